//! Models that are written: their types, and what else is in their directories.

use std::{fs, path::Path};

use burn::tensor::{Tensor, TensorData};
use burn_lora::{LoraAdapter, LoraAdapters, LoraModule, Scaling, quantize::Quantization};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use burn_lora_llm::{
    chat::Chat,
    gguf::model,
    llama::Llama,
    merged::{self, Precision, Saved},
    pretrained,
};

use super::{Made, assert_holds, gguf, noise, scores, user};
use crate::{backend::Plain, oracle::device};

fn load(path: &Path) -> Llama<Plain> {
    pretrained::load::<Plain>(path, None, &device::<Plain>()).unwrap().llama
}

/// Writes the model of `base` again.
fn save(base: &Path, out: &Path, precision: Option<Precision>) -> burn_lora_llm::Result<Saved> {
    merged::save(&load(base), &Chat::read(base)?, base, out, precision)
}

fn names(dir: &Path) -> Vec<String> {
    let files = fs::read_dir(dir).into_iter().flatten();
    let mut names: Vec<_> =
        files.map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
}

#[test]
fn w8_files_of_another_model_do_not_stay_beside_a_merged_one() {
    let (base, out) = (Made::new().write(), TempDir::new().unwrap());
    let out = out.path();
    for name in
        ["chat_template.jinja", "generation_config.json", "special_tokens_map.json", "notes.txt"]
    {
        fs::write(out.join(name), r#"{"eos_token_id": 7}"#).unwrap();
    }
    let index = json!({"weight_map": {"a": "model-00001-of-00002.safetensors"}});
    fs::write(out.join("model.safetensors.index.json"), index.to_string()).unwrap();
    save(base.path(), out, None).unwrap();
    let expected = [
        "config.json",
        "model.safetensors",
        "notes.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names(out), expected);
    assert_eq!(scores(out), scores(base.path()));
    let rendered = |dir| Chat::read(dir).unwrap().render(&[user("a")], true).unwrap();
    assert_eq!(rendered(out), rendered(base.path()));
    // What the base has is there.
    fs::write(base.path().join("generation_config.json"), r#"{"eos_token_id": 3}"#).unwrap();
    let templates = "additional_chat_templates";
    for dir in [base.path(), out] {
        fs::create_dir(dir.join(templates)).unwrap();
    }
    fs::write(out.join(templates).join("old.jinja"), "of another model").unwrap();
    let copied =
        ["tokenizer.model", "chat_template.json", "additional_chat_templates/tool_use.jinja"];
    for name in copied {
        fs::write(base.path().join(name), name).unwrap();
    }
    save(base.path(), out, None).unwrap();
    assert!(Chat::read(out).unwrap().stops(3));
    for name in copied {
        assert_eq!(fs::read_to_string(out.join(name)).unwrap(), name);
    }
    assert_eq!(names(&out.join(templates)), ["tool_use.jinja"]);
}

#[test]
fn w9_divisors_of_rope_become_a_rule_or_nothing_is_written() {
    let dir = TempDir::new().unwrap();
    for (index, divisors) in
        [[1.0, 1.0, 2.0, 8.0], [1.0; 4], [4.0; 4], [1.0, 8.0, 8.0, 8.0]].iter().enumerate()
    {
        let (_dir, path) = gguf::write(&gguf::divided(*divisors), |_| ());
        let out = dir.path().join(index.to_string());
        save(&path, &out, None).unwrap();
        let wanted = model::read(&path).unwrap().config.rope().frequencies;
        let config = burn_lora_llm::config::LlamaConfig::read(&out.join("config.json")).unwrap();
        for (found, wanted) in config.rope().frequencies.iter().zip(wanted) {
            assert!((found / wanted - 1.0).abs() < 1e-6, "{divisors:?}: {found}, not {wanted}");
        }
    }
    assert_eq!(config(&dir.path().join("0"))["rope_scaling"]["rope_type"], "llama3");
    assert_eq!(
        config(&dir.path().join("2"))["rope_scaling"],
        json!({"rope_type": "linear", "factor": 4.0})
    );

    let out = dir.path().join("refused");
    for divisors in [[1.0, 3.0, 2.0, 8.0], [2.0, 2.0, 4.0, 8.0], [0.5, 1.0, 1.0, 1.0]] {
        let (_dir, path) = gguf::write(&gguf::divided(divisors), |_| ());
        let error = save(&path, &out, None).unwrap_err();
        assert_holds(&error, "model.gguf: its frequencies of RoPE are no rule");
        assert!(!out.exists());
    }
}

#[test]
fn w9_whatever_is_refused_leaves_no_files() {
    let (base, dir) = (Made::new().write(), TempDir::new().unwrap());
    let (llama, chat) = (load(base.path()), Chat::read(base.path()).unwrap());
    let out = dir.path().join("merged");
    let refused =
        |llama: &Llama<Plain>| merged::save(llama, &chat, base.path(), &out, Some(Precision::F16));
    let large =
        Made::new().with(|it| it.tensors.get_mut("model.norm.weight").unwrap().1[2] = -70_000.0);
    let error = refused(&load(large.write().path())).unwrap_err();
    assert_holds(
        &error,
        "`model.norm.weight`: -70000 is too large for F16; write it in another type",
    );
    assert!(!out.exists());
    // What is copied cannot be read.
    fs::create_dir(base.path().join("merges.txt")).unwrap();
    assert_holds(&refused(&llama).unwrap_err(), "merges.txt: ");
    assert!(!out.exists());
    // The directory of a GGUF file is one of a base, too.
    let (dir, path) = gguf::write(&Made::new(), |_| ());
    let before = names(dir.path());
    assert_holds(&save(&path, dir.path(), None).unwrap_err(), "the base is there");
    assert_eq!(names(dir.path()), before);
}

#[test]
fn a_merged_gguf_file_keeps_all_tokens_that_end_answers() {
    let ((_dir, path), out) = (gguf::write(&Made::new(), |_| ()), TempDir::new().unwrap());
    save(&path, out.path(), None).unwrap();
    // The file names the first, and the second is known by its name.
    assert_eq!(config(out.path())["eos_token_id"], json!([2, 3]));
    for path in [&path, out.path()] {
        let chat = Chat::read(path).unwrap();
        let ends: Vec<_> = (0..13).filter(|&id| chat.stops(id)).collect();
        assert_eq!(ends, [2, 3]);
        assert_eq!(chat.encode_to_end("user").unwrap().last(), Some(&2));
    }
}

/// The type of 16 bits with this many bits of exponent and mantissa, after a sign.
#[derive(Clone, Copy)]
struct Half {
    exponent: i32,
    mantissa: i32,
}

impl Half {
    /// The value of the bits, by the definition of IEEE 754.
    fn value(self, bits: u16) -> f64 {
        let mantissa = f64::from(bits & ((1 << self.mantissa) - 1)) / 2_f64.powi(self.mantissa);
        let exponent = i32::from(bits >> self.mantissa & ((1 << self.exponent) - 1));
        let bias = (1 << (self.exponent - 1)) - 1;
        let size = match exponent {
            0 => mantissa * 2_f64.powi(1 - bias),
            _ => (1.0 + mantissa) * 2_f64.powi(exponent - bias),
        };
        if bits >> 15 == 1 { -size } else { size }
    }

    /// The bits nearest to a number; of two, those that are even.
    fn round(self, number: f32) -> u16 {
        let size = f64::from(number.abs());
        let largest = (((1_u16 << self.exponent) - 1) << self.mantissa) - 1;
        // The first that is not below, and the one before it.
        let (mut above, mut end) = (0, largest);
        while above < end {
            let middle = above + (end - above) / 2;
            match self.value(middle) < size {
                true => above = middle + 1,
                false => end = middle,
            }
        }
        let [low, high] = [above.saturating_sub(1), above];
        let distance = |bits: u16| (self.value(bits) - size).abs();
        let bits = match distance(low).total_cmp(&distance(high)) {
            std::cmp::Ordering::Less => low,
            std::cmp::Ordering::Greater => high,
            std::cmp::Ordering::Equal if low % 2 == 0 => low,
            std::cmp::Ordering::Equal => high,
        };
        bits | u16::from(number.is_sign_negative()) << 15
    }
}

/// The weight of the layer that has an adapter.
const ADAPTED: &str = "model.layers.1.mlp.down_proj.weight";

/// The model with `2.5 · A · B` added to this weight.
fn merged_on(base: &Path) -> Llama<Plain> {
    merged_with(&load(base))
}

fn merged_with(llama: &Llama<Plain>) -> Llama<Plain> {
    let matrix = |rows: usize, cols: usize, seed| {
        let data = TensorData::new(noise(rows * cols, seed), [rows, cols]);
        Tensor::<Plain, 2>::from_data(data, &device::<Plain>())
    };
    let (a, b) = (matrix(24, 2, 5), matrix(2, 16, 6));
    let adapter = LoraAdapter::new(a, b, 5.0, Scaling::AlphaOverRank);
    let path = ADAPTED.strip_suffix(".weight").unwrap();
    llama.switch(&LoraAdapters::new([(path, adapter)])).unwrap().merge().unwrap()
}

/// The numbers in single precision.
fn numbers_of(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks(4).map(|it| f32::from_le_bytes(it.try_into().unwrap())).collect()
}

#[test]
fn d8_weights_are_rounded_once_to_the_nearest_even() {
    // Numbers between two of each type, among and below the smallest, and near the largest.
    let special = [
        1.0 + 2_f32.powi(-11),
        1.0 + 3.0 * 2_f32.powi(-11),
        1.0 + 2_f32.powi(-11) + 2_f32.powi(-20),
        -1.0 - 2_f32.powi(-8),
        1.0 + 3.0 * 2_f32.powi(-8),
        1.0 + 2_f32.powi(-8) + 2_f32.powi(-20),
        2_f32.powi(-25),
        3.0 * 2_f32.powi(-25),
        -2_f32.powi(-26),
        2_f32.powi(-134),
        1e-40,
        65_503.0,
        -65_519.0,
        -0.0,
        1e-7,
        6.1e-5,
    ];
    let base = Made::new()
        .with(|it| it.tensors.get_mut("model.norm.weight").unwrap().1 = special.to_vec());
    let (base, dir) = (base.write(), TempDir::new().unwrap());
    let merged = merged_on(base.path());
    let chat = Chat::read(base.path()).unwrap();
    let written = |precision: Precision| {
        let out = dir.path().join(precision.to_string());
        let saved = merged::save(&merged, &chat, base.path(), &out, Some(precision)).unwrap();
        assert_eq!(Vec::from_iter(saved.precisions), [precision]);
        let bytes = fs::read(out.join("model.safetensors")).unwrap();
        assert!(bytes.len() > saved.bytes && bytes.len() < saved.bytes + 4096);
        (out, bytes)
    };
    let (_, sums) = written(Precision::F32);
    let sums = SafeTensors::deserialize(&sums).unwrap();
    let (a, b, weight) = (noise(24 * 2, 5), noise(2 * 16, 6), &Made::new().tensors[ADAPTED].1);
    let found = numbers_of(sums.tensor(ADAPTED).unwrap().data());
    for (index, number) in found.into_iter().enumerate() {
        let (row, col) = (index / 24, index % 24);
        let product = |rank| f64::from(a[col * 2 + rank]) * f64::from(b[rank * 16 + row]);
        let expected = f64::from(weight[index]) + 2.5 * (0..2).map(product).sum::<f64>();
        assert!((f64::from(number) - expected).abs() < 1e-6, "{number}, not {expected}");
    }
    for (precision, half, dtype, name) in [
        (Precision::F16, Half { exponent: 5, mantissa: 10 }, Dtype::F16, "float16"),
        (Precision::BF16, Half { exponent: 8, mantissa: 7 }, Dtype::BF16, "bfloat16"),
    ] {
        let (out, bytes) = written(precision);
        assert_eq!(config(&out)["dtype"], name);
        let halves = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(halves.len(), sums.len());
        // What is read back is what was written.
        let again = dir.path().join("again");
        save(&out, &again, Some(Precision::F32)).unwrap();
        let again = fs::read(again.join("model.safetensors")).unwrap();
        let again = SafeTensors::deserialize(&again).unwrap();
        for (name, sum) in sums.tensors() {
            let found = halves.tensor(&name).unwrap();
            assert_eq!((found.dtype(), found.shape()), (dtype, sum.shape()));
            let again = numbers_of(again.tensor(&name).unwrap().data());
            for ((number, bits), again) in
                numbers_of(sum.data()).iter().zip(found.data().chunks(2)).zip(again)
            {
                let bits = u16::from_le_bytes([bits[0], bits[1]]);
                assert_eq!(bits, half.round(*number), "{name}: {number:e} in {precision}");
                assert_eq!(f64::from(again), half.value(bits), "{name}: {number:e} in {precision}");
            }
        }
    }
}

#[test]
fn d8_weights_keep_the_type_of_the_base() {
    let is_norm = |name: &str| name.contains("norm");
    let mixed = |name: &str| if is_norm(name) { Dtype::F32 } else { Dtype::BF16 };
    let made = Made::new().with(|it| it.config["dtype"] = json!("bfloat16"));
    let (base, dir) = (made.write_as(mixed), TempDir::new().unwrap());
    let merged = merged_on(base.path());
    let chat = Chat::read(base.path()).unwrap();
    let saved =
        merged::save(&merged, &chat, base.path(), &dir.path().join("merged"), None).unwrap();
    assert_eq!(Vec::from_iter(saved.precisions), [Precision::F32, Precision::BF16]);
    assert_eq!(config(&dir.path().join("merged"))["dtype"], "bfloat16");
    let read = |dir: &Path| fs::read(dir.join("model.safetensors")).unwrap();
    let (before, after) = (read(base.path()), read(&dir.path().join("merged")));
    let [before, after] = [&before, &after].map(|it| SafeTensors::deserialize(it).unwrap());
    for (name, tensor) in before.tensors() {
        let found = after.tensor(&name).unwrap();
        assert_eq!(found.dtype(), mixed(&name), "{name}");
        // What has no adapter is the same to the bit.
        assert!(name == ADAPTED || found.data() == tensor.data(), "{name}");
    }

    // A head beside the table stays one.
    let headed = Made::new().with_head().write_as(|_| Dtype::F16);
    save(headed.path(), &dir.path().join("headed"), None).unwrap();
    assert_eq!(config(&dir.path().join("headed"))["tie_word_embeddings"], false);
    assert_eq!(scores(&dir.path().join("headed")), scores(headed.path()));

    // What has few bits becomes halves, and the rest stays.
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/llama/fixtures/packed.gguf");
    let (packed, out) = (load(&path).dequantize(), dir.path().join("packed"));
    let chat = Chat::read(base.path()).unwrap();
    let saved = merged::save(&packed, &chat, &path, &out, None);
    let saved = saved.unwrap();
    assert_eq!(Vec::from_iter(saved.precisions), [Precision::F32, Precision::F16, Precision::BF16]);
    let stored = pretrained::load::<Plain>(&out, None, &device::<Plain>()).unwrap().stored;
    assert_eq!(stored.as_deref(), Some("BF16, F16"));
}

#[test]
fn a_model_is_mostly_bf16_by_the_numbers_of_its_matrices() {
    // The table of embeddings has 208 of 2,768 numbers in matrices, and the norms count for nothing.
    let (table, norm) = (|it: &str| it.contains("embed"), |it: &str| it.contains("norm"));
    type Names<'a> = &'a dyn Fn(&str) -> bool;
    let cases: [(Names<'_>, bool); 5] = [
        (&|_| true, true),
        (&|_| false, false),
        (&|it| !table(it) && !norm(it), true),
        (&|it| table(it) || norm(it), false),
        (&|it| it.contains("mlp"), true),
    ];
    for (index, (is_bf16, expected)) in cases.into_iter().enumerate() {
        for other in [Dtype::F32, Dtype::F16] {
            let dtype = |name: &str| if is_bf16(name) { Dtype::BF16 } else { other };
            let dir = Made::new().write_as(dtype);
            let found = pretrained::is_mostly_bf16(dir.path()).unwrap();
            assert_eq!(found, expected, "{index} {other:?}");
        }
    }
    let error = pretrained::is_mostly_bf16(TempDir::new().unwrap().path()).unwrap_err();
    assert_holds(&error, "config.json");
}

/// The norm of the numbers.
fn norm(numbers: impl Iterator<Item = f64>) -> f64 {
    numbers.map(|it| it * it).sum::<f64>().sqrt()
}

#[track_caller]
fn assert_near(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-4 * expected, "{found}, not {expected}");
}

#[test]
fn what_rounding_changed_is_told_beside_what_adapters_changed() {
    // A base in bf16, and quantized ones. Only the adapted weight is rounded there.
    let base = Made::new().write_as(|_| Dtype::BF16);
    let (dir, chat) = (TempDir::new().unwrap(), Chat::read(base.path()).unwrap());
    let (a, b) = (noise(24 * 2, 5), noise(2 * 16, 6));
    let update = |index: usize| {
        let (row, col) = (index / 24, index % 24);
        let product = |rank| f64::from(a[col * 2 + rank]) * f64::from(b[rank * 16 + row]);
        2.5 * (0..2).map(product).sum::<f64>()
    };
    let llama = load(base.path());
    let updates = merged::updates(&llama, &merged_on(base.path()));
    assert_eq!(Vec::from_iter(updates.keys()), [ADAPTED]);
    assert_near(updates[ADAPTED], norm((0..16 * 24).map(update)));
    assert!(merged::updates(&llama, &llama).is_empty());
    for (precision, half) in [
        (Precision::BF16, Half { exponent: 8, mantissa: 7 }),
        (Precision::F16, Half { exponent: 5, mantissa: 10 }),
    ] {
        let out = dir.path().join(precision.to_string());
        let merged = merged_on(base.path());
        let saved = merged::save(&merged, &chat, base.path(), &out, Some(precision)).unwrap();
        let tensors = Made::new().tensors;
        assert!(saved.rounding.keys().eq(tensors.keys()));
        for (name, (_, numbers)) in &tensors {
            let bf16 = Half { exponent: 8, mantissa: 7 };
            let sums = numbers.iter().enumerate().map(|(index, &number)| {
                let update = if name == ADAPTED { update(index) } else { 0.0 };
                bf16.value(bf16.round(number)) + update
            });
            let errors = sums.clone().map(|it| half.value(half.round(it as f32)) - it);
            let found = saved.rounding[name];
            assert_near(found.norm, norm(sums.clone()));
            assert_near(found.error, norm(errors));
        }
        let errors = saved.rounding.iter().filter(|(_, it)| it.error > 0.0);
        let changed: Vec<_> = errors.map(|(name, _)| name).collect();
        assert!(precision == Precision::F16 || changed == [ADAPTED], "{changed:?}");
    }
    // Nothing is rounded to single precision.
    let saved = merged::save(
        &merged_on(base.path()),
        &chat,
        base.path(),
        &dir.path().join("full"),
        Some(Precision::F32),
    );
    assert!(saved.unwrap().rounding.is_empty());

    // The update of a quantized base is that of the numbers that its codes stand for.
    for quantization in [Quantization::Int8, Quantization::Nf4, Quantization::Bf16] {
        let quantized =
            pretrained::load::<Plain>(base.path(), Some(quantization), &device::<Plain>());
        let quantized = quantized.unwrap().llama;
        let merged = merged_with(&quantized);
        let updates = merged::updates(&quantized, &merged);
        assert_eq!(Vec::from_iter(updates.keys()), [ADAPTED]);
        assert_near(updates[ADAPTED], norm((0..16 * 24).map(update)));
    }
}
