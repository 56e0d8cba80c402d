//! The server goes and comes, by a kill or by a freeze, while agents run: that is no fault of theirs.

use std::time::Duration;

use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

use super::fleet::{Fleet, Leaf, looked_up, until_online};
use super::witness::{Ledger, examine, until_settled};
use crate::lifecycle::eventually;
use crate::nats_server::NatsServer;
use crate::rpc::Client;

/// Longer than the lease.
const LONG: Duration = Duration::from_millis(2500);

fn fleet(server: &NatsServer) -> Fleet {
    let mut fleet = Fleet::new(&server.url());
    fleet.set("LATTICE_WORK_LEASE", "2s");
    fleet.set("LATTICE_NATS_RECONNECT_DELAY_MAX", "300ms");
    fleet.set("LATTICE_NATS_PING_INTERVAL", "1s");
    fleet.set("LATTICE_NATS_REQUEST_TIMEOUT", "1s");
    fleet
}

/// A leaf with an agent that tells how far it is, asks, and ends, each behind a gate; and an orchestrator.
async fn asking(fleet: &mut Fleet) -> (Leaf, Client) {
    let script = "read -r work\nwait_for tell\necho '::lattice {\"progress\": 50, \"message\": \"half way\"}'\n\
        wait_for ask\necho '::lattice {\"escalate\": {\"reason\": \"which colour?\"}}'\nread -r answer\nprintf '%s by attempt %s' \"$answer\" $LATTICE_ATTEMPT";
    fleet.agent_with("fleet", "asker", "limits: { max_attempts: 1 }", true, script);
    let leaf = fleet.leaf("north", "fleet");
    let desk = fleet.desk("desk").await;
    until_online(&desk, &["asker"]).await;
    (leaf, desk)
}

/// As `look`, while the server may be away.
async fn try_look(desk: &Client, id: &str) -> Option<Value> {
    let answer = desk.try_call("check_work", json!({"work_id": id})).await.unwrap().ok()?;
    Some(answer["works"].get(0).cloned().unwrap_or(answer))
}

/// What is asked of no work in particular is answered out of the run store, which has taken in all that stands on the log by then.
async fn is_known(desk: &Client, id: &str) {
    let all = desk.call("check_work", json!({})).await.to_string();
    assert!(all.contains(id), "{all}");
}

