//! What happens to the lattice itself is told once, whoever sees it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;

use lattice_mcp::model::audit::{Fact, Kind};
use lattice_mcp::transport::{Filter, Position, local};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};

use crate::lifecycle::{Place, eventually};
use crate::rpc::{Client, agent, binary};

const QUICK: [(&str, &str); 2] = [("LATTICE_PRESENCE_HEARTBEAT", "300ms"), ("LATTICE_PRESENCE_TTL", "1500ms")];

async fn station(place: &Place, name: &str, agents: &Path) -> Client {
    let mut command = binary(place.data.path(), agents);
    command.args(["--station", name]).envs(QUICK);
    let client = Client::start(command).await;
    client.call("list_available_agents", json!({})).await;
    client
}

/// All that was told, in order.
async fn told(place: &Place) -> Vec<Fact> {
    let store = local::open_read_only(&place.data.path().join("default")).unwrap();
    let entries = store.transport().log.read(Filter::Audit, Position::default(), usize::MAX).await.unwrap();
    let facts = entries
        .iter()
        .map(|entry| {
            let fact = Fact::from_bytes(&entry.body).unwrap();
            assert_eq!(entry.subject.to_string(), format!("events.{}", fact.kind.wire_type()));
            fact
        })
        .collect();
    tokio::task::spawn_blocking(move || store.close()).await.unwrap();
    facts
}

/// Each type that was told of a station, and how often.
async fn counts(place: &Place, station: &str) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for fact in told(place).await.iter().filter(|fact| fact.station.as_str() == station) {
        *counts.entry(fact.kind.wire_type().to_owned()).or_default() += 1;
    }
    counts
}

async fn until_told(place: &Place, station: &str, kind: &str, times: usize) {
    eventually(&format!("{times} {kind} of {station}"), async || {
        let counts = counts(place, station).await;
        (counts.get(kind).copied().unwrap_or(0) == times).then_some(())
    })
    .await;
}

async fn leave(mut client: Client) {
    client.hang_up().await;
    assert!(client.child.wait().await.unwrap().success());
}

