//! The keys of the tensors: what each holds, and whether they are those that the configuration requires.

use std::collections::{BTreeMap, BTreeSet};

use safetensors::tensor::{Metadata, TensorInfo};

use super::config::PeftConfig;
use crate::{
    adapter::WeightLayout,
    error::{LoraError, Mismatch, shown},
};

pub(super) const PREFIX: &str = "base_model.model.";
pub(super) const A: &str = ".lora_A.weight";
pub(super) const B: &str = ".lora_B.weight";
pub(super) const B_BIAS: &str = ".lora_B.bias";
pub(super) const EMBEDDING_A: &str = ".lora_embedding_A";
pub(super) const EMBEDDING_B: &str = ".lora_embedding_B";
pub(super) const MAGNITUDE: &str = ".lora_magnitude_vector";
/// The same, as PEFT calls the parameter in memory.
const MAGNITUDE_IN_MEMORY: &str = ".lora_magnitude_vector.weight";

/// What the keys of trainable tokens end with.
const TOKENS: &str = ".token_adapter.trainable_tokens_delta";

/// The longest key, in bytes. Names of layers are far shorter, and the file may come from anywhere.
const LONGEST: usize = 500;

/// A batch norm's count of batches, which PyTorch needs for a momentum that Burn's norms do not have.
const BATCHES: &str = ".num_batches_tracked";

/// The most whole tables that PEFT saves unasked: those of the embeddings and of the head.
const MOST_TABLES: usize = 2;

/// The header's entries for the tensors of one layer.
#[derive(Default)]
pub(super) struct Parts<'a> {
    a: Option<&'a TensorInfo>,
    b: Option<&'a TensorInfo>,
    bias: Option<&'a TensorInfo>,
    embedding_a: Option<&'a TensorInfo>,
    embedding_b: Option<&'a TensorInfo>,
    /// With what its key ends with.
    magnitude: Option<(&'a TensorInfo, &'static str)>,
}

impl Parts<'_> {
    fn is_embedding(&self) -> bool {
        self.embedding_a.is_some() || self.embedding_b.is_some()
    }

    /// How the layer stores its weight. [`check`] checks the shapes of A and B.
    pub fn layout(&self) -> WeightLayout {
        match self.a {
            Some(a) if a.shape.len() > 2 => {
                WeightLayout::Conv { kernel: a.shape[2..].to_vec(), groups: 1 }
            }
            None if self.is_embedding() => WeightLayout::Embedding,
            _ => WeightLayout::Matrix,
        }
    }

    /// Whether the layer can be the head that is tied to the embedding `table`.
    fn repeats(&self, table: &Parts) -> bool {
        let shape = |info: Option<&TensorInfo>| Some(info?.shape.clone());
        let swapped = |info| shape(info).map(|it| it.into_iter().rev().collect::<Vec<_>>());
        table.is_embedding()
            && shape(self.a).is_some_and(|a| Some(a) == swapped(table.embedding_b))
            && shape(self.b).is_some_and(|b| Some(b) == swapped(table.embedding_a))
    }
}

