//! Learns from reward alone: a policy gradient (REINFORCE, Williams 1992) with the reward to go, a
//! baseline for each time step, and the clipped steps and the entropy of PPO (Schulman et al. 2017), which
//! get more out of each episode.

use burn::{
    module::AutodiffModule,
    optim::{AdamConfig, GradientsParams, Optimizer},
    tensor::{
        Int, Tensor, TensorData,
        activation::{log_softmax, softmax},
    },
};
use burn_lora::Lora;
use common::backend::{Plain, Train};

use crate::{
    physics::{MAX_STEPS, Physics, State},
    policy::Policy,
};
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

/// A policy counts as trained with 95 % of the highest return.
pub const TARGET: f64 = 0.95 * MAX_STEPS as f64;
/// The episodes from which a policy learns at a time.
pub const BATCH: usize = 8;
/// The steps of the optimizer for each batch of episodes.
const PASSES: usize = 10;
/// How much a reward counts one step later.
const DISCOUNT: f64 = 0.99;
/// How far the ratio of an action's probabilities may move in the steps for one batch. It is more than the
/// usual 0.2: a policy that was trained before is sure of itself, and has to change its mind.
const CLIP: f64 = 0.5;
/// How much an uncertain policy is preferred. A policy that is sure of the wrong push never tries the other,
/// and so learns nothing.
const ENTROPY: f64 = 0.02;
/// The episodes whose mean return is a policy's.
const TEST_EPISODES: usize = 50;

/// What happened from a start to its end.
#[derive(Clone, Default)]
struct Episode {
    states: Vec<State>,
    /// Whether the push was to the right, for each state.
    actions: Vec<bool>,
}

/// Plays an episode from each start, all at the same time: each forward pass decides for every pole that
/// still stands. `choose` gets the probability of a push to the right.
fn play(
    policy: &Policy<Plain>,
    physics: &Physics,
    starts: Vec<State>,
    mut choose: impl FnMut(f32) -> bool,
) -> Vec<Episode> {
    let mut episodes = vec![Episode::default(); starts.len()];
    let mut standing: Vec<_> = starts.into_iter().enumerate().collect();
    for _ in 0..MAX_STEPS {
        let states: Vec<_> = standing.iter().map(|(_, state)| *state).collect();
        let probabilities = softmax(policy.logits(&states), 1).into_data();
        let of_right = probabilities.iter::<f32>().skip(1).step_by(2);
        for ((index, state), of_right) in standing.iter_mut().zip(of_right) {
            let right = choose(of_right);
            episodes[*index].states.push(*state);
            episodes[*index].actions.push(right);
            *state = physics.step(state, right);
        }
        standing.retain(|(_, state)| !state.failed());
        if standing.is_empty() {
            break;
        }
    }
    episodes
}

fn starts(count: usize, rng: &mut StdRng) -> Vec<State> {
    (0..count).map(|_| State::start(rng)).collect()
}

/// The mean return from random starts, with the push that the policy prefers in each step.
pub fn mean_return(policy: &Policy<Plain>, physics: &Physics, seed: u64) -> f64 {
    let starts = starts(TEST_EPISODES, &mut StdRng::seed_from_u64(seed));
    let episodes = play(policy, physics, starts, |of_right| of_right > 0.5);
    // Each step earns 1.
    let steps: usize = episodes.iter().map(|episode| episode.states.len()).sum();
    steps as f64 / TEST_EPISODES as f64
}

/// How much better each action turned out than what follows at its time on average, in units of the
/// standard deviation. An episode that has ended counts with 0.
fn advantages(episodes: &[Episode]) -> Vec<f32> {
    let to_go = |episode: &Episode, time: usize| {
        let left = episode.states.len().saturating_sub(time) as i32;
        (1.0 - DISCOUNT.powi(left)) / (1.0 - DISCOUNT)
    };
    let baseline = |time| {
        let sum = episodes.iter().map(|episode| to_go(episode, time)).sum::<f64>();
        sum / episodes.len() as f64
    };
    let baselines: Vec<_> = (0..MAX_STEPS).map(baseline).collect();
    let better = episodes.iter().flat_map(|episode| {
        let times = (0..episode.states.len()).zip(&baselines);
        times.map(|(time, baseline)| to_go(episode, time) - baseline)
    });
    let better: Vec<_> = better.collect();
    let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / better.len() as f64;
    let middle = mean(&mut better.iter().copied());
    let deviation = mean(&mut better.iter().map(|it| (it - middle).powi(2))).sqrt();
    // Where all episodes are alike, there is nothing to learn.
    better.iter().map(|it| ((it - middle) / (deviation + 1e-8)) as f32).collect()
}

