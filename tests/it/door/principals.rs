//! What one principal ordered is nobody else's to see, wait for, answer or stop: on one machine, and over a server.

use serde_json::{Value, json};

use super::server::{Client, Server};
use super::{ANN, BOB, EVE, OPS, TOKENS};
use crate::lifecycle::eventually;
use crate::stage::Stage;

const OPERATOR: &str = "the-token-of-whoever-runs-it";

/// A stage with these tokens, its doors, and whoever runs its agents.
struct House {
    stage: Stage,
    _leaf: Option<tokio::process::Child>,
}

impl House {
    async fn of(mut stage: Stage, further: &[(&str, &str)]) -> (Self, Server) {
        let file = stage.place.data.path().join("tokens.yaml");
        std::fs::write(&file, TOKENS).unwrap();
        stage.set("LATTICE_HTTP_TOKENS_FILE", &file.display().to_string());
        stage.set("LATTICE_HTTP_TOKEN", OPERATOR);
        for (name, value) in further {
            stage.set(name, value);
        }
        let leaf = stage.leaf();
        let server = Server::start(stage.desk()).await;
        let operator = server.client(OPERATOR);
        eventually("the agents are there", async || {
            let known = operator.call("list_available_agents", json!({})).await.unwrap();
            let online =
                |name: &str| known["agents"].as_array().unwrap().iter().any(|agent| agent["name"] == name && agent["status"] == "online");
            (online("asker") && online("parent")).then_some(())
        })
        .await;
        (Self { stage, _leaf: leaf }, server)
    }
}

fn agents(stage: &Stage) {
    let ask = r#"read -r work; echo '::lattice {"escalate": {"reason": "which?"}}'; read -r answer; printf 'got %s' "$answer""#;
    std::fs::write(stage.place.agents.path().join("asker.sh"), format!("#!/bin/sh\n{ask}\n")).unwrap();
    std::fs::write(
        stage.place.agents.path().join("asker.md"),
        "---\nname: asker\ndescription: asks\nrunner: { kind: command, command: [sh, asker.sh], interactive: true }\n---\n",
    )
    .unwrap();
    std::fs::write(stage.place.agents.path().join("nested.py"), concat!(include_str!("../calls.py"), include_str!("../nested.py")))
        .unwrap();
    stage.place.agent("parent", "", "cat > /dev/null; exec python3 ./nested.py");
}

/// What the parent's calls came to.
async fn said(client: Client, id: &Value) -> Value {
    let done = client.call("await_work", json!({"work_id": id, "timeout": "50s"})).await.unwrap();
    assert_eq!(done["status"], "COMPLETE", "{done}");
    serde_json::from_str(done["result"].as_str().unwrap()).unwrap()
}

