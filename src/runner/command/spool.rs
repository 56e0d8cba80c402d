//! What a program prints, kept in memory while it is small and in a file when it is not; always valid UTF-8.

use std::borrow::Cow;
use std::io;
use std::path::PathBuf;

use tokio::fs::File;
use tokio::io::{AsyncWriteExt, BufWriter};

const EVIDENCE_MAX: usize = 1024;

/// Takes in output.
pub(super) struct Spool {
    path: PathBuf,
    memory_max: usize,
    memory: Vec<u8>,
    file: Option<BufWriter<File>>,
    lossy: Lossy,
    newline: bool,
    /// How many bytes were printed.
    pub(super) printed: u64,
    size: u64,
    head: Vec<u8>,
    tail: Tail,
}

/// All that was printed, without one newline at its end.
#[derive(Debug)]
pub(super) enum Printed {
    /// It is small.
    Memory(String),
    /// It is not.
    File {
        /// Where it is.
        path: PathBuf,
        /// How large it is.
        size: u64,
    },
}

impl Spool {
    /// Beyond `memory_max` it goes to this file.
    pub(super) fn new(path: PathBuf, memory_max: usize) -> Self {
        Self {
            path,
            memory_max,
            memory: Vec::new(),
            file: None,
            lossy: Lossy::default(),
            newline: false,
            printed: 0,
            size: 0,
            head: Vec::new(),
            tail: Tail::new(EVIDENCE_MAX),
        }
    }

    /// Takes in some more.
    pub(super) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.printed += bytes.len() as u64;
        let head = bytes.len().min(EVIDENCE_MAX - self.head.len());
        self.head.extend_from_slice(&bytes[..head]);
        self.tail.push(&bytes[head..]);
        let text = self.lossy.decode(bytes);
        self.keep(text.as_bytes()).await
    }

    /// How the output began and how it ended.
    pub(super) fn evidence(&self) -> String {
        let head = String::from_utf8_lossy(&self.head);
        let tail = self.tail.text();
        match self.printed > (self.head.len() + self.tail.len()) as u64 {
            true => format!("{head}\n[...]\n{tail}"),
            false => format!("{head}{tail}"),
        }
    }

    /// Closes it.
    pub(super) async fn finish(mut self) -> io::Result<Printed> {
        let rest = self.lossy.end();
        self.keep(rest.as_bytes()).await?;
        match self.file {
            Some(mut file) => {
                file.flush().await?;
                Ok(Printed::File { path: self.path, size: self.size })
            }
            None => Ok(Printed::Memory(String::from_utf8_lossy(&self.memory).into_owned())),
        }
    }

    async fn keep(&mut self, text: &[u8]) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        // The last newline waits to see whether anything follows.
        if std::mem::take(&mut self.newline) {
            self.store(b"\n").await?;
        }
        let text = match text.strip_suffix(b"\n") {
            Some(text) => {
                self.newline = true;
                text
            }
            None => text,
        };
        self.store(text).await
    }

    async fn store(&mut self, text: &[u8]) -> io::Result<()> {
        self.size += text.len() as u64;
        if self.file.is_none() {
            if self.memory.len() + text.len() <= self.memory_max {
                self.memory.extend_from_slice(text);
                return Ok(());
            }
            let file = File::options().create(true).write(true).truncate(true).mode(0o600).open(&self.path).await?;
            let mut file = BufWriter::with_capacity(64 * 1024, file);
            file.write_all(&std::mem::take(&mut self.memory)).await?;
            self.file = Some(file);
        }
        match &mut self.file {
            Some(file) => file.write_all(text).await,
            None => Ok(()),
        }
    }
}

/// The last bytes of a stream.
pub(super) struct Tail {
    max: usize,
    bytes: Vec<u8>,
    is_all: bool,
}

impl Tail {
    /// Keeps so many.
    pub(super) fn new(max: usize) -> Self {
        Self { max, bytes: Vec::new(), is_all: true }
    }

    /// Takes in some more.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.is_all &= self.bytes.len() + bytes.len() <= self.max;
        self.bytes.extend_from_slice(&bytes[bytes.len().saturating_sub(self.max)..]);
        if self.bytes.len() > 2 * self.max {
            self.bytes.drain(..self.bytes.len() - self.max);
        }
    }

    /// How many it has.
    pub(super) fn len(&self) -> usize {
        self.bytes.len().min(self.max)
    }

    /// Them, from a character's beginning.
    pub(super) fn text(&self) -> String {
        let bytes = &self.bytes[self.bytes.len() - self.len()..];
        let cut = match self.is_all {
            true => 0,
            false => bytes.iter().take(3).take_while(|byte| **byte & 0xc0 == 0x80).count(),
        };
        String::from_utf8_lossy(&bytes[cut..]).into_owned()
    }
}

/// Decodes UTF-8 that comes in chunks as if it came whole; what is none becomes U+FFFD.
#[derive(Default)]
struct Lossy(Vec<u8>);

impl Lossy {
    fn decode<'a>(&mut self, bytes: &'a [u8]) -> Cow<'a, str> {
        if self.0.is_empty()
            && let Ok(text) = std::str::from_utf8(bytes)
        {
            return Cow::Borrowed(text);
        }
        let mut all = std::mem::take(&mut self.0);
        all.extend_from_slice(bytes);
        let mut text = String::with_capacity(all.len());
        let mut chunks = all.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            match std::str::from_utf8(chunk.invalid()) {
                Ok(_) => {}
                // A character that is cut off at the very end may go on in the next chunk.
                Err(error) if error.error_len().is_none() && chunks.peek().is_none() => self.0 = chunk.invalid().to_vec(),
                Err(_) => text.push(char::REPLACEMENT_CHARACTER),
            }
        }
        Cow::Owned(text)
    }

    fn end(&mut self) -> &'static str {
        match std::mem::take(&mut self.0).is_empty() {
            true => "",
            false => "\u{fffd}",
        }
    }
}

/// The longest beginning of at most `max` bytes that ends with a whole character.
pub(super) fn beginning(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chunks_decode_as_the_whole(bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(0xe2), Just(0x82), Just(0xac), Just(0xf0), Just(b'a')], 0..60), step in 1usize..8) {
            let mut lossy = Lossy::default();
            let mut text: String = bytes.chunks(step).map(|chunk| lossy.decode(chunk).into_owned()).collect();
            text.push_str(lossy.end());
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }

    #[test]
    fn a_tail_begins_with_a_character() {
        let mut tail = Tail::new(4);
        tail.push("xyää€".as_bytes());
        assert_eq!(tail.text(), "€");
        tail.push(b"ab");
        assert_eq!(tail.len(), 4);
    }
}
