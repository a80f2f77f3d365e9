//! What the layers of a model are called in files.

use std::{cell::LazyCell, collections::BTreeMap};

use burn::{module::Module, tensor::backend::Backend};

use crate::{
    adapter::WeightLayout, adapters::renaming::Renaming, error::LoraError, layer::LoraLayer,
    traverse,
};

/// The part of a pipeline that a layer belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// The U-Net, or the transformer in its place.
    Denoiser,
    TextEncoder,
    TextEncoder2,
    TextEncoder3,
}

/// What names begin with in Python, and which part that is.
pub(super) const PARTS: [(&str, Part); 5] = [
    ("unet.", Part::Denoiser),
    ("transformer.", Part::Denoiser),
    ("text_encoder.", Part::TextEncoder),
    ("text_encoder_2.", Part::TextEncoder2),
    ("text_encoder_3.", Part::TextEncoder3),
];

/// What names begin with in files that have the names as they are: those of diffusers, and ComfyUI's.
const DOTTED: [(&str, Part); 6] =
    [PARTS[0], PARTS[1], PARTS[2], PARTS[3], PARTS[4], ("diffusion_model.", Part::Denoiser)];

/// What names begin with in files where each `.` is a `_`: those of kohya, and of OneTrainer and LyCORIS for
/// transformers.
const FLAT: [(&str, Part); 7] = [
    ("lora_unet_", Part::Denoiser),
    ("lora_transformer_", Part::Denoiser),
    ("lycoris_", Part::Denoiser),
    ("lora_te_", Part::TextEncoder),
    ("lora_te1_", Part::TextEncoder),
    ("lora_te2_", Part::TextEncoder2),
    ("lora_te3_", Part::TextEncoder3),
];

/// A name without what it begins with, and the part.
fn without<'n>(
    name: &'n str,
    beginnings: &[(&'static str, Part)],
) -> Option<(&'static str, Part, &'n str)> {
    beginnings.iter().find_map(|(begin, part)| Some((*begin, *part, name.strip_prefix(begin)?)))
}

/// What a name in Python begins with, its part, and the rest. Without a part it is of the U-Net.
pub(super) fn of_python(name: &str) -> (&'static str, Part, &str) {
    without(name, &PARTS).unwrap_or(("", Part::Denoiser, name))
}

/// The name of a layer in a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFile<'k> {
    /// What it begins with; empty if that is no part.
    pub begin: &'static str,
    part: Part,
    rest: &'k str,
    is_flat: bool,
}

impl<'k> InFile<'k> {
    pub fn new(name: &'k str) -> Self {
        let flat = without(name, &FLAT).filter(|(_, _, rest)| !rest.contains('.'));
        let is_flat = flat.is_some();
        let (begin, part, rest) =
            flat.or_else(|| without(name, &DOTTED)).unwrap_or(("", Part::Denoiser, name));
        Self { begin, part, rest, is_flat }
    }

    /// The names that the layer may have, the likeliest first. The older files of diffusers name the processor of an
    /// attention, and the projections of all attentions alike.
    fn spellings(&self) -> Vec<String> {
        if self.is_flat {
            return vec![self.rest.to_owned()];
        }
        let mut names = vec![self.rest.to_owned(), self.rest.replace(".processor.", ".")];
        if let Some(attention) = names[1].strip_suffix(".to_out") {
            let others = [format!("{attention}.to_out.0"), format!("{attention}.out_proj")];
            names.extend(others);
        } else if let Some((attention, it @ ("q" | "k" | "v"))) = names[1].rsplit_once(".to_") {
            names.push(format!("{attention}.{it}_proj"));
        }
        names
    }
}

/// A layer of the model.
pub(super) struct Layer {
    pub path: String,
    /// Its name in Python, without the part.
    pub name: String,
    part: Part,
    /// The shape of its weight as a matrix, `[d_input, d_output]`.
    pub shape: [usize; 2],
    pub layout: WeightLayout,
}

/// The layers of a model, by their names.
pub(super) struct Layers<'m> {
    layers: Vec<Layer>,
    dotted: BTreeMap<(Part, String), Vec<usize>>,
    flat: BTreeMap<(Part, String), Vec<usize>>,
    /// The names in Python of its stock modules. They are only found if the layers do not have a name.
    stock: LazyCell<Vec<String>, Box<dyn FnOnce() -> Vec<String> + 'm>>,
}

/// What a name in a file means.
pub(super) enum Meant<'l> {
    Layer(&'l Layer),
    /// Several layers have the name, in these paths.
    Several(Vec<String>),
    /// A layer in a part that the model does not have.
    OtherPart,
    Nothing,
}

impl<'m> Layers<'m> {
    /// The layers of the model, where `names` goes from the names in Python to its paths.
    pub fn of<B: Backend, M: Module<B>>(model: &'m M, names: &Renaming) -> Result<Self, LoraError> {
        let found = traverse::layers(model, |path, layer: &dyn LoraLayer<B>| {
            (path.to_owned(), layer.weight_shape(), layer.weight_layout())
        });
        let to_python = names.inverse();
        let paths: Vec<_> = found.iter().map(|(path, ..)| path.clone()).collect();
        to_python.require_matches(&paths, "the model")?;
        let layers = found.into_iter().map(|(path, shape, layout)| {
            let name = to_python.apply(&path);
            let (_, part, name) = of_python(&name);
            Layer { name: name.to_owned(), part, path, shape, layout }
        });
        let layers: Vec<_> = layers.collect();
        let (mut dotted, mut flat) = (BTreeMap::<_, Vec<_>>::new(), BTreeMap::<_, Vec<_>>::new());
        for (index, layer) in layers.iter().enumerate() {
            dotted.entry((layer.part, layer.name.clone())).or_default().push(index);
            flat.entry((layer.part, flattened(&layer.name))).or_default().push(index);
        }
        let stock = move || {
            let weights = traverse::stock_weights::<B, M>(model).into_iter();
            weights.map(|it| to_python.apply(&it.path)).collect()
        };
        Ok(Self { layers, dotted, flat, stock: LazyCell::new(Box::new(stock)) })
    }

