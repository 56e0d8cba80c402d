//! The server is alone: what lives at home goes on, what lives elsewhere waits and says so, and all of it is one lattice again later.

use serde_json::{Value, json};

use super::fleet::{Fleet, look, looked_up, until_online};
use super::witness::{Ledger, examine, messages, until_settled};
use crate::lifecycle::eventually;
use crate::nats_server::NatsServer;
use crate::rpc::Client;

/// Processes that notice soon that a server is there or is not.
fn fleet(server: &NatsServer) -> Fleet {
    let mut fleet = Fleet::new(&server.url());
    fleet.set("LATTICE_WORK_LEASE", "2s");
    fleet.set("LATTICE_RETRY_MAX_ATTEMPTS", "50");
    fleet.set("LATTICE_NATS_RECONNECT_DELAY_MAX", "300ms");
    fleet
}

/// Assigns as soon as the process has found out how things stand.
async fn until_taken(ledger: &mut Ledger, desk: &Client, agent: &str, task: &str) -> String {
    eventually(&format!("{agent} takes {task}"), async || {
        let unique = format!("{task} {}", super::now_ms());
        ledger.ask(&unique);
        let answer = desk.try_call("assign_work", json!({"agent_name": agent, "task": unique})).await.unwrap().ok()?;
        Some(ledger.acknowledge(&unique, &answer))
    })
    .await
}

/// A refusal that says why; until the process has found out, an order may still be on its way.
async fn refused(ledger: &mut Ledger, desk: &Client, agent: &str) -> String {
    eventually("a refusal", async || {
        let task = format!("refused {}", super::now_ms());
        ledger.ask(&task);
        match desk.try_call("assign_work", json!({"agent_name": agent, "task": task})).await.unwrap() {
            Ok(answer) => {
                ledger.acknowledge(&task, &answer);
                None
            }
            Err(text) => Some(text),
        }
    })
    .await
}

fn is_noted(work: &Value) -> bool {
    work["note"].as_str().is_some_and(|note| note.contains("cannot be reached"))
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_server_is_away_local_work_goes_on_and_remote_work_waits_and_says_so() {
    let mut server = NatsServer::start();
    let mut fleet = fleet(&server);
    fleet.agent("desk", "at-desk", "printf %s \"$LATTICE_TASK\"");
    fleet.agent_with("fleet", "gated", "limits: { max_parallel: 1 }", false, "wait_for all\nprintf %s \"$LATTICE_TASK\"");
    let _leaf = fleet.leaf("north", "fleet");
    let desk = fleet.desk("desk").await;
    until_online(&desk, &["at-desk", "gated"]).await;
    let mut ledger = Ledger::default();
    let runs = ledger.assign(&desk, "gated", "runs elsewhere").await;
    let waits = ledger.assign(&desk, "gated", "waits elsewhere").await;
    let held = fleet.until_begun(&runs, 1).await.remove(0);
    eventually("the desk sees that it runs", async || (look(&desk, &runs).await["status"] == "ACCEPTED").then_some(())).await;
    server.kill();

    let refusal = refused(&mut ledger, &desk, "gated").await;
    eprintln!("alone: an order for elsewhere: {refusal}");
    assert!(refusal.contains("cannot be reached"), "{refusal}");
    for n in 0..3 {
        let id = until_taken(&mut ledger, &desk, "at-desk", &format!("alone {n}")).await;
        assert_eq!(desk.settled(&id).await["status"], "COMPLETE");
    }
    for (id, status) in [(&runs, "ACCEPTED"), (&waits, "PENDING")] {
        let told = eventually("it is said that the server is away", async || {
            let answer = desk.try_call("check_work", json!({"work_id": id})).await.unwrap().ok()?;
            let work = answer["works"].get(0).cloned().unwrap_or(answer);
            is_noted(&work).then_some(work)
        })
        .await;
        eprintln!("alone: {status}: {}", told["note"]);
        assert_eq!(told["status"], status, "{told}");
    }
    // The other side finishes what it runs, and cannot tell anybody.
    fleet.open("all");
    eventually("it ends elsewhere", async || {
        fleet.ran().iter().any(|ran| !ran.begins && ran.work_id == runs && ran.attempt == held.attempt).then_some(())
    })
    .await;

    server.revive();
    let ids = ledger.ids();
    until_settled(&desk, &ids).await;
    for (id, work) in looked_up(&desk, &ids).await {
        assert_eq!((&work["status"], &work["result"]), (&json!("COMPLETE"), &json!(ledger.orders[&id].task)), "{work}");
        assert!(!is_noted(&work), "nothing is away any more: {work}");
    }
    until_told(&fleet, &ids).await;
    examine(&fleet, &ledger).await.assert_none();
    fleet.assert_calm();
}

/// What was done alone is on the stream soon after, not at once.
async fn until_told(fleet: &Fleet, ids: &[String]) {
    eventually("everything is on the stream", async || {
        let told = messages(fleet.url(), "lattice.default.work.>").await;
        let complete = |id: &String| {
            told.iter().any(|(subject, body)| subject.contains(id) && String::from_utf8_lossy(body).contains("WORK_COMPLETE"))
        };
        ids.iter().all(complete).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stations_that_start_while_the_server_is_down_join_when_it_comes() {
    let mut server = NatsServer::start();
    server.kill();
    let mut fleet = fleet(&server);
    fleet.agent("desk", "at-desk", "printf %s \"$LATTICE_TASK\"");
    fleet.agent("fleet", "worker", "printf %s \"$LATTICE_TASK\"");
    let _leaf = fleet.leaf("north", "fleet");
    eventually("the leaf finds no server", async || fleet.log("north").contains("cannot be reached").then_some(())).await;
    let desk = fleet.desk("desk").await;
    let mut ledger = Ledger::default();
    let alone = until_taken(&mut ledger, &desk, "at-desk", "before there was a server").await;
    assert_eq!(desk.settled(&alone).await["status"], "COMPLETE");
    // Nobody has told it of the worker yet, and the answer says that there may be more than it knows.
    let unknown = refused(&mut ledger, &desk, "worker").await;
    assert!(unknown.contains("cannot be reached"), "{unknown}");
    let unknown = desk.refusal("get_agent_schema", json!({"agent_name": "worker"})).await;
    assert!(unknown.contains("cannot be reached"), "{unknown}");

    server.revive();
    until_online(&desk, &["at-desk", "worker"]).await;
    for n in 0..3 {
        let id = ledger.assign(&desk, "worker", &format!("after {n}")).await;
        assert_eq!(desk.settled(&id).await["status"], "COMPLETE");
    }
    let newcomer = fleet.desk("newcomer").await;
    until_online(&newcomer, &["at-desk", "worker"]).await;
    let id = ledger.assign(&newcomer, "at-desk", "from a newcomer").await;
    assert_eq!(newcomer.settled(&id).await["status"], "COMPLETE");
    until_told(&fleet, &ledger.ids()).await;
    examine(&fleet, &ledger).await.assert_none();
    fleet.assert_calm();
}
