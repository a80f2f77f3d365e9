//! Finds or downloads the pretrained encoder.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use hf_hub::{Cache, Repo, api::sync::ApiBuilder};

use crate::common::{Context, Result};

const MODEL: &str = "sentence-transformers/all-MiniLM-L6-v2";

/// The files that are needed.
const FILES: [&str; 3] = ["config.json", "tokenizer.json", "model.safetensors"];

/// The directory of the model: `given`, or the Hugging Face cache, after a download if needed.
pub fn find(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = given {
        let missing = FILES.iter().find(|file| !dir.join(file).is_file());
        return match missing {
            Some(file) => Err(format!("{}: there is no {file} in it", dir.display())),
            None => Ok(dir.to_owned()),
        };
    }
    let cache = Cache::from_env().repo(Repo::model(MODEL.to_owned()));
    let cached: Option<Vec<PathBuf>> = FILES.iter().map(|file| cache.get(file)).collect();
    let files = match cached {
        Some(files) => files,
        None => download().map_err(|reason| {
            format!(
                "{MODEL} is not available ({reason}). Get it with `pip install huggingface_hub` and \
                 `hf download {MODEL} {} --local-dir minilm`, and give `--model minilm`; or try the \
                 example without it, with `--generated`",
                FILES.join(" "),
            )
        })?,
    };
    Ok(files[0].parent().expect("it is a file").to_owned())
}

fn download() -> Result<Vec<PathBuf>> {
    // Without a network, hf-hub waits for a long time.
    reachable()?;
    println!("Downloading {MODEL}");
    let api = ApiBuilder::from_env().with_progress(true).build().context("huggingface.co")?;
    let repo = api.model(MODEL.to_owned());
    FILES.iter().map(|file| repo.get(file).context(file)).collect()
}

/// Checks that the hub answers within seconds.
fn reachable() -> Result<()> {
    let endpoint =
        std::env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".to_owned());
    let agent = ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_secs(10)))
        .http_status_as_error(false)
        .build()
        .new_agent();
    agent.head(&endpoint).call().map(drop).context(endpoint)
}
