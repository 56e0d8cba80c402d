//! What a program says to us between its output: `::lattice {...}` lines.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::model::budget::Usage;
use crate::model::event::{Failure, FailureKind, Needs};
use crate::model::time::{Span, Timestamp};

const MARK: &[u8] = b"::lattice ";

/// One well-formed line.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Directive {
    /// How far it is.
    pub(super) progress: Option<(Option<f64>, Option<String>)>,
    /// What it asks.
    pub(super) escalate: Option<Escalate>,
    /// What it has used since it said so last.
    pub(super) usage: Option<Usage>,
    /// The JSON of its result.
    pub(super) result: Option<String>,
    /// Why it cannot deliver.
    pub(super) fail: Option<Fail>,
}

/// Why a program cannot deliver, in its own words.
#[derive(Debug, Deserialize, PartialEq)]
pub(super) struct Fail {
    /// The kind.
    #[serde(default)]
    pub(super) kind: FailKind,
    /// A sentence for whoever reads the status.
    #[serde(default)]
    pub(super) message: Option<String>,
    /// How long to wait before another attempt; of a quota, until it is there again.
    #[serde(default)]
    pub(super) retry_after: Option<Span>,
    /// The same, as a moment.
    #[serde(default)]
    pub(super) retry_at: Option<Timestamp>,
}

/// The kinds of failure that a program may claim.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FailKind {
    /// Trying again may help.
    #[default]
    Transient,
    /// What it uses has no quota left.
    Quota,
    /// It can do nothing with its input.
    BadInput,
    /// It tried, and gave up.
    GaveUp,
}

impl Fail {
    /// The failure that it stands for.
    pub(super) fn into_failure(self, now: Timestamp) -> Failure {
        let (kind, text) = match self.kind {
            FailKind::Transient => (FailureKind::Transient, "the program asked to be tried again"),
            FailKind::Quota => (FailureKind::Quota, "the program is out of quota"),
            FailKind::BadInput => (FailureKind::BadInput, "the program can do nothing with its input"),
            FailKind::GaveUp => (FailureKind::GaveUp, "the program gave up"),
        };
        let retry_at = self.retry_at.or(self.retry_after.map(|span| now.after(span.get())));
        let message = self.message.filter(|message| !message.trim().is_empty()).unwrap_or_else(|| text.to_owned());
        Failure { retry_at, ..Failure::new(kind, message) }
    }
}

/// A question.
#[derive(Debug, Deserialize, PartialEq)]
pub(super) struct Escalate {
    /// What it needs.
    pub(super) reason: String,
    /// What helps to decide.
    #[serde(default)]
    pub(super) context: Value,
    /// Who is asked.
    #[serde(default)]
    pub(super) needs: Needs,
}

#[derive(Deserialize)]
struct Written<'a> {
    progress: Option<f64>,
    message: Option<String>,
    escalate: Option<Escalate>,
    usage: Option<Usage>,
    #[serde(borrow, default, deserialize_with = "present")]
    result: Option<&'a RawValue>,
    fail: Option<Fail>,
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

impl Directive {
    /// Reads a line that begins with the mark; the error says what is wrong with it.
    pub(super) fn parse(line: &[u8]) -> Result<Self, String> {
        let body = line.strip_prefix(MARK).unwrap_or(line);
        let written: Written<'_> = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        if written.usage.is_some_and(|usage| !usage.is_plausible()) {
            return Err("usage has a number that cannot be meant: tokens and turns are counts, cost_usd is 0 or more".into());
        }
        let pct = written.progress.filter(|pct| !pct.is_nan()).map(|pct| pct.clamp(0.0, 100.0));
        let directive = Self {
            progress: (pct.is_some() || written.message.is_some()).then_some((pct, written.message)),
            escalate: written.escalate,
            usage: written.usage,
            result: written.result.map(|raw| raw.get().to_owned()),
            fail: written.fail,
        };
        match directive == Self::default() {
            true => Err("it has none of progress, message, escalate, usage, result and fail".into()),
            false => Ok(directive),
        }
    }
}

/// A stretch of output.
#[derive(Debug, PartialEq)]
pub(super) enum Piece<'a> {
    /// Ordinary output.
    Text(Cow<'a, [u8]>),
    /// A whole line that begins with the mark, its end included.
    Marked(Vec<u8>),
}

/// Takes output apart, whatever the chunks it comes in.
pub(super) struct Splitter {
    line_max: usize,
    within_line: bool,
    held: Vec<u8>,
}

impl Splitter {
    /// Lines longer than this are ordinary output.
    pub(super) fn new(line_max: usize) -> Self {
        Self { line_max, within_line: false, held: Vec::new() }
    }

