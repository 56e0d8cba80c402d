//! Who a request comes from, by its credentials, and how often they may come.

use std::net::IpAddr;
use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::header::{self, HeaderMap, HeaderValue};
use tokio_util::sync::CancellationToken;

use super::Error;
use super::oauth::Issuer;
use super::rates::{Bound, Held, Hold, Rates};
use super::refusal::{Challenge, Refusal};
use super::tokens::{Admitted, Tokens};
use crate::config;
use crate::model::access::{Access, Principal};

/// Where a server says whose tokens it takes.
pub(super) const METADATA: &str = "/.well-known/oauth-protected-resource";

/// Checks credentials.
pub(super) struct Guard {
    tokens: Tokens,
    issuer: Option<Issuer>,
    pub(super) challenge: Challenge,
    addresses: Rates<IpAddr>,
    principals: Rates<Principal>,
    tries: Rates<IpAddr>,
    streams: Arc<Held<Option<Principal>>>,
    streams_max: (u32, u32),
}

impl Guard {
    /// What the settings ask of requests to this server, which clients know by `base`.
    pub(super) fn open(config: &config::Http, tokens: Tokens, base: &str) -> Result<Self, Error> {
        let issuer = Issuer::open(&config.oauth, &format!("{base}/mcp"))?;
        let metadata = issuer.as_ref().map(|_| format!("{base}{METADATA}/mcp"));
        Ok(Self {
            tokens,
            issuer,
            challenge: Challenge { metadata, prefix: config.oauth.scope_prefix.clone() },
            addresses: Rates::new(config.rate_per_address),
            principals: Rates::new(config.rate_per_principal),
            tries: Rates::new(config.rate_refused),
            streams: Arc::new(Held::new(config.streams_max, config.streams_per_principal)),
            streams_max: (config.streams_max, config.streams_per_principal),
        })
    }

    /// Reads the files of tokens again, if they have changed.
    pub(super) fn refresh(&self) {
        self.tokens.refresh();
    }

    /// Keeps the issuer's keys fresh until cancelled.
    pub(super) async fn keep(&self, cancel: CancellationToken) {
        if let Some(issuer) = &self.issuer {
            issuer.keep(cancel).await;
        }
    }

    /// Counts a request of an address.
    pub(super) fn pace(&self, peer: IpAddr) -> Result<(), Refusal> {
        if self.addresses.take(&peer) { Ok(()) } else { Err(Refusal::too_fast("from this address", "http.rate_per_address")) }
    }

    /// Whether anybody needs credentials here.
    pub(super) fn asks(&self) -> bool {
        self.tokens.any() || self.issuer.is_some()
    }

    /// Whoever comes with these credentials.
    pub(super) async fn admit(&self, headers: &HeaderMap, query: Option<&str>, peer: Option<IpAddr>) -> Result<Admitted, Refusal> {
        if !self.asks() {
            return Ok(Admitted { access: Arc::new(Access::OPERATOR), revoked: CancellationToken::new(), until: None });
        }
        // Whoever comes without any asks how to get some.
        let guesses = headers.contains_key(header::AUTHORIZATION);
        let admitted = match self.check(headers, query).await {
            Err(refusal) if guesses && refusal.is_unauthorized() && peer.is_some_and(|peer| !self.tries.take(&peer)) => {
                Err(Refusal::too_fast("with bad credentials from this address", "http.rate_refused"))
            }
            other => other,
        }?;
        match &admitted.access.principal {
            Some(principal) if !self.principals.take(principal) => Err(Refusal::too_fast("of this principal", "http.rate_per_principal")),
            _ => Ok(admitted),
        }
    }

    async fn check(&self, headers: &HeaderMap, query: Option<&str>) -> Result<Admitted, Refusal> {
        let none = || Refusal::no_token(&self.challenge);
        let mut given = headers.get_all(header::AUTHORIZATION).iter();
        let (Some(value), None) = (given.next(), given.next()) else { return Err(none()) };
        let (scheme, secret) = value.to_str().ok().and_then(|text| text.split_once(' ')).ok_or_else(none)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(none());
        }
        if query.is_some_and(carries_token) {
            return Err(Refusal::token_in_address());
        }
        let secret = secret.trim();
        match (self.tokens.find(secret), &self.issuer) {
            (Some(admitted), _) => Ok(admitted),
            (None, Some(issuer)) => issuer.admit(secret, &self.challenge).await,
            (None, None) => Err(Refusal::wrong_token(&self.challenge)),
        }
    }

    /// Makes room for a stream of notifications, which goes on until the hold is dropped.
    pub(super) fn stream(&self, access: &Access) -> Result<Hold<Option<Principal>>, Refusal> {
        self.streams.take(access.principal.clone()).map_err(|bound| match bound {
            Bound::All => Refusal::too_many_streams(self.streams_max.0, "http.streams_max"),
            Bound::Each => Refusal::too_many_streams(self.streams_max.1, "http.streams_per_principal"),
        })
    }

    /// Whose tokens are taken here, for whoever looks for credentials.
    pub(super) fn metadata(&self) -> Option<Response> {
        let metadata = Json(self.issuer.as_ref()?.metadata());
        Some(([(header::CACHE_CONTROL, HeaderValue::from_static("max-age=300"))], metadata).into_response())
    }
}

/// Whether an address carries a token, as RFC 6750 once allowed.
fn carries_token(query: &str) -> bool {
    query.split('&').any(|pair| {
        let name = pair.split('=').next().unwrap_or_default();
        ["access_token", "token", "bearer_token"].iter().any(|known| name.eq_ignore_ascii_case(known))
    })
}
