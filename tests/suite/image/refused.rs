//! What cannot be read is refused as a whole, and the error names the key, and what to do.

use std::fs;

use burn::module::Module;
use burn_lora::{LoraAdapters, LoraError, peft::Renaming};
use safetensors::{Dtype, tensor::TensorView};

use super::{
    fixture,
    toys::{Toy, read, twins},
    zeros,
};
use crate::model::{Plain, device};

const F32: Dtype = Dtype::F32;
const DOWN: (&str, Dtype, &[usize]) = ("lora_unet_fc.lora_down.weight", F32, &[2, 3]);
const UP: (&str, Dtype, &[usize]) = ("lora_unet_fc.lora_up.weight", F32, &[5, 2]);

/// The error of this file, without the file's name.
#[track_caller]
pub fn error<M: Module<Plain>>(file: &[u8], model: &M) -> String {
    let error = read(file, model, &Renaming::default()).unwrap_err().to_string();
    let (_, error) = error.split_once("set.safetensors").expect("the error names the file");
    error.to_owned()
}

#[track_caller]
fn assert_refused(tensors: &[(&str, Dtype, &[usize])], message: &str) {
    assert_eq!(error(&zeros(tensors), &Toy::new()), message);
}

#[test]
fn other_methods_are_named() {
    for (end, method) in [
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("lokr_w2_b", "LoKr"),
        ("oft_blocks", "OFT or BOFT"),
        ("oft_R.weight", "OFT or BOFT"),
        ("boft_R", "OFT or BOFT"),
        ("on_input", "IA3"),
        ("a1.weight", "GLoRA"),
        ("b2.weight", "GLoRA"),
        ("diff", "the difference of a weight that was trained in full"),
        ("diff_b", "the difference of a bias that was trained in full"),
        ("w_norm", "the difference of a norm that was trained in full"),
        ("b_norm", "the difference of a norm that was trained in full"),
        ("set_weight", "a weight that was trained in full"),
        ("bias_values", "a sparse difference of a bias"),
    ] {
        for name in ["lora_unet_fc", "diffusion_model.fc"] {
            let key = format!("{name}.{end}");
            let message = format!(
                ": `{key}` is not supported: it is {method}, and sets hold LoRA alone; merge the file into a copy of \
                 the base by the program that wrote it, and take what changed by `LoraModule::extract`"
            );
            assert_refused(&[DOWN, UP, (&key, F32, &[2, 2])], &message);
        }
    }
}

#[test]
fn biases_and_added_channels_are_refused() {
    assert_refused(
        &[DOWN, UP, ("unet.fc.lora_B.bias", F32, &[5])],
        ": `unet.fc.lora_B.bias` is not supported: it is the bias of an adapter, which is read from directories of \
         PEFT alone: save the adapter by `save_pretrained` of its `PeftModel`, and read it by `LoraAdapters::load`",
    );
    assert_refused(
        &[DOWN, UP, ("lora_unet_fc.reshape_weight", F32, &[2])],
        ": `lora_unet_fc.reshape_weight` is not supported: the layer has more channels with the adapter than in the \
         base; add them to the base, with weights of zero, and remove this tensor",
    );
}

/// As LyCORIS writes them without `wd_on_output`.
#[test]
fn magnitudes_of_inputs_are_refused() {
    let reason = "that of magnitudes of the layer's inputs, and adapters here have those of DoRA's paper, one for \
                  each output; train with `wd_on_output` in LyCORIS, or merge the file into a copy of the base \
                  there, and take what changed by `LoraModule::extract`";
    assert_refused(
        &[DOWN, UP, ("lora_unet_fc.dora_scale", F32, &[1, 3])],
        &format!(": `lora_unet_fc.dora_scale` is not supported: its shape [1, 3] is {reason}"),
    );
    assert_refused(
        &[
            ("lora_unet_conv.lora_down.weight", F32, &[2, 2, 3, 3]),
            ("lora_unet_conv.lora_up.weight", F32, &[4, 2, 1, 1]),
            ("lora_unet_conv.dora_scale", F32, &[1, 2, 1, 1]),
        ],
        &format!(
            ": `lora_unet_conv.dora_scale` is not supported: its shape [1, 2, 1, 1] is {reason}"
        ),
    );
}

#[test]
fn layers_without_such_adapters_are_refused() {
    for (name, what) in [
        (
            "table",
            "an embedding, and files of image models have adapters of linear layers and convolutions",
        ),
        (
            "up",
            "a transposed convolution, and files of image models have adapters of linear layers and convolutions",
        ),
        (
            "grouped",
            "a convolution with groups, for which programs for image models compute a different update",
        ),
    ] {
        let key = format!("lora_unet_{name}.lora_down.weight");
        let message = format!(": `{key}` is not supported: its layer `{name}` is {what}");
        assert_refused(&[(&key, F32, &[2, 3])], &message);
    }
}

