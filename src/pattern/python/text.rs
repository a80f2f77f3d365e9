//! A text, and sets of places in it.

use std::cell::OnceCell;

use super::{Place, set::Set};

/// The places between the characters of a text, and at its ends: a bit for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Places(Vec<u64>);

/// A text, and which of its characters each set of an expression has. These are looked up only once.
pub(super) struct Text<'e> {
    pub characters: Vec<char>,
    sets: &'e [Set],
    masks: Vec<OnceCell<Places>>,
}

impl<'e> Text<'e> {
    pub fn new(text: &str, sets: &'e [Set]) -> Self {
        let masks = vec![OnceCell::new(); sets.len()];
        Self { characters: text.chars().collect(), sets, masks }
    }

    pub fn none(&self) -> Places {
        Places(vec![0; self.characters.len() / 64 + 1])
    }

    pub fn places(&self, places: impl IntoIterator<Item = usize>) -> Places {
        let mut found = self.none();
        places.into_iter().for_each(|at| found.0[at / 64] |= 1 << (at % 64));
        found
    }

    /// The places with a character of the set behind them.
    fn mask(&self, set: usize) -> &Places {
        self.masks[set].get_or_init(|| {
            let characters = self.characters.iter().enumerate();
            let fitting = characters.filter(|(_, it)| self.sets[set].has(**it));
            self.places(fitting.map(|(at, _)| at))
        })
    }

    /// The places one character of the set further on.
    pub fn step(&self, from: &Places, set: usize) -> Places {
        let mut carry = 0;
        let words = from.0.iter().zip(&self.mask(set).0).map(|(from, mask)| {
            let fitting = from & mask;
            let moved = fitting << 1 | carry;
            carry = fitting >> 63;
            moved
        });
        Places(words.collect())
    }

    /// The places behind a run of characters of the set.
    pub fn run(
        &self,
        from: Places,
        set: usize,
        [least, most]: [usize; 2],
        is_possessive: bool,
    ) -> Places {
        let mut current = from;
        for _ in 0..least {
            if current.is_empty() {
                return current;
            }
            current = self.step(&current, set);
        }
        let mask = self.mask(set);
        if most == usize::MAX {
            let found = current.flooding(mask);
            return if is_possessive { found.without(mask) } else { found };
        }
        let mut found = self.none();
        for _ in least..most {
            let next = self.step(&current, set);
            found.add(&if is_possessive { current.without(mask) } else { current });
            current = if is_possessive { next } else { next.without(&found) };
            if current.is_empty() {
                return found;
            }
        }
        found.add(&current);
        found
    }

    /// Those of the places that are where the expression says.
    pub fn at(&self, from: Places, place: Place) -> Places {
        self.places(from.iter().filter(|at| place.is_at(&self.characters, *at)))
    }
}

impl Places {
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    pub fn has(&self, at: usize) -> bool {
        self.0[at / 64] >> (at % 64) & 1 == 1
    }

    /// The places, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = usize> {
        let words = self.0.iter().enumerate().filter(|(_, word)| **word != 0);
        words.flat_map(|(index, word)| {
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| 64 * index + bit)
        })
    }

    pub fn add(&mut self, others: &Self) {
        self.0.iter_mut().zip(&others.0).for_each(|(word, other)| *word |= other);
    }

    pub fn without(&self, others: &Self) -> Self {
        Self(self.0.iter().zip(&others.0).map(|(word, other)| word & !other).collect())
    }

    /// These places, and those that steps over places of the mask alone lead to. In a sum of both, a carry runs from
    /// each place to the end of its run.
    fn flooding(&self, mask: &Self) -> Self {
        let mut carry = false;
        let words = self.0.iter().zip(&mask.0).map(|(word, mask)| {
            let (sum, first) = (word & mask).overflowing_add(*mask);
            let (sum, second) = sum.overflowing_add(u64::from(carry));
            carry = first || second;
            (sum ^ mask) | word
        });
        Self(words.collect())
    }
}
