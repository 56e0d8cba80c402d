//! Refused requests: one shape, that a person, a script and an MCP client can read.

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use serde_json::json;

use crate::model::access::Scope;

/// A request that is refused: a JSON-RPC error without an id, as MCP asks for, that says what to do.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    code: i32,
    message: String,
    headers: Vec<(HeaderName, HeaderValue)>,
    cause: Cause,
}

/// JSON-RPC's code of a request that is not well-formed or not allowed.
const INVALID_REQUEST: i32 = -32600;
const PARSE_ERROR: i32 = -32700;
const INTERNAL_ERROR: i32 = -32603;
/// What MCP's own SDKs use for an unknown session.
const NO_SESSION: i32 = -32001;

impl Refusal {
    fn new(status: StatusCode, cause: Cause, message: impl Into<String>) -> Self {
        Self { status, code: INVALID_REQUEST, message: message.into(), headers: Vec::new(), cause }
    }

    fn header(mut self, name: HeaderName, value: &'static str) -> Self {
        self.headers.push((name, HeaderValue::from_static(value)));
        self
    }

    fn challenge(mut self, challenge: &str) -> Self {
        // What a header cannot carry is left out by whoever writes challenges.
        if let Ok(value) = HeaderValue::from_str(challenge) {
            self.headers.push((WWW_AUTHENTICATE, value));
        }
        self
    }

    fn code(mut self, code: i32) -> Self {
        self.code = code;
        self
    }

