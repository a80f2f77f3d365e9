//! The model: a recognizer of pictures and one of sounds, joined by a small head.

use burn::{
    module::{Module, Param},
    tensor::{
        Tensor,
        activation::{log_sigmoid, log_softmax},
        backend::Backend,
    },
};

use common::{classifier::Classifier, recognizer::Recognizer};

use crate::pairs::Pair;

/// The number of classes of each encoder.
pub const DIGITS: usize = 10;

/// The name of the head that joins the encoders.
pub const FUSION: &str = "fusion";

/// Tells whether a picture shows the digit that is spoken.
#[derive(Module, Debug)]
pub struct Matcher<B: Backend> {
    pub eye: Recognizer<B>,
    pub ear: Recognizer<B>,
    fusion: Fusion<B>,
}

impl<B: Backend> Matcher<B> {
    /// Joins two recognizers by a head that is not trained yet.
    pub fn new(eye: Recognizer<B>, ear: Recognizer<B>) -> Self {
        let scores = Tensor::zeros([DIGITS, DIGITS], &Default::default());
        Self { eye, ear, fusion: Fusion { scores: Param::from_tensor(scores) } }
    }
}

impl<B: Backend> Classifier<B> for Matcher<B> {
    type Sample = Pair;

    fn logits(&self, [pictures, sounds]: [Tensor<B, 3>; 2]) -> Tensor<B, 2> {
        self.fusion.forward(self.eye.logits(pictures), self.ear.logits(sounds))
    }
}

/// A score for each pair of a digit in a picture and a spoken one.
#[derive(Module, Debug)]
struct Fusion<B: Backend> {
    /// Positive where they are the same digit: `[seen, heard]`.
    scores: Param<Tensor<B, 2>>,
}

impl<B: Backend> Fusion<B> {
    /// The logits of both encoders, `[batch, digits]` each, to the logits of the pairs, `[batch, 2]`.
    ///
    /// These are the logarithms of the probabilities that the two do not match, and that they do: the means over
    /// all pairs of digits, weighted by the probabilities that the encoders give them.
    fn forward(&self, seen: Tensor<B, 2>, heard: Tensor<B, 2>) -> Tensor<B, 2> {
        let seen = log_softmax(seen, 1).unsqueeze_dim::<3>(2);
        let heard = log_softmax(heard, 1).unsqueeze_dim::<3>(1);
        let both = seen + heard;
        let scores = self.scores.val();
        let probability = |scores| {
            let each = both.clone() + log_sigmoid(scores).unsqueeze_dim::<3>(0);
            log_sum_exp(each.flatten(1, 2))
        };
        Tensor::cat(vec![probability(-scores.clone()), probability(scores)], 1)
    }
}

/// The logarithms of the sums of the exponentials of each row: `[rows, columns]` to `[rows, 1]`.
fn log_sum_exp<B: Backend>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    let highest = x.clone().max_dim(1).detach();
    (x - highest.clone()).exp().sum_dim(1).log() + highest
}
