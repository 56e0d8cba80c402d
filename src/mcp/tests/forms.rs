//! Forms: a question put to the person in front of the client.

use serde_json::{Value, json};

use super::client::forms;
use super::fixture::{Fixture, server};
use crate::config::Config;
use crate::dispatcher::{Bound, Caller};
use crate::mcp::Server;
use crate::model::event::{Kind, Needs};
use crate::model::output::Output;
use crate::model::size::Size;
use crate::telemetry::new_secret;
use crate::transport::{Bucket, Expect, Reach, SEAL};

#[tokio::test]
async fn an_older_clients_person_answers_in_a_form_while_the_wait_goes_on() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client_with(forms()).await;
    let id = fixture.asks_a_person(&mut client, "worker").await;
    let waiting = client.begin("tools/call", json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "20s"}})).await;
    let form = client.asked("elicitation/create").await;
    assert!(form["params"]["message"].as_str().unwrap().contains("Agent worker asks"), "{form}");
    client.reply(&form, json!({"action": "accept", "content": {"answer": "go on"}})).await;
    // The wait outlives the form: the work goes on with the answer.
    while fixture.answer_of(&id).await != (Some(json!("go on")), Some(Needs::Human)) {
        tokio::task::yield_now().await;
    }
    fixture.happens(&id, 1, Kind::Complete { result: Output::Inline(json!("done")), duration_ms: 1, checks: Vec::new() }).await;
    let done = client.answer(waiting).await;
    assert_eq!(done["result"]["structuredContent"]["status"], "COMPLETE", "{done}");
}

#[tokio::test]
async fn a_form_that_is_not_filled_in_is_no_answer_and_one_that_is_late_is_taken_back() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client_with(forms()).await;
    let id = fixture.asks_a_person(&mut client, "worker").await;
    for says in
        [json!({"action": "decline"}), json!({"action": "cancel"}), json!({"action": "accept", "content": {}}), json!({"answer": "yes"})]
    {
        let waiting = client.begin("tools/call", json!({"name": "await_work", "arguments": {"work_id": id}})).await;
        let form = client.asked("elicitation/create").await;
        client.reply(&form, says.clone()).await;
        let seen = client.answer(waiting).await["result"]["structuredContent"].clone();
        assert_eq!(seen["status"], "ESCALATED", "{says}: {seen}");
        assert!(seen["note"].as_str().unwrap().contains("it stays open"), "{seen}");
        assert!(seen["next"].as_str().unwrap().contains("ask your user"), "{seen}");
    }
    // A model's word is no person's word where the person can be asked.
    let answering = client.begin("tools/call", json!({"name": "answer_work", "arguments": {"work_id": id, "answer": "yes"}})).await;
    let form = client.asked("elicitation/create").await;
    client.reply(&form, json!({"action": "decline"})).await;
    let refused = client.answer(answering).await;
    assert_eq!(refused["result"]["isError"], true, "{refused}");
    assert_eq!(fixture.answer_of(&id).await, (None, None));

    let waiting = client.begin("tools/call", json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "20s"}})).await;
    let form = client.asked("elicitation/create").await;
    let mut other = fixture.client().await;
    let told = other.call("check_work", json!({"work_id": id})).await;
    assert!(told["next"].as_str().unwrap().contains(&format!("lattice-mcp work answer {} TEXT", id.as_str().unwrap())), "{told}");
    other.call("answer_work", json!({"work_id": id, "answer": "they say go"})).await;
    let taken_back = client.notified("notifications/cancelled").await;
    assert_eq!(taken_back["params"]["requestId"], form["id"], "{taken_back}");
    fixture.happens(&id, 1, Kind::Complete { result: Output::Inline(json!("done")), duration_ms: 1, checks: Vec::new() }).await;
    assert_eq!(client.answer(waiting).await["result"]["structuredContent"]["status"], "COMPLETE");
}

