use burn::{
    module::{Content, DisplaySettings, Module, ModuleDisplay, Param, RunningState},
    nn,
    tensor::{Tensor, backend::Backend},
};

use super::{folding::Foldable, statistic::Statistic};
use crate::{
    ops::{Channels, ScaleChannels, run},
    tensors::{at_least_f32, frozen},
};

/// A drop-in for Burn's [`BatchNorm`](nn::BatchNorm) that is frozen where its model is frozen.
///
/// Burn's asks the backend alone: with autodiff it normalizes by the statistics of the batch and moves the running
/// ones, whether it trains or not, and all clones of a model share these. A base would change with every step of an
/// adapter. This one
///
/// - **while it is frozen** normalizes by the running statistics of the base and moves nothing, with and without
///   autodiff, so that an adapted model trains on the numbers that it is evaluated with, and one output does not
///   depend on the rest of its batch. Recipes in PyTorch call `norm.eval()` for that;
/// - **while it trains**, that is while `gamma` requires a gradient, is Burn's: the batch's statistics, and running
///   ones that move. [`modules_to_save`](crate::LoraConfig::modules_to_save) has it train. Its running statistics are
///   saved with the adapters then, as PEFT does. No other model shares them.
///
/// Paths and files are Burn's.
///
/// ```
/// use burn::{backend::{Autodiff, Flex}, nn::BatchNormConfig, module::Module, tensor::Tensor};
/// use burn_lora::nn::BatchNorm;
///
/// type B = Autodiff<Flex>;
/// let device = Default::default();
/// let norm: BatchNorm<B> = BatchNormConfig::new(3).init(&device).into();
/// let frozen = norm.clone().no_grad();
/// let x = Tensor::<B, 4>::ones([2, 3, 8, 8], &device) * 5.0;
///
/// // A new norm has mean 0 and variance 1: nothing changes.
/// assert!(frozen.forward(x.clone()).mean().into_scalar() > 4.9);
/// // The batch has mean 5: all that is left is 0.
/// assert!(norm.forward(x).mean().into_scalar().abs() < 1e-3);
/// ```
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct BatchNorm<B: Backend> {
    /// The learnable factor, `[channels]`. PyTorch's `weight`.
    pub gamma: Param<Tensor<B, 1>>,
    /// The learnable bias, `[channels]`.
    pub beta: Param<Tensor<B, 1>>,
    /// The running mean, `[channels]`.
    running_mean: Statistic<B>,
    /// The running variance, `[channels]`.
    running_var: Statistic<B>,
    /// How much of a new batch goes into the running statistics, from 0 to 1.
    pub momentum: f64,
    /// What is added to the variance, so that its root is not zero.
    pub epsilon: f64,
}

impl<B: Backend> From<nn::BatchNorm<B>> for BatchNorm<B> {
    fn from(norm: nn::BatchNorm<B>) -> Self {
        let nn::BatchNorm { gamma, beta, running_mean, running_var, momentum, epsilon } = norm;
        // A record has taken in what the last passes left behind.
        let own = |shared: RunningState<Tensor<B, 1>>| shared.into_record().into();
        let (running_mean, running_var) = (own(running_mean), own(running_var));
        Self { gamma, beta, running_mean, running_var, momentum, epsilon }
    }
}

impl<B: Backend> BatchNorm<B> {
    /// The running mean, as a constant: `[channels]`.
    pub fn running_mean(&self) -> Tensor<B, 1> {
        self.running_mean.value()
    }

    /// The running variance, as a constant: `[channels]`.
    pub fn running_var(&self) -> Tensor<B, 1> {
        self.running_var.value()
    }

    /// Whether it normalizes by the batch, and moves its running statistics.
    pub fn trains(&self) -> bool {
        B::ad_enabled(&self.gamma.lazy_device()) && self.gamma.is_require_grad()
    }

