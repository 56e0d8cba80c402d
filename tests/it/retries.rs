//! Further attempts, and what becomes of works that have none left.

use serde_json::{Value, json};

use crate::ground::{Ground, assign, check, on_both};
use crate::lifecycle::{Place, eventually, reaches};

on_both! {
    an_agent_says_when_it_may_be_tried_again
    the_kind_of_a_failure_decides_and_the_agent_s_own_policy_comes_first
    a_dead_letter_keeps_the_evidence_of_every_attempt_and_is_redriven_once
    only_what_has_failed_is_redriven
    a_failed_item_is_redriven_beside_the_others
}

async fn an_agent_says_when_it_may_be_tried_again(ground: Ground) {
    let late = r#"date +%s%3N >> tries; [ "$LATTICE_ATTEMPT" = 1 ] || exit 0; echo '::lattice {"fail": {"message": "busy", "retry_after": "2s"}}'; exit 1"#;
    ground.agent("later", "retry: { initial_delay: 1ms }", late);
    let client = ground.station().await;
    let id = client.assign("later", "x").await;
    let waiting = reaches(&client, &id, "PENDING").await;
    let waiting = if waiting["event"] == "WORK_RETRYING" {
        waiting
    } else {
        eventually("it waits for its second attempt", async || {
            Some(check(&client, &id).await).filter(|work| work["event"] == "WORK_RETRYING")
        })
        .await
    };
    assert_eq!((waiting["last_attempt"]["kind"].as_str(), waiting["last_attempt"]["message"].as_str()), (Some("transient"), Some("busy")));
    assert!(waiting["retry_at"].is_string(), "{waiting}");
    assert_eq!(client.settled(&id).await["status"], "COMPLETE");
    let tries: Vec<u64> = ground.file("tries").lines().map(|line| line.parse().unwrap()).collect();
    assert!(tries.len() == 2 && tries[1] - tries[0] >= 1900, "{tries:?}");
    let events = ground.say(&["work", &id]).await;
    let retrying = events["events"].as_array().unwrap().iter().find(|event| event["type"] == "WORK_RETRYING").unwrap();
    assert_eq!((retrying["error"]["message"].as_str(), retrying["next_at"].is_string()), (Some("busy"), true), "{retrying}");
}

async fn the_kind_of_a_failure_decides_and_the_agent_s_own_policy_comes_first(ground: Ground) {
    let fails =
        |kind: &str| format!("echo x >> tries-{kind}; echo '::lattice {{\"fail\": {{\"kind\": \"{kind}\", \"message\": \"so it is\"}}}}'");
    ground.agent("gave_up", "", &fails("gave_up"));
    ground.agent("bad_input", "", &fails("bad_input"));
    ground.agent("transient", "retry: { enabled: false }", &fails("transient"));
    ground.agent(
        "stubborn",
        "limits: { max_attempts: 4 }\nretry: { on: [agent], backoff: fixed, initial_delay: 10ms }",
        "echo x >> tries-stubborn; exit 1",
    );
    let client = ground.station().await;
    for (agent, kind, tries, dead) in [
        ("gave_up", "gave_up", 1, false),
        ("bad_input", "bad_input", 1, false),
        ("transient", "transient", 1, true),
        ("stubborn", "agent", 4, true),
    ] {
        let id = client.assign(agent, "x").await;
        let work = client.settled(&id).await;
        assert_eq!((work["status"].as_str(), work["error"]["kind"].as_str()), (Some("FAILED"), Some(kind)), "{work}");
        assert_eq!(ground.file(&format!("tries-{agent}")).lines().count(), tries, "{agent}");
        assert_eq!(work["dead_letter"] == true, dead, "{work}");
    }
}

async fn a_dead_letter_keeps_the_evidence_of_every_attempt_and_is_redriven_once(ground: Ground) {
    let script = r#"[ -e mended ] && { printf 'fine: %s' "$LATTICE_TASK"; exit; }; echo "evidence $LATTICE_ATTEMPT" >&2; exit 75"#;
    ground.agent("hopeless", "limits: { max_attempts: 2 }\nretry: { initial_delay: 10ms }", script);
    let client = ground.station().await;
    let id = assign(&client, "hopeless", "the task", json!({"context": {"n": 1}, "priority": 3, "timeout": "1m"})).await;
    let work = client.settled(&id).await;
    assert_eq!((work["status"].as_str(), work["dead_letter"].as_bool()), (Some("FAILED"), Some(true)), "{work}");
    let is_dead = async |id: &str| ground.say(&["work", "--dead"]).await.as_array().unwrap().iter().any(|work| work["work_id"] == id);
    assert!(is_dead(&id).await);
    let shown = ground.say(&["work", &id]).await;
    let evidence: Vec<&str> =
        shown["attempts"].as_array().unwrap().iter().map(|tried| tried["error"]["evidence"].as_str().unwrap()).collect();
    assert_eq!(evidence.iter().map(|text| text.trim()).collect::<Vec<_>>(), ["evidence 1", "evidence 2"]);
    let (_, text) = ground.run(&["work", &id]).await;
    assert!(text.contains("evidence 1") && text.contains(&format!("work redrive {id}")), "{text}");

    ground.write("mended");
    // Two who do so at once get one work.
    let redrive = ["work", "redrive", &id];
    let (one, two) = tokio::join!(ground.run(&redrive), ground.run(&redrive));
    let anew: Value = eventually("one of them has redriven it", async || {
        ground.say(&["work", &id]).await["redriven_as"].as_str().map(|anew| json!(anew))
    })
    .await;
    let anew = anew.as_str().unwrap();
    assert!(one.0 || two.0, "{one:?} {two:?}");
    for (_, said) in [&one, &two] {
        assert!(said.contains(anew), "{said}");
    }
    let work = client.settled(anew).await;
    assert_eq!((work["status"].as_str(), work["result"].as_str()), (Some("COMPLETE"), Some("fine: the task")), "{work}");
    let shown = ground.say(&["work", anew]).await;
    assert_eq!((shown["redrives"].as_str(), shown["priority"].as_i64(), shown["context"]["n"].as_i64()), (Some(&*id), Some(3), Some(1)));
    assert_eq!(shown["root_run_id"], ground.say(&["work", &id]).await["root_run_id"], "it belongs to the same request");
    // What has settled stays as it is, and nobody needs to look after it any more.
    assert_eq!(check(&client, &id).await["status"], "FAILED");
    assert!(!is_dead(&id).await);
    let (done, said) = ground.run(&redrive).await;
    assert!(!done && said.contains(anew), "{said}");
    assert_eq!(ground.say(&["runs"]).await.as_array().unwrap().len(), 2, "nothing was made twice");
}

