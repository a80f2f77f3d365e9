//! The policy: a small network that reads the state of the cart, and decides where to push.

use burn::{
    module::Module,
    nn::LinearConfig,
    tensor::{Tensor, TensorData, activation::tanh, backend::Backend},
};
use burn_lora::LoraLinear;

use crate::physics::State;

const HIDDEN: usize = 64;

/// A perceptron: 4 numbers, twice 64 hidden units, and a logit for each direction.
#[derive(Module, Debug)]
pub struct Policy<B: Backend> {
    fc1: LoraLinear<B>,
    fc2: LoraLinear<B>,
    head: LoraLinear<B>,
}

impl<B: Backend> Policy<B> {
    pub fn new(device: &B::Device) -> Self {
        let layer = |d_input, d_output| LinearConfig::new(d_input, d_output).init(device).into();
        Self { fc1: layer(4, HIDDEN), fc2: layer(HIDDEN, HIDDEN), head: layer(HIDDEN, 2) }
    }

    /// The logits of pushing to the left and to the right, for many carts at once: `[states, 2]`.
    pub fn logits(&self, states: &[State]) -> Tensor<B, 2> {
        let x = tanh(self.fc1.forward(stack(states)));
        let x = tanh(self.fc2.forward(x));
        self.head.forward(x)
    }
}

/// The states as rows of numbers of about the same size.
fn stack<B: Backend>(states: &[State]) -> Tensor<B, 2> {
    let rows = states.iter().flat_map(|state| {
        [state.position / 2.4, state.velocity / 2.0, state.angle / 0.21, state.spin / 2.0]
    });
    let values: Vec<f32> = rows.map(|value| value as f32).collect();
    Tensor::from_data(TensorData::new(values, [states.len(), 4]), &Default::default())
}
