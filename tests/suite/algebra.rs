//! Arithmetic with sets of adapters, compared with the same arithmetic on the dense updates.

use burn::tensor::Tensor;
use burn_lora::{
    Init, Lora, LoraAdapter, LoraAdapters, LoraConfig, LoraError, LoraModule, Scaling,
    adapters::Combination,
};

use crate::{
    model::{Mlp, Plain, device},
    oracle::{Matrix, assert_close, assert_identical},
};

fn dense(tensor: Tensor<Plain, 2>) -> Matrix {
    let [rows, cols] = tensor.dims();
    Matrix { rows, cols, data: tensor.into_data().convert::<f64>().to_vec().unwrap() }
}

/// The dense update of a layer.
fn delta(set: &LoraAdapters<Plain>, path: &str) -> Matrix {
    let adapter = set.get(path).unwrap();
    dense(adapter.a.val()).times(&dense(adapter.b.val())).scaled(adapter.scale())
}

fn as_tensor(matrix: &Matrix) -> Tensor<Plain, 2> {
    matrix.tensor([matrix.rows, matrix.cols], &device::<Plain>())
}

#[track_caller]
fn assert_same(set: &LoraAdapters<Plain>, path: &str, expected: &Matrix) {
    assert_close(as_tensor(&delta(set, path)), expected, 1e-5);
}

fn base() -> Mlp<Plain> {
    Mlp::new(&device::<Plain>())
}

fn set(rank: usize, alpha: f64, seed: u64) -> LoraAdapters<Plain> {
    let config = LoraConfig::new(rank, alpha).with_seed(seed).with_init(Init::RandomBoth);
    let config = config.with_scaling(Scaling::AlphaOverRank).with_bias(true);
    base().attach(&config).unwrap().adapters()
}

const PATHS: [&str; 3] = ["blocks.0", "blocks.1", "head"];

#[test]
fn scaling_is_exact_and_minus_one_takes_a_task_away() {
    let one = set(3, 2.0, 1);
    for by in [0.5, -1.0, 3.0] {
        assert_same(&one.scaled(by), "head", &delta(&one, "head").scaled(by));
    }
    let nothing =
        LoraAdapters::combine(&[(&one, 1.0), (&one.scaled(-1.0), 1.0)], Combination::Concatenate);
    assert_same(&nothing.unwrap(), "head", &delta(&one, "head").scaled(0.0));
}

#[test]
fn concatenating_is_the_weighted_sum_of_the_updates() {
    let (one, two, three) = (set(3, 2.0, 1), set(2, 5.0, 2), set(4, -1.0, 3));
    let parts = [(&one, 0.5), (&two, -2.0), (&three, 1.0)];
    let sum = LoraAdapters::combine(&parts, Combination::Concatenate).unwrap();
    for path in PATHS {
        let expected = parts.iter().map(|(set, weight)| delta(set, path).scaled(*weight));
        let expected = expected.reduce(|sum, it| sum.plus(&it)).unwrap();
        assert_eq!(sum.get(path).unwrap().rank(), 9);
        assert_same(&sum, path, &expected);
    }

    // If all sets have the same scale, the factors are copied without rounding.
    let (one, two) = (set(2, 3.0, 1), set(2, 3.0, 2));
    let parts = [(&one, 1.0), (&two, 1.0)];
    let sum = LoraAdapters::combine(&parts, Combination::Concatenate).unwrap();
    let b = sum.get("head").unwrap().b.val();
    assert_identical(b.clone().narrow(0, 0, 2), one.get("head").unwrap().b.val());
    assert_identical(b.narrow(0, 2, 2), two.get("head").unwrap().b.val());
}

