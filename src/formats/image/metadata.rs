//! What the headers of the files say beside the tensors.
//!
//! diffusers keeps the fields of PEFT's configuration in one text, `lora_adapter_metadata`, with the part that they
//! are of before their names: `unet.r`. kohya's programs note what they trained with in `ss_network_*`.

use std::collections::{BTreeMap, HashMap};

use burn::tensor::backend::Backend;
use serde_json::{Map, Value};

use super::names::PARTS;
use crate::{
    adapters::LoraAdapters,
    error::LoraError,
    formats::{
        config::{self, PeftConfig},
        json::check_object,
    },
};

/// The name of the text, as in diffusers.
const FIELD: &str = "lora_adapter_metadata";

/// The fields that say what the adapters compute. No others are written, because diffusers passes them all on to PEFT,
/// which in older versions fails on those that it does not know.
const WRITTEN: [&str; 9] = [
    "alpha_pattern",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
];

/// Fields that choose layers. The tensors tell them, and diffusers has PEFT go by these.
const TARGETS: [&str; 4] =
    ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"];

/// The configurations of the parts, by what the names of their layers begin with.
pub(super) struct Configs(BTreeMap<&'static str, PeftConfig>);

impl Configs {
    /// The configurations in the header; `None` if it has none.
    pub fn read(
        header: &Option<HashMap<String, String>>,
        file: &str,
    ) -> Result<Option<Self>, LoraError> {
        let text = header.as_ref().and_then(|header| header.get(FIELD));
        let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
        let place = format!("{file}: `{FIELD}`");
        let invalid = |problem: String| LoraError::InvalidFile { file: place.clone(), problem };
        check_object(text.as_bytes()).map_err(invalid)?;
        let fields: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| invalid(error.to_string()))?;
        // Of patterns, the first that matches counts. diffusers sorts them, as a map here may do.
        let mut parts = BTreeMap::<_, Map<String, Value>>::new();
        for (name, value) in fields {
            let part =
                PARTS.iter().find_map(|(begin, _)| Some((*begin, name.strip_prefix(begin)?)));
            let (part, name) = part.unwrap_or(("", &name));
            parts.entry(part).or_default().insert(name.to_owned(), value);
        }
        let parsed = parts.into_iter().map(|(part, mut fields)| {
            fields.retain(|name, _| !TARGETS.contains(&name.as_str()));
            fields.entry("peft_type").or_insert_with(|| "LORA".into());
            let text = serde_json::to_vec(&fields).expect("maps of JSON can be written");
            Ok((part, config::parse(&text, &place)?))
        });
        Ok(Some(Self(parsed.collect::<Result<_, LoraError>>()?)))
    }

    /// The configuration of the layers whose names begin so.
    pub fn of(&self, begin: &str, file: &str) -> Result<&PeftConfig, LoraError> {
        self.0.get(begin).ok_or_else(|| {
            let whose = if begin.is_empty() { "names without a part" } else { begin };
            let problem = format!(
                "`{FIELD}` in its header says nothing of `{whose}`, of which there are adapters; take it out of the \
                 header, and alpha is the rank where no tensor says otherwise"
            );
            LoraError::InvalidFile { file: file.to_owned(), problem }
        })
    }
}

/// The header of a file of diffusers with these parts, by what the names of their layers begin with.
pub(super) fn diffusers<B: Backend>(
    parts: &BTreeMap<&'static str, LoraAdapters<B>>,
    file: &str,
) -> Result<HashMap<String, String>, LoraError> {
    let mut fields = BTreeMap::new();
    for (part, set) in parts {
        let config = config::write(set, file)?;
        let mut config: Map<String, Value> =
            serde_json::from_slice(&config).expect("what was written can be read");
        for name in WRITTEN {
            fields.insert(format!("{part}{name}"), config.remove(name));
        }
    }
    let text = serde_json::to_string_pretty(&fields).expect("maps of JSON can be written");
    Ok(HashMap::from([("format".to_owned(), "pt".to_owned()), (FIELD.to_owned(), text)]))
}

/// The header of a file of kohya's with these ranks and alphas. Where they differ, it says so, as sd-scripts does.
pub(super) fn kohya(
    ranks: &[usize],
    alphas: &[f64],
    has_magnitudes: bool,
) -> HashMap<String, String> {
    fn common<T: PartialEq + ToString>(values: &[T]) -> String {
        match values {
            [first, others @ ..] if others.iter().all(|it| it == first) => first.to_string(),
            _ => "Dynamic".to_owned(),
        }
    }
    // sd-scripts' own module has no magnitudes; LyCORIS has.
    let module = if has_magnitudes { "lycoris.kohya" } else { "networks.lora" };
    let fields = [
        ("format", "pt".to_owned()),
        ("ss_network_module", module.to_owned()),
        ("ss_network_dim", common(ranks)),
        ("ss_network_alpha", common(alphas)),
    ];
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
