//! Serves one base and many adapters over HTTP, in OpenAI's protocol.
//!
//! ```text
//! request ─► http: read and checked ─► queue ─► engine: one step for all texts at once ─► http: the answer
//!                      │                            │
//!                      └── sets: the adapters ──────┘
//! ```
//!
//! Start reading with [`engine`], which answers, and [`http`], which speaks.

mod engine;
mod http;
mod metrics;
mod protocol;
mod sets;
mod text;

use std::{fs, net::SocketAddr, path::Path, sync::Arc, thread};

use burn_lora_llm::{Context, Result, chat::Chat, llama::Llama, texts::Reading};

use crate::{args::ServeArgs, backend::Plain, base::Base};
use sha2::{Digest, Sha256};
use tokio::{net::TcpListener, runtime::Runtime, signal, sync::mpsc};

use engine::Engine;
use http::Server;
use metrics::Metrics;
use sets::Sets;

pub use sets::check;

/// Serves until the program is told to stop, and then ends the answers that were begun.
pub fn serve(args: &ServeArgs, llama: Llama<Plain>, chat: Chat, base: Base) -> Result<()> {
    let token = args.token_file.as_deref().map(read_token).transpose()?;
    let chat = Arc::new(chat);
    let sets = args.adapters.as_ref().map(|root| {
        let bytes = args.adapter_memory.saturating_mul(1 << 20);
        Sets::open(root, bytes, llama.clone(), base, chat.clone())
    });
    let sets = sets.transpose()?;
    let names = sets.as_ref().map_or(vec![], Sets::names);

    let metrics = Arc::new(Metrics::default());
    let (queue, jobs) = mpsc::channel(args.queue);
    let max_length = llama.max_positions.min(args.max_length);
    let vocab_size = llama.vocab_size();
    let limit = args.max_tokens;
    let prefix_bytes = args.prefix_memory.saturating_mul(1 << 20);
    let reading = Reading { exact: args.exact.exact, prefix_bytes };
    let engine = Engine::new(llama, reading, chat.clone(), args.batch, metrics.clone())?;
    let engine = thread::Builder::new().name("engine".to_owned()).spawn(move || engine.run(jobs));
    let engine = engine.context("starting a thread")?;

    let server = Server { chat, sets, queue, metrics, max_length, vocab_size, limit, token };
    let runtime = Runtime::new().context("starting the server")?;
    runtime.block_on(async {
        let address = SocketAddr::new(args.host, args.port);
        let listener = TcpListener::bind(address).await.context(address)?;
        let address = listener.local_addr().context(address)?;
        println!("Serving on http://{address}/v1 the models: base {}", names.join(" "));
        let app = http::routes(server);
        axum::serve(listener, app).with_graceful_shutdown(stopped()).await.context("serving")
    })?;
    // The queue is closed now, so the engine ends when nothing is left in it.
    drop(runtime);
    engine.join().map_err(|_| "the engine has panicked".to_owned())
}

/// Waits for the first request to end. At a second one the program ends at once, whatever is under way.
async fn stopped() {
    signalled().await;
    eprintln!("ending, when the answers that were begun are complete; once more to end at once");
    tokio::spawn(async {
        signalled().await;
        std::process::exit(130);
    });
}

/// Waits for Ctrl-C, or a request of the system to end.
async fn signalled() {
    #[cfg(unix)]
    if let Ok(mut terminate) = signal::unix::signal(signal::unix::SignalKind::terminate()) {
        tokio::select! {
            _ = signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        return;
    }
    let _ = signal::ctrl_c().await;
}

/// The hash of the token that clients must send. Comparing hashes takes no longer for a nearly right one.
fn read_token(path: &Path) -> Result<[u8; 32]> {
    let token = fs::read_to_string(path).context(path.display())?;
    match token.trim() {
        "" => Err(format!("{}: a token expected, and the file is empty", path.display())),
        token => Ok(Sha256::digest(token).into()),
    }
}
