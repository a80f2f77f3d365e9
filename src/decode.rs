//! Layers on slices, for programs that answer token by token.
//!
//! A step of an answer takes one row, or a few, through every layer of a decoder. That is too little arithmetic for
//! tensors: their memory is asked for and given back, threads wait for each operation, and what was computed before is
//! copied to stand beside what is new. The functions here take and give slices, of memory that the caller uses again.
//!
//! ```
//! use burn::{backend::Flex, nn::LinearConfig};
//! use burn_lora::{
//!     Init, LoraConfig, LoraLinear,
//!     decode::{self, Inputs, Linear, Update},
//! };
//!
//! let config = LoraConfig::peft(4, 8.0).with_init(Init::RandomBoth);
//! let layer: LoraLinear<Flex> = LinearConfig::new(64, 32).init(&Default::default()).into();
//! let adapted = config.init(layer.base.clone());
//!
//! // The base, and what an adapter adds to it.
//! let linear = Linear::of(&layer, false).expect("the backend computes on the CPU");
//! let adapter = adapted.adapter().expect("it was put on");
//! let update = Update::of(adapter, false).expect("it is a low-rank update");
//!
//! // Two rows, of which the second has the adapter.
//! let mut x = Inputs::new(2, 64);
//! x.numbers_mut().fill(0.5);
//! x.prepare(2, false);
//! let mut y = vec![0.0; 2 * 32];
//! let updates = [None, Some(&update)];
//! decode::forward([&linear], &x, |_, row| updates[row], [&mut y]);
//! ```
//!
//! Rows are of two kinds. The first are *few*: tokens of answers, for which each weight is read once for all of them. The
//! others are *many*: prompts that are read. They are multiplied in `f32`, or in [bf16](crate::nn::Precision) where the layer
//! is set to that. The first may be multiplied in 8 bits where weights are held in at most 8 bits ([`Inputs::prepare`]).
//! Whatever other rows there are, the result of a row is the same, to the bit.
//!
//! All of this needs one of the features `flex` and `ndarray`, and their backends.

use std::sync::{LazyLock, Mutex};

use burn_lora_kernels::Team;

mod attention;
mod functions;
mod inputs;
mod linear;
mod table;
mod update;

pub use attention::{Heads, Reading, attend};
pub use functions::{Gate, add_scaled, cap, gate, norm, rotate, weigh};
pub use inputs::Inputs;
pub use linear::{Linear, forward};
pub use table::{Table, TableUpdate};
pub use update::Update;

/// Does the work on a thread of the pool that products in bf16 are shared in. From another thread, each of them would have to
/// wake the pool.
pub fn in_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| work())
}

/// The threads that share products of few rows: as many as the pool has.
static TEAM: LazyLock<Team> = LazyLock::new(|| Team::new(rayon::current_num_threads() - 1));

/// Does all jobs. Those that take so many multiplications together that it is worth it are shared among threads.
fn share<J: Send>(jobs: Vec<J>, work: usize, run: impl Fn(J) + Sync) {
    /// To wait for another thread takes about as long.
    const WORTH_THREADS: usize = 1 << 15;

    if work < WORTH_THREADS {
        return jobs.into_iter().for_each(run);
    }
    let jobs: Vec<_> = jobs.into_iter().map(|job| Mutex::new(Some(job))).collect();
    TEAM.run(jobs.len(), |index| {
        let job = jobs[index].lock().expect("nobody else has it").take();
        run(job.expect("it is taken once"));
    });
}
