//! Which layers the names in a file mean.

use std::fs;

use burn::{
    module::Module,
    nn::{
        Linear, LinearConfig,
        conv::{Conv2d, Conv2dConfig},
    },
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{
    Lora, LoraAdapters, LoraLinear, LoraModule, Scaling, image::ImageFormat, peft::Renaming,
};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::{
    toys::{Toy, linear, read, twins},
    zeros,
};
use crate::{
    model::{Plain, device},
    oracle::Matrix,
};

/// Models of several parts.
#[derive(Module, Debug)]
struct Pipeline<B: Backend> {
    transformer: Toy<B>,
    text_encoder: Toy<B>,
    text_encoder_2: Toy<B>,
}

#[derive(Module, Debug)]
struct Text<B: Backend> {
    layers: Vec<Attention<B>>,
}

#[derive(Module, Debug)]
struct Attention<B: Backend> {
    q_proj: LoraLinear<B>,
    out_proj: LoraLinear<B>,
}

/// The factors of a linear layer of 3 inputs and 5 outputs, with this name.
fn factors(name: &str) -> [(String, Dtype, &'static [usize]); 2] {
    [
        (format!("{name}.lora_down.weight"), Dtype::F32, &[2, 3]),
        (format!("{name}.lora_up.weight"), Dtype::F32, &[5, 2]),
    ]
}

fn of_layers(names: &[&str]) -> Vec<u8> {
    let tensors: Vec<_> = names.iter().flat_map(|name| factors(name)).collect();
    let tensors: Vec<_> =
        tensors.iter().map(|(key, dtype, shape)| (&**key, *dtype, *shape)).collect();
    zeros(&tensors)
}

fn paths(set: &LoraAdapters<Plain>) -> Vec<String> {
    set.iter().map(|(path, _)| path.to_owned()).collect()
}

#[test]
fn a_model_of_several_parts_takes_all_of_them() {
    let [transformer, text_encoder, text_encoder_2] = [(); 3].map(|()| Toy::<Plain>::new());
    let model = Pipeline { transformer, text_encoder, text_encoder_2 };
    let expected = ["text_encoder.fc", "text_encoder_2.fc", "transformer.fc"];
    for names in [
        ["lora_unet_fc", "lora_te1_fc", "lora_te2_fc"],
        ["lora_unet_fc", "lora_te_fc", "lora_te2_fc"],
        ["transformer.fc", "text_encoder.fc", "text_encoder_2.fc"],
        ["diffusion_model.fc", "text_encoder.fc", "text_encoder_2.fc"],
        ["unet.fc", "text_encoder.fc", "lora_te2_fc"],
    ] {
        let set = read(&of_layers(&names), &model, &Renaming::default()).unwrap();
        assert_eq!(paths(&set), expected);
        assert!(set.unused().is_empty());
    }
    // They are written under the names of their parts.
    let set = read(
        &of_layers(&["unet.fc", "text_encoder.fc", "lora_te2_fc"]),
        &model,
        &Renaming::default(),
    );
    let (set, dir) = (set.unwrap(), tempfile::tempdir().unwrap());
    let keys = |set: &LoraAdapters<Plain>, format| {
        let file = dir.path().join("set.safetensors");
        set.save_image(&file, format, &Renaming::default()).unwrap();
        let bytes = fs::read(file).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut keys: Vec<_> = tensors.names().into_iter().map(str::to_owned).collect();
        keys.retain(|it| it.ends_with("lora_down.weight") || it.ends_with("lora_A.weight"));
        keys.sort();
        keys
    };
    let of = |names: [&str; 3], end: &str| names.map(|name| format!("{name}.{end}"));
    let kohya = of(["lora_te1_fc", "lora_te2_fc", "lora_unet_fc"], "lora_down.weight");
    assert_eq!(keys(&set, ImageFormat::Kohya), kohya);
    assert_eq!(keys(&set, ImageFormat::Diffusers), of(expected, "lora_A.weight"));
    // One text encoder has no number.
    let one = LoraAdapters::new([("text_encoder.fc", set.get("text_encoder.fc").unwrap().clone())]);
    assert_eq!(keys(&one, ImageFormat::Kohya), ["lora_te_fc.lora_down.weight"]);
}

#[test]
fn other_parts_are_left_for_their_models() {
    let file = of_layers(&["lora_unet_fc", "lora_te_layers_0_q_proj"]);
    let set = read(&file, &Toy::<Plain>::new(), &Renaming::default()).unwrap();
    assert_eq!(paths(&set), ["fc"]);
    let te = "lora_te_layers_0_q_proj";
    assert_eq!(set.unused(), [format!("{te}.lora_down.weight"), format!("{te}.lora_up.weight")]);
    assert!(
        set.to_string().contains("not used: lora_te_layers_0_q_proj.lora_down.weight, "),
        "{set}"
    );

    let text = Text::<Plain> { layers: vec![Attention { q_proj: linear(), out_proj: linear() }] };
    let whole = Renaming::new([("text_encoder", "")]);
    let set = read(&file, &text, &whole).unwrap();
    assert_eq!(paths(&set), ["layers.0.q_proj"]);
    assert_eq!(set.unused().len(), 2);
    // The older names of diffusers.
    let zeros = zeros(&[
        ("text_encoder.layers.0.to_q_lora.down.weight", Dtype::F32, &[2, 3]),
        ("text_encoder.layers.0.to_q_lora.up.weight", Dtype::F32, &[5, 2]),
        ("text_encoder.layers.0.out_proj.lora_linear_layer.down.weight", Dtype::F32, &[2, 3]),
        ("text_encoder.layers.0.out_proj.lora_linear_layer.up.weight", Dtype::F32, &[5, 2]),
    ]);
    let set = read(&zeros, &text, &whole).unwrap();
    assert_eq!(paths(&set), ["layers.0.out_proj", "layers.0.q_proj"]);
}

/// kohya's files for SDXL have the names of its first code.
#[test]
fn other_names_are_renamed() {
    let names = Renaming::new([("input_blocks.4.1.transformer_blocks.*", "blocks.*")]);
    #[derive(Module, Debug)]
    struct Model<B: Backend> {
        blocks: Vec<LoraLinear<B>>,
    }
    let model = Model::<Plain> { blocks: vec![linear(), linear()] };
    for name in [
        "lora_unet_input_blocks_4_1_transformer_blocks_1",
        "diffusion_model.input_blocks.4.1.transformer_blocks.1",
    ] {
        assert_eq!(paths(&read(&of_layers(&[name]), &model, &names).unwrap()), ["blocks.1"]);
    }
}

#[test]
fn dots_and_other_names_tell_layers_apart() {
    let set = read(&of_layers(&["unet.a.b", "unet.a_b"]), &twins(), &Renaming::default()).unwrap();
    assert_eq!(paths(&set), ["a.b", "a_b"]);
    let names = Renaming::new([("first", "a")]);
    let set = read(&of_layers(&["lora_unet_first_b", "lora_unet_a_b"]), &twins(), &names).unwrap();
    assert_eq!(paths(&set), ["a.b", "a_b"]);
}

#[test]
fn stock_models_are_read_through_an_overlay() {
    #[derive(Module, Debug)]
    struct Stock<B: Backend> {
        fc: Linear<B>,
        conv: Conv2d<B>,
    }
    let device = device::<Plain>();
    let stock = Stock::<Plain> {
        fc: LinearConfig::new(3, 5).init(&device),
        conv: Conv2dConfig::new([2, 4], [3, 3]).init(&device),
    };
    let file = zeros(&[
        ("lora_unet_fc.lora_down.weight", Dtype::F32, &[2, 3]),
        ("lora_unet_fc.lora_up.weight", Dtype::F32, &[5, 2]),
        ("lora_unet_conv.lora_down.weight", Dtype::F32, &[2, 2, 3, 3]),
        ("lora_unet_conv.lora_up.weight", Dtype::F32, &[4, 2, 1, 1]),
    ]);
    let error = read(&file, &stock, &Renaming::default()).unwrap_err().to_string();
    let expected = "lora_unet_fc.lora_down.weight (a stock module: see `Lora::overlay`)";
    assert!(error.contains(expected), "{error}");
    let overlay = Lora::overlay(stock);
    let set = read(&file, &overlay, &Renaming::default()).unwrap();
    assert_eq!(paths(&set), ["conv", "fc"]);
    overlay.switch(&set).unwrap();
}

/// A linear layer as a convolution with a kernel of size 1, and the other way round.
#[test]
fn kernels_of_size_one_are_matrices() {
    let model = Toy::<Plain>::new();
    for (down, up) in
        [(&[2, 3][..], &[5, 2][..]), (&[2, 3, 1, 1], &[5, 2, 1, 1]), (&[2, 3, 1, 1], &[5, 2])]
    {
        let file = zeros(&[
            ("lora_unet_fc.lora_down.weight", Dtype::F32, down),
            ("lora_unet_fc.lora_up.weight", Dtype::F32, up),
            ("lora_unet_point.lora_down.weight", Dtype::F32, down),
            ("lora_unet_point.lora_up.weight", Dtype::F32, up),
        ]);
        let set = read(&file, &model, &Renaming::default()).unwrap();
        for path in ["fc", "point"] {
            assert_eq!(set.get(path).unwrap().shape(), [3, 5]);
        }
        model.switch(&set).unwrap();
    }
}

#[test]
fn alpha_is_read_in_every_type_and_is_the_rank_if_it_is_not_there() {
    let matrices = [vec![0; 4 * 2 * 3], vec![0; 4 * 5 * 2]];
    let alpha = |dtype, shape: &[usize], bytes: &[u8]| {
        let mut views = vec![
            ("lora_unet_fc.lora_down.weight", Dtype::F32, vec![2, 3], &*matrices[0]),
            ("lora_unet_fc.lora_up.weight", Dtype::F32, vec![5, 2], &*matrices[1]),
        ];
        if !bytes.is_empty() {
            views.push(("lora_unet_fc.alpha", dtype, shape.to_vec(), bytes));
        }
        let views = views
            .into_iter()
            .map(|(key, dtype, shape, bytes)| (key, TensorView::new(dtype, shape, bytes).unwrap()));
        let file = safetensors::serialize(views, None).unwrap();
        let set = read(&file, &Toy::<Plain>::new(), &Renaming::default()).unwrap();
        let adapter = set.get("fc").unwrap().clone();
        assert_eq!(adapter.scaling, Scaling::AlphaOverRank);
        adapter.alpha
    };
    assert_eq!(alpha(Dtype::F32, &[], &[]), 2.0);
    assert_eq!(alpha(Dtype::F32, &[], &(-1.5f32).to_le_bytes()), -1.5);
    assert_eq!(alpha(Dtype::F32, &[1], &1.5f32.to_le_bytes()), 1.5);
    assert_eq!(alpha(Dtype::F64, &[], &0.1f64.to_le_bytes()), 0.1);
    assert_eq!(alpha(Dtype::F16, &[], &[0x00, 0x3e]), 1.5);
    assert_eq!(alpha(Dtype::BF16, &[], &[0xc0, 0x3f]), 1.5);
    assert_eq!(alpha(Dtype::I64, &[], &(-7i64).to_le_bytes()), -7.0);
    assert_eq!(alpha(Dtype::I32, &[1, 1], &(-7i32).to_le_bytes()), -7.0);
}

/// The values of each type are where they belong.
#[test]
fn factors_are_read_in_every_type() {
    let model = Toy::<Plain>::new();
    // Numbers that every type holds.
    let short = |it: Matrix| it.map(|it| (8.0 * it).floor() / 8.0 + 0.0625);
    let (down, up) = (short(Matrix::random(2, 3, 1)), short(Matrix::random(5, 2, 2)));
    for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16] {
        let number = |it: &f64| match dtype {
            Dtype::F64 => it.to_le_bytes().to_vec(),
            Dtype::F32 => (*it as f32).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f64(*it).to_le_bytes().to_vec(),
            _ => bf16::from_f64(*it).to_le_bytes().to_vec(),
        };
        let bytes = |it: &Matrix| it.data.iter().flat_map(number).collect::<Vec<_>>();
        let [a, b] = [&down, &up].map(bytes);
        let views = [
            ("lora_unet_fc.lora_down.weight", TensorView::new(dtype, vec![2, 3], &a).unwrap()),
            ("lora_unet_fc.lora_up.weight", TensorView::new(dtype, vec![5, 2], &b).unwrap()),
        ];
        let file = safetensors::serialize(views, None).unwrap();
        let set = read(&file, &model, &Renaming::default()).unwrap();
        let adapter = set.get("fc").unwrap();
        let values =
            |it: Tensor<Plain, 2>| it.into_data().convert::<f64>().to_vec::<f64>().unwrap();
        assert_eq!(values(adapter.a.val()), down.transpose().data, "{dtype:?}");
        assert_eq!(values(adapter.b.val()), up.transpose().data, "{dtype:?}");
    }
}