#[tokio::test]
async fn a_newer_clients_person_answers_between_two_tries_and_nothing_else_passes() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.raw(Size::mib(1));
    (client.modern, client.capabilities) = (true, forms());
    let id = fixture.asks_a_person(&mut client, "worker").await;
    let call = json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "20s"}});
    let form = client.request("tools/call", call.clone()).await["result"].clone();
    assert_eq!(form["resultType"], "input_required", "{form}");
    let (key, request) = form["inputRequests"].as_object().unwrap().iter().next().unwrap();
    assert_eq!(request["method"], "elicitation/create");
    let retry = |state: &str, key: &str, said: Value, call: &Value| {
        let mut call = call.clone();
        call["requestState"] = state.into();
        call["inputResponses"] = json!({ key: said });
        call
    };
    let (state, yes) = (form["requestState"].as_str().unwrap(), json!({"action": "accept", "content": {"answer": "yes"}}));
    let mut tampered = state.to_owned();
    let last = tampered.pop().unwrap();
    tampered.push(if last == 'A' { 'B' } else { 'A' });
    let other = json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "21s"}});
    let escalate = json!({"name": "escalate", "arguments": {"work_id": id, "reason": "may I?"}});
    for (what, bad) in [
        ("a tampered state", retry(&tampered, key, yes.clone(), &call)),
        ("no state at all", retry("", key, yes.clone(), &call)),
        ("garbage", retry("yes", key, yes.clone(), &call)),
        ("another request", retry(state, key, yes.clone(), &other)),
        ("another tool", retry(state, key, yes.clone(), &escalate)),
        ("another question", retry(state, "x", yes.clone(), &call)),
        ("no form", retry(state, key, json!("yes"), &call)),
        ("a form without an answer", retry(state, key, json!({"action": "accept", "content": {"answer": 5}}), &call)),
    ] {
        let refused = client.request("tools/call", bad).await;
        assert_eq!(refused["error"]["code"], -32602, "{what}: {refused}");
    }
    let mut alone = call.clone();
    alone["inputResponses"] = json!({ key: yes });
    let refused = client.request("tools/call", alone).await;
    assert!(refused["error"]["message"].as_str().unwrap().contains("without the requestState"), "{refused}");
    // Another caller brings it back: an agent, whose connection is bound to a run.
    let work = fixture.dispatcher.check(id.as_str().unwrap().parse().unwrap()).await.unwrap();
    let bound = Bound { work_id: work.work_id, run_id: work.run_id.clone(), attempt: 1 };
    let mut agent = fixture.connect(fixture.server.with_caller(Caller::bound(bound)), Size::mib(1));
    (agent.modern, agent.capabilities) = (true, forms());
    let refused = agent.request("tools/call", retry(state, key, yes.clone(), &call)).await;
    assert_eq!(refused["error"]["code"], -32602, "{refused}");
    assert_eq!(fixture.answer_of(&id).await, (None, None));

    let waiting = client.begin("tools/call", retry(state, key, yes.clone(), &call)).await;
    while fixture.answer_of(&id).await != (Some(json!("yes")), Some(Needs::Human)) {
        tokio::task::yield_now().await;
    }
    fixture.happens(&id, 1, Kind::Complete { result: Output::Inline(json!("done")), duration_ms: 1, checks: Vec::new() }).await;
    assert_eq!(client.answer(waiting).await["result"]["structuredContent"]["status"], "COMPLETE");
    // The same form twice: it is told that its answer came too late.
    let late = client.request("tools/call", retry(state, key, yes, &call)).await;
    assert_eq!(late["result"]["isError"], true, "{late}");
}

