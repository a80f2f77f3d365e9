//! Arithmetic with sets of adapters, compared with the same arithmetic on the dense updates.

use burn::tensor::Tensor;
use burn_lora::{
    Init, LoraAdapter, LoraAdapters, LoraConfig, LoraError, LoraModule, Scaling,
    adapters::Combination,
};

use crate::{
    model::{Mlp, Plain, device},
    oracle::{Matrix, assert_close, assert_identical},
};

/// The dense update of a layer.
fn delta(set: &LoraAdapters<Plain>, path: &str) -> Matrix {
    let adapter = set.get(path).unwrap();
    let dense = |tensor: Tensor<Plain, 2>| {
        let [rows, cols] = tensor.dims();
        Matrix { rows, cols, data: tensor.into_data().convert::<f64>().to_vec().unwrap() }
    };
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
