use thiserror::Error;

/// What can go wrong with configurations, targets and values that come from outside the program.
///
/// Programmer mistakes, such as a rank of zero or an input of the wrong width, panic instead, as
/// they do in Burn.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoraError {
    /// A field of [`LoraConfig`](crate::LoraConfig) has a value that cannot work.
    #[error("invalid LoraConfig: `{field}` {problem}")]
    InvalidConfig {
        /// The field's name.
        field: &'static str,
        /// What is wrong with it, and what would be right.
        problem: String,
    },

    /// A pattern is not a valid regular expression.
    #[error("`{pattern}` is not a valid pattern: {source}")]
    InvalidPattern {
        /// The pattern as it was given.
        pattern: String,
        /// Where the expression goes wrong.
        source: Box<regex::Error>,
    },

    /// A pattern names nothing in the model: most often a misspelt target.
    #[error(
        "{field} matched nothing: {}; the model has: {}",
        quoted(.patterns),
        quoted(.available)
    )]
    Unmatched {
        /// The field of the configuration that holds the patterns.
        field: &'static str,
        /// The patterns without a match.
        patterns: Vec<String>,
        /// The paths that they could have matched.
        available: Vec<String>,
    },

    /// Layers already carry an adapter, which attaching would throw away.
    #[error("already adapted: {}; detach or merge the adapters first", quoted(.paths))]
    AlreadyAttached {
        /// The layers' paths.
        paths: Vec<String>,
    },

    /// Merging would write NaN or infinity into a weight: the adapter has most likely diverged.
    #[error("merging `{path}` would produce NaN or infinite weights; nothing was merged")]
    NotFinite {
        /// The layer's path.
        path: String,
    },
}

fn quoted(names: &[String]) -> String {
    match names {
        [] => "nothing".to_owned(),
        names => names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "),
    }
}
