//! Going on where a training ended.

use std::sync::{Arc, Mutex};

use burn::{
    data::dataloader::{DataLoader, DataLoaderIterator},
    tensor::backend::Backend,
};

/// A loader that begins with the order of the epoch after the first `done`: burn-train's checkpoints
/// do not say how far its random numbers have come.
pub struct Resumed<B: Backend, O> {
    loader: Arc<dyn DataLoader<B, O>>,
    /// How many orders are still to be passed over.
    done: Mutex<usize>,
}

impl<B: Backend, O> Resumed<B, O> {
    pub fn new(loader: Arc<dyn DataLoader<B, O>>, done: usize) -> Self {
        Self { loader, done: Mutex::new(done) }
    }

    /// The same place in another loader, whose random numbers start anew.
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
        // An order is drawn when an iterator is made.
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
