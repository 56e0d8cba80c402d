//! Keeps one hook: folds its stream, says what callers want of it, and removes what is gone.

use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use async_nats::HeaderMap;
use bytes::Bytes;
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::super::hook::{Hook, Label, Op};
use super::super::link::{Fault, Link};
use super::super::log;
use super::super::stream::{Stored, Stream};
use super::super::tail::Tail;
use super::ask::{Answer, Ask, Draft};
use super::{HELD_BACK, ITEM, Inner, TURN, hook_stream};
use crate::model::id::StationId;
use crate::model::time::Timestamp;
use crate::transport::{Delivery, Error, Result, Waits};

/// How many wants go into one message.
const BATCH_MAX: usize = 512;
/// How often a hook with timers looks at its clock at least.
const CLOCK_EVERY: Duration = Duration::from_millis(200);
/// After so many operations, everything that lives is said anew, so that what was said before can go.
const SNAPSHOT_EVERY: usize = 256;
/// A snapshot of more items would not fit a message.
const SNAPSHOT_ITEMS_MAX: usize = 5_000;
/// How many messages of gone items may stand in the stream.
const DEAD_MAX: usize = 256;
/// How many of them may stand between items that live.
const SCATTERED_MAX: usize = 2_048;
const TROUBLE_PAUSE: Duration = Duration::from_millis(250);
/// How long somebody who is connected again needs to say that what it holds is held.
const HOLD_AGAIN: Duration = Duration::from_secs(1);
/// How long an item that has settled may wait for the next operation on its hook, to go with it.
const DROP_WITHIN: Duration = Duration::from_millis(2);
/// How long the last word on a hook may take when its keeper ends.
const LAST_WORD: Duration = Duration::from_secs(1);
/// A hook of another station is forgotten when nobody has asked for it for so long.
const IDLE_MAX: Duration = Duration::from_secs(120);

/// Keeps one hook.
pub(super) struct Keeper {
    pub(super) queue: Weak<Inner>,
    pub(super) link: Arc<Link>,
    pub(super) tasks: TaskTracker,
    /// The way to itself, which does not keep it going.
    pub(super) asks: mpsc::WeakSender<Ask>,
    pub(super) station: StationId,
    pub(super) serves: bool,
    pub(super) raised: watch::Sender<u64>,
    pub(super) cancel: CancellationToken,
}

/// An open hook.
pub(super) struct Open {
    pub(super) stream: Arc<Stream>,
    tail: Tail,
    pub(super) hook: Hook,
    /// Items that are on their way to the stream, so that a full hook stays full.
    pub(super) coming: Coming,
    /// Where it is said that they are there or given up.
    pub(super) asks: mpsc::WeakSender<Ask>,
    pub(super) tasks: TaskTracker,
    /// Messages of items that are gone.
    dead: Vec<u64>,
    /// What has settled, and goes with the next operation, or by itself at a moment soon.
    pub(super) settled: Vec<Delivery>,
    settled_due: Option<Instant>,
    /// An operation may have landed that was not heard of.
    doubtful: bool,
    /// How often the connection had been made when it was looked at last.
    connects: u64,
    used: Instant,
}

impl Keeper {
    pub(super) async fn run(self, mut asks: mpsc::Receiver<Ask>) {
        loop {
            let open = tokio::select! {
                () = self.cancel.cancelled() => None,
                open = self.open(&mut asks) => open,
            };
            let Some(mut open) = open else { return };
            tokio::select! {
                () = self.cancel.cancelled() => {
                    // An operation that was under way is known by its number; what it left is said now, or found by whoever comes next.
                    let _ = tokio::time::timeout(LAST_WORD, self.let_go(&mut open)).await;
                    return;
                }
                goes_on = self.keep(&mut open, &mut asks) => if !goes_on { return },
            }
            tracing::warn!(station = %self.station, "the server has lost this hook, or the end of it: it is read anew");
        }
    }

