//! One attempt at one work, from its taking to its last record.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::claim::refutation;
use super::policy::{self, Verdict};
use super::watch_over::{Ears, Watch};
use super::{Inner, TROUBLE_PAUSE};
use crate::model::after;
use crate::model::agent::Definition;
use crate::model::assignment::Assignment;
use crate::model::event::{Ask, Event, Failure, FailureKind, Kind, Side};
use crate::model::id::RunId;
use crate::model::output::Output;
use crate::model::retry::{self, After, Policy};
use crate::model::status::Status;
use crate::model::time::Timestamp;
use crate::model::work::Work;
use crate::orders;
use crate::registry::Identity;
use crate::runner::{Ended, Line, Order};
use crate::telemetry::now;
use crate::transport::{Accept, Delivery, Record, Result, Taken};
use crate::works::{Following, record};

const REPORTS_MAX: usize = 64;
const ANSWERS_MAX: usize = 16;
/// The assigner writes its order on the log once the hook has the work: whoever takes that at once waits so long for it.
const ORDER_WAIT: Duration = Duration::from_millis(250);
const ORDER_PAUSE: Duration = Duration::from_millis(1);
/// An agent that is out of quota pauses this long at least.
const QUOTA_PAUSE_MIN: Duration = Duration::from_secs(1);
/// Work of which nobody knows what came of its last attempt comes back so late.
const LEFT_PAUSE: Duration = Duration::from_secs(30);
/// Work that found no room at its station comes back so late.
const ROOM_PAUSE_MIN: Duration = Duration::from_secs(1);
const ROOM_PAUSE_MAX: Duration = Duration::from_secs(30);

/// What a running attempt is told from outside.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Word {
    /// The work as somebody has just read it.
    Stands(Arc<Work>),
    /// A later attempt holds the work.
    Lost,
    /// The station stops soon: what only waits for an answer can wait elsewhere.
    Rest,
    /// The station stops.
    HandBack,
}

/// Why an attempt is being stopped.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Why {
    Cancelled(Option<String>),
    Failed(Failure),
    Lost,
    HandBack,
}

/// What every step of an attempt needs.
pub(super) struct Attempt<'a> {
    pub(super) leaf: &'a Inner,
    pub(super) delivery: &'a Delivery,
    lane: &'a str,
    pub(super) assignment: Arc<Assignment>,
    pub(super) definition: Arc<Definition>,
    started: Instant,
}

/// Runs an attempt to its end; when it returns, its records stand and its item is settled, released, or somebody else's.
pub(super) async fn run(leaf: &Inner, taken: Taken, definition: Arc<Definition>, inbox: mpsc::Receiver<Word>) {
    let assignment = match serde_json::from_slice::<Assignment>(&taken.body) {
        Ok(assignment) => Arc::new(assignment),
        Err(error) => return refuse(leaf, &taken.delivery, &error).await,
    };
    let span = tracing::info_span!("attempt", work_id = %assignment.work_id, run_id = %assignment.orchestrator_run_id,
        agent = %assignment.agent_name, attempt = taken.delivery.attempt);
    let attempt = Attempt { leaf, delivery: &taken.delivery, lane: &taken.lane, assignment, definition, started: Instant::now() };
    async {
        if let Err(error) = attempt.go(inbox).await {
            tracing::error!(%error, "the attempt is left to its lease: another one follows");
        }
    }
    .instrument(span)
    .await;
}

/// What is put on the log with each taking: the attempt is accepted.
pub(super) fn accept(me: &Identity) -> Accept {
    let me = me.clone();
    Accept::with(move |taken| {
        let assignment: Run = serde_json::from_slice(&taken.body).ok()?;
        let (station, instance) = (me.station.clone(), me.instance);
        let (work_id, attempt) = (taken.delivery.id, taken.delivery.attempt);
        let run_id = assignment.orchestrator_run_id;
        Some(record(Event { work_id, run_id, at: now(), station, instance, side: Side::Leaf, attempt, kind: Kind::Accepted }))
    })
}

