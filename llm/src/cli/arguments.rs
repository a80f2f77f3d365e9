//! The arguments of a run, which is resumed only with the same.

use std::{fs, path::Path};

use serde_json::Value;

use crate::{Context, Result, files::write_atomically};

/// The file in the directory of a run.
const ARGUMENTS: &str = "arguments.json";

/// Arguments that had another name in runs of the first version, and that name.
const RENAMED: [(&str, &str); 1] = [("quantize", "quantise")];

/// Writes the arguments of a new run with the directory `out`. Removes `checkpoints`, a directory of
/// earlier runs there, which must not be taken for those of this run.
pub fn begin(out: &Path, checkpoints: &str, arguments: &Value) -> Result<()> {
    forget(out, checkpoints)?;
    write(out, arguments)
}

/// Writes the arguments of the run with the directory `out`.
pub fn write(out: &Path, arguments: &Value) -> Result<()> {
    let path = out.join(ARGUMENTS);
    let text = serde_json::to_vec_pretty(arguments).context(path.display())?;
    write_atomically(&path, &text).context(path.display())
}

/// The arguments of the run with the directory `out`.
pub fn read(out: &Path) -> Result<Value> {
    let path = out.join(ARGUMENTS);
    let text =
        fs::read(&path).context(format!("there is nothing to resume: {}", path.display()))?;
    serde_json::from_slice(&text).context(path.display())
}

/// Removes `checkpoints`, a directory in `out`, if there is one.
pub fn forget(out: &Path, checkpoints: &str) -> Result<()> {
    let old = out.join(checkpoints);
    if old.exists() {
        fs::remove_dir_all(&old).context(old.display())?;
    }
    Ok(())
}

/// What runs did before they wrote it down.
const ADDED: [(&str, &str); 1] = [("dtype", "f32")];

/// Fails unless the run with the directory `out` had the same arguments. Those in `growing` are numbers that may be
/// greater now.
pub fn resume(out: &Path, arguments: &Value, growing: &[&str]) -> Result<()> {
    let (before, path) = (read(out)?, out.join(ARGUMENTS));
    let fields = arguments.as_object().into_iter().flatten();
    for (field, now) in fields {
        let old_name = RENAMED.iter().find(|(name, _)| name == field).map(|(_, old)| *old);
        let unsaid = ADDED.iter().find(|(name, _)| name == field).map(|&(_, value)| value.into());
        let unsaid: Value = unsaid.unwrap_or_default();
        let then = before.get(field).or_else(|| before.get(old_name?)).unwrap_or(&unsaid);
        let grows = growing.contains(&field.as_str());
        let has_grown = grows && then.as_f64().zip(now.as_f64()).is_some_and(|(a, b)| a < b);
        if then != now && !has_grown {
            let most = if grows { ", and may only grow" } else { "" };
            return Err(format!(
                "{}: `{field}` was {then}, and is {now} now{most}",
                path.display()
            ));
        }
    }
    Ok(())
}
