//! What others put on the lattice's subjects: garbage, forgeries by mistake, and the words of older and newer versions.

use async_nats::HeaderMap;
use async_nats::jetstream;
use serde_json::{Value, json};

use super::fleet::{Fleet, Leaf, look, looked_up, until_online};
use super::witness::{Ledger, stories, until_settled};
use crate::lifecycle::eventually;
use crate::nats_server::NatsServer;
use crate::rpc::Client;

const BODIES: [&[u8]; 12] = [
    b"",
    b"garbage",
    b"\xff\xfe\x00\x01",
    b"null",
    b"[]",
    b"{}",
    b"{\"v\": 99, \"ops\": [{\"z\": {\"seq\": 1}}]}",
    b"{\"v\": 1, \"ops\": [{\"t\": {\"seq\": 1}}]}",
    b"{\"type\": \"WORK_COMPLETE\", \"work_id\": \"a.b\"}",
    b"{\"type\": \"WORK_COMPLETE\", \"work_id\": \"*\", \"attempt\": -1, \"timestamp\": \"yesterday\"}",
    b"{\"station\": \"a.b\", \"instance\": \"*\", \"agents\": {\"a.b\": \">\"}, \"source\": 7, \"manifest\": {\"name\": \"..\"}}",
    b"{\"type\": 1e999}",
];

/// A fleet with a work that runs, and a control station that nobody bothers.
struct Scene {
    fleet: Fleet,
    desk: Client,
    peer: async_nats::Client,
    ledger: Ledger,
    running: String,
    _leaves: [Leaf; 2],
    _server: NatsServer,
}

impl Scene {
    async fn begin() -> Self {
        let server = NatsServer::start();
        let mut fleet = Fleet::new(&server.url());
        fleet.set("LATTICE_WORK_LEASE", "2s");
        fleet.set("LATTICE_RETRY_MAX_ATTEMPTS", "50");
        fleet.set("LATTICE_PRESENCE_HEARTBEAT", "500ms");
        for station in ["fleet", "other"] {
            fleet.agent(station, &format!("of-{station}"), "printf %s \"$LATTICE_TASK\"");
        }
        fleet.agent("fleet", "gated", "wait_for all\nprintf %s \"$LATTICE_TASK\"");
        let leaves = [fleet.leaf("north", "fleet"), fleet.leaf("south", "other")];
        let desk = fleet.desk("desk").await;
        until_online(&desk, &["of-fleet", "of-other", "gated"]).await;
        let mut ledger = Ledger::default();
        let running = ledger.assign(&desk, "gated", "runs meanwhile").await;
        fleet.until_begun(&running, 1).await;
        let peer = async_nats::connect(server.url()).await.unwrap();
        Self { fleet, desk, peer, ledger, running, _leaves: leaves, _server: server }
    }

    /// Says something where a stream keeps it, in its order; whether it does is the server's business.
    async fn say(&self, subject: &str, headers: HeaderMap, body: &[u8]) {
        let context = jetstream::new(self.peer.clone());
        if let Ok(answer) = context.publish_with_headers(subject.to_owned(), headers, body.to_vec().into()).await {
            let _ = answer.await;
        }
    }

    /// Says something to whoever listens.
    async fn call(&self, subject: &str, headers: HeaderMap, body: &[u8]) {
        self.peer.publish_with_headers(subject.to_owned(), headers, body.to_vec().into()).await.unwrap();
    }

