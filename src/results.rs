//! Results of any size: their digest, their beginning, and selections of lines, matches, JSON paths and bytes.
//!
//! A result is read as a stream and never held as a whole, save for the few JSON paths that need the document. This module
//! does not know works: whoever asks brings the output.

mod bytes;
mod grep;
mod json;
mod jsonpath;
mod lines;
mod path;
mod source;

use std::sync::Arc;

use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;

use self::source::Source;
use crate::config;
use crate::model::hex::hex;
use crate::model::output::{Media, Output};
use crate::model::size::Size;
use crate::model::time::Span;
use crate::transport::{self, Blobs};

/// Which part of a result is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// Lines, counted from 1, the last one included.
    Lines {
        /// The first line.
        from: u64,
        /// The last line.
        to: u64,
    },
    /// Lines that match a regular expression.
    Grep(String),
    /// Values at a JSON path.
    JsonPath(String),
    /// Bytes, counted from 0, the last one included.
    Bytes {
        /// The first byte.
        from: u64,
        /// The last byte.
        to: u64,
    },
}

/// A part of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// The part.
    pub text: String,
    /// How large the whole result is.
    pub total_bytes: u64,
    /// More was selected than the text holds.
    pub truncated: bool,
    /// What was left out and how to get it, or why there is nothing.
    pub note: Option<String>,
}

/// A result from its first byte on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Whole {
    /// The text, or its beginning.
    pub text: String,
    /// What kind of text it is.
    pub media: Media,
    /// How large the whole result is.
    pub total_bytes: u64,
    /// The result goes on after the text.
    pub truncated: bool,
}

/// Why nothing was selected.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Not a range of lines.
    #[error("lines {0:?} is no range of lines: write \"10-40\", \"10\" or \"10-\", counted from 1 and the last one included")]
    Lines(String),
    /// Not a range of bytes.
    #[error("bytes {0:?} is no range of bytes: write \"0-1023\", \"512\" or \"512-\", counted from 0 and the last one included")]
    Bytes(String),
    /// Not a regular expression.
    #[error("grep {pattern:?} is no regular expression: {reason}")]
    Pattern {
        /// What was given, or its beginning.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Not a JSON path.
    #[error("jsonpath {path:?} is no JSON path: {reason}; write it like $.items[0].name, $.items[0:10] or $['a name']")]
    Path {
        /// What was given, or its beginning.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The result is text.
    #[error("the result is plain text; use lines, grep or bytes")]
    PlainText,
    /// The result says that it is JSON, and is not.
    #[error("the result is not valid JSON at byte {at}: {reason}; use lines, grep or bytes")]
    NotJson {
        /// Where, from 0.
        at: u64,
        /// What is wrong there.
        reason: String,
    },
    /// The path needs the whole document in memory.
    #[error(
        "the result is {total} bytes, and jsonpath {path:?} works up to {max} only; paths of names, indices, wildcards and slices \
         that count from the start ($.a[0].b, $.items[*].name, $.items[0:10]) work at any size"
    )]
    TooLarge {
        /// What was given, or its beginning.
        path: String,
        /// How large the result is.
        total: u64,
        /// How large it may be.
        max: Size,
    },
    /// The selection gave no answer in time.
    #[error("the selection took longer than {0} (results.search_timeout) without an answer; use a simpler pattern or path, or bytes")]
    Slow(Span),
    /// The bytes of the result can't be had.
    #[error(transparent)]
    Store(#[from] transport::Error),
    /// Reading the result failed half way.
    #[error("the result cannot be read: {0}")]
    Read(Arc<str>),
}

impl Selector {
    /// Reads `"10-40"`, `"10"` or `"10-"`.
    ///
    /// # Errors
    /// `Lines`.
    pub fn lines(text: &str) -> Result<Self, Error> {
        let bad = || Error::Lines(shown(text));
        let (from, to) = range(text).filter(|(from, _)| *from > 0).ok_or_else(bad)?;
        Ok(Self::Lines { from, to })
    }

    /// Reads `"0-1023"`, `"512"` or `"512-"`.
    ///
    /// # Errors
    /// `Bytes`.
    pub fn bytes(text: &str) -> Result<Self, Error> {
        let (from, to) = range(text).ok_or_else(|| Error::Bytes(shown(text)))?;
        Ok(Self::Bytes { from, to })
    }

    /// Takes a regular expression that every line is searched for.
    ///
    /// # Errors
    /// `Pattern`.
    pub fn grep(text: &str) -> Result<Self, Error> {
        grep::compile(text)?;
        Ok(Self::Grep(text.to_owned()))
    }

    /// Takes a JSON path (RFC 9535).
    ///
    /// # Errors
    /// `Path`.
    pub fn jsonpath(text: &str) -> Result<Self, Error> {
        path::parse(text)?;
        Ok(Self::JsonPath(text.to_owned()))
    }
}

