use std::{ops::Range, sync::Arc};

use burn::tensor::backend::Backend;

use super::{Inputs, Update, share};
use crate::{
    layer::LoraLinear,
    ops::{HostWeight, OnHost, run, slices},
    quantized::Weight,
    tensors::at_least_f32,
};

/// The ranks of an update that a thread takes at once.
const FEW_RANKS: usize = 4;

/// A linear layer in the memory of the host. It shares the weight's memory with the layer that it was made of.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Arc<dyn HostWeight>,
    bias: Option<Vec<f32>>,
    /// The adapter that it had.
    own: Option<Arc<Update>>,
}

impl Linear {
    /// The layer, with its adapter. `None` on other backends than those of the features `flex` and `ndarray`, if its
    /// numbers are of another type than `f32` or quantized, or if its adapter has [DoRA](crate::LoraConfig::dora)'s
    /// magnitudes. `halves` is as in [`Update::of`].
    pub fn of<B: Backend>(layer: &LoraLinear<B>, halves: bool) -> Option<Self> {
        if layer.is_mixed() {
            return None;
        }
        let bias = layer.base.bias.as_ref().map(|it| {
            let data = at_least_f32(it.val()).into_data().convert::<f32>();
            data.into_vec().expect("it was converted")
        });
        let own = match layer.adapter() {
            Some(adapter) => Some(Arc::new(Update::of(adapter, halves)?)),
            None => None,
        };
        Some(Self { weight: on_host(&layer.base_weight())?, bias, own })
    }

    pub(super) fn of_weight(weight: Arc<dyn HostWeight>) -> Self {
        Self { weight, bias: None, own: None }
    }

    /// `[d_input, d_output]`
    pub fn dims(&self) -> [usize; 2] {
        self.weight.dims()
    }

    pub(super) fn with_own(self, own: Option<Update>) -> Self {
        Self { own: own.map(Arc::new), ..self }
    }

    pub(super) fn weight(&self) -> &dyn HostWeight {
        &*self.weight
    }
}

pub(super) fn on_host<B: Backend>(weight: &Weight<B>) -> Option<Arc<dyn HostWeight>> {
    run::<OnHost, B>(weight)
}

/// The updates of a row: the layer's own, and that of its set.
type Updates<'a> = [Option<&'a Update>; 2];

/// Applies layers to the same rows: `[rows, d_input]` to `[rows, d_output]` for each. `updates` has the update of a layer
/// for a row, of which both are numbers; it is added to the adapter that the layer has.
///
/// The layers' outputs are shared among the cores together, which wait for each other once.
///
/// # Panics
///
/// If the rows, an output or an update does not fit the layer.
pub fn forward<'a, const N: usize>(
    layers: [&'a Linear; N],
    x: &Inputs,
    updates: impl Fn(usize, usize) -> Option<&'a Update>,
    outputs: [&mut [f32]; N],
) {
    let mut jobs = Vec::new();
    let (rows, mut work) = (x.rows(), 0);
    for (place, (layer, y)) in layers.iter().zip(outputs).enumerate() {
        let [d_input, d_output] = layer.dims();
        assert!(
            x.width() == d_input && y.len() == rows * d_output,
            "the layer takes [{rows}, {d_input}] to [{rows}, {d_output}], got {} numbers to a row, and {} outputs",
            x.width(),
            y.len(),
        );
        let of_row = |row: usize| [layer.own.as_deref(), updates(place, row)];
        let hidden = Hidden::new((0..rows).map(of_row), x, layer.dims());
        if layer.weight.is_in_bf16() && x.few() < rows {
            let many = x.few()..rows;
            let numbers = &x.numbers()[many.start * d_input..];
            layer.weight.times_in_bf16(numbers, &mut y[many.start * d_output..]);
        }
        work += rows * d_input * d_output;
        let outputs = y.chunks_exact_mut(d_output).collect();
        jobs.push(Job { layer, hidden, outputs });
    }
    share(shared_out(jobs), work, |parts| parts.into_iter().for_each(|it| it.run(x)));
}

/// What is multiplied with the factors B of some rows' updates.
struct Hidden<'a> {
    numbers: Vec<f32>,
    /// The updates of each row, and where their numbers begin.
    rows: Vec<(Updates<'a>, usize)>,
}

