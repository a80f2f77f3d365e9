//! A text that grows by tokens, and is handed out in pieces.

use burn_lora_llm::{Result, chat::Chat};

/// How many tokens of the text before are decoded with the answer.
const CONTEXT: usize = 8;

/// The text of an answer, up to one of the texts at which it ends.
pub struct Growing {
    /// The end of the text that the answer goes on with, and how its tokens are decoded. Some tokenizers drop the
    /// space before the first word of what they decode: alone, an answer would lose it.
    before: Vec<u32>,
    prefix: String,
    ids: Vec<u32>,
    text: String,
    stops: Vec<String>,
    /// How many of its bytes were handed out.
    shown: usize,
}

impl Growing {
    pub fn new(stops: Vec<String>) -> Self {
        let (before, prefix) = Default::default();
        Self { before, prefix, ids: Vec::new(), text: String::new(), stops, shown: 0 }
    }

    /// An answer that goes on with the text `prompt`.
    pub fn after(prompt: &[u32], stops: Vec<String>, chat: &Chat) -> Result<Self> {
        let before = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        let prefix = chat.decode(&before)?;
        Ok(Self { before, prefix, ..Self::new(stops) })
    }

    /// The number of tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Adds a token. Returns whether the text has come to one of its ends, which is cut off.
    pub fn push(&mut self, id: u32, chat: &Chat) -> Result<bool> {
        self.ids.push(id);
        let text = chat.decode(&[&*self.before, &self.ids].concat())?;
        self.set(match text.strip_prefix(&self.prefix) {
            Some(text) => text.to_owned(),
            // The first token completes a character that the prompt began.
            None => chat.decode(&self.ids)?,
        });
        let ends = self.stops.iter().filter_map(|stop| self.text.find(stop));
        let end = ends.min();
        if let Some(end) = end {
            self.text.truncate(end);
        }
        Ok(end.is_some())
    }

    /// Takes a longer text in place of the one so far.
    fn set(&mut self, text: String) {
        self.text = text;
    }

    /// What was not handed out yet and can be: whole characters, and nothing that may become one of the ends.
    pub fn piece(&mut self) -> String {
        // A character may consist of several tokens. Until its last, it is decoded as U+FFFD.
        let whole = self.text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let held = self.stops.iter().map(|stop| overlap(whole, stop)).max().unwrap_or(0);
        let end = whole.len() - held;
        self.take(end)
    }

    /// All that was not handed out yet.
    pub fn rest(&mut self) -> String {
        self.take(self.text.len())
    }

    fn take(&mut self, end: usize) -> String {
        let piece = self.text.get(self.shown..end).unwrap_or_default().to_owned();
        self.shown = self.shown.max(end);
        piece
    }
}

/// The length of the longest end of `text` with which `stop` begins.
fn overlap(text: &str, stop: &str) -> usize {
    let begins = stop.char_indices().map(|(length, _)| length).filter(|&length| length > 0);
    begins.filter(|&length| text.ends_with(&stop[..length])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use tokenizers::{Tokenizer, decoders::metaspace::Metaspace, models::wordlevel::WordLevel};

    use super::*;

    /// The pieces of a text that grows to these texts, one after the other.
    fn pieces(stops: &[&str], texts: &[&str]) -> Vec<String> {
        let mut growing = Growing::new(stops.iter().map(|&it| it.to_owned()).collect());
        let piece = |text: &&str| {
            growing.set((*text).to_owned());
            growing.piece()
        };
        let mut pieces: Vec<_> = texts.iter().map(piece).collect();
        pieces.push(growing.rest());
        pieces
    }

    #[test]
    fn characters_come_whole() {
        assert_eq!(pieces(&[], &["a", "a\u{fffd}", "aé", "aéb"]), ["a", "", "é", "b", ""]);
    }

    #[test]
    fn what_may_become_an_end_is_held_back() {
        let stops = ["\n\nQ", "END"];
        assert_eq!(pieces(&stops, &["a\n", "a\n\n", "a\n\nb E"]), ["a", "", "\n\nb ", "E"]);
    }

    /// Tokens as those of SentencePiece: the first word loses its space.
    #[test]
    fn an_answer_keeps_the_space_after_its_prompt() {
        let words = ["▁The", "▁dog", "s", "</s>"].map(str::to_owned);
        let vocabulary = words.into_iter().zip(0..).collect();
        let words = WordLevel::builder().vocab(vocabulary).unk_token("s".to_owned());
        let mut tokenizer = Tokenizer::new(words.build().unwrap());
        tokenizer.with_decoder(Some(Metaspace::default()));
        let chat = Chat::new(tokenizer, "", "</s>").unwrap();

        let mut alone = Growing::new(Vec::new());
        let mut after = Growing::after(&[0], Vec::new(), &chat).unwrap();
        for (id, [expected, expected_after]) in [(1, ["dog", " dog"]), (2, ["s", "s"])] {
            alone.push(id, &chat).unwrap();
            after.push(id, &chat).unwrap();
            assert_eq!([alone.piece(), after.piece()], [expected, expected_after]);
        }
    }
}
