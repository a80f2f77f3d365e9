//! The command `export`: adapters for the programs of others.

use std::{fs, path::Path};

use burn_lora::{LoraAdapters, gguf::paths};
use burn_lora_llm::{Context, Result, chat::Chat, files::is_gguf, pretrained};

use crate::{
    adapters, args::ExportArgs, backend::Plain, base::Base, find, modelfile,
    remembered::Remembered, target,
};

/// Writes adapters as a file for llama.cpp, with a Modelfile for Ollama, or as a directory for PEFT.
///
/// # Errors
///
/// If a file cannot be read or written, if the adapters do not fit the model, or have no place in such a file.
pub fn run(args: &ExportArgs) -> Result<()> {
    let path = find(&args.model)?;
    let (chat, base) = (Chat::read(&path)?, Base::of(&path)?);
    let (set, remembered) = adapters(&args.adapter, &base, &chat)?;
    check(&set, &path, &args.adapter)?;
    let out = &args.out;
    if !target::is_gguf_name(out) {
        target::check_adapters(out, args.force)?;
        set.save(out).map_err(|error| error.to_string())?;
        // What is remembered of adapters that were there before does not hold for these.
        match remembered {
            Some(remembered) => remembered.write(out)?,
            None => Remembered::remove(out)?,
        }
        println!("The {} adapters are in {}, for PEFT.", set.len(), out.display());
        return Ok(());
    }
    target::check_file(out, args.force, &[&path, &args.adapter])?;
    let modelfile = modelfile::path_beside(out);
    modelfile::check(&modelfile, args.force)?;
    // With the base that they were trained on, for those who only have the file.
    let named = match set.base_model() {
        Some(_) => set,
        None => set.with_base_model(&base.name),
    };
    let family = base.family()?;
    target::write(out, || named.save_gguf(out, &family).map_err(|error| error.to_string()))?;
    modelfile::write(&modelfile, &path, Some(out), &chat)?;
    let size = fs::metadata(out).context(out.display())?.len();
    println!(
        "The {} adapters are in {out}: {:.1} MB in F32, for llama.cpp (`--lora {out}`).",
        named.len(),
        size as f64 / 1e6,
        out = out.display(),
    );
    println!("{} makes a model of Ollama of it: `ollama create NAME -f {0}`.", modelfile.display());
    if is_gguf(&path) && paths(&path).len() > 1 {
        println!(
            "Ollama needs the base in one file: `burn-lora merge --out model.gguf` without `--adapter`."
        );
    }
    if !is_gguf(&path) {
        println!(
            "llama.cpp needs the base as a GGUF file: the one that it was made of, or `burn-lora merge --out \
             model.gguf` without `--adapter`."
        );
    }
    Ok(())
}

/// Fails unless the model has these layers, in these sizes.
fn check(set: &LoraAdapters<Plain>, model: &Path, adapter: &Path) -> Result<()> {
    let shapes = pretrained::shapes(model)?;
    for (path, it) in set.iter() {
        // Where the table is the head, what has no place for it says so.
        if path == "lm_head" && !shapes.contains_key("lm_head.weight") {
            continue;
        }
        let [d_input, d_output] = it.shape();
        let is_table = path.ends_with("embed_tokens");
        let own = if is_table { [d_input, d_output] } else { [d_output, d_input] };
        let problem = match shapes.get(&format!("{path}.weight")) {
            Some(shape) if shape[..] == own => continue,
            Some(shape) => format!("is for a weight {own:?}, and that of the model is {shape:?}"),
            None => "is for a layer that the model does not have".to_owned(),
        };
        return Err(format!("{}: the adapter of `{path}` {problem}", adapter.display()));
    }
    Ok(())
}
