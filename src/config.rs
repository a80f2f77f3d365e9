//! The configuration of adapters.

mod init;
mod patterns;
mod plan;
mod targets;

use std::fmt;

use burn::config::Config;
use serde::{Deserialize, Serialize};

use crate::error::LoraError;

pub use init::Init;
use plan::Patterns;
pub(crate) use plan::{LayerConfig, Plan};
pub(crate) use targets::Targets;

/// The rule that turns `alpha` and the rank into the scale `s` of the update `s·A·B`.
///
/// With `rank` 4 and `alpha` 8 the three rules give 8, 2 and 4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scaling {
    /// `s = alpha`.
    #[default]
    Alpha,
    /// `s = alpha / rank`: the rule of the LoRA paper, and PEFT's default.
    AlphaOverRank,
    /// `s = alpha / √rank`: rsLoRA, whose updates keep their size as the rank grows
    /// ([Kalajdzievski 2023](https://arxiv.org/abs/2312.03732)).
    AlphaOverSqrtRank,
}

impl Scaling {
    /// The scale `s`.
    pub fn scale(self, alpha: f64, rank: usize) -> f64 {
        match self {
            Self::Alpha => alpha,
            Self::AlphaOverRank => alpha / rank as f64,
            Self::AlphaOverSqrtRank => alpha / (rank as f64).sqrt(),
        }
    }
}

impl fmt::Display for Scaling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Alpha => "alpha",
            Self::AlphaOverRank => "alpha/rank",
            Self::AlphaOverSqrtRank => "alpha/sqrt(rank)",
        })
    }
}

/// The configuration of adapters: their ranks, their initial values, and which layers get one.
///
/// It is plain data. It can be built in code, or read from JSON with Burn's [`Config::load`], or from any other format
/// by serde:
///
/// ```
/// use burn::config::Config;
/// use burn_lora::LoraConfig;
///
/// let config = LoraConfig::peft(8, 16.0)
///     .with_targets(["query", "value"])
///     .with_rank_pattern([("layers.0.query", 4)])
///     .with_modules_to_save(["head"]);
/// let file = br#"{
///     "rank": 8, "alpha": 16, "scaling": "alpha_over_rank", "targets": ["query", "value"],
///     "rank_pattern": {"layers.0.query": 4}, "modules_to_save": ["head"]
/// }"#;
/// assert_eq!(LoraConfig::load_binary(file).unwrap(), config);
/// ```
///
/// The fields have the names that they have here. Only `rank` and `alpha` are needed, and an unknown field is an error.
/// Without `scaling`, alpha itself is the scale: PEFT's rule is `"alpha_over_rank"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// The rank: the number of columns of A, and of rows of B. At least 1.
    pub rank: usize,
    /// The value that [`scaling`](Self::scaling) turns into the scale `s`.
    pub alpha: f64,
    /// The rule for the scale `s`. Default: [`Scaling::Alpha`].
    #[serde(default)]
    pub scaling: Scaling,
    /// How A and B are drawn. Default: [`Init::KaimingUniform`].
    #[serde(default)]
    pub init: Init,
    /// The probability with which each element of the adapter's input is dropped during training,
    /// in `[0, 1)`. The base's input is not affected. Default: 0.
    #[serde(default)]
    pub dropout: f64,
    /// Whether the adapter also has a bias, which starts at zero: `s·(x·A·B + bias)`. PEFT calls it
    /// `lora_bias`. Default: false.
    #[serde(default)]
    pub bias: bool,
    /// Whether the adapters have magnitudes, as in DoRA
    /// ([Liu et al. 2024](https://arxiv.org/abs/2402.09353)): a length for each column of the adapted
    /// weight, which trains with A and B. A step takes more time, and not every set can be combined or
    /// served in mixed batches then. It excludes [`bias`](Self::bias). Default: false.
    #[serde(default)]
    pub dora: bool,
    /// Whether A stays as it was drawn and only B trains, as in LoRA-FA
    /// ([Zhang et al. 2023](https://arxiv.org/abs/2308.03303)). Not for embeddings, whose A starts at
    /// zero. Default: false.
    #[serde(default)]
    pub freeze_a: bool,
    /// The target modules, which are the layers to adapt: names or regular expressions that match a
    /// layer's whole path, or whole segments at the end of the path. If empty, every layer that can
    /// carry an adapter is a target. Default: empty.
    #[serde(default)]
    pub targets: Vec<String>,
    /// The layers that get no adapter even if a target matches. Patterns as in
    /// [`targets`](Self::targets). Default: none.
    #[serde(default)]
    pub excludes: Vec<String>,
    /// Ranks that replace [`rank`](Self::rank) for some layers. The first pattern that matches a layer's
    /// path is used. In a file, they are a list of pairs, or a map. Default: none.
    #[serde(default, deserialize_with = "patterns::read")]
    pub rank_pattern: Vec<(String, usize)>,
    /// Values that replace [`alpha`](Self::alpha) for some layers. The first pattern that matches a
    /// layer's path is used. In a file, they are a list of pairs, or a map. Default: none.
    #[serde(default, deserialize_with = "patterns::read")]
    pub alpha_pattern: Vec<(String, f64)>,
    /// Modules or parameters that train in full and are saved with the adapters, such as a new head.
    /// Layers in these modules get no adapter. Patterns as in [`targets`](Self::targets).
    /// Default: none.
    #[serde(default)]
    pub modules_to_save: Vec<String>,
    /// The seed of the factors. Each layer has its own random stream, which depends on the seed and the
    /// layer's path, but not on the backend or the order of the layers. Default: 0.
    #[serde(default)]
    pub seed: u64,
}

