//! A training step of a whole model with burn-lora: `whole_model MODEL METHOD WORKERS SEGMENTS`, where MODEL is
//! `minilm` (32 texts of 32 tokens), `smollm2` (4 of 128), `resnet` (32 images of 32×32 pixels) or `conv` (one
//! convolution of 64 to 64 channels, 3×3, that passes gradients on), METHOD is `lora` or `full`, and SEGMENTS
//! is `plain` or `segments`. With MODEL `product`, it multiplies instead, and METHOD is the size, `ROWSxINNERxCOLUMNS`.

mod resnet;

use burn::{
    backend::Autodiff,
    module::{AutodiffModule, Module},
    nn::{LinearConfig, PaddingConfig2d, conv::Conv2dConfig},
    optim::{AdamConfig, Optimizer},
    tensor::{BasicOps, Distribution, Int, Tensor, backend::Backend},
};
use burn_lora::{
    Lora, LoraConfig, LoraLinear, LoraModule,
    nn::{LoraConv2d, Precision},
    quantize::Quantization,
    train::{Backward, Workers, segments},
};
use burn_lora_peers::{precision, serve};

use burn_lora_llm::{
    bert::{
        Tokens,
        classifier::{ALL_LINEAR, HEAD, Text},
    },
    data,
    loss::gradients,
    sizes::{minilm, smollm2},
};

#[cfg(feature = "ndarray")]
type Plain = burn::backend::NdArray;
#[cfg(not(feature = "ndarray"))]
type Plain = burn::backend::Flex;

type Train = Autodiff<Plain>;

type Ids<B> = Tensor<B, 2, Int>;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, method, workers, segmented] = &args[..] else {
        panic!("expected MODEL METHOD WORKERS SEGMENTS, got {args:?}")
    };
    let workers = Workers::new(workers.parse().expect("a number of workers"));
    let (lora, segmented) = (method == "lora", segmented == "segments");
    match model.as_str() {
        "conv" => train_conv(lora, &workers),
        "minilm" => train_minilm(lora, &workers, segmented),
        "product" => multiply(method),
        "resnet" => train_resnet(lora, &workers),
        _ => train_smollm2(lora, &workers, segmented),
    }
}

/// The product of a linear layer.
fn multiply(size: &str) {
    let sizes: Vec<usize> = size.split('x').map(|it| it.parse().expect("a size")).collect();
    let [rows, inner, columns] = sizes[..] else { panic!("ROWSxINNERxCOLUMNS, got {size}") };
    let device = Default::default();
    let x = Tensor::<Plain, 2>::random([rows, inner], Distribution::Default, &device);
    let layer = LinearConfig::new(inner, columns).with_bias(false).init::<Plain>(&device);
    let layer = LoraLinear::from(layer).with_precision(precision());
    // As a file in bf16 is held.
    let layer = match precision() {
        Precision::Bf16 => layer.quantize(Quantization::Bf16).expect("a linear layer").0,
        _ => layer,
    };
    serve(x, |x| {
        let _ = layer.forward(x.clone());
        x
    })
}

/// Adapters on `targets` of which `also` trains in full, or all of the model.
fn trained<M: LoraModule<Train> + Module<Train>>(
    base: M,
    lora: bool,
    targets: &[&str],
    also: &[&str],
) -> Lora<Train, M> {
    let config = LoraConfig::peft(8, 16.0).with_targets(targets.iter().copied());
    let config = config.with_modules_to_save(also.iter().copied());
    let base = base.with_precision(precision());
    match lora {
        true => base.attach(&config).expect("it can be attached"),
        false => base.train_only(&[".*"]).expect("it has parameters"),
    }
}

/// Answers with times of steps, in which `pass` computes the gradients of a part of the batch.
fn run<M, K: BasicOps<Train>, const D: usize>(
    model: Lora<Train, M>,
    workers: &Workers,
    batch: Tensor<Train, D, K>,
    pass: impl Fn(&Lora<Train, M>, Tensor<Train, D, K>) -> Backward + Sync,
) where
    M: AutodiffModule<Train> + Module<Train>,
    Lora<Train, M>: AutodiffModule<Train>,
{
    let mut optimizer = AdamConfig::new().init();
    serve(model, |model| {
        let parts = batch.clone().chunk(workers.count(), 0);
        let Backward { gradients, .. } = workers.backward(&model, parts, &pass);
        optimizer.step(1e-4, model, gradients)
    });
}

fn ids(texts: usize, length: usize) -> Ids<Train> {
    let shape = [texts, length];
    (Tensor::<Train, 2>::random(shape, Distribution::Default, &Default::default())
        * minilm::VOCAB_SIZE as f64)
        .int()
}

fn train_minilm(lora: bool, workers: &Workers, segmented: bool) {
    let base = minilm::base::<Train>(&Default::default());
    let model = trained(base, lora, &ALL_LINEAR, &[HEAD]);
    run(model, workers, ids(32, 32), |model, ids| {
        if segmented {
            let ids: Vec<_> = ids.into_data().iter::<u32>().collect();
            let texts = ids.chunks(32).map(|ids| Text { ids: ids.to_vec(), label: 0 });
            return segments(model, &texts.collect::<Vec<_>>()[..]);
        }
        let padding = ids.zeros_like().bool();
        let logits = model.forward(&Tokens { ids, padding });
        Backward::new(model, logits.square().sum() / 32.0)
    });
}

fn train_smollm2(lora: bool, workers: &Workers, segmented: bool) {
    let base = smollm2::base::<Train>(&Default::default());
    // As a file in bf16 is held.
    let base = match precision() {
        Precision::Bf16 if lora => base.quantize(Quantization::Bf16).expect("it has layers").0,
        _ => base,
    };
    let model = trained(base, lora, &smollm2::LAYERS, &[]);
    let ids: Vec<_> = smollm2::texts(4).iter().flat_map(|text| text.ids.clone()).collect();
    let ids = Tensor::<Train, 1, Int>::from_ints(&*ids, &Default::default());
    let ids = ids.reshape([4, smollm2::LENGTH]);
    run(model, workers, ids, |model, ids| {
        let ids: Vec<_> = ids.into_data().iter::<u32>().collect();
        let texts = ids.chunks(smollm2::LENGTH);
        let texts: Vec<_> = texts.map(|ids| data::Text { ids: ids.to_vec(), given: 0 }).collect();
        let rows: Vec<_> = texts.iter().map(|text| vec![text]).collect();
        gradients(model, &rows, segmented)
    });
}

fn images(batch: usize, channels: usize) -> Tensor<Train, 4> {
    Tensor::random([batch, channels, 32, 32], Distribution::Default, &Default::default())
}

fn train_resnet(lora: bool, workers: &Workers) {
    let base = resnet::ResNet::<Train>::new(&Default::default());
    let model = trained(base, lora, &resnet::LAYERS, &[]);
    let images = images(32, 3);
    run(model, workers, images, |model, images| {
        Backward::new(model, model.forward(images).square().sum() / 32.0)
    });
}

#[derive(Module, Debug)]
struct Conv<B: Backend> {
    conv: LoraConv2d<B>,
}

fn train_conv(lora: bool, workers: &Workers) {
    let conv = Conv2dConfig::new([64, 64], [3, 3])
        .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
        .init(&Default::default());
    let model = trained(Conv::<Train> { conv: conv.into() }, lora, &["conv"], &[]);
    let images = images(32, 64);
    run(model, workers, images, |model, images| {
        Backward::new(model, model.conv.forward(images.require_grad()).square().sum() / 32.0)
    });
}
