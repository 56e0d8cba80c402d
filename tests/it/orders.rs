//! Works that hang together: waiting for others, over many items, called off with their parents; on one machine and over a server.
//!
//! Leaves and orchestrators are processes of their own, so that either may die.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::sync::Mutex;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::lifecycle::{eventually, reaches};
use crate::nats_server::NatsServer;
use crate::rpc::{Client, agent, binary};

const UNKNOWN: &str = "0198f2c4-7d3e-7000-8000-1b2c3d4e5f60";

/// A lattice: on one machine it has one data folder, on a server each process has its own.
struct Scene {
    server: Option<NatsServer>,
    dir: TempDir,
    agents: TempDir,
    leaves: Mutex<Vec<Child>>,
}

impl Scene {
    fn new(server: Option<NatsServer>) -> Self {
        let scene = Self { server, dir: TempDir::new().unwrap(), agents: TempDir::new().unwrap(), leaves: Mutex::default() };
        scene.agent("upper", "", "printf '%s' \"$LATTICE_TASK\" | tr a-z A-Z");
        scene.agent(
            "gated",
            "",
            "echo \"begin $LATTICE_TASK\" >> ran; while [ ! -e gate ]; do sleep 0.02; done; printf 'of %s' \"$LATTICE_TASK\"",
        );
        scene.agent("context", "", "echo \"begin $LATTICE_TASK\" >> ran; printf '%s' \"$LATTICE_CONTEXT\"");
        scene.agent("broken", "", "echo 'no such luck' >&2; exit 3");
        std::fs::write(scene.agents.path().join("nested.py"), concat!(include_str!("calls.py"), include_str!("nested.py"))).unwrap();
        scene.agent("nested", "", "cat > /dev/null; echo $$ >> pids; exec python3 ./nested.py");
        scene
    }

    fn local() -> Self {
        Self::new(None)
    }

    fn nats() -> Self {
        Self::new(Some(NatsServer::start()))
    }

    fn agent(&self, name: &str, front: &str, script: &str) {
        agent(self.agents.path(), name, front, script);
    }

    fn folder(&self, name: &str) -> std::path::PathBuf {
        let folder = self.dir.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn command(&self, station: &str, name: &str, agents: &std::path::Path) -> Command {
        let data = if self.server.is_some() { self.folder(&format!("data-{name}")) } else { self.folder("data") };
        let mut command = binary(&data, agents);
        command.args(["--station", station]).env("LATTICE_MCP_WORKSPACE", "tests").env("LATTICE_RETRY_INITIAL_DELAY", "100s");
        command.env("LATTICE_RETRY_MAX_DELAY", "100s").env("LATTICE_WORK_KILL_AFTER", "500ms").env("LATTICE_WORK_RECHECK", "2s");
        if let Some(server) = &self.server {
            command.env("LATTICE_NATS_URL", server.url());
        }
        command
    }

    /// Starts a process that runs the agents.
    fn leaf(&self) {
        self.leaf_with(|_| {});
    }

    fn leaf_with(&self, change: impl FnOnce(&mut Command)) {
        let mut command = self.command("fleet", "leaf", self.agents.path());
        change(&mut command);
        self.leaves.lock().unwrap().push(command.arg("leaf").stdin(Stdio::null()).spawn().unwrap());
    }

    /// One that runs a few works at once.
    fn leaf_of(&self, places: u32) {
        let mut command = self.command("fleet", "leaf", self.agents.path());
        command.env("LATTICE_WORK_MAX_PARALLEL", places.to_string());
        self.leaves.lock().unwrap().push(command.arg("leaf").stdin(Stdio::null()).spawn().unwrap());
    }

    /// Kills every leaf without a word.
    async fn kill_leaves(&self) {
        let leaves: Vec<Child> = self.leaves.lock().unwrap().drain(..).collect();
        for mut leaf in leaves {
            leaf.kill().await.unwrap();
        }
    }

    /// An orchestrator that runs no agents; it sees those of the leaf.
    async fn desk(&self, name: &str) -> Client {
        self.desk_with(name, |_| {}).await
    }

    async fn desk_with(&self, name: &str, change: impl FnOnce(&mut Command)) -> Client {
        let none = self.folder(&format!("none-{name}"));
        let mut command = self.command(name, name, &none);
        change(&mut command);
        let desk = Client::start(command).await;
        let offered = std::fs::read_dir(self.agents.path()).unwrap();
        let offered = offered.filter(|file| file.as_ref().unwrap().path().extension().is_some_and(|end| end == "md")).count();
        eventually("the agents are online", async || {
            let known = desk.call("list_available_agents", json!({})).await;
            let known = known["agents"].as_array().unwrap();
            (known.len() == offered && known.iter().all(|agent| agent["status"] == "online")).then_some(())
        })
        .await;
        desk
    }

    fn open(&self) {
        std::fs::write(self.agents.path().join("gate"), "").unwrap();
    }

    fn lines(&self, file: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.agents.path().join(file)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

async fn assign(desk: &Client, order: Value) -> String {
    desk.call("assign_work", order).await["work_id"].as_str().unwrap().to_owned()
}

async fn look(desk: &Client, id: &str) -> Value {
    let answer = desk.call("check_work", json!({"work_id": id})).await;
    answer["works"].get(0).cloned().unwrap_or(answer)
}

async fn kill(mut desk: Client) {
    desk.child.start_kill().unwrap();
    desk.child.wait().await.unwrap();
}

fn is_gone(pid: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/status")).map_or(true, |state| state.contains("State:\tZ"))
}

macro_rules! over_both {
    ($($name:ident)+) => {
        mod on_one_machine {
            use super::Scene;
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name(&Scene::local()).await;
            })+
        }
        mod over_a_server {
            use super::Scene;
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name(&Scene::nats()).await;
            })+
        }
    };
}

