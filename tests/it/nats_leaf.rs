//! Stations that only run agents: they keep to what is theirs, however many others there are.

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::lifecycle::eventually;
use crate::nats_server::NatsServer;
use crate::rpc::{Client, agent, binary};

const QUICK: [(&str, &str); 2] = [("LATTICE_PRESENCE_HEARTBEAT", "300ms"), ("LATTICE_PRESENCE_TTL", "1500ms")];

fn command(server: &NatsServer, name: &str, data: &TempDir, agents: &TempDir) -> Command {
    let mut command = binary(data.path(), agents.path());
    command.args(["--station", name]).env("LATTICE_NATS_URL", server.url()).envs(QUICK);
    command
}

fn leaf(server: &NatsServer, name: &str, data: &TempDir, agents: &TempDir) -> Child {
    command(server, name, data, agents).arg("leaf").spawn().unwrap()
}

async fn holder(desk: &Client, wanted: &str) {
    eventually(&format!("{wanted} holds the name"), async || {
        let known = desk.call("list_available_agents", json!({})).await;
        let shared = known["agents"].as_array().unwrap().iter().find(|agent| agent["name"] == "shared")?.clone();
        (shared["status"] == "online" && shared["location"] == wanted).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaf_waits_for_a_name_takes_it_over_when_its_holder_is_gone_and_gives_it_to_nobody_while_it_lives() {
    let server = NatsServer::start();
    let (agents, own) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    agent(agents.path(), "shared", "", "echo at $LATTICE_AGENT");
    agent(own.path(), "shared", "", "echo at another");
    let datas = [TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap()];
    let mut first = leaf(&server, "first", &datas[0], &agents);
    let desk = Client::start(command(&server, "desk", &datas[2], &TempDir::new().unwrap())).await;
    holder(&desk, "first").await;
    let _second = leaf(&server, "second", &datas[1], &own);
    eventually("the second is there", async || {
        let output = command(&server, "desk", &datas[2], &own).args(["stations", "--json"]).output().await.unwrap();
        let stations: Value = serde_json::from_slice(&output.stdout).unwrap();
        stations.as_array().unwrap().iter().any(|station| station["station"] == "second").then_some(())
    })
    .await;
    let id = desk.assign("shared", "x").await;
    assert_eq!(desk.settled(&id).await["result"], "at shared", "the name is the first one's");
    holder(&desk, "first").await;
    first.kill().await.unwrap();
    holder(&desk, "second").await;
    let id = desk.assign("shared", "x").await;
    assert_eq!(desk.settled(&id).await["result"], "at another");
    // The first one comes back, and finds its name taken.
    let _first = leaf(&server, "first", &datas[0], &agents);
    let id = desk.assign("shared", "x").await;
    assert_eq!(desk.settled(&id).await["result"], "at another");
    holder(&desk, "second").await;
}

/// What the server has sent to a station's connection so far, in messages.
async fn sent_to(monitor: u16, station: &str) -> Option<u64> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", monitor)).await.ok()?;
    stream.write_all(b"GET /connz?limit=1000 HTTP/1.0\r\nHost: localhost\r\n\r\n").await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    let page: Value = serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()?;
    let name = format!("lattice-mcp default {station}");
    page["connections"].as_array()?.iter().find(|connection| connection["name"] == name)?["out_msgs"].as_u64()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_heartbeats_of_others_do_not_reach_a_leaf() {
    let monitor = crate::nats_server::free_port();
    let server = NatsServer::with(&format!("http: \"127.0.0.1:{monitor}\""));
    let (data, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    agent(agents.path(), "quiet", "", "echo hello");
    let mut still = command(&server, "still", &data, &agents);
    // Its own heartbeats are far apart: what it hears in between is of others.
    let _still = still.arg("leaf").envs([("LATTICE_PRESENCE_HEARTBEAT", "1h"), ("LATTICE_PRESENCE_TTL", "3h")]).spawn().unwrap();
    let desk_data = TempDir::new().unwrap();
    let desk = Client::start(command(&server, "desk", &desk_data, &TempDir::new().unwrap())).await;
    eventually("the leaf is there", async || {
        let known = desk.call("list_available_agents", json!({})).await;
        (known["agents"][0]["status"] == "online").then_some(())
    })
    .await;
    let client = async_nats::connect(server.url()).await.unwrap();
    let count = async || sent_to(monitor, "still").await;
    let before = eventually("it is counted", count).await;
    let mut other = 0;
    while other < 200 {
        // As another station would say it.
        let sign = json!({"station": format!("s{other}"), "instance": uuid::Uuid::now_v7(), "agents": {}});
        let place = format!("$KV.lattice_default_stations.s{other}.{}", sign["instance"].as_str().unwrap());
        client.request(place, sign.to_string().into()).await.unwrap();
        other += 1;
    }
    eventually("the desk has heard of all", async || {
        let output = command(&server, "desk", &desk_data, &agents).args(["stations", "--json"]).output().await.unwrap();
        let stations: Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
        (stations.as_array().unwrap().len() >= 200).then_some(())
    })
    .await;
    let after = eventually("it is counted", count).await;
    assert!(after - before < 100, "{} messages reached a leaf that has nothing to do with them", after - before);
    let id = desk.assign("quiet", "x").await;
    assert_eq!(desk.settled(&id).await["result"], "hello");
}
