//! `/mcp`: hands requests to rmcp, which serves both generations of clients, and watches over their answers.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt as _;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName};
use http::{Method, StatusCode};
use rmcp::ServerHandler;
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::connection::Ends;
use super::intake::{self, Look};
use super::refusal::Refusal;
use super::sessions::{Open, Sessions};
use super::{Kind, Limits, Make};
use crate::config;

const SESSION_ID: HeaderName = HeaderName::from_static("mcp-session-id");
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// rmcp's refusals are short texts.
const REFUSAL_MAX: usize = 64 * 1024;

tokio::task_local! {
    /// For whom rmcp makes a server now: its factory is not told, but is called on the request's own task.
    static KIND: Kind;
}

/// The MCP endpoint.
pub(super) struct Mcp<S> {
    rmcp: StreamableHttpService<S, LocalSessionManager>,
    sessions: Arc<Sessions>,
    body_max: u64,
    limits: Limits,
    ends: Ends,
}

impl<S> Clone for Mcp<S> {
    fn clone(&self) -> Self {
        Self {
            rmcp: self.rmcp.clone(),
            sessions: self.sessions.clone(),
            body_max: self.body_max,
            limits: self.limits.clone(),
            ends: self.ends.clone(),
        }
    }
}

impl<S: ServerHandler> Mcp<S> {
    pub(super) fn new(make: Make<S>, sessions: Arc<Sessions>, http: &config::Http, limits: &Limits, ends: Ends) -> Self {
        let mut config = StreamableHttpServerConfig::default()
            // The door has checked these already, and says more.
            .disable_allowed_hosts()
            .disable_allowed_origins()
            .with_sse_retry(None)
            .with_max_request_body_bytes(http.body_max.as_usize())
            .with_cancellation_token(ends.servers.clone());
        config.session_store = Some(sessions.store());
        let factory = move || Ok(make(KIND.try_with(|kind| *kind).unwrap_or(Kind::Request)));
        let rmcp = StreamableHttpService::new(factory, sessions.manager.clone(), config);
        Self { rmcp, sessions, body_max: http.body_max.get(), limits: limits.clone(), ends }
    }

    pub(super) async fn handle(self, request: Request) -> Response {
        self.answer(request).await.unwrap_or_else(IntoResponse::into_response)
    }

    async fn answer(&self, request: Request) -> Result<Response, Refusal> {
        if !matches!(*request.method(), Method::GET | Method::POST | Method::DELETE) {
            return Err(Refusal::method("GET, POST, DELETE"));
        }
        if self.ends.requests.is_cancelled() {
            return Err(Refusal::stopping());
        }
        let (mut parts, body) = request.into_parts();
        let body = intake::read(&parts.headers, body, self.body_max, &self.limits).await?;
        let look = if parts.method == Method::POST { intake::look(&body)? } else { Look::default() };
        let session = text(&parts.headers, &SESSION_ID).filter(|_| !look.modern);

        let lasting = parts.method == Method::GET || look.listen;
        let call = (!lasting).then(|| self.ends.calls.token());
        let joining = if look.initialize && session.is_none() { Some(self.sessions.admit().await?) } else { None };
        let open = session.as_deref().and_then(|id| self.sessions.open(id));
        if let Some(id) = &session {
            self.before(&parts.method, id, &mut parts.headers).await?;
        }
        let kind = if look.initialize || session.is_some() { Kind::Session } else { Kind::Request };
        let ended = (parts.method == Method::DELETE).then(|| session.clone()).flatten();

        let request = Request::from_parts(parts, Body::from(body));
        let response = KIND.scope(kind, self.rmcp.handle(request)).await.map(Body::new);
        let response = reword(response).await.inspect_err(|refusal| {
            if let Some(id) = session.as_deref().filter(|_| refusal.is_gone()) {
                self.sessions.forget(id);
            }
        })?;
        if let Some(id) = ended {
            drop(open);
            self.sessions.forget(&id);
            // It is over, not merely taken note of: clients take 202 for a failure.
            let mut response = response;
            if response.status() == StatusCode::ACCEPTED {
                *response.status_mut() = StatusCode::NO_CONTENT;
            }
            return Ok(response);
        }
        let (from_before, id) = (session.is_some(), session.or_else(|| text(response.headers(), &SESSION_ID)));
        let open = open.or_else(|| id.map(|id| self.sessions.join(&id, from_before)));
        drop(joining);
        Ok(self.watch(response, open, call))
    }

    /// What rmcp leaves out: ending a session that does not exist, and listening on from before a restart.
    async fn before(&self, method: &Method, id: &str, headers: &mut HeaderMap) -> Result<(), Refusal> {
        if *method == Method::DELETE && !self.sessions.exists(id).await {
            return Err(Refusal::no_session());
        }
        // The events of before a restart are gone, and are counted anew. A client that asks for those after one of them might get a
        // stream that ends at once; without the question it gets one that goes on.
        let of_session = |id: String| !id.contains('/');
        if *method == Method::GET && text(headers, &LAST_EVENT_ID).is_some_and(of_session) && self.sessions.is_from_before(id) {
            headers.remove(LAST_EVENT_ID);
        }
        Ok(())
    }

    /// Keeps the session in use, and the server from stopping, for as long as the answer streams.
    fn watch(&self, response: Response, open: Option<Open>, call: Option<TaskTrackerToken>) -> Response {
        let streams = response.headers().get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
        if !streams {
            return response;
        }
        let cut = if call.is_none() { self.ends.streams.clone() } else { CancellationToken::new() };
        response.map(|body| {
            let stream = body.into_data_stream().take_until(cut.cancelled_owned());
            Body::from_stream(stream.map(move |part| {
                let _held = (&open, &call);
                part
            }))
        })
    }
}

fn text(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// rmcp refuses in plain text.
async fn reword(response: Response) -> Result<Response, Refusal> {
    let status = response.status();
    let json = response.headers().get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/json"));
    if json || !(status.is_client_error() || status.is_server_error()) {
        return Ok(response);
    }
    let body = axum::body::to_bytes(response.into_body(), REFUSAL_MAX).await.unwrap_or_default();
    Err(Refusal::from_rmcp(status, &String::from_utf8_lossy(&body)))
}
