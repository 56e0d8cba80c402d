//! Taking in a request's body within bounds, and a first look at it.

use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use http::{HeaderMap, header};
use rmcp::model::{ProtocolVersion, RequestMetaObject};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use tokio::time::{Instant, timeout, timeout_at};

use super::Limits;
use super::refusal::Refusal;
use crate::model::access::Scope;

/// How much of a body that is too large is read and thrown away, so that the client gets to read the refusal.
const WASTE_FACTOR: u64 = 4;
const WASTE_TIME: Duration = Duration::from_secs(5);

/// Reads a body of at most `max` bytes.
pub(super) async fn read(headers: &HeaderMap, body: Body, max: u64, limits: &Limits) -> Result<Bytes, Refusal> {
    let mut stream = body.into_data_stream();
    let waits = headers.contains_key(header::EXPECT);
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > max) {
        if !waits {
            waste(&mut stream, max).await;
        }
        return Err(Refusal::too_large(max));
    }
    let end = Instant::now() + limits.body_total;
    let mut whole = BytesMut::new();
    loop {
        let next = timeout_at(end, timeout(limits.body_stall, stream.next())).await;
        match next.map_err(|_| Refusal::stalled())?.map_err(|_| Refusal::stalled())? {
            None => return Ok(whole.freeze()),
            Some(Err(_)) => return Err(Refusal::broken_off()),
            Some(Ok(part)) if (whole.len() + part.len()) as u64 > max => {
                waste(&mut stream, max).await;
                return Err(Refusal::too_large(max));
            }
            Some(Ok(part)) => whole.extend_from_slice(&part),
        }
    }
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

    #[test]
    fn what_is_no_message_is_refused() {
        let twice = r#"{"method":"tools/call","params":{"name":"check_work","name":"assign_work"}}"#;
        for text in ["", "{", "[1,", "[]", "7", r#"{"method":3}"#, twice] {
            assert!(look(text.as_bytes(), needs).is_err(), "{text}");
        }
    }
}
