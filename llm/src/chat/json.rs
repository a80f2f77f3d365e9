//! JSON as Python's `json.dumps` writes it, with spaces after commas and colons.

use std::io;

use minijinja::{Error, ErrorKind, Value, value::Kwargs};
use serde::Serialize;
use serde_json::{
    Serializer,
    ser::{Formatter, PrettyFormatter},
};

/// The filter `tojson` of `transformers`, which escapes no characters of HTML.
pub(super) fn filter(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    // What is not ASCII is written as it is by default.
    if options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false) {
        let problem = "tojson: ensure_ascii=True is not supported";
        return Err(Error::new(ErrorKind::InvalidOperation, problem));
    }
    options.assert_all_used()?;
    let mut bytes = Vec::new();
    let written = match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut bytes, Spaced)),
        Some(indent) => {
            let indent = vec![b' '; indent.min(64)];
            let formatter = PrettyFormatter::with_indent(&indent);
            value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter))
        }
    };
    let told = |problem: String| Error::new(ErrorKind::BadSerialization, problem);
    written.map_err(|error| told(error.to_string()))?;
    String::from_utf8(bytes).map_err(|error| told(error.to_string()))
}

/// A single line.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { to.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { to.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        to.write_all(b": ")
    }
}
