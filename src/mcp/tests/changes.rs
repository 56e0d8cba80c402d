//! Who hears of what has changed.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::fixture::{Fixture, catalog, manifest};
use crate::dispatcher::Caller;
use crate::mcp::{Parts, Server};
use crate::model::event::Kind;
use crate::model::size::Size;

#[tokio::test]
async fn what_changes_while_the_station_wakes_is_in_the_first_lists_and_not_told() {
    let mut fixture = Fixture::new();
    let registry = fixture.dispatcher.registry().clone();
    let wake = move || {
        let registry = registry.clone();
        async move { registry.offer(catalog(vec![manifest("early", "Is there")])).await.map_err(|error| error.to_string()) }.boxed()
    };
    fixture.server = Server::new(Parts {
        dispatcher: fixture.dispatcher.clone(),
        caller: Caller::connection(),
        wake: Arc::new(wake),
        stop: CancellationToken::new(),
        tasks: fixture.tasks.clone(),
    });
    let mut client = fixture.client().await;
    // By its answer, the server has seen that the client is ready.
    client.request("ping", json!({})).await;
    let listed = client.request("tools/list", json!({})).await;
    assert!(listed.to_string().contains("- **early** (local)"), "{listed}");
    client.request("ping", json!({})).await;
    assert!(client.notifications.is_empty(), "{:?}", client.notifications);
    fixture.offer(&["early", "late"]).await;
    client.notified("notifications/tools/list_changed").await;
    client.notified("notifications/resources/list_changed").await;
    assert!(client.request("tools/list", json!({})).await.to_string().contains("- **late** (local)"));
    assert!(client.notifications.is_empty(), "{:?}", client.notifications);
}

#[tokio::test]
async fn old_and_new_clients_hear_of_changed_agents() {
    let fixture = Fixture::new();
    let mut old = fixture.client().await;
    old.request("tools/list", json!({})).await;
    let mut new = fixture.raw(Size::mib(1));
    new.modern = true;
    let wanted = json!({"toolsListChanged": true, "promptsListChanged": true, "resourceSubscriptions": ["agent://worker", "bad"]});
    let listening = new.begin("subscriptions/listen", json!({"notifications": wanted})).await;
    let acknowledged = new.notified("notifications/subscriptions/acknowledged").await;
    assert_eq!(
        acknowledged["params"]["notifications"],
        json!({"toolsListChanged": true, "resourceSubscriptions": ["agent://worker"]}),
        "{acknowledged}"
    );
    // The acknowledgement leaves before the server begins to listen: what happens in between is told all the same.
    fixture.offer(&["worker"]).await;
    old.notified("notifications/tools/list_changed").await;
    old.notified("notifications/resources/list_changed").await;
    let told = new.notified("notifications/tools/list_changed").await;
    assert_eq!(told["params"]["_meta"]["io.modelcontextprotocol/subscriptionId"], listening, "{told}");
    assert_eq!(new.notified("notifications/resources/updated").await["params"]["uri"], "agent://worker");
    let listed = old.request("tools/list", json!({})).await;
    assert!(listed.to_string().contains("- **worker** (local)"));
    assert!(new.leave().await < Duration::from_secs(2), "a listening client does not hold up the end");
    old.leave().await;
    assert_eq!(fixture.tasks.len(), 0, "a connection leaves no task behind");
}

#[tokio::test]
async fn subscribers_hear_of_works_and_runs() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let assigned = client.call("assign_work", json!({"agent_name": "worker", "task": "t"})).await;
    let id = &assigned["work_id"];
    let work = format!("work://{}", id.as_str().unwrap());
    let run = format!("run://{}", assigned["root_run_id"].as_str().unwrap());
    for uri in [&work, &run, &work] {
        let subscribed = client.request("resources/subscribe", json!({"uri": uri})).await;
        assert_eq!(subscribed["result"], json!({}), "{subscribed}");
    }
    fixture.happens(id, 1, Kind::Accepted).await;
    let mut told = Vec::new();
    for _ in 0..2 {
        told.push(client.notified("notifications/resources/updated").await["params"]["uri"].as_str().unwrap().to_owned());
    }
    told.sort();
    assert_eq!(told, [run.clone(), work.clone()]);
    client.request("resources/unsubscribe", json!({"uri": run})).await;
    client.request("resources/unsubscribe", json!({"uri": "work://x"})).await;
    fixture.completes(id, json!("x")).await;
    assert_eq!(client.notified("notifications/resources/updated").await["params"]["uri"], work.as_str());
    let unknown = client.request("resources/subscribe", json!({"uri": "work://0198f2c4-7d3e-7000-8000-1b2c3d4e5f60"})).await;
    assert_eq!(unknown["error"]["code"], -32002, "{unknown}");
    // One who listens to a run of nobody keeps the reader, and goes with it.
    client.request("resources/subscribe", json!({"uri": run})).await;
    client.leave().await;
    let no_task_is_left = async {
        while !fixture.tasks.is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), no_task_is_left).await.expect("the reader of runs ends with the last who listens");
}
