//! Reading and writing `adapter_config.json`.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::backend::Backend;
use serde::Deserialize;
use serde_json::{Value, json};

use super::json::{Entries, check_object};
use crate::{
    adapter::WeightLayout,
    adapters::{
        LoraAdapters,
        peft_targets::{Indices, Modules, Names, Targets, within_any},
    },
    config::Scaling,
    error::LoraError,
    pattern::Pattern,
};

/// Unsupported fields that change what an adapter computes. A field that is null, false or empty is off,
/// and is accepted.
const UNSUPPORTED: [&str; 11] = [
    "alora_invocation_tokens",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
    "arrow_config",
];

/// Initialisations that move a part of the base's weight into the adapter. Such an adapter does not fit
/// the original base.
const BASE_CHANGING: [&str; 5] = ["pissa", "olora", "loftq", "corda", "lora_ga"];

/// The contents of the file.
#[derive(Debug, Deserialize)]
pub(crate) struct PeftConfig {
    peft_type: Option<String>,
    #[serde(default = "default_rank")]
    r: usize,
    #[serde(default = "default_alpha")]
    lora_alpha: f64,
    #[serde(default)]
    pub lora_dropout: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    rank_pattern: Entries<usize>,
    #[serde(default)]
    alpha_pattern: Entries<f64>,
    /// `rank_pattern`, compiled.
    #[serde(skip)]
    ranks: Vec<(Pattern, usize)>,
    /// `alpha_pattern`, compiled.
    #[serde(skip)]
    alphas: Vec<(Pattern, f64)>,
    #[serde(default)]
    pub lora_bias: bool,
    #[serde(default)]
    bias: BiasMode,
    modules_to_save: Option<Vec<String>>,
    pub target_modules: Option<Modules>,
    pub exclude_modules: Option<Modules>,
    pub layers_to_transform: Option<Indices>,
    pub layers_pattern: Option<Names>,
    init_lora_weights: Option<Value>,
    /// All other fields.
    #[serde(flatten)]
    pub others: BTreeMap<String, Value>,
}

fn default_rank() -> usize {
    8
}

fn default_alpha() -> f64 {
    8.0
}

/// Which biases of the base were trained, and are in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum BiasMode {
    #[default]
    None,
    All,
    LoraOnly,
}

pub(crate) fn parse(text: &[u8], file: &str) -> Result<PeftConfig, LoraError> {
    let invalid = |problem: String| LoraError::InvalidFile { file: file.to_owned(), problem };
    let unsupported = |field: &str, reason: String| LoraError::Unsupported {
        file: file.to_owned(),
        field: field.to_owned(),
        reason,
    };
    check_object(text).map_err(invalid)?;
    let mut config: PeftConfig =
        serde_json::from_slice(text).map_err(|error| invalid(error.to_string()))?;

    match config.peft_type.as_deref() {
        Some("LORA") => {}
        Some(other) => return Err(unsupported("peft_type", format!(": it is {other}, not LORA"))),
        None => return Err(invalid("`peft_type` is missing; LORA is expected".to_owned())),
    }
    for field in UNSUPPORTED {
        if config.others.get(field).is_some_and(is_on) {
            return Err(unsupported(field, String::new()));
        }
    }
    if let Some(Value::String(init)) = &config.init_lora_weights
        && BASE_CHANGING.iter().any(|it| init.to_lowercase().starts_with(it))
    {
        let reason = format!(
            ": {init} changes the base's weights; convert the adapter in PEFT with \
             `save_pretrained(..., path_initial_model_for_weight_conversion=...)`"
        );
        return Err(unsupported("init_lora_weights", reason));
    }
    let ranks = config.rank_pattern.0.iter().map(|(_, rank)| *rank);
    if ranks.chain([config.r]).any(|rank| rank == 0) {
        return Err(invalid("a rank is 0".to_owned()));
    }
    let alphas = config.alpha_pattern.0.iter().map(|(_, alpha)| *alpha);
    if alphas.chain([config.lora_alpha]).any(|alpha| !alpha.is_finite()) {
        return Err(invalid("an alpha is not finite".to_owned()));
    }
    if !(0.0..1.0).contains(&config.lora_dropout) {
        return Err(invalid(format!("`lora_dropout` is {}, not in [0, 1)", config.lora_dropout)));
    }
    // Patterns that this crate cannot compile are an error, because PEFT may accept them: to ignore them
    // would give a wrong rank or alpha.
    config.ranks = compile_keys(&config.rank_pattern).map_err(invalid)?;
    config.alphas = compile_keys(&config.alpha_pattern).map_err(invalid)?;
    Ok(config)
}

fn is_on(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    }
}

/// Compiles the keys of rank or alpha patterns. A key matches a whole path or the end of a path.
fn compile_keys<V: Copy>(patterns: &Entries<V>) -> Result<Vec<(Pattern, V)>, String> {
    let compiled = patterns.0.iter().map(|(key, value)| Ok((Pattern::new(key)?, *value)));
    compiled.collect::<Result<_, LoraError>>().map_err(|error| error.to_string())
}

fn first_match<V: Copy>(patterns: &[(Pattern, V)], path: &str) -> Option<V> {
    patterns.iter().find(|(key, _)| key.matches(path)).map(|(_, value)| *value)
}

impl PeftConfig {
    pub fn rank(&self, path: &str) -> usize {
        first_match(&self.ranks, path).unwrap_or(self.r)
    }

    pub fn alpha(&self, path: &str) -> f64 {
        first_match(&self.alphas, path).unwrap_or(self.lora_alpha)
    }

    pub fn scaling(&self) -> Scaling {
        if self.use_rslora { Scaling::AlphaOverSqrtRank } else { Scaling::AlphaOverRank }
    }

