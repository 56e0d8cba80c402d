//! Questions and lost contexts over a server: the same as on one machine.

use serde_json::json;

use super::fleet::{Fleet, kill, until_online};
use super::proxy::{Line, Proxy};
use crate::lifecycle::reaches;
use crate::nats_server::NatsServer;
use crate::questions::{CAREFUL, begin_task, fill_in, modern, stands};

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_outlives_the_leaf_and_the_orchestrator_and_a_new_orchestrator_needs_no_id() {
    let server = NatsServer::start();
    let mut fleet = Fleet::new(&server.url());
    fleet.agent_with("fleet", "careful", "", true, CAREFUL);
    fleet.agent("fleet", "upper", "printf %s \"$LATTICE_TASK\" | tr a-z A-Z");
    let mut leaf = fleet.leaf("north", "fleet");
    let desk = fleet.desk("desk").await;
    until_online(&desk, &["careful", "upper"]).await;
    let done = desk.assign("upper", "hello").await;
    desk.settled(&done).await;
    let id = desk.assign("careful", "act").await;
    reaches(&desk, &id, "ESCALATED").await;
    leaf.kill();
    kill(desk).await;

    let other = fleet.desk("other").await;
    let seen = other.call("check_work", json!({})).await;
    assert_eq!((&seen["outstanding"], &seen["of_other_workspaces"]), (&json!(0), &json!(1)), "{seen}");
    let desk = fleet.desk("desk").await;
    let seen = desk.call("check_work", json!({})).await;
    assert_eq!((&seen["works"][0]["work_id"], &seen["works"][0]["question"]), (&json!(id), &json!("may I?")), "{seen}");
    assert_eq!((&seen["settled_since_last_look"], &seen["settled_last"][0]["work_id"]), (&json!(1), &json!(done)), "{seen}");
    assert_eq!(desk.call("check_work", json!({})).await["settled_since_last_look"], 0);

    let answer = json!({"work_id": id, "answer": "yes"});
    let (one, two) = tokio::join!(desk.try_call("answer_work", answer.clone()), other.try_call("answer_work", answer));
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one.is_ok(), two.is_err(), "{one:?} {two:?}");
    let told = one.err().or(two.err()).unwrap();
    assert!(told.contains("was answered already"), "{told}");
    kill(desk).await;
    kill(other).await;

    let _leaf = fleet.leaf("south", "fleet");
    let desk = fleet.desk("desk").await;
    let settled = desk.settled(&id).await;
    assert_eq!((&settled["status"], &settled["attempt"]), (&json!("COMPLETE"), &json!(2)), "{settled}");
    assert!(settled["result"].to_string().contains("yes"), "{settled}");
    fleet.assert_calm();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_is_answered_by_any_process_of_its_caller_and_by_no_other() {
    let server = NatsServer::start();
    let mut fleet = Fleet::new(&server.url());
    fleet.set("LATTICE_MCP_TASK_AFTER", "100ms");
    fleet.agent_with("fleet", "careful", "", true, &format!("wait_for ask\n{CAREFUL}"));
    let _leaf = fleet.leaf("north", "fleet");
    let desk = fleet.desk("desk").await;
    until_online(&desk, &["careful"]).await;
    let id = desk.assign("careful", "act").await;
    let task = begin_task(&desk, &id).await;
    kill(desk).await;
    let other = fleet.desk("other").await;
    let refused = modern(&other, "tasks/get", json!({"taskId": task})).await;
    assert_eq!(refused["error"]["code"], -32602, "{refused}");
    let desk = fleet.desk("desk").await;
    assert_eq!(modern(&desk, "tasks/get", json!({"taskId": task})).await["result"]["status"], "working");
    fleet.open("ask");
    let asking = stands(&desk, &task, "input_required").await;
    fill_in(&desk, &task, &asking, "yes").await;
    let done = stands(&desk, &task, "completed").await;
    assert!(done["result"]["structuredContent"]["result"].to_string().contains("yes"), "{done}");
    fleet.assert_calm();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_another_one_overtakes_is_asked_all_the_same_and_hears_its_own_answer() {
    let server = NatsServer::start();
    let proxy = Proxy::before(server.port()).await;
    let mut fleet = Fleet::new(&server.url());
    fleet.elsewhere("slow", &[], &proxy.url());
    let careful = CAREFUL.replace("\nread -r answer", "\nnote asked\nread -r answer");
    fleet.agent_with("fleet", "careful", "", true, &format!("wait_for ask\n{careful}"));
    let _leaf = fleet.leaf("slow", "fleet");
    let (desk, other) = (fleet.desk("desk").await, fleet.desk("other").await);
    until_online(&desk, &["careful"]).await;
    let id = desk.assign("careful", "act").await;
    fleet.until_begun(&id, 1).await;

    // The question is on its way while another one is put.
    proxy.set(Line::Frozen);
    fleet.open("ask");
    fleet.until_noted(&id, "asked").await;
    let asked = json!({"work_id": id, "reason": "in English?"});
    let (heard, ()) = tokio::join!(other.call("escalate", asked), async {
        let asking = reaches(&desk, &id, "ESCALATED").await;
        assert_eq!((&asking["question"]["ask"], &asking["question"]["reason"]), (&json!(1), &json!("in English?")), "{asking}");
        desk.call("answer_work", json!({"work_id": id, "answer": "theirs", "ask": 1})).await;
    });
    assert_eq!(heard["answer"], "theirs", "{heard}");
    proxy.set(Line::Open);
    let asking = reaches(&desk, &id, "ESCALATED").await;
    assert_eq!((&asking["question"]["ask"], &asking["question"]["reason"]), (&json!(2), &json!("may I?")), "{asking}");
    assert_eq!(asking["question"]["needs"], "human", "{asking}");
    desk.call("answer_work", json!({"work_id": id, "answer": "mine", "ask": 2})).await;
    let settled = desk.settled(&id).await;
    assert_eq!((&settled["status"], &settled["attempt"]), (&json!("COMPLETE"), &json!(1)), "{settled}");
    assert!(settled["result"].to_string().contains("mine"), "{settled}");
    fleet.assert_calm();
}
