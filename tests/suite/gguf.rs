//! GGUF files, beside those that GGUF's own package writes: see `tests/gguf/make_fixtures.py`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::{Tensor, backend::Backend};
use burn_lora::{
    LoraAdapter, LoraAdapters, LoraError, Scaling,
    gguf::{Family, Field, Gguf, NewTensor, Packing, WRITER, write},
    peft::Renaming,
    quantize::GgufType,
};
use safetensors::SafeTensors;

use crate::{
    model::{Plain, device},
    oracle::{Matrix, bits},
    peft::TempDir,
};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from("tests/gguf/fixtures").join(name)
}

fn numbers(tensors: &SafeTensors, name: &str) -> (Vec<usize>, Vec<f32>) {
    let tensor = tensors.tensor(name).unwrap();
    let numbers = tensor.data().as_chunks().0.iter().map(|&it| f32::from_le_bytes(it));
    (tensor.shape().to_vec(), numbers.collect())
}

/// Two heads of queries, and one of keys.
fn family() -> Family {
    Family {
        architecture: "llama".to_owned(),
        names: Renaming::new([
            ("token_embd", "embed"),
            ("output", "head"),
            ("blk.*.attn_q", "layers.*.query"),
            ("blk.*.attn_k", "layers.*.key"),
            ("blk.*.attn_v", "layers.*.value"),
        ]),
        pairs: vec![("blk.*.attn_q".to_owned(), 2), ("blk.*.attn_k".to_owned(), 1)],
        is_tied: false,
    }
}

fn load(name: &str) -> LoraAdapters<Plain> {
    LoraAdapters::load_gguf(fixture(name), &family(), &device::<Plain>()).unwrap()
}

/// Numbers that are the same on every backend.
fn adapter<B: Backend>(
    shape: [usize; 2],
    rank: usize,
    alpha: f64,
    scaling: Scaling,
) -> LoraAdapter<B> {
    let factor = |rows, cols, seed| {
        Matrix::random(rows, cols, seed).tensor::<B, 2>([rows, cols], &device::<B>())
    };
    let [d_input, d_output] = shape;
    LoraAdapter::new(factor(d_input, rank, 7), factor(rank, d_output, 8), alpha, scaling)
        .of_linear()
}

