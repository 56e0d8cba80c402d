//! What goes on while an attempt's agent runs: its reports, what is said from outside, and the clock. What is to be written waits for
//! nothing but the server, and nothing here waits for that.

use std::collections::{BTreeSet, VecDeque};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::TROUBLE_PAUSE;
use super::attempt::{Attempt, Why, Word};
use super::claim::Meter;
use super::outbox::{Outbox, Step};
use crate::model::event::{Ask, Event, Failure, FailureKind, Kind};
use crate::model::output::Output;
use crate::model::time::{Span, Timestamp};
use crate::model::work::{Exchange, Work};
use crate::runner::{Answer, Ended, Report};
use crate::telemetry::now;
use crate::transport::Result;
use crate::works::{Following, record};

/// Goes along with the work while an attempt at it runs: nothing that is said of it after the taking is missed.
pub(super) struct Ears<'a> {
    pub(super) attempt: &'a Attempt<'a>,
    pub(super) following: Option<Following>,
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

/// A question that the agent itself has asked over its line, and that is not answered.
struct Own {
    /// Tells it from others of this attempt.
    id: u32,
    /// The question; its number is 0 until it is put, and again when another one was quicker to take that.
    ask: Ask,
    /// The event that puts it, but for the number.
    event: Event,
    /// Whether it was seen on the log.
    stands: bool,
}

/// Watches over a running agent: its reports, what is said from outside, and the clock.
pub(super) struct Watch<'a> {
    attempt: &'a Attempt<'a>,
    stop: CancellationToken,
    answers: mpsc::Sender<Answer>,
    /// Answers that the agent has not taken yet, after those in the channel.
    unheard: VecDeque<Answer>,
    pub(super) why: Option<Why>,
    /// The highest number of a question.
    asks: u32,
    /// The last question that has an answer on the log: an earlier one cannot be opened again.
    closed: u32,
    /// The questions of this attempt on the log that have no answer, whoever put them.
    open: BTreeSet<u32>,
    /// Those that had one when the work was looked at: an older look opens none of them again.
    answered: BTreeSet<u32>,
    /// All the questions of this attempt on the log, answered or not, whoever put them.
    stand: BTreeSet<u32>,
    /// What the agent has asked itself: the answers to these are what it hears.
    own: Vec<Own>,
    /// How many it has asked so: the next one's id.
    asked: u32,
    pub(super) last_ask: Option<Ask>,
    /// What earlier attempts asked and this one has not asked again, if its agent can be handed their answers.
    before: Vec<Exchange>,
    /// What the agent had printed when it was stopped.
    pub(super) printed: Option<Output>,
    /// Since when it waits for an answer.
    waiting: Option<Timestamp>,
    /// Until when it waits for one.
    answer_by: Timestamp,
    /// How long it has waited for answers before.
    waited: Duration,
    silence: Duration,
    heard_at: Instant,
    /// Whether the station stops.
    rests: bool,
    meter: Meter,
    /// What is said of the attempt and not written yet, after what is being written.
    outbox: Outbox,
    writing: Option<BoxFuture<'a, Result<()>>>,
}

impl<'a> Watch<'a> {
    pub(super) fn new(attempt: &'a Attempt<'a>, work: &Work, stop: CancellationToken, answers: mpsc::Sender<Answer>) -> Self {
        let silence = attempt.assignment.silence_timeout.or(attempt.definition.manifest.limits.silence);
        let silence = silence.or(attempt.leaf.config.lattice.work.silence);
        let asks = work.exchanges.iter().map(|exchange| exchange.ask.ask).max().unwrap_or(0);
        Self {
            attempt,
            stop,
            answers,
            unheard: VecDeque::new(),
            why: None,
            asks,
            closed: work.status.mark().map_or(0, |mark| mark.answered),
            open: BTreeSet::new(),
            answered: BTreeSet::new(),
            stand: BTreeSet::new(),
            own: Vec::new(),
            asked: 0,
            last_ask: None,
            before: if attempt.definition.runner.hears_answers() { work.exchanges.clone() } else { Vec::new() },
            printed: None,
            waiting: None,
            answer_by: now(),
            waited: work.waited(now()),
            silence: silence.map_or(Duration::MAX, Span::get),
            heard_at: Instant::now(),
            rests: false,
            meter: Meter::new(attempt.leaf.config.lattice.work.progress_per_second),
            outbox: Outbox::default(),
            writing: None,
        }
    }

    /// The moment at which the work has taken too long; time spent waiting for answers does not count.
    pub(super) fn deadline(&self) -> Timestamp {
        let waiting = self.waiting.map_or(Duration::ZERO, |since| now().since(since));
        self.attempt.assignment.deadline().after(self.waited + waiting)
    }

