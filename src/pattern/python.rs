//! Python's regular expressions, as PEFT's files have them for names of modules.
//!
//! Python and the crate `regex` read some expressions differently: to Python `[[:alpha:]]` is a set of six characters
//! with a `]` behind it, and `a++` does not give back what it took. So they are read here, by the rules of Python's
//! `re`. Only whether a name matches is asked, never what a group matched. For that it is enough to follow the set of
//! places that a match can have reached, which takes no exponential time.

mod parse;
mod set;

use set::{Set, is_word};

/// The most characters of an expression. No name needs as many, and it may come from a file.
const LONGEST: usize = 20_000;

/// The most work of an expression, in steps for each place of a name.
const MOST_WORK: usize = 1 << 21;

/// How many times an unbounded repetition, or a look around, counts as work.
const ROUNDS: usize = 64;

/// An expression of Python's `re`.
#[derive(Clone, Debug)]
pub(crate) struct Expression {
    root: Node,
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
    One(Set),
    At(Place),
    Sequence(Vec<Node>),
    Either(Vec<Node>),
    /// A repeated character. If it is possessive, it takes all that it can, and gives nothing back.
    Run {
        set: Set,
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
        let root = parse::parse(source, takes_flags)?;
        if root.work() > MOST_WORK {
            return Err("its repetitions are nested too deeply".to_owned());
        }
        let plain = Plain::of(&root);
        Ok(Self { root, plain })
    }

    /// Whether the whole name matches, as in `re.fullmatch`.
    pub fn matches(&self, name: &str) -> bool {
        let text: Vec<_> = name.chars().collect();
        self.root.ends(&text, vec![0]).contains(&text.len())
    }

    /// Whether the name, or whole segments at its end, match: PEFT's `re.match(rf"(.*\.)?({source})$", name)`.
    pub fn matches_end(&self, name: &str) -> bool {
        let text: Vec<_> = name.chars().collect();
        match &self.plain {
            Some(plain) if !text.contains(&'\n') => plain.matches_end(&text),
            _ => {
                let ends = self.root.ends(&text, segments(&text));
                ends.iter().any(|end| Place::End.is_at(&text, *end))
            }
        }
    }

    /// The first number that is a whole segment right behind a match of whole segments, and that others follow.
    pub fn number_behind(&self, name: &str) -> Option<usize> {
        let text: Vec<_> = name.chars().collect();
        segments(&text).into_iter().find_map(|start| {
            let ends = self.root.ends(&text, vec![start]);
            ends.into_iter().rev().find_map(|end| {
                let rest: String = text.get(end..)?.iter().collect();
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
    fn of(root: &Node) -> Option<Self> {
        let nodes = match root {
            Node::Sequence(nodes) => nodes.as_slice(),
            node => std::slice::from_ref(node),
        };
        let is_anchored = matches!(nodes.first(), Some(Node::At(Place::Start)));
        let character = |node: &Node| match node {
            Node::One(set) if set.is_any() => Some(None),
            Node::One(set) => set.single().map(Some),
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
    /// The places that a match which is at one of these can be at behind the node. Both are in order.
    fn ends(&self, text: &[char], from: Vec<usize>) -> Vec<usize> {
        let leads_on = |node: &Self, at: usize| !node.ends(text, vec![at]).is_empty();
        match self {
            Self::One(set) => {
                let fits = |at: &usize| text.get(*at).is_some_and(|it| set.has(*it));
                from.into_iter().filter(fits).map(|at| at + 1).collect()
            }
            Self::At(place) => from.into_iter().filter(|at| place.is_at(text, *at)).collect(),
            Self::Sequence(nodes) => {
                nodes.iter().fold(
                    from,
                    |from, node| {
                        if from.is_empty() { from } else { node.ends(text, from) }
                    },
                )
            }
            Self::Either(nodes) => nodes
                .iter()
                .fold(Vec::new(), |found, node| union(found, node.ends(text, from.clone()))),
            Self::Run { set, least, most, is_possessive } => {
                run(text, from, set, [*least, *most], *is_possessive)
            }
            Self::Repeat { node, least, most } => {
                let (mut current, mut found) = (from, Vec::new());
                for count in 0.. {
                    if count >= *least {
                        found = union(found, current.clone());
                    }
                    if count >= *most {
                        break;
                    }
                    let next = node.ends(text, current.clone());
                    if next == current {
                        // So it stays, however often it is repeated.
                        found = union(found, current);
                        break;
                    }
                    let is_known = next.iter().all(|at| found.binary_search(at).is_ok());
                    if next.is_empty() || count >= *least && is_known {
                        break;
                    }
                    current = next;
                }
                found
            }
            Self::Ahead { node, is_negated } => {
                from.into_iter().filter(|at| leads_on(node, *at) != *is_negated).collect()
            }
            Self::Behind { node, width, is_negated } => {
                let fits = |at: &usize| {
                    let start = at.checked_sub(*width);
                    start.is_some_and(|start| leads_on(node, start)) != *is_negated
                };
                from.into_iter().filter(fits).collect()
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

    /// How many steps a match takes for each place of a name, roughly.
    fn work(&self) -> usize {
        match self {
            Self::One(_) | Self::At(_) | Self::Run { .. } => 1,
            Self::Sequence(nodes) | Self::Either(nodes) => {
                nodes.iter().map(Self::work).fold(1, usize::saturating_add)
            }
            Self::Repeat { node, most, .. } => node.work().saturating_mul(ROUNDS.min(*most)),
            Self::Ahead { node, .. } | Self::Behind { node, .. } => {
                node.work().saturating_mul(ROUNDS)
            }
        }
    }
}

/// The places behind a run of characters of the set.
fn run(
    text: &[char],
    from: Vec<usize>,
    set: &Set,
    [least, most]: [usize; 2],
    is_possessive: bool,
) -> Vec<usize> {
    let (mut found, mut reached) = (Vec::new(), 0);
    for start in from {
        reached = reached.max(start);
        while text.get(reached).is_some_and(|it| set.has(*it)) {
            reached += 1;
        }
        let last = reached.min(start.saturating_add(most));
        let first = if is_possessive { last } else { start.saturating_add(least) };
        if last >= start.saturating_add(least) {
            let next = found.last().map_or(0, |it| it + 1);
            found.extend(first.max(next)..=last);
        }
    }
    found
}

/// The places of both, in order.
fn union(mut one: Vec<usize>, other: Vec<usize>) -> Vec<usize> {
    if one.is_empty() {
        return other;
    }
    one.extend(other);
    one.sort_unstable();
    one.dedup();
    one
}

#[cfg(test)]
mod tests {
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
        Expression::new(&nested(2)).unwrap();
        assert!(Expression::new(&nested(4)).unwrap_err().contains("nested too deeply"));
        assert!(Expression::new(&"a".repeat(30_000)).unwrap_err().contains("size limit"));
        // What a backtracking matcher would not finish.
        let name = "a".repeat(400);
        assert!(!Expression::new("(a|aa)+b").unwrap().matches(&name));
        assert!(Expression::new("(?:a?){4000000000}").unwrap().matches(&name));
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
