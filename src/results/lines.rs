//! Ranges of lines.

use std::io::{self, BufRead, BufReader, Read};

use super::source::{CHUNK, Source};
use super::{Error, Notes, Selection, read_error, text_of, whole_chars};
use crate::config;

/// How much of a line is shown when it is one of several.
const LINE_MAX: usize = 16 << 10;

pub(super) fn select(source: Source, from: u64, to: u64, limits: &config::Results) -> Result<Selection, Error> {
    let total = source.total();
    let mut reader = BufReader::with_capacity(CHUNK, source);
    let mut lines = Lines { next: 1, at: 0, held: Vec::new(), max: limits.selection_max.as_usize(), cut: Vec::new(), full: false };
    let read = lines.read(&mut reader, from, to);
    let mut notes = Notes::default();
    let halted = match read {
        Ok(()) => false,
        Err(error) => {
            let why = reader.get_ref().halted().ok_or_else(|| read_error(error))?;
            notes.say(format!("{why}, before the end of line {}", lines.next));
            true
        }
    };
    if lines.next <= from && !halted {
        notes.say(format!("the result has {} lines", lines.next - 1));
    }
    if let Some((number, rest)) = lines.cut.first() {
        let last = (rest + limits.selection_max.get()).min(total) - 1;
        notes.say(format!("line {number} is cut: read on with bytes: \"{rest}-{last}\""));
        let more = lines.cut.len() - 1;
        notes.say((more > 0).then(|| format!("{more} further lines are cut likewise")));
    }
    if lines.full {
        let next = lines.next;
        let rest = if to == u64::MAX { format!("{next}-") } else { format!("{next}-{to}") };
        notes.say(format!("at most {} are given at once (results.selection_max): go on with lines: \"{rest}\"", limits.selection_max));
    }
    let truncated = halted || lines.full || !lines.cut.is_empty();
    let (text, lossy) = text_of(lines.held);
    notes.say(lossy);
    Ok(Selection { text, total_bytes: total, truncated, note: notes.into_note() })
}

struct Lines {
    /// The number of the line that comes next.
    next: u64,
    /// Where it begins.
    at: u64,
    held: Vec<u8>,
    max: usize,
    /// Lines that were cut, and where the rest of each begins.
    cut: Vec<(u64, u64)>,
    /// The next line was wanted and has no room.
    full: bool,
}

impl Lines {
    fn read(&mut self, reader: &mut BufReader<Source>, from: u64, to: u64) -> io::Result<()> {
        while self.next < from {
            let skipped = reader.skip_until(b'\n')?;
            if skipped == 0 {
                return Ok(());
            }
            self.step(skipped);
        }
        while self.next <= to && !reader.fill_buf()?.is_empty() {
            let room = self.max.saturating_sub(self.held.len());
            if !self.line(reader, room, from == to)? {
                self.full = true;
                break;
            }
        }
        Ok(())
    }

    /// Takes in one line; false when others stand there already and it has no room beside them.
    fn line(&mut self, reader: &mut BufReader<Source>, room: usize, alone: bool) -> io::Result<bool> {
        let before = self.held.len();
        let allowed = if alone { room } else { room.min(LINE_MAX) };
        let mut read = reader.by_ref().take(allowed as u64).read_until(b'\n', &mut self.held)?;
        let ended = self.held[before..].last() == Some(&b'\n');
        if !ended && read == allowed {
            match reader.fill_buf()?.first() {
                None => {}
                Some(b'\n') if allowed > 0 => {
                    reader.consume(1);
                    self.held.push(b'\n');
                    read += 1;
                }
                Some(_) if allowed == room && before > 0 => {
                    self.held.truncate(before);
                    return Ok(false);
                }
                Some(_) => {
                    self.held.truncate(before + whole_chars(&self.held[before..]));
                    self.cut.push((self.next, self.at + (self.held.len() - before) as u64));
                    if !alone {
                        self.held.push(b'\n');
                        read += reader.skip_until(b'\n')?;
                    }
                }
            }
        }
        self.step(read);
        Ok(true)
    }

    fn step(&mut self, bytes: usize) {
        self.next += 1;
        self.at += bytes as u64;
    }
}
