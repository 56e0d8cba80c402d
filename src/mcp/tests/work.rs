//! Work from its assignment to its result, and what is said of arguments that are wrong.

use serde_json::{Value, json};

use super::fixture::Fixture;
use crate::config::Config;
use crate::dispatcher::{Bound, Caller};
use crate::model::event::{Failure, FailureKind, Kind};
use crate::model::output::{BlobRef, Media, Output};
use crate::model::owner::{Owner, Principal, Workspace};
use crate::model::size::Size;
use crate::model::time::Span;

fn validate(tool: &Value, answer: &Value) {
    let schema = &tool["outputSchema"];
    let problems: Vec<String> =
        jsonschema::validator_for(schema).unwrap().iter_errors(answer).map(|error| format!("{}: {error}", error.instance_path())).collect();
    assert!(problems.is_empty(), "{} gives {answer}: {problems:?}", tool["name"]);
}

#[tokio::test]
async fn work_goes_from_assignment_to_its_result_by_the_schemas() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let listed = client.request("tools/list", json!({})).await;
    let tools = listed["result"]["tools"].as_array().unwrap().clone();
    let tool = |name: &str| tools.iter().find(|tool| tool["name"] == name).unwrap().clone();
    assert!(tool("assign_work")["description"].as_str().unwrap().ends_with("Agents:\n- **worker** (local): Does what it is told"));

    let agents = client.call("list_available_agents", json!({"query": "TOLD", "capability": ""})).await;
    validate(&tool("list_available_agents"), &agents);
    assert_eq!(agents["agents"][0]["name"], "worker");
    assert_eq!(agents["agents"][0]["load"], json!({"running": 0, "waiting": 0}));
    let schema = client.call("get_agent_schema", json!({"agent_name": "worker"})).await;
    validate(&tool("get_agent_schema"), &schema);
    assert_eq!(schema["limits"]["timeout"], "5m");

    let assigned = client.call("assign_work", json!({"agent_name": "worker", "task": "do it", "priority": "3"})).await;
    validate(&tool("assign_work"), &assigned);
    assert_eq!(assigned["status"], "ASSIGNED");
    assert_eq!(assigned["run_id"], format!("{}-1", assigned["root_run_id"].as_str().unwrap()));
    let second = client.call("assign_work", json!({"agent_name": "worker", "task": "do more"})).await;
    assert_eq!(second["root_run_id"], assigned["root_run_id"], "one connection, one root");
    let id = &assigned["work_id"];
    let pending = client.call("check_work", json!({"work_id": id})).await;
    validate(&tool("check_work"), &pending);
    assert_eq!((&pending["status"], &pending["event"]), (&json!("PENDING"), &json!("WORK_ASSIGNED")));
    let everything = client.call("check_work", json!({})).await;
    validate(&tool("check_work"), &everything);
    assert_eq!(everything["outstanding"], 2);

    fixture.completes(id, json!({"found": 3})).await;
    for verb in ["check_work", "await_work", "await_work"] {
        let done = client.call(verb, json!({"work_id": id})).await;
        validate(&tool(verb), &done);
        assert_eq!((&done["status"], &done["result"]), (&json!("COMPLETE"), &json!({"found": 3})));
        assert_eq!((&done["event"], &done["duration_ms"], &done["attempt"]), (&json!("WORK_COMPLETE"), &json!(7), &json!(1)));
    }
    let both = client.call("check_work", json!({"work_ids": [id, second["work_id"]]})).await;
    validate(&tool("check_work"), &both);
    assert_eq!(both["works"][1]["status"], "PENDING");
    let tree = client.call("check_work", json!({"run_id": assigned["root_run_id"]})).await;
    validate(&tool("check_work"), &tree);
    assert_eq!(tree["works"].as_array().unwrap().len(), 2);
    let cancelled = client.call("cancel_work", json!({"work_id": second["work_id"], "reason": "enough"})).await;
    validate(&tool("cancel_work"), &cancelled);
    assert_eq!((&cancelled["status"], &cancelled["reason"]), (&json!("CANCELLED"), &json!("enough")));
    let late = client.call("cancel_work", json!({"work_id": id})).await;
    assert_eq!(late["status"], "COMPLETE");
    let nothing = client.call("check_work", json!({})).await;
    assert_eq!(nothing["outstanding"], 0);
    assert_eq!(nothing["settled_last"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn bad_arguments_are_tool_errors_that_say_what_to_do() {
    let fixture = Fixture::new();
    fixture.offer(&["worker", "writer"]).await;
    let mut client = fixture.client().await;
    let unknown = "0198f2c4-7d3e-7000-8000-1b2c3d4e5f60";
    let long = "x".repeat(65);
    let order = |further: Value| {
        let mut order = json!({"agent_name": "worker", "task": "t"});
        order.as_object_mut().unwrap().extend(further.as_object().unwrap().clone());
        order
    };
    let cases = [
        ("assign_work", json!({}), "agent_name is missing"),
        ("assign_work", json!({"agent_name": "worker"}), "task is missing"),
        ("assign_work", json!({"agent_name": "a.b", "task": "t"}), "'.' at position 2"),
        ("assign_work", json!({"agent_name": "a b", "task": "t"}), "' ' at position 2"),
        ("assign_work", json!({"agent_name": long, "task": "t"}), "65 characters"),
        ("assign_work", json!({"agent_name": "worke", "task": "t"}), "closest first: worker, writer"),
        ("assign_work", json!({"agent_name": ["worker"], "task": "t"}), "agent_name must be a text"),
        ("assign_work", order(json!({"priority": 1.5})), "priority must be a whole number"),
        ("assign_work", order(json!({"priority": -9_000_000_000_000_000_000_i64})), "out of bounds"),
        ("assign_work", order(json!({"priority": 1e300})), "priority must be a whole number"),
        ("assign_work", order(json!({"timeout": "soon"})), "is not a duration"),
        ("assign_work", order(json!({"timeout": -5})), "timeout must be a duration"),
        ("assign_work", order(json!({"timeout": "0s"})), "out of bounds"),
        ("assign_work", order(json!({"context": [1]})), "context must be a JSON object"),
        ("assign_work", order(json!({"station": "x.y"})), "station name"),
        ("assign_work", order(json!({"station": "elsewhere"})), "held by station here"),
        ("assign_work", order(json!({"run_id": "nope"})), "not a run id"),
        ("assign_work", order(json!({"run_id": unknown})), "no run"),
        ("assign_work", order(json!({"idempotency_key": ""})), "1 to 256 characters"),
        ("await_work", json!({}), "both missing"),
        ("await_work", json!({"work_ids": []}), "both missing"),
        ("await_work", json!({"work_id": unknown}), "no work"),
        ("await_work", json!({"work_id": "42"}), "not a work id"),
        ("await_work", json!({"work_id": unknown, "mode": "some"}), "mode must be \"all\" or \"any\""),
        ("await_work", json!({"work_id": unknown, "timeout": "45"}), "is not a duration"),
        ("check_work", json!({"work_id": {"id": 1}}), "work_id must be a text"),
        ("check_work", json!({"work_ids": [unknown]}), "no work"),
        ("check_work", json!({"lines": "1-4"}), "read the result of one work"),
        ("check_work", json!({"work_id": unknown, "lines": "1-4", "grep": "x"}), "more than one"),
        ("check_work", json!({"work_id": unknown, "lines": "a-b"}), "lines"),
        ("check_work", json!({"run_id": unknown}), "no run"),
        ("cancel_work", json!({}), "work_id is missing"),
        ("cancel_work", json!({"work_id": unknown}), "no work"),
        ("answer_work", json!({"work_id": unknown}), "answer is missing"),
        ("answer_work", json!({"work_id": unknown, "answer": "yes"}), "no work"),
        ("escalate", json!({"reason": "help"}), "which work escalates"),
        ("escalate", json!({"work_id": unknown}), "reason is missing"),
        ("escalate", json!({"work_id": unknown, "reason": "r", "needs": "god"}), "needs must be"),
        ("get_agent_schema", json!({}), "agent_name is missing"),
        ("get_agent_schema", json!({"agent_name": "größe"}), "'ö'"),
    ];
    for (tool, arguments, expected) in cases {
        let text = client.refused(tool, arguments.clone()).await;
        assert!(text.contains(expected), "{tool} {arguments}: {text}");
        assert!(text.contains(". "), "{tool} {arguments} says no next step: {text}");
    }
    let many: Vec<String> = (0..1001).map(|n| format!("0198f2c4-7d3e-7000-8000-{n:012}")).collect();
    for verb in ["await_work", "check_work"] {
        assert!(client.refused(verb, json!({"work_ids": many})).await.contains("at most 1000"));
    }
    let text = client.request("tools/call", json!({"name": "check_work", "arguments": ["x"]})).await;
    assert_eq!(text["result"]["isError"], true, "{text}");
    let none = client.request("tools/call", json!({"name": "no_such_tool", "arguments": {}})).await;
    assert_eq!(none["error"]["code"], -32602, "{none}");
    assert!(none["error"]["message"].as_str().unwrap().contains("assign_work"));
}

#[tokio::test]
async fn a_large_result_stands_as_digest_size_and_link() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let (small, large, huge) = (client.assign("worker").await, client.assign("worker").await, client.assign("worker").await);
    fixture.completes(&small, json!("x".repeat(16 << 10))).await;
    fixture.completes(&large, json!("line\n".repeat(5000))).await;
    let bytes = "0123456789".repeat(20_000).into_bytes();
    let blob = fixture.dispatcher.transport().blobs.put(&mut bytes.as_slice(), Media::Text).await.unwrap();
    fixture.happens(&huge, 1, Kind::Accepted).await;
    fixture.happens(&huge, 1, Kind::Complete { result: Output::Blob(blob.clone()), duration_ms: 1, checks: vec![] }).await;
    assert!(client.call("check_work", json!({"work_id": small})).await["result"].is_string());
    let report = client.call("check_work", json!({"work_id": large})).await;
    assert!(report.get("result").is_none());
    assert_eq!(report["result_ref"]["size"], 25_000);
    assert_eq!(report["result_ref"]["sha256"].as_str().unwrap().len(), 64);
    let uri = report["result_ref"]["uri"].as_str().unwrap();
    assert_eq!(uri, format!("work://{}/result", large.as_str().unwrap()));
    let part = client.call("check_work", json!({"work_id": large, "lines": "2-3"})).await;
    assert_eq!(part["selection"]["total_bytes"], 25_000, "{part}");
    assert!(part["selection"]["text"].as_str().unwrap().contains("line\nline"), "{part}");
    let whole = client.request("resources/read", json!({"uri": uri})).await;
    assert_eq!(whole["result"]["contents"][0]["text"].as_str().unwrap().len(), 25_000);
    assert_eq!(whole["result"]["contents"][0]["mimeType"], "text/plain");
    let report = client.request("tools/call", json!({"name": "check_work", "arguments": {"work_id": huge}})).await;
    assert_eq!(report["result"]["structuredContent"]["result_ref"]["sha256"], blob.sha256);
    assert_eq!(report["result"]["content"][1]["type"], "resource_link");
    let refused = client.request("resources/read", json!({"uri": format!("work://{}/result", huge.as_str().unwrap())})).await;
    let text = refused["error"]["message"].as_str().unwrap();
    assert!(text.contains("200000 bytes") && text.contains("check_work"), "{text}");
    // Several at once stay within what one selection may give.
    let mut ids = vec![small.clone()];
    for _ in 0..8 {
        let id = client.assign("worker").await;
        fixture.completes(&id, json!("y".repeat(16 << 10))).await;
        ids.push(id);
    }
    let all = client.call("check_work", json!({"work_ids": ids})).await;
    assert!(all.to_string().len() < 32_000, "{}", all.to_string().len());
}

#[tokio::test]
async fn a_missing_result_was_dropped_by_age_only_if_it_is_that_old() {
    for (kept, wanted, unwanted) in [(Span::secs(86_400), "may be there alone", "by age ("), (Span::millis(0), "by age (", "may be there")]
    {
        let mut config = Config::default();
        config.lattice.storage.blob_max_age = kept;
        let fixture = Fixture::with(config);
        fixture.offer(&["worker"]).await;
        let mut client = fixture.client().await;
        let id = client.assign("worker").await;
        let result = Output::Blob(BlobRef { sha256: "ab".repeat(32), size: 300_000, media: Media::Text });
        fixture.happens(&id, 1, Kind::Accepted).await;
        fixture.happens(&id, 1, Kind::Complete { result, duration_ms: 1, checks: vec![] }).await;
        let part = client.refused("check_work", json!({"work_id": id, "bytes": "0-9"})).await;
        let uri = format!("work://{}/result", id.as_str().unwrap());
        let whole = client.request("resources/read", json!({"uri": uri})).await["error"]["message"].as_str().unwrap().to_owned();
        for text in [part, whole] {
            assert!(text.contains("no blob has the digest") && text.contains(wanted) && !text.contains(unwanted), "{text}");
        }
    }
}

#[tokio::test]
async fn a_failure_says_its_kind_and_that_it_is_dead() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let id = client.assign("worker").await;
    fixture.happens(&id, 1, Kind::Accepted).await;
    let failure = Failure { dead_letter: true, exit_code: Some(1), ..Failure::new(FailureKind::Agent, "it broke") };
    fixture.happens(&id, 1, Kind::Failed { failure, duration_ms: 3 }).await;
    let report = client.call("check_work", json!({"work_id": id})).await;
    assert_eq!(report["error"], json!({"kind": "agent", "message": "it broke", "exit_code": 1}));
    assert_eq!(report["dead_letter"], true);
}

