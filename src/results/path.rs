//! JSON paths: which of them can be followed while the document streams by.

use std::ops::Range;

use super::{Error, shown};
use crate::model::size::Size;

const PATH_MAX: usize = 4 << 10;
const STEPS_MAX: usize = 64;
const NESTING_MAX: usize = 16;
const COPIES_MAX: u32 = 256;
const DESCENTS_MAX: usize = 2;
/// The largest document that is held in memory for a path that can't be streamed.
const DOCUMENT_MAX: Size = Size::mib(8);
/// The largest one for a path that may look through the whole document again for each value.
const DOCUMENT_MAX_COSTLY: Size = Size::kib(64);
/// Integers beyond this are no part of RFC 9535.
const INTEGER_MAX: u64 = (1 << 53) - 1;

/// A JSON path.
pub(super) enum Path {
    /// Names, indices, slices and wildcards from the start on: evaluated as the document streams by.
    Streams(Steps),
    /// Anything else: needs the document.
    Document {
        path: Box<serde_json_path::JsonPath>,
        /// The largest document that it may be tried on.
        max: Size,
        /// At most one value can match.
        singular: bool,
    },
}

/// A path made of single steps.
pub(super) struct Steps {
    pub(super) text: String,
    pub(super) steps: Vec<Step>,
    /// Where each step stands in the text.
    pub(super) spans: Vec<Range<usize>>,
}

/// One step down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Name(String),
    Index(u64),
    /// Counted from the end, from 1.
    Last,
    Slice {
        from: u64,
        to: u64,
        step: u64,
    },
    All,
}

impl Step {
    /// Whether it leads to at most one value.
    pub(super) fn is_single(&self) -> bool {
        matches!(self, Self::Name(_) | Self::Index(_) | Self::Last)
    }
}

pub(super) fn parse(text: &str) -> Result<Path, Error> {
    let refused = |reason: String| Error::Path { path: shown(text), reason };
    let text = text.trim();
    if text.len() > PATH_MAX {
        return Err(refused(format!("it has {} bytes, and at most {PATH_MAX} are taken", text.len())));
    }
    if !text.starts_with('$') {
        return Err(refused("it does not begin with $, the document".into()));
    }
    let simple = Parser { text, at: 1 }.steps();
    let singular = simple.as_ref().is_some_and(|simple| simple.steps.iter().all(Step::is_single));
    match simple {
        Some(steps) if !steps.steps.contains(&Step::Last) => Ok(Path::Streams(steps)),
        _ => {
            let max = weigh(text).map_err(|reason| refused(reason.into()))?;
            match serde_json_path::JsonPath::parse(text) {
                Ok(path) => Ok(Path::Document { path: Box::new(path), max, singular }),
                Err(error) => Err(refused(format!("{} at position {}", error.message(), error.position() + 1))),
            }
        }
    }
}

/// How large a document a path may be tried on, so that no path takes all memory or forever: its parts multiply each other.
fn weigh(text: &str) -> Result<Size, &'static str> {
    let bare = without_quotes(text);
    let (mut copies, mut nested) = (1u32, vec![1]);
    for c in bare.chars() {
        match c {
            '[' | '(' => nested.push(1),
            ']' | ')' => copies = copies.saturating_mul(nested.pop().unwrap_or(1)),
            ',' => nested.iter_mut().last().into_iter().for_each(|alternatives| *alternatives += 1),
            _ => {}
        }
        if nested.len() > NESTING_MAX {
            return Err("its brackets nest too deep");
        }
    }
    let descents = bare.matches("..").count();
    if copies > COPIES_MAX {
        return Err("its alternatives multiply to too many; name fewer in each pair of brackets");
    }
    if descents > DESCENTS_MAX {
        return Err("it descends (..) too often; name the steps in between");
    }
    let filter = bare.split_once('?').map_or("", |(_, filter)| filter);
    let again = ["$", "..", "match", "search"].iter().any(|part| filter.contains(part));
    Ok(if again || descents > 1 || copies > 16 { DOCUMENT_MAX_COSTLY } else { DOCUMENT_MAX })
}

