//! The syntax of Python's `re`.

use std::collections::HashMap;

use super::{
    Node, Place,
    set::{Class, Item, Set},
};

/// How deep groups may be nested.
const DEEPEST: usize = 50;

/// Reads the expression. The error says what is wrong with it, or what of it is not supported.
/// Nodes name a set by its index.
pub(super) fn parse(source: &str, takes_flags: bool) -> Result<(Node, Vec<Set>), String> {
    let flags = Flags::default();
    let source = source.chars().collect();
    let (names, sets) = (Vec::new(), HashMap::new());
    let mut parser = Parser { source, at: 0, flags, takes_flags, depth: 0, names, sets };
    let node = parser.either()?;
    if parser.peek().is_some() {
        return Err("a `)` is not opened".to_owned());
    }
    let mut sets: Vec<_> = parser.sets.into_iter().collect();
    sets.sort_unstable_by_key(|(_, index)| *index);
    Ok((node, sets.into_iter().map(|(set, _)| set).collect()))
}

#[derive(Clone, Copy, Default)]
struct Flags {
    ignores_case: bool,
    dot_is_all: bool,
}

struct Parser {
    source: Vec<char>,
    at: usize,
    flags: Flags,
    /// Whether flags can be set for the whole expression here: only where it begins.
    takes_flags: bool,
    depth: usize,
    /// The names of groups.
    names: Vec<String>,
    /// The sets, each once, and their indices.
    sets: HashMap<Set, usize>,
}

impl Parser {
    fn of_set(&mut self, set: Set) -> Node {
        let next = self.sets.len();
        Node::One(*self.sets.entry(set).or_insert(next))
    }

    fn peek(&self) -> Option<char> {
        self.source.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += 1;
        Some(next)
    }

    fn skip(&mut self, expected: char) -> bool {
        let is_next = self.peek() == Some(expected);
        self.at += usize::from(is_next);
        is_next
    }

    /// The characters up to `end`, which is skipped.
    fn until(&mut self, end: char) -> Result<String, String> {
        let mut text = String::new();
        loop {
            match self.next() {
                None => return Err(format!("`{end}` is missing")),
                Some(it) if it == end => return Ok(text),
                Some(it) => text.push(it),
            }
        }
    }

    fn either(&mut self) -> Result<Node, String> {
        let mut nodes = vec![self.sequence()?];
        while self.skip('|') {
            self.takes_flags = false;
            nodes.push(self.sequence()?);
        }
        Ok(if nodes.len() == 1 { nodes.remove(0) } else { Node::Either(nodes) })
    }

    fn sequence(&mut self) -> Result<Node, String> {
        let mut nodes = Vec::new();
        while let Some(character) = self.peek().filter(|it| !"|)".contains(*it)) {
            self.at += 1;
            match character {
                '*' => self.repeat(&mut nodes, 0, usize::MAX)?,
                '+' => self.repeat(&mut nodes, 1, usize::MAX)?,
                '?' => self.repeat(&mut nodes, 0, 1)?,
                '{' => match self.counts()? {
                    Some([least, most]) => self.repeat(&mut nodes, least, most)?,
                    // Anything else in braces is what it says.
                    None => nodes.push(self.character('{')),
                },
                '(' => nodes.extend(self.group()?),
                '^' => nodes.push(Node::At(Place::Start)),
                '$' => nodes.push(Node::At(Place::End)),
                '.' if self.flags.dot_is_all => {
                    nodes.push(self.of_set(Set { is_negated: true, ..Set::default() }));
                }
                '.' => {
                    let set = Set::of([Item::Range('\n', '\n')]);
                    nodes.push(self.of_set(Set { is_negated: true, ..set }));
                }
                '[' => nodes.push(self.set()?),
                '\\' => nodes.push(self.escape()?),
                character => nodes.push(self.character(character)),
            }
            self.takes_flags &= nodes.is_empty();
        }
        Ok(Node::Sequence(nodes))
    }

    fn character(&mut self, character: char) -> Node {
        self.one(Item::Range(character, character))
    }

    fn one(&mut self, item: Item) -> Node {
        self.of_set(Set { ignores_case: self.flags.ignores_case, ..Set::of([item]) })
    }

