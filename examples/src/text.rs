//! Texts as tokens, and the data sets of texts.

use std::{path::Path, sync::Arc};

use burn::{
    data::{
        dataloader::{DataLoader, DataLoaderBuilder, batcher::Batcher},
        dataset::InMemDataset,
    },
    tensor::{Tensor, backend::Backend},
};
use tokenizers::{Tokenizer, TruncationParams};

use burn_lora_llm::{Context, Result, sst2};

use burn_lora_llm::bert::{
    BertConfig, Tokens,
    classifier::{Text, TextClassifier},
};

use crate::classifier::{Classifier, Sample, shuffled};

/// Longer texts are truncated.
const LENGTH: usize = 128;

impl<B: Backend> Classifier<B> for TextClassifier<B> {
    type Sample = Text;

    fn logits(&self, tokens: Tokens<B>) -> Tensor<B, 2> {
        self.forward(&tokens)
    }
}

impl Sample for Text {
    type Input<B: Backend> = Tokens<B>;

    const BATCH: usize = 32;

    fn label(&self) -> u8 {
        self.label
    }

    fn stack<B: Backend>(texts: &[Self], device: &B::Device) -> Tokens<B> {
        Tokens::stack(texts.iter().map(|text| &*text.ids), device)
    }

    /// Puts texts of about the same length in a batch, which needs little padding. On SST-2 it saves two
    /// thirds of the work.
    fn batches<B: Backend>(texts: &[Self], seed: Option<u64>) -> Arc<dyn DataLoader<B, Vec<Self>>> {
        let mut texts = texts.to_vec();
        texts.sort_by_key(|text| text.ids.len());
        let groups: Vec<_> = texts.chunks(Self::BATCH).map(<[Self]>::to_vec).collect();
        shuffled(DataLoaderBuilder::new(Group).batch_size(1), seed).build(InMemDataset::new(groups))
    }
}

#[derive(Clone)]
struct Group;

impl<B: Backend> Batcher<B, Vec<Text>, Vec<Text>> for Group {
    fn batch(&self, groups: Vec<Vec<Text>>, _: &B::Device) -> Vec<Text> {
        groups.concat()
    }
}

/// Texts for training, for the evaluation after each epoch, and for testing.
pub struct Texts {
    /// "sst2" or "generated".
    pub name: &'static str,
    pub train: Vec<Text>,
    pub dev: Vec<Text>,
    pub test: Vec<Text>,
}

impl Texts {
    /// The Stanford Sentiment Treebank with two classes, from `train.tsv`, `dev.tsv` and `test.tsv`
    /// in `dir`.
    pub fn read(dir: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let read = |name: &str| encode(tokenizer, &sst2::read(&dir.join(name))?);
        Ok(Self {
            name: "sst2",
            train: read("train.tsv")?,
            dev: read("dev.tsv")?,
            test: read("test.tsv")?,
        })
    }
}

