//! A leaf that sleeps past its lease and wakes up again.

use rustix::process::Signal;
use serde_json::json;

use super::fleet::{Fleet, Leaf, Ran, look, until_online};
use super::witness::{Ledger, examine, stories};
use crate::lifecycle::eventually;
use crate::nats_server::NatsServer;
use crate::rpc::Client;

struct Scene {
    fleet: Fleet,
    leaves: Vec<Leaf>,
    desk: Client,
    _server: NatsServer,
}

impl Scene {
    /// Two replicas with an agent that waits for a gate of its attempt.
    async fn begin() -> Self {
        let server = NatsServer::start();
        let mut fleet = Fleet::new(&server.url());
        fleet.set("LATTICE_WORK_LEASE", "2s");
        fleet.agent("fleet", "gated", "wait_for $LATTICE_ATTEMPT\nprintf 'attempt %s' $LATTICE_ATTEMPT");
        let leaves = vec![fleet.leaf("north", "fleet"), fleet.leaf("south", "fleet")];
        let desk = fleet.desk("desk").await;
        until_online(&desk, &["gated"]).await;
        Self { fleet, leaves, desk, _server: server }
    }

    /// Lets the leaf that has this work fall asleep, and waits until the other one has it.
    async fn lull(&self, id: &str) -> &Leaf {
        let first = self.fleet.until_begun(id, 1).await.remove(0);
        let sleeper = self.leaves.iter().find(|leaf| leaf.name == first.leaf).unwrap();
        sleeper.signal(Signal::STOP);
        let second = self.fleet.until_begun(id, 2).await.remove(1);
        assert_ne!(
            (second.leaf.as_str(), second.attempt),
            (sleeper.name.as_str(), first.attempt),
            "a replica takes it up, as a new attempt"
        );
        sleeper
    }

    /// What it says of its old attempt at last: that it has a result as well, or that it gave up.
    async fn word_of_the_sleeper(&self, id: &str, attempt: u64) -> String {
        eventually("the sleeper speaks", async || {
            let story = stories(self.fleet.url()).await.remove(id).unwrap();
            story
                .0
                .into_iter()
                .find(|said| said.attempt == attempt && !["WORK_ASSIGNED", "WORK_ACCEPTED"].contains(&said.kind.as_str()))
                .map(|said| said.kind)
        })
        .await
    }

