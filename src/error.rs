//! What can go wrong.

use std::{collections::BTreeSet, fmt, path::PathBuf};

use regex::Regex;
use thiserror::Error;

/// What can go wrong with configurations, targets and values that come from outside the program.
///
/// Programmer mistakes, such as a rank of zero or an input of the wrong width, panic instead, as
/// they do in Burn.
///
/// `Debug` gives the name of the variant and the message of `Display`, because that is what a program prints whose
/// `main` returns the error.
#[derive(Error)]
#[non_exhaustive]
pub enum LoraError {
    /// A field of [`LoraConfig`](crate::LoraConfig) has a value that cannot work.
    #[error("invalid LoraConfig: `{field}` {}", text(.problem))]
    InvalidConfig {
        /// The field's name.
        field: &'static str,
        /// What is wrong with it, and what would be right.
        problem: String,
    },

    /// An argument of a function has a value that cannot work.
    #[error("invalid argument: `{argument}` {}", text(.problem))]
    InvalidArgument {
        /// The argument's name.
        argument: &'static str,
        /// What is wrong with it, and what would be right.
        problem: String,
    },

    /// A pattern is not a valid regular expression.
    #[error("`{}` is not a valid pattern: {source}", shown(.pattern))]
    InvalidPattern {
        /// The pattern as it was given.
        pattern: String,
        /// Where the expression goes wrong.
        source: Box<regex::Error>,
    },

    /// A pattern names nothing in the model that it could mean: most often a misspelt target, or a module that holds
    /// layers and is none.
    #[error("{field} matched nothing: {}{}", quoted(.patterns), remedy(.patterns, .available))]
    Unmatched {
        /// The field of the configuration that holds the patterns.
        field: &'static str,
        /// The patterns without a match.
        patterns: Vec<String>,
        /// All paths that they could have matched; the message has those that are most alike.
        available: Vec<String>,
    },

