//! How texts are divided before byte pairs are merged, which files say by a name.

use serde_json::{Map, Value};
use tokenizers::{
    PreTokenizerWrapper, SplitDelimiterBehavior,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use crate::error::{Context, Result};

/// How Llama 3 divides texts: English endings, words with the character before them, numbers of up to three digits,
/// punctuation, and white space.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The same for Qwen, with single digits.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The same, where marks are parts of words.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Mistral's: a capital letter after a small one begins another word.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The same, with English endings, and numbers of up to three digits.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// DeepSeek's, one after the other: numbers, Chinese and Japanese, and the rest.
const DEEPSEEK3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

/// Falcon's: punctuation, then as GPT-2 does, then digits in threes.
const PUNCTUATION: &str = r"[\p{P}$+<=>^~|`]+";

/// What llama.cpp takes for it in files that do not name a way.
const USUAL_PUNCTUATION: &str = r"[\p{P}$+<=>^~|]+";

const THREE_DIGITS: [&str; 2] = [r"\p{N}+", "[0-9][0-9][0-9]"];

/// A way to divide texts, and what comes with it.
pub(super) struct Division {
    way: Way,
    /// Whether words that are tokens need no merges.
    pub(super) ignores_merges: bool,
    /// Whether texts begin with a token if the file does not say.
    pub(super) begins: bool,
}

enum Way {
    /// By GPT-2's words, numbers with their digits apart or not.
    Gpt2 { digits_apart: bool },
    /// By these expressions, one after the other.
    By(&'static [&'static str]),
    /// By Falcon's rules: this punctuation, GPT-2's words, and numbers of three digits.
    Falcon(&'static str),
}

impl Division {
    /// A name of each of the ways.
    pub(super) const NAMES: [&str; 11] = [
        "llama-bpe",
        "dbrx",
        "qwen2",
        "qwen35",
        "tekken",
        "gpt-4o",
        "deepseek-v3",
        "gpt-2",
        "smollm",
        "falcon",
        "default",
    ];

    /// The one that the fields name.
    ///
    /// # Errors
    ///
    /// If the name is unknown.
    pub(super) fn of(fields: &Map<String, Value>) -> Result<Self> {
        let name = match fields.get("tokenizer.ggml.pre") {
            None => "default",
            Some(name) => name.as_str().ok_or("`tokenizer.ggml.pre` must be a text")?,
        };
        let (way, both) = match name {
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral"
            | "midm-2.0" | "lfm2" => (Way::By(&[LLAMA3]), true),
            "dbrx" | "smaug-bpe" | "glm4" | "chatglm-bpe" => (Way::By(&[LLAMA3]), false),
            "qwen2" | "deepseek-r1-qwen" | "kormo" | "megrez" | "stablelm2" | "hunyuan"
            | "grok-2" | "solar-open" => (Way::By(&[QWEN2]), false),
            "qwen35" => (Way::By(&[QWEN35]), false),
            "tekken" => (Way::By(&[TEKKEN]), true),
            "gpt-4o" | "llama4" | "kanana2" | "talkie" | "minimax-m2" => (Way::By(&[GPT4O]), false),
            "deepseek-v3" | "hunyuan-dense" | "joyai-llm" => (Way::By(&DEEPSEEK3), false),
            "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "trillion" | "granite-docling"
            | "exaone4" | "gigachat" | "a.x-4.0" | "mellum" => {
                (Way::Gpt2 { digits_apart: false }, false)
            }
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone"
            | "minerva-7b" | "mellum2" => (Way::Gpt2 { digits_apart: true }, false),
            "falcon" => (Way::Falcon(PUNCTUATION), false),
            // Files that are older than these names have none.
            "default" => (Way::Falcon(USUAL_PUNCTUATION), false),
            name => return Err(format!("`tokenizer.ggml.pre` \"{name}\" is not supported")),
        };
        Ok(Self { way, ignores_merges: both, begins: both })
    }

    /// What is done to texts.
    pub(super) fn steps(&self) -> Result<Sequence> {
        let gpt2 = || ByteLevel::new(false, true, true).into();
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        match self.way {
            Way::Gpt2 { digits_apart } => {
                steps.extend(digits_apart.then(|| Digits::new(true).into()));
                steps.push(gpt2());
            }
            Way::By(patterns) => {
                for pattern in patterns {
                    steps.push(split(pattern)?);
                }
                steps.push(ByteLevel::new(false, true, false).into());
            }
            Way::Falcon(punctuation) => {
                steps.extend([split(punctuation)?, gpt2()]);
                for pattern in THREE_DIGITS {
                    steps.push(split(pattern)?);
                }
            }
        }
        Ok(Sequence::new(steps))
    }
}

fn split(pattern: &str) -> Result<PreTokenizerWrapper> {
    let pattern = SplitPattern::Regex(pattern.to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
    Ok(split.context("the division of texts")?.into())
}
