//! `/mcp`: hands requests to rmcp, which serves both generations of clients, and watches over their answers.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt as _;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName};
use http::{Method, StatusCode};
use rmcp::ServerHandler;
use rmcp::model::ProtocolVersion;
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::connection::Ends;
use super::guard::Guard;
use super::intake::{self, Look};
use super::rates::Hold;
use super::refusal::Refusal;
use super::sessions::{self, Open, Sessions};
use super::tokens::Admitted;
use super::{Kind, Limits, Make};
use crate::config;
use crate::model::access::{Principal, Scope};
use crate::telemetry::now;

const SESSION_ID: HeaderName = HeaderName::from_static("mcp-session-id");
const PROTOCOL_VERSION: HeaderName = HeaderName::from_static("mcp-protocol-version");
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
    guard: Arc<Guard>,
    needs: fn(&str, Option<&str>) -> Scope,
    body_max: u64,
    limits: Limits,
    ends: Ends,
}

impl<S> Clone for Mcp<S> {
    fn clone(&self) -> Self {
        Self {
            rmcp: self.rmcp.clone(),
            sessions: self.sessions.clone(),
            guard: self.guard.clone(),
            needs: self.needs,
            body_max: self.body_max,
            limits: self.limits.clone(),
            ends: self.ends.clone(),
        }
    }
}

impl<S: ServerHandler> Mcp<S> {
    pub(super) fn new(
        make: Make<S>,
        needs: fn(&str, Option<&str>) -> Scope,
        sessions: Arc<Sessions>,
        guard: Arc<Guard>,
        http: &config::Http,
        limits: &Limits,
        ends: Ends,
    ) -> Self {
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
        Self { rmcp, sessions, guard, needs, body_max: http.body_max.get(), limits: limits.clone(), ends }
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
        let admitted = parts.extensions.get::<Admitted>().cloned().ok_or_else(|| Refusal::no_token(&self.guard.challenge))?;
        if !admitted.access.allows(Scope::Read) {
            return Err(Refusal::scope(&self.guard.challenge, Scope::Read));
        }
        let body = intake::read(&parts.headers, body, self.body_max, &self.limits).await?;
        let look = if parts.method == Method::POST { intake::look(&body, self.needs)? } else { Look::default() };
        if let Some(needed) = look.needs.filter(|needed| !admitted.access.allows(*needed)) {
            return Err(Refusal::scope(&self.guard.challenge, needed));
        }
        // rmcp goes by the header where the message says nothing. What it serves without a session shall not name one either.
        let by_header = text(&parts.headers, &PROTOCOL_VERSION).is_some_and(|version| *version >= *ProtocolVersion::NO_INITIALIZE.as_str());
        if look.modern || (by_header && !look.initialize && !look.versioned) {
            parts.headers.remove(SESSION_ID);
        }
        let session = text(&parts.headers, &SESSION_ID);

        let lasting = parts.method == Method::GET || look.listen;
        let call = (!lasting).then(|| self.ends.calls.token());
        let stream = if lasting { Some(self.guard.stream(&admitted.access)?) } else { None };
        let who = admitted.access.principal.clone();
        let joining = if look.initialize && session.is_none() { Some(self.sessions.admit(who.as_ref()).await?) } else { None };
        if session.as_deref().is_some_and(|id| self.sessions.is_others(id, who.as_ref())) {
            return Err(Refusal::others_session());
        }
        let open = session.as_deref().and_then(|id| self.sessions.open(id));
        if let Some(id) = &session {
            sessions::WHO.scope(who.clone(), self.before(&parts.method, id, &mut parts.headers)).await?;
        }
        let kind = if look.initialize || session.is_some() { Kind::Session } else { Kind::Request };
        let ended = (parts.method == Method::DELETE).then(|| session.clone()).flatten();

        let request = Request::from_parts(parts, Body::from(body));
        let served = sessions::WHO.scope(who.clone(), KIND.scope(kind, self.rmcp.handle(request)));
        let response = tokio::select! {
            response = served => response.map(Body::new),
            // Whoever waited by a token that is taken away waits in vain.
            () = admitted.revoked.cancelled() => return Err(Refusal::wrong_token(&self.guard.challenge)),
        };
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
        let open = open.or_else(|| id.map(|id| self.sessions.join(&id, from_before, who)));
        drop(joining);
        Ok(self.watch(response, Held { _open: open, call, _stream: stream }, &admitted))
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

    /// Keeps the session in use, and the server from stopping, for as long as the answer streams; whoever is not let in any more
    /// hears no more of it.
    fn watch(&self, response: Response, held: Held, admitted: &Admitted) -> Response {
        let streams = response.headers().get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
        if !streams {
            return response;
        }
        let lasting = held.call.is_none();
        let cut = if lasting { self.ends.streams.clone() } else { CancellationToken::new() };
        let (revoked, until) = (admitted.revoked.clone(), admitted.until.filter(|_| lasting));
        let over = async move {
            let expired = async {
                match until {
                    Some(until) => tokio::time::sleep(until.since(now())).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = cut.cancelled() => {}
                () = revoked.cancelled() => {}
                () = expired => {}
            }
        };
        response.map(|body| {
            let stream = body.into_data_stream().take_until(Box::pin(over));
            Body::from_stream(stream.map(move |part| {
                let _held = &held;
                part
            }))
        })
    }
}

/// What an answer keeps while it streams.
struct Held {
    _open: Option<Open>,
    call: Option<TaskTrackerToken>,
    _stream: Option<Hold<Option<Principal>>>,
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
