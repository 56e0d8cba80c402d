//! Works that live at a station which the others cannot reach: it says what becomes of them.

use serde_json::{Value, json};

use super::proxy::{Line, Proxy};
use crate::lifecycle::{Place, eventually};
use crate::nats_server::NatsServer;
use crate::rpc::{Client, binary};

async fn station(url: &str, name: &str, place: &Place) -> Client {
    let mut command = binary(place.data.path(), place.agents.path());
    command.env("LATTICE_NATS_URL", url).env("LATTICE_STATION", name).env("LATTICE_NATS_RECONNECT_DELAY_MAX", "300ms");
    command.env("LATTICE_WORK_KILL_AFTER", "200ms");
    let client = Client::start(command).await;
    client.call("list_available_agents", json!({})).await;
    client
}

async fn sees(client: &Client, id: &str, wanted: &str) {
    eventually(wanted, async || {
        let answer = client.try_call("check_work", json!({"work_id": id})).await?.ok()?;
        let work = answer["works"].get(0).cloned().unwrap_or(answer);
        (work["status"] == wanted).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_work_that_was_cancelled_elsewhere_is_what_its_home_says() {
    let server = NatsServer::start();
    let line = Proxy::before(server.port()).await;
    let (home, elsewhere) = (Place::new(), Place::new());
    std::fs::remove_file(elsewhere.agents.path().join("upper.md")).unwrap();
    home.agent("gated", "limits: { max_parallel: 1 }", "while [ ! -e \"go-$LATTICE_TASK\" ]; do sleep 0.02; done; printf done");
    let (alice, bob) = (station(&line.url(), "alice", &home).await, station(&server.url(), "bob", &elsewhere).await);
    line.set(Line::Cut);
    let assigned = async |task: &str| {
        eventually("alice takes work all the same", async || {
            let order = json!({"agent_name": "gated", "task": task});
            Some(alice.try_call("assign_work", order).await?.ok()?["work_id"].as_str()?.to_owned())
        })
        .await
    };
    let (first, second) = (assigned("first").await, assigned("second").await);
    let (third, fourth) = (assigned("third").await, assigned("fourth").await);
    line.set(Line::Open);
    sees(&bob, &fourth, "PENDING").await;
    line.set(Line::Cut);
    let asked: Value = bob.call("cancel_work", json!({"work_id": second})).await;
    assert_eq!((&asked["status"], &asked["cancelling"]), (&json!("PENDING"), &json!(true)), "{asked}");
    for gate in ["go-first", "go-second"] {
        std::fs::write(home.agents.path().join(gate), "").unwrap();
    }
    for id in [&first, &second] {
        assert_eq!(alice.settled(id).await["status"], "COMPLETE");
    }
    line.set(Line::Open);
    for client in [&bob, &alice] {
        sees(client, &second, "COMPLETE").await;
    }
    // Where its home can be reached, what waits there is cancelled at once.
    sees(&bob, &third, "ACCEPTED").await;
    let cancelled = bob.call("cancel_work", json!({"work_id": fourth})).await;
    assert_eq!(cancelled["status"], "CANCELLED", "{cancelled}");
    sees(&alice, &fourth, "CANCELLED").await;
}