/// Reads the tokenizer in `path`, for an encoder of these sizes.
pub fn read_tokenizer(path: &Path, sizes: &BertConfig) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_file(path).context(path.display())?;
    let last = tokenizer.get_vocab(true).into_values().max();
    if let Some(last) = last.filter(|&last| last as usize >= sizes.vocab_size) {
        let known = sizes.vocab_size;
        return Err(format!(
            "{}: there is a token {last}, and the model has {known}",
            path.display()
        ));
    }
    let max_length = LENGTH.min(sizes.max_position_embeddings);
    let truncation = TruncationParams { max_length, ..Default::default() };
    tokenizer.with_truncation(Some(truncation)).context(path.display())?;
    // `stack` pads each batch to its longest text.
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{backend::Plain, grammar};
    use serde_json::Value;

    /// Compares with the tokens of Hugging Face's tokenizer, from `llm/tests/bert/make_fixtures.py`. The
    /// environment variable `MINILM` is a directory with all-MiniLM-L6-v2.
    #[test]
    #[ignore = "needs the tokenizer of all-MiniLM-L6-v2"]
    fn tokens_of_minilm_are_those_of_transformers() {
        let dir = std::env::var("MINILM").expect("MINILM says where all-MiniLM-L6-v2 is");
        let sizes = grammar::language(1).unwrap().config;
        let sizes = BertConfig { vocab_size: 30_522, max_position_embeddings: 512, ..sizes };
        let path = Path::new(&dir).join("tokenizer.json");
        let tokenizer = read_tokenizer(&path, &sizes).unwrap();
        let expected = fs::read("../llm/tests/bert/fixtures/minilm/expected.json").unwrap();
        let expected: Value = serde_json::from_slice(&expected).unwrap();
        let rows = |key: &str| expected[key].as_array().unwrap().clone();
        let samples: Vec<_> =
            rows("sentences").iter().map(|it| (it.as_str().unwrap().to_owned(), 0)).collect();
        let texts = encode(&tokenizer, &samples).unwrap();
        let Tokens { ids, padding } = Text::stack::<Plain>(&texts, &Default::default());
        let flat = |key: &str| {
            let rows = rows(key).into_iter();
            rows.flat_map(|row| row.as_array().unwrap().clone()).map(|it| it.as_i64().unwrap())
        };
        assert!(ids.into_data().iter::<i64>().eq(flat("ids")));
        assert!(padding.int().into_data().iter::<i64>().eq(flat("mask").map(|kept| 1 - kept)));

        // A tokenizer with more tokens than the model, and a model for shorter texts.
        let few = BertConfig { vocab_size: 30_521, ..sizes.clone() };
        let error = read_tokenizer(&path, &few).unwrap_err();
        assert!(error.contains("there is a token 30521, and the model has 30521"), "{error}");
        let short = BertConfig { max_position_embeddings: 7, ..sizes };
        let tokenizer = read_tokenizer(&path, &short).unwrap();
        let longest = encode(&tokenizer, &samples).unwrap().into_iter().map(|it| it.ids.len());
        assert_eq!(longest.max(), Some(7));
    }

    #[test]
    fn a_training_takes_texts_of_like_length_together_and_each_once() {
        let text = |length: u32| Text { ids: (0..length).collect(), label: (length % 2) as u8 };
        let texts: Vec<_> = (0..100).map(|index| text(1 + index * 37 % 100)).collect();
        let loader = Text::batches::<Plain>(&texts, Some(3));
        let (mut lengths, mut orders) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            let widths = loader.iter().map(|batch| {
                let Tokens { ids, padding } = Text::stack::<Plain>(&batch, &Default::default());
                let kept = padding.bool_not().int().sum_dim(1);
                lengths.extend(kept.into_data().iter::<i64>());
                ids.dims()[1]
            });
            orders.push(widths.collect::<Vec<_>>());
        }
        lengths.sort_unstable();
        assert_eq!(lengths, (2..=201).map(|twice| twice / 2).collect::<Vec<i64>>());
        assert_ne!(orders[0], orders[1]);
        orders.iter_mut().for_each(|order| order.sort_unstable());
        assert_eq!(orders, [[32, 64, 96, 100]; 2]);
    }

    #[test]
    fn files_that_are_not_sst2_are_refused_by_line() {
        let dir = std::env::temp_dir().join(format!("burn-lora-sst2-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let tokenizer = grammar::language(1).unwrap().tokenizer;
        let read = |content: &str| {
            fs::write(dir.join("train.tsv"), content).unwrap();
            Texts::read(&dir, &tokenizer).err().unwrap()
        };
        for (content, expected) in [
            ("index\tsentence\n0\tfine\n", "train.tsv: it must begin with"),
            ("sentence\tlabel\nfine\t1\nbad\t2\n", "train.tsv:3: a text, a tab and 0 or 1"),
            ("sentence\tlabel\n", "train.tsv: there are no texts in it"),
            ("sentence\tlabel\r\nfine\t1\r\n", "dev.tsv: "),
        ] {
            let error = read(content);
            assert!(error.contains(expected), "{error}");
        }
        fs::remove_dir_all(dir).unwrap();
    }
}
