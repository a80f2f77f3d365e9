//! The processes that train together, as an argument, and what it costs them to do so.

use std::{cell::Cell, env, time::Instant};

use burn_lora::train::{Alone, Replicas};

use super::Result;
use clap::Args;

/// In which variables launchers of processes tell how many there are: those of Open MPI, MVAPICH, MPICH and Intel
/// MPI, and of Slurm. Slurm's are in an allocation, too, where nothing was launched: a process that was has a number.
const SIZES: [(&str, Option<&str>); 6] = [
    ("OMPI_COMM_WORLD_SIZE", None),
    ("MV2_COMM_WORLD_SIZE", None),
    ("PMI_SIZE", None),
    ("MPI_LOCALNRANKS", None),
    ("SLURM_STEP_NUM_TASKS", Some("SLURM_PROCID")),
    ("SLURM_NTASKS", Some("SLURM_PROCID")),
];

/// In which variables they tell a process its number, from 0.
const RANKS: [&str; 4] = ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK"];

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
    ///
    /// # Errors
    ///
    /// Those of `work`. Without `--mpi`, if a launcher has started several processes: each would train by itself,
    /// and write the same files.
    pub fn run(self, work: impl FnOnce(&Counted<'_>) -> Result<()>) -> Result<()> {
        if self.mpi {
            return with_mpi(work);
        }
        match launched(|name| env::var(name).ok()) {
            Some(variable) => Err(format!(
                "{variable} says that a launcher has started several processes, and each would train by itself \
                 and write the same files; add `--mpi`, so that they train together, or unset the variable if \
                 each has files of its own"
            )),
            None => work(&Counted::new(&Alone)),
        }
    }
}

/// The variable by which this process is one of several, with its value.
fn launched(variable: impl Fn(&str) -> Option<String>) -> Option<String> {
    let above = |name: &str, least: u64| {
        let value = variable(name)?;
        let number: u64 = value.trim().parse().ok()?;
        (number > least).then(|| format!("{name}={value}"))
    };
    let sizes = SIZES.iter().filter(|(_, with)| with.is_none_or(|it| variable(it).is_some()));
    let mut several = sizes.map(|(name, _)| above(name, 1));
    several.find_map(|it| it).or_else(|| RANKS.iter().find_map(|name| above(name, 0)))
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

#[cfg(test)]
mod tests {
    use super::launched;

    #[test]
    fn d1_launchers_of_several_processes_are_known_by_their_variables() {
        for (variables, expected) in [
            (
                &[("OMPI_COMM_WORLD_SIZE", "2"), ("OMPI_COMM_WORLD_RANK", "0")][..],
                "OMPI_COMM_WORLD_SIZE=2",
            ),
            (&[("PMI_SIZE", "4"), ("PMI_RANK", "0")], "PMI_SIZE=4"),
            (&[("MV2_COMM_WORLD_SIZE", "3")], "MV2_COMM_WORLD_SIZE=3"),
            (&[("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0")], "SLURM_NTASKS=8"),
            (&[("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_PROCID", "0")], "SLURM_STEP_NUM_TASKS=2"),
            (&[("PMIX_RANK", "1")], "PMIX_RANK=1"),
            // One process, or none that was launched.
            (&[("OMPI_COMM_WORLD_SIZE", "1"), ("OMPI_COMM_WORLD_RANK", "0")], ""),
            (&[("SLURM_NTASKS", "8")], ""),
            (&[("SLURM_NTASKS", "1"), ("SLURM_PROCID", "0")], ""),
            (&[("PMIX_RANK", "0")], ""),
            (&[("PMI_SIZE", "many")], ""),
            (&[], ""),
        ] {
            let variable = |name: &str| {
                let found = variables.iter().find(|(it, _)| *it == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            assert_eq!(launched(variable).unwrap_or_default(), expected, "{variables:?}");
        }
    }
}
