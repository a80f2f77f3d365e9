//! Which layers `adapter_config.json` targets, by PEFT's rules.

use std::fmt;

use serde::Deserialize;

use crate::{error::shown, pattern::python::Expression};

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
    /// `None` if the file names no layers, so that only PEFT knows them.
    targets: Option<Matcher>,
    excludes: Option<Matcher>,
    modules_to_save: Vec<String>,
    /// The indices of the layers, and what they stand behind.
    layers: Option<(Vec<usize>, Vec<Expression>)>,
}

#[derive(Clone, Debug)]
enum Matcher {
    /// The expression, and its source.
    Expression(Box<Expression>, String),
    /// Full paths. Most expressions only list some, and a list takes less memory than a compiled one.
    Paths(Vec<String>),
    Names(Vec<String>),
    /// All linear layers.
    Linear,
}

/// The names of output projections in Hugging Face's models. "all-linear" leaves them out.
const HEADS: [&str; 7] = [
    "lm_head",
    "embed_out",
    "output_projection",
    "generator_lm_head",
    "lm_loss",
    "pred_layer",
    "cls.predictions.decoder",
];

impl Targets {
    /// The layers that the fields of the file target. The error names a field with an expression that cannot be read.
    pub fn new(
        target_modules: Option<&Modules>,
        exclude_modules: Option<&Modules>,
        layers_to_transform: Option<&Indices>,
        layers_pattern: Option<&Names>,
        modules_to_save: &[String],
    ) -> Result<Self, String> {
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
        let read = |pattern: &String| {
            let problem = |problem| unreadable("layers_pattern", pattern, problem);
            Expression::part(pattern).map_err(problem)
        };
        let patterns = patterns.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        if !Expression::are_short_work(patterns.iter()) {
            return Err("`layers_pattern`: to match its patterns takes too long".to_owned());
        }
        let matcher = |field: &str, modules: Option<&Modules>| {
            modules.map(|modules| Matcher::new(field, modules)).transpose()
        };
        Ok(Self {
            targets: matcher("target_modules", target_modules)?,
            excludes: matcher("exclude_modules", exclude_modules)?,
            modules_to_save: modules_to_save.to_vec(),
            layers: layers.zip(Some(patterns)),
        })
    }
}

/// What is wrong with an expression in a field of the file.
pub(crate) fn unreadable(field: &str, expression: &str, problem: impl fmt::Display) -> String {
    let expression = shown(expression);
    format!(
        "`{field}`: `{expression}` is not a valid pattern of Python, as it is read here: {problem}"
    )
}

/// Whether PEFT saves the parameter `name` because one of the modules that it is in was trained in full. PEFT compares
/// the ends of modules' names as mere text: `norm` also means `input_layernorm`.
pub(crate) fn module_in_full<'n>(modules: &[String], name: &'n str) -> Option<&'n str> {
    let ends = name.match_indices('.').map(|(end, _)| end);
    ends.map(|end| &name[..end])
        .find(|module| modules.iter().any(|it| module.ends_with(it.as_str())))
}

/// Whether the path is one of the modules, ends with one, or is inside one.
pub(crate) fn within_any(modules: &[String], path: &str) -> bool {
    let ends = path.match_indices('.').map(|(end, _)| end).chain([path.len()]);
    ends.into_iter().any(|end| is_or_ends_with(modules, &path[..end]))
}

