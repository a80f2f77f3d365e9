//! The command `merge`.

use std::{collections::BTreeMap, fmt, path::Path};

use burn_lora::{LoraModule, gguf::Packing};
use burn_lora_llm::{
    Result,
    chat::Chat,
    cli::live::during,
    data,
    llama::Llama,
    loss,
    merged::{self, Precision, Rounding, SavedGguf},
    pretrained::{self, Holding},
};

use crate::{
    adapters,
    args::{MAX_LENGTH, MergeArgs},
    backend::Plain,
    base::Base,
    find, modelfile, read, reading, target, texts,
};

/// Above this share of the update, what rounding changes is worth another type.
const LARGE: f64 = 0.1;

/// Writes the model with adapters in its weights, and tells what rounding changed in them.
///
/// # Errors
///
/// If a file cannot be read or written, or if the adapters do not fit.
pub fn run(args: &MergeArgs) -> Result<()> {
    let is_file = target::is_gguf_name(&args.out);
    let path = find(&args.base.model)?;
    let modelfile = modelfile::path_beside(&args.out);
    if is_file {
        if args.dtype.is_some() {
            return Err(
                "`--dtype` is for directories; the matrices of a GGUF file have a `--type`"
                    .to_owned(),
            );
        }
        let sources = [Some(&*path), args.adapter.as_deref()];
        target::check_file(
            &args.out,
            args.force,
            &sources.into_iter().flatten().collect::<Vec<_>>(),
        )?;
        modelfile::check(&modelfile, args.force)?;
    } else if args.r#type != Default::default() {
        return Err(
            "`--type` is for GGUF files; the weights in a directory have a `--dtype`".to_owned()
        );
    }
    let (chat, base) = (Chat::read(&path)?, Base::of(&path)?);
    if is_file {
        merged::check_gguf(&chat, &path)?;
    }
    let set = args.adapter.as_ref().map(|dir| adapters(dir, &base, &chat)).transpose()?;
    let (set, remembered) = set.map_or((None, None), |(set, it)| (Some(set), it));
    let texts = args.data.as_ref().map(|data| {
        // As the adapters were trained, so that `evaluate` tells the same.
        let max_length = remembered.as_ref().map_or(MAX_LENGTH, |it| it.max_length);
        let mask_prompt = remembered.as_ref().is_some_and(|it| it.mask_prompt);
        let reading = reading(max_length, mask_prompt, &pretrained::config(&path)?);
        let read = data::read(data, &chat, &reading)?;
        texts::tell(data, &read, max_length, &reading);
        Ok::<_, String>(read.texts)
    });
    let texts = texts.transpose()?;
    let holding = Holding { quantize: args.base.quantization(), keep_16_bits: false };
    let llama = read::<Plain>(&path, holding, &Default::default())?;
    let merged = match &set {
        None => llama.clone(),
        Some(set) => {
            let adapted = llama.switch(set).map_err(|error| error.to_string())?;
            adapted.merge().map_err(|error| error.to_string())?
        }
    };
    let updates = merged::updates(&llama, &merged);
    let merged = merged.dequantize();
    let told = |name: &str, llama: &Llama<Plain>| {
        let Some(texts) = &texts else { return };
        let doing = format!("evaluating {name} on {} texts", texts.len());
        let loss = during(&doing, || loss::evaluate(llama, texts, 4, &Default::default()));
        println!("{name:<24} loss {loss:.4}  perplexity {:.3}", loss.exp());
    };
    told("before rounding", &merged);
    let rounding = match is_file {
        true => {
            let saved = target::write(&args.out, || {
                merged::save_gguf(&merged, &chat, &path, &args.out, args.r#type)
            })?;
            modelfile::write(&modelfile, &args.out, None, &chat)?;
            tell_file(args, &modelfile, &saved);
            saved.rounding
        }
        false => {
            let saved = merged::save(&merged, &chat, &path, &args.out, args.dtype)?;
            let types: Vec<_> = saved.precisions.iter().map(Precision::to_string).collect();
            println!(
                "The merged model is in {}: {:.1} MB in {}; `--dtype` chooses another type.",
                args.out.display(),
                saved.bytes as f64 / 1e6,
                types.join(" and "),
            );
            saved.rounding
        }
    };
    if let Some(told) = self::told(&rounding, &updates, if is_file { "--type" } else { "--dtype" })
    {
        println!("{told}");
    }
    if texts.is_some() {
        let holding = Holding { quantize: None, keep_16_bits: false };
        let written = pretrained::load_held::<Plain>(&args.out, holding, &Default::default())?;
        told("as it was written", &written.llama);
    }
    Ok(())
}