    /// What should be adapted are stock modules, not layers of this crate.
    #[error(
        "{} cannot carry adapters: replace stock modules by this crate's layers, such as \
         `LoraLinear` for `Linear`, or adapt them as they are by `Lora::overlay`",
        quoted(.paths)
    )]
    StockLayers {
        /// The modules' paths.
        paths: Vec<String>,
    },

    /// A layer of one's own holds a [`LoraAdapter`](crate::LoraAdapter) as a field. Only the adapters of this crate's
    /// layers are found in a model, and so these would be frozen, and saved with no set.
    #[error(
        "{} would be frozen and not be saved: only the adapters of this crate's layers are found in a model; hold a \
         `LoraLinear` instead of a weight and a `LoraAdapter`, as \"A layer of your own\" in docs/layers.md shows",
        quoted(.paths)
    )]
    LooseAdapters {
        /// The paths of the fields.
        paths: Vec<String>,
    },

    /// The backend cannot compute with a layer's weight as it is.
    #[error("{} cannot carry an adapter: {}", quote(.path), text(.problem))]
    Unusable {
        /// The layer's path.
        path: String,
        /// Why not, and what to do.
        problem: String,
    },

    /// The weight of a layer cannot be quantized.
    #[error("{} cannot be quantized: {}", quote(.path), text(.problem))]
    NotQuantizable {
        /// The layer's path.
        path: String,
        /// Why not, and what to do.
        problem: String,
    },

    /// A model or a set of adapters cannot be used in a batch of several sets.
    #[error("{} cannot be part of a mixed batch: {}", text(.what), text(.problem))]
    NotMixable {
        /// The model, or the part of the set.
        what: String,
        /// Why not, and what to do.
        problem: String,
    },

    /// There are no sets of adapters of these names.
    #[error("there are no adapters called {}; there are {}", in_quotes(.names), in_quotes(.available))]
    UnknownAdapters {
        /// The names.
        names: Vec<String>,
        /// The names that there are.
        available: Vec<String>,
    },

    /// Layers already carry an adapter, which attaching would throw away.
    #[error("already adapted: {}; detach or merge the adapters first", quoted(.paths))]
    AlreadyAttached {
        /// The layers' paths.
        paths: Vec<String>,
    },

    /// The model has batch norms of Burn's, whose running statistics all clones of a model share. On a backend with
    /// autodiff each pass moves them, and putting on those of a set would move them, too: the base would change.
    #[error(
        "Burn's batch norms share their running statistics with all clones of a model, so that the base would \
         change: {}; have the model hold `burn_lora::nn::BatchNorm`, which is frozen with its model, or call \
         `with_own_statistics` on the model with autodiff first, and the statistics move in the adapted one alone",
        quoted(.paths)
    )]
    SharedStatistics {
        /// The norms' paths.
        paths: Vec<String>,
    },

    /// Adapters do not fit a model, or a file's tensors do not fit its configuration. Everything
    /// that is wrong is listed.
    #[error("{} does not fit{}", text(.what), .mismatch)]
    Mismatch {
        /// What does not fit: a file, or adapters.
        what: String,
        /// All that is wrong.
        mismatch: Box<Mismatch>,
    },

    /// A file or directory could not be read or written.
    #[error("{}: {source}", text(&.path.to_string_lossy()))]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },

    /// A file is not what it should be: truncated, corrupt, or of another format.
    #[error("{}: {}", text(.file), text(.problem))]
    InvalidFile {
        /// The file.
        file: String,
        /// What is wrong with it.
        problem: String,
    },

    /// A file, or adapters to be saved, need something that is not supported, and that must not be
    /// ignored since it would change the result.
    #[error("{}: {} is not supported{}", text(.file), quote(.field), after_colon(.reason))]
    Unsupported {
        /// The file, or what was to become one.
        file: String,
        /// The field or the key.
        field: String,
        /// Why not, and what to do, where that is not plain.
        reason: Option<String>,
    },

    /// A record cannot be loaded into a model: it is one of another model, or of other adapters.
    #[error("{}", text(.problem))]
    InvalidRecord {
        /// In what they differ.
        problem: String,
    },

    /// Sets of adapters cannot be combined or renamed.
    #[error("sets of adapters: {}: {}", quote(.path), text(.problem))]
    Incompatible {
        /// The layer or the parameter.
        path: String,
        /// Why not, and what to do.
        problem: String,
    },

    /// What trains together is not the same everywhere, see [`Replicas::agree`](crate::train::Replicas::agree).
    #[error("replica {replica} has `{}` where replica 0 has `{}`", text(.found), text(.expected))]
    ReplicasDiffer {
        /// The first replica that differs from replica 0.
        replica: usize,
        /// The first line of replica 0 in which they differ.
        expected: String,
        /// The other's line.
        found: String,
    },

    /// Merging would write NaN or infinity into a weight: the adapter has most likely diverged.
    #[error("merging {} would produce NaN or infinite weights; nothing was merged", quote(.path))]
    NotFinite {
        /// The layer's path.
        path: String,
    },
}

impl fmt::Debug for LoraError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {self}", self.variant())
    }
}

/// Everything that keeps adapters from fitting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mismatch {
    /// Keys or layers that should be there, and are not.
    pub missing: Vec<String>,
    /// Keys or layers that are there, and belong to nothing.
    pub unexpected: Vec<String>,
    /// Keys or layers of the wrong shape, with the shape that was expected and the one found.
    pub misshapen: Vec<String>,
    /// Targets of the configuration that match nothing.
    pub unmatched_targets: Vec<String>,
    /// What the keys or layers look like, and what to do, if that is known.
    pub hint: Option<String>,
}

impl Mismatch {
    /// Nothing if all fits. Targets without a match are told along with other faults, and are none
    /// by themselves: lists of targets are often written for several kinds of models.
    pub(crate) fn into_result(mut self, what: impl Into<String>) -> Result<(), LoraError> {
        if self.missing.is_empty() && self.unexpected.is_empty() && self.misshapen.is_empty() {
            return Ok(());
        }
        for keys in [&mut self.missing, &mut self.unexpected, &mut self.misshapen] {
            keys.sort();
        }
        Err(LoraError::Mismatch { what: what.into(), mismatch: Box::new(self) })
    }
}

