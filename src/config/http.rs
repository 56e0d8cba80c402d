//! The settings of the HTTP door.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Network, Secret, check};
use crate::model::access::Scope;
use crate::model::size::Size;
use crate::model::time::Span;

/// The HTTP door.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Http {
    /// Address and port; a bare port binds loopback.
    pub listen: Option<String>,
    /// The bearer token that every request must carry.
    pub token: Option<Secret>,
    /// A file whose first line is that token.
    pub token_file: Option<PathBuf>,
    /// A file of further tokens, each with a name and scopes; it is read again when it changes.
    pub tokens_file: Option<PathBuf>,
    /// Whose word counts besides that of our own tokens.
    pub oauth: OAuth,
    /// Whether everybody who comes through this door may see and use the works of everybody else who does.
    pub share_works: bool,
    /// Whether the door may stand open to other machines with neither a token nor OAuth.
    pub open_to_all: bool,
    /// The address by which clients know this server, without `/mcp`; the one that it listens on when absent.
    pub public_url: Option<String>,
    /// Our own certificate.
    pub tls: HttpTls,
    /// How often the files of tokens and certificates are looked at.
    pub reload_interval: Span,
    /// Origins of browser pages that may call, besides none.
    pub allowed_origins: Vec<String>,
    /// Further names under which this server is called (the Host header).
    pub allowed_hosts: Vec<String>,
    /// Proxies that say truly whose requests they bring (`X-Forwarded-For`, `Forwarded`).
    pub trusted_proxies: Vec<Network>,
    /// The largest request body.
    pub body_max: Size,
    /// How much of large request bodies may be held at once while they arrive.
    pub bodies_max: Size,
    /// How long a session of an older client may be idle.
    pub session_idle: Span,
    /// How many sessions of older clients may exist.
    pub sessions_max: u32,
    /// How many of them may be one principal's.
    pub sessions_per_principal: u32,
    /// How many connections are open at once, and never more than half of the files that the process may have open; further ones wait.
    pub connections_max: u32,
    /// How many of them may come from one address that is no trusted proxy's; further ones are closed.
    pub connections_per_address: u32,
    /// How many streams of notifications are open at once.
    pub streams_max: u32,
    /// How many of them may be one principal's.
    pub streams_per_principal: u32,
    /// How many requests a second one address may send.
    pub rate_per_address: u32,
    /// How many requests a second one principal may send.
    pub rate_per_principal: u32,
    /// How many bad credentials a second one address may try.
    pub rate_refused: u32,
    /// How many refused requests a second are told to the lattice's log, of each cause; the others are counted.
    pub refusals_told: u32,
    /// How large a request's head may be.
    pub head_max: Size,
    /// How long a connection may take to send its next request's head, idling included.
    pub head_timeout: Span,
    /// How long a request's body may stand still.
    pub body_stall: Span,
    /// How long a request's body may take in all.
    pub body_timeout: Span,
    /// How long a client may read nothing of what is sent to it.
    pub write_stall: Span,
}

impl Default for Http {
    fn default() -> Self {
        Self {
            listen: None,
            token: None,
            token_file: None,
            tokens_file: None,
            oauth: OAuth::default(),
            share_works: false,
            open_to_all: false,
            public_url: None,
            tls: HttpTls::default(),
            reload_interval: Span::secs(1),
            allowed_origins: Vec::new(),
            allowed_hosts: Vec::new(),
            trusted_proxies: Vec::new(),
            body_max: Size::mib(16),
            bodies_max: Size::mib(256),
            session_idle: Span::secs(24 * 3600),
            sessions_max: 10_000,
            sessions_per_principal: 1_000,
            connections_max: 16_384,
            connections_per_address: 2_048,
            streams_max: 8_192,
            streams_per_principal: 1_024,
            rate_per_address: 10_000,
            rate_per_principal: 1_000,
            rate_refused: 20,
            refusals_told: 20,
            head_max: Size::kib(64),
            head_timeout: Span::secs(60),
            body_stall: Span::secs(30),
            body_timeout: Span::secs(300),
            write_stall: Span::secs(60),
        }
    }
}

impl Http {
    /// Where to listen; a bare port binds loopback.
    ///
    /// # Errors
    /// The text is not an address, and the error says what one looks like.
    pub fn address(&self) -> Result<Option<SocketAddr>, String> {
        self.listen.as_deref().map(check::address).transpose()
    }
}

/// How a signature is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are those of RFC 7518 and RFC 8037")]
pub enum Algorithm {
    RS256,
    RS384,
    RS512,
    PS256,
    PS384,
    PS512,
    ES256,
    ES384,
    EdDSA,
}

/// Whose word counts besides that of our own tokens: an OAuth 2.1 issuer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OAuth {
    /// The issuer, exactly as its tokens name it; no OAuth when absent.
    pub issuer: Option<String>,
    /// Where its keys are; found by its metadata when absent.
    pub jwks_uri: Option<String>,
    /// For whom a token may be meant; our own address at `/mcp` when empty.
    pub audiences: Vec<String>,
    /// The signatures that count.
    pub algorithms: Vec<Algorithm>,
    /// What stands before our scopes in its tokens (`lattice:` for `lattice:read`).
    pub scope_prefix: String,
    /// What a token allows that names none of our scopes; nothing when absent.
    pub default_scope: Option<Scope>,
    /// A file of certificates that vouch for the issuer, besides the system's.
    pub ca: Option<PathBuf>,
    /// How far its clock and ours may be apart.
    pub skew: Span,
    /// How old its keys may become before they are fetched again.
    pub jwks_max_age: Span,
    /// How long keys count that cannot be fetched again.
    pub jwks_stale_max: Span,
    /// How long to wait between two fetches, whatever tokens come.
    pub jwks_pause: Span,
    /// How long a fetch may take.
    pub jwks_timeout: Span,
    /// How large the issuer's answers may be.
    pub jwks_max: Size,
}

impl Default for OAuth {
    fn default() -> Self {
        Self {
            issuer: None,
            jwks_uri: None,
            audiences: Vec::new(),
            algorithms: vec![Algorithm::RS256, Algorithm::PS256, Algorithm::ES256, Algorithm::ES384, Algorithm::EdDSA],
            scope_prefix: String::new(),
            default_scope: None,
            ca: None,
            skew: Span::secs(60),
            jwks_max_age: Span::secs(600),
            jwks_stale_max: Span::secs(86_400),
            jwks_pause: Span::secs(10),
            jwks_timeout: Span::secs(5),
            jwks_max: Size::kib(256),
        }
    }
}

/// The certificate of the HTTP door; plain HTTP without one.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpTls {
    /// A file with our certificate, and those that lead up to its authority.
    pub cert: Option<PathBuf>,
    /// A file with its key.
    pub key: Option<PathBuf>,
}
