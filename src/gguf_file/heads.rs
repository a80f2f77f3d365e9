//! The order of the rows of queries and keys.

/// The rows of queries or keys of so many heads, from the order of some families' files to Hugging Face's: the two rows
/// that RoPE turns together are next to each other there, and half a head apart here. `values` are whole rows.
///
/// # Panics
///
/// If the rows cannot be divided into pairs of so many heads.
pub fn pairs_to_halves<T: Copy>(values: &[T], heads: usize, rows: usize) -> Vec<T> {
    let half = half(values.len(), heads, rows);
    moved(values, rows, |row| {
        let (head, at) = (row / (2 * half), row % (2 * half));
        2 * half * head + 2 * (at % half) + at / half
    })
}

/// The opposite of [`pairs_to_halves`], with the same panics.
pub fn halves_to_pairs<T: Copy>(values: &[T], heads: usize, rows: usize) -> Vec<T> {
    let half = half(values.len(), heads, rows);
    moved(values, rows, |row| {
        let (head, at) = (row / (2 * half), row % (2 * half));
        2 * half * head + half * (at % 2) + at / 2
    })
}

/// The number of pairs of a head.
fn half(values: usize, heads: usize, rows: usize) -> usize {
    assert!(
        rows > 0 && heads > 0 && values.is_multiple_of(rows) && rows.is_multiple_of(2 * heads),
        "{values} values in {rows} rows cannot be divided into pairs of rows of {heads} heads"
    );
    rows / (2 * heads)
}

/// The rows, each taken from where `from` says.
fn moved<T: Copy>(values: &[T], rows: usize, from: impl Fn(usize) -> usize) -> Vec<T> {
    let width = values.len() / rows;
    (0..rows).flat_map(|row| values[from(row) * width..][..width].iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_to_where_hugging_face_has_them_and_back() {
        // Two heads of six rows, of two values each.
        let pairs: Vec<_> = (0..24).collect();
        let halves = pairs_to_halves(&pairs, 2, 12);
        let rows: Vec<_> = halves.iter().step_by(2).map(|it| it / 2).collect();
        assert_eq!(rows, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
        assert_eq!(halves_to_pairs(&halves, 2, 12), pairs);
    }

    #[test]
    #[should_panic = "12 values in 6 rows cannot be divided into pairs of rows of 2 heads"]
    fn heads_have_an_even_number_of_rows() {
        pairs_to_halves(&[0; 12], 2, 6);
    }
}