    /// The layers that the configuration targets, as [`Targets::new`] reads them.
    pub fn targets(&self) -> Option<Targets> {
        Targets::new(
            self.target_modules.as_ref(),
            self.exclude_modules.as_ref(),
            self.layers_to_transform.as_ref(),
            self.layers_pattern.as_ref(),
            self.modules_to_save(),
        )
    }

    pub fn modules_to_save(&self) -> &[String] {
        self.modules_to_save.as_deref().unwrap_or_default()
    }

    /// Whether the file may hold the parameter `name`, trained in full. `of_target` says whether the
    /// parameter belongs to the base of an adapted layer.
    pub fn saves(&self, name: &str, of_target: bool) -> bool {
        let is_bias = name == "bias" || name.ends_with(".bias");
        let by_mode = match self.bias {
            BiasMode::None => false,
            BiasMode::All => is_bias,
            BiasMode::LoraOnly => is_bias && of_target,
        };
        by_mode || within_any(self.modules_to_save(), name)
    }
}

/// The text of the file that describes `set`.
pub(crate) fn write<B: Backend>(set: &LoraAdapters<B>, file: &str) -> Result<Vec<u8>, LoraError> {
    let unsupported = |field: &str, reason: &str| LoraError::Unsupported {
        file: file.to_owned(),
        field: field.to_owned(),
        reason: reason.to_owned(),
    };
    let Some(first) = set.adapters.values().next() else {
        return Err(unsupported("an empty set", ": there is no adapter to save"));
    };
    if set.adapters.contains_key("") {
        return Err(unsupported("a layer without a name", ": make it the field of a model"));
    }

    for (path, adapter) in set.iter() {
        let reason = match &adapter.layout {
            WeightLayout::Conv { groups, .. } if *groups > 1 => {
                ": its convolution has groups, for which PEFT computes a different update"
            }
            WeightLayout::ConvTranspose { .. } => {
                ": PEFT has no adapters of transposed convolutions"
            }
            WeightLayout::Embedding if set.adapters.values().any(|it| it.bias.is_some()) => {
                ": PEFT has no adapters of embeddings in a set with biases"
            }
            _ => continue,
        };
        return Err(unsupported(path, reason));
    }

    // A file has one scaling rule: rsLoRA's if every adapter uses it, alpha/rank otherwise.
    let rslora = set.adapters.values().all(|it| it.scaling == Scaling::AlphaOverSqrtRank);
    let alpha = |path: &str| {
        let adapter = &set.adapters[path];
        match adapter.scaling {
            Scaling::AlphaOverSqrtRank if rslora => adapter.alpha,
            Scaling::AlphaOverRank => adapter.alpha,
            _ => adapter.scale() * adapter.rank() as f64,
        }
    };
    let paths = || set.adapters.keys();
    let exactly = |path: &str| format!("^{}", regex::escape(path));
    let (rank, common_alpha) = (first.rank(), alpha(paths().next().expect("there is one")));
    let ranks = paths().filter(|path| set.adapters[*path].rank() != rank);
    let ranks: BTreeMap<_, _> =
        ranks.map(|path| (exactly(path), set.adapters[path].rank())).collect();
    let alphas = paths().filter(|path| alpha(path) != common_alpha);
    let alphas: BTreeMap<_, _> = alphas.map(|path| (exactly(path), number(alpha(path)))).collect();
    if let Some(path) = paths().find(|path| !alpha(path).is_finite()) {
        return Err(unsupported("lora_alpha", &format!(": that of `{path}` is not finite")));
    }
    let dropout = set.adapters.values().map(|it| it.dropout.prob).fold(0.0, f64::max);
    if dropout >= 1.0 {
        return Err(unsupported("lora_dropout", ": it drops everything"));
    }

    let biases: BTreeSet<_> = set
        .extras
        .keys()
        .filter(|name| !within_any(&set.modules_to_save, name))
        // The other extras are the tables of adapted embeddings. PEFT has no field for these.
        .filter(|name| *name == "bias" || name.ends_with(".bias"))
        .map(String::as_str)
        .collect();
    let of_target = |name: &&str| {
        name.strip_suffix(".bias").is_some_and(|path| set.adapters.contains_key(path))
    };
    let bias = match &biases {
        biases if biases.is_empty() => "none",
        biases if biases.iter().all(of_target) => "lora_only",
        _ => "all",
    };

    let mut fields = set.config.clone();
    for (name, value) in [
        ("alpha_pattern", json!(alphas)),
        ("bias", json!(bias)),
        ("inference_mode", json!(true)),
        ("init_lora_weights", json!(true)),
        ("lora_alpha", number(common_alpha)),
        ("lora_bias", json!(set.adapters.values().any(|it| it.bias.is_some()))),
        ("lora_dropout", json!(dropout)),
        ("peft_type", json!("LORA")),
        ("r", json!(rank)),
        ("rank_pattern", json!(ranks)),
        // An expression, because a name in a list also matches every path that ends with that name.
        (
            "target_modules",
            json!(paths().map(|it| regex::escape(it)).collect::<Vec<_>>().join("|")),
        ),
        ("use_rslora", json!(rslora)),
    ] {
        fields.insert(name.to_owned(), value);
    }
    for (name, value) in [
        ("base_model_name_or_path", Value::Null),
        ("fan_in_fan_out", json!(false)),
        ("task_type", Value::Null),
    ] {
        fields.entry(name.to_owned()).or_insert(value);
    }
    if !set.modules_to_save.is_empty() {
        fields.insert("modules_to_save".to_owned(), json!(set.modules_to_save));
    }
    let mut text = serde_json::to_vec_pretty(&fields).expect("maps of JSON can be written");
    text.push(b'\n');
    Ok(text)
}

/// The number as PEFT writes it: a whole number has no decimal point.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}
