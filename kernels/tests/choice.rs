//! The variable that chooses instructions. It is read once, so each choice is made in a process of its own.

use std::{env, process::Command};

use burn_lora_kernels::{Dots, Instructions, VARIABLE, dots, instructions};

/// Runs in the processes that the other tests start.
#[test]
fn what_is_chosen() {
    println!("chosen: {}, {}", instructions(), dots());
}

/// Everything that [`what_is_chosen`] prints with this value of the variable, and whether it succeeds.
fn chosen(name: Option<&str>) -> (bool, String) {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "what_is_chosen", "--nocapture"]).env_remove(VARIABLE);
    if let Some(name) = name {
        command.env(VARIABLE, name);
    }
    let output = command.output().unwrap();
    let printed = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(printed).unwrap())
}

#[test]
fn the_fastest_are_chosen() {
    let fastest = Instructions::ALL.into_iter().rev().find(|it| it.are_there()).unwrap();
    let (succeeds, printed) = chosen(None);
    assert!(succeeds, "{printed}");
    let expected = format!("chosen: {fastest}, {}", Dots::up_to(fastest));
    assert!(printed.contains(&expected), "{expected} expected: {printed}");
}

#[test]
fn those_that_are_named_are_chosen() {
    for by in Instructions::ALL {
        let (succeeds, printed) = chosen(Some(by.name()));
        assert_eq!(succeeds, by.are_there(), "{printed}");
        let expected = match by.are_there() {
            true => format!("chosen: {by}, {}", Dots::up_to(by)),
            false => format!("{VARIABLE}: this processor has no {by}"),
        };
        assert!(printed.contains(&expected), "{expected} expected: {printed}");
    }
}

#[test]
fn names_of_nothing_are_refused_with_all_names() {
    for name in ["", "fast", "AVX2", "avx2 "] {
        let (succeeds, printed) = chosen(Some(name));
        let names = "portable, neon, avx2, avx512, avx512-bf16, amx";
        let expected = format!("{VARIABLE}: `{name}` are no instructions; there are {names}");
        assert!(!succeeds && printed.contains(&expected), "{expected} expected: {printed}");
    }
}

#[test]
fn dot_products_use_no_more_than_is_chosen() {
    assert_eq!(Dots::up_to(Instructions::Portable), Dots::Portable);
    assert_eq!(Dots::up_to(Instructions::Neon), Dots::Portable);
    assert!(Dots::up_to(Instructions::Avx2) <= Dots::Avx2);
    let fastest = Dots::ALL.into_iter().rev().find(|it| it.are_there()).unwrap();
    assert_eq!(Dots::up_to(Instructions::Amx), fastest);
    assert_eq!(Dots::ALL.map(Dots::name), ["portable", "avx2", "avx512-vnni"]);
}

#[test]
fn names_are_read_as_they_are_written() {
    for by in Instructions::ALL {
        assert_eq!(by.name().parse(), Ok(by));
        assert_eq!(by.to_string(), by.name());
    }
}