    /// Everything goes on: old works and new ones, here and on the other station, and every way to look at them.
    async fn assert_well(mut self, what: &str) {
        for n in 0..6 {
            for agent in ["of-fleet", "of-other"] {
                self.ledger.assign(&self.desk, agent, &format!("{what} {agent} {n}")).await;
            }
        }
        self.fleet.open("all");
        let ids = self.ledger.ids();
        until_settled(&self.desk, &ids).await;
        let fresh = self.fleet.desk("fresh").await;
        for desk in [&self.desk, &fresh] {
            for (id, work) in looked_up(desk, &ids).await {
                let wanted = (json!("COMPLETE"), json!(self.ledger.orders[&id].task));
                assert_eq!((work["status"].clone(), work["result"].clone()), wanted, "after {what}: {work}");
            }
        }
        assert_eq!(look(&fresh, &self.running).await["attempt"], 1, "what ran was left alone");
        let stories = stories(self.fleet.url()).await;
        for id in &ids {
            assert!(stories[id].settled().0.is_some_and(|said| said.kind == "WORK_COMPLETE"), "after {what}: {:?}", stories[id]);
        }
        until_online(&fresh, &["of-fleet", "of-other", "gated"]).await;
        for arguments in [&["stations"][..], &["agents"], &["runs"], &["events"], &["work"], &["status"]] {
            self.fleet.say("looker", arguments).await;
        }
        self.fleet.assert_calm();
    }
}

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        headers.insert(*name, *value);
    }
    headers
}

