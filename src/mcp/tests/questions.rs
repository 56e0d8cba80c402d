//! Questions of agents, and who answers them.

use std::time::Duration;

use serde_json::{Value, json};

use super::fixture::Fixture;
use crate::dispatcher::{Bound, Caller, Question};
use crate::model::event::{Ask, Kind, Needs};
use crate::model::id::WorkId;
use crate::model::size::Size;
use crate::telemetry::now;

#[tokio::test]
async fn a_question_is_seen_answered_and_the_asker_gets_the_answer() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let id = client.assign("worker").await;
    fixture.happens(&id, 1, Kind::Accepted).await;
    let work = fixture.dispatcher.check(id.as_str().unwrap().parse().unwrap()).await.unwrap();
    let bound = Bound { work_id: work.work_id, run_id: work.run_id.clone(), attempt: 1 };
    let mut agent = fixture.connect(fixture.server.with_caller(Caller::bound(bound)), Size::mib(1));
    agent.modern = true;
    let asking =
        agent.begin("tools/call", json!({"name": "escalate", "arguments": {"reason": "which colour?", "context": {"of": "shed"}}})).await;
    let seen = client.call("await_work", json!({"work_id": id, "timeout": "10s"})).await;
    assert_eq!(seen["status"], "ESCALATED");
    assert_eq!(seen["question"], json!({"ask": 1, "reason": "which colour?", "context": {"of": "shed"}, "needs": "orchestrator"}));
    assert!(seen["next"].as_str().unwrap().contains("answer_work"));
    let brief = client.call("check_work", json!({})).await;
    assert_eq!(brief["counts"], json!({"ESCALATED": 1}));
    let after = client.call("answer_work", json!({"work_id": id, "answer": "red"})).await;
    assert_eq!(after["status"], "ACCEPTED");
    let answered = agent.answer(asking).await;
    assert_eq!(answered["result"]["structuredContent"]["answer"], "red", "{answered}");
    let again = client.refused("answer_work", json!({"work_id": id, "answer": "blue"})).await;
    assert!(again.contains("waits for no answer"), "{again}");
    // What the agent assigns is its run's child.
    let child = agent.call("assign_work", json!({"agent_name": "worker", "task": "paint"})).await;
    assert_eq!(child["run_id"], format!("{}-1", work.run_id));
}

#[tokio::test]
async fn a_question_asked_again_after_a_later_one_was_answered_is_seen_by_somebody() {
    let fixture = Fixture::new();
    fixture.offer(&["helper"]).await;
    let mut client = fixture.client().await;
    let id = fixture.asks_a_person(&mut client, "helper").await;
    let work_id: WorkId = id.as_str().unwrap().parse().unwrap();
    fixture.happens(&id, 2, Kind::Accepted).await;
    let colour = Ask { ask: 2, reason: "which colour?".into(), context: Value::Null, needs: Needs::Orchestrator, parked: false };
    fixture.happens(&id, 2, Kind::Escalate(colour)).await;
    fixture.happens(&id, 0, Kind::Answered { ask: 2, answer: json!("red"), by: None }).await;

    let again = || Question { reason: "may I?".into(), context: Value::Null, needs: Needs::Human };
    let agent = |attempt| {
        let run_id = format!("{}-1", uuid::Uuid::from_u128(1)).parse().unwrap();
        Caller::bound(Bound { work_id, run_id, attempt })
    };
    let events = async || fixture.dispatcher.history(work_id).await.unwrap().0.len();
    let before = events().await;
    // The process of an attempt that another one has followed is not heard, and says nothing on the log.
    assert!(matches!(fixture.dispatcher.escalate(&agent(1), None, again()).await, Err(crate::dispatcher::Error::NotRunning { .. })));
    assert_eq!(events().await, before);
    for _ in 0..2 {
        assert_eq!(fixture.dispatcher.escalate(&agent(2), None, again()).await.unwrap(), (work_id, 3));
    }
    assert_eq!(events().await, before + 1, "it is put once");
    let work = fixture.dispatcher.check(work_id).await.unwrap();
    assert_eq!(work.open_question().map(|open| (open.ask, open.needs)), Some((3, Needs::Human)));
}

