//! The log: one stream over the lattice's works and audit events. A place in it is the stream's sequence.

use std::sync::Arc;

use async_nats::HeaderMap;
use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::Mutex;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::blobs::NatsBlobs;
use super::link::{Fault, Link};
use super::stream::{Stored, Stream};
use super::stream_config;
use super::tail::Tail;
use super::told::Told;
use crate::transport::{Entry, Error, Filter, Follow, Log, Position, Record, Result};

const TRACE_KEY: &[u8] = b"\"trace_id\"";
/// A larger body is not searched.
const TRACED_MAX: usize = 64 << 10;
/// Names the blob that holds a body which is too large for a message.
pub(super) const BODY: &str = "Lattice-Body";
/// Marks what was forwarded from the log of the machine where its work lives.
pub(super) const FROM: &str = "Lattice-From";

/// What a body says of the trace that it belongs to.
#[derive(Deserialize)]
struct Trace<'a> {
    trace_id: &'a str,
    span_id: &'a str,
}

/// Puts the trace context of a body into a header as well, where tools that watch the server find it.
pub(super) fn carry_trace(headers: &mut HeaderMap, body: &[u8]) {
    // Only what begins a work has one; the rest is not read for it.
    let has_trace = body.len() <= TRACED_MAX && body.windows(TRACE_KEY.len()).any(|some| some == TRACE_KEY);
    let Some(Trace { trace_id, span_id }) = has_trace.then(|| serde_json::from_slice(body).ok()).flatten() else { return };
    let is_hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if trace_id.len() == 32 && span_id.len() == 16 && is_hex(trace_id) && is_hex(span_id) {
        headers.insert("traceparent", format!("00-{trace_id}-{span_id}-01").as_str());
    }
}

/// The log of one lattice.
#[derive(Clone)]
pub(super) struct NatsLog {
    link: Arc<Link>,
    stream: Arc<Stream>,
    blobs: Arc<NatsBlobs>,
    told: Arc<Mutex<Option<Arc<Told>>>>,
}

impl NatsLog {
    pub(super) async fn open(link: &Arc<Link>, blobs: &Arc<NatsBlobs>) -> Result<Self> {
        let (wire, settings) = (&link.wire, &link.settings);
        let max_bytes = i64::try_from(settings.log_max_bytes.get()).unwrap_or(-1);
        let mut config = stream_config(link, wire.log_stream(), &wire.log_subjects(), settings.log_max_age.get(), max_bytes);
        config["discard"] = "old".into();
        config["deny_delete"] = true.into();
        config["deny_purge"] = true.into();
        config["allow_atomic"] = true.into();
        config["republish"] = json!({ "src": wire.all(), "dest": wire.told_all() });
        let stream = Stream::ensure(link, config).await?;
        Ok(Self { link: Arc::clone(link), stream, blobs: Arc::clone(blobs), told: Arc::default() })
    }

    /// The log's stream.
    pub(super) fn stream(&self) -> Arc<Stream> {
        Arc::clone(&self.stream)
    }

    /// Appends a record without waiting for the answer: what is appended later stands behind it. A lost one is sent again.
    pub(super) async fn append_soon(&self, record: Record, tasks: &TaskTracker) {
        let log = self.clone();
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        tasks.spawn(async move {
            let Ok((subject, headers, body)) = log.message(record).await else { return };
            let mut publish = std::pin::pin!(log.stream.publish(&subject, headers, body));
            // The first poll hands it to the connection, which keeps the order.
            let first = futures_util::poll!(publish.as_mut());
            let _ = begun.send(());
            let published = match first {
                std::task::Poll::Ready(published) => published,
                std::task::Poll::Pending => publish.await,
            };
            if let Err(fault) = published {
                tracing::warn!(%fault, "a record of a taking did not reach the log");
            }
        });
        // If it never began there is nothing to wait for.
        let _ = has_begun.await;
    }

    /// A record as a message.
    async fn message(&self, record: Record) -> Result<(String, HeaderMap, Bytes)> {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", Uuid::new_v4().simple().to_string().as_str());
        carry_trace(&mut headers, &record.body);
        let body = self.blobs.pack(&mut headers, record.body).await?;
        Ok((self.link.wire.record(&record.subject, &self.link.station), headers, body))
    }

    /// Messages as entries; what is no record of ours is left out, and so is what claims to be from another station.
    async fn entries(&self, stored: Vec<Stored>, filter: Filter) -> Result<Vec<Entry>> {
        let mut entries = Vec::with_capacity(stored.len());
        for stored in stored {
            let Some((subject, by)) = self.link.wire.parse_record(&stored.subject) else {
                tracing::warn!(subject = stored.subject, seq = stored.seq, "skipped a message of the log whose subject is no record's");
                continue;
            };
            if !filter.wants(&subject) {
                continue;
            }
            let position = Position::of(stored.seq);
            let body = match self.blobs.unpack(&stored).await {
                Ok(body) => body,
                Err(Error::NoBlob(digest)) => {
                    tracing::warn!(digest, seq = stored.seq, "skipped a record whose text is gone");
                    continue;
                }
                Err(error) => return Err(error),
            };
            entries.push(Entry { position, subject, by, is_forwarded: stored.header(FROM).is_some(), body });
        }
        Ok(entries)
    }

