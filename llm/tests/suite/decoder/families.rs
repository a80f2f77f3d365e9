//! Decoders of other families than Llama's, as Hugging Face directories and as GGUF files.

use std::collections::BTreeMap;

use burn::{
    module::AutodiffModule,
    tensor::{Int, Tensor, TensorData},
};
use burn_lora::{Lora, LoraAdapters, LoraModule, quantize::Quantization, train::Backward};
use burn_lora_llm::{
    data::Text,
    gguf::config::hugging_face_config,
    llama::{Cache, Llama},
    loss, pretrained,
};
use burn_store::ModuleSnapshot;
use safetensors::SafeTensors;
use serde::Deserialize;

use super::{Expected, assert_computes, changed, fixture, ids, tiny};
use crate::{
    backend::{Plain, Train},
    oracle::{Matrix, assert_close, assert_same, device},
};

const FAMILIES: [&str; 6] = ["gemma2", "gemma3", "phi3", "olmo2", "smollm3", "granite"];

#[test]
fn each_family_scores_as_in_transformers() {
    for name in FAMILIES {
        assert_computes(&tiny(name), fixture(name).join("expected.json"));
    }
}

#[test]
fn each_family_scores_the_same_from_a_gguf_file() {
    for name in FAMILIES {
        let path = fixture(&format!("{name}.gguf"));
        let loaded = pretrained::load::<Plain>(&path, None, &device::<Plain>()).unwrap();
        assert_computes(&loaded.llama, fixture(name).join("expected.json"));
    }
}

#[test]
fn a_gguf_file_of_each_family_is_described_as_hugging_face_does_it() {
    for name in FAMILIES {
        let described = hugging_face_config(&fixture(&format!("{name}.gguf"))).unwrap();
        let dir = changed(name, |config| {
            assert_eq!(described["architectures"], config["architectures"]);
            assert_eq!(described["model_type"], config["model_type"]);
            // `transformers` takes null for something in some of its fields.
            assert!(described.as_object().unwrap().values().all(|it| !it.is_null()), "{described}");
            *config = described;
        });
        let llama = pretrained::load(dir.path(), None, &device::<Plain>()).unwrap().llama;
        assert_computes(&llama, fixture(name).join("expected.json"));
    }
}

#[test]
fn adapters_of_each_family_are_those_of_peft() {
    let dir = tempfile::TempDir::new().unwrap();
    for name in FAMILIES {
        let path = fixture(name).join("adapter");
        let adapters = LoraAdapters::load(&path, &device::<Plain>()).unwrap();
        let adapted = tiny(name).switch(&adapters).unwrap();
        assert_computes(&adapted, path.join("expected.json"));
        adapted.adapters().save(dir.path().join(name)).unwrap();
        let read =
            |dir: &std::path::Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
        assert_eq!(read(&dir.path().join(name)), read(&path), "{name}");
        assert_computes(&adapted.merge().unwrap(), path.join("expected.json"));
    }
}

/// A model with its adapter, and its texts.
fn adapted(name: &str) -> (Lora<Train, Llama<Train>>, Vec<Vec<i32>>) {
    let path = fixture(name).join("adapter");
    let adapters = LoraAdapters::load(&path, &device::<Train>()).unwrap();
    let llama = pretrained::load::<Train>(&fixture(name), None, &device::<Train>()).unwrap().llama;
    let texts = Expected::read(path.join("expected.json")).ids;
    (llama.switch(&adapters).unwrap(), texts)
}

/// The gradients of the cross-entropy of all next tokens.
fn pass(llama: &Lora<Train, Llama<Train>>, texts: &[Vec<i32>]) -> Backward {
    let (count, length) = (texts.len(), texts[0].len());
    let ids = TensorData::new(texts.concat(), [count, length]);
    let ids = Tensor::<Train, 2, Int>::from_data(ids, &device::<Train>());
    let hidden = llama.hidden(ids.clone(), &llama.positions(length, &device::<Train>()));
    let targets = ids.narrow(1, 1, length - 1).flatten(0, 1);
    let hidden = hidden.narrow(1, 0, length - 1).flatten::<2>(0, 1);
    Backward::new(llama, llama.cross_entropy(hidden, targets))
}

