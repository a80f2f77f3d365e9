//! A text that grows by tokens, and is handed out in pieces.

use crate::{chat::Chat, common::Result};

/// The text of an answer, up to one of the texts at which it ends.
pub struct Growing {
    ids: Vec<u32>,
    text: String,
    stops: Vec<String>,
    /// How many of its bytes were handed out.
    shown: usize,
}

impl Growing {
    pub fn new(stops: Vec<String>) -> Self {
        Self { ids: Vec::new(), text: String::new(), stops, shown: 0 }
    }

    /// The number of tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Adds a token. Returns whether the text has come to one of its ends, which is cut off.
    pub fn push(&mut self, id: u32, chat: &Chat) -> Result<bool> {
        self.ids.push(id);
        self.set(chat.decode(&self.ids)?);
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
}