#[tokio::test]
async fn a_form_that_was_sealed_while_the_server_was_away_is_taken_by_everybody_afterwards() {
    let fixture = Fixture::reaching(Config::default(), Reach::Connected);
    fixture.offer(&["worker"]).await;
    let modern = |server: Server| {
        let mut client = fixture.connect(server, Size::mib(1));
        (client.modern, client.capabilities) = (true, forms());
        client
    };
    let elsewhere = || modern(server(&fixture.dispatcher, &fixture.woken, &fixture.tasks));
    let mut client = modern(fixture.server.for_connection());
    let id = fixture.asks_a_person(&mut client, "worker").await;
    let call = json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "20s"}});
    let declined = |form: &Value| {
        let (mut call, key) = (call.clone(), form["inputRequests"].as_object().unwrap().keys().next().unwrap().clone());
        call["requestState"] = form["requestState"].clone();
        call["inputResponses"] = json!({ key: {"action": "decline"} });
        call
    };
    let form = client.request("tools/call", call.clone()).await["result"].clone();
    let refused = |answer: &Value| answer["error"]["code"] == -32602;
    // The lattice has another seal, and this one's stands beside it.
    let table = &fixture.dispatcher.transport().table;
    let ours = table.get(Bucket::Keys, SEAL).await.unwrap().unwrap().value;
    table.put(Bucket::Keys, SEAL, new_secret().into(), Expect::Any, None).await.unwrap();
    assert!(refused(&elsewhere().request("tools/call", declined(&form)).await), "it is not known there");
    assert!(!refused(&client.request("tools/call", declined(&form)).await), "who sealed it knows it");
    let beside = format!("{SEAL}.ours");
    table.put(Bucket::Keys, &beside, ours, Expect::Any, None).await.unwrap();
    assert!(!refused(&elsewhere().request("tools/call", declined(&form)).await));
    // From now on one seal is enough.
    table.remove(Bucket::Keys, &beside, Expect::Any).await.unwrap();
    let form = client.request("tools/call", call.clone()).await["result"].clone();
    assert!(!refused(&elsewhere().request("tools/call", declined(&form)).await));
}

#[tokio::test]
async fn a_form_that_a_newer_clients_person_declines_is_not_shown_again_in_that_wait() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.raw(Size::mib(1));
    (client.modern, client.capabilities) = (true, forms());
    let id = fixture.asks_a_person(&mut client, "worker").await;
    let mut call = json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "20s"}});
    let form = client.request("tools/call", call.clone()).await["result"].clone();
    call["requestState"] = form["requestState"].clone();
    let key = form["inputRequests"].as_object().unwrap().keys().next().unwrap().clone();
    call["inputResponses"] = json!({ key: {"action": "decline"} });
    let seen = client.request("tools/call", call).await["result"]["structuredContent"].clone();
    assert_eq!(seen["status"], "ESCALATED", "{seen}");
    assert!(seen["next"].as_str().unwrap().contains("ask your user"), "{seen}");
}

#[tokio::test]
async fn whoever_escalates_to_a_person_asks_their_own_user_where_they_can() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client_with(forms()).await;
    let id = client.assign("worker").await;
    fixture.happens(&id, 1, Kind::Accepted).await;
    let question = json!({"work_id": id, "reason": "may I?", "needs": "human"});
    let asking = client.begin("tools/call", json!({"name": "escalate", "arguments": question})).await;
    let form = client.asked("elicitation/create").await;
    client.reply(&form, json!({"action": "decline"})).await;
    let queued = client.answer(asking).await["result"]["structuredContent"].clone();
    assert_eq!(queued["answered"], false, "{queued}");
    assert!(queued["note"].as_str().unwrap().contains("ask your user"), "{queued}");
    let asking = client.begin("tools/call", json!({"name": "escalate", "arguments": question})).await;
    let form = client.asked("elicitation/create").await;
    client.reply(&form, json!({"action": "accept", "content": {"answer": "yes"}})).await;
    let answered = client.answer(asking).await["result"]["structuredContent"].clone();
    assert_eq!((&answered["answered"], &answered["answer"]), (&json!(true), &json!("yes")));
    assert_eq!(fixture.answer_of(&id).await, (Some(json!("yes")), Some(Needs::Human)));
}
