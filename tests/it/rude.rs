//! Clients that break the rules: the real binary answers, and stays up.

use serde_json::{Value, json};

use crate::lifecycle::{Place, eventually};
use crate::rpc::Client;

async fn alive(client: &Client) {
    let id = client.assign("upper", "still here").await;
    assert_eq!(client.settled(&id).await["result"], "STILL HERE");
}

async fn error_with(client: &Client, code: i64) -> Value {
    let mut notifications = client.notifications.lock().await;
    loop {
        let message =
            tokio::time::timeout(std::time::Duration::from_secs(60), notifications.recv()).await.expect("an error is sent").unwrap();
        if message["error"]["code"] == code {
            return message;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_lines_are_answered_and_the_server_stays_up() {
    let place = Place::new();
    let client = place.client().await;
    for line in ["{", "nonsense", "\u{1}\u{2}", "[]]", "{\"jsonrpc\": \"2.0\", \"id\": "] {
        client.send(line).await;
        error_with(&client, -32700).await;
    }
    client.send_bytes(b"\xff\xfe{\"jsonrpc\":\"2.0\"}").await;
    error_with(&client, -32700).await;
    alive(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_of_ten_megabytes_is_a_task_and_one_above_the_limit_is_refused() {
    let place = Place::new();
    let client = place.client().await;
    let refused = client.refusal("assign_work", json!({"agent_name": "upper", "task": "x".repeat(10 << 20)})).await;
    assert!(refused.contains("8MiB") && refused.contains("input_max"), "{refused}");
    let id = client.assign("upper", "y").await;
    client.settled(&id).await;
    let before = crate::lifecycle::resident_kib(client.pid());
    client.send_bytes(&vec![b'z'; 64 << 20]).await;
    eventually("an error is sent", async || {
        client.notifications.lock().await.try_recv().ok().filter(|message| message.get("error").is_some())
    })
    .await;
    let grown = crate::lifecycle::resident_kib(client.pid()).saturating_sub(before);
    assert!(grown < 48 << 10, "a line that is refused is not kept: memory grew by {grown} KiB");
    alive(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_methods_and_tools_are_errors_that_say_so() {
    let place = Place::new();
    let client = place.client().await;
    let unknown = client.request("tools/destroy", json!({})).await.unwrap();
    assert_eq!(unknown["error"]["code"], -32601, "{unknown}");
    let long = client.request(&"x".repeat(1 << 20), json!({})).await.unwrap();
    assert!(long["error"]["code"] == -32601 && long.to_string().len() < 1000, "a name of a megabyte is not sent back");
    let unknown = client.request("tools/call", json!({"name": "destroy_work", "arguments": {}})).await.unwrap();
    assert!(unknown.to_string().contains("destroy_work"), "{unknown}");
    for arguments in [json!(null), json!([]), json!("text"), json!(5)] {
        let answer = client.request("tools/call", json!({"name": "assign_work", "arguments": arguments})).await.unwrap();
        assert!(answer.get("error").is_some() || answer["result"]["isError"] == true, "{answer}");
    }
    alive(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_clients_at_once_and_an_agent_file_deleted_while_it_runs() {
    let place = Place::new();
    place.agent("fading", "", "while [ ! -e gate ]; do sleep 0.02; done; echo the end");
    let (one, two) = (place.client().await, place.client().await);
    let id = one.assign("fading", "x").await;
    eventually("it runs", async || {
        let work = two.call("check_work", json!({"work_id": id})).await;
        (work["status"] == "ACCEPTED").then_some(())
    })
    .await;
    std::fs::remove_file(place.agents.path().join("fading.md")).unwrap();
    eventually("it is withdrawn", async || {
        let refused = two.try_call("assign_work", json!({"agent_name": "fading", "task": "y"})).await.unwrap();
        refused.err().filter(|text| text.contains("upper"))
    })
    .await;
    std::fs::write(place.agents.path().join("gate"), "").unwrap();
    assert_eq!(two.settled(&id).await["result"], "the end", "what ran goes on");
    tokio::join!(alive(&one), alive(&two));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_that_only_says_hello_leaves_no_trace() {
    let place = Place::new();
    let mut client = place.client().await;
    client.hang_up().await;
    assert!(client.child.wait().await.unwrap().success());
    let looker = place.client().await;
    looker.call("list_available_agents", json!({})).await;
    let output = crate::rpc::binary(place.data.path(), place.agents.path()).args(["stations", "--json"]).output().await.unwrap();
    let stations: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(stations.to_string().matches("instance").count().max(1), 1, "only the one that was asked something: {stations}");
}
