//! A work: the fold of all that happened to an order.

mod fold;

use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use super::accept::{Check, Claim};
use super::after::After;
use super::assignment::Assignment;
use super::budget::{Allowance, Usage};
use super::event::{Answerer, Ask, Failure, FailureKind};
use super::id::{InstanceId, RunId, StationId, WorkId};
use super::output::Output;
use super::run::Run;
use super::status::Status;
use super::time::Timestamp;

/// How a work ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Delivered.
    Complete(Output),
    /// Failed.
    Failed(Failure),
    /// Cancelled, with the caller's reason.
    Cancelled(Option<String>),
}

/// One try at a work.
#[derive(Debug, Clone, PartialEq)]
pub struct Attempt {
    /// Its number, from 1.
    pub number: u32,
    /// Who ran it.
    pub station: StationId,
    /// Which process ran it.
    pub instance: InstanceId,
    /// When it began.
    pub started_at: Timestamp,
    /// Why it ended, when it did without settling the work.
    pub ended: Option<Failure>,
    /// Whether all that it does is wait for an answer.
    pub waits: bool,
}

/// A question and its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Exchange {
    /// The question.
    pub ask: Ask,
    /// The attempt that asked it last.
    pub attempt: u32,
    /// When it was asked.
    pub asked_at: Timestamp,
    /// The answer, once there is one.
    pub answer: Option<Value>,
    /// When it was answered.
    pub answered_at: Option<Timestamp>,
    /// Who answered it.
    pub answered_by: Option<Answerer>,
}

/// The fold of a work's events.
#[derive(Debug, Clone, PartialEq)]
pub struct Work {
    /// The work.
    pub work_id: WorkId,
    /// Its own run.
    pub run_id: RunId,
    /// Where it stands.
    pub status: Status,
    /// The type of the last event that counted.
    pub event: String,
    /// The order, once its event was seen.
    pub assignment: Option<Box<Assignment>>,
    /// The last reported percentage.
    pub progress_pct: Option<f64>,
    /// The last reported message.
    pub progress_msg: Option<String>,
    /// Questions and answers, oldest first.
    pub exchanges: Vec<Exchange>,
    /// Tries, oldest first.
    pub attempts: Vec<Attempt>,
    /// No attempt before this moment.
    pub retry_at: Option<Timestamp>,
    /// When all that it waited for had settled.
    pub released_at: Option<Timestamp>,
    /// What an attempt that was stopped had printed.
    pub printed: Option<Output>,
    /// Why somebody asked to cancel.
    pub cancel_reason: Option<String>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// How long the attempt that settled it took.
    pub duration_ms: Option<u64>,
    /// What the last claim that it is done was held against.
    pub checks: Vec<Check>,
    /// What each attempt has reported to have used.
    pub used: Vec<(u32, Usage)>,
    /// When the last event that counted happened.
    pub updated_at: Timestamp,
    /// When it settled.
    pub settled_at: Option<Timestamp>,
    /// The work that was given out in its stead.
    pub redriven_as: Option<WorkId>,
    /// It lives on another machine than this log: what is said here counts once that one has heard it.
    pub is_elsewhere: bool,
    /// Somebody asked here to cancel it, and where it lives that was not heard yet.
    pub stop_asked: bool,
    /// How many late events were kept as evidence only.
    pub late_events: u32,
    /// How many events were folded.
    pub events: u64,
    /// Items of an order over many whose agents ask something, as whoever looked found them; the fold itself knows none.
    pub asking: Vec<Arc<Work>>,
}

impl Work {
    /// What the run store still knows of a work whose events were dropped by age.
    pub fn from_run(run: &Run) -> Self {
        Self {
            status: run.status,
            event: run.event.clone(),
            outcome: run.outcome.clone(),
            duration_ms: run.duration_ms,
            checks: run.checks.clone(),
            used: vec![(run.attempt, run.usage)],
            settled_at: run.settled_at,
            ..Self::unknown(run.work_id, run.run_id.clone(), run.settled_at.unwrap_or(run.assigned_at))
        }
    }

    /// Whether it is an order over many items, each of which is a work of its own.
    pub fn is_map(&self) -> bool {
        self.assignment.as_ref().is_some_and(|order| order.map.is_some())
    }

    /// Whether somebody cancelled it, or asked for that.
    pub fn is_called_off(&self) -> bool {
        self.status == Status::Cancelled || self.status.mark().is_some_and(|mark| mark.cancelling || self.stop_asked)
    }

    /// The works that it waits for, as long as it does.
    pub fn waits_for(&self) -> Option<&After> {
        let waits = matches!(self.status, Status::Pending(_)) && self.attempts.is_empty() && self.released_at.is_none();
        self.assignment.as_ref().filter(|_| waits)?.after.as_ref()
    }

    /// The question that waits for an answer; of several, the one that is shown.
    pub fn open_question(&self) -> Option<&Ask> {
        let Status::Escalated { ask, .. } = self.status else { return None };
        self.exchanges.iter().rev().map(|exchange| &exchange.ask).find(|asked| asked.ask == ask)
    }

    /// All questions that wait for an answer.
    pub fn open_questions(&self) -> impl Iterator<Item = &Ask> {
        let attempt = match self.status {
            Status::Escalated { mark, .. } => Some(mark.attempt),
            _ => None,
        };
        self.unanswered(attempt)
    }

    fn unanswered(&self, attempt: Option<u32>) -> impl Iterator<Item = &Ask> {
        let open = move |exchange: &&Exchange| exchange.answer.is_none() && Some(exchange.attempt) == attempt;
        self.exchanges.iter().filter(open).map(|exchange| &exchange.ask)
    }

