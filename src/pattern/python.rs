//! Python's regular expressions, as PEFT's files have them for names of modules.
//!
//! Python and the crate `regex` read some expressions differently: to Python `[[:alpha:]]` is a set of six characters
//! with a `]` behind it, and `a++` does not give back what it took. So they are read here, by the rules of Python's
//! `re`. Only whether a name matches is asked, never what a group matched. For that it is enough to follow the set of
//! places that a match can have reached, which takes no exponential time.

mod parse;
mod set;
mod text;

use set::{Set, is_word};
use text::{Places, Text};

/// The most characters of an expression. No name needs as many, and it may come from a file.
const LONGEST: usize = 20_000;

/// The most work of an expression, in steps for one name.
const MOST_WORK: usize = 1 << 19;

/// The places of a name for which work is counted. Few names of layers are longer, and files with such are refused.
const PLACES: usize = 500;

/// An expression of Python's `re`.
#[derive(Clone, Debug)]
pub(crate) struct Expression {
    root: Node,
    sets: Vec<Set>,
    /// How many steps a match takes at most.
    work: usize,
    plain: Option<Plain>,
}

/// An expression of mere characters. Most are names, one for each layer, and to compare them takes far less time.
#[derive(Clone, Debug)]
struct Plain {
    /// Whether it begins with `^`.
    is_anchored: bool,
    /// `None` stands for any character.
    characters: Vec<Option<char>>,
}

#[derive(Clone, Debug)]
enum Node {
    /// A character of the set with this index.
    One(usize),
    At(Place),
    Sequence(Vec<Node>),
    Either(Vec<Node>),
    /// A repeated character. If it is possessive, it takes all that it can, and gives nothing back.
    Run {
        set: usize,
        least: usize,
        most: usize,
        is_possessive: bool,
    },
    Repeat {
        node: Box<Node>,
        least: usize,
        most: usize,
    },
    Ahead {
        node: Box<Node>,
        is_negated: bool,
    },
    Behind {
        node: Box<Node>,
        width: usize,
        is_negated: bool,
    },
}

/// A place between characters.
#[derive(Clone, Copy, Debug)]
enum Place {
    Start,
    /// The end, or before a line break at the end.
    End,
    VeryEnd,
    Boundary,
    NoBoundary,
}

impl Expression {
    /// The expression by itself, as in `re.fullmatch`. The error says what is wrong with it.
    pub fn new(source: &str) -> Result<Self, String> {
        Self::parsed(source, true)
    }

    /// The expression as a part of a larger one, in which flags such as `(?i)` cannot be set for the whole.
    pub fn part(source: &str) -> Result<Self, String> {
        Self::parsed(source, false)
    }

    fn parsed(source: &str, takes_flags: bool) -> Result<Self, String> {
        if source.chars().nth(LONGEST).is_some() {
            return Err(format!("it exceeds size limit: it has more than {LONGEST} characters"));
        }
        let (root, sets) = parse::parse(source, takes_flags)?;
        // A set is looked up for each character of a name, which takes less than a step.
        let lookups = sets.iter().map(|set| set.items.len().saturating_mul(PLACES / 8));
        let work = lookups.fold(root.work().of(PLACES), usize::saturating_add);
        if work > MOST_WORK {
            return Err("to match it takes too long: it is nested or repeated too often".to_owned());
        }
        let plain = Plain::of(&root, &sets);
        Ok(Self { root, sets, work, plain })
    }

    /// Whether all of them can be tried on each of many names, as one of them may be.
    pub fn are_short_work<'e>(mut all: impl Iterator<Item = &'e Self>) -> bool {
        let add = |sum: usize, it: &Self| {
            Some(sum + if it.plain.is_some() { 0 } else { it.work }).filter(|it| *it <= MOST_WORK)
        };
        all.try_fold(0, add).is_some()
    }

    /// Whether the whole name matches, as in `re.fullmatch`.
    pub fn matches(&self, name: &str) -> bool {
        let text = Text::new(name, &self.sets);
        self.root.ends(&text, text.places([0])).has(text.characters.len())
    }

    /// Whether the name, or whole segments at its end, match: PEFT's `re.match(rf"(.*\.)?({source})$", name)`.
    pub fn matches_end(&self, name: &str) -> bool {
        match &self.plain {
            Some(plain) if !name.contains('\n') => {
                plain.matches_end(&name.chars().collect::<Vec<_>>())
            }
            _ => {
                let text = Text::new(name, &self.sets);
                let ends = self.root.ends(&text, text.places(segments(&text.characters)));
                !text.at(ends, Place::End).is_empty()
            }
        }
    }

    /// The first number that is a whole segment right behind a match of whole segments, and that others follow.
    pub fn number_behind(&self, name: &str) -> Option<usize> {
        let text = Text::new(name, &self.sets);
        segments(&text.characters).into_iter().find_map(|start| {
            let ends = self.root.ends(&text, text.places([start]));
            ends.iter().rev().find_map(|end| {
                let rest: String = text.characters.get(end..)?.iter().collect();
                let (number, _) = rest.strip_prefix('.')?.split_once('.')?;
                number.parse().ok()
            })
        })
    }
}

