use burn::tensor::{Tensor, TensorData, backend::Backend};

use crate::{LoraAdapter, adapter::Tie, ops::slices, tensors::at_least_f32};

/// What an adapter adds to the output of a layer, `s·((x·A)·B + bias)`, in the memory of the host. The factors are copied.
#[derive(Clone, Debug)]
pub struct Update {
    rank: usize,
    scale: f32,
    /// A transposed: `[rank, d_input]`.
    a: Vec<f32>,
    /// `[rank, d_output]`
    b: Vec<f32>,
    /// `s·bias`: `[d_output]`.
    bias: Option<Vec<f32>>,
}

impl Update {
    /// The update of a linear layer. `None` with [DoRA](crate::LoraConfig::dora)'s magnitudes, which change the layer itself.
    pub fn of<B: Backend>(adapter: &LoraAdapter<B>) -> Option<Self> {
        Self::by(adapter, |[a, b]| [a.transpose(), b])
    }

    /// The update of what is looked up in a table of embeddings, for which A is looked up, too: `s·A[row]·B`.
    pub(super) fn of_lookup<B: Backend>(adapter: &LoraAdapter<B>) -> Option<Self> {
        Self::by(adapter, |factors| factors)
    }

    /// The update of the same table as a projection, `s·(x·Bᵀ)·Aᵀ`. `Some(None)` if the adapter leaves the projection as
    /// it is.
    pub(super) fn of_projection<B: Backend>(adapter: &LoraAdapter<B>) -> Option<Option<Self>> {
        match adapter.tie {
            Tie::Leaves => adapter.magnitude.is_none().then_some(None),
            _ => Self::by(adapter, |[a, b]| [b, a.transpose()]).map(Some),
        }
    }

    fn by<B: Backend>(
        adapter: &LoraAdapter<B>,
        order: impl Fn([Tensor<B, 2>; 2]) -> [Tensor<B, 2>; 2],
    ) -> Option<Self> {
        if adapter.magnitude.is_some() {
            return None;
        }
        let [a, b] = order(adapter.factors()).map(|it| numbers(at_least_f32(it).into_data()));
        let bias = adapter.bias_delta().map(|it| numbers(at_least_f32(it).into_data()));
        Some(Self { rank: adapter.rank(), scale: adapter.scale() as f32, a, b, bias })
    }

    /// `s·(x·A)`, to be added by [`add`](Self::add): `[rank]`.
    pub(super) fn hidden(&self, x: &[f32], hidden: &mut Vec<f32>) {
        let columns = self.a.chunks_exact(x.len());
        hidden.extend(columns.map(|a| self.scale * slices::dot(a, x)));
    }

    /// The same of a row of A, where this is an update of what is looked up.
    pub(super) fn looked_up(&self, row: usize) -> impl Iterator<Item = f32> {
        self.a[row * self.rank..][..self.rank].iter().map(|a| self.scale * a)
    }

    /// Adds `hidden·B` and the bias to the outputs from `start` on.
    pub(super) fn add(&self, hidden: &[f32], start: usize, y: &mut [f32]) {
        if let Some(bias) = &self.bias {
            slices::add_scaled(y, 1.0, &bias[start..][..y.len()]);
        }
        let d_output = self.b.len() / self.rank;
        for (hidden, b) in hidden.iter().zip(self.b.chunks_exact(d_output)) {
            slices::add_scaled(y, *hidden, &b[start..][..y.len()]);
        }
    }

    /// The rank.
    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    /// What it is for: `[d_input, d_output]`.
    pub(super) fn dims(&self) -> [usize; 2] {
        [&self.a, &self.b].map(|it| it.len() / self.rank)
    }
}

fn numbers(data: TensorData) -> Vec<f32> {
    data.convert::<f32>().into_vec().expect("it was converted")
}
