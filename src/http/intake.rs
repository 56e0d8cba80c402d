//! Taking in a request's body within bounds, and a first look at it.

use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use http::{HeaderMap, header};
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
    /// It carries its protocol version, as newer clients do: sessions mean nothing to it.
    pub(super) modern: bool,
    /// Its answer is a stream that lasts as long as the client listens.
    pub(super) listen: bool,
    /// What its sender must be allowed to do.
    pub(super) needs: Option<Scope>,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    method: Option<std::borrow::Cow<'a, str>>,
    params: Option<Params>,
}

#[derive(Deserialize)]
struct Params {
    #[serde(rename = "_meta")]
    meta: Option<Meta>,
    name: Option<Value>,
}

#[derive(Deserialize)]
struct Meta {
    #[serde(rename = "io.modelcontextprotocol/protocolVersion")]
    version: Option<IgnoredAny>,
}

/// Looks at a message; whether it is one of MCP's is left to rmcp. `needs` knows which scope a method and its tool need.
pub(super) fn look(body: &[u8], needs: fn(&str, Option<&str>) -> Scope) -> Result<Look, Refusal> {
    match serde_json::from_slice::<Message<'_>>(body) {
        Ok(message) => {
            let method = message.method.as_deref();
            let (meta, name) = message.params.map_or((None, None), |params| (params.meta, params.name));
            let version = meta.and_then(|meta| meta.version);
            // What has no method answers a question of ours.
            let needed = method.map_or(Scope::Assign, |method| needs(method, name.as_ref().and_then(Value::as_str)));
            Ok(Look {
                initialize: method == Some("initialize"),
                modern: version.is_some() && method != Some("initialize"),
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
        assert!(look(r#"{"method":"tools/call","params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28"}}}"#).modern);
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
