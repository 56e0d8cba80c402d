//! The primitives that everything stands on: a log, queues, tables and blobs.
//!
//! This module knows records, items and rows; it does not know what a work is, nor who may do what.
//! `local` keeps them in one SQLite file; further transports pass the same contract suite.

pub mod local;
pub mod mesh;
pub mod nats;
pub mod subject;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::io::AsyncRead;
use tokio::sync::watch;

use crate::model::hex::hex;
use crate::model::id::{InstanceId, StationId, WorkId};
use crate::model::output::{BlobRef, Media};
use crate::model::time::Timestamp;
use crate::model::turn::Turn;
pub use subject::{Filter, Subject, Wire};

/// The four primitives of one lattice; cheap to clone.
#[derive(Clone)]
pub struct Transport {
    /// Append and follow.
    pub log: Arc<dyn Log>,
    /// Push, take, settle.
    pub queue: Arc<dyn Queue>,
    /// Get, put at an expected revision, watch.
    pub table: Arc<dyn Table>,
    /// Large values by digest.
    pub blobs: Arc<dyn Blobs>,
    /// Whether the lattice's server can be reached.
    pub reach: watch::Receiver<Reach>,
}

/// Whether the other machines of the lattice can be reached.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Reach {
    /// There is no server: everything is on this machine.
    #[default]
    Alone,
    /// The server is connected.
    Connected,
    /// The server cannot be reached.
    Away {
        /// Since when.
        since: Timestamp,
        /// Why, and what is done about it.
        reason: Arc<str>,
    },
}

impl Transport {
    /// Why the lattice's server cannot be reached, if it cannot.
    pub fn away(&self) -> Option<(Timestamp, Arc<str>)> {
        match &*self.reach.borrow() {
            Reach::Away { since, reason } => Some((*since, Arc::clone(reason))),
            Reach::Alone | Reach::Connected => None,
        }
    }
}

/// What the items of a hook wait for: each kind has a limit of its own, so that neither keeps the other out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waits {
    /// Their turn.
    ToStart,
    /// Somebody who wakes them.
    HeldBack,
}

impl Waits {
    /// What an item that is pushed will wait for.
    pub fn of(item: &Item) -> Self {
        if item.held_back { Self::HeldBack } else { Self::ToStart }
    }
}

impl std::fmt::Display for Waits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ToStart => "wait there",
            Self::HeldBack => "wait there for others",
        })
    }
}

/// Why a primitive did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The hook holds as much waiting work as it may.
    #[error("the hook of station {station} is full: {limit} works {waits}")]
    Full {
        /// Whose hook.
        station: StationId,
        /// How many may wait.
        limit: u32,
        /// What they wait for.
        waits: Waits,
    },
    /// The row is not at the expected revision.
    #[error("{bucket}/{key} was changed by somebody else")]
    Conflict {
        /// The bucket.
        bucket: &'static str,
        /// The key.
        key: String,
    },
    /// No blob has this digest.
    #[error("no blob has the digest {0}")]
    NoBlob(String),
    /// The store is corrupt, read-only, full, of a newer version, or otherwise refuses; the text says where and what to do.
    #[error("{0}")]
    Store(Arc<str>),
    /// The server does not let us; nothing was done.
    #[error("{0}")]
    Denied(Arc<str>),
    /// The server cannot be reached now; nothing was done.
    #[error("{0}")]
    Unreachable(Arc<str>),
    /// The server was asked and did not answer: it may or may not have been done.
    #[error("{0}")]
    Unanswered(Arc<str>),
    /// The transport has been closed.
    #[error("the transport is closed")]
    Closed,
}

/// The result of a primitive.
pub type Result<T> = std::result::Result<T, Error>;

/// A place in the log. Where two logs are read as one, each has its own number, and they rise apart: of two places neither may be
/// behind the other, so there is no order among them. The default is before the first record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Position {
    /// The number in the log; this machine's, where the server's goes beside it.
    pub seq: u64,
    /// The number in the server's log, where that goes beside this machine's.
    pub far: u64,
}

