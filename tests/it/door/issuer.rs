//! A small OpenID Connect issuer: it publishes its keys and signs tokens with them, and misbehaves when told to.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256, RsaKeyPair};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::sync::Notify;

/// A key of 2048 bits, for tests only: ring makes none.
const RSA: &str = include_str!("issuer.rsa");
/// For whom tokens are meant unless a test says otherwise.
pub(crate) const AUDIENCE: &str = "https://lattice.example/mcp";

/// A key that signs.
pub(crate) enum Signer {
    Rs256(RsaKeyPair),
    Es256(EcdsaKeyPair),
    EdDsa(Ed25519KeyPair),
}

impl Signer {
    pub(crate) fn rsa() -> Self {
        let der = STANDARD.decode(RSA.split_whitespace().collect::<String>()).unwrap();
        Self::Rs256(RsaKeyPair::from_pkcs8(&der).unwrap())
    }

    pub(crate) fn p256() -> Self {
        let random = SystemRandom::new();
        let made = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        Self::Es256(EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, made.as_ref(), &random).unwrap())
    }

    pub(crate) fn ed25519() -> Self {
        let made = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Self::EdDsa(Ed25519KeyPair::from_pkcs8(made.as_ref()).unwrap())
    }

    pub(crate) fn algorithm(&self) -> &'static str {
        match self {
            Self::Rs256(_) => "RS256",
            Self::Es256(_) => "ES256",
            Self::EdDsa(_) => "EdDSA",
        }
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match self {
            Self::Rs256(key) => {
                let mut signature = vec![0; key.public().modulus_len()];
                key.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).unwrap();
                signature
            }
            Self::Es256(key) => key.sign(&random, message).unwrap().as_ref().to_vec(),
            Self::EdDsa(key) => key.sign(message).as_ref().to_vec(),
        }
    }

    /// What is published of it.
    pub(crate) fn jwk(&self, kid: &str) -> Value {
        let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        match self {
            Self::Rs256(key) => {
                let parts = ring::rsa::PublicKeyComponents::<Vec<u8>>::from(key.public());
                json!({"kty": "RSA", "kid": kid, "use": "sig", "alg": "RS256", "n": text(&parts.n), "e": text(&parts.e)})
            }
            Self::Es256(key) => {
                let point = key.public_key().as_ref();
                json!({"kty": "EC", "crv": "P-256", "kid": kid, "use": "sig", "x": text(&point[1..33]), "y": text(&point[33..])})
            }
            Self::EdDsa(key) => json!({"kty": "OKP", "crv": "Ed25519", "kid": kid, "x": text(key.public_key().as_ref())}),
        }
    }

    /// The key that is published, as bytes: what somebody would take for a shared secret.
    pub(crate) fn public(&self) -> Vec<u8> {
        match self {
            Self::Rs256(key) => key.public_key().as_ref().to_vec(),
            Self::Es256(key) => key.public_key().as_ref().to_vec(),
            Self::EdDsa(key) => key.public_key().as_ref().to_vec(),
        }
    }

    /// A token.
    pub(crate) fn token(&self, header: &Value, claims: &Value) -> String {
        signed(header, claims, |message| self.sign(message))
    }
}

/// A token with whatever signature.
pub(crate) fn signed(header: &Value, claims: &Value, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
    let text = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let message = format!("{}.{}", text(header), text(claims));
    let signature = URL_SAFE_NO_PAD.encode(sign(message.as_bytes()));
    format!("{message}.{signature}")
}

/// How the issuer answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    Good,
    /// It hangs up.
    Down,
    /// It takes the question and says nothing.
    Slow,
    /// Its answer does not end for a long time.
    Huge,
    /// Its answer is no JSON.
    Garbled,
    /// It says that it is somebody else.
    Other,
    /// It answers when it is told to.
    Held,
}

struct State {
    mood: Mood,
    jwks: Vec<Value>,
}

