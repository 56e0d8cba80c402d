//! A process that is only asleep while it runs a work's last attempt is not declared dead; one that is dead, is.

use std::time::{Duration, Instant};

use lattice_mcp::config::Config;
use lattice_mcp::model::id::StationId;
use lattice_mcp::telemetry::{new_instance, now};
use lattice_mcp::transport::{Delivery, Want, local as store};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::ground::{Ground, check, on_both};
use crate::lifecycle::eventually;
use crate::rpc::Client;
use crate::transport::want;

on_both! {
    who_sleeps_through_its_last_attempt_settles_it_once_awake
    who_is_killed_at_its_last_attempt_has_failed_as_soon_as_somebody_can_know
    what_a_sleeper_runs_is_cancelled_and_stays_so
    the_time_of_a_work_is_up_while_its_process_sleeps
    an_answer_given_to_a_sleeper_reaches_its_only_attempt
}

const GATED: &str = "echo x >> started; while [ ! -e gate ]; do sleep 0.02; done; echo attempt $LATTICE_ATTEMPT";
/// What may not be tried again after its process has given no more sign of life.
const LAST: [(&str, &str); 2] = [("once", "limits: { max_attempts: 1 }"), ("unretried", "retry: { on: [transient] }")];

/// With a lease and a presence that run out soon, and an agent for each way to have no attempt left.
fn set(ground: &mut Ground) {
    for (name, value) in [("WORK_LEASE", "2s"), ("PRESENCE_HEARTBEAT", "300ms"), ("PRESENCE_TTL", "1500ms")] {
        ground.set(&format!("LATTICE_{name}"), value);
    }
    ground.listen("warn,lattice_mcp::leaf=debug");
    LAST.iter().for_each(|(name, front)| ground.agent(name, front, GATED));
}

fn wake(sleeper: &Client) {
    kill_process(Pid::from_raw(i32::try_from(sleeper.pid()).unwrap()).unwrap(), Signal::CONT).unwrap();
}

/// A process that runs a work of each of these agents, and another of its station and its folder that runs nothing yet.
async fn begun(ground: &mut Ground, more: Value) -> (Client, Client, Vec<String>) {
    let (first, ids) = begun_alone(ground, more).await;
    let second = ground.station().await;
    (first, second, ids)
}

/// A process that runs a work of each of these agents.
async fn begun_alone(ground: &mut Ground, more: Value) -> (Client, Vec<String>) {
    set(ground);
    let first = ground.station().await;
    let mut ids = Vec::new();
    for (agent, _) in LAST {
        let mut order = json!({"agent_name": agent, "task": "x"});
        order.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
        ids.push(first.call("assign_work", order).await["work_id"].as_str().unwrap().to_owned());
    }
    eventually("they start", async || (ground.file("started").lines().count() == LAST.len()).then_some(())).await;
    (first, ids)
}

/// Waits until the holds of a sleeper have run out, and the other process has looked at what they held.
async fn until_lapsed(ground: &Ground, other: &Client, ids: &[String]) {
    for id in ids {
        ground.until_said(&[id, "it is left as it is"]).await;
        eventually("it is not known what became of it", async || (check(other, id).await["detail"] == "outcome unknown").then_some(()))
            .await;
    }
}

async fn who_sleeps_through_its_last_attempt_settles_it_once_awake(mut ground: Ground) {
    let (sleeper, other, ids) = begun(&mut ground, json!({})).await;
    ground.lull(&sleeper).await;
    until_lapsed(&ground, &other, &ids).await;
    for id in &ids {
        let work = check(&other, id).await;
        assert_eq!((&work["status"], &work["detail"]), (&json!("ACCEPTED"), &json!("outcome unknown")), "{work}");
    }
    wake(&sleeper);
    ground.write("gate");
    for id in &ids {
        let work = other.settled(id).await;
        assert_eq!((&work["status"], &work["result"]), (&json!("COMPLETE"), &json!("attempt 1")), "{work}");
        assert_eq!(sleeper.settled(id).await["result"], work["result"]);
    }
    assert_eq!(ground.file("started").lines().count(), LAST.len(), "nothing ran twice");
}