#[test]
fn a_name_of_two_layers_is_refused() {
    let tensors = [
        ("lora_unet_a_b.lora_down.weight", F32, &[2, 3][..]),
        ("lora_unet_a_b.lora_up.weight", F32, &[5, 2]),
    ];
    let expected = ": `lora_unet_a_b.lora_down.weight` is not supported: it may mean each of the layers `a.b`, `a_b`, \
                    which have the same name in such files; give them different names by `names`, or write the file \
                    in the format of diffusers, which keeps the dots";
    assert_eq!(error(&zeros(&tensors), &twins()), expected);
}

#[test]
fn names_of_no_layer_are_listed_with_the_closest() {
    assert_refused(
        &[
            DOWN,
            UP,
            ("lora_unet_conf.lora_down.weight", F32, &[2, 3]),
            ("lora_unet_conf.lora_up.weight", F32, &[5, 2]),
            ("unet.fcc.alpha", F32, &[]),
            ("lora_unet_fc.other", F32, &[2]),
        ],
        " does not fit; unexpected: lora_unet_conf.lora_down.weight (no layer has this name; the closest is \
         lora_unet_conv), lora_unet_fc.other (no part of an adapter), unet.fcc.alpha (no layer has this name; the \
         closest is unet.fc); the names in the file are those of the model in Python; have `names` say which layers \
         they mean (see `peft::Renaming`)",
    );
}

#[test]
fn a_file_for_other_parts_alone_says_so() {
    assert_refused(
        &[
            ("lora_te_fc.lora_down.weight", F32, &[2, 3]),
            ("lora_te_fc.lora_up.weight", F32, &[5, 2]),
        ],
        ": there is no adapter in it for a part that the model has, but for others, such as \
         `lora_te_fc.lora_down.weight`; if the model is one of these, have `names` begin the names of its layers by \
         it, such as `Renaming::new([(\"text_encoder\", \"\")])`",
    );
    assert_refused(&[], ": there is no adapter in it");
}

#[test]
fn what_is_missing_or_misshapen_is_listed() {
    assert_refused(
        &[DOWN, ("lora_unet_point.lora_up.weight", F32, &[5, 2]), ("unet.conv.alpha", F32, &[])],
        " does not fit; missing: A (lora_down) of lora_unet_point, A (lora_down) of unet.conv, B (lora_up) of \
         lora_unet_fc, B (lora_up) of unet.conv",
    );
    assert_refused(
        &[
            ("lora_unet_fc.alpha", F32, &[2]),
            ("lora_unet_fc.dora_scale", F32, &[4, 1]),
            ("lora_unet_fc.lora_down.weight", F32, &[2, 4]),
            ("lora_unet_fc.lora_up.weight", F32, &[5, 3]),
            ("lora_unet_conv.lora_down.weight", F32, &[2, 2, 1, 1]),
            ("lora_unet_conv.lora_up.weight", F32, &[4, 2]),
        ],
        " does not fit; of the wrong shape: lora_unet_conv.lora_down.weight (expected [2, 2, 3, 3], the first being \
         the rank, found [2, 2, 1, 1]), lora_unet_fc.alpha (expected one number, found [2]), lora_unet_fc.dora_scale \
         (expected [5, 1, ..], found [4, 1]), lora_unet_fc.lora_down.weight (expected [2, 3], the first being the \
         rank, found [2, 4]), lora_unet_fc.lora_up.weight (expected [5, 2], the second being the rank, found [5, 3])",
    );
    assert_refused(
        &[
            ("lora_unet_conv.lora_down.weight", F32, &[2, 2, 3, 3]),
            ("lora_unet_conv.lora_mid.weight", F32, &[2, 3, 3, 3]),
            ("lora_unet_conv.lora_up.weight", F32, &[4, 2, 1, 1]),
        ],
        " does not fit; of the wrong shape: lora_unet_conv.lora_down.weight (expected [2, 2], the first being the \
         rank, found [2, 2, 3, 3]), lora_unet_conv.lora_mid.weight (expected [2, 2, 3, 3], the first being the rank, \
         found [2, 3, 3, 3])",
    );
    // No shape may lead to a panic.
    for shape in [&[][..], &[0], &[2], &[0, 3], &[0, 0, 0, 0], &[2, 3, 1, 1, 1]] {
        for (key, ..) in [DOWN, UP] {
            let mut tensors = [DOWN, UP];
            tensors.iter_mut().filter(|it| it.0 == key).for_each(|it| it.2 = shape);
            let fits = shape == [2, 3, 1, 1, 1] && key == DOWN.0;
            assert_eq!(read(&zeros(&tensors), &Toy::new(), &Renaming::default()).is_ok(), fits);
        }
    }
}

