//! Products in bf16: when the program chooses them, and what stays as it is with them.

use burn_lora::nn::Precision;
use half::bf16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::*;

/// Whether the backend of the program has products in bf16.
const HAS_BF16: bool = !cfg!(any(feature = "wgpu", feature = "cuda", feature = "rocm"));

impl Place {
    /// A copy of the model `model` in bf16.
    fn in_bf16(&self, name: &str) {
        self.model(name, "llama3");
        let bytes = fs::read(self.path("model/model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
        let rounded = tensors.iter().map(|(name, tensor)| {
            let numbers = tensor.data().as_chunks().0.iter().map(|&it| f32::from_le_bytes(it));
            let halves = numbers.flat_map(|it| bf16::from_f32(it).to_le_bytes());
            (name, tensor.shape().to_vec(), halves.collect::<Vec<_>>())
        });
        let rounded: Vec<_> = rounded.collect();
        let views = rounded.iter().map(|(name, shape, bytes)| {
            (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap())
        });
        self.write(
            &format!("{name}/model.safetensors"),
            safetensors::serialize(views, None).unwrap(),
        );
    }

    /// The bytes of adapters, which are in f32.
    fn weights(&self, run: &str) -> Vec<u8> {
        let bytes =
            fs::read(self.path(format!("{run}/adapter/adapter_model.safetensors"))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        assert!(tensors.tensors().iter().all(|(_, it)| it.dtype() == Dtype::F32));
        bytes
    }

    fn losses(&self, run: &str) -> Vec<f64> {
        let losses = self.json(&format!("{run}/summary.json"))["history"]["losses"].clone();
        serde_json::from_value(losses).unwrap()
    }

    /// In which type the run multiplied, as it remembers.
    fn dtype(&self, run: &str) -> String {
        let (summary, arguments) = (
            self.json(&format!("{run}/summary.json")),
            self.json(&format!("{run}/arguments.json")),
        );
        assert_eq!(summary["dtype"], arguments["dtype"]);
        arguments["dtype"].as_str().unwrap().to_owned()
    }
}

/// The loss in the line of this name.
fn loss_of(out: &str, name: &str) -> f64 {
    let line = out.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().skip_while(|it| *it != "loss").nth(1).unwrap().parse().unwrap()
}

fn assert_near(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found / expected - 1.0).abs() < 0.01, "{found}, not {expected}");
    }
}

#[test]
fn training_multiplies_in_the_type_that_is_asked_for() {
    let place = Place::new();
    place.in_bf16("half");
    let run = |model: &str, out: &str, more: &str| {
        place.done(&train(&format!("--model {model} --learning-rate 0.01 --out {out} {more}"))).0
    };
    let told = "Products are in ";
    let out = run("half", "f32", "--dtype f32");
    assert!(!out.contains(told), "{out}");
    assert!(out.contains("The weights are BF16 in the file, and F32 here."), "{out}");
    assert_eq!(place.dtype("f32"), "f32");
    // A model in f32 stays so.
    let out = run("model", "usual", "");
    assert!(!out.contains(told) && !out.contains("The weights are"), "{out}");
    assert_eq!(place.dtype("usual"), "f32");
    let out = run("half", "auto", "");
    assert!(out.contains(told), "{out}");
    if !HAS_BF16 {
        assert_eq!(
            (place.dtype("auto"), place.weights("auto")),
            ("f32".into(), place.weights("f32"))
        );
        let error = place.refused(&train("--dtype bf16 --out refused"));
        assert!(error.contains("`--dtype bf16` cannot be used: the backend"), "{error}");
        assert!(!place.path("refused").exists());
        return;
    }
    let out = run("half", "bf16", "--dtype bf16");
    assert!(out.contains("Products are in bf16 (") && out.contains("sums in f32"), "{out}");
    assert!(
        out.contains("The weights are BF16 in the file; 0.0 MB are held in 16 bits here."),
        "{out}"
    );
    assert_eq!(place.dtype("bf16"), "bf16");
    assert_near(&place.losses("bf16"), &place.losses("f32"));
    assert_ne!(place.weights("bf16"), place.weights("f32"));
    let as_auto = if Precision::bf16_is_fast() { "bf16" } else { "f32" };
    assert_eq!(place.dtype("auto"), as_auto);
    assert_eq!(place.weights("auto"), place.weights(as_auto));
    // Whatever the model is in, and whatever trains.
    for (out, model, more) in [
        ("of_f32", "model", ""),
        ("full", "half", "--full"),
        ("int8", "half", "--quantize int8"),
        ("held", "model", "--quantize bf16"),
        ("segments", "half", "--segments"),
        ("dora", "half", "--relative dora"),
        ("pissa", "half", "--relative pissa"),
        ("eva", "half", "--relative eva"),
    ] {
        let printed = run(model, out, &format!("--dtype bf16 {more}"));
        assert!(printed.contains("Products are in bf16"), "{out}: {printed}");
        assert!(place.losses(out).iter().all(|loss| loss.is_finite()), "{out}");
        if out == "int8" {
            let held = "0.0 MB are held in 2 to 8 bits here, and 0.0 MB in 16.";
            assert!(printed.contains(held), "{printed}");
        }
    }
    assert_near(&place.losses("of_f32"), &place.losses("usual"));
    // Weights that train are in f32, and no other numbers are multiplied than those of the adapters' base.
    assert_near(&place.losses("full")[..1], &place.losses("f32")[..1]);
}

