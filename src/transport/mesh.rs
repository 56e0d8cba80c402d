//! Local first: the lattice's server where it can be reached, this machine's own store where it cannot.
//!
//! A work lives in one place, which is decided when it is pushed: on the server, or, while that is away and the work is for this
//! station's own agents, in the local store. An item of an order over many lives where its order does, whatever can be reached by
//! then: each process of the lattice finds the same place for it. What happens to a work is written where it lives, and what was
//! written locally is forwarded to the server's log once that is back.

mod blobs;
mod keys;
mod log;
mod queue;
mod seal;
mod table;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OnceCell, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Bucket, Entry, Error, Expect, Filter, Log, Position, Reach, Record, Result, Signal, Transport};
use crate::model::id::{InstanceId, StationId, WorkId};
use crate::model::time::Timestamp;
use crate::telemetry::now;

/// How many works' homes are remembered.
const HOMES_MAX: usize = 16_384;
/// How long it takes until what failed is tried again.
const TROUBLE_PAUSE: Duration = Duration::from_millis(500);
/// The row that says up to where the local log was forwarded.
const FORWARDED: &str = "mesh.forwarded";
const FORWARD_BATCH: usize = 256;
/// The row that says from where on the server's log may say something of works that live here.
const HEARD: &str = "mesh.heard";
/// How often it is looked whether any work still lives here.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How many events of one work are read at once.
const HISTORY_BATCH: usize = 1024;
/// Numbers of children that were given while the server was away begin here, apart from the server's.
const CHILDREN_APART: u64 = 1 << 40;

/// The server's side, once it has been reached for the first time.
pub type Far = watch::Receiver<Option<Transport>>;

/// Where a process stands.
pub struct Place {
    /// Its station.
    pub station: StationId,
    /// The process.
    pub instance: InstanceId,
    /// Whether it forwards what the local log says; not a process that only looks.
    pub forwards: bool,
    /// Tells by all that was said of a work whether it goes on now, or waits for more words.
    pub goes_on: fn(&[Entry]) -> bool,
}

/// Composes the two sides; `tasks` carry what goes on in the background until `cancel`.
pub fn compose(
    local: Transport,
    far: Far,
    reach: watch::Receiver<Reach>,
    place: Place,
    tasks: TaskTracker,
    cancel: CancellationToken,
) -> Transport {
    let Place { station, instance, forwards, goes_on } = place;
    let homes = Homes { local: local.clone(), known: Arc::default() };
    let (far_head, begun) = (Mutex::default(), OnceCell::new());
    let mesh = Arc::new(Mesh {
        local,
        far,
        reach: reach.clone(),
        station,
        instance,
        goes_on,
        homes,
        noted: Mutex::default(),
        far_head,
        begun,
        here: tokio::sync::Mutex::default(),
        paces: Mutex::default(),
        tasks,
        cancel,
    });
    if forwards {
        let (forwarding, bringing) = (Arc::clone(&mesh), Arc::clone(&mesh));
        mesh.tasks.spawn(async move { forwarding.forward().await });
        mesh.tasks.spawn(async move { bringing.bring_back().await });
    }
    Transport { log: mesh.clone(), queue: mesh.clone(), table: mesh.clone(), blobs: mesh, reach }
}

struct Mesh {
    local: Transport,
    far: Far,
    reach: watch::Receiver<Reach>,
    station: StationId,
    instance: InstanceId,
    goes_on: fn(&[Entry]) -> bool,
    homes: Homes,
    /// Works whose keys this process has noted in the local store.
    noted: Mutex<HashMap<WorkId, Noted>>,
    /// The last place of the server's log that was seen, and in which epoch.
    far_head: Mutex<(u64, u64)>,
    /// That it is known from where on the local log is forwarded.
    begun: OnceCell<()>,
    here: tokio::sync::Mutex<Here>,
    paces: Mutex<queue::Paces>,
    tasks: TaskTracker,
    cancel: CancellationToken,
}