    /// The counts of a repetition behind its `{`, or nothing, and nothing read, if there are none.
    fn counts(&mut self) -> Result<Option<[usize; 2]>, String> {
        let start = self.at;
        if self.peek() == Some('}') {
            return Ok(None);
        }
        let digits = |parser: &mut Self| {
            let mut digits = String::new();
            while let Some(digit) = parser.peek().filter(char::is_ascii_digit) {
                digits.push(digit);
                parser.at += 1;
            }
            digits
        };
        let least = digits(self);
        let most = if self.skip(',') { digits(self) } else { least.clone() };
        if !self.skip('}') {
            self.at = start;
            return Ok(None);
        }
        let number = |digits: &str, missing: usize| match digits {
            "" => Ok(missing),
            digits => {
                let number = digits.parse().ok().filter(|it| *it < u32::MAX as usize);
                number.ok_or_else(|| format!("the number of repetitions `{digits}` is too large"))
            }
        };
        let [least, most] = [number(&least, 0)?, number(&most, usize::MAX)?];
        if most < least {
            return Err(format!("`{{{least},{most}}}` repeats more often at least than at most"));
        }
        Ok(Some([least, most]))
    }

    /// Repeats the last node.
    fn repeat(&mut self, nodes: &mut Vec<Node>, least: usize, most: usize) -> Result<(), String> {
        let is_possessive = !self.skip('?') && self.skip('+');
        let node = match nodes.pop() {
            None | Some(Node::At(_)) => return Err("there is nothing to repeat".to_owned()),
            Some(Node::Repeat { .. } | Node::Run { .. }) => {
                return Err("a repetition is repeated".to_owned());
            }
            Some(node) => node,
        };
        nodes.push(match node {
            Node::One(set) => Node::Run { set, least, most, is_possessive },
            _ if is_possessive => {
                return Err("possessive repetitions of groups are not supported".to_owned());
            }
            node => Node::Repeat { node: Box::new(node), least, most },
        });
        Ok(())
    }

