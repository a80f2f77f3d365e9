//! Continues texts, token by token.

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use rand::{RngExt, rngs::StdRng};

use crate::{chat::Chat, error::Result, llama::Llama};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// 0 chooses the token with the highest score. Higher temperatures give others a greater chance.
    pub temperature: f64,
    /// Only the most probable tokens have a chance, as few as have this probability together.
    pub top_p: f64,
}

/// Continues `prompt` by at most `limit` tokens, and shows each piece of text as soon as it is whole.
/// The result holds the new tokens.
///
/// # Errors
///
/// If the prompt has no token to go on from.
pub fn generate<B: Backend>(
    llama: &Llama<B>,
    chat: &Chat,
    prompt: &[u32],
    limit: usize,
    sampling: Sampling,
    rng: &mut StdRng,
    mut show: impl FnMut(&str),
) -> Result<Vec<u32>> {
    if prompt.is_empty() {
        return Err("the prompt is empty, and there is no token to go on from".to_owned());
    }
    let device = Default::default();
    let mut cache = llama.cache();
    let (mut next, mut new, mut shown) = (prompt.to_vec(), Vec::new(), 0);
    while new.len() < limit {
        let ids: Vec<_> = next.iter().map(|&id| id as i32).collect();
        let ids = Tensor::<B, 2, Int>::from_data(TensorData::new(ids, [1, next.len()]), &device);
        let scores: Vec<f64> = llama.read(ids, &mut cache).into_data().iter().collect();
        let id = sampling.choose(&scores, rng);
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

impl Sampling {
    /// The token that comes next.
    pub fn choose(&self, scores: &[f64], rng: &mut StdRng) -> u32 {
        let mut ids: Vec<_> = (0..scores.len()).collect();
        let by_score = |&a: &usize, &b: &usize| scores[b].total_cmp(&scores[a]);
        if self.temperature == 0.0 {
            return ids.into_iter().min_by(by_score).expect("there are tokens") as u32;
        }
        ids.sort_by(by_score);
        let weight = |id: usize| ((scores[id] - scores[ids[0]]) / self.temperature).exp();
        let all: f64 = ids.iter().map(|&id| weight(id)).sum();
        let mut kept = 0.0;
        let nucleus = ids.iter().take_while(|&&id| {
            let takes = kept < self.top_p * all;
            kept += weight(id);
            takes
        });
        let nucleus: Vec<_> = nucleus.copied().collect();
        let total: f64 = nucleus.iter().map(|&id| weight(id)).sum();
        let mut left = rng.random::<f64>() * total;
        for &id in &nucleus {
            left -= weight(id);
            if left <= 0.0 {
                return id as u32;
            }
        }
        ids[0] as u32
    }
}
