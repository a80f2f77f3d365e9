use burn::tensor::{
    DType, Tensor,
    activation::{quiet_softmax, softmax},
    backend::Backend,
};

use super::{AttentionMask, soft_cap as capped, swap_heads};
use crate::{
    ops::{Attend, Attention, run},
    precision::Precision,
};

/// How [`attention`] makes weights of products.
#[derive(Clone, Debug, Default)]
pub struct AttentionOptions {
    /// What the products of queries and keys are multiplied by. By default 1 divided by the root of a head's size.
    pub scale: Option<f64>,
    /// Caps the scores: s becomes `cap·tanh(s/cap)`. Gemma 2 does that.
    pub soft_cap: Option<f64>,
    /// Adds 1 to the sum of the exponentials, so that a head can attend to nothing ([Miller
    /// 2023](https://www.evanmiller.org/attention-is-off-by-one.html)). As Burn's
    /// [`quiet_softmax`](burn::tensor::activation::quiet_softmax) does.
    pub quiet: bool,
    /// The precision of the products, where this is one operation. In bf16, keys and values must be finite also where
    /// they are hidden: they are multiplied by 0.
    pub precision: Precision,
}

/// Attention ([Vaswani et al. 2017](https://arxiv.org/abs/1706.03762)): `softmax(scale·q·kᵀ)·v` for each head.
///
/// Queries are `[batch, length, heads, size]`, keys and values `[batch, total, shared, size]`, as projections give
/// them once their last dimension is split; nothing has to be permuted. If there are more heads of queries than of
/// keys, groups of them share one ([Ainslie et al. 2023](https://arxiv.org/abs/2305.13245)): head i reads the keys
/// of head `i·shared/heads`. The output is `[batch, length, heads, size]`. A query that sees nothing has the output
/// 0.
///
/// On the CPU backends of the features `flex` and `ndarray` this is one operation, in `f32`, that reads keys in
/// blocks ([Dao et al. 2022](https://arxiv.org/abs/2205.14135)). The scores are never there as a whole: memory
/// grows with the length, not with its square, and hidden keys cost no time. Queries and heads are shared among all
/// cores. In other types and on other backends the formula is composed of Burn's operations.
///
/// # Panics
///
/// If the shapes do not fit each other, or the mask.
pub fn attention<B: Backend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    mask: &AttentionMask<B>,
    options: &AttentionOptions,
) -> Tensor<B, 4> {
    let ([batch, length, heads, size], [_, total, shared, _]) = (q.dims(), k.dims());
    assert!(
        k.dims() == [batch, total, shared, size] && v.dims() == k.dims(),
        "keys and values of [{batch}, total, shared, {size}] expected for queries of {:?}, got {:?} and {:?}",
        q.dims(),
        k.dims(),
        v.dims(),
    );
    assert!(
        shared > 0 && heads.is_multiple_of(shared),
        "{heads} heads of queries cannot share {shared} heads of keys evenly"
    );
    assert!(
        mask.dims() == [length, total] && [1, batch].contains(&mask.texts()),
        "a mask for {batch} texts of {length} queries and {total} keys expected, got {} of {:?}",
        mask.texts(),
        mask.dims(),
    );
    if batch * length * total * size == 0 {
        return q.zeros_like();
    }
    let &AttentionOptions { scale, soft_cap, quiet, precision } = options;
    let scale = scale.unwrap_or(1.0 / (size as f64).sqrt());
    let input = Attention { q, k, v, ranges: mask.ranges(), scale, soft_cap, quiet, precision };
    run::<Attend, B>(&input).unwrap_or_else(|| composed(input, mask))
}

fn composed<B: Backend>(input: Attention<B>, mask: &AttentionMask<B>) -> Tensor<B, 4> {
    let Attention { q, k, v, scale, soft_cap, quiet, .. } = input;
    let ([batch, length, heads, size], [_, total, shared, _]) = (q.dims(), k.dims());
    let [q, k, v] = [q * scale, k, v].map(swap_heads);
    // The heads that share a head of keys go through one product with it.
    let group = [batch, shared, heads / shared * length, size];
    let scores = q.reshape(group).matmul(k.swap_dims(2, 3));
    let mut scores = scores.reshape([batch, heads, length, total]);
    if let Some(cap) = soft_cap {
        scores = capped(scores, cap);
    }
    let hidden = (!mask.hides_nothing()).then(|| mask.hidden(&scores.device()));
    if let Some((hidden, _)) = &hidden {
        // Finite, because the difference of two infinities is not a number.
        let low = if scores.dtype() == DType::F16 { -6e4 } else { -1e9 };
        scores = scores.mask_fill(hidden.clone(), low);
    }
    let mut weights = if quiet { quiet_softmax(scores, 3) } else { softmax(scores, 3) };
    if let Some((hidden, true)) = hidden {
        weights = weights.mask_fill(hidden, 0.0);
    }
    let weights = weights.reshape([batch, shared, heads / shared * length, total]);
    swap_heads(weights.matmul(v).reshape([batch, heads, length, size]))
}
