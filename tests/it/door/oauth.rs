//! Tokens of an issuer: those that count, and all those that do not.

use std::time::{Duration, Instant};

use lattice_mcp::config::{self, OAuth};
use lattice_mcp::http;
use lattice_mcp::model::time::Span;
use serde_json::{Value, json};

use super::issuer::{AUDIENCE, Issuer, Mood, Signer, seconds, signed};
use super::{by, calls, ends, listening, lists};
use crate::http::Door;
use crate::lifecycle::eventually;
use crate::web::{Ask, Reply, Wire};

fn with_issuer(issuer: &Issuer) -> config::Http {
    let oauth = OAuth {
        issuer: Some(issuer.url()),
        skew: Span::secs(5),
        jwks_pause: Span::millis(200),
        jwks_timeout: Span::millis(500),
        ..OAuth::default()
    };
    config::Http { oauth, public_url: Some("https://lattice.example".into()), rate_refused: 1_000, ..Default::default() }
}

async fn status(door: &Door, token: &str) -> u16 {
    by(token, lists()).at(door.at).await.status()
}

fn header(signer: &Signer, kid: &str) -> Value {
    json!({"alg": signer.algorithm(), "typ": "at+jwt", "kid": kid})
}

#[tokio::test]
async fn clients_learn_where_to_get_a_token() {
    let issuer = Issuer::start(vec![Signer::rsa().jwk("one")]).await;
    let door = Door::open(with_issuer(&issuer)).await;
    let refused = lists().at(door.at).await;
    let place = "https://lattice.example/.well-known/oauth-protected-resource/mcp";
    let challenge = format!("Bearer resource_metadata=\"{place}\", scope=\"read assign\"");
    assert_eq!((refused.status(), refused.get("www-authenticate")), (401, Some(challenge.as_str())));
    for path in ["/.well-known/oauth-protected-resource", "/.well-known/oauth-protected-resource/mcp"] {
        let metadata = Ask::new("GET", path).with("Host", "lattice.example").at(door.at).await;
        assert_eq!(metadata.status(), 200, "{path}");
        let metadata = metadata.json();
        assert_eq!(metadata["resource"], AUDIENCE);
        assert_eq!(metadata["authorization_servers"], json!([issuer.url()]));
        assert_eq!(metadata["scopes_supported"], json!(["read", "assign", "admin"]));
        assert_eq!(metadata["bearer_methods_supported"], json!(["header"]));
    }
    assert_eq!(Ask::new("GET", "/.well-known/openid-configuration").at(door.at).await.status(), 404);
}

#[tokio::test]
async fn tokens_of_every_kind_of_key_count_by_their_scopes() {
    let signers = [("one", Signer::rsa()), ("two", Signer::p256()), ("three", Signer::ed25519())];
    let issuer = Issuer::start(signers.iter().map(|(kid, signer)| signer.jwk(kid)).collect()).await;
    let door = Door::open(with_issuer(&issuer)).await;
    for (kid, signer) in &signers {
        let reader = signer.token(&header(signer, kid), &issuer.claims("ann", "openid read"));
        assert_eq!(status(&door, &reader).await, 200, "{kid}");
        let refused = by(&reader, calls("assign_work")).at(door.at).await;
        assert_eq!(refused.status(), 403, "{kid}");
        let challenge = refused.get("www-authenticate").unwrap();
        assert!(challenge.starts_with("Bearer error=\"insufficient_scope\", scope=\"read assign\", resource_metadata="), "{challenge}");
        let worker = signer.token(&header(signer, kid), &issuer.claims("ann", "assign"));
        assert_eq!(by(&worker, calls("assign_work")).at(door.at).await.status(), 200, "{kid}");
        let nobody = signer.token(&header(signer, kid), &issuer.claims("ann", "openid email"));
        assert_eq!(status(&door, &nobody).await, 403, "{kid}");
    }
    assert_eq!(issuer.asked(), 1, "the keys are fetched once");
}

#[tokio::test]
async fn scopes_may_have_a_prefix_and_tokens_without_them_a_default() {
    let signer = Signer::p256();
    let issuer = Issuer::start(vec![signer.jwk("one")]).await;
    let mut config = with_issuer(&issuer);
    config.oauth.scope_prefix = "lattice:".into();
    config.oauth.default_scope = Some(lattice_mcp::model::access::Scope::Read);
    let door = Door::open(config).await;
    let may = async |scope: &str| {
        let token = signer.token(&header(&signer, "one"), &issuer.claims("ann", scope));
        (status(&door, &token).await, by(&token, calls("assign_work")).at(door.at).await.status())
    };
    assert_eq!(may("lattice:assign").await, (200, 200));
    assert_eq!(may("assign").await, (200, 403));
    assert_eq!(may("").await, (200, 403));
}

fn explained(reply: &Reply, said: &str) {
    let challenge = reply.get("www-authenticate").unwrap_or_else(|| panic!("{reply:?}"));
    assert_eq!(reply.status(), 401, "{said}: {reply:?}");
    assert!(challenge.contains("error=\"invalid_token\"") && challenge.contains("resource_metadata="), "{challenge}");
    assert!(challenge.contains(said) && reply.error().contains(said), "{said}: {challenge}");
}

