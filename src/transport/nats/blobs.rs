//! Large values: an object store of NATS, each object named by the SHA-256 of its bytes. NATS tools read it as well.
//!
//! Nothing in it is ever replaced: the stream takes no rollups, each station's chunks have their own subjects, and of two chunks
//! with one number the first counts. A description that somebody puts beside another's is believed once its bytes have the digest.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::HeaderMap;
use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::OnceCell;
use tokio_util::io::StreamReader;
use uuid::Uuid;

use super::link::{Fault, Link};
use super::log::BODY;
use super::stream::{Stored, Stream};
use super::stream_config;
use crate::model::hex::hex;
use crate::model::output::{BlobRef, Media};
use crate::model::time::Timestamp;
use crate::transport::{Blobs, Error, Result};

/// How large a chunk is; the server's limit may ask for smaller ones.
const CHUNK: usize = 128 << 10;
/// What a message has besides its body, at most.
const HEADERS_MAX: usize = 16 << 10;
/// How many chunks are under way at once.
const WINDOW: usize = 16;
/// How many chunks are read at once.
const READ_AHEAD: usize = 8;
/// Says which chunk a message is, so that ranges are found.
const NUMBER: &str = "Lattice-Chunk";
/// How many descriptions of one blob are looked at.
const DESCRIPTIONS_MAX: usize = 16;
/// How many blobs' descriptions are remembered.
const KNOWN_MAX: usize = 1024;
/// What the server says when a stream is full.
const FULL: [u64; 3] = [10_077, 10_047, 10_023];

/// The blobs of one lattice.
pub(super) struct NatsBlobs {
    link: Arc<Link>,
    max_age: Duration,
    stream: OnceCell<Arc<Stream>>,
    known: Mutex<HashMap<String, Arc<Meta>>>,
}

/// What the store says of an object, in the form of NATS.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Meta {
    name: String,
    #[serde(default)]
    description: String,
    bucket: String,
    nuid: String,
    size: u64,
    chunks: usize,
    mtime: String,
    digest: String,
    #[serde(default)]
    options: serde_json::Value,
    #[serde(default)]
    metadata: HashMap<String, String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    deleted: bool,
}

impl Meta {
    fn first(&self) -> u64 {
        self.metadata.get("first").and_then(|text| text.parse().ok()).unwrap_or(1)
    }

    fn age(&self, now: Timestamp) -> Duration {
        self.mtime.parse().map_or(Duration::MAX, |at| now.since(at))
    }

    fn chunk_size(&self) -> u64 {
        self.options["max_chunk_size"].as_u64().filter(|size| *size > 0).unwrap_or(CHUNK as u64)
    }
}

impl NatsBlobs {
    pub(super) fn new(link: &Arc<Link>, max_age: Duration) -> Self {
        Self { link: Arc::clone(link), max_age, stream: OnceCell::new(), known: Mutex::default() }
    }

    pub(super) async fn stream(&self) -> Result<&Arc<Stream>> {
        let make = || async {
            let (link, wire) = (&self.link, &self.link.wire);
            let max_bytes = i64::try_from(link.settings.blob_max_bytes.get()).unwrap_or(-1);
            let mut config = stream_config(link, wire.blob_stream(), &wire.blob_subjects(), self.max_age, max_bytes);
            config["discard"] = "new".into();
            Stream::ensure(link, config).await
        };
        self.stream.get_or_try_init(make).await
    }

    /// The largest body of a message.
    fn inline_max(&self) -> usize {
        let server = self.link.client.max_payload().saturating_sub(HEADERS_MAX).max(1024);
        self.link.settings.body_inline_max.as_usize().min(server)
    }

    /// Keeps a body small enough for a message: a larger one becomes a blob that the headers name.
    pub(super) async fn pack(&self, headers: &mut HeaderMap, body: Bytes) -> Result<Bytes> {
        if body.len() <= self.inline_max() {
            return Ok(body);
        }
        let blob = self.put(&mut &body[..], Media::Json).await?;
        headers.insert(BODY, blob.sha256.as_str());
        Ok(Bytes::new())
    }

