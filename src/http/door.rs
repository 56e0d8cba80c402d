//! Who may come in: the names of this server, the origins of pages, and what may be asked how often.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::Authority;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use super::connection::Peer;
use super::guard::Guard;
use super::proxies::Proxies;
use super::rates::holder;
use super::refusal::{Refusal, Said};
use super::tokens::Admitted;
use super::told::Told;
use super::{Error, Health, Listen};
use crate::config;
use crate::model::access::Scope;

/// A host and perhaps a port, in lower case and without brackets.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Name {
    host: String,
    port: Option<u16>,
}

impl Name {
    fn parse(text: &str) -> Option<Self> {
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Some(Self { host: ip.to_string(), port: None });
        }
        let authority: Authority = text.parse().ok().filter(|_| !text.contains('@'))?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').trim_end_matches('.').to_ascii_lowercase();
        // What follows is a port or nothing; the parser lets anything pass there.
        let port = match text.strip_prefix(authority.host())?.strip_prefix(':') {
            None | Some("") if text.ends_with(':') || text.len() == authority.host().len() => None,
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => Some(digits.parse().ok()?),
            _ => return None,
        };
        (!host.is_empty()).then_some(Self { host, port })
    }
}

/// Scheme, host and port; a missing port is the scheme's own.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Origin {
    /// What browsers send for pages without an origin.
    Null,
    Of {
        scheme: String,
        name: Name,
    },
}

impl Origin {
    fn parse(text: &str) -> Option<Self> {
        if text == "null" {
            return Some(Self::Null);
        }
        let (scheme, rest) = text.split_once("://")?;
        let mut name = Name::parse(rest)?;
        let scheme = scheme.to_ascii_lowercase();
        name.port = name.port.or(match scheme.as_str() {
            "http" => Some(80),
            "https" => Some(443),
            _ => None,
        });
        Some(Self::Of { scheme, name })
    }
}

/// What is checked on every request.
pub(super) struct Rules {
    hosts: Vec<Name>,
    /// Bound to every interface: any address of this machine is its name. A page on the web can't make a browser send one.
    any_address: bool,
    origins: Vec<Origin>,
    /// How pages of this very server come.
    scheme: &'static str,
}

impl Rules {
    pub(super) fn new(config: &config::Http, listen: &Listen, address: SocketAddr) -> Result<Self, Error> {
        let mut hosts =
            vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned(), address.ip().to_string(), listen.host().to_owned()];
        hosts.retain(|host| !host.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified()));
        let mut hosts: Vec<_> = hosts.iter().filter_map(|host| Name::parse(host)).collect();
        hosts.extend(config.public_url.as_deref().and_then(host_of));
        for entry in &config.allowed_hosts {
            hosts.push(Name::parse(entry.trim()).ok_or_else(|| Error::Host(entry.clone()))?);
        }
        let origins = config.allowed_origins.iter().map(|entry| {
            let text = entry.trim().trim_end_matches('/');
            Origin::parse(text).ok_or_else(|| Error::Origin(entry.clone()))
        });
        let scheme = if config.tls.cert.is_some() { "https" } else { "http" };
        Ok(Self { hosts, any_address: address.ip().is_unspecified(), origins: origins.collect::<Result<_, _>>()?, scheme })
    }

    pub(super) fn host(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let mut given = headers.get_all(header::HOST).iter();
        let (Some(host), None) = (given.next(), given.next()) else {
            return Err(Refusal::bad_host("the Host header is missing or doubled"));
        };
        let text = host.to_str().map_err(|_| Refusal::bad_host("the Host header is not readable"))?;
        let name = Name::parse(text).ok_or_else(|| Refusal::bad_host("the Host header is not readable"))?;
        let known = self.hosts.iter().any(|ours| ours.host == name.host && ours.port.is_none_or(|port| name.port == Some(port)));
        let address = self.any_address && name.host.parse::<IpAddr>().is_ok();
        if known || address { Ok(()) } else { Err(Refusal::host(&cut(text))) }
    }

    /// The request's origin, if it has one and it is allowed. Pages of this very server are: their origin is the host that the
    /// request names, which has been checked.
    pub(super) fn origin(&self, headers: &HeaderMap) -> Result<Option<HeaderValue>, Refusal> {
        let mut given = headers.get_all(header::ORIGIN).iter();
        let Some(origin) = given.next() else { return Ok(None) };
        let text = origin.to_str().unwrap_or("not readable");
        let own = headers.get(header::HOST).and_then(|host| Origin::parse(&format!("{}://{}", self.scheme, host.to_str().ok()?)));
        let known = |origin: &Origin| self.origins.contains(origin) || own.as_ref() == Some(origin);
        let known = given.next().is_none() && Origin::parse(text).as_ref().is_some_and(known);
        if known { Ok(Some(origin.clone())) } else { Err(Refusal::origin(&cut(text))) }
    }
}