    /// Whether it, or one of its items, waits for an answer.
    pub fn asks(&self) -> bool {
        matches!(self.status, Status::Escalated { .. }) || (!self.status.is_settled() && !self.asking.is_empty())
    }

    /// The questions that its agent died with, until the next attempt asks them again.
    pub fn interrupted_questions(&self) -> impl Iterator<Item = &Ask> {
        let runs = !self.status.is_settled() && self.open_question().is_none();
        self.unanswered(self.exchanges.iter().map(|exchange| exchange.attempt).max().filter(|_| runs))
    }

    /// Whether its agent ended to wait for answers, and has them all: nothing but its turn keeps it from its next attempt.
    pub fn is_answered(&self) -> bool {
        // Any other end of an attempt says when the next one may begin.
        matches!(self.status, Status::Pending(_)) && !self.attempts.is_empty() && self.retry_at.is_none()
    }

    /// What all its attempts have reported to have used.
    pub fn usage(&self) -> Usage {
        self.used.iter().fold(Usage::default(), |sum, (_, usage)| sum.plus(*usage))
    }

    /// What the last word that it is done is worth; nothing while nobody has said so.
    pub fn claim(&self) -> Option<Claim> {
        match &self.outcome {
            Some(Outcome::Complete(_)) if self.checks.is_empty() => Some(Claim::Claimed),
            Some(Outcome::Complete(_)) => Some(Claim::Verified),
            _ => (!self.checks.is_empty()).then_some(Claim::Refuted),
        }
    }

    /// The claim that was refuted last, before the work was tried again: the attempt, and why.
    pub fn refuted(&self) -> Option<(u32, &Failure)> {
        let ended = |attempt: &Attempt| attempt.ended.as_ref().is_some_and(|failure| failure.kind == FailureKind::Refuted);
        let last = self.attempts.iter().rev().find(|attempt| ended(attempt))?;
        last.ended.as_ref().map(|failure| (last.number, failure))
    }

    /// The budget that was given with it.
    pub fn budget(&self) -> Option<&Allowance> {
        self.assignment.as_ref()?.budgets.iter().find(|allowance| allowance.run_id == self.run_id)
    }

    /// How many attempts count against the limit, the one that runs not included.
    pub fn attempts_burnt(&self, running: u32) -> u32 {
        // Whose process dies while it waits for somebody has failed at nothing.
        let burns = |attempt: &Attempt| attempt.ended.as_ref().map_or(!attempt.waits, |failure| failure.kind.burns_attempt());
        let burnt = |attempt: &&Attempt| attempt.number < running && burns(attempt);
        u32::try_from(self.attempts.iter().filter(burnt).count()).unwrap_or(u32::MAX)
    }

    /// About how many bytes of text it holds.
    pub fn text_len(&self) -> usize {
        let order = self.assignment.as_ref().map_or(0, |order| order.task.len() + json_len(&order.context));
        let outcome = match &self.outcome {
            Some(Outcome::Complete(Output::Inline(Value::String(text)))) => text.len(),
            Some(Outcome::Complete(Output::Inline(value))) => json_len(value),
            Some(Outcome::Failed(failure)) => failure.message.len() + failure.evidence.as_ref().map_or(0, String::len),
            _ => 0,
        };
        let asked = |exchange: &Exchange| exchange.ask.reason.len() + json_len(&exchange.ask.context) + json_len(&exchange.answer);
        let checks: usize = self.checks.iter().map(|check| check.found.len() + check.output.len()).sum();
        let items = self.assignment.as_ref().and_then(|order| order.map.as_ref()).map_or(0, |map| json_len(&map.items));
        let printed = match &self.printed {
            Some(Output::Inline(value)) => json_len(value),
            _ => 0,
        };
        checks + order + outcome + items + printed + self.exchanges.iter().map(asked).sum::<usize>()
    }

    /// How long it waited for other works and for answers in all, up to now; that time does not count against its timeout.
    pub fn waited(&self, now: Timestamp) -> std::time::Duration {
        let mut asked: Vec<&Exchange> = self.exchanges.iter().collect();
        asked.sort_by_key(|exchange| exchange.asked_at);
        let (mut sum, mut upto) = (self.held_back(now), Timestamp::default());
        for exchange in asked {
            // While two questions are open the time goes by once.
            let until = self.waited_until(exchange, now);
            sum += until.since(exchange.asked_at.max(upto));
            upto = upto.max(until);
        }
        sum
    }

    /// Until when it waited for an answer: to one that its agent died with only until it was tried again.
    fn waited_until(&self, exchange: &Exchange, now: Timestamp) -> Timestamp {
        let is_open = self.open_questions().any(|open| open.ask == exchange.ask.ask);
        match exchange.answered_at {
            Some(at) => at,
            None if is_open => now,
            None => {
                let again = self.attempts.iter().map(|attempt| attempt.started_at).find(|at| *at >= exchange.asked_at);
                again.or(self.retry_at).or(self.settled_at).map_or(now, |at| at.min(now))
            }
        }
    }

    /// How long it waited for other works.
    fn held_back(&self, now: Timestamp) -> std::time::Duration {
        let Some(order) = self.assignment.as_ref().filter(|order| order.after.is_some()) else { return std::time::Duration::ZERO };
        let began = self.released_at.or(self.attempts.first().map(|attempt| attempt.started_at));
        began.unwrap_or(now).since(order.assigned_at)
    }

    /// The attempt that runs now, as far as anybody knows.
    pub fn running(&self) -> Option<&Attempt> {
        let runs = matches!(self.status, Status::Accepted(_) | Status::Escalated { parked: false, .. });
        self.attempts.last().filter(|attempt| runs && attempt.ended.is_none())
    }
}

fn json_len(value: &impl Serialize) -> usize {
    serde_json::to_string(value).map_or(0, |text| text.len())
}
