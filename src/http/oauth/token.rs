//! One signed token (RFC 7519): taken apart, its signature checked, and what it says held against our rules.
//!
//! Written on ring, which is in the program for TLS anyway. It takes what access tokens need and refuses everything else: no
//! unsigned tokens, no shared secrets, no extensions that it does not understand.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::signature as ring;
use serde_json::{Map, Value};

use crate::config::Algorithm;
use crate::model::time::Timestamp;

/// The longest token; a header holds no more anyway.
const TOKEN_MAX: usize = 32 * 1024;
/// How many scopes are looked at.
const SCOPES_MAX: usize = 256;
/// The latest second that counts as a time.
const SECONDS_MAX: f64 = 1e11;

/// What is asked of a token.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    pub(super) issuer: String,
    pub(super) audiences: Vec<String>,
    pub(super) algorithms: Vec<Algorithm>,
    pub(super) skew: Duration,
}

/// A token whose signature nobody has checked yet.
pub(super) struct Token<'a> {
    pub(super) algorithm: Algorithm,
    /// The key that it names.
    pub(super) kid: Option<String>,
    signed: &'a str,
    signature: Vec<u8>,
    payload: &'a str,
}

/// What a token says that counts here.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Claims {
    pub(super) subject: String,
    pub(super) scopes: Vec<String>,
    pub(super) expires_ms: i64,
}

/// What a published key is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Material {
    Rsa { n: Vec<u8>, e: Vec<u8> },
    P256(Vec<u8>),
    P384(Vec<u8>),
    Ed25519(Vec<u8>),
}

/// A published key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) kid: Option<String>,
    /// The one algorithm that it is for, if it says so.
    pub(super) algorithm: Option<Algorithm>,
    pub(super) material: Material,
}

impl<'a> Token<'a> {
    /// Takes a token apart.
    pub(super) fn parse(text: &'a str, allowed: &[Algorithm]) -> Result<Self, String> {
        if text.len() > TOKEN_MAX {
            return Err(format!("it is longer than {TOKEN_MAX} bytes"));
        }
        let mut parts = text.split('.');
        let (Some(header), Some(payload), Some(signature), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return Err("it is no signed token (JWT) and none of this server's own tokens".into());
        };
        let head = object(header).ok_or("its header cannot be read")?;
        let named = head.get("alg").and_then(Value::as_str).unwrap_or_default();
        let algorithm = algorithm(named)
            .filter(|algorithm| allowed.contains(algorithm))
            .ok_or_else(|| format!("its signature is made with {:?}, which is not in http.oauth.algorithms", cut(named)))?;
        if head.contains_key("crit") {
            return Err("it needs extensions that are not known here (crit)".into());
        }
        // Tokens for other purposes say so: a logout token, a proof of possession.
        let kind = head.get("typ").map(|kind| kind.as_str().unwrap_or("?").to_ascii_lowercase());
        if !matches!(kind.as_deref().map(|kind| kind.strip_prefix("application/").unwrap_or(kind)), None | Some("jwt" | "at+jwt")) {
            return Err("it is no access token (typ)".into());
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| "its signature cannot be read")?;
        if signature.is_empty() {
            return Err("it is not signed".into());
        }
        let signed = &text[..header.len() + 1 + payload.len()];
        let kid = head.get("kid").and_then(Value::as_str).map(str::to_owned);
        Ok(Self { algorithm, kid, signed, signature, payload })
    }

    /// Whether a key may have signed it at all.
    pub(super) fn fits(&self, key: &Key) -> bool {
        let made_for = match key.material {
            Material::Rsa { .. } => matches!(
                self.algorithm,
                Algorithm::RS256 | Algorithm::RS384 | Algorithm::RS512 | Algorithm::PS256 | Algorithm::PS384 | Algorithm::PS512
            ),
            Material::P256(_) => self.algorithm == Algorithm::ES256,
            Material::P384(_) => self.algorithm == Algorithm::ES384,
            Material::Ed25519(_) => self.algorithm == Algorithm::EdDSA,
        };
        made_for && key.algorithm.is_none_or(|only| only == self.algorithm) && (self.kid.is_none() || self.kid == key.kid)
    }

