//! Drawn images: a textured shape of a random color on a background with a gradient.

use rand::{RngExt, SeedableRng, rngs::StdRng};
use rand_distr::Normal;

use super::{CHANNELS, Photo, Photos, SIDE};

const TRAIN: usize = 6_000;
const TEST: usize = 1_000;

/// Images for training and for testing. The same seed gives the same images.
pub fn photos(seed: u64) -> Photos {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut draw = |count: usize| {
        (0..count).map(|index| draw((index % 10) as u8, &mut rng)).collect::<Vec<_>>()
    };
    Photos { name: "generated", train: draw(TRAIN), test: draw(TEST) }
}

/// The approximate distance of a point from a shape of radius 1. It is negative inside the shape.
fn outside(shape: u8, x: f64, y: f64) -> f64 {
    match shape {
        0 => x.hypot(y) - 1.0,
        1 => x.abs().max(y.abs()) - 0.85,
        2 => (y - 0.6).max(1.7 * x.abs() - y - 1.0),
        3 => (x.abs().min(y.abs()) - 0.3).max(x.abs().max(y.abs()) - 1.0),
        _ => (x.hypot(y) - 0.75).abs() - 0.25,
    }
}

fn draw(label: u8, rng: &mut StdRng) -> Photo {
    let (shape, striped) = (label % 5, label >= 5);
    let radius = rng.random_range(8.0..13.0);
    let [center_x, center_y] = [(); 2].map(|()| 15.5 + rng.random_range(-3.0..3.0));
    let (sin, cos) = rng.random_range(-0.4f64..0.4).sin_cos();
    let wave = rng.random_range(1.3..1.7);
    // Shapes are bright and backgrounds are dark, so that a negative looks different from any image.
    let mut color = |from: f64| [(); CHANNELS].map(|()| from + rng.random_range(0.0..110.0));
    let (ink, paper, shade) = (color(130.0), color(0.0), color(20.0));
    let noise = Normal::new(0.0, 10.0).expect("the deviation is positive");
    let mut pixels = vec![0; CHANNELS * SIDE * SIDE];
    for row in 0..SIDE {
        for column in 0..SIDE {
            let (dx, dy) = (column as f64 - center_x, row as f64 - center_y);
            let (x, y) = ((cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius);
            let covered = (0.5 - radius * outside(shape, x, y)).clamp(0.0, 1.0);
            let dark = striped && (wave * (dx + dy)).sin() > 0.0;
            let ink_share = if dark { 0.25 } else { 1.0 };
            let fade = row as f64 / SIDE as f64 * 0.4;
            for channel in 0..CHANNELS {
                let back = (1.0 - fade) * paper[channel] + fade * shade[channel];
                let front = ink_share * ink[channel] + (1.0 - ink_share) * back;
                let value = covered * front + (1.0 - covered) * back + rng.sample(noise);
                pixels[(channel * SIDE + row) * SIDE + column] = value.clamp(0.0, 255.0) as u8;
            }
        }
    }
    Photo { pixels, label }
}
