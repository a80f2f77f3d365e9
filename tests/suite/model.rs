//! The models that the tests adapt.

use burn::{
    module::{Module, ModuleMapper, Param},
    nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig},
    tensor::{Tensor, activation::relu, backend::Backend},
};
use burn_lora::LoraLinear;

use crate::{
    backend,
    oracle::{Matrix, Problem},
};

pub type Train = backend::Train;
pub type Plain = backend::Plain;

pub fn device<B: Backend>() -> B::Device {
    B::Device::default()
}

/// Two layers, a norm and a head. The layers and the head can have adapters.
#[derive(Module, Debug)]
pub struct Mlp<B: Backend> {
    pub blocks: Vec<LoraLinear<B>>,
    pub norm: LayerNorm<B>,
    pub head: LoraLinear<B>,
}

/// The same model as it would be without this crate.
#[derive(Module, Debug)]
pub struct PlainMlp<B: Backend> {
    pub blocks: Vec<Linear<B>>,
    pub norm: LayerNorm<B>,
    pub head: Linear<B>,
}

impl<B: Backend> Mlp<B> {
    pub fn new(device: &B::Device) -> Self {
        Self::from(PlainMlp::new(device))
    }

    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let x = self.blocks.iter().fold(x, |x, block| relu(block.forward(x)));
        self.head.forward(self.norm.forward(x))
    }
}

impl<B: Backend> PlainMlp<B> {
    pub fn new(device: &B::Device) -> Self {
        Self {
            blocks: [(6, 8), (8, 7)]
                .map(|(d_input, d_output)| LinearConfig::new(d_input, d_output).init(device))
                .into(),
            norm: LayerNormConfig::new(7).init(device),
            head: LinearConfig::new(7, 3).with_bias(false).init(device),
        }
    }

    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let x = self.blocks.iter().fold(x, |x, block| relu(block.forward(x)));
        self.head.forward(self.norm.forward(x))
    }
}

impl<B: Backend> From<PlainMlp<B>> for Mlp<B> {
    fn from(plain: PlainMlp<B>) -> Self {
        Self {
            blocks: plain.blocks.into_iter().map(Into::into).collect(),
            norm: plain.norm,
            head: plain.head.into(),
        }
    }
}

/// The model with weights that are the same each time.
pub fn filled<B: Backend, M: Module<B>>(model: M) -> M {
    struct Fill(u64);
    impl<B: Backend> ModuleMapper<B> for Fill {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            self.0 += 1;
            let (dims, device) = (param.dims(), param.device());
            let values = Matrix::random(1, dims.iter().product(), self.0);
            param.map(|it| values.tensor(dims, &device).set_require_grad(it.is_require_grad()))
        }
    }
    model.map(&mut Fill(0))
}

/// So many random cases; half of them on a GPU backend, which compiles kernels for each.
pub fn random_cases(count: u32) -> proptest::test_runner::Config {
    let count = if cfg!(feature = "wgpu") { count / 2 } else { count };
    proptest::test_runner::Config::with_cases(count)
}

/// A layer with the weights and the adapter of `problem`. `alpha` and `scaling` must give its scale.
pub fn layer<B: Backend>(
    problem: &Problem,
    alpha: f64,
    scaling: burn_lora::Scaling,
) -> LoraLinear<B> {
    let device = device::<B>();
    let [d_input, rank, d_output] = [problem.a.rows, problem.a.cols, problem.b.cols];
    let row = |it: &Matrix| Param::from_tensor(it.tensor([d_output], &device));
    let base = Linear {
        weight: Param::from_tensor(problem.w.tensor([d_input, d_output], &device)),
        bias: problem.bias.as_ref().map(row),
    };
    let (a, b) =
        (problem.a.tensor([d_input, rank], &device), problem.b.tensor([rank, d_output], &device));
    let mut adapter = burn_lora::LoraAdapter::new(a, b, alpha, scaling);
    adapter.bias = problem.adapter_bias.as_ref().map(row);
    assert!((adapter.scale() - problem.scale).abs() < 1e-12);
    let mut layer = LoraLinear::from(base);
    layer.set_adapter(Some(adapter));
    layer
}
