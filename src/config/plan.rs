//! A configuration resolved for a model: what each of its layers gets.

use std::collections::BTreeMap;

use super::{Init, LoraConfig, Scaling, fnv1a, targets::Targets};
use crate::{
    error::LoraError,
    pattern::{Pattern, require_matches},
};

/// What one layer's adapter is made of. The fields are those of [`LoraConfig`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LayerConfig {
    pub rank: usize,
    pub alpha: f64,
    pub scaling: Scaling,
    pub init: Init,
    pub dropout: f64,
    pub bias: bool,
    pub dora: bool,
    pub freeze_a: bool,
    /// The seed of this layer's own random stream.
    pub seed: u64,
}

impl From<&LoraConfig> for LayerConfig {
    /// For a layer that is no part of a model. Patterns do not concern it.
    fn from(config: &LoraConfig) -> Self {
        Self {
            rank: config.rank,
            alpha: config.alpha,
            scaling: config.scaling,
            init: config.init,
            dropout: config.dropout,
            bias: config.bias,
            dora: config.dora,
            freeze_a: config.freeze_a,
            seed: config.seed,
        }
    }
}

/// The layers of a model that get an adapter, and what each of them gets.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    layers: BTreeMap<String, LayerConfig>,
    modules_to_save: Vec<Pattern>,
}

impl Plan {
    /// What the layer at `path` gets, if it is chosen.
    pub fn get(&self, path: &str) -> Option<&LayerConfig> {
        self.layers.get(path)
    }

    /// Whether the layer at `path` is chosen.
    pub fn contains(&self, path: &str) -> bool {
        self.layers.contains_key(path)
    }

    /// What trains in full next to the adapters.
    pub fn modules_to_save(&self) -> &[Pattern] {
        &self.modules_to_save
    }
}

/// The patterns of a configuration, each compiled once.
pub(super) struct Patterns {
    targets: Targets,
    ranks: Vec<Pattern>,
    alphas: Vec<Pattern>,
}

impl Patterns {
    pub fn of(config: &LoraConfig) -> Result<Self, LoraError> {
        Ok(Self {
            targets: Targets::new(&config.targets, &config.excludes, &config.modules_to_save)?,
            ranks: Pattern::all(config.rank_pattern.iter().map(|(pattern, _)| pattern))?,
            alphas: Pattern::all(config.alpha_pattern.iter().map(|(pattern, _)| pattern))?,
        })
    }
}

impl LoraConfig {
    /// Chooses, from the paths of all layers, those that get an adapter, and decides what each of them gets.
    ///
    /// Fails if the configuration is [invalid](Self::validate), if a pattern other than those of
    /// `modules_to_save` matches no path, or if no path is left.
    pub(crate) fn resolve(&self, paths: &[String]) -> Result<Plan, LoraError> {
        self.check_values()?;
        let Patterns { targets, ranks, alphas } = Patterns::of(self)?;
        targets.require_matches(paths)?;
        require_matches("rank_pattern", &ranks, paths, Pattern::matches)?;
        require_matches("alpha_pattern", &alphas, paths, Pattern::matches)?;

        let layer = |path: &String| {
            let config = LayerConfig {
                rank: first_match(&ranks, &self.rank_pattern, path).unwrap_or(self.rank),
                alpha: first_match(&alphas, &self.alpha_pattern, path).unwrap_or(self.alpha),
                seed: self.seed ^ fnv1a(path),
                ..LayerConfig::from(self)
            };
            (path.clone(), config)
        };
        let layers = targets.choose(paths)?.into_iter().map(layer).collect();
        Ok(Plan { layers, modules_to_save: targets.into_modules_to_save() })
    }
}

/// The value of the first pattern that matches. `patterns` are those of `values`, compiled.
fn first_match<T: Copy>(patterns: &[Pattern], values: &[(String, T)], path: &str) -> Option<T> {
    let index = patterns.iter().position(|pattern| pattern.matches(path))?;
    Some(values[index].1)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_first_matching_pattern_decides() {
        let config = LoraConfig::new(8, 16.0)
            .with_rank_pattern([("blocks.0.fc", 2), ("fc", 4)])
            .with_alpha_pattern([("fc", 1.5)]);
        let paths = ["blocks.0.fc", "blocks.1.fc", "blocks.1.query"].map(String::from);
        let plan = config.resolve(&paths).unwrap();
        let of = |path: &str| plan.get(path).map(|it| (it.rank, it.alpha)).unwrap();
        assert_eq!(of("blocks.0.fc"), (2, 1.5));
        assert_eq!(of("blocks.1.fc"), (4, 1.5));
        assert_eq!(of("blocks.1.query"), (8, 16.0));
        assert!(plan.get("blocks.0").is_none());
    }

    #[test]
    fn each_layer_has_a_seed_of_its_own_and_a_single_layer_that_of_the_configuration() {
        let config = LoraConfig::new(1, 1.0).with_seed(7);
        let paths = ["", "a", "b"].map(String::from);
        let plan = config.resolve(&paths).unwrap();
        let seed = |path: &str| plan.get(path).unwrap().seed;
        assert_eq!(seed(""), 7);
        assert_eq!(LayerConfig::from(&config), *plan.get("").unwrap());
        assert!(seed("a") != seed("b") && seed("a") != 7);
    }

    /// To compile a pattern takes as long as to match thousands of paths. Compiled for each layer, these took 4 and
    /// 39 seconds in an optimized build, and many times as long in this one.
    #[test]
    fn s12_many_patterns_of_a_large_model_take_no_time() {
        let paths: Vec<_> = (0..500)
            .flat_map(|layer| {
                ["q_proj", "k_proj", "v_proj", "o_proj"]
                    .map(|name| format!("model.layers.{layer}.self_attn.{name}"))
            })
            .collect();
        for patterns in [20, 200] {
            // Half of them are plain names, and half are expressions.
            let pattern = |index: usize| match index % 2 {
                0 => (format!("layers.{index}.self_attn.q_proj"), index + 1),
                _ => (format!(r"layers\.{index}\.self_attn\.(q|v)_proj"), index + 1),
            };
            let config = LoraConfig::new(8, 16.0)
                .with_targets(["q_proj", "v_proj"])
                .with_rank_pattern((0..patterns).map(pattern));
            let start = Instant::now();
            let plan = config.resolve(&paths).unwrap();
            let took = start.elapsed();
            assert!(took < Duration::from_secs(5), "{patterns} patterns took {took:?}");
            assert_eq!(plan.layers.len(), 1000);
            assert_eq!(plan.get("model.layers.6.self_attn.q_proj").unwrap().rank, 7);
            assert_eq!(plan.get("model.layers.7.self_attn.v_proj").unwrap().rank, 8);
            assert_eq!(plan.get("model.layers.499.self_attn.v_proj").unwrap().rank, 8);
        }
    }
}
