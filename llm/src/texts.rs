//! Texts that are read and continued at the same time, each with adapters of its own.
//!
//! ```text
//! prompt ─► begin ─► step: a part of the prompt ─► … ─► step: the scores of the first new token
//!                                                                      │
//!            ┌──────────────── push: the token that was chosen ◄───────┘
//!            └─► step: the scores of the next token ─► …                              end
//! ```
//!
//! On `flex` and `ndarray` a step is one pass of a [`HostLlama`], which reads parts of prompts beside
//! the tokens of answers. On other backends it is passes of a [`Llama`] with a [`Cache`].

mod host;
mod prefixes;
mod tensors;

use burn::tensor::backend::Backend;
use burn_lora::{LoraAdapters, LoraError, LoraModule, serve::MultiLora};

use crate::llama::{Cache, HostLlama, Llama, Step, Text};
use host::HostTexts;
use tensors::TensorTexts;

/// The tokens of prompts that are read at once if nobody waits for others.
pub const PART: usize = 512;

/// The number of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TextId(u64);

/// The scores of the token after each text that was read to its end.
pub type Scores = Vec<(TextId, Vec<f32>)>;

/// How texts are read.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// As in [`HostLlama::of`].
    pub exact: bool,
    /// The bytes of keys and values that are kept of texts that have ended, for others that begin in the same way.
    pub prefix_bytes: usize,
}

/// Texts with adapters of one base, which are read and continued at the same time.
#[derive(Debug)]
pub struct Texts<B: Backend> {
    models: MultiLora<B, Llama<B>>,
    way: Way<B>,
    next: u64,
}

#[derive(Debug)]
enum Way<B: Backend> {
    Host(Box<HostTexts>),
    Tensors(Box<TensorTexts<B>>),
}

impl<B: Backend> Texts<B> {
    /// No texts yet.
    ///
    /// # Errors
    ///
    /// As [`MultiLora::new`].
    pub fn new(llama: Llama<B>, reading: Reading) -> Result<Self, LoraError> {
        let way = match HostLlama::of(&llama, reading.exact) {
            Some(llama) => Way::Host(Box::new(HostTexts::new(llama, reading))),
            None => Way::Tensors(Box::default()),
        };
        Ok(Self { models: MultiLora::new(llama)?, way, next: 0 })
    }

    /// Adds a set of adapters, if there is none of this name. It stays for as long as texts use it.
    ///
    /// # Errors
    ///
    /// As [`MultiLora::insert`].
    pub fn insert(&mut self, name: &str, set: &LoraAdapters<B>) -> Result<(), LoraError> {
        if self.models.names().any(|it| it == name) {
            return Ok(());
        }
        // First, so that a set that fails is in neither of the two.
        let adapted = match self.way {
            Way::Host(_) => Some(self.models.base().switch(set)?),
            Way::Tensors(_) => None,
        };
        self.models.insert(name, set)?;
        if let (Way::Host(texts), Some(adapted)) = (&mut self.way, adapted) {
            texts.insert(name, &*adapted);
        }
        Ok(())
    }

    /// Forgets what was kept of texts with this set, because another one takes its place.
    pub fn forget(&mut self, set: &str) {
        if let Way::Host(texts) = &mut self.way {
            texts.forget(set);
        }
    }

    /// Begins a text. Nothing is read until the next [`step`](Self::step).
    ///
    /// # Panics
    ///
    /// If the prompt is empty, or the set was not [inserted](Self::insert).
    pub fn begin(&mut self, set: Option<&str>, prompt: Vec<u32>) -> TextId {
        assert!(!prompt.is_empty(), "a prompt must have a token to go on from");
        let known = set.is_none_or(|set| self.models.names().any(|it| it == set));
        assert!(known, "the set {set:?} was not inserted");
        let (id, set) = (TextId(self.next), set.map(str::to_owned));
        self.next += 1;
        match &mut self.way {
            Way::Host(texts) => texts.begin(id, set, prompt),
            Way::Tensors(texts) => texts.begin(id, set, prompt),
        }
        id
    }

