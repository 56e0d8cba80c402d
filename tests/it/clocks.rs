//! Machines whose clocks are an hour off: a real process with a real shifted clock, beside others on the same server.

use std::path::{Path, PathBuf};

use lattice_mcp::model::time::Timestamp;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::lifecycle::{Place, eventually};
use crate::nats_server::NatsServer;
use crate::rpc::{Client, agent, binary};

/// Shifts what a program is told of the time of day, by as many seconds as a file says at that moment; the compiler is there, as
/// the build needs it.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int done = real(clock, at);
    const char *file = getenv("TEST_CLOCK_FILE");
    if (done || clock != CLOCK_REALTIME || !file) return done;
    int shift = open(file, O_RDONLY | O_CLOEXEC);
    char text[32] = "";
    if (shift >= 0) {
        if (read(shift, text, sizeof text - 1) > 0) at->tv_sec += atol(text);
        close(shift);
    }
    return done;
}
"#;

fn shim(dir: &Path) -> PathBuf {
    let (source, library) = (dir.join("shim.c"), dir.join("shim.so"));
    std::fs::write(&source, SHIM).unwrap();
    let built = std::process::Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).arg("-ldl").status().unwrap();
    assert!(built.success(), "cc makes a library");
    library
}

/// Sets a clock off by so many seconds, at once.
fn set_clock(clock: &Path, shift: i64) {
    let draft = clock.with_extension("new");
    std::fs::write(&draft, shift.to_string()).unwrap();
    std::fs::rename(draft, clock).unwrap();
}

fn machine_ms() -> i64 {
    i64::try_from(std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis()).unwrap()
}

struct Station {
    client: Client,
    data: TempDir,
    agents: TempDir,
    variables: Vec<(String, String)>,
}

