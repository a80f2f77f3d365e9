use burn::tensor::{Tensor, backend::Backend};

use crate::ops::{Rotate, Rotation, run};

/// Rotary embeddings ([Su et al. 2021](https://arxiv.org/abs/2104.09864)), as Hugging Face's Llama has them: pairs of
/// numbers of each head are turned by an angle that grows with the position of the token, so that the product of a
/// query and a key depends on their distance.
///
/// `x` is `[batch, length, heads, size]`. `cos` and `sin` are those of the angles, `[batch or 1, length, pairs]`, in
/// radians. Number i of a head is turned with number i + pairs; those from 2·pairs on stay as they are.
///
/// On the CPU backends of the features `flex` and `ndarray` it is one operation, in `f32`, that uses all cores.
/// Gradients reach `x` alone.
///
/// # Panics
///
/// If the shapes do not fit each other.
pub fn rotate<B: Backend>(x: Tensor<B, 4>, cos: Tensor<B, 3>, sin: Tensor<B, 3>) -> Tensor<B, 4> {
    let ([batch, length, heads, size], [texts, places, pairs]) = (x.dims(), cos.dims());
    assert!(
        cos.dims() == sin.dims()
            && [1, batch].contains(&texts)
            && places == length
            && 2 * pairs <= size,
        "cosines and sines of [1 or {batch}, {length}, up to {}] expected, got {:?} and {:?}",
        size / 2,
        cos.dims(),
        sin.dims(),
    );
    let input = Rotation { x, cos: cos.detach(), sin: sin.detach() };
    run::<Rotate, B>(&input).unwrap_or_else(|| {
        let Rotation { x, cos, sin } = input;
        if x.shape().num_elements() * pairs == 0 {
            return x;
        }
        let [cos, sin] = [cos, sin].map(|it| it.unsqueeze_dim::<4>(2));
        let left = x.clone().narrow(3, 0, pairs);
        let right = x.clone().narrow(3, pairs, pairs);
        let mut parts = vec![
            left.clone() * cos.clone() - right.clone() * sin.clone(),
            right * cos + left * sin,
        ];
        if 2 * pairs < size {
            parts.push(x.narrow(3, 2 * pairs, size - 2 * pairs));
        }
        Tensor::cat(parts, 3).reshape([batch, length, heads, size])
    })
}