    /// The group behind its `(`; nothing, if it is a comment or sets flags.
    fn group(&mut self) -> Result<Option<Node>, String> {
        let (mut flags, mut look) = (self.flags, None);
        if self.skip('?') {
            let unknown = |kind: &str| Err(format!("`(?{kind}` is not a group of Python's"));
            match self.next() {
                None => return unknown(""),
                Some(':') => {}
                Some('P') => match self.next() {
                    Some('<') => self.name()?,
                    Some('=') => return Err("references to groups are not supported".to_owned()),
                    other => return unknown(&format!("P{}", other.unwrap_or_default())),
                },
                Some('#') => return self.until(')').map(|_| None),
                Some('=') => look = Some((false, false)),
                Some('!') => look = Some((false, true)),
                Some('<') => match self.next() {
                    Some('=') => look = Some((true, false)),
                    Some('!') => look = Some((true, true)),
                    other => return unknown(&format!("<{}", other.unwrap_or_default())),
                },
                Some('(') => return Err("conditions `(?(` are not supported".to_owned()),
                Some('>') => return Err("atomic groups `(?>` are not supported".to_owned()),
                Some(it) if it.is_ascii_alphabetic() || it == '-' => {
                    self.at -= 1;
                    let is_whole = self.flags(&mut flags)?;
                    if is_whole {
                        if !self.takes_flags {
                            return Err(
                                "flags for the whole expression must come first in it".to_owned()
                            );
                        }
                        self.flags = flags;
                        return Ok(None);
                    }
                }
                Some(other) => return unknown(&other.to_string()),
            }
        }
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err("its groups are nested too deeply".to_owned());
        }
        self.takes_flags = false;
        let outer = std::mem::replace(&mut self.flags, flags);
        let node = self.either()?;
        self.flags = outer;
        if !self.skip(')') {
            return Err("a `(` is not closed".to_owned());
        }
        self.depth -= 1;
        let Some((is_behind, is_negated)) = look else {
            // A group of its own, so that it can be repeated whatever it holds.
            return Ok(Some(Node::Sequence(vec![node])));
        };
        if !is_behind {
            return Ok(Some(Node::Ahead { node: Box::new(node), is_negated }));
        }
        let [width, most] = node.widths();
        if width != most {
            return Err("what a look behind matches must have one length".to_owned());
        }
        Ok(Some(Node::Behind { node: Box::new(node), width, is_negated }))
    }

    /// The name of a group, up to its `>`.
    fn name(&mut self) -> Result<(), String> {
        let name = self.until('>')?;
        let is_name = name.chars().all(|it| it.is_alphanumeric() || it == '_')
            && name.starts_with(|it: char| it.is_alphabetic() || it == '_');
        if !is_name || self.names.contains(&name) {
            return Err(format!("`{name}` is no name of a group, or that of two"));
        }
        self.names.push(name);
        Ok(())
    }

    /// Reads flags up to the `:` of a group, or to a `)`, which sets them for the whole.
    fn flags(&mut self, flags: &mut Flags) -> Result<bool, String> {
        let (mut value, start) = (true, self.at);
        loop {
            match self.next() {
                Some('i') => flags.ignores_case = value,
                Some('s') => flags.dot_is_all = value,
                // What text is by itself.
                Some('u') if value => {}
                Some('-') if value => value = false,
                Some(':') if self.source[self.at - 2] != '-' => return Ok(false),
                Some(')') if value && self.at > start + 1 => return Ok(true),
                Some(flag) if "aLmx".contains(flag) => {
                    return Err(format!("the flag `{flag}` is not supported"));
                }
                _ => return Err("a group has flags that Python does not know".to_owned()),
            }
        }
    }

    /// The set behind its `[`. Only ranges, escapes and a `^` mean more than the character itself.
    fn set(&mut self) -> Result<Node, String> {
        const OPEN: &str = "a `[` is not closed";
        let is_negated = self.skip('^');
        let mut items = Vec::new();
        loop {
            let first = match self.next().ok_or(OPEN)? {
                ']' if !items.is_empty() => break,
                '\\' => self.escape_in_set()?,
                it => Item::Range(it, it),
            };
            if !self.skip('-') {
                items.push(first);
                continue;
            }
            let last = match self.next().ok_or(OPEN)? {
                ']' => {
                    items.extend([first, Item::Range('-', '-')]);
                    break;
                }
                '\\' => self.escape_in_set()?,
                it => Item::Range(it, it),
            };
            match (first, last) {
                (Item::Range(first, _), Item::Range(last, _)) if first <= last => {
                    items.push(Item::Range(first, last));
                }
                _ => return Err("a range of characters has no beginning or end".to_owned()),
            }
        }
        Ok(self.of_set(Set { items, is_negated, ignores_case: self.flags.ignores_case }))
    }

    fn escape_in_set(&mut self) -> Result<Item, String> {
        let character = match self.next() {
            Some('b') => '\x08',
            Some(digit @ '0'..='7') => self.octal(digit, 2)?,
            other => return self.common_escape(other),
        };
        Ok(Item::Range(character, character))
    }

    fn escape(&mut self) -> Result<Node, String> {
        let place = match self.next() {
            Some('A') => Place::Start,
            Some('Z') => Place::VeryEnd,
            Some('b') => Place::Boundary,
            Some('B') => Place::NoBoundary,
            Some('0') => {
                let character = self.octal('0', 2)?;
                return Ok(self.character(character));
            }
            Some(digit @ '1'..='9') => {
                let three = self.source.get(self.at - 1..self.at + 2);
                if three.is_some_and(|it| it.iter().all(|it| it.is_digit(8))) {
                    let character = self.octal(digit, 2)?;
                    return Ok(self.character(character));
                }
                return Err(format!(
                    "references to groups, such as `\\{digit}`, are not supported"
                ));
            }
            other => {
                let item = self.common_escape(other)?;
                return Ok(self.one(item));
            }
        };
        Ok(Node::At(place))
    }

    /// An escape that means the same in a set and outside.
    fn common_escape(&mut self, character: Option<char>) -> Result<Item, String> {
        let class = |class| Ok(Item::Class(class, character.is_some_and(|it| it.is_uppercase())));
        let character = match character {
            None => return Err("it ends with a `\\`".to_owned()),
            Some('d' | 'D') => return class(Class::Digit),
            Some('s' | 'S') => return class(Class::Space),
            Some('w' | 'W') => return class(Class::Word),
            Some('n') => '\n',
            Some('t') => '\t',
            Some('r') => '\r',
            Some('f') => '\x0c',
            Some('v') => '\x0b',
            Some('a') => '\x07',
            Some('x') => self.hexadecimal(2)?,
            Some('u') => self.hexadecimal(4)?,
            Some('U') => self.hexadecimal(8)?,
            Some('N') => return Err("characters by name, `\\N`, are not supported".to_owned()),
            Some(it) if it.is_ascii_alphanumeric() => {
                return Err(format!("Python does not know `\\{it}`"));
            }
            Some(it) => it,
        };
        Ok(Item::Range(character, character))
    }

    fn hexadecimal(&mut self, digits: usize) -> Result<char, String> {
        let found: String = self.source[self.at..].iter().take(digits).collect();
        self.at += found.chars().count();
        let is_whole = found.len() == digits && found.bytes().all(|it| it.is_ascii_hexdigit());
        let number = is_whole.then(|| u32::from_str_radix(&found, 16).ok()).flatten();
        number.and_then(char::from_u32).ok_or_else(|| format!("`{found}` is not a character"))
    }

    /// A character by its number in base 8, of which `first` is the first digit, and at most `more` follow.
    fn octal(&mut self, first: char, more: usize) -> Result<char, String> {
        let mut number = first.to_digit(8).unwrap_or_default();
        for _ in 0..more {
            let Some(digit) = self.peek().and_then(|it| it.to_digit(8)) else { break };
            self.at += 1;
            number = 8 * number + digit;
        }
        u8::try_from(number).map(char::from).map_err(|_| format!("`\\{number:o}` is no character"))
    }
}