/// The meaning of a tensor, by its key.
pub(super) enum Role<'a> {
    A(&'a str),
    B(&'a str),
    Bias(&'a str),
    Magnitude(&'a str),
    /// A parameter that was trained in full, with its name in the model.
    Extra(String),
    /// A parameter that the file holds once more, or as it was before training.
    Unused,
    /// A whole number, which no model here has.
    Count,
}

/// What all tensors of a file hold.
pub(super) struct Keys<'a> {
    /// The tensors of each layer, by the layer's path.
    pub layers: BTreeMap<&'a str, Parts<'a>>,
    /// The tensors in the order of the file.
    pub roles: Vec<(&'a str, &'a TensorInfo, Role<'a>)>,
    /// The modules that were trained in full.
    pub modules_to_save: Vec<String>,
    /// The keys of parameters of adapted layers that PEFT does not use either.
    pub unused: Vec<String>,
}

impl<'a> Keys<'a> {
    /// Checks that the tensors are those that the configuration requires.
    pub fn read(
        names: &'a [String],
        header: &'a Metadata,
        config: &PeftConfig,
        file: &str,
    ) -> Result<Self, LoraError> {
        let targets = &config.targets;
        let unsupported = |field: &str, reason: &str| LoraError::Unsupported {
            file: file.to_owned(),
            field: field.to_owned(),
            reason: Some(reason.to_owned()),
        };
        let (modules_to_save, unused) = (Vec::new(), Vec::new());
        let mut keys = Self { layers: BTreeMap::new(), roles: Vec::new(), modules_to_save, unused };
        let mut mismatch = Mismatch::default();
        for key in names {
            if key.len() > LONGEST {
                let problem = format!("the name `{}` is longer than any layer's", shown(key));
                return Err(LoraError::InvalidFile { file: file.to_owned(), problem });
            }
            if let Some(reason) = unreadable(key, names) {
                return Err(unsupported(key, reason));
            }
            let info = header.info(key).expect("the header has its keys");
            match key.strip_prefix(PREFIX) {
                Some(name) => {
                    let role = keys.role(name, info);
                    keys.roles.push((key, info, role));
                }
                None => mismatch.unexpected.push(key.to_owned()),
            }
        }
        mismatch.hint = names.iter().find_map(|key| foreign(key));
        keys.check_extras(config, &mut mismatch);
        for (path, parts) in &keys.layers {
            if is_grouped(parts, config.rank(path)) {
                return Err(unsupported(
                    &format!("{PREFIX}{path}{B}"),
                    "its convolution has groups, and PEFT's adapter mixes channels of different \
                     groups, which no update of the kernel can do",
                ));
            }
            check(path, parts, config, &mut mismatch);
            // PEFT would not put an adapter on this layer.
            let is_target = targets.allow(path, parts.layout() == WeightLayout::Matrix);
            let is_tied =
                config.ties_head && keys.layers.values().any(|table| parts.repeats(table));
            if !is_target && !is_tied {
                mismatch.unexpected.push(format!("{PREFIX}{path} (not a target)"));
            }
        }
        mismatch.unmatched_targets = targets.unmatched(keys.layers.keys().copied());
        mismatch.into_result(file)?;
        Ok(keys)
    }

    fn role(&mut self, name: &'a str, info: &'a TensorInfo) -> Role<'a> {
        if name.ends_with(BATCHES) {
            return Role::Count;
        }
        let of = |suffix| name.strip_suffix(suffix);
        let ends = [A, B, B_BIAS, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, MAGNITUDE_IN_MEMORY];
        let Some((end, path)) = ends.iter().find_map(|end| Some((*end, of(end)?))) else {
            return Role::Extra(name.to_owned());
        };
        let parts = self.layers.entry(path).or_default();
        if end.starts_with(MAGNITUDE) && parts.magnitude.is_some() {
            // The file holds it twice.
            return Role::Extra(name.to_owned());
        }
        if end.starts_with(MAGNITUDE) {
            parts.magnitude = Some((info, end));
            return Role::Magnitude(path);
        }
        let (part, role) = match end {
            A => (&mut parts.a, Role::A(path)),
            EMBEDDING_A => (&mut parts.embedding_a, Role::A(path)),
            B => (&mut parts.b, Role::B(path)),
            EMBEDDING_B => (&mut parts.embedding_b, Role::B(path)),
            _ => (&mut parts.bias, Role::Bias(path)),
        };
        *part = Some(info);
        role
    }

    /// The modules that are tables, trained or not, which PEFT saves without a word in the configuration
    /// (`save_embedding_layers`): those of the embeddings and of the head.
    fn unasked_tables<'e>(
        &self,
        extras: &'e BTreeMap<String, usize>,
        config: &PeftConfig,
    ) -> BTreeSet<&'e str> {
        let tables = extras.iter().filter_map(|(name, dims)| {
            let path = name.strip_suffix(".weight").filter(|_| *dims == 2)?;
            let is_known = path.ends_with(".base_layer")
                || self.layers.contains_key(path)
                || is_repeated(name, extras)
                || config.module_to_save(name).is_some();
            (!is_known).then_some(path)
        });
        let tables: BTreeSet<_> = tables.collect();
        if tables.len() <= MOST_TABLES { tables } else { BTreeSet::new() }
    }

    /// Names the parameters that were trained in full as the model does, and leaves out what the file
    /// holds twice.
    fn check_extras(&mut self, config: &PeftConfig, mismatch: &mut Mismatch) {
        let extras = self.roles.iter().filter_map(|(_, info, role)| match role {
            Role::Extra(name) => Some((name.clone(), info.shape.len())),
            _ => None,
        });
        let extras: BTreeMap<_, _> = extras.collect();
        let tables = self.unasked_tables(&extras, config);
        let (mut seen, mut modules) = (BTreeSet::new(), BTreeSet::new());
        let mut roles = std::mem::take(&mut self.roles);
        for (key, _, role) in &mut roles {
            let Role::Extra(name) = role else { continue };
            if is_repeated(name, &extras) {
                *role = Role::Unused;
                continue;
            }
            // PEFT names the parameters of an adapted layer's base `base_layer.*`, and does not use others.
            let (path, parameter) = name.rsplit_once('.').unwrap_or_default();
            if self.layers.contains_key(path)
                && ["weight", "bias"].contains(&parameter)
                && config.module_to_save(name).is_none()
            {
                // Versions of PEFT before 0.7 wrote trained biases so. Those must not be lost without a word.
                let is_trained = parameter == "bias" && config.trains_biases();
                let list = if is_trained { &mut mismatch.unexpected } else { &mut self.unused };
                list.push((*key).to_owned());
                *role = Role::Unused;
                continue;
            }
            let of_base = name.rsplit_once(".base_layer.").filter(|(path, parameter)| {
                self.layers.contains_key(path) && ["weight", "bias"].contains(parameter)
            });
            let of_base = of_base.map(|(path, parameter)| (path.to_owned(), parameter.to_owned()));
            let mut saved = tables.contains(name.rsplit_once('.').map_or("", |(path, _)| path));
            if let Some((path, parameter)) = &of_base {
                // PEFT also saves the tables of adapted embeddings and heads.
                saved |= extras.contains_key(&format!("{path}.base_layer.weight"));
                *name = format!("{path}.{parameter}");
            }
            saved |= config.saves(name, of_base.is_some());
            if !saved || !seen.insert(name.clone()) {
                mismatch.unexpected.push((*key).to_owned());
            }
            modules.extend(config.module_to_save(name).map(str::to_owned));
        }
        self.roles = roles;
        self.modules_to_save = modules.into_iter().collect();
    }
}

