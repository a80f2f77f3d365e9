//! The sentiment of film reviews (SST-2) as a conversation: the model is asked, and answers in a word.

use std::path::Path;

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};

use burn_lora_llm::{
    Context, Result,
    chat::{Chat, Message},
    data::{Batch, Reading, Text, Texts, conversation},
    llama::Llama,
    sst2,
};

/// The answers for the classes 0 and 1.
const ANSWERS: [&str; 2] = ["negative", "positive"];

/// The number of texts of a batch when the model is asked.
const BATCH: usize = 16;

/// A question about a review, and the number of the right answer.
pub struct Question {
    text: Text,
    class: u8,
}

fn message(role: &str, content: String) -> Message {
    Message { role: role.to_owned(), content }
}

fn question(review: &str) -> Message {
    message("user", format!("Is this film review positive or negative? {}", review.trim()))
}

/// The first reviews of a file, with their answers, to learn from.
pub fn texts(path: &Path, count: usize, chat: &Chat, reading: &Reading) -> Result<Texts> {
    let samples = sst2::read(path)?.into_iter().take(count);
    let texts = samples.map(|(review, class)| {
        let answer = message("assistant", ANSWERS[class as usize].to_owned());
        conversation(&[question(&review), answer], chat, reading.mask_prompt)
    });
    Texts::new(texts.collect::<Result<_>>()?, reading.max_length).context(path.display())
}

/// The reviews of a file as questions.
pub fn questions(path: &Path, chat: &Chat) -> Result<Vec<Question>> {
    let questions = sst2::read(path)?.into_iter().map(|(review, class)| {
        let ids = chat.encode(&chat.render(&[question(&review)], true)?, false)?;
        Ok(Question { text: Text { ids, given: 0 }, class })
    });
    questions.collect()
}

/// The share of the questions that the model answers rightly, in percent: of the two answers, it gives the
/// one with the higher score.
///
/// # Errors
///
/// If the answers begin with the same token.
pub fn accuracy<B: Backend>(
    llama: &Llama<B>,
    chat: &Chat,
    questions: &[Question],
    device: &B::Device,
) -> Result<f64> {
    let mut first = Vec::new();
    for answer in ANSWERS {
        first.extend(chat.encode(answer, false)?.first().copied());
    }
    if first.len() < 2 || first[0] == first[1] {
        return Err(format!("the answers {ANSWERS:?} begin with the same token"));
    }
    let ints = |values: Vec<u32>| {
        let values: Vec<_> = values.into_iter().map(|it| it as i32).collect();
        Tensor::<B, 1, Int>::from_data(TensorData::from(&*values), device)
    };
    let mut sorted: Vec<_> = questions.iter().collect();
    sorted.sort_by_key(|question| question.text.ids.len());
    let mut right = 0;
    for asked in sorted.chunks(BATCH) {
        let rows: Vec<_> = asked.iter().map(|question| vec![&question.text]).collect();
        let batch = Batch::new(llama, &rows, device);
        let hidden = llama.hidden(batch.ids, &batch.positions);
        let [rows, length, width] = hidden.dims();
        let last = asked.iter().zip(0..);
        let last = last.map(|(it, row)| (row * length + it.text.ids.len() - 1) as u32).collect();
        let hidden = hidden.reshape([rows * length, width]).select(0, ints(last));
        let scores = llama.logits(hidden.unsqueeze()).squeeze_dim::<2>(0);
        let scores = scores.select(1, ints(first.clone())).argmax(1);
        let answers = scores.into_data();
        let answers = answers.iter::<i64>().zip(asked);
        right += answers.filter(|(answer, question)| *answer == i64::from(question.class)).count();
    }
    Ok(100.0 * right as f64 / questions.len() as f64)
}
