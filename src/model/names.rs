//! What adapters are called that do not fit by their names alone.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::backend::Backend;

use crate::adapters::LoraAdapters;

/// What to do about the adapters at `unknown`, if they look like those of the model's layers under other names.
/// `layers` has the shapes of the model's layers.
pub(super) fn hint<B: Backend>(
    unknown: &[String],
    set: &LoraAdapters<B>,
    layers: &BTreeMap<&str, [usize; 2]>,
) -> Option<String> {
    other_prefix(unknown, layers).or_else(|| other_names(unknown, set, layers))
}

/// How to rename them, if their paths differ from those of the model by what they begin with.
fn other_prefix(unknown: &[String], layers: &BTreeMap<&str, [usize; 2]>) -> Option<String> {
    let begins = |whole: &str, end: &str| {
        let prefix = whole.strip_suffix(end)?.strip_suffix('.')?;
        (!end.is_empty()).then(|| prefix.to_owned())
    };
    let by_all = |prefix_of: &dyn Fn(&str, &str) -> Option<String>| {
        let prefixes = |path: &String| {
            layers.keys().filter_map(|layer| prefix_of(path, layer)).collect::<BTreeSet<_>>()
        };
        let shared = unknown.iter().map(prefixes).reduce(|one, other| &one & &other)?;
        shared.into_iter().min_by_key(String::len)
    };
    let (theirs, ours) =
        (by_all(&|path, layer| begins(path, layer)), by_all(&|path, layer| begins(layer, path)));
    let (whose, prefix, from, to) = match (&theirs, &ours) {
        (Some(prefix), _) => ("in the set", prefix, prefix.as_str(), ""),
        (None, Some(prefix)) => ("in the model", prefix, "", prefix.as_str()),
        (None, None) => return None,
    };
    Some(format!(
        "the names {whose} begin with `{prefix}.`, and the others do not: rename the set by \
         `Renaming::new([({from:?}, {to:?})])`"
    ))
}

/// An example of a renaming, if each of them has the shape of a layer that the set has nothing for.
fn other_names<B: Backend>(
    unknown: &[String],
    set: &LoraAdapters<B>,
    layers: &BTreeMap<&str, [usize; 2]>,
) -> Option<String> {
    let free: Vec<_> = layers.iter().filter(|(path, _)| set.get(path).is_none()).collect();
    // The layer that is most alike, by the names at the end of both.
    let twin = |path: &String| {
        let shape = set.get(path)?.shape();
        let same = free.iter().filter(|(_, other)| **other == shape);
        // Of those that are as much alike, the first.
        let alike = same.map(|(layer, _)| (shared_end(path, layer), *layer));
        alike.reduce(|best, it| if it.0 > best.0 { it } else { best })
    };
    let twins = unknown.iter().map(|path| Some((path, twin(path)?)));
    let twins = twins.collect::<Option<Vec<_>>>()?;
    let (path, (end, layer)) =
        twins.into_iter().reduce(|best, it| if it.1.0 > best.1.0 { it } else { best })?;
    let (from, to) = templates(path, layer, end);
    Some(format!(
        "they have the shapes of layers of the model with other names: see `peft::Renaming`, such as \
         `Renaming::new([({from:?}, {to:?})])`"
    ))
}

/// How many names at the end of both paths are the same.
fn shared_end(one: &str, other: &str) -> usize {
    one.rsplit('.').zip(other.rsplit('.')).take_while(|(one, other)| one == other).count()
}

/// Both paths without the names that they share at their end, and with stars for numbers.
fn templates(one: &str, other: &str, shared: usize) -> (String, String) {
    let is_number = |name: &&str| name.bytes().all(|byte| byte.is_ascii_digit());
    let names = |path| -> Vec<&str> { str::split(path, '.').collect() };
    let (one, other) = (names(one), names(other));
    let shared = shared.min(one.len() - 1).min(other.len() - 1);
    let (one, other) = (&one[..one.len() - shared], &other[..other.len() - shared]);
    let numbers = |names: &[&str]| names.iter().copied().filter(|it| is_number(it)).count();
    let has_stars = numbers(one) == numbers(other);
    let template = |names: &[&str]| {
        let names = names.iter().map(|it| if has_stars && is_number(it) { "*" } else { *it });
        names.collect::<Vec<_>>().join(".")
    };
    (template(one), template(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_leave_out_what_is_the_same() {
        let of = |one, other| templates(one, other, shared_end(one, other));
        let expected = ("encoder.layer.*.attention.self".into(), "layers.*.attention".into());
        assert_eq!(
            of("encoder.layer.3.attention.self.query", "layers.0.attention.query"),
            expected
        );
        assert_eq!(of("fc.1", "fc1"), ("fc.1".into(), "fc1".into()));
        assert_eq!(of("net.fc", "fc"), ("net.fc".into(), "fc".into()));
    }
}
