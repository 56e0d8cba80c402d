//! The hooks of all stations. Each hook that this process has to do with is kept by one task, which folds its stream and proposes
//! what callers want: many wants in one message, taken by the server only right after the last operation that the task knew.

mod ask;
mod keeper;

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

use self::ask::{Ask, Ready, Reply};
use self::keeper::Keeper;
use super::blobs::NatsBlobs;
use super::hook::{Grant, Label};
use super::link::{Fault, Link};
use super::log::{NatsLog, carry_trace};
use super::stream::Stream;
use super::stream_config;
use crate::model::id::{InstanceId, StationId, WorkId};
use crate::model::time::Timestamp;
use crate::transport::{Delivery, Error, Filter, Item, LaneLoad, Log, Position, Pushed, Queue, Record, Result, Signal, Take, Taken, Want};

/// The header that says what an item is.
const ITEM: &str = "Lattice-Item";
/// The header that says where an item stands among what waits.
const TURN: &str = "Lattice-Turn";
/// The header of an item that nobody gets before somebody wakes it.
const HELD_BACK: &str = "Lattice-Held-Back";
const WAITING_MAX: usize = 4096;
/// How often, and for how long, an order is put on the log again that its hook has.
const ANNOUNCE_PAUSE: Duration = Duration::from_secs(1);
const ANNOUNCE_MAX: Duration = Duration::from_secs(3600);
/// How often somebody looks for hooks that nobody of this process has to do with, whose items may be past their deadlines.
const DISCOVER_EVERY: Duration = Duration::from_secs(60);

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
        let own = asks.downgrade();
        let raised = hooks.get(station).map_or_else(|| watch::Sender::new(0), |handle| handle.raised.clone());
        let handle = Handle { asks, raised: raised.clone() };
        hooks.insert(station.clone(), handle.clone());
        let cancel = self.0.cancel.clone();
        let keeper = Keeper {
            queue: Arc::downgrade(&self.0),
            link: Arc::clone(&self.0.link),
            tasks: self.0.tasks.clone(),
            asks: own,
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
        let said = async {
            if announce.is_some() && self.0.log.read(Filter::Work(id), Position::default(), 1).await?.is_empty() {
                self.append(announce.into_iter().collect()).await?;
            }
            Ok(Pushed::Known)
        };
        match said.await {
            // Whoever takes this for "nothing was done" would give the work a second home.
            Err(Error::Unreachable(reason)) => Err(Error::Unanswered(reason)),
            other => other,
        }
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
        let (turn, lane, held_back) = (item.turn.clone(), item.lane.as_str().into(), item.held_back);
        let label = Label { id: item.id, turn, deadline: item.deadline, lane, held_back };
        let Ready(stream, item, coming) = match self.ask(station, |reply| Ask::Push(Box::new(item), limit, reply)).await? {
            Ok(ready) => ready,
            Err(Pushed::Elsewhere) => return Ok(Pushed::Elsewhere),
            Err(_) => return self.known(label.id, announce).await,
        };
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
                coming.arrived(published.seq, label, item.body).await;
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
        let (grants, next_at, lapsed) = self.ask(station, |reply| Ask::Take(want.clone(), reply)).await?;
        let taken = self.taken(grants).await?;
        let records: Vec<Record> = taken.iter().filter_map(|taken| want.accept.record(taken)).collect();
        for record in records {
            self.0.log.append_soon(record, &self.0.tasks).await;
        }
        Ok(Take { taken, next_at, lapsed })
    }

    async fn take_expired(&self, holder: InstanceId, lease: Duration, limit: usize, over: Option<Vec<Delivery>>) -> Result<Take> {
        self.discover_soon();
        let stations: Vec<StationId> = self.0.hooks.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect();
        let mut all = Take::default();
        for station in stations {
            let left = limit.saturating_sub(all.taken.len() + all.lapsed.len());
            if left == 0 {
                break;
            }
            let (grants, _, lapsed) = self.ask(&station, |reply| Ask::Expired(holder, lease, left, over.clone(), reply)).await?;
            all.taken.extend(self.taken(grants).await?);
            all.lapsed.extend(lapsed);
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
