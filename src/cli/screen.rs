//! Standard output: a terminal or a pipe, in tables or JSON.

use std::borrow::Cow;
use std::io::{self, BufWriter, IsTerminal, Stdout, Write};
use std::time::Duration;

use serde_json::Value;

use super::table::{Rolling, Table};
use crate::model::time::{Span, Timestamp};
use crate::telemetry::now;

/// What is written to, and for whom.
pub(super) struct Screen {
    out: BufWriter<Stdout>,
    /// The width of the terminal; a pipe has none.
    width: Option<usize>,
    pub(super) terminal: bool,
    pub(super) json: bool,
}

impl Screen {
    pub(super) fn new(json: bool) -> Self {
        let out = io::stdout();
        let terminal = out.is_terminal();
        let width = terminal.then(|| terminal_width(&out));
        Self { out: BufWriter::new(out), width, terminal, json }
    }

    pub(super) fn json(&mut self, value: &Value) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut self.out, value)?;
        self.out.write_all(b"\n")
    }

    /// One value in one line.
    pub(super) fn json_line(&mut self, value: &Value) -> io::Result<()> {
        serde_json::to_writer(&mut self.out, value)?;
        self.out.write_all(b"\n")
    }

    pub(super) fn rolling_head<const N: usize>(&mut self, table: &Rolling<N>) -> io::Result<()> {
        table.write_heads(&mut self.out)
    }

    pub(super) fn rolling_row<const N: usize>(&mut self, table: &mut Rolling<N>, cells: [String; N]) -> io::Result<()> {
        table.write(&mut self.out, self.width, cells)
    }

    /// Whether whoever read this has gone: a pipe tells without a write.
    pub(super) fn nobody_reads(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut pipe = [PollFd::new(self.out.get_ref(), PollFlags::empty())];
        poll(&mut pipe, Some(&rustix::time::Timespec::default())).is_ok() && pipe[0].revents().intersects(PollFlags::ERR)
    }

    pub(super) fn table(&mut self, table: &Table) -> io::Result<()> {
        table.write(&mut self.out, self.width)
    }

    /// One line of text; control characters are shown as escapes.
    pub(super) fn line(&mut self, text: &str) -> io::Result<()> {
        writeln!(self.out, "{}", escape(text))
    }

    /// A piece of a result or a log, as it is; on a terminal control characters are shown as escapes, all but tabs and line ends.
    pub(super) fn raw(&mut self, bytes: &[u8], plain: &mut Plain) -> io::Result<()> {
        if self.terminal { plain.write(&mut self.out, bytes) } else { self.out.write_all(bytes) }
    }

    /// A moment: how long ago on a terminal, else RFC 3339.
    pub(super) fn moment(&self, at: Timestamp) -> String {
        if self.terminal { ago(now().since(at)) } else { at.to_string() }
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn terminal_width(out: &Stdout) -> usize {
    let said = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let asked = || rustix::termios::tcgetwinsize(out).ok().map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0);
    said.or_else(asked).unwrap_or(100)
}

/// A long time in one unit, as people say it.
pub(super) fn ago(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0 => "now".into(),
        1..60 => format!("{seconds}s ago"),
        60..3600 => format!("{}m ago", seconds / 60),
        3600..86_400 => format!("{}h ago", seconds / 3600),
        _ => format!("{}d ago", seconds / 86_400),
    }
}

/// How long something took, no more exact than anybody wants to know.
pub(super) fn took(ms: u64) -> String {
    match ms {
        ..1000 => format!("{ms}ms"),
        1000..60_000 => format!("{}.{}s", ms / 1000, ms % 1000 / 100),
        _ => Span::secs(ms / 1000).to_string(),
    }
}

/// Whether a character could move a terminal's cursor, change its state or turn its text around.
fn is_unsafe(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// A text in one line that does nothing to a terminal.
pub(super) fn escape(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if is_unsafe(c) { escaped.extend(c.escape_default()) } else { escaped.push(c) }
    }
    Cow::Owned(escaped)
}

/// Makes a stream of bytes harmless to a terminal, whatever the pieces it comes in.
#[derive(Default)]
pub(super) struct Plain {
    /// The beginning of a character whose end has not come yet.
    begun: Vec<u8>,
}

impl Plain {
    fn write(&mut self, out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
        self.begun.extend_from_slice(bytes);
        let held = std::mem::take(&mut self.begun);
        let mut rest = held.as_slice();
        while !rest.is_empty() {
            let (good, bad) = match std::str::from_utf8(rest) {
                Ok(text) => (text, 0),
                Err(error) => {
                    let good = std::str::from_utf8(&rest[..error.valid_up_to()]).unwrap_or_default();
                    let Some(bad) = error.error_len() else {
                        self.text(out, good)?;
                        self.begun = rest[good.len()..].to_vec();
                        return Ok(());
                    };
                    (good, bad)
                }
            };
            self.text(out, good)?;
            if bad > 0 {
                out.write_all("\u{fffd}".as_bytes())?;
            }
            rest = &rest[good.len() + bad..];
        }
        Ok(())
    }

    fn text(&self, out: &mut impl Write, text: &str) -> io::Result<()> {
        for part in text.split_inclusive(['\n', '\t']) {
            let kept = part.trim_end_matches(['\n', '\t']);
            out.write_all(escape(kept).as_bytes())?;
            out.write_all(&part.as_bytes()[kept.len()..])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_control_a_terminal_is_escaped() {
        assert_eq!(escape("plain ü 漢"), "plain ü 漢");
        assert_eq!(escape("a\x1b[31mb\r\n\tc\u{7f}\u{9b}"), "a\\u{1b}[31mb\\r\\n\\tc\\u{7f}\\u{9b}");
        assert_eq!(escape("x\u{202e}y"), "x\\u{202e}y");
    }

    #[test]
    fn a_stream_is_harmless_in_pieces_of_every_size() {
        let text = "one\n\ttwo \x1b]0;title\x07 \u{9b}31m é 😀 end".as_bytes();
        let wanted = "one\n\ttwo \\u{1b}]0;title\\u{7} \\u{9b}31m é 😀 end";
        for size in 1..text.len() {
            let (mut plain, mut out) = (Plain::default(), Vec::new());
            for piece in text.chunks(size) {
                plain.write(&mut out, piece).unwrap();
            }
            assert_eq!(String::from_utf8(out).unwrap(), wanted, "in pieces of {size}");
        }
        let mut out = Vec::new();
        Plain::default().write(&mut out, b"a\xff\xc3(b").unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "a\u{fffd}\u{fffd}(b");
    }

    #[test]
    fn times_are_said_as_people_say_them() {
        let said = |seconds| ago(Duration::from_secs(seconds));
        assert_eq!([said(0), said(59), said(3599), said(86_399), said(200_000)], ["now", "59s ago", "59m ago", "23h ago", "2d ago"]);
        assert_eq!([took(7), took(1250), took(61_000)], ["7ms", "1.2s", "1m1s"]);
    }
}