#[test]
fn a_run_goes_on_in_its_type() {
    let place = Place::new();
    place.in_bf16("half");
    let run = |more: &str| train(&format!("--model half --iters 4 --eval-every 2 {more}"));
    let forget_the_end = || {
        fs::remove_dir_all(place.path("out/checkpoints/4")).unwrap();
        fs::remove_dir_all(place.path("out/adapter")).unwrap();
    };
    let types: &[&str] = if HAS_BF16 { &["f32", "bf16"] } else { &["f32"] };
    for dtype in types {
        place.done(&run(&format!("--force --dtype {dtype}")));
        let (weights, losses) = (place.weights("out"), place.losses("out"));
        let other = if *dtype == "f32" { "bf16" } else { "f32" };
        let error = place.refused(&run(&format!("--resume --dtype {other}")));
        assert!(
            error.contains(&format!("out: `dtype` was {dtype}, and is {other} now")),
            "{error}"
        );
        assert!(error.contains(&format!("--dtype {dtype}")), "{error}");
        for given in ["", "--dtype auto", &format!("--dtype {dtype}")] {
            forget_the_end();
            let (out, _) = place.done(&run(&format!("--resume {given}")));
            assert!(out.contains("goes on after step 2/4"), "{out}");
            assert_eq!(
                (place.weights("out"), place.losses("out")),
                (weights.clone(), losses.clone())
            );
        }
        // What is usual elsewhere is not asked about.
        let done = place.run_with(&run("--resume"), &[("BURN_LORA_KERNELS", "portable")]);
        assert!(done.status.success(), "{}", text(&done.stderr));
        assert_eq!(place.dtype("out"), *dtype);
    }

    // Runs of the first version did not write it down, and multiplied in f32.
    place.done(&run("--force --dtype f32"));
    let weights = place.weights("out");
    let mut arguments = place.json("out/arguments.json");
    arguments.as_object_mut().unwrap().remove("dtype").unwrap();
    place.write("out/arguments.json", arguments.to_string());
    forget_the_end();
    place.done(&run("--resume"));
    assert_eq!((place.dtype("out"), place.weights("out")), ("f32".to_owned(), weights));
}

