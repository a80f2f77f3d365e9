//! Tests of what is learnt, of the loss, and of how texts are continued.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use burn::{
    module::AutodiffModule,
    optim::GradientsParams,
    tensor::{Tensor, TensorData},
};
use burn_lora::{LoraConfig, LoraModule};
use rand::{SeedableRng, rngs::StdRng};
use serde::Deserialize;
use serde_json::json;
use tempfile::TempDir;
use tokenizers::{
    Tokenizer, models::wordlevel::WordLevel, pre_tokenizers::whitespace::WhitespaceSplit,
};

use crate::{
    chat::Chat,
    common::backend::{Plain, Train},
    data::{self, Batch, Reading, Text, deal, pack, tokens},
    generate::{Sampling, generate},
    generated, gguf_tokens,
    llama::Llama,
    loss::{evaluate, surprise},
    merged, pretrained, reviews,
    train::{History, Recipe, clip, norm, train},
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/llama/fixtures").join(name)
}

fn tiny<B: burn::tensor::backend::Backend>(name: &str) -> Llama<B> {
    pretrained::load(&fixture(name), &Default::default()).unwrap().llama
}

const WORDS: [&str; 11] =
    ["<end>", "user:", "assistant:", "a", "b", "c", "d", "e", "f", "negative", "positive"];

