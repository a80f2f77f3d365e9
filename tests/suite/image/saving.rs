//! Files are written completely or not at all, and keep everything to the bit.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use burn_lora::{
    Init, LoraAdapter, LoraAdapters, LoraConfig, LoraModule, Scaling, image::ImageFormat,
    peft::Renaming,
};
use safetensors::SafeTensors;

use super::{
    FILES, Io, fixture, load, load_file, text,
    unet::{self, UNet},
};
use crate::{
    model::Plain,
    oracle::{assert_close, bits},
};

/// What is written for Python to read: the name of the file, the set, and how it is spelled.
const SAVED: [(&str, &str, ImageFormat); 5] = [
    ("saved_kohya", "kohya", ImageFormat::Kohya),
    ("saved_kohya_dora", "kohya_dora", ImageFormat::Kohya),
    ("saved_kohya_tucker", "kohya_tucker", ImageFormat::Kohya),
    ("saved_diffusers", "kohya", ImageFormat::Diffusers),
    ("saved_diffusers_dora", "diffusers_dora", ImageFormat::Diffusers),
];

/// The same of the text encoder. transformers 5 has no `text_model` in its names.
fn saved_of_text() -> [(&'static str, Renaming, ImageFormat); 2] {
    [
        ("saved_text_kohya", text::names(), ImageFormat::Kohya),
        ("saved_text_diffusers", Renaming::new([("text_encoder", "")]), ImageFormat::Diffusers),
    ]
}

/// The renaming, if the set has a layer that it renames.
fn names(set: &LoraAdapters<Plain>) -> Renaming {
    let names = unet::names().partial();
    if set.renamed(&names.inverse()).is_ok() { names } else { Renaming::default() }
}

fn save(name: &str, path: &Path, format: ImageFormat) {
    let set = load(name);
    set.save_image(path, format, &names(&set)).unwrap();
}

#[track_caller]
fn assert_same(one: &LoraAdapters<Plain>, other: &LoraAdapters<Plain>) {
    assert_eq!(one.len(), other.len());
    for ((path, one), (other_path, other)) in one.iter().zip(other.iter()) {
        assert_eq!(path, other_path);
        assert_eq!(one.scale().to_bits(), other.scale().to_bits(), "{path}");
        assert_eq!(bits(one.a.val()), bits(other.a.val()), "{path}");
        assert_eq!(bits(one.b.val()), bits(other.b.val()), "{path}");
        let magnitudes = [one, other].map(|it| it.magnitude.as_ref().map(|it| bits(it.val())));
        assert_eq!(magnitudes[0], magnitudes[1], "{path}");
    }
    assert_eq!(one.fingerprint(), other.fingerprint());
}

#[test]
fn a_set_stays_the_same_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("set.safetensors");
    let mut sets: Vec<_> = FILES.map(load).into();
    // Scales that `f32` would round, and rules that the formats do not have.
    let rules = [Scaling::Alpha, Scaling::AlphaOverRank, Scaling::AlphaOverSqrtRank];
    sets.push(LoraAdapters::new(load("kohya").iter().enumerate().map(|(index, (path, it))| {
        let (alpha, scaling) = (0.1 + index as f64, rules[index % 3]);
        let mut adapter = it.clone();
        (adapter.alpha, adapter.scaling) = (alpha, scaling);
        (path.to_owned(), adapter)
    })));
    for set in &sets {
        for format in [ImageFormat::Kohya, ImageFormat::Diffusers] {
            set.save_image(&file, format, &names(set)).unwrap();
            let again = load_file(&file).unwrap();
            match set.iter().all(|(_, it)| it.scaling == Scaling::AlphaOverRank) {
                true => assert_same(&again, set),
                // alpha is the scale times the rank, and a quotient by the rank again.
                false => set.iter().zip(again.iter()).for_each(|((path, one), (_, other))| {
                    assert!((one.scale() / other.scale() - 1.0).abs() < 1e-15, "{path}");
                }),
            }
            // What is read again is written again as the same.
            let other = dir.path().join("again.safetensors");
            again.save_image(&other, format, &names(set)).unwrap();
            assert_same(&load_file(&other).unwrap(), &again);
        }
    }
}

/// The tensors of a file with their types, shapes and bytes, and what the header says.
type Contents = (BTreeMap<String, String>, BTreeMap<String, String>);

fn contents(path: PathBuf) -> Contents {
    let bytes = fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let header = header.metadata().clone().unwrap_or_default().into_iter().collect();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = tensors.iter().map(|(key, it)| {
        (key.to_owned(), format!("{:?} {:?} {:?}", it.dtype(), it.shape(), it.data()))
    });
    (tensors.collect(), header)
}

