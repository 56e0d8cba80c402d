//! Where a result's bytes come from, as a plain reader with a deadline.

use std::io::{self, Cursor, Read};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::runtime::Handle;

use super::Error;
use crate::model::output::Output;
use crate::model::time::Span;
use crate::transport::Blobs;

/// How many bytes are read at once.
pub(super) const CHUNK: usize = 64 << 10;
/// How long a search may overstay its time before it is given up.
pub(super) const PATIENCE: Duration = Duration::from_millis(500);

pub(super) type Bytes = Box<dyn AsyncRead + Unpin + Send>;

/// Opens a range of a result's bytes.
pub(super) async fn open(blobs: &Arc<dyn Blobs>, output: &Output, range: Range<u64>) -> Result<Bytes, Error> {
    match output {
        Output::Blob(blob) => Ok(blobs.open(&blob.sha256, range).await?),
        Output::Inline(value) => {
            let text = Output::inline_text(value).into_bytes();
            let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(text.len());
            let part = text[place(range.start)..place(range.end)].to_vec();
            Ok(Box::new(Cursor::new(part)))
        }
    }
}

/// Reads on a blocking thread, until its time is over or nobody waits any more.
pub(super) struct Source {
    inner: Bytes,
    handle: Handle,
    timeout: Span,
    until: Instant,
    stop: Arc<AtomicBool>,
    halted: bool,
    total: u64,
    read: u64,
}

/// Stops the source when it is dropped.
pub(super) struct Stops(Arc<AtomicBool>);

impl Drop for Stops {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Source {
    pub(super) fn new(inner: Bytes, total: u64, timeout: Span) -> (Self, Stops) {
        let stop = Arc::new(AtomicBool::new(false));
        let stops = Stops(stop.clone());
        let until = Instant::now() + timeout.get();
        (Self { inner, handle: Handle::current(), timeout, until, stop, halted: false, total, read: 0 }, stops)
    }

    /// How large the whole result is.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// What to say when an error was no error of reading, but the end of the search's time.
    pub(super) fn halted(&self) -> Option<String> {
        self.halted.then(|| {
            let Self { timeout, read, total, .. } = self;
            format!("the search stopped after {timeout} (results.search_timeout) at byte {read} of {total}")
        })
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) || Instant::now() >= self.until {
            self.halted = true;
            return Err(io::ErrorKind::TimedOut.into());
        }
        let n = self.handle.block_on(self.inner.read(buffer))?;
        self.read += n as u64;
        Ok(n)
    }
}
