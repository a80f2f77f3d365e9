//! Saving and loading ten million parameters, against writing and reading the same bytes plainly.
//!
//! ```text
//! cargo bench --bench files
//! ```

// Only a main function.
#![allow(missing_docs)]

#[path = "../examples/common/backend.rs"]
mod backend;

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    time::Instant,
};

use backend::Plain;
use burn_lora::{Init, LoraAdapter, LoraAdapters, LoraConfig};

const ROUNDS: usize = 15;

fn main() {
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

    // In turn, so that a change of the machine's speed meets all of them.
    let mut times = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        times[0].push(seconds(|| write(&plain, &bytes)));
        times[1].push(seconds(|| adapters.save(&set).expect("it can be saved")));
        times[2].push(seconds(|| drop(fs::read(&plain).expect("it was written"))));
        times[3].push(seconds(|| {
            LoraAdapters::<Plain>::load(&set, &device).expect("it was saved");
        }));
    }
    fs::remove_dir_all(&dir).expect("it was created");

    let [write, save, read, load] = times.map(median);
    println!(
        "{} parameters, {} bytes, backend {}, medians of {ROUNDS} in turn",
        adapters.num_params(),
        adapters.num_bytes(),
        backend::NAME
    );
    println!(
        "write and sync {:7.1} ms   save {:7.1} ms   ratio {:.2}",
        write * 1e3,
        save * 1e3,
        save / write
    );
    println!(
        "read           {:7.1} ms   load {:7.1} ms   ratio {:.2}",
        read * 1e3,
        load * 1e3,
        load / read
    );
}

/// As durably as `save` does.
fn write(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).expect("it can be created");
    file.write_all(bytes).expect("it can be written");
    file.sync_all().expect("it can be synced");
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
