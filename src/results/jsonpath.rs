//! Values at a JSON path: while the document streams by where the path allows it, else on the document in memory.
//!
//! Of keys that an object has twice, the stream sees the first.

use std::io::{Read, Write};

use serde_json::Value;

use super::json::{Cursor, Stop};
use super::path::{self, Path, Step, Steps};
use super::source::Source;
use super::{Error, Notes, Selection, read_error, shown, text_of, whole_chars};
use crate::config;
use crate::model::output::Media;
use crate::model::size::Size;

pub(super) fn select(source: Source, text: &str, media: Media, limits: &config::Results) -> Result<Selection, Error> {
    match path::parse(text)? {
        Path::Streams(path) => stream(source, &path, media, limits),
        Path::Document { path, max, singular } => search(source, Document { text, path: &path, max, singular }, media, limits),
    }
}

fn stream(source: Source, path: &Steps, media: Media, limits: &config::Results) -> Result<Selection, Error> {
    let total = source.total();
    let first_many = path.steps.iter().position(|step| !step.is_single());
    let out = Matches::new(first_many.is_some(), limits);
    let mut walk = Walk { cursor: Cursor::new(source), out, first_many, depth: path.steps.len(), place: None };
    let end = walk.step(&path.steps).and_then(|()| match walk.cursor.token()? {
        None => Ok(()),
        Some(_) => walk.cursor.expected("the end"),
    });
    let Walk { cursor, mut out, place, .. } = walk;
    let mut notes = Notes::default();
    let mut halted = false;
    match end {
        Ok(()) | Err(Stop::Done) => {}
        Err(Stop::Full) => notes.say(out.cut_note(path, first_many.zip(place), total)),
        Err(Stop::Syntax(reason)) => return Err(not_json(media, cursor.position(), reason)),
        Err(Stop::Io(error)) => {
            notes.say(cursor.source().halted().ok_or_else(|| read_error(error))?);
            out.drop_open_match();
            halted = true;
        }
    }
    Ok(out.into_selection(&path.text, total, halted, notes))
}

fn not_json(media: Media, at: u64, reason: String) -> Error {
    match media {
        Media::Text => Error::PlainText,
        Media::Json => Error::NotJson { at, reason },
    }
}

struct Walk {
    cursor: Cursor<Source>,
    out: Matches,
    /// The first step that can lead to several values.
    first_many: Option<usize>,
    /// How many steps the path has.
    depth: usize,
    /// The element that the first such step is at, when it is in an array.
    place: Option<u64>,
}

impl Walk {
    fn step(&mut self, steps: &[Step]) -> Result<(), Stop> {
        let Some((step, rest)) = steps.split_first() else { return self.found() };
        let level = self.depth - steps.len();
        // Nothing else can match once a step without siblings is done.
        let last_chance = self.first_many.is_none_or(|first| level < first);
        match (self.cursor.token()?, step) {
            (Some(b'{'), Step::Name(_) | Step::All) => self.members(step, rest, last_chance),
            (Some(b'['), Step::Index(_) | Step::Slice { .. } | Step::All) => self.elements(step, rest, level, last_chance),
            _ => self.cursor.skip(),
        }
    }

    fn members(&mut self, step: &Step, rest: &[Step], last_chance: bool) -> Result<(), Stop> {
        self.cursor.advance();
        if self.cursor.token()? == Some(b'}') {
            self.cursor.advance();
            return Ok(());
        }
        let mut found = false;
        loop {
            let wanted = match step {
                Step::Name(name) => self.key_is(name)? && !found,
                _ => {
                    self.cursor.key(&mut |_| true)?;
                    true
                }
            };
            if wanted {
                found = true;
                self.step(rest)?;
                if last_chance {
                    return Err(Stop::Done);
                }
            } else {
                self.cursor.skip()?;
            }
            match self.cursor.token()? {
                Some(b',') => self.cursor.advance(),
                Some(b'}') => {
                    self.cursor.advance();
                    return Ok(());
                }
                _ => return self.cursor.expected("a comma or }"),
            }
        }
    }