/// A key's row in the local store, as this process wrote it.
#[derive(Clone)]
struct Noted {
    key: String,
    value: Bytes,
    ttl: Option<Duration>,
    revision: u64,
    /// The revision that was given to whoever bound or took over the key.
    given: u64,
    home: Home,
}

/// Where the work of a key that this process bound may live.
#[derive(Clone, Copy)]
enum Home {
    /// The server was away: here or nowhere.
    Here,
    /// On the server, whose row has this revision, or nowhere.
    There(u64),
}

/// What is known of the local hook.
#[derive(Default)]
struct Here {
    written: Option<Signal>,
    is_empty: bool,
}

impl Mesh {
    /// The server's side.
    fn far(&self) -> Result<Transport> {
        match &*self.far.borrow() {
            Some(far) => Ok(far.clone()),
            None => Err(self.away()),
        }
    }

    fn away(&self) -> Error {
        Error::Unreachable(match &*self.reach.borrow() {
            Reach::Away { reason, .. } => Arc::clone(reason),
            _ => "the NATS server has not been reached yet; this station keeps trying".into(),
        })
    }

    /// Whether the local hook may have anything: it is looked at again only after it was written to, so that what comes from the server
    /// does not wait for the disk.
    async fn may_hold(&self, station: &StationId) -> Result<bool> {
        if *station != self.station {
            return Ok(true);
        }
        let mut here = self.here.lock().await;
        let written = here.written.get_or_insert_with(|| self.local.queue.signal(station)).is_raised();
        if written || !here.is_empty {
            here.is_empty = self.local.queue.load(station).await?.iter().all(|lane| lane.waiting + lane.held == 0);
        }
        Ok(!here.is_empty)
    }

    async fn is_local(&self, id: WorkId) -> Result<bool> {
        self.homes.is_local(id).await
    }

    fn remember(&self, id: WorkId, local: bool) {
        self.homes.remember(id, local);
    }

    /// Where a work lives; the server has by then what these records of it name.
    async fn home(&self, id: WorkId, records: &[Record]) -> Result<Transport> {
        if self.is_local(id).await? {
            return Ok(self.local.clone());
        }
        let far = self.far()?;
        self.bring_blobs(&far, records.iter().map(|record| &record.body)).await?;
        Ok(far)
    }

    async fn home_of(&self, records: &[Record]) -> Result<Option<bool>> {
        match records.iter().find_map(|record| record.subject.work()) {
            Some(id) => self.is_local(id).await.map(Some),
            None => Ok(None),
        }
    }