impl Position {
    /// A place in a log that is one.
    #[must_use]
    pub const fn of(seq: u64) -> Self {
        Self { seq, far: 0 }
    }

    /// Whether whoever has come to here has seen what stands at the other place.
    #[must_use]
    pub const fn reaches(self, other: Self) -> bool {
        self.seq >= other.seq && self.far >= other.far
    }

    /// As far as the one or the other, in each log.
    #[must_use]
    pub fn join(self, other: Self) -> Self {
        Self { seq: self.seq.max(other.seq), far: self.far.max(other.far) }
    }

    /// Where a reader stands that was here and has read these.
    #[must_use]
    pub fn past(self, entries: &[Entry]) -> Self {
        entries.iter().fold(self, |at, entry| at.join(entry.position))
    }
}

/// What is appended to the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Where it belongs.
    pub subject: Subject,
    /// Its bytes.
    pub body: Bytes,
}

/// What stands in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its place, in the log where it stands.
    pub position: Position,
    /// Where it belongs.
    pub subject: Subject,
    /// Which station said it, where the transport vouches for that.
    pub by: Option<StationId>,
    /// The log of the machine where its work lives had it first, and it was forwarded from there.
    pub is_forwarded: bool,
    /// Its bytes.
    pub body: Bytes,
}

impl Entry {
    /// Tells it from any other that may ever stand in its place.
    pub fn digest(&self) -> String {
        let mut digest = Sha256::new();
        digest.update(self.subject.to_string());
        digest.update([0]);
        digest.update(&self.body);
        hex(&digest.finalize())
    }
}

/// An append-only sequence of records.
#[async_trait]
pub trait Log: Send + Sync {
    /// Appends in order, all or nothing; durable when it returns. Gives the last record's position.
    async fn append(&self, records: Vec<Record>) -> Result<Position>;

    /// Appends what another log has. `from` names its place there: said again soon, by whatever process, it stands once.
    async fn forward(&self, record: Record, _from: &str) -> Result<Position> {
        self.append(vec![record]).await
    }

    /// Up to `limit` entries after a position, in order; fewer only where the log ends.
    async fn read(&self, filter: Filter, after: Position, limit: usize) -> Result<Vec<Entry>>;

    /// Everything after a position, first what is there, then what comes; nothing is skipped or repeated.
    async fn follow(&self, filter: Filter, after: Position) -> Result<Box<dyn Follow>>;

    /// Everything that is there, and a reader of what comes after it; nothing is skipped or repeated. For filters with few entries.
    async fn replay(&self, filter: Filter) -> Result<(Vec<Entry>, Box<dyn Follow>)>;

    /// As `replay`, without a look at what is there: what was heard of late, and a reader that soon gives whatever is missing. None
    /// where a look costs nothing.
    async fn lately(&self, _: Filter) -> Result<Option<(Vec<Entry>, Box<dyn Follow>)>> {
        Ok(None)
    }

    /// Whether a work stands on this machine, so that it goes on however long a server is away. False where there is one place only.
    async fn is_here(&self, _: WorkId) -> Result<bool> {
        Ok(false)
    }

    /// The last entry's position, as of all processes now.
    async fn head(&self) -> Result<Position>;

    /// Rises whenever a server may have lost what stood in the log, or the end of it: whoever keeps places looks whether they hold.
    fn epoch(&self) -> u64 {
        0
    }

    /// Tells this log from another one that stands under its name later.
    async fn identity(&self) -> Result<String> {
        Ok(String::new())
    }

    /// Whether the entry with this digest stands at this place of the log; of the server's, where there are two.
    async fn has(&self, seq: u64, digest: &str) -> Result<bool> {
        let found = self.read(Filter::AllWork, Position::of(seq.saturating_sub(1)), 1).await?;
        Ok(found.first().is_some_and(|entry| entry.position.seq == seq && entry.digest() == digest))
    }
}

/// A reader that goes along with the log.
#[async_trait]
pub trait Follow: Send {
    /// The next entries, at least one; waits until there are some. Dropping the future loses nothing.
    async fn next(&mut self) -> Result<Vec<Entry>>;
}

