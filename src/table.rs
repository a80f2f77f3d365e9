//! Text tables.

/// The rows under their headers. The first column is aligned left, the others right.
pub fn table(headers: &[&str], rows: &[impl AsRef<[String]>]) -> String {
    let headers: Vec<_> = headers.iter().map(|&header| header.to_owned()).collect();
    let lines = || std::iter::once(&headers[..]).chain(rows.iter().map(AsRef::as_ref));
    let width = |column: usize| lines().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..headers.len()).map(width).collect();
    let rule = "-".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1));
    let line = |row: &[String]| {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        cells.collect::<Vec<_>>().join("  ")
    };
    let mut lines = lines().map(line);
    let head = lines.next().expect("there are headers");
    let body = lines.map(|line| format!("\n{line}")).collect::<String>();
    format!("{head}\n{rule}{body}")
}

/// The number with commas between groups of three digits.
pub fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let groups = digits.as_bytes().rchunks(3).rev();
    let groups = groups.map(|group| String::from_utf8_lossy(group).into_owned());
    groups.collect::<Vec<_>>().join(",")
}
