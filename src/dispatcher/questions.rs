//! Questions of agents and their answers.

use std::sync::{Arc, PoisonError};

use serde_json::Value;

use super::{Bound, Caller, Dispatcher, Error, Result};
use crate::model::event::{Answerer, Ask, Event, Kind, Needs, Side};
use crate::model::id::WorkId;
use crate::model::status::Status;
use crate::model::work::{Exchange, Work};
use crate::telemetry::{new_answer_id, now};
use crate::transport::{self, Record};
use crate::works::record;

/// How long the machine where a work lives has to hear an answer that was given elsewhere.
const HEARD_WITHIN: std::time::Duration = std::time::Duration::from_secs(5);
/// How often a question is put that others get in the way of.
const TRIES: u32 = 8;

/// An answer to a question.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The answer: data for the agent.
    pub value: Value,
    /// The question's number; when absent, the open one, if there is only one.
    pub ask: Option<u32>,
    /// Who gives it: a person themself, or an orchestrator.
    pub who: Needs,
}

/// A question on behalf of a work.
#[derive(Debug, Clone)]
pub struct Question {
    /// What is needed.
    pub reason: String,
    /// What helps to decide.
    pub context: Value,
    /// Who is asked.
    pub needs: Needs,
}

impl Dispatcher {
    /// Answers a question of a work, which has to be named where several are open; the same work goes on once all are answered. Of
    /// several answers the first one on the log where the work lives counts, and only whoever gave that is not refused. An agent answers
    /// neither itself nor in a person's stead.
    ///
    /// # Errors
    /// `NotEscalated`, `AnsweredAlready`, `OtherQuestion`, `WhichQuestion`, `OwnQuestion`, `ForAPerson`, `LongText`, `UnknownWork`, or the
    /// transport's.
    pub async fn answer(&self, caller: &Caller, id: WorkId, reply: Reply) -> Result<Arc<Work>> {
        self.vet_text("answer", reply.value.as_str().map_or_else(|| reply.value.to_string().len(), str::len))?;
        let work = self.check(id).await?;
        let ask = match which_question(&work, reply.ask) {
            // Whoever gave that answer may have died before it woke the work.
            Err(answered @ Error::AnsweredAlready { .. }) => {
                self.0.orders.look_after(id).await?;
                return Err(answered);
            }
            ask => ask?,
        };
        if let Some(bound) = caller.work() {
            may_answer(bound, &work, ask)?;
        }
        let by = Answerer { who: reply.who, id: new_answer_id() };
        let event = self.event(&work, 0, Kind::Answered { ask, answer: reply.value, by: Some(by.clone()) });
        // Its agent waits for all that it has asked.
        let was_last = work.open_questions().all(|open| open.ask == ask);
        if was_last {
            self.wake(&work, vec![record(event)]).await?;
        } else {
            self.0.transport.log.append(vec![record(event)]).await?;
        }
        let (_, mut work) = self.history(id).await?;
        let taken = |work: &Work| work.exchanges.iter().any(|exchange| exchange.ask.ask == ask && exchange.answer.is_some());
        if work.is_elsewhere {
            // Somebody may have answered there.
            work = self.wait_until(id, HEARD_WITHIN, |work| work.status.is_settled() || taken(work)).await?;
        } else if !was_last && work.open_question().is_none() && !work.status.is_settled() {
            // The others were answered at the same moment.
            self.wake(&work, Vec::new()).await?;
        }
        let stands = work.exchanges.iter().find(|exchange| exchange.ask.ask == ask).and_then(|exchange| exchange.answered_by.as_ref());
        match stands {
            None if work.is_elsewhere && !work.status.is_settled() && !taken(&work) => {
                let station = self.target(&work);
                let text = format!("the answer waits for station {station}, where the work lives and which cannot be reached now");
                Err(transport::Error::Unanswered(text.into()).into())
            }
            Some(stands) if *stands == by => Ok(work),
            Some(_) => Err(Error::AnsweredAlready { work_id: id, ask }),
            // It settled in between, or its question was answered by an older version.
            None => Err(which_question(&work, Some(ask)).err().unwrap_or(Error::AnsweredAlready { work_id: id, ask })),
        }
    }