#[test]
fn a_sum_computes_what_its_parts_do_biases_included() {
    let base = base();
    let (one, two) = (set(3, 2.0, 1), set(2, 5.0, 2));
    let bias = |set: LoraAdapters<Plain>, value: f64| {
        let adapters: Vec<_> = set
            .iter()
            .map(|(path, adapter)| {
                let mut adapter = adapter.clone();
                adapter.bias = adapter.bias.map(|it| it.map(|bias| bias + value));
                (path.to_owned(), adapter)
            })
            .collect();
        LoraAdapters::new(adapters)
    };
    let (one, two) = (bias(one, 0.3), bias(two, -0.7));
    let sum = LoraAdapters::combine(&[(&one, 0.5), (&two, 2.0)], Combination::Concatenate);
    let summed = base.switch(&sum.unwrap()).unwrap();

    // The reference: both sets merged into the base, one after the other.
    let first = base.switch(&one.scaled(0.5)).unwrap().merge().unwrap();
    let both = first.switch(&two.scaled(2.0)).unwrap().merge().unwrap();
    let x = || Matrix::random(4, 6, 9).tensor::<Plain, 2>([4, 6], &device::<Plain>());
    let expected = both.forward(x()).into_data().convert::<f64>().to_vec().unwrap();
    assert_close(summed.forward(x()), &Matrix { rows: 4, cols: 3, data: expected }, 1e-5);
}

#[test]
fn a_layer_takes_part_with_the_sets_that_have_it() {
    let (one, two) = (set(3, 2.0, 1), set(3, 2.0, 2));
    let head = LoraAdapters::new([("head", two.get("head").unwrap().clone())]);
    for how in [Combination::Concatenate, Combination::Linear] {
        let sum = LoraAdapters::combine(&[(&one, 1.0), (&head, 1.0)], how).unwrap();
        assert_eq!(sum.len(), 3);
        assert_same(&sum, "blocks.0", &delta(&one, "blocks.0"));
    }
}

fn fixture(name: &str) -> LoraAdapters<Plain> {
    let path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peft/fixtures/combined");
    LoraAdapters::load(path.join(name), &device::<Plain>()).unwrap()
}

#[test]
fn python_combines_to_the_same() {
    let (one, two) = (fixture("one"), fixture("two"));
    for (name, how) in [
        ("cat", Combination::Concatenate),
        ("linear", Combination::Linear),
        ("ties", Combination::Ties { density: 0.6 }),
    ] {
        let ours = LoraAdapters::combine(&[(&one, 0.7), (&two, -0.4)], how).unwrap();
        let theirs = fixture(name);
        assert_eq!(ours.len(), theirs.len());
        for (path, _) in theirs.iter() {
            assert_same(&ours, path, &delta(&theirs, path));
        }
    }
}

#[test]
fn dare_drops_at_random_and_keeps_the_mean() {
    let a = Tensor::<Plain, 2>::ones([400, 50], &device::<Plain>());
    let b = Tensor::ones([50, 2], &device::<Plain>());
    let one = LoraAdapters::new([("fc", LoraAdapter::new(a, b, 1.0, Scaling::Alpha))]);
    let dare = |seed| {
        let how = Combination::Dare { density: 0.25, seed };
        let dropped = LoraAdapters::combine(&[(&one, 1.0)], how).unwrap();
        let a = dropped.get("fc").unwrap().a.val();
        a.into_data().convert::<f64>().to_vec::<f64>().unwrap()
    };
    let values = dare(3);
    assert!(values.iter().all(|&it| it == 0.0 || it == 4.0));
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    // The standard deviation of the mean is √(0.25·0.75/20,000)·4 = 0.012.
    assert!((mean - 1.0).abs() < 0.06, "{mean}");
    assert_eq!(values, dare(3));
    assert_ne!(values, dare(4));

    // With density 1, DARE is the linear combination, and DARE-TIES is TIES.
    let (one, two) = (set(3, 2.0, 1), set(3, 2.0, 2));
    let combine = |how| LoraAdapters::combine(&[(&one, 0.5), (&two, 1.5)], how).unwrap();
    let (density, seed) = (1.0, 0);
    let linear = combine(Combination::Linear);
    assert_same(&combine(Combination::Dare { density, seed }), "head", &delta(&linear, "head"));
    let ties = combine(Combination::Ties { density });
    assert_same(&combine(Combination::DareTies { density, seed }), "head", &delta(&ties, "head"));
}

/// The matrix with all but the largest elements set to zero, as many as `density` says.
fn pruned(matrix: &Matrix, density: f64) -> Matrix {
    let mut sizes: Vec<_> = matrix.data.iter().map(|it| it.abs()).collect();
    sizes.sort_by(|x, y| y.total_cmp(x));
    let keep = (density * sizes.len() as f64) as usize;
    matrix.map(|it| if keep > 0 && it.abs() >= sizes[keep - 1] { it } else { 0.0 })
}