    /// Whether a key has signed it.
    pub(super) fn is_signed_by(&self, key: &Key) -> bool {
        let (message, signature) = (self.signed.as_bytes(), self.signature.as_slice());
        let plain = |how: &'static dyn ring::VerificationAlgorithm, point: &[u8]| {
            ring::UnparsedPublicKey::new(how, point).verify(message, signature).is_ok()
        };
        match (&key.material, self.algorithm) {
            (Material::P256(point), Algorithm::ES256) => plain(&ring::ECDSA_P256_SHA256_FIXED, point),
            (Material::P384(point), Algorithm::ES384) => plain(&ring::ECDSA_P384_SHA384_FIXED, point),
            (Material::Ed25519(point), Algorithm::EdDSA) => plain(&ring::ED25519, point),
            (Material::Rsa { n, e }, algorithm) => {
                let how = match algorithm {
                    Algorithm::RS256 => &ring::RSA_PKCS1_2048_8192_SHA256,
                    Algorithm::RS384 => &ring::RSA_PKCS1_2048_8192_SHA384,
                    Algorithm::RS512 => &ring::RSA_PKCS1_2048_8192_SHA512,
                    Algorithm::PS256 => &ring::RSA_PSS_2048_8192_SHA256,
                    Algorithm::PS384 => &ring::RSA_PSS_2048_8192_SHA384,
                    Algorithm::PS512 => &ring::RSA_PSS_2048_8192_SHA512,
                    Algorithm::ES256 | Algorithm::ES384 | Algorithm::EdDSA => return false,
                };
                ring::RsaPublicKeyComponents { n, e }.verify(how, message, signature).is_ok()
            }
            _ => false,
        }
    }

    /// What it says, if that holds now. Asked only of a token whose signature is good.
    pub(super) fn claims(&self, rules: &Rules, now: Timestamp) -> Result<Claims, String> {
        let said = object(self.payload).ok_or("what it says cannot be read")?;
        if said.get("iss").and_then(Value::as_str) != Some(rules.issuer.as_str()) {
            return Err("it is of another issuer (iss)".into());
        }
        let meant_for = |word: &Value| word.as_str().is_some_and(|word| rules.audiences.iter().any(|ours| ours == word));
        let is_ours = match said.get("aud") {
            Some(Value::Array(words)) => words.iter().any(meant_for),
            Some(word) => meant_for(word),
            None => false,
        };
        if !is_ours {
            return Err("it is meant for somebody else (aud)".into());
        }
        let skew = i64::try_from(rules.skew.as_millis()).unwrap_or(i64::MAX);
        let now = now.as_millis();
        let expires_ms = time(&said, "exp")?.ok_or("it never expires (exp)")?;
        if now >= expires_ms.saturating_add(skew) {
            return Err("it has expired (exp)".into());
        }
        if time(&said, "nbf")?.is_some_and(|begins| now < begins.saturating_sub(skew)) {
            return Err("it does not count yet (nbf)".into());
        }
        if time(&said, "iat")?.is_some_and(|made| now < made.saturating_sub(skew)) {
            return Err("it was made in the future (iat)".into());
        }
        if said.contains_key("cnf") {
            return Err("it is bound to a key of its bearer, which is not asked for here (cnf)".into());
        }
        let subject = said.get("sub").and_then(Value::as_str).filter(|subject| !subject.is_empty());
        let subject = subject.ok_or("it speaks of nobody (sub)")?.to_owned();
        Ok(Claims { subject, scopes: scopes(&said), expires_ms: expires_ms.saturating_add(skew) })
    }
}

/// A published key, if it is of a kind that is used here.
pub(super) fn key(jwk: &Value) -> Option<Key> {
    let text = |name: &str| jwk.get(name).and_then(Value::as_str);
    let bytes = |name: &str| URL_SAFE_NO_PAD.decode(text(name)?.trim_end_matches('=')).ok();
    if text("use").is_some_and(|purpose| purpose != "sig") {
        return None;
    }
    if let Some(Value::Array(purposes)) = jwk.get("key_ops")
        && !purposes.iter().any(|purpose| purpose == "verify")
    {
        return None;
    }
    let point = |size: usize| {
        let (x, y) = (bytes("x")?, bytes("y")?);
        (x.len() == size && y.len() == size).then(|| [&[4][..], &x, &y].concat())
    };
    let material = match (text("kty")?, text("crv")) {
        ("RSA", _) => {
            let trimmed = |bytes: Vec<u8>| bytes.into_iter().skip_while(|byte| *byte == 0).collect();
            Material::Rsa { n: trimmed(bytes("n")?), e: trimmed(bytes("e")?) }
        }
        ("EC", Some("P-256")) => Material::P256(point(32)?),
        ("EC", Some("P-384")) => Material::P384(point(48)?),
        ("OKP", Some("Ed25519")) => Material::Ed25519(bytes("x").filter(|x| x.len() == 32)?),
        _ => return None,
    };
    let only = match text("alg") {
        None => None,
        // A key for something else is not for this.
        Some(named) => Some(algorithm(named)?),
    };
    Some(Key { kid: text("kid").map(str::to_owned), algorithm: only, material })
}

