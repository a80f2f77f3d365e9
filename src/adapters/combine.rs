//! Scaling and adding sets of adapters, and merging them by published methods.

use std::collections::BTreeMap;

use burn::{
    module::Param,
    nn::Dropout,
    tensor::{Tensor, TensorData, backend::Backend},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{Approximation, LoraAdapters, low_rank, peft_targets::Targets};
use crate::{
    adapter::LoraAdapter,
    config::{Scaling, fnv1a},
    error::LoraError,
    tensors::frozen,
};

/// How [`LoraAdapters::combine`] forms one adapter from several, for each layer.
///
/// Only [`Concatenate`](Self::Concatenate) adds the updates exactly. The others merge the factors A and
/// the factors B separately, as PEFT does. They need equal ranks, and keep that rank. They are
/// approximations, because the product of two sums is not the sum of the products.
/// [`LoraAdapters::combine_dense`] merges the updates themselves by the same methods.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Combination {
    /// The exact weighted sum of the updates. The factors are concatenated, so the ranks add up.
    Concatenate,
    /// The weighted sums of the factors: PEFT's "linear". A and B are each weighted by the square root
    /// of the adapter's weight times its scale.
    Linear,
    /// TIES ([Yadav et al. 2023](https://arxiv.org/abs/2306.01708)): of each factor only the largest
    /// elements are kept. Where their signs differ, only those with the sign of their sum are merged.
    Ties {
        /// The share of elements to keep, in `(0, 1]`.
        density: f64,
    },
    /// The same, where the signs differ, with the sign that more of the elements have, however large they are: PEFT's
    /// `majority_sign_method="frequency"`. Of as many of both signs, the positive ones are merged.
    TiesByCount {
        /// The share of elements to keep, in `(0, 1]`.
        density: f64,
    },
    /// Of each factor only the largest elements are kept, and then added: PEFT's "magnitude_prune".
    MagnitudePrune {
        /// The share of elements to keep, in `(0, 1]`.
        density: f64,
    },
    /// DARE ([Yu et al. 2023](https://arxiv.org/abs/2311.03099)): before the factors are added, elements
    /// are dropped at random, and the others are divided by `density`.
    Dare {
        /// The probability with which an element is kept, in `(0, 1]`.
        density: f64,
        /// The seed of the random choice.
        seed: u64,
    },
    /// Drops elements as DARE does, and then merges by sign as TIES does.
    DareTies {
        /// The probability with which an element is kept, in `(0, 1]`.
        density: f64,
        /// The seed of the random choice.
        seed: u64,
    },
    /// Drops elements as DARE does, and then merges by sign as [`TiesByCount`](Self::TiesByCount) does.
    DareTiesByCount {
        /// The probability with which an element is kept, in `(0, 1]`.
        density: f64,
        /// The seed of the random choice.
        seed: u64,
    },
}

impl Combination {
    /// An error if the density is none.
    fn check(self) -> Result<(), LoraError> {
        let density = match self {
            Self::Concatenate | Self::Linear => return Ok(()),
            Self::Ties { density }
            | Self::TiesByCount { density }
            | Self::MagnitudePrune { density }
            | Self::Dare { density, .. }
            | Self::DareTies { density, .. }
            | Self::DareTiesByCount { density, .. } => density,
        };
        if density > 0.0 && density <= 1.0 {
            return Ok(());
        }
        let problem = format!("is {density}, and must be in (0, 1]");
        Err(LoraError::InvalidArgument { argument: "density", problem })
    }
}

impl<B: Backend> LoraAdapters<B> {
    /// The adapters with all updates multiplied by `by`. Only alpha changes, so A and B are not rounded.
    /// A negative number subtracts the updates. Parameters that were trained in full stay as they are, and so
    /// do the magnitudes of [DoRA](crate::LoraConfig::dora), with which it is `A·B` that is multiplied.
    pub fn scaled(&self, by: f64) -> Self {
        let mut set = self.clone();
        for adapter in set.adapters.values_mut() {
            adapter.alpha *= by;
        }
        set
    }