/// Works that never were, and subjects that are none of ours.
fn uuid() -> String {
    uuid::Uuid::now_v7().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_log_changes_nothing() {
    let scene = Scene::begin().await;
    let nobody = uuid();
    let subjects = [
        format!("work.{nobody}.response.fleet"),
        format!("work.{nobody}.status"),
        format!("work.{}.response.fleet", scene.running),
        format!("work.{}.response.other", scene.running),
        format!("work.{}.status", scene.running),
        format!("work.{}.more.tokens.than.known", scene.running),
        "work.not-an-id.status".to_owned(),
        "work.a.b.status".to_owned(),
        "events.agent.registered.fleet".to_owned(),
        "events.nothing.known".to_owned(),
    ];
    for subject in &subjects {
        for body in BODIES {
            scene.say(&format!("lattice.default.{subject}"), HeaderMap::new(), body).await;
        }
        let missing = headers(&[("Lattice-Body", &"0".repeat(64))]);
        scene.say(&format!("lattice.default.{subject}"), missing, b"").await;
        scene.say(&format!("lattice.default.{subject}"), headers(&[("Lattice-Body", "../../etc")]), b"").await;
    }
    // A whole event, of somebody who may not say it, and one whose body belongs to another work.
    let complete = |id: &str, station: &str| {
        json!({"work_id": id, "orchestrator_run_id": uuid(), "type": "WORK_COMPLETE", "timestamp": "2026-01-01T00:00:00Z",
            "station_id": station, "instance_id": uuid(), "attempt": 1, "result": "forged"})
        .to_string()
    };
    let at = |rest: &str| format!("lattice.default.work.{}.{rest}", scene.running);
    scene.say(&at("response.other"), HeaderMap::new(), complete(&scene.running, "other").as_bytes()).await;
    scene.say(&at("response.other"), HeaderMap::new(), complete(&scene.running, "fleet").as_bytes()).await;
    scene.say(&at("response.fleet"), HeaderMap::new(), complete(&nobody, "fleet").as_bytes()).await;
    scene.assert_well("garbage on the log").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_a_hook_changes_nothing() {
    let scene = Scene::begin().await;
    let subject = "lattice.default.station.fleet.work.assign";
    let label = |id: &str, deadline: i64| headers(&[("Lattice-Item", &format!("{id} 5 {deadline} of-fleet~name"))]);
    let later = i64::try_from(super::now_ms()).unwrap() + 3_600_000;
    for body in BODIES {
        scene.say(subject, HeaderMap::new(), body).await;
        scene.say(subject, label(&uuid(), later), body).await;
    }
    for item in ["", "a.b 0 0 x", "* * * *", "\u{fe} 1 2 3", "99999999999999999999999 99999999999 9 9"] {
        scene.say(subject, headers(&[("Lattice-Item", item)]), b"{}").await;
    }
    for deadline in [i64::MIN, -1, 0, i64::MAX] {
        scene.say(subject, label(&uuid(), deadline), b"{}").await;
    }
    // An item whose body is somewhere else, where it is not.
    for digest in ["0".repeat(64), "a.b".to_owned()] {
        let mut item = label(&uuid(), later);
        item.insert("Lattice-Body", digest.as_str());
        scene.say(subject, item, b"").await;
    }
    scene.assert_well("garbage on the hook").await;
}

/// The order of a work that everybody has heard of is not readable any more: that is said, and nobody waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_work_whose_order_is_gone_fails() {
    let scene = Scene::begin().await;
    let (id, run) = (uuid(), format!("{}-1", uuid()));
    let assignment = order(&id, &run, "fleet", "of-fleet");
    scene
        .say(
            &format!("lattice.default.work.{id}.status"),
            HeaderMap::new(),
            &event(&id, &run, "WORK_ASSIGNED", json!({"assignment": assignment})),
        )
        .await;
    let later = super::now_ms() + 3_600_000;
    let item = headers(&[("Lattice-Item", &format!("{id} 5 {later} of-fleet~name")), ("Lattice-Body", &"0".repeat(64))]);
    scene.say("lattice.default.station.fleet.work.assign", item, b"").await;
    let work = scene.desk.settled(&id).await;
    assert_eq!((&work["status"], &work["error"]["kind"]), (&json!("FAILED"), &json!("unstartable")), "{work}");
    assert!(work["error"]["message"].as_str().unwrap().contains("assign the work again"), "{work}");
    scene.assert_well("an order that is gone").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_among_the_operations_of_a_hook_changes_nothing() {
    let scene = Scene::begin().await;
    let subject = "lattice.default.station.fleet.work.hook";
    let nobody = uuid();
    let ops = [
        json!({"v": 1}),
        json!({"v": 1, "ops": [{"d": {"seq": u64::MAX}}], "more": {"unknown": true}}),
        json!({"v": 1, "ops": [{"t": {"seq": u64::MAX, "holder": nobody, "until": "2026-01-01T00:00:00Z"}}]}),
        json!({"v": 1, "all": {"upto": 0, "items": []}}),
        json!({"v": 1, "all": {"upto": 0, "items": [[u64::MAX, u32::MAX, {"h": [nobody, "9999-12-31T23:59:59Z"]}, "9999-12-31T23:59:59Z"]]}}),
    ];
    for body in BODIES {
        // What a newer version wrote is no garbage: whoever does not understand it keeps away from that hook, and says so.
        if !body.windows(7).any(|part| part == b"\"v\": 99") {
            scene.say(subject, HeaderMap::new(), body).await;
        }
    }
    for op in ops {
        scene.say(subject, HeaderMap::new(), op.to_string().as_bytes()).await;
    }
    scene.assert_well("garbage among the operations").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_in_the_tables_changes_nothing() {
    let scene = Scene::begin().await;
    let instance = uuid();
    let keys = [
        "agents.stranger.other".to_owned(),
        "agents.of-fleet".to_owned(),
        "agents.of-fleet.a.b.c".to_owned(),
        "agents.=ZZ.fleet".to_owned(),
        "agents.==nothing.fleet".to_owned(),
        format!("stations.fleet.{instance}"),
        "stations.fleet".to_owned(),
        "stations.=2A.=3E".to_owned(),
        format!("children.{instance}"),
        format!("children.n=.{instance}"),
        "keys.anything".to_owned(),
        "sessions.anything".to_owned(),
    ];
    for key in &keys {
        let (bucket, key) = key.split_once('.').unwrap();
        for body in BODIES {
            scene.say(&format!("$KV.lattice_default_{bucket}.{key}"), HeaderMap::new(), body).await;
        }
        for (name, value) in [("Lattice-Expires", "soon"), ("KV-Operation", "DANCE"), ("Lattice-Key", "a.b"), ("Lattice-Body", "0")] {
            scene.say(&format!("$KV.lattice_default_{bucket}.{key}"), headers(&[(name, value)]), b"{}").await;
        }
    }
    // A claim that somebody else wrote over: whose name it is, is for those who run it to say again.
    scene.say("$KV.lattice_default_agents.of-fleet.other", HeaderMap::new(), b"garbage").await;
    scene.assert_well("garbage in the tables").await;
}

/// What the server says again of what it stored is heard by everybody; what merely looks like it changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn garbage_where_the_server_speaks_changes_nothing() {
    let scene = Scene::begin().await;
    let running = &scene.running;
    for subject in [
        format!("work.{running}.response.fleet"),
        format!("work.{running}.status"),
        "station.fleet.work.assign".to_owned(),
        "station.fleet.work.hook".to_owned(),
        "table.agents.of-fleet.fleet".to_owned(),
        "table.stations.fleet.x".to_owned(),
    ] {
        for body in BODIES {
            let subject = format!("lattice.default.told.{subject}");
            scene.call(&subject, HeaderMap::new(), body).await;
            for (stream, seq) in
                [("lattice_default_log", "0"), ("lattice_default_hook=fleet", "garbage"), ("KV_lattice_default_agents", "-1")]
            {
                let marks = headers(&[("Nats-Stream", stream), ("Nats-Sequence", seq), ("Nats-Subject", "a.b")]);
                scene.call(&subject, marks, body).await;
            }
        }
    }
    scene.peer.flush().await.unwrap();
    scene.assert_well("garbage where the server speaks").await;
}

/// An order as another version writes it.
fn order(id: &str, run: &str, station: &str, agent: &str) -> Value {
    json!({"work_id": id, "orchestrator_run_id": run, "originating_station": "future", "target_station": station,
        "agent_name": agent, "task": "from the future", "assigned_at": "2026-01-01T00:00:00Z", "timeout": "1h",
        "trace_id": "0".repeat(32), "span_id": "0".repeat(16), "colour": "blue"})
}

/// An event of a work that another version assigned and ran: with more, less and other than this version knows.
fn event(id: &str, run: &str, kind: &str, more: Value) -> Vec<u8> {
    let mut event = json!({"work_id": id, "orchestrator_run_id": run, "type": kind, "timestamp": "2026-01-01T00:00:00Z",
        "station_id": "future", "instance_id": uuid(), "added_later": {"deep": [1, 2, 3]}});
    event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    event.to_string().into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn works_of_older_and_newer_versions_are_understood_as_far_as_they_go() {
    let scene = Scene::begin().await;
    let (id, run) = (uuid(), format!("{}-1", uuid()));
    let assignment = order(&id, &run, "future", "seer");
    let status = format!("lattice.default.work.{id}.status");
    let response = format!("lattice.default.work.{id}.response.future");
    let say = async |subject: &str, kind: &str, more: Value| scene.say(subject, HeaderMap::new(), &event(&id, &run, kind, more)).await;
    let stands = async |wanted: &str| {
        eventually(wanted, async || {
            let works = scene.desk.try_call("check_work", json!({"work_id": id})).await.unwrap().ok()?;
            let work = works["works"].get(0).cloned().unwrap_or(works);
            (work["status"] == wanted).then_some(work)
        })
        .await
    };
    say(&status, "WORK_ASSIGNED", json!({"assignment": assignment})).await;
    stands("PENDING").await;
    say(&response, "WORK_ACCEPTED", json!({"attempt": 1})).await;
    say(&response, "WORK_DREAMT", json!({"attempt": 1, "of": "sheep"})).await;
    say(&response, "WORK_PROGRESS", json!({"attempt": 1, "progress_pct": 50.0, "mood": "good"})).await;
    say(&response, "WORK_RETRYING", json!({"attempt": 1, "error": {"kind": "bored", "message": "a kind of failure of another version"}}))
        .await;
    say(&response, "WORK_ACCEPTED", json!({"attempt": 2})).await;
    assert_eq!(stands("ACCEPTED").await["attempt"], 2);
    say(&response, "WORK_COMPLETE", json!({"attempt": 2, "result": {"seen": true}})).await;
    assert_eq!(stands("COMPLETE").await["result"], json!({"seen": true}));
    scene.assert_well("the words of another version").await;
}