fn algorithm(name: &str) -> Option<Algorithm> {
    serde_json::from_value(Value::from(name)).ok()
}

fn object(part: &str) -> Option<Map<String, Value>> {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}

/// A moment in milliseconds; what is there and is no number is an error.
#[expect(clippy::cast_possible_truncation, reason = "seconds of this size fit")]
fn time(said: &Map<String, Value>, name: &str) -> Result<Option<i64>, String> {
    match said.get(name) {
        None => Ok(None),
        Some(value) => match value.as_f64() {
            Some(seconds) if (0.0..=SECONDS_MAX).contains(&seconds) => Ok(Some((seconds * 1000.0) as i64)),
            _ => Err(format!("its {name} is no time")),
        },
    }
}

/// The scopes, as one text (`scope`) or as a list (`scp`, `scope`).
fn scopes(said: &Map<String, Value>) -> Vec<String> {
    let words = |value: &Value| -> Vec<String> {
        match value {
            Value::String(text) => text.split_ascii_whitespace().take(SCOPES_MAX).map(str::to_owned).collect(),
            Value::Array(words) => words.iter().take(SCOPES_MAX).filter_map(|word| word.as_str().map(str::to_owned)).collect(),
            _ => Vec::new(),
        }
    };
    ["scope", "scp"].into_iter().filter_map(|name| said.get(name)).flat_map(words).collect()
}