impl LoraError {
    /// The variant's name.
    fn variant(&self) -> &'static str {
        match self {
            Self::InvalidConfig { .. } => "InvalidConfig",
            Self::InvalidArgument { .. } => "InvalidArgument",
            Self::InvalidPattern { .. } => "InvalidPattern",
            Self::Unmatched { .. } => "Unmatched",
            Self::StockLayers { .. } => "StockLayers",
            Self::LooseAdapters { .. } => "LooseAdapters",
            Self::Unusable { .. } => "Unusable",
            Self::NotQuantizable { .. } => "NotQuantizable",
            Self::NotMixable { .. } => "NotMixable",
            Self::UnknownAdapters { .. } => "UnknownAdapters",
            Self::AlreadyAttached { .. } => "AlreadyAttached",
            Self::SharedStatistics { .. } => "SharedStatistics",
            Self::Mismatch { .. } => "Mismatch",
            Self::Io { .. } => "Io",
            Self::InvalidFile { .. } => "InvalidFile",
            Self::Unsupported { .. } => "Unsupported",
            Self::InvalidRecord { .. } => "InvalidRecord",
            Self::Incompatible { .. } => "Incompatible",
            Self::ReplicasDiffer { .. } => "ReplicasDiffer",
            Self::NotFinite { .. } => "NotFinite",
        }
    }

    pub(crate) fn unmatched(
        field: &'static str,
        patterns: Vec<String>,
        available: &[String],
    ) -> Self {
        Self::Unmatched { field, patterns, available: available.to_vec() }
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, keys) in [
            ("missing", &self.missing),
            ("unexpected", &self.unexpected),
            ("of the wrong shape", &self.misshapen),
            ("targets without a match", &self.unmatched_targets),
        ] {
            if !keys.is_empty() {
                write!(f, "; {name}: {}", some_of(keys))?;
            }
        }
        match &self.hint {
            Some(hint) => write!(f, "; {}", text(hint)),
            None => Ok(()),
        }
    }
}

/// What a message calls the layer at `path`. A layer that is no part of a model has no path.
pub(crate) fn named(path: &str) -> &str {
    if path.is_empty() { "the layer itself" } else { path }
}

/// The first names of a list that may be long, and how many more there are.
pub(crate) fn some_of(names: &[String]) -> String {
    first_of(names, shown)
}

fn first_of(names: &[String], show: fn(&str) -> String) -> String {
    const SHOWN: usize = 8;
    let first = names.iter().take(SHOWN).map(|name| show(name)).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => first,
        more => format!("{first}, and {more} more"),
    }
}

/// A name from outside the program, as a message shows it: without characters that would control a terminal, and without
/// its middle if it is long.
pub(crate) fn shown(name: &str) -> String {
    const LONGEST: usize = 400;
    const BEGINNING: usize = 200;
    const END: usize = 100;
    if name.len() <= LONGEST {
        return escaped(name, |_| false);
    }
    let start = name.char_indices().nth(BEGINNING).map_or(name.len(), |(at, _)| at);
    let end = name.char_indices().rev().nth(END).map_or(0, |(at, _)| at);
    if end <= start {
        return escaped(name, |_| false);
    }
    let [start, end] = [&name[..start], &name[end..]].map(|part| escaped(part, |_| false));
    format!("{start}[..]{end} ({} bytes)", name.len())
}

/// A part of a message that may have several lines.
fn text(message: &str) -> String {
    escaped(message, |it| it == '\n' || it == '\t')
}

/// The text with escapes for characters that would control a terminal, or that it would not show.
fn escaped(text: &str, is_kept: impl Fn(char) -> bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        // These are the marks that turn the direction of text, and those of no width.
        let is_hidden = matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
        match (character.is_control() || is_hidden) && !is_kept(character) {
            true => escaped.extend(character.escape_default()),
            false => escaped.push(character),
        }
    }
    escaped
}

