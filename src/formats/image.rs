//! Files of adapters of image models: those of kohya's sd-scripts, of diffusers, and of ComfyUI.
//!
//! Each is one file of safetensors. A layer has the factors A, `[rank, d_input]`, and B, `[d_output, rank]`, which are
//! kernels for convolutions, as in PEFT's files. The formats differ in the names, and in where they keep alpha.

mod keys;
mod metadata;
mod names;
mod parts;
mod read;
mod write;

use std::path::Path;

use burn::{module::Module, tensor::backend::Backend};

use super::find;
use crate::{
    adapters::{LoraAdapters, renaming::Renaming},
    error::LoraError,
    files,
};
use names::Layers;

/// How [`LoraAdapters::save_image`] spells the names in a file. [`LoraAdapters::load_image`] reads both spellings, and
/// others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// That of kohya's [sd-scripts](https://github.com/kohya-ss/sd-scripts) (`networks/lora.py`), which ComfyUI,
    /// AUTOMATIC1111's web UI and most others read: `lora_unet_mid_block_proj_in.lora_down.weight`,
    /// `.lora_up.weight` and `.alpha`. Each `.` in the name of a layer is a `_`. Text encoders begin with `lora_te`, or
    /// with `lora_te1` and `lora_te2` if both have adapters.
    ///
    /// Magnitudes are `.dora_scale`, `[d_output, 1]` or `[d_output, 1, 1, 1]`, as LyCORIS writes them with
    /// `wd_on_output`. ComfyUI 0.3.77 divides by the norms of the base, and not of its sum with the update, and so
    /// computes something else. diffusers 0.42 leaves magnitudes in this format out, and gives all attention layers the
    /// alpha that is most frequent in the file: write its own format for it.
    Kohya,
    /// That of [diffusers](https://github.com/huggingface/diffusers) (`save_lora_weights`):
    /// `unet.mid_block.proj_in.lora_A.weight`, `.lora_B.weight` and `.lora_magnitude_vector`. Names without a part begin
    /// with `unet.`. The ranks and alphas are in the header, as `lora_adapter_metadata`. Older versions of diffusers take
    /// the rank for alpha, and so does ComfyUI, which reads only a part of these names: write kohya's format for it.
    Diffusers,
}