/// Lets go of an item that is no order; a work that the log knows all the same fails for it.
pub(super) async fn refuse(leaf: &Inner, delivery: &Delivery, error: &serde_json::Error) {
    tracing::error!(work_id = %delivery.id, %error, "an item of the hook is not an order; it is dropped");
    let settled = async {
        let work = leaf.works.get(delivery.id).await?.filter(|work| !work.status.is_settled());
        let failure = Failure::new(FailureKind::Unstartable, format!("the order cannot be read ({error}): assign the work again"));
        let failed = |work: &Work| record(event(leaf, &work.run_id, delivery, Kind::Failed { failure, duration_ms: 0 }));
        leaf.transport.queue.settle(delivery, work.as_deref().map(failed).into_iter().collect()).await
    };
    if let Err(error) = settled.await {
        tracing::warn!(work_id = %delivery.id, %error, "could not drop an item that is no order; trying again when its hold has run out");
    }
}

/// The run of an order, if that can be read.
pub(super) fn run_of(body: &[u8]) -> Option<RunId> {
    serde_json::from_slice::<Run>(body).ok().map(|run| run.orchestrator_run_id)
}

/// The one field of an assignment that a record needs.
#[derive(serde::Deserialize)]
struct Run {
    orchestrator_run_id: RunId,
}

pub(super) fn event(leaf: &Inner, run_id: &RunId, delivery: &Delivery, kind: Kind) -> Event {
    let me = leaf.registry.me();
    // Whoever settles an item of another station's hook does so for its assigner: it is not the leaf that has the work.
    let side = if delivery.station == me.station { Side::Leaf } else { Side::Assigner };
    Event {
        work_id: delivery.id,
        run_id: run_id.clone(),
        at: now(),
        station: me.station.clone(),
        instance: me.instance,
        side,
        attempt: delivery.attempt,
        kind,
    }
}

