//! The encoder computes the same as Hugging Face's `transformers`,
//! and exchanges adapters with PEFT under Hugging Face's names. `tests/bert/make_fixtures.py` wrote the
//! reference outputs.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::{Tensor, TensorData, backend::Backend};
use burn_lora::{
    Init, LoraAdapters, LoraConfig, LoraError, LoraModule,
    peft::Renaming,
    quantize::{Quantization, QuantizeConfig},
    train::{Backward, Blocks, segments},
};
use safetensors::{SafeTensors, tensor::TensorView};
use serde::Deserialize;

use burn_lora_llm::bert::{
    self, Bert, Tokens,
    classifier::{self as model, ALL_LINEAR, HEAD, QUERY_VALUE, Text, TextClassifier},
    pretrained,
};
use tempfile::TempDir;

use crate::{
    backend::{Plain, Train},
    oracle::{Matrix, assert_close, assert_identical, assert_same, device},
};

/// Texts, and their vectors from Python.
#[derive(Deserialize)]
struct Expected {
    ids: Vec<Vec<i32>>,
    mask: Vec<Vec<u8>>,
    vectors: Vec<Vec<f64>>,
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bert/fixtures").join(name)
}

fn tiny() -> Bert<Plain> {
    pretrained::load(&fixture("tiny"), &device::<Plain>()).unwrap().0
}

fn tokens<B: Backend>(ids: &[Vec<i32>], mask: &[Vec<u8>]) -> Tokens<B> {
    let shape = [ids.len(), ids[0].len()];
    let int =
        |values: Vec<i32>| Tensor::from_data(TensorData::new(values, shape), &Default::default());
    let padding = int(mask.iter().flatten().map(|&kept| 1 - i32::from(kept)).collect());
    Tokens { ids: int(ids.concat()), padding: padding.bool() }
}

#[track_caller]
fn assert_embeds(bert: &Bert<Plain>, expected: &Path, tolerance: f64) {
    let expected: Expected = serde_json::from_slice(&fs::read(expected).unwrap()).unwrap();
    let vectors = bert.embed(&tokens(&expected.ids, &expected.mask));
    let [rows, cols] = vectors.dims();
    assert_eq!(rows, expected.vectors.len());
    let expected = Matrix { rows, cols, data: expected.vectors.concat() };
    assert_close(vectors, &expected, tolerance);
}

/// Adapters with Hugging Face's names, renamed for the encoder.
fn of_python(path: &Path) -> LoraAdapters<Plain> {
    let adapters = LoraAdapters::load(path, &device::<Plain>()).unwrap();
    adapters.renamed(&bert::names("")).unwrap()
}

#[test]
fn vectors_are_those_of_transformers() {
    assert_embeds(&tiny(), &fixture("tiny/expected.json"), 1e-5);
}

/// Needs the model: the environment variable `MINILM` is a directory with all-MiniLM-L6-v2.
#[test]
#[ignore = "needs the weights of all-MiniLM-L6-v2"]
fn vectors_of_minilm_are_those_of_transformers() {
    let dir = std::env::var("MINILM").expect("MINILM says where all-MiniLM-L6-v2 is");
    let (bert, _) = pretrained::load(Path::new(&dir), &device::<Plain>()).unwrap();
    assert_embeds(&bert, &fixture("minilm/expected.json"), 1e-4);

    // With an adapter that PEFT trained.
    let path = fixture("minilm/adapter");
    let adapters = of_python(&path);
    assert_embeds(&bert.switch(&adapters).unwrap(), &path.join("expected.json"), 1e-4);

    // Rounding changes the matrices as much as it is known to: all 36 by 0.64 and 9.39 %. Two blocks are enough.
    for (to, expected) in [(Quantization::Int8, 0.0064), (Quantization::Nf4, 0.094)] {
        let config = QuantizeConfig::from(to).with_targets([r"blocks\.[05]\..*"]);
        let (_, report) = bert.quantize(config).unwrap();
        assert_eq!(report.layers.len(), 12);
        let error = report.layers.iter().map(|it| it.error).sum::<f64>() / 12.0;
        assert!((error / expected - 1.0).abs() < 0.02, "{to:?}: {error}");
        let most = if to == Quantization::Nf4 { 0.145 } else { 0.27 };
        assert!((report.bytes() as f64) < most * report.bytes_before() as f64);
    }
}

