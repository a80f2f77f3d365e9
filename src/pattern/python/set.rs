//! Sets of characters.

use std::sync::LazyLock;

use regex::Regex;

/// A set of characters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Set {
    pub items: Vec<Item>,
    pub is_negated: bool,
    /// Whether upper and lower case are the same.
    pub ignores_case: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Item {
    Range(char, char),
    Class(Class, bool),
}

/// `\d`, `\s` or `\w`. The flag beside it says whether the others are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Class {
    Digit,
    Space,
    Word,
}

impl Set {
    pub fn of(items: impl Into<Vec<Item>>) -> Self {
        Self { items: items.into(), ..Self::default() }
    }

    pub fn has(&self, character: char) -> bool {
        let is_in = |character: char| self.items.iter().any(|item| item.has(character));
        let found = is_in(character)
            || self.ignores_case
                && (alone(character.to_lowercase()).is_some_and(is_in)
                    || alone(character.to_uppercase()).is_some_and(is_in));
        found != self.is_negated
    }

    /// The only character, if there is only one.
    pub fn single(&self) -> Option<char> {
        match self.items[..] {
            [Item::Range(first, last)] if first == last => {
                (!self.is_negated && !self.ignores_case).then_some(first)
            }
            _ => None,
        }
    }

    /// Whether it has every character but a line break, as `.` does.
    pub fn is_any(&self) -> bool {
        self.is_negated && matches!(self.items[..], [Item::Range('\n', '\n')])
    }
}

impl Item {
    fn has(&self, character: char) -> bool {
        match self {
            Self::Range(first, last) => (*first..=*last).contains(&character),
            Self::Class(class, is_negated) => class.has(character) != *is_negated,
        }
    }
}

impl Class {
    fn has(self, character: char) -> bool {
        match self {
            Self::Digit if character.is_ascii() => character.is_ascii_digit(),
            Self::Digit => is(character, &DIGIT),
            Self::Space => character.is_whitespace() || ('\x1c'..='\x1f').contains(&character),
            Self::Word => is_word(character),
        }
    }
}

pub(super) fn is_word(character: char) -> bool {
    match character.is_ascii() {
        true => character.is_ascii_alphanumeric() || character == '_',
        false => is(character, &WORD),
    }
}

/// What Python's `str.isdecimal` accepts.
static DIGIT: LazyLock<Regex> = LazyLock::new(|| class(r"\p{Nd}"));

/// What Python's `str.isalnum` accepts.
static WORD: LazyLock<Regex> = LazyLock::new(|| class(r"[\p{L}\p{N}]"));

fn class(expression: &str) -> Regex {
    Regex::new(expression).expect("it is a class of Unicode's")
}

fn is(character: char, class: &Regex) -> bool {
    class.is_match(character.encode_utf8(&mut [0; 4]))
}

/// The character, if there is only one.
fn alone(mut characters: impl Iterator<Item = char>) -> Option<char> {
    characters.next().filter(|_| characters.next().is_none())
}
