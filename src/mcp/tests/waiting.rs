//! Waits: what is told meanwhile, and how they end.

use std::time::Duration;

use serde_json::{Value, json};

use super::fixture::Fixture;
use crate::config::Config;
use crate::model::event::Kind;
use crate::model::output::Output;

#[tokio::test]
async fn progress_rises_strictly_and_the_wait_ends_with_the_work() {
    let mut config = Config::default();
    config.lattice.work.progress_interval = crate::model::time::Span::millis(50);
    let fixture = Fixture::with(config);
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let id = client.assign("worker").await;
    let arguments = json!({"work_id": id, "timeout": "20s"});
    let request =
        client.begin("tools/call", json!({"name": "await_work", "arguments": arguments, "_meta": {"progressToken": "tok"}})).await;
    let first = client.notified("notifications/progress").await;
    assert!(first["params"]["message"].as_str().unwrap().starts_with("still working"), "{first}");
    fixture.happens(&id, 1, Kind::Accepted).await;
    for pct in [10.0, 20.0, 30.0] {
        fixture.happens(&id, 1, Kind::Progress { pct: Some(pct), message: Some("step\nby step".into()) }).await;
    }
    fixture.happens(&id, 1, Kind::Complete { result: Output::Inline(json!("done")), duration_ms: 1, checks: vec![] }).await;
    let answer = client.answer(request).await;
    assert_eq!(answer["result"]["structuredContent"]["result"], "done", "{answer}");
    let progress: Vec<&Value> =
        client.notifications.iter().filter(|n| n["method"] == "notifications/progress").map(|n| &n["params"]).collect();
    let mut last = first["params"]["progress"].as_f64().unwrap();
    for params in &progress {
        assert_eq!(params["progressToken"], "tok");
        let value = params["progress"].as_f64().unwrap();
        assert!(value > last, "{value} after {last}");
        last = value;
    }
    for text in ["10% step by step", "20% step by step", "30% step by step"] {
        assert!(progress.iter().any(|params| params["message"] == text), "no {text}: {progress:?}");
    }
}

#[tokio::test]
async fn a_wait_that_runs_out_or_is_cancelled_leaves_the_work_alone() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let id = client.assign("worker").await;
    let waited = client.call("await_work", json!({"work_id": id, "timeout": "20ms"})).await;
    assert_eq!((&waited["status"], &waited["note"]), (&json!("PENDING"), &json!("still working, call await_work again")));
    let request = client.begin("tools/call", json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "1h"}})).await;
    client.send(&json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": request}})).await;
    client.send(&json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}})).await;
    assert_eq!(client.call("check_work", json!({"work_id": id})).await["status"], "PENDING");
    // A wait in any mode ends with the first; one that hangs up ends its waits.
    let other = client.assign("worker").await;
    fixture.completes(&other, json!("x")).await;
    let any = client.call("await_work", json!({"work_ids": [id, other], "mode": "any", "timeout": "10s"})).await;
    assert_eq!(any["works"][1]["status"], "COMPLETE");
    assert!(any.get("note").is_none(), "{any}");
    client.begin("tools/call", json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "1h"}})).await;
    assert!(client.leave().await < Duration::from_secs(2));
}
