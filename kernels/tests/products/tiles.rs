//! Products that go to new memory, and those of single tiles.

use std::panic::catch_unwind;

use burn_lora_kernels::{
    Left, Matrix, Panel, Right, Rows, Term, Tile, Tiles, multiply, sum_of_products,
};

use crate::oracle::{Factors, random, rounded};

const SIDE: usize = 32;

/// The product and a bias, exactly: the numbers are small and whole.
fn expected(factors: &Factors, bias: &[f32]) -> Vec<f32> {
    let (sums, _) = factors.expected();
    sums.iter().zip(bias.iter().cycle()).map(|(&sum, bias)| sum as f32 + bias).collect()
}

#[test]
fn new_memory_has_the_product_and_the_bias() {
    let mut random = random(1);
    // Up to 2,048 numbers are added up at once, and more in several passes.
    for inner in [0, 1, 31, 32, 33, 2047, 2048, 2049, 4100] {
        for [rows, columns] in [[1, 1], [5, 33], [33, 64], [70, 31], [0, 4], [4, 0]] {
            let factors = Factors::whole([rows, inner, columns], &mut random);
            let left = Left::new(&Matrix::new(&factors.left, [rows, inner]));
            let right = Matrix::new(&factors.right, [inner, columns]);
            let terms = [Term { left: &left, right: Right::Plain(&right) }];
            let bias: Vec<f32> = (0..columns).map(|it| it as f32 - 3.0).collect();
            let zeros = vec![0.0; columns];
            let sizes = format!("{rows} x {inner} x {columns}");
            assert_eq!(sum_of_products(&terms, Some(&bias)), expected(&factors, &bias), "{sizes}");
            assert_eq!(sum_of_products(&terms, None), expected(&factors, &zeros), "{sizes}");
        }
    }
}

#[test]
fn new_memory_has_the_sum_of_several_products() {
    let mut random = random(2);
    for inners in [[5, 70], [2016, 32], [2016, 33], [2048, 2048]] {
        let parts = inners.map(|inner| Factors::whole([37, inner, 45], &mut random));
        let lefts = parts.each_ref().map(|it| Left::new(&Matrix::new(&it.left, [37, it.dims[1]])));
        let rights = parts.each_ref().map(|it| Matrix::new(&it.right, [it.dims[1], 45]));
        let terms = [0, 1].map(|it| Term { left: &lefts[it], right: Right::Plain(&rights[it]) });
        let [first, second] = parts.each_ref().map(|it| expected(it, &[0.0]));
        let sum: Vec<f32> = first.iter().zip(&second).map(|(a, b)| a + b).collect();
        assert_eq!(sum_of_products(&terms, None), sum, "{inners:?}");
    }
}

/// Rows that cannot be written.
struct Broken;

impl Rows for Broken {
    fn dims(&self) -> [usize; 2] {
        [64, 40]
    }

    fn write(&self, row: usize, _: usize, to: &mut [u16]) {
        assert!(row < 50, "broken");
        to.fill(0);
    }
}

#[test]
fn what_panics_leaves_the_next_product_right() {
    let mut random = random(3);
    let factors = Factors::whole([40, 64, 40], &mut random);
    let left = Left::new(&Matrix::new(&factors.left, [40, 64]));
    let broken = catch_unwind(|| {
        sum_of_products(&[Term { left: &left, right: Right::Plain(&Broken) }], None)
    });
    assert!(broken.is_err());
    let right = Matrix::new(&factors.right, [64, 40]);
    let terms = [Term { left: &left, right: Right::Plain(&right) }];
    assert_eq!(sum_of_products(&terms, None), expected(&factors, &[0.0]));
}

/// The tile of the product from a row on, and for some rows of the panel.
fn of_tile(factors: &Factors, row: usize, start: usize, count: usize) -> Vec<f64> {
    let [rows, inner, columns] = factors.dims;
    let number = |place: usize, column: usize| -> f64 {
        let row = row + place;
        let products = (0..count).filter(|_| row < rows && column < columns).map(|it| {
            let left = factors.left.get(row * inner + start + it).filter(|_| start + it < inner);
            let left = left.map_or(0.0, |&it| rounded(it));
            left * rounded(factors.right[it * columns + column])
        });
        products.sum()
    };
    (0..SIDE * SIDE).map(|it| number(it / SIDE, it % SIDE)).collect()
}

