//! Tests of how texts are continued and judged, and of models that are written.

use burn_lora_llm::merged::Precision;
use clap::Parser;

use super::*;
use crate::args::{Args, Command};

#[test]
fn an_answer_with_the_cache_is_that_without_it() {
    let (_dir, chat) = chat();
    let llama: Llama<Plain> = tiny("qwen3");
    let device = Default::default();
    let greedy = Sampling { temperature: 0.0, top_p: 1.0 };
    let mut rng = StdRng::seed_from_u64(0);
    let prompt = [7, 11, 3];
    let options = Options { limit: 12, sampling: greedy, exact: false };
    let new = generate(&llama, &chat, &prompt, options, &mut rng, |_| ()).unwrap();
    assert!(new.len() > 3, "{new:?}");
    let mut all = prompt.to_vec();
    for &id in &new {
        let ids: Vec<_> = all.iter().map(|&id| id as i32).collect();
        let ids = Tensor::from_data(TensorData::new(ids, [1, all.len()]), &device);
        let scores =
            llama.read(ids, &mut llama.cache()).into_data().iter::<f32>().collect::<Vec<_>>();
        assert_eq!(greedy.choose(&scores, &mut rng), id);
        all.push(id);
    }
}

#[test]
fn tokens_are_chosen_as_often_as_they_are_probable() {
    let scores = [0.5_f32.ln(), 0.125_f32.ln(), 0.25_f32.ln(), 0.125_f32.ln()];
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
    for cold in [0.0, 1e-300, 1e-42, 1e-6, 1e-4] {
        assert_eq!(counts(cold, 1.0), [8000, 0, 0, 0], "{cold}");
    }
    // Scores that are no numbers, of a model that has diverged, choose something.
    for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (temperature, top_p) in [(0.0, 1.0), (1.0, 1.0), (1.0, 0.5), (1.0, 0.0)] {
            let sampling = Sampling { temperature, top_p };
            let mut rng = StdRng::seed_from_u64(5);
            assert!(sampling.choose(&[broken; 200], &mut rng) < 200);
            assert!(sampling.choose(&[broken, 1.0, 2.0], &mut rng) < 3);
        }
    }
    // With half the temperature, the probabilities are squared.
    assert!(near(counts(0.5, 1.0)[0], 0.25 / (0.25 + 0.0625 + 2.0 / 64.0)));
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
fn a_merged_model_does_not_replace_its_base() {
    let (dir, chat) = chat();
    let llama: Llama<Plain> = tiny("qwen3");
    let error = merged::save(&llama, &chat, dir.path(), dir.path(), None).unwrap_err();
    assert!(error.contains("the base is there"), "{error}");
    assert!(!fs::read(dir.path().join("tokenizer.json")).unwrap().is_empty());
}

#[test]
fn d8_the_type_of_a_merged_model_is_an_argument() {
    let parse = |dtype: &[&str]| {
        let words = ["burn-lora", "merge", "--adapter", "a", "--out", "b"];
        let args = Args::try_parse_from(words.iter().chain(dtype));
        let Some(Command::Merge(merge)) = args.map_err(|error| error.to_string())?.command else {
            panic!("it is another command");
        };
        Ok::<_, String>(merge.dtype)
    };
    assert_eq!(parse(&[]), Ok(None));
    for (name, precision) in
        [("f32", Precision::F32), ("f16", Precision::F16), ("bf16", Precision::BF16)]
    {
        assert_eq!(parse(&["--dtype", name]), Ok(Some(precision)));
    }
    assert!(parse(&["--dtype", "f8"]).unwrap_err().contains("f32, f16, bf16"));
}