over_both! {
    a_work_starts_once_all_it_waits_for_are_complete_and_has_their_results
    a_work_ends_as_one_that_it_waited_for_did_unless_told_otherwise
    what_waits_is_started_by_whoever_is_left
    many_items_are_one_work_whose_parts_run_a_few_at_a_time
    an_order_over_many_items_goes_on_without_whoever_gave_it
    an_order_over_many_items_keeps_its_pace_without_whoever_gave_it
    those_who_wait_for_an_order_over_many_items_do_not_keep_its_items_out
    agents_that_wait_for_their_works_lend_them_their_places
    items_without_a_result_are_named
    an_order_over_many_items_is_cancelled_with_all_of_them
    orders_that_cannot_be_are_refused_and_say_why
    one_key_is_one_work_for_its_caller_in_every_process
    works_are_cancelled_wherever_they_stand
    what_an_agent_had_printed_before_it_was_stopped_can_be_read
    a_cancelled_parent_takes_its_children_along
    no_child_that_is_assigned_during_the_cancel_stays_behind
}

async fn a_work_starts_once_all_it_waits_for_are_complete_and_has_their_results(scene: &Scene) {
    scene.leaf();
    let desk = scene.desk("desk").await;
    let (a, b) = (desk.assign("gated", "a").await, desk.assign("upper", "b").await);
    let after = json!({"agent_name": "context", "task": "c", "context": {"own": 1}, "after": [a, b], "timeout": "20s"});
    let c = assign(&desk, after).await;
    let last = assign(&desk, json!({"agent_name": "context", "task": "last", "after": [c]})).await;
    desk.settled(&b).await;
    let waits = look(&desk, &c).await;
    assert_eq!((&waits["status"], &waits["waits_for"]), (&json!("PENDING"), &json!([a, b])), "{waits}");
    reaches(&desk, &a, "ACCEPTED").await;
    assert!(!scene.lines("ran").contains(&"begin c".to_owned()));
    scene.open();
    let work = desk.settled(&c).await;
    assert_eq!((&work["status"], &work["attempt"]), (&json!("COMPLETE"), &json!(1)), "{work}");
    let context: Value = serde_json::from_str(work["result"].as_str().unwrap()).unwrap();
    assert_eq!(context["own"], 1);
    let ends = json!([
        {"work_id": a, "agent_name": "gated", "status": "COMPLETE", "result": "of a"},
        {"work_id": b, "agent_name": "upper", "status": "COMPLETE", "result": "B"},
    ]);
    assert_eq!(context["after"], ends);
    let work = desk.settled(&last).await;
    let context: Value = serde_json::from_str(work["result"].as_str().unwrap()).unwrap();
    assert_eq!(context["after"][0]["work_id"], c);
    assert_eq!(scene.lines("ran"), ["begin a", "begin c", "begin last"], "each began once, in order");
    // What is complete already is waited for no longer, however large the order.
    let large = "x".repeat(100_000);
    let order = json!({"agent_name": "upper", "task": large, "after": [a]});
    let id = assign(&desk, order).await;
    assert_eq!(desk.settled(&id).await["status"], "COMPLETE");
}

