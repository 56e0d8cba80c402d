//! kill -9 of anybody at any moment, under load.

use std::time::Duration;

use serde_json::json;

use super::fleet::{Fleet, Leaf, Ran, kill, looked_up, until_online};
use super::witness::{Ledger, examine};
use super::{Dice, now_ms, rounds};
use crate::lifecycle::eventually;
use crate::nats_server::NatsServer;
use crate::rpc::Client;

const LEAVES: [(&str, &str); 3] = [("north", "fleet"), ("south", "fleet"), ("alone", "solo")];
/// Each with its station.
const AGENTS: [(&str, &str); 4] = [("of-fleet", "fleet"), ("of-solo", "solo"), ("of-east", "east"), ("of-west", "west")];
const DESKS: [&str; 2] = ["east", "west"];
/// How many rounds a test run takes.
const ROUNDS: u64 = 10;
/// How many works each orchestrator assigns in a round.
const ORDERS: usize = 12;

/// The lattice, orchestrators of which have agents of their own, and what is known of it from outside.
struct Scene {
    fleet: Fleet,
    server: NatsServer,
    leaves: Vec<Leaf>,
    desks: Vec<Client>,
    ledger: Ledger,
    /// When which leaf was killed.
    kills: Vec<(String, u64)>,
}

impl Scene {
    async fn begin() -> Self {
        let server = NatsServer::start();
        let mut fleet = Fleet::new(&server.url());
        // Nobody here fails for having been killed too often.
        fleet.set("LATTICE_RETRY_MAX_ATTEMPTS", "1000");
        fleet.set("LATTICE_WORK_QUEUE_SIZE", "1000");
        for (agent, station) in AGENTS {
            let script = "sleep 0.$(($(od -An -N1 -tu1 /dev/urandom) % 6))5\nprintf '%s by attempt %s' \"$LATTICE_TASK\" $LATTICE_ATTEMPT";
            fleet.agent(station, agent, script);
        }
        let leaves = LEAVES.iter().map(|(name, station)| fleet.leaf(name, station)).collect();
        let desks = vec![];
        let (ledger, kills) = (Ledger::default(), vec![]);
        let mut scene = Self { fleet, server, leaves, desks, ledger, kills };
        for name in DESKS {
            let desk = scene.fleet.desk(name).await;
            desk.call("list_available_agents", json!({})).await;
            scene.desks.push(desk);
        }
        for desk in &scene.desks {
            until_online(desk, &AGENTS.map(|(agent, _)| agent)).await;
        }
        scene
    }

    /// Orders from every desk at once, and in the middle of them the death of somebody, who comes back.
    async fn round(&mut self, round: u64, dice: &mut Dice) {
        let patience = Duration::from_millis(dice.below(400));
        let victim = dice.index(LEAVES.len() + DESKS.len() + 1);
        let tasks: Vec<(usize, &str, String)> = (0..DESKS.len())
            .flat_map(|desk| (0..ORDERS).map(move |n| (desk, AGENTS[n % AGENTS.len()].0, format!("r{round}d{desk}n{n}"))))
            .collect();
        tasks.iter().for_each(|(.., task)| self.ledger.ask(task));
        let desks = &self.desks;
        let ordered = futures_util::future::join_all(tasks.iter().map(|(desk, agent, task)| async move {
            let answer = desks[*desk].try_call("assign_work", json!({"agent_name": agent, "task": task})).await;
            // A refusal, or no answer at all, promises nothing.
            answer.and_then(Result::ok).map(|answer| (task, answer))
        }));
        let (leaves, server, kills) = (&mut self.leaves, &mut self.server, &mut self.kills);
        let (ordered, ()) = tokio::join!(ordered, async {
            tokio::time::sleep(patience).await;
            if let Some(leaf) = leaves.get_mut(victim) {
                leaf.kill();
                kills.push((leaf.name.clone(), now_ms()));
            } else if victim < LEAVES.len() + DESKS.len() {
                super::signal(desks[victim - LEAVES.len()].pid(), rustix::process::Signal::KILL);
            } else {
                server.kill();
                server.revive();
            }
        });
        for (task, answer) in ordered.into_iter().flatten() {
            self.ledger.acknowledge(task, &answer);
        }
        if victim < LEAVES.len() {
            // Some stay away for a while, so that others have to do their work; in a soak, also past their leases.
            let longest = if rounds(ROUNDS) > ROUNDS { 8000 } else { 500 };
            tokio::time::sleep(Duration::from_millis(dice.below(longest))).await;
            let (name, station) = LEAVES[victim];
            self.leaves[victim] = self.fleet.leaf(name, station);
        } else if victim < LEAVES.len() + DESKS.len() {
            let at = victim - LEAVES.len();
            let desk = self.fleet.desk(DESKS[at]).await;
            desk.call("list_available_agents", json!({})).await;
            kill(std::mem::replace(&mut self.desks[at], desk)).await;
        }
        self.go_on(round).await;
    }