/// Selects a part of a result, within the limits of size and time.
///
/// # Errors
/// `PlainText`, `NotJson`, `TooLarge`, `Slow`, or what the store says. Dropping the future ends the search at its next chunk.
pub async fn select(blobs: &Arc<dyn Blobs>, output: &Output, selector: &Selector, limits: &config::Results) -> Result<Selection, Error> {
    let total = digest_size(output);
    if let Selector::Bytes { from, to } = *selector {
        return bytes::select(blobs, output, total, from, to, limits).await;
    }
    let reader = source::open(blobs, output, 0..total).await?;
    let (source, _stops_when_dropped) = Source::new(reader, total, limits.search_timeout);
    let (selector, media, held) = (selector.clone(), output.media(), limits.clone());
    let search = tokio::task::spawn_blocking(move || match &selector {
        Selector::Lines { from, to } => lines::select(source, *from, *to, &held),
        Selector::Grep(pattern) => grep::select(source, pattern, &held),
        Selector::JsonPath(path) => jsonpath::select(source, path, media, &held),
        Selector::Bytes { .. } => unreachable!("answered above"),
    });
    // The search itself stops between two chunks; this is for a chunk that takes forever.
    match tokio::time::timeout(limits.search_timeout.get() * 2 + source::PATIENCE, search).await {
        Ok(Ok(found)) => found,
        Ok(Err(failed)) => Err(Error::Read(failed.to_string().into())),
        Err(_) => Err(Error::Slow(limits.search_timeout)),
    }
}

/// The result from its first byte on, at most `max` bytes, cut between two characters.
///
/// # Errors
/// What the store says.
pub async fn whole(blobs: &Arc<dyn Blobs>, output: &Output, max: u64) -> Result<Whole, Error> {
    let total = digest_size(output);
    let mut held = Vec::new();
    source::open(blobs, output, 0..total.min(max)).await?.take(max).read_to_end(&mut held).await.map_err(read_error)?;
    if total > max {
        held.truncate(whole_chars(&held));
    }
    let truncated = (held.len() as u64) < total;
    Ok(Whole { text: text_of(held).0, media: output.media(), total_bytes: total, truncated })
}

/// The SHA-256 (hex) and the size of a result's bytes: a string's own text, else compact JSON; a blob's own.
pub fn digest(output: &Output) -> (String, u64) {
    match output {
        Output::Blob(blob) => (blob.sha256.clone(), blob.size),
        Output::Inline(value) => {
            let text = Output::inline_text(value);
            (hex(&Sha256::digest(text.as_bytes())), text.len() as u64)
        }
    }
}

fn digest_size(output: &Output) -> u64 {
    match output {
        Output::Blob(blob) => blob.size,
        Output::Inline(value) => Output::inline_text(value).len() as u64,
    }
}

/// `"a-b"`, `"a"` or `"a-"`; never backwards.
fn range(text: &str) -> Option<(u64, u64)> {
    let number = |text: &str| -> Option<u64> {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        // More than fits is as good as the end.
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    let text = text.trim();
    let (from, to) = match text.split_once('-') {
        None => (number(text)?, number(text)?),
        Some((from, "")) => (number(from.trim_end())?, u64::MAX),
        Some((from, to)) => (number(from.trim_end())?, number(to.trim_start())?),
    };
    (from <= to).then_some((from, to))
}

fn shown(text: &str) -> String {
    const SHOWN_MAX: usize = 200;
    text.chars().take(SHOWN_MAX).collect()
}

fn read_error(error: std::io::Error) -> Error {
    Error::Read(error.to_string().into())
}

/// How many of the bytes are whole characters: a character that the end cuts does not count.
fn whole_chars(bytes: &[u8]) -> usize {
    for back in 1..=bytes.len().min(3) {
        let start = bytes.len() - back;
        let needed = match bytes[start] {
            0x80..=0xbf => continue,
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            _ => 1,
        };
        return if needed > back { start } else { bytes.len() };
    }
    bytes.len()
}

/// The text of some bytes, and what to say of those that are no text.
fn text_of(bytes: Vec<u8>) -> (String, Option<String>) {
    match String::from_utf8(bytes) {
        Ok(text) => (text, None),
        Err(error) => {
            let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
            (text, Some("bytes that are not UTF-8 are shown as \u{fffd}".into()))
        }
    }
}

/// What a selection has to say, one sentence after the other.
#[derive(Default)]
struct Notes(Vec<String>);

impl Notes {
    fn say(&mut self, note: impl Into<Option<String>>) {
        self.0.extend(note.into());
    }

    fn into_note(self) -> Option<String> {
        (!self.0.is_empty()).then(|| self.0.join("; "))
    }
}

#[cfg(test)]
mod tests;
