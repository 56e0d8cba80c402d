//! Named values with revisions and expiry: key-value buckets of NATS. A row's revision is its sequence in the bucket's stream.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{Mutex, OnceCell};

use super::blobs::NatsBlobs;
use super::link::{Fault, Link};
use super::row::{self, Cell, State};
use super::stream::{Stored, Stream};
use super::watcher::Watcher;
use crate::transport::{Bucket, Error, Expect, Result, Row, Table, Watch};

/// How often a list waits for a replica that is behind.
const WAITS_MAX: u32 = 20;
/// How many rows are asked for at once.
const PAGE: usize = 256;
/// How often a change is tried again because somebody else changed the key, and then counts as a conflict.
const TRIES_MAX: u32 = 16;
/// How often a number is asked for again because another process was quicker.
const NUMBER_TRIES_MAX: u32 = 200;
/// The longest wait between two tries.
const PAUSE_MAX: Duration = Duration::from_millis(32);
/// The longest key.
const KEY_BYTES_MAX: usize = 16 << 10;
/// How many keys are counted up at once in this process.
const TURNS: usize = 64;

/// The tables of one lattice; cheap to clone.
#[derive(Clone)]
pub(super) struct NatsTable(Arc<Shared>);

struct Shared {
    link: Arc<Link>,
    blobs: Arc<NatsBlobs>,
    streams: [OnceCell<Arc<Stream>>; Bucket::ALL.len()],
    /// Callers in this process wait for each other, so that only processes compete for a number.
    turns: [Mutex<()>; TURNS],
}

/// What stands under a key.
struct Last {
    seq: u64,
    row: Option<Stored>,
}

impl Last {
    fn is(&self, expect: Expect) -> bool {
        match expect {
            Expect::Any => true,
            Expect::Absent => self.row.is_none(),
            Expect::Revision(revision) => self.row.is_some() && self.seq == revision,
        }
    }
}

impl NatsTable {
    /// The tables over a connection; a bucket is made when it is first used.
    pub(super) fn new(link: &Arc<Link>, blobs: &Arc<NatsBlobs>) -> Self {
        Self(Arc::new(Shared {
            link: Arc::clone(link),
            blobs: Arc::clone(blobs),
            streams: Default::default(),
            turns: std::array::from_fn(|_| Mutex::new(())),
        }))
    }

    pub(super) fn link(&self) -> &Link {
        &self.0.link
    }

    /// The bucket's stream.
    pub(super) async fn stream(&self, bucket: Bucket) -> Result<&Arc<Stream>> {
        self.0.streams[bucket as usize].get_or_try_init(|| super::bucket_stream(&self.0.link, bucket)).await
    }

