//! Replicas that are threads of one process.

use std::{
    panic::resume_unwind,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use super::Replicas;

/// One of several threads that each train a copy of a model: on a device of its own, or in tests.
///
/// Each thread needs a [`fork`](burn::module::Module::fork) of the model, or a model that it made itself. Burn's
/// autodiff keeps the operations of clones in one graph, and two threads that work on that can wait for each
/// other for ever.
///
/// Sums are formed in the order of the replicas, so that they have the same bits in every run. To share a CPU
/// among threads, use [`Workers`](crate::train::Workers), which need one copy of what trains, and one optimizer.
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

/// With what a replica unwinds that would wait for ever for another one.
struct Ended(usize);

impl ThreadReplica {
    /// Runs `work` in a thread for each of `count` replicas, and returns what they give, in their order.
    ///
    /// # Panics
    ///
    /// If `count` is 0, if `work` panics, or if one replica ends while others wait for it.
    pub fn run<T: Send>(count: usize, work: impl Fn(Self) -> T + Sync) -> Vec<T> {
        assert!(count > 0, "at least one replica expected");
        let work = &work;
        let ends: Vec<_> = thread::scope(|scope| {
            let replicas = Self::all(count).into_iter();
            let threads: Vec<_> = replicas.map(|it| scope.spawn(|| work(it))).collect();
            threads.into_iter().map(|it| it.join()).collect()
        });
        let mut ended = None;
        let mut results = Vec::new();
        for (end, replica) in ends.into_iter().zip(0..) {
            match end.map_err(|panic| panic.downcast::<Ended>()) {
                Ok(result) => results.push(result),
                Err(Ok(other)) => ended = ended.or(Some((replica, other.0))),
                // What the others tell is only what came of it.
                Err(Err(panic)) => resume_unwind(panic),
            }
        }
        if let Some((replica, other)) = ended {
            panic!("replica {other} ended, and replica {replica} waits for it");
        }
        results
    }

    fn all(count: usize) -> Vec<Self> {
        let state = Mutex::new(State { brought: vec![None; count], ..State::default() });
        let shared = Arc::new(Shared { count, state, changed: Condvar::new() });
        (0..count).map(|index| Self { index, shared: shared.clone() }).collect()
    }

    /// A replica that panics while it holds the lock leaves the state as it was.
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
                resume_unwind(Box::new(Ended(ended)));
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
