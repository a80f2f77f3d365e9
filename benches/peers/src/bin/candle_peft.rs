//! The training step with candle and the LoRA of `peft-rs`.

use burn_lora_peers::{Task, serve};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Linear, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use peft_rs::{LinearWithLora, LoraConfig};

fn main() {
    run().expect("candle computes");
}

fn run() -> Result<()> {
    let Task { method, tokens, width, rank } = Task::from_args();
    let (device, adapters) = (Device::Cpu, VarMap::new());
    let layers = if method == "mlp" { 4 } else { 1 };
    let config = || LoraConfig { r: rank, alpha: 16, ..Default::default() };
    let layers: Vec<_> = (0..layers)
        .map(|index| {
            let weight = Tensor::randn(0f32, 0.02, (width, width), &device)?;
            let base = Linear::new(weight, Some(Tensor::zeros(width, DType::F32, &device)?));
            let name = format!("layer{index}");
            let vars = VarBuilder::from_varmap(&adapters, DType::F32, &device).pp(&name);
            Ok(LinearWithLora::new(name, base, config(), vars).expect("the layer is a matrix"))
        })
        .collect::<Result<_>>()?;
    let data = Tensor::rand(0f32, 1.0, (tokens, width), &device)?;
    let step = ParamsAdamW { lr: 1e-3, ..Default::default() };
    let mut optimizer = AdamW::new(adapters.all_vars(), step)?;
    serve(layers, |layers| {
        let mut step = || -> Result<()> {
            // As in the middle of a model, where gradients go on to what is below.
            let x = Var::from_tensor(&data)?;
            let mut y = x.as_tensor().clone();
            for (index, layer) in layers.iter().enumerate() {
                y = if index > 0 { y.relu()? } else { y };
                y = layer.forward(&y).expect("the shapes fit");
            }
            optimizer.backward_step(&y.sqr()?.mean_all()?)
        };
        step().expect("candle computes");
        layers
    });
    Ok(())
}
