//! What the server counts, in the format of Prometheus.

use std::{
    fmt::Write,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

#[derive(Default)]
pub struct Metrics {
    /// Texts that are under way.
    batch: Number,
    pub requests: Number,
    /// Requests that were refused, or failed.
    pub errors: Number,
    /// Requests whose clients went away.
    pub abandoned: Number,
    pub prompt_tokens: Number,
    pub new_tokens: Number,
    /// Of the last step, in thousandths.
    speed: Number,
}

/// A number that several threads change.
#[derive(Default)]
pub struct Number(AtomicUsize);

impl Number {
    pub fn add(&self, more: usize) {
        self.0.fetch_add(more, Relaxed);
    }

    pub fn set(&self, value: usize) {
        self.0.store(value, Relaxed);
    }

    fn get(&self) -> usize {
        self.0.load(Relaxed)
    }
}

impl Metrics {
    /// Notes a step that added so many tokens.
    pub fn step(&self, tokens: usize, time: Duration) {
        self.speed.set((1000.0 * tokens as f64 / time.as_secs_f64()) as usize);
    }

    /// Notes how many texts are under way.
    pub fn batch(&self, texts: usize) {
        self.batch.set(texts);
        if texts == 0 {
            self.speed.set(0);
        }
    }

    /// All numbers, with those of the queue, of the adapters in memory, and of those with problems.
    pub fn text(&self, queue: usize, adapters: usize, bytes: usize, problems: usize) -> String {
        let mut text = String::new();
        let counters = [
            ("requests", "Requests that were answered or refused", &self.requests),
            ("errors", "Requests that were refused or failed", &self.errors),
            ("abandoned", "Requests whose clients went away", &self.abandoned),
            ("prompt_tokens", "Tokens of prompts that were read", &self.prompt_tokens),
            ("new_tokens", "Tokens of answers", &self.new_tokens),
        ];
        for (name, help, number) in counters {
            push(&mut text, &format!("{name}_total"), "counter", help, number.get() as f64);
        }
        let gauges = [
            ("queue", "Requests that wait", queue as f64),
            ("batch_size", "Texts that are under way", self.batch.get() as f64),
            ("tokens_per_second", "In the last step", self.speed.get() as f64 / 1000.0),
            ("adapters_resident", "Sets of adapters in memory", adapters as f64),
            ("adapter_bytes", "Bytes of their parameters", bytes as f64),
            (
                "adapter_problems",
                "Sets that cannot be used, or not as they are now",
                problems as f64,
            ),
        ];
        for (name, help, value) in gauges {
            push(&mut text, name, "gauge", help, value);
        }
        text
    }
}

fn push(text: &mut String, name: &str, kind: &str, help: &str, value: f64) {
    let name = format!("burn_lora_{name}");
    writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}")
        .expect("a string takes all");
}