impl Station {
    async fn start(server: &NatsServer, name: &str, shim: &Path, shift: i64) -> Self {
        let (data, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        agent(agents.path(), &format!("at-{name}"), "", "echo \"$LATTICE_TASK\" at $(date +%s)");
        let mut variables = vec![("LATTICE_NATS_URL".to_owned(), server.url()), ("LATTICE_STATION".to_owned(), name.to_owned())];
        let clock = data.path().join("clock");
        set_clock(&clock, shift);
        variables.push(("LD_PRELOAD".into(), shim.display().to_string()));
        variables.push(("TEST_CLOCK_FILE".into(), clock.display().to_string()));
        let mut command = binary(data.path(), agents.path());
        command.envs(variables.clone());
        Self { client: Client::start(command).await, data, agents, variables }
    }

    fn set_clock(&self, shift: i64) {
        set_clock(&self.data.path().join("clock"), shift);
    }

    /// Assigns a work, sees it settled, and tells how, and how far from the true time its events are.
    async fn work(&self, agent: &str) -> (Value, i64) {
        let id = self.client.assign(agent, "hello").await;
        let work = self.client.settled(&id).await;
        // Assigned by the old time, and judged by the new.
        if work["status"] != "COMPLETE" {
            return (work["status"].clone(), i64::MAX);
        }
        let (history, _) = self.ask(&["work", &id]).await;
        (work["status"].clone(), furthest(&history, machine_ms()))
    }

    /// Ends the process without a word, and starts another one of its folder with these variables.
    async fn start_again(&mut self, variables: Vec<(String, String)>) {
        self.client.child.start_kill().unwrap();
        self.client.child.wait().await.unwrap();
        self.variables = variables;
        let mut command = binary(self.data.path(), self.agents.path());
        command.envs(self.variables.clone());
        self.client = Client::start(command).await;
    }

    /// Gives its own agent a work, and tells how far the work's events are from a moment.
    async fn home_work(&self, from: i64) -> i64 {
        let id = eventually("it is taken at home", async || {
            let order = json!({"agent_name": "at-here", "task": "x"});
            self.client.try_call("assign_work", order).await?.ok()?["work_id"].as_str().map(str::to_owned)
        })
        .await;
        let work = self.client.settled(&id).await;
        assert_eq!(work["status"], "COMPLETE", "{work}");
        furthest(&self.ask(&["work", &id]).await.0, from)
    }

    async fn ask(&self, arguments: &[&str]) -> (Value, String) {
        let mut command = binary(self.data.path(), self.agents.path());
        let output = command.envs(self.variables.clone()).args(arguments).arg("--json").output().await.unwrap();
        (serde_json::from_slice(&output.stdout).unwrap_or_default(), String::from_utf8(output.stderr).unwrap())
    }
}

/// How far the events of a work are from a moment, in milliseconds.
fn furthest(history: &Value, from: i64) -> i64 {
    let events = history["events"].as_array().unwrap_or_else(|| panic!("{history}"));
    assert!(events.len() >= 3, "{history}");
    let moments = events.iter().map(|event| {
        let at = event["timestamp"].as_str().or(event["at"].as_str()).unwrap_or_else(|| panic!("{event}"));
        at.parse::<Timestamp>().unwrap().as_millis()
    });
    moments.map(|at| (at - from).abs()).max().unwrap()
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_an_hour_off_is_noticed_and_harms_nothing() {
    let dir = TempDir::new().unwrap();
    let (server, shim) = (NatsServer::start(), shim(dir.path()));
    let stations = [
        Station::start(&server, "right", &shim, 0).await,
        Station::start(&server, "early", &shim, 3600).await,
        Station::start(&server, "late", &shim, -3600).await,
    ];
    for station in &stations {
        // The first call wakes it.
        station.client.call("list_available_agents", json!({})).await;
    }
    for station in &stations {
        eventually("all three are there", async || {
            let known = station.client.call("list_available_agents", json!({})).await;
            let online = |agent: &&Value| agent["status"] == "online";
            (known["agents"].as_array().unwrap().iter().filter(online).count() == 3).then_some(())
        })
        .await;
    }
    let begun = machine_ms();
    let mut ids = Vec::new();
    for station in &stations {
        for name in ["at-right", "at-early", "at-late"] {
            ids.push(station.client.assign(name, "hello").await);
        }
    }
    for station in &stations {
        for id in &ids {
            let work = station.client.settled(id).await;
            assert_eq!(work["status"], "COMPLETE", "{work}");
        }
    }
    // Every event has the server's time, whoever wrote it.
    for id in &ids {
        let (history, _) = stations[1].ask(&["work", id]).await;
        let apart = furthest(&history, begun);
        assert!(apart < 600_000, "{apart} ms apart: {history}");
    }
    let (found, _) = stations[1].ask(&["doctor"]).await;
    let clock = found.as_array().unwrap().iter().find(|finding| finding["what"] == "clock").unwrap();
    assert!(clock["grade"] == "note" && clock["text"].as_str().unwrap().contains("ahead of the server"), "{clock}");
    let (_, said) = stations[2].ask(&["stations"]).await;
    assert!(said.contains("clock is 3600 s behind the server's") || said.contains("clock is 3599 s behind"), "{said}");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_set_while_a_station_runs_is_followed() {
    let dir = TempDir::new().unwrap();
    let (server, shim) = (NatsServer::start(), shim(dir.path()));
    let station = Station::start(&server, "here", &shim, 3600).await;
    eventually("its agent is there", async || {
        let known = station.client.call("list_available_agents", json!({})).await;
        (known["agents"][0]["status"] == "online").then_some(())
    })
    .await;
    let (status, apart) = station.work("at-here").await;
    assert!(status == "COMPLETE" && apart < 600_000, "{status}, {apart} ms apart");
    // Set right, as by a time server, then wrong in the other direction.
    for shift in [0, -7200] {
        station.set_clock(shift);
        eventually("works have the server's time again", async || {
            let (status, apart) = station.work("at-here").await;
            (status == "COMPLETE" && apart < 600_000).then_some(())
        })
        .await;
    }
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_goes_by_the_same_clock_although_it_cannot_ask_the_server() {
    let dir = TempDir::new().unwrap();
    let (mut server, shim) = (NatsServer::start(), shim(dir.path()));
    let station = Station::start(&server, "here", &shim, 3600).await;
    let (ran, gate, said) = (dir.path().join("ran"), dir.path().join("gate"), dir.path().join("said"));
    let waits = format!("until [ -e {} ] || [ ! -d {} ]; do sleep 0.05; done", gate.display(), dir.path().display());
    agent(station.agents.path(), "slow", "", &format!("echo begun >> {0}; {waits}; echo ended >> {0}", ran.display()));
    eventually("its agents are there", async || {
        let known = station.client.call("list_available_agents", json!({})).await;
        known["agents"].as_array().is_some_and(|all| all.len() == 2 && all[0]["status"] == "online").then_some(())
    })
    .await;
    eventually("the others of the folder are told", async || station.data.path().join("default/clock").exists().then_some(())).await;
    server.kill();
    let id = eventually("it is taken at home", async || {
        let order = json!({"agent_name": "slow", "task": "x", "timeout": "5m"});
        station.client.try_call("assign_work", order).await?.ok()?["work_id"].as_str().map(str::to_owned)
    })
    .await;
    eventually("it runs", async || std::fs::read_to_string(&ran).ok().filter(|text| text.contains("begun"))).await;
    let mut command = binary(station.data.path(), station.agents.path());
    command.envs(station.variables.clone()).env("LATTICE_LOG", "lattice_mcp::leaf=trace");
    command.stderr(std::fs::File::create(&said).unwrap());
    let second = Client::start(command).await;
    second.call("list_available_agents", json!({})).await;
    let look = eventually("the second one looks at what the first one holds", async || {
        let said = std::fs::read_to_string(&said).unwrap();
        said.lines().find(|line| line.contains("looked at the hook")).map(str::to_owned)
    })
    .await;
    assert!(look.contains("taken=0 lapsed=0"), "{look}");
    std::fs::write(&gate, "").unwrap();
    let work = station.client.settled(&id).await;
    assert_eq!((&work["status"], std::fs::read_to_string(&ran).unwrap().as_str()), (&json!("COMPLETE"), "begun\nended\n"), "{work}");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_correction_is_forgotten_with_the_clock_that_it_was_of() {
    let dir = TempDir::new().unwrap();
    let (mut server, shim) = (NatsServer::start(), shim(dir.path()));
    let mut station = Station::start(&server, "here", &shim, -3600).await;
    station.client.call("list_available_agents", json!({})).await;
    eventually("the others of the folder are told", async || station.data.path().join("default/clock").exists().then_some(())).await;
    // The clock is set right while nobody can ask the server.
    server.kill();
    station.set_clock(0);
    station.start_again(station.variables.clone()).await;
    let apart = station.home_work(machine_ms()).await;
    assert!(apart < 600_000, "{apart} ms apart");
    // Of a lattice without a server the machine's clock is the only one, right or wrong.
    station.set_clock(-3600);
    let alone = station.variables.iter().filter(|(name, _)| name != "LATTICE_NATS_URL").cloned().collect();
    station.start_again(alone).await;
    let apart = station.home_work(machine_ms() - 3_600_000).await;
    assert!(apart < 600_000, "{apart} ms apart");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_slept_does_no_work_twice() {
    let dir = TempDir::new().unwrap();
    let (place, shim, clock, ran) = (Place::new(), shim(dir.path()), dir.path().join("clock"), dir.path().join("ran"));
    set_clock(&clock, 0);
    place.agent("slow", "", &format!("echo begun >> {0}; sleep 6; echo ended >> {0}", ran.display()));
    let (shim, file) = (shim.display().to_string(), clock.display().to_string());
    let variables = [("LD_PRELOAD", shim.as_str()), ("TEST_CLOCK_FILE", file.as_str())];
    let clients = [place.client_with(&variables).await, place.client_with(&variables).await];
    for client in &clients {
        client.call("list_available_agents", json!({})).await;
    }
    let id = clients[0].assign("slow", "x").await;
    eventually("it runs", async || std::fs::read_to_string(&ran).ok().filter(|text| text.contains("begun"))).await;
    // Both processes wake at the same moment.
    set_clock(&clock, 120);
    let work = clients[0].settled(&id).await;
    assert_eq!((&work["status"], std::fs::read_to_string(&ran).unwrap().as_str()), (&json!("COMPLETE"), "begun\nended\n"), "{work}");
}
