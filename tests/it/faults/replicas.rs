//! Several processes under one station's name: they share its hook, wherever their folders are.

use std::collections::BTreeMap;

use serde_json::json;

use super::fleet::{Fleet, kill, looked_up, until_online};
use super::witness::{Ledger, examine, until_settled};
use crate::lifecycle::eventually;
use crate::nats_server::NatsServer;
use crate::rpc::Client;

/// A fleet of leaves that run two works at once each, with an agent that waits for a gate and one that does not.
fn fleet(server: &NatsServer) -> Fleet {
    let mut fleet = Fleet::new(&server.url());
    fleet.set("LATTICE_WORK_MAX_PARALLEL", "2");
    fleet.agent("fleet", "gated", "wait_for all\nprintf %s \"$LATTICE_TASK\"");
    fleet.agent_with("fleet", "single", "limits: { max_parallel: 1 }", false, "wait_for all\nprintf %s \"$LATTICE_TASK\"");
    fleet.agent("fleet", "quick", "printf %s \"$LATTICE_TASK\"");
    fleet
}

/// How many works have begun on each leaf.
fn shares(fleet: &Fleet) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for ran in fleet.ran().into_iter().filter(|ran| ran.begins) {
        *shares.entry(ran.leaf).or_default() += 1;
    }
    shares
}

async fn until_shared(fleet: &Fleet, wanted: &[(&str, usize)]) {
    let wanted: BTreeMap<String, usize> = wanted.iter().map(|(leaf, count)| ((*leaf).to_owned(), *count)).collect();
    eventually(&format!("{wanted:?} have begun"), async || (shares(fleet) == wanted).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_replica_takes_what_a_busy_one_has_not_started() {
    let server = NatsServer::start();
    let fleet = fleet(&server);
    let _north = fleet.leaf("north", "fleet");
    let desk = fleet.desk("desk").await;
    until_online(&desk, &["gated"]).await;
    let mut ledger = Ledger::default();
    for n in 0..6 {
        ledger.assign(&desk, "gated", &format!("w{n}")).await;
    }
    until_shared(&fleet, &[("north", 2)]).await;
    let _south = fleet.leaf("south", "fleet");
    until_shared(&fleet, &[("north", 2), ("south", 2)]).await;
    let _west = fleet.leaf("west", "fleet");
    until_shared(&fleet, &[("north", 2), ("south", 2), ("west", 2)]).await;
    fleet.open("all");
    let ids = ledger.ids();
    until_settled(&desk, &ids).await;
    assert!(looked_up(&desk, &ids).await.values().all(|work| work["status"] == "COMPLETE" && work["attempt"] == 1));
    examine(&fleet, &ledger).await.assert_none();
    fleet.assert_calm();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_agent_delays_no_other_agent_of_the_fleet() {
    let server = NatsServer::start();
    let fleet = fleet(&server);
    let _leaves = [fleet.leaf("north", "fleet"), fleet.leaf("south", "fleet")];
    let desk = fleet.desk("desk").await;
    until_online(&desk, &["single", "quick"]).await;
    let mut ledger = Ledger::default();
    for n in 0..6 {
        ledger.assign_with(&desk, json!({"agent_name": "single", "task": format!("w{n}"), "priority": 100})).await;
    }
    // Each runs one of them, and four more urgent ones wait.
    until_shared(&fleet, &[("north", 1), ("south", 1)]).await;
    for n in 0..4 {
        let id = ledger.assign(&desk, "quick", &format!("q{n}")).await;
        assert_eq!(desk.settled(&id).await["result"], format!("q{n}"));
    }
    assert!(looked_up(&desk, &ledger.ids()).await.values().filter(|work| work["status"] == "PENDING").count() == 4);
    fleet.open("all");
    examine(&fleet, &ledger).await.assert_none();
    fleet.assert_calm();
}

/// Two processes that were set up apart and got the same name by mistake: nothing is lost or done twice.
#[tokio::test(flavor = "multi_thread")]
async fn two_data_folders_under_one_station_id_lose_and_double_nothing() {
    let server = NatsServer::start();
    let mut fleet = Fleet::new(&server.url());
    fleet.set("LATTICE_RETRY_MAX_ATTEMPTS", "50");
    fleet.agent("twin", "worker", "sleep 0.1\nprintf %s \"$LATTICE_TASK\"");
    let twin = async |name: &str| -> Client {
        let client = Client::start(fleet.command(name, "twin")).await;
        until_online(&client, &["worker"]).await;
        client
    };
    let (one, two) = (twin("one").await, twin("two").await);
    let _leaf = fleet.leaf("three", "twin");
    let desk = fleet.desk("desk").await;
    until_online(&desk, &["worker"]).await;
    let mut ledger = Ledger::default();
    for (at, client) in [&one, &two, &desk].into_iter().enumerate() {
        for n in 0..8 {
            ledger.assign(client, "worker", &format!("{at}-{n}")).await;
        }
    }
    // One of them dies in the middle, and comes back with the folder that is its own.
    kill(one).await;
    let one = twin("one").await;
    for n in 0..4 {
        ledger.assign(&one, "worker", &format!("again-{n}")).await;
    }
    let ids = ledger.ids();
    until_settled(&two, &ids).await;
    for (id, work) in looked_up(&desk, &ids).await {
        assert_eq!((&work["status"], &work["result"]), (&json!("COMPLETE"), &json!(ledger.orders[&id].task)), "{work}");
    }
    examine(&fleet, &ledger).await.assert_none();
    fleet.assert_calm();
}
