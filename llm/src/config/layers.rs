//! In what the layers of a decoder differ: windows and rotations.

use serde::Deserialize;

use super::family::Family;

/// What `config.json` says of single layers.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Fields {
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    sliding_window_pattern: Option<usize>,
    layer_types: Option<Vec<String>>,
    no_rope_layers: Option<Vec<u8>>,
    no_rope_layer_interval: Option<usize>,
}

/// What is of its own in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layer {
    /// How many tokens each token sees at most, itself among them.
    pub window: Option<usize>,
    /// Whether it is of the kind that may have a window, whose rotations may be others.
    pub slides: bool,
    /// Whether queries and keys are turned.
    pub turns: bool,
}

impl Fields {
    /// The layers of a decoder with so many.
    pub fn layers(&self, family: Family, count: usize) -> Result<Vec<Layer>, String> {
        let used = self.use_sliding_window.unwrap_or(false);
        let window = match family {
            Family::Mistral | Family::Phi3 | Family::Gemma2 | Family::Gemma3 => self.sliding_window,
            Family::Qwen2 | Family::Qwen3 | Family::SmolLm3 => self.sliding_window.filter(|_| used),
            Family::Llama | Family::Olmo2 | Family::Granite => None,
        };
        if window == Some(0) {
            return Err("`sliding_window` is 0".to_owned());
        }
        let turning = self.turning(family, count)?;
        let sliding = self.sliding(family, &turning)?;
        let layers = sliding.into_iter().zip(turning).map(|(slides, turns)| Layer {
            window: window.filter(|_| slides),
            slides,
            turns,
        });
        Ok(layers.collect())
    }

    /// Which layers turn queries and keys.
    fn turning(&self, family: Family, count: usize) -> Result<Vec<bool>, String> {
        match (family, &self.no_rope_layers) {
            (Family::SmolLm3, Some(layers)) if layers.len() < count => {
                let found = layers.len();
                Err(format!("`no_rope_layers` has {found} numbers for {count} layers"))
            }
            (Family::SmolLm3, Some(layers)) => {
                Ok(layers[..count].iter().map(|it| *it != 0).collect())
            }
            (Family::SmolLm3, None) => {
                let interval = period("no_rope_layer_interval", self.no_rope_layer_interval, 4)?;
                Ok((1..=count).map(|number| number % interval != 0).collect())
            }
            _ => Ok(vec![true; count]),
        }
    }

    /// Which layers may have a window.
    fn sliding(&self, family: Family, turning: &[bool]) -> Result<Vec<bool>, String> {
        let count = turning.len();
        let by = |slides: &dyn Fn(usize) -> bool| Ok((0..count).map(slides).collect());
        // `transformers` does not read the types of these.
        if matches!(family, Family::Mistral | Family::Phi3) {
            return by(&|_| true);
        }
        if let Some(types) = &self.layer_types {
            if types.len() != count {
                let found = types.len();
                return Err(format!("`layer_types` has {found} types for {count} layers"));
            }
            let slides = types.iter().map(|kind| match kind.as_str() {
                "sliding_attention" => Ok(true),
                "full_attention" => Ok(false),
                other => Err(format!("`layer_types` has \"{other}\", which is not supported")),
            });
            return slides.collect();
        }
        match family {
            Family::Gemma2 => by(&|layer| layer % 2 == 0),
            Family::Gemma3 => {
                let pattern = period("sliding_window_pattern", self.sliding_window_pattern, 6)?;
                by(&|layer| (layer + 1) % pattern != 0)
            }
            Family::Qwen2 | Family::Qwen3 => {
                let first = self.max_window_layers.unwrap_or(28);
                by(&|layer| layer >= first)
            }
            Family::SmolLm3 => by(&|layer| !turning[layer]),
            _ => by(&|_| false),
        }
    }
}

fn period(name: &str, value: Option<usize>, usual: usize) -> Result<usize, String> {
    match value.unwrap_or(usual) {
        0 => Err(format!("`{name}` is 0")),
        period => Ok(period),
    }
}
