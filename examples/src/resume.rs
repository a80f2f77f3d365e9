//! Resumes a training at the right position in its data.

use std::sync::{Arc, Mutex};

use burn::{
    data::dataloader::{DataLoader, DataLoaderIterator},
    tensor::backend::Backend,
};

/// A loader that starts with the order of the epoch after the first `done`. burn-train's checkpoints do
/// not hold the state of its random numbers.
pub struct Resumed<B: Backend, O> {
    loader: Arc<dyn DataLoader<B, O>>,
    /// The number of orders that are still to be skipped.
    done: Mutex<usize>,
}

impl<B: Backend, O> Resumed<B, O> {
    pub fn new(loader: Arc<dyn DataLoader<B, O>>, done: usize) -> Self {
        Self { loader, done: Mutex::new(done) }
    }

    /// The same position in another loader, whose random numbers start from the seed.
    fn with(&self, loader: Arc<dyn DataLoader<B, O>>) -> Arc<dyn DataLoader<B, O>>
    where
        O: 'static,
    {
        let done = *self.done.lock().expect("nobody panics with the lock");
        Arc::new(Self::new(loader, done))
    }
}

impl<B: Backend, O: 'static> DataLoader<B, O> for Resumed<B, O> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<O> + 'a> {
        let done = std::mem::take(&mut *self.done.lock().expect("nobody panics with the lock"));
        // A loader draws an order when it creates an iterator.
        (0..done).for_each(|_| drop(self.loader.iter()));
        self.loader.iter()
    }

    fn num_items(&self) -> usize {
        self.loader.num_items()
    }

    fn to_device(&self, device: &B::Device) -> Arc<dyn DataLoader<B, O>> {
        self.with(self.loader.to_device(device))
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B, O>> {
        self.with(self.loader.slice(start, end))
    }
}