    /// Tells the server of a pause once it is back, unless that has ended by then.
    fn pause_later(&self, station: &StationId, lane: &str, until: Timestamp) {
        let (far, cancel, station, lane) = (self.far.clone(), self.cancel.clone(), station.clone(), lane.to_owned());
        let tell = async move {
            while until > now() {
                tokio::time::sleep(TROUBLE_PAUSE).await;
                let Some(far) = far.borrow().clone() else { continue };
                match far.queue.pause(&station, &lane, until).await {
                    Err(Error::Unreachable(_) | Error::Unanswered(_)) => {}
                    Err(error) => return tracing::warn!(%error, lane, "the server could not be told that an agent pauses"),
                    Ok(()) => return,
                }
            }
        };
        self.tasks.spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = tell => {}
            }
        });
    }

    /// Remembers a place of the server's log at which whoever asked in this epoch has seen something.
    fn saw(&self, epoch: u64, far: u64) {
        let mut head = self.far_head.lock().unwrap_or_else(PoisonError::into_inner);
        // Of an earlier epoch and a later one, the later one counts; of one, the later place.
        *head = (*head).max((epoch, far));
    }

    /// The last place of the server's log that was seen; the beginning, where it may be another log since.
    fn far_head(&self) -> u64 {
        let (epoch, head) = *self.far_head.lock().unwrap_or_else(PoisonError::into_inner);
        if epoch == self.epoch() { head } else { 0 }
    }

    /// Sends to the server what was written while it was away, and whatever is written locally after that.
    async fn forward(self: Arc<Self>) {
        let mut reach = self.reach.clone();
        let work = async {
            loop {
                let ended = self.forward_on().await;
                if let Err(error @ Error::Denied(_)) = &ended {
                    tracing::warn!(%error, "what agents here assign to agents here stays on this machine: the lattice does not see it");
                    return std::future::pending().await;
                }
                if let Err(error) = ended {
                    tracing::debug!(%error, "what happened while the server was away cannot be forwarded now");
                }
                tokio::select! {
                    () = tokio::time::sleep(TROUBLE_PAUSE) => {}
                    // Whoever asks the server once it is back wants to know.
                    Ok(()) = reach.changed() => {}
                }
            }
        };
        tokio::select! {
            () = self.cancel.cancelled() => {}
            () = work => {}
        }
    }

    /// From here on the local log is the lattice's as well, be the server there or not. What was done before this folder ever had a
    /// server is nobody else's.
    async fn begin_to_forward(&self) -> Result<()> {
        let begin = async || {
            if self.local.table.get(Bucket::Keys, FORWARDED).await?.is_some() {
                return Ok(());
            }
            let head = Bytes::from(self.local.log.head().await?.seq.to_string());
            match self.local.table.put(Bucket::Keys, FORWARDED, head, Expect::Absent, None).await {
                // Another process of this folder was first.
                Ok(_) | Err(Error::Conflict { .. }) => Ok(()),
                Err(error) => Err(error),
            }
        };
        self.begun.get_or_try_init(begin).await.map(|_| ())
    }

    async fn forward_on(&self) -> Result<()> {
        self.begin_to_forward().await?;
        let mut opened = self.far.clone();
        let far = loop {
            if let Some(far) = opened.borrow_and_update().clone() {
                break far;
            }
            opened.changed().await.map_err(|_| Error::Closed)?;
        };
        // Whoever hears of a work from here on may speak of it at once.
        self.heard(&far).await?;
        let mut follow = self.local.log.follow(Filter::AllWork, Position::of(self.forwarded().await?.0)).await?;
        let mut reach = self.reach.clone();
        let mut is_sealed = false;
        loop {
            if !matches!(*reach.borrow_and_update(), Reach::Away { .. }) {
                if !is_sealed {
                    self.unite_seal(&far).await?;
                    is_sealed = true;
                }
                self.unite_keys(&far).await?;
            }
            let entries = tokio::select! {
                entries = follow.next() => entries?,
                // A row that names no work is written without a word on the log.
                Ok(()) = reach.changed() => {
                    is_sealed = false;
                    continue;
                }
            };
            for some in entries.chunks(FORWARD_BATCH) {
                // Another process of this folder may have been quicker.
                let (already, _) = self.forwarded().await?;
                for entry in some.iter().filter(|entry| entry.position.seq > already) {
                    let Some(id) = entry.subject.work() else { continue };
                    self.take_blobs_along(&far, &entry.body).await?;
                    let record = Record { subject: entry.subject.clone(), body: entry.body.clone() };
                    far.log.forward(record, &format!("{id}.{}", entry.position.seq)).await?;
                }
                if let Some(last) = some.last() {
                    self.remember_forwarded(last.position.seq).await?;
                }
            }
        }
    }

    /// Brings to the local log what others say of works that live here: whoever assigned, answers or cancels elsewhere speaks to the
    /// server. Nothing is listened to while no such work is open.
    async fn bring_back(self: Arc<Self>) {
        let work = async {
            let mut opened = self.far.clone();
            let mut signal = self.local.queue.signal(&self.station);
            let (mut after, mut epoch) = (None::<u64>, self.epoch());
            loop {
                let far = opened.borrow_and_update().clone();
                if epoch != self.epoch() {
                    // Places of what the server had before may say nothing of what it has now.
                    (after, epoch) = (None, self.epoch());
                }
                // What is said of a work that comes to live here after this look stands behind that.
                let head = Some(self.far_head()).filter(|head| *head > 0);
                let some = match (&far, self.has_local().await) {
                    (Some(far), Ok(true)) => self.bring_back_on(far, &mut after, epoch).await,
                    (Some(_), Ok(false)) => {
                        after = after.max(head);
                        Ok(())
                    }
                    (None, Ok(_)) => Ok(()),
                    (_, Err(error)) => Err(error),
                };
                if let Err(error) = some {
                    tracing::debug!(%error, "what others say of works that live here cannot be heard now");
                    tokio::time::sleep(TROUBLE_PAUSE).await;
                    continue;
                }
                if epoch != self.epoch() {
                    continue;
                }
                tokio::select! {
                    () = signal.changed() => {}
                    changed = opened.changed() => if changed.is_err() { return },
                }
            }
        };
        tokio::select! {
            () = self.cancel.cancelled() => {}
            () = work => {}
        }
    }

    async fn has_local(&self) -> Result<bool> {
        Ok(self.local.queue.load(&self.station).await?.iter().any(|lane| lane.waiting + lane.held > 0))
    }

    /// As far back on the server's log as what lives here may have been forwarded.
    async fn heard(&self, far: &Transport) -> Result<u64> {
        loop {
            let (head, identity) = (far.log.head().await?.seq, far.log.identity().await?);
            if let Some(row) = self.local.table.get(Bucket::Keys, HEARD).await? {
                let text = std::str::from_utf8(&row.value).unwrap_or_default();
                let (seq, of) = text.split_once(' ').unwrap_or((text, ""));
                // A place of another log says nothing of this one.
                let is_of_this = |seq: &u64| of == identity && *seq <= head;
                return Ok(seq.parse().ok().filter(is_of_this).unwrap_or(0));
            }
            let place = format!("{head} {identity}");
            match self.local.table.put(Bucket::Keys, HEARD, place.into(), Expect::Absent, None).await {
                Ok(_) => return Ok(head),
                // Another process of this folder was first.
                Err(Error::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Keeps up to where this epoch's log was heard; nothing, once there may be another one.
    async fn remember_heard(&self, far: &Transport, upto: u64, epoch: u64) -> Result<()> {
        let place = format!("{upto} {}", far.log.identity().await?);
        if epoch != self.epoch() {
            return Ok(());
        }
        self.local.table.put(Bucket::Keys, HEARD, place.into(), Expect::Any, None).await.map(|_| ())
    }

    /// Listens for as long as a work lives here, and the server's log is that of this epoch.
    async fn bring_back_on(&self, far: &Transport, after: &mut Option<u64>, epoch: u64) -> Result<()> {
        let from = match *after {
            Some(after) => after,
            None => self.heard(far).await?,
        };
        self.remember_heard(far, from, epoch).await?;
        let mut kept = from;
        *after = Some(from);
        let mut follow = far.log.follow(Filter::AllStatus, Position::of(from)).await?;
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            let entries = tokio::select! {
                entries = follow.next() => entries?,
                _ = look.tick() => {
                    if let Some(heard) = after.filter(|heard| *heard != kept) {
                        self.remember_heard(far, heard, epoch).await?;
                        kept = heard;
                    }
                    match epoch == self.epoch() && self.has_local().await? {
                        true => continue,
                        false => return Ok(()),
                    }
                }
            };
            if epoch != self.epoch() {
                return Ok(());
            }
            for entry in entries {
                // What was forwarded from here stands here.
                if !entry.is_forwarded
                    && let Some(id) = entry.subject.work()
                    && self.is_local(id).await?
                {
                    self.hear(id, Record { subject: entry.subject, body: entry.body }).await?;
                }
                *after = Some(entry.position.seq);
            }
        }
    }

    /// Takes in what somebody said elsewhere of a work that lives here, once.
    async fn hear(&self, id: WorkId, record: Record) -> Result<()> {
        if self.said_of(id).await?.iter().any(|known| known.body == record.body) {
            return Ok(());
        }
        self.local.log.append(vec![record]).await?;
        // What else was heard at the same moment, by another process of this folder, stands there as well.
        if (self.goes_on)(&self.said_of(id).await?) {
            self.local.queue.wake(&self.station, id, None, Vec::new()).await?;
        }
        Ok(())
    }

    /// All that the local log has of a work.
    async fn said_of(&self, id: WorkId) -> Result<Vec<Entry>> {
        let mut said = Vec::new();
        loop {
            let more = self.local.log.read(Filter::Work(id), Position::default().past(&said), HISTORY_BATCH).await?;
            let is_end = more.len() < HISTORY_BATCH;
            said.extend(more);
            if is_end {
                return Ok(said);
            }
        }
    }

    /// Up to where the local log was forwarded, by whichever process of this folder, and the row's revision.
    async fn forwarded(&self) -> Result<(u64, Option<u64>)> {
        let row = self.local.table.get(Bucket::Keys, FORWARDED).await?;
        let upto = row.as_ref().and_then(|row| std::str::from_utf8(&row.value).ok()?.parse().ok());
        Ok((upto.unwrap_or(0), row.map(|row| row.revision)))
    }

    async fn remember_forwarded(&self, upto: u64) -> Result<()> {
        loop {
            let (known, revision) = self.forwarded().await?;
            if known >= upto {
                return Ok(());
            }
            let expect = revision.map_or(Expect::Absent, Expect::Revision);
            match self.local.table.put(Bucket::Keys, FORWARDED, Bytes::from(upto.to_string()), expect, None).await {
                // Another process of this folder, which may not have come as far.
                Err(Error::Conflict { .. }) => {}
                other => return other.map(|_| ()),
            }
        }
    }
}

impl Mesh {
    /// Without what was forwarded from here: the local log has that.
    async fn not_local(&self, entries: Vec<Entry>) -> Result<Vec<Entry>> {
        self.homes.not_local(entries).await
    }
}

/// Tells which works live in the local store; cheap to clone.
#[derive(Clone)]
struct Homes {
    local: Transport,
    known: Arc<Mutex<HashMap<WorkId, bool>>>,
}

impl Homes {
    async fn is_local(&self, id: WorkId) -> Result<bool> {
        if let Some(home) = self.known().get(&id) {
            return Ok(*home);
        }
        let is_local = !self.local.log.read(Filter::Work(id), Position::default(), 1).await?.is_empty();
        // It may have been pushed meanwhile: who pushes knows better.
        Ok(*self.known().entry(id).or_insert(is_local))
    }

    fn remember(&self, id: WorkId, local: bool) {
        self.known().insert(id, local);
    }

    /// Where a work lives of which nothing was found is not decided yet: another process may push it here.
    fn forget(&self, id: WorkId) {
        let mut known = self.known();
        if known.get(&id) == Some(&false) {
            known.remove(&id);
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<WorkId, bool>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= HOMES_MAX {
            known.clear();
        }
        known
    }

    async fn not_local(&self, entries: Vec<Entry>) -> Result<Vec<Entry>> {
        let mut kept = Vec::with_capacity(entries.len());
        for entry in entries {
            let is_local = match entry.subject.work() {
                None => false,
                Some(id) => self.is_local(id).await?,
            };
            if !is_local {
                kept.push(entry);
            }
        }
        Ok(kept)
    }
}

#[cfg(test)]
mod sides;
#[cfg(test)]
pub(crate) use self::sides::Sides;

#[cfg(test)]
mod tests;