    async fn until_ended(&self, id: &str, attempt: u64) {
        let ended = |ran: &Ran| !ran.begins && ran.work_id == id && ran.attempt == attempt;
        eventually("the attempt ends", async || self.fleet.ran().iter().any(ended).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_sleeper_delivers_after_its_work_was_settled_is_evidence() {
    let scene = Scene::begin().await;
    let mut ledger = Ledger::default();
    let id = ledger.assign(&scene.desk, "gated", "x").await;
    let sleeper = scene.lull(&id).await;
    scene.fleet.open("1");
    scene.until_ended(&id, 1).await;
    scene.fleet.open("2");
    let work = scene.desk.settled(&id).await;
    assert_eq!((work["status"].as_str(), work["result"].as_str()), (Some("COMPLETE"), Some("attempt 2")), "{work}");
    sleeper.signal(Signal::CONT);
    let word = scene.word_of_the_sleeper(&id, 1).await;
    let later = look(&scene.desk, &id).await;
    assert_eq!((&later["status"], &later["result"]), (&work["status"], &work["result"]));
    let found = examine(&scene.fleet, &ledger).await;
    eprintln!("sleep: after a settlement the late word was {word}; {} late results kept as evidence", found.late);
    found.assert_none();
    scene.fleet.assert_calm();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_sleeper_delivers_before_anybody_else_settles_the_work() {
    let scene = Scene::begin().await;
    let mut ledger = Ledger::default();
    let id = ledger.assign(&scene.desk, "gated", "x").await;
    let sleeper = scene.lull(&id).await;
    scene.fleet.open("1");
    scene.until_ended(&id, 1).await;
    sleeper.signal(Signal::CONT);
    let word = scene.word_of_the_sleeper(&id, 1).await;
    scene.fleet.open("2");
    let work = scene.desk.settled(&id).await;
    eprintln!("sleep: before a settlement the late word was {word}, and the work ended with {}", work["result"]);
    assert_eq!(work["status"], "COMPLETE", "{work}");
    if word == "WORK_COMPLETE" {
        assert_eq!(work["result"], "attempt 1", "the first result wins: {work}");
    }
    // The sleeper takes work again.
    let next = ledger.assign(&scene.desk, "gated", "y").await;
    assert_eq!(scene.desk.settled(&next).await["status"], "COMPLETE");
    examine(&scene.fleet, &ledger).await.assert_none();
    scene.fleet.assert_calm();
}

/// Waits until a hold has run out, and the leaf that lives has looked at what it held.
async fn until_lapsed(fleet: &Fleet, desk: &Client, id: &str) {
    eventually("the other leaf finds that nobody holds on to it", async || {
        fleet.log("south").lines().any(|line| line.contains(id) && line.contains("it is left as it is")).then_some(())
    })
    .await;
    eventually("it is not known what became of it", async || (look(desk, id).await["detail"] == "outcome unknown").then_some(())).await;
}

/// A leaf that runs the last attempt of some works, while there is no replica of it yet.
async fn last_attempts(fleet: &mut Fleet, timeouts: &[&str]) -> (Leaf, Client, Vec<String>) {
    for (name, value) in [("WORK_LEASE", "2s"), ("PRESENCE_HEARTBEAT", "300ms"), ("PRESENCE_TTL", "1500ms")] {
        fleet.set(&format!("LATTICE_{name}"), value);
    }
    let front = "limits: { max_attempts: 1 }";
    fleet.agent_with("fleet", "once", front, false, "wait_for once\nprintf 'attempt %s' $LATTICE_ATTEMPT");
    fleet.agent("fleet", "quick", "printf %s \"$LATTICE_TASK\"");
    let north = fleet.leaf("north", "fleet");
    let desk = fleet.desk("desk").await;
    until_online(&desk, &["once"]).await;
    let mut ids = Vec::new();
    for timeout in timeouts {
        let order = json!({"agent_name": "once", "task": "x", "timeout": timeout});
        let id = desk.call("assign_work", order).await["work_id"].as_str().unwrap().to_owned();
        fleet.until_begun(&id, 1).await;
        ids.push(id);
    }
    (north, desk, ids)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_elsewhere_declares_nobody_dead_and_whoever_has_the_folder_does() {
    let server = NatsServer::start();
    let mut fleet = Fleet::new(&server.url());
    let (mut north, desk, ids) = last_attempts(&mut fleet, &["10m", "20s"]).await;
    let [long, short] = &ids[..] else { unreachable!() };
    north.kill();
    // Whether it comes before the time of the one is up or after that.
    let _south = fleet.leaf("south", "fleet");
    until_lapsed(&fleet, &desk, long).await;
    let timed_out = desk.settled(short).await;
    assert_eq!((&timed_out["status"], &timed_out["error"]["kind"]), (&json!("FAILED"), &json!("total_timeout")), "{timed_out}");
    assert!(timed_out["error"]["message"].as_str().unwrap().contains("what came of it is unknown"), "{timed_out}");
    let open = look(&desk, long).await;
    assert_eq!((&open["status"], &open["detail"], &open["attempt"]), (&json!("ACCEPTED"), &json!("outcome unknown"), &json!(1)), "{open}");
    let _north = fleet.leaf("north", "fleet");
    let failed = desk.settled(long).await;
    assert_eq!(
        (&failed["status"], &failed["error"]["kind"], &failed["dead_letter"]),
        (&json!("FAILED"), &json!("crashed"), &json!(true)),
        "{failed}"
    );
    assert!(fleet.begun(short).len() == 1 && fleet.begun(long).len() == 1);
    fleet.assert_calm();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_sleeper_delivers_of_its_last_attempt_is_the_works_result() {
    let server = NatsServer::start();
    let mut fleet = Fleet::new(&server.url());
    let (north, desk, ids) = last_attempts(&mut fleet, &["10m"]).await;
    north.signal(Signal::STOP);
    let _south = fleet.leaf("south", "fleet");
    until_lapsed(&fleet, &desk, &ids[0]).await;
    fleet.open("once");
    north.signal(Signal::CONT);
    let work = desk.settled(&ids[0]).await;
    assert_eq!((&work["status"], &work["result"]), (&json!("COMPLETE"), &json!("attempt 1")), "{work}");
    assert_eq!(fleet.begun(&ids[0]).len(), 1);
    fleet.assert_calm();
}
