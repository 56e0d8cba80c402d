//! What the parts of one run tell each other and the leaf.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::model::event::Failure;
use crate::model::output::Output;
use crate::runner::{Answer, Report};

const ALIVE_EVERY: Duration = Duration::from_secs(1);

/// One run's common state.
pub(super) struct Shared {
    reports: mpsc::Sender<Report>,
    /// Cancelled when the agent must stop.
    pub(super) stop: CancellationToken,
    /// Cancelled when the run cannot go on.
    pub(super) raised: CancellationToken,
    /// Cancelled when nothing of the run is alive: what still stands in its pipes is all there will be.
    pub(super) drain: CancellationToken,
    /// Cancelled when both output pipes have been read to their end.
    pub(super) heard: CancellationToken,
    trouble: OnceLock<Failure>,
    note: OnceLock<String>,
    alive_at: Mutex<Option<Instant>>,
    /// What the program has asked and has no answer to.
    asked: Mutex<Vec<(String, Value)>>,
}

impl Shared {
    /// The state at a run's beginning.
    pub(super) fn new(reports: mpsc::Sender<Report>, stop: CancellationToken) -> Self {
        Self {
            reports,
            stop,
            raised: CancellationToken::new(),
            drain: CancellationToken::new(),
            heard: CancellationToken::new(),
            trouble: OnceLock::new(),
            note: OnceLock::new(),
            alive_at: Mutex::new(None),
            asked: Mutex::default(),
        }
    }

    /// Passes a report on; waits for room, but not when the run is to stop.
    pub(super) async fn report(&self, report: Report) {
        if let Report::Escalate { reason, context, .. } = &report {
            self.asked.lock().unwrap_or_else(PoisonError::into_inner).push((reason.clone(), context.clone()));
        }
        tokio::select! {
            biased;
            _ = self.reports.send(report) => {}
            () = self.stop.cancelled() => {}
        }
    }

    /// Passes on what the program had printed when it was stopped; a leaf that does not listen is not waited for.
    pub(super) async fn printed(&self, output: Output) {
        let _ = self.reports.send_timeout(Report::Printed(output), ALIVE_EVERY).await;
    }

    /// Notes that the program printed something.
    pub(super) fn alive(&self) {
        let now = Instant::now();
        let mut last = self.alive_at.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_none_or(|last| now.duration_since(last) >= ALIVE_EVERY) {
            // Without room there are reports enough that say the same.
            let _ = self.reports.try_send(Report::Alive);
            *last = Some(now);
        }
    }

    /// Ends the run with this failure; the first one counts.
    pub(super) fn raise(&self, failure: Failure) {
        let _ = self.trouble.set(failure);
        self.raised.cancel();
    }

    /// The failure that ended the run.
    pub(super) fn trouble(&self) -> Option<&Failure> {
        self.trouble.get()
    }

    /// Remembers a note for the run's log; the first one counts.
    pub(super) fn note(&self, text: String) {
        let _ = self.note.set(text);
    }

    /// The note for the run's log.
    pub(super) fn noted(&self) -> Option<&str> {
        self.note.get().map(String::as_str)
    }

    /// An answer has reached the program.
    pub(super) fn answered(&self, answer: &Answer) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = asked.iter().position(|(reason, context)| *reason == answer.reason && *context == answer.context) {
            asked.remove(at);
        }
    }

    /// Whether a question of the program's own is open.
    pub(super) fn is_asking(&self) -> bool {
        !self.asked.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}
