//! One stream of a NATS server: published to with message ids, read by direct gets, and followed by what the server says again.
//!
//! There are no consumers: a consumer, or a request with somebody else's subject as its reply, would let a station of few rights
//! make the server speak for it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

use async_nats::{HeaderMap, HeaderName, HeaderValue, Message, StatusCode};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Mutex;

use super::link::{Fault, Link};
use crate::transport::{Error, Result};

/// How many messages are asked for at once.
pub(super) const PAGE_MAX: usize = 256;
/// How often a publish without an answer is repeated under its message id.
const TRIES: u32 = 3;
/// How long a follower waits until it asks a server again that is away.
pub(super) const AWAY_PAUSE: Duration = Duration::from_millis(250);
/// How long a replica that is behind is given to catch up.
const BEHIND: Duration = Duration::from_millis(50);
/// What the server says to a second maker of a stream.
const STREAM_EXISTS: u64 = 10058;
/// What it says when a stream's limit is more than it has left.
const NO_ROOM: u64 = 10047;
/// How often a cluster is asked for a stream that it has just made.
const AGREE_MAX: u32 = 20;
/// No stream is made smaller than this.
const BYTES_MIN: i64 = 16 << 20;
/// What it says when there is no such message.
const NO_MESSAGE: u64 = 10037;
/// What it says when there is no such stream.
const NO_STREAM: u64 = 10059;
/// What it says while the cluster's servers agree on who leads.
const NO_LEADER: u64 = 10008;
/// Stands for no connection: the stream is looked at again.
const LOOK_AGAIN: u64 = u64::MAX;
/// The header in which the server names the stream.
const STREAM: &str = "Nats-Stream";
/// All that it marks what it has stored with.
const MARKS: [&str; 3] = [STREAM, "Nats-Sequence", "Nats-Subject"];

/// A stored message.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) seq: u64,
    pub(super) subject: String,
    pub(super) headers: Option<Arc<HeaderMap>>,
    pub(super) body: Bytes,
}

impl Stored {
    /// A header's text.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.as_ref()?.get(name).map(async_nats::HeaderValue::as_str)
    }

    /// A message with the marks that the server puts on what it has stored, behind all that its sender wrote.
    ///
    /// Marks that stand twice are of something that the server itself said here, for somebody who named this as the place to
    /// answer, or somebody's forgery: it has its place among the messages, and says nothing.
    pub(super) fn read(stream: &str, message: Message) -> Option<Self> {
        let headers = message.headers?;
        let mark = |name: &str| headers.get_all(name).last().map(HeaderValue::as_str);
        (mark(STREAM)? == stream).then_some(())?;
        let (seq, subject) = (mark("Nats-Sequence")?.parse().ok()?, mark("Nats-Subject")?.to_owned());
        let is_forged = MARKS.iter().any(|name| headers.get_all(*name).count() > 1);
        let (headers, body) = if is_forged { (None, Bytes::new()) } else { (Some(Arc::new(headers)), message.payload) };
        Some(Self { seq, subject, headers, body })
    }
}

/// A message as the stream's leader gives it.
#[derive(Debug, Deserialize)]
struct Kept {
    seq: u64,
    subject: String,
    #[serde(default)]
    hdrs: String,
    #[serde(default)]
    data: String,
}

impl Kept {
    fn read(self) -> Option<Stored> {
        let text = String::from_utf8(STANDARD.decode(self.hdrs).ok()?).ok()?;
        let mut headers = HeaderMap::new();
        for line in text.split("\r\n").skip(1) {
            let Some((name, value)) = line.split_once(':') else { continue };
            headers.append(name.parse::<HeaderName>().ok()?, value.trim().parse::<HeaderValue>().ok()?);
        }
        // What is stored has no marks of its own.
        let is_forged = MARKS.iter().any(|name| headers.get(*name).is_some());
        let (headers, body) =
            if is_forged { (None, Bytes::new()) } else { (Some(Arc::new(headers)), Bytes::from(STANDARD.decode(self.data).ok()?)) };
        Some(Stored { seq: self.seq, subject: self.subject, headers, body })
    }
}