/// For each element, the weighted mean of those with the sign that `votes` elect.
fn elected(parts: &[Matrix], weights: &[f64], votes: impl Fn(f64) -> f64) -> Matrix {
    Matrix::from_fn(parts[0].rows, parts[0].cols, |row, col| {
        let total: f64 = parts.iter().map(|it| votes(it.at(row, col))).sum();
        let sign = if total >= 0.0 { 1.0 } else { -1.0 };
        let agree = parts.iter().zip(weights).filter(|(it, _)| it.at(row, col) * sign > 0.0);
        let terms: Vec<_> = agree.map(|(it, weight)| it.at(row, col) * weight).collect();
        terms.iter().sum::<f64>() / terms.len().max(1) as f64
    })
}

fn summed(parts: &[Matrix], weights: &[f64]) -> Matrix {
    let terms = parts.iter().zip(weights).map(|(it, weight)| it.scaled(*weight));
    terms.reduce(|sum, it| sum.plus(&it)).unwrap()
}

fn count(value: f64) -> f64 {
    if value == 0.0 { 0.0 } else { value.signum() }
}

/// How the naive reference merges matrices.
type Merge = fn(&[Matrix], &[f64]) -> Matrix;

const DENSITY: f64 = 0.6;

/// The methods that have no random choice, with their references.
fn methods() -> [(Combination, Merge); 4] {
    [
        (Combination::Linear, summed),
        (Combination::MagnitudePrune { density: DENSITY }, |parts, weights| {
            summed(&kept(parts), weights)
        }),
        (Combination::Ties { density: DENSITY }, |parts, weights| {
            elected(&kept(parts), weights, |it| it)
        }),
        (Combination::TiesByCount { density: DENSITY }, |parts, weights| {
            elected(&kept(parts), weights, count)
        }),
    ]
}

fn kept(parts: &[Matrix]) -> Vec<Matrix> {
    parts.iter().map(|it| pruned(it, DENSITY)).collect()
}

#[test]
fn s17_factors_are_merged_as_the_formulas_say() {
    let sets = [set(3, 2.0, 1), set(3, 5.0, 2), set(3, -4.0, 3)];
    let weights = [0.5, 0.75, 0.9];
    let parts: Vec<_> = sets.iter().zip(weights).collect();
    for (how, merge) in methods() {
        let merged = LoraAdapters::combine(&parts, how).unwrap();
        for path in PATHS {
            let factors = |of: fn(&LoraAdapter<Plain>) -> Tensor<Plain, 2>| -> Vec<_> {
                sets.iter().map(|set| dense(of(set.get(path).unwrap()))).collect()
            };
            let scales = parts.iter().map(|(set, weight)| set.get(path).unwrap().scale() * weight);
            let roots: Vec<f64> = scales.map(|it| it.abs().sqrt().copysign(it)).collect();
            let sizes: Vec<f64> = roots.iter().map(|it| it.abs()).collect();
            let a = merge(&factors(|it| it.a.val()), &roots);
            let b = merge(&factors(|it| it.b.val()), &sizes);
            assert_same(&merged, path, &a.times(&b));
        }
    }
}

