//! Patterns that match paths in a model: those of this crate's configurations, by the syntax of the crate `regex`; and
//! in [`python`] those of PEFT's files.

pub(crate) mod python;

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
/// So plain names match as in PEFT's list of target modules, and other expressions match the ends of paths, as PEFT's
/// rank and alpha patterns do.
#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    source: String,
    regex: Regex,
    /// Whether the source has no special characters but dots, which stand for any character.
    is_plain: bool,
}

impl Pattern {
    pub(crate) fn new(source: &str) -> Result<Self, LoraError> {
        let regex = compile(&format!(r"^(?:.*\.)?(?:{source})$")).map_err(|error| {
            LoraError::InvalidPattern { pattern: source.to_owned(), source: Box::new(error) }
        })?;
        let is_plain =
            source.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        Ok(Self { source: source.to_owned(), regex, is_plain })
    }

    pub(crate) fn all<S: AsRef<str>>(
        sources: impl IntoIterator<Item = S>,
    ) -> Result<Vec<Self>, LoraError> {
        sources.into_iter().map(|source| Self::new(source.as_ref())).collect()
    }

    /// The expression as it was given.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    pub(crate) fn matches(&self, path: &str) -> bool {
        if self.is_plain && path.bytes().all(|byte| byte.is_ascii_graphic()) {
            return self.matches_plainly(path);
        }
        self.regex.is_match(path)
    }

    /// The same for a plain pattern and a path of plain characters. Most patterns of files are such names, one for
    /// each layer, and to compare them takes far less time than a regular expression.
    fn matches_plainly(&self, path: &str) -> bool {
        let (path, source) = (path.as_bytes(), self.source.as_bytes());
        let Some(start) = path.len().checked_sub(source.len()) else { return false };
        let begins_a_segment = start == 0 || path[start - 1] == b'.';
        let mut pairs = source.iter().zip(&path[start..]);
        begins_a_segment && pairs.all(|(pattern, byte)| pattern == byte || *pattern == b'.')
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
    fn plain_names_match_as_expressions_do() {
        let patterns = ["query", "0.query", "layers.0.query", "", "q", "a.b", ".", "x-1_y"];
        let paths = ["", "query", "my_query", "layers.0.query", "layers.10.query", "a.", "a.b"];
        for pattern in patterns {
            let pattern = Pattern::new(pattern).unwrap();
            assert!(pattern.is_plain);
            for path in paths.iter().chain(&["axb", "z.axb", "y.x-1_y", "é.query", "a\nb"]) {
                assert_eq!(
                    pattern.matches(path),
                    pattern.regex.is_match(path),
                    "{pattern:?} {path}"
                );
            }
        }
        assert!(!Pattern::new(r"a\.b").unwrap().is_plain);
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
