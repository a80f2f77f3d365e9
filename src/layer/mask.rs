use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use burn::tensor::{Bool, Tensor, TensorData, backend::Backend};

/// Which keys each query of [`attention`](super::attention) sees: those from a first one to a last one, which covers
/// texts of several lengths, the future, several texts in one row, and windows. What no query sees costs no time on
/// the CPU backends.
///
/// ```
/// use burn::backend::Flex;
/// use burn_lora::nn::AttentionMask;
///
/// // A text of 4 tokens, in which each sees itself and those before it, but at most 2.
/// let mask = AttentionMask::<Flex>::causal(4).window(2);
/// assert_eq!([mask.keys(0, 0), mask.keys(0, 3)], [0..1, 2..4]);
/// // Texts of 3 and 1 tokens in one row.
/// let mask = AttentionMask::<Flex>::packed(&[vec![3, 1]]);
/// assert_eq!([mask.keys(0, 2), mask.keys(0, 3)], [0..3, 3..4]);
/// ```
#[derive(Clone, Debug)]
pub struct AttentionMask<B: Backend> {
    /// `[texts, length]`
    ranges: Arc<[[u32; 2]]>,
    length: usize,
    total: usize,
    /// The same for backends that need a tensor: what is not seen, `[texts, length, total]`.
    hidden: Arc<OnceLock<Tensor<B, 3, Bool>>>,
}

impl<B: Backend> AttentionMask<B> {
    /// The keys `seen(text, query)` of `total`, for each query of each text. If all texts of a batch are alike, a
    /// single one is enough.
    ///
    /// # Panics
    ///
    /// If a query sees a key that is not there.
    pub fn new(
        texts: usize,
        length: usize,
        total: usize,
        seen: impl Fn(usize, usize) -> Range<usize>,
    ) -> Self {
        let mut ranges = Vec::with_capacity(texts * length);
        for text in 0..texts {
            for query in 0..length {
                let Range { start, end } = seen(text, query);
                assert!(end <= total, "keys below {total} expected, got {start}..{end}");
                ranges.push([start, end].map(|it| it as u32));
            }
        }
        Self { ranges: ranges.into(), length, total, hidden: Arc::default() }
    }

    /// All queries see all keys.
    pub fn all(length: usize, total: usize) -> Self {
        Self::new(1, length, total, |_, _| 0..total)
    }

    /// Texts of `length` tokens, in which each token sees itself and those before it.
    pub fn causal(length: usize) -> Self {
        Self::new(1, length, length, |_, query| 0..query + 1)
    }

    /// Texts that are filled up to `total` at their end: only the tokens of the text are seen, by all queries.
    pub fn padded(texts: &[usize], length: usize, total: usize) -> Self {
        Self::new(texts.len(), length, total, |text, _| 0..texts[text])
    }

    /// Rows that hold several texts each, one after the other, of these lengths: each token sees itself and those
    /// before it in its text. What fills up a row to the length of the longest sees nothing, and costs nothing.
    pub fn packed(rows: &[Vec<usize>]) -> Self {
        let length = rows.iter().map(|row| row.iter().sum()).max().unwrap_or(0);
        let seen = rows.iter().map(|row| {
            let mut seen = Vec::with_capacity(length);
            for text in row {
                let start = seen.len();
                seen.extend((0..*text).map(|token| start..start + token + 1));
            }
            seen.resize(length, 0..0);
            seen
        });
        let seen: Vec<Vec<_>> = seen.collect();
        Self::new(rows.len(), length, length, |row, query| seen[row][query].clone())
    }

    /// Lets each query see at most the last `size` of its keys. In a causal mask these are the token itself and
    /// the `size - 1` before it (a *sliding window*).
    ///
    /// # Panics
    ///
    /// If the size is 0.
    pub fn window(self, size: usize) -> Self {
        assert!(size > 0, "a window of at least 1 key expected");
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        let ranges =
            self.ranges.iter().map(|&[start, end]| [start.max(end.saturating_sub(size)), end]);
        Self { ranges: ranges.collect(), hidden: Arc::default(), ..self }
    }

    /// The mask that hides these keys from all queries of a text, `[batch, total]`, and these from each query,
    /// `[batch, length, total]`. `None` if what a query sees has holes, if one sees nothing, and for other shapes.
    pub(crate) fn of_hidden(
        padding: Option<Tensor<B, 2, Bool>>,
        hidden: Option<Tensor<B, 3, Bool>>,
        [batch, length, total]: [usize; 3],
    ) -> Option<Self> {
        if padding.is_none() && hidden.is_none() {
            return Some(Self::all(length, total));
        }
        let fits = padding.as_ref().is_none_or(|it| it.dims() == [batch, total])
            && hidden.as_ref().is_none_or(|it| it.dims() == [batch, length, total]);
        if !fits {
            return None;
        }
        let read = |data: TensorData| data.iter::<bool>().collect::<Vec<_>>();
        let padding = padding.map(|it| read(it.into_data()));
        let hidden = hidden.map(|it| read(it.into_data()));
        let queries = if hidden.is_some() { length } else { 1 };
        let mut ranges = Vec::with_capacity(batch * queries);
        for row in 0..batch * queries {
            let padding = padding.as_ref().map(|it| &it[row / queries * total..][..total]);
            let hidden = hidden.as_ref().map(|it| &it[row * total..][..total]);
            let seen = |key: &usize| ![padding, hidden].iter().flatten().any(|it| it[*key]);
            let start = (0..total).find(seen)?;
            let end = (start..total).find(|key| !seen(key)).unwrap_or(total);
            if (end..total).any(|key| seen(&key)) {
                return None;
            }
            ranges.push(start..end);
        }
        let seen = |text: usize, query: usize| ranges[text * queries + query % queries].clone();
        Some(Self::new(batch, length, total, seen))
    }

    /// The keys that a query of a text sees. Where all texts are alike, the text can be any.
    ///
    /// # Panics
    ///
    /// If there is no such query, or no such text.
    pub fn keys(&self, text: usize, query: usize) -> Range<usize> {
        let texts = self.texts();
        assert!(texts == 1 || text < texts, "a text below {texts} expected, got {text}");
        assert!(query < self.length, "a query below {} expected, got {query}", self.length);
        let [start, end] = self.ranges[text % texts * self.length + query];
        start as usize..end as usize
    }

    /// The numbers of queries and of keys of a text.
    pub fn dims(&self) -> [usize; 2] {
        [self.length, self.total]
    }

    /// The number of texts, 1 if all are alike.
    pub(super) fn texts(&self) -> usize {
        self.ranges.len().checked_div(self.length).unwrap_or(1)
    }

    pub(super) fn ranges(&self) -> Arc<[[u32; 2]]> {
        self.ranges.clone()
    }

    /// What is not seen, `[texts, 1, length, total]`, and whether a query sees nothing.
    pub(super) fn hidden(&self, device: &B::Device) -> (Tensor<B, 4, Bool>, bool) {
        let hidden = self.hidden.get_or_init(|| {
            let rows = self.ranges.iter().flat_map(|&[start, end]| {
                (0..self.total as u32).map(move |key| !(start..end).contains(&key))
            });
            let shape = [self.texts(), self.length, self.total];
            Tensor::from_data(TensorData::new(rows.collect::<Vec<_>>(), shape), device)
        });
        let blind = self.ranges.iter().any(|[start, end]| start >= end);
        (hidden.clone().to_device(device).unsqueeze_dim(1), blind)
    }

    /// Whether every query sees every key.
    pub(super) fn hides_nothing(&self) -> bool {
        self.ranges.iter().all(|it| *it == [0, self.total as u32])
    }
}
