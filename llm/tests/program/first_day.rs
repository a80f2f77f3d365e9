//! What a person tries on a first day.

use super::*;

#[test]
fn d1_a_launcher_without_mpi_is_refused_by_its_variable() {
    let place = Place::new();
    for (variable, value) in [("OMPI_COMM_WORLD_SIZE", "2"), ("PMI_SIZE", "2"), ("PMIX_RANK", "1")]
    {
        let done = place.run_with(&train(""), &[(variable, value)]);
        let error = text(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{error}");
        assert!(error.contains(&format!("{variable}={value}")), "{error}");
        assert!(error.contains("`--mpi`"), "{error}");
        assert!(!place.path("out").exists(), "nothing was written");
    }
    // A launcher of one process is none.
    let done = place.run_with(&train(""), &[("OMPI_COMM_WORLD_SIZE", "1")]);
    assert!(done.status.success(), "{}", text(&done.stderr));
}

#[test]
fn d7_the_bare_command_prints_all_of_its_help() {
    let place = Place::new();
    let done = place.run("");
    let help = text(&done.stderr);
    assert_eq!(done.status.code(), Some(2));
    assert!(help.lines().count() > 10, "{help}");
    for word in ["train", "evaluate", "generate", "merge", "serve", "--version", "Backend: "] {
        assert!(help.contains(word), "{word}: {help}");
    }
    assert_eq!(help, place.done("--help").0);
    // What is wrong still has one line.
    let error = place.refused("evaluate");
    assert!(error.contains("--data"), "{error}");
}

#[test]
fn d7_the_version_is_told() {
    let place = Place::new();
    let expected = format!("burn-lora {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(
        [place.done("--version").0, place.done("-V").0],
        [expected.clone(), expected.clone()]
    );

    // With `-v` also what it computes with.
    let verbose = place.done("--version -v").0;
    let lines: Vec<_> = verbose.strip_prefix(&expected).unwrap().lines().collect();
    assert!(lines[0].starts_with("backend: "), "{verbose}");
    for command in ["-V -v", "-vV", "-v --version", "--verbose --version"] {
        assert_eq!(place.done(command).0, verbose);
    }
    if lines.len() > 1 {
        let done = place.run_with("-V -v", &[("BURN_LORA_KERNELS", "portable")]);
        let out = text(&done.stdout);
        assert!(out.contains("\nproducts in bf16: portable"), "{out}");
        let (used, others) =
            lines[1].split_once("; this processor also has ").unwrap_or((lines[1], ""));
        let used = used.strip_prefix("products in bf16: ").unwrap();
        assert!(used == "portable" || others.ends_with("portable"), "{verbose}");
        assert!(!others.split(", ").any(|it| it == used), "{verbose}");
    }
    let error = place.refused("-v");
    assert!(error.contains("--version"), "{error}");
    let error = place.refused("--version evaluate");
    assert!(error.contains("cannot be used with"), "{error}");
}

#[test]
fn d7_prompts_beyond_the_context_are_refused() {
    let place = Place::new();
    // `user: … <end> assistant:` are 3 tokens besides the prompt.
    let generate = |words: usize| {
        let mut command = place.command("generate --model model --max-tokens 9 --prompt");
        let done = command.arg("a ".repeat(words)).output().unwrap();
        (done.status.success(), text(&done.stdout), text(&done.stderr))
    };
    for (words, tokens) in [(61, 64), (80, 83)] {
        let (success, _, error) = generate(words);
        assert!(!success && error.contains(&format!("the prompt has {tokens} tokens")), "{error}");
        assert!(error.contains("at most 64"), "{error}");
    }
    // An answer ends where the model cannot read on.
    let (success, out, error) = generate(59);
    assert!(success, "{error}");
    let full = out.contains("[2 tokens") && out.contains("the context of 64 is full");
    assert!(full || out.contains("[0 tokens") || out.contains("[1 tokens"), "{out}");
}