/// Why an adapter with this key cannot be read, if its kind is not supported. Layers may have any names, so that only
/// the end of a key tells.
fn unreadable(key: &str, names: &[String]) -> Option<&'static str> {
    if key.ends_with(TOKENS) {
        return Some("trainable tokens cannot be read");
    }
    if key.rsplit('.').take(2).any(|name| name.starts_with("lora_ga_")) {
        return Some("LoRA-GA cannot be read");
    }
    // PEFT 0.21 applies the update of the output projection twice.
    let (attention, _) = key.split_once(".base_layer.out_proj.")?;
    let is_attention = names.iter().any(|name| *name == format!("{attention}{A}"));
    is_attention.then_some(
        "adapters of PyTorch's `MultiheadAttention` cannot be read; use four `Linear`s instead",
    )
}

/// Whether PEFT wrote the parameter a second time, next to that of the module trained in full. In a module that holds
/// others, the name of the adapter comes before their names.
fn is_repeated(name: &str, extras: &BTreeMap<String, usize>) -> bool {
    let is_there = |module: &str, rest: &str| extras.contains_key(&format!("{module}.{rest}"));
    let trained = name.split_once(".modules_to_save.").is_some_and(|(module, rest)| {
        let within = rest.split_once('.');
        is_there(module, rest) || within.is_some_and(|(_, rest)| is_there(module, rest))
    });
    let original = name.split_once(".original_module.");
    trained || original.is_some_and(|(module, rest)| is_there(module, rest))
}

/// Whether the layer is a convolution with groups. PEFT's B then has fewer columns than the rank.
fn is_grouped(parts: &Parts, rank: usize) -> bool {
    let columns = parts.b.filter(|b| b.shape.len() > 2).map(|b| b.shape[1]);
    columns.is_some_and(|columns| columns > 0 && columns < rank && rank.is_multiple_of(columns))
}

