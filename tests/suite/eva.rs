//! EVA: adapters that start with the principal directions of their layers' inputs.

use std::fs;

use burn::tensor::{Tensor, backend::Backend};
use burn_lora::{Init, Lora, LoraAdapter, LoraConfig, LoraModule};
use nalgebra::DMatrix;
use serde_json::Value;

use crate::{
    model::{Mlp, Plain, Train, device, filled},
    oracle::{Matrix, assert_close, assert_identical},
    peft::{Model, fixture},
};

const WIDTH: usize = 6;

/// Inputs that vary more in some directions than in others, around a mean far from zero.
fn inputs(rows: usize) -> Matrix {
    let (values, mix) = (Matrix::random(rows, WIDTH, 3), Matrix::random(WIDTH, WIDTH, 4));
    let stretched = Matrix::from_fn(rows, WIDTH, |r, c| values.at(r, c) * 4.0 / (1 + c * c) as f64);
    stretched.times(&mix).map(|it| it + 7.0)
}

/// The eigenvectors of the covariance, largest eigenvalues first, and the shares of the eigenvalues.
fn principal(x: &Matrix) -> (Vec<Vec<f64>>, Vec<f64>) {
    let matrix = DMatrix::from_row_slice(x.rows, x.cols, &x.data);
    let mean = matrix.row_mean();
    let centered = DMatrix::from_fn(x.rows, x.cols, |r, c| matrix[(r, c)] - mean[c]);
    let eigen = (centered.transpose() * centered).symmetric_eigen();
    let mut order: Vec<_> = (0..x.cols).collect();
    order.sort_by(|one, other| eigen.eigenvalues[*other].total_cmp(&eigen.eigenvalues[*one]));
    let total: f64 = eigen.eigenvalues.iter().sum();
    let vector = |i: &usize| eigen.eigenvectors.column(*i).iter().copied().collect();
    let shares = order.iter().map(|i| eigen.eigenvalues[*i] / total).collect();
    (order.iter().map(vector).collect(), shares)
}

/// A·Aᵀ: the same whatever the signs and the order of A's columns.
fn projection(adapter: &LoraAdapter<Plain>) -> Tensor<Plain, 2> {
    adapter.a.val().matmul(adapter.a.val().transpose())
}

fn tensor<B: Backend>(x: &Matrix) -> Tensor<B, 2> {
    x.tensor([x.rows, x.cols], &device::<B>())
}

#[test]
fn a_is_the_principal_directions_in_any_number_of_batches() {
    let base = || filled(Mlp::<Plain>::new(&device::<Plain>()));
    let x = inputs(60);
    let config = LoraConfig::peft(2, 6.0).with_targets(["blocks.0"]);
    for batches in [1, 4] {
        let lora = base().attach_eva(&config, 1.0, |model| {
            for rows in tensor::<Plain>(&x).chunk(batches, 0) {
                model.forward(rows);
            }
        });
        let adapters = lora.unwrap().adapters();
        let adapter = adapters.get("blocks.0").unwrap();
        let (vectors, _) = principal(&x);
        let expected = Matrix::from_fn(WIDTH, WIDTH, |r, c| {
            vectors[..2].iter().map(|vector| vector[r] * vector[c]).sum()
        });
        assert_eq!(adapter.rank(), 2);
        assert_close(projection(adapter), &expected, 1e-4);
    }
}

