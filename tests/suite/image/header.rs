//! The configuration that diffusers writes into the header.

use std::collections::HashMap;

use burn_lora::{Scaling, peft::Renaming};
use safetensors::{Dtype, tensor::TensorView};

use super::{
    refused::error,
    toys::{Toy, read},
};
use crate::model::Plain;

const F32: Dtype = Dtype::F32;

/// The set of a file of diffusers with this text in its header.
fn configured(text: &str, more: &[(&'static str, Dtype, &[usize])]) -> Vec<u8> {
    let zeros = vec![0; 256];
    let tensors =
        [("unet.fc.lora_A.weight", F32, &[2, 3][..]), ("unet.fc.lora_B.weight", F32, &[5, 2])];
    let views = tensors.iter().chain(more).map(|(key, dtype, shape)| {
        let bytes = 4 * shape.iter().product::<usize>();
        (*key, TensorView::new(*dtype, shape.to_vec(), &zeros[..bytes]).unwrap())
    });
    let header = HashMap::from([("lora_adapter_metadata".to_owned(), text.to_owned())]);
    safetensors::serialize(views, Some(header)).unwrap()
}

#[test]
fn the_configuration_in_the_header_is_kept_to() {
    let toy = Toy::<Plain>::new();
    let names = Renaming::default();
    // The tensors tell the layers, whatever the targets are.
    let text = r#"{"unet.r": 2, "unet.lora_alpha": 7, "unet.use_rslora": true, "unet.lora_dropout": 0.1,
        "unet.target_modules": "(?L:other)", "unet.exclude_modules": ["fc"]}"#;
    let set = read(&configured(text, &[]), &toy, &names).unwrap();
    let adapter = set.get("fc").unwrap();
    assert_eq!((adapter.alpha, adapter.scaling), (7.0, Scaling::AlphaOverSqrtRank));
    assert_eq!(adapter.dropout.prob, 0.1);
    for (text, more, message) in [
        (
            r#"{"unet.r": 3}"#,
            &[][..],
            " does not fit; of the wrong shape: unet.fc.lora_A.weight (expected [3, 3], the first being the rank, \
             found [2, 3]), unet.fc.lora_B.weight (expected [5, 3], the second being the rank, found [5, 2])",
        ),
        (
            r#"{"unet.r": 2, "unet.use_dora": true}"#,
            &[],
            " does not fit; missing: the magnitudes of unet.fc (lora_magnitude_vector)",
        ),
        (
            r#"{"unet.r": 2}"#,
            &[("unet.fc.lora_magnitude_vector", F32, &[5][..])],
            " does not fit; unexpected: unet.fc.lora_magnitude_vector (`use_dora` is not set)",
        ),
        (
            r#"{"unet.r": 2}"#,
            &[("unet.fc.alpha", F32, &[][..])],
            ": `unet.fc.alpha` is not supported: the header says the alphas, too, in `lora_adapter_metadata`; take \
             one of them out",
        ),
        (
            r#"{"text_encoder.r": 2}"#,
            &[],
            ": `lora_adapter_metadata` in its header says nothing of `unet.`, of which there are adapters; take it \
             out of the header, and alpha is the rank where no tensor says otherwise",
        ),
        (
            r#"{"r": 2}"#,
            &[],
            ": `lora_adapter_metadata` in its header says nothing of `unet.`, of which there are adapters; take it \
             out of the header, and alpha is the rank where no tensor says otherwise",
        ),
        (
            r#"{"unet.peft_type": "LOKR"}"#,
            &[],
            ": `lora_adapter_metadata`: `peft_type` is not supported: it is LOKR, not LORA; only LoRA's adapters are \
             read",
        ),
        (
            r#"{"unet.r": 2, "unet.r": 3}"#,
            &[],
            ": `lora_adapter_metadata`: the key `unet.r` occurs twice at line 1 column 26",
        ),
        (
            "[]",
            &[],
            ": `lora_adapter_metadata`: invalid type: sequence, expected an object at line 1 column 0",
        ),
    ] {
        assert_eq!(error(&configured(text, more), &toy), message);
    }
}
