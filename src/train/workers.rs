//! Training steps that are shared among threads.

use std::{
    num::NonZero,
    panic::resume_unwind,
    sync::{Mutex, PoisonError},
    thread,
};

use burn::{module::AutodiffModule, tensor::backend::AutodiffBackend};

use super::Backward;
use crate::traverse::statistics;

/// Threads that share the forward and the backward pass of a training step. For CPU backends.
///
/// A backend uses all cores in some of its operations, above all in products of matrices, and one core in the
/// others. Workers use all cores in all of them: each has its part of the batch, and one core. They share the
/// weights, and hold their own activations. Their gradients are added, which is little work as long as only
/// adapters train.
///
/// ```
/// use burn::{
///     backend::{Autodiff, Flex},
///     module::Module,
///     nn::LinearConfig,
///     tensor::{Tensor, backend::Backend},
/// };
/// use burn_lora::{LoraConfig, LoraLinear, LoraModule, train::{Backward, Workers}};
///
/// #[derive(Module, Debug)]
/// struct Net<B: Backend> {
///     fc: LoraLinear<B>,
/// }
///
/// # fn main() -> Result<(), burn_lora::LoraError> {
/// type B = Autodiff<Flex>;
/// let device = Default::default();
/// let base = Net::<B> { fc: LinearConfig::new(8, 3).init(&device).into() };
/// let model = base.attach(&LoraConfig::new(2, 4.0))?;
/// let batch = Tensor::<B, 2>::ones([10, 8], &device);
///
/// let workers = Workers::new(2);
/// // Two parts of the batch, whose losses add up to the loss of the whole batch.
/// let step = workers.backward(&model, batch.chunk(2, 0), |model, part| {
///     Backward::new(model, model.fc.forward(part).square().sum() / 10.0)
/// });
/// // optimizer.step(rate, model, step.gradients)
/// # assert!(step.loss > 0.0 && step.gradients.len() == 2);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Workers {
    pools: Vec<Pool>,
}

impl Workers {
    /// `count` workers with one core each. A single one has all cores.
    ///
    /// # Panics
    ///
    /// If `count` is 0, or the threads cannot be started.
    pub fn new(count: usize) -> Self {
        assert!(count > 0, "at least one worker expected");
        // As many threads as rayon has by default.
        let threads = if count == 1 { 0 } else { 1 };
        Self { pools: (0..count).map(|_| Pool::new(threads)).collect() }
    }

    /// As many workers as there are cores.
    ///
    /// # Panics
    ///
    /// If the threads cannot be started.
    pub fn per_core() -> Self {
        Self::new(thread::available_parallelism().map_or(1, NonZero::get))
    }

    /// The number of workers.
    pub fn count(&self) -> usize {
        self.pools.len()
    }

    /// Calls `pass` for each part of a batch, and adds up what it gives. Each call has a fork of `model`, so
    /// that the graphs of two threads have nothing in common.
    ///
    /// The results are added in the order of the parts, so that the same parts give the same bits in every
    /// run, unless the model draws random numbers: dropout takes them from one source for all threads. The
    /// loss of a part should be its share of the batch's loss, and not the mean of the part. Parts of about
    /// the same size keep all workers busy. If there are more parts than workers, worker `i` of `n` computes
    /// the parts `i`, `i + n` and so on. A single part is computed by the calling thread if there are several workers.
    ///
    /// Running statistics of [`nn::BatchNorm`](crate::nn::BatchNorm)s that train move to the mean of where the
    /// workers moved them.
    ///
    /// # Panics
    ///
    /// If `pass` panics, or the model has no parameters.
    pub fn backward<B, M, P>(
        &self,
        model: &M,
        parts: Vec<P>,
        pass: impl Fn(&M, P) -> Backward + Sync,
    ) -> Backward
    where
        B: AutodiffBackend,
        M: AutodiffModule<B>,
        P: Send,
    {
        // A thread of another pool would take up other work of that pool while it waits for this one.
        let in_pool = rayon::current_thread_index().is_some();
        if (self.count() > 1 && parts.len() < 2) || (self.count() == 1 && in_pool) {
            return Backward::sum(model, parts.into_iter().map(|part| pass(model, part)));
        }
        // This also draws weights that were not drawn yet. Otherwise each fork would draw its own.
        let device = model.devices().first().expect("a model with parameters expected").clone();
        if let [pool] = &self.pools[..] {
            let fork = model.clone().fork(&device);
            let (sum, fork) = pool.run(|| {
                let sum = Backward::sum(&fork, parts.into_iter().map(|part| pass(&fork, part)));
                // Statistics that are shared wait for the thread that moved them.
                statistics::sync(&fork);
                (sum, fork)
            });
            statistics::follow::<B, M>(model, &[&fork]);
            return sum;
        }
        let count = parts.len();
        let mut shares: Vec<Vec<P>> = self.pools.iter().map(|_| Vec::new()).collect();
        for (i, part) in parts.into_iter().enumerate() {
            shares[i % self.pools.len()].push(part);
        }
        let results: Vec<Vec<Backward>> = thread::scope(|scope| {
            let pass = &pass;
            let threads: Vec<_> = self
                .pools
                .iter()
                .zip(shares)
                .map(|(pool, parts)| {
                    let fork = model.clone().fork(&device);
                    let work = move || {
                        let done = parts.into_iter().map(|part| pass(&fork, part)).collect();
                        (done, fork)
                    };
                    scope.spawn(|| pool.run(work))
                })
                .collect();
            let (results, forks): (_, Vec<M>) = threads
                .into_iter()
                .map(|it| it.join().unwrap_or_else(|panic| resume_unwind(panic)))
                .unzip();
            statistics::follow::<B, M>(model, &forks.iter().collect::<Vec<_>>());
            results
        });
        let mut results: Vec<_> = results.into_iter().map(Vec::into_iter).collect();
        let workers = results.len();
        let in_order = (0..count).filter_map(|part| results[part % workers].next());
        Backward::sum(model, in_order)
    }
}

/// The cores that a worker's operations use.
///
/// The whole pass runs on a thread of the pool. From outside, each operation would wake a thread and wait for it.
#[derive(Debug)]
struct Pool {
    pool: rayon::ThreadPool,
    /// Held by the pass that runs. A thread of the pool that waits for a part of its pass could otherwise take up
    /// another pass, and wait for itself.
    running: Mutex<()>,
}

impl Pool {
    /// A pool of so many threads; of as many as rayon has by default, if it is 0.
    fn new(threads: usize) -> Self {
        // Deep models need more than a thread has by default.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).stack_size(16 << 20);
        Self { pool: pool.build().expect("threads can be started"), running: Mutex::new(()) }
    }

    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        // A pass that panicked left nothing behind.
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        self.pool.install(work)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_has_one_core() {
        let pool = Pool::new(1);
        assert_eq!(pool.run(rayon::current_num_threads), 1);
        let caller = thread::current().id();
        assert!(pool.run(|| thread::current().id()) != caller);
    }
}