    /// The adapters alone, without the parameters that were trained in full, such as a new head.
    pub fn without_modules_to_save(&self) -> Self {
        let targets = self.targets.clone().map(Targets::without_modules_to_save);
        let (extras, modules_to_save) = Default::default();
        Self { extras, modules_to_save, targets, ..self.clone() }
    }

    /// These adapters with the parameters that were trained in full along with `other`, in place of those that they
    /// have.
    pub fn with_modules_to_save_of(&self, other: &Self) -> Self {
        let (extras, modules_to_save) = (other.extras.clone(), other.modules_to_save.clone());
        Self { extras, modules_to_save, ..self.without_modules_to_save() }
    }

    /// Combines several sets, each with a weight, into one: for each layer the weighted sum of the
    /// updates, or another [`Combination`]. If only some of the sets adapt a layer, those are combined.
    ///
    /// ```
    /// # fn main() -> Result<(), burn_lora::LoraError> {
    /// use burn::{backend::Flex, tensor::Tensor};
    /// use burn_lora::{LoraAdapter, LoraAdapters, Scaling, adapters::Combination};
    ///
    /// let device = Default::default();
    /// let set = |value: f32| {
    ///     let a = Tensor::<Flex, 2>::full([4, 2], value, &device);
    ///     let b = Tensor::full([2, 3], value, &device);
    ///     LoraAdapters::new([("fc", LoraAdapter::new(a, b, 1.0, Scaling::Alpha))])
    /// };
    /// let (one, two) = (set(1.0), set(2.0));
    /// let sum = LoraAdapters::combine(&[(&one, 0.5), (&two, 0.25)], Combination::Concatenate)?;
    /// assert_eq!(sum.get("fc").unwrap().rank(), 4);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Parameters that were trained in full cannot be added. Leave them out by
    /// [`without_modules_to_save`](Self::without_modules_to_save), and take those of one of the sets by
    /// [`with_modules_to_save_of`](Self::with_modules_to_save_of).
    ///
    /// # Errors
    ///
    /// [`LoraError::Incompatible`] if adapters of one layer have different shapes or layouts, or
    /// different ranks unless `how` is [`Combination::Concatenate`]; if a set has parameters that were
    /// trained in full. [`LoraError::InvalidArgument`] if a weight is not finite, or
    /// a density is not in `(0, 1]`.
    pub fn combine(parts: &[(&Self, f64)], how: Combination) -> Result<Self, LoraError> {
        how.check()?;
        let ranks_may_differ = how == Combination::Concatenate;
        layer_by_layer(parts, ranks_may_differ, |path, parts| match how {
            Combination::Concatenate => concatenate(parts),
            how => factorwise(parts, how, path),
        })
    }

    /// Combines several sets like [`combine`](Self::combine), but merges the dense updates in place of their factors,
    /// and then takes the best approximation by adapters of `rank`: PEFT's "svd" (from
    /// [`Combination::Linear`] or [`Concatenate`](Combination::Concatenate), which are the same here), "ties_svd",
    /// "dare_linear_svd", "dare_ties_svd" and "magnitude_prune_svd". The ranks of the sets may differ. Without a rank,
    /// it is the largest of theirs.
    ///
    /// For the methods that drop elements, the update of each layer exists as a dense matrix, for one layer at a time.
    ///
    /// ```
    /// # fn main() -> Result<(), burn_lora::LoraError> {
    /// use burn::{backend::Flex, tensor::Tensor};
    /// use burn_lora::{LoraAdapter, LoraAdapters, Scaling, adapters::Combination};
    ///
    /// let device = Default::default();
    /// let set = |rank: usize, value: f32| {
    ///     let a = Tensor::<Flex, 2>::full([4, rank], value, &device);
    ///     let b = Tensor::full([rank, 3], value, &device);
    ///     LoraAdapters::new([("fc", LoraAdapter::new(a, b, 1.0, Scaling::Alpha))])
    /// };
    /// let (one, two) = (set(1, 1.0), set(2, -0.5));
    /// let how = Combination::Ties { density: 0.5 };
    /// let merged = LoraAdapters::combine_dense(&[(&one, 0.5), (&two, 0.5)], how, None)?;
    /// assert_eq!(merged.adapters.get("fc").unwrap().rank(), 2);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As for [`combine`](Self::combine), except that ranks may differ; and if `rank` is 0.
    ///
    /// # Panics
    ///
    /// If an adapter holds NaN or infinite values.
    pub fn combine_dense(
        parts: &[(&Self, f64)],
        how: Combination,
        rank: Option<usize>,
    ) -> Result<Approximation<B>, LoraError> {
        how.check()?;
        if rank == Some(0) {
            let problem = "is 0, and must be at least 1".to_owned();
            return Err(LoraError::InvalidArgument { argument: "rank", problem });
        }
        let ranks = parts.iter().flat_map(|(set, _)| set.adapters.values().map(|it| it.rank()));
        let rank = rank.or(ranks.max()).unwrap_or(1);
        let mut kept = BTreeMap::new();
        let adapters = layer_by_layer(parts, true, |path, parts| {
            let (adapter, share) = match how {
                Combination::Concatenate | Combination::Linear => {
                    low_rank::truncate(&concatenate(parts), rank)
                }
                how => densely(parts, how, path, rank),
            };
            kept.insert(path.to_owned(), share);
            adapter
        })?;
        Ok(Approximation { adapters, kept })
    }
}