#[tokio::test]
async fn tokens_that_do_not_count_are_refused_with_the_reason() {
    let signer = Signer::rsa();
    let issuer = Issuer::start(vec![signer.jwk("one")]).await;
    let door = Door::open(with_issuer(&issuer)).await;
    let good = issuer.claims("ann", "admin");
    let head = header(&signer, "one");
    assert_eq!(status(&door, &signer.token(&head, &good)).await, 200);
    let changed = |name: &str, value: Value| {
        let mut claims = good.clone();
        claims[name] = value;
        signer.token(&head, &claims)
    };
    let headed = |name: &str, value: Value| {
        let mut head = head.clone();
        head[name] = value;
        signer.token(&head, &good)
    };
    let unsigned = signed(&json!({"alg": "none", "kid": "one"}), &good, |_| Vec::new());
    let secret = |message: &[u8]| {
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &signer.public());
        ring::hmac::sign(&key, message).as_ref().to_vec()
    };
    let stranger = Signer::p256();
    let mut tampered = signer.token(&head, &good);
    tampered.replace_range(tampered.len() - 12..tampered.len() - 8, "AAAA");
    for (token, said) in [
        (changed("exp", json!(seconds(-60))), "expired"),
        (changed("exp", json!("soon")), "exp is no time"),
        (changed("nbf", json!(seconds(600))), "does not count yet"),
        (changed("iat", json!(seconds(600))), "made in the future"),
        (changed("aud", json!("https://elsewhere.example/mcp")), "meant for somebody else"),
        (changed("aud", json!([])), "meant for somebody else"),
        (changed("iss", json!("https://evil.example")), "of another issuer"),
        (changed("sub", json!("")), "speaks of nobody"),
        (changed("sub", json!("a\nb")), "no name"),
        (changed("cnf", json!({"jkt": "x"})), "bound to a key"),
        (unsigned, "none"),
        (signed(&json!({"alg": "HS256", "kid": "one"}), &good, secret), "HS256"),
        (signed(&head, &good, |_| Vec::new()), "not signed"),
        (signed(&head, &good, |_| vec![0; 256]), "signature is wrong"),
        (tampered, "signature is wrong"),
        (headed("kid", json!("two")), "does not publish"),
        (headed("alg", json!("ES256")), "does not publish"),
        (headed("crit", json!(["b64"])), "crit"),
        (headed("typ", json!("logout+jwt")), "typ"),
        (stranger.token(&header(&stranger, "one"), &good), "does not publish"),
        ("no-jwt-at-all-and-no-token".to_owned(), "no signed token"),
    ] {
        explained(&by(&token, lists()).at(door.at).await, said);
    }
    let embedded = {
        // A key that comes with its token is nobody's word.
        let mut head = header(&stranger, "mine");
        head["jwk"] = stranger.jwk("mine");
        head["jku"] = json!("https://evil.example/keys");
        stranger.token(&head, &good)
    };
    explained(&by(&embedded, lists()).at(door.at).await, "does not publish");
}

#[tokio::test]
async fn a_flood_of_unknown_keys_leads_to_few_questions_and_holds_nobody_up() {
    let signer = Signer::ed25519();
    let issuer = Issuer::start(vec![signer.jwk("one")]).await;
    let mut config = with_issuer(&issuer);
    config.oauth.jwks_pause = Span::secs(60);
    config.rate_refused = 100_000;
    let door = Door::open(config).await;
    let good = signer.token(&header(&signer, "one"), &issuer.claims("ann", "read"));
    assert_eq!(status(&door, &good).await, 200);
    let begun = Instant::now();
    let flood = (0..300).map(|n| {
        let token = signer.token(&header(&signer, &format!("unknown-{n}")), &issuer.claims("eve", "read"));
        let at = door.at;
        async move { by(&token, lists()).at(at).await.status() }
    });
    let refused = futures_util::future::join_all(flood).await;
    assert!(refused.iter().all(|status| *status == 401), "{refused:?}");
    assert_eq!(status(&door, &good).await, 200);
    assert_eq!(issuer.asked(), 1, "asked again within the pause, after {:?}", begun.elapsed());
}

#[tokio::test]
async fn keys_may_change_while_the_server_runs() {
    let (old, new) = (Signer::rsa(), Signer::p256());
    let issuer = Issuer::start(vec![old.jwk("old")]).await;
    let mut config = with_issuer(&issuer);
    config.oauth.jwks_max_age = Span::secs(2);
    let door = Door::open(config).await;
    let by_old = old.token(&header(&old, "old"), &issuer.claims("ann", "read"));
    let by_new = new.token(&header(&new, "new"), &issuer.claims("ann", "read"));
    assert_eq!(status(&door, &by_old).await, 200);
    issuer.publish(vec![old.jwk("old"), new.jwk("new")]);
    eventually("the new key counts", async || (status(&door, &by_new).await == 200).then_some(())).await;
    assert_eq!(status(&door, &by_old).await, 200);
    issuer.publish(vec![new.jwk("new")]);
    eventually("the old key counts no more", async || (status(&door, &by_old).await == 401).then_some(())).await;
    assert_eq!(status(&door, &by_new).await, 200);
    // Another key under the same name.
    let other = Signer::p256();
    let by_other = other.token(&header(&other, "new"), &issuer.claims("ann", "read"));
    issuer.publish(vec![other.jwk("new")]);
    eventually("the key of the same name counts", async || (status(&door, &by_other).await == 200).then_some(())).await;
    assert_eq!(status(&door, &by_new).await, 401);
}