    /// Everybody takes orders again, so that the next round finds a whole lattice and not the ruins of this one.
    async fn go_on(&mut self, round: u64) {
        let Self { desks, ledger, .. } = self;
        for (at, desk) in desks.iter().enumerate() {
            for (agent, _) in AGENTS {
                let mut tries = 0..;
                eventually("an order is taken after a kill", async || {
                    let task = format!("r{round}d{at} for {agent}, try {:?}", tries.next());
                    ledger.ask(&task);
                    let answer = desk.try_call("assign_work", json!({"agent_name": agent, "task": task})).await?.ok()?;
                    ledger.acknowledge(&task, &answer);
                    Some(())
                })
                .await;
            }
        }
    }

    /// For each attempt that ended with its leaf: how long it took from the kill until the next one began elsewhere.
    fn recoveries(&self) -> Vec<u64> {
        let ran = self.fleet.ran();
        let begun: Vec<&Ran> = ran.iter().filter(|ran| ran.begins).collect();
        let killed = |of: &Ran| self.kills.iter().filter(|(leaf, at)| *leaf == of.leaf && *at >= of.at_ms).map(|(_, at)| *at).min();
        let next = |of: &Ran| begun.iter().copied().find(|next| next.work_id == of.work_id && next.attempt == of.attempt + 1);
        let time = |of: &&Ran| {
            let (killed, next) = (killed(of)?, next(of)?);
            (next.leaf != of.leaf).then(|| next.at_ms.checked_sub(killed)).flatten()
        };
        let mut times: Vec<u64> = begun.iter().filter_map(time).collect();
        times.sort_unstable();
        times
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_settled_twice_whoever_is_killed_whenever() {
    let rounds = rounds(ROUNDS);
    let mut dice = Dice::new("kills");
    let mut scene = Scene::begin().await;
    for round in 0..rounds {
        scene.round(round, &mut dice).await;
    }
    let found = examine(&scene.fleet, &scene.ledger).await;
    let recoveries = scene.recoveries();
    eprintln!(
        "kills: {rounds} kills, {} of them of leaves; {} works asked for, {} acknowledged; {} lost, {} settled twice, {} late results; \
         {} attempts began elsewhere after a leaf's death: median {:?} ms, most {:?} ms",
        scene.kills.len(),
        scene.ledger.asked(),
        scene.ledger.orders.len(),
        found.lost.len(),
        found.doubly.len(),
        found.late,
        recoveries.len(),
        recoveries.get(recoveries.len() / 2),
        recoveries.last(),
    );
    found.assert_none();
    assert!(scene.ledger.orders.len() as u64 >= rounds, "too few works to mean anything: {}", scene.ledger.orders.len());
    let works = looked_up(&scene.desks[0], &scene.ledger.ids()).await;
    for (id, order) in &scene.ledger.orders {
        let work = &works[id];
        assert_eq!(work["status"], "COMPLETE", "{work}");
        assert!(work["result"].as_str().unwrap().starts_with(&format!("{} by attempt ", order.task)), "{work}");
    }
    scene.fleet.assert_calm();
}
