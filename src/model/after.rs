//! Works that a work waits for, and what their ends mean for it.

use serde::{Deserialize, Serialize};

use super::event::{Failure, FailureKind};
use super::id::WorkId;
use super::work::Outcome;

/// What a work waits for before its first attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct After {
    /// The works, each once, in the caller's order.
    pub work_ids: Vec<WorkId>,
    /// What happens when one of them has no result.
    #[serde(default)]
    pub if_failed: IfFailed,
}

/// What becomes of a work when one that it waits for fails or is cancelled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IfFailed {
    /// It fails with one that failed, and is cancelled with one that was cancelled.
    #[default]
    Follow,
    /// It fails.
    Fail,
    /// It is cancelled.
    Cancel,
    /// It starts all the same, once all have settled.
    Run,
}

/// What is to be done about a work that waits.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// It waits on.
    Wait,
    /// It may start.
    Start,
    /// It fails.
    Fail(Failure),
    /// It is cancelled, for this reason.
    Cancel(String),
}

impl After {
    /// Decides from how those that it waits for have ended, in the order of `work_ids`; `None` for one that has not.
    pub fn verdict(&self, ends: &[Option<&Outcome>]) -> Verdict {
        let ended = || self.work_ids.iter().zip(ends).filter_map(|(id, end)| Some((id, (*end)?)));
        if self.if_failed != IfFailed::Run {
            let failed = ended().find_map(|(id, end)| match end {
                Outcome::Failed(failure) => Some((id, format!("failed: {}", failure.message))),
                _ => None,
            });
            let cancelled = ended().find(|(_, end)| matches!(end, Outcome::Cancelled(_))).map(|(id, _)| (id, "was cancelled".to_owned()));
            let follows = if failed.is_some() { IfFailed::Fail } else { IfFailed::Cancel };
            if let Some((id, how)) = failed.or(cancelled) {
                let text = format!("work {id}, which it waited for, {how}");
                let wanted = if self.if_failed == IfFailed::Follow { follows } else { self.if_failed };
                return match wanted {
                    IfFailed::Cancel => Verdict::Cancel(text),
                    _ => Verdict::Fail(Failure::new(FailureKind::Dependency, text)),
                };
            }
        }
        let all = ends.len() >= self.work_ids.len() && ends.iter().all(Option::is_some);
        if all { Verdict::Start } else { Verdict::Wait }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::output::Output;
    use proptest::prelude::*;

    fn outcome() -> impl Strategy<Value = Outcome> {
        prop_oneof![
            3 => Just(Outcome::Complete(Output::Inline(serde_json::json!(1)))),
            1 => Just(Outcome::Failed(Failure::new(FailureKind::Agent, "no"))),
            1 => Just(Outcome::Cancelled(None)),
        ]
    }

    fn after(count: usize, if_failed: IfFailed) -> After {
        After { work_ids: (0..count as u128).map(|n| WorkId::new(uuid::Uuid::from_u128(n))).collect(), if_failed }
    }

    proptest! {
        /// Whoever knows more of the ends never takes back a start, and starts nothing that somebody else has ended.
        #[test]
        fn a_work_starts_once_all_it_waits_for_are_complete_and_never_before(
            ends in prop::collection::vec(outcome(), 1..6), known in prop::collection::vec(any::<bool>(), 6),
            choice in prop_oneof![Just(IfFailed::Follow), Just(IfFailed::Fail), Just(IfFailed::Cancel), Just(IfFailed::Run)],
        ) {
            let after = after(ends.len(), choice);
            let some: Vec<Option<&Outcome>> = ends.iter().zip(&known).map(|(end, known)| known.then_some(end)).collect();
            let all: Vec<Option<&Outcome>> = ends.iter().map(Some).collect();
            let complete = ends.iter().all(|end| matches!(end, Outcome::Complete(_)));
            let failed = ends.iter().any(|end| matches!(end, Outcome::Failed(_)));
            let finally = after.verdict(&all);
            match (complete || choice == IfFailed::Run, choice) {
                (true, _) => prop_assert_eq!(&finally, &Verdict::Start),
                (false, IfFailed::Fail) => prop_assert!(matches!(finally, Verdict::Fail(_))),
                (false, IfFailed::Cancel) => prop_assert!(matches!(finally, Verdict::Cancel(_))),
                (false, _) => prop_assert_eq!(matches!(finally, Verdict::Fail(_)), failed),
            }
            match after.verdict(&some) {
                Verdict::Wait => prop_assert!(some.iter().any(Option::is_none)),
                Verdict::Start => prop_assert_eq!(some, all),
                Verdict::Fail(_) | Verdict::Cancel(_) => prop_assert!(finally != Verdict::Start),
            }
        }
    }

    #[test]
    fn the_reason_names_the_work() {
        let after = after(2, IfFailed::Follow);
        let failed = Outcome::Failed(Failure::new(FailureKind::Agent, "no such file"));
        let Verdict::Fail(failure) = after.verdict(&[None, Some(&failed)]) else { panic!("it did not fail") };
        assert!(failure.message.contains("000000000001, which it waited for, failed: no such file"), "{}", failure.message);
        let Verdict::Cancel(reason) = after.verdict(&[Some(&Outcome::Cancelled(None)), None]) else { panic!("it was not cancelled") };
        assert!(reason.contains("was cancelled"), "{reason}");
    }
}
