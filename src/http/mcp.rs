//! `/mcp`: hands requests to rmcp, which serves both generations of clients, and watches over their answers.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::StreamExt as _;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName};
use http::request::Parts;
use http::{Method, StatusCode};
use rmcp::ServerHandler;
use rmcp::model::ProtocolVersion;
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use tokio::sync::Semaphore;
use tokio::task::JoinError;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::connection::Ends;
use super::guard::Guard;
use super::intake::{self, Look};
use super::rates::Hold;
use super::refusal::Refusal;
use super::sessions::{self, Entry, OPEN_MAX, Open, Sessions, Turn};
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
    room: Arc<Semaphore>,
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
            room: self.room.clone(),
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
        let room = Arc::new(intake::room(http.bodies_max));
        Self { rmcp, sessions, guard, needs, body_max: http.body_max.get(), room, limits: limits.clone(), ends }
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
        let body = match intake::read(&parts.headers, body, self.body_max, &self.limits, &self.room).await {
            Ok(body) => body,
            Err(unread) => return Ok(unread.into_response()),
        };
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
        let entry = match &session {
            Some(id) => Some(self.sessions.enter(id, who.as_ref()).await?),
            None => None,
        };
        let kind = if look.initialize || session.is_some() { Kind::Session } else { Kind::Request };
        let asked = Asked { parts, body, session, who, kind };
        let served = async {
            match entry {
                Some(Entry::Open(open)) => self.serve(asked, Some(open)).await,
                None if !look.initialize => self.serve(asked, None).await,
                // Goes on when the client hangs up: otherwise rmcp would have a session that nobody here knows, or half of one.
                Some(Entry::TakeUp(turn)) => ended(self.ends.calls.spawn(self.clone().take_up(asked, turn)).await),
                None => ended(self.ends.calls.spawn(self.clone().initialize(asked)).await),
            }
        };
        let (response, open) = tokio::select! {
            served = served => served?,
            // Whoever waited by a token that is taken away waits in vain.
            () = admitted.revoked.cancelled() => return Err(Refusal::wrong_token(&self.guard.challenge)),
        };
        Ok(self.watch(response, Held { _open: open, call, _stream: stream }, &admitted))
    }

    /// Opens a session.
    async fn initialize(self, asked: Asked) -> Result<Served, Refusal> {
        let who = asked.who.clone();
        let _joining = self.sessions.admit(who.as_ref()).await?;
        let (response, _) = timeout(OPEN_MAX, self.serve(asked, None)).await.map_err(|_| sessions::too_slow())??;
        let open = text(response.headers(), &SESSION_ID).map(|id| self.sessions.join(&id, false, who));
        Ok((response, open))
    }

    /// Takes a session up again that this process does not serve, as far as it is its caller's.
    async fn take_up(self, asked: Asked, _turn: Turn) -> Result<Served, Refusal> {
        let (session, who) = (asked.session.clone(), asked.who.clone());
        let id = session.unwrap_or_default();
        timeout(OPEN_MAX, self.sessions.is_kept_for(&id, who.as_ref())).await.map_err(|_| sessions::too_slow())??;
        // What rmcp has of it was not opened to the end.
        self.sessions.close(&id).await;
        let Ok(served) = timeout(OPEN_MAX, self.serve(asked, None)).await else {
            self.sessions.close(&id).await;
            return Err(sessions::too_slow());
        };
        // Also a request that is refused may have taken it up.
        let open = if self.sessions.serves(&id).await { Some(self.sessions.join(&id, true, who)) } else { None };
        served.map(|(response, _)| (response, open))
    }

    /// Has rmcp answer.
    async fn serve(&self, asked: Asked, open: Option<Open>) -> Result<Served, Refusal> {
        let Asked { mut parts, body, session, who, kind } = asked;
        let ended = (parts.method == Method::DELETE).then(|| session.clone()).flatten();
        if let Some(id) = session.as_deref().filter(|_| parts.method == Method::GET) {
            self.listen_on(id, &mut parts.headers);
        }
        let served = self.rmcp.handle(Request::from_parts(parts, Body::from(body)));
        let response = sessions::WHO.scope(who, KIND.scope(kind, served)).await.map(Body::new);
        let mut response = reword(response).await.inspect_err(|refusal| {
            if let Some(id) = session.as_deref().filter(|_| refusal.is_gone()) {
                self.sessions.forget(id);
            }
        })?;
        let Some(id) = ended else { return Ok((response, open)) };
        drop(open);
        self.sessions.forget(&id);
        // It is over, not merely taken note of: clients take 202 for a failure.
        if response.status() == StatusCode::ACCEPTED {
            *response.status_mut() = StatusCode::NO_CONTENT;
        }
        Ok((response, None))
    }

    /// What rmcp leaves out: listening on from before a restart.
    fn listen_on(&self, id: &str, headers: &mut HeaderMap) {
        // The events of before a restart are gone, and are counted anew. A client that asks for those after one of them might get a
        // stream that ends at once; without the question it gets one that goes on.
        let of_session = |id: String| !id.contains('/');
        if text(headers, &LAST_EVENT_ID).is_some_and(of_session) && self.sessions.is_from_before(id) {
            headers.remove(LAST_EVENT_ID);
        }
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

/// A request that is let in.
struct Asked {
    parts: Parts,
    body: Bytes,
    session: Option<String>,
    who: Option<Principal>,
    kind: Kind,
}

/// An answer, and its hold on its session.
type Served = (Response, Option<Open>);

fn ended(task: Result<Result<Served, Refusal>, JoinError>) -> Result<Served, Refusal> {
    task.unwrap_or_else(|error| Err(Refusal::from_rmcp(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string())))
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
