//! One layer of a decoder on slices.

use burn::{nn::RmsNorm, tensor::backend::Backend};
use burn_lora::{
    LoraLinear,
    decode::{self, Gate, Heads, Inputs, Linear, Reading, Update},
};

use super::{Norm, has_halves, steps::Steps};
use crate::{
    config::{Activation, Design, LayerDesign, Norms, Span},
    llama::{Layer, matrices::place},
};

/// A layer.
#[derive(Debug)]
pub(super) struct HostLayer {
    of_layer: LayerDesign,
    heads: Heads,
    before_attention: Option<Norm>,
    projections: Projections<3>,
    queries_keys: [Option<Norm>; 2],
    output: Named,
    after_attention: Option<Norm>,
    before_mlp: Option<Norm>,
    gates: Projections<2>,
    down: Named,
    after_mlp: Option<Norm>,
}

/// A linear layer, and its place among those of a block.
#[derive(Debug)]
struct Named {
    linear: Linear,
    place: usize,
}

/// Layers with the same input.
#[derive(Debug)]
enum Projections<const N: usize> {
    Apart([Named; N]),
    /// All in one, one after the other.
    Fused(Named),
}

/// Memory that the next layer, and the next step, uses again. All are rows.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// What layers read and write: `[rows, hidden_size]`.
    pub x: Vec<f32>,
    /// What a linear layer reads.
    inputs: Inputs,
    /// What the next reads.
    next: Inputs,
    /// What linear layers write.
    outputs: [Vec<f32>; 3],
    fused: Vec<f32>,
    normed: Vec<f32>,
}

impl HostLayer {
    /// `None` as for [`Linear::of`].
    pub fn of<B: Backend>(
        layer: &Layer<B>,
        design: &Design,
        of_layer: LayerDesign,
        exact: bool,
    ) -> Option<Self> {
        let (attention, mlp) = (&layer.self_attn, &layer.mlp);
        let [queries, keys] = attention.widths();
        let size = attention.head_dim;
        let norm = |norm: &Option<RmsNorm<B>>| norm.as_ref().map(|it| Norm::of(it, design));
        let attended = Some(Norm::of(&layer.post_attention_layernorm, design));
        let (after_attention, before_mlp) = match design.norms {
            Norms::Before => (None, attended),
            Norms::After | Norms::Both => (attended, norm(&layer.pre_feedforward_layernorm)),
        };
        let (q, k, v) = (&attention.q_proj, &attention.k_proj, &attention.v_proj);
        let projections = [("q_proj", q), ("k_proj", k), ("v_proj", v)];
        let gates = [("gate_proj", &mlp.gate_proj), ("up_proj", &mlp.up_proj)];
        Some(Self {
            of_layer,
            heads: Heads {
                queries: queries / size,
                shared: keys / size,
                size,
                scale: design.score_scale as f32,
                soft_cap: design.score_cap.map(|it| it as f32),
                precision: attention.o_proj.precision(),
            },
            before_attention: norm(&layer.input_layernorm),
            projections: Projections::of(projections, "qkv_proj", &attention.qkv_proj, exact)?,
            queries_keys: [norm(&attention.q_norm), norm(&attention.k_norm)],
            output: Named::of("o_proj", &attention.o_proj, exact)?,
            after_attention,
            before_mlp,
            gates: Projections::of(gates, "gate_up_proj", &mlp.gate_up_proj, exact)?,
            down: Named::of("down_proj", &mlp.down_proj, exact)?,
            after_mlp: norm(&layer.post_feedforward_layernorm),
        })
    }

    /// Applies the layer to the rows in `buffers.x`, and adds their keys and values to the texts.
    pub fn forward(
        &self,
        index: usize,
        steps: &mut Steps,
        design: &Design,
        rounds: bool,
        buffers: &mut Buffers,
    ) {
        let (rows, few) = (steps.rows(), steps.few);
        let Buffers { x, inputs, next, outputs, fused, normed } = buffers;
        let width = x.len() / rows;
        let prepare = |inputs: &mut Inputs| inputs.prepare(few, rounds);
        let read = |norm: &Option<Norm>, x: &[f32], inputs: &mut Inputs| {
            inputs.resize(rows, width);
            match norm {
                Some(norm) => norm.apply(x, inputs.numbers_mut()),
                None => inputs.numbers_mut().copy_from_slice(x),
            }
            prepare(inputs);
        };
        let mut add = |norm: &Option<Norm>, y: &[f32], x: &mut [f32]| {
            let scale = design.residual_scale as f32;
            let Some(norm) = norm else { return decode::add_scaled(x, scale, y) };
            normed.resize(y.len(), 0.0);
            norm.apply(y, normed);
            decode::add_scaled(x, scale, normed);
        };

        read(&self.before_attention, x, inputs);
        let [queries, keys] =
            [self.heads.queries, self.heads.shared].map(|it| it * self.heads.size);
        let widths = [queries, keys, keys];
        self.projections.forward(index, steps, inputs, widths, outputs.each_mut(), fused);
        next.resize(rows, queries);
        self.attend(index, steps, design, outputs, next);
        prepare(next);
        let [y, ..] = &mut *outputs;
        self.output.forward(index, steps, next, y);
        add(&self.after_attention, y, x);

        read(&self.before_mlp, x, inputs);
        let [inner, _] = self.down.linear.dims();
        let [gate, up, _] = &mut *outputs;
        self.gates.forward(index, steps, inputs, [inner, inner], [gate, up], fused);
        let activation = match design.activation {
            Activation::Silu => Gate::Silu,
            Activation::GeluTanh => Gate::GeluTanh,
        };
        decode::gate(gate, up, activation);
        next.resize(rows, inner);
        next.numbers_mut().copy_from_slice(gate);
        prepare(next);
        self.down.forward(index, steps, next, up);
        add(&self.after_mlp, up, x);
    }

