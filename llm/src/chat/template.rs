//! Chat templates. They are written for the Jinja of Python's `transformers`: they call Python's methods, break off
//! loops, refuse conversations with `raise_exception`, ask for the day with `strftime_now`, and mark what the
//! assistant said with `{% generation %}`.

use std::fmt::Write;

use chrono::{Local, NaiveDateTime};
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::Serialize;

use super::json;
use crate::error::{Context, Result};

/// Tells the local time.
pub(super) type Clock = fn() -> NaiveDateTime;

/// The clock of this machine.
pub(super) fn local() -> NaiveDateTime {
    Local::now().naive_local()
}

/// A chat template.
pub(super) struct Template(Environment<'static>);

const NAME: &str = "chat_template";

impl Template {
    /// Reads a template, to which `clock` tells the time.
    pub(super) fn new(source: &str, clock: Clock) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| {
            Err::<String, _>(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", json::filter);
        environment.add_function("strftime_now", move |format: &str| strftime(clock(), format));
        let source = without_generation(source);
        environment.add_template_owned(NAME, source).context("the chat template")?;
        Ok(Self(environment))
    }

    pub(super) fn render(&self, context: Value) -> Result<String> {
        let rendered = self.0.get_template(NAME).and_then(|it| it.render(context));
        rendered.context("the chat template")
    }
}

/// What a template is told. Without an answer to come, nobody is asked for one. There are no tools and documents, which
/// is told, too: templates take what they were not told of for something.
pub(super) fn conversation(
    messages: &[impl Serialize],
    answer: bool,
    begin: &str,
    end: &str,
) -> Value {
    context! {
        messages => messages,
        add_generation_prompt => answer,
        bos_token => begin,
        eos_token => end,
        tools => (),
        documents => (),
    }
}

/// The time as Python's `strftime` writes it.
fn strftime(time: NaiveDateTime, format: &str) -> std::result::Result<String, Error> {
    let (mut python, mut rust) = (format.chars(), String::new());
    while let Some(it) = python.next() {
        match (it, python.clone().next()) {
            ('%', Some('f')) => rust.push_str("%6f"),
            // Without a time zone, Python writes nothing.
            ('%', Some('z' | 'Z')) => {}
            ('%', Some(other)) => rust.extend(['%', other]),
            ('%', None) => rust.push_str("%%"),
            (other, _) => {
                rust.push(other);
                continue;
            }
        }
        python.next();
    }
    let mut text = String::new();
    write!(text, "{}", time.format(&rust)).map_err(|_| {
        let problem = format!("strftime_now cannot read the format {format:?}");
        Error::new(ErrorKind::InvalidOperation, problem)
    })?;
    Ok(text)
}

/// The template with `with` in place of `generation`: both are scopes, and write what is in them.
fn without_generation(source: &str) -> String {
    let (mut written, mut rest) = (String::new(), source);
    let next = |rest: &str| {
        let tags = [("{%", "%}"), ("{{", "}}"), ("{#", "#}")].into_iter();
        tags.filter_map(|(open, close)| Some((rest.find(open)?, close))).min()
    };
    while let Some((at, close)) = next(rest) {
        let past = |text: &str| rest[at + 2..].find(text).map_or(rest.len(), |it| at + 2 + it);
        let end = (past(close) + close.len()).min(rest.len());
        let (before, tag) = (&rest[..at], &rest[at..end]);
        let name = tag[2..].trim_start_matches(['-', '+']).trim_start();
        let name =
            name.split(|it: char| !it.is_alphanumeric() && it != '_').next().unwrap_or_default();
        written.push_str(before);
        let end = match (close, name) {
            ("%}", "raw") => past("endraw"),
            _ => end,
        };
        match (close, name) {
            ("%}", "generation") => written.push_str(&tag.replacen(name, "with", 1)),
            ("%}", "endgeneration") => written.push_str(&tag.replacen(name, "endwith", 1)),
            _ => written.push_str(&rest[at..end]),
        }
        rest = &rest[end..];
    }
    written + rest
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use chrono::NaiveDate;

    use super::*;

    fn noon() -> NaiveDateTime {
        NaiveDate::from_ymd_opt(2026, 3, 7).unwrap().and_hms_micro_opt(12, 5, 9, 42).unwrap()
    }

    fn rendered(source: &str) -> Result<String> {
        Template::new(source, noon)?.render(context! { items => ["a", "b", "c"] })
    }

    /// The expected texts are those of Jinja 3.1 with the settings and the extensions of `transformers`.
    #[test]
    fn r3_templates_have_the_tags_of_transformers() {
        for (source, expected) in [
            ("{% generation %}a{% endgeneration %}b", "ab"),
            ("{%- generation -%}\n a \n{%- endgeneration -%}\n b", "ab"),
            ("x\n  {% generation %}\n  a\n  {% endgeneration %}\nb", "x\n  a\nb"),
            (
                "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}",
                "21",
            ),
            ("{% for it in items %}{% generation %}{{ it }}{% endgeneration %}{% endfor %}", "abc"),
            (
                "{% for it in items %}{% if it == 'b' %}{% break %}{% endif %}{{ it }}{% endfor %}",
                "a",
            ),
            (
                "{% for it in items %}{% if it == 'b' %}{% continue %}{% endif %}{{ it }}{% endfor %}",
                "ac",
            ),
            ("{% for it in items %}{{ loop.previtem }}{{ loop.nextitem }} {% endfor %}", "b ac b "),
            // None of these are tags.
            ("{# {% generation %} #}a", "a"),
            ("{{ '{% generation %}' }}", "{% generation %}"),
            ("{% raw %}{% generation %}{% endraw %}a", "{% generation %}a"),
            ("generation {% if true %}generation{% endif %}", "generation generation"),
        ] {
            assert_eq!(rendered(source).as_deref(), Ok(expected), "{source}");
        }
        let error = rendered("{% generation %}a").unwrap_err();
        assert!(error.contains("the chat template: syntax error"), "{error}");
        assert!(rendered("{% genre %}").unwrap_err().contains("unknown statement genre"));
        for cut in ["{%", "{{ a", "{% raw", "{% raw %}", "{#", "{% generation"] {
            let _ = rendered(cut);
        }
    }

    /// `transformers` rendered the conversations.
    #[test]
    fn families_render_as_in_transformers() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chat/fixtures/templates.json");
        let fixture: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        let cases = fixture["cases"].as_array().unwrap();
        assert!(cases.len() > 50);
        for case in cases {
            let name = case["name"].as_str().unwrap();
            let source = text(&fixture["templates"][name]).unwrap();
            let messages: Vec<crate::chat::Message> =
                serde_json::from_value(case["messages"].clone()).unwrap();
            let answer = case["answer"].as_bool().unwrap();
            let rendered = Template::new(&source, noon)
                .and_then(|it| it.render(conversation(&messages, answer, "<s>", "</s>")));
            match text(&case["error"]) {
                Some(expected) => {
                    let error = rendered.unwrap_err();
                    assert!(error.contains(&expected), "{name}: {error}");
                }
                None => assert_eq!(rendered.ok(), text(&case["expected"]), "{name}: {messages:?}"),
            }
        }
    }

    /// The expected texts are those of Python's `datetime(2026, 3, 7, 12, 5, 9, 42).strftime`.
    #[test]
    fn r3_templates_ask_for_the_day() {
        for (format, expected) in [
            ("%d %b %Y", "07 Mar 2026"),
            ("%Y-%m-%d", "2026-03-07"),
            ("%B %-d, %Y", "March 7, 2026"),
            ("%A %H:%M:%S.%f", "Saturday 12:05:09.000042"),
            ("%I %p %j %y %%z%z%Z.", "12 PM 066 26 %z."),
            ("%", "%"),
        ] {
            let source = format!("{{{{ strftime_now('{format}') }}}}");
            assert_eq!(rendered(&source).as_deref(), Ok(expected), "{format}");
        }
        let asks = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}";
        assert_eq!(rendered(asks).as_deref(), Ok("2026"));
        let error = rendered("{{ strftime_now('%Q') }}").unwrap_err();
        assert!(error.contains("cannot read the format \"%Q\""), "{error}");
    }
}
