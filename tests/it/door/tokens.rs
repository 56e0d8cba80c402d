//! Named tokens, and the sessions that are opened with them.

use std::sync::Arc;

use futures_util::future::join_all;
use lattice_mcp::config::{self, Secret};
use lattice_mcp::http;
use serde_json::json;

use super::{ANN, BOB, EVE, OPS, by, calls, ends, listening, lists, tokens_file, with_tokens};
use crate::http::{Door, Memory, in_session};
use crate::lifecycle::eventually;
use crate::web::{Ask, Wire, call, initialize, modern};

#[tokio::test]
async fn named_tokens_come_and_go_while_the_server_runs() {
    let (_dir, file) = tokens_file();
    let door = Door::open(with_tokens(&file)).await;
    let status = async |token: &str| by(token, lists()).at(door.at).await.status();
    assert_eq!((status(ANN).await, status("a-token-of-tomorrow").await), (200, 401));
    let mut stream = listening(door.at, ANN).await.unwrap();
    let mut waiting = Wire::open(door.at).await;
    waiting.send(by(ANN, modern(call(7, "sleep", &json!({ "ms": 60_000 })))).text()).await;

    std::fs::write(&file, "new: { token: a-token-of-tomorrow }\nbob: { token: bobs-token-0123456789, scopes: [read, assign] }\n").unwrap();
    eventually("the token is revoked", async || (status(ANN).await == 401).then_some(())).await;
    assert_eq!((status("a-token-of-tomorrow").await, status(BOB).await), (200, 200));
    assert!(ends(&mut stream).await, "whoever listened by it hears no more");
    let refused = tokio::time::timeout(std::time::Duration::from_secs(20), waiting.head()).await;
    assert_eq!(refused.expect("nor does whoever waited").unwrap().status, 401);

    std::fs::remove_file(&file).unwrap();
    eventually("all are revoked", async || (status(BOB).await == 401).then_some(())).await;
}

#[tokio::test]
async fn each_token_may_do_what_its_scopes_say() {
    let (_dir, file) = tokens_file();
    let door = Door::open(with_tokens(&file)).await;
    for (token, tool, expected) in [
        (EVE, "check_work", 200),
        (EVE, "await_work", 200),
        (EVE, "assign_work", 403),
        (EVE, "answer_work", 403),
        (EVE, "cancel_work", 403),
        (EVE, "escalate", 403),
        (BOB, "assign_work", 200),
        (OPS, "cancel_work", 200),
    ] {
        let reply = by(token, calls(tool)).at(door.at).await;
        assert_eq!(reply.status(), expected, "{token} {tool}");
        if expected == 403 {
            let challenge = reply.get("www-authenticate").unwrap();
            assert_eq!(challenge, "Bearer error=\"insufficient_scope\", scope=\"read assign\"", "{tool}");
            assert!(reply.error().contains("the scope assign"), "{reply:?}");
        }
    }
    assert_eq!(by(EVE, lists()).at(door.at).await.status(), 200);
    // What answers a question of ours answers an agent.
    let answer = by(EVE, Ask::mcp(&json!({ "jsonrpc": "2.0", "id": 1, "result": {} })));
    assert_eq!(answer.at(door.at).await.status(), 403);
    let told = door.turned.lock().unwrap().clone();
    assert!(told.iter().any(|turned| turned.cause == "scope"), "{told:?}");
    assert!(told.iter().all(|turned| turned.principal.as_ref().unwrap().as_str() == "token:eve" && turned.peer == "127.0.0.1"), "{told:?}");
}

#[tokio::test]
async fn the_token_of_the_settings_stands_beside_the_named_ones() {
    let (_dir, file) = tokens_file();
    let door = Door::open(config::Http { token: Some(Secret::new("s3cret")), ..with_tokens(&file) }).await;
    for token in ["s3cret", ANN] {
        assert_eq!(by(token, calls("assign_work")).at(door.at).await.status(), 200, "{token}");
    }
}