    /// The names of the layers, as this one is spelled.
    fn alike(&self, name: &InFile) -> &BTreeMap<(Part, String), Vec<usize>> {
        if name.is_flat { &self.flat } else { &self.dotted }
    }

    /// The layer that the file means.
    pub fn find(&self, name: &InFile) -> Meant<'_> {
        let (known, spellings) = (self.alike(name), name.spellings());
        let mut found = spellings.into_iter().filter_map(|it| known.get(&(name.part, it)));
        match found.next().map(Vec::as_slice) {
            Some([index]) => Meant::Layer(&self.layers[*index]),
            Some(several) => {
                let paths = several.iter().map(|index| self.layers[*index].path.clone());
                Meant::Several(paths.collect())
            }
            None if name.begin.is_empty() || self.has(name.part) => Meant::Nothing,
            None => Meant::OtherPart,
        }
    }

    /// Whether the model has a layer in this part. One without any layers has stock modules in their place.
    fn has(&self, part: Part) -> bool {
        match self.layers.is_empty() {
            true => self.stock.iter().any(|name| of_python(name).1 == part),
            false => self.layers.iter().any(|it| it.part == part),
        }
    }

    /// Why no layer has these names in a file, for each of them.
    pub fn explain(&self, names: &[InFile]) -> Vec<String> {
        let is_stock = |name: &InFile| {
            self.stock.iter().any(|it| {
                let (_, part, it) = of_python(it);
                let it = if name.is_flat { flattened(it) } else { it.to_owned() };
                part == name.part && name.spellings().contains(&it)
            })
        };
        let reasons = names.iter().map(|name| {
            if is_stock(name) {
                return "a stock module: see `Lora::overlay`".to_owned();
            }
            let others = self.alike(name).keys().filter(|(part, _)| *part == name.part);
            let likeness = |it: &str| strsim::normalized_levenshtein(it, name.rest);
            let alike = others.map(|(_, it)| (likeness(it), it));
            match alike.max_by(|(one, _), (other, _)| one.total_cmp(other)) {
                Some((_, it)) => {
                    format!("no layer has this name; the closest is {}{it}", name.begin)
                }
                None => "no layer has this name".to_owned(),
            }
        });
        reasons.collect()
    }
}

/// The name as kohya's files have it.
pub(super) fn flattened(name: &str) -> String {
    name.replace('.', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_begin_with_their_part() {
        for (name, begin, part, rest, is_flat) in [
            ("lora_unet_a_b", "lora_unet_", Part::Denoiser, "a_b", true),
            ("lora_transformer_a", "lora_transformer_", Part::Denoiser, "a", true),
            ("lycoris_a", "lycoris_", Part::Denoiser, "a", true),
            ("lora_te_a", "lora_te_", Part::TextEncoder, "a", true),
            ("lora_te1_a", "lora_te1_", Part::TextEncoder, "a", true),
            ("lora_te2_a", "lora_te2_", Part::TextEncoder2, "a", true),
            ("lora_te3_a", "lora_te3_", Part::TextEncoder3, "a", true),
            ("text_encoder.a", "text_encoder.", Part::TextEncoder, "a", false),
            ("text_encoder_3.a", "text_encoder_3.", Part::TextEncoder3, "a", false),
            ("text_encoder_2.a", "text_encoder_2.", Part::TextEncoder2, "a", false),
            ("transformer.a", "transformer.", Part::Denoiser, "a", false),
            ("diffusion_model.a.b", "diffusion_model.", Part::Denoiser, "a.b", false),
            ("unet.lora_unet_a", "unet.", Part::Denoiser, "lora_unet_a", false),
            // Of a model alone; one of its modules is called like a part of kohya's.
            ("a.b", "", Part::Denoiser, "a.b", false),
            ("lora_unet_a.b", "", Part::Denoiser, "lora_unet_a.b", false),
        ] {
            let found = InFile::new(name);
            assert_eq!((found.begin, found.part, found.rest), (begin, part, rest));
            assert_eq!(found.is_flat, is_flat, "{name}");
        }
        assert_eq!(of_python("unet.a"), ("unet.", Part::Denoiser, "a"));
        assert_eq!(of_python("diffusion_model.a"), ("", Part::Denoiser, "diffusion_model.a"));
    }

    #[test]
    fn older_spellings_mean_the_projections() {
        let spellings = |name: &str| InFile::new(name).spellings();
        let attention = "unet.mid.attn1.processor";
        assert!(spellings(&format!("{attention}.to_q")).contains(&"mid.attn1.to_q".to_owned()));
        assert!(
            spellings(&format!("{attention}.to_out")).contains(&"mid.attn1.to_out.0".to_owned())
        );
        let text = spellings("text_encoder.layers.0.self_attn.to_v");
        assert!(text.contains(&"layers.0.self_attn.v_proj".to_owned()), "{text:?}");
        let text = spellings("text_encoder.layers.0.self_attn.to_out");
        assert!(text.contains(&"layers.0.self_attn.out_proj".to_owned()), "{text:?}");
        assert_eq!(spellings("lora_unet_processor_to_q"), ["processor_to_q"]);
    }
}
