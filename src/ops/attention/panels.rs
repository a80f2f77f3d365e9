//! The products of attention, of rows of keys and values with panels.
//!
//! A panel is a matrix whose columns are 32 queries, stored row by row. So each row fills a few vectors, and what
//! is computed for one query (a maximum, a sum, an exponential) is computed for 32 at once. Panels come out of one
//! product as the next one reads them, and keys and values are read where they lie: nothing has to be packed.
//!
//! All products of this module's parent are made here.
//!
//! The loops go by index, because closures in them would not be compiled for the wider vectors.

use pulp::Simd;

/// The columns of a panel.
pub(super) const WIDTH: usize = 32;

/// A row of a panel.
pub(super) type Line = [f32; WIDTH];

/// Sums of a tile: two vectors for each of its rows.
type Sums<S, const M: usize> = [[<S as Simd>::f32s; 2]; M];

/// Calls a function for the tiles of so many rows, which have 8, 4 or 1 of them. The sums of larger ones would not
/// fit the registers.
macro_rules! for_tiles {
    ($count:expr, $start:ident, $rows:ident, $simd:ident => $work:block) => {
        let mut $start = 0;
        while $simd::REGISTER_COUNT >= 32 && $start + 8 <= $count {
            const $rows: usize = 8;
            $work
            $start += 8;
        }
        while $start + 4 <= $count {
            const $rows: usize = 4;
            $work
            $start += 4;
        }
        while $start < $count {
            const $rows: usize = 1;
            $work
            $start += 1;
        }
    };
}
/// Rows that lie at equal distances.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    /// From the beginning of the first row on.
    pub values: &'a [f32],
    /// From one row to the next.
    pub stride: usize,
    pub count: usize,
    /// The numbers of a row.
    pub width: usize,
}

impl<'a> Rows<'a> {
    #[inline(always)]
    pub fn row(&self, index: usize) -> &'a [f32] {
        &self.values[index * self.stride..][..self.width]
    }

    /// The first rows.
    pub fn first(self, count: usize) -> Self {
        Self { count, ..self }
    }
}

/// `out = rows·panel`: `[count, width]` times `[width, 32]`.
#[inline(always)]
pub(super) fn rows_by_panel<S: Simd>(simd: S, rows: Rows, panel: &[Line], out: &mut [Line]) {
    assert!(panel.len() == rows.width && out.len() == rows.count, "the shapes fit");
    for pair in 0..pairs::<S>() {
        for_tiles!(rows.count, start, M, S => {
            let sums = along_rows::<S, M>(simd, rows, start, panel, pair, zeros(simd));
            store_lines::<S, M>(&mut out[start..start + M], pair, sums);
        });
    }
}

/// `out += rowsᵀ·panel`: `[width, count]` times `[count, 32]`.
#[inline(always)]
pub(super) fn columns_by_panel<S: Simd>(simd: S, rows: Rows, panel: &[Line], out: &mut [Line]) {
    assert!(panel.len() == rows.count && out.len() == rows.width, "the shapes fit");
    for pair in 0..pairs::<S>() {
        for_tiles!(rows.width, start, M, S => {
            let out = &mut out[start..start + M];
            let sums = along_columns(simd, rows, start, panel, pair, load_lines::<S, M>(out, pair));
            store_lines::<S, M>(out, pair, sums);
        });
    }
}

/// `out += panels·rows`: several panels of `lines` rows each, next to each other, `[lines, 32 · panels]`, times
/// `[32 · panels, width]`. The width is a multiple of 32; its columns are lines, one after the other.
#[inline(always)]
pub(super) fn panels_by_rows<S: Simd>(
    simd: S,
    panels: &[Line],
    lines: usize,
    rows: &[Line],
    out: &mut [Line],
) {
    let width = out.len() / lines;
    let fits = panels.len().is_multiple_of(lines) && out.len() == lines * width;
    assert!(fits && rows.len() == panels.len() / lines * WIDTH * width, "the shapes fit");
    for column in 0..width {
        for pair in 0..pairs::<S>() {
            for_tiles!(lines, start, M, S => {
                let mut sums: Sums<S, M> = zeros(simd);
                for m in 0..M {
                    sums[m] = load::<S>(&out[(start + m) * width + column], pair);
                }
                let parts = panels.chunks_exact(lines).zip(rows.chunks_exact(WIDTH * width));
                for (panel, rows) in parts {
                    let panel: &[Line; M] =
                        panel[start..start + M].try_into().expect("so many lines");
                    for (query, row) in rows.chunks_exact(width).enumerate().take(WIDTH) {
                        let mut numbers = [0.0; M];
                        for m in 0..M {
                            numbers[m] = panel[m][query];
                        }
                        multiply(simd, &mut sums, numbers, load::<S>(&row[column], pair));
                    }
                }
                for m in 0..M {
                    store::<S>(&mut out[(start + m) * width + column], pair, sums[m]);
                }
            });
        }
    }
}

