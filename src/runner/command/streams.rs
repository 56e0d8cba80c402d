//! Reads what a program prints: directives at once, the rest into the spool, standard error into the log.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::{Instant, sleep_until, timeout};

use super::directive::{Directive, Escalate, Piece, Splitter};
use super::log::Log;
use super::progress::Throttle;
use super::shared::Shared;
use super::spool::{Spool, beginning};
use crate::model::budget::Usage;
use crate::model::event::{Failure, FailureKind};
use crate::model::size::Size;
use crate::runner::Report;
use crate::telemetry::now;

/// How long a pipe may be silent after its program is gone before we stop listening.
pub(super) const GRACE: Duration = Duration::from_millis(500);

const CHUNK: usize = 64 * 1024;
/// The most that can stand in a pipe.
const PIPE_MAX: usize = 1024 * 1024;
const MESSAGE_MAX: usize = 4 * 1024;

/// What a program printed.
pub(super) struct Heard {
    /// Its ordinary output.
    pub(super) spool: Spool,
    /// The JSON of its last `result` directive.
    pub(super) result: Option<String>,
    /// Its last `fail` directive, unless a result came after it.
    pub(super) failure: Option<Failure>,
}

/// How the program says it ends.
#[derive(Default)]
struct Said {
    result: Option<String>,
    failure: Option<Failure>,
}

/// The end of a pipe: read to its end, or to what was in it when everybody on the other side was gone.
pub(super) struct Pipe<'a, R> {
    source: R,
    shared: &'a Shared,
    left: usize,
}

impl<'a, R: AsyncRead + Unpin> Pipe<'a, R> {
    /// Reads this.
    pub(super) fn new(source: R, shared: &'a Shared) -> Self {
        Self { source, shared, left: PIPE_MAX }
    }

    /// The next bytes; none at the end. Dropping the future loses nothing.
    pub(super) async fn read(&mut self, chunk: &mut [u8]) -> usize {
        let drain = &self.shared.drain;
        let read = tokio::select! {
            biased;
            read = self.source.read(chunk), if !drain.is_cancelled() => read,
            () = drain.cancelled() => match self.left {
                0 => Ok(0),
                _ => timeout(GRACE, self.source.read(chunk)).await.unwrap_or(Ok(0)),
            },
        };
        let read = read.unwrap_or(0);
        if drain.is_cancelled() {
            self.left = self.left.saturating_sub(read);
        }
        if read > 0 {
            self.shared.alive();
        }
        read
    }
}

/// Standard output.
pub(super) struct Stdout<'a> {
    /// What the run's parts share.
    pub(super) shared: &'a Shared,
    /// Takes in ordinary output.
    pub(super) spool: Spool,
    /// Merges progress.
    pub(super) throttle: Throttle,
    /// How long a directive may be.
    pub(super) line_max: Size,
    /// How much may be printed.
    pub(super) output_max: Size,
    /// What was used and not passed on yet.
    pub(super) used: Usage,
}

