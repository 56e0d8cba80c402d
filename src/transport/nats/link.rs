//! The connection to the server, and what can go wrong with a request.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::{Client, HeaderMap, Message, RequestErrorKind};
use bytes::Bytes;
use serde_json::Value;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{OnceCell, Semaphore, broadcast, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Options;
use super::connect::Denial;
use super::pages::{Answers, Pages};
use super::stream::ApiError;
use crate::config;
use crate::model::id::StationId;
use crate::model::time::Timestamp;
use crate::transport::local::Clock;
use crate::transport::{Error, Wire};

/// How many atomic batches are under way at once; the server takes 50 for a stream.
const BATCHES_MAX: usize = 16;

/// The connection of one process to a lattice.
pub(super) struct Link {
    pub(super) client: Client,
    pub(super) wire: Wire,
    pub(super) station: StationId,
    pub(super) settings: config::Nats,
    pub(super) clock: Clock,
    pub(super) batches: Semaphore,
    /// Counts moments after which something may have been missed.
    pub(super) interruptions: watch::Receiver<u64>,
    /// Tells of everything that these credentials may not do.
    pub(super) denials: broadcast::Sender<Denial>,
    pub(super) background: Background,
    pages: OnceCell<Pages>,
}

/// What runs in the background, and ends with a transport.
#[derive(Debug, Clone, Default)]
pub(super) struct Background {
    pub(super) tasks: TaskTracker,
    pub(super) cancel: CancellationToken,
}

/// Why a request came to nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum Fault {
    /// No answer: it may or may not have been done.
    #[error("{0}")]
    Silent(String),
    /// These credentials may not do it: nothing was done.
    #[error(
        "these credentials may not publish to {0}: give the station's user the permission, or another user (lattice.nats.auth); \
             with an embedded server, `lattice-mcp station add NAME --full` on its machine makes one that may assign"
    )]
    Denied(Arc<str>),
    /// There is no connection: nothing was sent.
    #[error("{0}")]
    Away(Arc<str>),
    /// The server answered with an error.
    #[error("the server says: {} (code {})", .0.description, .0.err_code)]
    Api(ApiError),
    /// The server answered with something else.
    #[error("the server says: {0}")]
    Answer(String),
    /// Nobody serves the subject.
    #[error("nothing on the server serves this: it is missing, or JetStream is off")]
    NoResponders,
    /// What is sent is larger than the server takes.
    #[error("larger than the server takes in one message: {0}")]
    TooLarge(String),
    /// The transport is closed.
    #[error("the transport is closed")]
    Closed,
}

impl Fault {
    /// Another process changed what this one expected.
    pub(super) fn is_conflict(&self) -> bool {
        matches!(self, Self::Api(error) if matches!(error.err_code, 10071 | 10164))
    }

    /// These credentials may not do it, now or later.
    pub(super) fn is_denied(&self) -> bool {
        match self {
            Self::Denied(_) => true,
            Self::Api(error) => matches!(error.code, 401 | 403),
            _ => false,
        }
    }

    pub(super) fn about(self, what: &str) -> Error {
        match self {
            Self::Away(text) => Error::Unreachable(text),
            Self::Denied(_) => Error::Denied(format!("{what}: {self}").into()),
            Self::Silent(text) => Error::Unanswered(format!("{what}: {text}").into()),
            Self::Closed => Error::Closed,
            other => Error::Store(format!("{what}: {other}").into()),
        }
    }
}

impl Link {
    pub(super) fn new(client: Client, options: &Options, background: Background) -> Arc<Self> {
        let Options { lattice, station, settings, clock, interruptions, denials, .. } = options.clone();
        let (wire, batches, pages) = (Wire::new(lattice), Semaphore::new(BATCHES_MAX), OnceCell::new());
        Arc::new(Self { client, wire, station, settings, clock, batches, interruptions, denials, background, pages })
    }

    pub(super) fn now(&self) -> Timestamp {
        (self.clock)()
    }

    fn patience(&self) -> Duration {
        self.settings.request_timeout.get()
    }

