//! A cursor over JSON that streams by: it holds one buffer and the open brackets, never a value.
//!
//! `serde_json` reads streams as well, but holds each string whole and steps byte by byte; a result may be one string.

use std::io::{self, Read};

use super::source::CHUNK;

/// How deep values may nest.
const DEPTH_MAX: usize = 1024;

/// Why the cursor went no further.
#[derive(Debug)]
pub(super) enum Stop {
    /// This is not JSON.
    Syntax(String),
    /// Whoever takes the bytes has enough.
    Full,
    /// Nothing further can match.
    Done,
    /// The bytes can't be had.
    Io(io::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

type Result<T> = std::result::Result<T, Stop>;

pub(super) struct Cursor<R> {
    source: R,
    buffer: Vec<u8>,
    at: usize,
    filled: usize,
    /// Where the buffer begins.
    base: u64,
}

impl<R: Read> Cursor<R> {
    pub(super) fn new(source: R) -> Self {
        Self { source, buffer: vec![0; CHUNK], at: 0, filled: 0, base: 0 }
    }

    pub(super) fn source(&self) -> &R {
        &self.source
    }

    /// How many bytes were passed.
    pub(super) fn position(&self) -> u64 {
        self.base + self.at as u64
    }

    /// The byte that comes next; `None` at the end.
    fn peek(&mut self) -> Result<Option<u8>> {
        if self.at == self.filled {
            self.base += self.filled as u64;
            (self.at, self.filled) = (0, 0);
            self.filled = self.source.read(&mut self.buffer)?;
        }
        Ok((self.at < self.filled).then(|| self.buffer[self.at]))
    }

    pub(super) fn advance(&mut self) {
        self.at += 1;
    }

    /// The first byte of the next token; `None` at the end.
    pub(super) fn token(&mut self) -> Result<Option<u8>> {
        loop {
            match self.peek()? {
                Some(b' ' | b'\t' | b'\n' | b'\r') => self.advance(),
                byte => return Ok(byte),
            }
        }
    }

    /// Fails, with what stands here instead.
    pub(super) fn expected<T>(&mut self, what: &str) -> Result<T> {
        Err(Stop::Syntax(match self.peek()? {
            None => format!("{what} was expected, and it ends"),
            Some(byte) => format!("{what} was expected, not {:?}", char::from(byte)),
        }))
    }

    /// Passes a value whole.
    pub(super) fn skip(&mut self) -> Result<()> {
        self.value(&mut |_| true)
    }

    /// Passes a value and gives its bytes without the blanks between them; `take` says false when it has enough.
    pub(super) fn value(&mut self, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
        let mut open: Vec<u8> = Vec::new();
        loop {
            match self.token()? {
                Some(b'"') => self.string(take)?,
                Some(b'-' | b'0'..=b'9') => self.number(take)?,
                Some(b't') => self.word(b"true", take)?,
                Some(b'f') => self.word(b"false", take)?,
                Some(b'n') => self.word(b"null", take)?,
                Some(bracket @ (b'{' | b'[')) => {
                    self.pass(take)?;
                    // Both brackets close two places further on.
                    if self.token()? == Some(bracket + 2) {
                        self.pass(take)?;
                    } else if open.len() == DEPTH_MAX {
                        return Err(Stop::Syntax(format!("it nests deeper than {DEPTH_MAX} levels")));
                    } else {
                        open.push(bracket + 2);
                        if bracket == b'{' {
                            self.key(take)?;
                        }
                        continue;
                    }
                }
                _ => return self.expected("a value"),
            }
            if !self.close(&mut open, take)? {
                return Ok(());
            }
        }
    }

    /// Passes what follows a value, up to the next one; false when there is none.
    fn close(&mut self, open: &mut Vec<u8>, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<bool> {
        while let Some(bracket) = open.last().copied() {
            match self.token()? {
                Some(b',') => {
                    self.pass(take)?;
                    if bracket == b'}' {
                        self.key(take)?;
                    }
                    return Ok(true);
                }
                Some(byte) if byte == bracket => {
                    self.pass(take)?;
                    open.pop();
                }
                _ => return self.expected(if bracket == b'}' { "a comma or }" } else { "a comma or ]" }),
            }
        }
        Ok(false)
    }

    /// Passes a key and its colon.
    pub(super) fn key(&mut self, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
        if self.token()? != Some(b'"') {
            return self.expected("a key in quotes");
        }
        self.string(take)?;
        if self.token()? != Some(b':') {
            return self.expected("a colon");
        }
        self.pass(take)
    }

    /// Passes one byte.
    fn pass(&mut self, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
        let taken = take(&self.buffer[self.at..=self.at]);
        self.advance();
        if taken { Ok(()) } else { Err(Stop::Full) }
    }

    fn string(&mut self, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
        self.pass(take)?;
        loop {
            if self.peek()?.is_none() {
                return self.expected("the end of a string");
            }
            let rest = &self.buffer[self.at..self.filled];
            let plain = rest.iter().position(|byte| matches!(byte, b'"' | b'\\' | ..=0x1f)).unwrap_or(rest.len());
            let taken = take(&rest[..plain]);
            self.at += plain;
            if !taken {
                return Err(Stop::Full);
            }
            match self.peek()? {
                Some(b'"') => return self.pass(take),
                Some(b'\\') => self.escape(take)?,
                Some(..=0x1f) => return self.expected("an escape in place of a control character"),
                _ => {}
            }
        }
    }

    fn escape(&mut self, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
        self.pass(take)?;
        match self.peek()? {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.pass(take),
            Some(b'u') => {
                self.pass(take)?;
                for _ in 0..4 {
                    if !self.peek()?.is_some_and(|byte| byte.is_ascii_hexdigit()) {
                        return self.expected("a hexadecimal digit");
                    }
                    self.pass(take)?;
                }
                Ok(())
            }
            _ => self.expected("an escape"),
        }
    }

    fn word(&mut self, word: &[u8], take: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
        for wanted in word {
            if self.peek()? != Some(*wanted) {
                return self.expected("true, false or null");
            }
            self.pass(take)?;
        }
        Ok(())
    }

    fn number(&mut self, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
        if self.peek()? == Some(b'-') {
            self.pass(take)?;
        }
        if self.peek()? == Some(b'0') {
            self.pass(take)?;
            if self.peek()?.is_some_and(|byte| byte.is_ascii_digit()) {
                return self.expected("a number without a leading zero");
            }
        } else {
            self.digits(take)?;
        }
        if self.peek()? == Some(b'.') {
            self.pass(take)?;
            self.digits(take)?;
        }
        if matches!(self.peek()?, Some(b'e' | b'E')) {
            self.pass(take)?;
            if matches!(self.peek()?, Some(b'+' | b'-')) {
                self.pass(take)?;
            }
            self.digits(take)?;
        }
        Ok(())
    }

    /// Passes digits, at least one.
    fn digits(&mut self, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
        if !self.peek()?.is_some_and(|byte| byte.is_ascii_digit()) {
            return self.expected("a digit");
        }
        while self.peek()?.is_some_and(|byte| byte.is_ascii_digit()) {
            self.pass(take)?;
        }
        Ok(())
    }
}
