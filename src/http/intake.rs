//! Taking in a request's body within bounds, and a first look at it.

use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use http::{HeaderMap, header};
use rmcp::model::{ProtocolVersion, RequestMetaObject};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout, timeout_at};

use super::Limits;
use super::refusal::Refusal;
use crate::model::access::Scope;
use crate::model::size::Size;

/// How much of a body that is too large is read and thrown away, so that the client gets to read the refusal.
const WASTE_FACTOR: u64 = 4;
const WASTE_TIME: Duration = Duration::from_secs(5);

/// How much of a body needs no room of the budget: ordinary messages get in also when large ones have used it up.
const FREE: usize = 16 * 1024;
/// How long a body waits for room: it holds room itself, so that two might wait for each other.
const ROOM_WAIT: Duration = Duration::from_secs(2);
const KIB: usize = 1024;

/// The room for all bodies that are being read, in KiB.
pub(super) fn room(all: Size) -> Semaphore {
    Semaphore::new((all.as_usize() / KIB).min(Semaphore::MAX_PERMITS))
}

/// Why a body is not taken in.
pub(super) enum Unread {
    /// The request is refused.
    Refused(Refusal),
    /// The bodies of others take all the room.
    NoRoom,
}

impl From<Refusal> for Unread {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl IntoResponse for Unread {
    fn into_response(self) -> Response {
        match self {
            Self::Refused(refusal) => refusal,
            Self::NoRoom => Refusal::no_room(),
        }
        .into_response()
    }
}

/// Reads a body of at most `max` bytes, as far as there is `room` for it.
pub(super) async fn read(headers: &HeaderMap, body: Body, max: u64, limits: &Limits, room: &Semaphore) -> Result<Bytes, Unread> {
    let mut stream = body.into_data_stream();
    let waits = headers.contains_key(header::EXPECT);
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > max) {
        if !waits {
            waste(&mut stream, max).await;
        }
        return Err(Refusal::too_large(max).into());
    }
    let end = Instant::now() + limits.body_total;
    let mut whole = BytesMut::new();
    let mut held = None;
    loop {
        let next = timeout_at(end, timeout(limits.body_stall, stream.next())).await;
        match next.map_err(|_| Refusal::stalled())?.map_err(|_| Refusal::stalled())? {
            None => return Ok(whole.freeze()),
            Some(Err(_)) => return Err(Refusal::broken_off().into()),
            Some(Ok(part)) if (whole.len() + part.len()) as u64 > max => {
                drop((whole, held));
                waste(&mut stream, max).await;
                return Err(Refusal::too_large(max).into());
            }
            Some(Ok(part)) if make_room(&mut held, whole.len() + part.len(), room).await => whole.extend_from_slice(&part),
            Some(Ok(_)) => {
                drop((whole, held));
                waste(&mut stream, max).await;
                return Err(Unread::NoRoom);
            }
        }
    }
}

/// Holds enough room for a body of this length; false when there is none for a while.
async fn make_room<'a>(held: &mut Option<SemaphorePermit<'a>>, length: usize, room: &'a Semaphore) -> bool {
    let needed = length.saturating_sub(FREE).div_ceil(KIB);
    let missing = needed.saturating_sub(held.as_ref().map_or(0, SemaphorePermit::num_permits));
    if missing == 0 {
        return true;
    }
    let Ok(Ok(more)) = timeout(ROOM_WAIT, room.acquire_many(u32::try_from(missing).unwrap_or(u32::MAX))).await else { return false };
    match held {
        Some(held) => held.merge(more),
        None => *held = Some(more),
    }
    true
}

async fn waste(stream: &mut axum::body::BodyDataStream, max: u64) {
    let mut left = max.saturating_mul(WASTE_FACTOR);
    let _ = timeout(WASTE_TIME, async {
        while let Some(Ok(part)) = stream.next().await {
            left = left.saturating_sub(part.len() as u64);
            if left == 0 {
                return;
            }
        }
    })
    .await;
}

/// What of a message decides how it is served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Look {
    /// It opens a session.
    pub(super) initialize: bool,
    /// It carries its protocol version.
    pub(super) versioned: bool,
    /// It is a newer client's request, by what it carries: sessions mean nothing to it.
    pub(super) modern: bool,
    /// Its answer is a stream that lasts as long as the client listens.
    pub(super) listen: bool,
    /// What its sender must be allowed to do.
    pub(super) needs: Option<Scope>,
}

#[derive(Deserialize)]
struct Message<'a> {
    id: Option<IgnoredAny>,
    #[serde(borrow)]
    method: Option<std::borrow::Cow<'a, str>>,
    params: Option<Params>,
}

#[derive(Deserialize)]
struct Params {
    #[serde(rename = "_meta")]
    meta: Option<RequestMetaObject>,
    name: Option<Value>,
}

