//! Errors, which are messages for the user.

use std::fmt::Display;

/// A result whose error is a message for the user: which file, what is wrong with it, and what to do.
pub type Result<T> = std::result::Result<T, String>;

/// Adds to an error what was being done, and with which file.
pub trait Context<T> {
    /// The error's message, after what was being done.
    fn context(self, doing: impl Display) -> Result<T>;
}

impl<T, E: Display> Context<T> for std::result::Result<T, E> {
    fn context(self, doing: impl Display) -> Result<T> {
        self.map_err(|error| format!("{doing}: {error}"))
    }
}
