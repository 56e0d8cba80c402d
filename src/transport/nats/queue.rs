//! The hooks of all stations. Each hook that this process has to do with is kept by one task, which folds its stream and proposes
//! what callers want: many wants in one message, taken by the server only right after the last operation that the task knew.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::HeaderMap;
use async_trait::async_trait;
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::blobs::NatsBlobs;
use super::hook::{Grant, Hook, Label, Op, Undo, until};
use super::link::{Fault, Link};
use super::log::{NatsLog, carry_trace};
use super::stream::{Stored, Stream, Tail};
use super::stream_config;
use crate::model::id::{InstanceId, StationId, WorkId};
use crate::model::time::Timestamp;
use crate::transport::{
    Delivery, Error, Filter, Item, LaneLoad, Log, Position, Pushed, Queue, Record, Result, Signal, Take, Taken, Waits, Want,
};

/// The header that says what an item is.
const ITEM: &str = "Lattice-Item";
/// The header that says where an item stands among what waits.
const TURN: &str = "Lattice-Turn";
/// The header of an item that nobody gets before somebody wakes it.
const HELD_BACK: &str = "Lattice-Held-Back";
/// How many wants go into one message.
const BATCH_MAX: usize = 512;
const WAITING_MAX: usize = 4096;
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
/// How often, and for how long, an order is put on the log again that its hook has.
const ANNOUNCE_PAUSE: Duration = Duration::from_secs(1);
const ANNOUNCE_MAX: Duration = Duration::from_secs(3600);
const TROUBLE_PAUSE: Duration = Duration::from_millis(250);
/// How long somebody who is connected again needs to say that what it holds is held.
const HOLD_AGAIN: Duration = Duration::from_secs(1);
/// How often somebody looks for hooks that nobody of this process has to do with, whose items may be past their deadlines.
const DISCOVER_EVERY: Duration = Duration::from_secs(60);
/// How long an item that has settled may wait for the next operation on its hook, to go with it.
const DROP_WITHIN: Duration = Duration::from_millis(2);
/// How long the last word on a hook may take when its keeper ends.
const LAST_WORD: Duration = Duration::from_secs(1);
/// A hook of another station is forgotten when nobody has asked for it for so long.
const IDLE_MAX: Duration = Duration::from_secs(120);

/// The hooks of one lattice.
pub(super) struct NatsQueue(Arc<Inner>);

struct Inner {
    link: Arc<Link>,
    log: NatsLog,
    blobs: Arc<NatsBlobs>,
    tasks: TaskTracker,
    cancel: CancellationToken,
    hooks: Mutex<HashMap<StationId, Handle>>,
    discovered: Mutex<Option<Instant>>,
}

/// The way to a hook's task.
#[derive(Clone)]
struct Handle {
    asks: mpsc::Sender<Ask>,
    raised: watch::Sender<u64>,
}

type Reply<T> = oneshot::Sender<Result<T>>;

/// What a caller wants of a hook.
enum Ask {
    Push(Box<Item>, u32, Reply<Option<Ready>>),
    Pushed(u64, Label, Bytes),
    Abandoned(Waits),
    Take(Want, Reply<(Vec<Grant>, Option<Timestamp>)>),
    Expired(InstanceId, Duration, usize, Reply<Vec<Grant>>),
    Extend(Vec<Delivery>, Duration, Option<Timestamp>, Reply<Vec<Delivery>>),
    Holds(Delivery, Reply<bool>),
    Settle(Delivery, Reply<bool>),
    Release(Delivery, Timestamp, Option<Timestamp>, Reply<bool>),
    Wake(WorkId, Option<Timestamp>, Reply<bool>),
    Remove(WorkId, Reply<bool>),
    Knows(WorkId, Reply<bool>),
    Pause(String, Timestamp, Reply<()>),
    Load(Reply<Vec<LaneLoad>>),
}

/// An item on its way to its stream, for which room is kept until it is there or given up.
struct OnItsWay<'a> {
    queue: &'a NatsQueue,
    station: &'a StationId,
    waits: Waits,
}

impl Drop for OnItsWay<'_> {
    fn drop(&mut self) {
        let (asks, waits) = (self.queue.handle(self.station).asks, self.waits);
        // Whoever gives up cannot wait.
        self.queue.0.tasks.spawn(async move { _ = asks.send(Ask::Abandoned(waits)).await });
    }
}