#[track_caller]
fn assert_same_contents(path: &Path, name: &str) {
    let (tensors, header) = contents(path.to_owned());
    let (others, other_header) = contents(fixture(&format!("{name}.safetensors")));
    assert_eq!(header, other_header, "{name}");
    assert!(tensors.keys().eq(others.keys()), "{name}");
    for (key, it) in &tensors {
        assert!(*it == others[key], "{name}: {key}");
    }
}

/// The files in `tests/image/fixtures` are those that diffusers has read: see `tests/image/check_saved.py`.
#[test]
fn what_is_written_is_what_diffusers_has_read() {
    let dir = tempfile::tempdir().unwrap();
    let (io, base) = (Io::read(), UNet::<Plain>::base());
    for (file, name, format) in SAVED {
        let path = dir.path().join(format!("{file}.safetensors"));
        save(name, &path, format);
        assert_same_contents(&path, file);
        let adapted = base.switch(&load_file(path).unwrap()).unwrap();
        assert_close(io.output(&adapted), &io.values(&format!("y.{name}")), 1e-5);
    }
    for (file, names, format) in saved_of_text() {
        let path = dir.path().join(file);
        text::load().save_image(&path, format, &names).unwrap();
        assert_same_contents(&path, file);
    }
}

#[test]
#[ignore = "run by tests/image/check_saved.py"]
fn write_for_python() {
    let out = PathBuf::from(std::env::var("IMAGE_OUT").expect("IMAGE_OUT names a directory"));
    for (file, names, format) in saved_of_text() {
        let path = out.join(format!("{file}.safetensors"));
        text::load().save_image(path, format, &names).unwrap();
    }
    for (file, name, format) in SAVED {
        save(name, &out.join(format!("{file}.safetensors")), format);
    }
}

#[test]
fn a_failed_save_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("set.safetensors");
    let set = load("kohya");
    let names = names(&set);
    save("kohya", &file, ImageFormat::Kohya);
    let before = fs::read(&file).unwrap();
    let with = |change: fn(&mut LoraAdapter<Plain>)| {
        LoraAdapters::new(set.iter().map(|(path, it)| {
            let mut adapter = it.clone();
            change(&mut adapter);
            (path.to_owned(), adapter)
        }))
    };
    let diverged = with(|it| it.b = it.b.clone().map(|b| b * f32::NAN));
    let endless = with(|it| it.alpha = f64::INFINITY);
    for format in [ImageFormat::Kohya, ImageFormat::Diffusers] {
        let error = diverged.save_image(&file, format, &names).unwrap_err();
        let expected = format!(
            "{}: the adapters hold NaN or infinite values; nothing was saved",
            file.display()
        );
        assert_eq!(error.to_string(), expected);
        let error = endless.save_image(&file, format, &names).unwrap_err();
        assert!(
            error.to_string().ends_with("is not supported: its alpha is not finite"),
            "{error}"
        );
        let error = set.save_image(dir.path().join("none/set"), format, &names).unwrap_err();
        assert!(error.to_string().starts_with(&format!("{}", dir.path().join("none").display())));
        // A directory is not replaced by a file.
        assert!(set.save_image(dir.path(), format, &names).is_err());
    }
    assert_eq!(fs::read(&file).unwrap(), before);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[cfg(unix)]
#[test]
fn a_link_stays_one_and_the_file_keeps_its_mode() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let dir = tempfile::tempdir().unwrap();
    let [file, link] = ["set.safetensors", "link"].map(|name| dir.path().join(name));
    save("kohya", &file, ImageFormat::Kohya);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    symlink(&file, &link).unwrap();
    save("comfy", &link, ImageFormat::Kohya);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
    assert_same(&load_file(&file).unwrap(), &load("comfy"));
}

/// Of twice the rank, because a part of the weight moved into the adapter.
#[test]
fn an_adapter_that_started_from_the_weight_fits_the_original_base() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("set.safetensors");
    let config = LoraConfig::peft(2, 3.0).with_init(Init::Pissa).with_targets(["conv_in"]);
    let adapted = UNet::<Plain>::base().attach(&config).unwrap();
    let names = Renaming::default();
    adapted.adapters().save_image(&file, ImageFormat::Kohya, &names).unwrap();
    assert_eq!(load_file(&file).unwrap().get("conv_in").unwrap().rank(), 4);
}
