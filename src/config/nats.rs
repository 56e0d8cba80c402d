//! The settings of the way to a NATS server.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Secret;
use crate::model::size::Size;
use crate::model::time::Span;

/// The server through which machines share the lattice.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Nats {
    /// Where it is: `nats://host:4222`, several with commas between them, or `embedded`; absent: one machine, no server. A user and
    /// a password, or a token, may stand before an `@`.
    pub url: Option<String>,
    /// Who we are to it.
    pub auth: NatsAuth,
    /// How the connection is protected.
    pub tls: NatsTls,
    /// How many servers of a cluster keep each stream.
    pub replicas: u32,
    /// How long the lattice's log is kept.
    pub log_max_age: Span,
    /// How large the lattice's log may become.
    pub log_max_bytes: Size,
    /// How much all large inputs and results may take.
    pub blob_max_bytes: Size,
    /// A larger message travels as a blob. Times `work.queue_size` and `work.held_back_max` this bounds a station's hook.
    pub body_inline_max: Size,
    /// How long one try to connect may take.
    pub connect_timeout: Span,
    /// How long an answer may take.
    pub request_timeout: Span,
    /// How often a quiet connection is tried.
    pub ping_interval: Span,
    /// The longest pause between two tries to connect again.
    pub reconnect_delay_max: Span,
}

impl Default for Nats {
    fn default() -> Self {
        Self {
            url: None,
            auth: NatsAuth::default(),
            tls: NatsTls::default(),
            replicas: 1,
            log_max_age: Span::secs(7 * 86_400),
            log_max_bytes: Size::mib(1024),
            blob_max_bytes: Size::mib(10 * 1024),
            body_inline_max: Size::kib(256),
            connect_timeout: Span::secs(5),
            request_timeout: Span::secs(5),
            ping_interval: Span::secs(4),
            reconnect_delay_max: Span::secs(4),
        }
    }
}

impl Nats {
    /// Whether we run the server ourselves.
    pub fn is_embedded(&self) -> bool {
        self.url.as_deref() == Some("embedded")
    }
}

/// Who we are to a server: one way at most.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NatsAuth {
    /// A user's name.
    pub user: Option<String>,
    /// That user's password.
    pub password: Option<Secret>,
    /// A token.
    pub token: Option<Secret>,
    /// A file of credentials, as `nsc` writes it.
    pub creds_file: Option<PathBuf>,
    /// A file whose first line is the seed of an nkey.
    pub nkey_file: Option<PathBuf>,
}

/// How the connection to a server is protected.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NatsTls {
    /// A file of certificates that vouch for the server, besides the system's.
    pub ca: Option<PathBuf>,
    /// A file with our own certificate.
    pub cert: Option<PathBuf>,
    /// A file with its key.
    pub key: Option<PathBuf>,
}

/// A server of our own.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmbeddedNats {
    /// Where it listens.
    pub address: std::net::IpAddr,
    /// Its port.
    pub port: u16,
    /// The port of its monitoring pages, on loopback; none when absent.
    pub http_port: Option<u16>,
    /// Where it keeps everything; a folder below the data folder when absent.
    pub store_dir: Option<PathBuf>,
    /// The program; looked for on the path when absent.
    pub server: Option<PathBuf>,
}

impl Default for EmbeddedNats {
    fn default() -> Self {
        Self { address: std::net::Ipv4Addr::LOCALHOST.into(), port: 4222, http_port: None, store_dir: None, server: None }
    }
}