    pub(super) async fn over(
        &mut self,
        run: impl Future<Output = Ended>,
        mut reports: mpsc::Receiver<Report>,
        mut inbox: mpsc::Receiver<Word>,
        mut ears: Ears<'_>,
    ) -> Result<Ended> {
        let mut run = std::pin::pin!(run);
        let answers = self.answers.clone();
        let ended = loop {
            let check_at = self.meter.due().map_or_else(|| self.next_check(), |due| due.min(self.next_check()));
            let takes_in = self.why.is_some() || self.outbox.has_room();
            tokio::select! {
                biased;
                Some(word) = inbox.recv() => self.hear(word),
                work = ears.next() => self.heed(&work),
                written = self.write() => written?,
                room = answers.reserve(), if !self.unheard.is_empty() => match (room, self.unheard.pop_front()) {
                    (Ok(room), Some(answer)) => room.send(answer),
                    // An agent that does not listen gets the answers with its next attempt.
                    _ => self.unheard.clear(),
                },
                // Whoever is to be stopped may say all that it has left.
                Some(report) = reports.recv(), if takes_in => self.take_in(report),
                ended = &mut run => break ended,
                () = tokio::time::sleep_until(check_at) => {
                    self.check_clock();
                    if self.meter.due().is_some_and(|due| due <= Instant::now()) {
                        self.tell_usage();
                    }
                }
            }
        };
        while let Ok(report) = reports.try_recv() {
            self.take_in(report);
        }
        self.write_all().await?;
        while let Ok(word) = inbox.try_recv() {
            self.hear(word);
        }
        while let Some(work) = ears.next().now_or_never() {
            self.heed(&work);
        }
        self.tell_usage();
        self.write_all().await?;
        if ended == Ended::Parked && self.why.is_none() {
            self.make_sure().await?;
        }
        Ok(ended)
    }

    /// Looks at the log until all that the agent has asked stands there under numbers of its own.
    async fn make_sure(&mut self) -> Result<()> {
        const TRIES: u32 = 8;
        let attempt = self.attempt;
        for _ in 0..TRIES {
            if self.why.is_some() || self.own.iter().all(|own| own.stands) {
                break;
            }
            let (_, work) = attempt.retrying(|| attempt.leaf.works.history(attempt.delivery.id)).await?;
            if let Some(work) = work {
                self.heed(&work);
            }
            self.write_all().await?;
        }
        Ok(())
    }

    /// Whether a question of the attempt has no answer.
    pub(super) const fn waits(&self) -> bool {
        self.waiting.is_some()
    }

    /// Writes what waits next, for as long as that takes; never returns while nothing does. Dropping the future loses nothing.
    async fn write(&mut self) -> Result<()> {
        self.begin_writing();
        let Some(writing) = &mut self.writing else { return std::future::pending().await };
        let written = writing.await;
        self.writing = None;
        written
    }

    async fn write_all(&mut self) -> Result<()> {
        while self.begin_writing() {
            self.write().await?;
        }
        Ok(())
    }

    /// Whether there is something to write.
    fn begin_writing(&mut self) -> bool {
        let attempt = self.attempt;
        while self.writing.is_none()
            && let Some(step) = self.outbox.next()
        {
            self.writing = match step {
                Step::Say(event) => Some(attempt.append(vec![record(*event)]).boxed()),
                Step::Extend(deadline) => Some(attempt.extend(deadline).boxed()),
                Step::Ask(id) => self.put(id).map(|event| attempt.append(vec![record(event)]).boxed()),
            };
        }
        self.writing.is_some()
    }

    /// The event that puts a question of the agent's, unless it was answered meanwhile. It has the next number as far as anybody here
    /// knows; whether another one was quicker, the log tells.
    fn put(&mut self, id: u32) -> Option<Event> {
        let own = self.own.iter_mut().find(|own| own.id == id)?;
        // Under the number of an earlier attempt nobody would see it once a later one was answered.
        if own.ask.ask <= self.closed {
            self.asks += 1;
            own.ask.ask = self.asks;
        }
        self.last_ask = Some(own.ask.clone());
        Some(Event { kind: Kind::Escalate(own.ask.clone()), ..own.event.clone() })
    }

    fn say(&mut self, kind: Kind) {
        self.outbox.put(Step::Say(Box::new(self.attempt.event(kind))));
    }

    fn next_check(&self) -> Instant {
        const FAR: Duration = Duration::from_secs(3600);
        if self.why.is_some() {
            return Instant::now() + FAR;
        }
        if self.waits() {
            return Instant::now() + self.answer_by.since(now());
        }
        let total = Instant::now() + self.deadline().since(now());
        self.heard_at.checked_add(self.silence).map_or(total, |silent| silent.min(total))
    }