impl Stdout<'_> {
    /// Reads to the end, or until the run cannot go on.
    pub(super) async fn read(mut self, source: impl AsyncRead + Unpin) -> Heard {
        let mut said = Said::default();
        if let Err(failure) = self.listen(source, &mut said).await {
            self.shared.raise(*failure);
        }
        self.pass_usage().await;
        if let Some(report) = self.throttle.last() {
            self.shared.report(report).await;
        }
        Heard { spool: self.spool, result: said.result, failure: said.failure }
    }

    async fn listen(&mut self, source: impl AsyncRead + Unpin, said: &mut Said) -> Result<(), Box<Failure>> {
        let mut pipe = Pipe::new(source, self.shared);
        let mut splitter = Splitter::new(self.line_max.as_usize());
        let mut chunk = vec![0; CHUNK];
        loop {
            let due = self.throttle.due();
            let read = tokio::select! {
                biased;
                read = pipe.read(&mut chunk) => read,
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    self.pass_progress().await;
                    continue;
                }
            };
            if read == 0 {
                break;
            }
            let mut rest = &chunk[..read];
            while let Some(piece) = splitter.next(&mut rest) {
                self.take(piece, said).await?;
            }
            self.pass_usage().await;
            self.pass_progress().await;
        }
        match splitter.end() {
            Some(piece) => self.take(piece, said).await,
            None => Ok(()),
        }
    }

    async fn take(&mut self, piece: Piece<'_>, said: &mut Said) -> Result<(), Box<Failure>> {
        let line = match piece {
            Piece::Text(text) => return self.keep(&text).await,
            Piece::Marked(line) => line,
        };
        match Directive::parse(&line) {
            Ok(directive) => self.follow(directive, said).await,
            Err(error) => {
                let shown = String::from_utf8_lossy(&line[..line.len().min(200)]).trim_end().to_owned();
                self.shared.note(format!("a ::lattice line is no directive and stays in the output ({error}): {shown}"));
                return self.keep(&line).await;
            }
        }
        Ok(())
    }

    async fn follow(&mut self, directive: Directive, said: &mut Said) {
        self.used = self.used.plus(directive.usage.unwrap_or_default());
        if let Some((pct, message)) = directive.progress {
            self.throttle.put(Report::Progress { pct, message: message.map(|text| cut(text, MESSAGE_MAX)) });
            self.pass_progress().await;
        }
        if let Some(Escalate { reason, context, needs }) = directive.escalate {
            // A question must not overtake the progress before it.
            if let Some(report) = self.throttle.last() {
                self.shared.report(report).await;
            }
            self.pass_usage().await;
            self.shared.report(Report::Escalate { reason, context, needs }).await;
        }
        if directive.result.is_some() {
            *said = Said { result: directive.result, failure: None };
        }
        if let Some(fail) = directive.fail {
            let mut failure = fail.into_failure(now());
            failure.message = cut(failure.message, MESSAGE_MAX);
            said.failure = Some(failure);
        }
    }

    /// What was used is passed on once for all lines that came together.
    async fn pass_usage(&mut self) {
        let used = std::mem::take(&mut self.used);
        if !used.is_empty() {
            self.shared.report(Report::Used(used)).await;
        }
    }

    async fn pass_progress(&mut self) {
        if let Some(report) = self.throttle.ready(Instant::now()) {
            self.shared.report(report).await;
        }
    }

    async fn keep(&mut self, text: &[u8]) -> Result<(), Box<Failure>> {
        self.spool.write(text).await.map_err(|error| Box::new(unkept(&error)))?;
        if self.spool.printed <= self.output_max.get() {
            return Ok(());
        }
        let text = format!("it printed more than {}: runner.output_max is the most that is taken as a result", self.output_max);
        Err(Box::new(Failure { evidence: Some(self.spool.evidence()), ..Failure::new(FailureKind::Limit, text) }))
    }
}

/// The disk may have room again for the next attempt; this one was made.
pub(super) fn unkept(error: &io::Error) -> Failure {
    Failure::new(FailureKind::Crashed, format!("the output could not be kept: {error}"))
}

/// Reads standard error to its end.
pub(super) async fn read_stderr(source: impl AsyncRead + Unpin, mut log: Log, shared: &Shared) -> Log {
    let mut pipe = Pipe::new(source, shared);
    let mut chunk = vec![0; CHUNK];
    let mut broken = false;
    loop {
        let read = pipe.read(&mut chunk).await;
        if read == 0 {
            return log;
        }
        if let Err(error) = log.write(&chunk[..read]).await
            && !std::mem::replace(&mut broken, true)
        {
            tracing::warn!(%error, "a run's log cannot be written");
        }
    }
}

fn cut(mut text: String, max: usize) -> String {
    if text.len() > max {
        text.truncate(beginning(&text, max).len());
        text.push('…');
    }
    text
}