/// The path in quotes, or what a layer without one is called.
fn quote(path: &str) -> String {
    if path.is_empty() { named(path).to_owned() } else { format!("`{}`", shown(path)) }
}

/// The end of a message that may have a reason.
fn after_colon(reason: &Option<String>) -> String {
    reason.as_ref().map(|reason| format!(": {}", text(reason))).unwrap_or_default()
}

/// The first names of a list that may be long, in quotes.
pub(crate) fn quoted(names: &[String]) -> String {
    match names {
        [] => "nothing".to_owned(),
        names => first_of(names, quote),
    }
}

/// The first of names that are no paths, and that may be empty, in quotes.
fn in_quotes(names: &[String]) -> String {
    match names {
        [] => "none".to_owned(),
        names => first_of(names, |name| format!("`{}`", shown(name))),
    }
}

/// Why patterns match nothing that they could mean, and what they most likely should be.
fn remedy(patterns: &[String], available: &[String]) -> String {
    if patterns.is_empty() && !available.is_empty() {
        return left_out(available);
    }
    let mut told = String::new();
    let mut misspelt = Vec::new();
    for pattern in patterns {
        // The paths that the pattern means, and those within what it means.
        let those = |end: &str| {
            let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern}){end}$"));
            let matches = |path: &&String| regex.as_ref().is_ok_and(|it| it.is_match(path));
            available.iter().filter(matches).cloned().collect::<Vec<_>>()
        };
        let (meant, within) = (those(""), those(r"\..+"));
        let whole = if pattern.contains('|') { format!("({pattern})") } else { pattern.clone() };
        match (&*meant, &*within) {
            ([], []) => misspelt.push(pattern.clone()),
            ([], _) => told += &format!(r"; `{pattern}` holds layers: `{whole}\..*`"),
            (meant, _) => told += &left_out(meant),
        }
    }
    match misspelt.is_empty() {
        true => told,
        false => told + &nearest(&misspelt, available),
    }
}

fn left_out(paths: &[String]) -> String {
    format!("; excludes and modules_to_save leave out {}", quoted(paths))
}

