//! Finds pretrained models, or downloads them.

use std::{path::PathBuf, time::Duration};

use hf_hub::{Cache, Repo, api::sync::ApiBuilder};

use super::{Context, Result};

/// A model on huggingface.co.
pub struct Model {
    /// Owner and name, with a slash between them.
    pub name: &'static str,
    /// The files that are needed.
    pub files: &'static [&'static str],
}

impl Model {
    /// The directory of the model in the Hugging Face cache, after a download if needed.
    ///
    /// # Errors
    ///
    /// If the model is neither there nor can be downloaded. The error says how to get it.
    pub fn find(&self) -> Result<PathBuf> {
        let Self { name, files } = self;
        let cache = Cache::from_env().repo(Repo::model((*name).to_owned()));
        let cached: Option<Vec<PathBuf>> = files.iter().map(|file| cache.get(file)).collect();
        let found = match cached {
            Some(found) => found,
            None => self.download().map_err(|reason| {
                format!(
                    "{name} is not available ({reason}). Get it with `pip install huggingface_hub` and \
                     `hf download {name} {} --local-dir model`, and give `--model model`; or try the \
                     example without it, with `--generated`",
                    files.join(" "),
                )
            })?,
        };
        Ok(found[0].parent().expect("it is a file").to_owned())
    }

    fn download(&self) -> Result<Vec<PathBuf>> {
        // Without a network, hf-hub waits for a long time.
        reachable()?;
        println!("Downloading {}", self.name);
        let api = ApiBuilder::from_env().with_progress(true).build().context("huggingface.co")?;
        let repo = api.model(self.name.to_owned());
        self.files.iter().map(|file| repo.get(file).context(file)).collect()
    }
}

/// Checks that the hub answers within seconds.
fn reachable() -> Result<()> {
    let endpoint =
        std::env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".to_owned());
    let agent = ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_secs(10)))
        .http_status_as_error(false)
        .build()
        .new_agent();
    agent.head(&endpoint).call().map(drop).context(endpoint)
}
