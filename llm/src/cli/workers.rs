//! The argument for the number of workers.

use clap::Args;

use super::positive;

/// The number of threads that share a step.
#[derive(Args, Clone, Copy, Debug)]
pub struct WorkersArg {
    /// Number of threads that share a training step; by default as many as there are cores, and 1 on GPUs. The
    /// same number gives the same bits on the same machine
    #[arg(long, value_name = "N", value_parser = positive)]
    workers: Option<usize>,
}

impl WorkersArg {
    /// The number, or `cores`, what the backend makes use of.
    pub fn count(self, cores: usize) -> usize {
        self.workers.unwrap_or(cores)
    }
}
