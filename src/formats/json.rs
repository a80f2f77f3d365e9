//! JSON without duplicate keys.

use std::{collections::BTreeSet, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use crate::error::shown;

/// Any JSON in which no object has the same key twice. Of two equal keys some parsers use the first, and
/// others the last, so they would read such a file differently.
pub(super) struct UniqueKeys;

impl<'de> Deserialize<'de> for UniqueKeys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueKeysVisitor)
    }
}

struct UniqueKeysVisitor;

impl<'de> Visitor<'de> for UniqueKeysVisitor {
    type Value = UniqueKeys;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueKeys, A::Error> {
        let mut seen = BTreeSet::new();
        while let Some(key) = map.next_key::<String>()? {
            map.next_value::<UniqueKeys>()?;
            if let Some(key) = seen.replace(key) {
                return Err(Error::custom(format!("the key `{}` occurs twice", shown(&key))));
            }
        }
        Ok(UniqueKeys)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<UniqueKeys, A::Error> {
        while seq.next_element::<UniqueKeys>()?.is_some() {}
        Ok(UniqueKeys)
    }

    fn visit_unit<E>(self) -> Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_bool<E>(self, _: bool) -> Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_i64<E>(self, _: i64) -> Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_u64<E>(self, _: u64) -> Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_f64<E>(self, _: f64) -> Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_str<E>(self, _: &str) -> Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }
}

/// The entries of an object, in the order in which they are written.
#[derive(Debug, Default, Clone)]
pub(super) struct Entries<V>(pub Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Entries<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor<V>(std::marker::PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for EntriesVisitor<V> {
            type Value = Entries<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<V>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(EntriesVisitor(std::marker::PhantomData))
    }
}

/// Checks that a text is one JSON object in which no key occurs twice.
pub(super) fn check_object(text: &[u8]) -> Result<(), String> {
    serde_json::from_slice::<Entries<IgnoredAny>>(text).map_err(|error| explained(text, &error))?;
    serde_json::from_slice::<UniqueKeys>(text).map_err(|error| explained(text, &error))?;
    Ok(())
}

/// The message of an error at a value, with the field that it belongs to. Python writes numbers that are not finite as
/// JSON has none.
pub(super) fn explained(text: &[u8], error: &serde_json::Error) -> String {
    let message = error.to_string();
    if !error.is_syntax() {
        return message;
    }
    let lines = text.split_inclusive(|it| *it == b'\n').take(error.line().saturating_sub(1));
    let place = lines.map(<[u8]>::len).sum::<usize>() + error.column();
    let Some((field, start)) = value_at(&text[..place.min(text.len())]) else { return message };
    let field = shown(&field);
    let end = |byte: &u8| b",]} \t\r\n".contains(byte);
    let value = text[start..].trim_ascii_start().split(end).next().unwrap_or_default();
    let value = shown(&String::from_utf8_lossy(value));
    let is_number = value.bytes().all(|it| it.is_ascii_digit() || b"+-.eE".contains(&it));
    if is_number && message.starts_with("number out of range")
        || ["NaN", "Infinity", "-Infinity"].contains(&value.as_str())
    {
        return format!("`{field}` is {value}; a finite number is expected");
    }
    format!("`{field}`: {message}")
}

/// The last value that begins in this beginning of a text, if a field holds it: the field, with those that it is in, and
/// where the value begins.
fn value_at(text: &[u8]) -> Option<(String, usize)> {
    let mut fields: Vec<Option<String>> = Vec::new();
    // The last string, and where the value of the innermost field begins.
    let (mut string, mut start) = (None, None);
    let mut at = 0;
    while let Some(byte) = text.get(at) {
        match byte {
            b'"' => {
                let rest = &text[at + 1..];
                let mut is_escaped = false;
                let length = rest.iter().position(|it| {
                    let ends = *it == b'"' && !is_escaped;
                    is_escaped = *it == b'\\' && !is_escaped;
                    ends
                });
                let length = length.unwrap_or(rest.len());
                string = Some(String::from_utf8_lossy(&rest[..length]).into_owned());
                at += length + 1;
            }
            b'{' | b'[' => {
                fields.push(None);
                start = Some(at + 1);
            }
            b'}' | b']' => drop(fields.pop()),
            b':' => {
                *fields.last_mut()? = string.take();
                start = Some(at + 1);
            }
            // The next item of a list begins here.
            b',' if fields.last().is_some_and(Option::is_none) => start = Some(at + 1),
            _ => {}
        }
        at += 1;
    }
    let names: Vec<_> = fields.into_iter().flatten().collect();
    Some((names.join("."), start?)).filter(|(field, _)| !field.is_empty())
}
