//! Agents' names: one station holds each, others run theirs for their own callers, and take the name over when its holder is gone.

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::lifecycle::{Place, eventually};
use crate::rpc::{Client, agent, binary};

const QUICK: [(&str, &str); 2] = [("LATTICE_PRESENCE_HEARTBEAT", "500ms"), ("LATTICE_PRESENCE_TTL", "2s")];

async fn station(place: &Place, name: &str, agents: &std::path::Path) -> Client {
    let mut command = binary(place.data.path(), agents);
    command.args(["--station", name]).envs(QUICK);
    let client = Client::start(command).await;
    client.call("list_available_agents", json!({})).await;
    client
}

async fn listed(client: &Client, name: &str) -> Option<Value> {
    let answer = client.call("list_available_agents", json!({})).await;
    answer["agents"].as_array().unwrap().iter().find(|agent| agent["name"] == name).cloned()
}

async fn answer(client: &Client, agent: &str) -> Value {
    let id = client.assign(agent, "who").await;
    client.settled(&id).await["result"].clone()
}

fn folder(says: &str) -> TempDir {
    let folder = TempDir::new().unwrap();
    agent(folder.path(), "shared", "", &format!("printf '%s' {says}"));
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn second_station_keeps_its_agent_local_and_takes_the_name_over_when_the_holder_dies() {
    let place = Place::new();
    let (north, south, none) = (folder("north"), folder("south"), TempDir::new().unwrap());
    let mut first = station(&place, "north", north.path()).await;
    let second = station(&place, "south", south.path()).await;
    let third = station(&place, "west", none.path()).await;
    assert_eq!(answer(&first, "shared").await, "north");
    assert_eq!(answer(&second, "shared").await, "south", "its own callers come first");
    assert_eq!(answer(&third, "shared").await, "north", "everybody else reaches the holder");
    assert_eq!(listed(&second, "shared").await.unwrap()["location"], "local");
    assert_eq!(listed(&third, "shared").await.unwrap()["location"], "north");
    first.child.start_kill().unwrap();
    first.child.wait().await.unwrap();
    eventually("the waiting claim is taken up", async || {
        listed(&third, "shared").await.filter(|agent| agent["location"] == "south" && agent["status"] == "online")
    })
    .await;
    assert_eq!(answer(&third, "shared").await, "south");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_folders_of_one_station_do_not_run_each_others_agents() {
    let place = Place::new();
    let (one, two) = (folder("one"), folder("two"));
    let first = station(&place, "here", one.path()).await;
    let second = station(&place, "here", two.path()).await;
    for _ in 0..5 {
        assert_eq!(answer(&first, "shared").await, "one");
        assert_eq!(answer(&second, "shared").await, "two");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn work_for_a_station_that_is_away_waits_says_so_and_runs_when_it_is_back() {
    let place = Place::new();
    let (north, none) = (folder("north"), TempDir::new().unwrap());
    let mut holder = station(&place, "north", north.path()).await;
    let other = station(&place, "west", none.path()).await;
    holder.child.start_kill().unwrap();
    holder.child.wait().await.unwrap();
    eventually("it is shown as offline", async || listed(&other, "shared").await.filter(|agent| agent["status"] == "offline")).await;
    let assigned = other.call("assign_work", json!({"agent_name": "shared", "task": "x"})).await;
    assert!(assigned["note"].as_str().is_some_and(|note| note.contains("north") && note.contains("offline")), "{assigned}");
    let id = assigned["work_id"].as_str().unwrap();
    let waiting = other.call("await_work", json!({"work_id": id, "timeout": "200ms"})).await;
    assert_eq!(waiting["status"], "PENDING", "{waiting}");
    let _back = station(&place, "north", north.path()).await;
    assert_eq!(other.settled(id).await["result"], "north");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_hook_refuses_and_says_what_to_do() {
    let place = Place::new();
    place.agent("blocked", "limits: { max_parallel: 1 }", "while [ ! -e gate ]; do sleep 0.02; done");
    let client = place.client_with(&[("LATTICE_WORK_QUEUE_SIZE", "2")]).await;
    let first = client.assign("blocked", "runs").await;
    crate::lifecycle::reaches(&client, &first, "ACCEPTED").await;
    let waiting = [client.assign("blocked", "waits").await, client.assign("blocked", "waits").await];
    let refused = client.refusal("assign_work", json!({"agent_name": "blocked", "task": "too much"})).await;
    assert!(refused.contains("full") && refused.contains('2'), "{refused}");
    std::fs::write(place.agents.path().join("gate"), "").unwrap();
    for id in waiting {
        assert_eq!(client.settled(&id).await["status"], "COMPLETE");
    }
    client.settled(&client.assign("blocked", "room again").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn work_stays_with_the_agent_it_was_given_to_whoever_holds_the_name_by_then() {
    for stations in [["north", "south"], ["here", "here"]] {
        let place = Place::new();
        let (north, south) = (TempDir::new().unwrap(), folder("south"));
        agent(north.path(), "shared", "limits: { max_parallel: 1 }", "while [ ! -e gate ]; do sleep 0.02; done; printf north");
        let mut first = station(&place, stations[0], north.path()).await;
        let works = [first.assign("shared", "runs").await, first.assign("shared", "waits").await];
        crate::lifecycle::reaches(&first, &works[0], "ACCEPTED").await;
        first.child.start_kill().unwrap();
        first.child.wait().await.unwrap();
        let second = station(&place, stations[1], south.path()).await;
        let none = TempDir::new().unwrap();
        let third = station(&place, "west", none.path()).await;
        eventually("the name is taken over", async || {
            let id = third.assign("shared", "whose").await;
            let work = third.call("await_work", json!({"work_id": id, "timeout": "1s"})).await;
            (work["result"] == "south").then_some(())
        })
        .await;
        std::fs::write(north.path().join("gate"), "").unwrap();
        let _back = station(&place, stations[0], north.path()).await;
        for id in &works {
            let work = second.settled(id).await;
            assert_eq!(work["result"], "north", "{stations:?}: {work}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_becomes_of_a_gone_stations_work_is_settled_by_another_station() {
    let place = Place::new();
    let (north, none) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    agent(north.path(), "shared", "", "sleep 300");
    let holder = {
        let mut command = binary(place.data.path(), north.path());
        command.args(["--station", "north"]).envs(QUICK).env("LATTICE_WORK_LEASE", "2s");
        Client::start(command).await
    };
    let assigned = holder.call("assign_work", json!({"agent_name": "shared", "task": "late", "timeout": "3s"})).await;
    let (late, unwanted) = (assigned["work_id"].as_str().unwrap(), holder.assign("shared", "unwanted").await);
    crate::lifecycle::reaches(&holder, late, "ACCEPTED").await;
    crate::lifecycle::reaches(&holder, &unwanted, "ACCEPTED").await;
    let other = station(&place, "west", none.path()).await;
    let mut holder = holder;
    holder.child.start_kill().unwrap();
    holder.child.wait().await.unwrap();
    eventually("it is cancelled", async || {
        let work = other.call("cancel_work", json!({"work_id": unwanted, "reason": "its machine is gone"})).await;
        (work["status"] == "CANCELLED").then_some(())
    })
    .await;
    let work = other.settled(late).await;
    assert_eq!((work["status"].as_str(), work["error"]["kind"].as_str()), (Some("FAILED"), Some("total_timeout")), "{work}");
}