    /// Keeps the hook until nobody asks for it; true when what the server has is another one.
    async fn keep(&self, open: &mut Open, asks: &mut mpsc::Receiver<Ask>) -> bool {
        self.raise();
        loop {
            if open.tail.is_anew() {
                return true;
            }
            let now = self.link.now();
            self.heed_outages(open, now);
            if open.hook.promote(now) {
                self.raise();
            }
            if open.settled_due.is_some_and(|due| due <= Instant::now()) {
                self.let_go(open).await;
            }
            let timer = open.hook.next_timer().map_or(IDLE_MAX, |at| at.since(now).clamp(Duration::from_millis(1), CLOCK_EVERY));
            let timer = open.settled_due.map_or(timer, |due| timer.min(due - Instant::now()));
            tokio::select! {
                biased;
                stored = open.tail.next() => match stored {
                    Ok(_) if open.tail.is_anew() => {}
                    Ok(stored) => {
                        if open.fold(stored, now) {
                            self.raise();
                        }
                    }
                    Err(Error::Closed) => return false,
                    Err(error) => {
                        tracing::debug!(%error, station = %self.station, "the hook cannot be followed now");
                        self.refuse_for(TROUBLE_PAUSE, asks, &error, &mut open.coming).await;
                    }
                },
                ask = asks.recv() => {
                    let Some(ask) = ask else { return false };
                    let mut batch = Vec::new();
                    batch.extend(self.settle_soon(open, ask));
                    while batch.len() < BATCH_MAX
                        && let Ok(ask) = asks.try_recv()
                    {
                        batch.extend(self.settle_soon(open, ask));
                    }
                    open.used = Instant::now();
                    if batch.is_empty() {
                        continue;
                    }
                    self.heed_outages(open, self.link.now());
                    self.carry_out(open, batch).await;
                }
                () = tokio::time::sleep(timer) => {
                    if !self.serves && open.hook.is_empty() && open.coming.is_empty() && open.used.elapsed() > IDLE_MAX && self.raised.receiver_count() == 0 {
                        asks.close();
                        while let Ok(ask) = asks.try_recv() {
                            ask.refuse(&Error::Unreachable("the hook was just being put away; ask again".into()));
                        }
                        if let Some(queue) = self.queue.upgrade() {
                            queue.hooks.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, handle| !handle.asks.is_closed());
                        }
                        return false;
                    }
                }
            }
        }
    }

    /// What has settled here can go with whatever is said next of this hook: it runs no more, and its outcome stands on the log. Until
    /// then it is held, and whoever finds it after that sees its outcome.
    fn settle_soon(&self, open: &mut Open, ask: Ask) -> Option<Ask> {
        match ask {
            Ask::Settle(delivery, reply) if self.serves && open.hook.newer.is_none() && open.hook.of(&delivery).is_some() => {
                open.settled.push(delivery);
                open.settled_due.get_or_insert_with(|| Instant::now() + DROP_WITHIN);
                let _ = reply.send(Ok(true));
                None
            }
            other => Some(other),
        }
    }

    /// Lets go of what has settled.
    async fn let_go(&self, open: &mut Open) {
        if !open.settled.is_empty() {
            self.carry_out(open, Vec::new()).await;
        }
        // It could not be said now.
        open.settled_due = (!open.settled.is_empty()).then(|| Instant::now() + TROUBLE_PAUSE);
    }

    fn raise(&self) {
        self.raised.send_modify(|count| *count += 1);
    }

    /// Nobody could extend a hold while the server was away: the others get as long as it may take them to come back.
    fn heed_outages(&self, open: &mut Open, now: Timestamp) {
        let connects = self.link.connects();
        if connects != open.connects {
            open.connects = connects;
            open.hook.spare(now.after(self.link.settings.reconnect_delay_max.get() + HOLD_AGAIN));
        }
    }

    /// Says no to whoever asks, for a while.
    async fn refuse_for(&self, span: Duration, asks: &mut mpsc::Receiver<Ask>, error: &Error, coming: &mut Coming) {
        let end = Instant::now() + span;
        while let Ok(Some(ask)) = tokio::time::timeout_at(end, asks.recv()).await {
            coming.heed(&ask);
            ask.refuse(error);
        }
    }

    async fn open(&self, asks: &mut mpsc::Receiver<Ask>) -> Option<Open> {
        loop {
            match self.try_open().await {
                Ok(open) => return Some(open),
                Err(Error::Closed) => return None,
                Err(error) => {
                    tracing::debug!(%error, station = %self.station, "the hook cannot be opened now");
                    // Of what is on its way to a hook that is not open yet nothing was counted.
                    self.refuse_for(TROUBLE_PAUSE, asks, &error, &mut Coming::default()).await;
                    if asks.is_closed() {
                        return None;
                    }
                }
            }
        }
    }

    async fn try_open(&self) -> Result<Open> {
        let (wire, station) = (&self.link.wire, &self.station);
        let connects = self.link.connects();
        let stream = hook_stream(&self.link, station).await?;
        let all = wire.hook_all(station);
        let told = wire.told(&all);
        let mut tail = stream.tail(all, told, 0, true).await?;
        let stored = tail.all().await?;
        let mut open = Open {
            stream,
            tail,
            hook: Hook::new(station.clone(), self.serves),
            coming: Coming::default(),
            asks: self.asks.clone(),
            tasks: self.tasks.clone(),
            dead: Vec::new(),
            settled: Vec::new(),
            settled_due: None,
            doubtful: false,
            connects,
            used: Instant::now(),
        };
        open.fold(stored, self.link.now());
        Ok(open)
    }

    /// Decides on all wants with one message, again when somebody else was quicker.
    async fn carry_out(&self, open: &mut Open, batch: Vec<Ask>) {
        // Once, however often the others are decided on, and whether they can be.
        batch.iter().for_each(|ask| open.coming.heed(ask));
        if let Some(version) = open.hook.newer {
            let text = format!("the hook of station {} is kept by a newer lattice-mcp (form {version}): update the one here", self.station);
            let error = Error::Store(text.into());
            return batch.into_iter().for_each(|ask| ask.refuse(&error));
        }
        if open.doubtful || batch.iter().any(|ask| ask.wants_news(&open.hook)) {
            if let Err(error) = open.catch_up(self.link.now()).await {
                batch.into_iter().for_each(|ask| ask.refuse(&error));
                return;
            }
            open.doubtful = false;
        }
        let mut tries = 0;
        loop {
            tries += 1;
            let mut draft = Draft { now: self.link.now(), ops: Vec::new(), undo: Vec::new(), raise: false };
            let answers: Vec<Answer> = batch.iter().map(|ask| draft.decide(open, ask)).collect();
            if draft.ops.is_empty() && !batch.is_empty() {
                return self.answer(open, batch, answers, &draft);
            }
            draft.let_go(open);
            if draft.ops.is_empty() {
                open.settled.clear();
                return;
            }
            let id = Uuid::new_v4().simple().to_string();
            match self.propose(open, Hook::message(draft.ops.clone()), &id).await {
                Ok(seq) => {
                    open.hook.last_op = seq;
                    open.hook.ops_since_snapshot += 1;
                    (open.settled, open.settled_due) = (Vec::new(), None);
                    self.answer(open, batch, answers, &draft);
                    self.tidy(open).await;
                    return;
                }
                Err(fault) => {
                    open.hook.undo(draft.undo);
                    for (ask, answer) in batch.iter().zip(&answers) {
                        if let (Ask::Push(item, ..), Answer::Ready) = (ask, answer) {
                            open.coming.end(Waits::of(item));
                        }
                    }
                    let error = if fault.is_conflict() && tries < 100 {
                        match open.catch_up(self.link.now()).await {
                            Ok(()) => continue,
                            Err(error) => error,
                        }
                    } else {
                        open.doubtful = true;
                        open.stream.explain(fault)
                    };
                    batch.into_iter().for_each(|ask| ask.refuse(&error));
                    return;
                }
            }
        }
    }

    /// Says an operation right after the last one that is known here.
    async fn propose(&self, open: &Open, body: Vec<u8>, id: &str) -> std::result::Result<u64, Fault> {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", id);
        headers.insert("Nats-Expected-Last-Subject-Sequence", open.hook.last_op.to_string().as_str());
        let subject = self.link.wire.hook(&self.station);
        match open.stream.publish(&subject, headers, Bytes::from(body)).await {
            Ok(published) => Ok(published.seq),
            Err(fault) if fault.is_conflict() => match open.stream.last(&subject).await? {
                // It was ours: the first answer got lost.
                Some(last) if last.header("Nats-Msg-Id") == Some(id) => Ok(last.seq),
                _ => Err(fault),
            },
            Err(fault) => Err(fault),
        }
    }

    fn answer(&self, open: &mut Open, batch: Vec<Ask>, answers: Vec<Answer>, draft: &Draft) {
        for op in &draft.ops {
            if let Op::Drop { seq } = op {
                open.dead.push(*seq);
            }
        }
        if draft.raise {
            self.raise();
        }
        for (ask, answer) in batch.into_iter().zip(answers) {
            ask.answer(answer, open);
        }
    }

    /// Says anew what lives, and removes the messages of what does not, when there is much of either.
    async fn tidy(&self, open: &mut Open) {
        if open.hook.ops_since_snapshot >= SNAPSHOT_EVERY.max(open.hook.len()) && open.hook.len() <= SNAPSHOT_ITEMS_MAX {
            let id = Uuid::new_v4().simple().to_string();
            match self.propose(open, open.hook.snapshot(open.tail.at(), self.link.now()), &id).await {
                Ok(seq) => {
                    open.hook.last_op = seq;
                    open.hook.ops_since_snapshot = 0;
                    // Not by a rollup: a stream that takes those could be emptied by anybody whose answers the server sends there.
                    let summed_up = json!({ "filter": self.link.wire.hook(&self.station), "seq": seq });
                    if let Err(fault) = open.stream.api("STREAM.PURGE", &summed_up).await {
                        tracing::debug!(%fault, station = %self.station, "what was summed up could not be removed");
                    }
                }
                Err(fault) if fault.is_conflict() => {}
                Err(fault) => {
                    open.doubtful = true;
                    tracing::debug!(%fault, station = %self.station, "the hook could not be summed up");
                }
            }
        }
        if open.dead.len() < DEAD_MAX {
            return;
        }
        let first = open.hook.first().map_or(open.tail.at() + 1, |first| first.min(open.tail.at() + 1));
        // Those below the first that lives go with one request; the others wait until they do, or until they are many.
        let below = open.dead.iter().filter(|seq| **seq < first).count();
        if below < DEAD_MAX / 2 && open.dead.len() < SCATTERED_MAX {
            return;
        }
        let mut dead = std::mem::take(&mut open.dead);
        if dead.len() < SCATTERED_MAX {
            open.dead = dead.extract_if(.., |seq| *seq >= first).collect();
        }
        let (stream, subject) = (Arc::clone(&open.stream), self.link.wire.assign(&self.station));
        self.tasks.spawn(async move {
            let purged = stream.api("STREAM.PURGE", &json!({ "filter": subject, "seq": first })).await;
            if let Err(fault) = purged {
                tracing::debug!(%fault, stream = stream.name, "could not remove the messages of items that are gone");
            }
            for seq in dead.into_iter().filter(|seq| *seq >= first) {
                if stream.api("STREAM.MSG.DELETE", &json!({ "seq": seq, "no_erase": true })).await.is_err() {
                    break;
                }
            }
        });
    }
}

