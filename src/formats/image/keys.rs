//! The keys of the tensors: what each holds, and of which layer.

use crate::error::LoraError;

/// What a tensor is of an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The factor A, which reads the input.
    Down,
    /// The factor B, which writes the output.
    Up,
    /// The kernel between the two, where they have size 1.
    Mid,
    Alpha,
    Magnitude,
}

/// How many roles there are.
pub(super) const ROLES: usize = 5;

/// What keys end with, behind the name of the layer: kohya's spelling, that of diffusers and PEFT, and the older ones
/// of diffusers. ComfyUI reads all of them, and the one of a `PeftModel` in memory.
const ENDS: [(&str, Role); 19] = [
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora_mid.weight", Role::Mid),
    (".alpha", Role::Alpha),
    (".dora_scale", Role::Magnitude),
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".lora_magnitude_vector", Role::Magnitude),
    (".lora_magnitude_vector.weight", Role::Magnitude),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    ("_lora.down.weight", Role::Down),
    ("_lora.up.weight", Role::Up),
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".lora_A.default.weight", Role::Down),
    (".lora_B.default.weight", Role::Up),
    (".lora_A", Role::Down),
    (".lora_B", Role::Up),
];

/// The parts of other adapters: what one of the last two names in a key begins with, the method, and whether the name
/// is no more than that.
const OTHERS: [(&str, &str, bool); 18] = [
    ("hada_", "LoHa", false),
    ("lokr_", "LoKr", false),
    ("oft_", "OFT or BOFT", false),
    ("boft_", "OFT or BOFT", false),
    ("on_input", "IA3", true),
    ("ia3_l", "IA3", true),
    ("a1", "GLoRA", true),
    ("a2", "GLoRA", true),
    ("b1", "GLoRA", true),
    ("b2", "GLoRA", true),
    ("diff", "the difference of a weight that was trained in full", true),
    ("diff_b", "the difference of a bias that was trained in full", true),
    ("w_norm", "the difference of a norm that was trained in full", true),
    ("b_norm", "the difference of a norm that was trained in full", true),
    ("set_weight", "a weight that was trained in full", true),
    ("bias_indices", "a sparse difference of a bias", true),
    ("bias_values", "a sparse difference of a bias", true),
    ("bias_size", "a sparse difference of a bias", true),
];

/// The name of the layer, as it is in the key, and what the tensor is of its adapter; `None` if the key ends like none
/// of an adapter.
///
/// # Errors
///
/// If it is of another method than LoRA, or something that sets here do not have.
pub(super) fn split<'k>(key: &'k str, file: &str) -> Result<Option<(&'k str, Role)>, LoraError> {
    let unsupported = |reason: String| {
        let (file, field) = (file.to_owned(), key.to_owned());
        Err(LoraError::Unsupported { file, field, reason: Some(reason) })
    };
    let found = ENDS.iter().find_map(|(end, role)| Some((key.strip_suffix(end)?, *role)));
    if found.is_some() {
        return Ok(found);
    }
    if key.ends_with(".lora_B.bias") || key.ends_with(".lora_up.bias") {
        return unsupported(
            "it is the bias of an adapter, which is read from directories of PEFT alone: save the adapter by \
             `save_pretrained` of its `PeftModel`, and read it by `LoraAdapters::load`"
                .to_owned(),
        );
    }
    if key.ends_with(".reshape_weight") {
        return unsupported(
            "the layer has more channels with the adapter than in the base; add them to the base, with weights of \
             zero, and remove this tensor"
                .to_owned(),
        );
    }
    let is_of = |name: &str, begin: &str, whole: bool| match whole {
        true => name == begin,
        false => name.starts_with(begin),
    };
    // Layers may have any names, so that only the end of a key tells.
    let mut names = key.rsplit('.').take(2);
    let other = names.find_map(|name| OTHERS.iter().find(|(it, _, whole)| is_of(name, it, *whole)));
    match other {
        Some((_, method, _)) => unsupported(format!(
            "it is {method}, and sets hold LoRA alone; merge the file into a copy of the base by the program that \
             wrote it, and take what changed by `LoraModule::extract`"
        )),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_leaves_the_name_of_the_layer() {
        for (end, role) in ENDS {
            let key = format!("unet.mid.to_q{end}");
            assert_eq!(split(&key, "file").unwrap(), Some(("unet.mid.to_q", role)), "{key}");
        }
        // Those of layers that are called like parts of other adapters.
        for key in ["unet.a1.lora_down.weight", "diff.alpha", "unet.hada_x.lora_A.weight"] {
            assert!(split(key, "file").unwrap().is_some(), "{key}");
        }
        for key in ["unet.mid.to_q.weight", "lora_unet_mid", "unet.a10.weight"] {
            assert_eq!(split(key, "file").unwrap(), None, "{key}");
        }
    }
}
