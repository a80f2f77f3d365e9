//! Training steps of a decoder on one long text with burn-lora: `long_text DIR LENGTH TEXTS WORKERS plain|segments [int8|nf4]`.
//! DIR is a model in Hugging Face's format. Adapters of rank 8 are on all linear layers.

use burn::{
    backend::{Autodiff, Flex},
    optim::{AdamConfig, Optimizer},
};
use burn_lora::{
    LoraConfig, LoraModule,
    nn::Precision,
    quantize::Quantization,
    train::{Backward, Workers},
};
use burn_lora_llm::{data::Text, loss::gradients, pretrained::{Holding, load_held}, sizes::smollm2::LAYERS};
use burn_lora_peers::{precision, serve};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, length, texts, workers, way, quantize @ ..] = &args[..] else {
        panic!("expected DIR LENGTH TEXTS WORKERS plain|segments [int8|nf4], got {args:?}")
    };
    let [length, texts, workers] =
        [length, texts, workers].map(|it| it.parse().expect("a whole number"));
    let segmented = way == "segments";
    let quantize = quantize.first().map(|it| match it.as_str() {
        "int8" => Quantization::Int8,
        _ => Quantization::Nf4,
    });
    let precision = precision();
    let holding = Holding { quantize, keep_16_bits: precision == Precision::Bf16 };
    let read = load_held::<Autodiff<Flex>>(dir.as_ref(), holding, &Default::default());
    let base = read.expect("a model").llama.with_precision(precision);
    let known = base.vocab_size();
    let config = LoraConfig::peft(8, 16.0).with_targets(LAYERS);
    let model = base.attach(&config).expect("the layers are there");
    let texts: Vec<_> = (0..texts)
        .map(|text| {
            let ids = (0..length).map(|it| ((text * length + it) * 7919 % known) as u32);
            Text { ids: ids.collect(), given: 0 }
        })
        .collect();
    let rows: Vec<_> = texts.iter().map(|text| vec![text]).collect();
    let (workers, mut optimizer) = (Workers::new(workers), AdamConfig::new().init());
    serve(model, |model| {
        let parts = rows.chunks(rows.len().div_ceil(workers.count())).collect();
        let Backward { gradients, .. } =
            workers.backward(&model, parts, |model, rows| gradients(model, rows, segmented));
        optimizer.step(1e-4, model, gradients)
    });
}