/// The places where segments begin, up to a line break.
fn segments(text: &[char]) -> Vec<usize> {
    let line = text.split(|it| *it == '\n').next().unwrap_or_default();
    let dots = line.iter().enumerate().filter(|(_, it)| **it == '.');
    [0].into_iter().chain(dots.map(|(dot, _)| dot + 1)).collect()
}

impl Plain {
    fn of(root: &Node, sets: &[Set]) -> Option<Self> {
        let nodes = match root {
            Node::Sequence(nodes) => nodes.as_slice(),
            node => std::slice::from_ref(node),
        };
        let is_anchored = matches!(nodes.first(), Some(Node::At(Place::Start)));
        let character = |node: &Node| match node {
            Node::One(set) if sets[*set].is_any() => Some(None),
            Node::One(set) => sets[*set].single().map(Some),
            _ => None,
        };
        let characters = nodes[usize::from(is_anchored)..].iter().map(character);
        Some(Self { is_anchored, characters: characters.collect::<Option<_>>()? })
    }

    fn matches_end(&self, text: &[char]) -> bool {
        let Some(start) = text.len().checked_sub(self.characters.len()) else { return false };
        let begins_a_segment = start == 0 || !self.is_anchored && text[start - 1] == '.';
        let mut pairs = self.characters.iter().zip(&text[start..]);
        begins_a_segment
            && pairs.all(|(expected, it)| expected.is_none_or(|expected| expected == *it))
    }
}

impl Place {
    fn is_at(self, text: &[char], at: usize) -> bool {
        let is_boundary = || {
            let before = at.checked_sub(1).is_some_and(|before| is_word(text[before]));
            before != text.get(at).is_some_and(|it| is_word(*it))
        };
        match self {
            Self::Start => at == 0,
            Self::End => at == text.len() || text[at..] == ['\n'],
            Self::VeryEnd => at == text.len(),
            Self::Boundary => is_boundary(),
            Self::NoBoundary => !text.is_empty() && !is_boundary(),
        }
    }
}

impl Node {
    /// The places that a match which is at one of these can be at behind the node.
    fn ends(&self, text: &Text, from: Places) -> Places {
        if from.is_empty() {
            return from;
        }
        let leads_on = |node: &Self, at: usize| !node.ends(text, text.places([at])).is_empty();
        match self {
            Self::One(set) => text.step(&from, *set),
            Self::At(place) => text.at(from, *place),
            Self::Sequence(nodes) => nodes.iter().fold(from, |from, node| node.ends(text, from)),
            Self::Either(nodes) => nodes.iter().fold(text.none(), |mut found, node| {
                found.add(&node.ends(text, from.clone()));
                found
            }),
            Self::Run { set, least, most, is_possessive } => {
                text.run(from, *set, [*least, *most], *is_possessive)
            }
            Self::Repeat { node, least, most } => {
                let mut current = from;
                for _ in 0..*least {
                    let next = node.ends(text, current.clone());
                    if next == current {
                        // So it stays, however often it is repeated.
                        break;
                    }
                    current = next;
                }
                let mut found = text.none();
                for _ in *least..*most {
                    found.add(&current);
                    // Further rounds from a place that is known lead to none but those that are.
                    current = node.ends(text, current).without(&found);
                    if current.is_empty() {
                        break;
                    }
                }
                found.add(&current);
                found
            }
            Self::Ahead { node, is_negated } => {
                text.places(from.iter().filter(|at| leads_on(node, *at) != *is_negated))
            }
            Self::Behind { node, width, is_negated } => {
                let fits = |at: &usize| {
                    let start = at.checked_sub(*width);
                    start.is_some_and(|start| leads_on(node, start)) != *is_negated
                };
                text.places(from.iter().filter(fits))
            }
        }
    }

