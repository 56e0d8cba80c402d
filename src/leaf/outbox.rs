//! What an attempt has said while its agent runs and is not written yet: kept in order, and never more than so much of it.

use std::collections::VecDeque;
use std::mem::discriminant;

use crate::model::event::{Event, Kind};
use crate::model::time::Timestamp;

/// From so much on, what is said anew takes the place of what it makes obsolete.
const STEPS_MAX: usize = 64;
/// An agent with so many questions that nobody can hear yet is not listened to until some are written.
const UNHEARD_MAX: usize = 16;

/// What is written at once.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Step {
    /// This goes on the log.
    Say(Box<Event>),
    /// So does this question of the agent's, under the number that is the next one then.
    Ask(u32),
    /// The item has this deadline from now on.
    Extend(Timestamp),
}

impl Step {
    fn is_question(&self) -> bool {
        matches!(self, Self::Ask(_))
    }

    /// Makes this step say what a later one does, if nothing is missed then: of progress, of what was used in all, and of a deadline
    /// the last counts. Gives the later one back otherwise.
    fn take_over(&mut self, later: Self) -> Option<Self> {
        match (self, later) {
            (Self::Extend(deadline), Self::Extend(later)) => *deadline = later,
            (Self::Say(event), Self::Say(mut later)) if discriminant(&event.kind) == discriminant(&later.kind) => {
                match (&event.kind, &mut later.kind) {
                    (Kind::Used(_), Kind::Used(_)) => {}
                    (Kind::Progress { pct: before, message: said }, Kind::Progress { pct, message }) => {
                        *pct = pct.or(*before);
                        *message = message.take().or_else(|| said.clone());
                    }
                    _ => return Some(Self::Say(later)),
                }
                *event = later;
            }
            (_, later) => return Some(later),
        }
        None
    }
}

/// What waits to be written.
#[derive(Debug, Default)]
pub(super) struct Outbox(VecDeque<Step>);

impl Outbox {
    /// Takes one more step, to be written after all that was put here before; where there is no room, what it makes obsolete goes.
    pub(super) fn put(&mut self, step: Step) {
        let mut left = Some(step);
        if self.0.len() >= STEPS_MAX {
            for waiting in self.0.iter_mut().rev() {
                left = left.and_then(|step| waiting.take_over(step));
            }
        }
        self.0.extend(left);
    }

    /// What is to be written next.
    pub(super) fn next(&mut self) -> Option<Step> {
        self.0.pop_front()
    }

    /// Whether another question has room.
    pub(super) fn has_room(&self) -> bool {
        self.0.iter().filter(|step| step.is_question()).count() < UNHEARD_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::budget::Usage;
    use crate::model::event::Side;
    use crate::model::id::RunId;
    use crate::telemetry::{new_instance, new_work_id};

    fn say(kind: Kind) -> Step {
        Step::Say(Box::new(Event {
            work_id: new_work_id(),
            run_id: RunId::root_of(uuid::Uuid::from_u128(7)),
            at: Timestamp::from_millis(1),
            station: "s".parse().unwrap(),
            instance: new_instance(),
            side: Side::Leaf,
            attempt: 1,
            kind,
        }))
    }

    fn progress(pct: Option<f64>, message: Option<&str>) -> Step {
        say(Kind::Progress { pct, message: message.map(str::to_owned) })
    }

    fn kinds(mut outbox: Outbox) -> Vec<Kind> {
        let said = |step| match step {
            Step::Say(event) => Some(event.kind),
            Step::Ask(_) | Step::Extend(_) => None,
        };
        std::iter::from_fn(|| outbox.next()).filter_map(said).collect()
    }

    #[test]
    fn all_that_has_room_is_written_in_its_order() {
        let mut outbox = Outbox::default();
        let steps =
            [progress(Some(1.0), None), Step::Ask(1), progress(Some(2.0), None), Step::Extend(Timestamp::from_millis(9)), Step::Ask(2)];
        steps.iter().for_each(|step| outbox.put(step.clone()));
        assert_eq!(std::iter::from_fn(|| outbox.next()).collect::<Vec<_>>(), steps);
    }

    #[test]
    fn without_room_the_last_progress_and_usage_count_and_no_question_is_lost() {
        let mut outbox = Outbox::default();
        let tokens = |tokens| say(Kind::Used(Usage { tokens, ..Usage::default() }));
        outbox.put(progress(None, Some("began")));
        let mut asked = 0;
        for n in 1..=1000u32 {
            outbox.put(progress(Some(n.into()), None));
            outbox.put(tokens(n.into()));
            outbox.put(Step::Extend(Timestamp::from_millis(n.into())));
            if outbox.has_room() {
                asked += 1;
                outbox.put(Step::Ask(asked));
            }
        }
        assert!(asked >= 16 && !outbox.has_room() && outbox.0.len() <= STEPS_MAX + UNHEARD_MAX + 3, "{asked}, {}", outbox.0.len());
        assert_eq!(outbox.0.iter().rev().find(|step| matches!(step, Step::Extend(_))), Some(&Step::Extend(Timestamp::from_millis(1000))));
        let questions: Vec<u32> = outbox.0.iter().filter_map(|step| if let Step::Ask(own) = step { Some(*own) } else { None }).collect();
        assert_eq!(questions, (1..=asked).collect::<Vec<_>>());
        let kinds = kinds(outbox);
        let last = |is: fn(&Kind) -> bool| kinds.iter().rev().find(|kind| is(kind)).cloned();
        assert_eq!(last(|kind| matches!(kind, Kind::Used(_))), Some(Kind::Used(Usage { tokens: 1000, ..Usage::default() })));
        assert_eq!(last(|kind| matches!(kind, Kind::Progress { .. })), Some(Kind::Progress { pct: Some(1000.0), message: None }));
    }

    #[test]
    fn merged_progress_keeps_what_only_the_earlier_one_said() {
        let mut outbox = Outbox::default();
        (0..STEPS_MAX).for_each(|_| outbox.put(progress(None, Some("reading"))));
        outbox.put(progress(Some(7.0), None));
        assert_eq!(kinds(outbox).last(), Some(&Kind::Progress { pct: Some(7.0), message: Some("reading".into()) }));
    }
}