#[test]
fn what_fills_up_a_text_does_not_count() {
    let bert = tiny();
    let short = bert.embed(&tokens(&[vec![5, 2, 7]], &[vec![1, 1, 1]]));
    let filled = bert.embed(&tokens(&[vec![5, 2, 7, 3, 1]], &[vec![1, 1, 1, 0, 0]]));
    let expected: Vec<f64> = short.into_data().iter::<f64>().collect();
    let expected = Matrix { rows: 1, cols: expected.len(), data: expected };
    assert_close(filled, &expected, 1e-6);
}

#[test]
fn an_adapter_that_peft_made_computes_the_same_here() {
    let path = fixture("tiny/adapter");
    let adapters = of_python(&path);
    let adapted = tiny().switch(&adapters).unwrap();
    assert_embeds(&adapted, &path.join("expected.json"), 1e-5);
    assert_embeds(&adapted.merge().unwrap(), &path.join("expected.json"), 1e-5);
    assert_embeds(&adapted.detach(), &fixture("tiny/expected.json"), 1e-5);

    // Saved from the model, the file is the same as PEFT's.
    let dir = TempDir::new().unwrap();
    adapted
        .adapters()
        .renamed(&bert::names("").inverse())
        .unwrap()
        .save(dir.path().join("saved"))
        .unwrap();
    let read = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert_eq!(read(&dir.path().join("saved")), read(&path));
}

fn classifier() -> TextClassifier<Plain> {
    let (bert, config) = pretrained::load(&fixture("tiny"), &device::<Plain>()).unwrap();
    TextClassifier::new(bert, &config, 2, &device::<Plain>())
}