    /// Attention with these queries, keys and values.
    fn attend(
        &self,
        index: usize,
        steps: &mut Steps,
        design: &Design,
        [q, k, v]: &mut [Vec<f32>; 3],
        to: &mut Inputs,
    ) {
        let size = self.heads.size;
        for (numbers, norm) in [&mut *q, &mut *k].into_iter().zip(&self.queries_keys) {
            let width = numbers.len() / steps.rows();
            if let Some(norm) = norm {
                debug_assert_eq!(
                    norm.weight.len(),
                    match design.queries_and_keys {
                        Some(Span::Token) => width,
                        _ => size,
                    }
                );
                let before = numbers.clone();
                norm.apply(&before, numbers);
            }
            let Some(rope) = self.of_layer.rope else { continue };
            for (row, heads) in numbers.chunks_exact_mut(width).enumerate() {
                let [cos, sin] = steps.turns(rope, row);
                decode::rotate(heads, size, cos, sin);
            }
        }
        let window = design.windows[self.of_layer.window];
        let [queries, keys] = [self.heads.queries, self.heads.shared].map(|it| it * size);
        let mut outputs = to.numbers_mut();
        let readings = steps.parts.iter_mut().map(|part| {
            let rows = part.rows.clone();
            let of = |width: usize| rows.start * width..rows.end * width;
            let new = [&k[of(keys)], &v[of(keys)]];
            let [k, v] = part.step.text.add(index, keys, new);
            let y;
            (y, outputs) = std::mem::take(&mut outputs).split_at_mut(rows.len() * queries);
            Reading { q: &q[of(queries)], k, v, is_single: part.is_single, window, y }
        });
        decode::attend(&self.heads, readings.collect());
    }
}

impl Named {
    fn of<B: Backend>(name: &str, layer: &LoraLinear<B>, exact: bool) -> Option<Self> {
        Some(Self {
            linear: Linear::of(layer, has_halves(layer.quantized(), exact))?,
            place: place(name),
        })
    }

    fn forward(&self, index: usize, steps: &Steps, x: &Inputs, y: &mut Vec<f32>) {
        forward(index, steps, x, [self], [y]);
    }
}

impl<const N: usize> Projections<N> {
    fn of<B: Backend>(
        apart: [(&str, &Option<LoraLinear<B>>); N],
        name: &str,
        fused: &Option<LoraLinear<B>>,
        exact: bool,
    ) -> Option<Self> {
        if let Some(fused) = fused {
            return Some(Self::Fused(Named::of(name, fused, exact)?));
        }
        let layers = apart.map(|(name, layer)| Named::of(name, layer.as_ref()?, exact));
        let layers: Vec<_> = layers.into_iter().collect::<Option<_>>()?;
        Some(Self::Apart(layers.try_into().expect("there are as many")))
    }

    /// `widths` are the numbers of outputs of each.
    fn forward(
        &self,
        index: usize,
        steps: &Steps,
        x: &Inputs,
        widths: [usize; N],
        outputs: [&mut Vec<f32>; N],
        fused: &mut Vec<f32>,
    ) {
        match self {
            Self::Apart(layers) => forward(index, steps, x, layers.each_ref(), outputs),
            Self::Fused(layer) => {
                layer.forward(index, steps, x, fused);
                let mut start = 0;
                for (output, width) in outputs.into_iter().zip(widths) {
                    output.clear();
                    let rows = fused.chunks_exact(fused.len() / x.rows());
                    rows.for_each(|row| output.extend_from_slice(&row[start..start + width]));
                    start += width;
                }
            }
        }
    }
}

/// Applies linear layers to the rows, with the adapters of their texts.
fn forward<const N: usize>(
    index: usize,
    steps: &Steps,
    x: &Inputs,
    layers: [&Named; N],
    outputs: [&mut Vec<f32>; N],
) {
    let update = |number: usize, row: usize| -> Option<&Update> {
        steps.set(row)?.layers[index][layers[number].place].as_ref()
    };
    let mut layers_of = layers.iter();
    let outputs = outputs.map(|output| {
        let [_, d_output] = layers_of.next().expect("there are as many").linear.dims();
        output.resize(x.rows() * d_output, 0.0);
        &mut output[..]
    });
    decode::forward(layers.map(|it| &it.linear), x, update, outputs);
}
