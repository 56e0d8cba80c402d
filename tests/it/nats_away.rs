//! Works that begin while the server is away: they go on at home, and everybody can speak to them once it is back.

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::lifecycle::{Place, eventually};
use crate::nats_server::NatsServer;
use crate::rpc::{Client, binary};

async fn station(server: &NatsServer, name: &str, data: &TempDir, agents: &TempDir) -> Client {
    let mut command = binary(data.path(), agents.path());
    command.env("LATTICE_NATS_URL", server.url()).env("LATTICE_STATION", name).env("LATTICE_NATS_RECONNECT_DELAY_MAX", "300ms");
    let client = Client::start(command).await;
    client.call("list_available_agents", json!({})).await;
    client
}

async fn sees(client: &Client, id: &str, wanted: &str) -> Value {
    eventually(wanted, async || {
        let answer = client.try_call("check_work", json!({"work_id": id})).await?.ok()?;
        let work = answer["works"].get(0).cloned().unwrap_or(answer);
        (work["status"] == wanted).then_some(work)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn work_that_began_alone_is_answered_and_cancelled_from_elsewhere_later() {
    let mut server = NatsServer::start();
    let (home, other) = (Place::new(), Place::new());
    home.agent("gated", "", "while [ ! -e gate ]; do sleep 0.05; done; echo opened");
    let script =
        "read -r work\necho '::lattice {\"escalate\": {\"reason\": \"which colour?\"}}'\nread -r answer\nprintf 'it is %s' \"$answer\"\n";
    std::fs::write(home.agents.path().join("asker.sh"), script).unwrap();
    std::fs::write(
        home.agents.path().join("asker.md"),
        "---\nname: asker\ndescription: asks\nrunner: { kind: command, interactive: true, command: [sh, asker.sh] }\n---\n",
    )
    .unwrap();
    let alice = station(&server, "alice", &home.data, &home.agents).await;
    let bob = station(&server, "bob", &other.data, &TempDir::new().unwrap()).await;
    eventually("bob sees what alice has", async || {
        let known = bob.call("list_available_agents", json!({})).await;
        (known["agents"].as_array().unwrap().len() == 3).then_some(())
    })
    .await;
    server.kill();
    let lonely = eventually("alice takes work all the same", async || {
        let assigned = alice.try_call("assign_work", json!({"agent_name": "asker", "task": "x"})).await?.ok()?;
        Some(assigned["work_id"].as_str()?.to_owned())
    })
    .await;
    let to_cancel = alice.assign("gated", "x").await;
    let to_finish = alice.assign("upper", "done alone").await;
    sees(&alice, &lonely, "ESCALATED").await;
    assert_eq!(alice.settled(&to_finish).await["result"], "DONE ALONE");
    let refused = bob.refusal("assign_work", json!({"agent_name": "upper", "task": "x"})).await;
    assert!(refused.contains("cannot be reached"), "{refused}");

    server.revive();
    let question = sees(&bob, &lonely, "ESCALATED").await;
    assert!(question.to_string().contains("which colour?"), "{question}");
    sees(&bob, &to_cancel, "ACCEPTED").await;
    assert_eq!(sees(&bob, &to_finish, "COMPLETE").await["result"], "DONE ALONE");
    bob.call("answer_work", json!({"work_id": lonely, "answer": "green"})).await;
    for client in [&alice, &bob] {
        assert!(sees(client, &lonely, "COMPLETE").await["result"].as_str().unwrap().contains("green"));
    }
    bob.call("cancel_work", json!({"work_id": to_cancel})).await;
    for client in [&alice, &bob] {
        sees(client, &to_cancel, "CANCELLED").await;
    }
    // And what is assigned now goes the usual way.
    let id = bob.assign("upper", "together").await;
    assert_eq!(alice.settled(&id).await["result"], "TOGETHER");
}
