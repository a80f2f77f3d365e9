//! Values for patterns, as files have them.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};

/// Reads patterns with their values, in the order of the file: a list of pairs, or a map.
pub(super) fn read<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Vec<(String, T)>, D::Error> {
    struct Pairs<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Pairs<T> {
        type Value = Vec<(String, T)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of patterns, or a list of pairs")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut pairs: A) -> Result<Self::Value, A::Error> {
            std::iter::from_fn(|| pairs.next_element().transpose()).collect()
        }

        fn visit_map<A: MapAccess<'de>>(self, mut pairs: A) -> Result<Self::Value, A::Error> {
            std::iter::from_fn(|| pairs.next_entry().transpose()).collect()
        }
    }
    // Formats that do not tell what comes next always have the list.
    match deserializer.is_human_readable() {
        true => deserializer.deserialize_any(Pairs(PhantomData)),
        false => deserializer.deserialize_seq(Pairs(PhantomData)),
    }
}
