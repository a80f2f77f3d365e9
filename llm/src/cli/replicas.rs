//! The processes that train together, as an argument, and what it costs them to do so.

use std::{cell::Cell, time::Instant};

use burn_lora::train::{Alone, Replicas};

use super::Result;
use clap::Args;

/// Whether processes that `mpirun` started train together.
#[derive(Args, Clone, Copy, Debug)]
pub struct MpiArg {
    /// Train with all processes that `mpirun` started: each computes its part of every batch. Needs the feature
    /// `mpi`
    #[arg(long)]
    mpi: bool,
}

impl MpiArg {
    /// Runs `work` in each of the processes, or in this one alone. If it fails in one of them, all end: the
    /// others would wait for ever.
    pub fn run(self, work: impl FnOnce(&Counted<'_>) -> Result<()>) -> Result<()> {
        if !self.mpi {
            return work(&Counted::new(&Alone));
        }
        with_mpi(work)
    }
}

#[cfg(feature = "mpi")]
fn with_mpi(work: impl FnOnce(&Counted<'_>) -> Result<()>) -> Result<()> {
    let replicas = burn_lora::train::MpiReplicas::new();
    let result = work(&Counted::new(&replicas));
    match (result, replicas.count()) {
        (Err(error), 2..) => {
            // In one piece, for others may write, too.
            let message = format!("error: replica {}: {error}\n", replicas.index());
            eprint!("{message}");
            replicas.abort(1)
        }
        (result, _) => result,
    }
}

#[cfg(not(feature = "mpi"))]
fn with_mpi(_: impl FnOnce(&Counted<'_>) -> Result<()>) -> Result<()> {
    Err("this program was built without MPI: add `--features mpi`".to_owned())
}

/// Replicas that count what they send.
pub struct Counted<'a> {
    replicas: &'a dyn Replicas,
    sent: Cell<Sent>,
}

/// What a replica sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sent {
    /// The number of bytes.
    pub bytes: usize,
    /// The time of sending, and of waiting for the others.
    pub seconds: f64,
}

impl<'a> Counted<'a> {
    /// Replicas that have sent nothing yet.
    pub fn new(replicas: &'a dyn Replicas) -> Self {
        Self { replicas, sent: Cell::default() }
    }

    /// Whether this is the one that talks to the user, and writes files.
    pub fn is_first(&self) -> bool {
        self.index() == 0
    }

    /// Runs `work` in the first replica, and then in the others, which so find what it has written.
    pub fn first_then_others<T>(&self, work: impl FnOnce() -> T) -> T {
        if !self.is_first() {
            self.wait();
        }
        let result = work();
        if self.is_first() {
            self.wait();
        }
        result
    }

    /// The value of the first replica, to the bit.
    pub fn of_first(&self, value: f64) -> f64 {
        let bytes = if self.is_first() { value.to_le_bytes() } else { [0; 8] };
        let mut bytes = bytes.map(f32::from);
        self.sum(&mut bytes);
        f64::from_le_bytes(bytes.map(|it| it as u8))
    }

    /// What was sent so far.
    pub fn sent(&self) -> Sent {
        self.sent.get()
    }
}

impl Replicas for Counted<'_> {
    fn count(&self) -> usize {
        self.replicas.count()
    }

    fn index(&self) -> usize {
        self.replicas.index()
    }

    fn sum(&self, buffer: &mut [f32]) {
        let start = Instant::now();
        self.replicas.sum(buffer);
        let Sent { mut bytes, mut seconds } = self.sent.get();
        if self.count() > 1 {
            bytes += size_of_val(buffer);
            seconds += start.elapsed().as_secs_f64();
        }
        self.sent.set(Sent { bytes, seconds });
    }
}
