//! What a sweep needs to know of a task.

use common::classifier::{Learns, SampleOf};

/// A base that was trained on one task, and another task that it is adapted to.
pub struct Task<M: Learns> {
    /// "mnist" or "generated".
    pub dataset: &'static str,
    pub base: M,
    pub train: Vec<SampleOf<M>>,
    pub test: Vec<SampleOf<M>>,
    /// Test samples of the task that the base was trained on. Empty if it is another kind of task.
    pub old_test: Vec<SampleOf<M>>,
    /// Modules without adapters, all of whose parameters train along with the adapters.
    pub modules_to_save: &'static [&'static str],
    /// The layers that get adapters where the layers are not what is compared. Empty for all.
    pub targets: &'static [&'static str],
    /// The sets of layers that are compared, and their names.
    pub sets: &'static [(&'static str, &'static [&'static str])],
    /// The learning rate of full fine-tuning.
    pub learning_rate: f64,
    pub lora_learning_rate: f64,
    pub epochs: usize,
}
