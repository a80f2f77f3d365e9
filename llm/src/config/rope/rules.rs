//! The rules by which rotary embeddings turn, as `config.json` has them.

use std::f64::consts::{PI, TAU};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Beyond, Rope, plain};

/// What `config.json` says of RoPE.
#[derive(Clone, Debug, Deserialize)]
pub(in crate::config) struct Fields {
    rope_theta: Option<f64>,
    /// Of layers with a window, in older files of Gemma 3.
    rope_local_base_freq: Option<f64>,
    rope_scaling: Option<Parameters>,
    /// Newer files hold all of it here.
    rope_parameters: Option<Parameters>,
    partial_rotary_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

/// The names under which layers of one kind have parameters of their own.
const KINDS: [&str; 2] = ["full_attention", "sliding_attention"];

#[derive(Clone, Debug, Default, Deserialize)]
struct Parameters {
    rope_type: Option<String>,
    /// The older name of the same. Files may have both.
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    short_factor: Option<Vec<f64>>,
    long_factor: Option<Vec<f64>>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// What else the rules depend on.
pub(in crate::config) struct Sizes {
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    /// Whether it is Phi-3: a part of each head may stay as it is, and in old files `yarn` means `longrope`.
    pub is_phi3: bool,
}

impl Fields {
    /// The rule of all layers.
    pub fn rope(&self, sizes: &Sizes) -> Result<Rope, String> {
        let of = |it: &Parameters| {
            if let Some((name, _)) = it.others.iter().find(|(_, value)| value.is_object()) {
                return Err(format!(
                    "RoPE's parameters of `{name}` layers alone are not supported"
                ));
            }
            self.rule(it, self.rope_theta.unwrap_or(10_000.0), sizes)
        };
        let [new, old] =
            [&self.rope_parameters, &self.rope_scaling].map(|it| it.as_ref().map(of).transpose());
        match (new?, old?) {
            (Some(new), Some(old)) if new != old => Err(
                "`rope_parameters` and `rope_scaling` contradict each other; remove one of them"
                    .to_owned(),
            ),
            (Some(found), _) | (None, Some(found)) => Ok(found),
            (None, None) => of(&Parameters::default()),
        }
    }

    /// The rules of layers that see all, and of those with a window.
    pub fn ropes_by_kind(&self, sizes: &Sizes) -> Result<[Rope; 2], String> {
        let of = |kind: &str| -> Result<Option<Parameters>, String> {
            let nested = self.rope_parameters.as_ref().and_then(|it| it.others.get(kind));
            let parameters = nested.filter(|it| !it.is_null()).map(|it| {
                serde_json::from_value(it.clone())
                    .map_err(|error| format!("`rope_parameters`, `{kind}`: {error}"))
            });
            parameters.transpose()
        };
        let [full, sliding] = KINDS.map(of);
        // Without names of kinds, and in older files, a rule is that of the layers that see all.
        let flat = self.rope_parameters.as_ref();
        let flat = flat.filter(|it| !KINDS.iter().any(|kind| it.others.contains_key(*kind)));
        let full = full?.or_else(|| flat.or(self.rope_scaling.as_ref()).cloned());
        let theta = self.rope_theta.unwrap_or(1_000_000.0);
        let local = self.rope_local_base_freq.unwrap_or(10_000.0);
        Ok([
            self.rule(&full.unwrap_or_default(), theta, sizes)?,
            self.rule(&sliding?.unwrap_or_default(), local, sizes)?,
        ])
    }

    fn rule(&self, parameters: &Parameters, theta: f64, sizes: &Sizes) -> Result<Rope, String> {
        let theta = parameters.rope_theta.unwrap_or(theta);
        let theta = positive("rope_theta", theta)?;
        let share = parameters.partial_rotary_factor.or(self.partial_rotary_factor).unwrap_or(1.0);
        if share != 1.0 && !sizes.is_phi3 {
            return Err(format!("RoPE's `partial_rotary_factor` {share} is not supported"));
        }
        if !(share > 0.0 && share <= 1.0) {
            return Err(format!(
                "RoPE's `partial_rotary_factor` must be above 0 and at most 1, and is {share}"
            ));
        }
        let turned = (sizes.head_dim as f64 * share) as usize;
        if turned == 0 || !turned.is_multiple_of(2) {
            return Err(format!(
                "RoPE's `partial_rotary_factor` {share} of a head of {} elements must be an even number of them",
                sizes.head_dim
            ));
        }
        // What the file says outside of the parameters comes first, as in `transformers`.
        let usual = self.original_max_position_embeddings;
        let usual = usual.or(parameters.original_max_position_embeddings);
        let usual = usual.unwrap_or(sizes.max_position_embeddings as f64);
        Plain { parameters, theta, pairs: turned / 2, usual }.by(sizes)
    }
}

/// The frequencies without a rule, and what rules make of them.
struct Plain<'a> {
    parameters: &'a Parameters,
    theta: f64,
    pairs: usize,
    /// The length of the texts of the first training.
    usual: f64,
}

impl Plain<'_> {
    fn by(&self, sizes: &Sizes) -> Result<Rope, String> {
        let Self { parameters, theta, pairs, .. } = *self;
        let frequencies = plain(theta, pairs);
        let factor = || need("factor", parameters.factor);
        let max = sizes.max_position_embeddings;
        let rope = |frequencies| Rope { frequencies, amplitude: 1.0, theta, beyond: None };
        match parameters.rope_type.as_deref().or(parameters.old_type.as_deref()) {
            None if parameters.factor.is_some() => {
                Err("RoPE has a `factor`, but no `rope_type` says what it does".to_owned())
            }
            None | Some("default") => Ok(rope(frequencies)),
            Some("linear") => {
                let factor = factor()?;
                Ok(rope(frequencies.into_iter().map(|it| it / factor).collect()))
            }
            Some("dynamic") if pairs < 2 => {
                Err("RoPE by the rule \"dynamic\" needs more than one pair".to_owned())
            }
            Some("dynamic") => {
                let beyond = Beyond::Slower { length: max, theta, factor: factor()? };
                Ok(Rope { beyond: Some(beyond), ..rope(frequencies) })
            }
            Some("llama3") => Ok(rope(self.llama3(frequencies)?)),
            Some("yarn") if !sizes.is_phi3 => self.yarn(frequencies, max),
            Some("longrope" | "su" | "yarn") => self.longrope(&frequencies, max),
            Some(other) => Err(format!("`rope_type` \"{other}\" is not supported")),
        }
    }