    fn elements(&mut self, step: &Step, rest: &[Step], level: usize, last_chance: bool) -> Result<(), Stop> {
        self.cursor.advance();
        if self.cursor.token()? == Some(b']') {
            self.cursor.advance();
            return Ok(());
        }
        let (from, to, stride) = match *step {
            Step::Index(index) => (index, index + 1, 1),
            Step::Slice { from, to, step } => (from, to, step),
            _ => (0, u64::MAX, 1),
        };
        // The last element that the step wants is the end of it all, unless something above goes on.
        let only = last_chance || self.first_many == Some(level);
        let mut index = 0;
        loop {
            if index >= to && only {
                return Err(Stop::Done);
            }
            if (from..to).contains(&index) && (index - from).is_multiple_of(stride) {
                if self.first_many == Some(level) {
                    self.place = Some(index);
                }
                self.step(rest)?;
            } else {
                self.cursor.skip()?;
            }
            index += 1;
            match self.cursor.token()? {
                Some(b',') => self.cursor.advance(),
                Some(b']') => {
                    self.cursor.advance();
                    return Ok(());
                }
                _ => return self.cursor.expected("a comma or ]"),
            }
        }
    }

    /// Passes a key and says whether it is this one, without holding more of it than that takes.
    fn key_is(&mut self, name: &str) -> Result<bool, Stop> {
        let longest = name.len() * 6 + 2;
        let mut raw = Vec::new();
        self.cursor.key(&mut |bytes| {
            if raw.len() <= longest {
                raw.extend_from_slice(&bytes[..bytes.len().min(longest + 2)]);
            }
            true
        })?;
        // The colon was passed as well.
        raw.pop();
        Ok(raw.len() <= longest && serde_json::from_slice::<String>(&raw).is_ok_and(|key| key == name))
    }

    fn found(&mut self) -> Result<(), Stop> {
        let Some(_) = self.cursor.token()? else { return self.cursor.expected("a value") };
        let at = self.cursor.position();
        let out = &mut self.out;
        out.begin(at)?;
        self.cursor.value(&mut |bytes| out.take(bytes))?;
        self.out.count += 1;
        Ok(())
    }
}

/// What matched so far, as JSON text.
struct Matches {
    many: bool,
    out: Vec<u8>,
    max: Size,
    count: u64,
    /// Where the last match begins in the document, and how long the text was before it.
    last: (u64, usize),
    cut: bool,
}

impl Matches {
    fn new(many: bool, limits: &config::Results) -> Self {
        let out = if many { vec![b'['] } else { Vec::new() };
        Self { many, last: (0, out.len()), out, max: limits.selection_max, count: 0, cut: false }
    }

    /// Leaves room for the bracket at the end.
    fn room(&self) -> usize {
        self.max.as_usize().saturating_sub(self.out.len() + usize::from(self.many))
    }

    fn begin(&mut self, at: u64) -> Result<(), Stop> {
        self.last = (at, self.out.len());
        if self.count > 0 && !self.take(b",") { Err(Stop::Full) } else { Ok(()) }
    }

    fn take(&mut self, bytes: &[u8]) -> bool {
        let taken = bytes.len().min(self.room());
        self.out.extend_from_slice(&bytes[..taken]);
        taken == bytes.len()
    }

    /// Forgets a match that has begun and has no end.
    fn drop_open_match(&mut self) {
        self.out.truncate(self.last.1);
    }

