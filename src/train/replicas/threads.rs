//! Replicas that are threads of one process.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::Replicas;

/// One of several threads that each train a copy of a model: on a device of its own, or in tests.
///
/// Each thread needs a [`fork`](burn::module::Module::fork) of the model, or a model that it made itself. Burn's
/// autodiff keeps the operations of clones in one graph, and two threads that work on that can wait for each
/// other for ever.
///
/// Move the replica into its thread. Then it is dropped when the thread ends, and the others, which would wait
/// for it, panic instead.
///
/// Sums are formed in the order of the replicas, so that they have the same bits in every run. To share a CPU
/// among threads, use [`Workers`](crate::Workers), which need one copy of what trains, and one optimizer.
#[derive(Debug)]
pub struct ThreadReplica {
    index: usize,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    count: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The buffers that are to be added, by the replicas that brought them.
    brought: Vec<Option<Vec<f32>>>,
    /// The sum of the last ones, and how many sums there were. It stays until all have brought the next ones.
    sum: Arc<Vec<f32>>,
    sums: usize,
    /// A replica that ended.
    ended: Option<usize>,
}

impl ThreadReplica {
    /// `count` replicas, one for each thread.
    ///
    /// # Panics
    ///
    /// If `count` is 0.
    #[allow(clippy::new_ret_no_self, reason = "there is never a single one")]
    pub fn new(count: usize) -> Vec<Self> {
        assert!(count > 0, "at least one replica expected");
        let state = Mutex::new(State { brought: vec![None; count], ..State::default() });
        let shared = Arc::new(Shared { count, state, changed: Condvar::new() });
        (0..count).map(|index| Self { index, shared: shared.clone() }).collect()
    }

    /// No replica panics while it holds the lock with the state half changed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Adds the buffers, if all were brought.
    ///
    /// # Panics
    ///
    /// If they have different lengths.
    fn add(&mut self) -> bool {
        if self.brought.iter().any(Option::is_none) {
            return false;
        }
        let lengths: Vec<_> = self.brought.iter().flatten().map(Vec::len).collect();
        let equal = lengths.iter().all(|length| *length == lengths[0]);
        assert!(equal, "buffers of {lengths:?} numbers cannot be added");
        let mut buffers = self.brought.iter_mut().filter_map(Option::take);
        let mut sum = buffers.next().unwrap_or_default();
        for buffer in buffers {
            sum.iter_mut().zip(buffer).for_each(|(sum, number)| *sum += number);
        }
        self.sum = Arc::new(sum);
        self.sums += 1;
        true
    }
}

impl Replicas for ThreadReplica {
    fn count(&self) -> usize {
        self.shared.count
    }

    fn index(&self) -> usize {
        self.index
    }

    fn sum(&self, buffer: &mut [f32]) {
        let mut state = self.lock();
        let before = state.sums;
        state.brought[self.index] = Some(buffer.to_vec());
        if state.add() {
            self.shared.changed.notify_all();
        }
        while state.sums == before {
            if let Some(ended) = state.ended {
                drop(state);
                panic!("replica {ended} ended, and replica {} waits for its part", self.index);
            }
            let waited = self.shared.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        let sum = state.sum.clone();
        drop(state);
        buffer.copy_from_slice(&sum);
    }
}

impl Drop for ThreadReplica {
    /// Those that wait for this one would wait for ever.
    fn drop(&mut self) {
        self.lock().ended.get_or_insert(self.index);
        self.shared.changed.notify_all();
    }
}
