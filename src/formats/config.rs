//! Reading and writing `adapter_config.json`.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::backend::Backend;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::json::{Entries, check_object, explained};
use crate::{
    adapter::{LoraAdapter, Tie, WeightLayout},
    adapters::{
        BASE_MODEL, LoraAdapters, TASK_TYPE,
        peft_targets::{Indices, Modules, Names, Targets, module_in_full, unreadable, within_any},
    },
    config::Scaling,
    error::{LoraError, named, shown},
    pattern::python::Expression,
};

/// Unsupported fields that change what an adapter computes. A field that is null, false or empty is off,
/// and is accepted.
const UNSUPPORTED: [&str; 10] = [
    "alora_invocation_tokens",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
    "arrow_config",
];

/// Initializations that move a part of the base's weight into the adapter. Such an adapter does not fit
/// the original base.
const BASE_CHANGING: [&str; 5] = ["pissa", "olora", "loftq", "corda", "lora_ga"];

/// The contents of the file.
#[derive(Debug)]
pub(crate) struct PeftConfig {
    r: usize,
    lora_alpha: f64,
    pub lora_dropout: f64,
    /// Whether every adapter has magnitudes.
    pub use_dora: bool,
    use_rslora: bool,
    /// The patterns of the ranks, compiled.
    ranks: Vec<(Expression, usize)>,
    /// The patterns of the alphas, compiled.
    alphas: Vec<(Expression, f64)>,
    pub lora_bias: bool,
    bias: BiasMode,
    modules_to_save: Vec<String>,
    pub targets: Targets,
    /// Whether weights in the file may be those of Hugging Face's `Conv1D`.
    pub fan_in_fan_out: bool,
    /// Whether the adapter of an embedding moves a head that is the same table, too.
    pub ties_head: bool,
    /// All other fields.
    pub others: BTreeMap<String, Value>,
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

/// The fields that were not read yet.
struct Fields(BTreeMap<String, Value>);

impl Fields {
    /// Takes out a field. As in PEFT, one that is null is not set.
    fn take<T: DeserializeOwned>(
        &mut self,
        field: &str,
        expected: &str,
    ) -> Result<Option<T>, String> {
        match self.0.remove(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => typed(field, value, expected).map(Some),
        }
    }
}

fn typed<T: DeserializeOwned>(field: &str, value: Value, expected: &str) -> Result<T, String> {
    let problem = format!("`{field}` is {}; {expected} is expected", shown(&value.to_string()));
    serde_json::from_value(without_fraction(value)).map_err(|_| problem)
}

/// Writes whole numbers without a fraction. Some programs write 2.0 for 2.
fn without_fraction(value: Value) -> Value {
    match value {
        Value::Number(it) if it.is_f64() => number(it.as_f64().unwrap_or_default()),
        Value::Array(items) => items.into_iter().map(without_fraction).collect(),
        other => other,
    }
}

/// The patterns of a field, compiled, in the order of the file. A key matches a whole path or the end of
/// a path.
///
/// Patterns that cannot be read here are an error, because PEFT may accept them: to ignore them would give a wrong rank
/// or alpha.
fn patterns<V: DeserializeOwned>(
    field: &str,
    entries: Option<Entries<Value>>,
    expected: &str,
) -> Result<Vec<(Expression, V)>, String> {
    let read = |(key, value): (String, Value)| {
        let pattern = Expression::part(&key);
        let pattern = pattern.map_err(|problem| unreadable(field, &key, problem))?;
        Ok((pattern, typed(&format!("{field}.{}", shown(&key)), value, expected)?))
    };
    let patterns: Vec<_> =
        entries.unwrap_or_default().0.into_iter().map(read).collect::<Result<_, String>>()?;
    match Expression::are_short_work(patterns.iter().map(|(pattern, _)| pattern)) {
        true => Ok(patterns),
        false => Err(format!(
            "`{field}`: to match its patterns takes too long; write plain names of layers"
        )),
    }
}

/// The fields whose order matters.
#[derive(Deserialize)]
struct Ordered {
    rank_pattern: Option<Entries<Value>>,
    alpha_pattern: Option<Entries<Value>>,
}

pub(crate) fn parse(text: &[u8], file: &str) -> Result<PeftConfig, LoraError> {
    let invalid = |problem: String| LoraError::InvalidFile { file: file.to_owned(), problem };
    let unsupported = |field: &str, reason: Option<String>| LoraError::Unsupported {
        file: file.to_owned(),
        field: field.to_owned(),
        reason,
    };
    let mut fields = Fields(object(text).map_err(invalid)?);
    let peft_type = fields.take::<String>("peft_type", "a string").map_err(invalid)?;
    match peft_type.as_deref() {
        Some("LORA") => {}
        Some(other) => {
            return Err(unsupported(
                "peft_type",
                Some(format!("it is {other}, not LORA; only LoRA's adapters are read")),
            ));
        }
        None => return Err(invalid("`peft_type` is missing; LORA is expected".to_owned())),
    }
    for field in UNSUPPORTED {
        if fields.0.get(field).is_some_and(is_on) {
            return Err(unsupported(field, None));
        }
    }
    if let Some(Value::String(init)) = fields.0.get("init_lora_weights")
        && BASE_CHANGING.iter().any(|it| init.to_lowercase().starts_with(it))
    {
        let reason = format!(
            "{init} changes the base's weights; convert the adapter in PEFT with \
             `save_pretrained(..., path_initial_model_for_weight_conversion=...)`"
        );
        return Err(unsupported("init_lora_weights", Some(reason)));
    }
    let config = fields.into_config(text).map_err(invalid)?;

    for (field, other, is_on) in [
        ("use_dora", "lora_bias", config.lora_bias),
        ("use_dora", "ensure_weight_tying", config.ties_head),
    ] {
        if config.use_dora && is_on {
            return Err(unsupported(field, Some(format!("it is set together with `{other}`"))));
        }
    }
    let ranks = config.ranks.iter().map(|(_, rank)| *rank);
    if ranks.chain([config.r]).any(|rank| rank == 0) {
        return Err(invalid("a rank is 0".to_owned()));
    }
    let alphas = config.alphas.iter().map(|(_, alpha)| *alpha);
    if alphas.chain([config.lora_alpha]).any(|alpha| !alpha.is_finite()) {
        return Err(invalid("an alpha is not finite".to_owned()));
    }
    if !(0.0..1.0).contains(&config.lora_dropout) {
        return Err(invalid(format!("`lora_dropout` is {}, not in [0, 1)", config.lora_dropout)));
    }
    Ok(config)
}

/// The fields of the object that the text is.
fn object(text: &[u8]) -> Result<BTreeMap<String, Value>, String> {
    check_object(text)?;
    serde_json::from_slice(text).map_err(|error| explained(text, &error))
}

impl Fields {
    fn into_config(mut self, text: &[u8]) -> Result<PeftConfig, String> {
        const NUMBER: &str = "a number";
        const WHOLE: &str = "a whole number of at least 0";
        const BOOL: &str = "true or false";
        const NAMES: &str = "a string or a list of strings";
        for field in ["rank_pattern", "alpha_pattern"] {
            self.take::<BTreeMap<String, Value>>(field, "an object of numbers")?;
        }
        let ordered: Ordered = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let modules_to_save: Vec<String> =
            self.take("modules_to_save", "a list of strings")?.unwrap_or_default();
        let targets = Targets::new(
            self.take::<Modules>("target_modules", NAMES)?.as_ref(),
            self.take::<Modules>("exclude_modules", NAMES)?.as_ref(),
            self.take::<Indices>("layers_to_transform", "a whole number or a list of these")?
                .as_ref(),
            self.take::<Names>("layers_pattern", NAMES)?.as_ref(),
            &modules_to_save,
        )?;
        Ok(PeftConfig {
            r: self.take("r", WHOLE)?.unwrap_or(8),
            lora_alpha: self.take("lora_alpha", NUMBER)?.unwrap_or(8.0),
            lora_dropout: self.take("lora_dropout", NUMBER)?.unwrap_or_default(),
            use_rslora: self.take("use_rslora", BOOL)?.unwrap_or_default(),
            ranks: patterns("rank_pattern", ordered.rank_pattern, WHOLE)?,
            alphas: patterns("alpha_pattern", ordered.alpha_pattern, NUMBER)?,
            lora_bias: self.take("lora_bias", BOOL)?.unwrap_or_default(),
            bias: self.take("bias", r#""none", "all" or "lora_only""#)?.unwrap_or_default(),
            modules_to_save,
            targets,
            fan_in_fan_out: self.0.get("fan_in_fan_out").is_some_and(is_on),
            use_dora: self.0.get("use_dora").is_some_and(is_on),
            ties_head: self.0.get("ensure_weight_tying").is_some_and(is_on),
            others: self.0,
        })
    }
}

fn is_on(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    }
}

fn first_match<V: Copy>(patterns: &[(Expression, V)], path: &str) -> Option<V> {
    patterns.iter().find(|(key, _)| key.matches_end(path)).map(|(_, value)| *value)
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

    /// The module that the parameter `name` was trained in full with, or the parameter, if it was by itself.
    pub fn module_to_save<'n>(&self, name: &'n str) -> Option<&'n str> {
        let is_named = || self.modules_to_save.iter().any(|it| name.ends_with(it.as_str()));
        module_in_full(&self.modules_to_save, name).or_else(|| is_named().then_some(name))
    }

    /// Whether biases of the base were trained, and are in the file.
    pub fn trains_biases(&self) -> bool {
        self.bias != BiasMode::None
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
        by_mode || self.module_to_save(name).is_some()
    }
}