impl Config for LoraConfig {}

impl LoraConfig {
    /// A configuration with the given rank and alpha, and defaults for the rest. The scale `s` is
    /// `alpha` itself. For PEFT's scaling, use [`peft`](Self::peft).
    pub fn new(rank: usize, alpha: f64) -> Self {
        Self {
            rank,
            alpha,
            scaling: Scaling::default(),
            init: Init::default(),
            dropout: 0.0,
            bias: false,
            dora: false,
            freeze_a: false,
            targets: Vec::new(),
            excludes: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            modules_to_save: Vec::new(),
            seed: 0,
        }
    }

    /// A configuration with PEFT's scaling, [`Scaling::AlphaOverRank`]: the scale `s` is
    /// `lora_alpha / r`.
    ///
    /// ```
    /// use burn_lora::{LoraConfig, Scaling};
    ///
    /// // LoraConfig(r=8, lora_alpha=16) in Python: s = 2.
    /// let config = LoraConfig::peft(8, 16.0);
    /// assert_eq!(config.scaling, Scaling::AlphaOverRank);
    /// // The same scale by the plain formula, in which alpha is the scale: 16 would be large.
    /// assert_eq!(LoraConfig::new(8, 2.0).scaling, Scaling::Alpha);
    /// ```
    pub fn peft(rank: usize, alpha: f64) -> Self {
        Self::new(rank, alpha).with_scaling(Scaling::AlphaOverRank)
    }

    /// Sets the rule for the scale `s`.
    pub fn with_scaling(mut self, scaling: Scaling) -> Self {
        self.scaling = scaling;
        self
    }

    /// Sets how A and B are drawn.
    pub fn with_init(mut self, init: Init) -> Self {
        self.init = init;
        self
    }

    /// Sets the dropout on the adapter's input.
    pub fn with_dropout(mut self, dropout: f64) -> Self {
        self.dropout = dropout;
        self
    }

    /// Sets whether the adapter has a bias.
    pub fn with_bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// Sets whether the adapters have the magnitudes of DoRA.
    pub fn with_dora(mut self, dora: bool) -> Self {
        self.dora = dora;
        self
    }

    /// Sets whether A stays as it was drawn, as in LoRA-FA.
    pub fn with_freeze_a(mut self, freeze_a: bool) -> Self {
        self.freeze_a = freeze_a;
        self
    }

    /// Sets the layers to adapt.
    pub fn with_targets<S: Into<String>>(mut self, targets: impl IntoIterator<Item = S>) -> Self {
        self.targets = strings(targets);
        self
    }