/// Looks at a message; whether it is one of MCP's is left to rmcp. `needs` knows which scope a method and its tool need.
pub(super) fn look(body: &[u8], needs: fn(&str, Option<&str>) -> Scope) -> Result<Look, Refusal> {
    match serde_json::from_slice::<Message<'_>>(body) {
        Ok(message) => {
            let method = message.method.as_deref();
            let (meta, name) = message.params.map_or((None, None), |params| (params.meta, params.name));
            let initialize = method == Some("initialize");
            // Only what rmcp takes for a request has a version of its own.
            let meta = meta.filter(|_| method.is_some() && !initialize && message.id.is_some());
            let version = meta.as_ref().and_then(RequestMetaObject::protocol_version);
            let is_whole = meta.is_some_and(|meta| meta.missing_required_keys(&ProtocolVersion::NO_INITIALIZE).is_empty());
            // What has no method answers a question of ours.
            let needed = method.map_or(Scope::Assign, |method| needs(method, name.as_ref().and_then(Value::as_str)));
            Ok(Look {
                initialize,
                versioned: version.is_some(),
                modern: is_whole || version.is_some_and(|version| !version.has_initialize()),
                listen: method == Some("subscriptions/listen"),
                needs: Some(needed),
            })
        }
        Err(error) if !error.is_data() => Err(Refusal::no_json(&error.to_string())),
        Err(_) if body.trim_ascii_start().starts_with(b"[") => Err(Refusal::batch()),
        Err(_) => Err(Refusal::no_message()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn needs(_: &str, tool: Option<&str>) -> Scope {
        if tool == Some("assign_work") { Scope::Assign } else { Scope::Read }
    }

    #[test]
    fn a_message_shows_how_it_is_served() {
        let look = |text: &str| look(text.as_bytes(), needs).unwrap();
        assert!(look(r#"{"id":1,"method":"initialize","params":{"_meta":{}}}"#).initialize);
        let with_meta = |start: &str, meta: &str| look(&format!(r#"{{{start},"params":{{"_meta":{{{meta}}}}}}}"#));
        let version = |version: &str| format!(r#""io.modelcontextprotocol/protocolVersion":{version}"#);
        let of_now = version(r#""2026-07-28""#);
        let (request, of_old) = (r#""id":1,"method":"tools/call""#, version(r#""2025-11-25""#));
        assert!(with_meta(request, &of_now).modern && with_meta(request, &of_now).versioned);
        assert!(with_meta(request, &format!(r#"{of_old},"io.modelcontextprotocol/clientCapabilities":{{}}"#)).modern);
        for (start, meta) in [
            (request, &of_old),
            (request, &version("7")),
            (r#""id":1,"method":"initialize""#, &of_now),
            (r#""method":"notifications/cancelled""#, &of_now),
            (r#""id":null,"method":"notifications/cancelled""#, &of_now),
            (r#""id":1,"result":{}"#, &of_now),
        ] {
            assert!(!with_meta(start, meta).modern, "{start} {meta}");
        }
        assert!(look(r#"{"method":"subscriptions/listen"}"#).listen);
        assert_eq!(look(r#"{"id":1,"result":{}}"#), Look { needs: Some(Scope::Assign), ..Look::default() });
        assert_eq!(look(r#"{"method":"tools/call","params":{"name":"assign_work"}}"#).needs, Some(Scope::Assign));
        assert_eq!(look(r#"{"method":"tools/call","params":{"name":[7]}}"#).needs, Some(Scope::Read));
    }

    fn sent(parts: Vec<usize>, then: impl Future<Output = ()> + Send + 'static) -> Body {
        let parts = futures_util::stream::iter(parts).map(|length| Ok::<_, std::io::Error>(Bytes::from(vec![b' '; length])));
        let end = futures_util::stream::once(then).filter_map(|()| std::future::ready(None));
        Body::from_stream(parts.chain(end))
    }

    #[tokio::test(start_paused = true)]
    async fn bodies_that_stand_still_take_no_more_than_the_room_and_small_ones_get_in() {
        let config = config::Http::default();
        let (limits, max, all) = (Limits::new(&config, None), config.body_max.get(), room(Size::kib(64)));
        let none = HeaderMap::new();
        let take = |body| read(&none, body, max, &limits, &all);
        let start = Instant::now();
        // One has half of the room, and two want the other half and a little more: each of the two has what the other waits for.
        let (still, one, two, small) = tokio::join!(
            take(sent(vec![FREE + 32 * KIB], std::future::pending())),
            take(sent(vec![FREE + 16 * KIB, KIB], std::future::pending())),
            take(sent(vec![FREE + 16 * KIB, KIB], std::future::pending())),
            take(sent(vec![FREE], std::future::ready(()))),
        );
        assert!(matches!(still, Err(Unread::Refused(_))));
        assert_eq!([&one, &two].iter().filter(|read| matches!(read, Err(Unread::NoRoom))).count(), 1);
        assert_eq!(small.ok().map(|bytes| bytes.len()), Some(FREE));
        assert!(start.elapsed() < limits.body_stall + 2 * WASTE_TIME);
        assert_eq!(all.available_permits(), 64, "all is given back");
        assert_eq!(take(sent(vec![KIB; 64 + 16], std::future::ready(()))).await.ok().map(|bytes| bytes.len()), Some(80 * KIB));
        let response = Unread::NoRoom.into_response();
        assert_eq!(response.status(), http::StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers().get(header::RETRY_AFTER).unwrap(), "5");
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let twice = r#"{"method":"tools/call","params":{"name":"check_work","name":"assign_work"}}"#;
        for text in ["", "{", "[1,", "[]", "7", r#"{"method":3}"#, twice] {
            assert!(look(text.as_bytes(), needs).is_err(), "{text}");
        }
    }
}
