//! Local first: the lattice's server where it can be reached, this machine's own store where it cannot.
//!
//! A work lives in one place, which is decided when it is pushed: on the server, or, while that is away and the work is for this
//! station's own agents, in the local store. What happens to it is written where it lives, and what was written locally is
//! forwarded to the server's log once that is back.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::io::AsyncRead;
use tokio::sync::{OnceCell, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{
    Blobs, Bucket, Change, Delivery, Entry, Error, Expect, Filter, Follow, Item, LaneLoad, Log, Position, Pushed, Queue, Reach, Record,
    Result, Row, Signal, Table, Take, Taken, Transport, Want, Watch,
};
use crate::model::id::{InstanceId, StationId, WorkId};
use crate::model::output::{BlobRef, Media};
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
/// How many events of one work are compared.
const HISTORY_MAX: usize = 4096;
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
    let Place { station, instance, forwards } = place;
    let homes = Homes { local: local.clone(), known: Arc::default() };
    let (far_head, begun) = (AtomicU64::new(0), OnceCell::new());
    let mesh = Arc::new(Mesh {
        local,
        far,
        reach: reach.clone(),
        station,
        instance,
        homes,
        apart: Mutex::default(),
        far_head,
        begun,
        here: tokio::sync::Mutex::default(),
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
    homes: Homes,
    /// Works whose keys were noted here while the server was away: they live here as well, or nowhere.
    apart: Mutex<HashSet<WorkId>>,
    /// The last place of the server's log that was seen.
    far_head: AtomicU64,
    /// That it is known from where on the local log is forwarded.
    begun: OnceCell<()>,
    here: tokio::sync::Mutex<Here>,
    tasks: TaskTracker,
    cancel: CancellationToken,
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

    async fn home(&self, id: WorkId) -> Result<Transport> {
        if self.is_local(id).await? { Ok(self.local.clone()) } else { self.far() }
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

    fn saw(&self, far: u64) {
        self.far_head.fetch_max(far, Ordering::Relaxed);
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
            let head = Bytes::from(self.local.log.head().await?.0.to_string());
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
        let row = self.local.table.get(Bucket::Keys, FORWARDED).await?;
        let mut after = row.and_then(|row| std::str::from_utf8(&row.value).ok()?.parse().ok()).unwrap_or(0);
        let mut follow = self.local.log.follow(Filter::AllWork, Position(after)).await?;
        loop {
            let entries = follow.next().await?;
            for some in entries.chunks(FORWARD_BATCH) {
                for entry in some {
                    self.take_blobs_along(&far, &entry.body).await?;
                    far.log.append(vec![Record { subject: entry.subject.clone(), body: entry.body.clone() }]).await?;
                    after = entry.position.0;
                }
                self.remember_forwarded(after).await?;
            }
        }
    }

    /// Brings to the local log what others say of works that live here: whoever assigned, answers or cancels elsewhere speaks to the
    /// server. Nothing is listened to while no such work is open.
    async fn bring_back(self: Arc<Self>) {
        let work = async {
            let mut opened = self.far.clone();
            let mut signal = self.local.queue.signal(&self.station);
            let mut after = None::<u64>;
            loop {
                let far = opened.borrow_and_update().clone();
                let some = match (&far, self.has_local().await) {
                    (Some(far), Ok(true)) => self.bring_back_on(far, &mut after).await,
                    (Some(_), Ok(false)) => {
                        after = Some(self.far_head.load(Ordering::Relaxed)).filter(|head| *head > 0);
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
            if let Some(row) = self.local.table.get(Bucket::Keys, HEARD).await? {
                return Ok(std::str::from_utf8(&row.value).ok().and_then(|text| text.parse().ok()).unwrap_or(0));
            }
            let head = far.log.head().await?.0;
            match self.local.table.put(Bucket::Keys, HEARD, Bytes::from(head.to_string()), Expect::Absent, None).await {
                Ok(_) => return Ok(head),
                // Another process of this folder was first.
                Err(Error::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Listens for as long as a work lives here.
    async fn bring_back_on(&self, far: &Transport, after: &mut Option<u64>) -> Result<()> {
        let from = match *after {
            Some(after) => after,
            None => self.heard(far).await?,
        };
        self.local.table.put(Bucket::Keys, HEARD, Bytes::from(from.to_string()), Expect::Any, None).await?;
        *after = Some(from);
        let mut follow = far.log.follow(Filter::AllStatus, Position(from)).await?;
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            let entries = tokio::select! {
                entries = follow.next() => entries?,
                _ = look.tick() => match self.has_local().await? {
                    true => continue,
                    false => return Ok(()),
                },
            };
            for entry in entries {
                if let Some(id) = entry.subject.work()
                    && self.is_local(id).await?
                    && !self
                        .local
                        .log
                        .read(Filter::Work(id), Position::default(), HISTORY_MAX)
                        .await?
                        .iter()
                        .any(|known| known.body == entry.body)
                {
                    let record = Record { subject: entry.subject, body: entry.body };
                    self.local.queue.wake(&self.station, id, None, vec![record]).await?;
                }
                *after = Some(entry.position.0);
            }
        }
    }

    async fn remember_forwarded(&self, upto: u64) -> Result<()> {
        let value = Bytes::from(upto.to_string());
        self.local.table.put(Bucket::Keys, FORWARDED, value, Expect::Any, None).await.map(|_| ())
    }

    /// Uploads the blobs that an event names.
    async fn take_blobs_along(&self, far: &Transport, body: &[u8]) -> Result<()> {
        let Ok(value) = serde_json::from_slice::<serde_json::Value>(body) else { return Ok(()) };
        for sha256 in digests(&value) {
            if far.blobs.size(&sha256).await.is_ok() {
                continue;
            }
            match self.local.blobs.open(&sha256, 0..u64::MAX).await {
                Ok(mut source) => _ = far.blobs.put(&mut *source, Media::Text).await?,
                Err(Error::NoBlob(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Every digest that an event names.
fn digests(value: &serde_json::Value) -> Vec<String> {
    match value {
        serde_json::Value::Object(map) => map
            .iter()
            .flat_map(|(key, value)| match (key.as_str(), value.as_str()) {
                ("sha256", Some(digest)) => vec![digest.to_owned()],
                _ => digests(value),
            })
            .collect(),
        serde_json::Value::Array(values) => values.iter().flat_map(digests).collect(),
        _ => Vec::new(),
    }
}

/// A place in both logs at once: everything up to here of the one and of the other.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Both {
    far: u64,
    local: u64,
}

/// Marks a place in both logs; a place without it is one of the local log, from before there was a server.
const MARK: u64 = 1 << 62;
const LOCAL_BITS: u32 = 28;
const LOCAL_MAX: u64 = (1 << LOCAL_BITS) - 1;

impl Both {
    fn of(position: Position) -> Self {
        match position.0 & MARK {
            0 => Self { far: 0, local: position.0 },
            _ => Self { far: (position.0 & !MARK) >> LOCAL_BITS, local: position.0 & LOCAL_MAX },
        }
    }

    fn position(self) -> Position {
        Position(MARK | (self.far << LOCAL_BITS) | self.local.min(LOCAL_MAX))
    }

    fn mark_local(&mut self, entries: &mut [Entry]) {
        for entry in entries {
            self.local = self.local.max(entry.position.0);
            entry.position = self.position();
        }
    }

    fn mark_far(&mut self, entries: &mut [Entry]) {
        for entry in entries {
            self.far = self.far.max(entry.position.0);
            entry.position = self.position();
        }
    }
}

#[async_trait]
impl Log for Mesh {
    async fn append(&self, records: Vec<Record>) -> Result<Position> {
        if self.home_of(&records).await? == Some(true) {
            let local = self.local.log.append(records).await?;
            return Ok(Both { far: self.far_head.load(Ordering::Relaxed), local: local.0 }.position());
        }
        let far = self.far()?.log.append(records).await?.0;
        self.saw(far);
        Ok(Both { far, local: 0 }.position())
    }

    async fn read(&self, filter: Filter, after: Position, limit: usize) -> Result<Vec<Entry>> {
        let mut at = Both::of(after);
        if let Filter::Work(id) = filter {
            if self.is_local(id).await? {
                let mut entries = self.local.log.read(filter, Position(at.local), limit).await?;
                at.mark_local(&mut entries);
                return Ok(entries);
            }
            let mut entries = self.far()?.log.read(filter, Position(at.far), limit).await?;
            at.mark_far(&mut entries);
            return Ok(entries);
        }
        let mut entries = self.local.log.read(filter, Position(at.local), limit).await?;
        at.mark_local(&mut entries);
        if entries.len() < limit {
            // Without the server, what is known here is all there is.
            let Ok(far) = self.far() else { return Ok(entries) };
            match far.log.read(filter, Position(at.far), limit - entries.len()).await {
                Ok(mut more) => {
                    at.mark_far(&mut more);
                    self.saw(at.far);
                    entries.extend(self.not_local(more).await?);
                }
                Err(Error::Unreachable(_) | Error::Unanswered(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(entries)
    }

    async fn follow(&self, filter: Filter, after: Position) -> Result<Box<dyn Follow>> {
        let at = Both::of(after);
        if let Filter::Work(id) = filter {
            let (inner, side) = if self.is_local(id).await? {
                (self.local.log.follow(filter, Position(at.local)).await?, Side::Local)
            } else {
                (self.far()?.log.follow(filter, Position(at.far)).await?, Side::Far)
            };
            return Ok(Box::new(One { inner, side, at }));
        }
        let local = self.local.log.follow(filter, Position(at.local)).await?;
        Ok(Box::new(Two { local, far: None, opened: self.far.clone(), filter, at, homes: self.homes.clone() }))
    }

    async fn replay(&self, filter: Filter) -> Result<(Vec<Entry>, Box<dyn Follow>)> {
        let mut at = Both::default();
        if let Filter::Work(id) = filter {
            if self.is_local(id).await? {
                let (mut entries, inner) = self.local.log.replay(filter).await?;
                at.mark_local(&mut entries);
                return Ok((entries, Box::new(One { inner, side: Side::Local, at })));
            }
            let (mut entries, inner) = self.far()?.log.replay(filter).await?;
            at.mark_far(&mut entries);
            return Ok((entries, Box::new(One { inner, side: Side::Far, at })));
        }
        let entries = self.read(filter, Position::default(), usize::MAX).await?;
        let after = entries.last().map_or(Position::default(), |entry| entry.position);
        Ok((entries, self.follow(filter, after).await?))
    }

    async fn lately(&self, filter: Filter) -> Result<Option<(Vec<Entry>, Box<dyn Follow>)>> {
        let Filter::Work(id) = filter else { return Ok(None) };
        if self.is_local(id).await? {
            return Ok(None);
        }
        let Some((mut entries, inner)) = self.far()?.log.lately(filter).await? else { return Ok(None) };
        let mut at = Both::default();
        at.mark_far(&mut entries);
        Ok(Some((entries, Box::new(One { inner, side: Side::Far, at }))))
    }

    async fn head(&self) -> Result<Position> {
        let local = self.local.log.head().await?.0;
        let far = match self.far() {
            Ok(far) => match far.log.head().await {
                Ok(head) => {
                    self.saw(head.0);
                    head.0
                }
                Err(Error::Unreachable(_) | Error::Unanswered(_)) => self.far_head.load(Ordering::Relaxed),
                Err(error) => return Err(error),
            },
            Err(_) => self.far_head.load(Ordering::Relaxed),
        };
        Ok(Both { far, local }.position())
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

enum Side {
    Local,
    Far,
}

/// Goes along with one work where it lives.
struct One {
    inner: Box<dyn Follow>,
    side: Side,
    at: Both,
}

#[async_trait]
impl Follow for One {
    async fn next(&mut self) -> Result<Vec<Entry>> {
        let mut entries = self.inner.next().await?;
        match self.side {
            Side::Local => self.at.mark_local(&mut entries),
            Side::Far => self.at.mark_far(&mut entries),
        }
        Ok(entries)
    }
}

/// Goes along with both logs; with the server's once that has been reached.
struct Two {
    local: Box<dyn Follow>,
    far: Option<Box<dyn Follow>>,
    opened: Far,
    filter: Filter,
    at: Both,
    homes: Homes,
}

#[async_trait]
impl Follow for Two {
    async fn next(&mut self) -> Result<Vec<Entry>> {
        loop {
            if self.far.is_none() {
                let far = self.opened.borrow_and_update().clone();
                if let Some(far) = far {
                    self.far = Some(far.log.follow(self.filter, Position(self.at.far)).await?);
                }
            }
            tokio::select! {
                entries = self.local.next() => {
                    let mut entries = entries?;
                    self.at.mark_local(&mut entries);
                    return Ok(entries);
                }
                entries = async { match &mut self.far { Some(far) => far.next().await, None => std::future::pending().await } } => {
                    let mut entries = entries?;
                    self.at.mark_far(&mut entries);
                    let entries = self.homes.not_local(entries).await?;
                    if !entries.is_empty() {
                        return Ok(entries);
                    }
                }
                changed = self.opened.changed(), if self.far.is_none() => changed.map_err(|_| Error::Closed)?,
            }
        }
    }
}

#[async_trait]
impl Queue for Mesh {
    async fn push(&self, station: &StationId, item: Item, limit: u32, announce: Option<Record>) -> Result<Pushed> {
        let id = item.id;
        let away = match self.far() {
            // Others may have used its key on the server meanwhile.
            _ if self.apart().contains(&id) => Error::Unreachable("the NATS server was away when this began".into()),
            Ok(far) => {
                // Whoever hears of it before this returns need not look for it here.
                self.homes.known().entry(id).or_insert(false);
                match far.queue.push(station, item.clone(), limit, announce.clone()).await {
                    Err(Error::Unreachable(reason)) => Error::Unreachable(reason),
                    other => {
                        self.remember(id, false);
                        return other;
                    }
                }
            }
            Err(away) => away,
        };
        if *station != self.station {
            return Err(away);
        }
        self.begin_to_forward().await?;
        // Nothing was sent, so the work can have no second home.
        self.remember(id, true);
        self.local.queue.push(station, item, limit, announce).await
    }

    async fn take(&self, station: &StationId, want: &Want) -> Result<Take> {
        let mut take =
            if want.look || self.may_hold(station).await? { self.local.queue.take(station, want).await? } else { Take::default() };
        for taken in &take.taken {
            self.remember(taken.delivery.id, true);
        }
        let room = want.room.saturating_sub(u32::try_from(take.taken.len()).unwrap_or(u32::MAX));
        if room == 0 {
            return Ok(take);
        }
        let Ok(far) = self.far() else { return Ok(take) };
        let mut rest = Want { room, ..want.clone() };
        for (lane, left) in &mut rest.lanes {
            let used = take.taken.iter().filter(|taken| taken.lane == *lane).count();
            *left = left.saturating_sub(u32::try_from(used).unwrap_or(u32::MAX));
        }
        match far.queue.take(station, &rest).await {
            Ok(more) => {
                for taken in &more.taken {
                    self.remember(taken.delivery.id, false);
                }
                take.taken.extend(more.taken);
                take.next_at = [take.next_at, more.next_at].into_iter().flatten().min();
            }
            Err(Error::Unreachable(_) | Error::Unanswered(_)) => {}
            Err(error) if take.taken.is_empty() => return Err(error),
            Err(error) => tracing::warn!(%error, "could not take work from the server's hook"),
        }
        Ok(take)
    }

    async fn take_expired(&self, holder: InstanceId, lease: Duration, limit: usize) -> Result<Vec<Taken>> {
        let mut all = self.local.queue.take_expired(holder, lease, limit).await?;
        for taken in &all {
            self.remember(taken.delivery.id, true);
        }
        if let Ok(far) = self.far() {
            match far.queue.take_expired(holder, lease, limit - all.len()).await {
                Ok(more) => all.extend(more),
                Err(Error::Unreachable(_) | Error::Unanswered(_)) => {}
                Err(error) => tracing::warn!(%error, "could not look for works on the server whose time is up"),
            }
        }
        Ok(all)
    }

    async fn extend(&self, held: &[Delivery], lease: Duration, deadline: Option<Timestamp>) -> Result<Vec<Delivery>> {
        let (mut here, mut there) = (Vec::new(), Vec::new());
        for delivery in held {
            if self.is_local(delivery.id).await? { here.push(delivery.clone()) } else { there.push(delivery.clone()) }
        }
        let mut lost = if here.is_empty() { Vec::new() } else { self.local.queue.extend(&here, lease, deadline).await? };
        if !there.is_empty() {
            lost.extend(self.far()?.queue.extend(&there, lease, deadline).await?);
        }
        Ok(lost)
    }

    async fn settle(&self, delivery: &Delivery, records: Vec<Record>) -> Result<bool> {
        self.home(delivery.id).await?.queue.settle(delivery, records).await
    }

    async fn release(&self, delivery: &Delivery, at: Timestamp, deadline: Option<Timestamp>, records: Vec<Record>) -> Result<bool> {
        self.home(delivery.id).await?.queue.release(delivery, at, deadline, records).await
    }

    async fn wake(&self, station: &StationId, id: WorkId, deadline: Option<Timestamp>, records: Vec<Record>) -> Result<bool> {
        self.home(id).await?.queue.wake(station, id, deadline, records).await
    }

    async fn remove(&self, station: &StationId, id: WorkId, records: Vec<Record>) -> Result<bool> {
        self.home(id).await?.queue.remove(station, id, records).await
    }

    async fn pause(&self, station: &StationId, lane: &str, until: Timestamp) -> Result<()> {
        if *station == self.station {
            self.local.queue.pause(station, lane, until).await?;
        }
        let told = match self.far() {
            Ok(far) => far.queue.pause(station, lane, until).await,
            Err(away) => Err(away),
        };
        match told {
            Err(Error::Unreachable(_) | Error::Unanswered(_)) if *station == self.station => self.pause_later(station, lane, until),
            other => other?,
        }
        Ok(())
    }

    async fn load(&self, station: &StationId) -> Result<Vec<LaneLoad>> {
        let here = if *station == self.station { self.local.queue.load(station).await? } else { Vec::new() };
        let mut load = match self.far() {
            Ok(far) => match far.queue.load(station).await {
                Ok(load) => load,
                Err(Error::Unreachable(_) | Error::Unanswered(_)) => Vec::new(),
                Err(error) => return Err(error),
            },
            Err(_) => Vec::new(),
        };
        for lane in here {
            match load.iter_mut().find(|known| known.lane == lane.lane) {
                Some(known) => {
                    known.waiting += lane.waiting;
                    known.held += lane.held;
                    known.held_back += lane.held_back;
                    known.paused_until = known.paused_until.max(lane.paused_until);
                }
                None => load.push(lane),
            }
        }
        Ok(load)
    }

    fn signal(&self, station: &StationId) -> Signal {
        let raised = watch::Sender::new(0u64);
        let signal = Signal::new(raised.subscribe());
        let (mut local, mut opened, station, cancel) =
            (self.local.queue.signal(station), self.far.clone(), station.clone(), self.cancel.clone());
        self.tasks.spawn(async move {
            let mut far: Option<Signal> = None;
            loop {
                if far.is_none() {
                    far = opened.borrow_and_update().as_ref().map(|far| far.queue.signal(&station));
                    raised.send_modify(|count| *count += 1);
                }
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = raised.closed() => return,
                    () = local.changed() => {}
                    () = async { match &mut far { Some(far) => far.changed().await, None => std::future::pending().await } } => {}
                    changed = opened.changed(), if far.is_none() => if changed.is_err() { std::future::pending::<()>().await },
                }
                raised.send_modify(|count| *count += 1);
            }
        });
        signal
    }
}

#[async_trait]
impl Table for Mesh {
    async fn get(&self, bucket: Bucket, key: &str) -> Result<Option<Row>> {
        match bucket {
            Bucket::Sessions => self.local.table.get(bucket, key).await,
            Bucket::Keys => Ok(self.keyed(key).await?.map(|(row, _)| row)),
            _ => self.far()?.table.get(bucket, key).await,
        }
    }

    async fn put(&self, bucket: Bucket, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> Result<u64> {
        match bucket {
            Bucket::Sessions => self.local.table.put(bucket, key, value, expect, ttl).await,
            Bucket::Keys => {
                let is_here = match expect {
                    Expect::Absent => false,
                    // Its work may have gone to the server after all: then the key goes there as well.
                    Expect::Any => self.local.table.get(bucket, key).await?.is_some() && !self.is_of_work_elsewhere(&value).await?,
                    Expect::Revision(_) => matches!(self.keyed(key).await?, Some((_, Side::Local))),
                };
                if is_here {
                    return self.local.table.put(bucket, key, value, expect, ttl).await;
                }
                let put = match self.far() {
                    Ok(far) => far.table.put(bucket, key, value.clone(), expect, ttl).await,
                    Err(away) => Err(away),
                };
                match put {
                    // What is known by a revision is the server's, and stays so.
                    Err(Error::Unreachable(_)) if !matches!(expect, Expect::Revision(_)) => {
                        if let Some(id) = work_of(&value) {
                            self.apart().insert(id);
                        }
                        self.local.table.put(bucket, key, value, expect, ttl).await
                    }
                    other => other,
                }
            }
            _ => self.far()?.table.put(bucket, key, value, expect, ttl).await,
        }
    }

    async fn remove(&self, bucket: Bucket, key: &str, expect: Expect) -> Result<bool> {
        match bucket {
            Bucket::Sessions => self.local.table.remove(bucket, key, expect).await,
            Bucket::Keys if matches!(self.keyed(key).await?, Some((_, Side::Local))) => self.local.table.remove(bucket, key, expect).await,
            _ => self.far()?.table.remove(bucket, key, expect).await,
        }
    }

    async fn list(&self, bucket: Bucket) -> Result<Vec<Row>> {
        match bucket {
            Bucket::Sessions => self.local.table.list(bucket).await,
            _ => self.far()?.table.list(bucket).await,
        }
    }

    async fn list_of(&self, bucket: Bucket, head: &str) -> Result<Vec<Row>> {
        match bucket {
            Bucket::Sessions => self.local.table.list_of(bucket, head).await,
            _ => self.far()?.table.list_of(bucket, head).await,
        }
    }

    async fn watch(&self, bucket: Bucket) -> Result<Box<dyn Watch>> {
        match bucket {
            Bucket::Sessions => self.local.table.watch(bucket).await,
            _ => Ok(Box::new(Opening { bucket, opened: self.far.clone(), inner: None })),
        }
    }

    async fn next(&self, bucket: Bucket, key: &str, floor: u64, count: u64) -> Result<u64> {
        let far = match self.far() {
            Ok(far) => far.table.next(bucket, key, floor, count).await,
            Err(away) => Err(away),
        };
        match far {
            Err(Error::Unreachable(_)) => {
                // Each process counts in a range of its own: no other can have the same number.
                let apart = CHILDREN_APART + (u64::from_be_bytes(self.instance.low_bytes()) & 0xf_ffff) * (1 << 24);
                let own = format!("{key}@{}", self.instance);
                self.local.table.next(bucket, &own, floor.max(apart), count).await
            }
            other => other,
        }
    }
}

impl Mesh {
    fn apart(&self) -> MutexGuard<'_, HashSet<WorkId>> {
        let mut apart = self.apart.lock().unwrap_or_else(PoisonError::into_inner);
        if apart.len() >= HOMES_MAX {
            apart.clear();
        }
        apart
    }

    /// A row of `Keys`, and which side has it: one that was written while the server was away is known here only. Of a key whose work
    /// does not live here the server's word counts, if it has one.
    async fn keyed(&self, key: &str) -> Result<Option<(Row, Side)>> {
        let here = self.local.table.get(Bucket::Keys, key).await?;
        if let Some(row) = &here
            && !self.is_of_work_elsewhere(&row.value).await?
        {
            return Ok(here.map(|row| (row, Side::Local)));
        }
        let there = match self.far() {
            Ok(far) => far.table.get(Bucket::Keys, key).await,
            Err(away) => Err(away),
        };
        let there = match there {
            Err(Error::Unreachable(_)) => None,
            there => {
                // The server is back, and nobody has used the key there: the work may go there now.
                if let Some(id) = here.as_ref().and_then(|row| work_of(&row.value)) {
                    self.apart().remove(&id);
                }
                there?
            }
        };
        Ok(there.map(|row| (row, Side::Far)).or(here.map(|row| (row, Side::Local))))
    }

    /// Whether a row names a work that does not live here. That is looked up each time: another process may be about to push it.
    async fn is_of_work_elsewhere(&self, value: &[u8]) -> Result<bool> {
        let Some(work_id) = work_of(value) else { return Ok(false) };
        Ok(self.local.log.read(Filter::Work(work_id), Position::default(), 1).await?.is_empty())
    }
}

/// The work that a row names.
fn work_of(value: &[u8]) -> Option<WorkId> {
    #[derive(serde::Deserialize)]
    struct Named {
        work_id: WorkId,
    }
    serde_json::from_slice(value).ok().map(|named: Named| named.work_id)
}

/// A watch that begins when the server has been reached.
struct Opening {
    bucket: Bucket,
    opened: Far,
    inner: Option<Box<dyn Watch>>,
}

#[async_trait]
impl Watch for Opening {
    async fn next(&mut self) -> Result<Vec<Change>> {
        loop {
            if let Some(inner) = &mut self.inner {
                return inner.next().await;
            }
            let far = self.opened.borrow_and_update().clone();
            match far {
                Some(far) => self.inner = Some(far.table.watch(self.bucket).await?),
                None => self.opened.changed().await.map_err(|_| Error::Closed)?,
            }
        }
    }
}

#[async_trait]
impl Blobs for Mesh {
    async fn put(&self, source: &mut (dyn AsyncRead + Unpin + Send), media: Media) -> Result<BlobRef> {
        // First to the disk: a source is read once, and the server may go away in the middle.
        let blob = self.local.blobs.put(source, media).await?;
        if let Ok(far) = self.far()
            && far.blobs.size(&blob.sha256).await.is_err()
        {
            let mut stored = self.local.blobs.open(&blob.sha256, 0..blob.size).await?;
            match far.blobs.put(&mut *stored, media).await {
                Ok(_) | Err(Error::Unreachable(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(blob)
    }

    async fn open(&self, sha256: &str, range: Range<u64>) -> Result<Box<dyn AsyncRead + Unpin + Send>> {
        match self.local.blobs.open(sha256, range.clone()).await {
            Err(Error::NoBlob(_)) => self.far()?.blobs.open(sha256, range).await,
            other => other,
        }
    }

    async fn size(&self, sha256: &str) -> Result<u64> {
        match self.local.blobs.size(sha256).await {
            Err(Error::NoBlob(_)) => self.far()?.blobs.size(sha256).await,
            other => other,
        }
    }
}
