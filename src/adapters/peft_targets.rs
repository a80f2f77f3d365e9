//! Which layers `adapter_config.json` targets, by PEFT's rules.

use regex::Regex;
use serde::Deserialize;

use crate::pattern::compile;

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Modules {
    /// A regular expression, or "all-linear".
    Expression(String),
    /// Paths, or ends of paths.
    Names(Vec<String>),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Indices {
    One(usize),
    Many(Vec<usize>),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Names {
    One(String),
    Many(Vec<String>),
}

/// The layers that a configuration targets, by PEFT's rules.
#[derive(Clone, Debug)]
pub(crate) struct Targets {
    targets: Matcher,
    excludes: Option<Matcher>,
    modules_to_save: Vec<String>,
    /// The indices of the layers, and the expressions that find an index in a path.
    layers: Option<(Vec<usize>, Vec<Regex>)>,
}

#[derive(Clone, Debug)]
enum Matcher {
    Expression(Regex),
    /// Full paths. Most expressions only list some, and a list takes less memory than a compiled one.
    Paths(Vec<String>),
    Names(Vec<String>),
}

impl Targets {
    /// The layers that the fields of the file target. `None` if an expression cannot be compiled here,
    /// or if the file names no layers, or all linear ones.
    pub fn new(
        target_modules: Option<&Modules>,
        exclude_modules: Option<&Modules>,
        layers_to_transform: Option<&Indices>,
        layers_pattern: Option<&Names>,
        modules_to_save: &[String],
    ) -> Option<Self> {
        let layers = match layers_to_transform {
            None => None,
            Some(Indices::One(index)) => Some(vec![*index]),
            Some(Indices::Many(indices)) if indices.is_empty() => None,
            Some(Indices::Many(indices)) => Some(indices.clone()),
        };
        let patterns = match layers_pattern {
            None => vec![],
            Some(Names::One(pattern)) if pattern.is_empty() => vec![],
            Some(Names::One(pattern)) => vec![pattern.clone()],
            Some(Names::Many(patterns)) => patterns.clone(),
        };
        // The index is the first number after a pattern. Without patterns, it is the first number after
        // any segment but the first.
        let finders: Result<Vec<_>, _> = if patterns.is_empty() {
            compile(r"^.*?\.[^.]*\.(?P<index>\d+)\.").map(|finder| vec![finder])
        } else {
            let finder = |it| compile(&format!(r"^(?:.*?\.)??(?:{it})\.(?P<index>\d+)\."));
            patterns.iter().map(finder).collect()
        };
        let excludes = match exclude_modules {
            Some(modules) => Some(Matcher::new(modules)?),
            None => None,
        };
        Some(Self {
            targets: Matcher::new(target_modules?)?,
            excludes,
            modules_to_save: modules_to_save.to_vec(),
            layers: layers.zip(Some(finders.ok()?)),
        })
    }
}

/// Whether the path is one of the modules, ends with one, or is inside one.
pub(crate) fn within_any(modules: &[String], path: &str) -> bool {
    let ends = path.match_indices('.').map(|(end, _)| end).chain([path.len()]);
    ends.into_iter().any(|end| is_or_ends_with(modules, &path[..end]))
}

fn is_or_ends_with(names: &[String], path: &str) -> bool {
    names.iter().any(|name| {
        path.strip_suffix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    })
}

/// The text that an expression matches, if it matches only one.
fn unescape(expression: &str) -> Option<String> {
    let mut text = String::new();
    let mut characters = expression.chars();
    while let Some(character) = characters.next() {
        text.push(match character {
            '\\' => characters.next().filter(|it| !it.is_alphanumeric())?,
            it if ".+*?()[]{}^$#&-~".contains(it) => return None,
            it => it,
        });
    }
    Some(text)
}

impl Matcher {
    fn new(modules: &Modules) -> Option<Self> {
        match modules {
            Modules::Names(names) => Some(Self::Names(names.clone())),
            Modules::Expression(all) if all.eq_ignore_ascii_case("all-linear") => None,
            Modules::Expression(expression) => {
                let paths = expression.split('|').map(unescape).collect();
                if let Some(paths) = paths {
                    return Some(Self::Paths(paths));
                }
                compile(&format!("^(?:{expression})$")).ok().map(Self::Expression)
            }
        }
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Expression(regex) => regex.is_match(path),
            Self::Paths(paths) => paths.iter().any(|it| it == path),
            Self::Names(names) => is_or_ends_with(names, path),
        }
    }
}

impl Targets {
    pub fn matches(&self, path: &str) -> bool {
        if self.excludes.as_ref().is_some_and(|excludes| excludes.matches(path))
            || within_any(&self.modules_to_save, path)
            || !self.targets.matches(path)
        {
            return false;
        }
        match (&self.targets, &self.layers) {
            // A full path in the list matches, whatever the indices are.
            (Matcher::Names(names), Some((indices, finders)))
                if !names.iter().any(|name| name == path) =>
            {
                let found = finders.iter().find_map(|finder| finder.captures(path));
                let index = found.and_then(|found| found.name("index")?.as_str().parse().ok());
                index.is_some_and(|index| indices.contains(&index))
            }
            _ => true,
        }
    }

    /// The names that match none of the paths, or the expression if it matches none of them.
    pub fn unmatched<'a>(&self, paths: impl Iterator<Item = &'a str> + Clone) -> Vec<String> {
        match &self.targets {
            Matcher::Expression(regex) if !paths.clone().any(|path| regex.is_match(path)) => {
                vec![regex.as_str().to_owned()]
            }
            Matcher::Expression(_) => vec![],
            Matcher::Paths(names) => {
                let matches = |name: &String| paths.clone().any(|path| path == name);
                names.iter().filter(|name| !matches(name)).cloned().collect()
            }
            Matcher::Names(names) => {
                let matches = |name: &String| {
                    paths.clone().any(|path| is_or_ends_with(std::slice::from_ref(name), path))
                };
                names.iter().filter(|name| !matches(name)).cloned().collect()
            }
        }
    }
}