    /// Sets the layers that get no adapter.
    pub fn with_excludes<S: Into<String>>(mut self, excludes: impl IntoIterator<Item = S>) -> Self {
        self.excludes = strings(excludes);
        self
    }

    /// Sets the ranks of particular layers.
    pub fn with_rank_pattern<S: Into<String>>(
        mut self,
        ranks: impl IntoIterator<Item = (S, usize)>,
    ) -> Self {
        self.rank_pattern = ranks.into_iter().map(|(path, rank)| (path.into(), rank)).collect();
        self
    }

    /// Sets the alphas of particular layers.
    pub fn with_alpha_pattern<S: Into<String>>(
        mut self,
        alphas: impl IntoIterator<Item = (S, f64)>,
    ) -> Self {
        self.alpha_pattern = alphas.into_iter().map(|(path, alpha)| (path.into(), alpha)).collect();
        self
    }

    /// Sets the modules and parameters that train in full.
    pub fn with_modules_to_save<S: Into<String>>(
        mut self,
        modules: impl IntoIterator<Item = S>,
    ) -> Self {
        self.modules_to_save = strings(modules);
        self
    }

    /// Sets the seed.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Checks every value that does not depend on a model.
    ///
    /// # Errors
    ///
    /// [`LoraError::InvalidConfig`] or [`LoraError::InvalidPattern`], naming the field or pattern.
    pub fn validate(&self) -> Result<(), LoraError> {
        self.check_values()?;
        Patterns::of(self).map(drop)
    }

