//! The tensors of each layer, and whether they are those of an adapter of it.

use std::collections::BTreeMap;

use safetensors::tensor::TensorInfo;

use super::{
    keys::{self, ROLES, Role},
    metadata::Configs,
    names::{InFile, Layer, Layers, Meant},
};
use crate::{
    adapter::WeightLayout,
    error::{LoraError, Mismatch, quoted, shown},
    formats::config::PeftConfig,
};

/// How many names of no layer are explained. Messages show no more.
const EXPLAINED: usize = 8;

/// The tensors of one layer, by their roles, with their keys.
#[derive(Default)]
pub(super) struct Parts<'k>([Option<(&'k str, &'k TensorInfo)>; ROLES]);

impl<'k> Parts<'k> {
    pub fn get(&self, role: Role) -> Option<(&'k str, &'k TensorInfo)> {
        self.0[role as usize]
    }

    /// Any of the keys.
    fn key(&self) -> &'k str {
        self.0.iter().flatten().next().expect("a layer has a tensor").0
    }
}

/// The tensors of an adapter.
pub(super) struct Found<'l, 'k> {
    pub layer: &'l Layer,
    pub parts: Parts<'k>,
    /// What the layer's name in the file begins with.
    begin: &'static str,
}

impl Found<'_, '_> {
    /// The configuration of the layer, if the file has one.
    pub fn config<'c>(
        &self,
        configs: Option<&'c Configs>,
        file: &str,
    ) -> Result<Option<&'c PeftConfig>, LoraError> {
        configs.map(|configs| configs.of(self.begin, file)).transpose()
    }
}

/// The tensors of each layer, by its path, and the keys of those in parts that the model does not have.
pub(super) fn by_layer<'l, 'k>(
    infos: impl Iterator<Item = (&'k str, &'k TensorInfo)>,
    layers: &'l Layers,
    file: &str,
) -> Result<(BTreeMap<&'l str, Found<'l, 'k>>, Vec<String>), LoraError> {
    let mut found = BTreeMap::<_, Found>::new();
    // Names of no layer, with one of their keys.
    let (mut unused, mut unknown) = (Vec::new(), BTreeMap::new());
    let mut mismatch = Mismatch::default();
    for (key, info) in infos {
        let Some((name, role)) = keys::split(key, file)? else {
            mismatch.unexpected.push(format!("{key} (no part of an adapter)"));
            continue;
        };
        let in_file = InFile::new(name);
        match layers.find(&in_file) {
            Meant::Layer(layer) => {
                let entry = found.entry(layer.path.as_str());
                let begin = in_file.begin;
                let of_layer = entry.or_insert(Found { layer, parts: Parts::default(), begin });
                if let Some((other, _)) = of_layer.parts.0[role as usize].replace((key, info)) {
                    let (other, key) = (shown(other), shown(key));
                    let problem = format!(
                        "`{other}` and `{key}` are the same part of one adapter; take one of them out"
                    );
                    return Err(LoraError::InvalidFile { file: file.to_owned(), problem });
                }
            }
            Meant::Several(paths) => return Err(ambiguous(key, &paths, file)),
            Meant::OtherPart => unused.push(key.to_owned()),
            Meant::Nothing => drop(unknown.entry(name).or_insert((key, in_file))),
        }
    }
    if !unknown.is_empty() {
        let (keys, names): (Vec<_>, Vec<_>) = unknown.into_values().unzip();
        // To compare all names of a large file with all layers would take long.
        let mut reasons = layers.explain(&names[..names.len().min(EXPLAINED)]).into_iter();
        mismatch.unexpected.extend(keys.into_iter().map(|key| {
            let reason = reasons.next().unwrap_or_else(|| "no layer has this name".to_owned());
            format!("{key} ({reason})")
        }));
        let hint = "the names in the file are those of the model in Python; have `names` say which layers they \
                    mean (see `peft::Renaming`)";
        mismatch.hint = Some(hint.to_owned());
    }
    mismatch.into_result(file)?;
    Ok((found, unused))
}

/// The error of a key that several layers have.
fn ambiguous(key: &str, paths: &[String], file: &str) -> LoraError {
    LoraError::Unsupported {
        file: file.to_owned(),
        field: key.to_owned(),
        reason: Some(format!(
            "it may mean each of the layers {}, which have the same name in such files; give them different names \
             by `names`, or write the file in the format of diffusers, which keeps the dots",
            quoted(paths)
        )),
    }
}

