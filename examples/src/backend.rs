//! The backend that the cargo features choose.

burn_lora_llm::choose_backend!();