impl Open {
    /// Folds messages of the stream; says whether something may have become free.
    fn fold(&mut self, stored: Vec<Stored>, now: Timestamp) -> bool {
        let mut any = false;
        for stored in stored {
            if let Some(label) = stored.header(ITEM).map(|text| Label::from_headers(text, stored.header(TURN))) {
                let Some(mut label) = label else {
                    self.refuse_item(&stored);
                    continue;
                };
                label.held_back = stored.header(HELD_BACK).is_some();
                // A packed body is fetched when the item is taken.
                let packed = stored.header(log::BODY).is_some();
                if !self.hook.put_stored(stored.seq, label, (!packed).then_some(stored.body), now) {
                    self.dead.push(stored.seq);
                }
                any = true;
            } else if stored.subject.ends_with(".assign") {
                self.refuse_item(&stored);
            } else {
                match self.hook.fold(stored.seq, &stored.body) {
                    Ok(()) => any = true,
                    Err(reason) => tracing::error!(
                        seq = stored.seq,
                        reason,
                        stream = self.stream.name,
                        "skipped an operation on a hook that cannot be read"
                    ),
                }
            }
        }
        any
    }

    fn refuse_item(&mut self, stored: &Stored) {
        tracing::warn!(seq = stored.seq, stream = self.stream.name, "skipped a message on a hook that is no item");
        self.dead.push(stored.seq);
    }