    /// Pairs that turn often within a text of the first training stay, those that turn seldom slow down, and between
    /// them it goes over smoothly.
    fn llama3(&self, frequencies: Vec<f64>) -> Result<Vec<f64>, String> {
        let factor = need("factor", self.parameters.factor)?;
        let low = need("low_freq_factor", self.parameters.low_freq_factor)?;
        let high = need("high_freq_factor", self.parameters.high_freq_factor)?;
        let length = positive("original_max_position_embeddings", self.usual)?;
        if high <= low {
            return Err("RoPE's `high_freq_factor` must be above `low_freq_factor`".to_owned());
        }
        let slowed = frequencies.into_iter().map(|frequency| {
            let turns = length * frequency / TAU;
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            frequency * (kept + (1.0 - kept) / factor)
        });
        Ok(slowed.collect())
    }

    /// The same idea, where it goes over with the number of the pair, and not with how often it turns ([Peng et al.
    /// 2023](https://arxiv.org/abs/2309.00071)).
    fn yarn(&self, frequencies: Vec<f64>, max: usize) -> Result<Rope, String> {
        let Self { parameters, theta, pairs, .. } = *self;
        let length = positive("original_max_position_embeddings", self.usual)?;
        let factor = positive("factor", parameters.factor.unwrap_or(max as f64 / length))?;
        if theta == 1.0 {
            return Err(
                "RoPE's `rope_theta` is 1, by which no pair turns slower than another".to_owned()
            );
        }
        let size = 2.0 * pairs as f64;
        let [fast, slow] =
            [("beta_fast", parameters.beta_fast, 32.0), ("beta_slow", parameters.beta_slow, 1.0)]
                .map(|(name, value, usual)| positive(name, value.unwrap_or(usual)));
        // The number of the element whose pair turns so often.
        let place = |turns: f64| size * (length / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (place(fast?), place(slow?));
        if parameters.truncate.unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(size - 1.0));
        if high == low {
            high += 0.001;
        }
        let slowed = frequencies.into_iter().enumerate().map(|(i, frequency)| {
            let slowed = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            frequency * (slowed / factor + 1.0 - slowed)
        });
        let amplitude = |scale: f64| match factor <= 1.0 {
            true => 1.0,
            false => 0.1 * scale * factor.ln() + 1.0,
        };
        let given = |it: Option<f64>| it.filter(|it| *it != 0.0);
        let usual = match (given(parameters.mscale), given(parameters.mscale_all_dim)) {
            (Some(one), Some(all)) => amplitude(one) / amplitude(all),
            _ => amplitude(1.0),
        };
        let amplitude = parameters.attention_factor.unwrap_or(usual);
        let amplitude = positive("attention_factor", amplitude)?;
        Ok(Rope { frequencies: slowed.collect(), amplitude, theta, beyond: None })
    }

    /// Each pair has a divisor, and another one in long texts ([Ding et al.
    /// 2024](https://arxiv.org/abs/2402.13753)).
    fn longrope(&self, frequencies: &[f64], max: usize) -> Result<Rope, String> {
        let Self { parameters, theta, pairs, .. } = *self;
        let length = positive("original_max_position_embeddings", self.usual)?;
        let divided = |name: &str, divisors: &Option<Vec<f64>>| {
            let divisors =
                divisors.as_ref().ok_or_else(|| format!("RoPE's `{name}` is missing"))?;
            if divisors.len() != pairs || !divisors.iter().all(|it| it.is_finite() && *it > 0.0) {
                let found = divisors.len();
                return Err(format!(
                    "RoPE's `{name}` must have {pairs} numbers above 0, and has {found}"
                ));
            }
            Ok(frequencies.iter().zip(divisors).map(|(it, divisor)| it / divisor).collect())
        };
        let short = divided("short_factor", &parameters.short_factor)?;
        let long = divided("long_factor", &parameters.long_factor)?;
        let factor = parameters.factor.unwrap_or(max as f64 / length);
        let usual = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / length.ln()).sqrt() };
        let amplitude = positive("attention_factor", parameters.attention_factor.unwrap_or(usual))?;
        let beyond = Beyond::Long { length: length as usize, frequencies: long };
        Ok(Rope { frequencies: short, amplitude, theta, beyond: Some(beyond) })
    }
}

fn need(name: &str, value: Option<f64>) -> Result<f64, String> {
    positive(name, value.ok_or_else(|| format!("RoPE's `{name}` is missing"))?)
}

fn positive(name: &str, value: f64) -> Result<f64, String> {
    match value.is_finite() && value > 0.0 {
        true => Ok(value),
        false => Err(format!("RoPE's `{name}` must be above 0, and is {value}")),
    }
}