impl<'a> Hidden<'a> {
    fn new(updates: impl Iterator<Item = Updates<'a>>, x: &Inputs, dims: [usize; 2]) -> Self {
        let (mut rows, mut count) = (Vec::with_capacity(x.rows()), 0);
        for updates in updates {
            rows.push((updates, count));
            for update in updates.into_iter().flatten() {
                let found = update.dims();
                assert!(found == dims, "an update for {dims:?} expected, got {found:?}");
                count += update.rank();
            }
        }
        let mut numbers = vec![0.0; count];
        let (mut rest, mut jobs) = (&mut numbers[..], Vec::new());
        // A single row is shared out, too.
        let ranks = if x.rows() == 1 { FEW_RANKS } else { usize::MAX };
        for (row, (updates, _)) in rows.iter().enumerate() {
            for update in updates.iter().copied().flatten() {
                let hidden;
                (hidden, rest) = rest.split_at_mut(update.rank());
                let parts = hidden.chunks_mut(ranks).enumerate();
                jobs.extend(parts.map(|(part, hidden)| (update, row, part * ranks, hidden)));
            }
        }
        // What takes the time is the memory that is read.
        share(jobs, 4 * count * dims[0], |(update, row, first, hidden)| {
            update.hidden(x.row(row), first, hidden);
        });
        Self { numbers, rows }
    }

    /// Adds the bias and the updates to outputs of a row, from `start` on.
    fn finish(&self, layer: &Linear, row: usize, start: usize, y: &mut [f32]) {
        if let Some(bias) = &layer.bias {
            slices::add_scaled(y, 1.0, &bias[start..][..y.len()]);
        }
        let (updates, mut place) = self.rows[row];
        for update in updates.into_iter().flatten() {
            update.add(&self.numbers[place..][..update.rank()], start, y);
            place += update.rank();
        }
    }
}

/// The outputs of a layer.
struct Job<'a, 'y> {
    layer: &'a Linear,
    hidden: Hidden<'a>,
    /// Of each row.
    outputs: Vec<&'y mut [f32]>,
}

/// A part of them.
struct Part<'a, 'y> {
    layer: &'a Linear,
    hidden: Arc<Hidden<'a>>,
    range: Range<usize>,
    outputs: Vec<&'y mut [f32]>,
}

/// Shares the outputs of all layers out evenly.
fn shared_out<'a, 'y>(jobs: Vec<Job<'a, 'y>>) -> Vec<Vec<Part<'a, 'y>>> {
    /// So many for each thread, since some threads are faster than others at times.
    const EACH: usize = 4;

    let work = |layer: &Linear, count: usize| count * layer.dims()[0];
    let total: usize = jobs.iter().map(|it| work(it.layer, it.layer.dims()[1])).sum();
    let each = total.div_ceil(EACH * rayon::current_num_threads()).max(1);
    let (mut all, mut current, mut room) = (Vec::new(), Vec::new(), each);
    for Job { layer, hidden, mut outputs } in jobs {
        let ([d_input, d_output], hidden, mut start) = (layer.dims(), Arc::new(hidden), 0);
        while start < d_output {
            let count = room.div_ceil(d_input).clamp(1, d_output - start);
            let mut taken = Vec::with_capacity(outputs.len());
            outputs = outputs
                .into_iter()
                .map(|it| {
                    let (first, rest) = it.split_at_mut(count);
                    taken.push(first);
                    rest
                })
                .collect();
            let range = start..start + count;
            current.push(Part { layer, hidden: hidden.clone(), range, outputs: taken });
            start += count;
            room = room.saturating_sub(count * d_input);
            if room == 0 {
                all.push(std::mem::take(&mut current));
                room = each;
            }
        }
    }
    if !current.is_empty() {
        all.push(current);
    }
    all
}

impl Part<'_, '_> {
    fn run(mut self, x: &Inputs) {
        let weight = &self.layer.weight;
        let (few, many) = self.outputs.split_at_mut(x.few());
        match x.rounded().filter(|_| weight.is_packed()) {
            Some(rounded) => weight.times_rounded(rounded, self.range.clone(), few),
            None => {
                let numbers = &x.numbers()[..x.few() * x.width()];
                weight.times_few(numbers, self.range.clone(), few);
            }
        }
        if !many.is_empty() && !weight.is_in_bf16() {
            weight.times_many(x.many(), self.range.clone(), many);
        }
        for (row, y) in self.outputs.iter_mut().enumerate() {
            self.hidden.finish(self.layer, row, self.range.start, y);
        }
    }
}
