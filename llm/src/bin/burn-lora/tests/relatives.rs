//! Each relative of LoRA can be chosen.

use burn::{
    nn::LinearConfig,
    tensor::{Distribution, Tensor, Tolerance},
};
use burn_lora::{LoraConfig, LoraLinear};
use burn_lora_llm::cli::relatives::Relative;

use crate::backend::Plain;
use clap::ValueEnum;

#[test]
fn all_relatives_start_from_what_the_base_computes() {
    let device = Default::default();
    let base = LoraLinear::<Plain>::from(LinearConfig::new(12, 8).init(&device));
    let x = Tensor::<Plain, 2>::random([16, 12], Distribution::Default, &device);
    let expected = base.forward(x.clone()).into_data();
    for relative in Relative::value_variants() {
        let see = |model: &LoraLinear<Plain>| drop(model.forward(x.clone()));
        let lora = relative.attach(&base, LoraConfig::peft(4, 8.0), see).unwrap();
        assert!(lora.parameters().trainable > 0, "{}", relative.name());
        let found = lora.forward(x.clone()).into_data();
        found.assert_approx_eq::<f32>(&expected, Tolerance::rel_abs(1e-4, 1e-5));
    }
}