/// There is room for the item: the caller publishes it to this stream.
struct Ready(Arc<Stream>, Box<Item>);

/// Makes or checks a station's hook.
pub(super) async fn hook_stream(link: &Arc<Link>, station: &StationId) -> Result<Arc<Stream>> {
    let wire = &link.wire;
    // The server sets aside whatever a stream may take, and there are as many hooks as stations: how many items wait is bounded instead.
    let mut config = stream_config(link, wire.hook_stream(station), &wire.hook_subjects(station), Duration::ZERO, -1);
    config["discard"] = "new".into();
    config["republish"] = json!({ "src": wire.all(), "dest": wire.told_all() });
    Stream::ensure(link, config).await
}

impl NatsQueue {
    pub(super) fn new(link: &Arc<Link>, log: &NatsLog, blobs: &Arc<NatsBlobs>, tasks: TaskTracker, cancel: CancellationToken) -> Self {
        Self(Arc::new(Inner {
            link: Arc::clone(link),
            log: log.clone(),
            blobs: Arc::clone(blobs),
            tasks,
            cancel,
            hooks: Mutex::default(),
            discovered: Mutex::default(),
        }))
    }

    fn handle(&self, station: &StationId) -> Handle {
        let mut hooks = self.0.hooks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = hooks.get(station).filter(|handle| !handle.asks.is_closed()) {
            return handle.clone();
        }
        let (asks, waiting) = mpsc::channel(WAITING_MAX);
        let raised = hooks.get(station).map_or_else(|| watch::Sender::new(0), |handle| handle.raised.clone());
        let handle = Handle { asks, raised: raised.clone() };
        hooks.insert(station.clone(), handle.clone());
        let cancel = self.0.cancel.clone();
        let keeper = Keeper {
            queue: Arc::downgrade(&self.0),
            link: Arc::clone(&self.0.link),
            tasks: self.0.tasks.clone(),
            serves: *station == self.0.link.station,
            station: station.clone(),
            raised,
            cancel,
        };
        self.0.tasks.spawn(keeper.run(waiting));
        handle
    }

