//! What a person sees while something runs. In a terminal, the last line shows how far it is. In a pipe
//! or a file, a line appears from time to time.

use std::{
    fmt::Display,
    io::{IsTerminal, stderr, stdout},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// In a pipe, a training that runs says at least this often how far it is.
const INTERVAL: Duration = Duration::from_secs(10);

/// The resolution of the bar.
const TICKS: u64 = 1000;

/// How far a training is.
pub struct Position {
    /// The part of the training that runs: an epoch, for example.
    pub part: String,
    /// What is done of this part, from 0 to 1.
    pub of_part: f64,
    /// What is done of all that this program has to do for the training, from 0 to 1.
    pub of_all: f64,
}

/// The display of one training. It disappears when it is dropped.
pub struct Live {
    name: String,
    bar: ProgressBar,
    start: Instant,
    /// When the last line was printed.
    last: Instant,
}

impl Live {
    /// Shows the name of the training at once: its first step can take seconds.
    pub fn new(name: &str, part: impl Display) -> Self {
        let bar = ProgressBar::with_draw_target(Some(TICKS), target());
        let style = ProgressStyle::with_template("{prefix} [{wide_bar}] {msg}");
        bar.set_style(style.expect("the template is valid").progress_chars("=> "));
        bar.set_message("starting");
        bar.set_prefix(format!("{name:<24} {part}"));
        bar.tick();
        let now = Instant::now();
        Self { name: name.to_owned(), bar, start: now, last: now }
    }

    /// Shows how far the training is, the loss, and the time that is left.
    pub fn update(&mut self, position: &Position, loss: f64) {
        self.show(position, format_args!("loss {loss:.4}"));
    }

    /// Shows how far the training is, what it has reached, and the time that is left.
    pub fn show(&mut self, position: &Position, reached: impl Display) {
        let Position { part, of_part, of_all } = position;
        let left = self.start.elapsed().mul_f64((1.0 - of_all).max(0.0) / of_all.max(1e-9));
        let percent = 100.0 * of_part;
        let message = format!("{percent:3.0} %  {reached}  {} left", duration(left));
        if !self.bar.is_hidden() {
            self.bar.set_prefix(format!("{:<24} {part}", self.name));
            self.bar.set_message(message);
            self.bar.set_position((of_part * TICKS as f64) as u64);
        } else if self.last.elapsed() >= INTERVAL {
            self.line(format_args!("{part}  {message}"));
        }
    }

    /// Prints a line that stays, after the name of the training.
    pub fn line(&mut self, text: impl Display) {
        self.bar.suspend(|| println!("{:<24} {text}", self.name));
        self.last = Instant::now();
    }

    /// Prints a warning.
    pub fn warn(&self, text: impl Display) {
        self.bar.suspend(|| eprintln!("warning: {text}"));
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Says in a terminal what is being done, for as long as `work` takes.
pub fn during<T>(doing: &str, work: impl FnOnce() -> T) -> T {
    let bar = ProgressBar::with_draw_target(None, target());
    bar.set_style(ProgressStyle::with_template("{msg} ...").expect("the template is valid"));
    bar.set_message(doing.to_owned());
    bar.tick();
    let result = work();
    bar.finish_and_clear();
    result
}

/// Where bars move: in a terminal, if there is one.
fn target() -> ProgressDrawTarget {
    match moves(stdout().is_terminal(), stderr().is_terminal()) {
        true => ProgressDrawTarget::stdout(),
        false => ProgressDrawTarget::hidden(),
    }
}

/// Whether a person watches. `mpirun` gives each process a terminal for its output, and reads from that what it
/// puts into pipes; standard error is a pipe then.
fn moves(stdout: bool, stderr: bool) -> bool {
    stdout && stderr
}

/// A duration in the units in which people count it.
fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64().ceil() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::moves;

    #[test]
    fn d1_bars_move_only_where_all_that_is_said_is_in_a_terminal() {
        let found = [(true, true), (true, false), (false, true)].map(|(out, err)| moves(out, err));
        assert_eq!(found, [true, false, false]);
    }
}
