//! Agents that are out of quota, agents that may start so often only, and whose turn it is.

use serde_json::json;

use crate::ground::{Ground, agent, assign, check, on_both};
use crate::lifecycle::{eventually, reaches};

on_both! {
    an_agent_that_is_out_of_quota_pauses_for_all_and_no_attempt_is_burnt
    a_quota_that_comes_back_too_late_ends_the_work_by_its_timeout_and_says_why
    an_agent_starts_no_more_often_than_it_may
    desks_that_share_an_agent_take_turns
}

async fn an_agent_that_is_out_of_quota_pauses_for_all_and_no_attempt_is_burnt(ground: Ground) {
    let script = r#"echo x >> tries; [ ! -e spent ] || { echo '::lattice {"fail": {"kind": "quota", "message": "429 from the model", "retry_after": "6s"}}'; exit 1; }; echo done"#;
    ground.agent("model", "limits: { max_attempts: 1, max_parallel: 1 }", script);
    ground.write("spent");
    // Two replicas, and somebody who only looks.
    let (first, second, desk) = (ground.station().await, ground.station().await, ground.desk("desk").await);
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(desk.assign("model", "x").await);
    }
    eventually("the agent pauses", async || agent(&desk, "model").await.filter(|agent| agent["paused_until"].is_string())).await;
    for id in &ids {
        let work = reaches(&desk, id, "PENDING").await;
        assert!(work["paused_until"].is_string(), "{work}");
        assert!(work["note"].as_str().unwrap().contains("out of quota"), "{work}");
    }
    // The first one said so; at most one more was under way at the replica.
    let tries = ground.file("tries").lines().count();
    assert!(tries <= 2, "{tries} tries");
    let paused = agent(&desk, "model").await.unwrap();
    let (_, table) = ground.run(&["agents"]).await;
    assert!(table.contains("paused until"), "{table}");
    drop((first, second));
    let restarted = ground.station().await;
    assert_eq!(agent(&restarted, "model").await.unwrap()["paused_until"], paused["paused_until"], "it survives a restart");
    std::fs::remove_file(ground.place.agents.path().join("spent")).unwrap();
    assert_eq!(ground.file("tries").lines().count(), tries, "nothing was tried while it paused");
    for id in &ids {
        let work = desk.settled(id).await;
        assert_eq!(work["status"], "COMPLETE", "its only attempt was not burnt: {work}");
    }
    assert!(agent(&desk, "model").await.unwrap().get("paused_until").is_none());
}

async fn a_quota_that_comes_back_too_late_ends_the_work_by_its_timeout_and_says_why(ground: Ground) {
    ground.agent("model", "", r#"echo '::lattice {"fail": {"kind": "quota", "message": "monthly limit", "retry_after": "30d"}}'"#);
    let client = ground.station().await;
    let first = assign(&client, "model", "x", json!({"timeout": "3s"})).await;
    eventually("the agent pauses", async || agent(&client, "model").await.filter(|agent| agent["paused_until"].is_string())).await;
    let second = assign(&client, "model", "x", json!({"timeout": "1m", "queue_timeout": "1s"})).await;
    for (id, kind, words) in [(first, "total_timeout", "monthly limit"), (second, "queue_timeout", "out of quota")] {
        let work = client.settled(&id).await;
        assert_eq!(work["error"]["kind"], kind, "{work}");
        assert!(work["error"]["message"].as_str().unwrap().contains(words), "{work}");
    }
}

async fn an_agent_starts_no_more_often_than_it_may(ground: Ground) {
    ground.agent("slowly", "limits: { per_minute: 2 }", "echo x >> tries");
    let (one, two) = (ground.station().await, ground.station().await);
    let mut ids = Vec::new();
    for client in [&one, &two, &one, &two] {
        ids.push(client.assign("slowly", "x").await);
    }
    eventually("two have started", async || (ground.file("tries").lines().count() == 2).then_some(())).await;
    // Another agent's work comes through, so all processes have looked.
    for client in [&one, &two] {
        assert_eq!(client.settled(&client.assign("upper", "x").await).await["result"], "X");
    }
    let mut pending = 0;
    for id in &ids {
        pending += u32::from(check(&one, id).await["status"] == "PENDING");
    }
    assert_eq!((pending, ground.file("tries").lines().count()), (2, 2));
    assert_eq!(one.call("get_agent_schema", json!({"agent_name": "slowly"})).await["limits"]["per_minute"], 2);
}

async fn desks_that_share_an_agent_take_turns(ground: Ground) {
    ground.agent("single", "limits: { max_parallel: 1 }", "while [ ! -e gate ]; do sleep 0.02; done; echo \"$LATTICE_TASK\" >> order");
    let station = ground.station().await;
    let (greedy, modest) = (ground.desk("greedy").await, ground.desk("modest").await);
    let first = greedy.assign("single", "first").await;
    reaches(&greedy, &first, "ACCEPTED").await;
    let mut ids = Vec::new();
    for n in 0..6 {
        ids.push(greedy.assign("single", &format!("greedy-{n}")).await);
    }
    for n in 0..2 {
        ids.push(modest.assign("single", &format!("modest-{n}")).await);
    }
    ids.push(assign(&greedy, "single", "urgent", json!({"priority": 5})).await);
    ground.write("gate");
    for id in &ids {
        assert_eq!(station.settled(id).await["status"], "COMPLETE");
    }
    let order = ground.file("order");
    let order: Vec<&str> = order.lines().collect();
    assert_eq!(order, ["first", "urgent", "modest-0", "greedy-0", "modest-1", "greedy-1", "greedy-2", "greedy-3", "greedy-4", "greedy-5"]);
}
