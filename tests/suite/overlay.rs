//! The overlay on stock modules: its outputs, the gradients of its adapters, and the unchanged base.

mod golden;
mod own;

use std::collections::BTreeMap;

use burn::{
    module::{AutodiffModule, ModuleMapper, ModuleVisitor, Param},
    nn::{
        EmbeddingConfig, LinearConfig,
        attention::{CrossAttentionConfig, MhaInput, MultiHeadAttentionConfig},
        conv::{
            Conv1dConfig, Conv2dConfig, Conv3dConfig, ConvTranspose1dConfig, ConvTranspose2dConfig,
            ConvTranspose3dConfig, DeformConv2dConfig,
        },
        gru::{BiGruConfig, GruConfig},
        transformer::{
            PositionWiseFeedForwardConfig, TransformerDecoderConfig, TransformerDecoderInput,
            TransformerEncoderConfig, TransformerEncoderInput,
        },
        {BiLstmConfig, BiRnnConfig, LstmConfig, RnnConfig},
    },
    optim::GradientsParams,
    tensor::{Int, Tensor, backend::Backend},
};
use burn_lora::{Init, Lora, LoraAdapters, LoraConfig};

use crate::{
    model::{Train, device},
    oracle::{Matrix, assert_close, assert_identical},
};

fn config() -> LoraConfig {
    LoraConfig::new(2, 0.7).with_init(Init::RandomBoth)
}

fn values<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f64> {
    tensor.into_data().convert::<f64>().to_vec().unwrap()
}

/// An input of any shape.
fn input<B: Backend, const D: usize>(shape: [usize; D]) -> Tensor<B, D> {
    Matrix::random(1, shape.iter().product(), 3).tensor(shape, &device::<B>())
}

/// The position of each element of the weight in `ΔW`: its row of A and its column of B.
fn places(container: &str, dims: &[usize]) -> Vec<(usize, usize)> {
    let total: usize = dims.iter().product();
    let inner: usize = dims[1..].iter().product();
    let kernel: usize = dims[2..].iter().product();
    (0..total)
        .map(|index| match container {
            // [out, in, kernel]
            it if it.starts_with("Struct:Conv") && !it.contains("Transpose")
                || it == "Struct:DeformConv2d" =>
            {
                (index % inner, index / inner)
            }
            // [in, out, kernel]
            it if it.starts_with("Struct:ConvTranspose") => {
                (index / inner * kernel + index % kernel, index % inner / kernel)
            }
            _ => (index / inner, index % inner),
        })
        .collect()
}

/// Replaces each adapted weight by the sum, formed in `f64`.
struct Dense<'a, B: Backend> {
    set: &'a LoraAdapters<B>,
    names: Vec<(String, String)>,
    changed: usize,
}

fn path(names: &[(String, String)]) -> String {
    names.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(".")
}

/// The name of the adapter of a weight.
fn layer_path(path: &str) -> &str {
    path.strip_suffix("weight").map_or(path, |it| it.strip_suffix('.').unwrap_or(it))
}

impl<B: Backend> ModuleMapper<B> for Dense<'_, B> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.names.push((name.to_owned(), container.to_owned()));
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.names.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let path = path(&self.names);
        let Some(adapter) = self.set.get(layer_path(&path)) else { return param };
        if D < 2 {
            return param;
        }
        self.changed += 1;
        let container = self.names.last().unwrap().1.clone();
        let (a, b) = (values(adapter.a.val()), values(adapter.b.val()));
        let ([_, columns], rank) = (adapter.shape(), adapter.rank());
        param.map(|weight| {
            let dims = weight.dims();
            let mut dense = values(weight.clone());
            for (value, (row, column)) in dense.iter_mut().zip(places(&container, &dims)) {
                let update: f64 =
                    (0..rank).map(|j| a[row * rank + j] * b[j * columns + column]).sum();
                *value += adapter.scale() * update;
            }
            let dense = Matrix { rows: 1, cols: dense.len(), data: dense };
            dense.tensor::<B, D>(dims, &weight.device()).set_require_grad(weight.is_require_grad())
        })
    }
}

/// Computes the gradients of the factors from the gradients of the dense module's weights.
struct Gradients<'a> {
    set: &'a LoraAdapters<Train>,
    names: Vec<(String, String)>,
    grads: &'a <Train as burn::tensor::backend::AutodiffBackend>::Gradients,
    found: BTreeMap<String, [Matrix; 2]>,
}

impl ModuleVisitor<Train> for Gradients<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.names.push((name.to_owned(), container.to_owned()));
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.names.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
        let path = path(&self.names);
        let layer = layer_path(&path).to_owned();
        let Some(adapter) = self.set.get(&layer).filter(|_| D >= 2) else { return };
        let (Some(grad), [rows, cols]) = (param.grad(self.grads), adapter.shape()) else { return };
        let mut dense = Matrix { rows, cols, data: vec![0.0; rows * cols] };
        let places = places(&self.names.last().unwrap().1, &param.dims());
        for (value, (row, column)) in values(grad).into_iter().zip(places) {
            dense.data[row * cols + column] += value;
        }
        let rank = adapter.rank();
        let a = Matrix { rows, cols: rank, data: values(adapter.a.val()) };
        let b = Matrix { rows: rank, cols, data: values(adapter.b.val()) };
        let scale = adapter.scale();
        let grads =
            [dense.times(&b.transpose()).scaled(scale), a.transpose().times(&dense).scaled(scale)];
        self.found.insert(layer, grads);
    }
}

