//! Tokens of SentencePiece: pieces of texts in which spaces are `▁`, made of pairs in the order of their scores, and
//! bytes of characters that no piece has.

use std::collections::HashSet;

use serde_json::{Map, Value};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, Tokenizer,
    decoders::{
        byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders, strip::Strip,
    },
    models::bpe::{BPE, Merges},
    normalizers::{
        prepend::Prepend,
        replace::{Replace, ReplacePattern},
        utils::Sequence,
    },
};

use super::{
    ends::{self, special},
    vocabulary::{Kind, Vocabulary},
};
use crate::error::{Context, Result};

/// What spaces are in pieces.
const SPACE: &str = "▁";

/// Pieces have at most so many bytes. SentencePiece makes none of more than 16 characters by default.
const LONGEST: usize = 256;

/// So many pairs are read. The largest vocabularies make half a million.
const PAIRS: usize = 1 << 22;

/// The tokenizer of such tokens.
///
/// # Errors
///
/// If a field is missing or malformed.
pub(super) fn tokenizer(fields: &Map<String, Value>) -> Result<Tokenizer> {
    let mut vocabulary = Vocabulary::read(fields)?;
    let merges = merges(&vocabulary)?;
    let says = |name: &str| fields.get(&format!("tokenizer.ggml.{name}")).and_then(Value::as_bool);
    let spaces = Spaces {
        is_before: says("add_space_prefix").unwrap_or(true),
        are_single: says("remove_extra_whitespaces").unwrap_or(false),
    };
    spell(&mut vocabulary, spaces);
    let mut model = BPE::builder()
        .vocab_and_merges(vocabulary.ids(), merges)
        .fuse_unk(true)
        .byte_fallback(true);
    if let Some(unknown) = special(fields, "unknown") {
        model = model.unk_token(unknown);
    }
    let mut tokenizer = Tokenizer::new(model.build().context("the pieces")?);
    tokenizer.with_normalizer(Some(spaces.normalizer()?));
    tokenizer.with_decoder(Some(spaces.decoder()?));
    tokenizer.add_tokens(&added_tokens(&vocabulary, fields, spaces));
    ends::add(&mut tokenizer, fields, true, false)?;
    Ok(tokenizer)
}

/// The pairs that make up each piece, the best first. Of equally good ones SentencePiece takes the first in the text,
/// where the longer piece is before the shorter one.
pub(super) fn merges(vocabulary: &Vocabulary) -> Result<Merges> {
    let scores = vocabulary.for_each_token("scores")?;
    let all = vocabulary.tokens.iter().zip(&vocabulary.kinds).zip(scores);
    let normal = all.filter(|((_, kind), _)| **kind == Kind::Normal);
    let normal = normal.map(|((token, _), score)| {
        let score = score.as_f64().ok_or("`tokenizer.ggml.scores` must hold numbers")?;
        match token.len() {
            ..=LONGEST => Ok((token.as_str(), score)),
            length => Err(format!("`tokenizer.ggml.tokens`: a token has {length} bytes")),
        }
    });
    let normal = normal.collect::<Result<Vec<_>>>()?;
    let known: HashSet<_> = normal.iter().map(|(token, _)| *token).collect();
    let mut pairs = Vec::new();
    for &(token, score) in &normal {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if known.contains(left) && known.contains(right) {
                pairs.push((score, left, right));
            }
        }
        if pairs.len() > PAIRS {
            return Err(format!(
                "`tokenizer.ggml.tokens`: they are made of more than {PAIRS} pairs"
            ));
        }
    }
    pairs.sort_by(|(score, left, _), (other, other_left, _)| {
        other.total_cmp(score).then(other_left.len().cmp(&left.len()))
    });
    Ok(pairs.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect())
}

/// What becomes of the spaces of texts.
#[derive(Clone, Copy)]
struct Spaces {
    /// Whether each text begins with one more.
    is_before: bool,
    /// Whether there are none at the ends of texts, and never two in a row.
    are_single: bool,
}

impl Spaces {
    /// Whether tokens of spaces can be looked for when spaces are already `▁`. Otherwise what is done to texts would be
    /// done to these tokens, too.
    fn are_only_replaced(self) -> bool {
        !self.is_before && !self.are_single
    }

    fn normalizer(self) -> Result<Sequence> {
        let replace = |pattern, by: &str| -> Result<NormalizerWrapper> {
            Ok(Replace::new(pattern, by).context("the spaces")?.into())
        };
        let mut steps = Vec::new();
        if self.are_single {
            for (pattern, by) in [("^ +| +$", ""), (" {2,}", " ")] {
                steps.push(replace(ReplacePattern::Regex(pattern.to_owned()), by)?);
            }
        }
        if self.is_before {
            steps.push(Prepend::new(SPACE.to_owned()).into());
        }
        steps.push(replace(ReplacePattern::String(" ".to_owned()), SPACE)?);
        Ok(Sequence::new(steps))
    }

    fn decoder(self) -> Result<Decoders> {
        let spaces = Replace::new(SPACE, " ").context("the spaces")?;
        let mut steps: Vec<DecoderWrapper> =
            vec![spaces.into(), ByteFallback::default().into(), Fuse::default().into()];
        let removed = match self {
            Self { are_single: true, .. } => usize::MAX,
            Self { is_before: true, .. } => 1,
            _ => 0,
        };
        if removed > 0 {
            steps.push(Strip::new(' ', removed, 0).into());
        }
        Ok(Decoders::new(steps))
    }
}

/// Spells tokens that are never divided as they are looked for in texts. Files have their spaces in either way.
fn spell(vocabulary: &mut Vocabulary, spaces: Spaces) {
    let (from, to) = if spaces.are_only_replaced() { (" ", SPACE) } else { (SPACE, " ") };
    let mut known: HashSet<_> = vocabulary.tokens.iter().cloned().collect();
    for (token, kind) in vocabulary.tokens.iter_mut().zip(&vocabulary.kinds) {
        let spelled = token.replace(from, to);
        if *kind == Kind::UserDefined && !known.contains(&spelled) {
            known.insert(spelled.clone());
            *token = spelled;
        }
    }
}

/// The tokens that are looked for before all others.
fn added_tokens(
    vocabulary: &Vocabulary,
    fields: &Map<String, Value>,
    spaces: Spaces,
) -> Vec<AddedToken> {
    let text = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or_default();
    let name = text("general.name").to_lowercase();
    let is_phi3 = text("general.architecture") == "phi3"
        || ["phi-3", "phi3"].iter().any(|it| name.contains(it));
    let tokens = vocabulary.added_tokens().into_iter().map(|token| {
        // The tokens of Phi-3's chats take what is between them and the text with them.
        let strips = is_phi3 && !["<unk>", "<s>", "<|endoftext|>"].contains(&&*token.content);
        let is_plain = !token.special;
        token.rstrip(strips).normalized(is_plain && spaces.are_only_replaced())
    });
    tokens.collect()
}
