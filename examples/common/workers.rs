//! The argument for the number of workers.

use clap::Args;

use super::{backend, positive};

#[derive(Args, Clone, Copy, Debug)]
pub struct WorkersArg {
    /// Number of threads that share a training step; by default as many as there are cores, and 1 on GPUs. The
    /// same number gives the same bits on the same machine
    #[arg(long, value_name = "N", value_parser = positive)]
    workers: Option<usize>,
}

impl WorkersArg {
    pub fn count(self) -> usize {
        self.workers.unwrap_or_else(backend::cores)
    }
}
