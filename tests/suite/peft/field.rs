//! Files as people have them, and as they go wrong: PEFT's values, or an error that says what is wrong.

use std::{collections::BTreeMap, fs};

use burn::{
    module::{Module, Param},
    nn::{EmbeddingConfig, Linear, LinearConfig, conv::Conv2dConfig},
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{
    Lora, LoraAdapter, LoraAdapters, LoraError, LoraLinear, LoraModule, Scaling,
    nn::{LoraConv2d, LoraEmbedding},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use super::{TempDir, files, load};
use crate::{
    model::{Plain, device, filled},
    oracle::{Matrix, assert_close, assert_identical, bits},
};

/// A file of these tensors, whose elements differ from each other.
fn file(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .enumerate()
        .map(|(seed, (_, shape))| {
            let values = Matrix::random(1, shape.iter().product(), seed as u64);
            values.data.iter().flat_map(|it| (*it as f32).to_le_bytes()).collect()
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((key, shape), bytes)| {
        (
            format!("base_model.model.{key}"),
            TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap(),
        )
    });
    safetensors::serialize(views, None).unwrap()
}

/// The elements of a tensor of [`file`], whose place there is `seed`.
fn elements(seed: u64, rows: usize, cols: usize) -> Matrix {
    Matrix { rows, cols, ..Matrix::random(1, rows * cols, seed) }
}

fn parse(fields: Value, weights: &[u8]) -> Result<LoraAdapters<Plain>, LoraError> {
    let mut config = json!({"peft_type": "LORA", "r": 1, "lora_alpha": 6, "target_modules": ["a"]});
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    LoraAdapters::from_bytes(&serde_json::to_vec(&config).unwrap(), weights, &device::<Plain>())
}

#[track_caller]
fn assert_error<T: std::fmt::Debug>(result: Result<T, LoraError>, expected: &str) {
    let error = result.unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
}

#[derive(Module, Debug)]
struct Small<B: Backend> {
    a: LoraLinear<B>,
    head: LoraLinear<B>,
}

#[derive(Module, Debug)]
struct Container<B: Backend> {
    a: LoraLinear<B>,
    head: Vec<LoraLinear<B>>,
}

fn linear(d_input: usize, d_output: usize) -> LoraLinear<Plain> {
    LinearConfig::new(d_input, d_output).init(&device::<Plain>()).into()
}

fn small() -> Small<Plain> {
    filled(Small { a: linear(2, 3), head: linear(2, 2) })
}

const A: (&str, &[usize]) = ("a.lora_A.weight", &[1, 2]);
const B: (&str, &[usize]) = ("a.lora_B.weight", &[3, 1]);

#[test]
fn s2_what_is_missing_of_a_module_in_full_is_listed() {
    let base = small();
    let switched = |modules: Value, tensors: &[(&str, &[usize])]| {
        let tensors = [&[A, B], tensors].concat();
        base.switch(&parse(json!({"modules_to_save": modules}), &file(&tensors)).unwrap())
    };
    let (weight, bias) = (("head.weight", &[2, 2][..]), ("head.bias", &[2][..]));
    let missing = "missing: head.bias (modules_to_save), head.weight (modules_to_save)";
    assert_error(switched(json!(["head"]), &[]), missing);
    // PEFT compares the ends of names as mere text.
    assert_error(switched(json!(["ad"]), &[]), missing);
    let missing = "does not fit; missing: head.weight (modules_to_save)";
    assert_error(switched(json!(["head"]), &[bias]), missing);
    let whole = switched(json!(["head"]), &[weight, bias]).unwrap();
    assert_close(whole.head.base.weight.val(), &elements(2, 2, 2).transpose(), 0.0);
    assert_close(whole.head.base.bias.as_ref().unwrap().val(), &elements(3, 1, 2), 0.0);
    // Lists are written for several kinds of models, and with a model's set everything is there.
    switched(json!(["classifier", "score"]), &[]).unwrap();
    base.switch(&whole.adapters()).unwrap();
}

#[test]
fn s3_a_plain_weight_beside_an_adapter_is_not_used() {
    let base = small();
    let plain = file(&[A, B]);
    let more = file(&[A, B, ("a.weight", &[3, 2])]);
    let [plain, more] = [plain, more].map(|weights| parse(json!({}), &weights).unwrap());
    assert_eq!(more.unused(), ["base_model.model.a.weight"]);
    assert!(more.to_string().ends_with("\nnot used: base_model.model.a.weight"), "{more}");
    assert!(plain.unused().is_empty() && !plain.to_string().contains("not used"));
    let x = || Matrix::random(4, 2, 9).tensor::<Plain, 2>([4, 2], &device::<Plain>());
    let [plain, more] = [plain, more].map(|set| base.switch(&set).unwrap());
    assert_identical(more.a.base.weight.val(), base.a.base.weight.val());
    assert_identical(more.a.forward(x()), plain.a.forward(x()));
    // The same of a bias, which PEFT has as `a.base_layer.bias`; but if it was trained, it must not be lost.
    let weights = file(&[A, B, ("a.bias", &[3])]);
    let bias = parse(json!({}), &weights).unwrap();
    assert_eq!(bias.unused(), ["base_model.model.a.bias"]);
    assert_identical(base.switch(&bias).unwrap().a.forward(x()), plain.a.forward(x()));
    for mode in ["all", "lora_only"] {
        let result = parse(json!({"bias": mode}), &weights);
        assert_error(result, "does not fit; unexpected: base_model.model.a.bias");
    }
}

#[test]
fn s4_all_biases_and_a_container_in_full_load_together() {
    let weights = file(&[
        A,
        B,
        ("a.base_layer.bias", &[3]),
        ("head.0.bias", &[2]),
        ("head.0.weight", &[2, 2]),
        ("head.modules_to_save.default.0.bias", &[2]),
        ("head.original_module.0.bias", &[2]),
    ]);
    let set = parse(json!({"bias": "all", "modules_to_save": ["head"]}), &weights).unwrap();
    let model = filled(Container { a: linear(2, 3), head: vec![linear(2, 2)] });
    let weight = model.a.base.weight.val().into_data().convert::<f64>().to_vec().unwrap();
    let model = model.switch(&set).unwrap();
    let x = Matrix::random(4, 2, 9);
    let tensor = || x.tensor::<Plain, 2>([4, 2], &device::<Plain>());
    let weight = Matrix { rows: 2, cols: 3, data: weight };
    let update = elements(1, 3, 1).times(&elements(0, 1, 2)).scaled(6.0);
    let y = x.times(&weight.plus(&update.transpose())).plus_row(&elements(2, 1, 3));
    assert_close(model.a.forward(tensor()), &y, 1e-6);
    let y = x.times(&elements(4, 2, 2).transpose()).plus_row(&elements(3, 1, 2));
    assert_close(model.head[0].forward(tensor()), &y, 1e-6);
}

#[test]
fn s5_expressions_have_the_meaning_that_python_gives_them() {
    let layer = |name: &'static str| {
        let keys = ["A", "B"].map(|it| format!("{name}.lora_{it}.weight"));
        keys.map(|key| (key, [1, 1]))
    };
    let tensors: Vec<_> = ["a", "aa", "b"].into_iter().flat_map(layer).collect();
    let tensors: Vec<_> = tensors.iter().map(|(key, shape)| (key.as_str(), &shape[..])).collect();
    let weights = file(&tensors);
    let alphas = |expression: &str| {
        let fields = json!({"target_modules": ["a", "aa", "b"], "alpha_pattern": {expression: 9}});
        let set = parse(fields, &weights).unwrap();
        ["a", "aa", "b"].map(|it| set.get(it).unwrap().alpha)
    };
    // By Python 3.11's `re`; `tests/peft/make_regex_fixtures.py` has many more.
    for expression in [r"[[:alpha:]]", r"[a-z&&[a]]", r"[a-z--[a]]", r"\<a", r"\b{start}a", "a++a"]
    {
        assert_eq!(alphas(expression), [6.0; 3], "{expression}");
    }
    assert_eq!(alphas("[a-c~~b]"), [9.0, 6.0, 9.0]);
    assert_eq!(alphas("a{,2}"), [9.0, 9.0, 6.0]);
    assert_eq!(alphas(r"(?!b)[ab]\Z"), [9.0, 6.0, 6.0]);

    let refused = |fields: Value, expected: &str| assert_error(parse(fields, &weights), expected);
    for field in ["rank_pattern", "alpha_pattern"] {
        let expected =
            format!(r"`{field}`: `(a)\1` is not a valid pattern of Python, as it is read");
        refused(json!({field: {r"(a)\1": 2}}), &expected);
    }
    for field in ["target_modules", "exclude_modules", "layers_pattern"] {
        let expected =
            format!(r"`{field}`: `\p{{L}}` is not a valid pattern of Python, as it is read");
        let fields = json!({field: r"\p{L}", "layers_to_transform": 1});
        refused(fields, &format!("{expected} here: Python does not know `\\p`"));
    }
}

#[test]
fn s6_a_targeted_layer_without_tensors_is_missing() {
    let base = small();
    let switched = |targets: &str, more: Value| {
        let mut fields = json!({"target_modules": targets});
        fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        base.switch(&parse(fields, &file(&[A, B])).unwrap())
    };
    for targets in ["(?!x)(a|head)", "a|head", "all-linear", "All-Linear"] {
        assert_error(
            switched(targets, json!({})),
            "the set of adapters does not fit; missing: head",
        );
        switched(targets, json!({"exclude_modules": ["head"]})).unwrap();
        switched(targets, json!({"exclude_modules": "(?=h).*"})).unwrap();
    }
    switched("(?!head).*", json!({})).unwrap();
}

#[test]
fn s6_all_linear_means_the_layers_that_it_means_in_peft() {
    #[derive(Module, Debug)]
    struct Mixed<B: Backend> {
        a: LoraLinear<B>,
        lm_head: LoraLinear<B>,
        conv: LoraConv2d<B>,
        table: LoraEmbedding<B>,
    }
    let device = device::<Plain>();
    let base = Mixed {
        a: linear(2, 3),
        lm_head: linear(2, 2),
        conv: Conv2dConfig::new([2, 3], [1, 1]).init(&device).into(),
        table: EmbeddingConfig::new(5, 2).init(&device).into(),
    };
    let all = json!({"target_modules": "all-linear"});
    // The head, the convolution and the embedding need none.
    base.switch(&parse(all.clone(), &file(&[A, B])).unwrap()).unwrap();
    let conv: [(&str, &[usize]); 2] =
        [("conv.lora_A.weight", &[1, 2, 1, 1]), ("conv.lora_B.weight", &[3, 1, 1, 1])];
    let result = parse(all.clone(), &file(&[A, B, conv[0], conv[1]]));
    assert_error(result, "unexpected: base_model.model.conv (not a target)");
    let table: [(&str, &[usize]); 2] =
        [("table.lora_embedding_A", &[1, 5]), ("table.lora_embedding_B", &[2, 1])];
    let result = parse(all, &file(&[A, B, table[0], table[1]]));
    assert_error(result, "unexpected: base_model.model.table (not a target)");
}

/// In an overlay, any matrix can carry an adapter. That alone does not make a layer of it.
#[test]
fn s6_all_linear_does_not_mean_matrices_that_are_no_layers() {
    #[derive(Module, Debug)]
    struct Stock<B: Backend> {
        a: Linear<B>,
        matrix: Param<Tensor<B, 2>>,
    }
    let device = device::<Plain>();
    let a = LinearConfig::new(2, 3).init(&device);
    let overlay = || {
        let matrix = Param::from_tensor(Tensor::ones([4, 5], &device));
        Lora::overlay(Stock::<Plain> { a: a.clone(), matrix })
    };
    let set = |targets: Value| parse(json!({"target_modules": targets}), &file(&[A, B])).unwrap();
    overlay().switch(&set(json!("all-linear"))).unwrap();
    assert_error(overlay().switch(&set(json!("a|(?!x)matrix"))).map(drop), "missing: matrix");
}

#[test]
fn s7_a_set_made_by_hand_is_saved_as_what_it_is_for_or_not_at_all() {
    let adapter = |d_input: usize, d_output: usize| {
        let device = device::<Plain>();
        let a = Matrix::random(d_input, 2, 1).tensor::<Plain, 2>([d_input, 2], &device);
        let b = Matrix::random(2, d_output, 2).tensor([2, d_output], &device);
        LoraAdapter::new(a, b, 6.0, Scaling::AlphaOverRank)
    };
    let dir = TempDir::new("by-hand");
    let (unknown, known) = (dir.0.join("unknown"), dir.0.join("known"));
    let set = LoraAdapters::new([("conv", adapter(36, 3))]);
    assert_error(set.save(&unknown), "`conv` is not supported: it was put together by hand");
    assert!(!unknown.exists());

    #[derive(Module, Debug)]
    struct Layers<B: Backend> {
        conv: LoraConv2d<B>,
        table: LoraEmbedding<B>,
        fc: LoraLinear<B>,
    }
    let device = device::<Plain>();
    let base = Layers {
        conv: Conv2dConfig::new([4, 3], [3, 3]).init::<Plain>(&device).into(),
        table: EmbeddingConfig::new(7, 5).init(&device).into(),
        fc: linear(4, 6),
    };
    let bare = || [("conv", adapter(36, 3)), ("table", adapter(7, 5)), ("fc", adapter(4, 6))];
    let [(_, conv), (_, table), (_, fc)] = bare();
    let said = LoraAdapters::new([
        ("conv", conv.of_convolution([3, 3])),
        ("table", table.of_embedding()),
        ("fc", fc.of_linear()),
    ]);
    for set in [said, base.switch(&LoraAdapters::new(bare())).unwrap().adapters()] {
        set.save(&known).unwrap();
        let bytes = fs::read(known.join("adapter_model.safetensors")).unwrap();
        let found = SafeTensors::deserialize(&bytes).unwrap();
        let shapes: BTreeMap<_, _> = found
            .iter()
            .map(|(key, it)| {
                (key.trim_start_matches("base_model.model.").to_owned(), it.shape().to_vec())
            })
            .collect();
        let expected: [(&str, &[usize]); 6] = [
            ("conv.lora_A.weight", &[2, 4, 3, 3]),
            ("conv.lora_B.weight", &[3, 2, 1, 1]),
            ("fc.lora_A.weight", &[2, 4]),
            ("fc.lora_B.weight", &[6, 2]),
            ("table.lora_embedding_A", &[2, 7]),
            ("table.lora_embedding_B", &[5, 2]),
        ];
        let expected = expected.map(|(key, shape)| (key.to_owned(), shape.to_vec()));
        assert_eq!(shapes, BTreeMap::from(expected));
        let again = LoraAdapters::<Plain>::load(&known, &device).unwrap();
        for (path, adapter) in base.switch(&again).unwrap().adapters().iter() {
            let (_, expected) = bare().into_iter().find(|(name, _)| *name == path).unwrap();
            assert_identical(adapter.a.val(), expected.a.val());
            assert_identical(adapter.b.val(), expected.b.val());
        }
    }
}

#[test]
#[should_panic = "A must have as many rows for each input channel as a kernel of [3, 3] has elements, got 35 rows"]
fn s7_a_kernel_that_does_not_fit_is_refused() {
    let [a, b] = [[35, 2], [2, 3]].map(|shape| Tensor::<Plain, 2>::ones(shape, &device::<Plain>()));
    let _ = LoraAdapter::new(a, b, 1.0, Scaling::Alpha).of_convolution([3, 3]);
}

#[test]
fn s11_layers_may_have_the_names_of_parts_of_peft() {
    let dir = TempDir::new("names");
    for name in
        ["token_adapter", "lora_ga_", "base_layer.out_proj", "modules_to_save", "original_module"]
    {
        for path in [name.to_owned(), format!("x.{name}.y"), format!("x.{name}")] {
            let [a, b] = [(4, 2, 1), (2, 3, 2)].map(|(rows, cols, seed)| {
                Matrix::random(rows, cols, seed)
                    .tensor::<Plain, 2>([rows, cols], &device::<Plain>())
            });
            let adapter = LoraAdapter::new(a, b, 2.0, Scaling::AlphaOverRank).of_linear();
            let set = LoraAdapters::new([(path.clone(), adapter)]);
            set.save(dir.0.join("set")).unwrap();
            let again = LoraAdapters::<Plain>::load(dir.0.join("set"), &device::<Plain>()).unwrap();
            assert_eq!(again.fingerprint(), set.fingerprint(), "{path}");
        }
    }
    let tokens = ("x.token_adapter.trainable_tokens_delta", &[1, 2][..]);
    assert_error(parse(json!({}), &file(&[A, B, tokens])), "trainable tokens cannot be read");
}

#[test]
fn s11_names_in_files_do_not_control_the_terminal() {
    let name = "a\u{1b}[2J\r\n\u{202e}";
    let keys = ["A", "B"].map(|it| format!("{name}.lora_{it}.weight"));
    let weights = file(&[(&keys[0], &[1, 1]), (&keys[1], &[1, 1])]);
    let error = parse(json!({}), &weights).unwrap_err().to_string();
    assert!(error.contains(r"a\u{1b}[2J\r\n\u{202e} (not a target)"), "{error}");
    let long = format!("{}.lora_A.weight", "x".repeat(129_000));
    let error = parse(json!({}), &file(&[(&long, &[1, 1])])).unwrap_err().to_string();
    assert!(error.contains("is longer than any layer's") && error.len() < 600, "{error}");
    let set = parse(json!({"target_modules": [name]}), &weights).unwrap();
    assert!(set.to_string().contains(r"a\u{1b}[2J"), "{set}");
    let error = small().switch(&set).unwrap_err().to_string();
    assert!(error.contains(r"a\u{1b}[2J") && !error.contains('\u{1b}'), "{error}");
    for text in [
        format!(r#"{{"peft_type": "LORA", "r": "{}"}}"#, r"\u001b".repeat(9)),
        "{\"\\u0007\": 1, \"\\u0007\": 2}".to_owned(),
    ] {
        let error =
            LoraAdapters::<Plain>::from_bytes(text.as_bytes(), &weights, &device::<Plain>());
        let error = error.unwrap_err().to_string();
        assert!(!error.contains(|it: char| it.is_control()), "{error:?}");
    }
}

#[test]
fn s13_files_of_other_kinds_are_called_what_they_are() {
    let (config, _) = files("plain");
    for (start, kind) in [
        (&b""[..], "the file is empty"),
        (b"\x08\0\0", "the file has 3 bytes, and a safetensors file at least 8"),
        (b"\x80\x02}q\0(X\x05\0\0\0", "this is a pickle"),
        (b"PK\x03\x04\0\0\0\0\0\0", "this is a zip archive"),
        (b"<!DOCTYPE html><html>", "this is a page of the web"),
        (b"\n<html lang=\"en\">", "this is a page of the web"),
        (b"GGUF\x03\0\0\0\0\0\0\0", "this is a GGUF file"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "compressed by gzip"),
        (b"\x93NUMPY\x01\0v\0", "an array of numpy"),
        (b"\x89HDF\r\n\x1a\n\0", "an HDF5 file"),
        (b"Entry not found", "this is text, and not a safetensors file"),
        (b"{\"error\": \"Repository not found\"}", "this is text, and not a safetensors file"),
    ] {
        let result = LoraAdapters::<Plain>::from_bytes(&config, start, &device::<Plain>());
        assert_error(result, kind);
    }
    let (_, weights) = files("plain");
    for (start, kind) in [
        (&b""[..], "adapter_config.json: the file is empty"),
        (b"\x80\x04\x95", "adapter_config.json: this is a pickle"),
        (b"<html>", "adapter_config.json: this is a page of the web"),
        (b"GGUF\x03\0\0\0", "adapter_config.json: this is a GGUF file"),
    ] {
        let result = LoraAdapters::<Plain>::from_bytes(start, &weights, &device::<Plain>());
        assert_error(result, kind);
    }
}

/// The lengths of headers begin with any bytes, such as those of a pickle.
#[test]
fn s13_no_header_is_taken_for_another_kind_of_file() {
    let config = br#"{"peft_type": "LORA", "r": 1, "target_modules": ["a"]}"#;
    let plain = file(&[A, B]);
    let length = u64::from_le_bytes(plain[..8].try_into().unwrap());
    for bytes in [[0x80, 2], [0x80, 4], [0x1f, 0x8b], *b"PK", *b"GG", *b"<h", *b"  "] {
        let padded = u64::from(u16::from_le_bytes(bytes));
        let mut weights = padded.to_le_bytes().to_vec();
        weights.extend(&plain[8..8 + length as usize]);
        weights.resize(8 + padded as usize, b' ');
        weights.extend(&plain[8 + length as usize..]);
        LoraAdapters::<Plain>::from_bytes(config, &weights, &device::<Plain>()).unwrap();
    }
}

#[test]
fn s13_numbers_that_are_not_finite_are_named_by_their_field() {
    let (_, weights) = files("plain");
    for (text, expected) in [
        (
            r#"{"peft_type": "LORA", "lora_alpha": NaN}"#,
            "`lora_alpha` is NaN; a finite number is expected",
        ),
        (
            "{\"peft_type\": \"LORA\",\n \"r\": Infinity,\n \"x\": 1}",
            "`r` is Infinity; a finite number",
        ),
        (r#"{"lora_alpha": -Infinity, "r": 1}"#, "`lora_alpha` is -Infinity; a finite number"),
        (r#"{"r": 8, "lora_alpha": 1e999}"#, "`lora_alpha` is 1e999; a finite number"),
        (r#"{"alpha_pattern": {"q": 1, "k\"": NaN}}"#, "`alpha_pattern.k\\\"` is NaN"),
        (r#"{"eva_config": {"rho": [1.0, NaN]}}"#, "`eva_config.rho` is NaN"),
        (r#"{"r": 8, "lora_alpha": nope}"#, "`lora_alpha`: expected ident"),
        (r#"{"lora_parameters": {"scale": NaN}}"#, "`lora_parameters.scale` is NaN"),
    ] {
        let result =
            LoraAdapters::<Plain>::from_bytes(text.as_bytes(), &weights, &device::<Plain>());
        assert_error(result, expected);
    }
}

#[test]
fn s13_a_tensor_that_the_header_describes_wrongly_is_named() {
    let raw = |header: &str, data: usize| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    let first = r#""x.a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}"#;
    for (second, expected) in [
        (
            r#"{"dtype": "F32", "shape": [4, 1], "data_offsets": [8, 20]}"#,
            "`x.b` has 12 bytes by the header",
        ),
        (
            r#"{"dtype": "F32", "shape": [3, 1], "data_offsets": [12, 24]}"#,
            "`x.b` is at bytes 12 to 24",
        ),
        (r#"{"dtype": "F32", "shape": [3, 1], "data_offsets": [0, 12]}"#, "and should begin at"),
        (
            r#"{"dtype": "F32", "shape": [-3], "data_offsets": [8, 20]}"#,
            "`x.b` is described wrongly",
        ),
        (
            r#"{"dtype": "X32", "shape": [3], "data_offsets": [8, 20]}"#,
            "`x.b` is described wrongly",
        ),
        ("1", "`x.b` is described wrongly in the header"),
    ] {
        let weights = raw(&format!(r#"{{{first}, "x.b": {second}}}"#), 20);
        assert_error(parse(json!({}), &weights), expected);
    }
}

/// PEFT calls the magnitudes `lora_magnitude_vector.weight` in memory, and some programs write that.
#[test]
fn magnitudes_load_under_their_name_in_memory() {
    let (config, weights) = files("dora");
    let tensors = SafeTensors::deserialize(&weights).unwrap();
    let end = ".lora_magnitude_vector";
    let renamed = tensors.iter().map(|(key, view)| match key.ends_with(end) {
        true => (format!("{key}.weight"), view),
        false => (key.to_owned(), view),
    });
    let renamed = safetensors::serialize(renamed, None).unwrap();
    let set = LoraAdapters::<Plain>::from_bytes(&config, &renamed, &device::<Plain>()).unwrap();
    assert_eq!(set.fingerprint(), load("dora").fingerprint());
    let (_, adapter) = set.iter().next().unwrap();
    assert!(!bits(adapter.magnitude.as_ref().unwrap().val()).is_empty());
    let twice = tensors.iter().flat_map(|(key, view)| {
        let other = key.ends_with(end).then(|| (format!("{key}.weight"), view.clone()));
        [(key.to_owned(), view)].into_iter().chain(other)
    });
    let twice = safetensors::serialize(twice, None).unwrap();
    let result = LoraAdapters::<Plain>::from_bytes(&config, &twice, &device::<Plain>());
    assert_error(result, "unexpected: base_model.model.fc1.lora_magnitude_vector.weight");
}