    async fn tail(&self, filter: Filter, after: Position) -> Result<Tail> {
        let wire = &self.link.wire;
        // The statuses of all works are sifted out of everything, where a gap shows.
        let (wide, work) = match filter {
            Filter::AllWork | Filter::AllStatus => (wire.filter(Filter::AllWork), None),
            Filter::Work(id) => (wire.filter(filter), Some(id)),
            Filter::Audit => {
                let wide = wire.filter(filter);
                let told = wire.told(&wide);
                return self.stream.tail(wide, told, after.seq, false).await;
            }
        };
        Ok(self.stream.tail_beside(wide, self.told().await?, work, after.seq))
    }

    /// What the server says again of works. One subscription for each work would cost it more than the work itself.
    async fn told(&self) -> Result<Arc<Told>> {
        let mut told = self.told.lock().await;
        if let Some(told) = told.as_ref().filter(|told| !told.is_over()) {
            return Ok(Arc::clone(told));
        }
        let wire = &self.link.wire;
        let said = self.link.client.subscribe(wire.told(&wire.filter(Filter::AllWork))).await;
        let said = said.map_err(|error| self.stream.explain(Fault::Silent(error.to_string())))?;
        let new = Arc::new(Told::new(said, self.stream.name.clone(), &self.link));
        *told = Some(Arc::clone(&new));
        Ok(new)
    }

    async fn follower(&self, filter: Filter, after: Position) -> Result<Follower> {
        Ok(Follower { tail: self.tail(filter, after).await?, log: self.clone(), filter, unread: Vec::new() })
    }
}

#[async_trait]
impl Log for NatsLog {
    async fn append(&self, records: Vec<Record>) -> Result<Position> {
        let mut messages = Vec::with_capacity(records.len());
        for record in records {
            messages.push(self.message(record).await?);
        }
        let published = match messages.len() {
            0 => return self.head().await,
            1 => {
                let (subject, headers, body) = messages.remove(0);
                self.stream.publish(&subject, headers, body).await
            }
            _ => self.stream.publish_all(messages).await,
        };
        Ok(Position::of(published.map_err(|fault| self.stream.explain(fault))?.seq))
    }

    async fn forward(&self, record: Record, from: &str) -> Result<Position> {
        let (subject, mut headers, body) = self.message(record).await?;
        // The server itself drops what a second process of the same folder forwards.
        headers.insert("Nats-Msg-Id", from);
        headers.insert(FROM, from);
        let published = self.stream.publish(&subject, headers, body).await;
        Ok(Position::of(published.map_err(|fault| self.stream.explain(fault))?.seq))
    }

    async fn read(&self, filter: Filter, after: Position, limit: usize) -> Result<Vec<Entry>> {
        let (subject, mut at, mut all) = (self.link.wire.filter(filter), after.seq, Vec::new());
        while all.len() < limit {
            let page = self.stream.page(Some(&subject), at, limit - all.len()).await?;
            let Some(last) = page.messages.last() else { break };
            at = last.seq;
            all.extend(self.entries(page.messages, filter).await?);
            if page.pending == 0 {
                break;
            }
        }
        Ok(all)
    }

    async fn follow(&self, filter: Filter, after: Position) -> Result<Box<dyn Follow>> {
        Ok(Box::new(self.follower(filter, after).await?))
    }

    async fn replay(&self, filter: Filter) -> Result<(Vec<Entry>, Box<dyn Follow>)> {
        let mut follower = self.follower(filter, Position::default()).await?;
        let stored = follower.tail.all().await?;
        let entries = self.entries(stored, filter).await?;
        Ok((entries, Box::new(follower)))
    }

    async fn lately(&self, filter: Filter) -> Result<Option<(Vec<Entry>, Box<dyn Follow>)>> {
        let Filter::Work(id) = filter else { return Ok(None) };
        let (stored, tail) = self.stream.tail_lately(self.link.wire.filter(filter), self.told().await?, id);
        let entries = self.entries(stored, filter).await?;
        Ok(Some((entries, Box::new(Follower { tail, log: self.clone(), filter, unread: Vec::new() }))))
    }

    async fn head(&self) -> Result<Position> {
        self.stream.head().await.map(Position::of)
    }

    fn epoch(&self) -> u64 {
        self.link.connects() + self.stream.life_known()
    }

    async fn identity(&self) -> Result<String> {
        self.stream.identity().await
    }

    async fn has(&self, seq: u64, digest: &str) -> Result<bool> {
        let stored = self.stream.surely_at(seq).await.map_err(|fault| self.stream.explain(fault))?;
        let entries = self.entries(stored.into_iter().collect(), Filter::AllWork).await?;
        Ok(entries.first().is_some_and(|entry| entry.digest() == digest))
    }
}

/// Goes along with the log.
struct Follower {
    log: NatsLog,
    tail: Tail,
    filter: Filter,
    /// Messages whose texts are not there yet.
    unread: Vec<Stored>,
}

#[async_trait]
impl Follow for Follower {
    async fn next(&mut self) -> Result<Vec<Entry>> {
        loop {
            if self.unread.is_empty() {
                self.unread = self.tail.next().await?;
            }
            let entries = self.log.entries(self.unread.clone(), self.filter).await?;
            self.unread.clear();
            if !entries.is_empty() {
                return Ok(entries);
            }
        }
    }
}