#[tokio::test]
async fn an_issuer_that_is_away_slow_huge_or_somebody_else_opens_no_door_and_closes_none() {
    let signer = Signer::p256();
    let issuer = Issuer::start(vec![signer.jwk("one")]).await;
    let good = signer.token(&header(&signer, "one"), &issuer.claims("ann", "read"));
    for mood in [Mood::Down, Mood::Slow, Mood::Huge, Mood::Garbled, Mood::Other] {
        issuer.set(mood);
        let door = Door::open(with_issuer(&issuer)).await;
        let begun = Instant::now();
        let refused = by(&good, lists()).at(door.at).await;
        assert_eq!((refused.status(), refused.get("retry-after")), (503, Some("10")), "{mood:?}: {refused:?}");
        assert!(refused.error().contains("cannot be checked at present"), "{refused:?}");
        assert!(!refused.error().contains("127.0.0.1"), "{refused:?}");
        assert!(door.turned.lock().unwrap().iter().any(|turned| turned.cause == "issuer"), "{mood:?}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{mood:?} took {:?}", begun.elapsed());
        assert_eq!(by("nonsense", lists()).at(door.at).await.status(), 401, "{mood:?}");
        issuer.set(Mood::Good);
        eventually("its tokens count", async || (status(&door, &good).await == 200).then_some(())).await;
        issuer.set(mood);
        let unknown = signer.token(&header(&signer, "two"), &issuer.claims("ann", "read"));
        let came = issuer.came();
        eventually("it is asked for an unknown key", async || {
            assert!(matches!(status(&door, &unknown).await, 401 | 503), "{mood:?}");
            (issuer.came() > came).then_some(())
        })
        .await;
        let begun = Instant::now();
        assert_eq!(status(&door, &good).await, 200, "{mood:?}: known keys count on");
        assert!(begun.elapsed() < Duration::from_secs(5), "{mood:?}");
        issuer.set(Mood::Good);
        door.close().await;
    }
}

#[tokio::test]
async fn whoever_listens_is_let_go_when_their_token_expires() {
    let signer = Signer::ed25519();
    let issuer = Issuer::start(vec![signer.jwk("one")]).await;
    let mut config = with_issuer(&issuer);
    config.oauth.skew = Span::millis(0);
    let door = Door::open(config).await;
    let mut claims = issuer.claims("ann", "read");
    claims["exp"] = json!(seconds(3));
    let token = signer.token(&header(&signer, "one"), &claims);
    let mut stream = listening(door.at, &token).await.unwrap();
    assert!(ends(&mut stream).await, "the stream went on");
    assert_eq!(status(&door, &token).await, 401);
}

#[tokio::test]
async fn an_issuer_guards_an_address_that_is_open_to_the_network() {
    let issuer = Issuer::start(vec![Signer::p256().jwk("one")]).await;
    let config = with_issuer(&issuer);
    for listen in ["0.0.0.0:0", "[::]:0"] {
        assert!(http::bind(&config, listen.parse().unwrap()).await.is_ok());
        let nameless = config::Http { public_url: None, ..config.clone() };
        let error = http::bind(&nameless, listen.parse().unwrap()).await.err().unwrap().to_string();
        assert!(error.contains("http.public_url"), "{error}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_keeps_no_new_key_from_the_others() {
    let (old, new) = (Signer::p256(), Signer::p256());
    let issuer = Issuer::start(vec![old.jwk("old")]).await;
    let mut config = with_issuer(&issuer);
    config.oauth.jwks_pause = Span::millis(500);
    config.oauth.jwks_timeout = Span::secs(30);
    let door = Door::open(config).await;
    let by_old = old.token(&header(&old, "old"), &issuer.claims("ann", "read"));
    assert_eq!(status(&door, &by_old).await, 200);
    issuer.publish(vec![old.jwk("old"), new.jwk("new")]);
    issuer.set(Mood::Held);
    let asked = issuer.held();
    let unknown = old.token(&header(&old, "unknown"), &issuer.claims("eve", "read"));
    eventually("the issuer is asked", async || {
        // Whoever asks does not wait for the answer.
        let mut wire = Wire::open(door.at).await;
        wire.send(by(&unknown, lists()).text()).await;
        drop(wire);
        (issuer.held() > asked).then_some(())
    })
    .await;
    issuer.set(Mood::Good);
    issuer.answer();
    let by_new = new.token(&header(&new, "new"), &issuer.claims("ann", "read"));
    let begun = Instant::now();
    assert_eq!(status(&door, &by_new).await, 200, "after {:?}", begun.elapsed());
}
