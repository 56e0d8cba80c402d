//! What a client is shown: tools, resources, prompts, and what the server says of itself.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::FutureExt;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::fixture::{Fixture, manifest};
use crate::dispatcher::Caller;
use crate::mcp::{Parts, Server};
use crate::model::size::Size;

#[tokio::test]
async fn the_tools_are_the_golden_ones_and_cost_under_2500_tokens() {
    let fixture = Fixture::new();
    let mut client = fixture.client().await;
    let listed = client.request("tools/list", json!({})).await;
    let size = listed.to_string().chars().count();
    println!("tools/list without agents: {size} characters, {} tokens", size / 4);
    assert!(size < 10_000, "{size} characters");
    assert!(!listed.to_string().contains("\"format\""), "no client needs formats");
    let tools = &listed["result"]["tools"];
    for tool in tools.as_array().unwrap() {
        for field in ["title", "description", "inputSchema", "outputSchema", "annotations"] {
            assert!(!tool[field].is_null(), "{} has no {field}", tool["name"]);
        }
        for schema in [&tool["inputSchema"], &tool["outputSchema"]] {
            assert_eq!(schema["type"], "object");
            jsonschema::validator_for(schema).unwrap();
        }
    }
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas/tools.json");
    if std::env::var_os("UPDATE_GOLDEN").is_some_and(|value| value == "1") {
        std::fs::write(&golden, format!("{}\n", serde_json::to_string_pretty(tools).unwrap())).unwrap();
    }
    let kept: Value = serde_json::from_str(&std::fs::read_to_string(&golden).unwrap()).unwrap();
    assert_eq!(&kept, tools, "the tools changed: look at them, then run the tests with UPDATE_GOLDEN=1");
}

/// Gemini refuses all tools when one parameter has no type, and hosts that convert schemas lose what has none.
#[test]
fn every_parameter_of_every_tool_says_its_type() {
    fn untyped(schema: &Value, path: &str, found: &mut Vec<String>) {
        let choices = schema["anyOf"].as_array();
        match (schema["type"].as_str(), choices) {
            (Some("array"), None) => untyped(&schema["items"], &format!("{path}[]"), found),
            (Some(kind), None) if kind == "string" || schema.get("enum").is_none() => {}
            (None, Some(choices)) => choices.iter().for_each(|choice| untyped(choice, path, found)),
            _ => found.push(path.to_owned()),
        }
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            untyped(property, &format!("{path}.{name}"), found);
        }
    }
    let mut found = Vec::new();
    let tools = Server::agent_tools() + Server::work_tools() + Server::waiting_tools() + Server::question_tools();
    for tool in tools.list_all() {
        let tool = serde_json::to_value(tool).unwrap();
        untyped(&tool["inputSchema"], tool["name"].as_str().unwrap(), &mut found);
    }
    assert!(found.is_empty(), "{found:?}");
}