    /// Drops the match that does not fit beside others, or cuts the only one; says how to get the rest.
    fn cut_note(&mut self, path: &Steps, place: Option<(usize, u64)>, total: u64) -> String {
        self.cut = true;
        let max = self.max;
        if self.count == 0 {
            self.out.truncate(whole_chars(&self.out));
            let from = self.last.0;
            let to = (from + max.get()).min(total) - 1;
            return format!(
                "the first match alone is larger than {max} (results.selection_max), so only its beginning is here: go deeper with a \
                 longer path, or read it with bytes: \"{from}-{to}\" and on"
            );
        }
        self.drop_open_match();
        let count = self.count;
        let next = match place.and_then(|(step, index)| path.going_on(step, index)) {
            Some(path) => format!("go on with jsonpath: {path:?}"),
            None => "narrow the path".to_owned(),
        };
        format!("only the first {count} matches fit into {max} (results.selection_max): {next}")
    }

    fn into_selection(mut self, path: &str, total: u64, halted: bool, mut notes: Notes) -> Selection {
        if self.many && !(self.cut && self.count == 0) {
            self.out.push(b']');
        }
        if self.count == 0 && !self.cut && !halted {
            notes.say(format!("nothing in the result matches {:?}", shown(path)));
        }
        let (text, lossy) = text_of(self.out);
        notes.say(lossy);
        Selection { text, total_bytes: total, truncated: self.cut || halted, note: notes.into_note() }
    }
}

impl Steps {
    /// The same path, from an element of its first open step on; `None` when that would not be the rest.
    fn going_on(&self, step: usize, index: u64) -> Option<String> {
        // Of a single element with many matches inside, the same matches would come again.
        let rest = &self.steps[step + 1..];
        if !rest.iter().all(Step::is_single) {
            return None;
        }
        let slice = match self.steps[step] {
            Step::All => format!("[{index}:]"),
            Step::Slice { to: u64::MAX, step, .. } => format!("[{index}::{step}]"),
            Step::Slice { to, step, .. } => format!("[{index}:{to}:{step}]"),
            _ => return None,
        };
        let span = &self.spans[step];
        Some(format!("{}{slice}{}", &self.text[..span.start], &self.text[span.end..]))
    }
}

/// A path for a document in memory.
struct Document<'a> {
    text: &'a str,
    path: &'a serde_json_path::JsonPath,
    max: Size,
    singular: bool,
}

fn search(mut source: Source, wanted: Document<'_>, media: Media, limits: &config::Results) -> Result<Selection, Error> {
    let Document { text, path, max, singular } = wanted;
    let total = source.total();
    if total > max.get() {
        return Err(Error::TooLarge { path: shown(text), total, max });
    }
    let mut document = Vec::new();
    if let Err(error) = source.read_to_end(&mut document) {
        source.halted().ok_or_else(|| read_error(error))?;
        return Err(Error::Slow(limits.search_timeout));
    }
    let parsed: Value = serde_json::from_slice(&document).map_err(|error| {
        let lines = document.split_inclusive(|byte| *byte == b'\n').take(error.line().saturating_sub(1));
        let at = lines.map(<[u8]>::len).sum::<usize>() + error.column().saturating_sub(1);
        not_json(media, at as u64, error.to_string())
    })?;
    drop(document);
    let mut out = Matches::new(!singular, limits);
    let mut notes = Notes::default();
    for node in path.query(&parsed) {
        if out.begin(0).is_err() || serde_json::to_writer(&mut out, node).is_err() {
            out.cut = true;
            let max = limits.selection_max;
            notes.say(if out.count == 0 {
                out.out.truncate(whole_chars(&out.out));
                format!(
                    "the first match alone is larger than {max} (results.selection_max), so only its beginning is here: narrow the path"
                )
            } else {
                out.drop_open_match();
                format!("only the first {} matches fit into {max} (results.selection_max): narrow the path", out.count)
            });
            break;
        }
        out.count += 1;
    }
    Ok(out.into_selection(text, total, false, notes))
}

impl Write for Matches {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.take(bytes) { Ok(bytes.len()) } else { Err(std::io::ErrorKind::WriteZero.into()) }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
