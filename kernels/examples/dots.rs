//! Rates of dot products: the bytes of packed rows, and the numbers in them, that are read in a second on one thread.

use std::{hint::black_box, time::Instant};

use burn_lora_kernels::{
    BlockFormat, Blocks, Codes, DotMemory, Dots, Floats, SplitRow, Vector8, dots,
};

const COLUMNS: usize = 4096;

fn main() {
    println!("chosen: {}", dots());
    let numbers: Vec<f32> = (0..COLUMNS).map(|it| (it as f32 * 0.7).sin()).collect();
    let x = Vector8::new(&numbers);
    let spent = best(|| drop(black_box(Vector8::new(black_box(&numbers)))));
    println!("a vector of {COLUMNS} numbers to 8 bits: {:.2} us", 1e6 * spent);
    // Rows that stay in a cache, and rows that come from memory.
    for rows in [32, 16384] {
        println!("{rows} rows of {COLUMNS}");
        for format in BlockFormat::ALL {
            let size = format.row_bytes(COLUMNS);
            // Scales of 0x3434, which are a quarter.
            let bytes = vec![0x34; rows * size];
            let matrix = Blocks::new(format, &bytes, [rows, COLUMNS]);
            let mut to = vec![0.0; rows];
            for by in Dots::ALL.into_iter().filter(|it| it.are_there()) {
                let spent = best(|| matrix.times(by, &x, black_box(&mut to)));
                print(&format!("{format:?}"), by, bytes.len(), rows, spent);
            }
            if let Some(by) = Dots::ALL.into_iter().rev().find(|it| it.are_there()) {
                let mut memory = DotMemory::new();
                let spent = best(|| {
                    for row in 0..rows {
                        black_box(format.dots(by, matrix.row(row), [&x; 4], &mut memory));
                    }
                });
                print(&format!("{format:?} x 4"), by, bytes.len(), 4 * rows, spent);
            }
        }
        let (scales, halves) = (vec![0.25; COLUMNS / 64], vec![[0x34; 2]; COLUMNS / 32]);
        let (full, half) = ((64, Floats::Full(&scales)), (32, Floats::Halves(&halves)));
        for (codes, bits, (block, scales)) in [
            (Codes::Bytes, 8, full),
            (Codes::Bytes, 8, half),
            (Codes::Nibbles, 4, full),
            (Codes::Nibbles, 4, half),
            (Codes::Nf4, 4, full),
        ] {
            let size = COLUMNS * bits / 8;
            let bytes = vec![0x34; rows * size];
            for by in Dots::ALL.into_iter().filter(|it| it.are_there()) {
                let mut memory = DotMemory::new();
                let spent = best(|| {
                    for bytes in bytes.chunks_exact(size) {
                        let row = SplitRow { codes, bytes, block, scales, minima: None };
                        black_box(row.dots(by, [&x], &mut memory));
                    }
                });
                print(&format!("{codes:?}, {block}"), by, bytes.len(), rows, spent);
            }
        }
    }
    let mut numbers = vec![0.0; COLUMNS];
    for format in BlockFormat::ALL {
        let bytes = vec![0x34; format.row_bytes(COLUMNS)];
        let spent = best(|| format.unpack(&bytes, black_box(&mut numbers)));
        println!("unpack {format:?}: {:.1} G numbers/s", 1e-9 * COLUMNS as f64 / spent);
    }
}

fn print(name: &str, by: Dots, bytes: usize, rows: usize, spent: f64) {
    let (bytes, numbers) = (1e-9 * bytes as f64 / spent, 1e-9 * (rows * COLUMNS) as f64 / spent);
    println!("{name:20} {by:12} {bytes:6.1} GB/s {numbers:6.1} G products/s");
}

/// The seconds of the fastest of some runs.
fn best(mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::MAX;
    while start.elapsed().as_secs_f64() < 0.1 {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}