/// The name in an address of ours, at any port: what stands before us may add its own.
fn host_of(url: &str) -> Option<Name> {
    let (_, rest) = url.split_once("://")?;
    Name::parse(rest.trim_end_matches('/')).map(|name| Name { port: None, ..name })
}

fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}

/// The whole door.
pub(super) struct Door {
    pub(super) rules: Rules,
    pub(super) proxies: Proxies,
    pub(super) guard: Arc<Guard>,
    pub(super) told: Arc<Told>,
}

impl Door {
    /// Whoever comes by this request's credentials. Everybody may ask whether the server is well, and how to get credentials.
    async fn admit(&self, path: &str, headers: &HeaderMap, query: Option<&str>, from: Option<IpAddr>) -> Result<Option<Admitted>, Refusal> {
        let is_nameless = self.guard.asks() && !headers.contains_key(header::AUTHORIZATION);
        if (path == "/health" && is_nameless) || path.starts_with("/.well-known/") {
            return Ok(None);
        }
        self.guard.admit(headers, query, from).await.map(Some)
    }
}

/// Lets a request in, or says why not.
pub(super) async fn pass(State(door): State<Arc<Door>>, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let method = request.method().clone();
    let path = cut(request.uri().path());
    let peer = request.extensions().get::<Peer>().map(|Peer(at)| *at);
    let headers = request.headers();
    let from = peer.map(|at| door.proxies.client(at.ip(), headers));
    let address = from.map(holder);
    let asks = method == Method::OPTIONS && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);

    let mut who = None;
    let paced = address.map_or(Ok(()), |address| door.guard.pace(address));
    let known = door.rules.host(headers).and_then(|()| door.rules.origin(headers));
    let (mut response, origin) = match (paced, known) {
        // Also what is refused for something else counts, and a page of an allowed origin may read that it is to wait.
        (Err(refusal), known) => (refusal.into_response(), known.ok().flatten()),
        (Ok(()), Err(refusal)) => (refusal.into_response(), None),
        (Ok(()), Ok(Some(origin))) if asks => (preflight(headers), Some(origin)),
        (Ok(()), Ok(origin)) => match door.admit(&path, headers, request.uri().query(), address).await {
            Err(refusal) => (refusal.into_response(), origin),
            Ok(admitted) => {
                // Nobody further in has any use for it, and what is not there is in no log.
                request.headers_mut().remove(header::AUTHORIZATION);
                if let Some(admitted) = admitted {
                    who = admitted.access.principal.clone();
                    request.extensions_mut().insert(admitted.access.clone());
                    request.extensions_mut().insert(admitted);
                }
                (next.run(request).await, origin)
            }
        },
    };
    share(&mut response, origin.as_ref());

    let (status, ms) = (response.status().as_u16(), began.elapsed().as_millis());
    match response.extensions_mut().remove() {
        Some(Said { reason, cause }) => {
            if let Some(untold) = door.told.of(from, cause, who.as_ref()) {
                let who = who.as_ref().map(tracing::field::display);
                let client = from.filter(|from| peer.is_some_and(|at| at.ip() != *from)).map(tracing::field::display);
                tracing::warn!(status, %method, path, peer = ?peer, client, who, reason, untold, "refused an HTTP request");
            }
        }
        None => tracing::debug!(status, %method, path, ms, "answered an HTTP request"),
    }
    response
}

