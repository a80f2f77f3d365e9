//! The program `burn-lora` as its users meet it: commands, what they print, and the files that they leave.

mod data;
mod dtype;
mod export;
mod first_day;
mod results;
mod server;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokenizers::{
    Tokenizer, models::wordlevel::WordLevel, pre_tokenizers::whitespace::WhitespaceSplit,
};

/// The words that the small models know. What is none of them is the last.
const WORDS: [&str; 11] = [
    "<end>",
    "user:",
    "assistant:",
    "system:",
    "a",
    "b",
    "c",
    "d",
    "negative",
    "positive",
    "<unknown>",
];

const TEMPLATE: &str = "{% for it in messages %}{{ it.role }}: {{ it.content }} <end> {% endfor %}\
                        {% if add_generation_prompt %}assistant: {% endif %}";

/// A directory to work in, with the model `model` and the texts `data`.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        place.model("model", "llama3");
        place.texts("data/train.jsonl", &["a", "b c", "c d a", "d"]);
        place.texts("data/valid.jsonl", &["b", "a a"]);
        place
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(name)).unwrap()).unwrap()
    }

    /// A model of the tests of decoders, with a tokenizer of words. It reads 64 tokens.
    fn model(&self, name: &str, fixture: &str) {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/llama/fixtures");
        for file in ["config.json", "model.safetensors"] {
            self.write(
                &format!("{name}/{file}"),
                fs::read(fixtures.join(fixture).join(file)).unwrap(),
            );
        }
        let words = WORDS.iter().zip(0..).map(|(word, id)| (word.to_string(), id));
        let words: HashMap<_, _> = words.collect();
        let words = WordLevel::builder().vocab(words.into_iter().collect());
        let model = words.unk_token("<unknown>".to_owned()).build().unwrap();
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(WhitespaceSplit));
        self.write(&format!("{name}/tokenizer.json"), tokenizer.to_string(false).unwrap());
        let settings = json!({ "eos_token": "<end>", "chat_template": TEMPLATE });
        self.write(&format!("{name}/tokenizer_config.json"), settings.to_string());
    }

    /// Questions, all with the same answer, a line for each.
    fn texts(&self, name: &str, prompts: &[&str]) {
        let line = |it| format!("{}\n", json!({ "prompt": it, "completion": "a b" }));
        self.write(name, prompts.iter().map(line).collect::<String>());
    }

    /// Runs the program with the arguments, which spaces divide.
    fn run(&self, arguments: &str) -> Output {
        self.run_with(arguments, &[])
    }

    fn run_with(&self, arguments: &str, variables: &[(&str, &str)]) -> Output {
        self.command(arguments).envs(variables.iter().copied()).output().unwrap()
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_burn-lora"));
        command.args(arguments.split_whitespace()).current_dir(self.dir.path());
        // Tests may run in a cluster, and the library with other instructions.
        for (name, _) in std::env::vars() {
            if ["OMPI_", "PMI", "MPI_", "MV2_", "SLURM_", "BURN_LORA_"]
                .iter()
                .any(|it| name.starts_with(it))
            {
                command.env_remove(name);
            }
        }
        command
    }

    /// What it prints on standard output and on standard error. It succeeds.
    #[track_caller]
    fn done(&self, arguments: &str) -> (String, String) {
        let done = self.run(arguments);
        let (out, err) = (text(&done.stdout), text(&done.stderr));
        assert!(done.status.success(), "{arguments}: {out}{err}");
        (out, err)
    }

    /// The one line of its error.
    #[track_caller]
    fn refused(&self, arguments: &str) -> String {
        let done = self.run(arguments);
        let err = text(&done.stderr);
        assert!(!done.status.success(), "{arguments}: {}", text(&done.stdout));
        let lines = err.lines().filter(|line| !line.starts_with("warning: ")).count();
        assert_eq!(lines, 1, "{err}");
        err
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A training that takes no time, with these arguments in the place of its own.
fn train(more: &str) -> String {
    let usual = "--model model --data data --workers 1 --rank 2 --iters 2 --batch 2 --out out";
    let given = |name: &str| more.split_whitespace().any(|it| it == name);
    let usual: Vec<_> = usual.split(' ').collect();
    let kept = usual.chunks(2).filter(|it| !given(it[0])).map(|it| it.join(" "));
    format!("train {} {more}", kept.collect::<Vec<_>>().join(" "))
}