#[test]
fn s17_dense_updates_are_merged_and_approximated_best() {
    // Ranks may differ.
    let sets = [set(3, 2.0, 1), set(2, 5.0, 2), set(1, -4.0, 3)];
    let weights = [0.5, 0.75, -0.9];
    let parts: Vec<_> = sets.iter().zip(weights).collect();
    for (how, merge) in methods() {
        for path in PATHS {
            let updates: Vec<_> = sets.iter().map(|set| delta(set, path)).collect();
            let expected = merge(&updates, &weights);
            let whole = LoraAdapters::combine_dense(&parts, how, Some(9)).unwrap();
            assert_same(&whole.adapters, path, &expected);
            for (rank, found) in [(3, None), (1, Some(1))] {
                let merged = LoraAdapters::combine_dense(&parts, how, found).unwrap();
                assert_eq!(merged.adapters.get(path).unwrap().rank(), rank);
                assert_best(&delta(&merged.adapters, path), &expected, merged.kept[path], rank);
            }
        }
    }
    // What is dropped at random is nothing at density 1, and the same each time otherwise.
    let of =
        |how| delta(&LoraAdapters::combine_dense(&parts, how, Some(9)).unwrap().adapters, "head");
    let close =
        |one: Combination, other: Combination| assert_close(as_tensor(&of(one)), &of(other), 1e-5);
    let (density, seed) = (1.0, 0);
    close(Combination::Dare { density, seed }, Combination::Linear);
    close(Combination::Concatenate, Combination::Linear);
    close(Combination::DareTies { density, seed }, Combination::Ties { density });
    close(Combination::DareTiesByCount { density, seed }, Combination::TiesByCount { density });
    let dare = |seed| of(Combination::Dare { density: 0.5, seed });
    assert_eq!(dare(1), dare(1));
    assert_ne!(dare(1), dare(2));
    // Biases are added with their whole weights.
    let biased = |value: f64| {
        let adapters = set(2, 3.0, 1);
        let adapters = adapters.iter().map(|(path, adapter)| {
            let mut adapter = adapter.clone();
            adapter.bias = adapter.bias.map(|it| it.map(|bias| bias + value));
            (path.to_owned(), adapter)
        });
        LoraAdapters::new(adapters.collect::<Vec<_>>())
    };
    let (one, two) = (biased(0.3), biased(-0.7));
    let how = Combination::MagnitudePrune { density: 0.5 };
    let merged = LoraAdapters::combine_dense(&[(&one, 0.5), (&two, 2.0)], how, None).unwrap();
    let bias = merged.adapters.get("head").unwrap().bias_delta().unwrap();
    let expected = Matrix::from_fn(1, 3, |_, _| 1.5 * (0.5 * 0.3 - 2.0 * 0.7));
    assert_close(bias, &expected, 1e-6);
}

#[test]
fn s17_a_head_is_dropped_or_taken_from_one_set() {
    let base = base();
    let config = LoraConfig::new(2, 3.0).with_init(Init::RandomBoth);
    let plain = base.attach(&config.clone().with_targets(["blocks.0"])).unwrap().adapters();
    let headed = |value: f32| {
        let config = config.clone().with_targets(["blocks.0"]).with_modules_to_save(["head"]);
        let mut model = base.attach(&config).unwrap().into_inner();
        let weight = &mut model.head.base.weight;
        *weight = weight.clone().map(|it| it * 0.0 + value);
        Lora::new(model).train_only(&["head"]).unwrap().adapters()
    };
    let (one, two) = (headed(1.0), headed(2.0));
    let sum = |parts: &[(&LoraAdapters<Plain>, f64)]| {
        LoraAdapters::combine(parts, Combination::Concatenate)
    };
    let error = sum(&[(&plain, 0.5), (&one, 0.5)]).unwrap_err().to_string();
    for remedy in ["`without_modules_to_save`", "`with_modules_to_save_of`"] {
        assert!(error.contains(remedy), "{error}");
    }
    let [bare_one, bare_two] = [&one, &two].map(|it| it.without_modules_to_save());
    let both = sum(&[(&bare_one, 0.5), (&bare_two, 0.25)]).unwrap();
    let expected = delta(&one, "blocks.0").scaled(0.5).plus(&delta(&two, "blocks.0").scaled(0.25));
    assert_same(&both, "blocks.0", &expected);
    let weight = |set: &LoraAdapters<Plain>| {
        let model = base.switch(set).unwrap();
        (model.head.base.weight.to_data(), model.parameters().trainable)
    };
    let kept = both.with_modules_to_save_of(&two);
    let factors = 4 * (6 + 8);
    assert_eq!(weight(&both), (base.head.base.weight.to_data(), factors));
    let ours = Tensor::<Plain, 2>::full([7, 3], 2.0, &device::<Plain>()).to_data();
    assert_eq!(weight(&kept), (ours, factors + 7 * 3));
}