/// What waits in a hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The work; pushing it again changes nothing.
    pub id: WorkId,
    /// Whoever takes names the lanes it serves: the agent, in effect.
    pub lane: String,
    /// Its place among what waits.
    pub turn: Turn,
    /// From this moment on only `take_expired` gives it.
    pub deadline: Timestamp,
    /// Nobody gets it before somebody wakes it.
    pub held_back: bool,
    /// It lives where this item does, and nowhere else.
    pub beside: Option<WorkId>,
    /// The order.
    pub body: Bytes,
}

/// Whether a push was the first of its item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// It waits now.
    New,
    /// It waited, or was held, already.
    Known,
    /// What it belongs beside is not on this hook: nothing has happened.
    Elsewhere,
}

/// The right to settle an item: void once a later attempt has been taken.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Delivery {
    /// The hook.
    pub station: StationId,
    /// The item.
    pub id: WorkId,
    /// Which taking of the item this is, from 1.
    pub attempt: u32,
}

/// An item that was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// The right to settle it.
    pub delivery: Delivery,
    /// Its lane.
    pub lane: String,
    /// The order.
    pub body: Bytes,
    /// Its deadline.
    pub deadline: Timestamp,
}

/// What a taker has room for.
#[derive(Debug, Clone)]
pub struct Want {
    /// Who takes.
    pub holder: InstanceId,
    /// The lanes it serves, each with the room that is left in it.
    pub lanes: Vec<(String, u32)>,
    /// The room that is left in all.
    pub room: u32,
    /// Lanes of which only so many items may be taken in any minute, by whomever.
    pub per_minute: Vec<(String, u32)>,
    /// What has waited this long counts as one priority more urgent.
    pub ageing: Duration,
    /// How long an item is held unless it is extended.
    pub lease: Duration,
    /// What goes on the log for each item that is taken.
    pub accept: Accept,
    /// Nothing but these items, if given.
    pub only: Option<Vec<WorkId>>,
    /// Of what others hold and have not extended in time, nothing but these, if given.
    pub over: Option<Vec<Delivery>>,
    /// Whether to look for items that nobody has told this process of yet, when it knows of none.
    pub look: bool,
}

impl Want {
    /// How many items of a lane may be taken in any minute, if that is bounded.
    pub fn pace(&self, lane: &str) -> Option<u32> {
        self.per_minute.iter().find(|(name, _)| name == lane).map(|(_, count)| *count)
    }

    /// Whether an item may be taken of which this delivery has lapsed.
    pub fn takes_over(&self, id: WorkId, attempt: u32) -> bool {
        takes_over(self.over.as_deref(), id, attempt)
    }
}

/// Whether an item may be taken of which this delivery has lapsed, if nothing but these are.
fn takes_over(over: Option<&[Delivery]>, id: WorkId, attempt: u32) -> bool {
    over.is_none_or(|over| over.iter().any(|delivery| delivery.id == id && delivery.attempt == attempt))
}

/// Makes the record of a taking; after a crash an item may be held without it, never the record stand without a taking.
#[derive(Clone, Default)]
pub struct Accept(Option<Arc<MakeRecord>>);

type MakeRecord = dyn Fn(&Taken) -> Option<Record> + Send + Sync;

impl Accept {
    /// Makes records by this.
    pub fn with(make: impl Fn(&Taken) -> Option<Record> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(make)))
    }

    /// The record for an item that is being taken.
    pub fn record(&self, taken: &Taken) -> Option<Record> {
        self.0.as_ref().and_then(|make| make(taken))
    }
}

impl std::fmt::Debug for Accept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Accept(..)" } else { "Accept(nothing)" })
    }
}

/// What a take found.
#[derive(Debug, Clone, Default)]
pub struct Take {
    /// The most urgent first.
    pub taken: Vec<Taken>,
    /// When something of these lanes becomes free at the earliest: a delayed or held item, a paused lane, or the pace of one.
    pub next_at: Option<Timestamp>,
    /// What was left because it is not among those that may be taken over.
    pub lapsed: Vec<Lapsed>,
}

