//! Tables of embeddings.

use std::fs;

use burn::{
    module::{Module, Param},
    nn::Embedding,
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use burn_lora::{
    Init, LoraAdapters, LoraConfig, LoraModule,
    decode::{Table, TableUpdate, forward},
    nn::LoraEmbedding,
    quantize::{Quantization, QuantizedWeight},
};

use super::{HAS_OWN, Inputs, adapter};
use crate::{
    model::{Plain, device},
    oracle::{Matrix, assert_close},
};

fn ids(ids: &[i32]) -> Tensor<Plain, 2, Int> {
    Tensor::from_data(TensorData::new(ids.to_vec(), [1, ids.len()]), &device::<Plain>())
}

/// Both uses of a table, with its own adapter and with that of a text.
#[test]
fn lookups_and_projections_are_those_of_tensors() {
    if !HAS_OWN {
        return;
    }
    let (device, shape @ [count, width]) = (device::<Plain>(), [50, 96]);
    let weight: Tensor<Plain, 2> = Matrix::random(count, width, 1).tensor(shape, &device);
    let table: LoraEmbedding<Plain> =
        Embedding { weight: Param::from_tensor(weight.clone()) }.into();
    let mut quantized = table.clone();
    quantized.set_quantized(QuantizedWeight::new(weight, Quantization::Int8));
    let set = adapter(shape, 3, false, 2);
    let x = Matrix::random(3, width, 4);
    for base in [table, quantized] {
        let mut adapted = base.clone();
        adapted.set_adapter(Some(set.clone()));
        let update = TableUpdate::of(&set, false).unwrap();
        for (layer, host, update) in [
            (&base, Table::of(&base, false).unwrap(), None),
            (&adapted, Table::of(&adapted, false).unwrap(), None),
            (&adapted, Table::of(&base, false).unwrap(), Some(&update)),
        ] {
            let rows = [7, 0, 49];
            let expected = layer.forward(ids(&rows)).into_data().to_vec::<f32>().unwrap();
            let mut found = vec![0.0; 3 * width];
            for (row, to) in rows.into_iter().zip(found.chunks_exact_mut(width)) {
                host.look_up(row as usize, update, to);
            }
            let expected = Matrix {
                rows: 3,
                cols: width,
                data: expected.into_iter().map(f64::from).collect(),
            };
            let found: Tensor<Plain, 2> =
                Tensor::from_data(TensorData::new(found, [3, width]), &device);
            assert_close(found, &expected, 1e-6);

            let hidden: Tensor<Plain, 3> = x.tensor([1, 3, width], &device);
            let expected = layer.project(hidden).into_data().iter().collect();
            let expected = Matrix { rows: 3, cols: count, data: expected };
            let mut inputs = Inputs::new(3, width);
            inputs.numbers_mut().iter_mut().zip(&x.data).for_each(|(to, it)| *to = *it as f32);
            inputs.prepare(2, false);
            let mut found = vec![0.0; 3 * count];
            let update = update.and_then(TableUpdate::projection);
            forward([&host.projection()], &inputs, |_, _| update, [&mut found]);
            let found: Tensor<Plain, 2> =
                Tensor::from_data(TensorData::new(found, [3, count]), &device);
            assert_close(found, &expected, 3e-6);
        }
    }
}

#[derive(Module, Debug)]
struct Tied<B: Backend> {
    table: LoraEmbedding<B>,
}

/// In PEFT an adapter of the table leaves a tied head as it is, unless it says otherwise.
#[test]
fn an_adapter_of_peft_leaves_the_projection_as_it_is() {
    if !HAS_OWN {
        return;
    }
    let (device, shape) = (device::<Plain>(), [20, 64]);
    let weight = Matrix::random(20, 64, 1).tensor(shape, &device);
    let table: LoraEmbedding<Plain> = Embedding { weight: Param::from_tensor(weight) }.into();
    let base = Tied { table: table.clone() };
    let config = LoraConfig::new(3, 7.0).with_init(Init::RandomBoth);
    let adapted = base.attach(&config).unwrap();
    let dir = tempfile::TempDir::new().unwrap();
    adapted.adapters().save(dir.path()).unwrap();
    let path = dir.path().join("adapter_config.json");
    let config = fs::read_to_string(&path).unwrap();
    let without = config.replace("\"ensure_weight_tying\": true", "\"ensure_weight_tying\": false");
    assert_ne!(without, config);
    fs::write(&path, without).unwrap();
    let read = LoraAdapters::load(dir.path(), &device).unwrap();
    let moved = base.switch(&read).unwrap();
    let read = moved.table.adapter().unwrap();
    let update = TableUpdate::of(read, false).unwrap();
    assert!(update.projection().is_none());
    let hidden: Tensor<Plain, 3> = Matrix::random(1, 64, 3).tensor([1, 1, 64], &device);
    let difference = moved.table.project(hidden.clone()) - table.project(hidden);
    assert_eq!(difference.abs().max().into_scalar(), 0.0);
}
