//! The keys that an issuer publishes: fetched, kept, and fetched again when a token names one that is not among them.
//!
//! However many such tokens come, there is one fetch at a time and a pause after each; tokens of known keys never wait for one. Who
//! fetches is always the keeper, and never a request: a client that leaves ends nothing that others wait for.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::fetch::Fetch;
use super::token::{self, Key, Token};
use crate::config;

/// How many keys of an issuer are looked at.
const KEYS_MAX: usize = 64;
/// Keys that are too old are fetched once the pause since the last fetch is over, which is looked at so often.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// Why no key fits.
#[derive(Debug)]
pub(super) enum Missing {
    /// The issuer publishes no such key.
    Unknown,
    /// What the issuer publishes could not be fetched; the log has the reason, which is not for whoever asks.
    Away,
}

/// The keys of one issuer.
pub(super) struct Keys {
    fetch: Fetch,
    issuer: String,
    jwks_uri: Option<String>,
    max_age: Duration,
    stale_max: Duration,
    pause: Duration,
    known: RwLock<Known>,
    /// Wakes the keeper.
    wanted: Notify,
    fetches: watch::Sender<Fetches>,
}

/// What the keeper does.
#[derive(Debug, Default, Clone, Copy)]
struct Fetches {
    is_under_way: bool,
    /// How many have come to their end.
    done: u64,
    /// There will be no more.
    over: bool,
}

#[derive(Default, Clone)]
struct Known {
    keys: Arc<Vec<Key>>,
    /// When they were fetched.
    at: Option<Instant>,
    /// When it was tried last, and what went wrong then.
    tried: Option<Instant>,
    trouble: Option<String>,
}

impl Keys {
    pub(super) fn new(fetch: Fetch, issuer: &str, config: &config::OAuth) -> Self {
        Self {
            fetch,
            issuer: issuer.to_owned(),
            jwks_uri: config.jwks_uri.clone(),
            max_age: config.jwks_max_age.get(),
            stale_max: config.jwks_stale_max.get().max(config.jwks_max_age.get()),
            pause: config.jwks_pause.get(),
            known: RwLock::default(),
            wanted: Notify::new(),
            fetches: watch::Sender::default(),
        }
    }

    /// The keys that may have signed a token.
    pub(super) async fn fitting(&self, token: &Token<'_>) -> Result<Vec<Key>, Missing> {
        let found = self.known_for(token);
        if !found.is_empty() {
            return Ok(found);
        }
        self.look_again().await;
        let found = self.known_for(token);
        let known = self.known();
        match (found.is_empty(), known.trouble, known.at) {
            (false, _, _) => Ok(found),
            (true, None, Some(_)) => Err(Missing::Unknown),
            (true, _, _) => Err(Missing::Away),
        }
    }

    /// Has the keys fetched again, or waits for the fetch that is under way; nothing happens when that was done just now. A key may
    /// have changed under its name. Whoever stops waiting stops nothing.
    pub(super) async fn look_again(&self) {
        let mut fetches = self.fetches.subscribe();
        let before = *fetches.borrow_and_update();
        if !before.is_under_way && self.may_try() {
            self.wanted.notify_one();
        } else if !fetches.borrow().is_under_way {
            return;
        }
        // One that has come to its end since is as good as the next.
        let _ = fetches.wait_for(|now| now.done > before.done || now.over).await;
    }

    /// Fetches the keys before they are too old, and when somebody wants them, until cancelled.
    pub(super) async fn keep(&self, cancel: CancellationToken) {
        cancel.run_until_cancelled(self.keep_on()).await;
        self.fetches.send_modify(|fetches| fetches.over = true);
    }

    async fn keep_on(&self) {
        loop {
            let known = self.known();
            let wait = match (known.at, known.trouble) {
                (Some(at), None) => self.max_age.saturating_sub(at.elapsed()).max(LOOK_PAUSE),
                (None, None) => Duration::ZERO,
                (_, Some(_)) => self.pause,
            };
            tokio::select! {
                () = self.wanted.notified() => {}
                () = tokio::time::sleep(wait) => {}
            }
            if self.may_try() {
                self.renew().await;
            }
        }
    }

    fn known(&self) -> Known {
        self.known.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn known_for(&self, token: &Token<'_>) -> Vec<Key> {
        let known = self.known();
        if known.at.is_none_or(|at| at.elapsed() > self.stale_max) {
            return Vec::new();
        }
        known.keys.iter().filter(|key| token.fits(key)).cloned().collect()
    }

    fn may_try(&self) -> bool {
        self.known().tried.is_none_or(|tried| tried.elapsed() >= self.pause)
    }

    async fn renew(&self) {
        self.fetches.send_modify(|fetches| fetches.is_under_way = true);
        self.known.write().unwrap_or_else(PoisonError::into_inner).tried = Some(Instant::now());
        let fetched = self.published().await;
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.tried = Some(Instant::now());
        match fetched {
            Ok(keys) => {
                tracing::debug!(issuer = self.issuer, keys = keys.len(), "fetched an issuer's keys");
                *known = Known { keys: Arc::new(keys), at: known.tried, tried: known.tried, trouble: None };
            }
            Err(trouble) => {
                tracing::warn!(issuer = self.issuer, trouble, "an issuer's keys cannot be fetched; those that are known count on");
                known.trouble = Some(trouble);
            }
        }
        drop(known);
        self.fetches.send_modify(|fetches| *fetches = Fetches { is_under_way: false, done: fetches.done + 1, ..*fetches });
    }

    async fn published(&self) -> Result<Vec<Key>, String> {
        let place = match &self.jwks_uri {
            Some(place) => place.clone(),
            None => self.discover().await?,
        };
        let published = self.fetch.json(&place).await?;
        let Some(Value::Array(jwks)) = published.get("keys") else { return Err(format!("{place} answers no list of keys")) };
        let keys: Vec<Key> = jwks.iter().take(KEYS_MAX).filter_map(token::key).collect();
        if keys.is_empty() { Err(format!("{place} lists no key that is used here")) } else { Ok(keys) }
    }

    /// Where the issuer's keys are, by its metadata (OpenID Connect Discovery, RFC 8414).
    async fn discover(&self) -> Result<String, String> {
        let issuer = self.issuer.trim_end_matches('/');
        let (scheme, rest) = issuer.split_once("://").unwrap_or(("https", issuer));
        let (host, path) = rest.split_once('/').map_or((rest, String::new()), |(host, path)| (host, format!("/{path}")));
        let places = [
            format!("{issuer}/.well-known/openid-configuration"),
            format!("{scheme}://{host}/.well-known/oauth-authorization-server{path}"),
        ];
        let mut trouble = String::new();
        for place in places {
            let metadata = match self.fetch.json(&place).await {
                Ok(metadata) => metadata,
                Err(error) => {
                    trouble = if trouble.is_empty() { error } else { format!("{trouble}; {error}") };
                    continue;
                }
            };
            if metadata.get("issuer").and_then(Value::as_str) != Some(self.issuer.as_str()) {
                return Err(format!("{place} is the metadata of another issuer: http.oauth.issuer must be as it says, to the letter"));
            }
            let uri = metadata.get("jwks_uri").and_then(Value::as_str).filter(|uri| config::is_trustworthy(uri));
            // Only an issuer on this machine may lead to what is not protected.
            let uri = uri.filter(|uri| uri.starts_with("https://") || scheme == "http");
            return uri.map(str::to_owned).ok_or_else(|| format!("{place} names no jwks_uri with https"));
        }
        Err(trouble)
    }
}