#[tokio::test]
async fn each_workspace_sees_its_own_works_and_what_is_new_to_it() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let owner = |name| Some(Owner::of(Principal::User, &Workspace::Named(name)));
    let at = |name| fixture.connect(fixture.server.with_caller(Caller::connection().owned_by(owner(name))), Size::mib(1));
    let (mut one, mut two) = (at("one"), at("two"));
    (one.modern, two.modern) = (true, true);
    let (done, open) = (one.assign("worker").await, one.assign("worker").await);
    fixture.completes(&done, json!(1)).await;
    let asking = fixture.asks_a_person(&mut one, "worker").await;
    let theirs = two.assign("worker").await;

    let seen = one.call("check_work", json!({})).await;
    assert_eq!(
        (&seen["outstanding"], &seen["settled_since_last_look"], &seen["of_other_workspaces"]),
        (&json!(2), &json!(1), &json!(1)),
        "{seen}"
    );
    assert_eq!((&seen["works"][0]["work_id"], &seen["works"][0]["question"]), (&asking, &json!("may I?")), "{seen}");
    assert_eq!((&seen["works"][1]["work_id"], &seen["works"][1]["status"]), (&open, &json!("PENDING")), "{seen}");
    assert_eq!((&seen["settled_last"][0]["work_id"], &seen["settled_last"][0]["new"]), (&done, &json!(true)), "{seen}");
    let mut again = at("one");
    again.modern = true;
    let seen = again.call("check_work", json!({})).await;
    assert_eq!((&seen["settled_since_last_look"], &seen["settled_last"][0]["new"]), (&json!(0), &Value::Null), "{seen}");
    let seen = two.call("check_work", json!({})).await;
    assert_eq!(
        (&seen["works"][0]["work_id"], &seen["outstanding"], &seen["settled_since_last_look"]),
        (&theirs, &json!(1), &json!(0)),
        "{seen}"
    );

    // An agent sees what it has assigned itself, and that counts as its orderer's.
    let work = fixture.dispatcher.check(open.as_str().unwrap().parse().unwrap()).await.unwrap();
    let bound = Bound { work_id: work.work_id, run_id: work.run_id.clone(), attempt: 1 };
    let mut agent = fixture.connect(fixture.server.with_caller(Caller::bound(bound)), Size::mib(1));
    agent.modern = true;
    assert_eq!(agent.call("check_work", json!({})).await["outstanding"], 0);
    let child = agent.assign("worker").await;
    assert_eq!(agent.call("check_work", json!({})).await["works"][0]["work_id"], child);
    assert_eq!(one.call("check_work", json!({})).await["outstanding"], 3);
    fixture.completes(&child, json!(2)).await;
    let seen = agent.call("check_work", json!({})).await;
    assert_eq!((&seen["outstanding"], &seen["settled_since_last_look"]), (&json!(0), &json!(1)), "{seen}");
    assert_eq!(agent.call("check_work", json!({})).await["settled_since_last_look"], 0);
}
