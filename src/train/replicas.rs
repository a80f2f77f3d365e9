//! Training on several processes, or devices, at once.

mod fingerprint;
mod flat;
mod gather;
#[cfg(feature = "mpi")]
mod mpi;
mod threads;

use sha2::{Digest, Sha256};

use crate::error::LoraError;
use gather::gather;

pub use fingerprint::fingerprint;
#[cfg(feature = "mpi")]
pub use mpi::MpiReplicas;
pub use threads::ThreadReplica;

/// The copies of one model that train together, as one of them sees it: *data parallelism*. Each computes the
/// gradients of its own part of a batch, [all add them up](super::Backward::all_reduce), and all apply the same
/// step, so that they stay copies of each other.
///
/// Only what trains is sent. With adapters that is a few percent of the model, which is why LoRA can be
/// distributed over networks that are far too slow for full fine-tuning.
///
/// A kind of network is a type that implements the three required methods. In this crate these are threads
/// ([`ThreadReplica`]), MPI (`MpiReplicas`, behind the feature `mpi`), and [`Alone`].
///
/// ```
/// use burn::{
///     backend::{Autodiff, Flex},
///     module::Module,
///     nn::LinearConfig,
///     optim::{AdamConfig, Optimizer},
///     tensor::{Tensor, backend::Backend},
/// };
/// use burn_lora::{
///     LoraConfig, LoraError, LoraLinear, LoraModule,
///     train::{Backward, Replicas, ThreadReplica, fingerprint},
/// };
///
/// #[derive(Module, Debug)]
/// struct Net<B: Backend> {
///     fc: LoraLinear<B>,
/// }
///
/// # fn main() -> Result<(), LoraError> {
/// type B = Autodiff<Flex>;
/// let device = Default::default();
/// let base = Net::<B> { fc: LinearConfig::new(8, 3).init(&device).into() };
/// let base = base.attach(&LoraConfig::new(2, 4.0))?;
/// let batch = Tensor::<B, 2>::ones([10, 8], &device);
///
/// let trained = ThreadReplica::run(2, |replica| {
///     let mut model = base.clone().fork(&device);
///     replica.agree(&fingerprint(&model))?;
///     let mut optimizer = AdamConfig::new().init();
///     for _ in 0..3 {
///         // This replica's part of the batch, and of the batch's loss.
///         let part = batch.clone().chunk(replica.count(), 0).swap_remove(replica.index());
///         let loss = model.fc.forward(part).square().sum() / 10.0;
///         let step = Backward::new(&model, loss).all_reduce(&model, &replica);
///         model = optimizer.step(1e-3, model, step.gradients);
///     }
///     Ok::<_, LoraError>(model.adapters().fingerprint())
/// });
/// let trained = trained.into_iter().collect::<Result<Vec<_>, _>>()?;
/// assert_eq!(trained[0], trained[1]);
/// # Ok(())
/// # }
/// ```
///
/// Running statistics of batch norms that train are not gradients: each replica has those of its own data.
///
/// All replicas must make the same calls in the same order, [`wait`](Self::wait), [`any`](Self::any) and
/// [`agree`](Self::agree) included. They panic where [`sum`](Self::sum) does.
pub trait Replicas {
    /// The number of replicas.
    fn count(&self) -> usize;

    /// The number of this one, from 0. MPI calls it the rank.
    fn index(&self) -> usize;

    /// Replaces each number of `buffer` by its sum over all replicas, the same bits for all of them.
    ///
    /// It waits for the others, which must bring buffers of the same length.
    ///
    /// # Panics
    ///
    /// If another replica ended. MPI ends the whole job then.
    fn sum(&self, buffer: &mut [f32]);

    /// Waits until all replicas are here.
    fn wait(&self) {
        self.sum(&mut [0.0]);
    }

    /// Whether `it` is true for at least one replica.
    fn any(&self, it: bool) -> bool {
        let mut count = [f32::from(u8::from(it))];
        self.sum(&mut count);
        count[0] > 0.0
    }

    /// Checks that all replicas have the same lines of text, apart from the spaces around them, such as the
    /// [`fingerprint`] of the model, the learning rate, and the number of steps that were done. Call it before
    /// the first step: replicas that differ would train on without an error, to a wrong result.
    ///
    /// # Errors
    ///
    /// [`LoraError::ReplicasDiffer`] with the first difference, for all replicas.
    fn agree(&self, lines: &str) -> Result<(), LoraError> {
        let lines = lines.lines().map(str::trim).collect::<Vec<_>>().join("\n");
        let digests = gather(self, &Sha256::digest(&lines));
        if digests.iter().all(|digest| *digest == digests[0]) {
            return Ok(());
        }
        let texts = gather(self, lines.as_bytes());
        let texts: Vec<_> = texts.iter().map(|text| String::from_utf8_lossy(text)).collect();
        let replica = texts.iter().position(|text| *text != texts[0]).unwrap_or_default();
        let (mut first, mut other) = (texts[0].lines(), texts[replica].lines());
        let line = |line: Option<&str>| line.unwrap_or("nothing more").to_owned();
        loop {
            let (expected, found) = (first.next(), other.next());
            if expected != found || expected.is_none() {
                let (expected, found) = (line(expected), line(found));
                return Err(LoraError::ReplicasDiffer { replica, expected, found });
            }
        }
    }
}

/// A training without replicas.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Replicas for Alone {
    fn count(&self) -> usize {
        1
    }

    fn index(&self) -> usize {
        0
    }

    fn sum(&self, _buffer: &mut [f32]) {}
}
