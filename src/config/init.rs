//! The initial values of fresh adapters.

use serde::{Deserialize, Serialize};

use super::LoraConfig;

/// The initial values of a fresh adapter's factors. Except with [`RandomBoth`](Self::RandomBoth), a fresh
/// adapter changes nothing: B is zero, or `A·B` is, or what A and B hold is in the weight already.
///
/// On a [`LoraEmbedding`](crate::nn::LoraEmbedding), A is zero instead of B, which is drawn from the normal
/// distribution; with [`RandomBoth`](Self::RandomBoth) both are.
///
/// PiSSA and OLoRA take A and B from the weight, and train what was there. In Python they subtract
/// `s·A·B` from the weight. Here the weight stays as it is, so that it can be shared, and given back, to
/// the bit. The update is `s·(A·B − A₀·B₀)` instead, where A₀ and B₀ are the initial values: the same
/// sum. It takes as much time as twice the rank. A file gets it as an adapter of twice the rank, as PEFT
/// converts it, which fits the original weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Init {
    /// A from the uniform distribution on `±1/√d_input`, as PEFT and the authors' loralib do.
    #[default]
    KaimingUniform,
    /// A from the normal distribution with standard deviation `1/rank`: PEFT's `"gaussian"`.
    Gaussian,
    /// A as with [`KaimingUniform`](Self::KaimingUniform), and B from the uniform distribution on
    /// `±1/√rank`: PEFT's `init_lora_weights=False`. Such an adapter changes the output from the
    /// start. It is meant for tests.
    RandomBoth,
    /// A and B are random, and `A·B` is zero: PEFT's `"orthogonal"`. The rank must be even.
    Orthogonal,
    /// The part of the weight with the largest singular values
    /// ([Meng et al. 2024](https://arxiv.org/abs/2404.02948)): PEFT's `"pissa"`. On a layer that is
    /// smaller than the rank, the rank is the smaller side of the weight.
    Pissa,
    /// The same approximately, which is much faster for large weights: PEFT's `"pissa_niter_16"`, for
    /// 16 iterations.
    #[serde(alias = "pissa_randomised")]
    PissaRandomized {
        /// The number of iterations. The more there are, the nearer the values are to the exact ones.
        iterations: usize,
    },
    /// The first part of the weight's QR decomposition
    /// ([Büyükakyüz 2024](https://arxiv.org/abs/2406.01775)): PEFT's `"olora"`. The rank is limited as
    /// with [`Pissa`](Self::Pissa).
    Olora,
}

impl LoraConfig {
    /// Whether the initial values depend on the weight.
    pub(crate) fn reads_weight(&self) -> bool {
        let takes = matches!(self.init, Init::Pissa | Init::PissaRandomized { .. } | Init::Olora);
        takes || self.dora
    }

    /// What is wrong with the initial values, and the field to blame.
    pub(super) fn check_init(&self) -> Result<(), (&'static str, String)> {
        let ranks = self.rank_pattern.iter().map(|(_, rank)| *rank).chain([self.rank]);
        let mut alphas = self.alpha_pattern.iter().map(|(_, alpha)| *alpha).chain([self.alpha]);
        match self.init {
            Init::Orthogonal => match ranks.into_iter().find(|rank| rank % 2 == 1) {
                Some(odd) => {
                    let problem =
                        format!("is orthogonal, which needs an even rank, and {odd} is odd");
                    Err(("init", problem))
                }
                None => Ok(()),
            },
            Init::Pissa | Init::PissaRandomized { .. } if alphas.any(|alpha| alpha == 0.0) => {
                Err(("init", "is PiSSA, which divides by alpha, and that is 0".to_owned()))
            }
            _ => Ok(()),
        }
    }
}