/// A tokenizer of words, and a template.
fn chat() -> (TempDir, Chat) {
    let dir = tempfile::tempdir().unwrap();
    let words = WORDS.iter().zip(0..).map(|(word, id)| (word.to_string(), id));
    let words: HashMap<_, _> = words.collect();
    let model = WordLevel::builder().vocab(words.into_iter().collect()).unk_token("f".to_owned());
    let mut tokenizer = Tokenizer::new(model.build().unwrap());
    tokenizer.with_pre_tokenizer(Some(WhitespaceSplit));
    tokenizer.save(dir.path().join("tokenizer.json"), false).unwrap();
    let template = "{% for it in messages %}{{ it.role }}: {{ it.content.strip() }} <end> {% endfor %}\
                    {% if add_generation_prompt %}assistant: {% endif %}";
    let settings = json!({"eos_token": {"content": "<end>"}, "chat_template": template});
    fs::write(dir.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    let chat = Chat::read(dir.path()).unwrap();
    (dir, chat)
}

const ALL: Reading = Reading { max_length: 100, mask_prompt: false };
const ANSWERS: Reading = Reading { max_length: 100, mask_prompt: true };

fn read(lines: &str, reading: &Reading) -> crate::common::Result<Vec<Text>> {
    let (dir, chat) = chat();
    let path = dir.path().join("train.jsonl");
    fs::write(&path, lines).unwrap();
    data::read(&path, &chat, reading)
}

#[test]
fn generated_questions_are_in_one_file_only_and_of_known_words() {
    let dir = tempfile::tempdir().unwrap();
    generated::write_texts(dir.path()).unwrap();
    let tokenizer = generated::tokenizer().unwrap();
    let mut questions = BTreeSet::new();
    for (file, count) in [("train.jsonl", 32), ("valid.jsonl", 8), ("test.jsonl", 8)] {
        let lines = fs::read_to_string(dir.path().join(file)).unwrap();
        assert_eq!(lines.lines().count(), count);
        for line in lines.lines() {
            let pair: HashMap<String, String> = serde_json::from_str(line).unwrap();
            assert!(pair["completion"].ends_with(", my friend."));
            for text in pair.values() {
                let ids = tokenizer.encode(text.as_str(), false).unwrap().get_ids().to_vec();
                assert!(!ids.contains(&0), "{text}");
                assert_eq!(tokenizer.decode(&ids, true).unwrap(), *text);
            }
            assert!(questions.insert(pair["prompt"].clone()), "{line}");
        }
    }
}

#[test]
fn a_merged_model_does_not_replace_its_base() {
    let (dir, chat) = chat();
    let llama: Llama<Plain> = tiny("qwen3");
    let error = merged::save(&llama, &chat, dir.path(), dir.path()).unwrap_err();
    assert!(error.contains("the base is there"), "{error}");
    assert!(!fs::read(dir.path().join("tokenizer.json")).unwrap().is_empty());
}

#[test]
fn the_three_forms_of_texts_are_told_by_their_keys() {
    let lines = r#"{"text": "a b c"}
{"prompt": "a", "completion": "b c"}

{"messages": [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b c"}]}"#;
    let talk = vec![1, 3, 0, 2, 4, 5, 0];
    let texts = read(lines, &ALL).unwrap();
    let ids: Vec<_> = texts.iter().map(|text| text.ids.clone()).collect();
    assert_eq!(ids, [vec![3, 4, 5, 0], talk.clone(), talk]);
    assert!(texts.iter().all(|text| text.given == 0));

    // `user: a <end> assistant:` is given.
    let given: Vec<_> = read(lines, &ANSWERS).unwrap().iter().map(|text| text.given).collect();
    assert_eq!(given, [0, 4, 4]);
    let short = Reading { max_length: 5, ..ANSWERS };
    let texts = read(lines, &short).unwrap();
    assert_eq!(texts.iter().map(Text::targets).collect::<Vec<_>>(), [3, 1, 1]);
}

#[test]
fn a_bad_line_is_an_error_with_its_number() {
    for (line, reading, expected) in [
        ("{", ALL, "train.jsonl, line 3: EOF"),
        (r#"{"txt": "a"}"#, ALL, "line 3: `messages`, or `prompt` and `completion`, or `text`"),
        (r#"{"text": "a", "prompt": "b", "completion": "c"}"#, ALL, "line 3: `messages`, or"),
        (r#"{"messages": [{"role": "user"}]}"#, ALL, "line 3: `messages`: missing field `content`"),
        (r#"{"messages": []}"#, ANSWERS, "line 3: `messages` is empty"),
        (r#"{"messages": [{"role": "user", "content": "a"}]}"#, ANSWERS, "must be the assistant's"),
        (r#"{"text": ""}"#, ALL, "line 3: within the greatest length, there is no token to learn"),
        (
            r#"{"prompt": "a b c d", "completion": "e"}"#,
            Reading { max_length: 6, mask_prompt: true },
            "line 3: within the greatest length",
        ),
    ] {
        let error = read(&format!("{{\"text\": \"a b\"}}\n\n{line}\n"), &reading).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    assert!(read("\n", &ALL).unwrap_err().contains("it holds no text"));
}

#[test]
fn a_gguf_file_says_how_texts_become_tokens() {
    let tokens = ["<s>", "a", "b", "ab", "Ġ", "Ġa", "1", "2", "12", "<do>", "Ċ"];
    let fields = |division: &str, begins: bool| {
        let fields = json!({
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": division,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": ["a b", "Ġ a", "1 2"],
            "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1, 1, 1, 1, 4, 1],
            "tokenizer.ggml.add_bos_token": begins,
            "tokenizer.ggml.bos_token_id": 0,
        });
        fields.as_object().unwrap().clone()
    };
    let read = |fields| gguf_tokens::tokenizer(&fields, Path::new("dir/model.gguf"));
    let ids = |division: &str, begins: bool| {
        let tokenizer = read(fields(division, begins)).unwrap();
        let encoding = tokenizer.encode("ab a12<do>b <s>\n12", true).unwrap();
        assert_eq!(tokenizer.decode(encoding.get_ids(), true).unwrap(), "ab a12<do>b \n12");
        encoding.get_ids().to_vec()
    };
    // Digits are divided by SmolLM2 and Qwen.
    let (divided, whole) = ([3, 5, 6, 7, 9, 2, 4, 0, 10, 6, 7], [3, 5, 8, 9, 2, 4, 0, 10, 8]);
    for (division, expected) in
        [("smollm", &divided[..]), ("qwen2", &divided), ("llama-bpe", &whole), ("default", &whole)]
    {
        assert_eq!(ids(division, false), expected, "{division}");
        assert_eq!(ids(division, true), [&[0], expected].concat(), "{division}");
    }

    let error = read(fields("gpt-9", false)).err().unwrap();
    assert_eq!(error, "dir/model.gguf: `tokenizer.ggml.pre` \"gpt-9\" is not supported");
    let mut other = fields("default", false);
    other["tokenizer.ggml.model"] = json!("llama");
    let error = read(other).err().unwrap();
    assert!(
        error.contains("of the kind \"llama\"") && error.contains("dir/tokenizer.json"),
        "{error}"
    );
    let mut other = fields("default", false);
    other.remove("tokenizer.ggml.merges");
    let error = read(other).err().unwrap();
    assert_eq!(error, "dir/model.gguf: `tokenizer.ggml.merges` is missing");
}

/// Texts of a fixture, and the logarithms of the probabilities that Python gives their next tokens.
fn texts_of(name: &str) -> (Vec<Text>, Vec<Vec<f64>>) {
    #[derive(Deserialize)]
    struct Expected {
        ids: Vec<Vec<u32>>,
        logits: Vec<Vec<f64>>,
    }
    let json = fs::read(fixture(name).join("expected.json")).unwrap();
    let expected: Expected = serde_json::from_slice(&json).unwrap();
    let length = expected.ids[0].len();
    let of_next = |text: usize, at: usize| {
        let row = &expected.logits[text * length + at];
        let sum: f64 = row.iter().map(|score| score.exp()).sum();
        row[expected.ids[text][at + 1] as usize] - sum.ln()
    };
    let probabilities =
        (0..2).map(|text| (0..length - 1).map(|at| of_next(text, at)).collect()).collect();
    let texts = expected.ids.into_iter().map(|ids| Text { ids, given: 0 }).collect();
    (texts, probabilities)
}

#[track_caller]
fn assert_near(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-4 * expected.abs(), "{found}, not {expected}");
}

fn number(tensor: Tensor<Plain, 1>) -> f64 {
    tensor.into_data().iter().next().unwrap()
}

#[test]
fn the_loss_is_that_of_python_however_texts_are_put_together() {
    for name in ["llama3", "qwen2"] {
        let llama: Llama<Plain> = tiny(name);
        let (mut texts, probabilities) = texts_of(name);
        // The first is cut off, and three tokens of the second are given.
        texts[0].ids.truncate(6);
        texts[1].given = 3;
        let expected = -probabilities[0][..5].iter().sum::<f64>();
        let expected = expected - probabilities[1][2..].iter().sum::<f64>();
        let of = |rows: &[Vec<&Text>]| {
            number(surprise(&llama, Batch::new(&llama, rows, &Default::default())))
        };
        let [one, two] = [&texts[0], &texts[1]];
        assert_near(of(&[vec![one], vec![two]]), expected);
        assert_near(of(&[vec![one, two]]), expected);
        assert_near(
            of(&[vec![two, one], vec![one]]),
            expected - probabilities[0][..5].iter().sum::<f64>(),
        );
        assert_near(of(&[vec![one]]) + of(&[vec![two]]), expected);

        // The mean of two batches of different sizes.
        let mean = evaluate(&llama, &texts, 1, &Default::default());
        assert_near(mean, expected / 11.0);
        assert_near(mean, evaluate(&llama, &texts, 2, &Default::default()));
    }
}

#[test]
fn answers_are_right_if_their_scores_are_higher() {
    let (dir, chat) = chat();
    let path = dir.path().join("test.tsv");
    let reviews = ["a b", "c", "d e d c b a", "e e", "b a c", "a", "d d d d"];
    let lines: String = reviews.iter().map(|review| format!("{review}\t1\n")).collect();
    fs::write(&path, format!("sentence\tlabel\n{lines}")).unwrap();
    let questions = reviews::questions(&path, &chat).unwrap();
    let (llama, device) = (tiny::<Plain>("qwen2"), Default::default());
    let positive = reviews.iter().filter(|review| {
        let question =
            format!("user: Is this film review positive or negative? {review} <end> assistant:");
        let ids = chat.encode(&question, false).unwrap();
        let ids: Vec<_> = ids.iter().map(|&id| id as i32).collect();
        let ids = Tensor::from_data(TensorData::new(ids.clone(), [1, ids.len()]), &device);
        let scores =
            llama.read(ids, &mut llama.cache()).into_data().iter::<f64>().collect::<Vec<_>>();
        scores[10] > scores[9]
    });
    let share = 100.0 * positive.count() as f64 / 7.0;
    assert!(share > 0.0 && share < 100.0, "{share}");
    assert_near(reviews::accuracy(&llama, &chat, &questions, &device).unwrap(), share);
}

#[test]
fn rows_are_filled_with_texts_in_their_order() {
    let texts = [3, 4, 2, 8, 9, 1].map(|length| Text { ids: vec![0; length], given: 0 });
    let texts: Vec<_> = texts.iter().collect();
    let rows = pack(&texts, 9);
    let lengths: Vec<Vec<_>> =
        rows.iter().map(|row| row.iter().map(|text| text.ids.len()).collect()).collect();
    assert_eq!(lengths, [vec![3, 4, 2], vec![8], vec![9], vec![1]]);
}

fn recipe() -> Recipe {
    Recipe {
        name: "LoRA",
        iters: 6,
        batch: 2,
        accumulate: 1,
        learning_rate: 0.01,
        warmup: 2,
        clip: 1.0,
        pack: None,
        eval_every: 3,
        seed: 1,
        workers: 1,
        segments: false,
    }
}

/// Trains on two texts, and returns the history and B of the first layer.
fn trained(recipe: &Recipe) -> crate::common::Result<(History, TensorData)> {
    trained_in(tempfile::tempdir().unwrap().path(), recipe, false)
}

/// The same in a directory that may have checkpoints. With `stops`, it ends after one step.
fn trained_in(
    dir: &Path,
    recipe: &Recipe,
    stops: bool,
) -> crate::common::Result<(History, TensorData)> {
    let (mut texts, _) = texts_of("llama3");
    texts[0].ids.truncate(5);
    let config = LoraConfig::new(2, 5.0).with_seed(3);
    let model = tiny::<Train>("llama3").attach(&config).unwrap();
    let stop = AtomicBool::new(stops);
    let (model, history) = train(model, &texts, &texts, recipe, Some(dir), &stop)?;
    let adapters = model.valid().adapters();
    let (_, adapter) = adapters.iter().next().unwrap();
    Ok((history, adapter.b.val().into_data()))
}

#[test]
fn training_makes_the_loss_small() {
    let (history, _) = trained(&Recipe { iters: 40, learning_rate: 0.05, ..recipe() }).unwrap();
    let first = history.valid[0];
    let last = history.valid[history.valid.len() - 1];
    assert_eq!((first.0, last.0, history.losses.len()), (0, 40, 40));
    assert!(last.1 < 0.2 * first.1, "{first:?} {last:?}");
    // Each step sees both texts, of 5 and 9 tokens.
    assert_eq!(history.tokens, 40 * 14);
    assert_near(history.losses[0], first.1);
}

#[test]
fn a_step_is_the_same_however_its_texts_are_divided() {
    let (one, expected) = trained(&recipe()).unwrap();
    for other in [
        Recipe { batch: 1, accumulate: 2, ..recipe() },
        Recipe { workers: 2, ..recipe() },
        Recipe { segments: true, ..recipe() },
        Recipe { workers: 3, segments: true, pack: Some(9), ..recipe() },
        Recipe { pack: Some(14), ..recipe() },
        Recipe { pack: Some(9), ..recipe() },
    ] {
        let (history, b) = trained(&other).unwrap();
        for (loss, expected) in history.losses.iter().zip(&one.losses) {
            assert_near(*loss, *expected);
        }
        b.assert_approx_eq::<f32>(&expected, burn::tensor::Tolerance::rel_abs(1e-2, 1e-4));
    }
}

#[test]
fn a_training_that_is_stopped_goes_on_to_the_same_bits() {
    // One text per step, so that their order counts.
    let recipe = Recipe { batch: 1, eval_every: 4, ..recipe() };
    let (straight, expected) = trained(&recipe).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = dir.path().join("checkpoints");
    for step in 1..6 {
        let (history, _) = trained_in(dir.path(), &recipe, true).unwrap();
        assert_eq!(history.losses.len(), step);
        // What a killed run leaves is not taken for a checkpoint.
        fs::create_dir_all(checkpoints.join(".unfinished/model.mpk")).unwrap();
    }
    let (resumed, b) = trained_in(dir.path(), &recipe, false).unwrap();
    assert_eq!(b.as_bytes(), expected.as_bytes());
    assert_eq!((resumed.losses, resumed.valid), (straight.losses, straight.valid));
    assert_eq!(resumed.tokens, straight.tokens);
    let mut kept: Vec<_> =
        fs::read_dir(checkpoints).unwrap().map(|it| it.unwrap().file_name()).collect();
    kept.sort();
    assert_eq!(kept, ["5", "6"]);

    // A run that is complete has nothing to do.
    let (again, b) = trained_in(dir.path(), &recipe, false).unwrap();
    assert_eq!((b.as_bytes(), again.losses.len()), (expected.as_bytes(), 6));
}

#[test]
fn no_text_is_longer_than_the_model_reads() {
    let llama = tiny::<Plain>("llama3");
    let cut = |given| crate::reading(given, true, &llama).max_length;
    assert_eq!([cut(3), cut(usize::MAX)], [3, llama.longest]);
    assert!(llama.longest > 3);
}

#[test]
fn rows_are_dealt_fairly() {
    let texts: Vec<_> =
        [3, 9, 5, 2, 8, 1].map(|length| Text { ids: vec![0; length], given: 0 }).into();
    let rows = || texts.iter().map(|text| vec![text]).collect::<Vec<_>>();
    let sizes = |workers| {
        let parts = deal(rows(), workers).into_iter();
        let size = |part: Vec<Vec<&Text>>| part.iter().map(|row| tokens(row)).collect::<Vec<_>>();
        parts.map(size).collect::<Vec<_>>()
    };
    assert_eq!(sizes(1), [[9, 8, 5, 3, 2, 1]]);
    assert_eq!(sizes(2), [vec![9, 8], vec![5, 3, 2, 1]]);
    assert_eq!(sizes(3), [vec![9], vec![8], vec![5, 3, 2, 1]]);
    // More workers than rows: no part is empty, and no row is lost.
    assert_eq!(sizes(9), [[9], [8], [5], [3], [2], [1]]);
}

#[test]
fn the_gradient_is_clipped_as_a_whole() {
    let model = tiny::<Train>("llama3").attach(&LoraConfig::new(2, 5.0).with_seed(3)).unwrap();
    let (texts, _) = texts_of("llama3");
    let gradients = || {
        let batch = Batch::new(&model, &[vec![&texts[0]]], &Default::default());
        GradientsParams::from_grads(surprise(&model, batch).backward(), &model)
    };
    let before = norm(&model, &gradients());
    assert!(before > 1.0, "{before}");
    for (most, expected) in [(0.5, 0.5), (2.0 * before, before)] {
        let mut gradients = gradients();
        clip(&model, &mut gradients, most);
        assert_near(norm(&model, &gradients), expected);
    }
}

#[test]
fn a_loss_that_is_no_number_stops_the_training() {
    let wild = Recipe { iters: 50, learning_rate: 1e30, warmup: 0, ..recipe() };
    let error = trained(&wild).err().expect("it stops");
    assert!(error.contains("in step ") && error.contains("--learning-rate"), "{error}");
}

#[test]
fn the_learning_rate_grows_and_falls() {
    let recipe = Recipe { iters: 10, warmup: 4, learning_rate: 2.0, ..recipe() };
    let rates: Vec<_> = (0..10).map(|step| recipe.rate(step)).collect();
    assert_eq!(rates[..5], [0.5, 1.0, 1.5, 2.0, 2.0]);
    assert!(rates[4..].windows(2).all(|pair| pair[1] < pair[0]));
    assert_near(rates[7], 1.0);
}

#[test]
fn an_answer_with_the_cache_is_that_without_it() {
    let (_dir, chat) = chat();
    let llama: Llama<Plain> = tiny("qwen3");
    let device = Default::default();
    let greedy = Sampling { temperature: 0.0, top_p: 1.0 };
    let mut rng = StdRng::seed_from_u64(0);
    let prompt = [7, 11, 3];
    let new = generate(&llama, &chat, &prompt, 12, greedy, &mut rng, |_| ()).unwrap();
    assert!(new.len() > 3, "{new:?}");
    let mut all = prompt.to_vec();
    for &id in &new {
        let ids: Vec<_> = all.iter().map(|&id| id as i32).collect();
        let ids = Tensor::from_data(TensorData::new(ids, [1, all.len()]), &device);
        let scores =
            llama.read(ids, &mut llama.cache()).into_data().iter::<f64>().collect::<Vec<_>>();
        assert_eq!(greedy.choose(&scores, &mut rng), id);
        all.push(id);
    }
}

#[test]
fn tokens_are_chosen_as_often_as_they_are_probable() {
    let scores = [0.5_f64.ln(), 0.125_f64.ln(), 0.25_f64.ln(), 0.125_f64.ln()];
    let mut rng = StdRng::seed_from_u64(5);
    let mut counts = |temperature, top_p| {
        let sampling = Sampling { temperature, top_p };
        let mut counts = [0; 4];
        for _ in 0..8000 {
            counts[sampling.choose(&scores, &mut rng) as usize] += 1;
        }
        counts
    };
    let near =
        |count: i32, probability: f64| (f64::from(count) / 8000.0 - probability).abs() < 0.03;
    let all = counts(1.0, 1.0);
    assert!(
        [0.5, 0.125, 0.25, 0.125].iter().zip(all).all(|(&it, count)| near(count, it)),
        "{all:?}"
    );
    // The two most probable are kept.
    let nucleus = counts(1.0, 0.7);
    assert!(nucleus[1] == 0 && nucleus[3] == 0 && near(nucleus[0], 2.0 / 3.0), "{nucleus:?}");
    assert_eq!(counts(0.0, 1.0), [8000, 0, 0, 0]);
    // With half the temperature, the probabilities are squared.
    assert!(near(counts(0.5, 1.0)[0], 0.25 / (0.25 + 0.0625 + 2.0 / 64.0)));
}
