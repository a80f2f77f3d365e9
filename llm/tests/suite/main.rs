//! The models compute what Hugging Face's `transformers` does, and exchange adapters with PEFT. Python wrote the
//! models and the reference outputs.

mod backend {
    burn_lora_llm::choose_backend!();
}
mod bert;
mod decoder;
mod files;
mod host;
mod llamacpp;
mod oracle;