    /// Lets a work's agent go on, with the time that it has left.
    async fn wake(&self, work: &Work, records: Vec<Record>) -> Result<()> {
        let deadline = work.assignment.as_ref().map(|assignment| assignment.deadline().after(work.waited(now())));
        self.0.transport.queue.wake(&self.target(work), work.work_id, deadline, records).await?;
        Ok(())
    }

    /// Waits while a question is open, at most for `patience`; gives the work as it is then.
    ///
    /// # Errors
    /// `UnknownWork`, or the transport's.
    pub async fn while_open(&self, id: WorkId, ask: u32, patience: std::time::Duration) -> Result<Arc<Work>> {
        self.wait_until(id, patience, |work| work.open_questions().all(|open| open.ask != ask)).await
    }

    /// Asks for help on behalf of a running work; gives the work and the question's number. The same question asked again while it
    /// is open is not a second one.
    ///
    /// # Errors
    /// `NoWork`, `NotRunning`, `ManyQuestions`, `LongText`, `UnknownWork`, or the transport's.
    pub async fn escalate(&self, caller: &Caller, work_id: Option<WorkId>, question: Question) -> Result<(WorkId, u32)> {
        self.vet_text("reason", question.reason.len())?;
        let id = work_id.or(caller.work().map(|bound| bound.work_id)).ok_or(Error::NoWork)?;
        Ok((id, self.ask(caller, id, question).await?))
    }

    /// Waits for the answer to a question; `None` when `patience` ran out first.
    ///
    /// # Errors
    /// `UnknownWork`, or the transport's.
    pub async fn answer_to(&self, caller: &Caller, id: WorkId, ask: u32, patience: std::time::Duration) -> Result<Option<Value>> {
        let answered =
            |work: &Work| work.exchanges.iter().find(|exchange| exchange.ask.ask == ask).and_then(|exchange| exchange.answer.clone());
        let work = self.wait_until(id, patience, |work| work.status.is_settled() || answered(work).is_some()).await?;
        let answer = answered(&work);
        if answer.is_some() {
            caller.had.lock().unwrap_or_else(PoisonError::into_inner).insert((id, ask));
        }
        Ok(answer)
    }

    /// Puts a question; gives its number.
    async fn ask(&self, caller: &Caller, id: WorkId, question: Question) -> Result<u32> {
        for _ in 0..TRIES {
            let work = self.check(id).await?;
            let refused = || Error::NotRunning { work_id: id, status: work.status.label() };
            let mark = work.status.mark().ok_or_else(refused)?;
            let attempt = caller.work().filter(|bound| bound.work_id == id).map_or(mark.attempt, |bound| bound.attempt);
            // Its process is one that a later attempt has taken the work from.
            if attempt < mark.attempt {
                return Err(refused());
            }
            // The same question again picks up the open one, or an answer that this caller has not had yet.
            let put =
                |ask| Ask { ask, reason: question.reason.clone(), context: question.context.clone(), needs: question.needs, parked: false };
            let fresh =
                |exchange: &&Exchange| exchange.ask.covers(&put(0)) && (exchange.answer.is_none() || !caller.has_had(id, exchange.ask.ask));
            let known = work.exchanges.iter().rev().find(fresh);
            // One that an attempt asked which then died is put again, under its number.
            let stands = |known: &&Exchange| known.answer.is_some() || work.open_questions().any(|open| open.ask == known.ask.ask);
            if let Some(known) = known.filter(stands) {
                return Ok(known.ask.ask);
            }
            if matches!(work.status, Status::Pending(_)) {
                return Err(refused());
            }
            let max = self.0.config.lattice.work.questions_max;
            if work.exchanges.iter().filter(|exchange| exchange.attempt == attempt).count() >= max as usize {
                return Err(Error::ManyQuestions { work_id: id, max });
            }
            let next = || work.exchanges.iter().map(|exchange| exchange.ask.ask).max().unwrap_or(0) + 1;
            // A later one was answered since: under its old number nobody would see it.
            let number = known.map(|known| known.ask.ask).filter(|ask| *ask > mark.answered).unwrap_or_else(next);
            // The agent itself asks through a process of its own station; anybody else asks in its stead.
            let side = if self.target(&work) == self.0.registry.me().station { Side::Leaf } else { Side::Assigner };
            let event = Event { side, ..self.event(&work, attempt, Kind::Escalate(put(number))) };
            self.0.transport.log.append(vec![record(event)]).await?;
        }
        // Others ask and answer at the same moment, again and again.
        Err(Error::NotRunning { work_id: id, status: self.check(id).await?.status.label() })
    }
}

