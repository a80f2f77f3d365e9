//! Replicas that are processes, on one machine or many, over MPI.

use std::{fmt, marker::PhantomData, thread};

use mpi::{
    Threading,
    collective::SystemOperation,
    environment::Universe,
    topology::SimpleCommunicator,
    traits::{Communicator, CommunicatorCollectives},
};

use super::Replicas;

/// The most numbers of one message. MPI counts them in 31 bits.
const MOST: usize = 1 << 28;

/// This process among those that `mpirun` started. It needs the feature `mpi`, and an MPI such as Open MPI.
///
/// A process that is started without `mpirun` is a single replica. If this is dropped by a panic, all processes
/// are ended. After an error, call [`abort`](Self::abort): to drop it waits for the others, which wait for this one.
pub struct MpiReplicas {
    world: SimpleCommunicator,
    /// It stays in the thread that started MPI.
    _thread: PhantomData<*const ()>,
    /// Ends MPI when it is dropped, which comes after all else.
    _universe: Universe,
}

impl MpiReplicas {
    /// Starts MPI. Call it once, in the main thread, before everything that takes long.
    ///
    /// # Panics
    ///
    /// If MPI was started before. If it cannot be started, MPI ends the process with a message.
    #[allow(
        clippy::new_without_default,
        reason = "a process has one, and does not get it by accident"
    )]
    pub fn new() -> Self {
        // Operations have threads of their own, which never call MPI.
        let started = mpi::initialize_with_threading(Threading::Funneled);
        let (universe, _) = started.expect("MPI was started before");
        Self { world: universe.world(), _thread: PhantomData, _universe: universe }
    }

    /// Ends all processes, this one with the exit code `code`. A replica that cannot go on must do so, since
    /// the others wait for it.
    pub fn abort(&self, code: i32) -> ! {
        self.world.abort(code)
    }
}

impl Replicas for MpiReplicas {
    fn count(&self) -> usize {
        self.world.size() as usize
    }

    fn index(&self) -> usize {
        self.world.rank() as usize
    }

    fn sum(&self, buffer: &mut [f32]) {
        for part in buffer.chunks_mut(MOST) {
            let own = part.to_vec();
            self.world.all_reduce_into(&own[..], part, SystemOperation::sum());
        }
    }
}

impl fmt::Debug for MpiReplicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (index, count) = (self.index(), self.count());
        f.debug_struct("MpiReplicas").field("index", &index).field("count", &count).finish()
    }
}

impl Drop for MpiReplicas {
    fn drop(&mut self) {
        if thread::panicking() {
            // Ending MPI in order would wait for the others.
            self.abort(101);
        }
    }
}