/// The set of what `merge` makes of the adapters of each layer. Fails if they do not go together.
fn layer_by_layer<B: Backend>(
    parts: &[(&LoraAdapters<B>, f64)],
    ranks_may_differ: bool,
    mut merge: impl FnMut(&str, &[(&LoraAdapter<B>, f64)]) -> LoraAdapter<B>,
) -> Result<LoraAdapters<B>, LoraError> {
    let incompatible = |path: &str, problem: String| {
        Err(LoraError::Incompatible { path: path.to_owned(), problem })
    };
    for (set, weight) in parts {
        if !weight.is_finite() {
            let problem = format!("has {weight}, which is not finite");
            return Err(LoraError::InvalidArgument { argument: "weights", problem });
        }
        if let Some(name) = set.extras.keys().next() {
            let problem = "it was trained in full, and cannot be added: leave it out by \
                           `without_modules_to_save`, and take that of one of the sets by \
                           `with_modules_to_save_of`";
            return incompatible(name, problem.to_owned());
        }
    }
    let parts: Vec<_> = parts.iter().map(|(set, weight)| (set.standalone(), *weight)).collect();
    let mut paths: Vec<_> = parts.iter().flat_map(|(set, _)| set.adapters.keys()).collect();
    paths.sort();
    paths.dedup();
    let mut combined = Vec::new();
    for path in paths {
        let parts: Vec<_> =
            parts.iter().filter_map(|(set, weight)| Some((set.get(path)?, *weight))).collect();
        let first = parts[0].0;
        for (adapter, _) in &parts {
            if adapter.shape() != first.shape() {
                let shapes = (first.shape(), adapter.shape());
                return incompatible(path, format!("shapes differ: {shapes:?}"));
            }
            if !adapter.layout.fits(&first.layout) && !first.layout.fits(&adapter.layout) {
                let layouts = (&first.layout, &adapter.layout);
                return incompatible(path, format!("layouts differ: {layouts:?}"));
            }
            if adapter.tie != first.tie {
                let problem =
                    "some of the adapters move a head that is the same table, and others do not";
                return incompatible(path, problem.to_owned());
            }
            if adapter.magnitude.is_some() {
                let problem = "it has DoRA's magnitudes, which cannot be added";
                return incompatible(path, problem.to_owned());
            }
            if !ranks_may_differ && adapter.rank() != first.rank() {
                let ranks = (first.rank(), adapter.rank());
                let problem = format!(
                    "ranks differ: {ranks:?}; truncate, concatenate, or merge the dense updates by \
                     `combine_dense`"
                );
                return incompatible(path, problem);
            }
        }
        let mut adapter = merge(path, &parts);
        let dropout = parts.iter().map(|(it, _)| it.dropout.prob).fold(0.0, f64::max);
        adapter.dropout = Dropout { prob: dropout };
        adapter.layout = first.layout.clone();
        adapter.tie = first.tie;
        combined.push((path.clone(), adapter));
    }
    Ok(LoraAdapters::new(combined))
}