/// An item whose holder has not extended its hold in time: the delivery is good until somebody else takes the item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lapsed {
    /// The holder's right to settle it.
    pub delivery: Delivery,
    /// Its lane.
    pub lane: String,
}

/// How many items a lane holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneLoad {
    /// The lane.
    pub lane: String,
    /// Waiting, delayed ones included.
    pub waiting: u32,
    /// Held by a taker.
    pub held: u32,
    /// How many of those that wait are not taken before somebody wakes them.
    pub held_back: u32,
    /// Nothing of it is taken before this moment.
    pub paused_until: Option<Timestamp>,
}

/// The hooks of all stations.
#[async_trait]
pub trait Queue: Send + Sync {
    /// Puts an item on a station's hook, and `announce` on the log if the item is new; both are durable when it returns,
    /// and after a crash the item may stand without its record, never the record without its item. Pushing it again adds what is missing.
    ///
    /// # Errors
    /// `Full` when `limit` items wait there already for what this one waits for; then nothing has happened.
    async fn push(&self, station: &StationId, item: Item, limit: u32, announce: Option<Record>) -> Result<Pushed>;

    /// Takes the free items of the wanted lanes whose turn it is, at most as many as there is room for, and appends what `accept`
    /// makes of each.
    async fn take(&self, station: &StationId, want: &Want) -> Result<Take>;

    /// Takes free items of any station whose deadline has passed, so that somebody can settle them. Of what others hold and have not
    /// extended in time, nothing but what is among `over`, if given; the rest is what it left.
    async fn take_expired(&self, holder: InstanceId, lease: Duration, limit: usize, over: Option<Vec<Delivery>>) -> Result<Take>;

    /// Holds on to items; gives those that were lost to a later attempt or are gone. `deadline` moves it for all of them.
    async fn extend(&self, held: &[Delivery], lease: Duration, deadline: Option<Timestamp>) -> Result<Vec<Delivery>>;

    /// Appends the records and then removes the item. False when the delivery was void: the item stays, the records stand all the same.
    async fn settle(&self, delivery: &Delivery, records: Vec<Record>) -> Result<bool>;

    /// Appends the records and then frees the item, not before `at`, with a new deadline if given. False when the delivery was void;
    /// then nothing has happened.
    async fn release(&self, delivery: &Delivery, at: Timestamp, deadline: Option<Timestamp>, records: Vec<Record>) -> Result<bool>;

    /// Appends the records and makes a released item free at once. False when it is held or gone; the records stand all the same.
    /// A new deadline, if given, is the item's in either case. One whose hold has lapsed is free as it is: its delivery stays good.
    async fn wake(&self, station: &StationId, id: WorkId, deadline: Option<Timestamp>, records: Vec<Record>) -> Result<bool>;

    /// Appends the records and removes the item unless it is held. False when it is held or gone; the records stand all the same.
    async fn remove(&self, station: &StationId, id: WorkId, records: Vec<Record>) -> Result<bool>;

    /// Nobody takes from a lane before this moment, or the one that was said before if that is later; a moment that has passed
    /// takes the pause back. Durable when it returns.
    async fn pause(&self, station: &StationId, lane: &str, until: Timestamp) -> Result<()>;

    /// How full a station's lanes are; paused ones are among them also when they are empty.
    async fn load(&self, station: &StationId) -> Result<Vec<LaneLoad>>;

    /// Wakes whoever takes from this station's hook when something may have become free.
    fn signal(&self, station: &StationId) -> Signal;
}

/// Tells that something changed since it was last asked; a change in between is not missed.
pub struct Signal(tokio::sync::watch::Receiver<u64>);

impl Signal {
    /// Wraps the counter that a transport raises.
    pub fn new(counter: tokio::sync::watch::Receiver<u64>) -> Self {
        Self(counter)
    }

    /// Whether anything changed since the last look.
    pub fn is_raised(&mut self) -> bool {
        let raised = self.0.has_changed().unwrap_or(true);
        self.0.mark_unchanged();
        raised
    }