#[tokio::test]
async fn an_earlier_question_to_a_person_is_not_answered_by_a_model_whose_user_can_be_asked() {
    let fixture = Fixture::new();
    fixture.offer(&["helper"]).await;
    let mut client = fixture.client_with(json!({ "elicitation": {} })).await;
    let id = fixture.asks_a_person(&mut client, "helper").await;
    let colour = Ask { ask: 2, reason: "which colour?".into(), context: Value::Null, needs: Needs::Orchestrator, parked: false };
    fixture.happens(&id, 2, Kind::Accepted).await;
    fixture.happens(&id, 2, Kind::Escalate(colour)).await;
    for _ in 0..2 {
        let refused = client.refused("answer_work", json!({ "work_id": id, "ask": 1, "answer": "yes" })).await;
        assert!(refused.contains("for the user"), "{refused}");
        let work = fixture.dispatcher.check(id.as_str().unwrap().parse().unwrap()).await.unwrap();
        if work.open_question().is_some() {
            client.call("answer_work", json!({ "work_id": id, "ask": 2, "answer": "red" })).await;
        }
    }
    let work = fixture.dispatcher.check(id.as_str().unwrap().parse().unwrap()).await.unwrap();
    let answers: Vec<_> = work.exchanges.iter().map(|exchange| exchange.answer.clone()).collect();
    assert_eq!(answers, [None, Some(json!("red"))]);
}

#[tokio::test]
async fn a_question_that_its_agent_died_with_stops_no_clock_once_the_work_goes_on() {
    let fixture = Fixture::new();
    fixture.offer(&["helper"]).await;
    let mut client = fixture.client().await;
    let id = fixture.asks_a_person(&mut client, "helper").await;
    let work_id: WorkId = id.as_str().unwrap().parse().unwrap();
    let later = || now().after(Duration::from_secs(3600));
    let open = fixture.dispatcher.check(work_id).await.unwrap();
    assert!(open.waited(later()) >= Duration::from_secs(3600));
    fixture.happens(&id, 2, Kind::Accepted).await;
    let goes_on = fixture.dispatcher.check(work_id).await.unwrap();
    assert!(goes_on.waited(later()) < Duration::from_secs(600));
}

#[tokio::test]
async fn an_escalation_by_a_client_that_names_the_work_is_queued_when_nobody_answers() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let id = client.assign("worker").await;
    let early = client.refused("escalate", json!({"work_id": id, "reason": "r"})).await;
    assert!(early.contains("only work that runs can escalate"), "{early}");
    fixture.happens(&id, 1, Kind::Accepted).await;
    let ask = Ask { ask: 1, reason: "r".into(), context: Value::Null, needs: Needs::Human, parked: false };
    fixture.happens(&id, 1, Kind::Escalate(ask)).await;
    fixture.happens(&id, 0, Kind::Answered { ask: 1, answer: json!({"go": true}), by: None }).await;
    let answered = client.call("escalate", json!({"work_id": id, "reason": "r", "needs": "HUMAN"})).await;
    assert_eq!((&answered["answered"], &answered["answer"]), (&json!(true), &json!({"go": true})));
}

#[tokio::test]
async fn of_two_who_answer_at_once_one_wins_and_the_other_is_told_also_when_they_say_the_same() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    for _ in 0..20 {
        let id = fixture.asks_a_person(&mut client, "worker").await;
        let answer = json!({"name": "answer_work", "arguments": {"work_id": id, "answer": "yes"}});
        let (mut one, mut two) = (fixture.client().await, fixture.client().await);
        let (one, two) = tokio::join!(one.request("tools/call", answer.clone()), two.request("tools/call", answer));
        let refused: Vec<&Value> = [&one, &two].into_iter().filter(|answer| answer["result"]["isError"] == true).collect();
        assert_eq!(refused.len(), 1, "{one} {two}");
        assert!(refused[0].to_string().contains("was answered already"), "{}", refused[0]);
    }
    let id = fixture.asks_a_person(&mut client, "worker").await;
    let wrong = client.refused("answer_work", json!({"work_id": id, "answer": "yes", "ask": 2})).await;
    assert!(wrong.contains("has asked no question 2; question 1 is open"), "{wrong}");
    let wrong = client.refused("answer_work", json!({"work_id": id, "answer": "yes", "ask": -1})).await;
    assert!(wrong.contains("ask must be"), "{wrong}");
}