#[test]
fn ranks_and_directions_are_those_of_python() {
    let text = fs::read_to_string(fixture("eva.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let values = |value: &Value| {
        value.as_array().unwrap().iter().map(|it| it.as_f64().unwrap()).collect::<Vec<_>>()
    };
    let x = Matrix { rows: 64, cols: WIDTH, data: values(&expected["x"]) };
    let base = Model::<Plain>::base();
    let y = base.forward(tensor(&x));
    let lora = base
        .attach_eva(&LoraConfig::peft(2, 6.0), 2.0, |model| {
            model.forward(tensor(&x));
        })
        .unwrap();
    assert_identical(lora.forward(tensor(&x)), y);
    let adapters = lora.adapters();
    let starts = expected["starts"].as_object().unwrap();
    assert_eq!(
        adapters.iter().map(|it| it.0).collect::<Vec<_>>(),
        starts.keys().collect::<Vec<_>>()
    );
    let mut ranks = Vec::new();
    for (path, start) in starts {
        let adapter = adapters.get(path).unwrap();
        ranks.push(adapter.rank());
        assert_eq!(adapter.rank() as u64, start["rank"].as_u64().unwrap(), "{path}");
        assert!((adapter.scale() - start["scale"].as_f64().unwrap()).abs() < 1e-9, "{path}");
        let data = values(&start["projection"]);
        let size = adapter.shape()[0];
        assert_close(projection(adapter), &Matrix { rows: size, cols: size, data }, 1e-3);
    }
    assert!(ranks.iter().any(|rank| *rank != 2), "ranks move: {ranks:?}");
}

#[test]
fn exactly_the_adapters_train_and_a_layer_can_lose_its_own() {
    let base = filled(Mlp::<Train>::new(&device::<Train>()));
    let x = inputs(60);
    let lora: Lora<Train, Mlp<Train>> = base
        .attach_eva(&LoraConfig::peft(1, 6.0).with_modules_to_save(["head"]), 3.0, |model| {
            model.forward(tensor(&x));
        })
        .unwrap();
    let adapters = lora.adapters();
    let trained = lora.parameters().trainable;
    assert_eq!(trained, adapters.num_params());
    let grads = lora.forward(tensor(&x)).sin().sum().backward();
    for (path, adapter) in adapters.iter() {
        assert!(adapter.b.grad(&grads).is_some(), "{path}");
    }
    assert!(lora.head.base.weight.grad(&grads).is_some());
    assert_eq!(adapters.iter().map(|(_, it)| it.rank()).sum::<usize>(), 2);
}

#[test]
fn what_was_not_seen_or_is_not_finite_is_refused() {
    let base = || filled(Mlp::<Plain>::new(&device::<Plain>()));
    let refused = |config: LoraConfig, x: Option<Matrix>, message: &str| {
        let lora = base().attach_eva(&config, 2.0, |model| {
            if let Some(x) = &x {
                model.forward(tensor(x));
            }
        });
        let error = lora.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    let config = LoraConfig::peft(2, 6.0);
    refused(config.clone(), None, "were not seen, or not finite");
    refused(config.clone(), Some(inputs(9).scaled(f64::NAN)), "were not seen, or not finite");
    refused(config.with_init(Init::Olora), Some(inputs(9)), "`init` is Olora, and EVA has initial");
}

#[test]
#[should_panic = "rho must be a number of at least 1, got 0.5"]
fn fewer_directions_than_ranks_are_refused() {
    let base = filled(Mlp::<Plain>::new(&device::<Plain>()));
    let _ = base.attach_eva(&LoraConfig::peft(2, 6.0), 0.5, |_| {});
}

#[test]
fn the_shares_decide_who_gets_the_ranks() {
    let base = filled(Mlp::<Plain>::new(&device::<Plain>()));
    // One direction has all of the variance of the first layer's inputs.
    let line = Matrix::from_fn(40, WIDTH, |r, c| (r as f64 - 20.0) * (c as f64 + 1.0));
    let (_, shares) = principal(&line);
    assert!(shares[0] > 0.999);
    let config = LoraConfig::peft(2, 6.0);
    let lora = base.attach_eva(&config, 2.0, |model| {
        model.forward(tensor(&line));
    });
    let adapters = lora.unwrap().adapters();
    assert_eq!(adapters.get("blocks.0").unwrap().rank(), 1);
    assert_eq!(adapters.iter().map(|(_, it)| it.rank()).sum::<usize>(), 6);
    assert_eq!(adapters.get("blocks.0").unwrap().scale(), 3.0);
}