/// A running issuer.
pub(crate) struct Issuer {
    at: SocketAddr,
    state: Arc<Mutex<State>>,
    came: Arc<AtomicUsize>,
    asked: Arc<AtomicUsize>,
    held: Arc<AtomicUsize>,
    release: Arc<Notify>,
}

impl Issuer {
    pub(crate) async fn start(jwks: Vec<Value>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State { mood: Mood::Good, jwks }));
        let issuer =
            Self { at, state: state.clone(), came: Arc::default(), asked: Arc::default(), held: Arc::default(), release: Arc::default() };
        let (held, release) = (issuer.held.clone(), issuer.release.clone());
        let (came, asked, url) = (issuer.came.clone(), issuer.asked.clone(), issuer.url());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (state, came, asked, url) = (state.clone(), came.clone(), asked.clone(), url.clone());
                let (held, release) = (held.clone(), release.clone());
                tokio::spawn(async move {
                    let mut stream = BufReader::new(stream);
                    let mut line = String::new();
                    if stream.read_line(&mut line).await.is_err() {
                        return;
                    }
                    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
                    while stream.read_line(&mut line).await.is_ok_and(|read| read > 2) {}
                    came.fetch_add(1, Ordering::SeqCst);
                    let (mood, jwks) = {
                        let state = state.lock().unwrap();
                        (state.mood, state.jwks.clone())
                    };
                    let (status, body) = match path.as_str() {
                        "/realms/one/.well-known/openid-configuration" => {
                            let issuer = if mood == Mood::Other { "https://elsewhere.example" } else { &url };
                            (200, json!({"issuer": issuer, "jwks_uri": format!("{url}/keys")}).to_string())
                        }
                        "/realms/one/keys" => {
                            asked.fetch_add(1, Ordering::SeqCst);
                            (200, json!({ "keys": jwks }).to_string())
                        }
                        _ => (404, "{}".to_owned()),
                    };
                    let head = |length: usize| {
                        format!(
                            "HTTP/1.1 {status} x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
                        )
                    };
                    match mood {
                        Mood::Down => {}
                        Mood::Slow => std::future::pending().await,
                        Mood::Huge => {
                            let _ = stream.write_all(head(1 << 30).as_bytes()).await;
                            while stream.write_all(&[b' '; 65_536]).await.is_ok() {}
                        }
                        Mood::Garbled => {
                            let _ = stream.write_all(format!("{}nonsense", head(8)).as_bytes()).await;
                        }
                        Mood::Held => {
                            let released = release.notified();
                            held.fetch_add(1, Ordering::SeqCst);
                            released.await;
                            let _ = stream.write_all(format!("{}{body}", head(body.len())).as_bytes()).await;
                        }
                        Mood::Good | Mood::Other => {
                            let _ = stream.write_all(format!("{}{body}", head(body.len())).as_bytes()).await;
                        }
                    }
                });
            }
        });
        issuer
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/realms/one", self.at)
    }

    pub(crate) fn set(&self, mood: Mood) {
        self.state.lock().unwrap().mood = mood;
    }

    pub(crate) fn publish(&self, jwks: Vec<Value>) {
        self.state.lock().unwrap().jwks = jwks;
    }

    /// How often it was asked for anything, whatever it said.
    pub(crate) fn came(&self) -> usize {
        self.came.load(Ordering::SeqCst)
    }

    /// How often its keys were asked for.
    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    /// How many questions it has held back.
    pub(crate) fn held(&self) -> usize {
        self.held.load(Ordering::SeqCst)
    }

    /// Answers those.
    pub(crate) fn answer(&self) {
        self.release.notify_waiters();
    }

    /// What a good token says.
    pub(crate) fn claims(&self, subject: &str, scope: &str) -> Value {
        json!({"iss": self.url(), "aud": AUDIENCE, "sub": subject, "scope": scope, "iat": seconds(0), "nbf": seconds(0), "exp": seconds(600)})
    }
}

/// Now, and so many seconds later.
pub(crate) fn seconds(later: i64) -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap() + later
}