#[test]
fn tiles_are_products_of_parts() {
    let mut random = random(4);
    let tiles = Tiles::default();
    for count in [1, 2, 31, 32, 33, 64, 100] {
        for start in [0, 32, 64] {
            let factors = Factors::whole([70, 200, SIDE], &mut random);
            let left = Left::new(&Matrix::new(&factors.left, [70, 200]));
            let rows = factors.right.as_chunks::<SIDE>().0;
            let mut panel = Panel::default();
            panel.fill(count, |row| &rows[row]);
            for row in [0, 3, 38, 64] {
                let before = 1000.0;
                let mut tile = Tile([[before; SIDE]; SIDE]);
                for adds in [false, true] {
                    tiles.multiply(&left, [row, start], &panel, adds, &mut tile);
                    let sum = of_tile(&factors, row, start, count);
                    let times = if adds { 2.0 } else { 1.0 };
                    for (found, expected) in tile.0.iter().flatten().zip(sum) {
                        assert_eq!(f64::from(*found), times * expected, "{count} {start} {row}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_panel_of_tiles_is_one_of_their_rows() {
    let mut random = random(5);
    let tiles = Tiles::default();
    let factors = Factors::fractions([SIDE, 96, SIDE], &mut random);
    let left = Left::new(&Matrix::new(&factors.left, [SIDE, 96]));
    let rows = factors.right.as_chunks::<SIDE>().0;
    let [mut by_rows, mut by_tiles] = [Panel::default(), Panel::default()];
    by_rows.fill(96, |row| &rows[row]);
    let parts: Vec<_> = rows.as_chunks::<SIDE>().0.iter().map(|rows| Tile(*rows)).collect();
    by_tiles.fill_tiles(&parts);
    let [first, second] = [by_rows, by_tiles].map(|panel| {
        let mut tile = Tile([[0.0; SIDE]; SIDE]);
        tiles.multiply(&left, [0, 0], &panel, false, &mut tile);
        tile.0
    });
    assert_eq!(first, second);
}

#[test]
fn a_left_factor_is_made_of_tiles() {
    let mut random = random(6);
    let factors = Factors::fractions([64, 96, 40], &mut random);
    let whole = Left::new(&Matrix::new(&factors.left, [64, 96]));
    let mut made = Left::zeros([64, 96]);
    for row in [0, 32] {
        for column in [0, 32, 64] {
            let mut tile = Tile([[0.0; SIDE]; SIDE]);
            for (place, numbers) in tile.0.iter_mut().enumerate() {
                numbers.copy_from_slice(&factors.left[(row + place) * 96 + column..][..SIDE]);
            }
            made.set_tile([row, column], &tile);
        }
    }
    let right = Matrix::new(&factors.right, [96, 40]);
    let [whole, made] = [&whole, &made]
        .map(|left| sum_of_products(&[Term { left, right: Right::Plain(&right) }], None));
    assert_eq!(whole, made);
}

/// Other products on the same thread neither end nor change what tiles need.
#[test]
fn tiles_survive_other_products() {
    let mut random = random(7);
    let factors = Factors::whole([40, 64, SIDE], &mut random);
    let left = Left::new(&Matrix::new(&factors.left, [40, 64]));
    let rows = factors.right.as_chunks::<SIDE>().0;
    let mut panel = Panel::default();
    panel.fill(64, |row| &rows[row]);
    let tiles = Tiles::default();
    drop(Tiles::default());
    let right = Matrix::new(&factors.right, [64, SIDE]);
    let mut other = vec![0.0; 40 * SIDE];
    let output = burn_lora_kernels::Output::new(&mut other, [40, SIDE]);
    multiply(&[Term { left: &left, right: Right::Plain(&right) }], output);
    let mut tile = Tile([[0.0; SIDE]; SIDE]);
    tiles.multiply(&left, [0, 0], &panel, false, &mut tile);
    for (found, expected) in tile.0.iter().flatten().zip(of_tile(&factors, 0, 0, 64)) {
        assert_eq!(f64::from(*found), expected);
    }
}

#[test]
#[should_panic(expected = "are not in 64 x 64")]
fn tiles_beyond_the_factor_are_refused() {
    let left = Left::zeros([40, 40]);
    let mut panel = Panel::default();
    panel.fill(40, |_| &[0.0; SIDE]);
    let mut tile = Tile([[0.0; SIDE]; SIDE]);
    Tiles::default().multiply(&left, [33, 0], &panel, false, &mut tile);
}

#[test]
#[should_panic(expected = "is none of 40 x 40")]
fn tiles_between_others_are_refused() {
    Left::zeros([40, 40]).set_tile([0, 16], &Tile([[0.0; SIDE]; SIDE]));
}
