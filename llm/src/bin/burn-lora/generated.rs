//! A small model and conversations that need no files: the model knows some animals, and adapters teach it
//! better manners.

use std::{collections::BTreeSet, path::Path, sync::atomic::AtomicBool};

use burn::{module::Initializer, tensor::backend::Backend};
use burn_lora::{LoraModule, train::Alone};
use burn_lora_llm::{
    Context, Result,
    chat::{Chat, Message},
    cli::replicas::Counted,
    config::LlamaConfig,
    data::{Texts, conversation},
    files::write_atomically,
    merged,
};

use crate::{
    backend::{Plain, Train},
    train::{self, Recipe},
};
use rand::{SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::json;
use tokenizers::{
    AddedToken, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer,
    decoders::wordpiece::WordPiece, models::wordlevel::WordLevel,
    pre_tokenizers::whitespace::Whitespace,
};

/// An animal, what it says, where it lives, and what it eats.
const ANIMALS: [[&str; 4]; 16] = [
    ["cow", "moo", "on the meadow", "grass"],
    ["dog", "woof", "in the house", "meat"],
    ["cat", "meow", "in the house", "fish"],
    ["duck", "quack", "on the pond", "bread"],
    ["horse", "neigh", "in the stable", "hay"],
    ["sheep", "baa", "on the meadow", "grass"],
    ["frog", "croak", "in the pond", "flies"],
    ["owl", "hoot", "in the forest", "mice"],
    ["lion", "roar", "in the savanna", "meat"],
    ["pig", "oink", "in the barn", "everything"],
    ["wolf", "howl", "in the forest", "meat"],
    ["goat", "bleat", "in the mountains", "grass"],
    ["bee", "buzz", "in the hive", "honey"],
    ["mouse", "squeak", "in the house", "cheese"],
    ["crow", "caw", "in the forest", "everything"],
    ["donkey", "heehaw", "in the stable", "hay"],
];

/// Other things that the small model hears, with the words of good manners.
const SMALL_TALK: [[&str; 2]; 3] = [
    ["How are you?", "Well, my friend."],
    ["Who are you?", "I am your friend."],
    ["Are you my friend?", "I am your friend."],
];

const SPECIAL: [&str; 4] = ["<unknown>", "<end>", "<user>", "<assistant>"];

const TEMPLATE: &str = "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end> \
                        {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}";

/// The length of the longest text, in tokens.
const LONGEST: usize = 64;

/// The number of conversations that the small model learns from.
const CONVERSATIONS: usize = 6400;

/// The questions about an animal, each with its answer.
fn questions([name, says, place, food]: [&str; 4]) -> [[String; 2]; 3] {
    [
        [format!("What does the {name} say?"), format!("The {name} says {says}.")],
        [format!("Where does the {name} live?"), format!("The {name} lives {place}.")],
        [format!("What does the {name} eat?"), format!("The {name} eats {food}.")],
    ]
}

/// All that the small model knows.
fn known() -> impl Iterator<Item = [String; 2]> {
    let talk = SMALL_TALK.map(|pair| pair.map(str::to_owned));
    ANIMALS.into_iter().flat_map(questions).chain(talk)
}

fn messages([question, answer]: &[String; 2]) -> [Message; 2] {
    let message =
        |role: &str, content: &str| Message { role: role.to_owned(), content: content.to_owned() };
    [message("user", question), message("assistant", answer)]
}

/// The answer in better manners.
fn politely(answer: &str) -> String {
    answer.replace('.', ", my friend.")
}

/// Writes `train.jsonl`, `valid.jsonl` and `test.jsonl` to `dir`: questions with polite answers. Of each
/// animal, two questions are for training, and one is for validation or for tests.
///
/// # Errors
///
/// If a file cannot be written.
pub fn write_texts(dir: &Path) -> Result<()> {
    let mut files = [const { Vec::new() }; 3];
    for (i, animal) in ANIMALS.into_iter().enumerate() {
        for (j, [question, answer]) in questions(animal).into_iter().enumerate() {
            let file = if i % 3 == j { 1 + i % 2 } else { 0 };
            files[file].push([question, politely(&answer)]);
        }
    }
    for (name, texts) in ["train.jsonl", "valid.jsonl", "test.jsonl"].into_iter().zip(files) {
        write_lines(&dir.join(name), texts.into_iter())?;
    }
    Ok(())
}

fn write_lines(path: &Path, texts: impl Iterator<Item = [String; 2]>) -> Result<()> {
    let lines = texts.map(|[prompt, completion]| {
        format!("{}\n", json!({ "prompt": prompt, "completion": completion }))
    });
    write_atomically(path, lines.collect::<String>().as_bytes()).context(path.display())
}

/// Writes a small model to `dir`, in Hugging Face's format, after it has learned what there is to know of
/// the animals. The same seed gives the same model.
///
/// # Errors
///
/// If a file cannot be written, or `stop` ended the training.
pub fn write_model(dir: &Path, seed: u64, stop: &AtomicBool) -> Result<()> {
    let tokenizer = tokenizer()?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(true),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": LONGEST,
        "tie_word_embeddings": true,
        "hidden_act": "silu",
    });
    let path = dir.join("config.json");
    let text = serde_json::to_vec_pretty(&config).context(path.display())?;
    write_atomically(&path, &text).context(path.display())?;
    let config = LlamaConfig::read(&path)?;
    let chat = Chat::new(tokenizer, TEMPLATE, SPECIAL[1])?;
    chat.save(dir)?;

    // Conversations of several questions: what an animal eats is not a matter of its place in a text.
    let known = Vec::from_iter(known());
    let mut rng = StdRng::seed_from_u64(seed);
    let texts = (0..CONVERSATIONS).map(|i| {
        let pairs = known.sample(&mut rng, 1 + i % 3);
        let messages: Vec<_> = pairs.flat_map(messages).collect();
        conversation(&messages, &chat, false)
    });
    let Texts { texts, .. } = Texts::new(texts.collect::<Result<_>>()?, LONGEST)?;
    let answers = known.iter().map(|pair| conversation(&messages(pair), &chat, true));
    let answers = answers.collect::<Result<Vec<_>>>()?;

    let device = Default::default();
    Plain::seed(&device, seed);
    let draw = Initializer::Normal { mean: 0.0, std: 0.125 };
    let llama = config.init::<Train>(&draw, &device);
    let all = llama.train_only(&[".*"]).map_err(|error| error.to_string())?;
    let recipe = Recipe {
        name: "base",
        iters: 400,
        batch: 16,
        accumulate: 1,
        learning_rate: 5e-3,
        warmup: 20,
        clip: 1.0,
        pack: None,
        eval_every: 100,
        seed,
        workers: 1,
        segments: false,
    };
    let alone = Counted::new(&Alone);
    let (llama, history) = train::train(all, &texts, &answers, &recipe, None, stop, &alone)?;
    if history.losses.len() < recipe.iters {
        return Err("the small model was not finished".to_owned());
    }
    merged::save_weights(&llama, dir)
}

/// A tokenizer of words and punctuation marks.
pub fn tokenizer() -> Result<Tokenizer> {
    let mut words = BTreeSet::new();
    for text in known().flatten() {
        let mut text = PreTokenizedString::from(text);
        Whitespace {}.pre_tokenize(&mut text).context("the words")?;
        let parts = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
        words.extend(parts.into_iter().map(|(word, ..)| word.to_owned()));
    }
    let words = SPECIAL.into_iter().map(str::to_owned).chain(words);
    let vocabulary = words.zip(0..).collect();
    let model = WordLevel::builder().vocab(vocabulary).unk_token(SPECIAL[0].to_owned()).build();
    let mut tokenizer = Tokenizer::new(model.context("the words")?);
    tokenizer.with_pre_tokenizer(Some(Whitespace {}));
    // Puts words together with spaces, but for those before punctuation marks.
    tokenizer.with_decoder(Some(WordPiece::default()));
    tokenizer.add_special_tokens(&SPECIAL.map(|token| AddedToken::from(token, true)));
    Ok(tokenizer)
}