    /// Adds a token to a text, whose last scores it was chosen from.
    ///
    /// # Panics
    ///
    /// If there is no such text, or its prompt was not read.
    pub fn push(&mut self, text: TextId, token: u32) {
        match &mut self.way {
            Way::Host(texts) => texts.push(text, token),
            Way::Tensors(texts) => texts.push(text, token),
        }
    }

    /// Ends a text.
    pub fn end(&mut self, text: TextId) {
        match &mut self.way {
            Way::Host(texts) => texts.end(text),
            Way::Tensors(texts) => texts.end(text),
        }
        self.drop_unused();
    }

    /// Drops the sets that no text uses.
    fn drop_unused(&mut self) {
        let unused: Vec<_> =
            self.models.names().filter(|it| !self.uses(it)).map(str::to_owned).collect();
        for set in unused {
            self.models.remove(&set);
            if let Way::Host(texts) = &mut self.way {
                texts.remove(&set);
            }
        }
    }

    fn uses(&self, set: &str) -> bool {
        match &self.way {
            Way::Host(texts) => texts.uses(set),
            Way::Tensors(texts) => texts.uses(set),
        }
    }

    /// Ends all texts. For callers that found that something went wrong in a step.
    pub fn clear(&mut self) {
        match &mut self.way {
            Way::Host(texts) => texts.clear(),
            Way::Tensors(texts) => texts.clear(),
        }
        self.drop_unused();
    }

    /// Reads the tokens that were pushed, and at most `prompt_tokens` of prompts, those that were begun first before the
    /// others. The result has the scores of the next token of each text that was read to its end. Other backends than
    /// `flex` and `ndarray` read one whole prompt.
    ///
    /// # Errors
    ///
    /// As [`MultiLora::batch`].
    pub fn step(&mut self, prompt_tokens: usize) -> Result<Scores, LoraError> {
        match &mut self.way {
            Way::Host(texts) => Ok(texts.step(prompt_tokens)),
            Way::Tensors(texts) => texts.step(&self.models),
        }
    }

    /// What was read so far.
    pub fn counts(&self) -> Counts {
        match &self.way {
            Way::Host(texts) => texts.counts,
            Way::Tensors(texts) => texts.counts,
        }
    }
}

/// How many tokens of prompts were read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Those that were computed.
    pub read: usize,
    /// Those that were taken over from other texts.
    pub reused: usize,
}

/// One text, which is read and continued.
#[derive(Debug)]
pub(crate) enum Reader<'a, B: Backend> {
    Host(Box<(HostLlama, Option<Text>)>),
    Tensors(&'a Llama<B>, Cache<B>),
}

impl<'a, B: Backend> Reader<'a, B> {
    pub fn new(llama: &'a Llama<B>, exact: bool) -> Self {
        match HostLlama::of(llama, exact) {
            Some(llama) => Self::Host(Box::new((llama, None))),
            None => Self::Tensors(llama, llama.cache()),
        }
    }

    /// Reads the next tokens: first the prompt, and then one at a time. Returns the scores of the token after them.
    pub fn read(&mut self, ids: &[u32]) -> Vec<f32> {
        match self {
            Self::Host(host) => {
                let (llama, text) = &mut **host;
                match text {
                    Some(text) => ids.iter().for_each(|id| text.push(*id)),
                    None => *text = Some(llama.text(ids.to_vec())),
                }
                let text = text.as_mut().expect("it has begun");
                loop {
                    // Prompts are read in parts, so that memory does not grow with their length.
                    let step = Step { text, set: None, tokens: PART };
                    if let [Some(scores)] = &llama.read(vec![step])[..] {
                        return scores.to_vec();
                    }
                }
            }
            Self::Tensors(llama, cache) => {
                let [scores] = &mut tensors::read(llama, &[ids], cache)[..] else {
                    unreachable!("it is one text")
                };
                std::mem::take(scores)
            }
        }
    }
}