    /// Nothing is sent into the void: what waits for a reconnect could be done much later than anybody expects.
    pub(super) fn check_connected(&self) -> Result<(), Fault> {
        match self.client.connection_state() {
            async_nats::connection::State::Connected => Ok(()),
            _ => Err(Fault::Away("the NATS server cannot be reached now; this station keeps trying".into())),
        }
    }

    /// How often the connection has been made.
    pub(super) fn connects(&self) -> u64 {
        self.client.statistics().connects.load(Ordering::Relaxed)
    }

    /// Waits for an answer, but not beyond an interruption of the connection, which may have swallowed it.
    pub(super) async fn answered<T>(&self, subject: &str, answer: impl Future<Output = T>) -> Result<T, Fault> {
        let mut interruptions = self.interruptions.clone();
        interruptions.mark_unchanged();
        let mut denials = self.denials.subscribe();
        let denied = async {
            loop {
                match denials.recv().await {
                    Ok(Denial::Publish(denied)) if *denied == *subject => return denied,
                    // Who has missed some finds out by the silence.
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        let connects = self.connects();
        let (mut answer, mut denied) = (std::pin::pin!(answer), std::pin::pin!(denied));
        let mut patience = std::pin::pin!(tokio::time::sleep(self.patience()));
        loop {
            tokio::select! {
                answer = &mut answer => return Ok(answer),
                denied = &mut denied => return Err(Fault::Denied(denied)),
                () = &mut patience => {
                    return Err(Fault::Silent(format!("the NATS server did not answer within {:?}", self.patience())));
                }
                // What one reader had no room for is no answer of ours: only another connection is.
                Ok(()) = interruptions.changed() => if self.connects() != connects || self.check_connected().is_err() {
                    return Err(Fault::Silent("the connection to the NATS server was interrupted".into()));
                },
            }
        }
    }

    /// A request with one answer.
    pub(super) async fn call(&self, subject: String, headers: Option<HeaderMap>, body: Bytes) -> Result<Message, Fault> {
        self.check_connected()?;
        let mut request = async_nats::Request::new().payload(body).timeout(None);
        if let Some(headers) = headers {
            request = request.headers(headers);
        }
        self.answered(&subject, self.client.send_request(subject.clone(), request)).await?.map_err(|error| match error.kind() {
            RequestErrorKind::NoResponders => Fault::NoResponders,
            RequestErrorKind::MaxPayloadExceeded => Fault::TooLarge(error.to_string()),
            _ => Fault::Silent(error.to_string()),
        })
    }

    /// Listens for up to so many answers to one request.
    pub(super) async fn listen(&self, count: usize) -> Result<Answers, Fault> {
        let background = &self.background;
        let pages = self.pages.get_or_try_init(|| Pages::open(&self.client, &background.tasks, background.cancel.clone())).await;
        Ok(pages.map_err(|error| Fault::Silent(error.to_string()))?.listen(count))
    }

    /// A request to JetStream's API.
    pub(super) async fn api(&self, subject: &str, body: &Value) -> Result<Value, Fault> {
        let body = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
        let answer = self.call(format!("$JS.API.{subject}"), None, body).await?;
        let mut answer: Value = serde_json::from_slice(&answer.payload).map_err(|error| Fault::Answer(format!("garbage: {error}")))?;
        match answer.get_mut("error").map(Value::take).and_then(|error| serde_json::from_value(error).ok()) {
            Some(error) => Err(Fault::Api(error)),
            None => Ok(answer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_refusal_means_that_something_may_not_be_done() {
        let api = |code: u16| {
            Fault::Api(serde_json::from_value(serde_json::json!({ "code": code, "err_code": 1, "description": "no" })).unwrap())
        };
        assert!(Fault::Denied("x".into()).is_denied() && api(401).is_denied() && api(403).is_denied());
        for fault in [Fault::Silent("lost".into()), Fault::Away("away".into()), Fault::NoResponders, api(500), api(503)] {
            assert!(!fault.is_denied(), "{fault}");
        }
    }
}