/// Checks one module: outputs, gradients of every factor, merging, and that the base is untouched.
fn check<M, const D: usize>(module: M, adapters: usize, pass: impl Fn(&M) -> Tensor<Train, D>)
where
    M: AutodiffModule<Train>,
{
    let before = pass(&module);
    let model = Lora::overlay(module.clone());
    assert_identical(model.with_adapters(&pass), before.clone());
    let model = model.attach(&config()).unwrap();
    let set = model.adapters();
    assert_eq!(set.len(), adapters);

    // The reference: a module whose weights are dense sums. They are trainable.
    let mut dense = Dense { set: &set, names: vec![], changed: 0 };
    let reference = module.clone().map(&mut dense);
    assert_eq!(dense.changed, adapters);
    let expected = pass(&reference);
    let matrix = |tensor: Tensor<Train, D>| {
        let data = values(tensor);
        Matrix { rows: 1, cols: data.len(), data }
    };
    let y = model.with_adapters(&pass);
    assert_close(y.clone(), &matrix(expected.clone()), 2e-5);

    let grads = expected.sin().sum().backward();
    let mut gradients =
        Gradients { set: &set, names: vec![], grads: &grads, found: BTreeMap::new() };
    reference.visit(&mut gradients);
    // A second forward and backward pass gives the same.
    for y in [y, model.with_adapters(&pass)] {
        let grads = y.sin().sum().backward();
        for (path, [d_a, d_b]) in &gradients.found {
            let adapter = set.get(path).unwrap();
            assert_close(adapter.a.grad(&grads).unwrap(), d_a, 5e-5);
            assert_close(adapter.b.grad(&grads).unwrap(), d_b, 5e-5);
        }
        let grads = GradientsParams::from_grads(grads, &model);
        assert_eq!(grads.len(), 2 * gradients.found.len(), "nothing else has a gradient");
    }
    assert!(!gradients.found.is_empty());

    assert_identical(pass(&module), before.clone());
    assert_identical(pass(&model.detach()), before);
    let merged = model.merge().unwrap();
    assert_close(pass(&merged), &matrix(pass(&reference)), 2e-5);
}

#[test]
fn convolutions() {
    let device = device::<Train>();
    let x = || input::<Train, 4>([2, 4, 5, 4]);
    check(Conv1dConfig::new(4, 6, 3).with_groups(2).init(&device), 1, |it| {
        it.forward(input([2, 4, 7]))
    });
    check(Conv2dConfig::new([4, 6], [3, 2]).with_groups(2).init(&device), 1, |it| it.forward(x()));
    check(Conv3dConfig::new([2, 3], [2, 2, 2]).init(&device), 1, |it| {
        it.forward(input([1, 2, 3, 4, 3]))
    });
    check(ConvTranspose1dConfig::new([4, 6], 3).init(&device), 1, |it| {
        it.forward(input([2, 4, 5]))
    });
    let transposed = ConvTranspose2dConfig::new([4, 6], [3, 2]).with_groups(2);
    check(transposed.init(&device), 1, |it| it.forward(x()));
    check(ConvTranspose3dConfig::new([2, 3], [2, 2, 2]).init(&device), 1, |it| {
        it.forward(input([1, 2, 3, 2, 3]))
    });
}

/// Burn's wgpu backend cannot compute gradients of deformable convolutions on every driver.
#[test]
fn deformable_convolutions() {
    let device = device::<Train>();
    check(DeformConv2dConfig::new([2, 3], [2, 2]).init(&device), 1, |it| {
        it.forward(input([1, 2, 4, 4]), input([1, 8, 3, 3]), None)
    });
}

#[test]
fn recurrent_modules() {
    let device = device::<Train>();
    let x = || input::<Train, 3>([2, 3, 4]);
    check(RnnConfig::new(4, 3, true).init(&device), 2, |it| it.forward(x(), None).0);
    check(GruConfig::new(4, 3, true).init(&device), 6, |it| it.forward(x(), None));
    check(LstmConfig::new(4, 3, true).init(&device), 8, |it| it.forward(x(), None).0);
    check(BiRnnConfig::new(4, 3, true).init(&device), 4, |it| it.forward(x(), None).0);
    check(BiGruConfig::new(4, 3, true).init(&device), 12, |it| it.forward(x(), None).0);
    check(BiLstmConfig::new(4, 3, true).init(&device), 16, |it| it.forward(x(), None).0);
}

#[test]
fn transformers_and_what_they_are_made_of() {
    let device = device::<Train>();
    let x = || input::<Train, 3>([2, 3, 4]);
    check(LinearConfig::new(4, 3).init(&device), 1, |it| it.forward(x()));
    let ids = || Tensor::<Train, 2, Int>::from_data([[0, 3, 1], [2, 2, 4]], &Default::default());
    check(EmbeddingConfig::new(6, 4).init(&device), 1, |it| it.forward(ids()));
    check(MultiHeadAttentionConfig::new(4, 2).with_dropout(0.0).init(&device), 4, |it| {
        it.forward(MhaInput::self_attn(x())).context
    });
    let cross = CrossAttentionConfig::new(4, 4, 2, 2, 2).with_dropout(0.0);
    check(cross.init(&device), 4, |it| it.forward(x(), input([2, 5, 4]), None));
    let feed_forward = PositionWiseFeedForwardConfig::new(4, 6).with_dropout(0.0);
    check(feed_forward.init(&device), 2, |it| it.forward(x()));
    let encoder = TransformerEncoderConfig::new(4, 6, 2, 2).with_dropout(0.0);
    check(encoder.init(&device), 12, |it| it.forward(TransformerEncoderInput::new(x())));
    let decoder = TransformerDecoderConfig::new(4, 6, 2, 1).with_dropout(0.0);
    check(decoder.init(&device), 10, |it| {
        it.forward(TransformerDecoderInput::new(x(), input([2, 5, 4])))
    });
}
