//! Files that are not what their names say, and weights of which a model makes nothing.

use std::{fs, path::Path};

use half::bf16;
use safetensors::Dtype;

use burn_lora::quantize::Quantization;
use burn_lora_llm::{bert, chat::Chat, pretrained};

use super::{Made, assert_holds, gguf, refusal};
use crate::{backend::Plain, oracle::device};

/// What git-lfs leaves in place of a large file.
pub(super) const POINTER: &str =
    "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n";

#[test]
fn u3_what_is_there_instead_of_weights_is_named() {
    let dir = Made::new().write();
    let at = |name: &str| dir.path().join(name);
    for (start, problem) in [
        (POINTER.as_bytes(), "this is a git-lfs pointer; fetch the file with `git lfs pull`"),
        (b"<!DOCTYPE html>", "this is a web page"),
        (b"PK\x03\x04\x00\x00\x08\x08", "this is a file of PyTorch"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j", "this is a file of PyTorch"),
        (b"GGUF\x03\x00\x00\x00", "this is a GGUF file"),
    ] {
        fs::write(at("model.safetensors"), start).unwrap();
        assert_holds(&refusal(dir.path()), &format!("model.safetensors: {problem}"));
    }
    fs::remove_file(at("model.safetensors")).unwrap();
    assert_holds(&refusal(dir.path()), "model.safetensors: No such file");
    fs::write(at("training_args.bin"), "").unwrap();
    assert_holds(&refusal(dir.path()), "model.safetensors: No such file");
    for name in ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"] {
        fs::write(at(name), "").unwrap();
        assert_holds(&refusal(dir.path()), &format!("model.safetensors: only {name} is there"));
        fs::remove_file(at(name)).unwrap();
    }
    fs::write(at("adapter_config.json"), "{}").unwrap();
    assert_holds(&refusal(dir.path()), "these are adapters; give the directory of their base");
    fs::write(at("q4.gguf"), "").unwrap();
    assert_holds(&refusal(dir.path()), "give the path of q4.gguf, which is there");

    // The same where nothing else is.
    let lone = tempfile::tempdir().unwrap();
    for (name, problem) in
        [("adapter_config.json", "these are adapters"), ("q4.gguf", "give the path of q4.gguf")]
    {
        fs::write(lone.path().join(name), "{}").unwrap();
        let expected = format!("{}: {problem}", lone.path().display());
        assert_holds(&refusal(lone.path()), &expected);
        assert_holds(&Chat::read(lone.path()).err().unwrap(), &expected);
    }
    for name in ["adapter_config.json", "q4.gguf"] {
        fs::remove_file(lone.path().join(name)).unwrap();
    }
    // Ollama names files by what is in them.
    fs::write(lone.path().join("sha256-01"), "GGUF\x03").unwrap();
    fs::write(lone.path().join("sha256-00"), "GGML").unwrap();
    assert_holds(&refusal(lone.path()), "give the path of sha256-01, which is there");
    fs::remove_file(at("q4.gguf")).unwrap();
    fs::remove_file(at("adapter_config.json")).unwrap();

    let problem = "this is a git-lfs pointer";
    fs::write(at("config.json"), POINTER).unwrap();
    assert_holds(&refusal(dir.path()), &format!("config.json: {problem}"));
    let chat = || Chat::read(dir.path()).err().unwrap();
    assert_holds(&chat(), &format!("config.json: {problem}"));
    fs::write(at("tokenizer.json"), POINTER).unwrap();
    assert_holds(&chat(), &format!("tokenizer.json: {problem}"));
    fs::write(at("tokenizer.json"), "<html>").unwrap();
    assert_holds(&chat(), "tokenizer.json: this is a web page");
    fs::remove_file(at("tokenizer.json")).unwrap();
    fs::write(at("tokenizer.model"), "").unwrap();
    assert_holds(&chat(), "tokenizer.json: only tokenizer.model is there, which is not read");
}

/// The header of safetensors begins with its length, which may look like another file's first bytes.
#[test]
fn u3_weights_with_any_length_of_the_header_are_read() {
    let dir = Made::new().write();
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for low in [0x0280_usize, 0x003c] {
        // White space may follow the header.
        let longer = (length..).find(|it| it % 0x1_0000 == low || it % 0x100 == low).unwrap();
        let mut bytes = (longer as u64).to_le_bytes().to_vec();
        bytes.extend(&whole[8..8 + length]);
        bytes.resize(8 + longer, b' ');
        bytes.extend(&whole[8 + length..]);
        fs::write(&path, bytes).unwrap();
        pretrained::load::<Plain>(dir.path(), None, &device::<Plain>()).unwrap();
    }
}

#[test]
fn u3_a_name_of_the_hub_is_not_a_path() {
    let name = Path::new("HuggingFaceTB/SmolLM2-135M-Instruct");
    let errors = [refusal(name), Chat::read(name).err().unwrap()];
    for error in errors {
        let found = "HuggingFaceTB/SmolLM2-135M-Instruct: there is no such directory or file";
        assert_holds(&error, found);
        assert_holds(&error, "`hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir DIR`");
    }
    for path in ["missing", "a/b/missing", "/missing/model", "dir/missing.gguf"] {
        let error = refusal(Path::new(path));
        assert_holds(&error, &format!("{path}: No such file or directory"));
    }
}

#[test]
fn u5_weights_that_are_not_finite_are_named() {
    let (norm, matrix) = ("model.norm.weight", "model.layers.1.mlp.up_proj.weight");
    let table = "model.embed_tokens.weight";
    let broken = |name: &str, number: f32| {
        Made::new().with(|it| {
            let numbers = &mut it.tensors.get_mut(name).unwrap().1;
            numbers[3] = number;
            numbers[5] = number;
        })
    };
    for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for name in [norm, matrix, table] {
            let made = broken(name, number);
            let count = made.tensors[name].1.len();
            let problem = format!("`{name}`: 2 of its {count} numbers are NaN or infinite");
            for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
                let dir = made.write_as(|_| dtype);
                let path = dir.path().display().to_string();
                assert_holds(&refusal(dir.path()), &format!("{path}: {problem}"));
                let int8 = Some(Quantization::Int8);
                let quantized = pretrained::load::<Plain>(dir.path(), int8, &device::<Plain>());
                assert_holds(&quantized.err().unwrap(), &problem);
            }
            let (_dir, path) = gguf::write(&made, |_| ());
            assert_holds(&refusal(&path), &format!("model.gguf: {problem}"));
        }
    }
    // All of them are named.
    let both = broken(norm, f32::NAN).with(|it| it.tensors.get_mut(table).unwrap().1[0] = f32::NAN);
    let error = refusal(both.write().path());
    assert_holds(&error, norm);
    assert_holds(&error, &format!("`{table}`: 1 of its 208 numbers"));
    // The largest numbers of the types are numbers.
    let largest = broken(matrix, bf16::MAX.to_f32()).write_as(|_| Dtype::BF16);
    pretrained::load::<Plain>(largest.path(), None, &device::<Plain>()).unwrap();
}

#[test]
fn u5_weights_of_an_encoder_that_are_not_finite_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bert/fixtures/tiny");
    fs::copy(tiny.join("config.json"), dir.path().join("config.json")).unwrap();
    let mut bytes = fs::read(tiny.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let name = "embeddings.LayerNorm.weight";
    let at = file.tensor(name).unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize;
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    let error = bert::pretrained::load::<Plain>(dir.path(), &device::<Plain>()).err().unwrap();
    assert_holds(&error, &format!("model.safetensors: `{name}`: 1 of its "));
}
