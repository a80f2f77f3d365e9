//! Digits drawn with a round pen. Each has a few strokes, randomly bent, rotated, slanted and blurred.

use std::f64::consts::TAU;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use rand_distr::Normal;

use super::{Digit, Digits, PIXELS, SIDE};

type Point = [f64; 2];

const TRAIN: usize = 12_000;
const TEST: usize = 2_000;

/// Images for training and for testing. The same seed gives the same images.
pub fn digits(seed: u64) -> Digits {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut draw = |count: usize| {
        (0..count).map(|index| draw((index % 10) as u8, &mut rng)).collect::<Vec<_>>()
    };
    Digits { name: "generated", train: draw(TRAIN), test: draw(TEST) }
}

/// The strokes of a digit: points in the unit square, `[right, down]`. A smooth curve joins the points.
fn strokes(digit: u8) -> Vec<Vec<Point>> {
    match digit {
        0 => vec![ellipse([0.5, 0.5], [0.23, 0.36])],
        1 => vec![vec![[0.36, 0.3], [0.54, 0.12]], vec![[0.54, 0.12], [0.54, 0.88]]],
        2 => vec![
            vec![[0.27, 0.3], [0.48, 0.12], [0.7, 0.28], [0.58, 0.54], [0.27, 0.86]],
            vec![[0.27, 0.86], [0.75, 0.86]],
        ],
        3 => vec![
            vec![[0.29, 0.2], [0.52, 0.12], [0.68, 0.28], [0.44, 0.47]],
            vec![[0.44, 0.47], [0.72, 0.65], [0.55, 0.87], [0.28, 0.79]],
        ],
        4 => vec![
            vec![[0.56, 0.12], [0.24, 0.6]],
            vec![[0.24, 0.6], [0.78, 0.6]],
            vec![[0.62, 0.36], [0.62, 0.9]],
        ],
        5 => vec![
            vec![[0.71, 0.13], [0.35, 0.13]],
            vec![[0.35, 0.13], [0.32, 0.45]],
            vec![[0.32, 0.45], [0.57, 0.42], [0.7, 0.63], [0.55, 0.86], [0.28, 0.82]],
        ],
        6 => vec![vec![
            [0.65, 0.13],
            [0.4, 0.34],
            [0.3, 0.64],
            [0.42, 0.87],
            [0.65, 0.82],
            [0.68, 0.6],
            [0.48, 0.51],
            [0.31, 0.66],
        ]],
        7 => vec![vec![[0.26, 0.14], [0.74, 0.14]], vec![[0.74, 0.14], [0.43, 0.88]]],
        8 => vec![ellipse([0.5, 0.31], [0.17, 0.19]), ellipse([0.5, 0.69], [0.21, 0.19])],
        9 => {
            vec![ellipse([0.49, 0.33], [0.19, 0.2]), vec![[0.68, 0.33], [0.66, 0.62], [0.54, 0.89]]]
        }
        digit => unreachable!("{digit} is not a digit"),
    }
}

fn ellipse(center: Point, radii: Point) -> Vec<Point> {
    let turns = (0..=12).map(|step| f64::from(step) / 12.0 * TAU);
    turns
        .map(|angle| [center[0] + radii[0] * angle.sin(), center[1] - radii[1] * angle.cos()])
        .collect()
}

fn draw(label: u8, rng: &mut StdRng) -> Digit {
    let (sin, cos) = rng.random_range(-0.26f64..0.26).sin_cos();
    let scale = [rng.random_range(16.0..25.0), rng.random_range(19.0..25.0)];
    let slant = rng.random_range(-0.25..0.25);
    let center = (SIDE as f64 - 1.0) / 2.0;
    let shift = [rng.random_range(-2.5..2.5), rng.random_range(-2.0..2.0)];
    let place = |[x, y]: Point, rng: &mut StdRng| {
        let x = (x - 0.5 + rng.random_range(-0.03..0.03)) * scale[0];
        let y = (y - 0.5 + rng.random_range(-0.03..0.03)) * scale[1];
        let x = x - slant * y;
        [center + shift[0] + cos * x - sin * y, center + shift[1] + sin * x + cos * y]
    };
    let mut segments = Vec::new();
    for stroke in strokes(label) {
        let points: Vec<_> = stroke.into_iter().map(|point| place(point, rng)).collect();
        let curve = smooth(&points);
        segments.extend(curve.windows(2).map(|pair| (pair[0], pair[1])));
    }

    let pen = rng.random_range(0.9..1.9);
    let noise = Normal::new(0.0, 14.0).expect("the deviation is positive");
    let pixels: [u8; PIXELS] = std::array::from_fn(|index| {
        let pixel = [(index % SIDE) as f64, (index / SIDE) as f64];
        let squares = segments.iter().map(|&(from, to)| squared_distance(pixel, from, to));
        let nearest = squares.fold(f64::INFINITY, f64::min).sqrt();
        let ink = (pen + 0.5 - nearest).clamp(0.0, 1.0);
        (255.0 * ink + rng.sample(noise)).clamp(0.0, 255.0) as u8
    });
    Digit { pixels, label }
}

/// A Catmull-Rom curve through the points, as short straight segments.
fn smooth(points: &[Point]) -> Vec<Point> {
    if points.len() == 2 {
        return points.to_vec();
    }
    let at = |index: isize| points[index.clamp(0, points.len() as isize - 1) as usize];
    let mut curve = vec![points[0]];
    for from in 0..points.len() as isize - 1 {
        let [before, start, end, after] = [from - 1, from, from + 1, from + 2].map(at);
        for step in 1..=4 {
            let t = f64::from(step) / 4.0;
            curve.push([0, 1].map(|axis| {
                let (p0, p1, p2, p3) = (before[axis], start[axis], end[axis], after[axis]);
                let linear = (p2 - p0) * t;
                let square = (2.0 * p0 - 5.0 * p1 + 4.0 * p2 - p3) * t * t;
                let cube = (3.0 * p1 - p0 - 3.0 * p2 + p3) * t * t * t;
                p1 + 0.5 * (linear + square + cube)
            }));
        }
    }
    curve
}

/// The square of the distance of a point from a segment. The root of the smallest square is enough, and roots
/// would be most of the time of drawing.
fn squared_distance(point: Point, from: Point, to: Point) -> f64 {
    let along = [to[0] - from[0], to[1] - from[1]];
    let offset = [point[0] - from[0], point[1] - from[1]];
    let length = along[0] * along[0] + along[1] * along[1];
    let t = (offset[0] * along[0] + offset[1] * along[1]) / length.max(1e-12);
    let t = t.clamp(0.0, 1.0);
    [0, 1].map(|axis| offset[axis] - t * along[axis]).iter().map(|it| it * it).sum()
}