fn signal(client: &Client, name: &str) {
    assert!(std::process::Command::new("kill").args([&format!("-{name}"), &client.pid().to_string()]).status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_station_tells_that_it_joins_registers_and_leaves_and_a_probe_tells_nothing() {
    let place = Place::new();
    let probe = place.client().await;
    leave(probe).await;
    assert!(told(&place).await.is_empty());
    let client = station(&place, "north", place.agents.path()).await;
    place.agent("second", "", "echo hello");
    until_told(&place, "north", "agent.registered", 2).await;
    leave(client).await;
    let facts = told(&place).await;
    let kinds: Vec<&str> = facts.iter().map(|fact| fact.kind.wire_type()).collect();
    assert_eq!(kinds, ["station.joined", "agent.registered", "agent.registered", "station.left"]);
    assert!(facts.iter().all(|fact| fact.instance == facts[0].instance && fact.lattice.as_str() == "default"));
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_tell_once_what_happens_to_the_agent_that_they_share() {
    let place = Place::new();
    let replicas = [
        station(&place, "north", place.agents.path()).await,
        station(&place, "north", place.agents.path()).await,
        station(&place, "north", place.agents.path()).await,
    ];
    until_told(&place, "north", "agent.registered", 1).await;
    for round in 1..=3 {
        place.agent("upper", &format!("capabilities: [round-{round}]"), "echo changed");
        until_told(&place, "north", "agent.changed", round).await;
    }
    std::fs::remove_file(place.agents.path().join("upper.md")).unwrap();
    until_told(&place, "north", "agent.withdrawn", 1).await;
    for replica in replicas {
        leave(replica).await;
    }
    let counts = counts(&place, "north").await;
    let expected = [("agent.changed", 3), ("agent.registered", 1), ("agent.withdrawn", 1), ("station.joined", 3), ("station.left", 3)];
    assert_eq!(counts, expected.map(|(kind, count)| (kind.to_owned(), count)).into());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_dies_is_told_lost_once_and_one_that_slept_is_back() {
    let place = Place::new();
    let mut others = Vec::new();
    for name in ["east", "south", "west"] {
        others.push(station(&place, name, TempDir::new().unwrap().path()).await);
    }
    let sleeper = station(&place, "sleeper", place.agents.path()).await;
    let mut dying = station(&place, "dying", TempDir::new().unwrap().path()).await;
    until_told(&place, "dying", "station.joined", 1).await;
    dying.child.start_kill().unwrap();
    dying.child.wait().await.unwrap();
    until_told(&place, "dying", "station.lost", 1).await;
    signal(&sleeper, "STOP");
    until_told(&place, "sleeper", "station.lost", 1).await;
    signal(&sleeper, "CONT");
    until_told(&place, "sleeper", "station.back", 1).await;
    leave(sleeper).await;
    for other in others {
        leave(other).await;
    }
    let facts = told(&place).await;
    let of =
        |station: &str| -> Vec<&Kind> { facts.iter().filter(|fact| fact.station.as_str() == station).map(|fact| &fact.kind).collect() };
    assert!(matches!(of("dying")[..], [Kind::Joined, Kind::Lost { .. }]), "{facts:?}");
    assert!(matches!(of("sleeper")[..], [Kind::Joined, Kind::Registered(_), Kind::Lost { .. }, Kind::Back, Kind::Left]), "{facts:?}");
    for other in ["east", "south", "west"] {
        assert!(matches!(of(other)[..], [Kind::Joined, Kind::Left]), "who says goodbye is not lost: {facts:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_name_and_its_taking_over_are_told_once() {
    let place = Place::new();
    let mut holder = station(&place, "north", place.agents.path()).await;
    let south = TempDir::new().unwrap();
    agent(south.path(), "upper", "", "echo south");
    until_told(&place, "north", "agent.registered", 1).await;
    let waiting = [station(&place, "south", south.path()).await, station(&place, "south", south.path()).await];
    until_told(&place, "south", "agent.refused", 1).await;
    holder.child.start_kill().unwrap();
    holder.child.wait().await.unwrap();
    until_told(&place, "south", "agent.taken_over", 1).await;
    for client in waiting {
        leave(client).await;
    }
    let facts = told(&place).await;
    let of_the_name: Vec<&Kind> = facts.iter().filter(|fact| fact.kind.agent().is_some()).map(|fact| &fact.kind).collect();
    let north = || "north".parse().unwrap();
    let agent = || "upper".parse().unwrap();
    assert_eq!(
        of_the_name,
        [
            &Kind::Registered(agent()),
            &Kind::Refused { agent: agent(), holder: north() },
            &Kind::TakenOver { agent: agent(), from: north() }
        ]
    );
}

/// What `events` prints with these arguments.
async fn events(place: &Place, args: &[&str]) -> String {
    let output = binary(place.data.path(), place.agents.path()).arg("events").args(args).output().await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn parsed(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

fn types(lines: &[Value]) -> Vec<&str> {
    lines.iter().map(|line| line["type"].as_str().unwrap()).collect()
}

/// A process that follows the events as JSON.
struct Follower {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Follower {
    fn start(place: &Place) -> Self {
        let mut command = binary(place.data.path(), place.agents.path());
        let mut child = command.args(["events", "--follow", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// Reads on to the first line of this type about this station.
    async fn until(&mut self, kind: &str, station: &str) -> Value {
        let found = async {
            while let Some(line) = self.lines.next_line().await.unwrap() {
                let line: Value = serde_json::from_str(&line).unwrap();
                if line["type"] == kind && [&line["station"], &line["station_id"]].contains(&&json!(station)) {
                    return line;
                }
            }
            panic!("it ended without {kind} of {station}")
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), found).await.unwrap_or_else(|_| panic!("never: {kind} of {station}"))
    }

    /// It has ended well, and has said nothing on standard error.
    async fn ended(self) {
        let output = tokio::time::timeout(std::time::Duration::from_secs(30), self.child.wait_with_output()).await.unwrap().unwrap();
        assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn following_shows_what_other_processes_do_until_interrupted() {
    let place = Place::new();
    let first = station(&place, "north", place.agents.path()).await;
    let mut follower = Follower::start(&place);
    follower.until("station.joined", "north").await;
    let south = TempDir::new().unwrap();
    let second = station(&place, "south", south.path()).await;
    let joined = follower.until("station.joined", "south").await;
    agent(south.path(), "painter", "", "echo blue");
    let registered = follower.until("agent.registered", "south").await;
    assert_eq!((&registered["agent"], &registered["instance_id"]), (&json!("painter"), &joined["instance_id"]));
    let work = eventually("the painter is known", async || {
        first.try_call("assign_work", json!({"agent_name": "painter", "task": "x"})).await.unwrap().ok()
    })
    .await;
    assert_eq!(follower.until("WORK_COMPLETE", "south").await["work_id"], work["work_id"]);
    std::fs::remove_file(south.path().join("painter.md")).unwrap();
    assert_eq!(follower.until("agent.withdrawn", "south").await["agent"], "painter");
    leave(second).await;
    follower.until("station.left", "south").await;
    let pid = follower.child.id().unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    follower.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_leaves_when_nobody_reads_it_any_more_although_nothing_happens() {
    let place = Place::new();
    leave(station(&place, "north", place.agents.path()).await).await;
    let mut follower = Follower::start(&place);
    follower.until("station.left", "north").await;
    let Follower { child, lines } = follower;
    drop(lines);
    let output = tokio::time::timeout(std::time::Duration::from_secs(30), child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn stations_agents_and_works_stand_in_one_list_that_does_nothing_to_a_terminal() {
    let place = Place::new();
    let nothing = binary(place.data.path(), place.agents.path()).args(["events", "--follow"]).output().await.unwrap();
    assert_eq!((nothing.status.code(), nothing.stdout.as_slice()), (Some(3), &b""[..]), "there is nothing to follow");
    place.agent("talker", "", "echo '::lattice {\"progress\": 50, \"message\": \"half\"}'; printf '\\033[31mred'");
    let client = station(&place, "north", place.agents.path()).await;
    until_told(&place, "north", "agent.registered", 2).await;
    let id = client.assign("talker", "say \x1b]0;evil\x07").await;
    client.settled(&id).await;
    leave(client).await;

    let all = parsed(&events(&place, &["--json"]).await);
    let expected =
        ["station.joined", "agent.registered", "agent.registered", "WORK_ASSIGNED", "WORK_ACCEPTED", "WORK_COMPLETE", "station.left"];
    assert_eq!(types(&all), expected);
    assert_eq!(types(&parsed(&events(&place, &["--json", "--kind", "agent"]).await)), expected[1..3]);
    assert_eq!(types(&parsed(&events(&place, &["--json", "--kind", "work"]).await)), expected[3..6]);
    let with_progress = parsed(&events(&place, &["--json", "--kind", "work", "--progress"]).await);
    assert!(types(&with_progress).contains(&"WORK_PROGRESS"));
    assert_eq!(events(&place, &["--json", "--since", "1ms"]).await, "");

    let table = events(&place, &[]).await;
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), expected.len() + 1, "{table}");
    assert!(lines[0].starts_with("TIME ") && lines[4].contains("\\u{1b}]0;evil\\u{7}") && lines[6].contains("\\u{1b}[31mred"), "{table}");
    assert!(!table.contains(|c: char| c.is_control() && c != '\n'));
    let column = |line: &str| line.find("north");
    assert!(lines[1..].iter().all(|line| column(line) == column(lines[1])), "{table}");
    assert!(events(&place, &["--since", "1ms"]).await.contains("--since"));
}