    pub(super) fn bad_host(why: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, Cause::Host, format!("{why}: send exactly one Host header that names this server"))
    }

    pub(super) fn host(host: &str) -> Self {
        let message = format!("{host:?} is not a name of this server: call it by another name, or add this one to http.allowed_hosts");
        Self::new(StatusCode::FORBIDDEN, Cause::Host, message)
    }

    pub(super) fn origin(origin: &str) -> Self {
        let message =
            format!("pages of origin {origin:?} may not call this server: add it to http.allowed_origins (--allow-origin) if they should");
        Self::new(StatusCode::FORBIDDEN, Cause::Origin, message)
    }

    pub(super) fn no_token(challenge: &Challenge) -> Self {
        let message = "this server needs a token: send the header \"Authorization: Bearer TOKEN\" (a token in the address is not accepted)";
        Self::new(StatusCode::UNAUTHORIZED, Cause::Credentials, message).challenge(&challenge.plain())
    }

    pub(super) fn wrong_token(challenge: &Challenge) -> Self {
        let message = "the token is not this server's: send the one of its http.token, LATTICE_HTTP_TOKEN or --token-file, \
                       or one of its http.tokens_file";
        Self::new(StatusCode::UNAUTHORIZED, Cause::Credentials, message)
            .challenge(&challenge.error("invalid_token", "the token is not known here"))
    }

    /// A token of an issuer that does not count, and why.
    pub(super) fn bad_token(challenge: &Challenge, why: &str) -> Self {
        let message = format!("the token does not count here: {why}; get a new one and try again");
        Self::new(StatusCode::UNAUTHORIZED, Cause::Credentials, message).challenge(&challenge.error("invalid_token", why))
    }

    /// The issuer's keys are not there to check a token with.
    pub(super) fn no_keys() -> Self {
        let message = "tokens cannot be checked at present, because their issuer's keys cannot be had: try again in a moment";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, Cause::Issuer, message).header(RETRY_AFTER, "10").code(INTERNAL_ERROR)
    }

    pub(super) fn no_room() -> Self {
        let message = "large requests that are still arriving take all the room there is: try again in a moment, or raise http.bodies_max";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, Cause::Size, message)
            .header(RETRY_AFTER, "5")
            .header(CONNECTION, "close")
            .code(INTERNAL_ERROR)
    }

    pub(super) fn token_in_address() -> Self {
        let message = "a token stands in the address, where logs and histories keep it: send it in the Authorization header only, and \
                       have this one replaced";
        Self::new(StatusCode::BAD_REQUEST, Cause::Credentials, message)
    }

    pub(super) fn scope(challenge: &Challenge, needed: Scope) -> Self {
        let message = format!("this request needs the scope {needed}, which the token does not have: ask for one that has it");
        Self::new(StatusCode::FORBIDDEN, Cause::Scope, message).challenge(&challenge.scope(needed))
    }

    pub(super) fn too_fast(whose: &str, key: &str) -> Self {
        let message = format!("too many requests {whose}: wait a second and try again, or raise {key}");
        Self::new(StatusCode::TOO_MANY_REQUESTS, Cause::Rate, message).header(RETRY_AFTER, "1")
    }

    pub(super) fn too_many_streams(max: u32, key: &str) -> Self {
        let message = format!("{max} streams of notifications are open already: close some of them, or raise {key}");
        Self::new(StatusCode::TOO_MANY_REQUESTS, Cause::Streams, message).header(RETRY_AFTER, "10")
    }

    /// The session is somebody else's; to whoever asks it does not exist.
    pub(super) fn others_session() -> Self {
        Self { cause: Cause::Session, ..Self::no_session() }
    }

    pub(super) fn method(allowed: &'static str) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, Cause::Method, format!("this method is not served here: use {allowed}"))
            .header(ALLOW, allowed)
    }

    pub(super) fn nothing_at(path: &str) -> Self {
        let path: String = path.chars().take(200).collect();
        Self::new(
            StatusCode::NOT_FOUND,
            Cause::Path,
            format!("nothing is served at {path:?}: MCP is at /mcp, the server's health at /health"),
        )
    }

    pub(super) fn too_large(max: u64) -> Self {
        let message = format!("the request is larger than {max} bytes: send less, or raise http.body_max");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, Cause::Size, message).header(CONNECTION, "close")
    }

    pub(super) fn stalled() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, Cause::Body, "the request's body did not arrive in time: send it again")
            .header(CONNECTION, "close")
    }

    pub(super) fn broken_off() -> Self {
        Self::new(StatusCode::BAD_REQUEST, Cause::Body, "the request's body broke off: send it again").header(CONNECTION, "close")
    }

    pub(super) fn no_json(why: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, Cause::Message, format!("the body is no JSON ({why}): send one JSON-RPC message"))
            .code(PARSE_ERROR)
    }

    pub(super) fn batch() -> Self {
        Self::new(StatusCode::BAD_REQUEST, Cause::Message, "batches are no longer part of MCP: send one JSON-RPC message per request")
    }

    pub(super) fn no_message() -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            Cause::Message,
            "the body is no JSON-RPC message of MCP: send an object with jsonrpc, method and params",
        )
    }

    pub(super) fn no_session() -> Self {
        let message = "there is no such session, or it has ended: send initialize again, without Mcp-Session-Id";
        Self::new(StatusCode::NOT_FOUND, Cause::Gone, message).code(NO_SESSION)
    }

    pub(super) fn session_needed() -> Self {
        let message = "this request needs a session: send initialize first, and its Mcp-Session-Id header with every later request";
        Self::new(StatusCode::BAD_REQUEST, Cause::Gone, message)
    }

    pub(super) fn too_many_sessions(max: usize) -> Self {
        let message = format!("all {max} sessions are in use: try again later, end sessions with DELETE, or raise http.sessions_max");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, Cause::Sessions, message).header(RETRY_AFTER, "30")
    }

    pub(super) fn stopping() -> Self {
        let message = "this server is stopping: try again when it is back";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, Cause::Stopping, message).header(RETRY_AFTER, "5").header(CONNECTION, "close")
    }

    /// What rmcp answered as plain text, in our shape; its internals go to the log.
    pub(super) fn from_rmcp(status: StatusCode, text: &str) -> Self {
        match status {
            StatusCode::NOT_FOUND => Self::no_session(),
            StatusCode::BAD_REQUEST if text.contains("Session ID is required") => Self::session_needed(),
            StatusCode::METHOD_NOT_ALLOWED => Self::method("POST"),
            StatusCode::UNSUPPORTED_MEDIA_TYPE if text.starts_with("fail to deserialize") => Self::no_message(),
            _ if text.contains("Session not found") || text.contains("Session service terminated") => Self::no_session(),
            _ if status.is_server_error() => {
                tracing::error!(cause = text, "an MCP request failed");
                Self::new(status, Cause::Internal, "the server failed on this request: its log has the cause").code(INTERNAL_ERROR)
            }
            _ => Self::new(status, Cause::Message, text),
        }
    }

    /// Whether it asks for other credentials.
    pub(super) fn is_unauthorized(&self) -> bool {
        self.status == StatusCode::UNAUTHORIZED
    }

    /// Whether it says that a session does not exist.
    pub(super) fn is_gone(&self) -> bool {
        self.code == NO_SESSION
    }
}