/// The text of the file that describes `set`.
pub(crate) fn write<B: Backend>(set: &LoraAdapters<B>, file: &str) -> Result<Vec<u8>, LoraError> {
    let unsupported = |field: &str, reason: &str| LoraError::Unsupported {
        file: file.to_owned(),
        field: field.to_owned(),
        reason: Some(reason.to_owned()),
    };
    let Some(first) = set.adapters.values().next() else {
        return Err(unsupported("an empty set", "there is no adapter to save"));
    };
    if set.adapters.contains_key("") {
        return Err(unsupported(named(""), "it has no name; make it the field of a model"));
    }

    for (path, adapter) in set.iter() {
        if let Some(reason) = adapter.layout.not_in_peft() {
            let remedy = "save the adapted model by `save_file`, whose record holds every adapter, or leave the \
                          layer out by `excludes`";
            return Err(unsupported(path, &format!("{reason}; {remedy}")));
        }
        let reason = match &adapter.layout {
            WeightLayout::Unknown => {
                "it was put together by hand, and files hold adapters of linear layers, convolutions and \
                 embeddings in different ways; put the set on its model and save \
                 `model.switch(&set)?.adapters()`, or say what it is for by `of_linear`, `of_convolution` or \
                 `of_embedding`"
            }
            WeightLayout::Embedding if set.adapters.values().any(|it| it.bias.is_some()) => {
                "PEFT has no adapters of embeddings in a set with biases"
            }
            _ if adapter.magnitude.is_some() != first.magnitude.is_some() => {
                "some adapters have DoRA's magnitudes, and others do not; save them as two sets"
            }
            _ if adapter.magnitude.is_some() && adapter.bias.is_some() => {
                "PEFT has no adapters with DoRA's magnitudes and a bias"
            }
            WeightLayout::Embedding if adapter.magnitude.is_some() && adapter.tie == Tie::Moves => {
                "it moves a head that is the same table, too, which PEFT has no files for with DoRA's \
                 magnitudes; leave the embedding out, or merge"
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
            _ => adapter.alpha_over_rank(),
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
        return Err(unsupported("lora_alpha", &format!("that of `{path}` is not finite")));
    }
    let dropout = set.adapters.values().map(|it| it.dropout.prob).fold(0.0, f64::max);
    if dropout >= 1.0 {
        return Err(unsupported("lora_dropout", "it drops everything"));
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

    let moves_head = |adapter: &LoraAdapter<B>| {
        adapter.layout == WeightLayout::Embedding && adapter.tie == Tie::Moves
    };
    let ties_head = set.adapters.values().any(|it| moves_head(it));
    let mut targets: Vec<_> = paths().map(|path| regex::escape(path)).collect();
    // PEFT ties a head only if the expression matches the bare name of an embedding that it knows.
    let is_known =
        |path: &String| path.ends_with(".embed_tokens") && moves_head(&set.adapters[path]);
    if paths().any(is_known) {
        targets.push("embed_tokens".to_owned());
    }
    let matrices: Vec<_> = set.extras.values().filter(|it| it.shape.len() == 2).collect();
    let mut fields = set.config.clone();
    if !matrices.is_empty() {
        let has_conv1d = matrices.iter().any(|it| it.may_be_conv1d);
        fields.insert("fan_in_fan_out".to_owned(), json!(has_conv1d));
    }
    for (name, value) in [
        ("alpha_pattern", json!(alphas)),
        ("bias", json!(bias)),
        ("ensure_weight_tying", json!(ties_head)),
        ("inference_mode", json!(true)),
        ("init_lora_weights", json!(true)),
        ("lora_alpha", number(common_alpha)),
        ("lora_bias", json!(set.adapters.values().any(|it| it.bias.is_some()))),
        ("lora_dropout", json!(dropout)),
        ("peft_type", json!("LORA")),
        ("r", json!(rank)),
        ("rank_pattern", json!(ranks)),
        // An expression, because a name in a list also matches every path that ends with that name.
        ("target_modules", json!(targets.join("|"))),
        ("use_dora", json!(first.magnitude.is_some())),
        ("use_rslora", json!(rslora)),
    ] {
        fields.insert(name.to_owned(), value);
    }
    for (name, value) in
        [(BASE_MODEL, Value::Null), ("fan_in_fan_out", json!(false)), (TASK_TYPE, Value::Null)]
    {
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