    fn check_clock(&mut self) {
        if self.why.is_some() {
            return;
        }
        if self.waits() {
            if now() >= self.answer_by {
                let own = self.own.first().map(|own| if own.ask.ask > 0 { own.ask.ask } else { self.asks + 1 });
                let open = self.open.first().copied().or(own).unwrap_or(self.asks);
                let text = format!("timed out: nobody answered question {open} in time");
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

    fn hear(&mut self, word: Word) {
        match word {
            Word::Stands(work) => self.heed(&work),
            Word::Lost => self.end(Why::Lost),
            Word::Rest => {
                self.rests = true;
                self.rest();
            }
            Word::HandBack => self.end(Why::HandBack),
        }
    }

    /// Does what the work's state asks for: stop, wait for an answer, or hand one to the agent. The same state twice changes nothing.
    fn heed(&mut self, work: &Work) {
        match work.status.mark() {
            None => self.end(Why::Lost),
            Some(mark) if mark.attempt > self.attempt.delivery.attempt => self.end(Why::Lost),
            Some(mark) if mark.cancelling => self.end(Why::Cancelled(work.cancel_reason.clone())),
            Some(mark) => self.closed = self.closed.max(mark.answered),
        }
        let mut heard = false;
        for exchange in &work.exchanges {
            let number = exchange.ask.ask;
            self.asks = self.asks.max(number);
            if exchange.attempt == self.attempt.delivery.attempt {
                self.stand.insert(number);
            }
            if let Some(before) = self.before.iter_mut().find(|before| before.ask.ask == number) {
                before.answer.clone_from(&exchange.answer);
            }
            if exchange.answer.is_some() {
                heard |= self.answered.insert(number);
                self.open.remove(&number);
            } else if exchange.attempt == self.attempt.delivery.attempt && !self.answered.contains(&number) && self.open.insert(number) {
                self.wait_for_answer();
            }
        }
        self.heed_own(work);
        if self.open.is_empty() && self.own.is_empty() {
            self.resume();
        } else if heard && self.waits() {
            // Whoever answered may have known of no other question, and have set the deadline for work that goes on.
            self.outbox.put(Step::Extend(self.answer_by));
        }
    }

    /// Hands the agent the answers to what it has asked itself, and asks again what another question took the number of.
    fn heed_own(&mut self, work: &Work) {
        for mut own in std::mem::take(&mut self.own) {
            match work.exchanges.iter().find(|exchange| exchange.ask.ask == own.ask.ask) {
                Some(exchange) if exchange.ask.covers(&own.ask) => {
                    if let Some(answer) = &exchange.answer {
                        self.hand_on(own.ask, answer.clone());
                        continue;
                    }
                    own.stands = exchange.attempt == self.attempt.delivery.attempt;
                }
                Some(_) => {
                    own.ask.ask = 0;
                    self.outbox.put(Step::Ask(own.id));
                }
                None => {}
            }
            self.own.push(own);
        }
    }

    /// Hands the agent an answer as soon as it takes one more.
    fn hand_on(&mut self, ask: Ask, answer: serde_json::Value) {
        self.unheard.push_back(Answer { ask: ask.ask, reason: ask.reason, context: ask.context, answer });
    }

    fn take_in(&mut self, report: Report) {
        self.heard_at = Instant::now();
        let kind = match report {
            Report::Alive => return,
            Report::Used(more) => return self.meter.add(more),
            Report::Printed(output) => {
                self.printed = Some(output);
                return;
            }
            Report::Progress { pct, message } => Kind::Progress { pct, message },
            Report::Escalate { reason, context, needs } => {
                return self.ask(Ask { ask: 0, reason, context, needs, parked: false });
            }
        };
        self.say(kind);
    }

    /// Takes in a question of the agent's own.
    fn ask(&mut self, mut ask: Ask) {
        if let Some(at) = self.before.iter().position(|before| before.ask.covers(&ask)) {
            let before = self.before.remove(at);
            ask.ask = before.ask.ask;
            // An earlier attempt asked that, and died before it had the answer.
            if let Some(answer) = before.answer {
                return self.hand_on(ask, answer);
            }
            // It is the same question still: whoever is about to answer it does not answer in vain.
        }
        let max = self.attempt.leaf.config.lattice.work.questions_max;
        // What others asked in the agent's stead, or it over its tool, counts too.
        let waiting = self.own.iter().filter(|own| !own.stands).count();
        if self.stand.len() + waiting >= max as usize {
            let agent = &self.attempt.assignment.agent_name;
            let text = format!("agent {agent} asked more than {max} questions in one attempt (lattice.work.questions_max)");
            return self.end(Why::Failed(Failure::new(FailureKind::Limit, text)));
        }
        self.asked += 1;
        self.tell_usage();
        self.wait_for_answer();
        self.outbox.put(Step::Ask(self.asked));
        let event = self.attempt.event(Kind::Escalate(ask.clone()));
        self.own.push(Own { id: self.asked, ask, event, stands: false });
    }

    fn rest(&mut self) {
        if self.rests && self.waits() {
            self.end(Why::HandBack);
        }
    }

    /// Says what was used and was not said yet.
    fn tell_usage(&mut self) {
        if let Some(used) = self.meter.tell() {
            self.say(Kind::Used(used));
        }
    }

    /// While a question is open the clocks stand still, and the item's deadline is the answer's.
    fn wait_for_answer(&mut self) {
        self.waiting.get_or_insert_with(now);
        self.answer_by = now().after(self.attempt.leaf.config.lattice.work.answer_timeout.get());
        self.outbox.put(Step::Extend(self.answer_by));
        self.rest();
    }

    /// The clocks go on, if they stood still.
    fn resume(&mut self) {
        let Some(since) = self.waiting.take() else { return };
        self.waited += now().since(since);
        self.heard_at = Instant::now();
        self.outbox.put(Step::Extend(self.deadline()));
    }
}
