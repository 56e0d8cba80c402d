//! Waits that have become tasks.

use std::sync::Arc;

use serde_json::{Value, json};

use super::client::{Client, forms};
use super::fixture::Fixture;
use crate::config::Config;
use crate::dispatcher::{Bound, Caller};
use crate::model::access::{self, Access, Scope};
use crate::model::event::{Ask, Kind, Needs};
use crate::model::output::Output;
use crate::model::owner::{Owner, Principal, Workspace};
use crate::model::size::Size;
use crate::model::time::Span;
use crate::transport::{Bucket, Expect};

fn knows_tasks() -> Value {
    json!({"elicitation": {}, "extensions": {"io.modelcontextprotocol/tasks": {}}})
}

fn soon_tasks() -> Config {
    let mut config = Config::default();
    config.mcp.task_after = Span::millis(50);
    config
}

impl Fixture {
    fn modern(&self, owner: &str, capabilities: Value) -> Client {
        let owner = Some(Owner::of(Principal::User, &Workspace::Named(owner)));
        let mut client = self.connect(self.server.with_caller(Caller::connection().owned_by(owner)), Size::mib(1));
        (client.modern, client.capabilities) = (true, capabilities);
        client
    }
}

impl Client {
    /// Waits for works, which becomes a task.
    async fn task(&mut self, arguments: Value) -> String {
        let made = self.request("tools/call", json!({"name": "await_work", "arguments": arguments})).await["result"].clone();
        assert_eq!((&made["resultType"], &made["status"]), (&json!("task"), &json!("working")), "{made}");
        assert_eq!((&made["ttlMs"], &made["pollIntervalMs"]), (&json!(86_400_000), &json!(1000)), "{made}");
        made["taskId"].as_str().unwrap().to_owned()
    }

    async fn of_task(&mut self, method: &str, id: &str, responses: Option<Value>) -> Value {
        let mut params = json!({"taskId": id});
        if let Some(responses) = responses {
            params["inputResponses"] = responses;
        }
        self.request(method, params).await
    }

    /// How a task stands.
    async fn stands(&mut self, id: &str) -> Value {
        self.of_task("tasks/get", id, None).await["result"].clone()
    }
}

#[tokio::test]
async fn a_wait_in_line_becomes_a_task_that_is_answered_and_ends_with_the_work() {
    let fixture = Fixture::with(soon_tasks());
    fixture.offer(&["worker"]).await;
    let mut client = fixture.modern("one", knows_tasks());
    let id = client.assign("worker").await;
    let task = client.task(json!({"work_id": id})).await;
    fixture.happens(&id, 1, Kind::Accepted).await;
    fixture.happens(&id, 1, Kind::Progress { pct: Some(50.0), message: Some("half way".into()) }).await;
    let working = client.stands(&task).await;
    assert_eq!((&working["status"], &working["resultType"]), (&json!("working"), &json!("complete")), "{working}");
    assert!(working["statusMessage"].as_str().unwrap().contains("half way"), "{working}");

    let ask = Ask { ask: 1, reason: "which colour?".into(), context: Value::Null, needs: Needs::Orchestrator, parked: false };
    fixture.happens(&id, 1, Kind::Escalate(ask)).await;
    let asking = client.stands(&task).await;
    assert_eq!(asking["status"], "input_required", "{asking}");
    let (key, request) = asking["inputRequests"].as_object().unwrap().iter().next().unwrap();
    assert_eq!(request["method"], "elicitation/create", "{asking}");
    for bad in [json!("blue"), json!({"action": "accept"}), json!({"action": "maybe"})] {
        let refused = client.of_task("tasks/update", &task, Some(json!({ key: bad }))).await;
        assert_eq!(refused["error"]["code"], -32602, "{refused}");
    }
    let ignored = client.of_task("tasks/update", &task, Some(json!({"unknown": {"action": "accept", "content": {"answer": "x"}}}))).await;
    assert_eq!(ignored["result"]["resultType"], "complete", "{ignored}");
    assert_eq!(fixture.answer_of(&id).await, (None, None));
    let blue = json!({ key: {"action": "accept", "content": {"answer": "blue"}} });
    let taken = client.of_task("tasks/update", &task, Some(blue.clone())).await;
    assert_eq!(taken["result"]["resultType"], "complete", "{taken}");
    assert_eq!(fixture.answer_of(&id).await, (Some(json!("blue")), Some(Needs::Human)));
    let twice = client.of_task("tasks/update", &task, Some(blue)).await;
    assert!(twice["error"]["message"].as_str().unwrap().contains("answered already"), "{twice}");
    assert_eq!(client.stands(&task).await["status"], "working");

    fixture.happens(&id, 1, Kind::Complete { result: Output::Inline(json!({"n": 1})), duration_ms: 3, checks: Vec::new() }).await;
    for _ in 0..2 {
        let done = client.stands(&task).await;
        assert_eq!((&done["status"], &done["result"]["structuredContent"]["result"]), (&json!("completed"), &json!({"n": 1})), "{done}");
        let ended = client.of_task("tasks/cancel", &task, None).await;
        assert_eq!(ended["result"]["resultType"], "complete", "an ended task stays as it is: {ended}");
    }
    // Settled work needs no task.
    let at_once = client.call("await_work", json!({"work_id": id})).await;
    assert_eq!(at_once["status"], "COMPLETE");
}

