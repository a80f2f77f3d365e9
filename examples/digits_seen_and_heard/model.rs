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

/// The number of digits that each side tells apart.
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
    /// Joins two recognizers by a head that knows nothing yet.
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

/// What is known of which seen digit goes with which heard one.
#[derive(Module, Debug)]
struct Fusion<B: Backend> {
    /// Positive where they go together: `[seen, heard]`.
    scores: Param<Tensor<B, 2>>,
}

impl<B: Backend> Fusion<B> {
    /// What each side makes of the digit, `[batch, digits]`, to the logits, `[batch, 2]`.
    ///
    /// They are the logarithms of the probabilities that the two do not go together, and that they do: the mean
    /// over all pairs of digits, each as likely as the two sides think.
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
