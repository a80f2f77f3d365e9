//! Pairs of a picture and a sound. Half of them are of the same digit.

use burn::tensor::{Tensor, backend::Backend};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use common::{Result, classifier::Sample, recognizer::Grid};

/// A picture and a sound. The class is 1 if both are of the same digit, and 0 otherwise.
#[derive(Clone, Debug)]
pub struct Pair {
    pub picture: Grid,
    pub sound: Grid,
    pub label: u8,
}

impl Sample for Pair {
    /// Pictures and sounds: `[batch, rows, columns]` each.
    type Input<B: Backend> = [Tensor<B, 3>; 2];

    const BATCH: usize = 32;

    fn label(&self) -> u8 {
        self.label
    }

    fn stack<B: Backend>(samples: &[Self], device: &B::Device) -> [Tensor<B, 3>; 2] {
        [
            Grid::stack(samples.iter().map(|it| &it.picture), device),
            Grid::stack(samples.iter().map(|it| &it.sound), device),
        ]
    }
}

/// Draws `count` pairs of these pictures and sounds, whose classes are their digits. Every second pair is of
/// the same digit. All sounds are equally likely, and so are all digits of the pictures.
pub fn pairs(pictures: &[Grid], sounds: &[Grid], count: usize, seed: u64) -> Result<Vec<Pair>> {
    let mut rng = StdRng::seed_from_u64(seed);
    let by_digit: [Vec<&Grid>; 10] = std::array::from_fn(|digit| {
        pictures.iter().filter(|it| usize::from(it.label) == digit).collect()
    });
    if let Some(digit) = by_digit.iter().position(Vec::is_empty) {
        return Err(format!("there is no picture of a {digit} to make pairs with"));
    }
    if sounds.is_empty() {
        return Err("there are no recordings to make pairs with".to_owned());
    }
    let pair = |index: usize| {
        let sound = &sounds[rng.random_range(0..sounds.len())];
        let label = (index % 2) as u8;
        let digit = match label {
            1 => sound.label,
            _ => (sound.label + rng.random_range(1..10)) % 10,
        };
        let of_digit = &by_digit[usize::from(digit)];
        let picture = of_digit[rng.random_range(0..of_digit.len())];
        Pair { picture: picture.clone(), sound: sound.clone(), label }
    };
    Ok((0..count).map(pair).collect())
}
