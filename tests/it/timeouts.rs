//! Three timeouts, who sees to them, and what is said while nobody knows.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::ground::{Ground, assign, check, on_both};
use crate::lifecycle::{eventually, reaches};
use crate::rpc::Client;

on_both! {
    each_timeout_can_be_given_with_the_call
    a_work_that_began_in_time_has_all_of_its_time
    an_orchestrator_sees_to_timeouts_when_the_station_is_gone
    what_a_sleeping_station_does_is_unknown_until_it_wakes
}

fn signal(client: &Client, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(client.pid()).unwrap()).unwrap(), signal).unwrap();
}

async fn each_timeout_can_be_given_with_the_call(ground: Ground) {
    ground.agent("sleeper", "limits: { max_parallel: 1 }", "sleep 300");
    ground.agent("hurried", "limits: { max_parallel: 1, queue: 1s }", "sleep 300");
    let client = ground.station().await;
    for agent in ["sleeper", "hurried"] {
        let first = assign(&client, agent, "x", json!({"timeout": "30s"})).await;
        reaches(&client, &first, "ACCEPTED").await;
    }
    let by_call = assign(&client, "sleeper", "x", json!({"timeout": "1m", "queue_timeout": "700ms"})).await;
    let by_agent = client.assign("hurried", "x").await;
    let both = assign(&client, "hurried", "x", json!({"queue_timeout": "1m", "timeout": "900ms"})).await;
    for (id, after) in [(by_call, "700ms"), (by_agent, "1s"), (both, "900ms")] {
        let work = client.settled(&id).await;
        assert_eq!((work["status"].as_str(), work["error"]["kind"].as_str()), (Some("FAILED"), Some("queue_timeout")), "{work}");
        assert!(work["error"]["message"].as_str().unwrap().contains(&format!("after {after} in the queue")), "{work}");
    }
    ground.agent("silent", "limits: { silence: 1m }", "sleep 300");
    eventually("the agent is there", async || crate::ground::agent(&client, "silent").await).await;
    let silent = assign(&client, "silent", "x", json!({"silence_timeout": "500ms"})).await;
    let work = client.settled(&silent).await;
    assert_eq!(work["error"]["kind"], "silence_timeout", "{work}");
    assert!(work["error"]["message"].as_str().unwrap().contains("said nothing for 500ms"), "{work}");
    for (name, value) in [("queue_timeout", "0s"), ("silence_timeout", "soon"), ("queue_timeout", "8d")] {
        let refused = client.refusal("assign_work", json!({"agent_name": "upper", "task": "x", name: value})).await;
        assert!(refused.contains(name) && refused.contains(value), "{refused}");
    }
}

async fn a_work_that_began_in_time_has_all_of_its_time(ground: Ground) {
    ground.agent(
        "gated",
        "",
        "echo x >> tries; [ \"$LATTICE_ATTEMPT\" -ge 2 ] || exit 75; while [ ! -e gate ]; do sleep 0.02; done; echo fine",
    );
    let client = ground.station().await;
    let id = assign(&client, "gated", "x", json!({"timeout": "1m", "queue_timeout": "900ms"})).await;
    // The second attempt begins a second later, after the time in the queue would have been up.
    eventually("its second attempt runs", async || (ground.file("tries").lines().count() == 2).then_some(())).await;
    let other = assign(&client, "gated", "x", json!({"timeout": "1m", "queue_timeout": "900ms"})).await;
    reaches(&client, &other, "ACCEPTED").await;
    ground.write("gate");
    for id in [id, other] {
        let work = client.settled(&id).await;
        assert_eq!(work["result"].as_str().map(str::trim), Some("fine"), "{work}");
    }
}

async fn an_orchestrator_sees_to_timeouts_when_the_station_is_gone(mut ground: Ground) {
    ground.set("LATTICE_WORK_LEASE", "2s");
    ground.agent("gated", "limits: { max_parallel: 1 }", "while [ ! -e gate ]; do sleep 0.02; done");
    let mut station = ground.station().await;
    let desk = ground.desk("desk").await;
    let running = assign(&desk, "gated", "x", json!({"timeout": "5s"})).await;
    reaches(&desk, &running, "ACCEPTED").await;
    let queued = assign(&desk, "gated", "x", json!({"timeout": "1m", "queue_timeout": "4s"})).await;
    station.child.start_kill().unwrap();
    station.child.wait().await.unwrap();
    for (id, kind, words) in [(queued, "queue_timeout", "no process that runs"), (running, "total_timeout", "is unknown")] {
        let work = desk.settled(&id).await;
        assert_eq!((work["status"].as_str(), work["error"]["kind"].as_str()), (Some("FAILED"), Some(kind)), "{work}");
        assert!(work["error"]["message"].as_str().unwrap().contains(words), "{work}");
    }
    ground.write("gate");
}

async fn what_a_sleeping_station_does_is_unknown_until_it_wakes(mut ground: Ground) {
    for (name, value) in [("LATTICE_PRESENCE_HEARTBEAT", "500ms"), ("LATTICE_PRESENCE_TTL", "2s"), ("LATTICE_WORK_LEASE", "2s")] {
        ground.set(name, value);
    }
    ground.agent("gated", "", "while [ ! -e gate ]; do sleep 0.02; done; echo awake");
    let (station, desk) = (ground.station().await, ground.desk("desk").await);
    let id = desk.assign("gated", "x").await;
    let work = reaches(&desk, &id, "ACCEPTED").await;
    assert!(work.get("detail").is_none(), "{work}");
    ground.lull(&station).await;
    let unknown =
        eventually("its outcome is unknown", async || Some(check(&desk, &id).await).filter(|work| work.get("detail").is_some())).await;
    assert_eq!((unknown["status"].as_str(), unknown["detail"].as_str()), (Some("ACCEPTED"), Some("outcome unknown")), "{unknown}");
    assert!(unknown["note"].as_str().unwrap().contains("no sign of life"), "{unknown}");
    signal(&station, Signal::CONT);
    eventually("it is heard of again", async || check(&desk, &id).await.get("detail").is_none().then_some(())).await;
    ground.write("gate");
    let work = desk.settled(&id).await;
    assert_eq!((work["status"].as_str(), work["result"].as_str().map(str::trim)), (Some("COMPLETE"), Some("awake")), "{work}");
    assert_eq!(work["attempt"], 1, "it was never declared dead");
}
