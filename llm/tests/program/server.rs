//! What a server tells of its adapters.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Stdio},
};

use super::*;

/// A server that runs, and ends with the test.
struct Running {
    child: Child,
    address: String,
    /// What it printed when it began.
    line: String,
    log: PathBuf,
}

impl Running {
    fn new(place: &Place, arguments: &str) -> Self {
        let log = place.path("log");
        let mut command = place.command(&format!("serve --model model --port 0 {arguments}"));
        let file = fs::File::create(&log).unwrap();
        let mut child = command.stdout(Stdio::piped()).stderr(file).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = lines.find_map(|line| line.ok().filter(|it| it.contains("http://")));
        let line = line.unwrap_or_else(|| panic!("{}", fs::read_to_string(&log).unwrap()));
        let address = line.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned();
        Self { child, address, line, log }
    }

    fn request(&self, head: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        write!(
            stream,
            "{head} HTTP/1.1\r\nHost: it\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    /// The names of the models, with their problems.
    fn models(&self) -> Vec<(String, Option<String>)> {
        let models: Value = serde_json::from_str(&self.request("GET /v1/models", "")).unwrap();
        let models = models["data"].as_array().unwrap().iter();
        let problem = |it: &Value| it["problem"].as_str().map(str::to_owned);
        models.map(|it| (it["id"].as_str().unwrap().to_owned(), problem(it))).collect()
    }

    fn problems(&self) -> String {
        let metrics = self.request("GET /metrics", "");
        let name = "burn_lora_adapter_problems ";
        metrics.lines().find_map(|line| line.strip_prefix(name)).unwrap().to_owned()
    }

    /// Whether the model answers, and what it says if not.
    fn ask(&self, model: &str) -> Result<(), String> {
        let body = json!({ "model": model, "prompt": "a b", "max_tokens": 1 }).to_string();
        let answer = self.request("POST /v1/completions", &body);
        let answer: Value = serde_json::from_str(&answer).unwrap();
        answer["error"]["message"].as_str().map_or(Ok(()), |error| Err(error.to_owned()))
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Copies a set of adapters.
fn copy(place: &Place, from: &str, to: &str) {
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        place.write(&format!("{to}/{file}"), fs::read(place.path(from).join(file)).unwrap());
    }
}

#[test]
fn d3_a_directory_that_is_a_set_is_refused_with_its_parent() {
    let place = Place::new();
    place.done(&train(""));
    for (given, parent) in [("out/adapter", "out"), ("./out/adapter/", "./out"), ("set", ".")] {
        copy(&place, "out/adapter", "set");
        let error = place.refused(&format!("serve --model model --port 0 --adapters {given}"));
        assert!(error.contains("itself a set of adapters"), "{error}");
        assert!(error.contains(&format!("`--adapters {parent}`")), "{error}");
    }
    // Before the model is read.
    let error = place.refused("serve --model nowhere --port 0 --adapters missing");
    assert!(error.contains("missing"), "{error}");
    // PEFT puts one set beside the directories of the others.
    copy(&place, "out/adapter", "set/polite");
    let server = Running::new(&place, "--adapters set");
    assert!(server.line.ends_with("base polite"), "{}", server.line);
    assert!(server.log().contains("warning: set: the set in it is not served"), "{}", server.log());
}

#[test]
fn d3_a_set_called_base_is_refused_and_never_listed_twice() {
    let place = Place::new();
    place.done(&train(""));
    copy(&place, "out/adapter", "sets/base");
    let error = place.refused("serve --model model --port 0 --adapters sets");
    assert!(
        error.contains("sets/base: `base` is the name of the model without adapters"),
        "{error}"
    );
    fs::rename(place.path("sets/base"), place.path("sets/polite")).unwrap();
    let server = Running::new(&place, "--adapters sets");
    // It comes later.
    copy(&place, "out/adapter", "sets/base");
    let names: Vec<_> = server.models().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["base", "polite"]);
}

#[test]
fn d3_sets_that_are_broken_are_told_from_the_start() {
    let place = Place::new();
    place.done(&train(""));
    copy(&place, "out/adapter", "sets/good");
    copy(&place, "out/adapter", "sets/broken");
    place.write("sets/broken/adapter_model.safetensors", "nothing");
    // One of another model.
    let qwen = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/llama/fixtures/qwen3/adapter");
    place.write(
        "sets/misfit/adapter_config.json",
        fs::read(qwen.join("adapter_config.json")).unwrap(),
    );
    let weights = fs::read(qwen.join("adapter_model.safetensors")).unwrap();
    place.write("sets/misfit/adapter_model.safetensors", weights);

    let server = Running::new(&place, "--adapters sets");
    let log = server.log();
    for name in ["broken", "misfit"] {
        let lines =
            log.lines().filter(|it| it.starts_with(&format!("warning: adapters `{name}`: ")));
        assert_eq!(lines.count(), 1, "{log}");
    }
    let with_problems = || {
        let models = server.models().into_iter().filter(|(_, problem)| problem.is_some());
        models.map(|(name, _)| name).collect::<Vec<_>>()
    };
    assert_eq!(
        (with_problems(), server.problems()),
        (vec!["broken".into(), "misfit".into()], "2".into())
    );
    let problem =
        server.models().into_iter().find(|(name, _)| name == "broken").unwrap().1.unwrap();
    assert!(problem.contains("sets/broken/adapter_model.safetensors"), "{problem}");
    assert_eq!(server.ask("broken"), Err(problem));
    server.ask("good").unwrap();

    // One that is mended is no problem any more, though nobody asks for it.
    copy(&place, "out/adapter", "sets/broken");
    assert_eq!((with_problems(), server.problems()), (vec!["misfit".into()], "1".into()));
    server.ask("broken").unwrap();

    // A set that breaks goes on as it was, and that is told.
    place.write("sets/good/adapter_model.safetensors", "nothing");
    server.ask("good").unwrap();
    let (name, problem) = server.models().into_iter().find(|(name, _)| name == "good").unwrap();
    assert!(
        problem.is_some_and(|it| it.contains("the set that was there before answers")),
        "{name}"
    );
    assert_eq!(server.problems(), "2");
    let log = server.log();
    assert_eq!(
        log.lines().filter(|it| it.starts_with("warning: adapters `good`: ")).count(),
        1,
        "{log}"
    );
    assert!(log.contains("adapters `broken`: the problem is gone"), "{log}");
}

#[test]
fn d3_a_set_that_no_batch_can_hold_is_told_from_the_start() {
    let place = Place::new();
    place.done(&train(""));
    copy(&place, "out/adapter", "sets/good");
    place.done(&train("--relative dora --out other"));
    copy(&place, "other/adapter", "sets/dora");
    let server = Running::new(&place, "--adapters sets");
    let told = server.log();
    let line = told.lines().find(|it| it.starts_with("warning: adapters `dora`: "));
    assert!(line.is_some_and(|it| it.contains("DoRA's magnitudes")), "{told}");
    let problem = server.models().into_iter().find(|(name, _)| name == "dora").unwrap().1.unwrap();
    // In words of the program, not of the library.
    assert!(problem.contains("`burn-lora merge`") && !problem.contains("base.switch"), "{problem}");
    assert_eq!(server.problems(), "1");
    assert_eq!(server.ask("dora"), Err(problem));
    server.ask("good").unwrap();
    place.done("merge --model model --adapter sets/dora --out merged");
    // One that can be served takes its place.
    copy(&place, "out/adapter", "sets/dora");
    assert_eq!(server.problems(), "0");
    server.ask("dora").unwrap();
}

#[test]
fn d3_sets_that_break_or_come_broken_are_told_before_they_are_asked_for() {
    let place = Place::new();
    place.done(&train(""));
    copy(&place, "out/adapter", "sets/good");
    copy(&place, "out/adapter", "sets/other");
    let server = Running::new(&place, "--adapters sets");
    assert_eq!(server.problems(), "0");
    place.write("sets/good/adapter_model.safetensors", "nothing");
    let with_problems = || {
        let models = server.models().into_iter().filter(|(_, problem)| problem.is_some());
        models.map(|(name, _)| name).collect::<Vec<_>>()
    };
    assert_eq!((with_problems(), server.problems()), (vec!["good".into()], "1".into()));
    copy(&place, "sets/good", "sets/new");
    assert_eq!(
        (with_problems(), server.problems()),
        (vec!["good".into(), "new".into()], "2".into())
    );
    let log = server.log();
    for name in ["good", "new"] {
        let lines =
            log.lines().filter(|it| it.starts_with(&format!("warning: adapters `{name}`: ")));
        assert_eq!(lines.count(), 1, "{log}");
    }
    copy(&place, "out/adapter", "sets/good");
    fs::remove_dir_all(place.path("sets/new")).unwrap();
    assert_eq!((with_problems(), server.problems()), (vec![], "0".into()));
}

#[test]
fn d6_a_server_tells_of_sets_for_another_base() {
    let place = Place::new();
    place.done(&train(""));
    copy(&place, "out/adapter", "sets/good");
    let mut config = place.json("sets/good/adapter_config.json");
    config["base_model_name_or_path"] = json!("org/other");
    copy(&place, "out/adapter", "sets/others");
    place.write("sets/others/adapter_config.json", config.to_string());
    let server = Running::new(&place, "--adapters sets");
    server.ask("others").unwrap();
    let log = server.log();
    let warnings: Vec<_> = log.lines().filter(|line| line.starts_with("warning: ")).collect();
    let expected = "warning: sets/others: the adapters name `org/other` as their base, and the model is `model`";
    assert_eq!(warnings, [expected]);
}
