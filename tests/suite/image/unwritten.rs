//! Sets that the files cannot hold are refused before anything is written, and the error names the layer.

use std::fs;

use burn::tensor::Tensor;
use burn_lora::{
    Init, LoraAdapter, LoraAdapters, LoraConfig, LoraModule, Scaling, image::ImageFormat,
    peft::Renaming,
};

use super::{
    load,
    toys::{Toy, read, twins},
    unet::{self, UNet},
};
use crate::model::{Plain, device};

/// The error of writing this set, without the file's name. Nothing is written.
#[track_caller]
fn not_written(set: &LoraAdapters<Plain>, format: ImageFormat, names: &Renaming) -> String {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("set.safetensors");
    let error = set.save_image(&file, format, names).unwrap_err().to_string();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    match error.split_once("set.safetensors: ") {
        Some((_, error)) => error.to_owned(),
        None => error,
    }
}

#[track_caller]
fn assert_not_written(set: &LoraAdapters<Plain>, message: &str) {
    for format in [ImageFormat::Kohya, ImageFormat::Diffusers] {
        assert_eq!(not_written(set, format, &Renaming::default()), message);
    }
}

fn attached(config: &LoraConfig, target: &str) -> LoraAdapters<Plain> {
    let config = config.clone().with_init(Init::RandomBoth).with_targets([target]);
    Toy::<Plain>::new().attach(&config).unwrap().adapters()
}

#[test]
fn what_no_file_holds_is_not_written() {
    let config = LoraConfig::peft(2, 3.0);
    assert_not_written(
        &attached(&config.clone().with_modules_to_save(["conv"]), "fc"),
        "`conv.bias` is not supported: it was trained in full, and files of image models hold adapters alone; leave \
         it out by `without_modules_to_save`, or write PEFT's directory by `save`",
    );
    assert_not_written(
        &attached(&config.clone().with_bias(true), "fc"),
        "`fc` is not supported: its adapter has a bias, and those of image models have none; train without `bias`, or \
         write PEFT's directory by `save`",
    );
    for (layer, what) in [
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
        let message =
            format!("`{layer}` is not supported: it is {what}; leave the layer out by `excludes`");
        assert_not_written(&attached(&config, layer), &message);
    }
    let device = device::<Plain>();
    let adapter = || {
        let (a, b) = (Tensor::<Plain, 2>::ones([3, 2], &device), Tensor::ones([2, 5], &device));
        LoraAdapter::new(a, b, 3.0, Scaling::AlphaOverRank)
    };
    assert_not_written(
        &LoraAdapters::new([("fc", adapter())]),
        "`fc` is not supported: it was put together by hand, and files hold adapters of linear layers and of \
         convolutions in different ways; put the set on its model and save `model.switch(&set)?.adapters()`, or say \
         what it is for by `of_linear` or `of_convolution`",
    );
    assert_not_written(
        &LoraAdapters::new([("", adapter().of_linear())]),
        "`the layer itself` is not supported: its name is empty; make it the field of a model, or give it one by \
         `names`",
    );
    assert_not_written(
        &LoraAdapters::new(Vec::<(String, _)>::new()),
        "`an empty set` is not supported: there is no adapter to save",
    );
    // A name that begins with a part is that of another layer without it.
    let same =
        LoraAdapters::new([("unet.fc", adapter().of_linear()), ("fc", adapter().of_linear())]);
    for (format, name) in
        [(ImageFormat::Kohya, "lora_unet_fc"), (ImageFormat::Diffusers, "unet.fc")]
    {
        let expected = format!(
            "`{name}` is not supported: it would be the name of each of the layers `fc`, `unet.fc`, so that the file \
             could not be read again; give them different names by `names`, or write the format of diffusers, which \
             keeps the dots"
        );
        assert_eq!(not_written(&same, format, &Renaming::default()), expected);
    }
}

#[test]
fn one_name_for_two_layers_is_not_written() {
    let config = LoraConfig::peft(2, 3.0).with_init(Init::RandomBoth);
    let set = twins().attach(&config).unwrap().adapters();
    let expected = "`lora_unet_a_b` is not supported: it would be the name of each of the layers `a.b`, `a_b`, so that \
                    the file could not be read again; give them different names by `names`, or write the format of \
                    diffusers, which keeps the dots";
    assert_eq!(not_written(&set, ImageFormat::Kohya, &Renaming::default()), expected);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("set.safetensors");
    for (format, names) in [
        (ImageFormat::Diffusers, Renaming::default()),
        (ImageFormat::Kohya, Renaming::new([("first", "a")])),
    ] {
        set.save_image(&file, format, &names).unwrap();
        let again = read(&fs::read(&file).unwrap(), &twins(), &names).unwrap();
        assert_eq!(again.fingerprint(), set.fingerprint());
    }
    let expected = "invalid argument: `names` has templates that match nothing: `other`; the set has `a.b`, `a_b`";
    assert_eq!(not_written(&set, ImageFormat::Kohya, &Renaming::new([("it", "other")])), expected);
}

#[test]
fn magnitudes_of_some_layers_alone_are_not_written_for_diffusers() {
    let set = load("kohya_dora");
    let mixed = LoraAdapters::new(set.iter().enumerate().map(|(index, (path, it))| {
        let mut adapter = it.clone();
        adapter.magnitude = adapter.magnitude.filter(|_| index > 0);
        (path.to_owned(), adapter)
    }));
    let names = unet::names().partial();
    let error = not_written(&mixed, ImageFormat::Diffusers, &names);
    let expected = "is not supported: some adapters have DoRA's magnitudes, and others do not; save them as two sets";
    assert!(error.ends_with(expected), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("set.safetensors");
    mixed.save_image(&file, ImageFormat::Kohya, &names).unwrap();
    let base = UNet::<Plain>::base();
    let again = LoraAdapters::load_image(&file, &base, &unet::names(), &device::<Plain>());
    assert_eq!(again.unwrap().fingerprint(), mixed.fingerprint());
}
