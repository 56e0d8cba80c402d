//! Works that begin while the server is away: they go on at home, and everybody can speak to them once it is back.

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::lifecycle::{Place, eventually};
use crate::nats_server::NatsServer;
use crate::questions::{begin_task, modern, stands};
use crate::rpc::{Client, binary};

async fn station(server: &NatsServer, name: &str, data: &TempDir, agents: &TempDir) -> Client {
    station_with(server, name, data, agents, &[]).await
}

async fn station_with(server: &NatsServer, name: &str, data: &TempDir, agents: &TempDir, variables: &[(&str, &str)]) -> Client {
    let mut command = binary(data.path(), agents.path());
    command.envs(variables.iter().copied());
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

#[tokio::test(flavor = "multi_thread")]
async fn a_work_that_began_alone_goes_on_once_all_that_it_asked_is_answered_elsewhere() {
    let mut server = NatsServer::start();
    let (home, other) = (Place::new(), Place::new());
    let script = r#"case "$(cat)" in *'"answer":"large"'*) printf enough; exit;; esac
printf '::lattice {"escalate": {"reason": "which %s?"}}\n' colour size"#;
    home.agent("ends", "", script);
    let alice = station(&server, "alice", &home.data, &home.agents).await;
    let bob = station(&server, "bob", &other.data, &TempDir::new().unwrap()).await;
    sees_agent(&bob, "ends").await;
    server.kill();
    let id = assigned_alone(&alice, json!({"agent_name": "ends", "task": "x"})).await;
    server.revive();
    eventually("both questions are seen", async || {
        let work = bob.try_call("check_work", json!({"work_id": id})).await?.ok()?;
        work["next"].as_str()?.contains("2 questions").then_some(())
    })
    .await;
    bob.call("answer_work", json!({"work_id": id, "answer": "red", "ask": 1})).await;
    // Whatever was woken by that would be taken first.
    let after = alice.assign("upper", "x").await;
    alice.settled(&after).await;
    bob.call("answer_work", json!({"work_id": id, "answer": "large", "ask": 2})).await;
    let done = sees(&bob, &id, "COMPLETE").await;
    assert_eq!(done["attempt"], 2, "{done}");
}

async fn sees_agent(client: &Client, name: &str) {
    eventually("the agent is seen", async || {
        let known = client.call("list_available_agents", json!({})).await;
        let online = |agent: &Value| agent["name"] == name && agent["status"] == "online";
        known["agents"].as_array().unwrap().iter().any(online).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_was_refused_while_the_server_was_away_leaves_its_key_free() {
    let mut server = NatsServer::start();
    let (home, bobs, carols, nothing) = (Place::new(), Place::new(), Place::new(), TempDir::new().unwrap());
    let workspace = [("LATTICE_MCP_WORKSPACE", "shared")];
    let alice = station(&server, "alice", &home.data, &home.agents).await;
    let bob = station_with(&server, "bob", &bobs.data, &nothing, &workspace).await;
    let carol = station_with(&server, "carol", &carols.data, &nothing, &workspace).await;
    sees_agent(&bob, "upper").await;
    sees_agent(&carol, "upper").await;
    server.kill();
    let order = |task: &str, key: &str| json!({"agent_name": "upper", "task": task, "idempotency_key": key});
    // Whoever was not answered can't know; from the first clear word on, nothing is sent.
    eventually("bob hears that the server is away", async || {
        let refused = bob.try_call("assign_work", json!({"agent_name": "upper", "task": "x"})).await?.err()?;
        refused.contains("Nothing was done").then_some(())
    })
    .await;
    for order in [order("one", "same"), order("first", "other")] {
        let refused = bob.refusal("assign_work", order).await;
        assert!(refused.contains("Nothing was done"), "{refused}");
    }
    // At home keys hold all the same.
    let lonely = alice.call("assign_work", order("at home", "home")).await["work_id"].clone();
    assert_eq!(alice.call("assign_work", order("at home", "home")).await["work_id"], lonely);
    server.revive();
    let assigned = async |client: &Client, order: Value| {
        eventually("it is assigned", async || match client.try_call("assign_work", order.clone()).await? {
            Ok(assigned) => Some(assigned["work_id"].as_str()?.to_owned()),
            Err(text) => {
                assert!(!text.contains("was used for another order"), "{text}");
                None
            }
        })
        .await
    };
    let first = assigned(&carol, order("one", "same")).await;
    assert_eq!(assigned(&bob, order("one", "same")).await, first, "two works under one key");
    let second = assigned(&bob, order("second", "other")).await;
    assert_eq!(assigned(&carol, order("second", "other")).await, second);
    assert_eq!(bob.settled(&second).await["result"], "SECOND");
    assert_eq!(json!(assigned(&alice, order("at home", "home")).await), lonely);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_was_begun_while_the_server_was_away_is_cancelled_once_it_is_back() {
    let mut server = NatsServer::start();
    let (home, other) = (Place::new(), Place::new());
    home.agent("gated", "", "while [ ! -e gate ]; do sleep 0.05; done; echo opened");
    let alice = station_with(&server, "alice", &home.data, &home.agents, &[("LATTICE_MCP_TASK_AFTER", "50ms")]).await;
    let bob = station(&server, "bob", &other.data, &TempDir::new().unwrap()).await;
    sees_agent(&bob, "gated").await;
    server.kill();
    let id = eventually("alice takes work all the same", async || {
        let assigned = alice.try_call("assign_work", json!({"agent_name": "gated", "task": "x"})).await?.ok()?;
        Some(assigned["work_id"].as_str()?.to_owned())
    })
    .await;
    let task = begin_task(&alice, &id).await;
    server.revive();
    // What alice tells the server arrives there.
    sees(&bob, &id, "ACCEPTED").await;
    assert_eq!(stands(&alice, &task, "working").await["taskId"], json!(task));
    let cancelled = modern(&alice, "tasks/cancel", json!({"taskId": task})).await;
    assert!(cancelled.get("error").is_none(), "{cancelled}");
    stands(&alice, &task, "cancelled").await;
    std::fs::write(home.agents.path().join("gate"), "").unwrap();
    assert_eq!(alice.settled(&id).await["status"], "COMPLETE");
}

fn lines(place: &Place, name: &str) -> Vec<String> {
    let mut lines: Vec<String> = place.file(name).lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

fn open(place: &Place, gate: &str) {
    std::fs::write(place.agents.path().join(gate), "").unwrap();
}

/// Assigns once this station has found out that the server is away.
async fn assigned_alone(client: &Client, order: Value) -> String {
    eventually("it takes work all the same", async || {
        Some(client.try_call("assign_work", order.clone()).await?.ok()?["work_id"].as_str()?.to_owned())
    })
    .await
}

/// Notes that it began, and ends once it may.
const STEP: &str = r#"echo "$LATTICE_TASK" >> ran; while [ ! -e "go-$LATTICE_TASK" ]; do sleep 0.02; done; printf 'of %s' "$LATTICE_TASK""#;

#[tokio::test(flavor = "multi_thread")]
async fn orders_that_wait_go_on_at_home_while_those_on_the_server_wait_for_it() {
    let mut server = NatsServer::start();
    let (home, other) = (Place::new(), Place::new());
    home.agent("step", "", STEP);
    let alice = station(&server, "alice", &home.data, &home.agents).await;
    let bob = station(&server, "bob", &other.data, &TempDir::new().unwrap()).await;
    sees_agent(&bob, "step").await;
    let map = |items: Value| json!({"agent_name": "step", "task": "{item}", "map": items, "parallel": 1});
    let far = alice.call("assign_work", map(json!(["far-1", "far-2"]))).await["work_id"].as_str().unwrap().to_owned();
    eventually("its first item runs", async || (lines(&home, "ran") == ["far-1"]).then_some(())).await;
    server.kill();
    let first = assigned_alone(&alice, json!({"agent_name": "step", "task": "first"})).await;
    let second = assigned_alone(&alice, json!({"agent_name": "upper", "task": "second", "after": [first]})).await;
    let items = assigned_alone(&alice, map(json!(["a", "b", "c"]))).await;
    ["go-first", "go-a", "go-b", "go-c", "go-far-1", "go-far-2"].iter().for_each(|gate| open(&home, gate));
    assert_eq!(sees(&alice, &second, "COMPLETE").await["result"], "SECOND");
    let results = sees(&alice, &items, "COMPLETE").await;
    assert!(results.to_string().contains("of c"), "{results}");
    assert_eq!(lines(&home, "ran"), ["a", "b", "c", "far-1", "first"]);

    server.revive();
    for client in [&alice, &bob] {
        for id in [&far, &items, &second] {
            sees(client, id, "COMPLETE").await;
        }
    }
    assert_eq!(lines(&home, "ran"), ["a", "b", "c", "far-1", "far-2", "first"], "each once");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_items_of_an_order_that_began_alone_run_once_though_the_server_comes_and_goes() {
    let mut server = NatsServer::start();
    let (home, elsewhere, other) = (Place::new(), Place::new(), Place::new());
    home.agent("step", "", STEP);
    let often = [("LATTICE_WORK_RECHECK", "200ms")];
    let alice = station_with(&server, "alice", &home.data, &home.agents, &often).await;
    // Another machine under the same name hears of the order too, and has no part in it.
    let replica = station_with(&server, "alice", &elsewhere.data, &home.agents, &often).await;
    let bob = station_with(&server, "bob", &other.data, &TempDir::new().unwrap(), &often).await;
    sees_agent(&bob, "step").await;
    server.kill();
    let order = json!({"agent_name": "step", "task": "{item}", "map": ["1", "2", "3", "4", "5", "6"], "parallel": 2});
    let id = assigned_alone(&alice, order).await;
    let runs = async |upto: usize| {
        let wanted: Vec<String> = (1..=upto).map(|number| number.to_string()).collect();
        eventually("the next items run", async || (lines(&home, "ran").len() >= upto).then_some(())).await;
        assert_eq!(lines(&home, "ran"), wanted, "each once");
    };
    runs(2).await;
    server.revive();
    for client in [&alice, &replica, &bob] {
        sees(client, &id, "ACCEPTED").await;
    }
    open(&home, "go-1");
    open(&home, "go-2");
    runs(4).await;
    server.kill();
    open(&home, "go-3");
    open(&home, "go-4");
    runs(6).await;
    server.revive();
    open(&home, "go-5");
    open(&home, "go-6");
    for client in [&alice, &replica, &bob] {
        sees(client, &id, "COMPLETE").await;
    }
    runs(6).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_talking_agent_runs_out_of_time_while_the_server_is_away_and_what_it_said_is_told_later() {
    let mut server = NatsServer::start();
    let home = Place::new();
    let script = "echo $$ > pid\ni=0\nwhile :; do i=$((i+1)); echo \"::lattice {\\\"progress\\\": 1, \\\"message\\\": \\\"turn $i\\\"}\"\n\
        ! mv away heard 2> /dev/null || echo '::lattice {\"escalate\": {\"reason\": \"which colour?\"}}'; sleep 0.1; done\n";
    std::fs::write(home.agents.path().join("talker.sh"), script).unwrap();
    std::fs::write(
        home.agents.path().join("talker.md"),
        "---\nname: talker\ndescription: talks\nrunner: { kind: command, interactive: true, command: [sh, talker.sh] }\n---\n",
    )
    .unwrap();
    let variables = [("LATTICE_WORK_KILL_AFTER", "500ms"), ("LATTICE_WORK_ANSWER_TIMEOUT", "3s")];
    let alice = station_with(&server, "alice", &home.data, &home.agents, &variables).await;
    let assign = async || {
        let order = json!({"agent_name": "talker", "task": "x", "timeout": "6s"});
        let id = alice.call("assign_work", order).await["work_id"].as_str().unwrap().to_owned();
        let pid = eventually("it runs", async || home.file("pid").trim().parse::<u32>().ok()).await;
        std::fs::remove_file(home.agents.path().join("pid")).unwrap();
        (id, pid)
    };
    let gone = async |pid: u32| {
        let stat = format!("/proc/{pid}/stat");
        eventually("the agent is stopped", async || (!std::path::Path::new(&stat).exists()).then_some(())).await;
    };
    let (talks, talker) = assign().await;
    let (asks, asker) = assign().await;
    server.kill();
    open(&home, "away");
    eventually("one of them asks", async || home.agents.path().join("heard").exists().then_some(())).await;
    gone(talker).await;
    gone(asker).await;
    server.revive();
    let mut asked = 0;
    for id in [&talks, &asks] {
        let work = sees(&alice, id, "FAILED").await;
        assert_eq!(work["error"]["kind"], "total_timeout", "{work}");
        asked += usize::from(work["error"]["message"].as_str().unwrap().contains("nobody answered question 1"));
    }
    assert_eq!(asked, 1, "the question that was asked meanwhile counts");
}

/// Whether a folder holds a file of this name, however deep.
fn holds(folder: &std::path::Path, name: &str) -> bool {
    let found = |entry: std::fs::DirEntry| entry.file_name() == name || entry.path().is_dir() && holds(&entry.path(), name);
    std::fs::read_dir(folder).into_iter().flatten().flatten().any(found)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_result_that_was_made_while_the_server_was_away_is_everybodys_once_it_is_back() {
    /// Of 300,000 letters.
    const DIGEST: &str = "12e1b9b179b29a4f7e5889b185d7ac71bff0ad1f49a7b391d0911b737a0f5381";
    let mut server = NatsServer::start();
    let (home, other) = (Place::new(), Place::new());
    home.agent("large", "", "while [ ! -e gate ]; do sleep 0.05; done; head -c 300000 /dev/zero | tr '\\0' a");
    let alice = station(&server, "alice", &home.data, &home.agents).await;
    let bob = station(&server, "bob", &other.data, &TempDir::new().unwrap()).await;
    sees_agent(&bob, "large").await;
    let id = bob.assign("large", "x").await;
    sees(&bob, &id, "ACCEPTED").await;
    server.kill();
    assigned_alone(&alice, json!({"agent_name": "upper", "task": "x"})).await;
    open(&home, "gate");
    eventually("alice keeps the result", async || holds(home.data.path(), DIGEST).then_some(())).await;

    server.revive();
    let work = sees(&bob, &id, "COMPLETE").await;
    assert_eq!((&work["attempt"], &work["result_ref"]["sha256"]), (&json!(1), &json!(DIGEST)), "{work}");
    let part = bob.call("check_work", json!({"work_id": id, "bytes": "0-9"})).await;
    assert_eq!((&part["selection"]["text"], &part["selection"]["total_bytes"]), (&json!("aaaaaaaaaa"), &json!(300_000)), "{part}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_has_lost_its_store_is_furnished_anew_and_its_log_read_from_the_beginning() {
    let mut server = NatsServer::start();
    let (home, other, nothing) = (Place::new(), Place::new(), TempDir::new().unwrap());
    let _alice = station(&server, "alice", &home.data, &home.agents).await;
    let bob = station(&server, "bob", &other.data, &nothing).await;
    sees_agent(&bob, "upper").await;
    for _ in 0..8 {
        let id = bob.assign("upper", "before").await;
        bob.settled(&id).await;
    }
    assert_eq!(bob.call("check_work", json!({})).await["outstanding"], 0);
    server.kill();
    std::fs::remove_dir_all(server.dir().join("store")).unwrap();
    server.revive();
    works_on_what_it_has_now(&bob).await;
    // So does one that was not there when that happened.
    bob.hang_up().await;
    server.kill();
    std::fs::remove_dir_all(server.dir().join("store")).unwrap();
    server.revive();
    let bob = station(&server, "bob", &other.data, &nothing).await;
    works_on_what_it_has_now(&bob).await;
}

/// Nothing of it can be done without the server, nor by whoever is blind to its log.
async fn works_on_what_it_has_now(client: &Client) {
    let first = eventually("an agent of another station takes work again", async || {
        client.try_call("assign_work", json!({"agent_name": "upper", "task": "first"})).await?.ok()
    })
    .await;
    let order = json!({"agent_name": "upper", "task": "second", "after": [first["work_id"]], "run_id": first["run_id"]});
    // Whoever was known before is known again once its station has said so.
    let second = eventually("it takes work that waits for other work", async || {
        client.try_call("assign_work", order.clone()).await?.ok()?["work_id"].as_str().map(str::to_owned)
    })
    .await;
    assert_eq!(client.settled(&second).await["result"], "SECOND");
    let run = client.call("check_work", json!({"run_id": first["root_run_id"]})).await;
    let is_in_it = |id: &Value| run["works"].as_array().unwrap().iter().any(|work| work["work_id"] == *id);
    assert!(is_in_it(&first["work_id"]) && is_in_it(&json!(second)), "{run}");
    assert_eq!(client.call("check_work", json!({})).await["outstanding"], 0);
}
