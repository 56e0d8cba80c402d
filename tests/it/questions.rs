//! Questions and lost contexts on one machine: answers outlive processes, and whoever remembers no id finds its works.

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::budgets::bound;
use crate::harness::{Lattice, TOKEN};
use crate::lifecycle::{Place, reaches};
use crate::rpc::{Client, binary};
use crate::stage::Stage;
use crate::web;

/// Asks a person, and gives the answer back.
pub(crate) const CAREFUL: &str = "read -r order\n\
    echo '::lattice {\"escalate\": {\"reason\": \"may I?\", \"needs\": \"human\"}}'\n\
    read -r answer\nprintf '%s' \"$answer\"";

fn place() -> Place {
    let place = Place::new();
    interactive(&place, "careful", CAREFUL);
    place
}

/// Adds an agent that is told the answers to its questions.
fn interactive(place: &Place, name: &str, script: &str) {
    let path = place.agents.path().join(format!("{name}.md"));
    place.agent(name, "", script);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("kind: command,", "kind: command, interactive: true,")).unwrap();
}

async fn kill(mut client: Client) {
    client.child.start_kill().unwrap();
    client.child.wait().await.unwrap();
}

/// Runs a command of the program; its exit code and what it said.
async fn run(place: &Place, arguments: &[&str]) -> (Option<i32>, String) {
    let output = binary(place.data.path(), place.agents.path()).args(arguments).output().await.unwrap();
    (output.status.code(), format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_given_while_every_process_is_dead_reaches_the_next_attempt_and_is_given_once() {
    let place = place();
    let client = place.client().await;
    let id = client.assign("careful", "act").await;
    let asking = reaches(&client, &id, "ESCALATED").await;
    assert!(asking["next"].as_str().unwrap().contains("ask your user"), "{asking}");
    kill(client).await;

    let (code, said) = run(&place, &["work", "answer", &id, "yes"]).await;
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = run(&place, &["work", "answer", &id, "yes"]).await;
    assert!(code != Some(0) && said.contains("question 1") && said.contains("answered already"), "{code:?}: {said}");

    let client = place.client().await;
    let done = client.settled(&id).await;
    assert_eq!((&done["status"], &done["attempt"]), (&json!("COMPLETE"), &json!(2)), "{done}");
    assert!(done["result"].to_string().contains("yes"), "{done}");
    let (code, said) = run(&place, &["work", "answer", &id, "no"]).await;
    assert!(code != Some(0) && said.contains("COMPLETE"), "{code:?}: {said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_the_next_attempt_asks_again_is_the_same_one() {
    let place = place();
    let client = place.client().await;
    let id = client.assign("careful", "act").await;
    reaches(&client, &id, "ESCALATED").await;
    kill(client).await;
    let client = place.client().await;
    let asking = crate::lifecycle::eventually("attempt 2 asks", async || {
        let work = client.call("check_work", json!({"work_id": id})).await;
        (work["status"] == "ESCALATED" && work["attempt"] == 2).then_some(work)
    })
    .await;
    assert_eq!(asking["question"]["ask"], 1, "{asking}");
    let wrong = client.refusal("answer_work", json!({"work_id": id, "answer": "yes", "ask": 2})).await;
    assert!(wrong.contains("question 1 is open"), "{wrong}");
    client.call("answer_work", json!({"work_id": id, "answer": "go", "ask": 1})).await;
    let done = client.settled(&id).await;
    assert!(done["status"] == "COMPLETE" && done["result"].to_string().contains("go"), "{done}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_comes_before_the_next_attempt_asks_again_is_kept_for_it_and_a_person_is_not_answered_for() {
    let place = place();
    // From the second attempt on it asks only when a file is there.
    let late = format!("[ \"$LATTICE_ATTEMPT\" = 1 ] || while [ ! -e gate ]; do sleep 0.02; done\n{CAREFUL}");
    interactive(&place, "late", &late);
    let client = place.client().await;
    let id = client.assign("late", "act").await;
    reaches(&client, &id, "ESCALATED").await;
    kill(client).await;
    let client = place.client().await;
    crate::lifecycle::eventually("attempt 2 runs", async || {
        let work = client.call("check_work", json!({"work_id": id})).await;
        (work["status"] == "ACCEPTED" && work["attempt"] == 2).then_some(())
    })
    .await;

    let done = client.call("assign_work", json!({"agent_name": "upper", "task": "x"})).await;
    client.settled(done["work_id"].as_str().unwrap()).await;
    let [work, run] = ["work_id", "run_id"].map(|name| done[name].as_str().unwrap());
    let agent = place.client_with(&[("LATTICE_BOUND_WORK", work), ("LATTICE_BOUND_RUN", run), ("LATTICE_BOUND_ATTEMPT", "1")]).await;
    let refused = agent.refusal("answer_work", json!({"work_id": id, "answer": "yes"})).await;
    assert!(refused.contains("for a person"), "{refused}");

    // A client with forms could ask the person, and so its model can't answer for them; without forms, the model asked its user.
    for arguments in [json!({"work_id": id, "answer": "yes"}), json!({"work_id": id, "answer": "yes", "ask": 1})] {
        let refused = modern(&client, "tools/call", json!({"name": "answer_work", "arguments": arguments})).await;
        assert!(
            refused["result"]["isError"] == true && refused.to_string().contains("is asked again when its agent asks it anew"),
            "{refused}"
        );
    }
    client.call("answer_work", json!({"work_id": id, "answer": "go"})).await;
    std::fs::write(place.agents.path().join("gate"), "").unwrap();
    let done = client.settled(&id).await;
    assert!(done["status"] == "COMPLETE" && done["result"].to_string().contains("go"), "{done}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_lost_its_context_finds_its_workspaces_works_without_an_id() {
    let place = place();
    let (here, there) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let at = async |folder: &TempDir| {
        let mut command = binary(place.data.path(), place.agents.path());
        command.current_dir(folder.path());
        Client::start(command).await
    };
    let client = at(&here).await;
    let done = client.assign("upper", "hello").await;
    client.settled(&done).await;
    let asking = client.assign("careful", "act").await;
    reaches(&client, &asking, "ESCALATED").await;
    kill(client).await;

    let other = at(&there).await;
    let seen = other.call("check_work", json!({})).await;
    assert_eq!((&seen["outstanding"], &seen["works"], &seen["of_other_workspaces"]), (&json!(0), &json!([]), &json!(1)), "{seen}");
    drop(other);
    let client = at(&here).await;
    // The next attempt may have been taken by now: the work is there in any case.
    let seen = client.call("check_work", json!({})).await;
    assert_eq!((&seen["outstanding"], &seen["works"][0]["work_id"]), (&json!(1), &json!(asking)), "{seen}");
    assert_eq!((&seen["settled_since_last_look"], &seen["settled_last"][0]["work_id"]), (&json!(1), &json!(done)), "{seen}");
    assert_eq!(seen["settled_last"][0]["new"], true, "{seen}");
    assert_eq!(client.call("check_work", json!({})).await["settled_since_last_look"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_answers_neither_its_own_question_nor_one_for_a_person_through_any_door() {
    for mut stage in Stage::both() {
        stage.set("LATTICE_MCP_TASK_AFTER", "50ms");
        let careful = format!("while [ ! -e gate ]; do sleep 0.02; done\n{CAREFUL}");
        interactive(&stage.place, "careful", &careful);
        interactive(&stage.place, "wondering", &careful.replace("human", "orchestrator"));
        stage.place.agent("gated", "", "while [ ! -e end ]; do sleep 0.02; done");
        let (client, _leaf) = stage.open(&["careful", "wondering", "gated"]).await;
        let assign = async |agent: &str| client.call("assign_work", json!({"agent_name": agent, "task": "x"})).await;
        let (careful, wondering, other) = (assign("careful").await, assign("wondering").await, assign("gated").await);
        let [id, open] = [&careful, &wondering].map(|work| work["work_id"].as_str().unwrap());
        let mut agents = Vec::new();
        for (work, asked, why) in [(&careful, id, "agent's own"), (&wondering, open, "agent's own"), (&other, id, "for a person")] {
            let agent = bound(&stage, work).await;
            let task = begin_task(&agent, asked).await;
            agents.push((agent, task, work, asked, why));
        }
        std::fs::write(stage.place.agents.path().join("gate"), "").unwrap();
        reaches(&client, id, "ESCALATED").await;
        reaches(&client, open, "ESCALATED").await;

        for (agent, task, work, asked, why) in agents {
            for arguments in [json!({"work_id": asked, "answer": "yes"}), json!({"work_id": asked, "answer": "yes", "ask": 1})] {
                let refused = agent.refusal("answer_work", arguments).await;
                assert!(refused.contains(why), "{refused}");
            }
            let responses = json!({ format!("{asked}/1"): {"action": "accept", "content": {"answer": "yes"}} });
            let refused = modern(&agent, "tasks/update", json!({"taskId": task, "inputResponses": responses})).await;
            assert_eq!(refused["error"]["code"], -32602, "{refused}");
            let mut command = stage.beside();
            command.env("LATTICE_BOUND_WORK", work["work_id"].as_str().unwrap()).env("LATTICE_BOUND_ATTEMPT", "1");
            command.env("LATTICE_BOUND_RUN", work["run_id"].as_str().unwrap());
            let said = command.args(["work", "answer", asked, "yes"]).output().await.unwrap();
            assert!(!said.status.success() && String::from_utf8_lossy(&said.stderr).contains(why), "{said:?}");
        }
        // Another agent may know what one wanted to know, and only a person's word is a person's.
        bound(&stage, &other).await.call("answer_work", json!({"work_id": open, "answer": "go"})).await;
        client.call("answer_work", json!({"work_id": id, "answer": "go"})).await;
        for id in [id, open] {
            let done = client.settled(id).await;
            assert!(done["status"] == "COMPLETE" && done["result"].to_string().contains("go"), "{done}");
        }
        std::fs::write(stage.place.agents.path().join("end"), "").unwrap();
        client.settled(other["work_id"].as_str().unwrap()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_that_are_too_long_are_refused_and_a_large_context_is_shown_in_part() {
    for stage in Stage::both() {
        let script = r#"read -r order
filler=$(head -c 300000 /dev/zero | tr '\0' x)
echo "::lattice {\"escalate\": {\"reason\": \"which?\", \"context\": {\"text\": \"${filler}the end\"}}}"
read -r answer; printf '%s' "$answer""#;
        interactive(&stage.place, "wordy", script);
        stage.place.agent("gated", "", "while [ ! -e gate ]; do sleep 0.02; done");
        let (client, _leaf) = stage.open(&["wordy", "gated"]).await;
        let (id, gated) = (client.assign("wordy", "x").await, client.assign("gated", "x").await);
        reaches(&client, &id, "ESCALATED").await;
        reaches(&client, &gated, "ACCEPTED").await;

        let long = "x".repeat(20_000);
        for (tool, name, arguments) in [
            ("cancel_work", "reason", json!({"work_id": id, "reason": long})),
            ("answer_work", "answer", json!({"work_id": id, "answer": long})),
            ("answer_work", "answer", json!({"work_id": id, "answer": {"text": long}})),
            ("escalate", "reason", json!({"work_id": gated, "reason": long})),
        ] {
            let refused = client.refusal(tool, arguments).await;
            assert!(refused.contains(name) && refused.contains("lattice.work.text_max") && refused.contains("200"), "{refused}");
        }
        let asking = client.call("await_work", json!({"work_id": id})).await;
        assert!(asking["status"] == "ESCALATED" && asking.to_string().len() < 8_000, "{} bytes", asking.to_string().len());
        let context = &asking["question"]["context"];
        assert_eq!(context["size"], 300_000 + r#"{"text":"the end"}"#.len(), "{context}");
        assert!(context["begin"].as_str().unwrap().starts_with(r#"{"text":"xxx"#) && context["next"].is_string(), "{context}");
        let part = client.call("check_work", json!({"work_id": id, "bytes": "300000-400000"})).await;
        assert!(part["selection"]["text"].as_str().unwrap().ends_with(r#"the end"}"#), "{part}");

        client.call("answer_work", json!({"work_id": id, "answer": "short"})).await;
        assert_eq!(client.settled(&id).await["status"], "COMPLETE");
        let cancelled = client.call("cancel_work", json!({"work_id": gated, "reason": "enough"})).await;
        assert_eq!(cancelled["reason"], "enough", "{cancelled}");
    }
}

/// A request of the newer protocol, of a client that knows tasks.
pub(crate) async fn modern(client: &Client, method: &str, mut params: Value) -> Value {
    params["_meta"] = json!({
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "0"},
        "io.modelcontextprotocol/clientCapabilities": {"elicitation": {}, "extensions": {"io.modelcontextprotocol/tasks": {}}},
    });
    client.request(method, params).await.expect("an answer")
}

/// Begins to wait as a task.
pub(crate) async fn begin_task(client: &Client, work_id: &str) -> String {
    let made = modern(client, "tools/call", json!({"name": "await_work", "arguments": {"work_id": work_id}})).await;
    made["result"]["taskId"].as_str().unwrap_or_else(|| panic!("no task: {made}")).to_owned()
}

/// Waits until a task stands like this.
pub(crate) async fn stands(client: &Client, task: &str, wanted: &str) -> Value {
    crate::lifecycle::eventually(wanted, async || {
        let stands = modern(client, "tasks/get", json!({"taskId": task})).await["result"].clone();
        (stands["status"] == wanted).then_some(stands)
    })
    .await
}

/// Fills in the only form of a task.
pub(crate) async fn fill_in(client: &Client, task: &str, asking: &Value, answer: &str) {
    let (key, _) = asking["inputRequests"].as_object().unwrap().iter().next().unwrap();
    let responses = json!({ key: {"action": "accept", "content": {"answer": answer}} });
    let taken = modern(client, "tasks/update", json!({"taskId": task, "inputResponses": responses})).await;
    assert_eq!(taken["result"]["resultType"], "complete", "{taken}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_outlives_the_process_that_began_it_and_any_other_answers_for_it() {
    let place = place();
    place.agent("gated", "", "while [ ! -e gate ]; do sleep 0.02; done; echo '::lattice {\"escalate\": {\"reason\": \"and now?\"}}'");
    let client = place.client_with(&[("LATTICE_MCP_TASK_AFTER", "100ms")]).await;
    let id = client.assign("gated", "act").await;
    let task = begin_task(&client, &id).await;
    assert_eq!(modern(&client, "tasks/get", json!({"taskId": task})).await["result"]["status"], "working");
    kill(client).await;
    let client = place.client().await;
    std::fs::write(place.agents.path().join("gate"), "").unwrap();
    let asking = stands(&client, &task, "input_required").await;
    let other = place.client().await;
    fill_in(&other, &task, &asking, "enough").await;
    crate::lifecycle::eventually("the answer stands", async || {
        let work = client.call("check_work", json!({"work_id": id})).await;
        (work["event"] != "WORK_ESCALATE").then_some(())
    })
    .await;
    client.call("cancel_work", json!({"work_id": id})).await;
    let done = stands(&other, &task, "completed").await;
    assert_eq!(done["result"]["structuredContent"]["status"], "CANCELLED", "{done}");
}

/// A request of the newer protocol over HTTP, of a client that knows tasks.
async fn over_http(url: &str, method: &str, name: &str, params: Value) -> Value {
    let at = url.trim_start_matches("http://").trim_end_matches("/mcp").parse().unwrap();
    let ask = web::modern(json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}));
    let (none, knows) = (r#"clientCapabilities":{}"#, r#"clientCapabilities":{"extensions":{"io.modelcontextprotocol/tasks":{}}}"#);
    let ask = ask.rebody(|body| body.replace(none, knows)).with("Mcp-Name", name).with("Authorization", &format!("Bearer {TOKEN}"));
    ask.at(at).await.json()
}

#[tokio::test(flavor = "multi_thread")]
async fn over_http_a_wait_becomes_a_task_by_default_and_is_of_that_door_alone() {
    let lattice = Lattice::new();
    let server = lattice.serve();
    let slow = json!({"name": "assign_work", "arguments": {"agent_name": "slow", "task": "50"}});
    let assigned = over_http(&server.url, "tools/call", "assign_work", slow).await["result"]["structuredContent"].clone();
    let wait = json!({"name": "await_work", "arguments": {"work_id": assigned["work_id"]}});
    let made = over_http(&server.url, "tools/call", "await_work", wait).await["result"].clone();
    assert_eq!(made["resultType"], "task", "{made}");
    let task = made["taskId"].as_str().unwrap();
    let elsewhere = over_http(&server.url, "tasks/get", "another name", json!({"taskId": task})).await;
    assert_eq!(elsewhere["error"]["code"], -32020, "{elsewhere}");
    let stranger = Client::start(binary(&lattice.path().join("data"), &lattice.agents())).await;
    let refused = modern(&stranger, "tasks/get", json!({"taskId": task})).await;
    assert_eq!(refused["error"]["code"], -32602, "{refused}");
    let done = crate::lifecycle::eventually("the task is completed", async || {
        let stands = over_http(&server.url, "tasks/get", task, json!({"taskId": task})).await["result"].clone();
        (stands["status"] == "completed").then_some(stands)
    })
    .await;
    assert_eq!(done["result"]["structuredContent"]["result"], json!({"steps": 50}), "{done}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_questions_of_an_orders_items_are_seen_and_answered_through_its_handle() {
    let place = place();
    let client = place.client().await;
    let order = json!({"agent_name": "careful", "task": "{item}", "map": ["a", "b"]});
    let map = client.call("assign_work", order).await["work_id"].as_str().unwrap().to_owned();
    for left in [2, 1] {
        let asking = crate::lifecycle::eventually("the items ask", async || {
            let asking = client.call("await_work", json!({"work_id": map, "timeout": "30s"})).await;
            assert_eq!(asking["note"], Value::Null, "the wait is over: {asking}");
            let all = asking["asking"].as_array().is_some_and(|items| items.len() == left);
            all.then_some(asking)
        })
        .await;
        assert_eq!(asking["status"], "ACCEPTED", "{asking}");
        let item = &asking["asking"][0];
        assert_eq!((&item["reason"], &item["needs"]), (&json!("may I?"), &json!("human")), "{asking}");
        assert!(item["next"].as_str().unwrap().contains("ask your user"), "{asking}");
        client.call("answer_work", json!({"work_id": item["work_id"], "answer": "yes"})).await;
    }
    let done = client.settled(&map).await;
    assert_eq!((&done["status"], &done["asking"]), (&json!("COMPLETE"), &Value::Null), "{done}");
    assert!(done["result"][1]["result"].to_string().contains("yes"), "{done}");

    // A client with forms is shown them.
    let order = json!({"agent_name": "careful", "task": "{item}", "map": ["a"]});
    let map = client.call("assign_work", order).await["work_id"].as_str().unwrap().to_owned();
    let form = modern(&client, "tools/call", json!({"name": "await_work", "arguments": {"work_id": map, "timeout": "30s"}})).await;
    assert!(form["result"]["resultType"] == "input_required" && form.to_string().contains("may I?"), "{form}");
}

/// What waits for a file, and then asks this; `then` follows.
fn asking_at(gate: &str, questions: &[(&str, &str)], then: &str) -> String {
    let ask = |(reason, needs): &(&str, &str)| {
        format!("echo '::lattice {{\"escalate\": {{\"reason\": \"{reason}\", \"needs\": \"{needs}\"}}}}'\n")
    };
    format!("read -r order\nwhile [ ! -e {gate} ]; do sleep 0.02; done\n{}{then}", questions.iter().map(ask).collect::<String>())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_to_somebody_elses_question_is_none_to_the_agents_own() {
    let place = Place::new();
    let own = [("may I delete it?", "human")];
    interactive(&place, "waits", &asking_at("go", &own, "read -r answer; printf '%s' \"$answer\""));
    interactive(&place, "ends", &asking_at("go", &own, "exit 0"));
    let (client, other) = (place.client().await, place.client().await);
    let works = [client.assign("waits", "x").await, client.assign("ends", "x").await];
    for id in &works {
        reaches(&client, id, "ACCEPTED").await;
        let asked = json!({"work_id": id, "reason": "in English?"});
        let (heard, ()) = tokio::join!(other.call("escalate", asked), async {
            reaches(&client, id, "ESCALATED").await;
            client.call("answer_work", json!({"work_id": id, "answer": "theirs", "ask": 1})).await;
        });
        assert_eq!(heard["answer"], "theirs", "{heard}");
    }
    std::fs::write(place.agents.path().join("go"), "").unwrap();
    for id in &works {
        let asking = reaches(&client, id, "ESCALATED").await;
        let question = &asking["question"];
        assert_eq!((&question["ask"], &question["reason"], &question["needs"]), (&json!(2), &json!("may I delete it?"), &json!("human")));
    }
    client.call("answer_work", json!({"work_id": works[0], "answer": "mine", "ask": 2})).await;
    let done = client.settled(&works[0]).await;
    assert_eq!(done["status"], "COMPLETE", "{done}");
    let heard: Value = done["result"].as_str().map_or_else(|| done["result"].clone(), |text| serde_json::from_str(text).unwrap());
    assert_eq!(heard, json!({"answer": "mine", "ask": 2, "reason": "may I delete it?"}));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_two_open_questions_is_seen_and_gets_its_own_answer() {
    for stage in Stage::both() {
        let both = [("which colour?", "orchestrator"), ("which size?", "orchestrator")];
        let hear = "read -r one; read -r two; printf '%s\\n%s' \"$one\" \"$two\"";
        interactive(&stage.place, "waits", &asking_at("go", &both, hear));
        let ends = asking_at("go", &both, "exit 0");
        let ends = ends.replace("read -r order\n", "order=$(cat); case \"$order\" in *exchanges*) printf %s \"$order\"; exit;; esac\n");
        stage.place.agent("ends", "", &ends);
        let (client, _leaf) = stage.open(&["waits", "ends"]).await;
        std::fs::write(stage.place.agents.path().join("go"), "").unwrap();
        for (agent, attempt) in [("waits", 1), ("ends", 2)] {
            let id = client.assign(agent, "x").await;
            let asking = crate::lifecycle::eventually("both are asked", async || {
                let work = client.call("check_work", json!({"work_id": id})).await;
                work["next"].as_str().is_some_and(|next| next.contains("2 questions")).then_some(work)
            })
            .await;
            assert_eq!(asking["question"]["ask"], 1, "{asking}");
            assert!(asking["next"].as_str().unwrap().contains("ask 1"), "{asking}");
            let which = client.refusal("answer_work", json!({"work_id": id, "answer": "red"})).await;
            assert!(which.contains("1 (which colour?), 2 (which size?)") && which.contains("with ask"), "{which}");
            let left = client.call("answer_work", json!({"work_id": id, "answer": "large", "ask": 2})).await;
            assert_eq!((&left["status"], &left["question"]["ask"]), (&json!("ESCALATED"), &json!(1)), "{left}");
            client.call("answer_work", json!({"work_id": id, "answer": "red"})).await;
            let done = client.settled(&id).await;
            assert_eq!((&done["status"], &done["attempt"]), (&json!("COMPLETE"), &json!(attempt)), "{done}");
            let heard = done["result"].to_string().replace('\\', "");
            for (ask, reason, answer) in [(1, "which colour?", "red"), (2, "which size?", "large")] {
                let line = heard.split('{').find(|part| part.contains(reason)).unwrap_or_else(|| panic!("{done}"));
                assert!(line.contains(&format!("\"ask\":{ask}")) && line.contains(&format!("\"answer\":\"{answer}\"")), "{done}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_may_ask_so_many_questions_and_no_more() {
    let place = Place::new();
    let questions = [("1?", "orchestrator"), ("2?", "orchestrator"), ("3?", "orchestrator")];
    interactive(&place, "few", &asking_at("go", &questions[..2], "read -r one; read -r two; while [ ! -e end ]; do sleep 0.02; done"));
    place.agent("many", "", &asking_at("go", &questions, "sleep 60"));
    place.agent("both", "", &asking_at("later", &questions[..2], "sleep 60"));
    std::fs::write(place.agents.path().join("go"), "").unwrap();
    let client = place.client_with(&[("LATTICE_WORK_QUESTIONS_MAX", "2")]).await;
    let id = client.assign("many", "x").await;
    let failed =
        crate::lifecycle::eventually("it settles", async || Some(client.settled(&id).await).filter(|work| work["status"] != "ESCALATED"))
            .await;
    assert_eq!((&failed["status"], &failed["error"]["kind"]), (&json!("FAILED"), &json!("limit")), "{failed}");
    assert!(failed.to_string().contains("more than 2 questions") && failed.to_string().contains("lattice.work.questions_max"), "{failed}");

    // What was asked through the tool counts as well.
    let id = client.assign("both", "x").await;
    reaches(&client, &id, "ACCEPTED").await;
    tokio::join!(client.call("escalate", json!({"work_id": id, "reason": "0?"})), async {
        reaches(&client, &id, "ESCALATED").await;
        client.call("answer_work", json!({"work_id": id, "answer": "yes", "ask": 1})).await;
    });
    std::fs::write(place.agents.path().join("later"), "").unwrap();
    let failed = reaches(&client, &id, "FAILED").await;
    assert!(failed.to_string().contains("more than 2 questions"), "{failed}");

    let id = client.assign("few", "x").await;
    for ask in [1, 2] {
        crate::lifecycle::eventually("it is asked", async || {
            let answer = json!({"work_id": id, "answer": "yes", "ask": ask});
            client.try_call("answer_work", answer).await.unwrap().is_ok().then_some(())
        })
        .await;
    }
    let refused = client.refusal("escalate", json!({"work_id": id, "reason": "3?"})).await;
    assert!(refused.contains("2 questions") && refused.contains("lattice.work.questions_max"), "{refused}");
    std::fs::write(place.agents.path().join("end"), "").unwrap();
    assert_eq!(client.settled(&id).await["status"], "COMPLETE");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_asks_anew_what_was_answered_hears_all_of_it_however_much_that_is() {
    const MANY: usize = 40;
    let place = Place::new();
    // Asks all at once, and the first time dies with its answers.
    let script = r#"read -r order
printf '::lattice {"escalate": {"reason": "%s?"}}\n' $(seq 40)
for n in $(seq 40); do read -r answer; echo "$answer" >> "heard$LATTICE_ATTEMPT"; done
[ "$LATTICE_ATTEMPT" -ge 2 ] || exit 75"#;
    interactive(&place, "curious", script);
    let client = place.client_with(&[("LATTICE_RETRY_INITIAL_DELAY", "20ms")]).await;
    let order = json!({"agent_name": "curious", "task": "x", "timeout": "20s"});
    let id = client.call("assign_work", order).await["work_id"].as_str().unwrap().to_owned();
    for ask in 1..=MANY {
        crate::lifecycle::eventually("it is asked", async || {
            let answer = json!({"work_id": id, "answer": format!("answer {ask}"), "ask": ask});
            client.try_call("answer_work", answer).await.unwrap().is_ok().then_some(())
        })
        .await;
    }
    let done = client.settled(&id).await;
    assert_eq!((&done["status"], &done["attempt"]), (&json!("COMPLETE"), &json!(2)), "{done}");
    let heard = place.file("heard2");
    for ask in 1..=MANY {
        assert!(heard.contains(&format!("\"answer\":\"answer {ask}\"")), "{ask}: {heard}");
    }
}