#[test]
fn adapters_of_the_classifier_go_by_the_names_of_hugging_face() {
    let config = LoraConfig::new(2, 3.0)
        .with_init(Init::RandomBoth)
        .with_targets(QUERY_VALUE)
        .with_modules_to_save([HEAD]);
    let model = classifier().attach(&config).unwrap();
    let set = model.adapters().renamed(&model::names().inverse()).unwrap();
    let dir = TempDir::new().unwrap();
    set.save(dir.path().join("saved")).unwrap();
    let bytes = fs::read(dir.path().join("saved/adapter_model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = tensors.names();
    names.sort();
    let mut expected = vec!["classifier.bias".to_owned(), "classifier.weight".to_owned()];
    for layer in 0..2 {
        for (projection, factor) in [("query", "A"), ("query", "B"), ("value", "A"), ("value", "B")]
        {
            let name = format!("encoder.layer.{layer}.attention.self.{projection}.lora_{factor}");
            expected.push(format!("{name}.weight"));
        }
    }
    assert_eq!(
        names,
        expected.iter().map(|it| format!("base_model.model.{it}")).collect::<Vec<_>>()
    );

    // The set holds the head, too.
    let again = LoraAdapters::load(dir.path().join("saved"), &device::<Plain>()).unwrap();
    let again = again.renamed(&model::names()).unwrap();
    let texts = tokens(&[vec![5, 2, 7], vec![1, 9, 9]], &[vec![1, 1, 1], vec![1, 1, 0]]);
    let expected: Vec<f64> = model.forward(&texts).into_data().iter::<f64>().collect();
    let expected = Matrix { rows: 2, cols: 2, data: expected };
    assert_close(classifier().switch(&again).unwrap().forward(&texts), &expected, 1e-5);
}

#[test]
fn norms_that_train_in_full_go_by_the_names_of_hugging_face() {
    let config = LoraConfig::new(2, 3.0)
        .with_targets(ALL_LINEAR)
        .with_modules_to_save(["attention_norm", "embeddings.norm.gamma"]);
    let set = tiny().attach(&config).unwrap().adapters();
    let text = set.renamed(&bert::names("").inverse()).unwrap().to_string();
    for name in [
        "encoder.layer.1.attention.output.LayerNorm.weight",
        "encoder.layer.0.attention.output.LayerNorm.bias",
        "embeddings.LayerNorm.weight",
        "encoder.layer.0.attention.output.dense",
        "encoder.layer.0.output.dense",
        "encoder.layer.1.intermediate.dense",
    ] {
        assert!(text.contains(&format!("{name} ")), "{name} is not in\n{text}");
    }
    assert!(!text.contains("embeddings.LayerNorm.bias"));
    assert_identical(
        tiny().switch(&set).unwrap().embed(&tokens(&[vec![5, 2]], &[vec![1, 1]])),
        tiny().attach(&config).unwrap().embed(&tokens(&[vec![5, 2]], &[vec![1, 1]])),
    );
}

#[test]
fn names_that_fall_together_are_refused() {
    let config = LoraConfig::new(2, 3.0).with_modules_to_save(["attention_norm", "output_norm"]);
    let set = tiny().attach(&config).unwrap().adapters();
    let refused = |from: &str, to: &str| {
        let error = set.renamed(&Renaming::new([(from, to)])).unwrap_err();
        assert!(matches!(error, LoraError::Incompatible { .. }), "{error}");
        error.to_string()
    };
    let error = refused("blocks.0.expand", "blocks.1.expand");
    assert!(error.contains("`blocks.1.expand`: the renaming gives this name to"), "{error}");
    let error = refused("blocks.0.output_norm.weight", "norm.weight");
    assert!(error.contains("rename the module as a whole, too"), "{error}");
    let error = refused("blocks.1.output_norm", "blocks.1.attention_norm");
    assert!(error.contains("`blocks.1.attention_norm.bias`: the renaming"), "{error}");
}

#[test]
fn adapters_of_another_depth_are_refused_by_name() {
    let set = of_python(&fixture("tiny/adapter"));
    let adapters = set.iter();
    let adapters = adapters
        .map(|(path, it)| (path.replace("blocks.1.contract", "blocks.7.contract"), it.clone()));
    let error = tiny().switch(&LoraAdapters::new(adapters)).unwrap_err().to_string();
    assert!(error.contains("unexpected: blocks.7.contract"), "{error}");
}

/// The error of loading the tiny model after `change` has edited its files.
fn refused(change: impl FnOnce(&Path)) -> String {
    let dir = TempDir::new().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture("tiny").join(file), dir.path().join(file)).unwrap();
    }
    change(dir.path());
    pretrained::load::<Plain>(dir.path(), &device::<Plain>()).unwrap_err()
}