    async fn ask<T>(&self, station: &StationId, ask: impl FnOnce(Reply<T>) -> Ask) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let mut ask = ask(reply);
        // A task that was just ending is begun anew.
        for _ in 0..3 {
            match self.handle(station).asks.send(ask).await {
                Ok(()) => return answer.await.map_err(|_| Error::Closed)?,
                Err(mpsc::error::SendError(back)) => ask = back,
            }
            if self.0.cancel.is_cancelled() {
                break;
            }
        }
        Err(Error::Closed)
    }

    /// The whole items, with bodies that were not at hand. One that cannot be fetched now keeps no other waiting: it is left to its lease.
    async fn taken(&self, grants: Vec<Grant>) -> Result<Vec<Taken>> {
        let mut taken = Vec::with_capacity(grants.len());
        let mut failed = None;
        for grant in grants {
            let body = match &grant.body {
                Some(body) => Ok(Some(body.clone())),
                None => self.fetch(&grant).await,
            };
            match body {
                Ok(Some(body)) => taken.push(Taken { delivery: grant.delivery, lane: grant.lane, body, deadline: grant.deadline }),
                Ok(None) => tracing::error!(work_id = %grant.delivery.id, "an item's message is gone from the hook; skipped"),
                Err(error) => {
                    tracing::warn!(work_id = %grant.delivery.id, %error, "an item that was taken cannot be fetched now");
                    failed = Some(error);
                }
            }
        }
        match failed {
            Some(error) if taken.is_empty() => Err(error),
            _ => Ok(taken),
        }
    }

    /// An item's body; nothing when its message is gone.
    async fn fetch(&self, grant: &Grant) -> Result<Option<Bytes>> {
        let stream = Stream::known(&self.0.link, self.0.link.wire.hook_stream(&grant.delivery.station));
        let Some(stored) = stream.at(grant.seq).await.map_err(|fault| stream.explain(fault))? else { return Ok(None) };
        match self.0.blobs.unpack(&stored).await {
            // Whoever takes it sees that it is no order any more, and can say so.
            Err(Error::NoBlob(_)) => Ok(Some(Bytes::new())),
            body => body.map(Some),
        }
    }

    async fn append(&self, records: Vec<Record>) -> Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        self.0.log.append(records).await.map(|_| ())
    }

    /// The hook has the item already; whoever pushed it may not have come to say so on the log.
    async fn known(&self, id: WorkId, announce: Option<Record>) -> Result<Pushed> {
        if announce.is_some() && self.0.log.read(Filter::Work(id), Position::default(), 1).await?.is_empty() {
            self.append(announce.into_iter().collect()).await?;
        }
        Ok(Pushed::Known)
    }

    /// Says on the log, as soon as that can be done, what the hook has: until then nobody finds the work. Saying it twice changes
    /// nothing.
    fn announce_later(&self, station: &StationId, id: WorkId, announce: Option<Record>) {
        let Some(record) = announce else { return };
        let (queue, station) = (Self(Arc::clone(&self.0)), station.clone());
        let cancel = self.0.cancel.clone();
        let saying = async move {
            let until = Instant::now() + ANNOUNCE_MAX;
            while Instant::now() < until {
                tokio::time::sleep(ANNOUNCE_PAUSE).await;
                let done = match queue.ask(&station, |reply| Ask::Knows(id, reply)).await {
                    Ok(true) => queue.known(id, Some(record.clone())).await.map(|_| ()),
                    other => other.map(|_| ()),
                };
                match done {
                    Ok(()) => return,
                    Err(error) => tracing::debug!(work_id = %id, %error, "an order cannot be put on the log yet"),
                }
            }
            tracing::warn!(work_id = %id, "an order that its hook has could not be put on the log");
        };
        self.0.tasks.spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = saying => {}
            }
        });
    }

    /// Looks after hooks that hold items although nobody here has asked for them, now and then and beside everything else.
    fn discover_soon(&self) {
        {
            let mut discovered = self.0.discovered.lock().unwrap_or_else(PoisonError::into_inner);
            if discovered.is_some_and(|next| Instant::now() < next) {
                return;
            }
            *discovered = Some(Instant::now() + DISCOVER_EVERY);
        }
        let (queue, cancel) = (Self(Arc::clone(&self.0)), self.0.cancel.clone());
        self.0.tasks.spawn(async move {
            let found = tokio::select! {
                () = cancel.cancelled() => return,
                found = queue.discover() => found,
            };
            if let Ok(false) = found {
                *queue.0.discovered.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + DISCOVER_EVERY * 600);
            }
        });
    }

    /// Begins to keep hooks that hold items; false where these credentials may not look for them.
    async fn discover(&self) -> Result<bool> {
        let (link, mut offset) = (&self.0.link, 0);
        loop {
            let body = json!({ "subject": link.wire.assign_any(), "offset": offset });
            let page = match link.api("STREAM.LIST", &body).await {
                Ok(page) => page,
                // A station of few rights sees only its own: others look after the rest.
                Err(fault) if fault.is_denied() => return Ok(false),
                Err(fault) => return Err(fault.about("the list of hooks")),
            };
            let streams = page["streams"].as_array().cloned().unwrap_or_default();
            for stream in &streams {
                let name = stream["config"]["name"].as_str().unwrap_or_default();
                if stream["state"]["messages"].as_u64().unwrap_or(0) > 0
                    && let Some(station) = link.wire.station_of_hook(name)
                {
                    self.handle(&station);
                }
            }
            offset += streams.len();
            if streams.is_empty() || offset as u64 >= page["total"].as_u64().unwrap_or(0) {
                return Ok(true);
            }
        }
    }
}

