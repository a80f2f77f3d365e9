//! The version, and what the program computes with here.

use burn_lora_kernels::{Instructions, instructions};
use burn_lora_llm::{Result, cli::backend::check_instructions};

use crate::backend;

/// Prints the version, and also which instructions are used if `verbose` says so.
///
/// # Errors
///
/// If instructions are asked for that are not there.
pub fn print(verbose: bool) -> Result<()> {
    let version = format!("burn-lora {}", env!("CARGO_PKG_VERSION"));
    if !verbose {
        println!("{version}");
        return Ok(());
    }
    check_instructions()?;
    println!("{version}");
    println!("backend: {}", backend::NAME);
    // Other backends have products of their own.
    if backend::ON_CPU {
        let used = instructions();
        let others = Instructions::ALL.into_iter().filter(|&it| it != used && it.are_there());
        println!("products in bf16: {used}{}", also(others.map(Instructions::name)));
    }
    Ok(())
}

/// What this processor has besides.
fn also<'a>(others: impl DoubleEndedIterator<Item = &'a str>) -> String {
    match others.rev().collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => String::new(),
        others => format!("; this processor also has {others}"),
    }
}