async fn a_work_ends_as_one_that_it_waited_for_did_unless_told_otherwise(scene: &Scene) {
    scene.agent("late", "", "while [ ! -e gate ]; do sleep 0.02; done; echo 'no such luck' >&2; exit 3");
    scene.leaf();
    let desk = scene.desk("desk").await;
    let (fails, stopped) = (desk.assign("late", "x").await, desk.assign("gated", "x").await);
    let mut ids = BTreeMap::new();
    for (name, dep) in [("fails", &fails), ("stopped", &stopped)] {
        for choice in ["follow", "fail", "cancel", "run"] {
            let order = json!({"agent_name": "context", "task": choice, "after": [dep], "if_failed": choice});
            ids.insert((name, choice), assign(&desk, order).await);
        }
    }
    let chained = assign(&desk, json!({"agent_name": "context", "task": "chained", "after": [ids[&("fails", "follow")]]})).await;
    reaches(&desk, &stopped, "ACCEPTED").await;
    desk.call("cancel_work", json!({"work_id": stopped})).await;
    scene.open();
    for ((dep, choice), id) in &ids {
        let work = desk.settled(id).await;
        let wanted = match (*dep, *choice) {
            (_, "run") => "COMPLETE",
            ("fails", "follow") | (_, "fail") => "FAILED",
            _ => "CANCELLED",
        };
        assert_eq!(work["status"], wanted, "{dep} {choice}: {work}");
        if wanted == "FAILED" {
            assert_eq!(work["error"]["kind"], "dependency", "{work}");
        }
        if wanted != "COMPLETE" {
            let named = if *dep == "fails" { &fails } else { &stopped };
            assert!(work.to_string().contains(named.as_str()), "{work}");
        }
    }
    let ran = desk.settled(&ids[&("fails", "run")]).await;
    assert!(ran["result"].as_str().unwrap().contains("\"FAILED\""), "{ran}");
    assert_eq!(desk.settled(&chained).await["status"], "FAILED");
    let refused = desk.refusal("assign_work", json!({"agent_name": "upper", "task": "x", "after": [fails]})).await;
    assert!(refused.contains(&fails) && refused.contains("exit code 3") && refused.contains("if_failed"), "{refused}");
    assert!(scene.lines("ran").iter().all(|line| line.ends_with(" x") || line.ends_with(" run")), "{:?}", scene.lines("ran"));
}

async fn what_waits_is_started_by_whoever_is_left(scene: &Scene) {
    scene.leaf();
    let desk = scene.desk("first").await;
    let a = desk.assign("gated", "a").await;
    let b = assign(&desk, json!({"agent_name": "context", "task": "b", "after": [a]})).await;
    reaches(&desk, &a, "ACCEPTED").await;
    kill(desk).await;
    scene.open();
    // Nobody but the leaf is there, and then another leaf, which hears of nothing.
    eventually("the leaf starts it", async || scene.lines("ran").contains(&"begin b".to_owned()).then_some(())).await;
    let second = scene.desk("second").await;
    assert_eq!(second.settled(&b).await["status"], "COMPLETE");
    std::fs::remove_file(scene.agents.path().join("gate")).unwrap();
    let c = second.assign("gated", "c").await;
    let d = assign(&second, json!({"agent_name": "context", "task": "d", "after": [c]})).await;
    reaches(&second, &c, "ACCEPTED").await;
    kill(second).await;
    scene.kill_leaves().await;
    scene.open();
    scene.leaf();
    let third = scene.desk("third").await;
    assert_eq!(third.settled(&d).await["status"], "COMPLETE");
    assert_eq!(scene.lines("ran").iter().filter(|line| *line == "begin d").count(), 1);
}

/// How many began before any had ended, at most.
fn at_once(lines: &[String]) -> i64 {
    let mut now = 0;
    lines.iter().fold(0, |most, line| {
        now += if line.starts_with('+') { 1 } else { -1 };
        most.max(now)
    })
}

async fn many_items_are_one_work_whose_parts_run_a_few_at_a_time(scene: &Scene) {
    scene.agent("part", "", "echo \"+ $LATTICE_TASK\" >> parts; sleep 0.1; echo \"- $LATTICE_TASK\" >> parts; printf '%s %s' \"$LATTICE_TASK\" \"$LATTICE_CONTEXT\"");
    scene.leaf();
    let desk = scene.desk("desk").await;
    let items: Vec<Value> = (0..20).map(|n| if n % 2 == 0 { json!(format!("f{n}")) } else { json!({"n": n}) }).collect();
    let order = json!({"agent_name": "part", "task": "see {item}", "context": {"all": true}, "map": items, "parallel": 3});
    let assigned = desk.call("assign_work", order).await;
    let id = assigned["work_id"].as_str().unwrap();
    let work = desk.settled(id).await;
    assert_eq!((&work["status"], &work["items"]), (&json!("COMPLETE"), &json!(20)), "{work}");
    let results = work["result"].as_array().unwrap();
    assert_eq!(results[0]["result"], "see f0 {\"all\":true,\"item\":\"f0\"}");
    assert_eq!(results[1]["result"], "see {\"n\":1} {\"all\":true,\"n\":1}");
    assert_eq!(results.len(), 20);
    let began: Vec<String> = scene.lines("parts").into_iter().filter(|line| line.starts_with('+')).collect();
    assert_eq!((began.len(), began.iter().collect::<BTreeSet<_>>().len()), (20, 20), "each item ran once: {began:?}");
    let most = at_once(&scene.lines("parts"));
    assert!((2..=3).contains(&most), "{most} ran at once");
    let tree = desk.call("check_work", json!({"run_id": assigned["run_id"]})).await;
    assert_eq!(tree["works"].as_array().unwrap().len(), 21);
    // One handle for all that follows.
    let next = assign(&desk, json!({"agent_name": "context", "task": "sum", "after": [id]})).await;
    let sum = desk.settled(&next).await;
    let context: Value = serde_json::from_str(sum["result"].as_str().unwrap()).unwrap();
    assert_eq!(context["after"][0]["result"].as_array().unwrap().len(), 20);
    // And an order over items may itself wait.
    let gate = desk.assign("gated", "gate").await;
    let order = json!({"agent_name": "context", "task": "{item}", "map": ["x", "y"], "after": [gate]});
    let waits = assign(&desk, order).await;
    assert_eq!(look(&desk, &waits).await["waits_for"], json!([gate]));
    scene.open();
    let work = desk.settled(&waits).await;
    assert_eq!(work["status"], "COMPLETE", "{work}");
    assert!(work["result"][1]["result"].as_str().unwrap().contains("of gate"), "{work}");
}