#[async_trait]
impl Queue for NatsQueue {
    async fn push(&self, station: &StationId, item: Item, limit: u32, announce: Option<Record>) -> Result<Pushed> {
        let (turn, lane, held_back, waits) = (item.turn.clone(), item.lane.as_str().into(), item.held_back, Waits::of(&item));
        let label = Label { id: item.id, turn, deadline: item.deadline, lane, held_back };
        let Some(Ready(stream, item)) = self.ask(station, |reply| Ask::Push(Box::new(item), limit, reply)).await? else {
            return self.known(label.id, announce).await;
        };
        let coming = OnItsWay { queue: self, station, waits };
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", item.id.to_string().as_str());
        headers.insert(ITEM, label.to_header().as_str());
        headers.insert(TURN, label.turn_header().as_str());
        if item.held_back {
            headers.insert(HELD_BACK, "1");
        }
        carry_trace(&mut headers, &item.body);
        let subject = self.0.link.wire.assign(station);
        let body = self.0.blobs.pack(&mut headers, item.body.clone()).await?;
        let published = stream.publish(&subject, headers, body).await.map_err(|fault| stream.explain(fault));
        match published {
            Ok(published) if published.duplicate => self.known(item.id, announce).await,
            Ok(published) => {
                let _ = self.handle(station).asks.send(Ask::Pushed(published.seq, label, item.body)).await;
                std::mem::forget(coming);
                match self.append(announce.iter().cloned().collect()).await {
                    Ok(()) => Ok(Pushed::New),
                    // The hook has it: whoever takes this for "nothing was done" would make a second one.
                    Err(Error::Unreachable(reason) | Error::Unanswered(reason) | Error::Denied(reason)) => {
                        self.announce_later(station, item.id, announce);
                        Err(Error::Unanswered(reason))
                    }
                    Err(error) => {
                        self.announce_later(station, item.id, announce);
                        Err(error)
                    }
                }
            }
            Err(error) => {
                if matches!(error, Error::Unanswered(_)) {
                    self.announce_later(station, item.id, announce);
                }
                Err(error)
            }
        }
    }

    async fn take(&self, station: &StationId, want: &Want) -> Result<Take> {
        let (grants, next_at) = self.ask(station, |reply| Ask::Take(want.clone(), reply)).await?;
        let taken = self.taken(grants).await?;
        let records: Vec<Record> = taken.iter().filter_map(|taken| want.accept.record(taken)).collect();
        for record in records {
            self.0.log.append_soon(record, &self.0.tasks).await;
        }
        Ok(Take { taken, next_at })
    }

    async fn take_expired(&self, holder: InstanceId, lease: Duration, limit: usize) -> Result<Vec<Taken>> {
        self.discover_soon();
        let stations: Vec<StationId> = self.0.hooks.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect();
        let mut all = Vec::new();
        for station in stations {
            let left = limit.saturating_sub(all.len());
            if left == 0 {
                break;
            }
            let grants = self.ask(&station, |reply| Ask::Expired(holder, lease, left, reply)).await?;
            all.extend(self.taken(grants).await?);
        }
        Ok(all)
    }

    async fn extend(&self, held: &[Delivery], lease: Duration, deadline: Option<Timestamp>) -> Result<Vec<Delivery>> {
        let mut by_station: HashMap<&StationId, Vec<Delivery>> = HashMap::new();
        for delivery in held {
            by_station.entry(&delivery.station).or_default().push(delivery.clone());
        }
        let mut lost = Vec::new();
        for (station, deliveries) in by_station {
            lost.extend(self.ask(station, |reply| Ask::Extend(deliveries, lease, deadline, reply)).await?);
        }
        Ok(lost)
    }

    async fn settle(&self, delivery: &Delivery, records: Vec<Record>) -> Result<bool> {
        self.append(records).await?;
        self.ask(&delivery.station, |reply| Ask::Settle(delivery.clone(), reply)).await
    }

    async fn release(&self, delivery: &Delivery, at: Timestamp, deadline: Option<Timestamp>, records: Vec<Record>) -> Result<bool> {
        if !self.ask(&delivery.station, |reply| Ask::Holds(delivery.clone(), reply)).await? {
            return Ok(false);
        }
        self.append(records).await?;
        self.ask(&delivery.station, |reply| Ask::Release(delivery.clone(), at, deadline, reply)).await
    }

    async fn wake(&self, station: &StationId, id: WorkId, deadline: Option<Timestamp>, records: Vec<Record>) -> Result<bool> {
        self.append(records).await?;
        self.ask(station, |reply| Ask::Wake(id, deadline, reply)).await
    }

    async fn remove(&self, station: &StationId, id: WorkId, records: Vec<Record>) -> Result<bool> {
        self.append(records).await?;
        self.ask(station, |reply| Ask::Remove(id, reply)).await
    }