async fn who_is_killed_at_its_last_attempt_has_failed_as_soon_as_somebody_can_know(mut ground: Ground) {
    let (mut victim, other, ids) = begun(&mut ground, json!({})).await;
    victim.child.start_kill().unwrap();
    victim.child.wait().await.unwrap();
    for (id, (agent, _)) in ids.iter().zip(LAST) {
        let work = other.settled(id).await;
        assert_eq!((&work["status"], &work["error"]["kind"]), (&json!("FAILED"), &json!("crashed")), "{work}");
        assert_eq!(work["dead_letter"] == true, agent == "once", "{work}");
    }
    // Nobody is there when the next one dies: whoever comes with its folder knows.
    let left = other.assign("once", "y").await;
    let mut other = other;
    eventually("it starts", async || (ground.file("started").lines().count() > LAST.len()).then_some(())).await;
    other.child.start_kill().unwrap();
    other.child.wait().await.unwrap();
    let third = ground.station().await;
    let work = third.settled(&left).await;
    assert_eq!(
        (&work["status"], &work["error"]["kind"], &work["dead_letter"]),
        (&json!("FAILED"), &json!("crashed"), &json!(true)),
        "{work}"
    );
    assert_eq!(ground.file("started").lines().count(), LAST.len() + 1);
}

async fn what_a_sleeper_runs_is_cancelled_and_stays_so(mut ground: Ground) {
    let (sleeper, other, ids) = begun(&mut ground, json!({})).await;
    ground.lull(&sleeper).await;
    until_lapsed(&ground, &other, &ids).await;
    for id in &ids {
        other.call("cancel_work", json!({"work_id": id, "reason": "no more need"})).await;
        assert_eq!(other.settled(id).await["status"], "CANCELLED");
    }
    wake(&sleeper);
    ground.write("gate");
    let after = sleeper.assign("once", "y").await;
    assert_eq!(sleeper.settled(&after).await["status"], "COMPLETE");
    for id in &ids {
        assert_eq!(sleeper.settled(id).await["status"], "CANCELLED");
    }
}

async fn the_time_of_a_work_is_up_while_its_process_sleeps(mut ground: Ground) {
    let (sleeper, ids) = begun_alone(&mut ground, json!({"timeout": "12s"})).await;
    ground.lull(&sleeper).await;
    // Whether it comes before the time is up or after that.
    let other = ground.station().await;
    for id in &ids {
        let work = other.settled(id).await;
        assert_eq!((&work["status"], &work["error"]["kind"]), (&json!("FAILED"), &json!("total_timeout")), "{work}");
        assert!(work["error"]["message"].as_str().unwrap().contains("what came of it is unknown"), "{work}");
    }
    wake(&sleeper);
    ground.write("gate");
    for id in &ids {
        assert_eq!(sleeper.settled(id).await["error"]["kind"], "total_timeout");
    }
}

async fn an_answer_given_to_a_sleeper_reaches_its_only_attempt(mut ground: Ground) {
    set(&mut ground);
    let script = "echo x >> started\nread -r work\necho '::lattice {\"escalate\": {\"reason\": \"which colour?\"}}'\nread -r answer\nprintf 'it is %s' \"$answer\"\n";
    std::fs::write(ground.place.agents.path().join("asker.sh"), script).unwrap();
    let front = "name: asker\ndescription: asks\nrunner: { kind: command, interactive: true, command: [sh, asker.sh] }\nlimits: { max_attempts: 1 }";
    std::fs::write(ground.place.agents.path().join("asker.md"), format!("---\n{front}\n---\n")).unwrap();
    let sleeper = ground.station().await;
    let id = sleeper.assign("asker", "x").await;
    let other = ground.station().await;
    eventually("it asks", async || (check(&other, &id).await["status"] == "ESCALATED").then_some(())).await;
    ground.lull(&sleeper).await;
    other.call("answer_work", json!({"work_id": id, "answer": "blue"})).await;
    until_lapsed(&ground, &other, std::slice::from_ref(&id)).await;
    wake(&sleeper);
    let work = other.settled(&id).await;
    assert!(work["status"] == "COMPLETE" && work["attempt"] == 1 && work["result"].to_string().contains("blue"), "{work}");
    assert_eq!(ground.file("started").lines().count(), 1);
}

