//! The orchestrator dies, and what it assigned is anybody's to wait for, call off and answer.

use serde_json::json;

use super::fleet::{Fleet, kill, look, until_online};
use super::witness::{Ledger, examine};
use crate::lifecycle::reaches;
use crate::nats_server::NatsServer;

#[tokio::test(flavor = "multi_thread")]
async fn works_of_a_killed_orchestrator_are_awaited_cancelled_and_answered_by_another() {
    let server = NatsServer::start();
    let mut fleet = Fleet::new(&server.url());
    fleet.agent("fleet", "gated", "wait_for all\nprintf %s \"$LATTICE_TASK\"");
    fleet.agent("fleet", "endless", "wait_for never");
    let asks = "read -r work\necho '::lattice {\"escalate\": {\"reason\": \"which colour?\"}}'\nread -r answer\nprintf %s \"$answer\"";
    fleet.agent_with("fleet", "asker", "", true, asks);
    let _leaf = fleet.leaf("north", "fleet");
    let first = fleet.desk("first").await;
    until_online(&first, &["gated", "endless", "asker"]).await;
    let mut ledger = Ledger::default();
    let waits = ledger.assign(&first, "gated", "wait for me").await;
    let runs = ledger.assign(&first, "endless", "stop me").await;
    let later = ledger.assign_with(&first, json!({"agent_name": "asker", "task": "answer me"})).await;
    kill(first).await;
    let second = fleet.desk("second").await;
    assert_eq!(reaches(&second, &later, "ESCALATED").await["question"]["reason"], "which colour?");
    fleet.until_begun(&runs, 1).await;
    let cancelled = second.call("cancel_work", json!({"work_id": runs, "reason": "nobody waits"})).await;
    assert_eq!((&cancelled["status"], &cancelled["reason"]), (&json!("CANCELLED"), &json!("nobody waits")), "{cancelled}");
    second.call("answer_work", json!({"work_id": later, "answer": "blue"})).await;
    let answered = second.settled(&later).await;
    assert_eq!(answered["status"], "COMPLETE", "{answered}");
    assert!(answered["result"].to_string().contains("blue"), "{answered}");
    assert_eq!(look(&second, &waits).await["status"], "ACCEPTED");
    fleet.open("all");
    assert_eq!(second.settled(&waits).await["result"], "wait for me");
    examine(&fleet, &ledger).await.assert_none();
    fleet.assert_calm();
}