/// Replaces the tensors of the file by the result of `change`.
fn rewrite<'a>(
    dir: &Path,
    bytes: &'a [u8],
    change: impl FnOnce(&mut Vec<(String, TensorView<'a>)>),
) {
    let mut tensors = SafeTensors::deserialize(bytes).unwrap().tensors();
    change(&mut tensors);
    fs::write(dir.join("model.safetensors"), safetensors::serialize(tensors, None).unwrap())
        .unwrap();
}

#[test]
fn files_that_are_not_this_model_are_refused_by_name() {
    let bytes = fs::read(fixture("tiny/model.safetensors")).unwrap();
    let error = refused(|dir| {
        rewrite(dir, &bytes, |tensors| {
            for (name, _) in tensors.iter_mut() {
                match name.as_str() {
                    "encoder.layer.0.attention.self.query.weight" => name.push_str("_orig"),
                    // The same number of elements, in another shape.
                    "encoder.layer.1.output.dense.weight" => {
                        *name = "encoder.layer.1.intermediate.dense.weight".to_owned();
                    }
                    "encoder.layer.1.intermediate.dense.weight" => {
                        *name = "encoder.layer.1.output.dense.weight".to_owned();
                    }
                    _ => {}
                }
            }
        });
    });
    for part in [
        "model.safetensors: ",
        "`encoder.layer.0.attention.self.query.weight` is missing",
        "`encoder.layer.0.attention.self.query.weight_orig` belongs to nothing",
        "`encoder.layer.1.output.dense.weight` must be of shape [12, 20], and is [20, 12]",
    ] {
        assert!(error.contains(part), "{part} is not in {error}");
    }

    let config = |from: &'static str, to: &'static str| {
        move |dir: &Path| {
            let path = dir.join("config.json");
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(from));
            fs::write(path, text.replace(from, to)).unwrap();
        }
    };
    let error = refused(config("\"model_type\": \"bert\"", "\"model_type\": \"gpt2\""));
    assert!(
        error.contains("config.json: `model_type` must be \"bert\", and is \"gpt2\""),
        "{error}"
    );
    let error = refused(config("\"gelu\"", "\"relu\""));
    assert!(error.contains("`hidden_act` must be \"gelu\", and is \"relu\""), "{error}");
    let error = refused(config("\"is_decoder\": false", "\"is_decoder\": true"));
    assert!(error.contains("`is_decoder` must be false"), "{error}");
    // Sizes that would need more memory than there is.
    let error = refused(config("\"vocab_size\": 23", "\"vocab_size\": 230000000000"));
    let expected = "by config.json `embeddings.word_embeddings.weight` is [230000000000, 12], and it is [23, 12]";
    assert!(error.contains(expected), "{error}");
    let error = refused(config("_layers\": 2", "_layers\": 3000000000"));
    assert!(error.contains("by config.json it has 3000000000 layers, and it has 2"), "{error}");
    let error = refused(config("\"intermediate_size\": 20", "\"intermediate_size\": 0"));
    assert!(error.contains("a size is 0"), "{error}");
    let error = refused(config("_heads\": 3", "_heads\": 5"));
    assert!(error.contains("`hidden_size` 12 cannot be split"), "{error}");
    let error = refused(config("\"vocab_size\"", "\"vocab\""));
    assert!(error.contains("missing field `vocab_size`"), "{error}");
    let error = refused(|dir| {
        fs::write(dir.join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    });
    assert!(error.contains("model.safetensors: "), "{error}");
    let error = refused(|dir| fs::remove_file(dir.join("model.safetensors")).unwrap());
    assert!(error.contains("model.safetensors: "), "{error}");
}

#[test]
fn segments_give_the_gradients_of_a_plain_pass() {
    let (bert, config) = pretrained::load(&fixture("tiny"), &device::<Train>()).unwrap();
    let base = TextClassifier::new(bert, &config, 3, &device::<Train>());
    let adapters = LoraConfig::new(2, 1.5).with_targets(ALL_LINEAR).with_init(Init::RandomBoth);
    let model = base.attach(&adapters.with_modules_to_save([HEAD])).unwrap();
    // Texts of several lengths, so that there is padding.
    let text = |ids: &[u32], label| Text { ids: ids.to_vec(), label };
    let texts = [text(&[1, 2, 3, 4, 5], 2), text(&[6, 7], 0), text(&[8, 9, 10], 1)];

    let context = Blocks::context(&*model, &texts[..], &device::<Train>());
    let logits = model.forward(&context.0);
    let log = burn::tensor::activation::log_softmax(logits, 1);
    let chosen = log.gather(1, context.1.unsqueeze_dim(1));
    let plain = Backward::new(&model, chosen.mean().neg());
    assert_same(&model, &segments(&model, &texts[..]), &plain);
}