/// What is wrong with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Cause {
    Host,
    Origin,
    Credentials,
    /// The issuer's keys are away.
    Issuer,
    Scope,
    /// It is somebody else's.
    Session,
    /// There is none, where one is needed.
    Gone,
    Rate,
    Connections,
    Streams,
    Sessions,
    Head,
    /// It is too large.
    Size,
    /// It did not arrive whole, or in time.
    Body,
    /// What arrived is no message of MCP.
    Message,
    Method,
    Path,
    Stopping,
    /// Nothing: the fault is ours.
    Internal,
}

impl Cause {
    /// The word for it in the lattice's log.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Origin => "origin",
            Self::Credentials => "credentials",
            Self::Scope => "scope",
            Self::Session => "session",
            Self::Rate => "rate",
            Self::Connections => "connections",
            Self::Streams => "streams",
            Self::Head => "head",
            Self::Issuer => "issuer",
            Self::Gone => "gone",
            Self::Sessions => "sessions",
            Self::Size => "size",
            Self::Body => "body",
            Self::Message => "message",
            Self::Method => "method",
            Self::Path => "path",
            Self::Stopping => "stopping",
            Self::Internal => "internal",
        }
    }
}

/// How a client learns which credentials are wanted (RFC 6750, RFC 9728).
#[derive(Debug, Clone, Default)]
pub(super) struct Challenge {
    /// Where the metadata of this server is, if an issuer's tokens count.
    pub(super) metadata: Option<String>,
    /// What stands before our scopes in the issuer's tokens.
    pub(super) prefix: String,
}

impl Challenge {
    fn plain(&self) -> String {
        let Some(metadata) = &self.metadata else { return "Bearer".to_owned() };
        format!("Bearer resource_metadata=\"{metadata}\", scope=\"{}\"", self.scopes(Scope::Assign))
    }

    fn error(&self, code: &str, why: &str) -> String {
        // A quoted string of RFC 6750 has neither quotes nor backslashes, and nothing but ASCII.
        let why: String = why.chars().filter(|c| matches!(c, ' '..='~') && !matches!(c, '"' | '\\')).take(200).collect();
        let mut text = format!("Bearer error=\"{code}\", error_description=\"{why}\"");
        if let Some(metadata) = &self.metadata {
            text += &format!(", resource_metadata=\"{metadata}\", scope=\"{}\"", self.scopes(Scope::Assign));
        }
        text
    }

    fn scope(&self, needed: Scope) -> String {
        let mut text = format!("Bearer error=\"insufficient_scope\", scope=\"{}\"", self.scopes(needed));
        if let Some(metadata) = &self.metadata {
            text += &format!(", resource_metadata=\"{metadata}\"");
        }
        text
    }

    /// A scope and those that it holds, as the issuer names them.
    fn scopes(&self, upto: Scope) -> String {
        let held = Scope::ALL.into_iter().filter(|scope| *scope <= upto);
        held.map(|scope| format!("{}{scope}", self.prefix)).collect::<Vec<_>>().join(" ")
    }
}

/// Why a response refuses; the door puts it into the log.
#[derive(Clone)]
pub(super) struct Said {
    pub(super) reason: String,
    pub(super) cause: Cause,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let body = json!({ "jsonrpc": "2.0", "error": { "code": self.code, "message": self.message } });
        let mut response = (self.status, body.to_string()).into_response();
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response.headers_mut().extend(self.headers);
        response.extensions_mut().insert(Said { reason: self.message, cause: self.cause });
        response
    }
}