#[tokio::test]
async fn a_task_is_its_callers_alone_and_only_of_those_who_know_tasks() {
    let fixture = Fixture::with(soon_tasks());
    fixture.offer(&["worker"]).await;
    let mut client = fixture.modern("one", knows_tasks());
    let id = client.assign("worker").await;
    let task = client.task(json!({"work_ids": [id]})).await;
    assert_eq!(task.len(), 64);
    let work = fixture.dispatcher.check(id.as_str().unwrap().parse().unwrap()).await.unwrap();
    let bound = Bound { work_id: work.work_id, run_id: work.run_id.clone(), attempt: 1 };
    let mut agent = fixture.connect(fixture.server.with_caller(Caller::bound(bound)), Size::mib(1));
    (agent.modern, agent.capabilities) = (true, knows_tasks());
    let mut other = fixture.modern("two", knows_tasks());
    let mut tampered = task.clone().into_bytes();
    tampered[0] = if tampered[0] == b'0' { b'1' } else { b'0' };
    let tampered = String::from_utf8(tampered).unwrap();
    for method in ["tasks/get", "tasks/cancel", "tasks/update"] {
        let responses = || (method == "tasks/update").then(|| json!({}));
        for who in [&mut agent, &mut other] {
            let refused = who.of_task(method, &task, responses()).await;
            assert_eq!(refused["error"]["code"], -32602, "{method}: {refused}");
        }
        for guess in [tampered.as_str(), "", "1", "../x", &"é".repeat(9999), id.as_str().unwrap()] {
            let refused = client.of_task(method, guess, responses()).await;
            assert_eq!(refused["error"]["code"], -32602, "{method}: {refused}");
            assert!(refused.to_string().len() < 600, "{refused}");
        }
        let mut without = fixture.modern("one", forms());
        let refused = without.of_task(method, &task, responses()).await;
        assert_eq!(refused["error"]["code"], -32021, "{method}: {refused}");
        let mut old = fixture.client_with(knows_tasks()).await;
        let refused = old.of_task(method, &task, responses()).await;
        assert_eq!(refused["error"]["code"], -32601, "{method}: {refused}");
    }
    for mut waiting in [fixture.modern("one", forms()), fixture.client_with(knows_tasks()).await] {
        let in_line = waiting.call("await_work", json!({"work_id": id, "timeout": "200ms"})).await;
        assert!(in_line["note"].as_str().unwrap().contains("still working"), "{in_line}");
    }
    assert_eq!(client.stands(&task).await["status"], "working");
    // Another connection of the same caller is the same caller.
    assert_eq!(fixture.modern("one", knows_tasks()).stands(&task).await["status"], "working");
}

#[tokio::test]
async fn whoever_has_a_name_finds_their_tasks_and_forms_at_another_door() {
    let fixture = Fixture::with(soon_tasks());
    fixture.offer(&["worker"]).await;
    let [mut here, mut there, mut other] = [("ann", "one"), ("ann", "two"), ("bob", "one")].map(|(name, workspace)| {
        let owner = Owner::of(Principal::Http, &Workspace::Named(workspace));
        let access = Access { principal: access::Principal::of_token(name), scope: Some(Scope::Assign) };
        let caller = Caller::connection().owned_by(Some(owner)).with_access(Arc::new(access));
        let mut client = fixture.connect(fixture.server.with_caller(caller), Size::mib(1));
        (client.modern, client.capabilities) = (true, knows_tasks());
        client
    });
    let id = here.assign("worker").await;
    let task = here.task(json!({"work_id": id})).await;
    assert_eq!(there.stands(&task).await["status"], "working");
    assert_eq!(other.of_task("tasks/get", &task, None).await["error"]["code"], -32602);
    // Earlier versions bound it to the workspace of the door, too.
    let (table, key) = (fixture.store.transport().table, format!("task.{task}"));
    let row = table.get(Bucket::Keys, &key).await.unwrap().unwrap();
    let mut kept: Value = serde_json::from_slice(&row.value).unwrap();
    assert_eq!(kept["who"], "principal token:ann");
    let owner = Owner::of(Principal::Http, &Workspace::Named("one")).for_principal(&access::Principal::kept("token:ann"));
    kept["who"] = format!("owner {}", owner.as_str()).into();
    table.put(Bucket::Keys, &key, kept.to_string().into(), Expect::Revision(row.revision), None).await.unwrap();
    assert_eq!(here.stands(&task).await["status"], "working");
    assert_eq!(other.of_task("tasks/get", &task, None).await["error"]["code"], -32602);

    fixture.happens(&id, 1, Kind::Accepted).await;
    let ask = Ask { ask: 1, reason: "may I?".into(), context: Value::Null, needs: Needs::Human, parked: false };
    fixture.happens(&id, 1, Kind::Escalate(ask)).await;
    for client in [&mut here, &mut there, &mut other] {
        client.capabilities = forms();
    }
    let mut call = json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "20s"}});
    let form = here.request("tools/call", call.clone()).await["result"].clone();
    let key = form["inputRequests"].as_object().unwrap().keys().next().unwrap();
    call["requestState"] = form["requestState"].clone();
    call["inputResponses"] = json!({ key: {"action": "accept", "content": {"answer": "yes"}} });
    assert_eq!(other.request("tools/call", call.clone()).await["result"]["isError"], true);
    assert_eq!(fixture.answer_of(&id).await, (None, None));
    let waiting = there.begin("tools/call", call).await;
    while fixture.answer_of(&id).await != (Some(json!("yes")), Some(Needs::Human)) {
        tokio::task::yield_now().await;
    }
    fixture.happens(&id, 1, Kind::Complete { result: Output::Inline(json!(1)), duration_ms: 1, checks: Vec::new() }).await;
    assert_eq!(there.answer(waiting).await["result"]["structuredContent"]["status"], "COMPLETE");
}

