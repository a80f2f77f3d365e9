//! Tests of the loss, and of how it becomes small.

use clap::Parser;

use super::*;
use crate::args::{Args, Command};

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
            number(cross_entropy(&llama, Batch::new(&llama, rows, &Default::default())))
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
fn trained(recipe: &Recipe) -> burn_lora_llm::Result<(History, TensorData)> {
    trained_in(tempfile::tempdir().unwrap().path(), recipe, false)
}

/// The same in a directory that may have checkpoints. With `stops`, it ends after one step.
fn trained_in(
    dir: &Path,
    recipe: &Recipe,
    stops: bool,
) -> burn_lora_llm::Result<(History, TensorData)> {
    trained_as(&Alone, dir, recipe, stops)
}

fn keeping(out: &Path) -> Keeping<'_> {
    Keeping { out, base: "org/base", remembered: Remembered::default() }
}

/// The same as one of several replicas.
fn trained_as(
    replicas: &dyn Replicas,
    dir: &Path,
    recipe: &Recipe,
    stops: bool,
) -> burn_lora_llm::Result<(History, TensorData)> {
    let (mut texts, _) = texts_of("llama3");
    texts[0].ids.truncate(5);
    let config = LoraConfig::new(2, 5.0).with_seed(3);
    let model = tiny::<Train>("llama3").attach(&config).unwrap();
    // One is enough to stop all.
    let stop = AtomicBool::new(stops && replicas.index() + 1 == replicas.count());
    let replicas = Counted::new(replicas);
    let keeping = keeping(dir);
    let (model, history) = train(model, &texts, &texts, recipe, Some(&keeping), &stop, &replicas)?;
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

/// What each of so many replicas has in the end.
fn together(
    count: usize,
    dir: &Path,
    recipe: impl Fn(usize) -> Recipe + Sync,
    stops: bool,
) -> Vec<burn_lora_llm::Result<(History, TensorData)>> {
    ThreadReplica::run(count, |it| trained_as(&it, dir, &recipe(it.index()), stops))
}

#[test]
fn replicas_share_a_step_with_workers_and_batches() {
    let recipe = |workers| Recipe { batch: 4, accumulate: 2, workers, ..recipe() };
    let (one, expected) = trained(&recipe(1)).unwrap();
    for (count, workers) in [(2, 1), (2, 2), (3, 2)] {
        let dir = tempfile::tempdir().unwrap();
        let all = together(count, dir.path(), |_| recipe(workers), false);
        let all: Vec<_> = all.into_iter().map(Result::unwrap).collect();
        for (history, b) in &all {
            assert_eq!(b.as_bytes(), all[0].1.as_bytes());
            assert_eq!(history.tokens, one.tokens);
            for (loss, expected) in history.losses.iter().zip(&one.losses) {
                assert_near(*loss, *expected);
            }
            b.assert_approx_eq::<f32>(&expected, burn::tensor::Tolerance::rel_abs(1e-2, 1e-4));
        }
        // Only the first evaluates.
        assert_eq!((all[0].0.valid.len(), all[1].0.valid.len()), (3, 0));
        assert!(all[1].0.sent > 6 * b_bytes(&all[0].1));
    }
}

#[test]
fn replicas_whose_models_differ_in_a_constant_are_refused() {
    let config = |rope_theta: f64, epsilon: f64| {
        let json = serde_json::json!({
            "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
            "hidden_act": "silu", "rms_norm_eps": epsilon, "rope_theta": rope_theta,
        });
        LlamaConfig::from_json(json).unwrap()
    };
    for (other, name) in [(config(2e4, 1e-5), "rope_theta"), (config(1e4, 1e-6), "rms_norm_eps")] {
        let configs = [config(1e4, 1e-5), other];
        let agreed =
            ThreadReplica::run(2, |replica| replica.agree(&configs[replica.index()].to_lines()));
        for error in agreed.into_iter().map(Result::unwrap_err) {
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}

/// B is a part of what is sent.
fn b_bytes(b: &TensorData) -> usize {
    b.as_bytes().len()
}

#[test]
fn another_number_of_replicas_resumes_a_training() {
    let recipe = |_| Recipe { batch: 2, eval_every: 4, ..recipe() };
    let (straight, expected) = trained(&recipe(0)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (count, done) in [(2, 1), (3, 2), (1, 3)] {
        let all = together(count, dir.path(), recipe, true);
        for replica in all {
            assert_eq!(replica.unwrap().0.losses.len(), done, "all stop");
        }
    }
    let (resumed, b) = together(2, dir.path(), recipe, false).swap_remove(1).unwrap();
    assert_eq!(resumed.tokens, straight.tokens);
    for (loss, expected) in resumed.losses.iter().zip(&straight.losses) {
        assert_near(*loss, *expected);
    }
    b.assert_approx_eq::<f32>(&expected, burn::tensor::Tolerance::rel_abs(1e-2, 1e-4));
}

#[test]
fn replicas_with_other_recipes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let rate = |index| if index == 1 { 0.02 } else { 0.01 };
    let all = together(2, dir.path(), |it| Recipe { learning_rate: rate(it), ..recipe() }, false);
    for replica in all {
        let error = replica.expect_err("it is refused");
        assert_eq!(
            error,
            "the replicas differ: replica 1 has `learning_rate: 0.02,` where replica 0 has \
             `learning_rate: 0.01,`",
        );
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was written");
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
fn d4_more_steps_go_on_along_the_longer_schedule() {
    // The learning rate grows in all of the first part, which it does alike for any number of steps.
    let of = |iters| Recipe { iters, warmup: 3, eval_every: 3, ..recipe() };
    let (straight, expected) = trained(&of(6)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    trained_in(dir.path(), &of(3), false).unwrap();
    let (longer, b) = trained_in(dir.path(), &of(6), false).unwrap();
    assert_eq!((b.as_bytes(), longer.losses), (expected.as_bytes(), straight.losses));
    assert_eq!(longer.valid, straight.valid);
}

#[test]
fn a_checkpoint_of_another_rank_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    trained_in(dir.path(), &recipe(), false).unwrap();
    let config = LoraConfig::new(3, 5.0);
    let model = tiny::<Train>("llama3").attach(&config).unwrap();
    let (texts, _) = texts_of("llama3");
    let (stop, replicas) = (AtomicBool::new(false), Counted::new(&Alone));
    let keeping = keeping(dir.path());
    let result = train(model, &texts, &texts, &recipe(), Some(&keeping), &stop, &replicas);
    let Err(error) = result else { panic!("it is refused") };
    assert!(error.contains("checkpoints/6: "), "{error}");
    assert!(error.contains("rank 3") && error.contains("rank 2"), "{error}");
}

#[test]
fn u4_a_checkpoint_that_is_cut_off_gives_way_to_the_one_before_it() {
    let recipe = Recipe { batch: 1, eval_every: 2, ..recipe() };
    let (straight, expected) = trained(&recipe).unwrap();
    for file in ["model.mpk", "optimizer.mpk", "history.json"] {
        let dir = tempfile::tempdir().unwrap();
        trained_in(dir.path(), &recipe, false).unwrap();
        let cut = |step: &str, length: fn(usize) -> usize| {
            let path = dir.path().join("checkpoints").join(step).join(file);
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..length(bytes.len())]).unwrap();
            path.display().to_string()
        };
        // The steps after the whole one are done again, to the same bits.
        cut("6", |length| length - 1);
        let (again, b) = trained_in(dir.path(), &recipe, false).unwrap();
        assert_eq!((b.as_bytes(), again.losses), (expected.as_bytes(), straight.losses.clone()));

        let paths = [cut("6", |_| 0), cut("4", |length| length / 2)];
        let error = trained_in(dir.path(), &recipe, false).expect_err("none is whole");
        assert!(paths.iter().all(|path| error.contains(&format!("{path} is cut off"))), "{error}");
        assert!(error.contains("no other checkpoint") && error.contains("--force"), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn the_gradient_is_clipped_as_a_whole() {
    let model = tiny::<Train>("llama3").attach(&LoraConfig::new(2, 5.0).with_seed(3)).unwrap();
    let (texts, _) = texts_of("llama3");
    let gradients = || {
        let batch = Batch::new(&model, &[vec![&texts[0]]], &Default::default());
        GradientsParams::from_grads(cross_entropy(&model, batch).backward(), &model)
    };
    let before = norm(&model, &gradients());
    assert!(before > 1.0, "{before}");
    for (most, expected) in [(0.5, 0.5), (2.0 * before, before)] {
        let mut gradients = gradients();
        clip(&model, &mut gradients, before, most);
        assert_near(norm(&model, &gradients), expected);
    }
}

#[test]
fn a_loss_that_is_no_number_stops_the_training() {
    let wild = Recipe { iters: 50, learning_rate: 1e30, warmup: 0, ..recipe() };
    let error = trained(&wild).expect_err("it stops");
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
fn the_default_targets_are_all_linear_layers_of_the_model() {
    let targets = |name: &str, words: &[&str]| {
        let args = Args::try_parse_from(["burn-lora", "train"].iter().chain(words)).unwrap();
        let Some(Command::Train(args)) = args.command else { panic!("it is another command") };
        args.targets_of(&tiny::<Plain>(name)).join(",")
    };
    let usual = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj";
    assert_eq!(targets("llama3", &[]), usual);
    assert_eq!(targets("phi3", &[]), "qkv_proj,o_proj,gate_up_proj,down_proj");
    assert_eq!(targets("phi3", &["--targets", "o_proj"]), "o_proj");
}
