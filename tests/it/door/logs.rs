//! What the door says of what it refused, and what it never says.

use serde_json::{Value, json};

use super::issuer::{Issuer, Signer};
use super::server::Server;
use super::{ANN, BOB, EVE, OPS, TOKENS, by, calls, lists};
use crate::lifecycle::{Place, eventually};
use crate::rpc::binary;
use crate::web::{Ask, call, initialize};

/// A server that says all that it can.
async fn loud(place: &Place, issuer: &Issuer) -> Server {
    let file = place.data.path().join("tokens.yaml");
    std::fs::write(&file, TOKENS).unwrap();
    let mut command = binary(place.data.path(), place.agents.path());
    command.args(["--log", "trace"]).env("LATTICE_HTTP_TOKEN", "the-one-secret-token");
    command.env("LATTICE_HTTP_TOKENS_FILE", &file).env("LATTICE_HTTP_RELOAD_INTERVAL", "50ms");
    command.env("LATTICE_HTTP_OAUTH_ISSUER", issuer.url()).env("LATTICE_HTTP_PUBLIC_URL", "https://lattice.example");
    Server::start(command).await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_the_log_of_a_run_that_says_all_it_can() {
    let place = Place::new();
    let signer = Signer::p256();
    let issuer = Issuer::start(vec![signer.jwk("one")]).await;
    let server = loud(&place, &issuer).await;
    let head = json!({"alg": "ES256", "kid": "one"});
    let jwt = signer.token(&head, &issuer.claims("ann", "assign"));
    let stale = signer.token(&head, &json!({"iss": issuer.url(), "aud": "x", "sub": "ann", "exp": 1}));
    let basic = "QWxhZGRpbjpvcGVuc2VzYW1l";
    for token in ["the-one-secret-token", ANN, &jwt] {
        assert_eq!(by(token, lists()).at(server.at).await.status(), 200);
        assert_eq!(by(token, Ask::mcp(&initialize())).at(server.at).await.status(), 200);
        let assigned =
            by(token, crate::web::modern(call(2, "assign_work", &json!({"agent_name": "upper", "task": "x"})))).at(server.at).await;
        assert_eq!(assigned.status(), 200, "{assigned:?}");
    }
    for ask in [
        by("a-guess-of-a-token-0001", lists()),
        by(&stale, lists()),
        by(EVE, calls("assign_work")),
        by(BOB, Ask::new("POST", &format!("/mcp?access_token={OPS}"))),
        Ask::new("POST", &format!("/mcp?token={OPS}")),
        lists().with("Authorization", &format!("Basic {basic}")),
        by(ANN, lists()).with("Host", "evil.example"),
        by(ANN, lists()).with("Origin", "https://evil.example"),
    ] {
        assert!(ask.at(server.at).await.status() >= 400);
    }
    let changed = TOKENS.replace("bobs-token-0123456789", "bobs-other-token-0123");
    std::fs::write(place.data.path().join("tokens.yaml"), format!("{changed}zed: {{ token: short-secret }}\n")).unwrap();
    eventually("the broken file is said", async || server.log.lock().unwrap().contains("zed: token is a text").then_some(())).await;
    assert_eq!(by(BOB, lists()).at(server.at).await.status(), 200, "a broken file leaves those of before");
    assert_eq!(by("bobs-other-token-0123", lists()).at(server.at).await.status(), 401);
    let log = server.log.lock().unwrap().clone();
    assert!(log.contains("TRACE") && log.contains("refused an HTTP request"), "it says little: {log:.2000}");
    let parts = [&jwt, &stale].map(|token| token.rsplit('.').next().unwrap().to_owned());
    let secrets = [
        "the-one-secret-token",
        ANN,
        BOB,
        EVE,
        OPS,
        &jwt,
        &stale,
        "a-guess-of-a-token-0001",
        basic,
        "bobs-other-token-0123",
        "short-secret",
    ];
    for secret in secrets.into_iter().chain(parts.iter().map(String::as_str)) {
        let line = log.lines().find(|line| line.contains(secret));
        assert!(line.is_none(), "the log says {secret}: {}", line.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_requests_are_told_to_the_lattice() {
    let place = Place::new();
    let issuer = Issuer::start(vec![Signer::p256().jwk("one")]).await;
    let server = loud(&place, &issuer).await;
    for ask in [
        by(EVE, calls("cancel_work")),
        by("a-guess-of-a-token-0001", lists()),
        by(ANN, lists()).with("Host", "evil.example"),
        by(ANN, lists()).with("Origin", "https://evil.example"),
    ] {
        assert!(ask.at(server.at).await.status() >= 400);
    }
    let told = eventually("all four are told", async || {
        let output = binary(place.data.path(), place.agents.path()).args(["events", "--json"]).output().await.unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let events: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let refused: Vec<Value> = events.into_iter().filter(|event| event["type"] == "request.refused").collect();
        (refused.len() == 4).then_some(refused)
    })
    .await;
    let causes: Vec<&str> = told.iter().map(|event| event["request"]["cause"].as_str().unwrap()).collect();
    assert_eq!(causes, ["scope", "credentials", "host", "origin"], "{told:?}");
    assert_eq!((&told[0]["request"]["principal"], &told[0]["request"]["peer"]), (&json!("token:eve"), &json!("127.0.0.1")));
    let output = binary(place.data.path(), place.agents.path()).args(["events"]).output().await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("from 127.0.0.1, token:eve: scope"), "{text}");
}