/// Some messages, and how many more the server has.
pub(super) struct Page {
    pub(super) messages: Vec<Stored>,
    pub(super) pending: u64,
}

/// What the server says of a publish.
#[derive(Debug, Deserialize)]
struct PublishAnswer {
    #[serde(default)]
    seq: u64,
    #[serde(default)]
    duplicate: bool,
    error: Option<ApiError>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct ApiError {
    pub(super) code: u16,
    #[serde(default)]
    pub(super) err_code: u64,
    #[serde(default)]
    pub(super) description: String,
}

/// A publish that the stream has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Published {
    pub(super) seq: u64,
    pub(super) duplicate: bool,
}

/// A stream.
pub(super) struct Stream {
    pub(super) link: Arc<Link>,
    pub(super) name: String,
    /// Direct gets are answered by any replica, which may be behind.
    replicated: bool,
    /// How long it keeps what it has, which is its operator's to say; not known of a stream that was not looked at.
    pub(super) max_age: Option<Duration>,
    /// What it is made with; nothing where it is only used.
    wanted: Option<Value>,
    /// When the stream was made that stands under the name.
    created: Mutex<String>,
    /// Which one of that name this is, of those that this process has known.
    life: AtomicU64,
    /// The last place that this process has seen.
    seen: AtomicU64,
    /// The connection on which it was looked at last.
    looked: AtomicU64,
    complained: Once,
}

impl Stream {
    /// A stream that is known to be there.
    pub(super) fn known(link: &Arc<Link>, name: String) -> Self {
        Self {
            link: Arc::clone(link),
            name,
            replicated: link.settings.replicas > 1,
            max_age: None,
            wanted: None,
            created: Mutex::default(),
            life: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            looked: AtomicU64::new(LOOK_AGAIN),
            complained: Once::new(),
        }
    }

    /// The stream, made if it is missing, and checked if it is there.
    pub(super) async fn ensure(link: &Arc<Link>, wanted: Value) -> Result<Arc<Self>> {
        let name = wanted["name"].as_str().unwrap_or_default().to_owned();
        let mut stream = Self::known(link, name);
        let (mut tries, connects) = (0, link.connects());
        let mut info = loop {
            tries += 1;
            let made = match stream.info().await {
                Err(Fault::Api(error)) if error.code == 404 => stream.create(&wanted).await,
                other => other,
            };
            match made {
                Ok(info) => break info,
                // The servers of a cluster do not learn at the same moment that it is there.
                Err(Fault::Api(error)) if error.code == 404 && stream.replicated => {
                    if tries == AGREE_MAX {
                        let text =
                            format!("the cluster's servers do not agree yet on the stream {}; this station keeps trying", stream.name);
                        return Err(Error::Unreachable(text.into()));
                    }
                    tokio::time::sleep(AWAY_PAUSE).await;
                }
                Err(fault) => return Err(stream.explain(fault)),
            }
        };
        let found = info["config"].take();
        stream.compare(&wanted, &found).await?;
        stream.replicated = found["num_replicas"].as_u64().is_some_and(|replicas| replicas > 1);
        stream.max_age = found["max_age"].as_u64().filter(|age| *age > 0).map(Duration::from_nanos);
        stream.created = Mutex::new(info["created"].as_str().unwrap_or_default().to_owned());
        stream.looked = AtomicU64::new(connects);
        stream.wanted = Some(wanted);
        Ok(Arc::new(stream))
    }

    /// Which of the streams of this name stands there, of those that this process has known. A server that comes back may have lost
    /// the stream, or the end of it: it is looked at once on each connection, and made anew if it is gone.
    pub(super) async fn life(&self) -> std::result::Result<u64, Fault> {
        let connects = self.link.connects();
        if self.looked.load(Ordering::Relaxed) != connects {
            // What was seen by now is there when it is asked for.
            let seen = self.seen.load(Ordering::Relaxed);
            let info = match self.info().await {
                Err(Fault::Api(error)) if error.code == 404 => self.make_again().await?,
                other => other?,
            };
            // Not before: whoever looks may be left in the middle, and would keep all others out.
            let mut created = self.created.lock().await;
            if self.looked.load(Ordering::Relaxed) == connects {
                return Ok(self.life.load(Ordering::Relaxed));
            }
            let is_other = info["created"].as_str().is_some_and(|at| at != *created);
            let is_shorter = info["state"]["last_seq"].as_u64().is_some_and(|last| last < seen);
            if is_other || is_shorter {
                info["created"].as_str().unwrap_or_default().clone_into(&mut created);
                self.seen.store(0, Ordering::Relaxed);
                self.life.fetch_add(1, Ordering::Relaxed);
            }
            self.looked.store(connects, Ordering::Relaxed);
        }
        Ok(self.life.load(Ordering::Relaxed))
    }