#[test]
fn numbers_are_rounded_as_by_the_package_of_the_format() {
    let bytes = fs::read(fixture("rounded.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let (_, numbers) = numbers(&tensors, "numbers");
    for kind in GgufType::ALL {
        let expected = tensors.tensor(&format!("{kind:?}")).map(|it| it.data().to_vec());
        assert_eq!(kind.pack(&numbers), expected.ok(), "{kind:?}");
    }
}

#[test]
fn files_of_the_package_are_read() {
    for (name, alpha, scale) in [("adapters.gguf", 4.5, 1.5), ("unscaled.gguf", 1.0, 1.0)] {
        let set = load(name);
        let bytes = fs::read(fixture(&format!("{name}.safetensors"))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(set.len(), 6);
        for (path, adapter) in set.iter() {
            let layer = family().names.inverse().apply(path);
            // PyTorch's order, but for the embedding's A.
            let factor = |name: &str| {
                let (shape, numbers) = numbers(&tensors, &format!("{layer}.{name}"));
                let rows = Matrix::from_fn(shape[0], shape[1], |row, col| {
                    numbers[row * shape[1] + col].into()
                });
                if layer == "token_embd" && name == "a" { rows } else { rows.transpose() }
            };
            for (found, expected) in [(&adapter.a, factor("a")), (&adapter.b, factor("b"))] {
                let found = found.val();
                let expected = expected.tensor::<Plain, 2>(found.dims(), &device::<Plain>());
                assert_eq!(bits(found), bits(expected), "{path}");
            }
            assert_eq!((adapter.alpha, adapter.scale()), (alpha, scale), "{path}");
        }
    }
}

#[test]
fn what_is_written_is_what_the_package_writes() {
    let dir = TempDir::new("gguf-written");
    for name in ["adapters.gguf", "unscaled.gguf"] {
        let path = dir.0.join(name);
        load(name).save_gguf(&path, &family()).unwrap();
        let [found, expected] = [path, fixture(name)].map(|path| Gguf::open(&path).unwrap());
        let names = |file: &Gguf| file.tensors.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&found), names(&expected));
        for (tensor, it) in &expected.tensors {
            assert_eq!(found.tensors[tensor].shape, it.shape, "{tensor}");
            assert_eq!(found.values(tensor).unwrap(), expected.values(tensor).unwrap(), "{tensor}");
        }
        for (key, value) in &expected.fields {
            assert_eq!(found.fields.get(key), Some(value), "{name}: {key}");
        }
    }
    // Without an alpha in the other file.
    let scaled = Gguf::open(&dir.0.join("unscaled.gguf")).unwrap();
    assert_eq!(scaled.fields["adapter.lora.alpha"], 3.0);
}

/// What llama.cpp multiplies: alpha over the rank, or nothing if alpha is 0.
fn scale(file: &Gguf, layer: &str) -> f64 {
    let alpha = file.fields["adapter.lora.alpha"].as_f64().unwrap();
    let rank = file.tensors[&format!("{layer}.weight.lora_b")].shape[1] as f64;
    if alpha == 0.0 { 1.0 } else { alpha / rank }
}

#[test]
fn every_rule_of_scaling_gives_the_same_update() {
    let dir = TempDir::new("gguf-scales");
    let path = dir.0.join("x.gguf");
    let one = |rank, alpha, scaling| adapter::<Plain>([5, 8], rank, alpha, scaling);
    for (name, value, query, alpha) in [
        (
            "rsLoRA",
            one(4, 3.0, Scaling::AlphaOverSqrtRank),
            one(4, 3.0, Scaling::AlphaOverSqrtRank),
            6.0,
        ),
        // Ranks differ, and the scales with them.
        ("ranks", one(2, 3.0, Scaling::AlphaOverRank), one(4, 3.0, Scaling::AlphaOverRank), 3.0),
        (
            "other scales",
            one(2, 3.0, Scaling::AlphaOverRank),
            one(2, 5.0, Scaling::AlphaOverRank),
            0.0,
        ),
        (
            "switched off",
            one(2, 0.0, Scaling::AlphaOverRank),
            one(2, 0.0, Scaling::AlphaOverRank),
            0.0,
        ),
        ("negative", one(2, -3.0, Scaling::Alpha), one(2, -3.0, Scaling::Alpha), -6.0),
    ] {
        let set = LoraAdapters::new([("layers.0.value", value), ("layers.0.query", query)]);
        set.save_gguf(&path, &family()).unwrap();
        let file = Gguf::open(&path).unwrap();
        assert_eq!(file.fields["adapter.lora.alpha"].as_f64(), Some(alpha), "{name}");
        let again = LoraAdapters::<Plain>::load_gguf(&path, &family(), &device::<Plain>()).unwrap();
        for (layer, adapter) in set.iter() {
            let found = again.get(layer).unwrap().delta();
            let difference = (found - adapter.delta()).abs().max().into_scalar();
            assert!(difference < 1e-5, "{name}: {layer} differs by {difference}");
        }
        // As llama.cpp computes it: B is [outputs, rank], and A [rank, inputs].
        let rank = file.tensors["blk.0.attn_v.weight.lora_b"].shape[1];
        let factor = |name: &str, rows: usize, cols: usize| {
            let values = file.values(name).unwrap();
            Matrix::from_fn(rows, cols, |row, col| values[row * cols + col].into())
        };
        let [a, b] = [
            factor("blk.0.attn_v.weight.lora_a", rank, 5),
            factor("blk.0.attn_v.weight.lora_b", 8, rank),
        ];
        let update = b.times(&a).scaled(scale(&file, "blk.0.attn_v")).transpose();
        let expected = set.get("layers.0.value").unwrap().delta();
        crate::oracle::assert_close(expected, &update, 1e-5);
    }
}

#[test]
fn the_name_of_the_base_comes_along() {
    let dir = TempDir::new("gguf-base");
    let path = dir.0.join("x.gguf");
    let value = adapter::<Plain>([5, 8], 2, 3.0, Scaling::AlphaOverRank);
    let set = LoraAdapters::new([("layers.0.value", value)]).with_base_model("org/model");
    set.save_gguf(&path, &family()).unwrap();
    let again = LoraAdapters::<Plain>::load_gguf(&path, &family(), &device::<Plain>()).unwrap();
    assert_eq!(again.base_model(), Some("org/model"));
}

#[test]
fn what_has_no_place_in_such_files_is_refused_and_an_old_file_stays() {
    let dir = TempDir::new("gguf-refused");
    let path = dir.0.join("x.gguf");
    fs::write(&path, "old").unwrap();
    let plain = || adapter::<Plain>([5, 8], 2, 3.0, Scaling::AlphaOverRank);
    let with = |change: fn(&mut LoraAdapter<Plain>)| {
        let mut adapter = plain();
        change(&mut adapter);
        adapter
    };
    let vector = || burn::module::Param::from_tensor(Tensor::ones([8], &device::<Plain>()));
    let biased = {
        let mut it = plain();
        it.bias = Some(vector());
        it
    };
    let dora = {
        let mut it = plain();
        it.magnitude = Some(vector());
        it
    };
    let nan = with(|it| it.a = burn::module::Param::from_tensor(it.a.val() * f32::NAN));
    let tied = Family { is_tied: true, ..family() };
    let other_heads = Family { pairs: vec![("blk.*.attn_q".to_owned(), 3)], ..family() };
    for (layer, adapter, family, message) in [
        (
            "layers.0.value",
            biased,
            &family(),
            "no place for the adapter's bias; merge the set into the model",
        ),
        (
            "layers.0.value",
            dora,
            &family(),
            "no place for DoRA's magnitudes; merge the set into the model, or `extract`",
        ),
        ("layers.0.value", nan, &family(), "x.gguf: `layers.0.value` holds NaN or infinite values"),
        (
            "layers.0.other",
            plain(),
            &family(),
            "the family has no name for it in llama.cpp's files; leave it out",
        ),
        (
            "embed",
            plain().of_embedding(),
            &tied,
            "the table of embeddings is also the head, and llama.cpp ends",
        ),
        ("head", plain(), &tied, "the table of embeddings is also the head, and llama.cpp ends"),
        ("embed", plain(), &family(), "it is an embedding in llama.cpp"),
        ("layers.0.query", plain(), &other_heads, "cannot be divided into the family's heads"),
        (
            "layers.0.value",
            plain().of_convolution([1, 1]),
            &family(),
            "llama.cpp has no adapters of convolutions",
        ),
    ] {
        let set = LoraAdapters::new([(layer, adapter)]);
        let error = set.save_gguf(&path, family).unwrap_err().to_string();
        assert!(error.contains(message) && error.contains(layer), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }
    let none: [(&str, LoraAdapter<Plain>); 0] = [];
    let error = LoraAdapters::new(none).save_gguf(&path, &family()).unwrap_err();
    assert!(matches!(error, LoraError::Unsupported { .. }), "{error}");
    assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 1, "nothing else is left behind");
}

/// A file of adapters with these fields changed, and these tensors in f32.
fn made(path: &Path, fields: &[(&str, Option<Field>)], tensors: &[(&str, &[usize], f32)]) {
    let mut all = vec![
        ("general.architecture", Field::from("llama")),
        ("general.type", "adapter".into()),
        ("adapter.type", "lora".into()),
        ("adapter.lora.alpha", 4_f32.into()),
    ];
    for (name, value) in fields {
        all.retain(|(it, _)| it != name);
        all.extend(value.clone().map(|value| (*name, value)));
    }
    let all = all.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let tensors = tensors.iter().map(|(name, shape, value)| NewTensor {
        name: (*name).to_owned(),
        shape: shape.to_vec(),
        packing: Packing::F32,
        bytes: Box::new(move || {
            let numbers = vec![*value; shape.iter().product()];
            Ok(Packing::F32.pack(&numbers).unwrap())
        }),
    });
    write(path, all, tensors.collect()).unwrap();
}

#[test]
fn files_that_are_wrong_are_refused_by_name() {
    let dir = TempDir::new("gguf-wrong");
    let path = dir.0.join("x.gguf");
    let (a, b) = ("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b");
    let usual: &[(&str, &[usize], f32)] = &[(a, &[2, 5], 0.5), (b, &[8, 2], 0.5)];
    let with = |value: &str| Some(Field::from(value));
    let text = "general.architecture";
    for (fields, tensors, message) in [
        (
            vec![("general.type", None)],
            usual,
            "`general.type` is missing, as in a model, not adapter",
        ),
        (vec![("general.type", with("model"))], usual, "`general.type` is model, not adapter"),
        (vec![("adapter.type", with("lokr"))], usual, "`adapter.type` is lokr; lora is expected"),
        (
            vec![(text, with("qwen2"))],
            usual,
            "`general.architecture` is qwen2, and the model's is llama",
        ),
        (
            vec![("adapter.alora.invocation_tokens", Some(vec![1_u32].into()))],
            usual,
            "`adapter.alora.invocation_tokens`",
        ),
        (
            vec![("adapter.lora.alpha", with("x"))],
            usual,
            "`adapter.lora.alpha` is \"x\"; a number is expected",
        ),
        (vec![], &[], "there is no adapter in it"),
        (vec![], &usual[..1], "`blk.0.attn_q.weight.lora_b` is missing"),
        (vec![], &usual[1..], "`blk.0.attn_q.weight.lora_a` is missing"),
        (
            vec![],
            &[(a, &[2, 5], 0.5), (b, &[8, 3], 0.5)],
            "`blk.0.attn_q.weight`: A is [2, 5] and B is [8, 3]",
        ),
        (vec![], &[(a, &[2, 5], 0.5), (b, &[6, 2], 0.5)], "6 outputs are not 2 heads"),
        (
            vec![],
            &[(a, &[10], 0.5), (b, &[8, 2], 0.5)],
            "a factor has the shape [10], not two sizes",
        ),
        (
            vec![],
            &[(a, &[2, 5], f32::NAN), (b, &[8, 2], 0.5)],
            "a factor holds NaN or infinite values",
        ),
        (
            vec![],
            &[
                ("blk.0.ffn_up.weight.lora_a", &[2, 5], 0.5),
                ("blk.0.ffn_up.weight.lora_b", &[8, 2], 0.5),
            ],
            "`blk.0.ffn_up.weight`: `llama` has no such layer",
        ),
        (vec![], &[("blk.0.attn_q.weight", &[2, 5], 0.5)], "`blk.0.attn_q.weight` is no factor"),
    ] {
        made(&path, &fields, tensors);
        let result = LoraAdapters::<Plain>::load_gguf(&path, &family(), &device::<Plain>());
        let error = result.unwrap_err().to_string();
        assert!(error.contains(message) && error.contains("x.gguf"), "{error}");
    }
    // llama.cpp passes over tensors of norms.
    let norm: (&str, &[usize], f32) = ("blk.0.attn_norm.weight", &[5], 1.0);
    made(&path, &[], &[usual[0], usual[1], norm]);
    let set = LoraAdapters::<Plain>::load_gguf(&path, &family(), &device::<Plain>()).unwrap();
    assert_eq!(set.unused(), ["blk.0.attn_norm.weight"]);
    fs::write(&path, "{}").unwrap();
    let result = LoraAdapters::<Plain>::load_gguf(&path, &family(), &device::<Plain>());
    assert!(result.unwrap_err().to_string().contains("it is not a GGUF file"));
}

#[test]
fn fields_are_copied_as_they_are() {
    let dir = TempDir::new("gguf-fields");
    let paths = ["one.gguf", "two.gguf"].map(|name| dir.0.join(name));
    let fields = [
        ("general.architecture", Field::from("llama")),
        ("a.number", 7_u32.into()),
        ("a.negative", (-7_i32).into()),
        ("a.float", 0.1_f32.into()),
        ("a.switch", true.into()),
        ("some.tokens", vec!["a".to_owned(), "ß\n".to_owned()].into()),
        ("some.scores", vec![-1_f32, f32::INFINITY].into()),
        ("some.types", vec![1_i32, 6].into()),
        ("some.ids", vec![1_u32, 6].into()),
        ("some.switches", vec![true, false].into()),
    ];
    let fields = fields.map(|(name, value)| (name.to_owned(), value));
    write(&paths[0], fields.to_vec(), Vec::new()).unwrap();
    let one = Gguf::open(&paths[0]).unwrap();
    assert_eq!(one.fields["some.tokens"][1], "ß\n");
    let mut copied = one.copied_fields().unwrap();
    assert_eq!(copied.pop(), Some((WRITER.to_owned(), env!("CARGO_PKG_VERSION").into())));
    assert_eq!(copied, fields);
    write(&paths[1], copied, Vec::new()).unwrap();
    assert_eq!(fs::read(&paths[0]).unwrap(), fs::read(&paths[1]).unwrap());
}

/// A failed save leaves no file, and one that is missing its directory says so.
#[test]
fn a_directory_that_is_missing_is_an_error() {
    let dir = TempDir::new("gguf-missing");
    let value = adapter::<Plain>([5, 8], 2, 3.0, Scaling::AlphaOverRank);
    let set = LoraAdapters::new([("layers.0.value", value)]);
    let error = set.save_gguf(dir.0.join("none/x.gguf"), &family()).unwrap_err();
    assert!(matches!(error, LoraError::Io { .. }), "{error}");
    assert!(error.to_string().contains("none/x.gguf"), "{error}");
}