    async fn pause(&self, station: &StationId, lane: &str, until: Timestamp) -> Result<()> {
        self.ask(station, |reply| Ask::Pause(lane.to_owned(), until, reply)).await
    }

    async fn load(&self, station: &StationId) -> Result<Vec<LaneLoad>> {
        let is_kept = self.0.hooks.lock().unwrap_or_else(PoisonError::into_inner).get(station).is_some_and(|hook| !hook.asks.is_closed());
        if !is_kept {
            // Whoever only asks makes no hook.
            let name = self.0.link.wire.hook_stream(station);
            match self.0.link.api(&format!("STREAM.INFO.{name}"), &Value::Null).await {
                Err(Fault::Api(error)) if error.code == 404 => return Ok(Vec::new()),
                // What it holds is not for these credentials.
                Err(Fault::Denied(_)) => return Ok(Vec::new()),
                Err(fault) => return Err(fault.about(&format!("the stream {name}"))),
                Ok(_) => {}
            }
        }
        self.ask(station, Ask::Load).await
    }

    fn signal(&self, station: &StationId) -> Signal {
        Signal::new(self.handle(station).raised.subscribe())
    }
}

/// Keeps one hook.
struct Keeper {
    queue: std::sync::Weak<Inner>,
    link: Arc<Link>,
    tasks: TaskTracker,
    station: StationId,
    serves: bool,
    raised: watch::Sender<u64>,
    cancel: CancellationToken,
}

/// An open hook.
struct Open {
    stream: Arc<Stream>,
    tail: Tail,
    hook: Hook,
    /// Items that are on their way to the stream, so that a full hook stays full.
    coming: Coming,
    /// Messages of items that are gone.
    dead: Vec<u64>,
    /// What has settled, and goes with the next operation, or by itself at a moment soon.
    settled: Vec<Delivery>,
    settled_due: Option<Instant>,
    /// An operation may have landed that was not heard of.
    doubtful: bool,
    /// How often the connection had been made when it was looked at last.
    connects: u64,
    used: Instant,
}

impl Keeper {
    async fn run(self, mut asks: mpsc::Receiver<Ask>) {
        let open = tokio::select! {
            () = self.cancel.cancelled() => None,
            open = self.open(&mut asks) => open,
        };
        let Some(mut open) = open else { return };
        tokio::select! {
            () = self.cancel.cancelled() => {}
            () = self.keep(&mut open, asks) => return,
        }
        // An operation that was under way is known by its number; what it left is said now, or found by whoever comes next.
        let _ = tokio::time::timeout(LAST_WORD, self.let_go(&mut open)).await;
    }

