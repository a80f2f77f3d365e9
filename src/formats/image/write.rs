//! From adapters to the tensors of a file.

use std::collections::{BTreeMap, HashMap};

use burn::tensor::backend::Backend;

use super::{
    ImageFormat, metadata,
    names::{Part, flattened, of_python},
    parts::not_in_files,
};
use crate::{
    adapter::{LoraAdapter, WeightLayout},
    adapters::{LoraAdapters, renaming::Renaming},
    error::{LoraError, named, quoted},
    formats::outgoing::{Outgoing, factor_shapes, magnitude_shape},
};

/// A layer with its adapter.
struct Placed<'s, B: Backend> {
    path: &'s str,
    /// What its name begins with in Python, if that is a part.
    begin: &'static str,
    part: Part,
    /// The rest of the name.
    name: String,
    adapter: &'s LoraAdapter<B>,
}

/// The tensors of the file, and what its header says.
pub(super) fn contents<B: Backend>(
    set: &LoraAdapters<B>,
    format: ImageFormat,
    names: &Renaming,
    file: &str,
) -> Result<(Outgoing<B>, HashMap<String, String>), LoraError> {
    check(set, file)?;
    let to_python = names.inverse();
    let paths: Vec<_> = set.adapters.keys().cloned().collect();
    to_python.require_matches(&paths, "the set")?;
    let placed = set.iter().map(|(path, adapter)| {
        let name = to_python.apply(path);
        let (begin, part, name) = of_python(&name);
        Placed { path, begin, part, name: name.to_owned(), adapter }
    });
    let placed: Vec<_> = placed.collect();
    if let Some(it) = placed.iter().find(|it| it.name.is_empty()) {
        let reason = "its name is empty; make it the field of a model, or give it one by `names`";
        return Err(unsupported(file, named(it.path), reason.to_owned()));
    }
    let by_name = match format {
        ImageFormat::Kohya => by_name(&placed, kohya_name(&placed), file)?,
        ImageFormat::Diffusers => by_name(&placed, diffusers_name, file)?,
    };
    let mut tensors = Outgoing::new();
    for (name, it) in &by_name {
        let [down, up, magnitude] = match format {
            ImageFormat::Kohya => ["lora_down.weight", "lora_up.weight", "dora_scale"],
            ImageFormat::Diffusers => ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"],
        };
        let key = |end: &str| format!("{name}.{end}");
        let [down_shape, up_shape] = factor_shapes(it.adapter);
        let dims = down_shape.len();
        tensors.factor(key(down), it.adapter.a.val(), down_shape);
        tensors.factor(key(up), it.adapter.b.val(), up_shape);
        if let Some(values) = &it.adapter.magnitude {
            let [_, d_output] = it.adapter.shape();
            let shape = match format {
                ImageFormat::Kohya => [vec![d_output], vec![1; dims - 1]].concat(),
                ImageFormat::Diffusers => magnitude_shape(it.adapter),
            };
            tensors.flat(key(magnitude), values.val(), shape);
        }
        if format == ImageFormat::Kohya {
            tensors.number(key("alpha"), it.adapter.alpha_over_rank());
        }
    }
    let header = match format {
        ImageFormat::Kohya => {
            let ranks: Vec<_> = placed.iter().map(|it| it.adapter.rank()).collect();
            let alphas: Vec<_> = placed.iter().map(|it| it.adapter.alpha_over_rank()).collect();
            let has_magnitudes = placed.iter().any(|it| it.adapter.magnitude.is_some());
            metadata::kohya(&ranks, &alphas, has_magnitudes)
        }
        ImageFormat::Diffusers => {
            let mut parts = BTreeMap::<_, Vec<_>>::new();
            for it in &placed {
                let of_part = parts.entry(diffusers_part(it)).or_default();
                of_part.push((it.name.clone(), it.adapter.clone()));
            }
            let parts = parts.into_iter().map(|(part, them)| (part, LoraAdapters::new(them)));
            metadata::diffusers(&parts.collect(), file)?
        }
    };
    Ok((tensors, header))
}