#[test]
fn sets_that_cannot_be_combined_are_refused() {
    let (one, two) = (set(3, 2.0, 1), set(2, 2.0, 2));
    let refused = |parts: &[(&LoraAdapters<Plain>, f64)], how, message: &str| {
        let error = LoraAdapters::combine(parts, how).unwrap_err();
        assert!(matches!(
            error,
            LoraError::Incompatible { .. } | LoraError::InvalidArgument { .. }
        ));
        assert!(error.to_string().contains(message), "{error}");
    };
    let both = [(&one, 1.0), (&two, 1.0)];
    refused(&both, Combination::Linear, "`blocks.0`: ranks differ: (3, 2)");
    refused(&both, Combination::Ties { density: 0.0 }, "invalid argument: `density` is 0");
    refused(&both, Combination::Dare { density: f64::NAN, seed: 0 }, "`density` is NaN");
    refused(&both, Combination::MagnitudePrune { density: 1.5 }, "`density` is 1.5");
    let error = LoraAdapters::combine_dense(&both, Combination::Linear, Some(0)).unwrap_err();
    assert!(error.to_string().contains("`rank` is 0"), "{error}");
    refused(
        &[(&one, f64::INFINITY)],
        Combination::Concatenate,
        "`weights` has inf, which is not finite",
    );
    let other = LoraAdapters::new([("head", one.get("blocks.0").unwrap().clone())]);
    let shapes = "`head`: shapes differ: ([7, 3], [6, 8])";
    refused(&[(&one, 1.0), (&other, 1.0)], Combination::Concatenate, shapes);
    let config = LoraConfig::new(2, 1.0).with_modules_to_save(["head"]);
    let saved = base().attach(&config).unwrap().adapters();
    refused(&[(&saved, 1.0)], Combination::Concatenate, "`head.weight`: it was trained in full");
    assert!(LoraAdapters::<Plain>::combine(&[], Combination::Linear).unwrap().is_empty());
}

/// The squared singular values of a matrix, largest first. Unlike the crate, it uses one-sided Jacobi
/// rotations, which make the columns orthogonal.
fn squared_singular_values(matrix: &Matrix) -> Vec<f64> {
    let mut columns: Vec<Vec<f64>> = (0..matrix.cols)
        .map(|col| (0..matrix.rows).map(|row| matrix.at(row, col)).collect())
        .collect();
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    for _ in 0..60 {
        for i in 0..columns.len() {
            for j in i + 1..columns.len() {
                let (p, q) = (dot(&columns[i], &columns[i]), dot(&columns[j], &columns[j]));
                let r = dot(&columns[i], &columns[j]);
                if r.abs() < 1e-300 {
                    continue;
                }
                let (sin, cos) = (0.5 * (2.0 * r).atan2(p - q)).sin_cos();
                let (left, right) = columns.split_at_mut(j);
                for (x, y) in left[i].iter_mut().zip(&mut right[0]) {
                    (*x, *y) = (cos * *x + sin * *y, cos * *y - sin * *x);
                }
            }
        }
    }
    let mut values: Vec<_> = columns.iter().map(|column| dot(column, column)).collect();
    values.sort_by(|x, y| y.total_cmp(x));
    values
}

fn squared_norm(matrix: &Matrix) -> f64 {
    matrix.data.iter().map(|it| it * it).sum()
}

#[track_caller]
fn assert_best(approximation: &Matrix, delta: &Matrix, kept: f64, rank: usize) {
    let values = squared_singular_values(delta);
    let best = values.iter().take(rank).sum::<f64>() / values.iter().sum::<f64>();
    assert!((kept - best).abs() < 1e-5, "kept {kept}, and the best is {best}");
    // The reported share must be that of the adapter in `f32`, not only of the decomposition.
    let error = squared_norm(&delta.plus(&approximation.scaled(-1.0))) / squared_norm(delta);
    assert!((1.0 - kept - error).abs() < 1e-5, "error {error}, kept {kept}");
}

#[test]
fn truncation_is_the_best_of_its_rank_and_reports_what_it_keeps() {
    let full = set(5, 3.0, 4);
    for rank in [1, 2, 4] {
        let truncated = full.truncate(rank);
        for path in PATHS {
            let approximation = delta(&truncated.adapters, path);
            let rank = rank.min(truncated.adapters.get(path).unwrap().rank());
            assert_best(&approximation, &delta(&full, path), truncated.kept[path], rank);
        }
    }
    // Truncation to the rank of the update or more loses nothing, biases included.
    let truncated = full.truncate(7);
    assert!(truncated.kept.values().all(|kept| (kept - 1.0).abs() < 1e-9));
    let x = || Matrix::random(4, 6, 9).tensor::<Plain, 2>([4, 6], &device::<Plain>());
    let base = base();
    let expected = base.switch(&full).unwrap().forward(x());
    let expected = expected.into_data().convert::<f64>().to_vec().unwrap();
    let found = base.switch(&truncated.adapters).unwrap().forward(x());
    assert_close(found, &Matrix { rows: 4, cols: 3, data: expected }, 1e-5);
}