    /// As `life`, as far as is known without asking.
    pub(super) fn life_known(&self) -> u64 {
        self.life.load(Ordering::Relaxed)
    }

    /// Tells the stream from another one of its name.
    pub(super) async fn identity(&self) -> Result<String> {
        self.life().await.map_err(|fault| self.explain(fault))?;
        Ok(self.created.lock().await.clone())
    }

    /// Makes the stream anew that its server has lost.
    async fn make_again(&self) -> std::result::Result<Value, Fault> {
        let Some(wanted) = &self.wanted else { return Err(Fault::NoResponders) };
        match self.create(wanted).await {
            Err(fault) if fault.is_denied() => {
                let name = &self.name;
                let text = format!(
                    "the NATS server has lost the stream {name}, and these credentials may not make it again: \
                     run `lattice-mcp station` for this station with credentials that may; this station keeps trying"
                );
                self.complained.call_once(|| tracing::warn!("{text}"));
                Err(Fault::Away(text.into()))
            }
            made => {
                if made.is_ok() {
                    tracing::warn!(stream = self.name, "the NATS server has lost this stream; it is made anew, without what stood there");
                }
                made
            }
        }
    }

    /// Whether what nobody served can be tried again: the server had lost the stream, and has one now.
    async fn is_back(&self) -> std::result::Result<bool, Fault> {
        self.looked.store(LOOK_AGAIN, Ordering::Relaxed);
        match self.life().await {
            Ok(_) => Ok(true),
            Err(Fault::NoResponders) => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    fn saw(&self, seq: u64) {
        self.seen.fetch_max(seq, Ordering::Relaxed);
    }

    /// Makes the stream, unless somebody else is quicker; gives the settings that it has then.
    async fn create(&self, wanted: &Value) -> std::result::Result<Value, Fault> {
        let mut wanted = wanted.clone();
        let mut info = loop {
            let bytes = wanted["max_bytes"].as_i64().unwrap_or(-1);
            match self.api("STREAM.CREATE", &wanted).await {
                Err(Fault::Api(error)) if error.err_code == STREAM_EXISTS => break self.info().await,
                // The server sets aside all that a stream may take: a small disk gets a smaller one.
                Err(Fault::Api(error)) if error.err_code == NO_ROOM && bytes / 2 >= BYTES_MIN => {
                    tracing::info!(stream = self.name, bytes, "the server has no room for a stream of this size; asking for half");
                    wanted["max_bytes"] = (bytes / 2).into();
                }
                other => break other,
            }
        };
        if let Err(Fault::Api(error)) = &mut info
            && error.err_code == NO_ROOM
        {
            error.description += ": give the server's JetStream more room, or lower the lattice.nats settings that end in max_bytes";
        }
        info
    }

    /// What there is may differ in limits, which are its operator's; not in what our reading and writing stand on.
    async fn compare(&self, wanted: &Value, found: &Value) -> Result<()> {
        for key in ["subjects", "retention", "storage"] {
            if found[key] != wanted[key] {
                return Err(Error::Store(
                    format!(
                        "the stream {} exists with {key} {} and not {}: it was made by something else; remove it, or choose another lattice id",
                        self.name, found[key], wanted[key]
                    )
                    .into(),
                ));
            }
        }
        const NEEDED: [&str; 7] =
            ["republish", "allow_direct", "allow_atomic", "allow_msg_ttl", "deny_delete", "deny_purge", "max_msgs_per_subject"];
        let differs = |key: &&&str| !wanted[**key].is_null() && found[**key] != wanted[**key];
        let missing: Vec<&&str> = NEEDED.iter().filter(differs).collect();
        for key in ["max_age", "max_bytes", "num_replicas"] {
            if !wanted[key].is_null() && found[key] != wanted[key] {
                tracing::info!(stream = self.name, setting = key, found = %found[key], ours = %wanted[key], "the stream keeps the limit that it was made with");
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let mut update = found.clone();
        for key in &missing {
            update[**key] = wanted[**key].clone();
        }
        self.api("STREAM.UPDATE", &update).await.map(|_| ()).map_err(|fault| {
            Error::Store(
                format!(
                    "the stream {} exists with other settings ({}) and cannot be changed to what is needed: {fault}",
                    self.name,
                    missing.iter().map(|key| format!("{key} {} and not {}", found[**key], wanted[**key])).collect::<Vec<_>>().join(", ")
                )
                .into(),
            )
        })
    }

    /// The stream's settings and state.
    pub(super) async fn info(&self) -> std::result::Result<Value, Fault> {
        self.api("STREAM.INFO", &Value::Null).await
    }

    /// A request to the server about this stream, repeated when no answer comes: none does more when it is done twice.
    pub(super) async fn api(&self, verb: &str, body: &Value) -> std::result::Result<Value, Fault> {
        let subject = format!("{verb}.{}", self.name);
        let mut tries = 0;
        loop {
            tries += 1;
            match self.link.api(&subject, body).await {
                Err(fault @ Fault::Silent(_)) if tries < TRIES => tracing::debug!(%fault, subject, "asking again"),
                Err(fault) => return Err(self.meanwhile(fault)),
                Ok(answer) => return Ok(answer),
            }
        }
    }

    /// While the servers of a cluster agree on a stream's next leader nobody serves it, which is as good as being away: nothing was done.
    fn meanwhile(&self, fault: Fault) -> Fault {
        match fault {
            Fault::NoResponders if self.replicated => {}
            Fault::Api(error) if self.replicated && error.err_code == NO_LEADER => {}
            other => return other,
        }
        Fault::Away(format!("no server of the cluster serves the stream {} now; this station keeps trying", self.name).into())
    }

    pub(super) fn explain(&self, fault: Fault) -> Error {
        fault.about(&format!("the stream {}", self.name))
    }

    /// The sequence of the last message, as its leader has it.
    pub(super) async fn head(&self) -> Result<u64> {
        let info = match self.info().await {
            Err(Fault::Api(error)) if error.code == 404 && self.is_back().await.map_err(|fault| self.explain(fault))? => self.info().await,
            other => other,
        };
        Ok(info.map_err(|fault| self.explain(fault))?["state"]["last_seq"].as_u64().unwrap_or(0))
    }

    /// How far a reader must come to have seen all that was answered before; nothing when each answer shows that anyway.
    pub(super) async fn horizon(&self) -> Result<Option<u64>> {
        if self.replicated { self.head().await.map(Some) } else { Ok(None) }
    }

    /// Whether a reader that found nothing more after `at` asked a replica that is behind; waits a little if so.
    pub(super) async fn is_behind(&self, at: u64, horizon: Option<u64>) -> Result<bool> {
        let Some(horizon) = horizon.filter(|horizon| at < *horizon) else { return Ok(false) };
        let missed = self.kept(&json!({ "seq": horizon })).await.map_err(|fault| self.explain(fault))?.is_some();
        if missed {
            tokio::time::sleep(BEHIND).await;
        }
        Ok(missed)
    }

    /// Publishes under a message id; repeats it when no answer comes, since the server knows the id.
    pub(super) async fn publish(&self, subject: &str, headers: HeaderMap, body: Bytes) -> std::result::Result<Published, Fault> {
        let mut tries = 0;
        loop {
            tries += 1;
            let answer = self.link.call(subject.to_owned(), Some(headers.clone()), body.clone()).await;
            let published = answer.and_then(|answer| read_publish(&answer.payload));
            if matches!(published, Err(Fault::NoResponders)) && tries == 1 && self.is_back().await? {
                continue;
            }
            match published.map_err(|fault| self.meanwhile(fault)) {
                Ok(published) => {
                    self.saw(published.seq);
                    return Ok(published);
                }
                Err(fault @ Fault::Silent(_)) if tries < TRIES => tracing::debug!(%fault, stream = self.name, "publishing again"),
                // This try was not sent, but an earlier one was, and may have landed.
                Err(Fault::Away(reason)) if tries > 1 => return Err(Fault::Silent(reason.to_string())),
                failed => return failed,
            }
        }
    }

    /// Publishes several messages, all or nothing, one after the other.
    pub(super) async fn publish_all(&self, messages: Vec<(String, HeaderMap, Bytes)>) -> std::result::Result<Published, Fault> {
        let mut tries = 0;
        loop {
            tries += 1;
            let published = self.publish_batch(&messages).await;
            if matches!(published, Err(Fault::NoResponders)) && tries == 1 && self.is_back().await? {
                continue;
            }
            match published.map_err(|fault| self.meanwhile(fault)) {
                Err(fault @ Fault::Silent(_)) if tries < TRIES => {
                    tracing::debug!(%fault, stream = self.name, "publishing a batch again");
                    // It may have landed: a batch has no id that the server would know again.
                    match self.find(&messages).await {
                        Ok(Some(seq)) => return Ok(Published { seq, duplicate: true }),
                        Ok(None) => {}
                        Err(Fault::Away(reason)) => return Err(Fault::Silent(reason.to_string())),
                        Err(fault) => return Err(fault),
                    }
                }
                Err(Fault::Away(reason)) if tries > 1 => return Err(Fault::Silent(reason.to_string())),
                other => return other,
            }
        }
    }

    async fn publish_batch(&self, messages: &[(String, HeaderMap, Bytes)]) -> std::result::Result<Published, Fault> {
        let batch = uuid::Uuid::new_v4().to_string();
        let last = messages.len();
        let _turn = self.link.batches.acquire().await.map_err(|_| Fault::Closed)?;
        for (n, (subject, headers, body)) in messages.iter().enumerate() {
            let mut headers = headers.clone();
            headers.insert("Nats-Batch-Id", batch.as_str());
            headers.insert("Nats-Batch-Sequence", (n + 1).to_string().as_str());
            if n + 1 == last {
                headers.insert("Nats-Batch-Commit", "1");
                let answer = self.link.call(subject.clone(), Some(headers), body.clone()).await;
                return answer.and_then(|answer| read_publish(&answer.payload));
            }
            let sent = self.link.client.publish_with_headers(subject.clone(), headers, body.clone()).await;
            sent.map_err(|error| Fault::Silent(error.to_string()))?;
        }
        Err(Fault::Closed)
    }

    /// Where the last of these messages stands, if it does.
    async fn find(&self, messages: &[(String, HeaderMap, Bytes)]) -> std::result::Result<Option<u64>, Fault> {
        let Some((subject, headers, _)) = messages.last() else { return Ok(None) };
        let id = headers.get("Nats-Msg-Id").map(async_nats::HeaderValue::as_str);
        let last = self.last(subject).await?;
        Ok(last.filter(|stored| stored.header("Nats-Msg-Id") == id).map(|stored| stored.seq))
    }

    /// The last message of a subject, as of all publishes that were answered.
    pub(super) async fn last(&self, subject: &str) -> std::result::Result<Option<Stored>, Fault> {
        let body = json!({ "last_by_subj": subject });
        if self.replicated { self.kept(&body).await } else { self.get(&body).await }
    }

    /// A message as the leader has it.
    async fn kept(&self, body: &Value) -> std::result::Result<Option<Stored>, Fault> {
        let mut answer = match self.api("STREAM.MSG.GET", body).await {
            Ok(answer) => answer,
            Err(Fault::Api(error)) if error.err_code == NO_MESSAGE => return Ok(None),
            // There is nothing in one that has just been made.
            Err(Fault::Api(error)) if error.err_code == NO_STREAM && self.is_back().await? => return Ok(None),
            Err(fault) => return Err(fault),
        };
        let kept: Option<Kept> = serde_json::from_value(answer["message"].take()).ok();
        kept.and_then(Kept::read).map(Some).ok_or_else(|| Fault::Answer("a message was given as garbage".to_owned()))
    }

    /// The message at a sequence, as of all publishes that were answered.
    pub(super) async fn surely_at(&self, seq: u64) -> std::result::Result<Option<Stored>, Fault> {
        let body = json!({ "seq": seq });
        if self.replicated { self.kept(&body).await } else { self.get(&body).await }
    }

    /// The message at a sequence.
    pub(super) async fn at(&self, seq: u64) -> std::result::Result<Option<Stored>, Fault> {
        self.get(&json!({ "seq": seq })).await
    }

    async fn get(&self, body: &Value) -> std::result::Result<Option<Stored>, Fault> {
        let subject = format!("$JS.API.DIRECT.GET.{}", self.name);
        let mut tries = 0;
        loop {
            tries += 1;
            match self.link.call(subject.clone(), None, Bytes::from(body.to_string())).await {
                Ok(message) => match message.status {
                    None => return Ok(Stored::read(&self.name, message)),
                    Some(StatusCode::NOT_FOUND) => return Ok(None),
                    Some(status) => return Err(Fault::Answer(format!("{status} {}", message.description.unwrap_or_default()))),
                },
                Err(Fault::Silent(_)) if tries < TRIES => {}
                Err(Fault::NoResponders) if tries == 1 && self.is_back().await? => {}
                Err(fault) => return Err(self.meanwhile(fault)),
            }
        }
    }

    /// Up to so many messages after a sequence, in order.
    pub(super) async fn page(&self, filter: Option<&str>, after: u64, count: usize) -> Result<Page> {
        let mut tries = 0;
        loop {
            tries += 1;
            match self.page_once(filter, after, count).await {
                Ok(page) => {
                    self.saw(page.messages.last().map_or(0, |last| last.seq));
                    return Ok(page);
                }
                Err(Fault::Silent(_)) if tries < TRIES => {}
                Err(Fault::NoResponders) if tries == 1 && self.is_back().await.map_err(|fault| self.explain(fault))? => {}
                Err(fault) => return Err(self.explain(self.meanwhile(fault))),
            }
        }
    }

    async fn page_once(&self, filter: Option<&str>, after: u64, count: usize) -> std::result::Result<Page, Fault> {
        let link = &self.link;
        link.check_connected()?;
        let mut body = json!({ "seq": after.saturating_add(1), "batch": count.clamp(1, PAGE_MAX) });
        if let Some(filter) = filter {
            body["next_by_subj"] = filter.into();
        }
        // One more says that there are no more.
        let mut answers = link.listen(PAGE_MAX + 1).await?;
        let subject = format!("$JS.API.DIRECT.GET.{}", self.name);
        let sent = link.client.publish_with_reply(subject.clone(), answers.inbox.clone(), Bytes::from(body.to_string())).await;
        sent.map_err(|error| Fault::Silent(error.to_string()))?;
        let mut page = Page { messages: Vec::new(), pending: 0 };
        loop {
            let message = link.answered(&subject, answers.next()).await?.ok_or(Fault::Closed)?;
            match message.status {
                None => page.messages.extend(Stored::read(&self.name, message)),
                Some(StatusCode::NOT_FOUND) => return Ok(page),
                Some(StatusCode::NO_RESPONDERS) => return Err(Fault::NoResponders),
                Some(status) if status.as_u16() == 204 => {
                    let pending = message.headers.as_ref().and_then(|headers| headers.get("Nats-Num-Pending"));
                    page.pending = pending.and_then(|pending| pending.as_str().parse().ok()).unwrap_or(0);
                    return Ok(page);
                }
                Some(status) => return Err(Fault::Answer(format!("{status} {}", message.description.unwrap_or_default()))),
            }
        }
    }
}

fn read_publish(payload: &Bytes) -> std::result::Result<Published, Fault> {
    let answer: PublishAnswer =
        serde_json::from_slice(payload).map_err(|error| Fault::Answer(format!("a publish was answered with garbage: {error}")))?;
    match answer.error {
        Some(error) => Err(Fault::Api(error)),
        None => Ok(Published { seq: answer.seq, duplicate: answer.duplicate }),
    }
}