fn is_or_ends_with(names: &[impl AsRef<str>], path: &str) -> bool {
    names.iter().any(|name| {
        path.strip_suffix(name.as_ref()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
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
    fn new(field: &str, modules: &Modules) -> Result<Self, String> {
        match modules {
            Modules::Names(names) => Ok(Self::Names(names.clone())),
            Modules::Expression(all) if all.eq_ignore_ascii_case("all-linear") => Ok(Self::Linear),
            Modules::Expression(source) => {
                let paths = source.split('|').map(unescape).collect();
                if let Some(paths) = paths {
                    return Ok(Self::Paths(paths));
                }
                let expression = Expression::new(source);
                let expression =
                    expression.map_err(|problem| unreadable(field, source, problem))?;
                Ok(Self::Expression(Box::new(expression), source.clone()))
            }
        }
    }

    fn matches(&self, path: &str, is_linear: bool) -> bool {
        match self {
            Self::Expression(expression, _) => expression.matches(path),
            Self::Paths(paths) => paths.iter().any(|it| it == path),
            Self::Names(names) => is_or_ends_with(names, path),
            Self::Linear => is_linear,
        }
    }
}

impl Targets {
    /// Whether PEFT puts an adapter on the layer, or may do so.
    pub fn allow(&self, path: &str, is_linear: bool) -> bool {
        self.targets.is_none() || self.matches(path, is_linear)
    }

    /// Whether PEFT puts an adapter on the layer in any case.
    pub fn require(&self, path: &str, is_linear: bool) -> bool {
        let is_head = || is_or_ends_with(&HEADS, path);
        let may_be_left_out = matches!(self.targets, Some(Matcher::Linear)) && is_head();
        self.matches(path, is_linear) && !may_be_left_out
    }

    /// The same without modules that are trained in full.
    pub fn without_modules_to_save(self) -> Self {
        Self { modules_to_save: Vec::new(), ..self }
    }

    /// Whether PEFT saves the parameter `name` with a module that was trained in full.
    pub fn saves(&self, name: &str) -> bool {
        module_in_full(&self.modules_to_save, name).is_some()
    }

    /// Whether modules are trained in full, or all linear layers are meant: a model's parameters tell which these are.
    pub fn ask_for_parameters(&self) -> bool {
        !self.modules_to_save.is_empty() || matches!(self.targets, Some(Matcher::Linear))
    }

    fn matches(&self, path: &str, is_linear: bool) -> bool {
        let Some(targets) = &self.targets else { return false };
        if self.excludes.as_ref().is_some_and(|excludes| excludes.matches(path, is_linear))
            || within_any(&self.modules_to_save, path)
            || !targets.matches(path, is_linear)
        {
            return false;
        }
        match (targets, &self.layers) {
            // A full path in the list matches, whatever the indices are.
            (Matcher::Names(names), Some((indices, patterns)))
                if !names.iter().any(|name| name == path) =>
            {
                let index = match patterns.as_slice() {
                    [] => first_index(path),
                    patterns => patterns.iter().find_map(|pattern| pattern.number_behind(path)),
                };
                index.is_some_and(|index| indices.contains(&index))
            }
            _ => true,
        }
    }

    /// The names that match none of the paths, or the expression if it matches none of them.
    pub fn unmatched<'a>(&self, paths: impl Iterator<Item = &'a str> + Clone) -> Vec<String> {
        match &self.targets {
            Some(Matcher::Expression(expression, source)) => {
                let is_used = paths.clone().any(|path| expression.matches(path));
                if is_used { vec![] } else { vec![source.clone()] }
            }
            Some(Matcher::Paths(names)) => {
                let matches = |name: &String| paths.clone().any(|path| path == name);
                names.iter().filter(|name| !matches(name)).cloned().collect()
            }
            Some(Matcher::Names(names)) => {
                let matches = |name: &String| {
                    paths.clone().any(|path| is_or_ends_with(std::slice::from_ref(name), path))
                };
                names.iter().filter(|name| !matches(name)).cloned().collect()
            }
            Some(Matcher::Linear) | None => vec![],
        }
    }
}

/// The first number that is a whole name of the path, but for the first two and the last.
fn first_index(path: &str) -> Option<usize> {
    let names: Vec<_> = path.split('.').collect();
    let inner = names.get(2..names.len() - 1)?;
    let number = inner.iter().find(|it| !it.is_empty() && it.bytes().all(|it| it.is_ascii_digit()));
    number?.parse().ok()
}