/// The path without what stands in quotes.
fn without_quotes(text: &str) -> String {
    let (mut bare, mut quote, mut escaped) = (String::new(), None, false);
    for c in text.chars() {
        match quote {
            None if matches!(c, '"' | '\'') => quote = Some(c),
            None => bare.push(c),
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            Some(_) => {}
        }
    }
    bare
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    /// All steps; `None` when the path is of another kind, or none at all.
    fn steps(mut self) -> Option<Steps> {
        let (mut steps, mut spans) = (Vec::new(), Vec::new());
        loop {
            self.blank();
            if self.at == self.text.len() {
                return Some(Steps { text: self.text.to_owned(), steps, spans });
            }
            let start = self.at;
            steps.push(self.step()?);
            spans.push(start..self.at);
            if steps.len() > STEPS_MAX {
                return None;
            }
        }
    }

    fn step(&mut self) -> Option<Step> {
        if self.eat('.') {
            if self.eat('*') {
                return Some(Step::All);
            }
            return self.shorthand().map(Step::Name);
        }
        self.eat('[').then_some(())?;
        self.blank();
        let step = match self.rest().chars().next()? {
            '*' => {
                self.at += 1;
                Step::All
            }
            quote @ ('"' | '\'') => Step::Name(self.quoted(quote)?),
            _ => self.counted()?,
        };
        self.blank();
        self.eat(']').then_some(step)
    }

    /// An index or a slice.
    fn counted(&mut self) -> Option<Step> {
        if self.rest().starts_with('-') {
            self.at += 1;
            return self.integer().filter(|n| *n > 0).map(|_| Step::Last);
        }
        let from = self.integer();
        self.blank();
        if !self.eat(':') {
            return from.map(Step::Index);
        }
        self.blank();
        let to = self.integer();
        self.blank();
        let mut step = None;
        if self.eat(':') {
            self.blank();
            step = self.integer();
            // Of width zero it selects nothing; that is not worth a walk of ours.
            if step == Some(0) {
                return None;
            }
        }
        Some(Step::Slice { from: from.unwrap_or(0), to: to.unwrap_or(u64::MAX), step: step.unwrap_or(1) })
    }

    fn integer(&mut self) -> Option<u64> {
        let digits = self.rest().bytes().take_while(u8::is_ascii_digit).count();
        let text = &self.rest()[..digits];
        let number = text.parse().ok().filter(|n| *n <= INTEGER_MAX && (text == "0" || !text.starts_with('0')))?;
        self.at += digits;
        Some(number)
    }

    fn shorthand(&mut self) -> Option<String> {
        let first = |c: char| c.is_ascii_alphabetic() || c == '_' || !c.is_ascii();
        let rest = self.rest();
        rest.chars().next().filter(|c| first(*c))?;
        let length = rest.find(|c: char| !first(c) && !c.is_ascii_digit()).unwrap_or(rest.len());
        let name = rest[..length].to_owned();
        self.at += length;
        Some(name)
    }

    /// A quoted name; JSON knows its escapes, all but the one of the single quote.
    fn quoted(&mut self, quote: char) -> Option<String> {
        let mut json = String::from('"');
        let mut chars = self.rest().char_indices().skip(1);
        while let Some((place, c)) = chars.next() {
            match c {
                '\\' => match chars.next()?.1 {
                    '\'' if quote == '\'' => json.push('\''),
                    '"' if quote == '\'' => return None,
                    escaped => json.extend(['\\', escaped]),
                },
                '"' if quote == '\'' => json.push_str("\\\""),
                c if c == quote => {
                    self.at += place + 1;
                    json.push('"');
                    return serde_json::from_str(&json).ok();
                }
                c => json.push(c),
            }
        }
        None
    }

    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn eat(&mut self, wanted: char) -> bool {
        let found = self.rest().starts_with(wanted);
        self.at += usize::from(found) * wanted.len_utf8();
        found
    }

    fn blank(&mut self) {
        self.at += self.rest().bytes().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r')).count();
    }
}