    /// The row in a message; nothing when its value, which was too large for the message, is gone.
    pub(super) async fn row(&self, bucket: Bucket, key: String, stored: &Stored) -> Result<Option<Row>> {
        match self.0.blobs.unpack(stored).await {
            Ok(value) => Ok(Some(Row { key, value, revision: stored.seq })),
            Err(Error::NoBlob(digest)) => {
                tracing::warn!(bucket = bucket.name(), key = shown(&key), digest, "a row counts as none, since its value is gone");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn check(&self, bucket: Bucket, key: &str) -> Result<()> {
        if key.len() <= KEY_BYTES_MAX {
            return Ok(());
        }
        let text = format!("a key of the bucket {} has {} bytes: shorten it to {KEY_BYTES_MAX}", bucket.name(), key.len());
        Err(Error::Store(text.into()))
    }

    async fn last(&self, bucket: Bucket, key: &str) -> Result<Last> {
        self.check(bucket, key)?;
        let link = &self.0.link;
        let last = self.stream(bucket).await?.last(&link.wire.row_any(bucket, key)).await;
        let Some(stored) = last.map_err(|fault| explain(bucket, fault))? else {
            return Ok(Last { seq: 0, row: None });
        };
        let cell = Cell::read(&link.wire, bucket, &stored);
        let is_live = cell.is_some_and(|cell| cell.key == key && cell.state.is_live(link.now()));
        Ok(Last { seq: stored.seq, row: is_live.then_some(stored) })
    }

    /// Publishes if `any` still ends at a sequence; nothing when it does not.
    async fn publish_after(
        &self,
        bucket: Bucket,
        (subject, any): (&str, &str),
        after: u64,
        mut headers: HeaderMap,
        body: Bytes,
    ) -> Result<Option<u64>> {
        let stream = self.stream(bucket).await?;
        headers.insert("Nats-Expected-Last-Subject-Sequence", after.to_string().as_str());
        if any != subject {
            headers.insert("Nats-Expected-Last-Subject-Sequence-Subject", any);
        }
        let id = headers.get(row::ID).map(|id| id.as_str().to_owned());
        match stream.publish(subject, headers, body).await {
            Ok(published) => Ok(Some(published.seq)),
            Err(fault) if fault.is_conflict() => {
                // An earlier try, whose answer was lost, may have been the one that got through.
                let last = stream.last(any).await.map_err(|fault| explain(bucket, fault))?;
                Ok(last.filter(|last| last.header(row::ID) == id.as_deref()).map(|last| last.seq))
            }
            Err(fault) => Err(explain(bucket, fault)),
        }
    }

    /// Whether all that ever stood under an agent's name, up to a sequence, is this station's own.
    async fn is_only_own(&self, key: &str, seq: u64) -> Result<bool> {
        let wire = &self.0.link.wire;
        let page = self.stream(Bucket::Agents).await?.page(Some(&wire.row_any(Bucket::Agents, key)), 0, 2).await?;
        Ok(matches!(page.messages.as_slice(), [only] if only.seq == seq && row::is_own(wire, only, key, &self.0.link.station)))
    }

    /// The newest message of each key that is there, in the order of the keys.
    async fn newest(&self, bucket: Bucket, filter: String) -> Result<BTreeMap<String, Stored>> {
        let stream = self.stream(bucket).await?;
        let mut rows = Rows::default();
        let (mut at, mut waits) = (0, 0);
        let horizon = stream.horizon().await?;
        loop {
            let page = stream.page(Some(&filter), at, PAGE).await?;
            at = page.messages.last().map_or(at, |last| last.seq);
            let is_last = page.pending == 0 && page.messages.len() < PAGE;
            page.messages.into_iter().for_each(|stored| rows.take_in(&self.0.link, bucket, stored));
            if is_last {
                if waits == WAITS_MAX || !stream.is_behind(at, horizon).await? {
                    return Ok(rows.0);
                }
                waits += 1;
            }
        }
    }

    fn conflict(bucket: Bucket, key: &str) -> Error {
        Error::Conflict { bucket: bucket.name(), key: key.to_owned() }
    }
}

/// The rows of a bucket, made up from its messages.
#[derive(Default)]
pub(super) struct Rows(pub(super) BTreeMap<String, Stored>);

impl Rows {
    /// Takes in the next message; a later one stands for its key instead of an earlier one.
    pub(super) fn take_in(&mut self, link: &Link, bucket: Bucket, stored: Stored) {
        let Some(cell) = Cell::read(&link.wire, bucket, &stored) else { return };
        match cell.state {
            State::Live(_) if cell.state.is_live(link.now()) => _ = self.0.insert(cell.key, stored),
            State::Live(_) | State::Gone => _ = self.0.remove(&cell.key),
        }
    }
}

#[async_trait]
impl Table for NatsTable {
    async fn get(&self, bucket: Bucket, key: &str) -> Result<Option<Row>> {
        match self.last(bucket, key).await?.row {
            Some(stored) => self.row(bucket, key.to_owned(), &stored).await,
            None => Ok(None),
        }
    }

    async fn put(&self, bucket: Bucket, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> Result<u64> {
        self.check(bucket, key)?;
        let link = &self.0.link;
        let (subject, any) = (link.wire.row(bucket, key, &link.station), link.wire.row_any(bucket, key));
        let mut packed = HeaderMap::new();
        let value = self.0.blobs.pack(&mut packed, value).await?;
        for n in 0..TRIES_MAX {
            let mut headers = row::headers(&link.wire, bucket, key);
            row::carry(&mut headers, &packed);
            if let Some(ttl) = ttl {
                row::expire(&mut headers, bucket, link.now(), ttl);
            }
            if expect == Expect::Any {
                let published = self.stream(bucket).await?.publish(&subject, headers, value).await;
                return Ok(published.map_err(|fault| explain(bucket, fault))?.seq);
            }
            let last = self.last(bucket, key).await?;
            if !last.is(expect) {
                break;
            }
            if let Some(seq) = self.publish_after(bucket, (&subject, &any), last.seq, headers, value.clone()).await? {
                return Ok(seq);
            }
            pause(n).await;
        }
        Err(Self::conflict(bucket, key))
    }

    async fn remove(&self, bucket: Bucket, key: &str, expect: Expect) -> Result<bool> {
        let link = &self.0.link;
        let (subject, any) = (link.wire.row(bucket, key, &link.station), link.wire.row_any(bucket, key));
        for n in 0..TRIES_MAX {
            let last = self.last(bucket, key).await?;
            if last.row.is_none() {
                return Ok(false);
            }
            if !last.is(expect) {
                break;
            }
            let mut headers = row::headers(&link.wire, bucket, key);
            // Once a removal is dropped, what other stations put under the name before would be there again.
            let droppable = bucket != Bucket::Agents || self.is_only_own(key, last.seq).await?;
            row::remove(&mut headers, droppable);
            if self.publish_after(bucket, (&subject, &any), last.seq, headers, Bytes::new()).await?.is_some() {
                return Ok(true);
            }
            pause(n).await;
        }
        Err(Self::conflict(bucket, key))
    }

    async fn list(&self, bucket: Bucket) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for (key, stored) in self.newest(bucket, self.0.link.wire.rows(bucket)).await? {
            rows.extend(self.row(bucket, key, &stored).await?);
        }
        Ok(rows)
    }

    async fn list_of(&self, bucket: Bucket, head: &str) -> Result<Vec<Row>> {
        self.check(bucket, head)?;
        let mut rows = Vec::new();
        for (key, stored) in self.newest(bucket, self.0.link.wire.rows_of(bucket, head)).await? {
            rows.extend(self.row(bucket, key, &stored).await?);
        }
        Ok(rows)
    }

    async fn watch(&self, bucket: Bucket) -> Result<Box<dyn Watch>> {
        Ok(Box::new(Watcher::open(self.clone(), bucket).await?))
    }

    async fn next(&self, bucket: Bucket, key: &str, floor: u64, count: u64) -> Result<u64> {
        self.check(bucket, key)?;
        let wire = &self.0.link.wire;
        let subject = wire.number(bucket, key);
        let mut hasher = DefaultHasher::new();
        subject.hash(&mut hasher);
        let _turn = self.0.turns[usize::try_from(hasher.finish() % TURNS as u64).unwrap_or(0)].lock().await;
        for n in 0..NUMBER_TRIES_MAX {
            let last = self.stream(bucket).await?.last(&subject).await.map_err(|fault| explain(bucket, fault))?;
            let given = last.as_ref().map_or(Some(0), |last| std::str::from_utf8(&last.body).ok()?.parse().ok());
            let given: u64 = given.ok_or_else(|| {
                let text =
                    format!("the count of {} in the bucket {} is no number: remove the message {subject}", shown(key), bucket.name());
                Error::Store(text.into())
            })?;
            let first = given.max(floor).saturating_add(1);
            let body = Bytes::from(first.saturating_add(count.saturating_sub(1)).to_string());
            let headers = row::headers(wire, bucket, key);
            let after = last.map_or(0, |last| last.seq);
            if self.publish_after(bucket, (&subject, &subject), after, headers, body).await?.is_some() {
                return Ok(first);
            }
            pause(n).await;
        }
        let text = format!("too many processes count up {} in the bucket {}: try again later", shown(key), bucket.name());
        Err(Error::Store(text.into()))
    }
}

/// Waits a little before the next try, differently in each process.
async fn pause(n: u32) {
    let most = Duration::from_millis(1).saturating_mul(1 << n.min(8)).min(PAUSE_MAX);
    tokio::time::sleep(most.mul_f64(super::tail::rand_unit())).await;
}

fn shown(key: &str) -> String {
    key.chars().take(80).collect()
}

pub(super) fn explain(bucket: Bucket, fault: Fault) -> Error {
    let advice = match &fault {
        Fault::NoResponders => ": start the station again once the server has JetStream",
        Fault::Api(error) if error.code == 503 => ": give the server's JetStream more room",
        _ => "",
    };
    match fault.about(&format!("the bucket {}", bucket.name())) {
        Error::Store(text) => Error::Store(format!("{text}{advice}").into()),
        other => other,
    }
}
