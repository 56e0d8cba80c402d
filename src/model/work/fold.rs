//! How each event changes a work: what counts, what is kept of it, and what comes too late.

use super::{Attempt, Exchange, Outcome, Work};
use crate::model::budget::Usage;
use crate::model::event::{Event, Failure, FailureKind, Kind, Side};
use crate::model::id::{RunId, WorkId};
use crate::model::status::Status;
use crate::model::time::Timestamp;

impl Work {
    /// Folds events, in the log's order; `None` without any.
    pub fn fold<'a>(events: impl IntoIterator<Item = &'a Event>) -> Option<Self> {
        let mut events = events.into_iter();
        let first = events.next()?;
        let mut work = Self::begin(first);
        work.apply(first);
        events.for_each(|event| work.apply(event));
        Some(work)
    }

    /// An empty fold, for the work of this event.
    pub fn begin(event: &Event) -> Self {
        Self::unknown(event.work_id, event.run_id.clone(), event.at)
    }

    /// A work of which nothing is known but its ids, as of this moment.
    pub(super) fn unknown(work_id: WorkId, run_id: RunId, updated_at: Timestamp) -> Self {
        Self {
            work_id,
            run_id,
            status: Status::default(),
            event: String::new(),
            assignment: None,
            progress_pct: None,
            progress_msg: None,
            exchanges: Vec::new(),
            attempts: Vec::new(),
            retry_at: None,
            released_at: None,
            printed: None,
            cancel_reason: None,
            outcome: None,
            duration_ms: None,
            checks: Vec::new(),
            used: Vec::new(),
            updated_at,
            settled_at: None,
            redriven_as: None,
            is_elsewhere: false,
            stop_asked: false,
            late_events: 0,
            events: 0,
            asking: Vec::new(),
        }
    }

    /// Whether an event is of somebody who may say it; others change nothing.
    ///
    /// A leaf's word counts only from the station that the work was given to, and never for an assigner's. Until the order is
    /// known that station is not: a taking may reach the log before it, and nobody else knows the work's id by then.
    pub fn heeds(&self, event: &Event) -> bool {
        let holds = self.assignment.as_ref().is_none_or(|order| order.target_station == event.station);
        let side = if event.side == Side::Heard { Side::Assigner } else { event.side };
        match (side, &event.kind) {
            // No leaf runs an order over many items: whoever finds how far its works are says so.
            (Side::Assigner, Kind::Accepted | Kind::Progress { .. } | Kind::Complete { .. }) if self.is_map() => true,
            (Side::Assigner, Kind::Accepted | Kind::Progress { .. } | Kind::Complete { .. } | Kind::Retrying { .. })
            | (Side::Assigner, Kind::Used(_) | Kind::Printed(_))
            | (Side::Leaf, Kind::Answered { .. } | Kind::Redriven { .. }) => false,
            (Side::Leaf, Kind::Cancelled { .. }) if event.attempt == 0 => false,
            // A leaf that found no order on the log repeats the one that its hook had.
            (Side::Leaf, Kind::Assigned(order)) => holds && order.target_station == event.station,
            (Side::Leaf, _) => holds,
            (Side::Assigner | Side::Heard, _) => true,
        }
    }

    /// Takes in one more event.
    pub fn apply(&mut self, event: &Event) {
        if !self.heeds(event) {
            return;
        }
        let before = self.status;
        self.is_elsewhere |= event.side == Side::Heard;
        if self.is_elsewhere && event.side == Side::Assigner && !before.is_settled() {
            // Of several words the one counts that was heard first where the work lives, whatever stands first here.
            match event.kind {
                Kind::Cancelled { .. } if event.attempt == 0 => return self.stop_asked = true,
                Kind::Answered { .. } => return,
                _ => {}
            }
        }
        self.events += 1;
        if let Kind::Used(usage) = &event.kind {
            // What was used was used, however the work has gone on since.
            return self.note_usage(event.attempt, *usage);
        }
        self.note_attempt(event);
        if let Kind::Assigned(assignment) = &event.kind {
            self.assignment.get_or_insert_with(|| assignment.clone());
        }
        if before.is_settled() {
            if let Kind::Redriven { work_id } = event.kind {
                self.redriven_as.get_or_insert(work_id);
                return;
            }
            // A leaf that accepts settled work finds out and stops: nothing to keep.
            self.late_events += u32::from(!matches!(event.kind, Kind::Assigned(_) | Kind::Other(_) | Kind::Accepted | Kind::Released));
            return;
        }
        self.status = before.after(event, self.open_after(event));
        if self.status.is_settled() {
            self.note_end(event);
            self.settle(event);
        } else if !self.take_in(before, event) {
            // Several may release a work.
            self.late_events += u32::from(!matches!(event.kind, Kind::Released));
            return;
        }
        if !matches!(event.kind, Kind::Redriven { .. } | Kind::Other(_)) {
            event.kind.wire_type().clone_into(&mut self.event);
            self.updated_at = self.updated_at.max(event.at);
        }
    }

    /// The first question of the attempt without an answer, once an event counts.
    fn open_after(&self, event: &Event) -> Option<u32> {
        let mark = self.status.mark()?;
        let others = self.unanswered(Some(event.attempt.max(mark.attempt))).map(|asked| asked.ask);
        match &event.kind {
            Kind::Answered { ask, .. } => others.filter(|other| other != ask).min(),
            Kind::Escalate(asked) => {
                let is_answered = self.exchanges.iter().any(|known| known.ask.ask == asked.ask && known.answer.is_some());
                others.chain((!is_answered).then_some(asked.ask)).min()
            }
            _ => others.min(),
        }
    }

    fn note_attempt(&mut self, event: &Event) {
        if event.attempt == 0 || !matches!(event.kind, Kind::Accepted | Kind::Retrying { .. } | Kind::Escalate(_)) {
            return;
        }
        let at = self.attempts.partition_point(|attempt| attempt.number < event.attempt);
        if self.attempts.get(at).is_none_or(|attempt| attempt.number != event.attempt) {
            let begun = Attempt {
                number: event.attempt,
                station: event.station.clone(),
                instance: event.instance,
                started_at: event.at,
                ended: None,
                waits: false,
            };
            self.attempts.insert(at, begun);
        }
        self.attempts[at].waits = matches!(event.kind, Kind::Escalate(_));
        match &event.kind {
            Kind::Retrying { failure, .. } => self.attempts[at].ended = Some(failure.clone()),
            Kind::Escalate(ask) if ask.parked => {
                let waits = Failure::new(FailureKind::HandedBack, "ended to wait for an answer");
                self.attempts[at].ended.get_or_insert(waits);
            }
            _ => {}
        }
    }

    fn note_usage(&mut self, attempt: u32, usage: Usage) {
        match self.used.iter_mut().find(|(number, _)| *number == attempt) {
            Some((_, known)) => *known = known.or_more(usage),
            None => self.used.push((attempt, usage)),
        }
    }

    /// A failure that settles the work ends the attempt that said so.
    fn note_end(&mut self, event: &Event) {
        let Kind::Failed { failure, .. } = &event.kind else { return };
        if let Some(attempt) = self.attempts.iter_mut().find(|attempt| attempt.number == event.attempt && attempt.ended.is_none()) {
            attempt.ended = Some(failure.clone());
        }
    }

    fn settle(&mut self, event: &Event) {
        self.settled_at = Some(event.at);
        self.retry_at = None;
        self.outcome = Some(match &event.kind {
            Kind::Complete { result, duration_ms, checks } => {
                self.duration_ms = Some(*duration_ms);
                self.checks.clone_from(checks);
                Outcome::Complete(result.clone())
            }
            Kind::Failed { failure, duration_ms } => {
                self.duration_ms = Some(*duration_ms);
                self.checks.clone_from(&failure.checks);
                Outcome::Failed(failure.clone())
            }
            Kind::Cancelled { reason } => Outcome::Cancelled(reason.clone().or(self.cancel_reason.take())),
            _ => Outcome::Cancelled(self.cancel_reason.take()),
        });
    }

    /// Keeps the details of an event that left the work unsettled; false when it came too late to count.
    fn take_in(&mut self, before: Status, event: &Event) -> bool {
        let mark = before.mark().unwrap_or_default();
        if event.attempt != 0 && event.attempt < mark.attempt {
            return false;
        }
        match &event.kind {
            Kind::Assigned(_) | Kind::Redriven { .. } | Kind::Other(_) => {}
            Kind::Accepted if event.attempt > mark.attempt => {
                (self.progress_pct, self.progress_msg, self.retry_at) = (None, None, None);
            }
            Kind::Progress { pct, message } if matches!(self.status, Status::Accepted(_) | Status::Escalated { parked: false, .. }) => {
                self.progress_pct = pct.or(self.progress_pct);
                self.progress_msg = message.clone().or(self.progress_msg.take());
            }
            Kind::Retrying { failure, next_at } => {
                self.retry_at = Some(*next_at);
                self.checks.clone_from(&failure.checks);
            }
            Kind::Released if self.waits_for().is_some() => self.released_at = Some(event.at),
            Kind::Printed(output) => self.printed = Some(output.clone()),
            Kind::Cancelled { reason } => self.cancel_reason = reason.clone(),
            Kind::Escalate(asked) => match self.exchanges.iter_mut().find(|known| known.ask.ask == asked.ask) {
                Some(known) => {
                    known.ask.parked |= asked.parked;
                    known.attempt = known.attempt.max(event.attempt);
                }
                None => self.exchanges.push(Exchange {
                    ask: asked.clone(),
                    attempt: event.attempt,
                    asked_at: event.at,
                    answer: None,
                    answered_at: None,
                    answered_by: None,
                }),
            },
            Kind::Answered { ask, answer, by } => {
                let known = self.exchanges.iter_mut().find(|known| known.ask.ask == *ask);
                match known {
                    Some(known) if known.answer.is_none() => {
                        known.answer = Some(answer.clone());
                        known.answered_at = Some(event.at);
                        let waits = matches!(self.status, Status::Escalated { .. });
                        self.attempts.iter_mut().for_each(|attempt| attempt.waits &= waits);
                        known.answered_by.clone_from(by);
                    }
                    _ => return false,
                }
            }
            _ => return false,
        }
        true
    }
}
