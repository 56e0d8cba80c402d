//! Works whose last answer stands on the log while nobody woke them for it: whoever gave it died, or was cut off, in between.

use lattice_mcp::config::Config;
use lattice_mcp::model::event::{Answerer, Event, Kind, Needs, Side};
use lattice_mcp::telemetry::{new_answer_id, new_instance, now};
use lattice_mcp::transport::local as store;
use lattice_mcp::works::record;
use serde_json::json;

use crate::ground::Ground;
use crate::lifecycle::reaches;
use crate::rpc::Client;

/// Asks, and ends to wait for the answer.
const ASKS: &str = r#"case "$(cat)" in *'"answer":"blue"'*) printf 'it is blue'; exit;; esac
echo '::lattice {"escalate": {"reason": "which colour?"}}'"#;

/// A work that has parked with a question, and somebody's answer on the log, and nothing more.
async fn answered(settings: &[(&str, &str)]) -> (Ground, Client, String) {
    let mut ground = Ground::local();
    ground.set("LATTICE_WORK_MAX_PARALLEL", "1");
    settings.iter().for_each(|(name, value)| ground.set(&format!("LATTICE_WORK_{name}"), value));
    ground.agent("asks", "", ASKS);
    let client = ground.station().await;
    let id = client.assign("asks", "x").await;
    // There is room for another one once nothing is left of the attempt, not even a look at what was said meanwhile.
    let after = client.assign("upper", "x").await;
    client.settled(&after).await;
    let asking = reaches(&client, &id, "ESCALATED").await;
    let store = store::open(&ground.place.data.path().join("default"), &Config::default().lattice.storage).unwrap();
    let event = Event {
        work_id: id.parse().unwrap(),
        run_id: asking["run_id"].as_str().unwrap().parse().unwrap(),
        at: now(),
        station: "here".parse().unwrap(),
        instance: new_instance(),
        side: Side::Assigner,
        attempt: 0,
        kind: Kind::Answered { ask: 1, answer: "blue".into(), by: Some(Answerer { who: Needs::Orchestrator, id: new_answer_id() }) },
    };
    store.transport().log.append(vec![record(event)]).await.unwrap();
    store.close();
    (ground, client, id)
}

async fn goes_on(client: &Client, id: &str) {
    let done = client.settled(id).await;
    assert_eq!((&done["status"], &done["result"]), (&json!("COMPLETE"), &json!("it is blue")), "{done}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_looks_after_what_waits_wakes_it() {
    let (_ground, client, id) = answered(&[("RECHECK", "200ms")]).await;
    goes_on(&client, &id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_answers_again_wakes_it() {
    let (_ground, client, id) = answered(&[("RECHECK", "1h")]).await;
    let refused = client.refusal("answer_work", json!({"work_id": id, "answer": "red", "ask": 1})).await;
    assert!(refused.contains("answered already"), "{refused}");
    goes_on(&client, &id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_does_not_fail_when_the_time_for_the_answer_is_up() {
    let (_ground, client, id) = answered(&[("RECHECK", "1h"), ("ANSWER_TIMEOUT", "5s")]).await;
    goes_on(&client, &id).await;
}