    /// The next stretch; `None` when all of the chunk is used up.
    pub(super) fn next<'a>(&mut self, chunk: &mut &'a [u8]) -> Option<Piece<'a>> {
        while !chunk.is_empty() {
            if self.within_line || (self.held.is_empty() && chunk[0] != MARK[0]) {
                let (text, rest) = chunk.split_at(ordinary(chunk));
                *chunk = rest;
                self.within_line = text.last() != Some(&b'\n');
                return Some(Piece::Text(Cow::Borrowed(text)));
            }
            let end = chunk.iter().position(|byte| *byte == b'\n').map(|at| at + 1);
            let (line, rest) = chunk.split_at(end.unwrap_or(chunk.len()));
            *chunk = rest;
            self.held.extend_from_slice(line);
            let fits = self.held.len() <= self.line_max.saturating_add(1);
            if fits && end.is_some() && self.held.starts_with(MARK) {
                return Some(Piece::Marked(std::mem::take(&mut self.held)));
            }
            let open = end.is_none() && (self.held.starts_with(MARK) || MARK.starts_with(&self.held));
            if !(fits && open) {
                self.within_line = end.is_none();
                return Some(Piece::Text(Cow::Owned(std::mem::take(&mut self.held))));
            }
        }
        None
    }

    /// What is left when the output ends.
    pub(super) fn end(&mut self) -> Option<Piece<'static>> {
        let held = std::mem::take(&mut self.held);
        match held.is_empty() {
            true => None,
            false if held.starts_with(MARK) => Some(Piece::Marked(held)),
            false => Some(Piece::Text(Cow::Owned(held))),
        }
    }
}

/// How far ordinary output goes: to the end, or to a line that may be marked.
fn ordinary(chunk: &[u8]) -> usize {
    if !chunk.contains(&MARK[0]) {
        return chunk.len();
    }
    let marked = |at: &usize| chunk[*at] == b'\n' && chunk.get(at + 1) == Some(&MARK[0]);
    (0..chunk.len()).find(marked).map_or(chunk.len(), |at| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::command::fuzz::split;
    use proptest::prelude::*;

    #[test]
    fn marked_lines_are_told_from_output() {
        let output = b"a\n::lattice 1\r\n::latticeX\n :lattice 2\nb ::lattice 3\n::\n::lattice 4";
        let (text, marked) = split(output, 1, 100);
        assert_eq!(text, b"a\n::latticeX\n :lattice 2\nb ::lattice 3\n::\n");
        assert_eq!(marked, [b"::lattice 1\r\n".to_vec(), b"::lattice 4".to_vec()]);
    }

    #[test]
    fn a_line_that_is_too_long_is_output() {
        let long = format!("::lattice {}\n::lattice 1\n", "x".repeat(50));
        for step in [1, 7, 1000] {
            let (text, marked) = split(long.as_bytes(), step, 30);
            assert_eq!(text, &long.as_bytes()[..61]);
            assert_eq!(marked, [b"::lattice 1\n".to_vec()]);
        }
    }

    proptest! {
        #[test]
        fn chunks_make_no_difference(output in "(::lattice |::|lattice|\n|\r\n|x|:| ){0,40}", step in 1usize..12) {
            prop_assert_eq!(split(output.as_bytes(), step, 24), split(output.as_bytes(), output.len(), 24));
        }
    }

    #[test]
    fn directives_are_read_leniently_but_not_guessed() {
        let parse = |text: &str| Directive::parse(format!("::lattice {text}\r\n").as_bytes());
        assert_eq!(parse(r#"{"progress": 150, "message": "m", "else": 1}"#).unwrap().progress, Some((Some(100.0), Some("m".into()))));
        assert_eq!(parse(r#"{"progress": -1}"#).unwrap().progress, Some((Some(0.0), None)));
        assert_eq!(parse(r#"{"result": null}"#).unwrap().result.as_deref(), Some("null"));
        let asked = parse(r#"{"escalate": {"reason": "r", "needs": "human"}}"#).unwrap().escalate.unwrap();
        assert_eq!((asked.reason.as_str(), asked.context, asked.needs), ("r", Value::Null, Needs::Human));
        let used = parse(r#"{"usage": {"tokens": 12, "cost_usd": 0.5}}"#).unwrap().usage.unwrap();
        assert_eq!(used, Usage { tokens: 12, cost_usd: 0.5, turns: 0 });
        for bad in [r#"{"tokens": -1}"#, r#"{"tokens": 1.5}"#, r#"{"cost_usd": -0.1}"#, r#"{"turns": "one"}"#, r#"{"tokens": 1e15}"#, "5"] {
            assert!(parse(&format!(r#"{{"usage": {bad}}}"#)).is_err(), "{bad} was taken");
        }
        let failed = |text: &str| parse(text).unwrap().fail.unwrap().into_failure(Timestamp::from_millis(1000));
        assert_eq!(failed(r#"{"fail": {}}"#), Failure::new(FailureKind::Transient, "the program asked to be tried again"));
        let quota = failed(r#"{"fail": {"kind": "quota", "message": "429", "retry_after": "30s"}}"#);
        assert_eq!((quota.kind, quota.message.as_str(), quota.retry_at), (FailureKind::Quota, "429", Some(Timestamp::from_millis(31_000))));
        for bad in [r#"{"fail": {"kind": "bored"}}"#, r#"{"fail": {"retry_after": "soon"}}"#, r#"{"fail": "x"}"#] {
            assert!(parse(bad).is_err(), "{bad:?} was taken");
        }
        for bad in ["", "{", "[]", "{}", r#"{"progress": "50"}"#, r#"{"escalate": {}}"#, r#"{"progress": NaN}"#, "{\"message\": \"\u{0}"] {
            assert!(parse(bad).is_err(), "{bad:?} was taken");
        }
    }
}
