use burn::{
    module::{Param, ParamId},
    nn::{GroupNorm, LayerNorm, RmsNorm},
    tensor::{DType, Tensor, backend::Backend},
};

use crate::ops::{Norm, Normalize, run, runs_on};

/// What `norm.forward(x)` computes: `[..., d_model]` to the same, each vector divided by its root mean square
/// ([Zhang and Sennrich 2019](https://arxiv.org/abs/1910.07467)).
///
/// On the CPU backends of the features `flex` and `ndarray` it is one operation, in `f32`, that uses all cores, and
/// goes over the numbers once in each direction.
///
/// # Panics
///
/// If the last dimension is not the norm's.
pub fn rms_norm<B: Backend, const D: usize>(norm: &RmsNorm<B>, x: Tensor<B, D>) -> Tensor<B, D> {
    let gamma = Some(norm.gamma.val());
    vectors(x.clone(), gamma, None, norm.epsilon, false).unwrap_or_else(|| norm.forward(x))
}

/// What `norm.forward(x)` computes: `[..., d_model]` to the same, each vector minus its mean and divided by its
/// deviation ([Ba et al. 2016](https://arxiv.org/abs/1607.06450)).
///
/// On the CPU backends of the features `flex` and `ndarray` it is one operation, like [`rms_norm`].
///
/// # Panics
///
/// If the last dimension is not the norm's.
pub fn layer_norm<B: Backend, const D: usize>(
    norm: &LayerNorm<B>,
    x: Tensor<B, D>,
) -> Tensor<B, D> {
    if !runs_on::<B>() || x.dtype() != DType::F32 {
        return norm.forward(x);
    }
    let (gamma, beta) = (Some(norm.gamma.val()), norm.beta.as_ref().map(Param::val));
    vectors(x.clone(), gamma, beta, epsilon_of(norm), true).unwrap_or_else(|| norm.forward(x))
}

/// Burn keeps it private. The norm of `[t, -t]` is `t / sqrt(t² + epsilon)`, and t is so small that the square does
/// not count.
fn epsilon_of<B: Backend>(norm: &LayerNorm<B>) -> f64 {
    const T: f64 = 1e-12;
    let mut plain = norm.clone();
    let device = norm.gamma.lazy_device();
    plain.gamma = Param::initialized(ParamId::new(), Tensor::ones([2], (&device, DType::F32)));
    plain.beta = None;
    let pair = Tensor::<B, 2>::from_data([[T as f32, -T as f32]], (&device, DType::F32));
    let normed = plain.forward(pair).into_data().iter::<f64>().next().expect("there are two");
    (T / normed).powi(2) - T * T
}

/// What `norm.forward(x)` computes: `[batch, channels, ...]` to the same, each group of channels of an image minus
/// its mean and divided by its deviation ([Wu and He 2018](https://arxiv.org/abs/1803.08494)).
///
/// On the CPU backends of the features `flex` and `ndarray` it is one operation, like [`rms_norm`]. Burn's own takes
/// most of the time of a residual network on `flex`, in sums and products with `[1, channels, 1, 1]`.
///
/// # Panics
///
/// If the input has another number of channels.
pub fn group_norm<B: Backend, const D: usize>(
    norm: &GroupNorm<B>,
    x: Tensor<B, D>,
) -> Tensor<B, D> {
    let (channels, shape) = (norm.num_channels, x.dims());
    let [gamma, beta] = [&norm.gamma, &norm.beta].map(|it| it.as_ref().map(Param::val));
    let complete = norm.affine == (gamma.is_some() && beta.is_some());
    let normalized = (D >= 3 && shape[1] == channels && complete).then(|| {
        run::<Normalize<D>, B>(&Norm {
            x: x.clone(),
            gamma,
            beta,
            groups: norm.num_groups,
            channels,
            spread: shape[2..].iter().product(),
            centered: true,
            epsilon: norm.epsilon,
        })
    });
    normalized.flatten().unwrap_or_else(|| norm.forward(x))
}

fn vectors<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    gamma: Option<Tensor<B, 1>>,
    beta: Option<Tensor<B, 1>>,
    epsilon: f64,
    centered: bool,
) -> Option<Tensor<B, D>> {
    let channels = x.dims()[D - 1];
    run::<Normalize<D>, B>(&Norm {
        x,
        gamma,
        beta,
        groups: 1,
        channels,
        spread: 1,
        centered,
        epsilon,
    })
}
