//! A YAML document as a tree that remembers its lines, so that every complaint can name one.
//!
//! It knows no file and no key: that belongs to those who read the tree.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_saphyr::Spanned;

/// How many lines of comments may stand together: a file of settings is mostly such.
const COMMENTS_MAX: usize = 10_000;

/// The text is not YAML, or more of it than is sensible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Error {
    /// Where, when that is known.
    pub line: Option<usize>,
    /// What is wrong.
    pub reason: String,
}

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// The line, from 1.
    pub line: usize,
    /// The value.
    pub content: Content,
}

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Nothing, a truth value, a number or a text, and how it was written.
    Scalar(Value, String),
    /// A sequence.
    List(Vec<Node>),
    /// A mapping, in the order of the file.
    Map(Vec<Entry>),
}

/// A key of a mapping.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Where the key stands.
    pub line: usize,
    /// Its value.
    pub node: Node,
}

impl Node {
    /// The value without its lines.
    pub fn to_json(&self) -> Value {
        match &self.content {
            Content::Scalar(value, _) => value.clone(),
            Content::List(nodes) => nodes.iter().map(Self::to_json).collect(),
            Content::Map(entries) => Value::Object(entries.iter().map(|entry| (entry.key.clone(), entry.node.to_json())).collect()),
        }
    }

    /// The value of a key, when this is a mapping that has it.
    pub fn get(&self, key: &str) -> Option<&Self> {
        self.entries().iter().find(|entry| entry.key == key).map(|entry| &entry.node)
    }

    /// The keys of a mapping; none of anything else.
    pub fn entries(&self) -> &[Entry] {
        match &self.content {
            Content::Map(entries) => entries,
            _ => &[],
        }
    }

    /// Whether nothing was given.
    pub fn is_null(&self) -> bool {
        matches!(&self.content, Content::Scalar(Value::Null, _))
    }

    /// A scalar as a text: numbers and truth values as they were written.
    pub fn text(&self) -> Option<&str> {
        match &self.content {
            Content::Scalar(Value::String(text), _) => Some(text),
            Content::Scalar(Value::Null, _) => None,
            Content::Scalar(_, written) => Some(written),
            _ => None,
        }
    }

    fn note_written(&mut self, lines: &mut Lines<'_>) {
        match &mut self.content {
            Content::Scalar(Value::Number(_) | Value::Bool(_), written) => {
                let (line, column) = written.split_once(' ').unwrap_or_default();
                let place = |text: &str| text.parse::<usize>().unwrap_or(1).saturating_sub(1);
                let rest = lines.from(place(line), place(column));
                *written = rest.split([',', ']', '}', ' ', '\t', '\r']).next().unwrap_or_default().to_owned();
            }
            Content::Scalar(..) => {}
            Content::List(nodes) => nodes.iter_mut().for_each(|node| node.note_written(lines)),
            Content::Map(entries) => entries.iter_mut().for_each(|entry| entry.node.note_written(lines)),
        }
    }
}

/// Reads one document; an empty one is nothing.
///
/// # Errors
/// The text is not YAML, a key stands twice, or aliases and nesting would cost too much.
pub fn parse(text: &str) -> Result<Node, Error> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: 200_000, max_nodes: 100_000, max_depth: 48, max_documents: 1, max_aliases: 1000,
            max_buffered_comment_events: COMMENTS_MAX,
        },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 20_000, max_replay_stack_depth: 16 },
        with_snippet: false,
        // More than 96 comments in a row would be an error, and a configuration may be nothing but comments.
        emit_comments: false,
    };
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        return Ok(Node { line: 1, content: Content::Scalar(Value::Null, String::new()) });
    }
    let mut node: Node = serde_saphyr::from_str_with_options(text, options).map_err(|error| refused(&error))?;
    node.note_written(&mut Lines::of(text));
    Ok(node)
}

/// A text by lines and characters. Finding places one after the other costs no more than reading the text once.
struct Lines<'a> {
    lines: Vec<&'a str>,
    /// The line that was looked at last, and where each of its characters begins.
    known: Option<(usize, Vec<usize>)>,
}

impl<'a> Lines<'a> {
    fn of(text: &'a str) -> Self {
        // A carriage return alone ends a line as well, in YAML.
        let lines = text.split('\n').flat_map(|line| line.strip_suffix('\r').unwrap_or(line).split('\r')).collect();
        Self { lines, known: None }
    }

    /// What stands in a line from a character on, both counted from 0.
    fn from(&mut self, line: usize, column: usize) -> &'a str {
        let Some(text) = self.lines.get(line) else { return "" };
        if self.known.as_ref().is_none_or(|(known, _)| *known != line) {
            self.known = Some((line, text.char_indices().map(|(at, _)| at).collect()));
        }
        let at = self.known.as_ref().and_then(|(_, places)| places.get(column));
        at.map_or("", |at| &text[*at..])
    }
}

