//! Continues texts, token by token.

use burn::tensor::backend::Backend;
use burn_lora::decode;
use rand::{RngExt, rngs::StdRng};

use crate::{chat::Chat, error::Result, llama::Llama, texts::Reader};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// 0 chooses the token with the highest score. Higher temperatures give others a greater chance.
    pub temperature: f64,
    /// Only the most probable tokens have a chance, as few as have this probability together.
    pub top_p: f64,
}

/// How a text is continued.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The greatest number of new tokens.
    pub limit: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// As in [`HostLlama::of`](crate::llama::HostLlama::of).
    pub exact: bool,
}

/// Continues `prompt`, and shows each piece of text as soon as it is whole. The result holds the new tokens.
///
/// # Errors
///
/// If the prompt has no token to go on from.
pub fn generate<B: Backend>(
    llama: &Llama<B>,
    chat: &Chat,
    prompt: &[u32],
    options: Options,
    rng: &mut StdRng,
    mut show: impl FnMut(&str),
) -> Result<Vec<u32>> {
    let Options { limit, sampling, exact } = options;
    if prompt.is_empty() {
        return Err("the prompt is empty, and there is no token to go on from".to_owned());
    }
    let mut reader = Reader::new(llama, exact);
    let (mut next, mut new, mut shown) = (prompt.to_vec(), Vec::new(), 0);
    while new.len() < limit {
        let id = sampling.choose(&reader.read(&next), rng);
        if chat.stops(id) {
            break;
        }
        new.push(id);
        next = vec![id];
        // A character may consist of several tokens. Until its last, it is decoded as U+FFFD.
        let text = chat.decode(&new)?;
        if !text.ends_with(char::REPLACEMENT_CHARACTER) {
            show(text.get(shown..).unwrap_or_default());
            shown = text.len();
        }
    }
    Ok(new)
}

/// Below this temperature no other token than the best has a chance that could be told from none.
const COLD: f64 = 1e-5;

impl Sampling {
    /// The token that comes next.
    ///
    /// # Panics
    ///
    /// If there are no scores, or the temperature is NaN.
    pub fn choose(&self, scores: &[f32], rng: &mut StdRng) -> u32 {
        let by_score = |&a: &usize, &b: &usize| scores[b].total_cmp(&scores[a]);
        if self.temperature < COLD {
            let best = (0..scores.len()).min_by(by_score);
            return best.expect("there are tokens") as u32;
        }
        let mut weights = scores.to_vec();
        let all = f64::from(decode::weigh(&mut weights, self.temperature as f32));
        let (mut ids, mut total): (Vec<usize>, _) = ((0..scores.len()).collect(), all);
        if self.top_p < 1.0 {
            (ids, total) = nucleus(ids, &weights, self.top_p * all);
        }
        let mut left = rng.random::<f64>() * total;
        for &id in &ids {
            left -= f64::from(weights[id]);
            if left <= 0.0 {
                return id as u32;
            }
        }
        // What rounding leaves.
        ids.into_iter().min_by(by_score).expect("there are tokens") as u32
    }
}

/// The heaviest tokens, as few as have this weight together, and their weight. Only as many are sorted as are needed.
fn nucleus(mut ids: Vec<usize>, weights: &[f32], wanted: f64) -> (Vec<usize>, f64) {
    let by_weight = |a: &usize, b: &usize| weights[*b].total_cmp(&weights[*a]);
    let (mut kept, mut total, mut step) = (0, 0.0, 64);
    // At least one, also where weights are no numbers.
    while kept < ids.len() && (kept == 0 || total < wanted) {
        let rest = &mut ids[kept..];
        step = rest.len().min(4 * step);
        if step < rest.len() {
            rest.select_nth_unstable_by(step, by_weight);
        }
        rest[..step].sort_unstable_by(by_weight);
        for &id in &rest[..step] {
            if kept > 0 && total >= wanted {
                break;
            }
            total += f64::from(weights[id]);
            kept += 1;
        }
    }
    ids.truncate(kept);
    (ids, total)
}
