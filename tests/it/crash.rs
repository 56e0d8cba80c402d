//! What survives: kill -9 of anybody at any moment, restarts, signals, a process that sleeps past its lease.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use crate::lifecycle::{Place, eventually, reaches};
use crate::rpc::Client;

/// A short lease, so that take-overs are quick; everything else as it comes.
const QUICK: [(&str, &str); 2] = [("LATTICE_WORK_LEASE", "2s"), ("LATTICE_RETRY_MAX_ATTEMPTS", "50")];

fn signal(pid: u32, name: &str) {
    let status = std::process::Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap();
    assert!(status.success(), "kill -{name} {pid}");
}

async fn kill(mut client: Client) {
    client.child.start_kill().unwrap();
    client.child.wait().await.unwrap();
}

/// What is known of a work from outside, reduced to what may never change once it settled.
async fn outcome(client: &Client, id: &str) -> Value {
    let answer = client.call("check_work", json!({"work_id": id})).await;
    let work = answer["works"].get(0).cloned().unwrap_or(answer);
    json!([work["status"], work["event"], work["result"], work["error"], work["run_id"]])
}

#[tokio::test(flavor = "multi_thread")]
async fn work_of_a_killed_process_is_taken_up_by_another() {
    let place = Place::new();
    place.agent("slow", "", "echo $LATTICE_ATTEMPT >> started; [ $LATTICE_ATTEMPT -ge 2 ] || sleep 300; echo attempt $LATTICE_ATTEMPT");
    let first = place.client_with(&QUICK).await;
    let id = first.assign("slow", "x").await;
    eventually("it starts", async || (place.file("started").lines().count() == 1).then_some(())).await;
    let second = place.client_with(&QUICK).await;
    kill(first).await;
    let work = second.settled(&id).await;
    assert_eq!(
        (work["status"].as_str(), work["result"].as_str(), work["attempt"].as_u64()),
        (Some("COMPLETE"), Some("attempt 2"), Some(2)),
        "{work}"
    );
    assert_eq!(place.file("started"), "1\n2\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_was_killed_takes_up_its_own_work_when_restarted_and_leaves_no_orphan() {
    let place = Place::new();
    place.agent("slow", "", "echo $$ >> started; [ $LATTICE_ATTEMPT -ge 2 ] || sleep 300; echo attempt $LATTICE_ATTEMPT");
    let first = place.client_with(&QUICK).await;
    let id = first.assign("slow", "x").await;
    eventually("it starts", async || (place.file("started").lines().count() == 1).then_some(())).await;
    kill(first).await;
    let again = place.client_with(&QUICK).await;
    assert_eq!(again.settled(&id).await["result"], "attempt 2");
    let orphan = place.file("started").lines().next().unwrap().to_owned();
    eventually("the orphan is gone", async || {
        let state = std::fs::read_to_string(format!("/proc/{orphan}/status")).unwrap_or_else(|_| "State:\tZ".into());
        state.contains("State:\tZ").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_slept_past_its_lease_settles_nothing_twice() {
    let place = Place::new();
    place.agent("gated", "", "echo $LATTICE_ATTEMPT >> started; while [ ! -e gate ]; do sleep 0.02; done; echo attempt $LATTICE_ATTEMPT");
    let sleeper = place.client_with(&QUICK).await;
    let id = sleeper.assign("gated", "x").await;
    eventually("it starts", async || (place.file("started").lines().count() == 1).then_some(())).await;
    let other = place.client_with(&QUICK).await;
    other.call("list_available_agents", json!({})).await;
    signal(sleeper.pid(), "STOP");
    eventually("another attempt starts", async || (place.file("started").lines().count() == 2).then_some(())).await;
    std::fs::write(place.agents.path().join("gate"), "").unwrap();
    let work = other.settled(&id).await;
    let settled = outcome(&other, &id).await;
    signal(sleeper.pid(), "CONT");
    assert_eq!(work["status"], "COMPLETE");
    assert_eq!(sleeper.settled(&id).await["result"], work["result"]);
    // One more work through the one that slept: whatever it still had to say of the old one has been said.
    let after = sleeper.assign("gated", "y").await;
    sleeper.settled(&after).await;
    assert_eq!(outcome(&sleeper, &id).await, settled);
    assert_eq!(outcome(&other, &id).await, settled);
}

#[tokio::test(flavor = "multi_thread")]
async fn work_of_a_killed_process_is_cancelled_by_whoever_is_there() {
    let place = Place::new();
    place.agent("slow", "", "echo x >> started; sleep 300");
    let first = place.client_with(&QUICK).await;
    let id = first.assign("slow", "x").await;
    eventually("it starts", async || (!place.file("started").is_empty()).then_some(())).await;
    // This one runs no such agent, so it can never take the work up.
    let elsewhere = tempfile::TempDir::new().unwrap();
    let mut command = crate::rpc::binary(place.data.path(), elsewhere.path());
    command.envs(QUICK);
    let other = Client::start(command).await;
    other.call("list_available_agents", json!({})).await;
    kill(first).await;
    eventually("it is cancelled", async || {
        let work = other.call("cancel_work", json!({"work_id": id, "reason": "its machine is gone"})).await;
        (work["status"] == "CANCELLED").then_some(())
    })
    .await;
    assert_eq!(place.file("started").lines().count(), 1, "it did not start again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_station_that_is_asked_to_stop_gives_grace_and_hands_back_the_rest() {
    let place = Place::new();
    place.agent("long", "", "echo $$ $LATTICE_ATTEMPT >> started; [ $LATTICE_ATTEMPT -ge 2 ] || sleep 300; echo attempt $LATTICE_ATTEMPT");
    place.agent("short", "", "echo x >> short-started; while [ ! -e gate ]; do sleep 0.02; done; echo short done");
    let quick = [("LATTICE_WORK_GRACE", "2s"), ("LATTICE_WORK_KILL_AFTER", "500ms"), ("LATTICE_RETRY_MAX_ATTEMPTS", "1")];
    let mut client = place.client_with(&quick).await;
    let long = client.assign("long", "x").await;
    let short = client.assign("short", "x").await;
    eventually("both run", async || (place.file("started").contains(" 1") && place.file("short-started").contains('x')).then_some(()))
        .await;
    signal(client.pid(), "TERM");
    std::fs::write(place.agents.path().join("gate"), "").unwrap();
    assert!(client.child.wait().await.unwrap().success());
    let pid = place.file("started").split(' ').next().unwrap().to_owned();
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "an agent's process stayed behind");
    let next = place.client_with(&quick).await;
    assert_eq!(next.settled(&short).await["result"], "short done", "it ended within its grace");
    let work = next.settled(&long).await;
    assert_eq!(work["result"], "attempt 2", "a hand-back burns no attempt: {work}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_under_load_burns_no_attempt() {
    let place = Place::new();
    place.agent("once", "limits: { max_attempts: 1, max_parallel: 4 }", "echo done");
    let elsewhere = tempfile::TempDir::new().unwrap();
    let mut leaf = place.client_with(&QUICK).await;
    leaf.call("list_available_agents", json!({})).await;
    let mut command = crate::rpc::binary(place.data.path(), elsewhere.path());
    command.envs(QUICK);
    let orders = Client::start(command).await;
    let mut ids = vec![];
    for _ in 0..4 {
        let pid = leaf.pid();
        let burst = (0..24).map(|n| orders.call("assign_work", json!({"agent_name": "once", "task": n.to_string()})));
        let (assigned, ()) = tokio::join!(futures_util::future::join_all(burst), async { signal(pid, "TERM") });
        ids.extend(assigned.iter().map(|work| work["work_id"].as_str().unwrap().to_owned()));
        assert!(leaf.child.wait().await.unwrap().success());
        leaf = place.client_with(&QUICK).await;
        leaf.call("list_available_agents", json!({})).await;
    }
    for id in &ids {
        let work = orders.settled(id).await;
        assert_eq!(work["status"], "COMPLETE", "{work}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_sleeps_again_and_again_keeps_its_healthy_work() {
    let place = Place::new();
    place.agent(
        "gated",
        "limits: { max_attempts: 2 }",
        "echo x >> started; while [ ! -e gate ]; do sleep 0.02; done; echo attempt $LATTICE_ATTEMPT",
    );
    let client = place.client_with(&[("LATTICE_WORK_LEASE", "2s")]).await;
    let id = client.assign("gated", "x").await;
    eventually("it starts", async || (!place.file("started").is_empty()).then_some(())).await;
    for _ in 0..3 {
        signal(client.pid(), "STOP");
        // Nothing can be awaited of a process that sleeps: its lease has to run out.
        tokio::time::sleep(Duration::from_millis(2600)).await;
        signal(client.pid(), "CONT");
        client.call("check_work", json!({"work_id": id})).await;
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    std::fs::write(place.agents.path().join("gate"), "").unwrap();
    let work = client.settled(&id).await;
    assert_eq!((work["status"].as_str(), work["result"].as_str()), (Some("COMPLETE"), Some("attempt 1")), "{work}");
    assert_eq!(place.file("started").lines().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_leaves_at_once() {
    let place = Place::new();
    place.agent("long", "", "echo $$ >> started; sleep 300");
    let mut client = place.client_with(&[("LATTICE_WORK_GRACE", "10m")]).await;
    client.assign("long", "x").await;
    eventually("it runs", async || (!place.file("started").is_empty()).then_some(())).await;
    signal(client.pid(), "TERM");
    let code = eventually("it leaves", async || {
        signal_if_there(client.child.id());
        client.child.try_wait().unwrap()
    })
    .await;
    assert_eq!(code.code(), Some(130));
    let pid = place.file("started").trim().to_owned();
    eventually("no agent stays", async || (!running(&pid)).then_some(())).await;
}

fn signal_if_there(pid: Option<u32>) {
    if let Some(pid) = pid {
        let _ = std::process::Command::new("kill").args(["-TERM", &pid.to_string()]).status();
    }
}

fn running(pid: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|status| !status.contains("State:\tZ"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_standard_input_stops_the_server() {
    let place = Place::new();
    let mut client = place.client().await;
    let id = client.assign("upper", "before the end").await;
    client.hang_up().await;
    let code = tokio::time::timeout(Duration::from_secs(60), client.child.wait()).await.expect("it ends").unwrap();
    assert!(code.success());
    let next = place.client().await;
    assert_eq!(next.settled(&id).await["result"], "BEFORE THE END");
}

/// Small random numbers that can be had again from the seed that was printed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_settled_twice_whoever_is_killed_whenever() {
    const ROUNDS: u64 = 8;
    const PROCESSES: usize = 3;
    let seed =
        std::env::var("LATTICE_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| u64::from(std::process::id()) * 7919);
    eprintln!("LATTICE_TEST_SEED={seed}");
    let mut dice = Dice(seed | 1);
    let place = Place::new();
    place.agent(
        "worker",
        "",
        "[ $(($(od -An -N1 -tu1 /dev/urandom) % 4)) -gt 0 ] || sleep 0.2; printf '%s by attempt %s' \"$LATTICE_TASK\" $LATTICE_ATTEMPT",
    );
    let mut clients = vec![];
    for _ in 0..PROCESSES {
        clients.push(place.client_with(&QUICK).await);
    }
    // Each work that was acknowledged, and what was seen of it once it had settled.
    let mut acknowledged: BTreeMap<String, (String, Option<Value>)> = BTreeMap::new();
    for round in 0..ROUNDS {
        let victim = usize::try_from(dice.below(PROCESSES as u64)).unwrap();
        let patience = Duration::from_millis(dice.below(250));
        let orders = clients.iter().enumerate().flat_map(|(at, client)| {
            (0..8).map(move |n| async move {
                let task = format!("r{round}c{at}n{n}");
                let answer = client.try_call("assign_work", json!({"agent_name": "worker", "task": task})).await;
                answer.map(|answer| (answer.expect("the order is good")["work_id"].as_str().unwrap().to_owned(), task))
            })
        });
        let pid = clients[victim].pid();
        let (answers, ()) = tokio::join!(futures_util::future::join_all(orders), async {
            tokio::time::sleep(patience).await;
            signal(pid, "KILL");
        });
        acknowledged.extend(answers.into_iter().flatten().map(|(id, task)| (id, (task, None))));
        kill(clients.remove(victim)).await;
        // Some are looked at in between: what has settled must stay as it is.
        for (id, (_, seen)) in acknowledged.iter_mut().filter(|(_, (_, seen))| seen.is_none()).take(10) {
            let now = outcome(&clients[0], id).await;
            if ["COMPLETE", "FAILED", "CANCELLED"].contains(&now[0].as_str().unwrap()) {
                *seen = Some(now);
            }
        }
        clients.push(place.client_with(&QUICK).await);
    }
    assert!(acknowledged.len() as u64 > ROUNDS * 8, "too few works to mean anything: {}", acknowledged.len());
    for (id, (task, seen)) in &acknowledged {
        let work = clients[0].settled(id).await;
        assert_eq!(work["status"], "COMPLETE", "{task}: {work}");
        assert!(work["result"].as_str().unwrap().starts_with(&format!("{task} by attempt ")), "{task}: {work}");
        let now = outcome(&clients[0], id).await;
        assert_eq!(seen.as_ref().unwrap_or(&now), &now, "{task} changed after it had settled");
        assert_eq!(outcome(&clients[1], id).await, now, "two processes disagree about {task}");
    }
    let runs: std::collections::BTreeSet<String> = futures_util::future::join_all(acknowledged.keys().map(|id| outcome(&clients[0], id)))
        .await
        .iter()
        .map(|work| work[4].to_string())
        .collect();
    assert_eq!(runs.len(), acknowledged.len(), "two works share a run id");
    eventually("nothing is outstanding", async || {
        let answer = clients[0].call("check_work", json!({})).await;
        (answer["outstanding"] == 0 || answer["outstanding"]["count"] == 0 || answer["works"] == json!([])).then_some(())
    })
    .await;
    let last = clients.pop().unwrap();
    reaches(&last, acknowledged.keys().next().unwrap(), "COMPLETE").await;
}

/// An agent that asks, and says each time that it has been started.
fn asker(place: &Place) {
    let script = "echo $$ >> started\nread -r work\necho '::lattice {\"escalate\": {\"reason\": \"which colour?\"}}'\nread -r answer\nprintf 'it is %s' \"$answer\"\n";
    std::fs::write(place.agents.path().join("asker.sh"), script).unwrap();
    let front = "name: asker\ndescription: asks\nrunner: { kind: command, interactive: true, command: [sh, asker.sh] }\nlimits: { max_attempts: 2 }";
    std::fs::write(place.agents.path().join("asker.md"), format!("---\n{front}\n---\n")).unwrap();
}

async fn asks_again(place: &Place, client: &Client, id: &str, times: usize) {
    eventually("it asks again", async || {
        let work = client.call("check_work", json!({"work_id": id})).await;
        let work = work["works"].get(0).cloned().unwrap_or(work);
        (place.file("started").lines().count() == times && work["status"] == "ESCALATED" && work["attempt"] == times).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_killed_while_it_waits_for_an_answer_has_failed_at_nothing() {
    let place = Place::new();
    asker(&place);
    let quick = [QUICK[0]];
    let mut client = place.client_with(&quick).await;
    let id = client.assign("asker", "x").await;
    for times in 1..=4 {
        asks_again(&place, &client, &id, times).await;
        kill(client).await;
        client = place.client_with(&quick).await;
    }
    asks_again(&place, &client, &id, 5).await;
    client.call("answer_work", json!({"work_id": id, "answer": "blue"})).await;
    let work = client.settled(&id).await;
    assert!(work["status"] == "COMPLETE" && work["result"].to_string().contains("blue"), "{work}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_an_answer_gets_no_grace_when_the_station_stops() {
    let place = Place::new();
    asker(&place);
    let client = place.client_with(&[("LATTICE_WORK_GRACE", "10m")]).await;
    let id = client.assign("asker", "x").await;
    asks_again(&place, &client, &id, 1).await;
    client.hang_up().await;
    let mut client = client;
    assert!(client.child.wait().await.unwrap().success());
    let again = place.client().await;
    asks_again(&place, &again, &id, 2).await;
    again.call("answer_work", json!({"work_id": id, "answer": "blue"})).await;
    let result = again.settled(&id).await["result"].to_string();
    assert!(result.contains("it is") && result.contains("blue"), "{result}");
}

/// Clients close the input, then send TERM, then kill.
#[tokio::test(flavor = "multi_thread")]
async fn a_signal_after_the_end_of_the_input_hands_back_at_once() {
    let place = Place::new();
    asker(&place);
    place.agent(
        "slow",
        "limits: { max_attempts: 1 }",
        "echo x >> slow; [ $LATTICE_ATTEMPT -ge 2 ] || sleep 300; echo attempt $LATTICE_ATTEMPT",
    );
    let mut client = place.client_with(&[("LATTICE_WORK_GRACE", "10m")]).await;
    let id = client.assign("slow", "x").await;
    eventually("it starts", async || (place.file("slow").lines().count() == 1).then_some(())).await;
    let asks = client.assign("asker", "x").await;
    asks_again(&place, &client, &asks, 1).await;
    client.hang_up().await;
    // What waits is handed back as soon as the end of the input is heard.
    let other = place.client().await;
    asks_again(&place, &other, &asks, 2).await;
    signal(client.pid(), "TERM");
    assert!(client.child.wait().await.unwrap().success());
    assert_eq!(other.settled(&id).await["result"], "attempt 2");
}
