//! Small photographs: CIFAR-10 where it can be had, drawn shapes otherwise.

mod generated;
mod official;

use std::path::Path;

use crate::common::{Result, classifier::Picture};

/// The side of an image, in pixels.
pub const SIDE: usize = 32;

/// Red, green and blue.
pub const CHANNELS: usize = 3;

/// The number of values of an image.
pub const VALUES: usize = CHANNELS * SIDE * SIDE;

/// A colour image, channel by channel and row by row, and its class.
#[derive(Clone, Debug)]
pub struct Photo {
    pub pixels: Vec<u8>,
    pub label: u8,
}

impl Picture for Photo {
    fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    fn label(&self) -> u8 {
        self.label
    }
}

/// Images to learn from, and others to judge by.
#[derive(Clone)]
pub struct Photos {
    /// "cifar10" or "generated".
    pub name: &'static str,
    pub train: Vec<Photo>,
    pub test: Vec<Photo>,
}

impl Photos {
    /// CIFAR-10 from `dir` if given; otherwise from the cache directory, or the network; and if
    /// there is neither, or `generated` is set, drawn shapes.
    pub fn load(dir: Option<&Path>, generated: bool, seed: u64) -> Result<Self> {
        if generated {
            return Ok(generated::photos(seed));
        }
        if let Some(dir) = dir {
            println!("Data: CIFAR-10 from {}", dir.display());
            return official::read(dir);
        }
        match official::cached_or_downloaded() {
            Ok(dir) => {
                println!("Data: CIFAR-10 from {}", dir.display());
                official::read(&dir)
            }
            Err(reason) => {
                println!("Data: generated shapes, since CIFAR-10 is not at hand ({reason})");
                Ok(generated::photos(seed))
            }
        }
    }

    /// The same photographs, each changed.
    pub fn map(&self, change: impl Fn(&[u8]) -> Vec<u8>) -> Self {
        let changed = |photos: &[Photo]| {
            let photos = photos.iter();
            photos.map(|it| Photo { pixels: change(&it.pixels), label: it.label }).collect()
        };
        Self { name: self.name, train: changed(&self.train), test: changed(&self.test) }
    }
}

/// The photograph as a grey relief, lit from the top left: what is left of it are the edges.
pub fn emboss(pixels: &[u8]) -> Vec<u8> {
    let plane = SIDE * SIDE;
    let grey = |row: usize, column: usize| {
        let at = row.min(SIDE - 1) * SIDE + column.min(SIDE - 1);
        (0..CHANNELS).map(|channel| i32::from(pixels[channel * plane + at])).sum::<i32>()
    };
    let relief = (0..plane).map(|index| {
        let (row, column) = (index / SIDE, index % SIDE);
        let slope =
            grey(row + 1, column + 1) - grey(row.saturating_sub(1), column.saturating_sub(1));
        (128 + slope / 3).clamp(0, 255) as u8
    });
    relief.collect::<Vec<_>>().repeat(CHANNELS)
}
