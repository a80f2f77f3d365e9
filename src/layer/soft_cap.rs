use burn::tensor::{Tensor, backend::Backend};

/// `cap·tanh(x/cap)`, element by element: nothing becomes larger than the cap, and what is small stays nearly as it is.
/// Gemma 2 does this to scores ([Gemma Team 2024](https://arxiv.org/abs/2408.00118)).
pub fn soft_cap<B: Backend, const D: usize>(x: Tensor<B, D>, cap: f64) -> Tensor<B, D> {
    (x / cap).tanh() * cap
}