async fn only_what_has_failed_is_redriven(ground: Ground) {
    ground.agent("gone", "", "exit 1");
    ground.agent("gated", "", "while [ ! -e gate ]; do sleep 0.02; done");
    let client = ground.station().await;
    let fine = client.assign("upper", "fine").await;
    client.settled(&fine).await;
    let running = client.assign("gated", "x").await;
    reaches(&client, &running, "ACCEPTED").await;
    let orphan = client.assign("gone", "x").await;
    assert_eq!(client.settled(&orphan).await["status"], "FAILED");
    for file in ["gone.md", "gone.sh"] {
        std::fs::remove_file(ground.place.agents.path().join(file)).unwrap();
    }
    eventually("the agent is withdrawn", async || crate::ground::agent(&client, "gone").await.is_none().then_some(())).await;
    for (id, words) in [
        (fine.as_str(), "is COMPLETE: only work that FAILED"),
        (&running, "is ACCEPTED: only work that FAILED"),
        (&orphan, "no agent named gone"),
        ("0198f2c4-7d3e-7000-8000-1b2c3d4e5f60", "no work 0198f2c4"),
    ] {
        let (done, said) = ground.run(&["work", "redrive", id]).await;
        assert!(!done && said.contains(words), "{id}: {said}");
    }
    ground.write("gate");
    assert_eq!(client.settled(&running).await["status"], "COMPLETE");
}

async fn a_failed_item_is_redriven_beside_the_others(ground: Ground) {
    ground.agent("picky", "", r#"[ -e mended ] || [ "$LATTICE_TASK" != 2 ] || exit 1; printf 'of %s' "$LATTICE_TASK""#);
    let client = ground.station().await;
    let order = json!({"agent_name": "picky", "task": "{item}", "map": [1, 2, 3]});
    let map = client.call("assign_work", order).await;
    let (map, run) = (map["work_id"].as_str().unwrap(), map["run_id"].as_str().unwrap());
    assert_eq!(client.settled(map).await["status"], "FAILED");
    let runs = ground.say(&["runs"]).await;
    let item = runs.as_array().unwrap().iter().find(|row| row["run_id"] == format!("{run}-2")).unwrap();
    ground.write("mended");
    let anew = ground.say(&["work", "redrive", item["work_id"].as_str().unwrap()]).await;
    let work = client.settled(anew["work_id"].as_str().unwrap()).await;
    assert_eq!((work["status"].as_str(), work["result"].as_str()), (Some("COMPLETE"), Some("of 2")), "{work}");
    assert_eq!(anew["run_id"], format!("{run}-4"), "no item has its number");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_station_that_can_open_no_file_burns_no_attempt() {
    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

    let place = Place::new();
    place.agent("once", "limits: { max_attempts: 1 }", "echo x >> tries; echo done");
    let client = place.client().await;
    // It knows its agents, and runs them.
    assert_eq!(client.settled(&client.assign("upper", "x").await).await["result"], "X");
    let pid = Pid::from_raw(client.pid().cast_signed());
    let none = Rlimit { current: Some(8), ..getrlimit(Resource::Nofile) };
    let before = prlimit(pid, Resource::Nofile, none).unwrap();
    let id = client.assign("once", "x").await;
    eventually("its second attempt could not begin either", async || {
        let work = check(&client, &id).await;
        assert_ne!(work["status"], "FAILED", "{work}");
        let is_full = work["last_attempt"]["message"].as_str().is_some_and(|message| message.contains("Too many open files"));
        (is_full && work["attempt"].as_u64() >= Some(2)).then_some(())
    })
    .await;
    prlimit(pid, Resource::Nofile, before).unwrap();
    let work = client.settled(&id).await;
    assert_eq!((&work["status"], &work["result"]), (&json!("COMPLETE"), &json!("done")), "{work}");
    assert_eq!(place.file("tries").lines().count(), 1);
}