/// How to train.
pub struct Recipe<'a> {
    pub physics: &'a Physics,
    pub learning_rate: f64,
    pub seed: u64,
    /// Where the training ends if the policy has not reached the target.
    pub max_episodes: usize,
}

/// What a training gave.
pub struct Trained {
    pub model: Lora<Plain, Policy<Plain>>,
    /// The return before the training, and after each batch of episodes.
    pub returns: Vec<f64>,
}

impl Trained {
    /// The number of episodes after which the target was reached.
    pub fn episodes(&self) -> Option<usize> {
        let batches = self.returns.iter().position(|&it| it >= TARGET)?;
        Some(batches * BATCH)
    }

    /// The return in the end.
    pub fn last(&self) -> f64 {
        self.returns.last().copied().unwrap_or(f64::NAN)
    }
}

/// Trains until the target is reached. Tells `progress` each time the number of episodes and the return.
pub fn train(
    recipe: &Recipe,
    mut model: Lora<Train, Policy<Train>>,
    mut progress: impl FnMut(usize, f64),
) -> Trained {
    let &Recipe { physics, learning_rate, seed, max_episodes } = recipe;
    let mut optimizer = AdamConfig::new().init();
    let mut rng = StdRng::seed_from_u64(seed);
    let watched = rng.next_u64();
    let mut returns = Vec::new();
    loop {
        let policy = model.valid();
        let now = mean_return(&policy, physics, watched);
        progress(returns.len() * BATCH, now);
        returns.push(now);
        if now >= TARGET || returns.len() * BATCH > max_episodes {
            return Trained { model: policy, returns };
        }
        let starts = starts(BATCH, &mut rng);
        let episodes = play(&policy, physics, starts, |of_right| rng.random::<f32>() < of_right);
        let batch = Batch::new(&policy, &episodes);
        for _ in 0..PASSES {
            let gradients = batch.loss(&model).backward();
            let gradients = GradientsParams::from_grads(gradients, &*model);
            model = optimizer.step(learning_rate, model, gradients);
        }
    }
}

/// All actions of some episodes.
struct Batch {
    states: Vec<State>,
    /// 1 for a push to the right: `[states, 1]`.
    actions: Tensor<Train, 2, Int>,
    advantages: Tensor<Train, 2>,
    /// The logarithms of the probabilities with which the actions were taken.
    before: Tensor<Train, 2>,
}

impl Batch {
    fn new(policy: &Policy<Plain>, episodes: &[Episode]) -> Self {
        let device = Default::default();
        let states: Vec<_> = episodes.iter().flat_map(|it| it.states.iter().copied()).collect();
        let actions = episodes.iter().flat_map(|it| it.actions.iter().map(|&it| i32::from(it)));
        let shape = [states.len(), 1];
        let actions = TensorData::new(actions.collect::<Vec<_>>(), shape);
        let actions = Tensor::<Train, 2, Int>::from_data(actions, &device);
        let advantages = TensorData::new(advantages(episodes), shape);
        let advantages = Tensor::<Train, 2>::from_data(advantages, &device);
        let before = log_softmax(policy.logits(&states), 1).gather(1, actions.clone().inner());
        Self { states, actions, advantages, before: Tensor::from_inner(before) }
    }

    /// The expected advantage, as far as the probabilities have not moved too much, and the entropy of the
    /// policy, with the sign of a loss.
    fn loss(&self, policy: &Policy<Train>) -> Tensor<Train, 1> {
        let all = log_softmax(policy.logits(&self.states), 1);
        let entropy = -(all.clone().exp() * all.clone()).sum_dim(1).mean();
        let now = all.gather(1, self.actions.clone());
        let ratio = (now - self.before.clone()).exp();
        let clipped = ratio.clone().clamp(1.0 - CLIP, 1.0 + CLIP);
        let [free, clipped] = [ratio, clipped].map(|ratio| ratio * self.advantages.clone());
        -free.min_pair(clipped).mean() - entropy * ENTROPY
    }
}
