//! What goes on while an attempt's agent runs: its reports, what is said from outside, and the clock. What is to be written waits for
//! nothing but the server, and nothing here waits for that.

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
use crate::model::event::{Ask, Failure, FailureKind, Kind};
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

/// Watches over a running agent: its reports, what is said from outside, and the clock.
pub(super) struct Watch<'a> {
    attempt: &'a Attempt<'a>,
    stop: CancellationToken,
    answers: mpsc::Sender<Answer>,
    pub(super) why: Option<Why>,
    asks: u32,
    answered: u32,
    /// The last question that has an answer on the log: an earlier one cannot be opened again.
    pub(super) closed: u32,
    pub(super) last_ask: Option<Ask>,
    /// What earlier attempts asked, if this one's agent can be handed their answers.
    before: Vec<Exchange>,
    /// Those of these questions that this attempt has asked again, and that are still open.
    again: Vec<u32>,
    /// What the agent had printed when it was stopped.
    pub(super) printed: Option<Output>,
    /// Since when it waits for an answer.
    waiting: Option<Timestamp>,
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
            why: None,
            asks,
            answered: asks,
            closed: work.status.mark().map_or(0, |mark| mark.answered),
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
        let ended = loop {
            let check_at = self.meter.due().map_or_else(|| self.next_check(), |due| due.min(self.next_check()));
            let takes_in = self.why.is_some() || self.outbox.has_room();
            tokio::select! {
                biased;
                Some(word) = inbox.recv() => self.hear(word),
                work = ears.next() => self.heed(&work),
                written = self.write() => written?,
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
        Ok(ended)
    }

    /// Writes what waits next, for as long as that takes; never returns while nothing does. Dropping the future loses nothing.
    async fn write(&mut self) -> Result<()> {
        let attempt = self.attempt;
        if self.writing.is_none() {
            self.writing = self.outbox.next().map(|step| match step {
                Step::Say(event) => attempt.append(vec![record(*event)]).boxed(),
                Step::Extend(deadline) => attempt.extend(deadline).boxed(),
            });
        }
        let Some(writing) = &mut self.writing else { return std::future::pending().await };
        let written = writing.await;
        self.writing = None;
        written
    }

    async fn write_all(&mut self) -> Result<()> {
        while self.writing.is_some() || !self.outbox.is_empty() {
            self.write().await?;
        }
        Ok(())
    }

    fn say(&mut self, kind: Kind) {
        self.outbox.put(Step::Say(Box::new(self.attempt.event(kind))));
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
        for exchange in &work.exchanges {
            let ask = exchange.ask.ask;
            if let Some(before) = self.before.iter_mut().find(|before| before.ask.ask == ask) {
                before.answer.clone_from(&exchange.answer);
            }
            // Put by the tool, on the agent's behalf.
            if ask > self.asks {
                self.asks = ask;
                self.wait_for_answer();
            }
            let asked_again = self.again.contains(&ask);
            let Some(answer) = exchange.answer.as_ref().filter(|_| ask > self.answered || asked_again) else { continue };
            self.answered = self.answered.max(ask);
            self.again.retain(|again| *again != ask);
            self.before.retain(|before| before.ask.ask != ask);
            if ask == self.asks || asked_again {
                self.resume();
            }
            // An agent that does not listen gets the answer with its next attempt.
            let _ = self.answers.try_send(Answer { ask, answer: answer.clone() });
        }
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
                let before = self.before.iter().position(|before| before.ask.reason == reason && before.ask.context == context);
                let number = match before.map(|at| (self.before[at].ask.ask, self.before[at].answer.clone(), at)) {
                    // An earlier attempt asked that, and died before it had the answer.
                    Some((ask, Some(answer), at)) => {
                        self.before.remove(at);
                        let _ = self.answers.try_send(Answer { ask, answer });
                        return;
                    }
                    // It is the same question still: whoever is about to answer it does not answer in vain.
                    Some((ask, None, _)) if ask > self.closed => {
                        self.again.push(ask);
                        ask
                    }
                    // A later one was answered since: under its old number nobody would see it.
                    _ => {
                        self.asks += 1;
                        self.asks
                    }
                };
                self.tell_usage();
                self.wait_for_answer();
                let ask = Ask { ask: number, reason, context, needs, parked: false };
                self.last_ask = Some(ask.clone());
                Kind::Escalate(ask)
            }
        };
        self.say(kind);
    }

    fn rest(&mut self) {
        if self.rests && self.waiting.is_some() {
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
        self.outbox.put(Step::Extend(now().after(self.answer_timeout())));
        self.rest();
    }

    fn answer_timeout(&self) -> Duration {
        self.attempt.leaf.config.lattice.work.answer_timeout.get()
    }

    fn resume(&mut self) {
        if let Some(since) = self.waiting.take() {
            self.waited += now().since(since);
        }
        self.heard_at = Instant::now();
        self.outbox.put(Step::Extend(self.deadline()));
    }
}