#[test]
fn the_same_tensor_twice_is_refused() {
    assert_refused(
        &[DOWN, UP, ("unet.fc.lora_A.weight", F32, &[2, 3])],
        ": `lora_unet_fc.lora_down.weight` and `unet.fc.lora_A.weight` are the same part of one adapter; take one of \
         them out",
    );
}

/// A file of a linear layer, with values in A and an alpha.
fn with_values(a: f32, alpha: f32) -> Vec<u8> {
    let bytes = |count: usize, value: f32| value.to_le_bytes().repeat(count);
    let (down, up, alpha) = (bytes(6, a), bytes(10, 1.0), bytes(1, alpha));
    let views = [
        (DOWN.0, TensorView::new(F32, vec![2, 3], &down).unwrap()),
        (UP.0, TensorView::new(F32, vec![5, 2], &up).unwrap()),
        ("lora_unet_fc.alpha", TensorView::new(F32, vec![], &alpha).unwrap()),
    ];
    safetensors::serialize(views, None).unwrap()
}

#[test]
fn values_that_are_not_finite_are_refused() {
    for (a, alpha, message) in [
        (f32::NAN, 1.0, ": `lora_unet_fc.lora_down.weight` holds NaN or infinite values"),
        (f32::INFINITY, 1.0, ": `lora_unet_fc.lora_down.weight` holds NaN or infinite values"),
        (1.0, f32::NEG_INFINITY, ": `lora_unet_fc.alpha` is not a finite number"),
    ] {
        assert_eq!(error(&with_values(a, alpha), &Toy::new()), message);
    }
    assert_refused(
        &[DOWN, UP, ("lora_unet_fc.alpha", Dtype::U8, &[])],
        ": `lora_unet_fc.alpha` is of type U8; F64, F32, F16, BF16, I64 or I32 is expected",
    );
    assert_refused(
        &[DOWN, ("lora_unet_fc.lora_up.weight", Dtype::I32, &[5, 2])],
        ": `lora_unet_fc.lora_up.weight` is of type I32; F64, F32, F16 or BF16 is expected",
    );
}

#[test]
fn files_of_other_kinds_are_named() {
    let toy = Toy::<Plain>::new();
    let pickle = b"PK\x03\x04 and the rest of an archive";
    assert_eq!(
        error(pickle, &toy),
        ": this is a zip archive, as `torch.save` and numpy write; it must be saved as safetensors"
    );
    let whole = fs::read(fixture("kohya.safetensors")).unwrap();
    let cut = error(&whole[..whole.len() - 10], &toy);
    assert!(cut.starts_with(": the tensors should have "), "{cut}");
    let device = device::<Plain>();
    let load = |path| LoraAdapters::<Plain>::load_image(path, &toy, &Renaming::default(), &device);
    assert!(matches!(load(fixture("none")), Err(LoraError::Io { .. })));
    let directory = load(fixture("")).unwrap_err().to_string();
    assert!(directory.ends_with(": not a file"), "{directory}");
}

#[test]
fn a_renaming_that_matches_nothing_is_refused() {
    let toy = Toy::<Plain>::new();
    let file = zeros(&[DOWN, UP]);
    let error = |names| read(&file, &toy, &names).unwrap_err().to_string();
    let expected = "invalid argument: `names` has templates that match nothing: `middle`; the model has `fc`, `conv`, \
                    `point`, `grouped`, `up`, `table`";
    assert_eq!(error(Renaming::new([("mid_block", "middle")])), expected);
    let expected = "invalid argument: `names` has templates that match nothing: `other`; the other templates do: use \
                    its `inverse()`";
    assert_eq!(error(Renaming::new([("fc", "other")])), expected);
}

/// Whatever a file holds, reading it does not panic.
#[test]
fn damaged_files_are_errors_or_other_files() {
    let (whole, toy, names) = (with_values(1.0, 3.0), Toy::new(), Renaming::default());
    let header = whole.len() - 4 * (6 + 10 + 1);
    for place in 0..header {
        for byte in [b'0', b'9', b'"', b',', b'.', 0xff] {
            let mut damaged = whole.clone();
            damaged[place] = byte;
            drop(read(&damaged, &toy, &names));
        }
    }
    for length in 0..whole.len() {
        read(&whole[..length], &toy, &names).unwrap_err();
    }
}
