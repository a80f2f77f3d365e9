//! The command `merge`.

use std::{collections::BTreeMap, fmt};

use burn_lora::LoraModule;
use burn_lora_llm::{
    Result,
    chat::Chat,
    merged::{self, Precision, Rounding},
    pretrained::Holding,
};

use crate::{adapters, args::MergeArgs, backend::Plain, base::Base, find, read};

/// Above this share of the update, what rounding changes is worth another type.
const LARGE: f64 = 0.1;

/// Writes the model with adapters in its weights, and tells what rounding changed in them.
///
/// # Errors
///
/// If a file cannot be read or written, or if the adapters do not fit.
pub fn run(args: &MergeArgs) -> Result<()> {
    let path = find(&args.base.model)?;
    let (chat, base) = (Chat::read(&path)?, Base::of(&path)?);
    let (set, _) = adapters(&args.adapter, &base, &chat)?;
    let holding = Holding { quantize: args.base.quantization(), keep_16_bits: false };
    let llama = read::<Plain>(&path, holding, &Default::default())?;
    let adapted = llama.switch(&set).map_err(|error| error.to_string())?;
    let merged = adapted.merge().map_err(|error| error.to_string())?;
    let updates = merged::updates(&llama, &merged);
    let saved = merged::save(&merged.dequantize(), &chat, &path, &args.out, args.dtype)?;
    let types: Vec<_> = saved.precisions.iter().map(Precision::to_string).collect();
    println!(
        "The merged model is in {}: {:.1} MB in {}; `--dtype` chooses another type.",
        args.out.display(),
        saved.bytes as f64 / 1e6,
        types.join(" and "),
    );
    if let Some(told) = told(&saved.rounding, &updates) {
        println!("{told}");
    }
    Ok(())
}

/// What rounding changed in the weights, and in what the adapters changed. Nothing if nothing was rounded.
fn told(rounding: &BTreeMap<String, Rounding>, updates: &BTreeMap<String, f64>) -> Option<String> {
    let of_weights = Share::of(rounding.iter().map(|(name, it)| (&**name, it.error, it.norm)))?;
    let updated = updates.iter().filter_map(|(name, &norm)| {
        let rounding = rounding.get(name)?;
        Some((&**name, rounding.error, norm))
    });
    let Some(of_updates) = Share::of(updated) else {
        return Some(format!("Rounding changed the weights by {of_weights}."));
    };
    let instead = match of_updates.all > LARGE {
        true => "; `--dtype f32` keeps it",
        false => "",
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
