//! Handwritten digits: MNIST where it is available, and drawn digits otherwise.

mod generated;
mod mnist;

use std::path::Path;

use burn::tensor::{Tensor, backend::Backend};

use burn_lora_llm::{Result, cli::live::during};

use super::{
    classifier::{Sample, stack_images},
    experiment::Samples,
};

/// The side of an image, in pixels.
pub const SIDE: usize = 28;

/// The number of pixels.
pub const PIXELS: usize = SIDE * SIDE;

/// A gray image, row by row, and the digit it shows.
#[derive(Clone, Debug)]
pub struct Digit {
    pub pixels: [u8; PIXELS],
    pub label: u8,
}

impl Sample for Digit {
    type Input<B: Backend> = Tensor<B, 2>;

    fn label(&self) -> u8 {
        self.label
    }

    fn stack<B: Backend>(samples: &[Self], device: &B::Device) -> Tensor<B, 2> {
        stack_images(samples.iter().map(|it| &it.pixels[..]), device)
    }
}

/// Images for training and for testing.
#[derive(Clone)]
pub struct Digits {
    /// "mnist" or "generated".
    pub name: &'static str,
    pub train: Vec<Digit>,
    pub test: Vec<Digit>,
}

impl Digits {
    /// MNIST from `dir` if given, and otherwise from the cache directory or the network. Drawn digits if
    /// none of them has it, or if `generated` is set.
    pub fn load(dir: Option<&Path>, generated: bool, seed: u64) -> Result<Self> {
        if generated {
            return Ok(Self::drawn(seed));
        }
        if let Some(dir) = dir {
            println!("Data: MNIST from {}", dir.display());
            return Self::read(dir);
        }
        match mnist::cached_or_downloaded() {
            Ok(dir) => {
                println!("Data: MNIST from {}", dir.display());
                Self::read(&dir)
            }
            Err(reason) => {
                println!("Data: generated digits, because MNIST is not available ({reason})");
                Ok(Self::drawn(seed))
            }
        }
    }

    /// MNIST from `dir`.
    pub fn read(dir: &Path) -> Result<Self> {
        mnist::read(dir)
    }

    pub fn drawn(seed: u64) -> Self {
        during("drawing digits", || generated::digits(seed))
    }

    pub fn samples(&self) -> Samples<'_, Digit> {
        Samples::new(&self.train, &self.test)
    }

    /// The same digits, with `change` applied to each image.
    pub fn map(&self, change: impl Fn(&[u8; PIXELS]) -> [u8; PIXELS]) -> Self {
        let changed = |digits: &[Digit]| {
            let digits = digits.iter();
            digits.map(|it| Digit { pixels: change(&it.pixels), label: it.label }).collect()
        };
        during("changing the images", || Self {
            name: self.name,
            train: changed(&self.train),
            test: changed(&self.test),
        })
    }
}

/// The image rotated counter-clockwise by `degrees`, with bilinear sampling and a black background.
pub fn rotate(pixels: &[u8; PIXELS], degrees: f64) -> [u8; PIXELS] {
    let (sin, cos) = degrees.to_radians().sin_cos();
    let center = (SIDE as f64 - 1.0) / 2.0;
    let sample = |x: f64, y: f64| {
        let at = |x: f64, y: f64| {
            let inside = (0.0..SIDE as f64).contains(&x) && (0.0..SIDE as f64).contains(&y);
            if inside { f64::from(pixels[y as usize * SIDE + x as usize]) } else { 0.0 }
        };
        let (left, top) = (x.floor(), y.floor());
        let (right, down) = (x - left, y - top);
        (1.0 - down) * ((1.0 - right) * at(left, top) + right * at(left + 1.0, top))
            + down * ((1.0 - right) * at(left, top + 1.0) + right * at(left + 1.0, top + 1.0))
    };
    std::array::from_fn(|index| {
        let (x, y) = ((index % SIDE) as f64 - center, (index / SIDE) as f64 - center);
        sample(center + cos * x - sin * y, center + sin * x + cos * y).round() as u8
    })
}

/// The image with left and right exchanged.
pub fn mirror(pixels: &[u8; PIXELS]) -> [u8; PIXELS] {
    std::array::from_fn(|index| pixels[index - index % SIDE + SIDE - 1 - index % SIDE])
}
