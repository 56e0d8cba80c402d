//! What to do with an attempt, decided from the work's fold alone.

use crate::model::event::{Failure, FailureKind};
use crate::model::id::InstanceId;
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
    /// Its last attempt has not said how it ended: it has failed if the process that ran it is dead, and else that may still come.
    Unknown(InstanceId, Failure),
    /// Run it.
    Run,
}

/// Decides before an attempt.
pub(super) fn before(work: &Work, attempt: u32, policy: &Policy) -> Verdict {
    let Some(mark) = work.status.mark() else { return Verdict::Drop };
    if mark.cancelling {
        return Verdict::Cancel(work.cancel_reason.clone());
    }
    let burns = |ended: &Failure| ended.kind.burns_attempt();
    let last = work.attempts.iter().rev().find(|earlier| earlier.number < attempt && earlier.ended.as_ref().is_none_or(burns));
    // Nobody said how it ended: its process died, or sleeps. One that only waited for an answer gave up nothing with it.
    let silent = last.filter(|last| last.ended.is_none());
    if let Some(silent) = silent.filter(|last| !last.waits && !policy.retries(FailureKind::Crashed)) {
        let text = "the process that ran it gave no more sign of life, and the agent is not tried again after that";
        return Verdict::Unknown(silent.instance, Failure::new(FailureKind::Crashed, text));
    }
    let max = policy.max_attempts;
    if work.attempts_burnt(attempt) < max {
        return Verdict::Run;
    }
    let message = format!("all {max} attempts are used up, and the last one gave no result: its process gave no more sign of life");
    let ended = last.and_then(|last| last.ended.clone());
    let failure = Failure { dead_letter: true, ..ended.unwrap_or_else(|| Failure::new(FailureKind::Crashed, message)) };
    match silent {
        Some(silent) => Verdict::Unknown(silent.instance, failure),
        None => Verdict::GiveUp(failure),
    }
}

/// Whether an attempt may go on although its hold is lost: whoever has the item now has begun nothing, and the work has not settled.
pub(super) fn goes_on(work: &Work, attempt: u32) -> bool {
    work.status.mark().is_some_and(|mark| mark.attempt <= attempt)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::event::{Ask, Event, Kind, Needs, Side};
    use crate::model::id::{RunId, WorkId};
    use crate::model::retry::{Backoff, Retried};
    use crate::model::time::Timestamp;

    /// How an attempt has gone, as far as anybody said.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Went {
        Silent,
        Asking,
        Busy,
        HandedBack,
    }

    fn process(attempt: u32) -> InstanceId {
        InstanceId::new(uuid::Uuid::from_u128(u128::from(attempt)))
    }

    fn event(attempt: u32, kind: Kind) -> Event {
        let (work_id, run_id) = (WorkId::new(uuid::Uuid::from_u128(7)), RunId::root_of(uuid::Uuid::from_u128(8)));
        let (at, station) = (Timestamp::from_millis(i64::from(attempt)), "north".parse().unwrap());
        Event { work_id, run_id, at, station, instance: process(attempt), side: Side::Leaf, attempt, kind }
    }

    fn work(attempts: &[Went]) -> Work {
        let mut events = vec![event(0, Kind::Progress { pct: None, message: None })];
        for (number, went) in (1..).zip(attempts) {
            events.push(event(number, Kind::Accepted));
            let failed = |kind| Kind::Retrying { failure: Failure::new(kind, "so"), next_at: Timestamp::from_millis(0) };
            let ask = || Ask {
                ask: number,
                reason: "may I?".into(),
                context: serde_json::Value::Null,
                needs: Needs::Orchestrator,
                parked: false,
            };
            events.extend(match went {
                Went::Silent => None,
                Went::Asking => Some(event(number, Kind::Escalate(ask()))),
                Went::Busy => Some(event(number, failed(FailureKind::Transient))),
                Went::HandedBack => Some(event(number, failed(FailureKind::HandedBack))),
            });
        }
        Work::fold(&events).unwrap()
    }

    fn policy(max_attempts: u32, on: Vec<Retried>) -> Policy {
        let (initial_delay, max_delay) = (std::time::Duration::ZERO, std::time::Duration::ZERO);
        Policy { max_attempts, backoff: Backoff::Fixed, initial_delay, max_delay, jitter_percent: 0, on }
    }

    fn decide(attempts: &[Went], policy: &Policy) -> Verdict {
        before(&work(attempts), u32::try_from(attempts.len()).unwrap() + 1, policy)
    }

    #[test]
    fn the_last_attempt_has_failed_only_when_it_said_so_or_its_process_is_dead() {
        use Went::{Asking, Busy, HandedBack, Silent};
        let policy = policy(2, vec![Retried::Transient, Retried::Crashed]);
        assert_eq!(decide(&[Silent], &policy), Verdict::Run);
        assert_eq!(decide(&[Silent, HandedBack, Asking], &policy), Verdict::Run);
        assert!(matches!(decide(&[Silent, Busy], &policy), Verdict::GiveUp(failure) if failure.kind == FailureKind::Transient));
        for attempts in [&[Busy, Silent][..], &[Silent, Silent], &[Silent, Silent, HandedBack]] {
            let Verdict::Unknown(whose, failure) = decide(attempts, &policy) else { panic!("{attempts:?}") };
            assert_eq!((whose, failure.kind, failure.dead_letter), (process(2), FailureKind::Crashed, true), "{attempts:?}");
        }
    }

    #[test]
    fn what_is_not_tried_again_after_a_crash_waits_for_the_same_certainty() {
        let policy = policy(9, vec![Retried::Transient]);
        assert!(
            matches!(decide(&[Went::Silent], &policy), Verdict::Unknown(whose, failure) if whose == process(1) && !failure.dead_letter)
        );
        assert_eq!(decide(&[Went::Asking], &policy), Verdict::Run);
    }

    #[test]
    fn an_attempt_goes_on_until_a_later_one_begins_or_the_work_settles() {
        let mut asleep = work(&[Went::Silent]);
        assert!(goes_on(&asleep, 1) && !goes_on(&work(&[Went::Silent, Went::Silent]), 1));
        asleep.apply(&event(3, Kind::Failed { failure: Failure::new(FailureKind::TotalTimeout, "late"), duration_ms: 0 }));
        assert!(!goes_on(&asleep, 1));
    }

    proptest! {
        #[test]
        fn nobody_is_declared_dead_for_being_silent(
            attempts in proptest::collection::vec(prop_oneof![Just(Went::Silent), Just(Went::Asking), Just(Went::Busy), Just(Went::HandedBack)], 0..8),
            max in 1u32..5,
            retries in any::<bool>(),
        ) {
            let policy = policy(max, if retries { vec![Retried::Crashed] } else { vec![] });
            let last = attempts.iter().rposition(|went| *went != Went::HandedBack);
            let burnt = attempts.iter().filter(|went| matches!(went, Went::Silent | Went::Busy)).count();
            match decide(&attempts, &policy) {
                Verdict::Run => prop_assert!(burnt < max as usize),
                Verdict::GiveUp(failure) => {
                    prop_assert!(burnt >= max as usize && failure.dead_letter);
                    prop_assert_eq!(attempts[last.unwrap()], Went::Busy);
                }
                Verdict::Unknown(whose, failure) => {
                    prop_assert_eq!(whose, process(u32::try_from(last.unwrap()).unwrap() + 1));
                    prop_assert_eq!(failure.kind, FailureKind::Crashed);
                    prop_assert!(attempts[last.unwrap()] != Went::Busy);
                }
                other => prop_assert!(false, "{other:?}"),
            }
        }
    }
}