    /// Folds everything that the stream has now.
    async fn catch_up(&mut self, now: Timestamp) -> Result<()> {
        let stored = self.tail.all().await?;
        if self.tail.is_anew() {
            return Err(Error::Unreachable("the server has lost the hook, which is just being read anew; ask again".into()));
        }
        self.fold(stored, now);
        Ok(())
    }
}

/// How many items are on their way to the stream: those that may start, and those that are held back.
#[derive(Default)]
pub(super) struct Coming(usize, usize);

impl Coming {
    fn is_empty(&self) -> bool {
        self.0 + self.1 == 0
    }

    pub(super) fn of(&self, waits: Waits) -> usize {
        match waits {
            Waits::ToStart => self.0,
            Waits::HeldBack => self.1,
        }
    }

    fn slot(&mut self, waits: Waits) -> &mut usize {
        match waits {
            Waits::ToStart => &mut self.0,
            Waits::HeldBack => &mut self.1,
        }
    }

    /// Counts out what has arrived or was given up.
    fn heed(&mut self, ask: &Ask) {
        match ask {
            Ask::Pushed(_, label, _) => self.end(if label.held_back { Waits::HeldBack } else { Waits::ToStart }),
            Ask::Abandoned(waits) => self.end(*waits),
            _ => {}
        }
    }

    pub(super) fn begin(&mut self, waits: Waits) {
        *self.slot(waits) += 1;
    }

    pub(super) fn end(&mut self, waits: Waits) {
        let count = self.slot(waits);
        *count = count.saturating_sub(1);
    }
}
