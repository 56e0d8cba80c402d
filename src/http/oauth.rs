//! Tokens of somebody else's: an OAuth 2.1 issuer whose signatures are checked against the keys that it publishes.
//!
//! This server is a resource server only: it says which issuer it trusts (RFC 9728) and knows nothing of how tokens come to be.

mod fetch;
mod keys;
mod token;

use std::sync::Arc;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use self::fetch::Fetch;
use self::keys::{Keys, Missing};
use self::token::Claims;
use super::Error;
use super::refusal::{Challenge, Refusal};
use super::tokens::Admitted;
use crate::config;
use crate::model::access::{Access, Principal, Scope};
use crate::model::time::Timestamp;
use crate::telemetry::now;

/// An issuer, and what is asked of its tokens.
pub(super) struct Issuer {
    keys: Keys,
    rules: token::Rules,
    prefix: String,
    default_scope: Option<Scope>,
    resource: String,
}

impl Issuer {
    /// The issuer of the settings, if there is one; `resource` is this server's own address as clients know it.
    pub(super) fn open(config: &config::OAuth, resource: &str) -> Result<Option<Self>, Error> {
        let Some(issuer) = &config.issuer else { return Ok(None) };
        let audiences = if config.audiences.is_empty() { vec![resource.to_owned()] } else { config.audiences.clone() };
        let fetch = Fetch::new(config.ca.as_deref(), config.jwks_timeout.get(), config.jwks_max.as_usize())?;
        Ok(Some(Self {
            keys: Keys::new(fetch, issuer, config),
            rules: token::Rules { issuer: issuer.clone(), audiences, algorithms: config.algorithms.clone(), skew: config.skew.get() },
            prefix: config.scope_prefix.clone(),
            default_scope: config.default_scope,
            resource: resource.to_owned(),
        }))
    }

    /// Keeps the issuer's keys fresh until cancelled.
    pub(super) async fn keep(&self, cancel: CancellationToken) {
        self.keys.keep(cancel).await;
    }

    /// Whoever a token speaks of.
    ///
    /// # Errors
    /// A refusal that says what is wrong with it.
    pub(super) async fn admit(&self, text: &str, challenge: &Challenge) -> Result<Admitted, Refusal> {
        let bad = |why: &str| Refusal::bad_token(challenge, why);
        let token = token::Token::parse(text, &self.rules.algorithms).map_err(|why| bad(&why))?;
        let is_signed = async || {
            let keys = self.keys.fitting(&token).await.map_err(|missing| match missing {
                Missing::Unknown => bad("it is signed with a key that its issuer does not publish"),
                Missing::Away => Refusal::no_keys(),
            })?;
            Ok::<_, Refusal>(keys.iter().any(|key| token.is_signed_by(key)))
        };
        if !is_signed().await? {
            self.keys.look_again().await;
            if !is_signed().await? {
                return Err(bad("its signature is wrong"));
            }
        }
        let claims = token.claims(&self.rules, now()).map_err(|why| bad(&why))?;
        self.access(&claims).ok_or_else(|| bad("its subject is no name that can be kept"))
    }

    fn access(&self, claims: &Claims) -> Option<Admitted> {
        let principal = Principal::of_subject(&self.rules.issuer, &claims.subject)?;
        let named = claims.scopes.iter().filter_map(|word| word.strip_prefix(self.prefix.as_str())?.parse::<Scope>().ok());
        let scope = named.max().or(self.default_scope);
        let until = Timestamp::from_millis(claims.expires_ms);
        Some(Admitted {
            access: Arc::new(Access { principal: Some(principal), scope }),
            revoked: CancellationToken::new(),
            until: Some(until),
        })
    }

    /// What clients read to find the issuer (RFC 9728).
    pub(super) fn metadata(&self) -> Value {
        json!({
            "resource": self.resource,
            "authorization_servers": [self.rules.issuer],
            "scopes_supported": Scope::ALL.map(|scope| format!("{}{scope}", self.prefix)),
            "bearer_methods_supported": ["header"],
            "resource_name": "Lattice",
        })
    }
}