/// The weighted sum of the updates.
fn concatenate<B: Backend>(parts: &[(&LoraAdapter<B>, f64)]) -> LoraAdapter<B> {
    let scales: Vec<_> = parts.iter().map(|(adapter, weight)| adapter.scale() * weight).collect();
    // A common scale becomes the alpha of the sum, so that no factor has to be multiplied and rounded.
    let alpha = if scales.iter().all(|scale| *scale == scales[0]) { scales[0] } else { 1.0 };
    let own = |scale: f64| if alpha == scale { 1.0 } else { scale / alpha };
    let [a, b] = factors(parts);
    let b = b.into_iter().zip(&scales).map(|(b, scale)| times(b, own(*scale))).collect();
    let mut sum = LoraAdapter::new(Tensor::cat(a, 1), Tensor::cat(b, 0), alpha, Scaling::Alpha);
    let biases = parts.iter().zip(&scales).filter_map(|((adapter, _), scale)| {
        Some(times(frozen(adapter.bias.as_ref()?), own(*scale)))
    });
    sum.bias = biases.reduce(|sum, bias| sum + bias).map(Param::from_tensor);
    sum
}

/// The factors A and the factors B of all parts.
fn factors<B: Backend>(parts: &[(&LoraAdapter<B>, f64)]) -> [Vec<Tensor<B, 2>>; 2] {
    let factors = parts.iter().map(|(adapter, _)| adapter.constant_factors());
    let (a, b) = factors.map(|[a, b]| (a, b)).unzip();
    [a, b]
}

/// Merges the factors A and the factors B separately. Both factors of a part are weighted by the square
/// root of its weight times its scale. If that product is negative, the weight of A is negative.
fn factorwise<B: Backend>(
    parts: &[(&LoraAdapter<B>, f64)],
    how: Combination,
    path: &str,
) -> LoraAdapter<B> {
    let scales: Vec<_> = parts.iter().map(|(adapter, weight)| adapter.scale() * weight).collect();
    let for_a: Vec<_> = scales.iter().map(|it| it.abs().sqrt().copysign(*it)).collect();
    let for_b: Vec<_> = scales.iter().map(|it| it.abs().sqrt()).collect();
    let [a, b] = factors(parts);
    let (a, b) = (merge(a, &for_a, how, path, "A"), merge(b, &for_b, how, path, "B"));
    LoraAdapter { bias: biases(parts), ..LoraAdapter::new(a, b, 1.0, Scaling::Alpha) }
}

/// Merges the dense updates, and approximates the result. Returns the share of it that is kept, too.
fn densely<B: Backend>(
    parts: &[(&LoraAdapter<B>, f64)],
    how: Combination,
    path: &str,
    rank: usize,
) -> (LoraAdapter<B>, f64) {
    let (updates, weights): (Vec<_>, Vec<_>) =
        parts.iter().map(|(adapter, weight)| (adapter.delta(), *weight)).unzip();
    let (adapter, kept) = low_rank::extract(merge(updates, &weights, how, path, "update"), rank);
    (LoraAdapter { bias: biases(parts), ..adapter }, kept)
}

/// The weighted sum of the biases, for an adapter of scale 1. A bias is not a product of two factors, so it is added
/// with its whole weight.
fn biases<B: Backend>(parts: &[(&LoraAdapter<B>, f64)]) -> Option<Param<Tensor<B, 1>>> {
    let biases = parts.iter().filter_map(|(adapter, weight)| {
        Some(times(frozen(adapter.bias.as_ref()?), adapter.scale() * weight))
    });
    biases.reduce(|sum, bias| sum + bias).map(Param::from_tensor)
}

