//! A station that the others cannot reach: cut off, or behind a line that has gone dead.

use serde_json::json;

use super::fleet::{Fleet, look, until_online};
use super::namespaces::Namespaces;
use super::proxy::{Line, Proxy};
use super::witness::{Ledger, examine, until_settled};
use crate::lifecycle::eventually;
use crate::nats_server::{NatsServer, free_port};
use crate::rpc::Client;

/// Two stations with agents, and an orchestrator; `far` has its own agents and its own orchestrator behind a line that goes dead.
fn fleet(url: &str) -> Fleet {
    let mut fleet = Fleet::new(url);
    fleet.set("LATTICE_WORK_LEASE", "2s");
    fleet.set("LATTICE_RETRY_MAX_ATTEMPTS", "50");
    fleet.set("LATTICE_PRESENCE_HEARTBEAT", "500ms");
    fleet.set("LATTICE_PRESENCE_TTL", "3s");
    fleet.set("LATTICE_NATS_PING_INTERVAL", "1s");
    fleet.set("LATTICE_NATS_REQUEST_TIMEOUT", "1s");
    fleet.set("LATTICE_NATS_CONNECT_TIMEOUT", "1s");
    fleet.set("LATTICE_NATS_RECONNECT_DELAY_MAX", "500ms");
    for station in ["near", "far"] {
        fleet.agent(station, &format!("at-{station}"), "printf %s \"$LATTICE_TASK\"");
        fleet.agent(station, &format!("gated-at-{station}"), "wait_for $LATTICE_TASK\nprintf %s \"$LATTICE_TASK\"");
    }
    fleet
}

/// Both sides go on by themselves while the line is dead, and agree when it is back.
#[expect(clippy::print_stderr, reason = "what a user is told is worth a look")]
async fn fall_apart_and_come_together(fleet: &Fleet, ledger: &mut Ledger, name: &str, part: impl Fn(), heal: impl Fn()) {
    let _leaf = fleet.leaf("near", "near");
    let (far, desk) = (fleet.desk("far").await, fleet.desk("desk").await);
    until_online(&far, &["at-near", "at-far"]).await;
    until_online(&desk, &["at-near", "at-far", "gated-at-far"]).await;
    let caught = ledger.assign(&desk, "gated-at-far", &format!("{name}-caught")).await;
    fleet.until_begun(&caught, 1).await;
    part();

    // The far side: its own agents work, and it says what it cannot reach.
    let local = until_worked(&far, ledger, &format!("{name}-local")).await;
    let remote = format!("{name}-remote");
    ledger.ask(&remote);
    let refusal = far.refusal("assign_work", json!({"agent_name": "at-near", "task": remote})).await;
    eprintln!("partition ({name}): the far side says: {refusal}");

    // The near side: its agents work, and work for the other one waits and says so, or runs out of time.
    eventually("the far side is seen to be offline", async || {
        let list = desk.call("list_available_agents", json!({})).await;
        list["agents"].as_array().unwrap().iter().any(|agent| agent["name"] == "at-far" && agent["status"] == "offline").then_some(())
    })
    .await;
    let near = ledger.assign(&desk, "at-near", &format!("{name}-near")).await;
    assert_eq!(desk.settled(&near).await["status"], "COMPLETE");
    let hurried = ledger.assign_with(&desk, json!({"agent_name": "at-far", "task": format!("{name}-hurried"), "timeout": "2s"})).await;
    let waiting = ledger.assign(&desk, "at-far", &format!("{name}-waiting")).await;
    let told = look(&desk, &waiting).await;
    assert_eq!(told["status"], "PENDING", "{told}");
    assert!(told["note"].as_str().is_some_and(|note| note.contains("far")), "it says that it waits: {told}");
    let failed = desk.settled(&hurried).await;
    assert_eq!((&failed["status"], &failed["error"]["kind"]), (&json!("FAILED"), &json!("queue_timeout")), "{failed}");

    // By now what the far side still runs of the server's work is past its lease, and that keeps nothing else from running.
    until_worked(&far, ledger, &format!("{name}-late")).await;
    heal();
    assert_eq!(desk.settled(&waiting).await["status"], "COMPLETE");
    fleet.open(&format!("{name}-caught"));
    assert_eq!(desk.settled(&caught).await["status"], "COMPLETE");
    // What the far side did by itself is known everywhere now.
    eventually("the far side's own work is known", async || {
        let works = desk.try_call("check_work", json!({"work_ids": [local]})).await.unwrap().ok()?;
        let work = works["works"].get(0).cloned().unwrap_or(works);
        (work["status"] == "COMPLETE").then_some(())
    })
    .await;
    let after = ledger.assign(&far, "at-near", &format!("{name}-after")).await;
    assert_eq!(far.settled(&after).await["status"], "COMPLETE");
}