/// What is in a GGUF file, by the types of its weights.
fn tell_file(args: &MergeArgs, modelfile: &Path, saved: &SavedGguf) {
    let mut types: BTreeMap<Packing, (usize, f64, f64)> = BTreeMap::new();
    for (name, packing) in &saved.packings {
        let (count, error, norm) = types.entry(*packing).or_default();
        *count += 1;
        if let Some(rounding) = saved.rounding.get(name) {
            *error += rounding.error.powi(2);
            *norm += rounding.norm.powi(2);
        }
    }
    println!(
        "The merged model is in {}: {:.1} MB, for llama.cpp; `--type` chooses another type.",
        args.out.display(),
        saved.bytes as f64 / 1e6
    );
    for (packing, (count, error, norm)) in types {
        let share = match norm > 0.0 {
            true => {
                format!(", which rounding changed by {} %", digits(100.0 * (error / norm).sqrt()))
            }
            false => String::new(),
        };
        println!("  {packing}: {count} weights{share}");
    }
    if !saved.kept.is_empty() {
        println!("The bytes of {} weights are those of the base.", saved.kept.len());
    }
    if let Some((name, [from, to])) = saved.replaced.iter().next() {
        println!(
            "{} weights were changed and cannot be written as they were: they have other types, such as `{name}`, \
             which was {from} and is {to}. Adapters beside the model lose nothing: `burn-lora export`.",
            saved.replaced.len()
        );
    }
    println!("{} makes a model of Ollama of it: `ollama create NAME -f {0}`.", modelfile.display());
}

/// What rounding changed in the weights, and in what the adapters changed. Nothing if nothing was rounded.
fn told(
    rounding: &BTreeMap<String, Rounding>,
    updates: &BTreeMap<String, f64>,
    option: &str,
) -> Option<String> {
    let of_weights = Share::of(rounding.iter().map(|(name, it)| (&**name, it.error, it.norm)))?;
    let updated = updates.iter().filter_map(|(name, &norm)| {
        let rounding = rounding.get(name)?;
        Some((&**name, rounding.error, norm))
    });
    let Some(of_updates) = Share::of(updated) else {
        return Some(format!("Rounding changed the weights by {of_weights}."));
    };
    let instead = match of_updates.all > LARGE {
        true => format!("; `{option} f32` keeps it"),
        false => String::new(),
    };
    Some(format!(
        "Rounding changed the weights by {of_weights}. In those that the adapters changed it is {of_updates} of their \
         update{instead}."
    ))
}

/// The norm of what rounding changed, over another norm.
struct Share<'a> {
    all: f64,
    most: f64,
    /// Where it is the most.
    name: &'a str,
}

impl<'a> Share<'a> {
    /// Of names, norms of errors, and the norms that these are compared with.
    fn of(parts: impl Iterator<Item = (&'a str, f64, f64)> + Clone) -> Option<Self> {
        let share = |error: f64, norm: f64| if norm > 0.0 { error / norm } else { 0.0 };
        let whole = |of: fn((&str, f64, f64)) -> f64| {
            parts.clone().map(|it| of(it).powi(2)).sum::<f64>().sqrt()
        };
        let shares = parts.clone().map(|(name, error, norm)| (name, share(error, norm)));
        let (name, most) = shares.max_by(|(_, one), (_, other)| one.total_cmp(other))?;
        Some(Self { all: share(whole(|it| it.1), whole(|it| it.2)), most, name })
    }
}

impl fmt::Display for Share<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { all, most, name } = self;
        write!(f, "{} % (at most {} %, in `{name}`)", digits(100.0 * all), digits(100.0 * most))
    }
}

/// With two digits behind the point, or as many as show something.
fn digits(percent: f64) -> String {
    match percent {
        0.0 => "0".to_owned(),
        small if small < 0.01 => format!("{small:.1e}"),
        usual => format!("{usual:.2}"),
    }
}