#[test]
fn losses_and_gradients_of_each_family_are_those_of_peft() {
    #[derive(Deserialize)]
    struct Loss {
        loss: f64,
    }
    for name in FAMILIES {
        let dir = fixture(name).join("adapter");
        let (llama, texts) = adapted(name);
        let pass = pass(&llama, &texts);
        let expected: Loss =
            serde_json::from_slice(&std::fs::read(dir.join("expected.json")).unwrap()).unwrap();
        let error = (pass.loss / expected.loss - 1.0).abs();
        assert!(error < 1e-5, "{name}: {}, not {}", pass.loss, expected.loss);

        let bytes = std::fs::read(dir.join("gradients.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let found = gradients(&llama, &pass);
        assert_eq!(found.len(), file.len(), "{name}");
        for (key, tensor) in file.iter() {
            let numbers = tensor.data().as_chunks().0.iter().map(|it| f32::from_le_bytes(*it));
            let [rows, cols] = tensor.shape() else { panic!("{key} is no matrix") };
            let numbers: Vec<_> = numbers.map(f64::from).collect();
            let largest = numbers.iter().fold(0.0_f64, |max, it| max.max(it.abs()));
            assert!(largest > 1e-3, "{name}: {key} has no gradient");
            let data = numbers.iter().map(|it| it / largest).collect();
            let expected = Matrix { rows: *rows, cols: *cols, data };
            // Software Vulkan's functions are less exact.
            let tolerance = if cfg!(feature = "wgpu") { 5e-4 } else { 1e-4 };
            assert_close(found[key].clone().transpose() / largest, &expected, tolerance);
        }
    }
}

/// The gradients of an adapter, by PEFT's names.
fn gradients(
    llama: &Lora<Train, Llama<Train>>,
    pass: &Backward,
) -> BTreeMap<String, Tensor<Plain, 2>> {
    let factors = llama.collect(None, None, false).into_iter().filter_map(|it| {
        let path = it.full_path();
        let (layer, factor) = path.rsplit_once(".adapter.")?;
        let name = format!("base_model.model.{layer}.lora_{}.weight", factor.to_uppercase());
        Some((name, pass.gradients.get(it.tensor_id?)?))
    });
    factors.collect()
}

#[test]
fn segments_give_the_gradients_of_a_plain_pass() {
    for name in ["gemma2", "gemma3", "phi3"] {
        let (llama, texts) = adapted(name);
        let text =
            |ids: &Vec<i32>| Text { ids: ids.iter().map(|it| *it as u32).collect(), given: 0 };
        let texts: Vec<_> = texts.iter().map(text).collect();
        let rows: Vec<_> = texts.iter().map(|it| vec![it]).collect();
        let plain = loss::gradients(&llama, &rows, false);
        assert_same(&*llama, &loss::gradients(&llama, &rows, true), &plain);
    }
}

#[test]
fn windows_and_rotations_are_the_same_with_a_cache() {
    for name in FAMILIES {
        let (llama, expected) = (tiny(name), Expected::read(fixture(name).join("expected.json")));
        let text = &expected.ids[1];
        let mut cache = llama.cache();
        for part in [0..4, 4..5, 5..7, 7..9, 9..10, 10..11] {
            let logits = llama.read(ids(&[&text[part.clone()]]), &mut cache);
            // Phi-3 turns a text otherwise as soon as it has more than 8 tokens.
            if name != "phi3" || part.end > 8 {
                assert_close(logits, &expected.rows(1, part.end - 1..part.end), 2e-5);
            }
        }
    }
}

/// Also where their lengths decide how they are turned.
#[test]
fn texts_beside_each_other_do_not_see_each_other() {
    let one = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3];
    let two = [2, 7, 1, 8];
    for name in ["gemma3", "phi3"] {
        let llama = tiny(name);
        let device = device::<Plain>();
        let alone = |text: &[i32]| {
            let positions = llama.positions(text.len(), &device);
            llama.logits(llama.hidden(ids(&[text]), &positions)).squeeze_dim::<2>(0)
        };
        let row = [&one[..], &two].concat();
        let packed = llama.packed(&[vec![one.len(), two.len()]], &device);
        let scores = llama.logits(llama.hidden(ids(&[&row]), &packed)).squeeze_dim::<2>(0);
        let expected = Tensor::cat(vec![alone(&one), alone(&two)], 0);
        let difference = (scores - expected).abs().max().into_scalar();
        assert!(difference < 1e-5, "{name}: {difference}");

        // The first one becomes long, and the other does not.
        let begun = [&one[..8], &two[..3]].map(|begin| {
            let mut cache = llama.cache();
            llama.read(ids(&[begin]), &mut cache);
            cache
        });
        let mut cache = Cache::join(&begun);
        let scores = llama.read(ids(&[&[one[8]], &[two[3]]]), &mut cache);
        for (row, text) in [&one[..9], &two].into_iter().enumerate() {
            let expected = alone(text).narrow(0, text.len() - 1, 1);
            let difference =
                (scores.clone().narrow(0, row, 1) - expected).abs().max().into_scalar();
            assert!(difference < 1e-5, "{name}: {difference}");
        }
    }
}

#[test]
fn fused_layers_are_held_in_few_bits_as_well() {
    for (name, count) in [("phi3", 4), ("gemma2", 7)] {
        let loaded =
            pretrained::load::<Plain>(&fixture(name), Some(Quantization::Int8), &device::<Plain>());
        let layers = loaded.unwrap().llama.parameters().layers.into_iter();
        let quantized = layers.filter(|it| it.quantized_bytes > 0).count();
        assert_eq!(quantized, 2 * count, "{name}");
    }
}

#[test]
fn a_model_without_autodiff_is_the_same() {
    let (llama, texts) = adapted("gemma2");
    let plain = llama.valid();
    let texts: Vec<_> = texts.iter().map(Vec::as_slice).collect();
    let positions = plain.positions(texts[0].len(), &device::<Plain>());
    let logits = plain.logits(plain.hidden(ids(&texts), &positions));
    let expected = Expected::read(fixture("gemma2/adapter/expected.json"));
    let (rows, cols) = (expected.logits.len(), expected.logits[0].len());
    let expected = Matrix { rows, cols, data: expected.logits.concat() };
    assert_close(logits.reshape([rows, cols]), &expected, 2e-5);
}
