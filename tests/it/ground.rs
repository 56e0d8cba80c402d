//! A lattice of one store, or of one server, on which the same behaviours are looked at: stations that run agents, and desks that
//! only assign.

use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::lifecycle::{Place, eventually};
use crate::nats_server::NatsServer;
use crate::rpc::{Client, binary};

/// The store or the server, one folder of agents, and settings that all processes share.
pub(crate) struct Ground {
    pub(crate) place: Place,
    _server: Option<NatsServer>,
    nothing: TempDir,
    /// Where all processes write what they log, if it is looked at.
    log: Option<std::path::PathBuf>,
    variables: Vec<(String, String)>,
}

impl Ground {
    pub(crate) fn local() -> Self {
        Self { place: Place::new(), _server: None, nothing: TempDir::new().unwrap(), log: None, variables: Vec::new() }
    }

    pub(crate) fn nats() -> Self {
        let server = NatsServer::start();
        let variables = vec![("LATTICE_NATS_URL".to_owned(), server.url())];
        Self { _server: Some(server), variables, ..Self::local() }
    }

    /// A setting of every process that is started from now on.
    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.variables.push((name.to_owned(), value.to_owned()));
    }

    /// Lets every process that is started from now on log by this filter, to be looked at.
    pub(crate) fn listen(&mut self, filter: &str) {
        self.log = Some(self.nothing.path().join("log"));
        self.set("LATTICE_LOG", filter);
    }

    /// Waits until some process has logged a line with all of these in it.
    pub(crate) async fn until_said(&self, parts: &[&str]) {
        eventually(&format!("somebody says {parts:?}"), async || (self.said(parts) > 0).then_some(())).await;
    }

    /// How many lines with all of these in them were logged.
    pub(crate) fn said(&self, parts: &[&str]) -> usize {
        let said = std::fs::read_to_string(self.log.as_ref().expect("somebody listens")).unwrap_or_default();
        said.lines().filter(|line| parts.iter().all(|part| line.contains(part))).count()
    }

    /// Lets a process sleep, at a moment when it keeps nobody out of the stores that it shares: whoever sleeps in the middle of a write
    /// locks them for all.
    pub(crate) async fn lull(&self, sleeper: &Client) {
        let process = Pid::from_raw(i32::try_from(sleeper.pid()).unwrap()).unwrap();
        let folder = self.place.data.path().join("default");
        eventually("it sleeps and locks nothing", async || {
            kill_process(process, Signal::STOP).unwrap();
            let locks_nothing = ["lattice.db", "runs.db"].iter().all(|store| is_free(&folder.join(store)));
            if !locks_nothing {
                kill_process(process, Signal::CONT).unwrap();
            }
            locks_nothing.then_some(())
        })
        .await;
    }

    pub(crate) fn agent(&self, name: &str, front: &str, script: &str) {
        self.place.agent(name, front, script);
    }

    pub(crate) fn file(&self, name: &str) -> String {
        self.place.file(name)
    }

    /// Makes a file beside the agents.
    pub(crate) fn write(&self, name: &str) {
        std::fs::write(self.place.agents.path().join(name), "").unwrap();
    }

    fn command(&self, station: &str, agents: &std::path::Path) -> tokio::process::Command {
        let mut command = binary(self.place.data.path(), agents);
        command.envs(self.variables.iter().map(|(name, value)| (name, value))).args(["--station", station]);
        if let Some(log) = &self.log {
            command.stderr(std::fs::File::options().create(true).append(true).open(log).unwrap());
        }
        command
    }

    /// A process of the station that runs the agents; the first call may find them not yet announced.
    pub(crate) async fn station(&self) -> Client {
        let client = Client::start(self.command("here", self.place.agents.path())).await;
        self.until_online(&client).await;
        client
    }

    /// A station that runs nothing.
    pub(crate) async fn desk(&self, name: &str) -> Client {
        let client = Client::start(self.command(name, self.nothing.path())).await;
        self.until_online(&client).await;
        client
    }

    async fn until_online(&self, client: &Client) {
        eventually("the agents are online", async || agent(client, "upper").await.filter(|agent| agent["status"] == "online")).await;
    }

    /// Runs a command to its end: whether it succeeded, and what it said.
    pub(crate) async fn run(&self, arguments: &[&str]) -> (bool, String) {
        let output = self.command("here", self.place.agents.path()).args(arguments).output().await.unwrap();
        let said = String::from_utf8_lossy(if output.status.success() { &output.stdout } else { &output.stderr }).into_owned();
        (output.status.success(), said)
    }

    /// What a command says in JSON.
    pub(crate) async fn say(&self, arguments: &[&str]) -> Value {
        let (done, said) = self.run(&[arguments, &["--json"]].concat()).await;
        assert!(done, "{arguments:?}: {said}");
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {said}"))
    }
}

/// Whether a store can be written to by others.
fn is_free(store: &Path) -> bool {
    let db = rusqlite::Connection::open(store).unwrap();
    db.busy_timeout(Duration::from_millis(500)).unwrap();
    db.execute_batch("BEGIN IMMEDIATE; ROLLBACK").is_ok()
}

/// An agent, as it is listed.
pub(crate) async fn agent(client: &Client, name: &str) -> Option<Value> {
    let answer = client.call("list_available_agents", json!({})).await;
    answer["agents"].as_array().unwrap().iter().find(|agent| agent["name"] == name).cloned()
}

/// Assigns with further arguments; gives the work's id.
pub(crate) async fn assign(client: &Client, agent: &str, task: &str, further: Value) -> String {
    let mut arguments = json!({"agent_name": agent, "task": task});
    arguments.as_object_mut().unwrap().extend(further.as_object().unwrap().clone());
    client.call("assign_work", arguments).await["work_id"].as_str().unwrap().to_owned()
}

/// A work, as it is now.
pub(crate) async fn check(client: &Client, id: &str) -> Value {
    client.call("check_work", json!({"work_id": id})).await
}

/// The same behaviours on a local store and on a server.
macro_rules! on_both {
    ($($name:ident)*) => {
        mod local {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name(crate::ground::Ground::local()).await;
            })*
        }
        mod nats {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name(crate::ground::Ground::nats()).await;
            })*
        }
    };
}
pub(crate) use on_both;