/// Adds to `mismatch` what is wrong with the tensors of a layer.
///
/// # Errors
///
/// If files of image models have no adapters of such layers.
pub(super) fn check(
    found: &Found,
    config: Option<&PeftConfig>,
    file: &str,
    mismatch: &mut Mismatch,
) -> Result<(), LoraError> {
    let Found { layer, parts, .. } = found;
    let unsupported = |key: &str, reason: String| LoraError::Unsupported {
        file: file.to_owned(),
        field: key.to_owned(),
        reason: Some(reason),
    };
    let [d_input, d_output] = layer.shape;
    let kernel = match &layer.layout {
        WeightLayout::Conv { kernel, groups: 1 } => kernel.as_slice(),
        WeightLayout::Unknown | WeightLayout::Matrix => &[],
        other => {
            let reason = format!("its layer `{}` is {}", layer.path, not_in_files(other));
            return Err(unsupported(parts.key(), reason));
        }
    };
    let name = keys::split(parts.key(), file)?.map_or("", |(name, _)| name);
    let of = |role| parts.get(role);
    let (Some((down_key, down)), Some((up_key, up))) = (of(Role::Down), of(Role::Up)) else {
        let missing = [(Role::Down, "A (lora_down)"), (Role::Up, "B (lora_up)")];
        let missing = missing.into_iter().filter(|(role, _)| of(*role).is_none());
        mismatch.missing.extend(missing.map(|(_, part)| format!("{part} of {name}")));
        return Ok(());
    };
    if let (Some(_), Some((key, _))) = (config, of(Role::Alpha)) {
        let reason =
            "the header says the alphas, too, in `lora_adapter_metadata`; take one of them out";
        return Err(unsupported(key, reason.to_owned()));
    }
    let mut expect = |key: &str, fits: bool, expected: String, found: &TensorInfo| {
        if !fits {
            let text = format!("{key} (expected {expected}, found {:?})", found.shape);
            mismatch.misshapen.push(text);
        }
    };

    let has_kernel = |shape: &[usize], kernel: &[usize]| {
        // Some programs write a linear layer as a convolution with a kernel of size 1, and the other way round.
        shape[2..] == *kernel || (is_ones(&shape[2..]) && is_ones(kernel))
    };
    let rank = config.map_or(down.shape.first().copied().unwrap_or(0), |it| it.rank(&layer.name));
    let channels = d_input / kernel.iter().product::<usize>();
    let mid = of(Role::Mid);
    let of_down = if mid.is_some() { &[][..] } else { kernel };
    let is_matrix = |shape: &[usize], rows, columns| {
        shape.len() >= 2 && rows > 0 && columns > 0 && shape[..2] == [rows, columns]
    };
    let fits = is_matrix(&down.shape, rank, channels) && has_kernel(&down.shape, of_down);
    expect(down_key, fits, shape("rank", rank, channels, of_down), down);
    let fits = is_matrix(&up.shape, d_output, rank) && is_ones(&up.shape[2..]);
    expect(up_key, fits, format!("[{d_output}, {rank}], the second being the rank"), up);
    if let Some((key, mid)) = mid {
        let fits = is_matrix(&mid.shape, rank, rank) && has_kernel(&mid.shape, kernel);
        expect(key, fits, shape("rank", rank, rank, kernel), mid);
    }
    if let Some((key, alpha)) = of(Role::Alpha) {
        expect(key, is_ones(&alpha.shape), "one number".to_owned(), alpha);
    }
    match (config, of(Role::Magnitude)) {
        (Some(config), None) if config.use_dora => {
            mismatch.missing.push(format!("the magnitudes of {name} (lora_magnitude_vector)"));
        }
        (Some(config), Some((key, _))) if !config.use_dora => {
            mismatch.unexpected.push(format!("{key} (`use_dora` is not set)"));
        }
        (_, Some((key, magnitude))) => {
            let fits = are_magnitudes(key, &magnitude.shape, [channels, d_output]);
            let fits = fits.map_err(|reason| unsupported(key, reason))?;
            expect(key, fits, format!("[{d_output}, 1, ..]"), magnitude);
        }
        (_, None) => {}
    }
    Ok(())
}

fn is_ones(sizes: &[usize]) -> bool {
    sizes.iter().all(|it| *it == 1)
}

/// Whether the shape is that of the magnitudes of a layer's outputs. It is an error if they are those of its inputs.
fn are_magnitudes(
    key: &str,
    shape: &[usize],
    [d_input, d_output]: [usize; 2],
) -> Result<bool, String> {
    let is_vector = shape.first() == Some(&d_output) && is_ones(&shape[1..]);
    // PEFT has those of a convolution in the shape of its output.
    let is_of_peft = key.contains(".lora_magnitude_vector")
        && shape.len() > 2
        && shape[..2] == [1, d_output]
        && is_ones(&shape[2..]);
    if is_vector || is_of_peft {
        return Ok(true);
    }
    if shape.len() < 2 || shape[..2] != [1, d_input] || !is_ones(&shape[2..]) {
        return Ok(false);
    }
    Err(format!(
        "its shape {shape:?} is that of magnitudes of the layer's inputs, and adapters here have those of DoRA's \
         paper, one for each output; train with `wd_on_output` in LyCORIS, or merge the file into a copy of the base \
         there, and take what changed by `LoraModule::extract`"
    ))
}

/// What a layer is that files of image models have no adapters of, and what to do.
pub(super) fn not_in_files(layout: &WeightLayout) -> &'static str {
    match layout {
        WeightLayout::Embedding => {
            "an embedding, and files of image models have adapters of linear layers and convolutions"
        }
        WeightLayout::ConvTranspose { .. } => {
            "a transposed convolution, and files of image models have adapters of linear layers and convolutions"
        }
        _ => {
            "a convolution with groups, for which programs for image models compute a different update"
        }
    }
}

/// A shape as messages have it.
fn shape(first: &str, rows: usize, columns: usize, kernel: &[usize]) -> String {
    let sizes = [&[rows, columns], kernel].concat();
    format!("{sizes:?}, the first being the {first}")
}
