//! The types of the weights in a file: those of the base, or the one that was asked for.

use std::{collections::BTreeMap, fs, path::Path};

use burn::tensor::Tensor;
use burn_lora::{
    LoraAdapters, LoraModule,
    gguf::{Packing, WRITER},
    quantize::GgufType,
};
use burn_lora_llm::{
    chat::Chat,
    gguf::open,
    merged::{self, GgufKind},
};
use tempfile::TempDir;

use super::{assert_same_tensors, decoder, fixture, load, save, small_tokenizer};
use crate::{backend::Plain, oracle::device};

/// What nothing changed keeps its bytes, in whatever type it is, and its fields.
#[test]
fn a_file_that_nothing_changed_is_written_as_it_was() {
    for name in ["q4_k_m", "others", "packed", "gemma3", "phi3", "llama3"] {
        let (dir, base) = (TempDir::new().unwrap(), decoder(&format!("{name}.gguf")));
        let path = dir.path().join("x.gguf");
        let (llama, chat) = (load(&base).dequantize(), chat(dir.path()));
        let saved = merged::save_gguf(&llama, &chat, &base, &path, GgufKind::Keep).unwrap();
        assert!(saved.rounding.is_empty() && saved.replaced.is_empty(), "{name}: {saved:?}");
        let [mut found, expected] = [&path, &base].map(|path| open(path).unwrap());
        found.fields.remove(WRITER);
        assert_eq!(found.fields, expected.fields, "{name}");
        assert_same_tensors(&found, &expected, name);
    }
}

/// The tokens do not matter where the fields are copied.
fn chat(dir: &Path) -> Chat {
    fs::write(dir.join("tokenizer.json"), small_tokenizer()).unwrap();
    fs::write(dir.join("config.json"), "{}").unwrap();
    let chat = Chat::read(dir).unwrap();
    fs::remove_file(dir.join("config.json")).unwrap();
    chat
}

/// Only what an adapter changed gets another type, and that is told.
#[test]
fn what_was_changed_in_a_file_of_k_quants_is_told() {
    let (dir, base) = (TempDir::new().unwrap(), decoder("q4_k_m.gguf"));
    let llama = load(&base);
    let layer = "model.layers.0.mlp.up_proj";
    let config = burn_lora::LoraConfig::new(2, 3.0).with_targets([layer]);
    let set = llama.attach(&config).unwrap().adapters();
    let set = LoraAdapters::new(set.iter().map(|(path, it)| {
        let mut it = it.clone();
        it.b = burn::module::Param::from_tensor(it.b.val() + 0.05);
        (path.to_owned(), it)
    }));
    let merged = llama.switch(&set).unwrap().merge().unwrap().dequantize();
    let (path, chat) = (dir.path().join("x.gguf"), chat(dir.path()));
    let saved = merged::save_gguf(&merged, &chat, &base, &path, GgufKind::Keep).unwrap();
    let name = format!("{layer}.weight");
    let was = open(&base).unwrap().tensors["blk.0.ffn_up.weight"].packing;
    let q8_0 = Packing::Blocks(GgufType::Q8_0);
    assert_eq!(saved.replaced, BTreeMap::from([(name.clone(), [was, q8_0])]));
    assert_eq!(saved.rounding.keys().collect::<Vec<_>>(), [&name]);
    let rounding = saved.rounding[&name];
    assert!(rounding.error > 0.0 && rounding.error < 0.01 * rounding.norm, "{rounding:?}");
    assert_eq!(saved.kept.len() + 1, saved.packings.len());
    let [found, expected] = [&path, &base].map(|path| open(path).unwrap());
    for (name, tensor) in &expected.tensors {
        if name == "blk.0.ffn_up.weight" {
            assert_eq!(found.tensors[name].packing, q8_0);
        } else {
            assert_eq!(found.tensors[name].packing, tensor.packing, "{name}");
            assert_eq!(found.bytes(name).unwrap(), expected.bytes(name).unwrap(), "{name}");
        }
    }
}

/// Matrices are in the type that was asked for where its blocks fit, and what rounding changed is told.
#[test]
fn matrices_have_the_type_that_was_asked_for() {
    let (dir, base) = (TempDir::new().unwrap(), decoder("q4_k_m.gguf"));
    let (llama, chat) = (load(&base).dequantize(), chat(dir.path()));
    let mut errors = Vec::new();
    for (kind, packing) in [
        (GgufKind::F32, Packing::F32),
        (GgufKind::BF16, Packing::BF16),
        (GgufKind::F16, Packing::F16),
        (GgufKind::Q8_0, Packing::Blocks(GgufType::Q8_0)),
        (GgufKind::Q5_1, Packing::Blocks(GgufType::Q5_1)),
        (GgufKind::Q5_0, Packing::Blocks(GgufType::Q5_0)),
        (GgufKind::Q4_1, Packing::Blocks(GgufType::Q4_1)),
        (GgufKind::Q4_0, Packing::Blocks(GgufType::Q4_0)),
    ] {
        let path = dir.path().join(format!("{kind}.gguf"));
        let saved = merged::save_gguf(&llama, &chat, &base, &path, kind).unwrap();
        let file = open(&path).unwrap();
        let head = if llama.is_tied() { "token_embd.weight" } else { "output.weight" };
        for (name, tensor) in &file.tensors {
            let expected = match tensor.shape.len() {
                1 => Packing::F32,
                _ if name == head && matches!(packing, Packing::Blocks(_)) => {
                    Packing::Blocks(GgufType::Q8_0)
                }
                _ => packing,
            };
            assert_eq!(tensor.packing, expected, "{kind}: {name}");
        }
        let name = "model.layers.0.mlp.up_proj.weight";
        errors.push(saved.rounding.get(name).map_or(0.0, |it| it.error / it.norm));
        // What is read again is what was told.
        let matrix = |path: &Path| -> Tensor<Plain, 1> {
            let values = open(path).unwrap().values("blk.0.ffn_up.weight").unwrap();
            Tensor::from_floats(values.as_slice(), &device::<Plain>())
        };
        let [found, was] = [matrix(&path), matrix(&base)];
        let norm = |it: Tensor<Plain, 1>| f64::from(it.square().sum().sqrt().into_scalar());
        let error = norm(found - was.clone()) / norm(was);
        let told = errors.last().unwrap();
        assert!((error - told).abs() < 1e-4 + 1e-3 * error, "{kind}: {error}, and {told} is told");
    }
    let (fine, coarse) = errors.split_at(4);
    assert!(fine.iter().all(|it| *it < 0.01), "{errors:?}");
    assert!(coarse.iter().all(|it| (0.01..0.15).contains(it)), "{errors:?}");
}

/// Rows that are no whole blocks stay in half precision.
#[test]
fn rows_that_are_no_whole_blocks_are_told() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.gguf");
    let saved = save(&fixture("llama"), &path, GgufKind::Q8_0);
    assert!(saved.packings.values().all(|it| matches!(it, Packing::F16 | Packing::F32)));
    assert!(saved.rounding.values().all(|it| it.error < 0.001 * it.norm));
}
