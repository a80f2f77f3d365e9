//! What can be done with the adapters of a whole model, against copying the bytes concerned.

use burn::tensor::{Distribution, Tensor};
use burn_lora::{LoraConfig, LoraModule};
use common::{
    backend::Plain,
    benches::{
        measure::{Work, medians, print_header, print_row},
        models::Mlp,
    },
};

pub fn run() {
    let device = Default::default();
    let (layers, width) = (8, 1024);
    let base = Mlp::<Plain>::new(layers, width, &device);
    let config = LoraConfig::new(8, 16.0);
    let adapted = base.attach(&config).expect("it can be attached");
    let adapters = adapted.adapters();
    let weights =
        Tensor::<Plain, 3>::random([layers - 1, width, width], Distribution::Default, &device);
    let names = ["one pass over the weights", "attach", "switch", "merge", "detach"];
    let works: Vec<Work> = vec![
        Box::new(|| drop(weights.clone().add_scalar(1.0))),
        Box::new(|| drop(base.attach(&config).expect("it can be attached"))),
        Box::new(|| drop(base.switch(&adapters).expect("they fit"))),
        Box::new(|| drop(adapted.merge().expect("it is finite"))),
        Box::new(|| drop(adapted.detach())),
    ];
    let times = medians(works);
    print_header(
        &format!(
            "Adapters of an MLP of {layers} layers, the head among them, width {width}, rank 8"
        ),
        &["operation", "ms", "in passes over the weights"],
    );
    for (name, time) in names.iter().zip(&times) {
        print_row(&[(*name).to_owned(), format!("{time:.3}"), format!("{:.3}", time / times[0])]);
    }
    println!();
}
