//! A small generated language about films. It gives an encoder and a task that need no files.
//!
//! The encoder is pretrained to predict a missing word. The task is to classify sentences as positive or
//! negative. Single words do not tell: "although the plot was clever , we were not amused".

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use tokenizers::{
    Tokenizer, models::wordlevel::WordLevel, pre_tokenizers::whitespace::WhitespaceSplit,
    processors::bert::BertProcessing,
};

use burn_lora_llm::{Context, Result};

use burn_lora_llm::bert::{BertConfig, classifier::Text};

use crate::text::{Texts, encode};

const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
const MASK: u32 = 4;

const NOUNS: [&str; 12] = [
    "film", "story", "plot", "cast", "music", "ending", "script", "hero", "villain", "camera",
    "dialogue", "set",
];
const ADVERBS: [&str; 4] = ["very", "really", "quite", "so"];
const VIEWERS: [&str; 4] = ["we", "they", "critics", "people"];
/// Negative adjectives, and positive ones.
const ADJECTIVES: [[&str; 9]; 2] = [
    ["dull", "awful", "boring", "clumsy", "cold", "terrible", "stale", "annoying", "weak"],
    ["great", "moving", "funny", "clever", "warm", "brilliant", "fresh", "charming", "strong"],
];
const VERBS: [[&str; 4]; 2] =
    [["hated", "left", "regretted", "mocked"], ["loved", "enjoyed", "praised", "admired"]];
const OTHERS: [&str; 8] = ["the", "was", "not", "never", "and", "but", "although", ","];

/// The numbers of sentences for pretraining, training, validation and testing.
const CLOZES: usize = 12_800;
const TRAIN: usize = 6_400;
const DEV: usize = 500;
const TEST: usize = 1_000;

/// What is needed to create and pretrain an encoder of the language.
pub struct Language {
    pub tokenizer: Tokenizer,
    pub config: BertConfig,
    /// Sentences with one word masked. The class is the word.
    pub clozes: Vec<Text>,
    pub clozes_test: Vec<Text>,
}

/// The language. The same seed gives the same sentences.
pub fn language(seed: u64) -> Result<Language> {
    let tokenizer = tokenizer()?;
    let config = BertConfig {
        vocab_size: tokenizer.get_vocab_size(true),
        hidden_size: 64,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        intermediate_size: 256,
        max_position_embeddings: 32,
        type_vocab_size: 2,
        layer_norm_eps: 1e-12,
    };
    // A different seed, for other sentences than those of the task.
    let mut rng = StdRng::seed_from_u64(seed + 1);
    let mut clozes = |count| {
        let texts = sentences(&tokenizer, count, &mut rng)?.into_iter();
        Ok::<_, String>(texts.map(|text| without_word(text, &mut rng)).collect())
    };
    let (clozes, clozes_test) = (clozes(CLOZES)?, clozes(TEST)?);
    Ok(Language { tokenizer, config, clozes, clozes_test })
}

/// The task: sentences, and whether they are positive.
pub fn texts(tokenizer: &Tokenizer, seed: u64) -> Result<Texts> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut texts = |count| sentences(tokenizer, count, &mut rng);
    let (train, dev, test) = (texts(TRAIN)?, texts(DEV)?, texts(TEST)?);
    Ok(Texts { name: "generated", train, dev, test })
}

fn sentences(tokenizer: &Tokenizer, count: usize, rng: &mut StdRng) -> Result<Vec<Text>> {
    let samples: Vec<_> = (0..count).map(|_| sentence(rng)).collect();
    encode(tokenizer, &samples)
}

/// A tokenizer that splits at spaces.
fn tokenizer() -> Result<Tokenizer> {
    let words = SPECIAL
        .iter()
        .chain(&NOUNS)
        .chain(&ADVERBS)
        .chain(&VIEWERS)
        .chain(ADJECTIVES.as_flattened())
        .chain(VERBS.as_flattened())
        .chain(&OTHERS);
    let vocabulary = words.zip(0..).map(|(word, id)| ((*word).to_owned(), id)).collect();
    let model = WordLevel::builder().vocab(vocabulary).unk_token(SPECIAL[1].to_owned()).build();
    let mut tokenizer = Tokenizer::new(model.context("the words")?);
    tokenizer.with_pre_tokenizer(Some(WhitespaceSplit));
    let [separator, start] = [(SPECIAL[3].to_owned(), 3), (SPECIAL[2].to_owned(), 2)];
    tokenizer.with_post_processor(Some(BertProcessing::new(separator, start)));
    Ok(tokenizer)
}

/// A sentence, and 1 for positive or 0 for negative. If two clauses disagree, the main clause counts.
fn sentence(rng: &mut StdRng) -> (String, u8) {
    let praise = usize::from(rng.random_bool(0.5));
    let main = clause(praise, rng);
    let text = match rng.random_range(0..5) {
        0 | 1 => main,
        2 => format!("{} and {main}", clause(praise, rng)),
        3 => format!("{} but {main}", clause(1 - praise, rng)),
        _ => match rng.random_bool(0.5) {
            true => format!("although {} , {main}", clause(1 - praise, rng)),
            false => format!("{main} although {}", clause(1 - praise, rng)),
        },
    };
    (text, praise as u8)
}

fn clause(praise: usize, rng: &mut StdRng) -> String {
    let negated = rng.random_bool(0.2);
    let said = if negated { 1 - praise } else { praise };
    let mut one = |words: &[&'static str]| *words.choose(rng).expect("there are words");
    let noun = one(&NOUNS);
    match one(&["is", "feel"]) {
        "is" => {
            let (adverb, adjective) = (one(&ADVERBS), one(&ADJECTIVES[said]));
            let not = if negated { "not " } else { "" };
            format!("the {noun} was {not}{adverb} {adjective}")
        }
        _ => {
            let (viewer, verb) = (one(&VIEWERS), one(&VERBS[said]));
            let never = if negated { "never " } else { "" };
            format!("{viewer} {never}{verb} the {noun}")
        }
    }
}

/// The text with one word masked.
fn without_word(mut text: Text, rng: &mut StdRng) -> Text {
    // Neither the first token nor the last, which are special.
    let at = rng.random_range(1..text.ids.len() - 1);
    let word = std::mem::replace(&mut text.ids[at], MASK);
    Text { label: u8::try_from(word).expect("there are few words"), ..text }
}
