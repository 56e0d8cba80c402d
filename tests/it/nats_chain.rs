//! Lineage across stations: agents that hand work on to agents of other stations, as children of their own runs.

use std::time::Duration;

use futures_util::StreamExt;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Child;

use crate::lifecycle::eventually;
use crate::nats_server::NatsServer;
use crate::rpc::{Client, agent, binary};

struct Station {
    name: &'static str,
    data: TempDir,
    agents: TempDir,
    _leaf: Child,
}

impl Station {
    fn start(server: &NatsServer, name: &'static str, token: &str) -> Self {
        let (data, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        std::fs::write(agents.path().join("chain.py"), include_str!("chain.py")).unwrap();
        for part in ["one", "two"] {
            agent(agents.path(), &format!("{name}-{part}"), "", "cat > /dev/null; exec python3 ./chain.py");
        }
        let mut command = binary(data.path(), agents.path());
        command.args(["leaf", "--station", name]).env("LATTICE_NATS_URL", server.url()).env("LATTICE_NATS_AUTH_TOKEN", token);
        Self { name, data, agents, _leaf: command.spawn().unwrap() }
    }
}

/// The runs of a tree, from the top down.
fn runs(tree: &Value, found: &mut Vec<(String, String, String)>) {
    match tree {
        Value::Array(trees) => trees.iter().for_each(|tree| runs(tree, found)),
        Value::Object(fields) => {
            let text = |name: &str| fields.get(name).and_then(Value::as_str).map(str::to_owned);
            if let (Some(run), Some(agent), Some(status)) = (text("run_id"), text("agent_name").or_else(|| text("agent")), text("status")) {
                found.push((run, agent, status));
            }
            fields.values().filter(|value| value.is_array() || value.is_object()).for_each(|value| runs(value, found));
        }
        _ => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_of_five_over_three_stations_is_one_tree_from_any_of_them() {
    let token = "a-token-that-agents-need-as-well";
    let server = NatsServer::with(&format!("authorization {{ token: \"{token}\" }}"));
    let stations = ["north", "south", "west"].map(|name| Station::start(&server, name, token));
    let (data, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut command = binary(data.path(), agents.path());
    command.envs([("LATTICE_NATS_URL", server.url().as_str()), ("LATTICE_NATS_AUTH_TOKEN", token), ("LATTICE_STATION", "desk")]);
    let desk = Client::start(command).await;
    eventually("all agents are there", async || {
        let known = desk.call("list_available_agents", json!({})).await;
        (known["agents"].as_array().unwrap().len() == 6).then_some(())
    })
    .await;
    let watcher = async_nats::ConnectOptions::with_token(token.to_owned()).connect(server.url()).await.unwrap();
    let mut pushed = watcher.subscribe("lattice.default.station.*.work.assign").await.unwrap();
    // A flush reaches the socket; an answer to a message of ours says that the server has read what came before it.
    let mut echo = watcher.subscribe("echo").await.unwrap();
    watcher.publish("echo", "".into()).await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), echo.next()).await.expect("the server echoes");

    let rest = json!(["south-one", "west-one", "north-two", "south-two"]);
    let assigned = desk.call("assign_work", json!({"agent_name": "north-one", "task": rest.to_string()})).await;
    let id = assigned["work_id"].as_str().unwrap().to_owned();
    let work = desk.settled(&id).await;
    assert_eq!(work["status"], "COMPLETE", "{work}");
    let links: Vec<Value> = serde_json::from_str(work["result"].as_str().unwrap()).unwrap();
    let names: Vec<&str> = links.iter().map(|link| link["agent"].as_str().unwrap()).collect();
    assert_eq!(names, ["north-one", "south-one", "west-one", "north-two", "south-two"]);
    let top = assigned["run_id"].as_str().unwrap();
    for (depth, link) in links.iter().enumerate() {
        assert_eq!(link["run"], format!("{top}{}", "-1".repeat(depth)), "each is the child of the one before");
        assert_eq!(link["trace"], links[0]["trace"], "one trace from end to end");
    }
    for _ in &links {
        let item = tokio::time::timeout(Duration::from_secs(10), pushed.next()).await.expect("each work is pushed").unwrap();
        let header = item.headers.as_ref().and_then(|headers| headers.get("traceparent")).map(|value| value.as_str().to_owned());
        let header = header.unwrap_or_else(|| panic!("no trace context: {:?}", item.headers));
        assert_eq!(header.split('-').nth(1), links[0]["trace"].as_str(), "{header}");
    }

    let expected: Vec<(String, String, String)> = links
        .iter()
        .map(|link| (link["run"].as_str().unwrap().to_owned(), link["agent"].as_str().unwrap().to_owned(), "COMPLETE".to_owned()))
        .collect();
    // Any id of the tree leads to all that hangs below it, on any station.
    for station in &stations {
        let tree = eventually("the tree is whole", async || {
            let mut command = binary(station.data.path(), station.agents.path());
            command.args(["runs", "--json", "--station", station.name, "--uuid", top, "--nats", &server.url()]);
            let output = command.env("LATTICE_NATS_AUTH_TOKEN", token).output().await.unwrap();
            let mut found = Vec::new();
            runs(&serde_json::from_slice(&output.stdout).ok()?, &mut found);
            found.dedup();
            (found.len() == 5).then_some(found)
        })
        .await;
        assert_eq!(tree, expected, "as {} sees it", station.name);
    }
}