    /// Waits for the next change; never returns once the transport is closed.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// The tables that exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bucket {
    /// Who holds which agent's name.
    Agents,
    /// Which processes are alive.
    Stations,
    /// The children of a run.
    Children,
    /// Idempotency keys, and single rows under names of their own: tasks, the secret that seals request states.
    Keys,
    /// Sessions of older HTTP clients.
    Sessions,
}

impl Bucket {
    /// All of them, each at the index that its discriminant is.
    pub const ALL: [Self; 5] = [Self::Agents, Self::Stations, Self::Children, Self::Keys, Self::Sessions];

    /// Its name in the store.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Agents => "agents",
            Self::Stations => "stations",
            Self::Children => "children",
            Self::Keys => "keys",
            Self::Sessions => "sessions",
        }
    }
}

/// The row of `Keys` with the secret that seals what clients bring back. Everybody comes to have the server's; what others were used
/// while that was away stand beside it, each under this name, a dot and a name of its own.
pub const SEAL: &str = "mcp.seal";

/// A row of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its key: any text.
    pub key: String,
    /// Its value.
    pub value: Bytes,
    /// Rises with every change in the bucket.
    pub revision: u64,
}

/// What a put or remove expects to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Anything.
    Any,
    /// No row.
    Absent,
    /// The row at this revision.
    Revision(u64),
}

/// A change in a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A row is new or has a new value.
    Put(Row),
    /// A row was removed or has expired.
    Removed(String),
    /// Everything that stood there when the watch began has been given.
    Loaded,
}

/// Named values with revisions and expiry.
#[async_trait]
pub trait Table: Send + Sync {
    /// The row of a key.
    async fn get(&self, bucket: Bucket, key: &str) -> Result<Option<Row>>;

    /// Writes a row if what is there is as expected; with a `ttl` it expires unless it is put again. Gives its revision.
    ///
    /// # Errors
    /// `Conflict` when it is not as expected.
    async fn put(&self, bucket: Bucket, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> Result<u64>;

    /// Removes a row if it is as expected; false when there was none.
    ///
    /// # Errors
    /// `Conflict` when it is not as expected.
    async fn remove(&self, bucket: Bucket, key: &str, expect: Expect) -> Result<bool>;

    /// All rows, by key.
    async fn list(&self, bucket: Bucket) -> Result<Vec<Row>>;

    /// The rows whose keys have two parts with a dot between them, of which this is the first.
    async fn list_of(&self, bucket: Bucket, head: &str) -> Result<Vec<Row>> {
        let mut rows = self.list(bucket).await?;
        rows.retain(|row| row.key.strip_prefix(head).is_some_and(|rest| rest.starts_with('.')));
        Ok(rows)
    }

    /// All rows, then `Loaded`, then every change.
    async fn watch(&self, bucket: Bucket) -> Result<Box<dyn Watch>>;

    /// Counts a key up by `count`, from `floor` at least, and gives the first of the new numbers; no number is given twice.
    async fn next(&self, bucket: Bucket, key: &str, floor: u64, count: u64) -> Result<u64>;
}

/// A reader of a bucket's changes.
#[async_trait]
pub trait Watch: Send {
    /// The next changes, at least one; waits until there are some. Dropping the future loses nothing.
    async fn next(&mut self) -> Result<Vec<Change>>;
}

/// Large values, named by the SHA-256 of their bytes.
#[async_trait]
pub trait Blobs: Send + Sync {
    /// Stores all bytes of a source without holding them in memory; durable when it returns.
    async fn put(&self, source: &mut (dyn AsyncRead + Unpin + Send), media: Media) -> Result<BlobRef>;

    /// Reads a range of bytes, cut at the blob's end.
    async fn open(&self, sha256: &str, range: Range<u64>) -> Result<Box<dyn AsyncRead + Unpin + Send>>;

    /// The blob's size.
    async fn size(&self, sha256: &str) -> Result<u64>;

    /// Whether a blob is there, and stays about as long as if it were put now. False also where that is not known.
    async fn is_fresh(&self, _: &str) -> Result<bool> {
        Ok(false)
    }
}
