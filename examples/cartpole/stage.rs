//! Trains one policy for each seed, all at the same time.

use std::{
    sync::{Mutex, PoisonError},
    thread,
};

use burn_lora::Lora;
use common::{
    backend::{self, Train},
    cli::live::{Live, Position},
};

use crate::{
    physics::Physics,
    policy::Policy,
    reinforce::{Recipe, Trained, train},
    report::{episodes, median},
};

/// A training that is repeated with several seeds.
pub struct Stage<'a> {
    pub name: &'a str,
    pub physics: &'a Physics,
    pub learning_rate: f64,
    pub max_episodes: usize,
    pub seeds: &'a [u64],
}

impl Stage<'_> {
    /// Trains the models, one for each seed. The result does not depend on the number of threads.
    pub fn train(&self, models: Vec<Lora<Train, Policy<Train>>>) -> Vec<Trained> {
        let part = format!("{} seeds", self.seeds.len());
        let live = Mutex::new(Live::new(self.name, &part));
        // The share of each training that is done.
        let shares = Mutex::new(vec![0.0; models.len()]);
        let jobs = models.into_iter().zip(self.seeds);
        let trained = in_parallel(jobs.collect(), |index, (model, &seed)| {
            let &Self { physics, learning_rate, max_episodes, .. } = self;
            let recipe = Recipe { physics, learning_rate, seed, max_episodes };
            let show = |share: f64, now: f64| {
                let mut shares = locked(&shares);
                shares[index] = share;
                let done = shares.iter().sum::<f64>() / shares.len() as f64;
                let position = Position { part: part.clone(), of_part: done, of_all: done };
                locked(&live).show(&position, format_args!("return {now:3.0}"));
            };
            let trained = train(&recipe, model, |episodes, now| {
                show(episodes as f64 / max_episodes as f64, now);
            });
            show(1.0, trained.last());
            trained
        });
        let count = median(trained.iter().map(Trained::episodes));
        let last = median(trained.iter().map(|it| Some(it.last()))).unwrap_or(f64::NAN);
        locked(&live).line(format_args!(
            "{part}  return {last:3.0} after {} episodes (medians)",
            episodes(count, self.max_episodes),
        ));
        trained
    }
}

/// Does the work for each item, on all cores.
fn in_parallel<I: Send, O: Send>(items: Vec<I>, work: impl Fn(usize, I) -> O + Sync) -> Vec<O> {
    let queue = Mutex::new(items.into_iter().enumerate());
    let done = Mutex::new(Vec::new());
    let take = || locked(&queue).next();
    thread::scope(|scope| {
        for _ in 0..backend::cores() {
            scope.spawn(|| {
                while let Some((index, item)) = take() {
                    let output = work(index, item);
                    locked(&done).push((index, output));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, output)| output).collect()
}

/// A thread that panics ends the program when the scope does.
fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