fn unsupported(file: &str, field: &str, reason: String) -> LoraError {
    let (file, field) = (file.to_owned(), field.to_owned());
    LoraError::Unsupported { file, field, reason: Some(reason) }
}

/// Fails if the set has something that no file of image models holds.
fn check<B: Backend>(set: &LoraAdapters<B>, file: &str) -> Result<(), LoraError> {
    if let Some(name) = set.extras.keys().next() {
        let reason = "it was trained in full, and files of image models hold adapters alone; leave it out by \
                      `without_modules_to_save`, or write PEFT's directory by `save`";
        return Err(unsupported(file, name, reason.to_owned()));
    }
    if set.is_empty() {
        return Err(unsupported(file, "an empty set", "there is no adapter to save".to_owned()));
    }
    for (path, adapter) in set.iter() {
        let reason = match &adapter.layout {
            WeightLayout::Matrix | WeightLayout::Conv { groups: 1, .. } if adapter.bias.is_some() => {
                "its adapter has a bias, and those of image models have none; train without `bias`, or write PEFT's \
                 directory by `save`"
                    .to_owned()
            }
            WeightLayout::Matrix | WeightLayout::Conv { groups: 1, .. } => {
                if adapter.alpha_over_rank().is_finite() {
                    continue;
                }
                "its alpha is not finite".to_owned()
            }
            WeightLayout::Unknown => {
                "it was put together by hand, and files hold adapters of linear layers and of convolutions in \
                 different ways; put the set on its model and save `model.switch(&set)?.adapters()`, or say what it \
                 is for by `of_linear` or `of_convolution`"
                    .to_owned()
            }
            other => format!("it is {}; leave the layer out by `excludes`", not_in_files(other)),
        };
        return Err(unsupported(file, path, reason));
    }
    Ok(())
}

/// The layers by their names in the file.
///
/// # Errors
///
/// If two have the same name.
fn by_name<'p, 's, B: Backend>(
    placed: &'p [Placed<'s, B>],
    name: impl Fn(&Placed<B>) -> String,
    file: &str,
) -> Result<BTreeMap<String, &'p Placed<'s, B>>, LoraError> {
    let mut names = BTreeMap::new();
    for it in placed {
        let name = name(it);
        if let Some(other) = names.insert(name.clone(), it) {
            let paths = [other.path.to_owned(), it.path.to_owned()];
            let reason = format!(
                "it would be the name of each of the layers {}, so that the file could not be read again; give them \
                 different names by `names`, or write the format of diffusers, which keeps the dots",
                quoted(&paths)
            );
            return Err(unsupported(file, &name, reason));
        }
    }
    Ok(names)
}

/// What kohya's programs call a layer. The first text encoder has a number where there are two.
fn kohya_name<B: Backend>(placed: &[Placed<B>]) -> impl Fn(&Placed<B>) -> String + use<B> {
    let are_two =
        placed.iter().any(|it| matches!(it.part, Part::TextEncoder2 | Part::TextEncoder3));
    move |it| {
        let begin = match it.part {
            Part::Denoiser => "lora_unet_",
            Part::TextEncoder if are_two => "lora_te1_",
            Part::TextEncoder => "lora_te_",
            Part::TextEncoder2 => "lora_te2_",
            Part::TextEncoder3 => "lora_te3_",
        };
        format!("{begin}{}", flattened(&it.name))
    }
}

/// What diffusers calls a layer.
fn diffusers_name<B: Backend>(it: &Placed<B>) -> String {
    format!("{}{}", diffusers_part(it), it.name)
}

fn diffusers_part<B: Backend>(it: &Placed<B>) -> &'static str {
    if it.begin.is_empty() { "unet." } else { it.begin }
}