#[test]
#[should_panic = "there is no decomposition of NaN"]
fn a_diverged_adapter_is_not_truncated() {
    set(2, 1.0, 1).scaled(f64::NAN).truncate(1);
}

#[test]
#[should_panic = "the rank must be at least 1, got 0"]
fn truncation_to_nothing_is_refused() {
    set(2, 1.0, 1).truncate(0);
}

#[test]
fn extraction_finds_the_best_adapters_for_a_tuned_model() {
    let base = base();
    // A tuned model whose difference has rank 2 in one layer, and full rank in the others.
    let tuned = base.switch(&set(2, 3.0, 4)).unwrap().merge().unwrap();
    let noise = Mlp::<Plain>::new(&device::<Plain>());
    let mut tuned = Mlp { head: noise.head.clone(), ..tuned };
    tuned.blocks[1] = noise.blocks[1].clone();

    let config = LoraConfig::new(2, 1.0).with_rank_pattern([("head", 1)]);
    let extracted = base.extract(&tuned, &config).unwrap();
    let difference = |path: &str| {
        let [base, tuned] = [&base, &tuned].map(|model| {
            let layer = match path {
                "head" => &model.head,
                path => &model.blocks[path[7..].parse::<usize>().unwrap()],
            };
            let weight = layer.base.weight.val();
            let [rows, cols] = weight.dims();
            Matrix { rows, cols, data: weight.into_data().convert::<f64>().to_vec().unwrap() }
        });
        tuned.plus(&base.scaled(-1.0))
    };
    for (path, rank) in [("blocks.0", 2), ("blocks.1", 2), ("head", 1)] {
        let approximation = delta(&extracted.adapters, path);
        assert_best(&approximation, &difference(path), extracted.kept[path], rank);
    }
    assert!(extracted.kept["blocks.0"] > 1.0 - 1e-6);
    assert!(base.switch(&extracted.adapters).is_ok());

    // A base with adapters is refused: they must be merged first.
    let adapted = base.attach(&config).unwrap();
    let error = base.extract(&adapted, &config).unwrap_err();
    assert!(matches!(error, LoraError::AlreadyAttached { .. }));

    // If the difference is zero, the kept share is 1.
    let same = base.extract(&base, &config).unwrap();
    assert!(same.kept.values().all(|&kept| kept == 1.0));
}

#[test]
fn extraction_is_good_beyond_the_directions_that_it_tries() {
    use burn::nn::LinearConfig;
    use burn_lora::LoraLinear;

    let layer =
        || -> LoraLinear<Plain> { LinearConfig::new(70, 50).init(&device::<Plain>()).into() };
    let (base, tuned) = (layer(), layer());
    let config = LoraConfig::new(4, 1.0);
    let extracted = base.extract(&tuned, &config).unwrap();
    let dense = |tensor: Tensor<Plain, 2>| {
        let data = tensor.into_data().convert::<f64>().to_vec().unwrap();
        Matrix { rows: 70, cols: 50, data }
    };
    let difference =
        dense(tuned.base.weight.val()).plus(&dense(base.base.weight.val()).scaled(-1.0));
    // Noise is the worst case: no direction is much larger than the others.
    let values = squared_singular_values(&difference);
    let best = values.iter().take(4).sum::<f64>() / values.iter().sum::<f64>();
    let kept = extracted.kept[""];
    assert!(kept <= best + 1e-6 && kept > 0.99 * best, "kept {kept}, and the best is {best}");
}

#[test]
fn a_tuned_model_that_diverged_has_no_extract() {
    let base = Mlp::<Plain>::new(&device::<Plain>());
    let mut tuned = base.clone();
    let head = &mut tuned.head.base.weight;
    *head = head.clone().map(|weight| weight / 0.0);
    let error = base.extract(&tuned, &LoraConfig::new(2, 1.0)).unwrap_err();
    assert!(matches!(&error, LoraError::Unusable { path, .. } if path == "head"), "{error}");
}
