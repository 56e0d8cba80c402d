//! A leaf that sleeps past its lease and wakes up again.

use rustix::process::Signal;

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
