//! Other names for a model's modules.

use std::collections::BTreeMap;

use burn::tensor::backend::Backend;

use super::LoraAdapters;
use crate::error::{LoraError, quoted};

/// A mapping from the names that a model has in Python to the paths that it has here, as pairs of templates.
///
/// ```
/// use burn_lora::peft::Renaming;
///
/// let names = Renaming::new([
///     ("encoder.layer.*.attention.self", "blocks.*.attention"),
///     ("encoder.layer.*.intermediate.dense", "blocks.*.expand"),
/// ]);
/// assert_eq!(names.apply("encoder.layer.3.attention.self.query"), "blocks.3.attention.query");
/// assert_eq!(names.inverse().apply("blocks.3.attention.query"), "encoder.layer.3.attention.self.query");
/// assert_eq!(names.apply("head"), "head");
/// ```
///
/// A template matches the module at its path, and everything in that module. `*` matches one name, such
/// as a layer's number. The first pair whose template matches is used. A path that no template matches
/// stays as it is. An empty template matches every path, so it must come last.
///
/// Everywhere in this crate, a renaming goes from the names in the files to the paths of the model. Rename a set of
/// adapters after you load it, and rename it back by the [`inverse`](Self::inverse) before you save it:
///
/// ```no_run
/// # use burn::{module::Module, tensor::backend::Backend};
/// # use burn_lora::{Lora, LoraAdapters, LoraError, LoraModule, peft::Renaming};
/// # fn run<B: Backend, M: Module<B>>(base: M, names: Renaming, device: B::Device) -> Result<(), LoraError> {
/// let adapters = LoraAdapters::load("adapters/from-python", &device)?;
/// let model = base.switch(&adapters.renamed(&names)?)?;
/// model.adapters().renamed(&names.inverse())?.save("adapters/for-python")?;
/// # Ok(())
/// # }
/// ```
///
/// A template that matches nothing is misspelt most likely, or the renaming is the wrong way round: it is an error. A
/// table of the names of a whole model is [`partial`](Self::partial), because few sets adapt every layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Renaming {
    pairs: Vec<(String, String)>,
    is_partial: bool,
}

impl Renaming {
    /// A renaming from the first template of each pair, which is the name in Python, to the second, which is the path
    /// here.
    ///
    /// # Panics
    ///
    /// If the two templates of a pair do not have the same number of `*`.
    pub fn new<S: Into<String>, T: Into<String>>(pairs: impl IntoIterator<Item = (S, T)>) -> Self {
        let pairs: Vec<(String, String)> =
            pairs.into_iter().map(|(from, to)| (from.into(), to.into())).collect();
        let stars = |template: &str| template.split('.').filter(|it| *it == "*").count();
        for (from, to) in &pairs {
            assert!(
                stars(from) == stars(to),
                "both templates of a renaming must have the same number of `*`: `{from}`, `{to}`"
            );
        }
        Self { pairs, is_partial: false }
    }

    /// The same renaming for sets that have only some of these names: it is enough if one template matches.
    pub fn partial(self) -> Self {
        Self { is_partial: true, ..self }
    }

    /// The renaming in the opposite direction.
    pub fn inverse(&self) -> Self {
        let pairs = self.pairs.iter().map(|(from, to)| (to.clone(), from.clone())).collect();
        Self { pairs, is_partial: self.is_partial }
    }

    /// The new name of the module or parameter at `path`.
    pub fn apply(&self, path: &str) -> String {
        self.find(path).unwrap_or_else(|| path.to_owned())
    }

    /// The new name, if a template matches.
    pub(crate) fn find(&self, path: &str) -> Option<String> {
        self.pairs.iter().find_map(|(from, to)| rename(path, from, to))
    }

    /// Fails if templates that should match one of the names match none. `whose` says what has the names.
    pub(crate) fn require_matches(&self, names: &[String], whose: &str) -> Result<(), LoraError> {
        let is_used =
            |(from, to): &&(String, String)| names.iter().any(|it| rename(it, from, to).is_some());
        let (used, unused): (Vec<_>, Vec<_>) = self.pairs.iter().partition(is_used);
        if names.is_empty() || unused.is_empty() || (self.is_partial && !used.is_empty()) {
            return Ok(());
        }
        let unused: Vec<_> = unused.into_iter().map(|(from, _)| from.clone()).collect();
        let inverse = self.inverse();
        let is_inverse = used.is_empty() && inverse.pairs.iter().any(|pair| is_used(&pair));
        let remedy = match is_inverse {
            true => "the other templates do: use its `inverse()`".to_owned(),
            false => format!("{whose} has {}", quoted(names)),
        };
        let problem = format!("has templates that match nothing: {}; {remedy}", quoted(&unused));
        Err(LoraError::InvalidArgument { argument: "names", problem })
    }
}

