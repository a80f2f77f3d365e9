//! The relatives of LoRA, as an argument.

use burn::{module::Module, tensor::backend::Backend};
use burn_lora::{Init, Lora, LoraConfig, LoraError, LoraModule};
use clap::ValueEnum;

/// A relative of LoRA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Relative {
    /// A length of its own for each column of the weight.
    Dora,
    /// Starts from the largest singular values of the weight.
    Pissa,
    /// Starts from the QR decomposition of the weight.
    Olora,
    /// A and B are both random, and their product is zero.
    Orthogonal,
    /// Starts from the directions in which a layer's inputs vary the most.
    Eva,
    /// Only B trains.
    LoraFa,
}

impl Relative {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dora => "DoRA",
            Self::Pissa => "PiSSA",
            Self::Olora => "OLoRA",
            Self::Orthogonal => "orthogonal",
            Self::Eva => "EVA",
            Self::LoraFa => "LoRA-FA",
        }
    }

    /// The model with adapters of this kind. `see` runs a model on some of the data; only EVA needs it.
    pub fn attach<B: Backend, M: Module<B>>(
        self,
        model: &M,
        config: LoraConfig,
        see: impl FnOnce(&M),
    ) -> Result<Lora<B, M>, LoraError> {
        let config = match self {
            Self::Dora => config.with_dora(true),
            Self::Pissa => config.with_init(Init::PissaRandomized { iterations: 16 }),
            Self::Olora => config.with_init(Init::Olora),
            Self::Orthogonal => config.with_init(Init::Orthogonal),
            Self::LoraFa => config.with_freeze_a(true),
            Self::Eva => return model.attach_eva(&config, 2.0, |model| see(model)),
        };
        model.attach(&config)
    }
}