/// What misspelt patterns most likely should be, and otherwise what there is.
fn nearest(patterns: &[String], available: &[String]) -> String {
    const SUGGESTED: usize = 3;
    const ALIKE: f64 = 0.5;
    let mut suggested: Vec<String> = Vec::new();
    for pattern in patterns {
        let segments = pattern.split('.').count();
        // A pattern means a part of a path, so it is compared with parts that are as long.
        let parts = available.iter().flat_map(|path| {
            let names: Vec<_> = path.split('.').filter(|name| !name.is_empty()).collect();
            names.windows(segments).map(|part| part.join(".")).collect::<Vec<_>>()
        });
        let parts: BTreeSet<_> = parts.collect();
        let likeness = |part: String| (strsim::normalized_levenshtein(pattern, &part), part);
        let mut alike: Vec<_> = parts.into_iter().map(likeness).collect();
        alike.retain(|(likeness, _)| *likeness >= ALIKE);
        alike.sort_by(|(one, _), (other, _)| other.total_cmp(one));
        let names = alike.into_iter().take(SUGGESTED).map(|(_, part)| part);
        suggested.extend(names.filter(|name| !suggested.contains(name)).collect::<Vec<_>>());
    }
    match suggested.as_slice() {
        [] => format!("; the model has: {}", quoted(available)),
        names => format!("; did you mean {}?", quoted(names)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_main_prints_has_the_variant_and_the_message() {
        let unsupported = |reason: Option<&str>| LoraError::Unsupported {
            file: "adapter_config.json".to_owned(),
            field: "use_qalora".to_owned(),
            reason: reason.map(str::to_owned),
        };
        let expected = "Unsupported: adapter_config.json: `use_qalora` is not supported";
        assert_eq!(format!("{:?}", unsupported(None)), expected);
        let expected = "adapter_config.json: `use_qalora` is not supported: it is new";
        assert_eq!(unsupported(Some("it is new")).to_string(), expected);
    }

    #[test]
    fn a_pattern_that_means_no_layer_gets_one_that_does() {
        let paths = ["hidden.0", "hidden.1", "head"].map(String::from);
        let message = |patterns: &[&str]| {
            let patterns = patterns.iter().map(|it| (*it).to_owned()).collect();
            LoraError::unmatched("targets", patterns, &paths).to_string()
        };
        let expected = r"targets matched nothing: `hidden`; `hidden` holds layers: `hidden\..*`";
        assert_eq!(message(&["hidden"]), expected);
        let expected = r"; `hid.*n|tail` holds layers: `(hid.*n|tail)\..*`; did you mean `head`?";
        assert!(message(&["hid.*n|tail", "haed"]).ends_with(expected));
        assert!(message(&["head"]).ends_with("; excludes and modules_to_save leave out `head`"));
        assert!(message(&[]).ends_with("leave out `hidden.0`, `hidden.1`, `head`"));
    }

    #[test]
    fn s11_names_are_shown_without_what_controls_a_terminal_and_short() {
        let file = |problem: &str| LoraError::InvalidFile {
            file: "a\u{1b}[2J/adapter_config.json".to_owned(),
            problem: problem.to_owned(),
        };
        let expected = "a\\u{1b}[2J/adapter_config.json: bad\\r\nline";
        assert_eq!(file("bad\r\nline").to_string(), expected);
        let unknown = |name: &str| LoraError::UnknownAdapters {
            names: vec![name.to_owned()],
            available: vec!["\u{202e}é\n".to_owned()],
        };
        let expected = "there are no adapters called `a\\u{0}b`; there are `\\u{202e}é\\n`";
        assert_eq!(unknown("a\0b").to_string(), expected);
        let long = unknown(&format!("begin{}end", "é".repeat(60_000))).to_string();
        assert!(long.starts_with("there are no adapters called `begin") && long.len() < 1000);
        assert!(long.contains("éend (120008 bytes)`; there are"), "{long}");
        let mismatch = Mismatch { missing: vec!["x".repeat(100_000)], ..Mismatch::default() };
        let error = mismatch.into_result("the file\x07").unwrap_err().to_string();
        assert!(error.starts_with(r"the file\u{7} does not fit; missing: xxx"), "{error}");
        assert!(error.len() < 500, "{error}");
    }

    #[test]
    fn adapters_without_a_name_are_no_layer() {
        let unknown = |available: Vec<String>| {
            LoraError::UnknownAdapters { names: vec![String::new()], available }.to_string()
        };
        let expected = "there are no adapters called ``; there are `polite`";
        assert_eq!(unknown(vec!["polite".to_owned()]), expected);
        assert_eq!(unknown(vec![]), "there are no adapters called ``; there are none");
    }

    #[test]
    fn a_misspelt_target_of_a_large_model_gets_a_short_answer() {
        let layers = |name: &str| {
            (0..100).map(|it| format!("encoder.layers.{it}.{name}")).collect::<Vec<_>>()
        };
        let paths =
            [layers("attention.query"), layers("attention.value"), layers("dense")].concat();
        let message =
            |pattern: &str| LoraError::unmatched("targets", vec![pattern.to_owned()], &paths);
        let expected = "targets matched nothing: `quary`; did you mean `query`?";
        assert_eq!(message("quary").to_string(), expected);
        let expected = "targets matched nothing: `atention.value`; did you mean `attention.value`, `attention.query`?";
        assert_eq!(message("atention.value").to_string(), expected);
        let far = message("conv1").to_string();
        assert!(far.contains("the model has: `encoder.layers.0.attention.query`, "), "{far}");
        assert!(far.ends_with("and 292 more") && far.len() < 400, "{far}");
    }
}