fn merge<B: Backend>(
    tensors: Vec<Tensor<B, 2>>,
    weights: &[f64],
    how: Combination,
    path: &str,
    what: &str,
) -> Tensor<B, 2> {
    let weighted = |tensors: Vec<Tensor<B, 2>>| {
        let weighted = tensors.into_iter().zip(weights);
        weighted.map(|(tensor, weight)| times(tensor, *weight)).reduce(|sum, it| sum + it)
    };
    let pruned = |tensors: Vec<Tensor<B, 2>>, prune: &dyn Fn(&mut [f32], usize)| {
        let tensors = tensors.into_iter().enumerate();
        tensors.map(|(part, it)| on_host(it, |values| prune(values, part))).collect::<Vec<_>>()
    };
    let drop = |density: f64, seed: u64| {
        move |values: &mut [f32], part: usize| {
            let stream = fnv1a(&format!("{path}.{what}.{part}"));
            drop_randomly(values, density, &mut StdRng::seed_from_u64(seed ^ stream));
        }
    };
    let keep = |density: f64| move |values: &mut [f32], _: usize| keep_largest(values, density);
    let merged = match how {
        Combination::Concatenate => unreachable!("it does not merge factors"),
        Combination::Linear => weighted(tensors),
        Combination::MagnitudePrune { density } => weighted(pruned(tensors, &keep(density))),
        Combination::Dare { density, seed } => weighted(pruned(tensors, &drop(density, seed))),
        Combination::Ties { density } => {
            Some(elect(pruned(tensors, &keep(density)), weights, |it| it))
        }
        Combination::TiesByCount { density } => {
            Some(elect(pruned(tensors, &keep(density)), weights, sign))
        }
        Combination::DareTies { density, seed } => {
            Some(elect(pruned(tensors, &drop(density, seed)), weights, |it| it))
        }
        Combination::DareTiesByCount { density, seed } => {
            Some(elect(pruned(tensors, &drop(density, seed)), weights, sign))
        }
    };
    merged.expect("a layer has at least one part")
}

/// Keeps the largest elements, whose share is `density`, and sets the others to zero.
fn keep_largest(values: &mut [f32], density: f64) {
    let keep = (density * values.len() as f64) as usize;
    let mut order: Vec<_> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[j].abs().total_cmp(&values[i].abs()));
    for &index in &order[keep..] {
        values[index] = 0.0;
    }
}

/// Keeps each element with probability `density`, and divides it by `density` to keep the mean.
fn drop_randomly(values: &mut [f32], density: f64, rng: &mut StdRng) {
    for value in values {
        *value = if rng.random_bool(density) { *value / density as f32 } else { 0.0 };
    }
}

/// The sign as a number, or zero.
fn sign(value: f32) -> f32 {
    if value == 0.0 { 0.0 } else { value.signum() }
}

/// For each element, the weighted mean of the tensors' values that have the sign of the sum of their votes.
fn elect<B: Backend>(
    tensors: Vec<Tensor<B, 2>>,
    weights: &[f64],
    vote: impl Fn(f32) -> f32,
) -> Tensor<B, 2> {
    let parts: Vec<Vec<f32>> = tensors.iter().map(|tensor| values(tensor.clone())).collect();
    on_host(tensors[0].clone(), |merged| {
        for (index, merged) in merged.iter_mut().enumerate() {
            let total: f32 = parts.iter().map(|part| vote(part[index])).sum();
            let sign = if total >= 0.0 { 1.0 } else { -1.0 };
            let (mut sum, mut count) = (0.0, 0);
            for (part, weight) in parts.iter().zip(weights) {
                if part[index] * sign > 0.0 {
                    sum += f64::from(part[index]) * weight;
                    count += 1;
                }
            }
            *merged = (sum / f64::from(count.max(1))) as f32;
        }
    })
}

fn times<B: Backend, const D: usize>(tensor: Tensor<B, D>, by: f64) -> Tensor<B, D> {
    if by == 1.0 { tensor } else { tensor.mul_scalar(by) }
}

fn values<B: Backend>(tensor: Tensor<B, 2>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().to_vec().expect("the data was converted to this type")
}

fn on_host<B: Backend>(tensor: Tensor<B, 2>, change: impl FnOnce(&mut [f32])) -> Tensor<B, 2> {
    let (shape, device) = (tensor.dims(), tensor.device());
    let mut values = values(tensor);
    change(&mut values);
    Tensor::from_data(TensorData::new(values, shape), &device)
}
