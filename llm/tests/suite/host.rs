//! Decoders on slices score as those on tensors, whatever else is in a step, and however prompts are divided.

use burn_lora::{Init, LoraAdapters, LoraConfig, LoraModule, quantize::Quantization};
use burn_lora_llm::{
    data,
    llama::{HostLlama, HostSet, Llama, Step, Text},
    loss, pretrained,
    texts::{Reading, TextId, Texts},
};

use crate::{
    backend::Plain,
    decoder::{Expected, fixture, tiny},
    oracle::device,
};

/// Whether the backend of the tests has decoders on slices.
static HAS_OWN: bool = !cfg!(feature = "wgpu");

const ALL: [&str; 13] = [
    "llama2", "llama3", "smollm2", "biases", "mistral", "qwen2", "qwen3", "gemma2", "gemma3",
    "phi3", "olmo2", "smollm3", "granite",
];

/// The scores of the last token that was read, after a prompt in parts, and then tokens of an answer.
fn scores(
    llama: &mut HostLlama,
    set: Option<&HostSet>,
    text: &[i32],
    prompt: usize,
    part: usize,
) -> Vec<Vec<f32>> {
    let ids: Vec<_> = text.iter().map(|it| *it as u32).collect();
    let mut text = llama.text(ids[..prompt].to_vec());
    let mut all = Vec::new();
    let mut read = |text: &mut Text| loop {
        let scores = llama.read(vec![Step { text: &mut *text, set, tokens: part }]);
        if let Some(scores) = &scores[0] {
            return scores.to_vec();
        }
    };
    all.push(read(&mut text));
    for id in &ids[prompt..] {
        text.push(*id);
        all.push(read(&mut text));
    }
    all
}

#[track_caller]
fn assert_near(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(1.0_f64, |max, it| max.max(it.abs()));
    for (found, expected) in found.iter().zip(expected) {
        let error = (f64::from(*found) - expected).abs() / largest;
        assert!(error < 2e-5, "{what}: {found} and not {expected}");
    }
}

