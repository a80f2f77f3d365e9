//! From a trained base to a merged model: a network has learned one curve, and a small adapter learns
//! another.
//!
//! ```text
//! cargo run --release --example quickstart
//! ```

use burn::{
    backend::{Autodiff, Flex},
    module::Module,
    nn::LinearConfig,
    optim::{AdamConfig, GradientsParams, Optimizer},
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{Lora, LoraAdapters, LoraConfig, LoraError, LoraLinear, LoraModule};

/// `LoraLinear` replaces `Linear`. LoRA needs no other change to a model.
#[derive(Module, Debug)]
struct Net<B: Backend> {
    layers: Vec<LoraLinear<B>>,
}

impl<B: Backend> Net<B> {
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let (last, hidden) = self.layers.split_last().expect("there are layers");
        last.forward(hidden.iter().fold(x, |x, layer| layer.forward(x).tanh()))
    }
}

type B = Autodiff<Flex>;
type Curve = fn(Tensor<B, 2>) -> Tensor<B, 2>;

fn loss(net: &Net<B>, curve: Curve) -> Tensor<B, 1> {
    let x = Tensor::<B, 1, _>::arange(-64..64, &Default::default()).float().unsqueeze_dim(1) / 64;
    (net.forward(x.clone()) - curve(x)).square().mean()
}

/// An ordinary training loop.
fn fit(mut net: Lora<B, Net<B>>, curve: Curve, rate: f64) -> Lora<B, Net<B>> {
    let mut optimizer = AdamConfig::new().init();
    for _ in 0..1500 {
        let grads = GradientsParams::from_grads(loss(&net, curve).backward(), &net);
        net = optimizer.step(rate, net, grads);
    }
    net
}

fn main() -> Result<(), LoraError> {
    let device = Default::default();
    <Flex as Backend>::seed(&device, 1);
    let layer = |inputs, outputs| LinearConfig::new(inputs, outputs).init(&device).into();
    let net: Net<B> = Net { layers: vec![layer(1, 64), layer(64, 64), layer(64, 1)] };
    let (old, new): (Curve, Curve) = (|x| (x * 4).sin(), |x| (x.clone() * 4).sin() * x.abs());
    let show = |name, net: &Net<B>| {
        let [old, new] = [old, new].map(|curve| loss(net, curve).into_scalar());
        println!("{name:<36} old curve {old:.5}, new curve {new:.5}");
    };

    // The base: a network trained in full. In a real program it comes from a file.
    let base = fit(net.train_only(&[".*"])?, old, 2e-3).into_inner();
    show("the base", &base);

    // Adds a new adapter to the large layer. It changes no output yet, and all else is frozen.
    let config = LoraConfig::new(4, 4.0).with_targets(["layers.1"]);
    let adapted = fit(base.attach(&config)?, new, 5e-3);
    show("the base with adapters", &adapted);
    println!("\n{}\n", adapted.parameters());

    // Saves what was trained, as a small directory that Python's PEFT can read.
    let dir = std::env::temp_dir().join("burn-lora-quickstart");
    adapted.adapters().save(&dir)?;
    let served = base.switch(&LoraAdapters::load(&dir, &device)?)?;
    show("the adapters from their file", &served);

    // Merged, it is a plain network without overhead. Detached, it is the base, bit for bit.
    show("merged into the weights", &served.merge()?);
    show("the base again", &served.detach());
    Ok(())
}