/// The question that an answer is for.
///
/// # Errors
/// `NotEscalated`, `AnsweredAlready`, `OtherQuestion`, or `WhichQuestion`.
pub(crate) fn which_question(work: &Work, meant: Option<u32>) -> Result<u32> {
    let (work_id, last) = (work.work_id, work.exchanges.last());
    let answered = |ask: u32| work.exchanges.iter().any(|exchange| exchange.ask.ask == ask && exchange.answer.is_some());
    match (work.status, meant) {
        (status, _) if status.is_settled() => Err(Error::NotEscalated { work_id, status: status.label() }),
        (_, Some(ask)) if answered(ask) => Err(Error::AnsweredAlready { work_id, ask }),
        (Status::Escalated { .. }, Some(ask)) if work.open_questions().any(|open| open.ask == ask) => Ok(ask),
        (Status::Escalated { ask: open, .. }, Some(ask)) => Err(Error::OtherQuestion { work_id, ask, open }),
        (Status::Escalated { ask, .. }, None) => the_only(work, work.open_questions()).map(|open| open.unwrap_or(ask)),
        // Its agent died with the question open; the next attempt finds the answer.
        (_, Some(ask)) if work.exchanges.iter().any(|exchange| exchange.ask.ask == ask) => Ok(ask),
        (status, None) => match (the_only(work, work.interrupted_questions())?, last) {
            (Some(ask), _) => Ok(ask),
            (None, Some(last)) => Err(Error::AnsweredAlready { work_id, ask: last.ask.ask }),
            (None, None) => Err(Error::NotEscalated { work_id, status: status.label() }),
        },
        (status, Some(_)) => Err(Error::NotEscalated { work_id, status: status.label() }),
    }
}

/// The question that an answer is for that names none: of several nobody knows which.
fn the_only<'a>(work: &Work, mut questions: impl Iterator<Item = &'a Ask>) -> Result<Option<u32>> {
    let (first, more) = (questions.next(), questions.next());
    match (first, more) {
        (Some(first), Some(second)) => {
            let (shown, left) = ([first, second], questions.count());
            let shown: Vec<String> = shown.iter().map(|ask| format!("{} ({})", ask.ask, beginning(&ask.reason))).collect();
            let more = if left > 0 { format!(" and {left} more") } else { String::new() };
            Err(Error::WhichQuestion { work_id: work.work_id, questions: format!("{}{more}", shown.join(", ")) })
        }
        (first, _) => Ok(first.map(|ask| ask.ask)),
    }
}

/// As much of a question as tells it from others.
fn beginning(reason: &str) -> String {
    const SHOWN_MAX: usize = 80;
    let cut: String = reason.chars().take(SHOWN_MAX).collect();
    if cut.len() < reason.len() { format!("{cut}…") } else { cut }
}

/// Whether an agent may answer a question. It need not be open: one that an agent died with is still for whom it was.
fn may_answer(agent: &Bound, work: &Work, ask: u32) -> Result<()> {
    let work_id = work.work_id;
    let is_for_a_person = |exchange: &Exchange| exchange.ask.ask == ask && exchange.ask.needs == Needs::Human;
    if agent.work_id == work_id {
        return Err(Error::OwnQuestion { work_id, ask });
    }
    if work.exchanges.iter().any(is_for_a_person) { Err(Error::ForAPerson { work_id, ask }) } else { Ok(()) }
}
