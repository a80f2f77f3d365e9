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
    /// Tokens of prompts that were not read, because another text had begun with them.
    pub reused_tokens: Number,
    /// From a request to the first token of its answer.
    pub first: Times,
    /// From one token of an answer to the next.
    pub next: Times,
    /// Of the last step, in thousandths.
    speed: Number,
}

/// How often something took how long.
#[derive(Default)]
pub struct Times {
    /// For each of [`BOUNDS`] how often it took as long as that, and not as long as the one before; and then how often it took
    /// longer.
    counts: [AtomicUsize; BOUNDS.len() + 1],
    /// In microseconds.
    sum: Number,
}

/// In seconds.
const BOUNDS: [f64; 14] =
    [0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 20.0];

impl Times {
    pub fn note(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let place = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len());
        self.counts[place].fetch_add(1, Relaxed);
        self.sum.add(time.as_micros() as usize);
    }

    /// The time that so great a share of them took at most, by the bounds, in seconds; 0 if there are none.
    fn quantile(&self, share: f64) -> f64 {
        let counts = self.counts.each_ref().map(|it| it.load(Relaxed));
        let wanted = share * counts.iter().sum::<usize>() as f64;
        let (mut below, mut least) = (0.0, 0.0);
        for (count, bound) in counts.into_iter().zip(BOUNDS) {
            let above = below + count as f64;
            if count > 0 && above >= wanted {
                return least + (bound - least) * (wanted - below) / count as f64;
            }
            (below, least) = (above, bound);
        }
        if below < wanted { least } else { 0.0 }
    }

    fn push(&self, text: &mut String, name: &str, help: &str) {
        let name = format!("burn_lora_{name}_seconds");
        write!(text, "# HELP {name} {help}\n# TYPE {name} histogram\n")
            .expect("a string takes all");
        let mut total = 0;
        let bounds = BOUNDS.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (count, bound) in self.counts.iter().zip(bounds) {
            total += count.load(Relaxed);
            writeln!(text, "{name}_bucket{{le=\"{bound}\"}} {total}").expect("a string takes all");
        }
        let sum = self.sum.get() as f64 / 1e6;
        writeln!(text, "{name}_sum {sum}\n{name}_count {total}").expect("a string takes all");
    }
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
            (
                "reused_tokens",
                "Tokens of prompts that were not read, because another had begun with them",
                &self.reused_tokens,
            ),
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
        let times = [
            ("first_token", "From a request to the first token of its answer", &self.first),
            ("next_token", "From a token of an answer to the next", &self.next),
        ];
        for (name, help, times) in times {
            times.push(&mut text, name, help);
            for (share, of) in [("p50", 0.5), ("p99", 0.99)] {
                let (name, help) = (format!("{name}_{share}_seconds"), format!("{help}, {share}"));
                push(&mut text, &name, "gauge", &help, times.quantile(of));
            }
        }
        text
    }
}

fn push(text: &mut String, name: &str, kind: &str, help: &str, value: f64) {
    let name = format!("burn_lora_{name}");
    writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}")
        .expect("a string takes all");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_counted_up_to_each_bound() {
        let metrics = Metrics::default();
        assert_eq!(metrics.first.quantile(0.5), 0.0);
        for millis in [1, 5, 15, 15, 40, 400, 60_000] {
            metrics.first.note(Duration::from_millis(millis));
        }
        let text = metrics.text(0, 0, 0, 0);
        let lines: Vec<_> = text.lines().filter(|it| it.contains("first_token")).collect();
        for line in [
            "# TYPE burn_lora_first_token_seconds histogram",
            "burn_lora_first_token_seconds_bucket{le=\"0.005\"} 2",
            "burn_lora_first_token_seconds_bucket{le=\"0.01\"} 2",
            "burn_lora_first_token_seconds_bucket{le=\"0.02\"} 4",
            "burn_lora_first_token_seconds_bucket{le=\"20\"} 6",
            "burn_lora_first_token_seconds_bucket{le=\"+Inf\"} 7",
            "burn_lora_first_token_seconds_count 7",
            "burn_lora_first_token_seconds_sum 60.476",
        ] {
            assert!(lines.contains(&line), "{line} is not in {lines:?}");
        }
        // The fourth of seven took between 10 and 20 ms, and what is above all bounds counts as the last of them.
        let median = metrics.first.quantile(0.5);
        assert!((0.01..=0.02).contains(&median), "{median}");
        assert_eq!(metrics.first.quantile(0.99), 20.0);
    }
}
