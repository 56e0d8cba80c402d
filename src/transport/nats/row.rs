//! What a message of a bucket says about a row: its key, whether it is there, and until when.

use std::time::Duration;

use async_nats::HeaderMap;
use uuid::Uuid;

use super::log::BODY;
use super::stream::Stored;
use crate::model::id::StationId;
use crate::model::time::Timestamp;
use crate::transport::subject::Place;
use crate::transport::{Bucket, Wire};

/// When the row expires, in milliseconds since 1970.
const EXPIRES: &str = "Lattice-Expires";
/// The key of a row whose subject has only a digest of it.
const KEY: &str = "Lattice-Key";
/// What tools of NATS call a removal.
const OPERATION: &str = "KV-Operation";
/// Knows a publish again.
pub(super) const ID: &str = "Nats-Msg-Id";
/// After how many seconds the server drops a message.
const TTL: &str = "Nats-TTL";
/// How long the server remembers a removal, for watchers that were away.
pub(super) const REMOVAL_KEPT: Duration = Duration::from_secs(24 * 3600);
/// The server drops an expired row this long after twice its time: clocks differ, and readers go by the header.
const MARGIN: Duration = Duration::from_secs(60);
/// Longer than this is for ever.
const TTL_MAX_S: u64 = 10 * 366 * 86_400;

/// A message of a bucket.
#[derive(Debug)]
pub(super) struct Cell {
    pub(super) key: String,
    pub(super) state: State,
}

/// What it makes of its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The row is there, until this moment if one is given.
    Live(Option<Timestamp>),
    /// The row is not there.
    Gone,
}

impl State {
    pub(super) fn is_live(self, now: Timestamp) -> bool {
        match self {
            Self::Live(expires) => expires.is_none_or(|at| at > now),
            Self::Gone => false,
        }
    }
}

impl Cell {
    /// Understands a message; nothing if it says nothing of a row. What is no row of ours counts as none, with a warning.
    pub(super) fn read(wire: &Wire, bucket: Bucket, stored: &Stored) -> Option<Self> {
        let warn = |why: &str| {
            let shown: String = stored.subject.chars().take(200).collect();
            tracing::warn!(bucket = bucket.name(), subject = shown, seq = stored.seq, why, "skipped a message of a bucket that is no row");
        };
        let gone = |key| Some(Self { key, state: State::Gone });
        let key = match wire.parse_row(bucket, &stored.subject, stored.header(KEY)) {
            Some(Place::Row(key)) => key,
            Some(Place::Number) => return None,
            Some(Place::Nobodys(key)) => {
                warn("it is in no station's place");
                return gone(key);
            }
            None => {
                warn("its subject is no key's");
                return None;
            }
        };
        if stored.headers.is_none() {
            warn("the server said it here, for somebody who named this as the place to answer");
            return gone(key);
        }
        if stored.header(OPERATION).is_some_and(|operation| operation != "PUT") || stored.header("Nats-Marker-Reason").is_some() {
            return gone(key);
        }
        let expires = stored.header(EXPIRES).map(|text| text.parse().map(Timestamp::from_millis));
        match expires.transpose() {
            Ok(expires) => Some(Self { key, state: State::Live(expires) }),
            Err(_) => {
                warn("its expiry is no time");
                gone(key)
            }
        }
    }
}

/// The headers that name a key, and the publish; every try needs its own.
pub(super) fn headers(wire: &Wire, bucket: Bucket, key: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(ID, Uuid::new_v4().simple().to_string().as_str());
    if let Some(long) = wire.long_key(bucket, key) {
        headers.insert(KEY, long.as_str());
    }
    headers
}

/// Lets a row expire, for readers and later for the server. In `agents` the server drops nothing:
/// what another station put before would be the newest again.
pub(super) fn expire(headers: &mut HeaderMap, bucket: Bucket, now: Timestamp, ttl: Duration) {
    headers.insert(EXPIRES, now.after(ttl).as_millis().to_string().as_str());
    if bucket != Bucket::Agents {
        drop_after(headers, ttl.saturating_mul(2).saturating_add(MARGIN));
    }
}

/// Makes a removal out of headers.
pub(super) fn remove(headers: &mut HeaderMap, droppable: bool) {
    headers.insert(OPERATION, "DEL");
    if droppable {
        drop_after(headers, REMOVAL_KEPT);
    }
}

fn drop_after(headers: &mut HeaderMap, span: Duration) {
    headers.insert(TTL, span.as_secs().clamp(1, TTL_MAX_S).to_string().as_str());
}

/// Takes over the headers that a packed body needs.
pub(super) fn carry(headers: &mut HeaderMap, packed: &HeaderMap) {
    if let Some(digest) = packed.get(BODY) {
        headers.insert(BODY, digest.as_str());
    }
}

/// A station's own message of `agents`.
pub(super) fn is_own(wire: &Wire, stored: &Stored, key: &str, station: &StationId) -> bool {
    stored.subject == wire.row(Bucket::Agents, key, station)
}