    async fn keep(&self, open: &mut Open, mut asks: mpsc::Receiver<Ask>) {
        self.raise();
        loop {
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
                    Ok(stored) => {
                        if open.fold(stored, now) {
                            self.raise();
                        }
                    }
                    Err(Error::Closed) => return,
                    Err(error) => {
                        tracing::debug!(%error, station = %self.station, "the hook cannot be followed now");
                        self.refuse_for(TROUBLE_PAUSE, &mut asks, &error).await;
                    }
                },
                ask = asks.recv() => {
                    let Some(ask) = ask else { return };
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
                        return;
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
    async fn refuse_for(&self, span: Duration, asks: &mut mpsc::Receiver<Ask>, error: &Error) {
        let end = Instant::now() + span;
        while let Ok(Some(ask)) = tokio::time::timeout_at(end, asks.recv()).await {
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
                    self.refuse_for(TROUBLE_PAUSE, asks, &error).await;
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
                let packed = stored.header(super::log::BODY).is_some();
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
        self.fold(stored, now);
        Ok(())
    }
}

/// How many items are on their way to the stream: those that may start, and those that are held back.
#[derive(Default)]
struct Coming(usize, usize);

impl Coming {
    fn is_empty(&self) -> bool {
        self.0 + self.1 == 0
    }

    fn of(&self, waits: Waits) -> usize {
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

    fn begin(&mut self, waits: Waits) {
        *self.slot(waits) += 1;
    }

    fn end(&mut self, waits: Waits) {
        let count = self.slot(waits);
        *count = count.saturating_sub(1);
    }
}

/// What is proposed for a batch of wants.
struct Draft {
    now: Timestamp,
    ops: Vec<Op>,
    undo: Vec<Undo>,
    raise: bool,
}

/// What a caller is told once the operations stand.
enum Answer {
    Known,
    Full,
    Ready,
    Nothing,
    Grants(Vec<Grant>, Option<Timestamp>),
    Lost(Vec<Delivery>),
    Is(bool),
    Load(Vec<LaneLoad>),
}

impl Draft {
    fn add(&mut self, hook: &mut Hook, op: Op) {
        self.undo.extend(hook.apply(&op));
        self.ops.push(op);
    }

    /// Drops what has settled, and is still whose it was.
    fn let_go(&mut self, open: &mut Open) {
        for delivery in &open.settled {
            if let Some(seq) = open.hook.of(delivery) {
                self.add(&mut open.hook, Op::Drop { seq });
            }
        }
    }

    fn decide(&mut self, open: &mut Open, ask: &Ask) -> Answer {
        let now = self.now;
        let hook = &mut open.hook;
        match ask {
            Ask::Push(item, limit, _) => {
                if hook.knows(item.id) {
                    Answer::Known
                } else if hook.waiting(Waits::of(item)) + open.coming.of(Waits::of(item)) >= *limit as usize {
                    Answer::Full
                } else {
                    open.coming.begin(Waits::of(item));
                    Answer::Ready
                }
            }
            Ask::Pushed(seq, label, body) => {
                open.coming.end(if label.held_back { Waits::HeldBack } else { Waits::ToStart });
                let small = body.len() as u64 <= open.stream.link.settings.body_inline_max.get();
                hook.put_stored(*seq, label.clone(), small.then(|| body.clone()), now);
                self.raise = true;
                Answer::Nothing
            }
            Ask::Abandoned(waits) => {
                open.coming.end(*waits);
                Answer::Nothing
            }
            Ask::Take(want, _) => {
                let mut grants = Vec::new();
                let mut room = hook.room(want, now);
                while grants.len() < want.room as usize
                    && let Some((lane, seq)) = hook.next(want, &room, now)
                {
                    room[lane] -= 1;
                    let paced = want.pace(&want.lanes[lane].0).is_some();
                    self.add(hook, Op::Take { seq, holder: want.holder, until: until(now, want.lease), at: Some(now), paced });
                    grants.extend(hook.grant(seq));
                }
                Answer::Grants(grants, hook.next_free(want, now))
            }
            Ask::Expired(holder, lease, limit, _) => {
                let mut grants = Vec::new();
                for seq in hook.expired(now, *limit) {
                    self.add(hook, Op::Take { seq, holder: *holder, until: until(now, *lease), at: None, paced: false });
                    grants.extend(hook.grant(seq));
                }
                Answer::Grants(grants, None)
            }
            Ask::Extend(held, lease, deadline, _) => {
                let mut lost = Vec::new();
                for delivery in held {
                    match hook.of(delivery) {
                        Some(seq) => self.add(hook, Op::Extend { seq, until: until(now, *lease), deadline: *deadline }),
                        None => lost.push(delivery.clone()),
                    }
                }
                Answer::Lost(lost)
            }
            Ask::Holds(delivery, _) => Answer::Is(hook.of(delivery).is_some()),
            Ask::Settle(delivery, _) => {
                let held = hook.of(delivery);
                held.into_iter().for_each(|seq| self.add(hook, Op::Drop { seq }));
                Answer::Is(held.is_some())
            }
            Ask::Release(delivery, at, deadline, _) => {
                let held = hook.of(delivery);
                if let Some(seq) = held {
                    self.add(hook, Op::Release { seq, at: (*at > now).then_some(*at), deadline: *deadline });
                    self.raise = true;
                }
                Answer::Is(held.is_some())
            }
            Ask::Wake(id, deadline, _) => match hook.find(*id, now) {
                None => Answer::Is(false),
                Some((seq, true)) => {
                    deadline.iter().for_each(|deadline| self.add(hook, Op::Move { seq, deadline: *deadline }));
                    Answer::Is(false)
                }
                Some((seq, false)) => {
                    if !hook.is_free(seq, *deadline) {
                        self.add(hook, Op::Release { seq, at: None, deadline: *deadline });
                        self.raise = true;
                    }
                    Answer::Is(true)
                }
            },
            Ask::Remove(id, _) => match hook.find(*id, now) {
                Some((seq, false)) => {
                    self.add(hook, Op::Drop { seq });
                    Answer::Is(true)
                }
                _ => Answer::Is(false),
            },
            Ask::Pause(lane, until, _) => {
                // The later of both, unless it is taken back.
                let before = hook.paused_until(lane, now);
                let until = (*until > now).then_some(*until).map(|until| before.map_or(until, |before| before.max(until)));
                if until != before {
                    self.add(hook, Op::Pause { lane: lane.clone(), until });
                    self.raise = true;
                }
                Answer::Nothing
            }
            Ask::Knows(id, _) => Answer::Is(hook.knows(*id)),
            Ask::Load(_) => Answer::Load(hook.load(now)),
        }
    }
}

impl Ask {
    /// Whether the answer would be wrong if something had not been heard of yet.
    fn wants_news(&self, hook: &Hook) -> bool {
        match self {
            Self::Push(item, limit, _) => !hook.knows(item.id) && hook.waiting(Waits::of(item)) >= *limit as usize,
            Self::Wake(id, ..) | Self::Remove(id, _) | Self::Knows(id, _) => !hook.knows(*id),
            Self::Settle(delivery, _) | Self::Holds(delivery, _) | Self::Release(delivery, ..) => hook.of(delivery).is_none(),
            Self::Extend(held, ..) => held.iter().any(|delivery| hook.of(delivery).is_none()),
            Self::Load(_) | Self::Pause(..) => true,
            Self::Take(want, _) => want.look && want.room > 0 && !hook.has_ready(want),
            Self::Expired(..) | Self::Pushed(..) | Self::Abandoned(_) => false,
        }
    }

    /// Whoever asked may have gone: an operation stands all the same.
    fn answer(self, answer: Answer, open: &Open) {
        match (self, answer) {
            (Self::Push(item, _, reply), Answer::Ready) => _ = reply.send(Ok(Some(Ready(Arc::clone(&open.stream), item)))),
            (Self::Push(item, limit, reply), Answer::Full) => {
                let waits = Waits::of(&item);
                _ = reply.send(Err(Error::Full { station: open.hook.station().clone(), limit, waits }));
            }
            (Self::Push(_, _, reply), _) => _ = reply.send(Ok(None)),
            (Self::Take(_, reply), Answer::Grants(grants, next_at)) => _ = reply.send(Ok((grants, next_at))),
            (Self::Expired(.., reply), Answer::Grants(grants, _)) => _ = reply.send(Ok(grants)),
            (Self::Extend(.., reply), Answer::Lost(lost)) => _ = reply.send(Ok(lost)),
            (
                Self::Holds(_, reply)
                | Self::Settle(_, reply)
                | Self::Release(.., reply)
                | Self::Wake(.., reply)
                | Self::Remove(_, reply)
                | Self::Knows(_, reply),
                Answer::Is(is),
            ) => _ = reply.send(Ok(is)),
            (Self::Pause(.., reply), _) => _ = reply.send(Ok(())),
            (Self::Load(reply), Answer::Load(load)) => _ = reply.send(Ok(load)),
            _ => {}
        }
    }

    fn refuse(self, error: &Error) {
        let error = error.clone();
        match self {
            Self::Push(.., reply) => _ = reply.send(Err(error)),
            Self::Take(_, reply) => _ = reply.send(Err(error)),
            Self::Expired(.., reply) => _ = reply.send(Err(error)),
            Self::Extend(.., reply) => _ = reply.send(Err(error)),
            Self::Holds(_, reply)
            | Self::Settle(_, reply)
            | Self::Release(.., reply)
            | Self::Wake(.., reply)
            | Self::Remove(_, reply)
            | Self::Knows(_, reply) => {
                _ = reply.send(Err(error));
            }
            Self::Pause(.., reply) => _ = reply.send(Err(error)),
            Self::Load(reply) => _ = reply.send(Err(error)),
            Self::Pushed(..) | Self::Abandoned(_) => {}
        }
    }
}