/// Has a work done by the far side's own agent; until it has found out that the server is away it may refuse.
async fn until_worked(far: &Client, ledger: &mut Ledger, name: &str) -> String {
    let id = eventually("a work of the far side's own", async || {
        let task = format!("{name}-{}", super::now_ms());
        ledger.ask(&task);
        let answer = far.try_call("assign_work", json!({"agent_name": "at-far", "task": task})).await.unwrap().ok()?;
        Some(ledger.acknowledge(&task, &answer))
    })
    .await;
    assert_eq!(far.settled(&id).await["status"], "COMPLETE");
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn a_station_whose_connection_is_cut_goes_on_and_comes_back() {
    a_bad_line(Line::Cut).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_station_whose_connection_is_frozen_goes_on_and_comes_back() {
    a_bad_line(Line::Frozen).await;
}

async fn a_bad_line(line: Line) {
    let server = NatsServer::start();
    let proxy = Proxy::before(server.port()).await;
    let mut fleet = fleet(&server.url());
    fleet.elsewhere("far", &[], &proxy.url());
    let mut ledger = Ledger::default();
    let name = format!("{line:?}");
    fall_apart_and_come_together(&fleet, &mut ledger, &name, || proxy.set(line), || proxy.set(Line::Open)).await;
    examine(&fleet, &ledger).await.assert_none();
    fleet.assert_calm();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_stations_in_network_namespaces_fall_apart_and_come_together() {
    let port = free_port();
    let namespaces = match Namespaces::new() {
        Ok(namespaces) => namespaces,
        Err(why) => {
            eprintln!("SKIPPED: two stations in network namespaces: this machine does not let us make them: {why}");
            return;
        }
    };
    let dir = tempfile::tempdir().unwrap();
    let config = format!("listen: \"0.0.0.0:{port}\"\njetstream {{ store_dir: {:?} }}\n", dir.path().join("store"));
    std::fs::write(dir.path().join("nats.conf"), &config).unwrap();
    let server = namespaces.server(&dir.path().join("nats.conf"));
    let mut fleet = fleet(&format!("nats://127.0.0.1:{port}"));
    for name in ["near", "desk"] {
        fleet.elsewhere(name, &namespaces.near(), &format!("nats://127.0.0.1:{port}"));
    }
    fleet.elsewhere("far", &namespaces.far(), &namespaces.url(port));
    let mut ledger = Ledger::default();
    fall_apart_and_come_together(&fleet, &mut ledger, "namespaces", || namespaces.link(false), || namespaces.link(true)).await;
    // What the server has kept is looked at from here.
    drop(server);
    let _server = NatsServer::with_config(dir, &config, port);
    examine(&fleet, &ledger).await.assert_none();
    fleet.assert_calm();
}

/// What a station's agents would do if the answer to an order got lost and the order was then kept in a second place.
#[tokio::test(flavor = "multi_thread")]
async fn an_order_whose_acknowledgement_got_lost_has_one_home() {
    let server = NatsServer::start();
    let proxy = Proxy::before(server.port()).await;
    let mut fleet = Fleet::new(&proxy.url());
    fleet.agent("home", "worker", "printf %s \"$LATTICE_TASK\"");
    let home = fleet.desk("home").await;
    until_online(&home, &["worker"]).await;
    let mut ledger = Ledger::default();
    for round in 0..3 {
        let task = format!("unheard {round}");
        ledger.ask(&task);
        proxy.set(Line::MuteAfter("PUB lattice.default.station.home.work.assign"));
        let (answer, ()) = tokio::join!(home.try_call("assign_work", json!({"agent_name": "worker", "task": task})), async {
            // The server has the order, and its answer is on its way when the line goes.
            let stored = async || server_has(&server.url(), &task).await.then_some(());
            eventually("the server has the order", stored).await;
            proxy.set(Line::Cut);
        });
        if let Ok(answer) = answer.unwrap() {
            ledger.acknowledge(&task, &answer);
        }
        proxy.set(Line::Open);
        eventually("the station is back", async || {
            let told = format!("back {round} {}", super::now_ms());
            ledger.ask(&told);
            let answer = home.try_call("assign_work", json!({"agent_name": "worker", "task": told})).await.unwrap().ok()?;
            ledger.acknowledge(&told, &answer);
            server_has(&server.url(), &told).await.then_some(())
        })
        .await;
    }
    let ids = ledger.ids();
    until_settled(&home, &ids).await;
    fleet.at(&server.url());
    examine(&fleet, &ledger).await.assert_none();
    let mut tasks: Vec<String> = Vec::new();
    for ran in fleet.ran().into_iter().filter(|ran| ran.begins) {
        assert!(!tasks.contains(&ran.work_id), "{} ran twice", ran.work_id);
        tasks.push(ran.work_id);
    }
    fleet.assert_calm();
}

/// Whether the hook of the station `home` has an order with this task.
async fn server_has(url: &str, task: &str) -> bool {
    let context = async_nats::jetstream::new(async_nats::connect(url).await.unwrap());
    let stream = context.get_stream("lattice_default_hook=home").await;
    let Ok(stream) = stream else { return false };
    let last = stream.get_last_raw_message_by_subject("lattice.default.station.home.work.assign").await;
    last.is_ok_and(|last| String::from_utf8_lossy(&last.payload).contains(task))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_is_cut_while_a_result_is_uploaded_costs_no_attempt() {
    let server = NatsServer::start();
    let proxy = Proxy::before(server.port()).await;
    let mut fleet = fleet(&server.url());
    fleet.set("LATTICE_WORK_LEASE", "60s");
    fleet.elsewhere("far", &[], &proxy.url());
    fleet.agent_with("far", "large", "limits: { max_attempts: 1 }", false, "wait_for print\nhead -c 300000 /dev/zero | tr '\\0' a");
    let _leaf = fleet.leaf("far", "far");
    let desk = fleet.desk("desk").await;
    until_online(&desk, &["large"]).await;
    let mut ledger = Ledger::default();
    let id = ledger.assign(&desk, "large", "x").await;
    fleet.until_begun(&id, 1).await;
    proxy.set(Line::MuteAfter("Lattice-Chunk"));
    fleet.open("print");
    crate::transport::within(proxy.until(Line::Mute)).await;
    proxy.set(Line::Cut);
    eventually("it is seen to be offline", async || {
        let list = desk.call("list_available_agents", json!({})).await;
        list["agents"].as_array().unwrap().iter().any(|agent| agent["name"] == "large" && agent["status"] == "offline").then_some(())
    })
    .await;
    proxy.set(Line::Open);
    let work = desk.settled(&id).await;
    assert_eq!((&work["status"], &work["attempt"]), (&json!("COMPLETE"), &json!(1)), "{work}");
    let part = desk.call("check_work", json!({"work_id": id, "bytes": "299990-"})).await;
    assert_eq!(part["selection"]["text"], "aaaaaaaaaa", "{part}");
    assert_eq!(fleet.begun(&id).len(), 1);
    fleet.assert_calm();
}
