//! A text that is read and continued.

use std::ops::Range;

/// The tokens of a text, and the keys and values of those that were read.
#[derive(Clone, Debug)]
pub struct Text {
    ids: Vec<u32>,
    /// How many of them were read as a prompt, or will be.
    prompt: usize,
    read: usize,
    /// Whether tokens were read that were not taken over.
    has_computed: bool,
    /// Whether it was longer than usual when it was read.
    is_long: bool,
    /// The keys and the values of each layer, token by token. There is room for the next ones.
    layers: Vec<[Vec<f32>; 2]>,
}

/// The least number of tokens for which a cache gets room at once.
const ROOM: usize = 64;

/// A layer's cache gets room for all that is known of the text once so many tokens for each layer before it are read. The
/// system clears new memory slowly: for all layers in one step, it would take longer than the step.
const SPREAD: usize = 32;

impl Text {
    pub(super) fn new(prompt: Vec<u32>, layers: usize) -> Self {
        let layers = (0..layers).map(|_| [const { Vec::new() }; 2]).collect();
        Self {
            prompt: prompt.len(),
            ids: prompt,
            read: 0,
            has_computed: false,
            is_long: false,
            layers,
        }
    }

    /// All tokens.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// How many tokens were read.
    pub fn read(&self) -> usize {
        self.read
    }

    /// How many tokens were not.
    pub fn unread(&self) -> usize {
        self.ids.len() - self.read
    }

    /// Adds a token of the answer.
    pub fn push(&mut self, id: u32) {
        self.ids.push(id);
    }

    /// The bytes of its keys and values.
    pub fn num_bytes(&self) -> usize {
        self.layers.iter().flatten().map(|it| size_of::<f32>() * it.capacity()).sum()
    }

    /// How many tokens another text, with the same adapters, has read of the prompt that both begin with. The last token does
    /// not count, because its scores are wanted, nor does what the other one has read of its answer, because that was not
    /// computed as prompts are.
    pub fn common(&self, other: &Self) -> usize {
        self.common_ids(other).min(other.read)
    }

    /// How many tokens both begin with, but for the last one here.
    pub fn common_ids(&self, other: &Self) -> usize {
        let wanted = &self.ids[..self.ids.len().saturating_sub(1)];
        wanted
            .iter()
            .zip(&other.ids[..other.prompt])
            .take_while(|(own, other)| own == other)
            .count()
    }

    /// Whether tokens were read that were not taken over from another text.
    pub fn has_computed(&self) -> bool {
        self.has_computed
    }

    /// Whether the prompt was read, so that only tokens of the answer are to come.
    pub fn is_answered(&self) -> bool {
        self.read >= self.prompt
    }

    /// Takes over the keys and values of the first tokens, which are [common](Self::common) with another text.
    pub(super) fn take_over(&mut self, other: &Self, tokens: usize) {
        if tokens <= self.read {
            return;
        }
        let read = other.read;
        for (own, other) in self.layers.iter_mut().flatten().zip(other.layers.iter().flatten()) {
            own.clear();
            own.extend_from_slice(&other[..other.len() / read * tokens]);
        }
        self.read = tokens;
    }

    /// Gives back the room for more tokens, and forgets what was read of the answer.
    pub(crate) fn shrink(&mut self) {
        let kept = self.read.min(self.prompt);
        for numbers in self.layers.iter_mut().flatten() {
            numbers.truncate(numbers.len() / self.read.max(1) * kept);
            numbers.shrink_to_fit();
        }
        self.ids.truncate(kept);
        self.ids.shrink_to_fit();
        (self.read, self.prompt) = (kept, kept);
    }

    /// Whether what is to be read is a token of the answer.
    pub(super) fn is_single(&self) -> bool {
        self.unread() == 1 && self.read >= self.prompt
    }

    /// The tokens that come next.
    pub(super) fn next(&self, count: usize) -> Range<usize> {
        self.read..self.read + count
    }

    /// The keys and the values of a layer, with those of the next tokens added, of which each has `width` numbers.
    pub(super) fn add(&mut self, layer: usize, width: usize, new: [&[f32]; 2]) -> [&[f32]; 2] {
        let is_early = self.read < layer * SPREAD;
        let known = self.unread() * width;
        for (all, new) in self.layers[layer].iter_mut().zip(new) {
            if all.capacity() - all.len() < new.len() {
                let room = if is_early { new.len() } else { known.max(all.len() / 4) };
                all.reserve_exact(room + (ROOM + 4 * layer) * width);
            }
            all.extend_from_slice(new);
        }
        let [keys, values] = &self.layers[layer];
        [keys, values]
    }

    /// So many tokens were read by all layers.
    pub(super) fn finish(&mut self, count: usize) {
        self.read += count;
        self.has_computed = true;
    }

    /// Begins again, if what is to be read makes the text longer than usual: all of it is then turned otherwise.
    pub(super) fn begin_again_beyond(&mut self, usual: usize) {
        let is_long = self.ids.len() > usual;
        if self.read > 0 && is_long && !self.is_long {
            self.layers.iter_mut().flatten().for_each(Vec::clear);
            (self.read, self.prompt) = (0, self.ids.len());
        }
        self.is_long = is_long;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYERS: usize = 30;

    /// Reads tokens, and counts the layers whose caches were moved.
    fn moved_by(text: &mut Text, tokens: usize) -> usize {
        let capacities =
            |text: &Text| text.layers.iter().map(|[keys, _]| keys.capacity()).collect::<Vec<_>>();
        let before = capacities(text);
        for layer in 0..LAYERS {
            let new = vec![layer as f32; 2 * tokens];
            let [keys, values] = text.add(layer, 2, [&new, &new]);
            assert_eq!([keys.len(), values.len()], [2 * (text.read + tokens); 2]);
        }
        text.finish(tokens);
        before.iter().zip(capacities(text)).filter(|(before, now)| **before != *now).count()
    }

    /// To move a cache takes time, and somebody waits for each step.
    #[test]
    fn few_layers_are_moved_in_one_step() {
        let mut text = Text::new(vec![0; 2000], LAYERS);
        assert_eq!(moved_by(&mut text, 16), LAYERS);
        for _ in 0..124 {
            let moved = moved_by(&mut text, 16);
            assert!(moved <= LAYERS / 3, "{moved} layers at {}", text.read());
        }
        assert_eq!(text.unread(), 0);
        for _ in 0..3000 {
            text.push(0);
            let moved = moved_by(&mut text, 1);
            assert!(moved <= 3, "{moved} layers at {}", text.read());
        }
        // No more than a quarter is empty.
        assert!(text.num_bytes() <= 5000 * LAYERS * 2 * 2 * 4 * 5 / 4 + LAYERS * 200 * 16);
    }
}
