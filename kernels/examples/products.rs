//! How fast products are in bf16, by each set of instructions that this processor has:
//! `cargo run --release -p burn-lora-kernels --example products`.
//!
//! The left factor is packed anew for each product, and the right one is read as rows of `f32` or of bf16, which are the
//! columns of the product, as layers have them.

use std::time::Instant;

use burn_lora_kernels::{Instructions, Left, Matrix, Output, Right, Rows, Term, multiply_by};
use half::bf16;

/// Rows, numbers that are summed up, and columns.
const SIZES: [[usize; 3]; 4] =
    [[1024, 1024, 1024], [512, 576, 1536], [512, 1536, 576], [512, 4096, 4096]];

/// For so long each product is repeated.
const SECONDS: f64 = 0.5;

fn main() {
    println!("rows x inner x columns, billions of operations a second, on {} threads", {
        rayon::current_num_threads()
    });
    for dims @ [rows, inner, columns] in SIZES {
        let numbers = |count: usize| (0..count).map(|it| (it * 7919 % 1000) as f32 / 1000.0 - 0.5);
        let left: Vec<f32> = numbers(rows * inner).collect();
        let wide: Vec<f32> = numbers(columns * inner).collect();
        let narrow: Vec<bf16> = wide.iter().copied().map(bf16::from_f32).collect();
        let left = Matrix::new(&left, [rows, inner]);
        for by in Instructions::ALL.into_iter().filter(|it| it.are_there()) {
            let rates = [
                rate(by, &left, &Matrix::new(&wide, [columns, inner])),
                rate(by, &left, &Matrix::new(&narrow, [columns, inner])),
            ];
            let [wide, narrow] = rates.map(|it| it.round());
            println!("{dims:?} {by:12} {wide:6} from f32, {narrow:6} from bf16");
        }
    }
}

fn rate(by: Instructions, left: &Matrix<f32>, right: &dyn Rows) -> f64 {
    let ([rows, inner], [columns, _]) = (left.dims(), right.dims());
    let mut result = vec![0.0; rows * columns];
    let (mut fastest, start) = (f64::INFINITY, Instant::now());
    while start.elapsed().as_secs_f64() < SECONDS {
        let begun = Instant::now();
        let terms = [Term { left: &Left::new(left), right: Right::Transposed(right) }];
        multiply_by(by, &terms, Output::new(&mut result, [rows, columns]));
        fastest = fastest.min(begun.elapsed().as_secs_f64());
    }
    2e-9 * (rows * inner * columns) as f64 / fastest
}
