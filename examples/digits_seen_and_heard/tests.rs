//! Tests of the pairs and the model.

use burn::{
    module::AutodiffModule,
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{LoraConfig, LoraModule};
use common::{
    backend::{Plain, Train},
    classifier::{Sample, logits},
    digits::{Digit, Digits, PIXELS},
    recognizer::{Grid, Recognizer},
    speech::generated,
    tensors::bits,
};

use crate::{
    model::{DIGITS, FUSION, Matcher},
    pairs::{Pair, pairs},
    senses::Senses,
};

/// Three grids of each digit, with different values.
fn grids(shape: [usize; 2]) -> Vec<Grid> {
    let count = shape[0] * shape[1];
    let grid = |index: usize| {
        let values = (0..count).map(|at| (at * (index + 3) % 17) as f32 / 16.0).collect();
        Grid { values, shape, label: (index % 10) as u8 }
    };
    (0..30).map(grid).collect()
}

fn some_pairs(seed: u64) -> Vec<Pair> {
    pairs(&grids([28, 28]), &grids([32, 64]), 200, seed).unwrap()
}

#[test]
fn half_of_the_pairs_match() {
    let pairs = some_pairs(1);
    for pair in &pairs {
        assert_eq!(pair.label == 1, pair.picture.label == pair.sound.label);
    }
    assert_eq!(pairs.iter().filter(|it| it.label == 1).count(), 100);
    // Those that do not match have all kinds of differences.
    let different =
        |offset| pairs.iter().any(|it| (it.sound.label + offset) % 10 == it.picture.label);
    assert!((0..10).all(different));
    let digits = |pairs: &[Pair]| -> Vec<_> {
        pairs.iter().map(|it| (it.picture.label, it.sound.label)).collect()
    };
    assert_eq!(digits(&pairs), digits(&some_pairs(1)));
    assert_ne!(digits(&pairs), digits(&some_pairs(2)));
}

#[test]
fn pairs_need_every_digit() {
    let (mut pictures, sounds) = (grids([28, 28]), grids([32, 64]));
    assert!(pairs(&pictures, &[], 10, 1).unwrap_err().contains("no recordings"));
    pictures.retain(|it| it.label != 3);
    assert!(pairs(&pictures, &sounds, 10, 1).unwrap_err().contains("no picture of a 3"));
}

#[test]
fn new_pictures_are_changed_and_new_recordings_are_of_one_speaker() {
    let digit = |label: u8| Digit { pixels: [10 * label; PIXELS], label };
    let digits = Digits {
        name: "test",
        train: (0..10).map(digit).collect(),
        test: (0..5).map(digit).collect(),
    };
    let negatives = Digits {
        train: digits
            .train
            .iter()
            .map(|it| Digit { pixels: it.pixels.map(|p| 255 - p), ..*it })
            .collect(),
        ..digits.clone()
    };
    let recordings = generated::recordings(6, 1);
    let senses = Senses::new(&recordings, "bass", &digits, &negatives).unwrap();
    let Senses { seen_before, heard_before, seen, heard, speaker, .. } = senses;
    assert_eq!(speaker, "bass");
    // Each voice has a recording of each digit that the official split trains on, and five for tests.
    assert_eq!(
        [&seen_before, &seen, &heard_before, &heard].map(|it| it.train.len()),
        [10, 10, 50, 10]
    );
    assert_eq!(
        [&seen_before, &seen, &heard_before, &heard].map(|it| it.test.len()),
        [5, 5, 250, 50]
    );
    for (before, after) in seen_before.train.iter().zip(&seen.train) {
        assert_eq!(before.label, after.label);
        let sums = before.values.iter().zip(&*after.values).map(|(a, b)| a + b);
        assert!(sums.into_iter().all(|sum| (sum - 1.0).abs() < 1e-6));
    }
}

#[test]
fn stacks_pictures_and_sounds() {
    let pairs = some_pairs(1);
    let [pictures, sounds] = Pair::stack::<Plain>(&pairs[..3], &Default::default());
    assert_eq!((pictures.dims(), sounds.dims()), ([3, 28, 28], [3, 32, 64]));
    let second: Tensor<Plain, 3> = sounds.narrow(0, 1, 1);
    assert_eq!(second.into_data().to_vec::<f32>().unwrap(), *pairs[1].sound.values);
}

/// Fresh adapters change nothing. They are on the encoders alone, and the head trains with them.
#[test]
fn adapters_are_in_both_encoders() {
    let device = Default::default();
    Plain::seed(&device, 1);
    let recognizer = || Recognizer::<Train>::new(DIGITS, &device);
    let base = Matcher::new(recognizer(), recognizer());
    let config = LoraConfig::new(2, 4.0).with_modules_to_save([FUSION]);
    let model = base.attach(&config).unwrap();
    let layers = model.parameters().layers;
    let adapted: Vec<_> = layers.iter().filter(|it| it.adapter.is_some()).collect();
    assert_eq!(adapted.len(), 10);
    let pairs = &some_pairs(1)[..4];
    let [before, after] = [base, model.into_inner()].map(|it| logits(&it.valid(), pairs));
    assert_eq!(before.dims(), [4, 2]);
    // They are logarithms of two probabilities.
    let sums: Vec<f32> = before.clone().exp().sum_dim(1).into_data().to_vec().unwrap();
    assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-5), "{sums:?}");
    assert_eq!(bits(before), bits(after));
}