/// Adds to `mismatch` what is wrong with the tensors of a layer.
fn check(path: &str, parts: &Parts, config: &PeftConfig, mismatch: &mut Mismatch) {
    let key = |suffix: &str| format!("{PREFIX}{path}{suffix}");
    let rank = config.rank(path);
    let kernel = parts.a.map_or(&[][..], |a| a.shape.get(2..).unwrap_or_default());
    let (mut factors, mut others) = (
        vec![(parts.a, A), (parts.b, B)],
        vec![(parts.embedding_a, EMBEDDING_A), (parts.embedding_b, EMBEDDING_B)],
    );
    if parts.a.is_none() && parts.b.is_none() && parts.is_embedding() {
        std::mem::swap(&mut factors, &mut others);
    }
    let missing = factors.iter().filter(|(part, _)| part.is_none());
    mismatch.missing.extend(missing.map(|(_, suffix)| key(suffix)));
    let unexpected = others.iter().filter(|(part, _)| part.is_some());
    mismatch.unexpected.extend(unexpected.map(|(_, suffix)| key(suffix)));
    match parts.bias {
        None if config.lora_bias && !parts.is_embedding() => mismatch.missing.push(key(B_BIAS)),
        Some(_) if !config.lora_bias || parts.is_embedding() => {
            mismatch.unexpected.push(key(B_BIAS));
        }
        _ => {}
    }
    match parts.magnitude {
        None if config.use_dora => mismatch.missing.push(key(MAGNITUDE)),
        Some((_, suffix)) if !config.use_dora => mismatch.unexpected.push(key(suffix)),
        _ => {}
    }
    let [a, b] = [factors[0], factors[1]];
    let d_output = b.0.and_then(|b| b.shape.first().copied());
    let ones = vec![1; kernel.len()];
    let a_fits = |shape: &[usize]| {
        shape.len() >= 2 && shape[0] == rank && shape.iter().product::<usize>() > 0
    };
    let b_fits = |shape: &[usize]| {
        shape.len() >= 2 && shape[0] > 0 && shape[1] == rank && shape[2..] == ones
    };
    let bias_fits = |shape: &[usize]| shape.len() == 1 && d_output.is_none_or(|it| it == shape[0]);
    // That of a convolution has the dimensions of an image.
    let magnitude_fits = |shape: &[usize]| {
        let (channels, others) = if kernel.is_empty() { (0, 1) } else { (1, kernel.len() + 2) };
        shape.len() == others
            && shape.iter().enumerate().all(|(dim, size)| {
                if dim == channels { d_output.is_none_or(|it| it == *size) } else { *size == 1 }
            })
    };
    let mut expect =
        |(part, suffix): (Option<&TensorInfo>, &str), fits: &dyn Fn(&[usize]) -> bool, expected| {
            if let Some(info) = part
                && !fits(&info.shape)
            {
                let text = format!("{} (expected {expected}, found {:?})", key(suffix), info.shape);
                mismatch.misshapen.push(text);
            }
        };
    let (more_a, more_b) = if kernel.is_empty() { ("", "") } else { (", ..kernel", ", 1, ..") };
    expect(a, &a_fits, format!("[{rank}, d_input{more_a}]"));
    expect(b, &b_fits, format!("[d_output, {rank}{more_b}]"));
    expect((parts.bias, B_BIAS), &bias_fits, "[d_output]".to_owned());
    let expected = if kernel.is_empty() { "[d_output]" } else { "[1, d_output, 1, ..]" };
    if let Some((magnitude, suffix)) = parts.magnitude {
        expect((Some(magnitude), suffix), &magnitude_fits, expected.to_owned());
    }
}

/// What a key that is not PEFT's looks like, and what to do.
fn foreign(key: &str) -> Option<String> {
    let ends = |ends: &[&str]| ends.iter().any(|end| key.ends_with(end));
    let is = |format: &str, remedy: &str| {
        Some(format!("`{}` looks like {format}: {remedy}", shown(key)))
    };
    let save = "save the adapter by `save_pretrained` of its `PeftModel`";
    let image = "read the file by `LoraAdapters::load_image`";
    if ends(&[".lora_down.weight", ".lora_up.weight"]) {
        return is("kohya's format", image);
    }
    let old = [".lora.down.weight", ".lora.up.weight", "_lora.down.weight", "_lora.up.weight"];
    if ends(&old) {
        return is("an old format of diffusers", image);
    }
    if ends(&[".lora_a", ".lora_b"]) {
        return is("mlx-lm's format", "its configuration must be mlx-lm's, too");
    }
    if ends(&[".lora_A", ".lora_B"]) {
        return is("loralib's format", "convert it to PEFT's; the factors have the same shapes");
    }
    for wrapper in ["_orig_mod.", "module."] {
        if key.strip_prefix(wrapper).is_some_and(|rest| rest.starts_with(PREFIX)) {
            return is(
                &format!("a wrapped model's (`{wrapper}`)"),
                &format!("unwrap it, and {save}"),
            );
        }
    }
    let has_name = |part: &str| {
        let name = key.split_once(part).and_then(|(_, rest)| rest.strip_suffix(".weight"));
        name.is_some_and(|name| !name.contains('.'))
    };
    if has_name(".lora_A.") || has_name(".lora_B.") {
        return is("a state in memory, with the adapter's name", save);
    }
    if !key.starts_with(PREFIX) && ends(&[A, B, EMBEDDING_A, EMBEDDING_B]) {
        return is("a part of a model", &format!("its keys lack the prefix `{PREFIX}`; {save}"));
    }
    None
}