#[tokio::test]
async fn a_session_is_of_whoever_opened_it_also_after_a_restart() {
    let (_dir, file) = tokens_file();
    let table = Arc::new(Memory::default());
    let door = Door::on(with_tokens(&file), table.clone()).await;
    let id = opened(&door, ANN).await;
    let ask = in_session(&call(2, "assign_work", &json!({})), &id);
    let stream = Ask::new("GET", "/mcp").with("Accept", "text/event-stream").with("Mcp-Session-Id", &id);
    let end = Ask::new("DELETE", "/mcp").with("Mcp-Session-Id", &id);
    // A version in the message makes it no newer client's.
    let with_version = |mut message: serde_json::Value, version: &str| {
        message["params"]["_meta"] = json!({ "io.modelcontextprotocol/protocolVersion": version });
        in_session(&message, &id)
    };
    let of_old = with_version(call(2, "assign_work", &json!({})), "2025-11-25").with("MCP-Protocol-Version", "2025-11-25");
    let note = with_version(json!({ "jsonrpc": "2.0", "method": "notifications/cancelled", "params": { "requestId": 7 } }), "2026-07-28");
    let answer = with_version(json!({ "jsonrpc": "2.0", "id": 0, "result": { "action": "accept" }, "params": {} }), "2026-07-28");
    let others = [&ask, &stream, &end, &of_old, &note, &answer].map(Clone::clone);
    for asked in &others {
        let reply = by(BOB, asked.clone()).at(door.at).await;
        assert_eq!(reply.status(), 404, "{asked:?}");
    }
    // What is a newer client's is nobody's session.
    let newer = by(BOB, modern(call(2, "assign_work", &json!({}))).with("Mcp-Session-Id", &id)).at(door.at).await;
    assert_eq!((newer.status(), newer.text.contains("Request")), (200, true), "{newer:?}");
    for own in [&ask, &of_old] {
        let reply = by(ANN, own.clone()).at(door.at).await;
        assert_eq!((reply.status(), reply.text.contains("Session")), (200, true), "{reply:?}");
    }
    assert!(door.turned.lock().unwrap().iter().any(|turned| turned.cause == "session"));
    door.close().await;

    let again = Door::on(with_tokens(&file), table).await;
    for asked in &others {
        assert_eq!(by(BOB, asked.clone()).at(again.at).await.status(), 404, "{asked:?}");
    }
    // What means no session takes none.
    let sessionless = note.with("MCP-Protocol-Version", "2026-07-28").with("Mcp-Method", "notifications/cancelled");
    assert_eq!(by(BOB, sessionless).at(again.at).await.status(), 202);
    assert_eq!(by(BOB, of_old.clone().with("MCP-Protocol-Version", "2025-06-18")).at(again.at).await.status(), 404);
    assert_eq!(by(ANN, ask.clone()).at(again.at).await.status(), 200);
    assert_eq!(by(BOB, ask).at(again.at).await.status(), 404);
    assert_eq!(by(ANN, end).at(again.at).await.status(), 204);
}

/// Opens a session with a token; its id.
async fn opened(door: &Door, token: &str) -> String {
    let opened = by(token, Ask::mcp(&initialize())).at(door.at).await;
    let id = opened.get("mcp-session-id").unwrap().to_owned();
    let done = by(token, in_session(&json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }), &id)).at(door.at).await;
    assert_eq!(done.status(), 202);
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_take_up_a_session_after_a_restart_and_only_its_owners_get_in() {
    let (_dir, file) = tokens_file();
    let table = Arc::new(Memory::default());
    let door = Door::on(with_tokens(&file), table.clone()).await;
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(opened(&door, ANN).await);
    }
    door.close().await;

    let again = Door::on(with_tokens(&file), table).await;
    for id in ids {
        let ask = |token, n: u32| {
            let asked = by(token, in_session(&call(n, "check_work", &json!({})), &id));
            async move { (token, asked.at(again.at).await.status()) }
        };
        let all = join_all((10..18).map(|n| ask(if n % 2 == 0 { ANN } else { BOB }, n)));
        let all = tokio::time::timeout(std::time::Duration::from_secs(20), all).await.expect("all are answered");
        assert!(all.iter().all(|(token, status)| *status == if *token == ANN { 200 } else { 404 }), "{all:?}");
    }
}

#[tokio::test]
async fn a_token_in_the_address_is_refused_also_beside_a_good_one() {
    let (_dir, file) = tokens_file();
    let door = Door::open(with_tokens(&file)).await;
    for query in ["access_token=x", &format!("a=b&ACCESS_TOKEN={ANN}"), &format!("token={ANN}")] {
        let path = format!("/mcp?{query}");
        assert_eq!(Ask::new("POST", &path).at(door.at).await.status(), 401, "{query}");
        let beside = by(ANN, Ask::new("POST", &path)).at(door.at).await;
        assert_eq!(beside.status(), 400, "{query}");
        assert!(beside.error().contains("stands in the address"), "{beside:?}");
    }
    assert_eq!(by(ANN, Ask::new("GET", "/mcp?page=2").with("Accept", "text/event-stream")).at(door.at).await.status(), 400, "no session");
}

#[tokio::test]
async fn named_tokens_guard_an_address_that_is_open_to_the_network() {
    let (_dir, file) = tokens_file();
    assert!(http::bind(&with_tokens(&file), "0.0.0.0:0".parse().unwrap()).await.is_ok());
    let open = config::Http { open_to_all: true, ..Default::default() };
    assert!(http::bind(&open, "0.0.0.0:0".parse().unwrap()).await.is_ok());
    std::fs::write(&file, "ann: { token: short }\n").unwrap();
    let error = http::bind(&with_tokens(&file), "0".parse().unwrap()).await.err().unwrap().to_string();
    assert!(error.contains("tokens.yaml:1: ann: token is a text of at least 16"), "{error}");
}