async fn asks(client: Client, id: &Value) {
    eventually("it asks", async || {
        let work = client.call("check_work", json!({"work_id": id})).await.unwrap();
        (work["status"] == "ESCALATED").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_principal_has_no_part_in_the_works_of_another() {
    for stage in Stage::both() {
        agents(&stage);
        let (house, server) = House::of(stage, &[]).await;
        let [ann, bob, eve, ops, operator] = [ANN, BOB, EVE, OPS, OPERATOR].map(|token| server.client(token));
        let assigned = ann.assign("asker", json!({"idempotency_key": "k"})).await;
        let (id, run, root) = (&assigned["work_id"], &assigned["run_id"], &assigned["root_run_id"]);
        asks(ann, id).await;

        let unknown = format!("no work {} is known", id.as_str().unwrap());
        for other in [bob, eve] {
            for (tool, arguments) in [
                ("check_work", json!({"work_id": id})),
                ("check_work", json!({"work_ids": [id]})),
                ("check_work", json!({"work_id": id, "lines": "1-2"})),
                ("await_work", json!({"work_id": id, "timeout": "1s"})),
            ] {
                let refused = other.call(tool, arguments.clone()).await.unwrap_err();
                assert!(refused.contains(&unknown), "{tool} {arguments}: {refused}");
            }
            let refused = other.call("check_work", json!({"run_id": run})).await.unwrap_err();
            assert!(refused.contains("no run"), "{refused}");
            let around = other.call("check_work", json!({})).await.unwrap().to_string();
            assert!(!around.contains(id.as_str().unwrap()) && !around.contains("asker"), "{around}");
            for uri in [
                format!("work://{}", id.as_str().unwrap()),
                format!("work://{}/result", id.as_str().unwrap()),
                format!("run://{}", root.as_str().unwrap()),
            ] {
                let read = other.request("resources/read", json!({"uri": uri})).await;
                assert!(read["error"].is_object() && !read.to_string().contains("which?"), "{uri}: {read}");
                let filter = json!({"notifications": {"resourceSubscriptions": [uri]}});
                let listened = other.request("subscriptions/listen", filter).await;
                assert!(listened["error"].is_object(), "{uri}: {listened}");
            }
            let listed = other.request("resources/list", json!({})).await;
            assert!(!listed.to_string().contains(id.as_str().unwrap()), "{listed}");
            let complete = json!({"ref": {"type": "ref/resource", "uri": "work://{id}"}, "argument": {"name": "id", "value": ""}});
            let completed = other.request("completion/complete", complete).await;
            assert_eq!(completed["result"]["completion"]["values"], json!([]), "{completed}");
        }
        for (tool, arguments) in [
            ("answer_work", json!({"work_id": id, "answer": "blue"})),
            ("cancel_work", json!({"work_id": id})),
            ("escalate", json!({"work_id": id, "reason": "mine"})),
        ] {
            let refused = bob.call(tool, arguments).await.unwrap_err();
            assert!(refused.contains(&unknown), "{tool}: {refused}");
            assert_eq!(eve.reply(tool, json!({"work_id": id})).await.status(), 403, "{tool}");
        }
        let refused = bob.call("assign_work", json!({"agent_name": "upper", "task": "x", "after": [id]})).await.unwrap_err();
        assert!(refused.contains("not known in this lattice"), "{refused}");
        let refused = bob.call("assign_work", json!({"agent_name": "upper", "task": "x", "run_id": run})).await.unwrap_err();
        assert!(refused.contains("no run"), "{refused}");
        let again = bob.assign("asker", json!({"idempotency_key": "k"})).await;
        assert_ne!(again["work_id"], *id, "the same key of another principal is another order");

        // Nothing has happened to it, and whoever may, may.
        for whose in [ann, ops, operator] {
            let seen = whose.call("check_work", json!({"work_id": id})).await.unwrap();
            assert_eq!(seen["status"], "ESCALATED", "{seen}");
        }
        let read = ops.request("resources/read", json!({"uri": format!("work://{}", id.as_str().unwrap())})).await;
        assert!(read.to_string().contains("token:ann"), "{read}");
        // Another process with the same tokens, over the same lattice.
        let beside = Server::start(house.stage.desk()).await;
        let refused = beside.client(BOB).call("check_work", json!({"work_id": id})).await.unwrap_err();
        assert!(refused.contains(&unknown), "{refused}");
        let answered = beside.client(ANN).call("answer_work", json!({"work_id": id, "answer": "blue"})).await.unwrap();
        assert_ne!(answered["status"], "FAILED");
        let done = ann.call("await_work", json!({"work_id": id})).await.unwrap();
        assert_eq!(
            (&done["status"], &done["result"]),
            (&json!("COMPLETE"), &json!("got {\"answer\":\"blue\",\"ask\":1,\"reason\":\"which?\"}")),
            "{done}"
        );
        ops.call("cancel_work", json!({"work_id": again["work_id"]})).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_agent_assigns_is_its_orderers_and_it_sees_no_more_than_they_do() {
    for stage in Stage::both() {
        agents(&stage);
        let (_house, server) = House::of(stage, &[]).await;
        let [ann, bob, operator] = [ANN, BOB, OPERATOR].map(|token| server.client(token));
        let secret = ann.assign("upper", json!({})).await["work_id"].clone();
        ann.call("await_work", json!({"work_id": secret})).await.unwrap();
        let calls =
            json!({"calls": [["check_work", {"work_id": secret}], ["assign_work", {"agent_name": "upper", "task": "below"}]]}).to_string();
        let parent = bob.assign("parent", json!({"task": calls})).await;
        let said = said(bob, &parent["work_id"]).await;
        assert!(said[0]["refused"].as_str().unwrap().contains("no work"), "{said}");
        let child = &said[1]["work_id"];
        let done = bob.call("await_work", json!({"work_id": child})).await.unwrap();
        assert_eq!(done["result"], "BELOW", "{done}");
        assert!(ann.call("check_work", json!({"work_id": child})).await.is_err());
        let tree = bob.call("check_work", json!({"run_id": parent["run_id"]})).await.unwrap();
        assert_eq!(tree["works"].as_array().unwrap().len(), 2, "{tree}");
        // What the operator orders is theirs, and hidden from those with names.
        let own = operator.assign("parent", json!({"task": calls})).await;
        let seen = self::said(operator, &own["work_id"]).await;
        assert_eq!(seen[0]["status"], "COMPLETE", "{seen}");
        assert!(bob.call("check_work", json!({"work_id": own["work_id"]})).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_setting_shares_the_works_of_all() {
    let [stage, _] = Stage::both();
    agents(&stage);
    let (_house, server) = House::of(stage, &[("LATTICE_HTTP_SHARE_WORKS", "true")]).await;
    let (ann, bob) = (server.client(ANN), server.client(BOB));
    let id = ann.assign("asker", json!({})).await["work_id"].clone();
    asks(bob, &id).await;
    bob.call("answer_work", json!({"work_id": id, "answer": "red"})).await.unwrap();
    let done = bob.call("await_work", json!({"work_id": id})).await.unwrap();
    assert!(done["result"].as_str().unwrap().contains("red"), "{done}");
}
