//! Saving and loading ten million parameters, against writing and reading the same bytes plainly.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
};

use burn_lora::{Init, LoraAdapter, LoraAdapters, LoraConfig};
use common::{
    backend::Plain,
    benches::measure::{Work, medians, print_header, print_row},
};

pub fn run() {
    let device = Default::default();
    let config = LoraConfig::new(16, 16.0).with_init(Init::RandomBoth);
    let layers = (0..76).map(|index| {
        let config = config.clone().with_seed(index);
        (format!("layers.{index}.query"), LoraAdapter::init(&config, [4096, 4096], &device))
    });
    let adapters = LoraAdapters::<Plain>::new(layers);
    let dir = std::env::temp_dir().join(format!("burn-lora-bench-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("the temporary directory can be written");
    let (set, plain) = (dir.join("set"), dir.join("plain"));
    let bytes = vec![0x3f; adapters.num_bytes()];

    let works: Vec<Work> = vec![
        Box::new(|| write(&plain, &bytes)),
        Box::new(|| adapters.save(&set).expect("it can be saved")),
        Box::new(|| drop(fs::read(&plain).expect("it was written"))),
        Box::new(|| drop(LoraAdapters::<Plain>::load(&set, &device).expect("it was saved"))),
    ];
    let times = medians(works);
    fs::remove_dir_all(&dir).expect("it was created");

    print_header(
        &format!("Files of {} parameters", adapters.num_params()),
        &["operation", "ms", "of the plain bytes"],
    );
    for (name, index) in [("save, synced", 1), ("load", 3)] {
        let (time, plain) = (times[index], times[index - 1]);
        print_row(&[name.to_owned(), format!("{time:.1}"), format!("{:.2}", time / plain)]);
    }
    println!();
}

/// As durably as `save` does.
fn write(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).expect("it can be created");
    file.write_all(bytes).expect("it can be written");
    file.sync_all().expect("it can be synced");
}
