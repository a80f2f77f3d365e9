//! Texts on slices.

use std::collections::BTreeMap;

use burn::tensor::backend::Backend;

use super::{Counts, Reading, Scores, TextId, prefixes::Prefixes};
use crate::llama::{HostLlama, HostSet, Llama, Step, Text};

/// Texts that begin with so many tokens in common do not read them at the same time.
const WORTH_WAITING: usize = 32;

/// Texts that each have a cache of their own.
#[derive(Debug)]
pub(super) struct HostTexts {
    llama: HostLlama,
    exact: bool,
    sets: BTreeMap<String, HostSet>,
    /// In the order in which they began.
    running: Vec<Running>,
    prefixes: Prefixes,
    pub counts: Counts,
}

#[derive(Debug)]
struct Running {
    id: TextId,
    set: Option<String>,
    text: Text,
    /// Whether its prompt is kept when it ends.
    is_kept: bool,
}

impl HostTexts {
    pub fn new(llama: HostLlama, Reading { exact, prefix_bytes }: Reading) -> Self {
        let (sets, running, counts) = Default::default();
        Self { llama, exact, sets, running, prefixes: Prefixes::new(prefix_bytes), counts }
    }

    /// Adds the adapters of a model.
    pub fn insert<B: Backend>(&mut self, name: &str, adapted: &Llama<B>) {
        let set = HostSet::of(adapted, self.exact).expect("a set with magnitudes is not mixable");
        self.sets.insert(name.to_owned(), set);
    }

    pub fn remove(&mut self, set: &str) {
        self.sets.remove(set);
    }

    pub fn forget(&mut self, set: &str) {
        self.prefixes.forget(set);
        let texts = self.running.iter_mut().filter(|it| it.set.as_deref() == Some(set));
        texts.for_each(|it| it.is_kept = false);
    }

    pub fn begin(&mut self, id: TextId, set: Option<String>, prompt: Vec<u32>) {
        let text = self.llama.text(prompt);
        self.running.push(Running { id, set, text, is_kept: true });
    }

    pub fn push(&mut self, id: TextId, token: u32) {
        let running = self.running.iter_mut().find(|it| it.id == id);
        let text = &mut running.expect("the text has begun").text;
        assert!(text.is_answered() && text.unread() == 0, "the text was not read to its end");
        text.push(token);
    }

    pub fn end(&mut self, id: TextId) {
        if let Some(place) = self.running.iter().position(|it| it.id == id) {
            let Running { set, text, is_kept, .. } = self.running.remove(place);
            if is_kept && self.llama.shares_prefixes() {
                self.prefixes.keep(set, text);
            }
        }
    }

    /// Drops all texts. Nothing of them is kept: a step may have ended in its middle.
    pub fn clear(&mut self) {
        self.running.clear();
    }

    pub fn uses(&self, set: &str) -> bool {
        self.running.iter().any(|it| it.set.as_deref() == Some(set))
    }

    pub fn step(&mut self, prompt_tokens: usize) -> Scores {
        let tokens = self.shares(prompt_tokens);
        let Self { llama, sets, running, .. } = self;
        let (mut ids, mut steps) = (Vec::new(), Vec::new());
        for (it, tokens) in running.iter_mut().zip(tokens).filter(|(_, tokens)| *tokens > 0) {
            let set = it.set.as_ref().map(|set| &sets[set]);
            ids.push(it.id);
            steps.push(Step { text: &mut it.text, set, tokens });
        }
        if steps.is_empty() {
            return Vec::new();
        }
        let scores = llama.read(steps).into_iter().zip(ids);
        scores.filter_map(|(scores, id)| Some((id, scores?.to_vec()))).collect()
    }

    /// How many tokens of each text are read in a step.
    fn shares(&mut self, mut room: usize) -> Vec<usize> {
        let mut tokens = vec![0; self.running.len()];
        for place in 0..self.running.len() {
            if self.running[place].text.is_answered() {
                // The token that was pushed, if there is one.
                tokens[place] = self.running[place].text.unread();
                continue;
            }
            if room == 0 {
                continue;
            }
            if self.llama.shares_prefixes() && !self.running[place].text.has_computed() {
                self.take_over(place);
                let own = &self.running[place];
                let waits = self.running[..place].iter().zip(&tokens).any(|(other, tokens)| {
                    let common = || own.text.common_ids(&other.text);
                    let is_read = *tokens > 0 && !other.text.is_answered() && other.set == own.set;
                    is_read && common() >= own.text.read() + WORTH_WAITING
                });
                // Another one is reading what this one begins with.
                if waits {
                    continue;
                }
            }
            tokens[place] = room.min(self.running[place].text.unread());
            room -= tokens[place];
            self.counts.read += tokens[place];
        }
        tokens
    }

    /// Takes over what others have read of what a text begins with.
    fn take_over(&mut self, place: usize) {
        let mut own = self.running.remove(place);
        let others = self.running.iter().filter(|it| it.set == own.set).map(|it| &it.text);
        let others = others.chain(self.prefixes.of(own.set.as_deref()));
        let longest = others.max_by_key(|it| own.text.common(it));
        let before = own.text.read();
        if let Some(longest) = longest.filter(|it| own.text.common(it) > before) {
            self.llama.take_over(&mut own.text, longest);
            self.counts.reused += own.text.read() - before;
            self.prefixes.used(own.set.as_deref(), &own.text);
        }
        self.running.insert(place, own);
    }
}
