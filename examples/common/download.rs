//! Downloads files, and checks them before they are used.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    time::Duration,
};

use sha2::{Digest, Sha256};

use super::{Context, Result, live::during};

/// Downloads the file at `url`. Fails unless it has this size and SHA-256.
pub fn fetch(url: &str, size: u64, sha256: &str, timeout: Duration) -> Result<Vec<u8>> {
    let config = ureq::Agent::config_builder()
        .timeout_connect(Some(Duration::from_secs(5)))
        .timeout_global(Some(timeout))
        .build();
    let bytes = during(&format!("downloading {url}"), || {
        let mut body = config.new_agent().get(url).call()?.into_body();
        body.with_config().limit(size + 1).read_to_vec()
    });
    let bytes = bytes.context(url)?;
    if bytes.len() as u64 != size || hex(&Sha256::digest(&bytes)) != sha256 {
        return Err(format!("{url}: not the expected file"));
    }
    Ok(bytes)
}

/// Writes a file so that it exists as a whole or not at all. Creates its directory if it is missing.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let dir = path.parent().expect("the path has a directory");
    fs::create_dir_all(dir)?;
    let unfinished = path.with_extension(format!("{}.part", std::process::id()));
    let mut file = File::create(&unfinished)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(unfinished, path)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