    /// The body of a message that was packed.
    pub(super) async fn unpack(&self, stored: &Stored) -> Result<Bytes> {
        let Some(sha256) = stored.header(BODY) else { return Ok(stored.body.clone()) };
        let mut body = Vec::new();
        let mut reader = self.open(sha256, 0..u64::MAX).await?;
        let read = reader.read_to_end(&mut body).await;
        read.map_err(|error| Error::Store(format!("the body {sha256} of a message cannot be read: {error}").into()))?;
        Ok(body.into())
    }

    async fn meta(&self, sha256: &str) -> Result<Arc<Meta>> {
        // The server may have dropped by age what was put long ago, or have it anew.
        match self.known(sha256).filter(|meta| self.is_young(meta)) {
            Some(meta) => Ok(meta),
            None => self.found(sha256).await,
        }
    }

    /// The description of a blob, as the server has it now.
    async fn found(&self, sha256: &str) -> Result<Arc<Meta>> {
        let missing = || Error::NoBlob(sha256.to_owned());
        if sha256.len() != 64 || !sha256.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Err(missing());
        }
        let stream = self.stream().await?;
        let subject = self.link.wire.blob(sha256);
        let last = stream.last(&subject).await.map_err(|fault| stream.explain(fault))?;
        let last = last.ok_or_else(|| {
            self.all_known().remove(sha256);
            missing()
        })?;
        let mut doubt = match self.checked(stream, sha256, &last).await? {
            Ok(meta) => return Ok(meta),
            Err(doubt) => doubt,
        };
        // Somebody's description leads nowhere: those before it may be good.
        let mut before = stream.page(Some(&subject), 0, DESCRIPTIONS_MAX).await?.messages;
        while let Some(stored) = before.pop() {
            match self.checked(stream, sha256, &stored).await? {
                Ok(meta) => return Ok(meta),
                Err(other) => doubt = other,
            }
        }
        Err(doubt)
    }

    /// A description whose bytes have the digest; else what is wrong with it.
    async fn checked(&self, stream: &Arc<Stream>, sha256: &str, stored: &Stored) -> Result<std::result::Result<Arc<Meta>, Error>> {
        let Some(meta) = serde_json::from_slice::<Meta>(&stored.body).ok().filter(|meta| !meta.deleted && meta.name == sha256) else {
            return Ok(Err(Error::NoBlob(sha256.to_owned())));
        };
        // Its bytes have been looked at before.
        if let Some(known) = self.known(sha256).filter(|known| known.nuid == meta.nuid) {
            return Ok(Ok(known));
        }
        let meta = Arc::new(meta);
        let mut reading = self.reading(Arc::clone(stream), &meta, 0..meta.size);
        let mut hash = Sha256::new();
        let read = loop {
            match reading.next().await {
                Ok(Some(bytes)) => hash.update(&bytes),
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        match read {
            Err(error) => match error.downcast::<Error>() {
                Ok(error @ (Error::Unreachable(_) | Error::Unanswered(_) | Error::Denied(_) | Error::Closed)) => Err(error),
                Ok(error) => Ok(Err(error)),
                Err(error) => Ok(Err(Error::Store(error.to_string().into()))),
            },
            Ok(()) if hex(&hash.finalize()) == sha256 => {
                self.know(&meta);
                Ok(Ok(meta))
            }
            Ok(()) => Ok(Err(Error::Store(format!("blob {sha256} holds other bytes than its digest says").into()))),
        }
    }

    fn known(&self, sha256: &str) -> Option<Arc<Meta>> {
        self.all_known().get(sha256).cloned()
    }

    fn all_known(&self) -> MutexGuard<'_, HashMap<String, Arc<Meta>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the server keeps it about as long as what is put now.
    fn is_young(&self, meta: &Meta) -> bool {
        let kept = self.stream.get().and_then(|stream| stream.max_age).unwrap_or(Duration::MAX).min(self.max_age);
        meta.age(self.link.now()) < kept / 4
    }

    fn know(&self, meta: &Arc<Meta>) {
        let mut known = self.all_known();
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        known.insert(meta.name.clone(), Arc::clone(meta));
    }

    fn reading(&self, stream: Arc<Stream>, meta: &Arc<Meta>, range: Range<u64>) -> Reading {
        let number = range.start / meta.chunk_size();
        Reading {
            subject: self.link.wire.chunks(&meta.nuid),
            // Chunks that are under way together may land in any order.
            after: meta.first().saturating_add(number).saturating_sub(WINDOW as u64 + 1),
            number,
            place: range.start,
            end: range.end,
            ready: BTreeMap::new(),
            stream,
            meta: Arc::clone(meta),
        }
    }

    fn explain(&self, stream: &Stream, fault: Fault) -> Error {
        match fault {
            Fault::Api(error) if FULL.contains(&error.err_code) => Error::Store(
                format!(
                    "the lattice's store of large values is full ({}): raise lattice.nats.blob_max_bytes on the stream {}, or the server's limits",
                    error.description, stream.name
                )
                .into(),
            ),
            fault => stream.explain(fault),
        }
    }

    /// Uploads all bytes of a source.
    async fn upload(&self, stream: &Arc<Stream>, upload: &str, source: &mut (dyn AsyncRead + Unpin + Send)) -> Result<Uploaded> {
        let chunk_size = CHUNK.min(self.inline_max());
        let subject = self.link.wire.chunks(upload);
        let mut hash = Sha256::new();
        let (mut size, mut chunks, mut first) = (0u64, 0usize, u64::MAX);
        let mut under_way = FuturesUnordered::new();
        loop {
            let mut chunk = BytesMut::with_capacity(chunk_size);
            while chunk.len() < chunk_size {
                let left = chunk_size - chunk.len();
                let read = source.take(left as u64).read_buf(&mut chunk).await;
                let read = read.map_err(|error| Error::Store(format!("what is to be stored cannot be read: {error}").into()))?;
                if read == 0 {
                    break;
                }
            }
            let is_last = chunk.len() < chunk_size;
            if !chunk.is_empty() {
                hash.update(&chunk);
                size += chunk.len() as u64;
                let mut headers = HeaderMap::new();
                headers.insert("Nats-Msg-Id", format!("{upload}.{chunks}").as_str());
                headers.insert(NUMBER, chunks.to_string().as_str());
                chunks += 1;
                let (stream, subject, chunk) = (Arc::clone(stream), subject.clone(), chunk.freeze());
                under_way.push(async move { stream.publish(&subject, headers, chunk).await });
            }
            while under_way.len() >= WINDOW || (is_last && !under_way.is_empty()) {
                if let Some(published) = under_way.next().await {
                    first = first.min(published.map_err(|fault| self.explain(stream, fault))?.seq);
                }
            }
            if is_last {
                return Ok(Uploaded { digest: hash.finalize().into(), size, chunks, first, chunk_size });
            }
        }
    }

    /// Takes back what was uploaded, as far as these credentials may: else it goes by age.
    async fn forget(&self, stream: &Stream, upload: &str) {
        if let Err(fault) = stream.api("STREAM.PURGE", &json!({ "filter": self.link.wire.chunks(upload) })).await {
            tracing::debug!(%fault, upload, "what was uploaded in vain stays until its age ends");
        }
    }
}

struct Uploaded {
    digest: [u8; 32],
    size: u64,
    chunks: usize,
    first: u64,
    chunk_size: usize,
}

#[async_trait]
impl Blobs for NatsBlobs {
    async fn put(&self, source: &mut (dyn AsyncRead + Unpin + Send), media: Media) -> Result<BlobRef> {
        let stream = self.stream().await?;
        // Its own station's name keeps it apart, so that permissions can.
        let upload = format!("{}.{}", self.link.station, Uuid::new_v4().simple());
        let uploaded = match self.upload(stream, &upload, source).await {
            Ok(uploaded) => uploaded,
            Err(error) => {
                self.forget(stream, &upload).await;
                return Err(error);
            }
        };
        let sha256 = hex(&uploaded.digest);
        let blob = BlobRef { sha256: sha256.clone(), size: uploaded.size, media };
        // What is there already must not end long before what is put now would.
        if self.is_fresh(&sha256).await.unwrap_or(false) {
            self.forget(stream, &upload).await;
            return Ok(blob);
        }
        let meta = Meta {
            name: sha256.clone(),
            description: String::new(),
            bucket: self.link.wire.blob_store(),
            nuid: upload,
            size: uploaded.size,
            chunks: uploaded.chunks,
            mtime: self.link.now().to_string(),
            digest: format!("SHA-256={}", URL_SAFE.encode(uploaded.digest)),
            options: json!({ "max_chunk_size": uploaded.chunk_size }),
            metadata: HashMap::from([("first".to_owned(), uploaded.first.to_string())]),
            deleted: false,
        };
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", meta.nuid.as_str());
        let body = Bytes::from(serde_json::to_vec(&meta).unwrap_or_default());
        stream.publish(&self.link.wire.blob(&sha256), headers, body).await.map_err(|fault| self.explain(stream, fault))?;
        self.know(&Arc::new(meta));
        Ok(blob)
    }

    async fn open(&self, sha256: &str, range: Range<u64>) -> Result<Box<dyn AsyncRead + Unpin + Send>> {
        let meta = self.meta(sha256).await?;
        let stream = Arc::clone(self.stream().await?);
        let (start, end) = (range.start.min(meta.size), range.end.min(meta.size));
        if start >= end {
            return Ok(Box::new(tokio::io::empty()));
        }
        let reading = self.reading(stream, &meta, start..end);
        let chunks = futures_util::stream::try_unfold(reading, |mut reading| async move {
            Ok::<_, std::io::Error>(reading.next().await?.map(|chunk| (chunk, reading)))
        });
        Ok(Box::new(StreamReader::new(Box::pin(chunks))))
    }

    async fn size(&self, sha256: &str) -> Result<u64> {
        Ok(self.meta(sha256).await?.size)
    }

    async fn is_fresh(&self, sha256: &str) -> Result<bool> {
        match self.found(sha256).await {
            Ok(meta) => Ok(self.is_young(&meta)),
            // What cannot be read is put anew.
            Err(Error::NoBlob(_) | Error::Store(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// A range on its way out of the store.
struct Reading {
    stream: Arc<Stream>,
    meta: Arc<Meta>,
    subject: String,
    after: u64,
    /// The chunk that comes next.
    number: u64,
    /// The byte that comes next.
    place: u64,
    end: u64,
    /// Chunks that have come, by their numbers.
    ready: BTreeMap<u64, Bytes>,
}

impl Reading {
    async fn next(&mut self) -> std::io::Result<Option<Bytes>> {
        if self.place >= self.end {
            return Ok(None);
        }
        loop {
            let (name, number) = (&self.meta.name, self.number);
            let Some(chunk) = self.ready.remove(&number) else {
                let page = self.stream.page(Some(&self.subject), self.after, READ_AHEAD).await.map_err(std::io::Error::other)?;
                if page.messages.is_empty() || self.ready.len() > WINDOW * 2 {
                    return Err(std::io::Error::other(format!("chunk {number} of blob {name} is gone from the store")));
                }
                for chunk in page.messages {
                    self.after = chunk.seq;
                    // Other programs leave the numbers out, and write one chunk after the other.
                    let counted = chunk.header(NUMBER).and_then(|text| text.parse::<u64>().ok());
                    let next = self.ready.last_key_value().map_or(number, |(last, _)| last + 1);
                    let counted = counted.unwrap_or(next);
                    if counted >= number {
                        self.ready.entry(counted).or_insert(chunk.body);
                    }
                }
                continue;
            };
            let begins = number * self.meta.chunk_size();
            let from = usize::try_from(self.place - begins).unwrap_or(usize::MAX);
            let to = usize::try_from(self.end - begins).unwrap_or(usize::MAX).min(chunk.len());
            if from >= to {
                return Err(std::io::Error::other(format!("chunk {number} of blob {name} is too short")));
            }
            let bytes = chunk.slice(from..to);
            self.number += 1;
            self.place += bytes.len() as u64;
            return Ok(Some(bytes));
        }
    }
}
