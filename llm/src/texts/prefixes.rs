//! What is kept of texts that have ended.

use crate::llama::Text;

/// Prompts that were read, with their keys and values, the one that was used last at the end.
#[derive(Debug)]
pub(super) struct Prefixes {
    kept: Vec<Kept>,
    /// The bytes that they may take.
    budget: usize,
}

#[derive(Debug)]
struct Kept {
    set: Option<String>,
    text: Text,
}

impl Prefixes {
    pub fn new(budget: usize) -> Self {
        Self { kept: Vec::new(), budget }
    }

    /// The prompts with this set.
    pub fn of(&self, set: Option<&str>) -> impl Iterator<Item = &Text> {
        self.kept.iter().filter(move |it| it.set.as_deref() == set).map(|it| &it.text)
    }

    /// Keeps the prompt of a text in the place of those that it begins with. Those that were not used for the longest time
    /// go.
    pub fn keep(&mut self, set: Option<String>, mut text: Text) {
        text.shrink();
        let fits = text.read() > 0 && text.num_bytes() <= self.budget;
        let begins = |long: &Text, short: &Text| long.ids().starts_with(short.ids());
        if !fits || self.kept.iter().any(|it| it.set == set && begins(&it.text, &text)) {
            return;
        }
        self.kept.retain(|it| it.set != set || !begins(&text, &it.text));
        self.kept.push(Kept { set, text });
        let mut bytes: usize = self.kept.iter().map(|it| it.text.num_bytes()).sum();
        while bytes > self.budget {
            bytes -= self.kept.remove(0).text.num_bytes();
        }
    }

    /// Notes that a text took over what was read of the prompt that it begins like.
    pub fn used(&mut self, set: Option<&str>, text: &Text) {
        let read = &text.ids()[..text.read()];
        let used = |it: &Kept| it.set.as_deref() == set && it.text.ids().starts_with(read);
        if let Some(place) = self.kept.iter().rposition(used).filter(|_| !read.is_empty()) {
            let used = self.kept.remove(place);
            self.kept.push(used);
        }
    }

    /// Forgets the prompts with a set.
    pub fn forget(&mut self, set: &str) {
        self.kept.retain(|it| it.set.as_deref() != Some(set));
    }
}
