//! What to do with an attempt, decided from the work's fold alone.

use std::time::Duration;

use crate::config::{Backoff, Retry};
use crate::model::agent::Limits;
use crate::model::event::{Failure, FailureKind};
use crate::model::time::Timestamp;
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
pub(super) fn before(work: &Work, attempt: u32, retry: &Retry, limits: &Limits) -> Verdict {
    let Some(mark) = work.status.mark() else { return Verdict::Drop };
    if mark.cancelling {
        return Verdict::Cancel(work.cancel_reason.clone());
    }
    let max = attempts_max(retry, limits);
    let burnt = work.attempts_burnt(attempt);
    if burnt < max {
        return Verdict::Run;
    }
    let message = format!("all {max} attempts are used up, and the last one gave no result: its process died");
    let last = work.attempts.iter().rev().find_map(|attempt| attempt.ended.clone());
    let mut failure = last.unwrap_or_else(|| Failure::new(FailureKind::Crashed, message));
    failure.dead_letter = true;
    Verdict::GiveUp(failure)
}

/// What a leaf does with work whose attempt failed.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum After {
    /// It failed for good.
    Fail(Failure),
    /// Another attempt follows, not before this moment.
    Retry(Failure, Timestamp),
}

/// Decides after a failed attempt; `burnt` counts this one too.
pub(super) fn after(mut failure: Failure, burnt: u32, retry: &Retry, limits: &Limits, now: Timestamp, deadline: Timestamp) -> After {
    if !failure.kind.worth_retrying() {
        return After::Fail(failure);
    }
    let next_at = now.after(delay(retry, burnt));
    if retry.enabled && burnt < attempts_max(retry, limits) && next_at < deadline {
        return After::Retry(failure, next_at);
    }
    failure.dead_letter = true;
    After::Fail(failure)
}

fn attempts_max(retry: &Retry, limits: &Limits) -> u32 {
    limits.max_attempts.unwrap_or(retry.max_attempts).max(1)
}

fn delay(retry: &Retry, burnt: u32) -> Duration {
    let first = retry.initial_delay.get();
    let grown = match retry.backoff {
        Backoff::Fixed => first,
        Backoff::Linear => first.saturating_mul(burnt.max(1)),
        Backoff::Exponential => first.saturating_mul(1u32.checked_shl(burnt.saturating_sub(1)).unwrap_or(u32::MAX)),
    };
    grown.min(retry.max_delay.get())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_as_configured() {
        let retry = Retry::default();
        assert_eq!([1, 2, 3].map(|burnt| delay(&retry, burnt).as_secs()), [1, 2, 4]);
        assert_eq!(delay(&retry, 99).as_secs(), 300);
        let linear = Retry { backoff: Backoff::Linear, ..Retry::default() };
        assert_eq!([1, 2, 3].map(|burnt| delay(&linear, burnt).as_secs()), [1, 2, 3]);
    }

    #[test]
    fn only_failures_worth_it_are_retried() {
        let (retry, limits, now) = (Retry::default(), Limits::default(), Timestamp::from_millis(0));
        let late = Timestamp::from_millis(1_000_000);
        let transient = || Failure::new(FailureKind::Transient, "busy");
        assert_eq!(after(transient(), 1, &retry, &limits, now, late), After::Retry(transient(), Timestamp::from_millis(1000)));
        assert!(matches!(after(transient(), 3, &retry, &limits, now, late), After::Fail(failure) if failure.dead_letter));
        assert!(matches!(after(transient(), 1, &retry, &limits, now, now), After::Fail(failure) if failure.dead_letter));
        let agent = Failure::new(FailureKind::Agent, "no");
        assert_eq!(after(agent.clone(), 1, &retry, &limits, now, late), After::Fail(agent));
        let off = Retry { enabled: false, ..retry };
        assert!(matches!(after(transient(), 1, &off, &limits, now, late), After::Fail(_)));
    }
}