fn refused(error: &serde_saphyr::Error) -> Error {
    let line = error.location().and_then(|location| usize::try_from(location.line()).ok()).filter(|line| *line > 0);
    let text = error.without_snippet().to_string();
    let reason = text.rsplit_once(" at line ").filter(|_| line.is_some()).map_or(text.as_str(), |(reason, _)| reason);
    let reason = reason.strip_prefix("error: ").unwrap_or(reason);
    Error { line, reason: format!("broken YAML: {}", reason.lines().next().unwrap_or_default()) }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Content>::deserialize(deserializer)?;
        let line = usize::try_from(spanned.referenced.line()).unwrap_or_default();
        let content = match spanned.value {
            // Where a number begins is kept for a moment: `note_written` looks it up.
            Content::Scalar(value @ (Value::Number(_) | Value::Bool(_)), _) => {
                Content::Scalar(value, format!("{} {}", spanned.defined.line(), spanned.defined.column()))
            }
            other => other,
        };
        Ok(Self { line, content })
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl AnyValue {
    fn scalar<E>(value: impl Into<Value>) -> Result<Content, E> {
        Ok(Content::Scalar(value.into(), String::new()))
    }
}

impl<'de> Visitor<'de> for AnyValue {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }
    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Content, E> {
        Self::scalar(value)
    }
    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Content, E> {
        Self::scalar(value)
    }
    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Content, E> {
        Self::scalar(value)
    }
    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Content, E> {
        Self::scalar(value)
    }
    fn visit_i128<E: de::Error>(self, value: i128) -> Result<Content, E> {
        Self::scalar(value.to_string())
    }
    fn visit_u128<E: de::Error>(self, value: u128) -> Result<Content, E> {
        Self::scalar(value.to_string())
    }
    fn visit_str<E: de::Error>(self, value: &str) -> Result<Content, E> {
        Self::scalar(value)
    }
    fn visit_bytes<E: de::Error>(self, value: &[u8]) -> Result<Content, E> {
        Self::scalar(String::from_utf8_lossy(value).into_owned())
    }
    fn visit_unit<E: de::Error>(self) -> Result<Content, E> {
        Self::scalar(Value::Null)
    }
    fn visit_none<E: de::Error>(self) -> Result<Content, E> {
        Self::scalar(Value::Null)
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Content, D::Error> {
        Content::deserialize(deserializer)
    }
    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<Content, D::Error> {
        Content::deserialize(deserializer)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = seq.next_element::<Node>()? {
            nodes.push(node);
        }
        Ok(Content::List(nodes))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Content, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            let line = usize::try_from(key.referenced.line()).unwrap_or_default();
            entries.push(Entry { key: key.value, line, node: map.next_value()? });
        }
        Ok(Content::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn values_know_their_lines() {
        let text = "\na: 1\nb:\n  c: [x, 007]\n  d:\n    - true\n    - 1.50\n";
        let node = parse(text).unwrap();
        assert_eq!(node.to_json(), json!({"a": 1, "b": {"c": ["x", 7.0], "d": [true, 1.5]}}));
        let b = node.get("b").unwrap();
        assert_eq!(node.entries()[1].line, 3);
        assert_eq!(b.entries()[0].line, 4);
        let Content::List(c) = &b.get("c").unwrap().content else { panic!("not a list") };
        assert_eq!((c[1].line, c[1].text()), (4, Some("007")));
        let Content::List(d) = &b.get("d").unwrap().content else { panic!("not a list") };
        assert_eq!((d[1].line, d[1].text()), (7, Some("1.50")));
    }

    #[test]
    fn an_alias_stands_for_what_was_written() {
        let node = parse("limit: &n 007\nother: *n\n").unwrap();
        assert_eq!(node.get("other").and_then(Node::text), Some("007"));
    }

    #[test]
    fn a_long_line_takes_no_longer_than_short_ones() {
        let took = |separator: &str| {
            let text = format!("é: [{}]", vec!["1"; 30_000].join(separator));
            let began = std::time::Instant::now();
            assert!(parse(&text).is_ok());
            began.elapsed()
        };
        let (long, short) = (took(","), took(",\n "));
        assert!(long < short * 10 + std::time::Duration::from_secs(1), "{long:?} in one line, {short:?} in many");
    }

    #[test]
    fn lines_may_end_as_they_did_on_old_machines() {
        for text in ["a: x\r\nb: 007\r\n", "a: x\rb: 007\r", "a: x\r\r\nb: 007"] {
            let node = parse(text).unwrap();
            assert_eq!(node.get("b").and_then(Node::text), Some("007"), "{text:?}");
        }
    }

    #[test]
    fn broken_yaml_names_its_line() {
        let error = parse("a: 1\nb: [x\nc: 2\n").unwrap_err();
        assert!(error.line.is_some(), "{error:?}");
        let error = parse("a: 1\nb: 2\na: 3\n").unwrap_err();
        assert_eq!(error.line, Some(3), "{error:?}");
        assert!(!error.reason.contains("line"), "{error:?}");
    }

    #[test]
    fn a_section_of_nothing_but_comments_is_nothing() {
        let node = parse(&format!("a:\n{}b: 1\n", "  # c: 1\n".repeat(2000))).unwrap();
        assert!(node.get("a").is_some_and(Node::is_null) && node.get("b").is_some());
    }

    #[test]
    fn a_bomb_is_refused() {
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for n in 1..12 {
            let aliases = vec![format!("*a{}", n - 1); 10].join(",");
            bomb.push_str(&format!("a{n}: &a{n} [{aliases}]\n"));
        }
        assert!(parse(&bomb).is_err());
        assert!(parse(&"[".repeat(100_000)).is_err());
        assert!(parse(&"{a: ".repeat(100_000)).is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[ -~\\n\\té]{0,80}") {
            let _ = parse(&text);
        }
    }
}