/// Whether the template matches the whole path.
pub(crate) fn is_at(path: &str, template: &str) -> bool {
    rename(path, template, "").is_some_and(|rest| rest.is_empty())
}

/// The path with the template `from` replaced by `to`; `None` if the path does not match `from`.
fn rename(path: &str, from: &str, to: &str) -> Option<String> {
    let mut names = path.split('.').filter(|name| !name.is_empty());
    let mut stars = Vec::new();
    for expected in from.split('.').filter(|name| !name.is_empty()) {
        let name = names.next()?;
        match expected {
            "*" => stars.push(name),
            expected if expected == name => {}
            _ => return None,
        }
    }
    let mut stars = stars.into_iter();
    let start = to.split('.').filter(|name| !name.is_empty());
    let start = start.filter_map(|name| if name == "*" { stars.next() } else { Some(name) });
    Some(start.chain(names).collect::<Vec<_>>().join("."))
}

impl<B: Backend> LoraAdapters<B> {
    /// The set with new names for the layers, and for the parameters that were trained in full: each name is
    /// replaced by [what the renaming gives](Renaming::apply).
    ///
    /// # Errors
    ///
    /// [`LoraError::InvalidArgument`] if a template of the renaming matches nothing in the set, or, if it is
    /// [partial](Renaming::partial), none does. [`LoraError::Incompatible`] if two layers or two parameters would get the
    /// same name, or if a parameter would no longer be in the module that was trained in full.
    pub fn renamed(&self, names: &Renaming) -> Result<Self, LoraError> {
        let known = self.adapters.keys().chain(self.extras.keys()).chain(&self.modules_to_save);
        names.require_matches(&known.cloned().collect::<Vec<_>>(), "the set")?;
        for module in &self.modules_to_save {
            let within = |module: &str, name: &str| {
                let rest = name.strip_prefix(module);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            };
            let held = self.extras.keys().filter(|name| within(module, name));
            if let Some(name) =
                held.into_iter().find(|name| !within(&names.apply(module), &names.apply(name)))
            {
                let problem = format!(
                    "the renaming takes `{name}` out of this module: rename the module as a whole, too"
                );
                return Err(LoraError::Incompatible { path: module.clone(), problem });
            }
        }
        let mut set = self.clone();
        set.adapters = rename_keys(set.adapters, names)?;
        set.extras = rename_keys(set.extras, names)?;
        for module in &mut set.modules_to_save {
            *module = names.apply(module);
        }
        // `targets` uses the names in the file.
        set.names_in_file.insert(0, names.inverse());
        Ok(set)
    }
}

fn rename_keys<V>(
    map: BTreeMap<String, V>,
    names: &Renaming,
) -> Result<BTreeMap<String, V>, LoraError> {
    let mut renamed = BTreeMap::new();
    for (path, value) in map {
        let name = names.apply(&path);
        if renamed.insert(name.clone(), value).is_some() {
            let problem = format!("the renaming gives this name to `{path}` and to another");
            return Err(LoraError::Incompatible { path: name, problem });
        }
    }
    Ok(renamed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_template_that_fits_decides() {
        let names = Renaming::new([
            ("bert.blocks.*.attention.output", "encoder.layer.*.attention.output.dense"),
            ("bert.blocks.*.attention", "encoder.layer.*.attention.self"),
            ("classifier", "classifier"),
            ("bert", ""),
        ]);
        for (path, name) in [
            ("bert.blocks.0.attention.output", "encoder.layer.0.attention.output.dense"),
            ("bert.blocks.11.attention.key.bias", "encoder.layer.11.attention.self.key.bias"),
            ("bert.words", "words"),
            ("classifier.weight", "classifier.weight"),
        ] {
            assert_eq!(names.apply(path), name);
            assert_eq!(names.inverse().apply(name), path);
        }
        assert_eq!(names.apply("bert.blocks.0"), "blocks.0");
        assert_eq!(names.apply("other"), "other");
    }

    #[test]
    #[should_panic = "the same number of `*`: `a.*`, `b`"]
    fn templates_must_have_the_same_stars() {
        Renaming::new([("a.*", "b")]);
    }
}
