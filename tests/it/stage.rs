//! The same lattice twice: one process with its embedded store, and a desk and a leaf with a server between them.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::lifecycle::{Place, eventually};
use crate::nats_server::NatsServer;
use crate::rpc::{Client, binary};

/// Agents in a place, and whatever leads to them.
pub(crate) struct Stage {
    pub(crate) place: Place,
    server: Option<NatsServer>,
    desk: TempDir,
    nothing: TempDir,
    settings: Vec<(String, String)>,
}

impl Stage {
    /// On one machine, and over a server.
    pub(crate) fn both() -> [Self; 2] {
        [None, Some(NatsServer::start())].map(|server| Self {
            place: Place::new(),
            server,
            desk: TempDir::new().unwrap(),
            nothing: TempDir::new().unwrap(),
            settings: vec![("LATTICE_RETRY_INITIAL_DELAY".into(), "20ms".into())],
        })
    }

    /// A setting of every process that is started from now on.
    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.settings.push((name.into(), value.into()));
    }

    fn command(&self, station: &str, data: &Path, agents: &Path) -> Command {
        let mut command = binary(data, agents);
        command.envs(self.settings.iter().map(|(name, value)| (name, value)));
        if let Some(server) = &self.server {
            command.args(["--station", station, "--nats", &server.url()]);
        }
        command
    }

    /// A command at the station that has the agents.
    pub(crate) fn beside(&self) -> Command {
        self.command("north", self.place.data.path(), self.place.agents.path())
    }

    /// Whoever runs the agents, if that is not the process that assigns.
    pub(crate) fn leaf(&self) -> Option<Child> {
        self.server.is_some().then(|| self.beside().arg("leaf").spawn().unwrap())
    }

    /// A command at the station that assigns.
    pub(crate) fn desk(&self) -> Command {
        match &self.server {
            Some(_) => self.command("desk", self.desk.path(), self.nothing.path()),
            None => self.beside(),
        }
    }

    /// A client that sees these agents, and the leaf that runs them if it is not the client's own process.
    pub(crate) async fn open(&self, agents: &[&str]) -> (Client, Option<Child>) {
        let leaf = self.leaf();
        let client = match &self.server {
            Some(_) => Client::start(self.command("desk", self.desk.path(), self.nothing.path())).await,
            None => {
                self.place.client_with(&self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect::<Vec<_>>()).await
            }
        };
        eventually("the agents are there", async || {
            let known = client.call("list_available_agents", json!({})).await;
            let known = known["agents"].as_array().unwrap();
            let online = |name: &&str| known.iter().any(|agent| agent["name"] == **name && agent["status"] == "online");
            agents.iter().all(online).then_some(())
        })
        .await;
        (client, leaf)
    }

    /// What a command says in JSON at the station that assigns.
    pub(crate) async fn said(&self, arguments: &[&str]) -> Value {
        let output = self.desk().args(arguments).output().await.unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_str(&text).unwrap_or(Value::String(text))
    }
}

/// Assigns with these arguments, and waits for the end.
pub(crate) async fn done(client: &Client, arguments: Value) -> Value {
    let assigned = client.call("assign_work", arguments).await;
    client.settled(assigned["work_id"].as_str().unwrap()).await
}
