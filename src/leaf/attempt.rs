//! One attempt at one work, from its taking to its last record.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::claim::{Meter, refutation};
use super::policy::{self, Verdict};
use super::{Inner, TROUBLE_PAUSE};
use crate::model::after;
use crate::model::agent::Definition;
use crate::model::event::{Ask, Event, Failure, FailureKind, Kind, Side};
use crate::model::id::{RunId, WorkId};
use crate::model::output::Output;
use crate::model::retry::{self, After, Policy};
use crate::model::time::{Span, Timestamp};
use crate::model::work::{Assignment, Exchange, Status, Work};
use crate::orders;
use crate::registry::Identity;
use crate::runner::{Answer, Ended, Line, Order, Report};
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
enum Why {
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
async fn refuse(leaf: &Inner, delivery: &Delivery, error: &serde_json::Error) {
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

/// Settles work whose time ran out while nobody held it.
pub(super) async fn expire(leaf: &Inner, taken: &Taken) {
    let settled = async {
        let (_, work) = leaf.works.history(taken.delivery.id).await?;
        let assignment = match serde_json::from_slice::<Assignment>(&taken.body) {
            Ok(assignment) => assignment,
            Err(error) => {
                refuse(leaf, &taken.delivery, &error).await;
                return Ok(());
            }
        };
        let records = match &work {
            Some(work) if work.status.is_settled() => Vec::new(),
            Some(work) if work.status.mark().is_some_and(|mark| mark.cancelling) => {
                let kind = Kind::Cancelled { reason: work.cancel_reason.clone() };
                vec![record(event(leaf, &assignment.orchestrator_run_id, &taken.delivery, kind))]
            }
            _ => {
                if let Some(work) = &work
                    && let Some(deadline) = still_time(&assignment, work, now())
                {
                    // Its first attempt began in time; whoever began it died before it could say how long there is.
                    leaf.transport.queue.release(&taken.delivery, now(), Some(deadline), Vec::new()).await?;
                    return Ok(());
                }
                let failure = match &work {
                    Some(work) if work.waits_for().is_some() || assignment.map.is_some() => waited_too_long(work),
                    Some(work) if !work.attempts.is_empty() => out_of_time(&assignment, work),
                    _ => never_began(&assignment, paused_until(leaf, taken).await?),
                };
                let kind = Kind::Failed { failure, duration_ms: 0 };
                vec![record(event(leaf, &assignment.orchestrator_run_id, &taken.delivery, kind))]
            }
        };
        leaf.transport.queue.settle(&taken.delivery, records).await.map(|_| ())
    };
    if let Err(error) = settled.await {
        tracing::warn!(work_id = %taken.delivery.id, %error, "could not settle work whose time is up; trying again");
    }
}

/// Until when there is still time for a work that began in time, though its item's deadline has passed.
fn still_time(assignment: &Assignment, work: &Work, now: Timestamp) -> Option<Timestamp> {
    let waits = matches!(work.status, Status::Pending(_) | Status::Accepted(_));
    let deadline = assignment.deadline().after(work.waited(now));
    (waits && !work.attempts.is_empty() && assignment.queue_timeout.is_some() && now < deadline).then_some(deadline)
}

/// Until when the lane is paused in which a work's time ran out.
async fn paused_until(leaf: &Inner, taken: &Taken) -> Result<Option<Timestamp>> {
    let lanes = leaf.transport.queue.load(&taken.delivery.station).await?;
    Ok(lanes.into_iter().find(|load| load.lane == taken.lane).and_then(|load| load.paused_until))
}

fn never_began(assignment: &Assignment, paused: Option<Timestamp>) -> Failure {
    let Assignment { target_station: station, agent_name: agent, timeout, .. } = assignment;
    let waited = assignment.queue_timeout.map_or(*timeout, |queue| queue.min(*timeout));
    let why = match paused {
        Some(until) => format!("agent {agent} is out of quota and pauses until {until}"),
        None => format!("no process that runs agent {agent} took it"),
    };
    Failure::new(FailureKind::QueueTimeout, format!("timed out after {waited} in the queue of station {station}: {why}"))
}

fn waited_too_long(work: &Work) -> Failure {
    match work.waits_for() {
        Some(after) => {
            let text = format!("timed out: what it waits for did not settle in time: {}", shown(&after.work_ids));
            Failure::new(FailureKind::QueueTimeout, text)
        }
        None => Failure::new(FailureKind::TotalTimeout, "timed out: its items did not settle in time (lattice.work.wait_max)"),
    }
}

fn out_of_time(assignment: &Assignment, work: &Work) -> Failure {
    if let Some(ask) = work.open_question() {
        let text = format!("timed out: nobody answered question {} ({}) in time", ask.ask, ask.reason);
        return Failure::new(FailureKind::TotalTimeout, text);
    }
    let last = work.attempts.last().map_or(0, |attempt| attempt.number);
    let ended = match work.attempts.last().and_then(|attempt| attempt.ended.as_ref()) {
        Some(failure) => format!("attempt {last} had ended: {}", failure.message),
        None => format!("attempt {last} had no more sign of life from its process, and what came of it is unknown"),
    };
    Failure::new(FailureKind::TotalTimeout, format!("timed out after {} in all; {ended}", assignment.timeout))
}

fn shown(ids: &[WorkId]) -> String {
    const SHOWN_MAX: usize = 5;
    let named: Vec<String> = ids.iter().take(SHOWN_MAX).map(ToString::to_string).collect();
    if ids.len() > SHOWN_MAX { format!("{} and {} more", named.join(", "), ids.len() - SHOWN_MAX) } else { named.join(", ") }
}

fn event(leaf: &Inner, run_id: &RunId, delivery: &Delivery, kind: Kind) -> Event {
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
            Verdict::GiveUp(failure) => self.settle(vec![self.record(Kind::Failed { failure, duration_ms: 0 })]).await,
            Verdict::Run => match self.ready().await? {
                Ready::Yes(order) => match self.hindrance(&work).await? {
                    Some(failure) => self.settle(vec![self.record(Kind::Failed { failure, duration_ms: 0 })]).await,
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

    /// What holds for this work's attempts: the agent's own word, where it has one.
    fn policy(&self) -> Policy {
        let manifest = &self.definition.manifest;
        self.leaf.config.lattice.retry.policy().with(&manifest.retry, &manifest.limits)
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
            watch.extend(watch.deadline()).await?;
        }
        let ears = Ears { attempt: self, following: Some(following) };
        let ended = watch.over(run, heard, inbox, ears).await?;
        watch.tell_usage().await?;
        let duration_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        match (ended, watch.why.take()) {
            (Ended::Complete(result), _) => self.settle(vec![self.record(Kind::Complete { result, duration_ms, checks })]).await,
            (Ended::Failed(_) | Ended::Stopped | Ended::Parked, Some(Why::Failed(failure))) => {
                self.failed(work, failure, watch.printed.take(), watch.deadline(), duration_ms).await
            }
            (Ended::Failed(_) | Ended::Stopped | Ended::Parked, Some(why)) => self.stopped(why, watch.printed.take(), duration_ms).await,
            (Ended::Failed(failure), None) if failure.kind == FailureKind::Quota => self.out_of_quota(failure).await,
            (Ended::Failed(failure), None) => self.failed(work, failure, None, watch.deadline(), duration_ms).await,
            (Ended::Parked, None) => self.park(watch.last_ask).await,
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

    /// Lets go of work that waits for an answer; whoever answers wakes it.
    async fn park(&self, asked: Option<Ask>) -> Result<()> {
        let Some(ask) = asked else {
            let failure = Failure::new(FailureKind::Agent, "the agent ended to wait for an answer, but asked nothing");
            return self.settle(vec![self.record(Kind::Failed { failure, duration_ms: 0 })]).await;
        };
        let until = now().after(self.leaf.config.lattice.work.answer_timeout.get());
        self.release(until, Some(until), Kind::Escalate(Ask { parked: true, ..ask })).await?;
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

    /// Settles the work; while the store refuses (a full disk), it tries again for as long as the attempt is held.
    async fn settle(&self, records: Vec<Record>) -> Result<()> {
        let held = self.retrying(|| self.leaf.transport.queue.settle(self.delivery, records.clone())).await?;
        if !held {
            tracing::info!("a later attempt holds the work; this one's outcome stands as evidence, or wins if it is the first");
        }
        Ok(())
    }

    async fn append(&self, records: Vec<Record>) -> Result<()> {
        self.retrying(|| self.leaf.transport.log.append(records.clone())).await.map(|_| ())
    }

    async fn release(&self, at: Timestamp, deadline: Option<Timestamp>, kind: Kind) -> Result<bool> {
        let records = vec![self.record(kind)];
        self.retrying(|| self.leaf.transport.queue.release(self.delivery, at, deadline, records.clone())).await
    }

    pub(super) async fn retrying<T, F: Future<Output = Result<T>>>(&self, step: impl Fn() -> F) -> Result<T> {
        const TRIES: u32 = 60;
        let mut tries = 0;
        loop {
            match step().await {
                // The server is away: the outcome is kept until it is back.
                Err(crate::transport::Error::Unreachable(reason) | crate::transport::Error::Unanswered(reason)) => {
                    tracing::debug!(%reason, "an outcome waits for the server");
                    tokio::time::sleep(TROUBLE_PAUSE).await;
                }
                Err(error @ crate::transport::Error::Store(_)) if tries < TRIES => {
                    tracing::error!(%error, "an outcome could not be stored; trying again");
                    tries += 1;
                    tokio::time::sleep(TROUBLE_PAUSE).await;
                }
                done => return done,
            }
        }
    }

    fn record(&self, kind: Kind) -> Record {
        record(event(self.leaf, &self.assignment.orchestrator_run_id, self.delivery, kind))
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

/// Goes along with the work while an attempt at it runs: nothing that is said of it after the taking is missed.
struct Ears<'a> {
    attempt: &'a Attempt<'a>,
    following: Option<Following>,
}

impl Ears<'_> {
    /// The work after what was said next. Dropping the future loses nothing.
    async fn next(&mut self) -> Arc<Work> {
        loop {
            if let Some(following) = &mut self.following {
                match following.next().await {
                    Ok((_, work)) => return work,
                    Err(error) => tracing::warn!(%error, "could not follow a work that runs here; trying again"),
                }
                self.following = None;
            }
            tokio::time::sleep(TROUBLE_PAUSE).await;
            match self.attempt.leaf.works.follow(self.attempt.delivery.id).await {
                Ok(following) => self.following = following,
                Err(error) => tracing::warn!(%error, "could not follow a work that runs here; trying again"),
            }
            // What was said in between stands in the work.
            if let Some(following) = &self.following {
                return following.work();
            }
        }
    }
}

/// Watches over a running agent: its reports, what is said from outside, and the clock.
struct Watch<'a> {
    attempt: &'a Attempt<'a>,
    stop: CancellationToken,
    answers: mpsc::Sender<Answer>,
    why: Option<Why>,
    asks: u32,
    answered: u32,
    last_ask: Option<Ask>,
    /// What earlier attempts asked, if this one's agent can be handed their answers.
    before: Vec<Exchange>,
    /// Those of these questions that this attempt has asked again, and that are still open.
    again: Vec<u32>,
    /// What the agent had printed when it was stopped.
    printed: Option<Output>,
    /// Since when it waits for an answer.
    waiting: Option<Timestamp>,
    /// How long it has waited for answers before.
    waited: Duration,
    silence: Duration,
    heard_at: Instant,
    /// Whether the station stops.
    rests: bool,
    meter: Meter,
}

impl<'a> Watch<'a> {
    fn new(attempt: &'a Attempt<'a>, work: &Work, stop: CancellationToken, answers: mpsc::Sender<Answer>) -> Self {
        let silence = attempt.assignment.silence_timeout.or(attempt.definition.manifest.limits.silence);
        let silence = silence.or(attempt.leaf.config.lattice.work.silence);
        let asks = work.exchanges.iter().map(|exchange| exchange.ask.ask).max().unwrap_or(0);
        Self {
            attempt,
            stop,
            answers,
            why: None,
            asks,
            answered: asks,
            last_ask: None,
            before: if attempt.definition.runner.hears_answers() { work.exchanges.clone() } else { Vec::new() },
            again: Vec::new(),
            printed: None,
            waiting: None,
            waited: work.waited(now()),
            silence: silence.map_or(Duration::MAX, Span::get),
            heard_at: Instant::now(),
            rests: false,
            meter: Meter::new(attempt.leaf.config.lattice.work.progress_per_second),
        }
    }

    /// The moment at which the work has taken too long; time spent waiting for answers does not count.
    fn deadline(&self) -> Timestamp {
        let waiting = self.waiting.map_or(Duration::ZERO, |since| now().since(since));
        self.attempt.assignment.deadline().after(self.waited + waiting)
    }

    async fn over(
        &mut self,
        run: impl Future<Output = Ended>,
        mut reports: mpsc::Receiver<Report>,
        mut inbox: mpsc::Receiver<Word>,
        mut ears: Ears<'_>,
    ) -> Result<Ended> {
        let mut run = std::pin::pin!(run);
        let ended = loop {
            let check_at = self.meter.due().map_or_else(|| self.next_check(), |due| due.min(self.next_check()));
            tokio::select! {
                biased;
                Some(word) = inbox.recv() => self.hear(word).await?,
                work = ears.next() => self.heed(&work).await?,
                Some(report) = reports.recv() => self.take_in(report).await?,
                ended = &mut run => break ended,
                () = tokio::time::sleep_until(check_at) => {
                    self.check_clock();
                    if self.meter.due().is_some_and(|due| due <= Instant::now()) {
                        self.tell_usage().await?;
                    }
                }
            }
        };
        while let Ok(report) = reports.try_recv() {
            self.take_in(report).await?;
        }
        while let Ok(word) = inbox.try_recv() {
            self.hear(word).await?;
        }
        while let Some(work) = ears.next().now_or_never() {
            self.heed(&work).await?;
        }
        Ok(ended)
    }

    fn next_check(&self) -> Instant {
        const FAR: Duration = Duration::from_secs(3600);
        if self.why.is_some() {
            return Instant::now() + FAR;
        }
        if let Some(since) = self.waiting {
            return Instant::now() + since.after(self.answer_timeout()).since(now());
        }
        let total = Instant::now() + self.deadline().since(now());
        self.heard_at.checked_add(self.silence).map_or(total, |silent| silent.min(total))
    }

    fn check_clock(&mut self) {
        if self.why.is_some() {
            return;
        }
        if let Some(since) = self.waiting {
            if now() >= since.after(self.answer_timeout()) {
                let text = format!("timed out: nobody answered question {} in time", self.asks);
                self.end(Why::Failed(Failure::new(FailureKind::TotalTimeout, text)));
            }
            return;
        }
        let assignment = &self.attempt.assignment;
        if now() >= self.deadline() {
            let text = format!("timed out: it took more than {} in all", assignment.timeout);
            self.end(Why::Failed(Failure::new(FailureKind::TotalTimeout, text)));
        } else if self.heard_at.elapsed() >= self.silence {
            let silence = Span::millis(u64::try_from(self.silence.as_millis()).unwrap_or(u64::MAX));
            let text = format!("timed out: agent {} said nothing for {silence}", assignment.agent_name);
            self.end(Why::Failed(Failure::new(FailureKind::SilenceTimeout, text)));
        }
    }

    fn end(&mut self, why: Why) {
        // The first reason counts, unless the work is somebody else's by now.
        if self.why.is_none() || why == Why::Lost {
            self.why = Some(why);
        }
        self.stop.cancel();
    }

    async fn hear(&mut self, word: Word) -> Result<()> {
        match word {
            Word::Stands(work) => self.heed(&work).await?,
            Word::Lost => self.end(Why::Lost),
            Word::Rest => {
                self.rests = true;
                self.rest();
            }
            Word::HandBack => self.end(Why::HandBack),
        }
        Ok(())
    }

    /// Does what the work's state asks for: stop, wait for an answer, or hand one to the agent. The same state twice changes nothing.
    async fn heed(&mut self, work: &Work) -> Result<()> {
        match work.status.mark() {
            None => self.end(Why::Lost),
            Some(mark) if mark.attempt > self.attempt.delivery.attempt => self.end(Why::Lost),
            Some(mark) if mark.cancelling => self.end(Why::Cancelled(work.cancel_reason.clone())),
            Some(_) => {}
        }
        for exchange in &work.exchanges {
            let ask = exchange.ask.ask;
            if let Some(before) = self.before.iter_mut().find(|before| before.ask.ask == ask) {
                before.answer.clone_from(&exchange.answer);
            }
            // Put by the tool, on the agent's behalf.
            if ask > self.asks {
                self.asks = ask;
                self.wait_for_answer().await?;
            }
            let asked_again = self.again.contains(&ask);
            let Some(answer) = exchange.answer.as_ref().filter(|_| ask > self.answered || asked_again) else { continue };
            self.answered = self.answered.max(ask);
            self.again.retain(|again| *again != ask);
            self.before.retain(|before| before.ask.ask != ask);
            if ask == self.asks || asked_again {
                self.resume().await?;
            }
            // An agent that does not listen gets the answer with its next attempt.
            let _ = self.answers.try_send(Answer { ask, answer: answer.clone() });
        }
        Ok(())
    }

    async fn take_in(&mut self, report: Report) -> Result<()> {
        self.heard_at = Instant::now();
        let kind = match report {
            Report::Alive => return Ok(()),
            Report::Used(more) => {
                self.meter.add(more);
                return Ok(());
            }
            Report::Printed(output) => {
                self.printed = Some(output);
                return Ok(());
            }
            Report::Progress { pct, message } => Kind::Progress { pct, message },
            Report::Escalate { reason, context, needs } => {
                let before = self.before.iter().position(|before| before.ask.reason == reason && before.ask.context == context);
                let number = match before.map(|at| (self.before[at].ask.ask, self.before[at].answer.clone(), at)) {
                    // An earlier attempt asked that, and died before it had the answer.
                    Some((ask, Some(answer), at)) => {
                        self.before.remove(at);
                        let _ = self.answers.try_send(Answer { ask, answer });
                        return Ok(());
                    }
                    // It is the same question still: whoever is about to answer it does not answer in vain.
                    Some((ask, None, _)) => {
                        self.again.push(ask);
                        ask
                    }
                    None => {
                        self.asks += 1;
                        self.asks
                    }
                };
                self.tell_usage().await?;
                self.wait_for_answer().await?;
                let ask = Ask { ask: number, reason, context, needs, parked: false };
                self.last_ask = Some(ask.clone());
                Kind::Escalate(ask)
            }
        };
        self.attempt.append(vec![self.attempt.record(kind)]).await
    }

    fn rest(&mut self) {
        if self.rests && self.waiting.is_some() {
            self.end(Why::HandBack);
        }
    }

    /// Puts on the log what was used and does not stand there yet.
    async fn tell_usage(&mut self) -> Result<()> {
        match self.meter.tell() {
            Some(used) => self.attempt.append(vec![self.attempt.record(Kind::Used(used))]).await,
            None => Ok(()),
        }
    }

    /// While a question is open the clocks stand still, and the item's deadline is the answer's.
    async fn wait_for_answer(&mut self) -> Result<()> {
        self.waiting.get_or_insert_with(now);
        self.extend(now().after(self.answer_timeout())).await?;
        self.rest();
        Ok(())
    }

    fn answer_timeout(&self) -> Duration {
        self.attempt.leaf.config.lattice.work.answer_timeout.get()
    }

    async fn resume(&mut self) -> Result<()> {
        if let Some(since) = self.waiting.take() {
            self.waited += now().since(since);
        }
        self.heard_at = Instant::now();
        self.extend(self.deadline()).await
    }

    async fn extend(&self, deadline: Timestamp) -> Result<()> {
        let lease = self.attempt.leaf.config.lattice.work.lease.get();
        let (queue, held) = (&self.attempt.leaf.transport.queue, std::slice::from_ref(self.attempt.delivery));
        self.attempt.retrying(|| queue.extend(held, lease, Some(deadline))).await.map(|_| ())
    }
}