async fn is_answered(fleet: &Fleet, desk: &Client, ledger: &Ledger, id: &str) {
    let work = eventually("the question arrives", async || try_look(desk, id).await.filter(|work| work["status"] == "ESCALATED")).await;
    assert_eq!(work["question"]["reason"], "which colour?");
    desk.call("answer_work", json!({"work_id": id, "answer": "blue"})).await;
    let work = desk.settled(id).await;
    assert_eq!((&work["status"], &work["attempt"]), (&json!("COMPLETE"), &json!(1)), "it ran on as it was: {work}");
    assert!(work["result"].as_str().unwrap().ends_with("by attempt 1"), "{work}");
    assert_eq!(fleet.begun(id).len(), 1);
    examine(fleet, ledger).await.assert_none();
    fleet.assert_calm();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_runs_and_asks_outlives_its_server() {
    let mut server = NatsServer::start();
    let mut fleet = fleet(&server);
    let (_leaf, desk) = asking(&mut fleet).await;
    let mut ledger = Ledger::default();
    let id = ledger.assign(&desk, "asker", "x").await;
    fleet.until_begun(&id, 1).await;
    is_known(&desk, &id).await;
    server.kill();
    let told =
        eventually("it is said that the server is away", async || try_look(&desk, &id).await.filter(|work| work["note"].is_string())).await;
    eprintln!("outages: check_work says: {}", told["note"]);
    fleet.open("tell");
    fleet.open("ask");
    // Nothing can be awaited of a server that is not there: the lease has to run out.
    tokio::time::sleep(LONG).await;
    server.revive();
    is_answered(&fleet, &desk, &ledger, &id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_runs_and_asks_outlives_a_frozen_server() {
    let server = NatsServer::start();
    let mut fleet = fleet(&server);
    let (_leaf, desk) = asking(&mut fleet).await;
    let mut ledger = Ledger::default();
    let id = ledger.assign(&desk, "asker", "x").await;
    fleet.until_begun(&id, 1).await;
    is_known(&desk, &id).await;
    kill_process(server.pid(), Signal::STOP).unwrap();
    fleet.open("tell");
    fleet.open("ask");
    eventually("it is said that the server is away", async || try_look(&desk, &id).await.filter(|work| work["note"].is_string())).await;
    tokio::time::sleep(LONG).await;
    kill_process(server.pid(), Signal::CONT).unwrap();
    is_answered(&fleet, &desk, &ledger, &id).await;
}

/// The server goes away again and again while works begin and end: no outage counts as an attempt of anybody's.
#[tokio::test(flavor = "multi_thread")]
async fn outages_burn_no_attempts() {
    let mut server = NatsServer::start();
    let mut fleet = fleet(&server);
    fleet.agent_with("fleet", "once", "limits: { max_attempts: 1 }", false, "sleep 0.1\nprintf %s \"$LATTICE_TASK\"");
    let _leaf = fleet.leaf("north", "fleet");
    let desk = fleet.desk("desk").await;
    until_online(&desk, &["once"]).await;
    let mut ledger = Ledger::default();
    for round in 0..5 {
        eventually("orders are taken again", async || {
            let task = format!("r{round} {}", super::now_ms());
            ledger.ask(&task);
            let answer = desk.try_call("assign_work", json!({"agent_name": "once", "task": task})).await.unwrap().ok()?;
            Some(ledger.acknowledge(&task, &answer))
        })
        .await;
        let tasks: Vec<String> = (0..8).map(|n| format!("r{round}n{n}")).collect();
        tasks.iter().for_each(|task| ledger.ask(task));
        let orders = tasks.iter().map(|task| desk.try_call("assign_work", json!({"agent_name": "once", "task": task})));
        let (answers, ()) = tokio::join!(futures_util::future::join_all(orders), async {
            tokio::time::sleep(Duration::from_millis(40 * round)).await;
            server.kill();
            server.revive();
        });
        for (task, answer) in tasks.iter().zip(answers) {
            if let Ok(answer) = answer.unwrap() {
                ledger.acknowledge(task, &answer);
            }
        }
    }
    let ids = ledger.ids();
    until_settled(&desk, &ids).await;
    for (id, work) in looked_up(&desk, &ids).await {
        assert_eq!((&work["status"], &work["result"]), (&json!("COMPLETE"), &json!(ledger.orders[&id].task)), "{work}");
    }
    let found = examine(&fleet, &ledger).await;
    eprintln!("outages: {} works acknowledged, {} lost, {} settled twice", ids.len(), found.lost.len(), found.doubly.len());
    found.assert_none();
    fleet.assert_calm();
}

/// When the server is back, all holds have run out at once: whoever comes first must not take what the others still run.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_takes_no_work_from_those_who_run_it() {
    let mut server = NatsServer::start();
    let mut fleet = fleet(&server);
    fleet.set("LATTICE_WORK_MAX_PARALLEL", "4");
    fleet.agent_with("fleet", "gated", "limits: { max_attempts: 1 }", false, "wait_for all\nprintf %s \"$LATTICE_TASK\"");
    fleet.agent("fleet", "quick", "printf %s \"$LATTICE_TASK\"");
    let _leaves = [fleet.leaf("north", "fleet"), fleet.leaf("south", "fleet"), fleet.leaf("west", "fleet")];
    let desk = fleet.desk("desk").await;
    until_online(&desk, &["gated"]).await;
    let mut ledger = Ledger::default();
    for n in 0..6 {
        let id = ledger.assign(&desk, "gated", &format!("runs {n}")).await;
        fleet.until_begun(&id, 1).await;
    }
    let ids = ledger.ids();
    for round in 0..3 {
        server.kill();
        // Nothing can be awaited of a server that is not there: the leases have to run out.
        tokio::time::sleep(LONG).await;
        server.revive();
        let after = eventually("orders are taken again", async || {
            let task = format!("after {round} {}", super::now_ms());
            ledger.ask(&task);
            let answer = desk.try_call("assign_work", json!({"agent_name": "quick", "task": task})).await.unwrap().ok()?;
            Some(ledger.acknowledge(&task, &answer))
        })
        .await;
        assert_eq!(desk.settled(&after).await["status"], "COMPLETE");
    }
    fleet.open("all");
    until_settled(&desk, &ids).await;
    for (id, work) in looked_up(&desk, &ids).await {
        assert_eq!((&work["status"], &work["attempt"]), (&json!("COMPLETE"), &json!(1)), "{work}");
        assert_eq!(fleet.begun(&id).len(), 1, "{work}");
    }
    examine(&fleet, &ledger).await.assert_none();
    fleet.assert_calm();
}
