//! The tests of the crate, one file per subject. They run on the backend that the cargo features choose,
//! and compare with the plain formulas in `oracle`, never with the crate's own code.

mod backend;
mod model;
mod oracle;

mod activation;
mod algebra;
mod attend;
mod attention;
mod conv;
mod conv_sizes;
mod correctness;
mod decode;
mod dora;
mod dropout;
#[cfg(feature = "ndarray")]
mod element;
mod embedding;
mod empty;
mod eva;
mod folding;
mod freezing;
mod functions;
mod gguf;
mod golden;
mod half;
mod image;
mod init;
mod learner;
mod loading;
mod lora_plus;
mod merging;
mod mixed;
mod norms;
mod overlay;
mod peft;
mod portable;
mod precision;
mod program;
mod quantized;
mod replicas;
mod sizes;
mod steps;
mod store;
mod whole_model;