/// It has begun, and slept before it could say that the whole of its time counts from then on.
#[tokio::test(flavor = "multi_thread")]
async fn who_sleeps_past_the_time_to_begin_keeps_its_hold() {
    let mut ground = Ground::local();
    let (sleeper, other, ids) = begun(&mut ground, json!({"queue_timeout": "30s"})).await;
    ground.lull(&sleeper).await;
    let store = store::open(&ground.place.data.path().join("default"), &Config::default().lattice.storage).unwrap();
    let (here, queue): (StationId, _) = ("here".parse().unwrap(), store.transport().queue);
    for id in &ids {
        queue.wake(&here, id.parse().unwrap(), Some(now()), Vec::new()).await.unwrap();
        ground.until_said(&[id, "it has time left"]).await;
        let left = queue.take_expired(new_instance(), Duration::from_secs(2), 9, Some(Vec::new())).await.unwrap();
        assert!(left.taken.is_empty() && left.lapsed.is_empty(), "{left:?}");
        let first = Delivery { station: here.clone(), id: id.parse().unwrap(), attempt: 1 };
        assert!(queue.extend(&[first], Duration::from_secs(2), None).await.unwrap().is_empty(), "nobody else has had it");
    }
    wake(&sleeper);
    ground.write("gate");
    for id in &ids {
        let work = other.settled(id).await;
        assert_eq!((&work["status"], &work["result"]), (&json!("COMPLETE"), &json!("attempt 1")), "{work}");
    }
    store.close();
}

/// Somebody took the item in the meantime, and died before it began anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_hold_that_is_lost_to_no_attempt_stops_nobody() {
    let mut ground = Ground::local();
    set(&mut ground);
    let sleeper = ground.station().await;
    let id = sleeper.assign("once", "x").await;
    eventually("it starts", async || (!ground.file("started").is_empty()).then_some(())).await;
    ground.lull(&sleeper).await;
    let store = store::open(&ground.place.data.path().join("default"), &Config::default().lattice.storage).unwrap();
    let (here, queue) = ("here".parse().unwrap(), store.transport().queue);
    let lanes: Vec<_> = queue.load(&here).await.unwrap().into_iter().map(|load| (load.lane, 9)).collect();
    let want = Want { lanes, lease: Duration::from_secs(3600), ..want(&[], 9) };
    let taken = eventually("its hold has run out", async || queue.take(&here, &want).await.unwrap().taken.pop()).await;
    assert_eq!((taken.delivery.id.to_string(), taken.delivery.attempt), (id.clone(), 2));
    wake(&sleeper);
    let goes_on = [&*id, "this one goes on"];
    ground.until_said(&goes_on).await;
    // Whatever is taken meanwhile, what runs is not held anew for each.
    let (before, began) = (ground.said(&goes_on), Instant::now());
    for _ in 0..20 {
        let other = sleeper.assign("upper", "x").await;
        sleeper.settled(&other).await;
    }
    let ticks = began.elapsed().as_millis() / 500 + 2;
    let said = ground.said(&goes_on) - before;
    assert!(said as u128 <= ticks, "it was held {said} times anew");
    ground.write("gate");
    let work = sleeper.settled(&id).await;
    assert_eq!((&work["status"], &work["result"]), (&json!("COMPLETE"), &json!("attempt 1")), "{work}");
    assert_eq!(ground.file("started").lines().count(), 1);
    store.close();
}