async fn an_order_over_many_items_keeps_its_pace_without_whoever_gave_it(scene: &Scene) {
    scene.agent("part", "", "while [ ! -e gate ]; do sleep 0.02; done; echo \"+ $LATTICE_TASK\" >> parts");
    // Nothing is looked at only because time has passed.
    scene.leaf_with(|command| _ = command.env("LATTICE_WORK_RECHECK", "1h"));
    let desk = scene.desk("first").await;
    assign(&desk, json!({"agent_name": "part", "task": "{item}", "map": [1, 2, 3, 4, 5, 6], "parallel": 1})).await;
    kill(desk).await;
    scene.open();
    eventually("all items were gone through", async || (scene.lines("parts").len() == 6).then_some(())).await;
}

async fn an_order_over_many_items_goes_on_without_whoever_gave_it(scene: &Scene) {
    scene.agent("part", "", "echo \"+ $LATTICE_TASK\" >> parts; while [ ! -e gate ]; do sleep 0.02; done; printf '%s' \"$LATTICE_TASK\"");
    scene.leaf();
    let desk = scene.desk("first").await;
    let big = "y".repeat(3000);
    let items: Vec<String> = (0..40).map(|n| format!("{n} {big}")).collect();
    let id = assign(&desk, json!({"agent_name": "part", "task": "{item}", "map": items, "parallel": 2})).await;
    eventually("two have begun", async || (scene.lines("parts").len() == 2).then_some(())).await;
    kill(desk).await;
    scene.kill_leaves().await;
    scene.open();
    scene.leaf();
    let second = scene.desk("second").await;
    let work = second.settled(&id).await;
    assert_eq!(work["status"], "COMPLETE", "{work}");
    let size = work["result_ref"]["size"].as_u64().unwrap();
    assert!(size > 120_000, "{work}");
    let last = second.call("check_work", json!({"work_id": id, "jsonpath": "$[39].result"})).await;
    assert!(last["selection"]["text"].as_str().unwrap().contains("39 yyy"), "{last}");
    let began = scene.lines("parts").iter().map(|line| line.split(' ').nth(1).unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(began.iter().collect::<BTreeSet<_>>().len(), 40);
    assert!(began.len() <= 42, "only the two that were cut off began again: {}", began.len());
}

async fn those_who_wait_for_an_order_over_many_items_do_not_keep_its_items_out(scene: &Scene) {
    scene.leaf();
    let limits = |command: &mut Command| _ = command.env("LATTICE_WORK_QUEUE_SIZE", "2").env("LATTICE_WORK_HELD_BACK_MAX", "5");
    let desk = scene.desk_with("desk", limits).await;
    let order = json!({"agent_name": "gated", "task": "{item}", "map": ["a", "b", "c", "d"], "parallel": 1});
    let map = assign(&desk, order).await;
    let waits = |task: &str| json!({"agent_name": "upper", "task": task, "after": [map]});
    let mut last = String::new();
    for n in 0..4 {
        last = assign(&desk, waits(&n.to_string())).await;
    }
    // The order and those that wait for it are as many as may wait there.
    let refused = desk.refusal("assign_work", waits("one too many")).await;
    assert!(refused.contains("5 works wait there for others") && refused.contains("lattice.work.held_back_max"), "{refused}");
    // What waits for nothing has its place all the same.
    let now = desk.assign("upper", "now").await;
    assert_eq!(desk.settled(&now).await["status"], "COMPLETE");
    scene.open();
    assert_eq!(desk.settled(&map).await["status"], "COMPLETE");
    assert_eq!(desk.settled(&last).await["status"], "COMPLETE");
}

async fn agents_that_wait_for_their_works_lend_them_their_places(scene: &Scene) {
    std::fs::write(scene.agents.path().join("assigner.py"), concat!(include_str!("calls.py"), include_str!("assigner.py"))).unwrap();
    scene.agent("assigner", "", "cat > /dev/null; exec python3 ./assigner.py");
    scene.agent("part", "", "echo \"+ $LATTICE_TASK\" >> parts; sleep 0.1; echo \"- $LATTICE_TASK\" >> parts");
    scene.leaf_of(2);
    let desk = scene.desk("desk").await;
    let task = json!([["part", "x"], ["part", "y"]]).to_string();
    let deep = json!([["assigner", [["assigner", [["part", "deep"]]]]]]).to_string();
    let order = json!({"agent_name": "assigner", "task": "{item}", "map": [task, task, deep, task], "timeout": "40s"});
    let map = assign(&desk, order).await;
    let done = desk.settled(&map).await;
    assert_eq!(done["status"], "COMPLETE", "{done}");
    let parts = scene.lines("parts");
    assert_eq!(parts.iter().filter(|line| line.starts_with('+')).count(), 7, "{parts:?}");
    assert!(at_once(&parts) <= 2, "no more places than there are: {parts:?}");
}

async fn items_without_a_result_are_named(scene: &Scene) {
    scene.agent("picky", "", "[ \"$LATTICE_TASK\" != bad ] || { echo 'not this' >&2; exit 4; }; printf fine");
    scene.leaf();
    let desk = scene.desk("desk").await;
    let assigned = desk.call("assign_work", json!({"agent_name": "picky", "task": "{item}", "map": ["a", "bad", "c"]})).await;
    let work = desk.settled(assigned["work_id"].as_str().unwrap()).await;
    assert_eq!((&work["status"], &work["error"]["kind"]), (&json!("FAILED"), &json!("dependency")), "{work}");
    let message = work["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("1 of 3") && message.contains("2 (FAILED)") && message.contains(assigned["run_id"].as_str().unwrap()),
        "{message}"
    );
    assert!(work["error"]["evidence"].as_str().unwrap().contains("exit code 4"), "{work}");
    let works = desk.call("check_work", json!({"run_id": assigned["run_id"]})).await;
    let fine = works["works"].as_array().unwrap().iter().filter(|work| work["result"] == "fine").count();
    assert_eq!(fine, 2, "what was done is not lost: {works}");
}

async fn an_order_over_many_items_is_cancelled_with_all_of_them(scene: &Scene) {
    scene.leaf();
    let desk = scene.desk("desk").await;
    let items: Vec<u32> = (0..30).collect();
    let assigned = desk.call("assign_work", json!({"agent_name": "gated", "task": "{item}", "map": items, "parallel": 3})).await;
    let id = assigned["work_id"].as_str().unwrap();
    eventually("three have begun", async || (scene.lines("ran").len() == 3).then_some(())).await;
    let cancelled = desk.call("cancel_work", json!({"work_id": id, "reason": "enough"})).await;
    assert_eq!((&cancelled["status"], &cancelled["reason"]), (&json!("CANCELLED"), &json!("enough")), "{cancelled}");
    let works = desk.call("check_work", json!({"run_id": assigned["run_id"]})).await;
    let works = works["works"].as_array().unwrap();
    assert!(works.iter().all(|work| work["status"] == "CANCELLED"), "{works:?}");
    scene.open();
    let after = desk.assign("upper", "after").await;
    desk.settled(&after).await;
    assert_eq!(scene.lines("ran").len(), 3, "no further item began");
}

async fn orders_that_cannot_be_are_refused_and_say_why(scene: &Scene) {
    scene.agent("strict", "input: { schema: { type: object, properties: { path: { type: string } }, required: [path] } }", "echo ok");
    scene.leaf();
    let desk = scene.desk("desk").await;
    let fine = desk.assign("upper", "fine").await;
    desk.settled(&fine).await;
    let many: Vec<u32> = (0..401).collect();
    let ids: Vec<String> = (0..101).map(|n| format!("0198f2c4-7d3e-7000-8000-{n:012}")).collect();
    let cases = [
        (json!({"agent_name": "upper", "after": [UNKNOWN]}), vec![UNKNOWN, "not known", "check_work"]),
        (json!({"agent_name": "upper", "after": ["nope"]}), vec!["nope"]),
        (json!({"agent_name": "upper", "after": {"a": 1}}), vec!["after"]),
        (json!({"agent_name": "upper", "after": ids}), vec!["101", "100", "lattice.work.after_max"]),
        (json!({"agent_name": "upper", "after": [fine], "if_failed": "panic"}), vec!["if_failed", "panic", "follow"]),
        (json!({"agent_name": "upper", "if_failed": "run"}), vec!["if_failed", "after"]),
        (json!({"agent_name": "upper", "after": [fine], "context": {"after": 1}}), vec!["after", "context"]),
        (json!({"agent_name": "upper", "map": []}), vec!["map", "no items"]),
        (json!({"agent_name": "upper", "map": many}), vec!["401", "400", "lattice.work.map_max"]),
        (json!({"agent_name": "upper", "map": ["a", "b", "c"], "budget": {"works": 3}}), vec!["budget.works is 3", "4 works"]),
        (json!({"agent_name": "upper", "parallel": 2}), vec!["parallel", "without map"]),
        (json!({"agent_name": "upper", "map": 5}), vec!["map", "a list"]),
        (json!({"agent_name": "upper", "map": ["a"], "parallel": 0}), vec!["parallel 0"]),
        (json!({"agent_name": "strict", "map": [{"path": "a"}, {"path": 5}]}), vec!["map[1]", "/path"]),
        (json!({"agent_name": "strict", "map": ["a"]}), vec!["map[0]", "path"]),
    ];
    for (mut arguments, words) in cases {
        arguments["task"] = json!("x");
        let refused = desk.refusal("assign_work", arguments.clone()).await;
        for word in words {
            assert!(refused.contains(word), "{arguments}: {word:?} is missing in: {refused}");
        }
    }
    assert_eq!(desk.call("check_work", json!({})).await["outstanding"], 0);
    // An agent that waits for its own work, straight away or through another, would wait for ever.
    let calls = json!([
        ["assign_work", {"agent_name": "upper", "task": "x", "after": ["$WORK"]}],
        ["assign_work", {"agent_name": "upper", "task": "x", "after": [fine]}],
    ]);
    let id = desk.assign("nested", &json!({"calls": calls}).to_string()).await;
    let answers = desk.settled(&id).await;
    let answers: Value = serde_json::from_str(answers["result"].as_str().unwrap()).unwrap();
    let refused = answers[0]["refused"].as_str().unwrap();
    assert!(refused.contains(&id) && refused.contains("can't settle before this one"), "{refused}");
    assert_eq!(answers[1]["status"], "ASSIGNED");
    let calls = |after: &str| json!({"calls": [["assign_work", {"agent_name": "upper", "task": "x", "after": [after]}]]}).to_string();
    // The work that it names is known only once it runs: it stands in a file.
    scene.agent(
        "late",
        "",
        "cat > /dev/null; while [ ! -e gate ]; do sleep 0.02; done; LATTICE_TASK=$(cat calls) exec python3 ./nested.py",
    );
    eventually("the last agent is there", async || {
        let known = desk.call("list_available_agents", json!({})).await.to_string();
        known.contains("\"late\"").then_some(())
    })
    .await;
    let late = desk.assign("late", "x").await;
    let between = assign(&desk, json!({"agent_name": "upper", "task": "x", "after": [late]})).await;
    std::fs::write(scene.agents.path().join("calls"), calls(&between)).unwrap();
    scene.open();
    let answers = desk.settled(&late).await;
    let answers: Value = serde_json::from_str(answers["result"].as_str().unwrap()).unwrap();
    let refused = answers[0]["refused"].as_str().unwrap_or_else(|| panic!("{answers}"));
    assert!(refused.contains(&between) && refused.contains(&late), "{refused}");
}

async fn one_key_is_one_work_for_its_caller_in_every_process(scene: &Scene) {
    scene.agent("count", "", "echo x >> counted");
    scene.leaf();
    let (one, two) = (scene.desk("one").await, scene.desk("two").await);
    let order = json!({"agent_name": "count", "task": "once", "idempotency_key": "k"});
    let calls = (0..16).map(|n| if n % 2 == 0 { one.call("assign_work", order.clone()) } else { two.call("assign_work", order.clone()) });
    let ids: BTreeSet<String> = futures_util::future::join_all(calls).await.iter().map(|work| work["work_id"].to_string()).collect();
    assert_eq!(ids.len(), 1, "{ids:?}");
    let id: String = serde_json::from_str(ids.first().unwrap()).unwrap();
    one.settled(&id).await;
    kill(one).await;
    kill(two).await;
    let again = scene.desk("three").await;
    let known = again.call("assign_work", order.clone()).await;
    assert_eq!(known["work_id"], id);
    assert!(known["note"].as_str().unwrap().contains("first order"), "{known}");
    assert_eq!(scene.lines("counted").len(), 1);
    for other in [
        json!({"task": "twice"}),
        json!({"priority": 1}),
        json!({"context": {"a": 1}}),
        json!({"timeout": "1m"}),
        json!({"map": ["a"]}),
        json!({"after": [id]}),
        json!({"agent_name": "upper"}),
        json!({"run_id": known["root_run_id"]}),
    ] {
        let mut changed = order.clone();
        changed.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
        let refused = again.refusal("assign_work", changed).await;
        assert!(refused.contains("\"k\"") && refused.contains(&id), "{other}: {refused}");
    }
    // Another workspace, and an agent below it, are other callers.
    let elsewhere = scene.desk_with("four", |command| _ = command.env("LATTICE_MCP_WORKSPACE", "another")).await;
    let theirs = assign(&elsewhere, order.clone()).await;
    assert_ne!(theirs, id);
    let nested = again.assign("nested", &json!({"calls": [["assign_work", order], ["assign_work", order]]}).to_string()).await;
    let answers: Value = serde_json::from_str(again.settled(&nested).await["result"].as_str().unwrap()).unwrap();
    assert_eq!(answers[0]["work_id"], answers[1]["work_id"]);
    assert!(![&id, &theirs].contains(&&answers[0]["work_id"].as_str().unwrap().to_owned()));
    // An order over many items, too.
    let map = json!({"agent_name": "count", "task": "{item}", "map": [1, 2, 3], "idempotency_key": "m"});
    let calls = [
        again.call("assign_work", map.clone()),
        elsewhere.call("assign_work", json!({"agent_name": "upper", "task": "x"})),
        again.call("assign_work", map),
    ];
    let assigned = futures_util::future::join_all(calls).await;
    assert_eq!(assigned[0]["work_id"], assigned[2]["work_id"]);
    again.settled(assigned[0]["work_id"].as_str().unwrap()).await;
    again.settled(answers[0]["work_id"].as_str().unwrap()).await;
    again.settled(&theirs).await;
    assert_eq!(scene.lines("counted").len(), 6);
}

async fn works_are_cancelled_wherever_they_stand(scene: &Scene) {
    scene.agent(
        "single",
        "limits: { max_parallel: 1 }",
        "echo \"begin $LATTICE_TASK\" >> single; while [ ! -e gate ]; do sleep 0.02; done",
    );
    scene.agent("moody", "", "echo \"moody $LATTICE_ATTEMPT\" >> moody; exit 75");
    scene.agent("parks", "", "cat > /dev/null; printf '::lattice {\"escalate\": {\"reason\": \"which?\"}}\\n'");
    scene.agent(
        "asks",
        "",
        "read -r order; echo $$ > asker; printf '::lattice {\"escalate\": {\"reason\": \"which?\"}}\\n'; read -r answer",
    );
    let path = scene.agents.path().join("asks.md");
    let text = std::fs::read_to_string(&path).unwrap().replace("./asks.sh\"]", "./asks.sh\"], interactive: true");
    std::fs::write(path, text).unwrap();
    scene.leaf();
    let desk = scene.desk("desk").await;
    let running = desk.assign("single", "first").await;
    eventually("the first one runs", async || (!scene.lines("single").is_empty()).then_some(())).await;
    let queued = desk.assign("single", "second").await;
    let waiting = assign(&desk, json!({"agent_name": "upper", "task": "third", "after": [running]})).await;
    let retrying = desk.assign("moody", "x").await;
    let parked = desk.assign("parks", "x").await;
    let asking = desk.assign("asks", "x").await;
    for id in [&parked, &asking] {
        reaches(&desk, id, "ESCALATED").await;
    }
    eventually("it waits for another try", async || look(&desk, &retrying).await.get("retry_at").cloned()).await;
    // Its attempt has ended once the question stands without it.
    let pid = scene.lines("asker").remove(0);
    for (what, id) in [
        ("queued", &queued),
        ("waiting", &waiting),
        ("retrying", &retrying),
        ("parked", &parked),
        ("asking", &asking),
        ("running", &running),
    ] {
        let cancelled = desk.call("cancel_work", json!({"work_id": id, "reason": what})).await;
        assert_eq!((&cancelled["status"], &cancelled["reason"]), (&json!("CANCELLED"), &json!(what)), "{what}: {cancelled}");
        assert_eq!(cancelled["event"], "WORK_CANCELLED", "{what}");
        let again = desk.call("cancel_work", json!({"work_id": id, "reason": "again"})).await;
        assert_eq!((&again["status"], &again["reason"]), (&json!("CANCELLED"), &json!(what)));
    }
    assert!(is_gone(&pid), "the asker is gone when that is confirmed");
    scene.open();
    let last = desk.assign("single", "last").await;
    desk.settled(&last).await;
    assert_eq!(scene.lines("single"), ["begin first", "begin last"], "what was cancelled before it began never did");
    assert_eq!(scene.lines("moody").len(), 1);
}

async fn what_an_agent_had_printed_before_it_was_stopped_can_be_read(scene: &Scene) {
    scene.agent("talks", "", "echo 'half of it'; echo there > said; sleep 300");
    scene.agent(
        "floods",
        "",
        "i=0; while [ $i -lt 3000 ]; do i=$((i + 1)); echo \"line number $i\"; done; echo there > flooded; sleep 300",
    );
    scene.leaf();
    let desk = scene.desk("desk").await;
    let id = desk.assign("talks", "x").await;
    eventually("it has printed", async || (!scene.lines("said").is_empty()).then_some(())).await;
    let cancelled = desk.call("cancel_work", json!({"work_id": id})).await;
    assert_eq!((&cancelled["status"], &cancelled["printed"]), (&json!("CANCELLED"), &json!("half of it")), "{cancelled}");
    let other = scene.desk("other").await;
    assert_eq!(look(&other, &id).await["printed"], "half of it");
    let lines = other.call("check_work", json!({"work_id": id, "lines": "1-1"})).await;
    assert_eq!(lines["selection"]["text"].as_str().unwrap().trim(), "half of it");
    let id = desk.assign("floods", "x").await;
    eventually("it has printed", async || (!scene.lines("flooded").is_empty()).then_some(())).await;
    let cancelled = desk.call("cancel_work", json!({"work_id": id})).await;
    assert!(cancelled["printed"]["size"].as_u64().unwrap() > 40_000, "{cancelled}");
    let found = other.call("check_work", json!({"work_id": id, "grep": "number 2999"})).await;
    assert!(found["selection"]["text"].as_str().unwrap().contains("line number 2999"), "{found}");
    // What ran out of time has left it behind as well.
    let late = assign(&desk, json!({"agent_name": "talks", "task": "x", "timeout": "3s"})).await;
    let late = desk.settled(&late).await;
    assert_eq!((&late["status"], &late["printed"]), (&json!("FAILED"), &json!("half of it")), "{late}");
}

async fn a_cancelled_parent_takes_its_children_along(scene: &Scene) {
    scene.agent("sleeps", "", "echo $$ >> pids; echo 'so far'; (sleep 300) & sleep 300");
    scene.leaf();
    let desk = scene.desk("desk").await;
    let inner = json!({"calls": [["assign_work", {"agent_name": "sleeps", "task": "x"}]], "stay": true}).to_string();
    let child = |agent: &str, task: &str| json!(["assign_work", {"agent_name": agent, "task": task}]);
    let outer = json!({"calls": [child("nested", &inner), child("sleeps", "x")], "stay": true}).to_string();
    let top = desk.call("assign_work", json!({"agent_name": "nested", "task": outer})).await;
    let works = eventually("all are there and run", async || {
        let works = desk.call("check_work", json!({"run_id": top["run_id"]})).await["works"].as_array().unwrap().clone();
        let sleeping = works.iter().filter(|work| work["status"] == "ACCEPTED").count();
        (sleeping == works.len() && works.len() == 4 && scene.lines("pids").len() == 4).then_some(works)
    })
    .await;
    let cancelled = desk.call("cancel_work", json!({"work_id": top["work_id"], "reason": "enough"})).await;
    assert_eq!(cancelled["status"], "CANCELLED", "{cancelled}");
    for work in &works {
        let id = work["work_id"].as_str().unwrap();
        let work = reaches(&desk, id, "CANCELLED").await;
        if work["agent_name"] == "sleeps" {
            assert_eq!(work["printed"], "so far", "{work}");
        }
        if *id != top["work_id"] {
            assert!(work["reason"].as_str().unwrap().contains("which it belongs to, was cancelled"), "{work}");
        }
    }
    for pid in scene.lines("pids") {
        assert!(is_gone(&pid), "process {pid} is still there");
    }
}

async fn no_child_that_is_assigned_during_the_cancel_stays_behind(scene: &Scene) {
    scene.leaf();
    let desk = scene.desk("desk").await;
    let calls = json!({"calls": [["assign_work", {"agent_name": "gated", "task": "x"}]], "repeat": true, "stay": true}).to_string();
    let top = desk.call("assign_work", json!({"agent_name": "nested", "task": calls})).await;
    eventually("children come", async || (scene.lines("answers").len() > 3).then_some(())).await;
    desk.call("cancel_work", json!({"work_id": top["work_id"]})).await;
    reaches(&desk, top["work_id"].as_str().unwrap(), "CANCELLED").await;
    let works = eventually("none is left", async || {
        let works = desk.call("check_work", json!({"run_id": top["run_id"]})).await["works"].as_array().unwrap().clone();
        works.iter().all(|work| work["status"] == "CANCELLED").then_some(works)
    })
    .await;
    assert!(works.len() > 4, "{works:?}");
    assert_eq!(desk.call("check_work", json!({})).await["outstanding"], 0);
}