#[tokio::test]
async fn both_generations_are_told_exactly_what_is_served() {
    let fixture = Fixture::new();
    let wanted = json!({
        "completions": {}, "prompts": {}, "resources": {"listChanged": true, "subscribe": true}, "tools": {"listChanged": true}
    });
    let mut old = fixture.raw(Size::mib(1));
    let hello = json!({"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}});
    let welcome = old.request("initialize", hello).await;
    assert_eq!(welcome["result"]["capabilities"], wanted);
    assert_eq!(welcome["result"]["protocolVersion"], "2025-06-18");
    let mut new = fixture.raw(Size::mib(1));
    new.modern = true;
    let discovered = new.request("server/discover", json!({})).await;
    let mut wanted = wanted;
    wanted["extensions"] = json!({"io.modelcontextprotocol/tasks": {}});
    assert_eq!(discovered["result"]["capabilities"], wanted, "{discovered}");
    assert!(discovered["result"]["instructions"].as_str().unwrap().contains("check_work"));
    assert_eq!(fixture.woken.load(Ordering::SeqCst), 0, "a probe wakes nobody");
    let listed = new.request("tools/list", json!({})).await;
    assert_eq!(listed["result"]["tools"].as_array().unwrap().len(), 8, "{listed}");
    assert_eq!(listed["result"]["cacheScope"], "private");
    assert_eq!(fixture.woken.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn resources_are_listed_read_and_completed() {
    let fixture = Fixture::new();
    fixture.offer_all((0..150).map(|n| manifest(&format!("agent-{n:03}"), "Helps")).collect()).await;
    let mut client = fixture.client().await;
    let assigned = client.call("assign_work", json!({"agent_name": "agent-007", "task": "t", "context": {"a": 1}})).await;
    let id = assigned["work_id"].as_str().unwrap().to_owned();
    let first = client.request("resources/list", json!({})).await;
    assert_eq!(first["result"]["resources"].as_array().unwrap().len(), 100);
    let cursor = &first["result"]["nextCursor"];
    let second = client.request("resources/list", json!({"cursor": cursor})).await;
    let rest = second["result"]["resources"].as_array().unwrap();
    assert_eq!((rest.len(), &rest[50]["uri"]), (51, &json!(format!("work://{id}"))));
    assert!(second["result"].get("nextCursor").is_none());
    assert_eq!(client.request("resources/list", json!({"cursor": "zz"})).await["error"]["code"], -32602);
    assert_eq!(client.request("resources/templates/list", json!({})).await["result"]["resourceTemplates"].as_array().unwrap().len(), 4);

    let mut read = async |uri: String| {
        let answer = client.request("resources/read", json!({"uri": uri})).await;
        match answer["result"]["contents"][0]["text"].as_str() {
            Some(text) => serde_json::from_str(text).unwrap(),
            None => answer,
        }
    };
    assert_eq!(read("agent://agent-007".into()).await["name"], "agent-007");
    let work = read(format!("work://{id}")).await;
    assert_eq!((&work["context"], &work["history"][0]["event"]), (&json!({"a": 1}), &json!("WORK_ASSIGNED")));
    let root = assigned["root_run_id"].as_str().unwrap();
    let tree = read(format!("run://{root}")).await;
    assert_eq!(tree["children"][0]["work_id"], id.as_str());
    for uri in ["file:///etc/passwd", "agent://nobody", "work://0198f2c4-7d3e-7000-8000-1b2c3d4e5f60", &format!("work://{id}/result")] {
        let missing = read(uri.to_owned()).await;
        assert_eq!(missing["error"]["code"], -32002, "{missing}");
        assert!(missing["error"]["message"].as_str().unwrap().contains(". "), "{missing}");
    }

    let complete = |reference: Value, name: &str, value: &str| json!({"ref": reference, "argument": {"name": name, "value": value}});
    let template = |uri: &str| json!({"type": "ref/resource", "uri": uri});
    let mut completed = async |params: Value| client.request("completion/complete", params).await["result"]["completion"].clone();
    let all = completed(complete(template("agent://{name}"), "name", "")).await;
    assert_eq!((all["values"].as_array().unwrap().len(), &all["total"], &all["hasMore"]), (100, &json!(150), &json!(true)));
    assert_eq!(completed(complete(template("agent://{name}"), "name", "agent-14")).await["total"], 10);
    assert_eq!(completed(complete(template("work://{id}"), "id", &id[..8])).await["values"], json!([id]));
    assert_eq!(completed(complete(template("run://{id}"), "id", root)).await["values"], json!([root, format!("{root}-1")]));
    let prompt = json!({"type": "ref/prompt", "name": "delegate"});
    assert_eq!(completed(complete(prompt, "agents", "agent-001,agent-149")).await["values"], json!(["agent-001,agent-149"]));
}

#[tokio::test]
async fn prompts_are_filled_in() {
    let fixture = Fixture::new();
    fixture.offer(&["painter", "worker"]).await;
    let mut client = fixture.client().await;
    assert_eq!(client.request("prompts/list", json!({})).await["result"]["prompts"].as_array().unwrap().len(), 2);
    let orchestrate = client.request("prompts/get", json!({"name": "orchestrate"})).await;
    assert!(orchestrate["result"]["messages"][0]["content"]["text"].as_str().unwrap().contains("After losing context"));
    let goal = "paint {agents} the shed {which}";
    let delegate = client.request("prompts/get", json!({"name": "delegate", "arguments": {"goal": goal, "agents": "painter"}})).await;
    let text = delegate["result"]["messages"][0]["content"]["text"].as_str().unwrap();
    assert!(text.contains("- **painter** (local)") && !text.contains("worker"), "{text}");
    assert!(text.ends_with(goal), "{text}");
    for (arguments, expected) in [(json!({}), "goal"), (json!({"goal": "g", "agents": "nobody"}), "painter")] {
        let refused = client.request("prompts/get", json!({"name": "delegate", "arguments": arguments})).await;
        assert!(refused["error"]["message"].as_str().unwrap().contains(expected), "{refused}");
    }
}

#[tokio::test]
async fn a_station_that_cannot_wake_says_so() {
    let fixture = Fixture::new();
    let server = Server::new(Parts {
        dispatcher: fixture.dispatcher.clone(),
        caller: Caller::stateless(),
        wake: Arc::new(|| async { Err("the store is read-only".to_owned()) }.boxed()),
        stop: CancellationToken::new(),
        tasks: fixture.tasks.clone(),
    });
    let mut client = fixture.connect(server, Size::mib(1));
    client.modern = true;
    assert!(client.refused("check_work", json!({})).await.contains("the store is read-only"));
    let listed = client.request("tools/list", json!({})).await;
    assert!(listed["error"]["message"].as_str().unwrap().contains("read-only"), "{listed}");
}