/// As `transformers` computes them.
#[test]
fn each_family_scores_as_on_tensors() {
    for name in ALL {
        let dir = fixture(name);
        let (llama, expected) = (tiny(name), Expected::read(dir.join("expected.json")));
        let Some(mut host) = HostLlama::of(&llama, true) else {
            assert!(!HAS_OWN, "{name}");
            continue;
        };
        let length = expected.ids[0].len();
        for (place, text) in expected.ids.iter().enumerate() {
            for (prompt, part) in [(1, 1), (3, 2), (length - 1, 4), (length, 100)] {
                let found = scores(&mut host, None, text, prompt, part);
                for (end, found) in (prompt..).zip(&found) {
                    // Phi-3 turns a text otherwise as soon as it has more than 8 tokens.
                    if name != "phi3" || end > 8 {
                        let rows = expected.rows(place, end - 1..end);
                        assert_near(
                            found,
                            &rows.data,
                            &format!("{name}, {prompt} in {part}, {end}"),
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn adapters_of_each_family_score_as_in_peft() {
    if !HAS_OWN {
        return;
    }
    for name in ["gemma2", "gemma3", "phi3", "olmo2", "smollm3", "granite"] {
        let path = fixture(name).join("adapter");
        let adapters = LoraAdapters::load(&path, &device::<Plain>()).unwrap();
        let (llama, expected) = (tiny(name), Expected::read(path.join("expected.json")));
        let adapted = llama.switch(&adapters).unwrap();
        let set = HostSet::of(&adapted, true).unwrap();
        let length = expected.ids[0].len();
        for (host, set) in [(&llama, Some(&set)), (&*adapted, None)] {
            let mut host = HostLlama::of(host, true).unwrap();
            for (place, text) in expected.ids.iter().enumerate() {
                let found = scores(&mut host, set, text, length - 2, 3);
                let rows = expected.rows(place, length - 1..length);
                assert_near(&found[2], &rows.data, name);
            }
        }
    }
}

/// A base, and sets of adapters of several ranks on some or all of its layers.
fn sets(llama: &Llama<Plain>) -> Vec<(String, LoraAdapters<Plain>)> {
    let config =
        |rank: usize| LoraConfig::new(rank, 5.0).with_init(Init::RandomBoth).with_seed(rank as u64);
    let all = [
        ("one", config(2)),
        ("two", config(3).with_targets(["q_proj", "down_proj"])),
        ("three", config(5).with_targets(["v_proj", "embed_tokens", "gate_proj"])),
    ];
    let adapters = |config: &LoraConfig| llama.attach(config).unwrap().adapters();
    all.iter().map(|(name, config)| ((*name).to_owned(), adapters(config))).collect()
}

/// A text that is asked for: its set, its prompt, and the length of its answer.
type Asked = (Option<&'static str>, Vec<u32>, usize);

fn asked() -> Vec<Asked> {
    let prompt = |seed: u32, length: u32| (0..length).map(|it| (it * it + 7 * seed) % 23).collect();
    vec![
        (None, prompt(1, 40), 6),
        (Some("one"), prompt(2, 3), 9),
        (Some("two"), prompt(3, 70), 2),
        (Some("one"), prompt(4, 55), 4),
        (Some("three"), prompt(5, 1), 12),
        (None, prompt(6, 9), 1),
        (Some("three"), prompt(7, 33), 5),
    ]
}

/// The answers, token by token with their scores, of texts of which another one begins in each step. Each step reads so many
/// tokens of prompts.
fn answers(
    texts: &mut Texts<Plain>,
    sets: &[(String, LoraAdapters<Plain>)],
    asked: &[Asked],
    part: usize,
) -> Vec<Vec<Vec<f32>>> {
    let mut all = vec![Vec::new(); asked.len()];
    let (mut running, mut next): (Vec<(TextId, usize)>, _) = (Vec::new(), 0);
    while next < asked.len() || !running.is_empty() {
        if let Some((set, prompt, _)) = asked.get(next) {
            for (name, adapters) in sets.iter().filter(|(name, _)| Some(&**name) == *set) {
                texts.insert(name, adapters).unwrap();
            }
            running.push((texts.begin(*set, prompt.clone()), next));
            next += 1;
        }
        for (id, scores) in texts.step(part).unwrap() {
            let (_, place) = *running.iter().find(|it| it.0 == id).unwrap();
            let best = (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap();
            all[place].push(scores);
            if all[place].len() == asked[place].2 {
                texts.end(id);
                running.retain(|it| it.0 != id);
            } else {
                texts.push(id, best as u32);
            }
        }
    }
    all
}

fn texts(llama: &Llama<Plain>, exact: bool, prefix_bytes: usize) -> Texts<Plain> {
    Texts::new(llama.clone(), Reading { exact, prefix_bytes }).unwrap()
}

/// On slices to the bit.
#[test]
fn an_answer_does_not_depend_on_other_texts() {
    let llama = tiny("smollm2");
    let (packed, _) = llama.clone().quantize(Quantization::Int8).unwrap();
    let sets = sets(&llama);
    for (llama, exact) in [(llama, true), (packed.clone(), true), (packed, false)] {
        let alone: Vec<_> = asked()
            .into_iter()
            .flat_map(|asked| answers(&mut texts(&llama, exact, 0), &sets, &[asked], 1000))
            .collect();
        for part in [1, 7, 1000] {
            let beside = answers(&mut texts(&llama, exact, 0), &sets, &asked(), part);
            for (place, (beside, alone)) in beside.iter().zip(&alone).enumerate() {
                for (token, (beside, alone)) in beside.iter().zip(alone).enumerate() {
                    if HAS_OWN {
                        let what =
                            format!("text {place}, token {token}, parts of {part}, exact: {exact}");
                        assert!(beside == alone, "{what}");
                        continue;
                    }
                    let alone: Vec<_> = alone.iter().map(|it| f64::from(*it)).collect();
                    assert_near(beside, &alone, "beside others");
                }
            }
        }
    }
}

/// In 8 bits a little is rounded away.
#[test]
fn answers_in_8_bits_are_near_the_exact_ones() {
    let (llama, _) = tiny("smollm2").quantize(Quantization::Int8).unwrap();
    let sets = sets(&llama);
    let [fast, exact] =
        [false, true].map(|exact| answers(&mut texts(&llama, exact, 0), &sets, &asked(), 9));
    let (mut largest, mut most) = (0.0_f32, 0.0_f32);
    // The first scores, since greedy answers may part later.
    for (fast, exact) in fast.iter().zip(&exact) {
        for (fast, exact) in fast[0].iter().zip(&exact[0]) {
            largest = largest.max(exact.abs());
            most = most.max((fast - exact).abs());
        }
    }
    assert_eq!(most > 0.0, HAS_OWN);
    assert!(most < 0.02 * largest, "{most} of {largest}");
}

/// To the bit, whether others are answered still or have ended.
#[test]
fn what_texts_begin_with_in_common_is_read_once() {
    if !HAS_OWN {
        return;
    }
    let llama = tiny("smollm2");
    let sets = sets(&llama);
    let common: Vec<_> = (0..60).map(|it| it * 5 % 23).collect();
    let with = |end: &[u32]| [&*common, end].concat();
    let asked: Vec<Asked> = vec![
        (None, with(&[1, 2, 3]), 5),
        (None, with(&[1, 2, 4, 4]), 3),
        (Some("one"), with(&[1, 2, 3]), 4),
        (None, with(&[1, 2, 3]), 2),
        (Some("one"), with(&[]), 1),
        (None, common[..20].to_vec(), 2),
    ];
    let alone: Vec<_> = asked
        .iter()
        .flat_map(|it| answers(&mut texts(&llama, false, 0), &sets, std::slice::from_ref(it), 1000))
        .collect();
    for part in [8, 1000] {
        let mut kept = texts(&llama, false, 1 << 20);
        for _ in 0..2 {
            assert!(answers(&mut kept, &sets, &asked, part) == alone);
        }
        let counts = kept.counts();
        let total: usize = 2 * asked.iter().map(|it| it.1.len()).sum::<usize>();
        assert_eq!(counts.read + counts.reused, total);
        match part {
            // What no other text had read: of the base 63 tokens and 2, and of the set 63; and again the last tokens of the
            // other prompts, whose scores are wanted.
            1000 => assert_eq!(counts.read, 63 + 2 + 63 + (2 * asked.len() - 3)),
            _ => assert!(counts.read < total / 3, "{} of {total}", counts.read),
        }

        // Nothing is kept of a set that another one replaces.
        kept.forget("one");
        let before = kept.counts();
        answers(&mut kept, &sets, &asked[2..3], part);
        assert_eq!(kept.counts().read - before.read, 63);
    }
    // Without memory for them, only texts that are answered at the same time have something in common.
    let mut none = texts(&llama, false, 0);
    for _ in 0..2 {
        answers(&mut none, &sets, &asked[..1], 1000);
    }
    assert_eq!(none.counts().reused, 0);
}

/// A budget for some prompts only: those that were not used for the longest time go.
#[test]
fn prompts_that_are_kept_take_no_more_memory_than_they_may() {
    if !HAS_OWN {
        return;
    }
    let llama = tiny("smollm2");
    let asked = |seed: u32| -> Vec<Asked> {
        vec![(None, (0..64).map(|it| (it + seed) * (it + 3 * seed + 1) % 23).collect(), 1)]
    };
    // A token has keys and values of 32 numbers in each of two layers.
    let config = pretrained::config(&fixture("smollm2")).unwrap();
    let each = 4 * 2 * config.num_hidden_layers * config.key_value_heads() * config.head_dim();
    let mut texts = texts(&llama, false, 3 * 64 * each);
    let mut reused = |seed| {
        let before = texts.counts().reused;
        answers(&mut texts, &[], &asked(seed), 1000);
        texts.counts().reused - before
    };
    for seed in [1, 2, 3] {
        assert_eq!(reused(seed), 0);
    }
    assert_eq!(reused(1), 63);
    // The fourth takes the place of the second.
    assert_eq!(reused(4), 0);
    assert_eq!([reused(1), reused(3), reused(4)], [63; 3]);
    assert_eq!(reused(2), 0);
}

/// Texts whose length decides how they are turned share nothing.
#[test]
fn texts_that_depend_on_their_length_share_nothing() {
    if !HAS_OWN {
        return;
    }
    let llama = tiny("phi3");
    let asked: Vec<Asked> =
        vec![(None, vec![3, 1, 4, 1, 5], 6), (None, vec![3, 1, 4, 1, 5, 9, 2, 6, 5, 3], 3)];
    let alone: Vec<_> = asked
        .iter()
        .flat_map(|it| answers(&mut texts(&llama, true, 0), &[], std::slice::from_ref(it), 1000))
        .collect();
    let mut kept = texts(&llama, true, 1 << 20);
    for part in [2, 1000] {
        assert!(answers(&mut kept, &[], &asked, part) == alone);
    }
    assert_eq!(kept.counts().reused, 0);
    // Nor does one wait for the other.
    let prompt: Vec<_> = (0..40).map(|it| it % 23).collect();
    kept.begin(None, [&*prompt, &[1]].concat());
    kept.begin(None, [&*prompt, &[2]].concat());
    assert_eq!(kept.step(1000).unwrap().len(), 2);
}

#[test]
fn texts_can_be_ended_at_any_time() {
    let llama = tiny("smollm2");
    let sets = sets(&llama);
    let mut texts = texts(&llama, false, 1 << 20);
    texts.insert("one", &sets[0].1).unwrap();
    let one = texts.begin(Some("one"), vec![1; 40]);
    let two = texts.begin(None, vec![2; 40]);
    texts.step(10).unwrap();
    texts.end(one);
    texts.end(one);
    let mut found = Vec::new();
    while found.is_empty() {
        found = texts.step(10).unwrap();
    }
    assert_eq!(found[0].0, two);
    texts.clear();
    assert!(texts.step(10).unwrap().is_empty());
    // Of what was cleared nothing is kept: a step may have ended in its middle.
    let before = texts.counts();
    let again = texts.begin(None, vec![2; 40]);
    while texts.step(100).unwrap().is_empty() {}
    texts.end(again);
    assert_eq!(texts.counts().reused, before.reused);
    // The set has gone with its text.
    let unknown = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        texts.begin(Some("one"), vec![1]);
    }));
    assert!(unknown.is_err());
}

/// The same cross-entropy as on tensors, also where a prompt does not count.
#[test]
fn texts_are_evaluated_as_they_are_answered() {
    let device = device::<Plain>();
    let text = |length: u32, given| data::Text {
        ids: (0..length).map(|it| it * it % 23).collect(),
        given,
    };
    let texts = [text(30, 0), text(1, 0), text(9, 4), text(17, 1), text(5, 5), text(12, 11)];
    for name in ["smollm2", "gemma2"] {
        let (packed, _) = tiny(name).quantize(Quantization::Int8).unwrap();
        let expected = loss::evaluate(&packed, &texts, 2, &device);
        let found = [true, false].map(|exact| loss::evaluate_answers(&packed, &texts, 4, exact));
        let [Some(exact), Some(fast)] = found else {
            assert!(!HAS_OWN);
            continue;
        };
        assert!((exact - expected).abs() < 1e-5 * expected, "{name}: {exact} and not {expected}");
        assert!(fast != exact && (fast - expected).abs() < 0.01 * expected, "{name}: {fast}");
    }
}