    /// How many characters a match has, at least and at most.
    fn widths(&self) -> [usize; 2] {
        match self {
            Self::One(_) => [1, 1],
            Self::At(_) | Self::Ahead { .. } | Self::Behind { .. } => [0, 0],
            Self::Sequence(nodes) => nodes
                .iter()
                .map(Self::widths)
                .fold([0, 0], |[a, b], [c, d]| [a.saturating_add(c), b.saturating_add(d)]),
            Self::Either(nodes) => {
                let widths = || nodes.iter().map(Self::widths);
                [
                    widths().map(|[least, _]| least).min().unwrap_or_default(),
                    widths().map(|[_, most]| most).max().unwrap_or_default(),
                ]
            }
            Self::Run { least, most, .. } => [*least, *most],
            Self::Repeat { node, least, most } => {
                let [one, other] = node.widths();
                [one.saturating_mul(*least), other.saturating_mul(*most)]
            }
        }
    }

    /// What a match takes at most. A step may be for all places at once.
    fn work(&self) -> Work {
        match self {
            Self::One(_) => Work { once: 1, ..Work::NONE },
            Self::At(_) => Work { once: 1, for_each: 1, ..Work::NONE },
            Self::Sequence(nodes) => nodes.iter().map(Self::work).fold(Work::NONE, Work::then),
            Self::Either(nodes) => {
                let nothing = Work { behind_each: 0, ..Work::NONE };
                nodes.iter().map(Self::work).fold(nothing, Work::or)
            }
            Self::Run { least, most, .. } => {
                let is_short = *most < 8;
                let once = 1 + PLACES.min(if *most == usize::MAX { *least } else { *most });
                let behind_each = if is_short { most - least + 1 } else { 0 };
                Work { once, behind_each, behind: if is_short { 0 } else { PLACES }, for_each: 0 }
            }
            Self::Repeat { node, most: 0 | 1, .. } => node.work().or(Work::NONE),
            Self::Repeat { node, least, most } => {
                let work = node.work();
                let longest = 1 + PLACES / node.widths()[0].max(1);
                let [first, others] = [*least, most - least].map(|it| it.min(longest));
                // The rounds that must be may each come to all places. The others come to each place once.
                let once = work.of(PLACES).saturating_mul(first);
                let once = once.saturating_add(work.once.saturating_mul(others));
                let once = once.saturating_add(work.for_each.saturating_mul(PLACES));
                Work { once, for_each: 0, behind: PLACES, behind_each: 0 }
            }
            Self::Ahead { node, .. } | Self::Behind { node, .. } => {
                Work { once: 1, for_each: node.work().of(1), ..Work::NONE }
            }
        }
    }
}

/// How many steps a match takes at most.
#[derive(Clone, Copy)]
struct Work {
    once: usize,
    /// The steps for each place that it is at.
    for_each: usize,
    /// At how many places it is then, whatever those before were.
    behind: usize,
    /// At how many places it is then for each that it was at.
    behind_each: usize,
}

impl Work {
    const NONE: Self = Self { once: 0, for_each: 0, behind: 0, behind_each: 1 };

    /// The steps from so many places.
    fn of(self, places: usize) -> usize {
        self.for_each.saturating_mul(places).saturating_add(self.once)
    }

    /// The same, if it is not at more places than there are.
    fn bounded(self) -> Self {
        match self.behind_each < 8 && self.behind < PLACES {
            true => self,
            false => Self { behind: PLACES, behind_each: 0, ..self },
        }
    }

    fn then(self, next: Self) -> Self {
        let each = next.for_each.saturating_mul(self.behind_each);
        let work = Self {
            once: self.once.saturating_add(next.of(self.behind)),
            for_each: self.for_each.saturating_add(each),
            behind: next.behind + next.behind_each * self.behind,
            behind_each: next.behind_each * self.behind_each,
        };
        work.bounded()
    }

