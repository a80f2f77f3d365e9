//! The type of the numbers that are multiplied, as an argument.

use std::{env, fmt, path::Path};

use burn_lora::nn::Precision;
use burn_lora_kernels::instructions;
use burn_lora_llm::{Result, pretrained};
use clap::ValueEnum;

use crate::backend;

/// In which type products are computed. Sums are in `f32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// bf16 if most of the model is bf16 in its file and the processor multiplies that faster; otherwise f32.
    Auto,
    /// Single precision.
    F32,
    /// The upper half of single precision.
    Bf16,
}

/// The type that was chosen, and what to tell of it.
#[derive(Debug, PartialEq)]
pub struct Chosen {
    pub precision: Precision,
    pub note: Option<String>,
}

/// What the choice depends on.
struct Circumstances {
    /// Whether most of the model is bf16 in its file.
    file_is_bf16: bool,
    /// The instructions that products in bf16 use, and whether these are faster than those for `f32`.
    instructions: &'static str,
    is_fast: bool,
    /// Why there are no products in bf16.
    obstacle: Option<String>,
}

impl Dtype {
    /// The type for the model at `path`, a directory or a GGUF file.
    ///
    /// # Errors
    ///
    /// If it is to be bf16 where there are no such products, or a file cannot be read.
    pub fn choose(self, path: &Path) -> Result<Chosen> {
        let instructions = instructions();
        self.choose_in(&Circumstances {
            file_is_bf16: self == Self::Auto && pretrained::is_mostly_bf16(path)?,
            instructions: instructions.name(),
            is_fast: instructions.multiply_bf16(),
            obstacle: obstacle(),
        })
    }

    fn choose_in(self, circumstances: &Circumstances) -> Result<Chosen> {
        let Circumstances { file_is_bf16, instructions, is_fast, obstacle } = circumstances;
        let in_f32 = |note| Ok(Chosen { precision: Precision::F32, note });
        let in_bf16 = |but: &str| {
            let note = format!("Products are in bf16 ({instructions}), sums in f32{but}.");
            Ok(Chosen { precision: Precision::Bf16, note: Some(note) })
        };
        let because = |why: &str| {
            in_f32(Some(format!("Products are in f32, and the model is in bf16: {why}.")))
        };
        match (self, obstacle) {
            (Self::F32, _) => in_f32(None),
            (Self::Auto, _) if !file_is_bf16 => in_f32(None),
            (Self::Auto, Some(why)) => because(why),
            (Self::Auto, None) if *is_fast => in_bf16("; --dtype f32 multiplies in f32"),
            (Self::Auto, None) => because(&format!(
                "this processor does not multiply bf16 faster ({instructions}); --dtype bf16 does it anyway"
            )),
            (Self::Bf16, Some(why)) => Err(format!("`--dtype bf16` cannot be used: {why}")),
            (Self::Bf16, None) if *is_fast => in_bf16(""),
            (Self::Bf16, None) => in_bf16("; this processor is not slower with --dtype f32"),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// Why there are no products in bf16, if there are none.
fn obstacle() -> Option<String> {
    let is_portable = || env::var_os("BURN_LORA_PORTABLE").is_some_and(|it| it == "1");
    match backend::ON_CPU {
        false => Some(format!("the backend `{}` has no products in bf16 here", backend::NAME)),
        true if is_portable() => {
            Some("with BURN_LORA_PORTABLE=1 there are no products in bf16".to_owned())
        }
        true => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_suits_the_file_and_the_processor() {
        use Dtype::{Auto, Bf16, F32};
        let (f32, bf16) = (Precision::F32, Precision::Bf16);
        for (dtype, file_is_bf16, is_fast, expected, words) in [
            (Auto, false, true, f32, None),
            (Auto, false, false, f32, None),
            (
                Auto,
                true,
                true,
                bf16,
                Some("in bf16 (amx), sums in f32; --dtype f32 multiplies in f32."),
            ),
            (
                Auto,
                true,
                false,
                f32,
                Some("in f32, and the model is in bf16: this processor does not"),
            ),
            (F32, true, true, f32, None),
            (Bf16, false, true, bf16, Some("Products are in bf16 (amx), sums in f32.")),
            (Bf16, true, false, bf16, Some("(amx), sums in f32; this processor is not slower")),
        ] {
            let circumstances =
                Circumstances { file_is_bf16, instructions: "amx", is_fast, obstacle: None };
            let chosen = dtype.choose_in(&circumstances).unwrap();
            assert_eq!(chosen.precision, expected, "{dtype} {file_is_bf16} {is_fast}");
            let note = chosen.note.as_deref();
            assert_eq!(note.is_some(), words.is_some(), "{note:?}");
            assert!(note.unwrap_or_default().contains(words.unwrap_or_default()), "{note:?}");
        }
    }

    #[test]
    fn where_there_are_no_products_in_bf16_they_are_refused() {
        let circumstances = |file_is_bf16| Circumstances {
            file_is_bf16,
            instructions: "amx",
            is_fast: true,
            obstacle: Some("the backend has none".to_owned()),
        };
        let chosen = |dtype: Dtype, file_is_bf16| dtype.choose_in(&circumstances(file_is_bf16));
        let because = "Products are in f32, and the model is in bf16: the backend has none.";
        let in_f32 = |note: Option<&str>| {
            Ok(Chosen { precision: Precision::F32, note: note.map(str::to_owned) })
        };
        assert_eq!(chosen(Dtype::Auto, true), in_f32(Some(because)));
        assert_eq!(chosen(Dtype::Auto, false), in_f32(None));
        assert_eq!(chosen(Dtype::F32, true), in_f32(None));
        let expected = "`--dtype bf16` cannot be used: the backend has none";
        assert_eq!(chosen(Dtype::Bf16, true), Err(expected.to_owned()));
    }
}
