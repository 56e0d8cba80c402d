//! The life of a work, through the real binary: assigned, run, waited for, retried, cancelled, answered.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::rpc::{Client, agent, binary};

/// A data folder and an agents folder.
pub(crate) struct Place {
    pub(crate) data: TempDir,
    pub(crate) agents: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let place = Self { data: TempDir::new().unwrap(), agents: TempDir::new().unwrap() };
        place.agent("upper", "", "printf '%s' \"$LATTICE_TASK\" | tr a-z A-Z");
        place
    }

    pub(crate) fn agent(&self, name: &str, front: &str, script: &str) {
        agent(self.agents.path(), name, front, script);
    }

    pub(crate) async fn client(&self) -> Client {
        self.client_with(&[]).await
    }

    pub(crate) async fn client_with(&self, variables: &[(&str, &str)]) -> Client {
        let mut command = binary(self.data.path(), self.agents.path());
        command.envs(variables.iter().copied());
        Client::start(command).await
    }

    pub(crate) fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.agents.path().join(name)).unwrap_or_default()
    }
}

/// Waits until something is so; the condition is asked again and again, and the test fails when it never is.
pub(crate) async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let until = Instant::now() + Duration::from_secs(60);
    while Instant::now() < until {
        if let Some(found) = probe().await {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("never: {what}");
}

async fn status(client: &Client, work_id: &str) -> Value {
    let answer = client.call("check_work", json!({"work_id": work_id})).await;
    answer["works"].get(0).cloned().unwrap_or(answer)
}

pub(crate) async fn reaches(client: &Client, work_id: &str, wanted: &str) -> Value {
    eventually(wanted, async || Some(status(client, work_id).await).filter(|work| work["status"] == wanted)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn work_is_assigned_awaited_and_checked_any_number_of_times_from_any_process() {
    let place = Place::new();
    let client = place.client().await;
    let assigned = client.call("assign_work", json!({"agent_name": "upper", "task": "hello"})).await;
    assert_eq!(assigned["status"], "ASSIGNED");
    let run = assigned["run_id"].as_str().unwrap();
    assert_eq!(run, format!("{}-1", assigned["root_run_id"].as_str().unwrap()));
    let id = assigned["work_id"].as_str().unwrap();
    for _ in 0..3 {
        let work = client.settled(id).await;
        assert_eq!(
            (work["status"].as_str(), work["result"].as_str(), work["event"].as_str()),
            (Some("COMPLETE"), Some("HELLO"), Some("WORK_COMPLETE"))
        );
        assert_eq!(status(&client, id).await["result"], "HELLO");
    }
    let other = place.client().await;
    assert_eq!(other.settled(id).await["result"], "HELLO");
    drop((client, other));
    let restarted = place.client().await;
    assert_eq!(status(&restarted, id).await["result"], "HELLO");
    assert_eq!(restarted.settled(id).await["result"], "HELLO");
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_assigned_at_once_are_siblings_with_numbers_of_their_own() {
    let place = Place::new();
    let client = place.client().await;
    let calls = (0..64).map(|n| client.call("assign_work", json!({"agent_name": "upper", "task": format!("n{n}")})));
    let assigned = futures_util::future::join_all(calls).await;
    let mut runs: Vec<&str> = assigned.iter().map(|work| work["run_id"].as_str().unwrap()).collect();
    runs.sort_unstable();
    runs.dedup();
    assert_eq!(runs.len(), 64);
    let roots: std::collections::BTreeSet<&str> = assigned.iter().map(|work| work["root_run_id"].as_str().unwrap()).collect();
    assert_eq!(roots.len(), 1, "one connection's works share a root");
    let numbers: std::collections::BTreeSet<u64> = runs.iter().map(|run| run.rsplit('-').next().unwrap().parse().unwrap()).collect();
    assert_eq!(numbers, (1..=64).collect());
    let ids: Vec<&Value> = assigned.iter().map(|work| &work["work_id"]).collect();
    let settled = eventually("all settle", async || {
        let answer = client.call("await_work", json!({"work_ids": ids, "timeout": "30s"})).await;
        let works = answer["works"].as_array().unwrap().clone();
        works.iter().all(|work| work["status"] == "COMPLETE").then_some(works)
    })
    .await;
    for (n, work) in settled.iter().enumerate() {
        assert_eq!(work["result"], format!("N{n}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_most_urgent_goes_first_and_the_older_among_equals() {
    let place = Place::new();
    place.agent("single", "limits: { max_parallel: 1 }", "while [ ! -e gate ]; do sleep 0.02; done; echo \"$LATTICE_TASK\" >> order");
    let client = place.client().await;
    let first = client.assign("single", "first").await;
    reaches(&client, &first, "ACCEPTED").await;
    let mut ids = vec![];
    for (task, priority) in [("low", -5), ("a", 0), ("b", 0), ("urgent", 9)] {
        let assigned = client.call("assign_work", json!({"agent_name": "single", "task": task, "priority": priority})).await;
        ids.push(assigned["work_id"].as_str().unwrap().to_owned());
    }
    // Another agent is not held up by the busy one.
    let other = client.assign("upper", "other").await;
    assert_eq!(client.settled(&other).await["result"], "OTHER");
    std::fs::write(place.agents.path().join("gate"), "").unwrap();
    for id in &ids {
        client.settled(id).await;
    }
    assert_eq!(place.file("order").lines().collect::<Vec<_>>(), ["first", "urgent", "a", "b", "low"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn queued_work_is_cancelled_at_once_and_never_starts() {
    let place = Place::new();
    place.agent("single", "limits: { max_parallel: 1 }", "while [ ! -e gate ]; do sleep 0.02; done; echo \"$LATTICE_TASK\" >> order");
    let client = place.client().await;
    let first = client.assign("single", "first").await;
    reaches(&client, &first, "ACCEPTED").await;
    let queued = client.assign("single", "second").await;
    let cancelled = client.call("cancel_work", json!({"work_id": queued, "reason": "not needed"})).await;
    assert_eq!(cancelled["status"], "CANCELLED", "{cancelled}");
    std::fs::write(place.agents.path().join("gate"), "").unwrap();
    client.settled(&first).await;
    let last = client.assign("single", "third").await;
    client.settled(&last).await;
    assert_eq!(place.file("order"), "first\nthird\n");
    assert_eq!(status(&client, &queued).await["status"], "CANCELLED");
}

#[tokio::test(flavor = "multi_thread")]
async fn running_work_is_cancelled_with_its_whole_process_tree() {
    let place = Place::new();
    place.agent(
        "stubborn",
        "",
        "trap '' TERM; echo $$ > pids; (trap '' TERM; setsid sh -c 'echo $$ >> pids; sleep 300' & sleep 300) & sleep 300",
    );
    let client = place.client_with(&[("LATTICE_WORK_KILL_AFTER", "500ms")]).await;
    let id = client.assign("stubborn", "go").await;
    eventually("the agent runs", async || (place.file("pids").lines().count() == 2).then_some(())).await;
    let pids: Vec<String> = place.file("pids").lines().map(str::to_owned).collect();
    let cancelled = client.call("cancel_work", json!({"work_id": id, "reason": "enough"})).await;
    assert_eq!(cancelled["status"], "CANCELLED", "{cancelled}");
    for pid in pids {
        let gone = |state: String| state.contains("State:\tZ");
        assert!(std::fs::read_to_string(format!("/proc/{pid}/status")).map_or(true, gone), "process {pid} is still there");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_timeout_says_which_one_it_was() {
    let place = Place::new();
    place.agent("sleeper", "limits: { max_parallel: 1 }", "sleep 300");
    place.agent("silent", "limits: { silence: 300ms }", "echo one >&2; sleep 300");
    let client = place.client().await;
    let assign = async |agent: &str, timeout: &str| {
        let work = client.call("assign_work", json!({"agent_name": agent, "task": "x", "timeout": timeout})).await;
        work["work_id"].as_str().unwrap().to_owned()
    };
    let silent = assign("silent", "60s").await;
    let total = assign("sleeper", "3s").await;
    reaches(&client, &total, "ACCEPTED").await;
    let queued = assign("sleeper", "500ms").await;
    for (id, kind, word) in
        [(queued, "queue_timeout", "queue"), (silent, "silence_timeout", "said nothing"), (total, "total_timeout", "in all")]
    {
        let work = client.settled(&id).await;
        assert_eq!((work["status"].as_str(), work["error"]["kind"].as_str()), (Some("FAILED"), Some(kind)), "{work}");
        assert!(work["error"]["message"].as_str().unwrap().contains(word), "{work}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_worth_it_is_retried_and_attempts_run_out() {
    let place = Place::new();
    place.agent("moody", "", "echo x >> tries; [ \"$LATTICE_ATTEMPT\" -ge 3 ] || exit 75; echo fine");
    place.agent("hopeless", "limits: { max_attempts: 2 }", "echo 'quota gone' >&2; exit 75");
    place.agent("broken", "", "echo 'no such luck' >&2; exit 3");
    let client = place.client_with(&[("LATTICE_RETRY_INITIAL_DELAY", "50ms")]).await;
    let moody = client.assign("moody", "x").await;
    let work = client.settled(&moody).await;
    assert_eq!((work["status"].as_str(), work["result"].as_str()), (Some("COMPLETE"), Some("fine")), "{work}");
    assert_eq!(place.file("tries").lines().count(), 3);
    let hopeless = client.assign("hopeless", "x").await;
    let work = client.settled(&hopeless).await;
    assert_eq!(work["status"], "FAILED");
    assert_eq!(work["dead_letter"], true, "{work}");
    assert!(work.to_string().contains("quota gone"), "{work}");
    let broken = client.assign("broken", "x").await;
    let work = client.settled(&broken).await;
    assert_eq!((work["error"]["kind"].as_str(), work["error"]["exit_code"].as_i64()), (Some("agent"), Some(3)), "{work}");
    assert!(work.to_string().contains("no such luck"));
    assert!(work.get("dead_letter").is_none(), "a plain failure was not retried");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interactive_agent_asks_and_goes_on_with_the_answer() {
    let place = Place::new();
    let script = r#"read -r order; printf '::lattice {"escalate": {"reason": "which colour?", "context": {"options": ["red", "blue"]}}}\n'; read -r answer; printf '%s' "$answer""#;
    place.agent("asker", "", script);
    let text = place.file("asker.md").replace("./asker.sh\"]", "./asker.sh\"], interactive: true");
    std::fs::write(place.agents.path().join("asker.md"), text).unwrap();
    let client = place.client().await;
    let id = client.assign("asker", "paint").await;
    let work = client.settled(&id).await;
    assert_eq!(work["status"], "ESCALATED", "await_work returns when the agent asks");
    assert_eq!(work["question"]["reason"], "which colour?");
    assert_eq!(work["question"]["context"]["options"][1], "blue");
    client.call("answer_work", json!({"work_id": id, "answer": "blue"})).await;
    let refused = client.refusal("answer_work", json!({"work_id": id, "answer": "red"})).await;
    assert!(refused.contains(&id), "{refused}");
    let work = eventually("it completes", async || Some(client.settled(&id).await).filter(|work| work["status"] == "COMPLETE")).await;
    let heard: Value = serde_json::from_str(work["result"].as_str().unwrap()).unwrap();
    assert_eq!((&heard["answer"], &heard["reason"]), (&json!("blue"), &json!("which colour?")), "{work}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_cannot_wait_is_started_again_with_the_answer() {
    let place = Place::new();
    let script = r#"order=$(cat); case "$order" in *'"answer":"blue"'*) echo "painted blue";; *) printf '::lattice {"escalate": {"reason": "which colour?"}}\n';; esac"#;
    place.agent("asker", "", script);
    let client = place.client().await;
    let id = client.assign("asker", "paint").await;
    assert_eq!(client.settled(&id).await["status"], "ESCALATED");
    drop(client);
    // Nobody was there when the answer came; the work goes on all the same.
    let client = place.client().await;
    client.call("answer_work", json!({"work_id": id, "answer": "blue"})).await;
    let work = eventually("it completes", async || Some(client.settled(&id).await).filter(|work| work["status"] == "COMPLETE")).await;
    assert_eq!(work["result"], "painted blue");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_nobody_answers_ends_the_work() {
    let place = Place::new();
    let script = r#"read -r order; printf '::lattice {"escalate": {"reason": "anybody?"}}\n'; read -r answer; echo "$answer""#;
    place.agent("asker", "", script);
    let text = place.file("asker.md").replace("./asker.sh\"]", "./asker.sh\"], interactive: true");
    std::fs::write(place.agents.path().join("asker.md"), text).unwrap();
    let client = place.client_with(&[("LATTICE_WORK_ANSWER_TIMEOUT", "1s")]).await;
    let id = client.assign("asker", "x").await;
    assert_eq!(client.settled(&id).await["status"], "ESCALATED");
    let work = reaches(&client, &id, "FAILED").await;
    assert!(work["error"]["message"].as_str().unwrap().contains("nobody answered"), "{work}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_question_asked_again_after_its_answer_is_a_new_one() {
    let place = Place::new();
    place.agent("waits", "", "while [ ! -e gate ]; do sleep 0.02; done");
    let (asker, other) = (place.client().await, place.client().await);
    let id = asker.assign("waits", "x").await;
    reaches(&asker, &id, "ACCEPTED").await;
    for answer in ["first", "second"] {
        let ask = asker.call("escalate", json!({"work_id": id, "reason": "proceed?"}));
        let (asked, ()) = tokio::join!(ask, async {
            reaches(&other, &id, "ESCALATED").await;
            other.call("answer_work", json!({"work_id": id, "answer": answer})).await;
        });
        assert_eq!(asked["answer"], answer, "{asked}");
    }
    std::fs::write(place.agents.path().join("gate"), "").unwrap();
    assert_eq!(asker.settled(&id).await["status"], "COMPLETE");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_order_leaves_its_idempotency_key_free() {
    let place = Place::new();
    let client = place.client().await;
    let huge = "x".repeat((8 << 20) + 1);
    client.refusal("assign_work", json!({"agent_name": "upper", "task": huge, "idempotency_key": "k"})).await;
    let assigned = client.call("assign_work", json!({"agent_name": "upper", "task": "small", "idempotency_key": "k"})).await;
    assert_eq!(client.settled(assigned["work_id"].as_str().unwrap()).await["result"], "SMALL");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_assigns_and_escalates_as_a_child_through_its_own_connection() {
    let place = Place::new();
    std::fs::write(place.agents.path().join("child.py"), concat!(include_str!("calls.py"), include_str!("child.py"))).unwrap();
    place.agent("parent", "", "cat > /dev/null; exec python3 ./child.py");
    let client = place.client().await;
    let assigned = client.call("assign_work", json!({"agent_name": "parent", "task": "go"})).await;
    let id = assigned["work_id"].as_str().unwrap();
    let work = client.settled(id).await;
    assert_eq!(work["status"], "ESCALATED", "{work}");
    assert_eq!(work["question"]["reason"], "may I?");
    client.call("answer_work", json!({"work_id": id, "answer": "yes"})).await;
    let work = eventually("it completes", async || Some(client.settled(id).await).filter(|work| work["status"] != "ESCALATED")).await;
    assert_eq!(work["status"], "COMPLETE", "{work}");
    let text = work["result"].as_str().unwrap();
    let report: Value = serde_json::from_str(text).unwrap();
    assert_eq!(report["child_run"], format!("{}-1", assigned["run_id"].as_str().unwrap()));
    assert_eq!(report["child_result"], "FROM BELOW");
    assert_eq!(report["answer"], "yes");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_idempotency_key_is_the_same_work_also_at_once_and_after_a_restart() {
    let place = Place::new();
    place.agent("count", "", "echo x >> ran");
    let (one, two) = (place.client().await, place.client().await);
    let order = json!({"agent_name": "count", "task": "once", "idempotency_key": "k1"});
    let calls = (0..16).map(|n| if n % 2 == 0 { one.call("assign_work", order.clone()) } else { two.call("assign_work", order.clone()) });
    let ids: std::collections::BTreeSet<String> =
        futures_util::future::join_all(calls).await.iter().map(|work| work["work_id"].to_string()).collect();
    assert_eq!(ids.len(), 1);
    let id: String = serde_json::from_str(ids.first().unwrap()).unwrap();
    one.settled(&id).await;
    drop((one, two));
    let again = place.client().await;
    assert_eq!(again.call("assign_work", order).await["work_id"], id);
    let refused = again.refusal("assign_work", json!({"agent_name": "count", "task": "twice", "idempotency_key": "k1"})).await;
    assert!(refused.contains("k1") && refused.contains(&id), "{refused}");
    assert_eq!(place.file("ran").lines().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_orders_are_refused_with_the_value_and_the_next_step() {
    let place = Place::new();
    place.agent("strict", "input: { schema: { type: object, properties: { path: { type: string }, deep: { type: object, properties: { n: { type: integer } } } }, required: [path] } }", "echo ok");
    let client = place.client().await;
    let long = "x".repeat(65);
    let cases = [
        (json!({"agent_name": "uper", "task": "x"}), vec!["uper", "upper", "strict"]),
        (json!({"agent_name": "up.per", "task": "x"}), vec!["'.'", "position 3"]),
        (json!({"agent_name": "up per", "task": "x"}), vec!["' '"]),
        (json!({"agent_name": long, "task": "x"}), vec!["65"]),
        (json!({"agent_name": "strict", "task": "x"}), vec!["path"]),
        (json!({"agent_name": "strict", "task": "x", "context": {"path": "p", "deep": {"n": "one"}}}), vec!["/deep/n", "one"]),
        (json!({"agent_name": "upper", "task": "x", "timeout": "5 minutes"}), vec!["5 minutes", "30s"]),
        (json!({"agent_name": "upper", "task": "x", "timeout": "-5m"}), vec!["-5m"]),
        (json!({"agent_name": "upper", "task": "x", "timeout": "0s"}), vec!["0s"]),
        (json!({"agent_name": "upper", "task": "x", "timeout": "99999d"}), vec!["99999d"]),
        (json!({"agent_name": "upper", "task": "x", "priority": 99_999_999_999i64}), vec!["99999999999", "1000"]),
        (json!({"agent_name": "upper", "task": "x", "priority": -1001}), vec!["-1001"]),
        (json!({"agent_name": "upper", "task": "x", "station": "nowhere"}), vec!["nowhere"]),
        (json!({"agent_name": "upper", "task": "x", "run_id": "abc"}), vec!["abc"]),
        (json!({"agent_name": "upper", "task": "x", "run_id": "0198f2c4-7d3e-7000-8000-1b2c3d4e5f60"}), vec!["0198f2c4"]),
        (json!({"agent_name": "upper", "task": "x", "idempotency_key": ""}), vec!["idempotency_key"]),
    ];
    for (arguments, words) in cases {
        let refused = client.refusal("assign_work", arguments.clone()).await;
        for word in words {
            assert!(refused.contains(word), "{arguments}: {word:?} is missing in: {refused}");
        }
    }
    for (tool, arguments) in [
        ("check_work", json!({"work_id": "0198f2c4-7d3e-7000-8000-1b2c3d4e5f60"})),
        ("await_work", json!({"work_id": "0198f2c4-7d3e-7000-8000-1b2c3d4e5f60"})),
        ("cancel_work", json!({"work_id": "0198f2c4-7d3e-7000-8000-1b2c3d4e5f60"})),
        ("answer_work", json!({"work_id": "0198f2c4-7d3e-7000-8000-1b2c3d4e5f60", "answer": "x"})),
        ("check_work", json!({"work_id": "not-an-id"})),
        ("await_work", json!({})),
        ("get_agent_schema", json!({"agent_name": "uper"})),
        ("escalate", json!({"reason": "help"})),
    ] {
        let refused = client.refusal(tool, arguments.clone()).await;
        assert!(refused.len() > 30, "{tool} {arguments}: {refused}");
    }
    assert_eq!(client.settled(&client.assign("upper", "alive").await).await["result"], "ALIVE");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_of_any_characters_and_a_megabyte_arrives_whole() {
    let place = Place::new();
    place.agent("digest", "", "cat | sha256sum; echo \"$1\"");
    place.agent("argument", "", "printf '%s' \"$1\"");
    let text = place.file("argument.md").replace("./argument.sh\"]", "./argument.sh\", \"{task}\"]");
    std::fs::write(place.agents.path().join("argument.md"), text).unwrap();
    place.agent("whole", "", "cat | sed 's/.*\"task\":\"\\(x*\\)\".*/\\1/' | wc -c");
    let client = place.client().await;
    let rude = "-rf \"quotes\" 'single' $(touch pwned) `touch pwned` ; touch pwned\nnewline\t\\ {prompt} é 🦀";
    let id = client.assign("argument", rude).await;
    assert_eq!(client.settled(&id).await["result"], rude);
    assert!(!place.agents.path().join("pwned").exists());
    let id = client.assign("whole", &"x".repeat(1 << 20)).await;
    assert_eq!(client.settled(&id).await["result"].as_str().unwrap().trim(), ((1 << 20) + 1).to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_of_a_hundred_megabytes_is_kept_whole_and_read_in_parts() {
    let place = Place::new();
    place.agent("huge", "", "i=0; awk 'BEGIN { for (i = 1; i <= 1000000; i++) printf \"line %07d %s\\n\", i, \"0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567\" }'");
    let client = place.client_with(&[("LATTICE_RESULTS_SEARCH_TIMEOUT", "60s")]).await;
    let before = resident_kib(client.pid());
    let id = client.assign("huge", "x").await;
    let work = client.settled(&id).await;
    assert_eq!(work["status"], "COMPLETE", "{work}");
    assert!(work.get("result").is_none() && work["result_ref"]["size"].as_u64().unwrap() > 100_000_000, "{work}");
    assert_eq!(work["result_ref"]["sha256"].as_str().unwrap().len(), 64);
    let lines = client.call("check_work", json!({"work_id": id, "lines": "500000-500001"})).await.to_string();
    assert!(lines.contains("line 0500000") && lines.contains("line 0500001") && !lines.contains("0500002"), "{lines}");
    let found = client.call("check_work", json!({"work_id": id, "grep": "line 0777777"})).await.to_string();
    assert!(found.contains("line 0777777"), "{found}");
    let bytes = client.call("check_work", json!({"work_id": id, "bytes": "0-11"})).await.to_string();
    assert!(bytes.contains("line 0000001"), "{bytes}");
    let grown = resident_kib(client.pid()).saturating_sub(before);
    assert!(grown < 60 * 1024, "memory grew by {grown} KiB");
}

pub(crate) fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_file_changes_the_lattice_and_a_broken_one_leaves_the_rest_alone() {
    let place = Place::new();
    let client = place.client().await;
    client.settled(&client.assign("upper", "warm").await).await;
    place.agent("late", "", "echo late");
    let names = async || client.call("list_available_agents", json!({})).await.to_string();
    eventually("the new agent is listed", async || names().await.contains("\"late\"").then_some(())).await;
    std::fs::write(place.agents.path().join("upper.md"), "---\nname: upper\ndescription: [broken\n---\n").unwrap();
    place.agent("third", "", "echo third");
    eventually("the third agent is listed", async || names().await.contains("\"third\"").then_some(())).await;
    assert_eq!(client.settled(&client.assign("upper", "still").await).await["result"], "STILL", "the last good version runs");
    std::fs::remove_file(place.agents.path().join("late.md")).unwrap();
    eventually("the removed agent is gone", async || (!names().await.contains("\"late\"")).then_some(())).await;
}