impl Attempt<'_> {
    async fn go(&self, inbox: mpsc::Receiver<Word>) -> Result<()> {
        let following = self.accepted().await?;
        let work = following.work();
        match policy::before(&work, self.delivery.attempt, &self.policy()) {
            Verdict::Drop => self.settle(Vec::new()).await,
            Verdict::Cancel(reason) => self.settle(vec![self.record(Kind::Cancelled { reason })]).await,
            Verdict::GiveUp(failure) => self.give_up(failure).await,
            Verdict::Unknown(process, failure) if self.leaf.runners.is_gone(process).await => self.give_up(failure).await,
            Verdict::Unknown(..) => self.leave().await,
            Verdict::Run => match self.ready().await? {
                Ready::Yes(order) => match self.hindrance(&work).await? {
                    Some(failure) => self.give_up(failure).await,
                    None => self.execute(&work, order, following, inbox).await,
                },
                Ready::NotYet(at) => {
                    let failure = Failure::new(FailureKind::HandedBack, "a work that it waits for has not settled");
                    self.release(at, None, Kind::Retrying { failure, next_at: at }).await.map(|_| ())
                }
                Ready::Never(kind) => self.settle(vec![self.record(kind)]).await,
            },
        }
    }

    /// Whether the work may start as things stand, and with which order: its parent may have been called off, and what it waits for
    /// may not have settled.
    async fn ready(&self) -> Result<Ready> {
        let (orders, order) = (&self.leaf.orders, &self.assignment);
        if let Some(parent) = order.parent_work_id
            && let Some(reason) = self.asking(|| orders.called_off_with(parent)).await?
        {
            return Ok(Ready::Never(Kind::Cancelled { reason: Some(reason) }));
        }
        let Some(after) = &order.after else { return Ok(Ready::Yes(order.clone())) };
        let (verdict, works) = self.asking(|| orders.verdict(after)).await?;
        Ok(match verdict {
            after::Verdict::Wait => Ready::NotYet(now().after(self.leaf.config.lattice.work.recheck.get())),
            after::Verdict::Fail(failure) => Ready::Never(Kind::Failed { failure, duration_ms: 0 }),
            after::Verdict::Cancel(reason) => Ready::Never(Kind::Cancelled { reason: Some(reason) }),
            after::Verdict::Start => Ready::Yes(Arc::new(self.asking(|| orders.filled(order, &works)).await?)),
        })
    }

    /// Asks until the server and the store answer.
    async fn asking<T, F: Future<Output = std::result::Result<T, orders::Error>>>(&self, ask: impl Fn() -> F) -> Result<T> {
        let asked = || async {
            ask().await.map_err(|error| match error {
                orders::Error::Transport(error) => error,
                other => crate::transport::Error::Store(other.to_string().into()),
            })
        };
        self.retrying(asked).await
    }

    /// The attempt stands on the log; what else stands there, and what comes after it? Whoever came first, wins.
    async fn accepted(&self) -> Result<Following> {
        let (works, id) = (&self.leaf.works, self.delivery.id);
        let has_order = |work: &Work| work.assignment.is_some();
        let stands = |work: &Work| has_order(work) && work.attempts.last().is_some_and(|last| last.number >= self.delivery.attempt);
        // Nobody has had it before: its taking stands on the hook, and what is said of it from here on is heard while it runs.
        if self.delivery.attempt == 1
            && let Some(following) = self.retrying(|| works.follow_young(id, ORDER_WAIT, has_order)).await?
            && has_order(&following.work())
        {
            return Ok(following);
        }
        let until = Instant::now() + ORDER_WAIT;
        loop {
            if let Some(mut following) = self.retrying(|| works.follow(id)).await? {
                let mut work = following.work();
                while !stands(&work) {
                    match tokio::time::timeout_at(until, following.next()).await {
                        Ok(Ok(next)) => work = next.1,
                        Ok(Err(_)) | Err(_) => break,
                    }
                }
                if stands(&work) {
                    return Ok(following);
                }
            } else if Instant::now() < until {
                tokio::time::sleep(ORDER_PAUSE).await;
                continue;
            }
            // The assigner, or we, died between the hook and the log, in an earlier life of this item. One after the other: should we
            // die in between, whoever comes next writes what is missing.
            let order = Kind::Assigned(Box::new((*self.assignment).clone()));
            self.append(vec![self.record(order)]).await?;
            self.append(vec![self.record(Kind::Accepted)]).await?;
        }
    }

    fn policy(&self) -> Policy {
        self.leaf.policy(&self.definition)
    }

    async fn execute(&self, work: &Work, assignment: Arc<Assignment>, following: Following, inbox: mpsc::Receiver<Word>) -> Result<()> {
        let (reports, heard) = mpsc::channel(REPORTS_MAX);
        let (answers, answered) = mpsc::channel(ANSWERS_MAX);
        let stop = CancellationToken::new();
        let order = Order {
            assignment,
            attempt: self.delivery.attempt,
            definition: self.definition.clone(),
            exchanges: work.exchanges.clone(),
            refuted: work.refuted().map(|(attempt, failure)| refutation(attempt, failure)),
        };
        let (mut checks, claimed) = (Vec::new(), order.clone());
        let runner = self.leaf.runners.runner_for(&self.definition.runner);
        let line = Line { reports: reports.clone(), answers: answered, stop: stop.clone() };
        let run = async {
            match runner.run(order, line).await {
                Ended::Complete(result) => self.examine(&claimed, result, &mut checks, reports, &stop).await,
                ended => ended,
            }
        };
        let mut watch = Watch::new(self, work, stop.clone(), answers);
        if self.assignment.start_by() < self.assignment.deadline() {
            // It has begun: from now on the whole of its time counts.
            self.extend(watch.deadline()).await?;
        }
        let ears = Ears { attempt: self, following: Some(following) };
        let ended = watch.over(run, heard, inbox, ears).await?;
        let duration_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        match (ended, watch.why.take()) {
            (Ended::Complete(result), _) => self.settle(vec![self.record(Kind::Complete { result, duration_ms, checks })]).await,
            (Ended::Failed(_) | Ended::Stopped | Ended::Parked, Some(Why::Failed(failure))) => {
                self.failed(work, failure, watch.printed.take(), watch.deadline(), duration_ms).await
            }
            (Ended::Failed(_) | Ended::Stopped | Ended::Parked, Some(why)) => self.stopped(why, watch.printed.take(), duration_ms).await,
            (Ended::Failed(failure), None) if failure.kind == FailureKind::Quota => self.out_of_quota(failure).await,
            (Ended::Failed(failure), None) if failure.kind == FailureKind::HandedBack => self.hand_back(work, failure).await,
            (Ended::Failed(failure), None) => self.failed(work, failure, None, watch.deadline(), duration_ms).await,
            (Ended::Parked, None) => self.park(watch.last_ask.take(), watch.waits()).await,
            (Ended::Stopped, None) => self.stopped(Why::HandBack, None, duration_ms).await,
        }
    }

    async fn stopped(&self, why: Why, printed: Option<Output>, duration_ms: u64) -> Result<()> {
        match why {
            Why::Cancelled(reason) => self.settle(self.ends(printed, Kind::Cancelled { reason })).await,
            Why::Failed(failure) => self.settle(self.ends(printed, Kind::Failed { failure, duration_ms })).await,
            Why::Lost => {
                // No crash, and no failure: what was given up for another attempt burns none.
                let failure = Failure::new(FailureKind::HandedBack, "another attempt holds the work, or it has settled");
                let given_up = self.record(Kind::Retrying { failure, next_at: now() });
                self.append(vec![given_up]).await
            }
            Why::HandBack => {
                let failure = Failure::new(FailureKind::HandedBack, "the station stopped and gave the work back");
                self.release(now(), None, Kind::Retrying { failure, next_at: now() }).await.map(|_| ())
            }
        }
    }

    /// What stands on the log at the end of an agent that was stopped: what it had printed comes first.
    fn ends(&self, printed: Option<Output>, end: Kind) -> Vec<Record> {
        printed.map(Kind::Printed).into_iter().chain([end]).map(|kind| self.record(kind)).collect()
    }

    async fn failed(&self, work: &Work, failure: Failure, printed: Option<Output>, deadline: Timestamp, duration_ms: u64) -> Result<()> {
        let burnt = work.attempts_burnt(self.delivery.attempt) + 1;
        match retry::after(failure, burnt, &self.policy(), self.delivery.id, now(), deadline) {
            After::Fail(failure) => self.settle(self.ends(printed, Kind::Failed { failure, duration_ms })).await,
            After::Retry(failure, next_at) => {
                self.release(next_at, None, Kind::Retrying { failure, next_at }).await?;
                self.heed_late_words().await
            }
        }
    }

    /// Pauses the agent for everybody until its quota is there again: nothing failed, and no attempt is burnt.
    async fn out_of_quota(&self, failure: Failure) -> Result<()> {
        let (retry, now) = (&self.leaf.config.lattice.retry, now());
        let said = failure.retry_at.unwrap_or_else(|| now.after(retry.quota_pause.get()));
        let soonest = now.after(retry.initial_delay.get().max(QUOTA_PAUSE_MIN));
        let until = said.max(soonest).min(now.after(retry.quota_pause_max.get()).max(soonest));
        let agent = &self.assignment.agent_name;
        let served = self.leaf.registry.served().into_iter().flatten();
        let others = served.filter(|lane| lane.definition.manifest.name == *agent && lane.name != self.lane).map(|lane| lane.name);
        for lane in others.chain([self.lane.to_owned()]) {
            self.retrying(|| self.leaf.transport.queue.pause(&self.delivery.station, &lane, until)).await?;
        }
        tracing::warn!(%until, reason = failure.message, "agent {agent} is out of quota and pauses; its work waits");
        self.release(until, None, Kind::Retrying { failure, next_at: until }).await?;
        self.heed_late_words().await
    }

    /// Lets go of work that found no room at this station, for a while that grows as long as that goes on: no attempt is burnt.
    async fn hand_back(&self, work: &Work, failure: Failure) -> Result<()> {
        let is_handed_back = |ended: &Failure| ended.kind == FailureKind::HandedBack;
        let earlier = work.attempts.iter().rev().skip_while(|attempt| attempt.number >= self.delivery.attempt);
        let times = earlier.take_while(|attempt| attempt.ended.as_ref().is_some_and(is_handed_back)).count();
        let times = u32::try_from(times).unwrap_or(u32::MAX).saturating_add(1);
        let next_at = now().after(self.policy().delay(times, self.delivery.id).clamp(ROOM_PAUSE_MIN, ROOM_PAUSE_MAX));
        tracing::warn!(%next_at, reason = failure.message, "this station has no room for the work at present; it is tried again");
        self.release(next_at, None, Kind::Retrying { failure, next_at }).await?;
        self.heed_late_words().await
    }

    /// Lets go of work that waits for an answer; whoever answers wakes it.
    async fn park(&self, asked: Option<Ask>, waits: bool) -> Result<()> {
        let Some(ask) = asked else {
            let failure = Failure::new(FailureKind::Agent, "the agent ended to wait for an answer, but asked nothing");
            return self.give_up(failure).await;
        };
        let until = now().after(self.leaf.config.lattice.work.answer_timeout.get());
        // The answer may have come before the agent had ended: then nothing wakes the work any more.
        let from = if waits { until } else { now() };
        self.release(from, Some(until), Kind::Escalate(Ask { parked: true, ..ask })).await?;
        self.heed_late_words().await
    }

    /// An answer or a cancel that came while the work was being let go of finds nobody who listens: look once more.
    async fn heed_late_words(&self) -> Result<()> {
        let (_, work) = self.leaf.works.history(self.delivery.id).await?;
        let Some(work) = work else { return Ok(()) };
        let queue = &self.leaf.transport.queue;
        let station = &self.delivery.station;
        match work.status {
            status if status.is_settled() => queue.remove(station, self.delivery.id, Vec::new()).await.map(|_| ()),
            Status::Pending(_) if work.retry_at.is_none_or(|at| at <= now()) => {
                let deadline = self.assignment.deadline().after(work.waited(now()));
                queue.wake(station, self.delivery.id, Some(deadline), Vec::new()).await.map(|_| ())
            }
            _ => Ok(()),
        }
    }

    /// Lets go of work that should not have been taken: something was said of it since it was looked at, or an older program freed it.
    async fn leave(&self) -> Result<()> {
        let failure = Failure::new(FailureKind::HandedBack, "what came of its last attempt is unknown: that process may only be asleep");
        let next_at = now().after(LEFT_PAUSE);
        self.release(next_at, None, Kind::Retrying { failure, next_at }).await.map(|_| ())
    }

    /// Ends the work with a failure that is not for another attempt to mend.
    async fn give_up(&self, failure: Failure) -> Result<()> {
        self.settle(vec![self.record(Kind::Failed { failure, duration_ms: 0 })]).await
    }

    /// Settles the work; while the store refuses (a full disk), it tries again for `lattice.work.outcome_patience`.
    async fn settle(&self, records: Vec<Record>) -> Result<()> {
        let held = self.retrying(|| self.leaf.transport.queue.settle(self.delivery, records.clone())).await?;
        if !held {
            tracing::info!("a later attempt holds the work; this one's outcome stands as evidence, or wins if it is the first");
        }
        Ok(())
    }

    pub(super) async fn append(&self, records: Vec<Record>) -> Result<()> {
        self.retrying(|| self.leaf.transport.log.append(records.clone())).await.map(|_| ())
    }

    /// Moves the item's deadline.
    pub(super) async fn extend(&self, deadline: Timestamp) -> Result<()> {
        let lease = self.leaf.config.lattice.work.lease.get();
        let (queue, held) = (&self.leaf.transport.queue, std::slice::from_ref(self.delivery));
        self.retrying(|| queue.extend(held, lease, Some(deadline))).await.map(|_| ())
    }

    async fn release(&self, at: Timestamp, deadline: Option<Timestamp>, kind: Kind) -> Result<bool> {
        let records = vec![self.record(kind)];
        let held = self.retrying(|| self.leaf.transport.queue.release(self.delivery, at, deadline, records.clone())).await?;
        if !held {
            // Whoever has the item now must not wait for this attempt any more.
            self.append(records).await?;
        }
        Ok(held)
    }

    pub(super) async fn retrying<T, F: Future<Output = Result<T>>>(&self, step: impl Fn() -> F) -> Result<T> {
        let patience = self.leaf.config.lattice.work.outcome_patience.get();
        let mut refused = None;
        loop {
            match step().await {
                // The server is away: the outcome is kept until it is back, and that is no refusal.
                Err(crate::transport::Error::Unreachable(reason) | crate::transport::Error::Unanswered(reason)) => {
                    refused = None;
                    tracing::debug!(%reason, "an outcome waits for the server");
                    tokio::time::sleep(TROUBLE_PAUSE).await;
                }
                Err(error @ crate::transport::Error::Store(_)) if refused.get_or_insert_with(Instant::now).elapsed() < patience => {
                    tracing::error!(%error, "an outcome could not be stored; trying again");
                    tokio::time::sleep(TROUBLE_PAUSE).await;
                }
                done => return done,
            }
        }
    }

    pub(super) fn record(&self, kind: Kind) -> Record {
        record(self.event(kind))
    }

    pub(super) fn event(&self, kind: Kind) -> Event {
        event(self.leaf, &self.assignment.orchestrator_run_id, self.delivery, kind)
    }
}

/// Whether a work may start.
enum Ready {
    /// With this order.
    Yes(Arc<Assignment>),
    /// It is looked at again at this moment.
    NotYet(Timestamp),
    /// This is its end.
    Never(Kind),
}
