//! Small photographs: CIFAR-10 where it is available, and drawn shapes otherwise.

mod generated;
mod official;

use std::path::Path;

use burn::tensor::{Tensor, backend::Backend};

use common::{
    Result,
    classifier::{Sample, stack_images},
    cli::live::during,
    experiment::Samples,
};

/// The side of an image, in pixels.
pub const SIDE: usize = 32;

/// Red, green and blue.
pub const CHANNELS: usize = 3;

/// The number of values of an image.
pub const VALUES: usize = CHANNELS * SIDE * SIDE;

/// A color image, channel by channel and row by row, and its class.
#[derive(Clone, Debug)]
pub struct Photo {
    pub pixels: Vec<u8>,
    pub label: u8,
}

impl Sample for Photo {
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
pub struct Photos {
    /// "cifar10" or "generated".
    pub name: &'static str,
    pub train: Vec<Photo>,
    pub test: Vec<Photo>,
}

impl Photos {
    /// CIFAR-10 from `dir` if given, and otherwise from the cache directory or the network. Drawn
    /// shapes if none of them has it, or if `generated` is set.
    pub fn load(dir: Option<&Path>, generated: bool, seed: u64) -> Result<Self> {
        if generated {
            return Ok(during("drawing shapes", || generated::photos(seed)));
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
                println!("Data: generated shapes, because CIFAR-10 is not available ({reason})");
                Ok(during("drawing shapes", || generated::photos(seed)))
            }
        }
    }

    pub fn samples(&self) -> Samples<'_, Photo> {
        Samples::new(&self.train, &self.test)
    }

    /// The same photographs, with `change` applied to each.
    pub fn map(&self, change: impl Fn(&[u8]) -> Vec<u8>) -> Self {
        let changed = |photos: &[Photo]| {
            let photos = photos.iter();
            photos.map(|it| Photo { pixels: change(&it.pixels), label: it.label }).collect()
        };
        Self { name: self.name, train: changed(&self.train), test: changed(&self.test) }
    }
}

/// The photographic negative: every value is replaced by 255 minus itself.
pub fn negative(pixels: &[u8]) -> Vec<u8> {
    pixels.iter().map(|value| 255 - value).collect()
}