/// Lets a page of an allowed origin read the response.
fn share(response: &mut Response, origin: Option<&HeaderValue>) {
    let headers = response.headers_mut();
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("Mcp-Session-Id, WWW-Authenticate"));
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
    }
}

/// Tells a browser that a page of this origin may send its request. Newer clients send headers named after a tool's parameters
/// (`Mcp-Param-*`), so what the page asks for is what it gets.
fn preflight(asked: &HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, DELETE, OPTIONS"));
    if let Some(names) = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names.clone());
    }
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    headers.append(header::VARY, HeaderValue::from_static("Access-Control-Request-Headers"));
    let private = HeaderName::from_static("access-control-request-private-network");
    if asked.contains_key(private) {
        headers.insert(HeaderName::from_static("access-control-allow-private-network"), HeaderValue::from_static("true"));
    }
    response
}

/// What `/health` answers: how the lattice is to whoever may look at it, and whether this server is well to everybody else.
pub(super) fn health(health: &Health, admitted: Option<&Admitted>) -> Response {
    let mut answer = health();
    if let Value::Object(fields) = &mut answer {
        fields.entry("status").or_insert_with(|| json!("ok"));
        fields.entry("version").or_insert_with(|| json!(env!("CARGO_PKG_VERSION")));
        if !admitted.is_some_and(|admitted| admitted.access.allows(Scope::Read)) {
            fields.retain(|name, _| name == "status");
        }
    }
    ([(header::CACHE_CONTROL, "no-store")], Json(answer)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(config: &config::Http, listen: &str, address: &str) -> Rules {
        Rules::new(config, &listen.parse().unwrap(), address.parse().unwrap()).unwrap()
    }

    fn headers(name: HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn only_the_servers_own_names_are_hosts() {
        let config = config::Http { allowed_hosts: vec!["Lattice.example:8443".into(), "box".into()], ..Default::default() };
        let rules = rules(&config, ":8765", "127.0.0.1:8765");
        for host in ["localhost", "LOCALHOST:9", "127.0.0.1:8765", "[::1]:1", "lattice.example:8443", "box:1", "box.", "localhost.:80"] {
            assert!(rules.host(&headers(header::HOST, host)).is_ok(), "{host}");
        }
        for host in [
            "evil.example",
            "lattice.example",
            "lattice.example:1",
            "127.0.0.2",
            "10.0.0.1",
            "a@localhost",
            "[::1]workpass",
            "localhost.evil.example",
            "",
            ":1",
        ] {
            assert!(rules.host(&headers(header::HOST, host)).is_err(), "{host}");
        }
    }

    #[test]
    fn a_server_on_every_interface_goes_by_its_addresses() {
        let rules = rules(&config::Http::default(), "0.0.0.0:1", "0.0.0.0:1");
        assert!(rules.host(&headers(header::HOST, "192.168.1.5:1")).is_ok());
        assert!(rules.host(&headers(header::HOST, "[fe80::1]:1")).is_ok());
        assert!(rules.host(&headers(header::HOST, "evil.example:1")).is_err());
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let allowed = ["https://app.example", "http://localhost:5173/", "vscode-webview://abc"].map(String::from).to_vec();
        let rules = rules(&config::Http { allowed_origins: allowed, ..Default::default() }, "1", "127.0.0.1:1");
        for origin in ["https://app.example", "https://APP.example:443", "http://localhost:5173", "vscode-webview://abc"] {
            assert!(rules.origin(&headers(header::ORIGIN, origin)).is_ok(), "{origin}");
        }
        for origin in [
            "http://app.example",
            "https://app.example:8443",
            "http://localhost",
            "http://127.0.0.1:1",
            "null",
            "",
            "https://app.example.evil.example",
        ] {
            assert!(rules.origin(&headers(header::ORIGIN, origin)).is_err(), "{origin}");
        }
    }

    #[test]
    fn a_wildcard_is_no_origin() {
        let config = config::Http { allowed_origins: vec!["*".into()], ..Default::default() };
        let made = Rules::new(&config, &"1".parse().unwrap(), "127.0.0.1:1".parse().unwrap());
        assert!(matches!(made, Err(Error::Origin(entry)) if entry == "*"));
    }
}
