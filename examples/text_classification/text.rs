//! Texts as tokens, and the data that they come from.

use std::{fs, path::Path, sync::Arc};

use burn::{
    data::{
        dataloader::{DataLoader, DataLoaderBuilder, batcher::Batcher},
        dataset::InMemDataset,
    },
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use tokenizers::{Tokenizer, TruncationParams};

use crate::{
    bert::Tokens,
    common::{
        Context, Result,
        classifier::{Batch, Sample, shuffled},
    },
};

/// Longer texts are cut.
const LENGTH: usize = 128;

/// A text as the encoder reads it, and its class.
#[derive(Clone, Debug)]
pub struct Text {
    pub ids: Vec<u32>,
    pub label: u8,
}

impl Sample for Text {
    type Input<B: Backend> = Tokens<B>;

    const BATCH: usize = 32;

    fn label(&self) -> u8 {
        self.label
    }

    /// Fills the texts up to the length of the longest.
    fn stack<B: Backend>(texts: &[Self], device: &B::Device) -> Tokens<B> {
        let length = texts.iter().map(|text| text.ids.len()).max().unwrap_or(0);
        let filled = |value: fn(Option<&u32>) -> i32| {
            let rows = texts.iter().flat_map(|text| (0..length).map(|at| value(text.ids.get(at))));
            let data = TensorData::new(rows.collect::<Vec<_>>(), [texts.len(), length]);
            Tensor::<B, 2, Int>::from_data(data, device)
        };
        Tokens {
            // What stands where nothing counts does not matter.
            ids: filled(|id| id.map_or(0, |&id| id as i32)),
            padding: filled(|id| i32::from(id.is_none())).bool(),
        }
    }

    /// Texts of about the same length together, so that little has to be filled up: on SST-2 that
    /// saves two thirds of the work.
    fn batches<B: Backend>(
        texts: &[Self],
        seed: Option<u64>,
    ) -> Arc<dyn DataLoader<B, Batch<B, Self>>> {
        let mut texts = texts.to_vec();
        texts.sort_by_key(|text| text.ids.len());
        let groups: Vec<_> = texts.chunks(Self::BATCH).map(<[Self]>::to_vec).collect();
        shuffled(DataLoaderBuilder::new(Group).batch_size(1), seed).build(InMemDataset::new(groups))
    }
}

#[derive(Clone)]
struct Group;

impl<B: Backend> Batcher<B, Vec<Text>, Batch<B, Text>> for Group {
    fn batch(&self, groups: Vec<Vec<Text>>, device: &B::Device) -> Batch<B, Text> {
        Batch::new(&groups.concat(), device)
    }
}

/// Texts to learn from, to watch while learning, and to judge by in the end.
pub struct Texts {
    /// "sst2" or "generated".
    pub name: &'static str,
    pub train: Vec<Text>,
    pub dev: Vec<Text>,
    pub test: Vec<Text>,
}

impl Texts {
    /// The Stanford Sentiment Treebank with two classes, from `train.tsv`, `dev.tsv` and `test.tsv`
    /// in `dir`: the line `sentence`, tab, `label`, and then lines of a text, a tab and 0 or 1.
    pub fn read(dir: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            let content = fs::read_to_string(&path).context(path.display())?;
            let mut lines = content.lines().enumerate();
            if !lines.next().is_some_and(|(_, header)| header == "sentence\tlabel") {
                return Err(format!(
                    "{}: it must begin with a line of `sentence`, a tab and `label`. GLUE's test.tsv \
                     has no labels: its dev.tsv serves to test, and a part of train.tsv to watch",
                    path.display(),
                ));
            }
            let lines = lines.filter(|(_, line)| !line.is_empty());
            let samples = lines.map(|(index, line)| match line.rsplit_once('\t') {
                Some((text, "0")) => Ok((text, 0)),
                Some((text, "1")) => Ok((text, 1)),
                _ => {
                    let line = index + 1;
                    Err(format!("{}:{line}: a text, a tab and 0 or 1 expected", path.display()))
                }
            });
            let samples = samples.collect::<Result<Vec<_>>>()?;
            match samples.is_empty() {
                true => Err(format!("{}: there are no texts in it", path.display())),
                false => encode(tokenizer, &samples),
            }
        };
        Ok(Self {
            name: "sst2",
            train: read("train.tsv")?,
            dev: read("dev.tsv")?,
            test: read("test.tsv")?,
        })
    }
}

/// The tokenizer of a pretrained encoder.
pub fn read_tokenizer(path: &Path) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_file(path).context(path.display())?;
    let truncation = TruncationParams { max_length: LENGTH, ..Default::default() };
    tokenizer.with_truncation(Some(truncation)).context(path.display())?;
    // What the longest of them all would need: batches are filled up one by one.
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// Texts and their classes as samples.
pub fn encode(tokenizer: &Tokenizer, samples: &[(impl AsRef<str>, u8)]) -> Result<Vec<Text>> {
    let texts: Vec<_> = samples.iter().map(|(text, _)| text.as_ref()).collect();
    let encodings = tokenizer.encode_batch(texts, true).context("tokenizing")?;
    let encodings = encodings.iter().zip(samples);
    Ok(encodings
        .map(|(encoding, &(_, label))| Text { ids: encoding.get_ids().to_vec(), label })
        .collect())
}
