use burn::tensor::{Tensor, TensorData, backend::Backend};

use crate::{
    adapter::{LoraAdapter, Tie},
    ops::slices,
    tensors::at_least_f32,
};

/// What an adapter adds to the output of a layer, `s·((x·A)·B + bias)`, in the memory of the host. The factors are copied.
#[derive(Clone, Debug)]
pub struct Update {
    rank: usize,
    scale: f32,
    /// A transposed: `[rank, d_input]`.
    a: Factor,
    /// `[rank, d_output]`
    b: Factor,
    /// `s·bias`: `[d_output]`.
    bias: Option<Vec<f32>>,
}

/// The numbers of a factor.
#[derive(Clone, Debug)]
enum Factor {
    Full(Vec<f32>),
    /// In half precision.
    Halves(Vec<[u8; 2]>),
}

impl Update {
    /// The update of a linear layer. `None` with [DoRA](crate::LoraConfig::dora)'s magnitudes, which change the layer itself.
    ///
    /// With `halves`, the factors are rounded to half precision: a step reads all of them from memory, and that is what they
    /// cost. Their numbers are then off by at most 1/2048 of themselves, or less than 2⁻²⁴ of the largest one. Factors that are
    /// not finite stay as they are.
    pub fn of<B: Backend>(adapter: &LoraAdapter<B>, halves: bool) -> Option<Self> {
        Self::by(adapter, halves, |[a, b]| [a.transpose(), b])
    }

    /// The update of what is looked up in a table of embeddings, for which A is looked up, too: `s·A[row]·B`.
    pub(super) fn of_lookup<B: Backend>(adapter: &LoraAdapter<B>, halves: bool) -> Option<Self> {
        Self::by(adapter, halves, |factors| factors)
    }

    /// The update of the same table as a projection, `s·(x·Bᵀ)·Aᵀ`. `Some(None)` if the adapter leaves the projection as
    /// it is.
    pub(super) fn of_projection<B: Backend>(
        adapter: &LoraAdapter<B>,
        halves: bool,
    ) -> Option<Option<Self>> {
        match adapter.tie {
            Tie::Leaves => adapter.magnitude.is_none().then_some(None),
            _ => Self::by(adapter, halves, |[a, b]| [b, a.transpose()]).map(Some),
        }
    }

    fn by<B: Backend>(
        adapter: &LoraAdapter<B>,
        halves: bool,
        order: impl Fn([Tensor<B, 2>; 2]) -> [Tensor<B, 2>; 2],
    ) -> Option<Self> {
        if adapter.magnitude.is_some() {
            return None;
        }
        // What starts from the weight has twice the rank, with what is taken away at first.
        let [a, _] = adapter.factors();
        let rank = a.dims()[1];
        let factors = order(adapter.factors()).map(|it| numbers(at_least_f32(it).into_data()));
        let bias = adapter.bias_delta().map(|it| numbers(at_least_f32(it).into_data()));
        let mut scale = adapter.scale() as f32;
        let [a, b] = factors.map(|numbers| match halves {
            true => {
                let (halves, unit) = Factor::halves(numbers);
                scale *= unit;
                halves
            }
            false => Factor::Full(numbers),
        });
        Some(Self { rank, scale, a, b, bias })
    }

    /// `s·(x·A)`, to be added by [`add`](Self::add), from a rank on.
    pub(super) fn hidden(&self, x: &[f32], first: usize, hidden: &mut [f32]) {
        for (rank, hidden) in (first..).zip(hidden) {
            let numbers = rank * x.len()..(rank + 1) * x.len();
            *hidden = self.scale
                * match &self.a {
                    Factor::Full(a) => slices::dot(&a[numbers], x),
                    Factor::Halves(a) => slices::dot_of_halves(&a[numbers], x),
                };
        }
    }

    /// The same of a row of A, where this is an update of what is looked up.
    pub(super) fn looked_up(&self, row: usize) -> Vec<f32> {
        let mut hidden = vec![0.0; self.rank];
        let of_row = row * self.rank..(row + 1) * self.rank;
        match &self.a {
            Factor::Full(a) => slices::add_scaled(&mut hidden, self.scale, &a[of_row]),
            Factor::Halves(a) => slices::add_scaled_halves(&mut hidden, self.scale, &a[of_row]),
        }
        hidden
    }

    /// Adds `hidden·B` and the bias to the outputs from `start` on.
    pub(super) fn add(&self, hidden: &[f32], start: usize, y: &mut [f32]) {
        if let Some(bias) = &self.bias {
            slices::add_scaled(y, 1.0, &bias[start..][..y.len()]);
        }
        let d_output = self.b.len() / self.rank;
        for (rank, hidden) in hidden.iter().enumerate() {
            let numbers = rank * d_output + start..rank * d_output + start + y.len();
            match &self.b {
                Factor::Full(b) => slices::add_scaled(y, *hidden, &b[numbers]),
                Factor::Halves(b) => slices::add_scaled_halves(y, *hidden, &b[numbers]),
            }
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

impl Factor {
    fn len(&self) -> usize {
        match self {
            Self::Full(numbers) => numbers.len(),
            Self::Halves(numbers) => numbers.len(),
        }
    }

    /// The numbers divided by a power of two, so that the largest is in the middle of what half precision has, and that
    /// power.
    fn halves(mut numbers: Vec<f32>) -> (Self, f32) {
        let largest = numbers.iter().fold(0.0_f32, |largest, it| largest.max(it.abs()));
        if !largest.is_normal() || !numbers.iter().all(|it| it.is_finite()) {
            return (Self::Full(numbers), 1.0);
        }
        let unit = largest.log2().floor().exp2();
        numbers.iter_mut().for_each(|it| *it /= unit);
        (Self::Halves(slices::halves(&numbers)), unit)
    }
}

fn numbers(data: TensorData) -> Vec<f32> {
    data.convert::<f32>().into_vec().expect("it was converted")
}
