//! The HTTP door: MCP's Streamable HTTP at `/mcp` for both generations of clients, and `/health`.
//!
//! It knows sockets, headers, tokens and sessions; it does not know the tools. Whoever mounts it says how an MCP server is made.

mod connection;
mod door;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod guard;
mod intake;
mod listen;
mod mcp;
mod oauth;
mod proxies;
mod rates;
mod refusal;
mod sessions;
mod stall;
mod tls;
mod tokens;
mod told;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse as _;
use axum::routing::{any, get};
use rmcp::ServerHandler;
use rustix::process::{Resource, getrlimit};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::listen::Listen;
use self::refusal::Refusal;
pub use self::told::Tell;
use crate::config;
use crate::model::access::Scope;
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

/// Says how the station is; `status` and `version` are filled in when absent. Who may not look is told the status alone.
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
    /// The scope that a request needs, by its method and its tool.
    pub needs: fn(&str, Option<&str>) -> Scope,
    /// Hears of refused requests.
    pub tell: Tell,
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
    /// How many of them may come from one address; further ones are closed.
    connections_of_one: u32,
    /// How large a request's head may be.
    head_max: usize,
    /// How long a client may read nothing.
    write_stall: Duration,
}

impl Limits {
    /// Those of the settings, as far as this process may have `files` open: the store and the agents need some besides connections.
    fn new(config: &config::Http, files: Option<u64>) -> Self {
        let room = files.map_or(usize::MAX, |files| usize::try_from(files / 2).unwrap_or(usize::MAX).max(1));
        let (all, of_one) = (config.connections_max as usize, config.connections_per_address);
        // Where there are few, one address does not get them all.
        let half = u32::try_from(room / 2).unwrap_or(u32::MAX).max(1);
        Self {
            head: config.head_timeout.get(),
            body_stall: config.body_stall.get(),
            body_total: config.body_timeout.get(),
            connections: all.min(room),
            connections_of_one: if room < all { of_one.min(half) } else { of_one },
            head_max: config.head_max.as_usize(),
            write_stall: config.write_stall.get(),
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
         http.token or --token-file, http.tokens_file or http.oauth.issuer, or listen on 127.0.0.1; \
         http.open_to_all lets everybody in who can reach it"
    )]
    Exposed(SocketAddr),
    /// Clients would be told an address that is none.
    #[error(
        "http.oauth.issuer needs http.public_url where the server listens on {0}, which is no address that clients could use: \
         set it to the one that they know, such as https://lattice.example"
    )]
    PublicUrl(SocketAddr),
    /// Somebody else listens there.
    #[error("port {} of {} is in use: stop the program that listens there, or choose another port (0 takes any free one)", .0.port(), .0.ip())]
    InUse(SocketAddr),
    /// Other machines could guess the token.
    #[error(
        "refusing to listen on {0} with a token of fewer than 16 characters, which could be guessed: choose a longer one (openssl rand -hex 32)"
    )]
    Short(SocketAddr),
    /// The system refuses.
    #[error("cannot listen on {0}")]
    Bind(SocketAddr, #[source] std::io::Error),
    /// The token's file cannot be read.
    #[error("cannot read the token file {}", .0.display())]
    TokenFile(PathBuf, #[source] std::io::Error),
    /// The token cannot be used.
    #[error("{0}")]
    Token(String),
    /// A file of certificates or keys cannot be used.
    #[error("{}: {reason}", file.display())]
    Certificate {
        /// The file.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// TLS cannot be set up.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
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
    guard: Arc<guard::Guard>,
    certificate: Option<Arc<tls::Certificate>>,
    config: config::Http,
    limits: Limits,
}

/// Opens the socket.
///
/// # Errors
/// When the settings make no sense, when the address would be open to the network without a token, or when the socket cannot be opened.
pub async fn bind(config: &config::Http, listen: Listen) -> Result<Bound, Error> {
    let tokens = tokens::Tokens::open(config)?;
    let certificate = tls::Certificate::open(&config.tls)?;
    let addresses = listen.addresses().await?;
    let exposed = addresses.iter().find(|address| !is_loopback(address.ip()));
    let is_guarded = tokens.any() || config.oauth.issuer.is_some();
    if let Some(address) = exposed.filter(|_| !is_guarded && !config.open_to_all) {
        return Err(Error::Exposed(*address));
    }
    if let Some(address) = exposed.filter(|_| tokens.is_short()) {
        return Err(Error::Short(*address));
    }
    let nowhere = addresses.iter().find(|address| address.ip().to_canonical().is_unspecified());
    if let Some(address) = nowhere.filter(|_| config.oauth.issuer.is_some() && config.public_url.is_none()) {
        return Err(Error::PublicUrl(*address));
    }
    let listener = listen_on_first(&addresses).await?;
    let address = listener.local_addr().map_err(|source| Error::Bind(addresses[0], source))?;
    let rules = door::Rules::new(config, &listen, address)?;
    let own = format!("{}://{address}", if certificate.is_some() { "https" } else { "http" });
    let base = config.public_url.as_deref().map_or(own.as_str(), |url| url.trim_end_matches('/'));
    let guard = Arc::new(guard::Guard::open(config, tokens, base)?);
    let files = getrlimit(Resource::Nofile).current;
    let limits = Limits::new(config, files);
    // Nobody asked for what stands there by itself.
    if limits.connections < config.connections_max as usize && config.connections_max != config::Http::default().connections_max {
        let (asked, taken) = (config.connections_max, limits.connections);
        tracing::warn!(
            asked,
            taken,
            files,
            "fewer connections are taken than http.connections_max asks for: raise the limit of open files"
        );
    }
    Ok(Bound { listener, address, rules, guard, certificate, config: config.clone(), limits })
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
        format!("{}://{}/mcp", if self.certificate.is_some() { "https" } else { "http" }, self.address)
    }

    /// Serves until `stop`, then lets running calls end within `grace`, ends the streams and returns.
    ///
    /// # Errors
    /// When TLS cannot be set up: a connection's failure is its own.
    pub async fn serve<S: ServerHandler>(self, parts: Parts<S>) -> Result<(), Error> {
        let acceptor = self.certificate.as_ref().map(tls::Certificate::acceptor).transpose()?;
        announce(&self.url());
        let ends = connection::Ends::default();
        let told = Arc::new(told::Told::new(parts.tell, self.config.refusals_told));
        let sessions = Arc::new(sessions::Sessions::new(parts.table, &self.config));
        let mcp = mcp::Mcp::new(parts.make, parts.needs, sessions.clone(), self.guard.clone(), &self.config, &self.limits, ends.clone());
        parts.tasks.spawn(sessions.clone().keep(ends.streams.clone()));
        let (guard, ending) = (self.guard.clone(), ends.streams.clone());
        parts.tasks.spawn(async move { guard.keep(ending).await });
        let files = reload(self.guard.clone(), self.certificate.clone(), self.config.reload_interval.get());
        parts.tasks.spawn(ends.streams.clone().run_until_cancelled_owned(files));

        let proxies = proxies::Proxies::new(&self.config.trusted_proxies);
        let health = parts.health;
        let health = move |request: axum::extract::Request| async move { door::health(&health, request.extensions().get()) };
        let only_get = || async { Refusal::method("GET") };
        let guard = self.guard.clone();
        let metadata = move |request: axum::extract::Request| async move {
            guard.metadata().unwrap_or_else(|| Refusal::nothing_at(request.uri().path()).into_response())
        };
        let door = door::Door { rules: self.rules, proxies: proxies.clone(), guard: self.guard, told: told.clone() };
        let router = Router::new()
            .route("/mcp", any(move |request| mcp.clone().handle(request)))
            .route("/health", get(health).fallback(only_get))
            .route(guard::METADATA, get(metadata.clone()).fallback(only_get))
            .route(&format!("{}/mcp", guard::METADATA), get(metadata).fallback(only_get))
            .fallback(|request: axum::extract::Request| async move { Refusal::nothing_at(request.uri().path()) })
            .layer(from_fn_with_state(Arc::new(door), door::pass));

        let way = connection::Way { router, acceptor, limits: self.limits, proxies, told };
        connection::accept(self.listener, way, &parts.stop, &parts.tasks, &ends).await;
        ends.drain(parts.grace).await;
        sessions.save().await;
        Ok(())
    }
}

/// Looks at the files of tokens and certificates again and again.
async fn reload(guard: Arc<guard::Guard>, certificate: Option<Arc<tls::Certificate>>, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        let (guard, certificate) = (guard.clone(), certificate.clone());
        let look = move || {
            guard.refresh();
            if let Some(certificate) = certificate {
                certificate.refresh();
            }
        };
        if tokio::task::spawn_blocking(look).await.is_err() {
            tracing::error!("looking at the files of tokens and certificates failed");
        }
    }
}

/// Says where the server is, whatever the log's filter: people and tests look for this line.
fn announce(url: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "listening on {url}");
    tracing::info!(url, "the HTTP door is open");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_room_for_other_files() {
        let taken = |files, asked, of_one| {
            let config = config::Http { connections_max: asked, connections_per_address: of_one, ..Default::default() };
            let limits = Limits::new(&config, files);
            (limits.connections, limits.connections_of_one)
        };
        assert_eq!(taken(None, 16_384, 512), (16_384, 512));
        assert_eq!(taken(Some(65_536), 16_384, 512), (16_384, 512));
        assert_eq!(taken(Some(1_024), 16_384, 512), (512, 256));
        assert_eq!(taken(Some(1_024), 100, 100), (100, 100));
        assert_eq!(taken(Some(1), 16_384, 512), (1, 1));
    }
}
