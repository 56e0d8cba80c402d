//! Where a work stands: one pure function of its events.

use serde::{Deserialize, Serialize};

use super::event::{Ask, Event, Kind};

/// Where a work stands. Settled states are final.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    /// It waits: for its first attempt, or for the one after `mark.attempt`.
    Pending(Mark),
    /// Attempt `mark.attempt` runs.
    Accepted(Mark),
    /// Attempt `mark.attempt` asked question `ask` and waits.
    Escalated {
        /// How far it has come.
        mark: Mark,
        /// The number of the open question that is shown; there may be more of them.
        ask: u32,
        /// The agent has ended; the answer starts another attempt.
        parked: bool,
    },
    /// Settled: delivered.
    Complete,
    /// Settled: failed.
    Failed,
    /// Settled: cancelled.
    Cancelled,
}

/// What an unsettled work remembers so that late and repeated events change nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The highest attempt seen.
    pub attempt: u32,
    /// The highest question answered.
    pub answered: u32,
    /// Somebody asked to cancel.
    pub cancelling: bool,
}

impl Default for Status {
    fn default() -> Self {
        Self::Pending(Mark::default())
    }
}

impl Status {
    /// The status after one more event: total, and the only place that decides it. `open` is the first question of the attempt that
    /// has no answer once the event counts.
    #[must_use]
    pub fn after(self, event: &Event, open: Option<u32>) -> Self {
        let Some(mark) = self.mark() else { return self };
        let attempt = event.attempt;
        let newer = attempt > mark.attempt;
        let current = attempt == mark.attempt;
        let running = Mark { attempt: attempt.max(mark.attempt), ..mark };
        match &event.kind {
            Kind::Assigned(_) | Kind::Used(_) | Kind::Redriven { .. } | Kind::Other(_) => self,
            Kind::Complete { .. } => Self::Complete,
            Kind::Failed { .. } if newer || current => Self::Failed,
            Kind::Cancelled { .. } if attempt > 0 && (newer || current) => Self::Cancelled,
            Kind::Cancelled { .. } if attempt == 0 => self.asked_to_stop(mark),
            Kind::Retrying { .. } if newer || current => Self::Pending(running).unless_cancelling(),
            Kind::Accepted | Kind::Progress { .. } if newer => Self::Accepted(running),
            Kind::Escalate(ask) if newer => Self::Accepted(running).asking(ask, open),
            Kind::Escalate(ask) if current => self.asking(ask, open),
            Kind::Answered { ask, .. } => self.answered(*ask, open),
            _ => self,
        }
    }

    /// What an unsettled work remembers.
    pub const fn mark(self) -> Option<Mark> {
        match self {
            Self::Pending(mark) | Self::Accepted(mark) | Self::Escalated { mark, .. } => Some(mark),
            Self::Complete | Self::Failed | Self::Cancelled => None,
        }
    }

    /// Whether nothing can change it any more.
    pub const fn is_settled(self) -> bool {
        self.mark().is_none()
    }

    /// The word that tools and the command line use.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Pending(_) => "PENDING",
            Self::Accepted(_) => "ACCEPTED",
            Self::Escalated { .. } => "ESCALATED",
            Self::Complete => "COMPLETE",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
        }
    }

    /// Work that no attempt holds is cancelled at once; held work only when its leaf confirms.
    fn asked_to_stop(self, mark: Mark) -> Self {
        let mark = Mark { cancelling: true, ..mark };
        match self {
            Self::Accepted(_) => Self::Accepted(mark),
            Self::Escalated { ask, parked: false, .. } => Self::Escalated { mark, ask, parked: false },
            _ => Self::Cancelled,
        }
    }

    fn unless_cancelling(self) -> Self {
        match self.mark() {
            Some(mark) if mark.cancelling => Self::Cancelled,
            _ => self,
        }
    }

    fn asking(self, asked: &Ask, open: Option<u32>) -> Self {
        match (self, open) {
            (Self::Accepted(mark), Some(ask)) => Self::Escalated { mark, ask, parked: asked.parked }.unless_parked_while_cancelling(),
            // The answer came first: the attempt is over, and the next one has it.
            (Self::Accepted(mark), None) if asked.parked => Self::Pending(mark).unless_cancelling(),
            // Whoever is shown a question answers that one, whatever is asked meanwhile.
            (Self::Escalated { mark, ask, parked }, _) => {
                Self::Escalated { mark, ask, parked: parked || asked.parked }.unless_parked_while_cancelling()
            }
            (other, _) => other,
        }
    }

    fn unless_parked_while_cancelling(self) -> Self {
        match self {
            Self::Escalated { parked: true, .. } => self.unless_cancelling(),
            _ => self,
        }
    }

    fn answered(self, answered: u32, open: Option<u32>) -> Self {
        let raise = |mark: Mark| Mark { answered: answered.max(mark.answered), ..mark };
        match self {
            Self::Pending(mark) => Self::Pending(raise(mark)),
            Self::Accepted(mark) => Self::Accepted(raise(mark)),
            Self::Escalated { mark, ask, parked } => {
                let (mark, shown) = (raise(mark), if ask == answered { open } else { Some(ask) });
                match shown {
                    Some(ask) => Self::Escalated { mark, ask, parked },
                    None if parked => Self::Pending(mark),
                    None => Self::Accepted(mark),
                }
            }
            other => other,
        }
    }
}