fn cut(text: &str) -> String {
    text.chars().take(20).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const ALL: [Algorithm; 2] = [Algorithm::RS256, Algorithm::ES256];

    fn rules() -> Rules {
        Rules {
            issuer: "https://id.example".into(),
            audiences: vec!["https://lattice.example/mcp".into()],
            algorithms: ALL.to_vec(),
            skew: Duration::from_secs(60),
        }
    }

    fn encoded(value: &Value) -> String {
        URL_SAFE_NO_PAD.encode(value.to_string())
    }

    fn token(header: &Value, said: &Value) -> String {
        format!("{}.{}.c2ln", encoded(header), encoded(said))
    }

    fn good() -> Value {
        json!({"iss": "https://id.example", "aud": ["other", "https://lattice.example/mcp"], "sub": "ann", "exp": 2000, "nbf": 900,
               "iat": 900, "scope": "openid read assign"})
    }

    fn claims(change: impl Fn(&mut Value), at: i64) -> Result<Claims, String> {
        let mut said = good();
        change(&mut said);
        let text = token(&json!({"alg": "RS256"}), &said);
        let token = Token::parse(&text, &ALL).unwrap();
        token.claims(&rules(), Timestamp::from_millis(at * 1000))
    }

    #[test]
    fn a_good_token_says_who_and_what() {
        let said = claims(|_| {}, 1000).unwrap();
        assert_eq!((said.subject.as_str(), said.expires_ms), ("ann", 2_060_000));
        assert_eq!(said.scopes, ["openid", "read", "assign"]);
        assert_eq!(claims(|said| said["scp"] = json!(["admin", 3]), 1000).unwrap().scopes.last().unwrap(), "admin");
    }

    #[test]
    fn clocks_may_differ_by_the_skew_and_no_more() {
        assert!(claims(|_| {}, 2059).is_ok() && claims(|_| {}, 2060).is_err());
        assert!(claims(|_| {}, 840).is_ok() && claims(|_| {}, 839).is_err());
    }

    #[test]
    fn claims_that_do_not_hold_are_named() {
        type Change = fn(&mut Value);
        let cases: [(Change, &str); 14] = [
            (|said| said["iss"] = json!("https://id.example/"), "(iss)"),
            (|said| drop(said.as_object_mut().unwrap().remove("iss")), "(iss)"),
            (|said| said["aud"] = json!("https://lattice.example"), "(aud)"),
            (|said| drop(said.as_object_mut().unwrap().remove("aud")), "(aud)"),
            (|said| said["exp"] = json!(100), "(exp)"),
            (|said| drop(said.as_object_mut().unwrap().remove("exp")), "(exp)"),
            (|said| said["exp"] = json!("9999"), "exp is no time"),
            (|said| said["exp"] = json!(1e300), "exp is no time"),
            (|said| said["nbf"] = json!(5000), "(nbf)"),
            (|said| said["nbf"] = json!("never"), "nbf is no time"),
            (|said| said["iat"] = json!(5000), "(iat)"),
            (|said| said["cnf"] = json!({"jkt": "x"}), "(cnf)"),
            (|said| said["sub"] = json!(""), "(sub)"),
            (|said| said["sub"] = json!(7), "(sub)"),
        ];
        for (change, said) in cases {
            let error = claims(change, 1000).unwrap_err();
            assert!(error.contains(said), "{error} for {said}");
        }
    }

    #[test]
    fn what_is_no_signed_access_token_is_refused_before_any_key_is_looked_for() {
        for (header, said) in [
            (json!({"alg": "none"}), "\"none\""),
            (json!({"alg": "None"}), "\"None\""),
            (json!({"alg": "HS256"}), "\"HS256\""),
            (json!({"alg": "EdDSA"}), "not in http.oauth.algorithms"),
            (json!({}), "\"\""),
            (json!({"alg": ["RS256"]}), "\"\""),
            (json!({"alg": "RS256", "crit": ["exp"]}), "crit"),
            (json!({"alg": "RS256", "typ": "dpop+jwt"}), "typ"),
            (json!({"alg": "RS256", "typ": 3}), "typ"),
            (json!([]), "header"),
        ] {
            let text = token(&header, &good());
            let error = Token::parse(&text, &ALL).err().unwrap();
            assert!(error.contains(said), "{error} for {header}");
        }
        let unsigned = format!("{}.{}.", encoded(&json!({"alg": "RS256"})), encoded(&good()));
        for text in [unsigned.as_str(), "", ".", "..", "a.b.c", "a.b.c.d", "e30.e30.x", &"x".repeat(40_000)] {
            assert!(Token::parse(text, &ALL).is_err(), "{text:.40}");
        }
    }

    #[test]
    fn keys_of_other_kinds_and_purposes_are_left_out() {
        let (x, y) = (URL_SAFE_NO_PAD.encode([1; 32]), URL_SAFE_NO_PAD.encode([2; 32]));
        let good = json!({"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": "one", "alg": "ES256", "use": "sig"});
        let found = key(&good).unwrap();
        assert_eq!((found.kid.as_deref(), found.algorithm), (Some("one"), Some(Algorithm::ES256)));
        for (name, value) in [
            ("use", json!("enc")),
            ("alg", json!("ECDH-ES")),
            ("crv", json!("secp256k1")),
            ("kty", json!("oct")),
            ("x", json!("AQ")),
            ("y", json!(null)),
            ("key_ops", json!(["sign"])),
        ] {
            let mut bad = good.clone();
            bad[name] = value;
            assert_eq!(key(&bad), None, "{bad}");
        }
        assert_eq!(key(&json!("x")), None);
    }

    #[test]
    fn a_key_is_used_for_its_own_algorithm_only() {
        let rsa = Key { kid: Some("a".into()), algorithm: None, material: Material::Rsa { n: vec![1], e: vec![3] } };
        let fits = |header: Value, key: &Key| {
            let text = token(&header, &json!({}));
            Token::parse(&text, &ALL).unwrap().fits(key)
        };
        assert!(fits(json!({"alg": "RS256", "kid": "a"}), &rsa) && fits(json!({"alg": "RS256"}), &rsa));
        assert!(!fits(json!({"alg": "RS256", "kid": "b"}), &rsa));
        assert!(!fits(json!({"alg": "ES256", "kid": "a"}), &rsa));
        assert!(!fits(json!({"alg": "RS256"}), &Key { algorithm: Some(Algorithm::PS256), ..rsa }));
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_parser(text in ".{0,200}", payload in "[ -~]{0,100}") {
            if let Ok(token) = Token::parse(&text, &ALL) {
                let _ = token.claims(&rules(), Timestamp::from_millis(0));
            }
            let text = format!("{}.{}.c2ln", encoded(&json!({"alg": "RS256"})), URL_SAFE_NO_PAD.encode(&payload));
            let token = Token::parse(&text, &ALL).unwrap();
            prop_assert!(token.claims(&rules(), Timestamp::from_millis(0)).is_err());
            let _ = key(&serde_json::from_str(&payload).unwrap_or(Value::Null));
        }
    }
}
