//! What many sets of adapters on one base take.

use std::fmt;

use crate::table::{grouped, table};

/// The bytes that the parameters of a base and of sets of adapters take in memory.
///
/// Printed, it is a table of them, with their sum in the last line. A set that is also held elsewhere shares its bytes
/// with that: tensors are not copied.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryReport {
    /// The bytes of the base, which all sets share.
    pub base: usize,
    /// The names of the sets, and the bytes of each, in alphabetical order.
    pub sets: Vec<(String, usize)>,
}

impl MemoryReport {
    /// The bytes of the base and of all sets.
    pub fn total(&self) -> usize {
        self.base + self.sets.iter().map(|(_, bytes)| bytes).sum::<usize>()
    }
}

impl fmt::Display for MemoryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |name: &str, bytes: usize| [name.to_owned(), grouped(bytes)];
        let sets = self.sets.iter().map(|(name, bytes)| row(name, *bytes));
        let rows: Vec<_> = std::iter::once(row("base", self.base)).chain(sets).collect();
        writeln!(f, "{}", table(&["in memory", "bytes"], &rows))?;
        write!(f, "{} sets, {} bytes in all", self.sets.len(), grouped(self.total()))
    }
}