/// Adds the products of rows, from one on, with a panel of as many lines as they have numbers.
#[inline(always)]
fn along_rows<S: Simd, const M: usize>(
    simd: S,
    rows: Rows,
    start: usize,
    panel: &[Line],
    pair: usize,
    mut sums: Sums<S, M>,
) -> Sums<S, M> {
    let mut parts: [&[f32]; M] = [&[]; M];
    for (m, part) in parts.iter_mut().enumerate() {
        *part = &rows.row(start + m)[..panel.len()];
    }
    for (k, line) in panel.iter().enumerate() {
        let mut numbers = [0.0; M];
        for m in 0..M {
            numbers[m] = parts[m][k];
        }
        multiply(simd, &mut sums, numbers, load::<S>(line, pair));
    }
    sums
}

/// Adds the products of columns, from one on, with a panel of as many lines as there are rows.
#[inline(always)]
fn along_columns<S: Simd, const M: usize>(
    simd: S,
    rows: Rows,
    start: usize,
    panel: &[Line],
    pair: usize,
    mut sums: Sums<S, M>,
) -> Sums<S, M> {
    for (row, line) in rows.values.chunks(rows.stride).zip(panel) {
        let column: [f32; M] = row[start..start + M].try_into().expect("so many numbers");
        multiply(simd, &mut sums, column, load::<S>(line, pair));
    }
    sums
}

/// The pairs of vectors in a line.
#[inline(always)]
const fn pairs<S: Simd>() -> usize {
    WIDTH / S::F32_LANES / 2
}

#[inline(always)]
fn zeros<S: Simd, const M: usize>(simd: S) -> Sums<S, M> {
    [[simd.splat_f32s(0.0); 2]; M]
}

#[inline(always)]
fn load_lines<S: Simd, const M: usize>(lines: &[Line], pair: usize) -> Sums<S, M> {
    let lines: &[Line; M] = lines.try_into().expect("so many lines");
    let mut sums = [load::<S>(&lines[0], pair); M];
    for m in 1..M {
        sums[m] = load::<S>(&lines[m], pair);
    }
    sums
}

#[inline(always)]
fn store_lines<S: Simd, const M: usize>(lines: &mut [Line], pair: usize, sums: Sums<S, M>) {
    let lines: &mut [Line; M] = lines.try_into().expect("so many lines");
    for m in 0..M {
        store::<S>(&mut lines[m], pair, sums[m]);
    }
}

/// A pair of vectors of a line.
#[inline(always)]
fn load<S: Simd>(line: &[f32], pair: usize) -> [S::f32s; 2] {
    let (vectors, _) = S::as_simd_f32s(line);
    [vectors[2 * pair], vectors[2 * pair + 1]]
}

#[inline(always)]
fn store<S: Simd>(line: &mut [f32], pair: usize, values: [S::f32s; 2]) {
    let (vectors, _) = S::as_mut_simd_f32s(line);
    [vectors[2 * pair], vectors[2 * pair + 1]] = values;
}

/// Adds the product of each number with both vectors to its sums.
#[inline(always)]
fn multiply<S: Simd, const M: usize>(
    simd: S,
    sums: &mut Sums<S, M>,
    numbers: [f32; M],
    vectors: [S::f32s; 2],
) {
    for m in 0..M {
        let number = simd.splat_f32s(numbers[m]);
        sums[m] = [
            simd.mul_add_e_f32s(number, vectors[0], sums[m][0]),
            simd.mul_add_e_f32s(number, vectors[1], sums[m][1]),
        ];
    }
}
