//! Lines: many at once, broken ones, long ones, the last one.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use super::fixture::Fixture;
use crate::model::size::Size;

#[tokio::test]
async fn calls_of_one_connection_run_at_once() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let id = client.assign("worker").await;
    let begun = Instant::now();
    for _ in 0..10 {
        client.begin("tools/call", json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "300ms"}})).await;
    }
    for _ in 0..10 {
        client.receive().await;
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn more_calls_than_there_is_room_for_are_refused_clearly() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let id = client.assign("worker").await;
    for _ in 0..1030 {
        client.begin("tools/call", json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "30s"}})).await;
    }
    let refused = client.receive().await;
    assert!(refused["result"]["content"][0]["text"].as_str().unwrap().starts_with("1024 requests of this connection"), "{refused}");
    fixture.completes(&id, json!("x")).await;
    for _ in 0..1029 {
        client.receive().await;
    }
}

#[tokio::test]
async fn what_is_not_json_or_too_long_does_not_end_the_server() {
    let fixture = Fixture::new();
    let mut client = fixture.raw(Size::kib(64));
    for (bytes, code) in [
        (&b"{not json}\n"[..], -32700),
        (b"\xff\xfe\"broken\"\n", -32700),
        (b"[]\n", -32600),
        (b"42\n", -32600),
        (b"{\"jsonrpc\": \"2.0\", \"id\": {}, \"method\": \"ping\"}\n", -32600),
    ] {
        client.send_bytes(bytes).await;
        let answer = client.receive().await;
        assert_eq!((&answer["error"]["code"], &answer["id"]), (&json!(code), &Value::Null), "{answer}");
        assert!(answer.as_object().unwrap().contains_key("id"));
    }
    // Before the handshake nothing but a request reaches rmcp, which would end.
    client.send_bytes(b"\n\r\n  \n{\"jsonrpc\": \"2.0\", \"method\": \"notifications/cancelled\", \"params\": {\"requestId\": 3}}\n").await;
    client.send_bytes(b"{\"jsonrpc\": \"2.0\", \"id\": 1, \"result\": {}}\n").await;
    let early = client.request("tools/list", json!({})).await;
    assert!(early["error"]["message"].as_str().unwrap().contains("_meta"), "{early}");
    let hello = json!({"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}});
    client.request("initialize", hello).await;
    let long = format!("{{\"jsonrpc\": \"2.0\", \"id\": 7, \"method\": \"ping\", \"params\": {{\"x\": \"{}\"}}}}\n", "x".repeat(10 << 20));
    client.send_bytes(long.as_bytes()).await;
    let answer = client.receive().await;
    assert_eq!(answer["error"]["code"], -32600, "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("65536 bytes"));
    let unreadable = json!({"jsonrpc": "2.0", "id": 8, "method": "tools/call"});
    client.send(&unreadable).await;
    let answer = client.receive().await;
    assert_eq!(answer["id"], 8, "{answer}");
    assert_eq!(client.request("tools/list", json!({})).await["result"]["tools"].as_array().unwrap().len(), 8);
    assert!(client.leave().await < Duration::from_secs(2));
}

#[tokio::test]
async fn a_line_as_long_as_allowed_is_served_and_the_last_one_needs_no_newline() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let task = "t".repeat(7 << 20);
    let assigned = client.call("assign_work", json!({"agent_name": "worker", "task": task})).await;
    assert_eq!(assigned["status"], "ASSIGNED");
    client.send_bytes(br#"{"jsonrpc": "2.0", "id": 99, "method": "ping"}"#).await;
    client.write.as_mut().unwrap().shutdown().await.unwrap();
    let answer = client.answer(99).await;
    assert_eq!(answer["result"], json!({}));
}
