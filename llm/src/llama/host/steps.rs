//! The rows of a step.

use std::ops::Range;

use super::{HostSet, Step};
use crate::config::Design;

/// The texts of a step, those with a token of their answer first.
pub(super) struct Steps<'a> {
    pub parts: Vec<Part<'a>>,
    /// The rows that are tokens of answers.
    pub few: usize,
    /// For each rule of RoPE, the cosines and sines of each row: `[rows, pairs]`.
    turns: Vec<[Vec<f32>; 2]>,
    /// The sets of all rows.
    sets: Vec<Option<&'a HostSet>>,
}

/// The rows of a text.
pub(super) struct Part<'a> {
    pub step: Step<'a>,
    pub rows: Range<usize>,
    pub is_single: bool,
    /// Which of the texts it is.
    place: usize,
}

impl<'a> Steps<'a> {
    pub fn new(steps: Vec<Step<'a>>, design: &Design) -> Self {
        let (mut rows, mut few, mut sets) = (0, 0, Vec::new());
        let (single, several): (Vec<_>, Vec<_>) =
            steps.into_iter().enumerate().partition(|(_, it)| it.text.is_single());
        let mut parts = Vec::with_capacity(single.len() + several.len());
        for (is_single, steps) in [(true, single), (false, several)] {
            for (place, step) in steps {
                let count = step.tokens.min(step.text.unread());
                sets.resize(rows + count, step.set);
                parts.push(Part { step, rows: rows..rows + count, is_single, place });
                rows += count;
            }
            if is_single {
                few = rows;
            }
        }
        let turns = design.ropes.iter().map(|rope| {
            let mut turns = [const { Vec::new() }; 2];
            for part in &parts {
                let text = &part.step.text;
                let frequencies = rope.frequencies_at(text.ids().len());
                for position in text.next(part.rows.len()) {
                    for frequency in frequencies.iter() {
                        let (sin, cos) = (position as f64 * frequency).sin_cos();
                        turns[0].push((rope.amplitude * cos) as f32);
                        turns[1].push((rope.amplitude * sin) as f32);
                    }
                }
            }
            turns
        });
        let turns = turns.collect();
        Self { parts, few, turns, sets }
    }

    pub fn rows(&self) -> usize {
        self.sets.len()
    }

    /// The set of a row.
    pub fn set(&self, row: usize) -> Option<&'a HostSet> {
        self.sets[row]
    }

    /// The tokens of all rows.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        let ids = |it: &Part| it.step.text.ids()[it.step.text.next(it.rows.len())].to_vec();
        self.parts.iter().flat_map(ids)
    }

    /// The cosines and sines of a row, by a rule of RoPE.
    pub fn turns(&self, rope: usize, row: usize) -> [&[f32]; 2] {
        self.turns[rope].each_ref().map(|it| {
            let pairs = it.len() / self.rows();
            &it[row * pairs..][..pairs]
        })
    }

    /// The last rows of the texts that are read to their ends, in the order of the texts.
    pub fn ends(&self) -> Vec<usize> {
        let complete = self.parts.iter().filter(|it| it.step.text.unread() == it.rows.len());
        let mut ends: Vec<_> = complete.map(|it| (it.place, it.rows.end - 1)).collect();
        ends.sort_unstable();
        ends.into_iter().map(|(_, row)| row).collect()
    }

    /// All layers have read the rows.
    pub fn finish(self) {
        self.parts.into_iter().for_each(|it| it.step.text.finish(it.rows.len()));
    }
}
