//! Lines that match a regular expression. Long lines are searched window by window, so that no line needs memory.

use std::fmt::Write;
use std::io::Read;

use regex::bytes::{Match, Regex, RegexBuilder};

use super::source::Source;
use super::{Error, Notes, Selection, read_error, shown};
use crate::config;

/// The longest line that is searched in one piece.
const WINDOW: usize = 32 << 10;
/// How much of a window the next one sees again: a longer match in a longer line may be missed or cut.
const OVERLAP: usize = 4 << 10;
/// The longest line that is shown whole; of others the surroundings of each match are.
const LINE_SHOWN_MAX: usize = 2 << 10;
const SURROUNDINGS: usize = 120;
const MATCH_SHOWN_MAX: usize = 400;
const PATTERN_MAX: usize = 4 << 10;
/// How large a compiled pattern may be: it bounds how long one window can take.
const COMPILED_MAX: usize = 1 << 20;

pub(super) fn compile(pattern: &str) -> Result<Regex, Error> {
    let refused = |reason: String| Error::Pattern { pattern: shown(pattern), reason };
    if pattern.len() > PATTERN_MAX {
        return Err(refused(format!("it has {} bytes, and at most {PATTERN_MAX} are taken", pattern.len())));
    }
    RegexBuilder::new(pattern).size_limit(COMPILED_MAX).dfa_size_limit(COMPILED_MAX).build().map_err(|error| match error {
        regex::Error::CompiledTooBig(max) => refused(format!("compiled it is larger than {max} bytes; use fewer or smaller repetitions")),
        other => refused(other.to_string()),
    })
}

pub(super) fn select(mut source: Source, pattern: &str, limits: &config::Results) -> Result<Selection, Error> {
    let mut search = Search {
        regex: compile(pattern)?,
        out: String::new(),
        max: limits.selection_max.as_usize(),
        line: 1,
        base: 0,
        seen: 0,
        inside: false,
        windowed: false,
        shortened: false,
        full: false,
    };
    let mut notes = Notes::default();
    let mut halted = false;
    if let Err(error) = search.run(&mut source) {
        let why = source.halted().ok_or_else(|| read_error(error))?;
        notes.say(format!("{why}, in line {}", search.line));
        halted = true;
    }
    if search.full {
        let line = search.line;
        notes.say(format!(
            "at most {} are given at once (results.selection_max), and more matches from line {line} on: narrow the pattern, or read on \
             with lines: \"{line}-\"",
            limits.selection_max
        ));
    } else if search.out.is_empty() && !halted {
        notes.say(format!("no line matches {:?}", shown(pattern)));
    }
    notes.say(search.shortened.then(|| {
        format!("of lines over {LINE_SHOWN_MAX} bytes only the surroundings of a match are shown: read around its byte with bytes")
    }));
    notes.say(search.windowed.then(|| {
        format!("lines over {WINDOW} bytes were searched piece by piece: a match of more than {OVERLAP} bytes may be missed or cut there")
    }));
    Ok(Selection { text: search.out, total_bytes: source.total(), truncated: halted || search.full, note: notes.into_note() })
}

struct Search {
    regex: Regex,
    out: String,
    max: usize,
    /// The line that the window begins in, from 1.
    line: u64,
    /// Where the window begins.
    base: u64,
    /// Matches before this byte are done.
    seen: u64,
    /// The window begins inside its line: its first byte is there to look back at.
    inside: bool,
    windowed: bool,
    shortened: bool,
    full: bool,
}

impl Search {
    fn run(&mut self, source: &mut Source) -> std::io::Result<()> {
        let mut window = Vec::with_capacity(2 * WINDOW);
        let mut chunk = vec![0; WINDOW];
        loop {
            let n = source.read(&mut chunk)?;
            window.extend_from_slice(&chunk[..n]);
            let mut done = 0;
            while let Some(length) = window[done..].iter().position(|byte| *byte == b'\n') {
                self.look(&window[done..done + length], true);
                if self.full {
                    return Ok(());
                }
                done += length + 1;
                (self.line, self.inside, self.base) = (self.line + 1, false, self.base + length as u64 + 1);
            }
            window.drain(..done);
            if n == 0 {
                if !window.is_empty() {
                    self.look(&window, true);
                }
                return Ok(());
            }
            if window.len() >= WINDOW {
                self.look(&window, false);
                let passed = window.len() - OVERLAP;
                window.drain(..passed);
                (self.inside, self.windowed, self.base) = (true, true, self.base + passed as u64);
            }
            if self.full {
                return Ok(());
            }
        }
    }

    /// Searches a line, or the part of it that the window holds.
    fn look(&mut self, part: &[u8], last: bool) {
        let part = if last { part.strip_suffix(b"\r").unwrap_or(part) } else { part };
        let long = self.inside || !last || part.len() > LINE_SHOWN_MAX;
        let done = usize::try_from(self.seen.saturating_sub(self.base)).unwrap_or(usize::MAX);
        let mut from = usize::from(self.inside).max(done);
        while from <= part.len() {
            let Some(found) = self.regex.find_at(part, from) else { return };
            // A match that touches the end may be another one with more of the line in sight: the next window decides.
            if !last && found.end() == part.len() && found.start() > part.len() - OVERLAP {
                return;
            }
            if !long {
                return self.say(&format!("{}: {}\n", self.line, String::from_utf8_lossy(part)));
            }
            from = self.show(part, &found);
            self.seen = self.base + from as u64;
            if self.full {
                return;
            }
        }
    }

    /// Shows a match and what stands around it; gives where to look for the next one.
    fn show(&mut self, part: &[u8], found: &Match<'_>) -> usize {
        let inner = |at: usize| !part.get(at).is_some_and(|byte| (0x80..=0xbf).contains(byte));
        let snap = |mut at: usize| {
            while at < part.len() && !inner(at) {
                at += 1;
            }
            at
        };
        let begin = snap(found.start().saturating_sub(SURROUNDINGS));
        let end = snap(part.len().min(found.end().min(found.start() + MATCH_SHOWN_MAX) + SURROUNDINGS));
        let mut entry = String::new();
        let byte = self.base + found.start() as u64;
        let (before, after) = (if begin > 0 { "…" } else { "" }, if end < part.len() { "…" } else { "" });
        let _ = writeln!(entry, "{} (byte {byte}): {before}{}{after}", self.line, String::from_utf8_lossy(&part[begin..end.max(begin)]));
        self.shortened = true;
        self.say(&entry);
        found.end().max(end).max(found.start() + 1)
    }

    fn say(&mut self, entry: &str) {
        if self.out.len() + entry.len() <= self.max {
            self.out.push_str(entry);
            return;
        }
        self.full = true;
        if self.out.is_empty() {
            let cut = (0..=self.max).rev().find(|at| entry.is_char_boundary(*at)).unwrap_or(0);
            self.out.push_str(&entry[..cut]);
        }
    }
}
