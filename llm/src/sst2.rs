//! The Stanford Sentiment Treebank with two classes: phrases and sentences of film reviews.

use std::path::Path;

use super::{Result, files::read_text};

/// The texts of a file and their classes, 1 if the text is positive. The file starts with the line
/// `sentence`, tab, `label`. Lines of a text, a tab and 0 or 1 follow.
///
/// # Errors
///
/// If the file cannot be read, or has no texts, or other lines. The error names the line.
pub fn read(path: &Path) -> Result<Vec<(String, u8)>> {
    let content = read_text(path)?;
    let mut lines = content.lines().enumerate();
    if lines.next().is_none_or(|(_, header)| header != "sentence\tlabel") {
        return Err(format!(
            "{}: it must begin with a line of `sentence`, a tab and `label`. GLUE's test.tsv has no labels: \
             its dev.tsv serves to test, and a part of train.tsv to watch",
            path.display(),
        ));
    }
    let lines = lines.filter(|(_, line)| !line.is_empty());
    let samples = lines.map(|(index, line)| match line.rsplit_once('\t') {
        Some((text, "0")) => Ok((text.to_owned(), 0)),
        Some((text, "1")) => Ok((text.to_owned(), 1)),
        _ => {
            let line = index + 1;
            Err(format!("{}:{line}: a text, a tab and 0 or 1 expected", path.display()))
        }
    });
    let samples = samples.collect::<Result<Vec<_>>>()?;
    match samples.is_empty() {
        true => Err(format!("{}: there are no texts in it", path.display())),
        false => Ok(samples),
    }
}