#[test]
fn adapters_do_not_depend_on_the_type() {
    if !HAS_BF16 {
        return;
    }
    let place = Place::new();
    place.in_bf16("half");
    place.done(&train("--model half --dtype bf16 --learning-rate 0.05"));
    let evaluate = |more: &str| {
        let command = "evaluate --model half --data data/valid.jsonl --adapter out/adapter";
        let (out, err) = place.done(&format!("{command} {more}"));
        assert!(err.is_empty(), "{err}");
        (loss_of(&out, "base"), loss_of(&out, "out/adapter"), out.contains("Products are in bf16"))
    };
    let (usual, f32, bf16) = (evaluate(""), evaluate("--dtype f32"), evaluate("--dtype bf16"));
    assert_eq!(usual, f32);
    assert!(!f32.2 && bf16.2);
    assert_near(&[bf16.0, bf16.1], &[f32.0, f32.1]);
    let valid = place.json("out/summary.json")["history"]["valid"].clone();
    let valid: Vec<(usize, f64)> = serde_json::from_value(valid).unwrap();
    assert_near(&[valid[0].1, valid[1].1], &[bf16.0, bf16.1]);
    for more in ["", "--dtype bf16", "--quantize nf4 --dtype bf16"] {
        place.done(&format!(
            "generate --model half --adapter out/adapter --prompt a --max-tokens 3 {more}"
        ));
    }
    place.done("merge --model half --adapter out/adapter --out merged");
}

#[test]
fn other_instructions_compute_nearly_the_same() {
    let place = Place::new();
    if !HAS_BF16 {
        return;
    }
    let run = |out: &str, instructions: Option<&str>| {
        let command = train(&format!("--dtype bf16 --learning-rate 0.01 --out {out}"));
        let variables = instructions.map(|it| ("BURN_LORA_KERNELS", it));
        let done = place.run_with(&command, variables.as_slice());
        assert!(done.status.success(), "{}", text(&done.stderr));
        text(&done.stdout)
    };
    run("usual", None);
    let out = run("portable", Some("portable"));
    assert!(out.contains("Products are in bf16 (portable), sums in f32; "), "{out}");
    assert_near(&place.losses("portable"), &place.losses("usual"));
}

#[test]
fn instructions_that_are_not_there_are_one_line() {
    let place = Place::new();
    for (command, names) in
        [("--version -v", ["fast", "none"]), (&train("--dtype bf16"), ["amx,avx2", ""])]
    {
        for name in names {
            let done = place.run_with(command, &[("BURN_LORA_KERNELS", name)]);
            let error = text(&done.stderr);
            assert_eq!((done.status.code(), error.lines().count()), (Some(1), 1), "{error}");
            assert!(error.contains(&format!("BURN_LORA_KERNELS: `{name}` are no")), "{error}");
            assert!(error.contains("there are portable"), "{error}");
        }
    }
    // No processor has both.
    let of_others = if cfg!(target_arch = "aarch64") { "avx2" } else { "neon" };
    let done = place.run_with("--version -v", &[("BURN_LORA_KERNELS", of_others)]);
    let error = text(&done.stderr);
    assert!(
        error.contains(&format!("this processor has no {of_others}; it has portable")),
        "{error}"
    );
}

#[test]
fn a_merge_tells_what_rounding_changed() {
    let place = Place::new();
    place.in_bf16("half");
    place.done(&train("--model half --dtype f32 --learning-rate 0.001"));
    let merge = |model: &str, more: &str| {
        let out = format!("merge --model {model} --adapter out/adapter --out merged");
        place.done(&format!("{out} {more}")).0
    };
    // After two small steps little is left of them in bf16, and most in f16.
    let share = |out: &str| {
        let line = out.lines().find(|line| line.starts_with("Rounding changed the weights by "));
        let line = line.unwrap_or_else(|| panic!("{out}"));
        assert_eq!(line.matches("(at most ").count(), 2, "{line}");
        let (weights, updates) =
            line.split_once(". In those that the adapters changed it is ").unwrap();
        let percent = |text: &str| text.split_once(" %").unwrap().0.parse::<f64>().unwrap();
        let weights = percent(weights.strip_prefix("Rounding changed the weights by ").unwrap());
        assert!(weights < 0.4, "{line}");
        (percent(updates), line.ends_with("`--dtype f32` keeps it."))
    };
    let (bf16, f16) = (share(&merge("half", "")), share(&merge("half", "--dtype f16")));
    assert!(bf16.0 > 4.0 * f16.0 && bf16.1, "{bf16:?} {f16:?}");
    assert!(!merge("half", "--dtype f32").contains("Rounding changed"));
    assert!(!merge("model", "").contains("Rounding changed"));
}