impl<B: Backend> LoraAdapters<B> {
    /// Reads a file of adapters of an image model, for this model:
    ///
    /// | program | names of layers | tensors |
    /// |---|---|---|
    /// | kohya's sd-scripts, LyCORIS (LoCon) | `lora_unet_`, `lora_te_`, `lora_te1_`, `lora_te2_`, `lora_te3_` (T5), with `_` for each `.` | `.lora_down.weight`, `.lora_up.weight`, `.lora_mid.weight`, `.alpha`, `.dora_scale` |
    /// | diffusers | `unet.`, `transformer.`, `text_encoder.`, `text_encoder_2.`, `text_encoder_3.`, or none of them | `.lora_A.weight`, `.lora_B.weight`, `.lora_magnitude_vector` |
    /// | older versions of diffusers | the same, with `.processor` in attentions | `_lora.down.weight`, `.lora.down.weight`, `.lora_linear_layer.down.weight`, and `up` |
    /// | ComfyUI | `diffusion_model.` | all of these |
    /// | OneTrainer, LyCORIS for transformers | `lora_transformer_`, `lycoris_` | as kohya's |
    ///
    /// `names` goes from the names that layers have in these files, with their dots, to the paths of the model. If both
    /// are the same, it is `Renaming::default()`. Since kohya's names cannot be split again, the names of all layers
    /// are compared with them. A model of several parts has names in Python that begin with `unet.`, `transformer.`,
    /// `text_encoder.`, `text_encoder_2.` or `text_encoder_3.`. kohya calls the T5 of Flux `lora_te3_`, and diffusers
    /// `text_encoder_2.`: for files of the one, `names` goes from `text_encoder_3`. One whose names begin with none of them is the U-Net alone, or the
    /// transformer in its place. For a text encoder alone, `names` has the pair `("text_encoder", "")`. kohya's files
    /// for SDXL have the names of its first code, such as `input_blocks.4.1`.
    ///
    /// A file often holds adapters of several parts. Those of parts that the model does not have are left out, and
    /// are listed in [`unused`](Self::unused): load them for the other models.
    ///
    /// The scale is `alpha/rank`. Alpha is in the tensors or in the header (`lora_adapter_metadata` of diffusers), and
    /// otherwise it is the rank. A kernel between the factors (`lora_mid`, Tucker) becomes a part of A, which is the same
    /// update. Tensors are in `f64`, `f32`, `f16` or `bf16`, and are converted to the backend's default type.
    ///
    /// ```no_run
    /// use burn::{module::Module, tensor::backend::Backend};
    /// use burn_lora::{Lora, LoraAdapters, LoraError, LoraModule, image::ImageFormat, peft::Renaming};
    ///
    /// fn styled<B: Backend, M: Module<B>>(unet: &M, device: &B::Device) -> Result<Lora<B, M>, LoraError> {
    ///     let names = Renaming::new([("mid_block.attentions.*", "middle.attention.*")]);
    ///     let style = LoraAdapters::load_image("style.safetensors", unet, &names, device)?;
    ///     style.save_image("again.safetensors", ImageFormat::Diffusers, &names.clone().partial())?;
    ///     unet.switch(&style)
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// [`LoraError::Mismatch`], listing all names that no layer of the model has, with the name that is most like each,
    /// and all tensors that are missing or that do not fit their layer. [`LoraError::Unsupported`], naming the key, if
    /// two layers of the model have the same name in the file; if an adapter is of another method than LoRA: LoHa, LoKr,
    /// OFT, BOFT, IA3, GLoRA, or whole weights; if its magnitudes are those of a layer's inputs; or if its
    /// layer is an embedding, a transposed convolution or one with groups. [`LoraError::InvalidArgument`] if a template of
    /// `names` matches no layer of the model. If the file is missing, is malformed, or holds NaN or infinite values.
    pub fn load_image<M: Module<B>>(
        path: impl AsRef<Path>,
        model: &M,
        names: &Renaming,
        device: &B::Device,
    ) -> Result<Self, LoraError> {
        let path = path.as_ref();
        let layers = Layers::of(model, names)?;
        let (source, length) = find::open(path)?;
        read::read(source, length, &path.display().to_string(), &layers, device)
    }

    /// Writes the adapters as a file for programs for image models, which [`load_image`](Self::load_image) reads again,
    /// to the bit. `names` is the same as there.
    ///
    /// An existing file is replaced in one step: if the process is killed, or saving fails, it stays as it was. A
    /// process that is killed may leave a hidden directory `.unfinished-*` next to it. Adapters that started as a part
    /// of the weight ([`Init::Pissa`](crate::Init::Pissa)) are written with twice their rank, so that they fit
    /// the original base. Dropout is not written in kohya's format.
    ///
    /// # Errors
    ///
    /// [`LoraError::Unsupported`], naming the layer or the parameter and what to do, if the file cannot hold it: modules
    /// that were trained in full, biases, embeddings, transposed convolutions and those with groups; a layer whose
    /// name is that of another in kohya's format; in the format of diffusers, a part of which some adapters have
    /// magnitudes, and others do not. [`LoraError::InvalidArgument`] if a template of `names` matches none of the set's
    /// layers, or, if they are [partial](Renaming::partial), none does. If the adapters hold NaN or infinite values, or the file
    /// cannot be written.
    pub fn save_image(
        &self,
        path: impl AsRef<Path>,
        format: ImageFormat,
        names: &Renaming,
    ) -> Result<(), LoraError> {
        let (path, set) = (path.as_ref(), self.standalone());
        let (tensors, header) = write::contents(&set, format, names, &path.display().to_string())?;
        files::replace(path, |unfinished| tensors.write(header, unfinished, path))
    }
}
