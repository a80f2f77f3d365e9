use burn_lora_kernels::{Stripes, Vector8};

/// Rows that layers are applied to: `[rows, width]`.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    width: usize,
    numbers: Vec<f32>,
    few: usize,
    /// The few rows in 8 bits, if they are wanted.
    rounded: Vec<Vector8>,
    /// The others.
    many: Stripes,
    rounds: bool,
}

impl Inputs {
    /// So many rows of zeros.
    ///
    /// # Panics
    ///
    /// If rows have no numbers.
    pub fn new(rows: usize, width: usize) -> Self {
        let mut inputs = Self::default();
        inputs.resize(rows, width);
        inputs
    }

    /// Changes the numbers of rows and of columns. What numbers there are then is not said, and no row is few until
    /// [`prepare`](Self::prepare) is called.
    ///
    /// # Panics
    ///
    /// If rows have no numbers.
    pub fn resize(&mut self, rows: usize, width: usize) {
        assert!(width > 0, "rows must have numbers, got a width of 0");
        self.width = width;
        self.numbers.resize(rows * width, 0.0);
        (self.few, self.rounds) = (0, false);
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.numbers.len() / self.width.max(1)
    }

    /// The numbers of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// All numbers, row by row: `[rows, width]`.
    pub fn numbers(&self) -> &[f32] {
        &self.numbers
    }

    /// The same, to be changed. [`prepare`](Self::prepare) is to be called afterwards.
    pub fn numbers_mut(&mut self) -> &mut [f32] {
        &mut self.numbers
    }

    /// Prepares the rows for products. The first `few` are multiplied as rows of answers are, and the others as those of
    /// prompts are.
    ///
    /// With `rounds`, few rows are rounded to 8 bits where the weight has at most 8 bits, which is several times as fast: each
    /// 32 numbers share a scale, and are off by at most 1/254 of the largest of them.
    ///
    /// # Panics
    ///
    /// If there are fewer rows.
    pub fn prepare(&mut self, few: usize, rounds: bool) {
        let rows = self.rows();
        assert!(few <= rows, "{few} of {rows} rows");
        (self.few, self.rounds) = (few, rounds);
        self.many.fill(&self.numbers[few * self.width..], self.width);
        if !rounds {
            return;
        }
        self.rounded.resize_with(self.rounded.len().max(few), Vector8::default);
        let numbers = self.numbers.chunks_exact(self.width).take(few);
        self.rounded.iter_mut().zip(numbers).for_each(|(rounded, row)| rounded.set(row));
    }

    /// The number of rows that are few.
    pub(super) fn few(&self) -> usize {
        self.few
    }

    /// Those in 8 bits.
    pub(super) fn rounded(&self) -> Option<&[Vector8]> {
        self.rounds.then(|| &self.rounded[..self.few])
    }

    /// The rows that are many.
    pub(super) fn many(&self) -> &Stripes {
        &self.many
    }

    pub(super) fn row(&self, row: usize) -> &[f32] {
        &self.numbers[row * self.width..][..self.width]
    }
}