    /// Normalizes each channel: `[batch, channels, ..]` to the same shape.
    ///
    /// # Panics
    ///
    /// If the input has fewer than two dimensions, or another number of channels.
    pub fn forward<const D: usize>(&self, input: Tensor<B, D>) -> Tensor<B, D> {
        let channels = self.gamma.shape()[0];
        assert!(
            D >= 2 && input.dims()[1] == channels,
            "a batch norm of {channels} channels: expected [batch, {channels}, ..], got {:?}",
            input.dims(),
        );
        if self.trains() {
            return self.forward_by_batch(input);
        }
        // Two numbers per channel are less work than four passes over the input.
        let (mean, var) = (self.running_mean(), self.running_var());
        let factor = self.gamma.val() / var.add_scalar(self.epsilon).sqrt();
        let summand = self.beta.val() - mean * factor.clone();
        let input = Channels { x: input, factor, summand };
        run::<ScaleChannels<D>, B>(&input).unwrap_or_else(|| {
            let mut shape = [1; D];
            shape[1] = channels;
            input.x * input.factor.reshape(shape) + input.summand.reshape(shape)
        })
    }

    /// Puts what the norm does into the convolution before it, whose weight and bias change. The norm then changes
    /// nothing, and costs nothing on the CPU backends of the features `flex` and `ndarray`. The output of both is the
    /// same, but for rounding (in `f32`, 1e-5 and less).
    ///
    /// The convolution has a bias then, also if it had none. Load a record of it only into a model whose convolution has
    /// one: Burn would leave it out without a word.
    ///
    /// Do it with a model for inference, after [`merge`](crate::Lora::merge):
    ///
    /// ```
    /// # use burn::{backend::Flex, nn::{BatchNormConfig, conv::Conv2dConfig}, tensor::Tensor};
    /// # use burn_lora::nn::{BatchNorm, LoraConv2d};
    /// # let device = Default::default();
    /// # let mut conv: LoraConv2d<Flex> = Conv2dConfig::new([3, 8], [3, 3]).init(&device).into();
    /// # let mut norm: BatchNorm<Flex> = BatchNormConfig::new(8).init(&device).into();
    /// # let x = Tensor::ones([1, 3, 8, 8], &device);
    /// let before = norm.forward(conv.forward(x.clone()));
    /// norm.fold_into(&mut conv);
    /// let after = norm.forward(conv.forward(x));
    /// # assert!((before - after).abs().max().into_scalar() < 1e-5);
    /// ```
    ///
    /// # Panics
    ///
    /// If the norm trains, has another number of channels than the convolution has outputs, or if the convolution has
    /// an adapter: merge it first.
    pub fn fold_into<C: Foldable<B>>(&mut self, conv: &mut C) {
        let channels = self.gamma.shape()[0];
        assert!(!self.trains(), "a frozen norm expected: one that trains cannot be folded");
        let [gamma, beta] = [&self.gamma, &self.beta].map(|it| at_least_f32(frozen(it)));
        let [mean, var] = [self.running_mean(), self.running_var()].map(at_least_f32);
        let factor = gamma / var.add_scalar(self.epsilon).sqrt();
        let summand = beta - mean * factor.clone();
        conv.scale_outputs(channels, factor, summand);
        let like = self.running_mean().zeros_like();
        let (running_mean, running_var) = (&self.running_mean, &self.running_var);
        running_mean.set(like.clone());
        running_var.set(like.ones_like());
        // Divided by the root in a forward pass, it gives exactly 1.
        let root = like.ones_like().add_scalar(self.epsilon).sqrt();
        self.gamma = Param::initialized(self.gamma.id, root);
        self.beta = Param::initialized(self.beta.id, like);
    }

    fn forward_by_batch<const D: usize>(&self, input: Tensor<B, D>) -> Tensor<B, D> {
        let norm = nn::BatchNorm {
            gamma: self.gamma.clone(),
            beta: self.beta.clone(),
            running_mean: RunningState::new(self.running_mean()),
            running_var: RunningState::new(self.running_var()),
            momentum: self.momentum,
            epsilon: self.epsilon,
        };
        let output = norm.forward(input);
        self.running_mean.move_to(norm.running_mean.value_sync());
        self.running_var.move_to(norm.running_var.value_sync());
        output
    }
}

impl<B: Backend> ModuleDisplay for BatchNorm<B> {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        content
            .add("num_features", &self.gamma.shape()[0])
            .add("momentum", &self.momentum)
            .add("epsilon", &self.epsilon)
            .optional()
    }
}