    /// Checks everything but the patterns.
    fn check_values(&self) -> Result<(), LoraError> {
        let invalid = |field, problem: String| Err(LoraError::InvalidConfig { field, problem });
        if self.rank == 0 {
            return invalid("rank", "is 0, and must be at least 1".to_owned());
        }
        if !self.alpha.is_finite() {
            return invalid("alpha", format!("is {}, and must be a finite number", self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return invalid("dropout", format!("is {}, and must be in [0, 1)", self.dropout));
        }
        if let Some((path, _)) = self.rank_pattern.iter().find(|(_, rank)| *rank == 0) {
            return invalid("rank_pattern", format!("gives `{path}` rank 0; at least 1 is needed"));
        }
        if let Some((path, alpha)) = self.alpha_pattern.iter().find(|(_, a)| !a.is_finite()) {
            return invalid("alpha_pattern", format!("gives `{path}` alpha {alpha}, not finite"));
        }
        if self.dora && self.bias {
            return invalid(
                "bias",
                "is set, and adapters with DoRA's magnitudes have none".to_owned(),
            );
        }
        self.check_init().or_else(|(field, problem)| invalid(field, problem))
    }
}

fn strings<S: Into<String>>(items: impl IntoIterator<Item = S>) -> Vec<String> {
    items.into_iter().map(Into::into).collect()
}

/// The 64-bit FNV-1a hash, XORed with its offset. Unlike the standard library's hash, it never changes.
/// The empty path hashes to zero, so that a single layer uses the seed itself.
pub(crate) fn fnv1a(text: &str) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    OFFSET ^ text.bytes().fold(OFFSET, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_scaling_rules() {
        assert_eq!(Scaling::Alpha.scale(8.0, 4), 8.0);
        assert_eq!(Scaling::AlphaOverRank.scale(8.0, 4), 2.0);
        assert_eq!(Scaling::AlphaOverSqrtRank.scale(8.0, 4), 4.0);
    }

    #[test]
    fn invalid_values_are_named() {
        let config = LoraConfig::new(4, 8.0);
        let rejected = [
            (LoraConfig::new(0, 8.0), "`rank` is 0"),
            (LoraConfig::new(4, f64::NAN), "`alpha` is NaN"),
            (config.clone().with_dropout(1.0), "`dropout` is 1"),
            (config.clone().with_dropout(-0.1), "`dropout` is -0.1"),
            (config.clone().with_rank_pattern([("fc", 0)]), "`rank_pattern` gives `fc` rank 0"),
            (config.clone().with_alpha_pattern([("fc", f64::INFINITY)]), "alpha inf"),
            (config.clone().with_targets(["("]), "`(` is not a valid pattern"),
            (config.clone().with_rank_pattern([("(", 1)]), "`(` is not a valid pattern"),
        ];
        for (config, message) in rejected {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        config.validate().unwrap();
    }

    #[test]
    fn json_needs_only_rank_and_alpha_and_rejects_misspellings() {
        let read = |json: &[u8]| LoraConfig::load_binary(json);
        assert_eq!(read(br#"{"rank": 4, "alpha": 8}"#).unwrap(), LoraConfig::new(4, 8.0));
        let scaled = read(br#"{"rank": 4, "alpha": 8, "scaling": "alpha_over_rank"}"#).unwrap();
        assert_eq!(scaled.scaling, Scaling::AlphaOverRank);
        assert!(read(br#"{"rank": 4, "alpha": 8, "target": []}"#).is_err());
    }

    /// The file of the guide's third chapter, with what its table says of it.
    #[test]
    fn s10_the_file_on_the_page_is_read() {
        let page = include_str!("../docs/guide/choosing.md");
        let (_, file) = page.split_once("```toml\n").unwrap();
        let (file, _) = file.split_once("```").unwrap();
        let expected = LoraConfig::peft(8, 16.0)
            .with_targets(["query", "value"])
            .with_modules_to_save(["head"])
            .with_rank_pattern([("layers.0", 4)])
            .with_alpha_pattern([("layers.0", 8.0)]);
        assert_eq!(toml::from_str::<LoraConfig>(file).unwrap(), expected);
        let init = |init: &str| {
            let file = format!("rank = 8\nalpha = 16\ninit = {init}");
            toml::from_str::<LoraConfig>(&file).unwrap().init
        };
        let randomized = "{ pissa_randomized = { iterations = 16 } }";
        for (text, expected) in [
            (r#""kaiming_uniform""#, Init::KaimingUniform),
            (r#""gaussian""#, Init::Gaussian),
            (r#""orthogonal""#, Init::Orthogonal),
            (r#""pissa""#, Init::Pissa),
            (randomized, Init::PissaRandomized { iterations: 16 }),
            (r#""olora""#, Init::Olora),
            (r#""random_both""#, Init::RandomBoth),
        ] {
            assert!(page.contains(text), "{text}");
            assert_eq!(init(text), expected);
        }
    }

    #[test]
    fn s10_patterns_in_files_are_maps_or_lists_of_pairs() {
        let config = LoraConfig::new(4, 8.0)
            .with_rank_pattern([("layers.1", 2), ("layers.0", 3)])
            .with_alpha_pattern([("fc", 0.5)]);
        for patterns in [
            r#""rank_pattern": {"layers.1": 2, "layers.0": 3}, "alpha_pattern": {"fc": 0.5}"#,
            r#""rank_pattern": [["layers.1", 2], ["layers.0", 3]], "alpha_pattern": [["fc", 0.5]]"#,
        ] {
            let file = format!(r#"{{"rank": 4, "alpha": 8, {patterns}}}"#);
            assert_eq!(LoraConfig::load_binary(file.as_bytes()).unwrap(), config);
        }
        let toml = "rank = 4\nalpha = 8\nrank_pattern = { \"layers.1\" = 2, \"layers.0\" = 3 }\n\
                    [alpha_pattern]\nfc = 0.5\n";
        let mut read: LoraConfig = toml::from_str(toml).unwrap();
        read.rank_pattern.sort_by(|one, other| other.cmp(one));
        assert_eq!(read, config);
        // What it writes, it reads.
        let again = serde_json::to_vec(&config).unwrap();
        assert_eq!(LoraConfig::load_binary(&again).unwrap(), config);
        let wrong = br#"{"rank": 4, "alpha": 8, "rank_pattern": "layers.1"}"#;
        let error = LoraConfig::load_binary(wrong).unwrap_err().to_string();
        assert!(error.contains("a map of patterns, or a list of pairs"), "{error}");
    }
}