    fn or(self, other: Self) -> Self {
        let work = Self {
            once: self.once.saturating_add(other.once).saturating_add(1),
            for_each: self.for_each.saturating_add(other.for_each),
            behind: self.behind + other.behind,
            behind_each: self.behind_each + other.behind_each,
        };
        work.bounded()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use serde_json::Value;

    use super::*;

    /// What `tests/peft/make_regex_fixtures.py` wrote.
    fn fixture() -> Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peft/fixtures/expressions.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn s5_names_match_as_in_python_or_the_expression_is_refused() {
        let fixture = fixture();
        let names: Vec<_> =
            fixture["names"].as_array().unwrap().iter().map(|it| it.as_str().unwrap()).collect();
        let mut unsupported = 0;
        for case in fixture["expressions"].as_array().unwrap() {
            let source = case["expression"].as_str().unwrap();
            let mut check = |read: Result<Expression, String>,
                             expected: &Value,
                             matches: fn(&Expression, &str) -> bool| {
                let expression = match read {
                    Ok(expression) => expression,
                    Err(_) if expected.is_null() => return,
                    Err(problem) => {
                        assert!(problem.contains("supported"), "{source}: {problem}");
                        unsupported += 1;
                        return;
                    }
                };
                assert!(!expected.is_null(), "Python refuses `{source}`");
                let expected = expected.as_array().unwrap();
                for (index, name) in names.iter().enumerate() {
                    let expected = expected.contains(&Value::from(index));
                    assert_eq!(matches(&expression, name), expected, "`{source}` and {name:?}");
                }
            };
            check(Expression::new(source), &case["whole"], Expression::matches);
            check(Expression::part(source), &case["end"], Expression::matches_end);
        }
        assert!(unsupported < 60, "{unsupported} expressions are not supported");
    }

    #[test]
    fn s5_the_error_says_what_is_wrong() {
        for (source, problem) in [
            ("a(", "a `(` is not closed"),
            ("a)", "a `)` is not opened"),
            ("(?<n>a)", "`(?<n` is not a group of Python's"),
            (r"(a)\1", r"references to groups, such as `\1`, are not supported"),
            ("(?>a)", "atomic groups `(?>` are not supported"),
            ("(?x)a", "the flag `x` is not supported"),
            ("a(?i)b", "flags for the whole expression must come first in it"),
            (r"\z", r"Python does not know `\z`"),
            (r"\p{L}", r"Python does not know `\p`"),
            ("a**", "a repetition is repeated"),
        ] {
            assert_eq!(Expression::new(source).unwrap_err(), problem, "{source}");
        }
    }

    #[test]
    fn what_takes_long_is_refused() {
        assert!(Expression::new(&"(".repeat(60)).unwrap_err().contains("nested too deeply"));
        let nested = |depth: usize| format!("{}a{}", "(".repeat(depth), "b?)+".repeat(depth));
        Expression::new(&nested(1)).unwrap();
        assert!(Expression::new(&nested(4)).unwrap_err().contains("takes too long"));
        Expression::new(r"(?:layers\.(?:\d+\.)+)*(?:(?!vision|audio).)*_proj").unwrap();
        assert!(Expression::new(&"a".repeat(30_000)).unwrap_err().contains("size limit"));
        // What a backtracking matcher would not finish.
        let name = "a".repeat(400);
        assert!(!Expression::new("(a|aa)+b").unwrap().matches(&name));
        assert!(Expression::new("(?:a?){4000000000}").unwrap().matches(&name));
    }

    #[test]
    fn h15_long_expressions_that_repeat_are_refused_or_take_no_time() {
        let many = |one: &str, count: usize| vec![one; count].join("|");
        let ranges: String = ('\u{100}'..'\u{4000}').collect();
        let names: Vec<_> = (0..7).map(|index| format!("{}{index}", "a.b".repeat(140))).collect();
        let start = Instant::now();
        for count in [1, 30, 100, 300, 3000] {
            for source in [
                format!("({})+", many(".|.?", count)),
                format!("(?:{})*", many("(?:a.)?|.+", count)),
                format!("((a{})+b?)+", "b?".repeat(count)),
                format!(".*({}).*", many(".?", count)),
                format!(".*(?!{}).*", many(".{9}x", count)),
                format!("(?:[{ranges}].?)+"),
            ] {
                let Ok(expression) = Expression::new(&source) else { continue };
                for name in &names {
                    expression.matches(name);
                }
            }
        }
        // Less than a second, even without optimization. It was minutes.
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        let slow = Expression::new(&format!("({})+", many(".|.?", 3000)));
        assert!(slow.unwrap_err().contains("takes too long"));
        // Long lists of layers, in which nothing is repeated, are short work.
        let list: Vec<_> = (0..600).map(|it| format!("layers.{it}.mlp.fc")).collect();
        let list = Expression::new(&format!(r".*\.({})", list.join("|"))).unwrap();
        assert!(list.matches("model.layers.599.mlp.fc"));
        assert!(!list.matches("model.layers.600.mlp.fc"));
    }

    #[test]
    fn the_number_behind_a_name_is_the_first() {
        let number =
            |source: &str, name: &str| Expression::part(source).unwrap().number_behind(name);
        assert_eq!(number("layers", "model.layers.3.attn.2.q"), Some(3));
        assert_eq!(number("layers", "layers.12.q"), Some(12));
        assert_eq!(number("h|layers", "x.h.1.layers.2.q"), Some(1));
        assert_eq!(number("layers", "layers.q.3.x"), None);
        assert_eq!(number("layers", "layers.3"), None);
        assert_eq!(number(".*", "a.b.7.c"), Some(7));
    }
}
