//! Downloads files, and checks them before they are used.

use std::time::Duration;

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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
