//! Adapters that do not fit are refused as a whole, and the error names the problem.

use std::fs;

use burn::{
    module::Module,
    nn::{LayerNorm, LayerNormConfig, LinearConfig},
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{
    LoraAdapter, LoraAdapters, LoraError, LoraLinear, LoraModule, Scaling, error::Mismatch,
    peft::Renaming,
};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

use super::{Model, TempDir, config, files, load, names};
use crate::{
    model::{Plain, device},
    oracle::bits,
};

fn parse(config: &[u8], weights: &[u8]) -> Result<LoraAdapters<Plain>, LoraError> {
    LoraAdapters::from_bytes(config, weights, &device::<Plain>())
}

#[track_caller]
fn assert_refused(config: &[u8], weights: &[u8], message: &str) {
    let error = parse(config, weights).unwrap_err().to_string();
    assert!(error.contains(message), "{error}");
}

/// A file with tensors of the given shapes, filled with zeros.
fn weights(tensors: &[(&str, Dtype, &[usize])]) -> Vec<u8> {
    let zeros = vec![0; 4096];
    let views = tensors.iter().map(|(key, dtype, shape)| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (*key, TensorView::new(*dtype, shape.to_vec(), &zeros[..bytes]).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

#[test]
fn all_that_does_not_fit_is_listed_in_one_error() {
    let config = br#"{"peft_type": "LORA", "r": 4, "target_modules": ["fc1", "fc2", "fc9"]}"#;
    let weights = weights(&[
        ("base_model.model.fc1.lora_A.weight", Dtype::F32, &[4, 6]),
        ("base_model.model.fc1.lora_B.bias", Dtype::F32, &[8]),
        ("base_model.model.fc2.lora_A.weight", Dtype::F32, &[3, 8]),
        ("base_model.model.fc2.lora_B.weight", Dtype::F32, &[8, 4, 1]),
        ("base_model.model.norm.weight", Dtype::F32, &[8]),
        ("base_model.model.other.lora_A.weight", Dtype::F32, &[4, 8]),
        ("base_model.model.other.lora_B.weight", Dtype::F32, &[8, 4]),
        ("fc2.lora_A.weight", Dtype::F32, &[4, 8]),
    ]);
    let LoraError::Mismatch { mismatch, .. } = parse(config, &weights).unwrap_err() else {
        panic!("another error is expected");
    };
    let Mismatch { missing, unexpected, misshapen, unmatched_targets, .. } = *mismatch;
    assert_eq!(missing, ["base_model.model.fc1.lora_B.weight"]);
    assert_eq!(
        unexpected,
        [
            "base_model.model.fc1.lora_B.bias",
            "base_model.model.norm.weight",
            "base_model.model.other (not a target)",
            "fc2.lora_A.weight"
        ]
    );
    assert_eq!(
        misshapen,
        [
            "base_model.model.fc2.lora_A.weight (expected [4, d_input], found [3, 8])",
            "base_model.model.fc2.lora_B.weight (expected [d_output, 4], found [8, 4, 1])"
        ]
    );
    assert_eq!(unmatched_targets, ["fc9"]);
}

#[test]
fn a_set_that_does_not_fit_a_model_leaves_it_untouched() {
    #[derive(Module, Debug)]
    struct Other<B: Backend> {
        fc1: LoraLinear<B>,
        fc2: LoraLinear<B>,
        fc3: LoraLinear<B>,
    }
    let linear = |d_output| LinearConfig::new(6, d_output).init::<Plain>(&device::<Plain>()).into();
    let model = Other { fc1: linear(7), fc2: linear(8), fc3: linear(9) };
    let model = model.attach(&config()).unwrap();
    let before = bits(model.fc1.adapter().unwrap().a.val());

    let LoraError::Mismatch { mismatch, .. } = model.switch(&load("modules_to_save")).unwrap_err()
    else {
        panic!("another error is expected");
    };
    assert_eq!(mismatch.misshapen, ["fc1 (expected [6, 7], found [6, 8])"]);
    assert_eq!(mismatch.unexpected, ["head.bias", "head.weight", "norm.bias", "norm.weight"]);
    // The configuration of `regex` means the layers fc1 and fc2. A set without one of them is an error.
    let mut parts = load("regex");
    let error = model.switch(&parts).unwrap_err().to_string();
    assert!(error.contains("fc2 (expected [6, 8], found [8, 8])"), "{error}");
    parts = load("exclude");
    let base = Model::<Plain>::base();
    assert!(base.switch(&parts).is_ok(), "what is excluded is not missing");
    let (text, _) = files("plain");
    let partial = weights(&[
        ("base_model.model.fc1.lora_A.weight", Dtype::F32, &[4, 6]),
        ("base_model.model.fc1.lora_B.weight", Dtype::F32, &[8, 4]),
    ]);
    let error = base.switch(&parse(&text, &partial).unwrap()).unwrap_err().to_string();
    assert_eq!(error, "the set of adapters does not fit; missing: fc2");

    assert_eq!(bits(model.fc1.adapter().unwrap().a.val()), before);
    assert!(model.fc3.adapter().is_some());
}

#[test]
fn a_saved_set_means_its_own_layers_alone() {
    #[derive(Module, Debug)]
    struct Outer<B: Backend> {
        fc: LoraLinear<B>,
        encoder: Inner<B>,
    }
    #[derive(Module, Debug)]
    struct Inner<B: Backend> {
        fc: LoraLinear<B>,
        norm: LayerNorm<B>,
    }
    let device = device::<Plain>();
    let fc = || LinearConfig::new(2, 3).init(&device).into();
    let encoder = Inner { fc: fc(), norm: LayerNormConfig::new(3).init(&device) };
    let base = Outer::<Plain> { fc: fc(), encoder };
    // `encoder.fc` ends with `fc`, and `gamma` has another name in the file.
    let config = config().with_excludes(["encoder.fc"]).with_modules_to_save(["gamma"]);
    let set = base.attach(&config).unwrap().adapters();
    let dir = TempDir::new("own-layers");
    set.save(&dir.0).unwrap();
    let again = LoraAdapters::<Plain>::load(&dir.0, &device).unwrap();
    assert_eq!((again.len(), again.num_params()), (1, 3 * (2 + 3) + 3));
    let restored = base.switch(&again).unwrap();
    assert!(restored.fc.adapter().is_some() && restored.encoder.fc.adapter().is_none());
}

#[test]
fn what_a_file_cannot_say_is_not_saved() {
    let dir = TempDir::new("not-said");
    let error = load("plain").scaled(f64::INFINITY).save(dir.0.join("set")).unwrap_err();
    assert!(error.to_string().contains("`lora_alpha` is not supported: that of `fc1`"), "{error}");
    assert_eq!(names(&dir.0), [""; 0]);
}

#[test]
fn layers_are_meant_by_their_indices() {
    #[derive(Module, Debug)]
    struct Stack<B: Backend> {
        layers: Vec<Block<B>>,
    }
    #[derive(Module, Debug)]
    struct Block<B: Backend> {
        fc: LoraLinear<B>,
    }
    let block = || Block { fc: LinearConfig::new(2, 3).init(&device::<Plain>()).into() };
    let inner = Model { stack: Stack { layers: vec![block(), block(), block()] } };
    #[derive(Module, Debug)]
    struct Model<B: Backend> {
        stack: Stack<B>,
    }
    let inner = inner.attach(&config().with_targets(["layers.1.fc"])).unwrap();
    let weights = weights(&[
        ("base_model.model.stack.layers.1.fc.lora_A.weight", Dtype::F32, &[4, 2]),
        ("base_model.model.stack.layers.1.fc.lora_B.weight", Dtype::F32, &[3, 4]),
    ]);
    let result = |fields: Value| {
        let mut text = json!({"peft_type": "LORA", "r": 4, "target_modules": ["fc"]});
        text.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let set = parse(&serde_json::to_vec(&text).unwrap(), &weights).unwrap();
        inner.switch(&set).map(drop).map_err(|error| error.to_string())
    };
    let missing = |layers: &str| {
        let layers: Vec<_> = layers.split(' ').map(|it| format!("stack.layers.{it}.fc")).collect();
        Err(format!("the set of adapters does not fit; missing: {}", layers.join(", ")))
    };
    assert_eq!(result(json!({})), missing("0 2"));
    assert_eq!(result(json!({"layers_to_transform": 1})), Ok(()));
    assert_eq!(result(json!({"layers_to_transform": [1, 2]})), missing("2"));
    let by_name = json!({"layers_to_transform": [1], "layers_pattern": "layers"});
    assert_eq!(result(by_name), Ok(()));
    let no_group = json!({"layers_to_transform": [1], "layers_pattern": ["(x)?layers"]});
    assert_eq!(result(no_group), Ok(()));
    assert_eq!(result(json!({"exclude_modules": ["0.fc", "2.fc"]})), Ok(()));
}

#[test]
fn fields_that_change_the_result_are_refused_by_name() {
    let (config, weights) = files("plain");
    let with = |field: &str, value: Value| {
        let mut config: Value = serde_json::from_slice(&config).unwrap();
        config[field] = value;
        serde_json::to_vec(&config).unwrap()
    };
    for field in [
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "layer_replication",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_qalora",
        "velora_config",
        "monteclora_config",
    ] {
        let config = with(field, json!([[0, 1]]));
        assert_refused(&config, &weights, &format!("`{field}` is not supported"));
        for off in [json!(null), json!(false), json!([]), json!({})] {
            parse(&with(field, off), &weights).unwrap();
        }
    }
    for init in ["OLoRA", "pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"] {
        assert_refused(&with("init_lora_weights", json!(init)), &weights, "init_lora_weights");
    }
    parse(&with("init_lora_weights", json!("gaussian")), &weights).unwrap();
    assert_refused(&with("peft_type", json!("LOHA")), &weights, "it is LOHA, not LORA");
    assert_refused(&with("r", json!(0)), &weights, "a rank is 0");
    assert_refused(&with("lora_dropout", json!(1.5)), &weights, "`lora_dropout` is 1.5");
    assert_refused(&with("rank_pattern", json!({"(": 2})), &weights, "`(` is not a valid pattern");
    // Found by fuzzing: an expression that takes seconds to compile.
    let endless = with("rank_pattern", json!({".".repeat(100_000): 2}));
    assert_refused(&endless, &weights, "exceeds size limit");
    // Each takes an instant, and all together minutes.
    let some: serde_json::Map<_, _> =
        (0..200).map(|it| (format!("(.|.?){{9}}(.?|{it})+x"), json!(2))).collect();
    assert_refused(&with("rank_pattern", json!(some)), &weights, "takes too long");
    let some: Vec<_> = some.keys().collect();
    let mut both: Value = serde_json::from_slice(&with("layers_pattern", json!(some))).unwrap();
    both["layers_to_transform"] = json!([0]);
    let both = serde_json::to_vec(&both).unwrap();
    assert_refused(&both, &weights, "`layers_pattern`: to match its patterns takes too long");
    assert_refused(&with("bias", json!("some")), &weights, "some");
}

#[test]
fn magnitudes_are_there_if_the_configuration_says_so() {
    let (text, dora) = files("dora");
    let (_, plain) = files("plain");
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    config["use_dora"] = json!(false);
    let off = serde_json::to_vec(&config).unwrap();
    assert_refused(&off, &dora, "unexpected: base_model.model.fc1.lora_magnitude_vector");
    // The name is that of the file, here one that PEFT has in memory.
    let key = "base_model.model.fc1.lora_magnitude_vector.weight";
    let in_memory = |magnitude: &[usize]| {
        weights(&[
            ("base_model.model.fc1.lora_A.weight", Dtype::F32, &[4, 6]),
            ("base_model.model.fc1.lora_B.weight", Dtype::F32, &[8, 4]),
            (key, Dtype::F32, magnitude),
        ])
    };
    let off = br#"{"peft_type": "LORA", "r": 4, "target_modules": ["fc1"]}"#;
    let error = parse(off, &in_memory(&[8])).unwrap_err().to_string();
    assert!(error.ends_with(&format!("unexpected: {key}")), "{error}");
    let on = br#"{"peft_type": "LORA", "r": 4, "target_modules": ["fc1"], "use_dora": true}"#;
    parse(on, &in_memory(&[8])).unwrap();
    assert_refused(on, &in_memory(&[7]), &format!("{key} (expected [d_output]"));
    config["use_dora"] = json!(true);
    for field in ["lora_bias", "ensure_weight_tying"] {
        let mut both = config.clone();
        both[field] = json!(true);
        let message = format!("`use_dora` is not supported: it is set together with `{field}`");
        assert_refused(&serde_json::to_vec(&both).unwrap(), &dora, &message);
    }
    config["target_modules"] = json!(["fc1", "fc2"]);
    let on = serde_json::to_vec(&config).unwrap();
    assert_refused(&on, &plain, "missing: base_model.model.fc1.lora_magnitude_vector");
    let config = br#"{"peft_type": "LORA", "r": 4, "target_modules": ["fc"], "use_dora": true}"#;
    let of = |a: &[usize], b: &[usize], m: &[usize]| {
        weights(&[
            ("base_model.model.fc.lora_A.weight", Dtype::F32, a),
            ("base_model.model.fc.lora_B.weight", Dtype::F32, b),
            ("base_model.model.fc.lora_magnitude_vector", Dtype::F32, m),
        ])
    };
    parse(config, &of(&[4, 6], &[8, 4], &[8])).unwrap();
    for shape in [&[7][..], &[1, 8], &[]] {
        assert_refused(config, &of(&[4, 6], &[8, 4], shape), "expected [d_output], found");
    }
    let (a, b) = (&[4, 6, 3, 3], &[8, 4, 1, 1]);
    parse(config, &of(a, b, &[1, 8, 1, 1])).unwrap();
    for shape in [&[8][..], &[8, 1, 1, 1], &[1, 7, 1, 1]] {
        assert_refused(config, &of(a, b, shape), "expected [1, d_output, 1, ..], found");
    }
}

#[test]
fn fields_without_a_value_are_not_set() {
    let (text, weights) = files("plain");
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    let expected = parse(&text, &weights).unwrap();
    for field in [
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "lora_bias",
        "lora_dropout",
        "use_rslora",
        "fan_in_fan_out",
        "ensure_weight_tying",
    ] {
        config[field] = json!(null);
    }
    config["r"] = json!(4.0);
    let text = serde_json::to_vec(&config).unwrap();
    let set = parse(&[b"\xef\xbb\xbf", &*text].concat(), &weights).unwrap();
    for (path, adapter) in set.iter() {
        assert_eq!(adapter.scale(), expected.get(path).unwrap().scale());
    }
}

#[test]
fn doubles_are_converted() {
    let config = br#"{"peft_type": "LORA", "r": 1, "target_modules": ["fc"]}"#;
    let file = |value: f64| {
        let bytes: Vec<_> = [value, -0.25].iter().flat_map(|it| it.to_le_bytes()).collect();
        let view = |shape: Vec<usize>| TensorView::new(Dtype::F64, shape, &bytes).unwrap();
        let (a, b) = (view(vec![1, 2]), view(vec![2, 1]));
        let tensors =
            [("base_model.model.fc.lora_A.weight", a), ("base_model.model.fc.lora_B.weight", b)];
        safetensors::serialize(tensors, None).unwrap()
    };
    let set = parse(config, &file(1.0 / 3.0)).unwrap();
    let adapter = set.get("fc").unwrap();
    let expected = [1.0f32 / 3.0, -0.25].map(f32::to_bits);
    assert_eq!((bits(adapter.a.val()), bits(adapter.b.val())), (expected.into(), expected.into()));
    assert_refused(config, &file(1e300), "holds NaN or infinite values");
}

#[test]
fn malformed_configurations_are_refused() {
    let (_, weights) = files("plain");
    for (text, message) in [
        ("", "the file is empty"),
        ("[]", "expected an object"),
        ("null", "expected an object"),
        ("{", "EOF"),
        ("{}", "`peft_type` is missing"),
        (r#"{"peft_type": "LORA", "r": 4, "r": 4}"#, "the key `r` occurs twice"),
        (r#"{"peft_type": "LORA", "rank_pattern": {"a": 1, "a": 2}}"#, "the key `a` occurs twice"),
        (r#"{"peft_type": "LORA", "r": -1}"#, "`r` is -1; a whole number"),
        (r#"{"peft_type": "LORA", "r": 2.5}"#, "`r` is 2.5; a whole number"),
        (r#"{"peft_type": "LORA", "r": "4"}"#, "`r` is \"4\"; a whole number"),
        (r#"{"peft_type": "LORA", "lora_alpha": "16"}"#, "`lora_alpha` is \"16\"; a number"),
        (r#"{"peft_type": "LORA", "rank_pattern": [1]}"#, "`rank_pattern` is [1]; an object"),
        (r#"{"peft_type": "LORA", "rank_pattern": {"a": "b"}}"#, "`rank_pattern.a` is \"b\""),
        (r#"{"peft_type": "LORA", "use_rslora": 1}"#, "`use_rslora` is 1; true or false"),
        (r#"{"peft_type": "LORA", "modules_to_save": "a"}"#, "`modules_to_save` is \"a\"; a list"),
        (r#"{"peft_type": "LORA", "bias": "some"}"#, "`bias` is \"some\"; \"none\""),
        (r#"{"peft_type": "LORA", "lora_alpha": 1e999}"#, "`lora_alpha` is 1e999; a finite"),
        ("{\"peft_type\": \"LORA\"} x", "trailing characters"),
        ("\u{feff}{}", "`peft_type` is missing"),
    ] {
        assert_refused(text.as_bytes(), &weights, message);
    }
    assert_refused(&[0xff, 0xfe], &weights, "expected value");
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert_refused(format!(r#"{{"x": {deep}}}"#).as_bytes(), &weights, "recursion limit");
}

/// A file with the given header, and `data` zero bytes.
fn raw(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn malformed_weights_are_refused() {
    let config = br#"{"peft_type": "LORA", "r": 1, "target_modules": ["fc"]}"#;
    let (a, b) = ("base_model.model.fc.lora_A.weight", "base_model.model.fc.lora_B.weight");
    let entry = |key: &str, dtype: &str, shape: &str, offsets: &str| {
        format!(r#""{key}": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}"#)
    };
    let good_a = entry(a, "F32", "[1, 2]", "[0, 8]");
    let good_b = entry(b, "F32", "[3, 1]", "[8, 20]");
    let good = raw(&format!("{{{good_a}, {good_b}}}"), 20);
    parse(config, &good).unwrap();

    for length in [0, 1, 7, 8, 9, good.len() - 1] {
        assert!(parse(config, &good[..length]).is_err(), "truncated to {length} bytes");
    }
    assert!(parse(config, &[good.clone(), vec![0]].concat()).is_err(), "a byte too many");
    for length in [u64::MAX, 1 << 40, good.len() as u64] {
        let mut bytes = good.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        assert!(parse(config, &bytes).is_err(), "a header of {length} bytes");
    }
    let second = |text: &str| raw(&format!("{{{good_a}, {text}}}"), 20);
    for (text, why) in [
        (entry(b, "F32", "[3, 1]", "[-8, 20]"), "negative offset"),
        (entry(b, "F32", "[3, 1]", "[20, 8]"), "offsets in reverse"),
        (entry(b, "F32", "[3, 1]", "[0, 12]"), "overlapping tensors"),
        (entry(b, "F32", "[3, 1]", "[8, 18446744073709551615]"), "overflowing offset"),
        (entry(b, "F32", "[4611686018427387904, 4]", "[8, 20]"), "overflowing shape"),
        (entry(b, "F32", "[4, 1]", "[8, 20]"), "shape and size that disagree"),
        (entry(b, "F32", "[3, -1]", "[8, 20]"), "negative size"),
        (entry(b, "X32", "[3, 1]", "[8, 20]"), "unknown type"),
        (format!(r#""{b}": 1"#), "not an object"),
    ] {
        assert!(parse(config, &second(&text)).is_err(), "{why}");
    }
    let whole = entry(b, "I32", "[3, 1]", "[8, 20]");
    assert_refused(config, &second(&whole), "`base_model.model.fc.lora_B.weight` is of type I32");
    let twice = format!("{{{good_a}, {good_b}, {good_b}}}");
    assert_refused(config, &raw(&twice, 20), "lora_B.weight` occurs twice");
    assert_refused(config, &raw("{}", 0), "there is no adapter in it");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut bytes = good.clone();
        let at = bytes.len() - 4;
        bytes[at..].copy_from_slice(&bad.to_le_bytes());
        assert_refused(config, &bytes, "lora_B.weight` holds NaN or infinite values");
    }
}

#[test]
fn files_that_are_not_there_or_no_files_are_named() {
    let dir = TempDir::new("not-there");
    let load = || LoraAdapters::<Plain>::load(&dir.0, &device::<Plain>()).unwrap_err().to_string();
    assert!(load().contains("adapter_config.json: No such file"), "{}", load());
    let (config, _) = files("plain");
    fs::write(dir.0.join("adapter_config.json"), config).unwrap();
    assert!(load().contains("adapter_model.safetensors: No such file"), "{}", load());
    fs::create_dir(dir.0.join("adapter_model.safetensors")).unwrap();
    assert!(load().contains("adapter_model.safetensors: not a file"), "{}", load());
}

#[test]
fn what_is_there_instead_is_named() {
    let dir = TempDir::new("instead");
    let load = || LoraAdapters::<Plain>::load(&dir.0, &device::<Plain>()).unwrap_err().to_string();
    let (config, weights) = files("plain");
    for name in ["two", "one"] {
        fs::create_dir(dir.0.join(name)).unwrap();
        fs::write(dir.0.join(name).join("adapter_config.json"), &config).unwrap();
    }
    assert!(
        load().contains("holds several adapters by name; load one of `one`, `two`"),
        "{}",
        load()
    );
    fs::write(dir.0.join("adapter_config.json"), &config).unwrap();
    fs::write(dir.0.join("adapter_model.bin"), "").unwrap();
    assert!(load().contains("only adapter_model.bin is there, which is not read"), "{}", load());

    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n";
    fs::write(dir.0.join("adapter_model.safetensors"), pointer).unwrap();
    let expected = "adapter_model.safetensors: this is a git-lfs pointer; fetch the file";
    assert!(load().contains(expected), "{}", load());
    assert_refused(pointer.as_bytes(), &weights, "adapter_config.json: this is a git-lfs pointer");
}

#[test]
fn a_file_in_the_place_of_a_directory_is_told_where_to_go() {
    let dir = TempDir::new("a-file");
    for (name, expected) in [
        (
            "style.safetensors",
            "style.safetensors: not a directory; if it is a file of adapters of an image model, read it by \
             `LoraAdapters::load_image`",
        ),
        (
            "adapter_model.safetensors",
            "adapter_model.safetensors: this is a file of a directory of adapters; give the directory",
        ),
    ] {
        let path = dir.0.join(name);
        fs::write(&path, "").unwrap();
        let error = LoraAdapters::<Plain>::load(&path, &device::<Plain>()).unwrap_err().to_string();
        assert!(error.ends_with(expected), "{error}");
    }
}

#[test]
fn other_formats_are_named() {
    let config = br#"{"peft_type": "LORA", "r": 4}"#;
    for (key, message) in [
        (
            "lora_unet_mid_attn.lora_down.weight",
            "looks like kohya's format: read the file by `LoraAdapters::load_image`",
        ),
        ("unet.mid.attn.to_q_lora.down.weight", "looks like an old format of diffusers: read the"),
        ("fc.processor.to_q.lora.up.weight", "looks like an old format of diffusers: read the"),
        ("fc.lora_A", "looks like loralib's format"),
        ("fc.lora_a", "looks like mlx-lm's format"),
        ("fc.lora_A.weight", "its keys lack the prefix `base_model.model.`"),
        (
            "_orig_mod.base_model.model.fc.lora_A.weight",
            "looks like a wrapped model's (`_orig_mod.`)",
        ),
        ("module.base_model.model.fc.lora_A.weight", "looks like a wrapped model's (`module.`)"),
        ("base_model.model.fc.lora_A.default.weight", "with the adapter's name"),
    ] {
        assert_refused(config, &weights(&[(key, Dtype::F32, &[4, 2, 1])]), message);
    }
}

#[test]
fn other_beginnings_of_names_are_named_with_the_remedy() {
    let base = Model::<Plain>::base();
    let renamed = |from: &str, to: &str| {
        let set = load("plain").renamed(&Renaming::new([(from, to)])).unwrap();
        base.switch(&set).unwrap_err().to_string()
    };
    for prefix in ["_orig_mod", "module", "language_model.model", "base_model.model"] {
        let error = renamed("", prefix);
        let expected = format!(
            "begin with `{prefix}.`, and the others do not: rename the set by \
                                `Renaming::new([(\"{prefix}\", \"\")])`"
        );
        assert!(error.contains(&expected), "{error}");
        // What the message says helps.
        let set = load("plain").renamed(&Renaming::new([("", prefix)])).unwrap();
        base.switch(&set.renamed(&Renaming::new([(prefix, "")])).unwrap()).unwrap();
    }
    assert!(!renamed("fc1", "fc9").contains("rename the set"));
}

#[test]
fn s9_a_template_that_matches_nothing_is_an_error() {
    let set = load("plain");
    let error = |names: Renaming| set.renamed(&names).unwrap_err();
    let unused = Renaming::new([("fc1", "layers.0"), ("layers.*", "fc.*")]);
    let text = error(unused.clone()).to_string();
    assert!(matches!(error(unused.clone()), LoraError::InvalidArgument { argument: "names", .. }));
    let expected = "`names` has templates that match nothing: `layers.*`; the set has `fc1`, `fc2`";
    assert!(text.contains(expected), "{text}");
    // A table of more names than the set has is one that says so.
    let renamed = set.renamed(&unused.partial()).unwrap();
    assert!(renamed.get("layers.0").is_some() && renamed.get("fc2").is_some());
    // The wrong way round.
    let inverse = error(Renaming::new([("layers.0", "fc1"), ("layers.1", "fc2")]).partial());
    assert!(inverse.to_string().ends_with("the other templates do: use its `inverse()`"));
    set.renamed(&Renaming::default()).unwrap();
}

#[test]
fn s9_a_misfit_of_renamed_layers_names_renaming() {
    let base = Model::<Plain>::base();
    let names = Renaming::new([("fc1", "net.0.dense"), ("fc2", "net.1.dense")]);
    let set = load("plain").renamed(&names).unwrap();
    let error = base.switch(&set).unwrap_err();
    let expected = "they have the shapes of layers of the model with other names: see `peft::Renaming`, \
                    such as `Renaming::new([(\"net.0.dense\", \"fc1\")])`";
    assert!(error.to_string().contains(expected), "{error}");
    base.switch(&set.renamed(&names.inverse()).unwrap()).unwrap();

    // Adapters of other shapes are those of another model.
    let adapter = set.get("net.0.dense").unwrap();
    let [d_input, d_output] = adapter.shape();
    let other = LoraAdapter::new(
        Tensor::ones([d_input + 1, 2], &device::<Plain>()),
        Tensor::ones([2, d_output], &device::<Plain>()),
        1.0,
        Scaling::Alpha,
    );
    let error = base.switch(&LoraAdapters::new([("net.0.dense", other)])).unwrap_err();
    assert!(!error.to_string().contains("Renaming"), "{error}");
}

#[test]
fn a_layer_without_a_name_is_called_so() {
    let linear = || LoraLinear::from(LinearConfig::new(6, 7).init::<Plain>(&device::<Plain>()));
    let adapter = load("plain").get("fc1").unwrap().clone();
    let error = linear().switch(&LoraAdapters::new([("", adapter)])).unwrap_err().to_string();
    assert!(error.contains("the layer itself (expected [6, 7], found [6, 8])"), "{error}");
    let mut adapter = linear().attach(&config()).unwrap().adapters().get("").unwrap().clone();
    adapter.b = adapter.b.map(|b| b * f32::NAN);
    let adapted = linear().switch(&LoraAdapters::new([("", adapter)])).unwrap();
    let error = adapted.merge().unwrap_err().to_string();
    assert!(error.starts_with("merging the layer itself would produce NaN"), "{error}");
}

#[cfg(unix)]
#[test]
fn links_in_a_circle_and_devices_are_refused() {
    use std::os::unix::fs::symlink;

    let dir = TempDir::new("links");
    let load = || LoraAdapters::<Plain>::load(&dir.0, &device::<Plain>()).unwrap_err().to_string();
    let config = dir.0.join("adapter_config.json");
    symlink(&config, dir.0.join("other")).unwrap();
    symlink(dir.0.join("other"), &config).unwrap();
    assert!(load().contains("adapter_config.json: "), "{}", load());
    fs::remove_file(&config).unwrap();
    symlink("/dev/zero", &config).unwrap();
    assert!(load().contains("adapter_config.json: not a file"), "{}", load());
}
