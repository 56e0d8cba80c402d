//! An agent's word that it is done: claimed, verified or refuted, by what is looked at outside the agent.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::lifecycle::{Place, eventually};
use crate::runner_bench::is_alive;
use crate::stage::{Stage, done};

fn hex(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes its work into files named by attempt, and mends its ways when it is told what was wrong.
const MAKER: &str = r#"printf '%s' "$LATTICE_CONTEXT" > "context.$LATTICE_ATTEMPT"
cat > "order.$LATTICE_ATTEMPT"
case "$LATTICE_CONTEXT" in *"still a draft"*) echo good > out.txt;; *) echo draft > out.txt;; esac
echo made"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_refuted_claim_is_tried_again_with_the_evidence_and_then_verified() {
    for stage in Stage::both() {
        stage.place.agent("maker", "", MAKER);
        let (client, _leaf) = stage.open(&["maker", "upper"]).await;
        let check = "cat > result.txt; echo looking; grep -q good out.txt || { echo still a draft >&2; exit 7; }";
        let accept = json!({"command": ["sh", "-c", check], "paths": ["out.txt"], "schema": {"const": "made"}});
        let order = json!({"agent_name": "maker", "task": "make it", "context": {"own": 1}, "accept": accept});
        let work = done(&client, order).await;
        assert_eq!((&work["status"], &work["claim"], &work["attempt"]), (&json!("COMPLETE"), &json!("verified"), &json!(2)), "{work}");
        let checks = work["checks"].as_array().unwrap();
        let what: Vec<&str> = checks.iter().map(|check| check["what"].as_str().unwrap()).collect();
        assert_eq!(what, ["paths", "schema", "command"]);
        assert!(checks.iter().all(|check| check["ok"] == true), "{work}");
        assert_eq!((&checks[2]["exit_code"], &checks[2]["output"]), (&json!(0), &json!("looking\n")));
        assert_eq!(checks[2]["sha256"], hex("looking\n"));
        assert_eq!(stage.place.file("result.txt"), "made", "the check reads the result");
        // The first attempt knew nothing; the second was told, beside its own context.
        assert_eq!(stage.place.file("context.1"), r#"{"own":1}"#);
        let context: Value = serde_json::from_str(&stage.place.file("context.2")).unwrap();
        let refuted = &context["lattice_refuted"];
        assert_eq!((&context["own"], &refuted["attempt"], &refuted["checks"][0]["exit_code"]), (&json!(1), &json!(1), &json!(7)));
        let order: Value = serde_json::from_str(&stage.place.file("order.2")).unwrap();
        assert_eq!(order["context"], context);
        // The log has it all, and so have the command line and the run store.
        let id = work["work_id"].as_str().unwrap();
        let shown = stage.said(&["work", id, "--json"]).await;
        let of_type = |kind: &str| shown["events"].as_array().unwrap().iter().find(|event| event["type"] == kind).unwrap().clone();
        let retrying = of_type("WORK_RETRYING");
        assert_eq!(retrying["error"]["kind"], "refuted");
        assert!(retrying["error"]["checks"][2]["output"].as_str().unwrap().contains("still a draft"), "{retrying}");
        assert_eq!(of_type("WORK_COMPLETE")["checks"], shown["checks"]);
        assert_eq!(shown["claim"], "verified");
        assert!(stage.said(&["work", id]).await.as_str().unwrap().contains("looking"));
        let listed = client.call("check_work", json!({"run_id": work["run_id"]})).await;
        assert_eq!((&listed["works"][0]["claim"], &listed["works"][0]["checks"]), (&work["claim"], &work["checks"]), "{listed}");
        // Nobody looked at this one.
        let plain = done(&client, json!({"agent_name": "upper", "task": "x"})).await;
        assert_eq!((&plain["status"], &plain["claim"], plain.get("checks")), (&json!("COMPLETE"), &json!("claimed"), None), "{plain}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_never_holds_fails_with_the_evidence() {
    for stage in Stage::both() {
        stage.place.agent("liar", "limits: { max_attempts: 2 }", "echo x >> ran; echo all done");
        let (client, _leaf) = stage.open(&["liar"]).await;
        let accept = json!({"command": ["sh", "-c", "echo the tests are red; exit 3"], "paths": ["ran", "never/made"]});
        let work = done(&client, json!({"agent_name": "liar", "task": "x", "accept": accept})).await;
        let error = &work["error"];
        assert_eq!((&work["status"], &work["claim"], &error["kind"]), (&json!("FAILED"), &json!("refuted"), &json!("refuted")), "{work}");
        assert_eq!((&error["exit_code"], &work["dead_letter"]), (&json!(3), &json!(true)), "{work}");
        assert_eq!(error["evidence"], "the tests are red\n");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("never/made does not exist") && message.contains("exit code 3"), "{message}");
        assert_eq!(work["checks"][1]["sha256"], hex("the tests are red\n"));
        assert_eq!(stage.place.file("ran").lines().count(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn checks_that_hang_or_flood_are_stopped_with_all_that_they_started() {
    for mut stage in Stage::both() {
        stage.set("LATTICE_RETRY_MAX_ATTEMPTS", "1");
        stage.set("LATTICE_WORK_KILL_AFTER", "300ms");
        stage.set("LATTICE_RUNNER_ACCEPT_OUTPUT_MAX", "64KiB");
        let (client, _leaf) = stage.open(&["upper"]).await;
        let stubborn =
            "trap '' TERM; echo $$ > pids; (trap '' TERM; setsid sh -c 'echo $$ >> pids; sleep 300' & sleep 300) & echo begun; sleep 300";
        let hangs = json!({"command": ["sh", "-c", stubborn], "timeout": "1s"});
        let floods = json!({"command": ["sh", "-c", "echo $$ > flood; exec yes"]});
        for (accept, word, file, count) in [(hangs, "did not end within 1s", "pids", 2), (floods, "printed more than 64KiB", "flood", 1)] {
            let work = done(&client, json!({"agent_name": "upper", "task": "x", "accept": accept})).await;
            assert_eq!((&work["status"], &work["error"]["kind"]), (&json!("FAILED"), &json!("refuted")), "{work}");
            assert!(work["error"]["message"].as_str().unwrap().contains(word), "{work}");
            assert!(work.to_string().len() < 12_000, "the evidence is bounded");
            let pids = stage.place.file(file);
            assert_eq!(pids.lines().count(), count);
            assert!(!pids.lines().any(is_alive), "what the check started is gone");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_work_is_cancelled_and_timed_out_while_its_claim_is_checked() {
    for mut stage in Stage::both() {
        stage.set("LATTICE_WORK_KILL_AFTER", "300ms");
        stage.place.agent("quick", "limits: { silence: 400ms }", "echo done");
        let (client, _leaf) = stage.open(&["quick"]).await;
        let accept = |file: &str| json!({"command": ["sh", "-c", format!("echo $$ > {file}; sleep 300")], "timeout": "1h"});
        let assigned = client.call("assign_work", json!({"agent_name": "quick", "task": "x", "accept": accept("first")})).await;
        let id = assigned["work_id"].as_str().unwrap();
        let pid = eventually("it is checked", async || Some(stage.place.file("first")).filter(|pid| pid.ends_with('\n'))).await;
        let work = client.call("check_work", json!({"work_id": id})).await;
        assert!(work["status"] == "ACCEPTED" && work.get("claim").is_none(), "{work}");
        let cancelled = client.call("cancel_work", json!({"work_id": id})).await;
        assert_eq!(cancelled["status"], "CANCELLED", "{cancelled}");
        assert!(!is_alive(&pid));
        // The agent is silent meanwhile, and that does not count: the total does.
        let work = done(&client, json!({"agent_name": "quick", "task": "x", "timeout": "3s", "accept": accept("second")})).await;
        assert_eq!((&work["status"], &work["error"]["kind"]), (&json!("FAILED"), &json!("total_timeout")), "{work}");
        assert!(!is_alive(&stage.place.file("second")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_whose_process_dies_is_made_again_and_nothing_of_it_stays() {
    for mut stage in Stage::both() {
        stage.set("LATTICE_WORK_LEASE", "2s");
        stage.place.agent("worker", "", "echo x >> ran; echo done");
        let (mut client, leaf) = stage.open(&["worker"]).await;
        let check = "echo $$ >> pids; [ -e pass ] || sleep 300";
        let order = json!({"agent_name": "worker", "task": "x", "accept": {"command": ["sh", "-c", check]}});
        let assigned = client.call("assign_work", order).await;
        let pid = eventually("it is checked", async || Some(stage.place.file("pids")).filter(|pids| pids.ends_with('\n'))).await;
        match leaf {
            Some(mut leaf) => leaf.kill().await.unwrap(),
            None => client.child.kill().await.unwrap(),
        }
        assert!(is_alive(&pid), "nobody was there to stop it");
        std::fs::write(stage.place.agents.path().join("pass"), "").unwrap();
        let (client, _leaf) = stage.open(&["worker"]).await;
        let work = client.settled(assigned["work_id"].as_str().unwrap()).await;
        assert_eq!((&work["claim"], &work["attempt"]), (&json!("verified"), &json!(2)), "{work}");
        assert_eq!((stage.place.file("ran").lines().count(), stage.place.file("pids").lines().count()), (2, 2));
        assert!(!is_alive(&pid), "the first check is still there");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn results_are_held_against_a_schema_and_paths_stay_in_the_directory() {
    let place = Place::new();
    place.agent("counter", "", "echo '{\"count\": \"three\"}'");
    place.agent("lister", "", "echo '[1, 2]'");
    place.agent("large", "", "yes word | head -n 20000");
    std::os::unix::fs::symlink("/etc", place.agents.path().join("way-out")).unwrap();
    let client = place.client_with(&[("LATTICE_RETRY_MAX_ATTEMPTS", "1")]).await;
    let check = async |agent: &str, accept: Value| done(&client, json!({"agent_name": agent, "task": "x", "accept": accept})).await;
    let schema = json!({"schema": {"type": "object", "properties": {"count": {"type": "integer"}}}});
    let work = check("counter", schema).await;
    let message = work["error"]["message"].as_str().unwrap();
    assert!(message.contains("/count") && message.contains("integer") && message.contains("three"), "{message}");
    assert_eq!(
        check("lister", json!({"schema": {"type": "array", "minItems": 2}})).await["claim"],
        "verified",
        "JSON text counts as what it says"
    );
    assert_eq!(check("lister", json!({"schema": {"type": "string"}})).await["claim"], "verified", "and as the text that it is");
    assert_eq!(check("large", json!({"schema": {"type": "string", "minLength": 99_999}})).await["claim"], "verified", "also as a blob");
    let work = check("upper", json!({"paths": ["way-out/passwd"]})).await;
    assert!(work["error"]["message"].as_str().unwrap().contains("leads out of the agent's directory"), "{work}");
    assert_eq!(check("upper", json!({"paths": ["upper.md", "./upper.sh"]})).await["claim"], "verified");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_cannot_be_made_here_fails_before_the_agent_runs() {
    let place = Place::new();
    place.agent("worker", "", "echo x >> ran");
    let order = |program: &str| json!({"agent_name": "worker", "task": "x", "accept": {"command": [program]}});
    let client = place.client().await;
    let work = done(&client, order("no-such-program-anywhere")).await;
    assert_eq!(work["error"]["kind"], "unstartable", "{work}");
    assert!(work["error"]["message"].as_str().unwrap().contains("no-such-program-anywhere"), "{work}");
    drop(client);
    let client = place.client_with(&[("LATTICE_RUNNER_ACCEPT_COMMANDS", "false")]).await;
    let work = done(&client, order("true")).await;
    assert!(work["error"]["message"].as_str().unwrap().contains("runner.accept_commands"), "{work}");
    assert_eq!(place.file("ran"), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_criteria_are_refused_with_the_value_and_the_next_step() {
    let place = Place::new();
    let client = place.client().await;
    for (accept, word) in [
        (json!({}), "asks for nothing"),
        (json!("cargo test"), "cargo test"),
        (json!({"command": "cargo test && echo ok"}), "never a shell's line"),
        (json!({"paths": ["../secret"]}), "leads upwards"),
        (json!({"paths": ["/etc/passwd"]}), "is absolute"),
        (json!({"schema": {"type": "no such type"}}), "not a JSON Schema"),
        (json!({"schema": (0..70).fold(json!({}), |inner, _| json!({"not": inner}))}), "64 levels"),
        (json!({"command": ["true"], "timeout": "soon"}), "soon"),
        (json!({"cmd": ["true"]}), "cmd"),
    ] {
        let refused = client.refusal("assign_work", json!({"agent_name": "upper", "task": "x", "accept": accept})).await;
        assert!(refused.contains(word) && refused.contains("gain"), "{accept}: {refused}");
    }
    let outstanding = client.call("check_work", json!({})).await;
    assert_eq!(outstanding["outstanding"], 0, "nothing was assigned");
}