#[tokio::test]
async fn a_cancelled_task_ends_the_wait_and_not_the_work() {
    let fixture = Fixture::with(soon_tasks());
    fixture.offer(&["worker"]).await;
    let mut client = fixture.modern("one", knows_tasks());
    let id = client.assign("worker").await;
    let task = client.task(json!({"work_id": id})).await;
    let taken = client.of_task("tasks/cancel", &task, None).await;
    assert_eq!(taken["result"]["resultType"], "complete", "{taken}");
    assert_eq!(client.stands(&task).await["status"], "cancelled");
    let refused = client.of_task("tasks/update", &task, Some(json!({}))).await;
    assert!(refused["error"]["message"].as_str().unwrap().contains("cancelled"), "{refused}");
    assert_eq!(client.call("check_work", json!({"work_id": id})).await["status"], "PENDING");
    fixture.completes(&id, json!(1)).await;
    assert_eq!(client.stands(&task).await["status"], "cancelled", "what has ended stays as it is");
    assert_eq!(client.call("await_work", json!({"work_id": id})).await["result"], 1);
}

#[tokio::test]
async fn a_task_that_has_ended_stays_as_it_is() {
    let fixture = Fixture::with(soon_tasks());
    fixture.offer(&["worker"]).await;
    let mut client = fixture.modern("one", knows_tasks());
    let id = client.assign("worker").await;
    let declined = client.task(json!({"work_id": id})).await;
    let run_out = client.task(json!({"work_id": id, "timeout": "100ms"})).await;
    let ended = loop {
        let stands = client.stands(&run_out).await;
        if stands["status"] != "working" {
            break stands;
        }
    };
    assert!(ended["result"]["structuredContent"]["note"].as_str().unwrap().contains("still working"), "{ended}");
    fixture.happens(&id, 1, Kind::Accepted).await;
    let ask = Ask { ask: 1, reason: "may I?".into(), context: Value::Null, needs: Needs::Human, parked: false };
    fixture.happens(&id, 1, Kind::Escalate(ask)).await;
    let asking = client.stands(&declined).await;
    let key = asking["inputRequests"].as_object().unwrap().keys().next().unwrap().clone();
    client.of_task("tasks/update", &declined, Some(json!({ key: {"action": "decline"} }))).await;
    let seen = client.stands(&declined).await;
    assert_eq!((&seen["status"], &seen["result"]["structuredContent"]["status"]), (&json!("completed"), &json!("ESCALATED")), "{seen}");
    assert_eq!(fixture.answer_of(&id).await, (None, None));
    // A client without forms gets the question as the task's result.
    let mut formless = fixture.modern("one", json!({"extensions": {"io.modelcontextprotocol/tasks": {}}}));
    let told = formless.call("await_work", json!({"work_id": id})).await;
    assert!(told["next"].as_str().unwrap().contains("ask your user"), "{told}");
    formless.call("answer_work", json!({"work_id": id, "answer": "yes"})).await;
    fixture.happens(&id, 1, Kind::Complete { result: Output::Inline(json!("done")), duration_ms: 3, checks: Vec::new() }).await;
    for (task, was) in [(&declined, seen), (&run_out, ended)] {
        assert_eq!(client.stands(task).await["result"], was["result"], "it changed after its end");
    }
}
