//! What a training leaves beside its adapters, for those who use them: PEFT's own file has no fields for it.

use std::{fs, io::ErrorKind, path::Path};

use burn_lora_llm::{Context, Result, chat::Chat, files::write_atomically};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::hex;

/// The file in a directory of adapters. PEFT does not look at it.
const FILE: &str = "burn_lora.json";

/// How adapters were trained.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Remembered {
    /// What distinguishes the weights of the base from those of others.
    pub base: Option<String>,
    /// What distinguishes the chat template from others; `None` without one.
    pub template: Option<String>,
    /// Whether only the answers were learned.
    pub mask_prompt: bool,
    /// Longer texts were cut off.
    pub max_length: usize,
}

impl Remembered {
    /// What is remembered of the adapters in `dir`, if they are those of this program.
    ///
    /// # Errors
    ///
    /// If the file is there and cannot be read.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        // Files for llama.cpp have nothing beside them.
        if dir.is_file() {
            return Ok(None);
        }
        let path = dir.join(FILE);
        match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            text => {
                let text = text.context(path.display())?;
                serde_json::from_slice(&text).map(Some).context(path.display())
            }
        }
    }

    /// Writes it beside the adapters in `dir`, unless it is there.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        if Self::read(dir).is_ok_and(|there| there.as_ref() == Some(self)) {
            return Ok(());
        }
        let path = dir.join(FILE);
        let text = serde_json::to_vec_pretty(self).context(path.display())?;
        write_atomically(&path, &text).context(path.display())
    }

    /// Removes it from beside the adapters in `dir`, if it is there.
    ///
    /// # Errors
    ///
    /// If it cannot be removed.
    pub fn remove(dir: &Path) -> Result<()> {
        let path = dir.join(FILE);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            done => done.context(path.display()),
        }
    }

    /// What to tell if the model writes conversations in another way than the one that was trained.
    pub fn other_template(&self, dir: &Path, chat: &Chat) -> Option<String> {
        (self.template != template(chat)).then(|| {
            format!(
                "{}: the adapters were trained with another chat template than the model's",
                dir.display()
            )
        })
    }
}

/// What distinguishes the chat template from others.
pub fn template(chat: &Chat) -> Option<String> {
    chat.template().map(|source| hex(&Sha256::digest(source)))
}
