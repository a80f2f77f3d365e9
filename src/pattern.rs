//! Patterns that match paths in a model.

use regex::{Regex, RegexBuilder};

use crate::error::LoraError;

/// Compiles a regular expression of limited size. A larger one is an error, because it may come from a
/// file and take long to compile. No name needs one.
pub(crate) fn compile(expression: &str) -> Result<Regex, regex::Error> {
    const SIZE_LIMIT: usize = 1 << 20;
    RegexBuilder::new(expression).size_limit(SIZE_LIMIT).build()
}

/// A regular expression that matches a whole dotted path, or whole segments at the end of the path:
/// `query`, `layers\.[0-3]\.query` and `.*query` all match `layers.0.query`.
///
/// So plain names match as in PEFT's list of target modules, and other expressions match as PEFT's rank
/// and alpha patterns do.
#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    source: String,
    regex: Regex,
}

impl Pattern {
    pub(crate) fn new(source: &str) -> Result<Self, LoraError> {
        let regex = compile(&format!(r"^(?:.*\.)?(?:{source})$")).map_err(|error| {
            LoraError::InvalidPattern { pattern: source.to_owned(), source: Box::new(error) }
        })?;
        Ok(Self { source: source.to_owned(), regex })
    }

    pub(crate) fn all<S: AsRef<str>>(
        sources: impl IntoIterator<Item = S>,
    ) -> Result<Vec<Self>, LoraError> {
        sources.into_iter().map(|source| Self::new(source.as_ref())).collect()
    }

    pub(crate) fn matches(&self, path: &str) -> bool {
        self.regex.is_match(path)
    }

    /// Whether the path, or a module that contains it, matches: `head` covers `head.weight`.
    pub(crate) fn covers(&self, path: &str) -> bool {
        self.covering(path).is_some()
    }

    /// The part of the path that matches: the outermost module that matches, or the path itself.
    pub(crate) fn covering<'a>(&self, path: &'a str) -> Option<&'a str> {
        let ends = path.match_indices('.').map(|(end, _)| end).chain([path.len()]);
        ends.map(|end| &path[..end]).find(|module| self.matches(module))
    }
}

/// Fails if there are patterns that `used` accepts for none of the `available` paths, and names them.
pub(crate) fn require_matches(
    field: &'static str,
    patterns: &[Pattern],
    available: &[String],
    used: impl Fn(&Pattern, &str) -> bool,
) -> Result<(), LoraError> {
    let unmatched: Vec<_> = patterns
        .iter()
        .filter(|pattern| !available.iter().any(|path| used(pattern, path)))
        .map(|pattern| pattern.source.clone())
        .collect();
    if unmatched.is_empty() {
        return Ok(());
    }
    Err(LoraError::unmatched(field, unmatched, available))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_whole_segments_only() {
        let matches = |pattern: &str, path: &str| Pattern::new(pattern).unwrap().matches(path);
        assert!(matches("query", "query"));
        assert!(matches("query", "layers.0.query"));
        assert!(matches("0.query", "layers.0.query"));
        assert!(matches(r"layers\.\d+\.(query|value)", "layers.12.value"));
        assert!(matches("fc.*", "fc1"));
        assert!(!matches("query", "layers.0.my_query"));
        assert!(!matches("query", "query.weight"));
        assert!(!matches("a|b", "xa"), "alternatives are anchored as a whole");
    }

    #[test]
    fn covers_what_a_module_holds() {
        let head = Pattern::new("head").unwrap();
        assert!(head.covers("head.weight"));
        assert!(head.covers("decoder.head.norm.gamma"));
        assert!(!head.covers("header.weight"));
    }

    #[test]
    fn a_bad_expression_is_named() {
        let error = Pattern::new("fc(").unwrap_err().to_string();
        assert!(error.starts_with("`fc(` is not a valid pattern"), "{error}");
    }
}
