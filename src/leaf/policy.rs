//! What to do with an attempt, decided from the work's fold alone.

use crate::model::event::{Failure, FailureKind};
use crate::model::retry::Policy;
use crate::model::work::Work;

/// What a leaf does with work that it has taken.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Verdict {
    /// It is settled: let go of it.
    Drop,
    /// Somebody wants it cancelled: confirm that.
    Cancel(Option<String>),
    /// It has no attempt left.
    GiveUp(Failure),
    /// Run it.
    Run,
}

/// Decides before an attempt.
pub(super) fn before(work: &Work, attempt: u32, policy: &Policy) -> Verdict {
    let Some(mark) = work.status.mark() else { return Verdict::Drop };
    if mark.cancelling {
        return Verdict::Cancel(work.cancel_reason.clone());
    }
    let earlier = work.attempts.iter().rev().find(|earlier| earlier.number < attempt);
    // Nobody said how it ended: its process died, or lost the work. One that only waited for an answer gave up nothing with it.
    let crashed = earlier.is_some_and(|earlier| earlier.ended.is_none() && !earlier.waits);
    if crashed && !policy.retries(FailureKind::Crashed) {
        return Verdict::GiveUp(Failure::new(
            FailureKind::Crashed,
            "the process that ran it gave no more sign of life, and the agent is not tried again after that",
        ));
    }
    let max = policy.max_attempts;
    if work.attempts_burnt(attempt) < max {
        return Verdict::Run;
    }
    let message = format!("all {max} attempts are used up, and the last one gave no result: its process gave no more sign of life");
    let last = earlier.and_then(|earlier| earlier.ended.clone());
    let mut failure = last.unwrap_or_else(|| Failure::new(FailureKind::Crashed, message));
    failure.dead_letter = true;
    Verdict::GiveUp(failure)
}
