//! mnist
fn main() {}
