//! The HTTP door: MCP's Streamable HTTP at `/mcp` for both generations of clients, and `/health`.
//!
//! It knows sockets, headers, tokens and sessions; it does not know the tools. Whoever mounts it says how an MCP server is made.

mod connection;
mod door;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod intake;
mod listen;
mod mcp;
mod refusal;
mod sessions;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{any, get};
use rmcp::ServerHandler;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::listen::Listen;
use self::refusal::Refusal;
use crate::config;
use crate::transport::Table;

/// For whom an MCP server is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A session of an older client (`initialize`, `Mcp-Session-Id`): it stays, so it may remember its caller.
    Session,
    /// One request of a newer client: nothing is remembered.
    Request,
}

/// Makes the MCP server of a session or a request.
pub type Make<S> = Arc<dyn Fn(Kind) -> S + Send + Sync>;

/// Says how the station is; `status` and `version` are filled in when absent.
pub type Health = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

/// What the door is mounted on.
pub struct Parts<S> {
    /// Makes the MCP server of a session or a request.
    pub make: Make<S>,
    /// Keeps the sessions of older clients over a restart.
    pub table: Arc<dyn Table>,
    /// Ends serving.
    pub stop: CancellationToken,
    /// Where connections run.
    pub tasks: TaskTracker,
    /// What `/health` answers.
    pub health: Health,
    /// How long running calls may go on after `stop`.
    pub grace: Duration,
}

/// What one client may take of the server.
#[derive(Debug, Clone)]
struct Limits {
    /// How long a connection may take to send its next request's head, idling included.
    head: Duration,
    /// How long a request's body may stand still.
    body_stall: Duration,
    /// How long a request's body may take in all.
    body_total: Duration,
    /// How many connections are open at once; further ones wait to be accepted.
    connections: usize,
}

impl From<&config::Http> for Limits {
    fn from(config: &config::Http) -> Self {
        Self {
            head: config.head_timeout.get(),
            body_stall: config.body_stall.get(),
            body_total: config.body_timeout.get(),
            connections: config.connections_max as usize,
        }
    }
}

/// Why the door does not open.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address cannot be read.
    #[error(
        "{0:?} is no address to listen on: give a port (8765 or :8765, on this machine only) or host:port (127.0.0.1:8765, [::1]:8765)"
    )]
    Listen(String),
    /// The host has no address.
    #[error("cannot find the address of {0}")]
    Resolve(String, #[source] std::io::Error),
    /// Anybody on the network could use it.
    #[error(
        "refusing to listen on {0} without a token, because other machines could use this lattice: set LATTICE_HTTP_TOKEN, \
         http.token or --token-file, or listen on 127.0.0.1"
    )]
    Exposed(SocketAddr),
    /// Somebody else listens there.
    #[error("port {} of {} is in use: stop the program that listens there, or choose another port (0 takes any free one)", .0.port(), .0.ip())]
    InUse(SocketAddr),
    /// The system refuses.
    #[error("cannot listen on {0}")]
    Bind(SocketAddr, #[source] std::io::Error),
    /// The token's file cannot be read.
    #[error("cannot read the token file {}", .0.display())]
    TokenFile(PathBuf, #[source] std::io::Error),
    /// The token cannot be used.
    #[error("{0}")]
    Token(String),
    /// An entry of `http.allowed_origins` is no origin.
    #[error(
        "{0:?} in http.allowed_origins is no origin: write scheme://host or scheme://host:port (https://app.example.com, http://localhost:5173)"
    )]
    Origin(String),
    /// An entry of `http.allowed_hosts` is no host.
    #[error("{0:?} in http.allowed_hosts is no host: write a name or an address, with or without a port (lattice.example.com)")]
    Host(String),
}

/// An open socket that nobody is served on yet.
pub struct Bound {
    listener: TcpListener,
    address: SocketAddr,
    rules: door::Rules,
    config: config::Http,
    limits: Limits,
}

/// Opens the socket.
///
/// # Errors
/// When the settings make no sense, when the address would be open to the network without a token, or when the socket cannot be opened.
pub async fn bind(config: &config::Http, listen: Listen) -> Result<Bound, Error> {
    let token = door::token(config)?;
    let addresses = listen.addresses().await?;
    let exposed = addresses.iter().find(|address| !is_loopback(address.ip()));
    if let (Some(address), None) = (exposed, &token) {
        return Err(Error::Exposed(*address));
    }
    let listener = listen_on_first(&addresses).await?;
    let address = listener.local_addr().map_err(|source| Error::Bind(addresses[0], source))?;
    let rules = door::Rules::new(config, token, &listen, address)?;
    Ok(Bound { listener, address, rules, config: config.clone(), limits: config.into() })
}

async fn listen_on_first(addresses: &[SocketAddr]) -> Result<TcpListener, Error> {
    let mut failed = None;
    for &address in addresses {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => failed = Some(Error::InUse(address)),
            Err(error) => failed = Some(Error::Bind(address, error)),
        }
    }
    Err(failed.unwrap_or_else(|| Error::Listen(String::new())))
}

fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

impl Bound {
    /// The address, with the port that the system chose if 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where clients find MCP.
    pub fn url(&self) -> String {
        format!("http://{}/mcp", self.address)
    }

    /// Serves until `stop`, then lets running calls end within `grace`, ends the streams and returns.
    ///
    /// # Errors
    /// None at present: a connection's failure is its own.
    pub async fn serve<S: ServerHandler>(self, parts: Parts<S>) -> Result<(), Error> {
        announce(&self.url());
        let ends = connection::Ends::default();
        let sessions = Arc::new(sessions::Sessions::new(parts.table, &self.config));
        let mcp = mcp::Mcp::new(parts.make, sessions.clone(), &self.config, &self.limits, ends.clone());
        parts.tasks.spawn(sessions.clone().keep(ends.streams.clone()));

        let health = parts.health;
        let router = Router::new()
            .route("/mcp", any(move |request| mcp.clone().handle(request)))
            .route("/health", get(move || async move { door::health(&health) }).fallback(|| async { Refusal::method("GET") }))
            .fallback(|request: axum::extract::Request| async move { Refusal::nothing_at(request.uri().path()) })
            .layer(from_fn_with_state(Arc::new(self.rules), door::pass));

        connection::accept(self.listener, router, &self.limits, &parts.stop, &parts.tasks, &ends).await;
        ends.drain(parts.grace).await;
        sessions.save().await;
        Ok(())
    }
}

/// Says where the server is, whatever the log's filter: people and tests look for this line.
fn announce(url: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "listening on {url}");
    tracing::info!(url, "the HTTP door is open");
}
