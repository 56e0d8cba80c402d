//! The runners: what a program is given, and what becomes of what it says.

use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use lattice_mcp::model::accept::Criteria;
use lattice_mcp::model::agent::{Prompt, RunnerSpec};
use lattice_mcp::model::event::{Ask, FailureKind, Needs};
use lattice_mcp::model::output::{BlobRef, Media, Output};
use lattice_mcp::model::time::Timestamp;
use lattice_mcp::model::work::Exchange;
use lattice_mcp::runner::{Answer, Ended, Report};
use lattice_mcp::transport::{self, Blobs};
use serde_json::{Value, json};
use tokio::io::AsyncRead;
use tokio_util::sync::CancellationToken;

use crate::runner_bench::{Bench, bytes, command, object};

const NASTY: &str = "--flag -rf 'single' \"double\" `touch pwned` $(touch pwned); touch pwned\n\ttwo {prompt} {task} \\ \u{1f980} *";

fn big_task() -> String {
    format!("{NASTY}{}", "0123456789abcde\n".repeat(1 << 16))
}

#[tokio::test]
async fn echo_answers_with_the_task() {
    let mut bench = Bench::new();
    bench.definition.runner = RunnerSpec::Echo;
    assert_eq!(bench.output().await, "do it");
    bench.assignment.task = big_task();
    let (blob, stored) = bench.blob().await;
    assert_eq!((blob.media, stored), (Media::Text, big_task().into_bytes()));
    let input = json!({"task": "from the blob", "context": {}}).to_string();
    bench.assignment.input_ref = Some(bench.blobs.put(&mut input.as_bytes(), Media::Json).await.unwrap());
    assert_eq!(bench.output().await, "from the blob");
}

#[tokio::test]
async fn a_missing_runner_says_what_to_do() {
    let mut bench = Bench::new();
    bench.definition.runner = RunnerSpec::Missing("install it".into());
    let failure = bench.failure().await;
    assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::Unstartable, "install it"));
}

#[tokio::test]
async fn output_is_the_result_without_one_newline() {
    assert_eq!(Bench::script("printf 'a\\r\\n\\nb\\n\\n'").output().await, "a\r\n\nb\n");
    assert_eq!(Bench::script("printf ''").output().await, "");
}

#[tokio::test]
async fn the_work_arrives_whole_on_standard_input() {
    let mut bench = Bench::script("cat");
    bench.assignment.task = NASTY.into();
    bench.assignment.context = object(json!({"path": "x", "n": [1, null]}));
    bench.definition.prompt = Prompt::Plain("You are {{x}}".into());
    bench.attempt = 2;
    let ask = Ask { ask: 1, reason: "why".into(), context: json!({"c": 1}), needs: Needs::Human, parked: true };
    bench.exchanges = vec![Exchange {
        ask,
        attempt: 1,
        asked_at: Timestamp::default(),
        answer: Some(json!("because")),
        answered_at: None,
        answered_by: None,
    }];
    let Value::String(text) = bench.output().await else { panic!("text") };
    let seen: Value = serde_json::from_str(&text).unwrap();
    let mut expected = serde_json::to_value(&bench.assignment).unwrap();
    for (field, value) in object(json!({
        "attempt": 2, "prompt": "You are {{x}}", "timeout": "5m", "parent_work_id": null,
        "exchanges": [{"ask": 1, "reason": "why", "context": {"c": 1}, "answer": "because"}],
    })) {
        expected[field] = value;
    }
    assert_eq!(seen, expected);
    assert_eq!(text.lines().count(), 1);
}

#[tokio::test]
async fn a_task_of_a_megabyte_arrives_byte_exact() {
    let mut bench = Bench::script("cat");
    bench.assignment.task = big_task();
    let (_, seen) = bench.blob().await;
    assert!(serde_json::from_slice::<Value>(&seen).unwrap()["task"] == big_task());
}

#[tokio::test]
async fn a_stored_input_is_streamed_and_found_by_placeholders() {
    let mut bench = Bench::script("cat");
    let input = json!({"context": {"deep": {"x": "found"}, "text": "y".repeat(50_000)}, "task": big_task()});
    bench.assignment.task = "only its beginning".into();
    bench.assignment.input_ref = Some(bench.blobs.put(&mut input.to_string().as_bytes(), Media::Json).await.unwrap());
    let (_, seen) = bench.blob().await;
    let seen: Value = serde_json::from_slice(&seen).unwrap();
    assert!(seen["task"] == input["task"] && seen["context"] == input["context"]);
    assert!(seen.get("input_ref").is_none());

    bench.command(&["sh", "-c", "printf '%s' \"$1 ${LATTICE_TASK-none} ${LATTICE_CONTEXT-none}\"", "x", "{context.deep.x}"]);
    assert_eq!(bench.output().await, "found none none");

    let small = json!({"task": "short", "context": {}}).to_string();
    bench.assignment.input_ref = Some(bench.blobs.put(&mut small.as_bytes(), Media::Json).await.unwrap());
    bench.command(&["sh", "-c", "printf '%s' \"$1 $LATTICE_TASK $LATTICE_CONTEXT\"", "x", "{task}"]);
    assert_eq!(bench.output().await, "short short {}");
    bench.assignment.input_ref.as_mut().unwrap().sha256 = "0".repeat(64);
    assert_eq!(bench.failure().await.kind, FailureKind::Crashed);
}

#[tokio::test]
async fn why_a_claim_was_refuted_stands_in_the_context_however_that_comes() {
    let mut bench = Bench::script("printf '%s\n' \"$LATTICE_CONTEXT\"; cat");
    bench.refuted = Some(json!({"attempt": 1, "message": "red"}));
    bench.assignment.context = object(json!({"own": 1}));
    let expected = json!({"own": 1, "lattice_refuted": {"attempt": 1, "message": "red"}});
    for stored in [false, true] {
        if stored {
            let input = json!({"context": {"own": 1}, "task": "from the blob"}).to_string();
            bench.assignment.input_ref = Some(bench.blobs.put(&mut input.as_bytes(), Media::Json).await.unwrap());
        }
        let Value::String(text) = bench.output().await else { panic!("text") };
        let (variable, order) = text.split_once('\n').unwrap();
        assert_eq!(serde_json::from_str::<Value>(variable).unwrap(), expected);
        assert_eq!(serde_json::from_str::<Value>(order).unwrap()["context"], expected, "stored: {stored}");
    }
}

#[tokio::test]
async fn one_argument_stays_one() {
    let mut bench = Bench::script("printf '%s\\n--\\n' \"$#\" \"$@\"");
    bench.assignment.task = NASTY.into();
    bench.assignment.context = object(json!({"a": {"b": [{"c": NASTY}]}}));
    bench.definition.prompt = Prompt::Plain("P".into());
    bench.command(&["./work.sh", "{task}", "--x={context.a.b[0].c}", "{context.nothing}", "{print $1}", "{prompt}{attempt}"]);
    let expected = format!("5\n--\n{NASTY}\n--\n--x={NASTY}\n--\n\n--\n{{print $1}}\n--\nP1\n--");
    assert_eq!(bench.output().await, expected);
    assert!(!bench.agents().join("pwned").exists());
}

#[tokio::test]
async fn a_shells_script_never_holds_the_clients_text() {
    let mut bench = Bench::new();
    for task in [NASTY, "'; touch pwned; '", "\"; touch pwned; \"", "`touch pwned`"] {
        bench.assignment.task = task.into();
        bench.command(&["sh", "-c", "printf '%s|%s|%s' {task} \"in {task}\" 'in {task} {{task}} {attempt}'"]);
        assert_eq!(bench.output().await, format!("{task}|in {task}|in {task} {{task}} 1"));
        assert!(!bench.agents().join("pwned").exists());
    }
}

#[tokio::test]
async fn an_argument_that_cannot_be_is_a_clear_failure() {
    let mut bench = Bench::script("printf '%s' \"$1\" | wc -c");
    bench.command(&["./work.sh", "{task}"]);
    bench.assignment.task = "x".repeat(131_071);
    assert_eq!(bench.output().await, "131071");
    for task in ["x".repeat(131_072), big_task(), "a\0b".into()] {
        bench.assignment.task = task;
        let failure = bench.failure().await;
        assert_eq!(failure.kind, FailureKind::Unstartable);
        assert!(failure.message.contains("{task}") && failure.message.contains("standard input whole"), "{}", failure.message);
    }
    bench.assignment.task = "x".repeat(131_000);
    bench.command(&[["./work.sh"].as_slice(), &["{task}"; 40]].concat());
    let failure = bench.failure().await;
    assert!(failure.kind == FailureKind::Unstartable && failure.message.contains("too long together"), "{}", failure.message);
}

#[tokio::test]
async fn a_template_prompt_is_filled_with_the_context() {
    let mut bench = Bench::script("");
    bench.definition.prompt = Prompt::Template("Look at {{path}} {{{task}}}".into());
    bench.assignment.context = object(json!({"path": "<{{task}}> {task}"}));
    bench.command(&["printf", "%s", "{prompt}"]);
    assert_eq!(bench.output().await, "Look at <{{task}}> {task} ");
    bench.definition.prompt = Prompt::Template("{{#if}".into());
    let failure = bench.failure().await;
    assert!(failure.kind == FailureKind::Unstartable && failure.message.contains("prompt of agent worker"), "{}", failure.message);
}

#[tokio::test]
async fn a_program_that_cannot_start_names_itself_and_the_way_out() {
    let mut bench = Bench::new();
    std::fs::write(bench.agents().join("plain.sh"), "#!/bin/sh\n").unwrap();
    bench.write("bare.sh", "");
    std::fs::write(bench.agents().join("bare.sh"), "\u{1}\u{2}").unwrap();
    bench.write("lost.sh", "");
    std::fs::write(bench.agents().join("lost.sh"), "#!/no/such/interpreter\n").unwrap();
    for (words, parts) in [
        (&["./gone.sh"][..], ["agents/./gone.sh", "does not exist"]),
        (&["no-such-program-anywhere"], ["no-such-program-anywhere", "install it"]),
        (&["plain.sh"], ["no program named plain.sh", "write ./plain.sh"]),
        (&["./plain.sh"], ["plain.sh", "chmod +x"]),
        (&["../agents"], ["agents", "is a folder"]),
        (&["./bare.sh"], ["bare.sh", "#!/bin/sh"]),
        (&["./lost.sh"], ["lost.sh", "interpreter"]),
        (&[], ["command is empty", "./scan.sh"]),
    ] {
        bench.command(words);
        let failure = bench.failure().await;
        assert_eq!(failure.kind, FailureKind::Unstartable);
        assert!(parts.iter().all(|part| failure.message.contains(part)), "{words:?}: {}", failure.message);
    }
    bench.command(&["true"]).cwd = Some("nowhere".into());
    assert!(bench.failure().await.message.contains("agents/nowhere"));
}

#[tokio::test]
async fn a_program_runs_in_its_agents_folder() {
    let mut bench = Bench::script("pwd -P");
    let agents = bench.agents().canonicalize().unwrap();
    assert_eq!(bench.output().await, agents.to_str().unwrap());
    std::fs::create_dir(agents.join("sub")).unwrap();
    bench.command(&["./work.sh"]).cwd = Some("sub".into());
    assert_eq!(bench.output().await, agents.join("sub").to_str().unwrap());
}

#[tokio::test]
async fn only_an_allow_list_of_the_environment_is_passed() {
    let mut bench = Bench::with(|context| context.runner.env_pass = vec!["CARGO_PKG_NAME".into()]);
    bench.assignment.context = object(json!({"a": 1}));
    let spec = bench.command(&["env"]);
    spec.env.insert("EXTRA".into(), "{task}".into());
    spec.env.insert("LATTICE_WORK_ID".into(), "forged".into());
    spec.env_pass.push("CARGO_PKG_VERSION".into());
    assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
    let Value::String(text) = bench.output().await else { panic!("text") };
    let has = |line: &str| assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
    has("EXTRA={task}");
    has("CARGO_PKG_NAME=lattice-mcp");
    has(&format!("CARGO_PKG_VERSION={}", env!("CARGO_PKG_VERSION")));
    has(&format!("PATH={}", std::env::var("PATH").unwrap()));
    has(&format!("LATTICE_WORK_ID={}", bench.assignment.work_id));
    has(&format!("LATTICE_RUN_ID={}", bench.assignment.orchestrator_run_id));
    has("LATTICE_AGENT=worker");
    has("LATTICE_ATTEMPT=1");
    has("LATTICE_TASK=do it");
    has("LATTICE_CONTEXT={\"a\":1}");
    has("TRACEPARENT=00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    assert!(text.contains(&format!("LATTICE_SUPERVISOR={}:", std::process::id())));
    assert!(!text.contains("CARGO_MANIFEST_DIR"));
}

#[tokio::test]
async fn large_and_unfit_inputs_are_left_out_of_the_environment() {
    let mut bench = Bench::new();
    bench.command(&["sh", "-c", "printf '%s' \"${LATTICE_TASK-none} ${LATTICE_CONTEXT-none}\""]);
    bench.assignment.task = "x".repeat(32 * 1024 + 1);
    bench.assignment.context = object(json!({"a": "x".repeat(40_000)}));
    assert_eq!(bench.output().await, "none none");
    bench.assignment.task = "a\0b".into();
    assert_eq!(bench.output().await, "none none");
}

#[tokio::test]
async fn a_run_finds_its_way_into_the_lattice_and_leaves_no_files() {
    let bench = Bench::script("stat -c %a \"$LATTICE_MCP_CONFIG\"; cat \"$LATTICE_MCP_CONFIG\"; ls -d \"$LATTICE_MCP_CONFIG\" >&2");
    let Value::String(text) = bench.output().await else { panic!("text") };
    let (mode, config) = text.split_once('\n').unwrap();
    let config: Value = serde_json::from_str(config).unwrap();
    let server = &config["mcpServers"]["lattice"];
    assert_eq!(mode, "600");
    assert_eq!((&server["command"], &server["args"]), (&json!("/opt/lattice-mcp"), &json!(["--stdio"])));
    let run_id = bench.assignment.orchestrator_run_id.as_str();
    let bound = json!({"LATTICE_BOUND_WORK": bench.assignment.work_id, "LATTICE_BOUND_RUN": run_id, "LATTICE_BOUND_ATTEMPT": "1"});
    assert_eq!(server["env"], bound);
    let log = std::fs::read_to_string(bench.log()).unwrap();
    assert!(log.contains(&format!("/data/running/{}.1/mcp.json", bench.assignment.work_id)), "{log}");
    let left: Vec<_> = std::fs::read_dir(bench.data().join("running")).unwrap().flatten().filter(|entry| entry.path().is_dir()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn exit_codes_mean_something() {
    let failure = Bench::script("echo out; echo first >&2; echo the end >&2; exit 75").failure().await;
    assert_eq!((failure.kind, failure.exit_code), (FailureKind::Transient, Some(75)));
    let failure = Bench::script("yes x | head -c 100000 >&2; printf 'the \\377 end\\n' >&2; exit 3").failure().await;
    assert_eq!((failure.kind, failure.exit_code), (FailureKind::Agent, Some(3)));
    let evidence = failure.evidence.unwrap();
    assert!(evidence.ends_with("the \u{fffd} end") && evidence.len() < 5000, "{evidence}");
    let failure = Bench::script("kill -SEGV $$").failure().await;
    assert_eq!((failure.kind, failure.exit_code), (FailureKind::Agent, None));
    assert!(failure.message.contains("SIGSEGV"), "{}", failure.message);
}

#[tokio::test]
async fn standard_error_is_the_log_up_to_its_limit() {
    let bench = Bench::with(|context| context.runner.log_max = bytes(10));
    bench.write("work.sh", "printf 0123456789abc >&2; printf def >&2");
    assert_eq!(bench.output().await, "");
    let log = std::fs::read_to_string(bench.log()).unwrap();
    assert_eq!(log, "0123456789\n[lattice-mcp: the rest is not kept: runner.log_max is 10]\n");
    assert_eq!(std::fs::metadata(bench.log()).unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn directives_become_reports_and_the_last_result() {
    let bench = Bench::script(
        r#"echo ignored
        echo '::lattice {"progress": 150, "message": "half way"}'
        printf '::lattice {"result": 1}\r\n'
        printf '::lattice {"result": {"a": [1, "b"]}}'"#,
    );
    let (ended, reports) = bench.run().await;
    assert_eq!(ended, Ended::Complete(Output::Inline(json!({"a": [1, "b"]}))));
    assert!(reports.contains(&Report::Progress { pct: Some(100.0), message: Some("half way".into()) }));
    assert!(reports.contains(&Report::Alive));
}

#[tokio::test]
async fn progress_comes_while_the_program_runs() {
    let bench = Bench::script("echo '::lattice {\"progress\": 1}'; cat >/dev/null; while [ ! -e go ]; do sleep 0.01; done; echo done");
    let go = bench.agents().join("go");
    let (ended, _) = bench
        .talk(|report, _, _| {
            if matches!(report, Report::Progress { .. }) {
                std::fs::write(&go, "").unwrap();
            }
        })
        .await;
    assert_eq!(ended, Ended::Complete(Output::Inline(json!("done"))));
}

#[tokio::test]
async fn much_progress_is_merged_and_its_last_is_not_lost() {
    let bench = Bench::script(
        "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo \"::lattice {\\\"progress\\\": 5, \\\"message\\\": \\\"$i\\\"}\"; done",
    );
    let began = std::time::Instant::now();
    let (ended, reports) = bench.run().await;
    let progress: Vec<_> = reports.iter().filter(|report| matches!(report, Report::Progress { .. })).collect();
    assert_eq!(ended, Ended::Complete(Output::Inline(json!(""))));
    assert_eq!(progress.last(), Some(&&Report::Progress { pct: Some(5.0), message: Some("2000".into()) }));
    let most = 20 * (began.elapsed().as_secs() as usize + 1) + 1;
    assert!(progress.len() >= 20 && progress.len() <= most, "{} reports, at most {most}", progress.len());
}

#[tokio::test]
async fn a_broken_directive_is_output_and_noted() {
    let bench = Bench::with(|context| context.runner.line_max = bytes(100));
    bench
        .write("work.sh", "echo '::lattice {oops'; echo '::lattice []'; echo \"::lattice {\\\"result\\\": \\\"$(seq 100)\\\"}\"; echo end");
    let Value::String(text) = bench.output().await else { panic!("text") };
    assert!(text.starts_with("::lattice {oops\n::lattice []\n::lattice {\"result\": \"1\n2\n") && text.ends_with("end"), "{text}");
    let log = std::fs::read_to_string(bench.log()).unwrap();
    assert_eq!(log.matches("is no directive").count(), 1, "{log}");
    assert!(log.contains("{oops"));
}

#[tokio::test]
async fn a_question_without_an_answer_parks_the_work() {
    let ask = r#"echo '::lattice {"escalate": {"reason": "which?", "context": {"a": 1}, "needs": "human"}}'"#;
    let (ended, reports) = Bench::script(&format!("echo '::lattice {{\"progress\": 1}}'; {ask}; echo bye")).run().await;
    assert_eq!(ended, Ended::Parked);
    let asked = Report::Escalate { reason: "which?".into(), context: json!({"a": 1}), needs: Needs::Human };
    let at = |wanted: &Report| reports.iter().position(|report| report == wanted).unwrap();
    assert!(at(&Report::Progress { pct: Some(1.0), message: None }) < at(&asked));
    let decided = Bench::script(&format!("{ask}; echo '::lattice {{\"result\": 1}}'"));
    assert_eq!(decided.output().await, 1);
    assert_eq!(Bench::script(&format!("{ask}; exit 2")).failure().await.exit_code, Some(2));
    let mut interactive = Bench::script(&format!("read -r work; {ask}; exit 0"));
    interactive.command(&["./work.sh"]).interactive = true;
    assert_eq!(interactive.run().await.0, Ended::Parked);
}

#[tokio::test]
async fn an_interactive_program_reads_its_answers() {
    let mut bench = Bench::script(
        "read -r work; for n in 1 2; do echo '::lattice {\"escalate\": {\"reason\": \"?\"}}'; read -r answer; echo \"$answer\"; done",
    );
    bench.command(&["./work.sh"]).interactive = true;
    let mut ask = 0;
    let (ended, _) = bench
        .talk(|report, answers, _| {
            if matches!(report, Report::Escalate { .. }) {
                ask += 1;
                answers.try_send(Answer { ask, reason: "?".into(), context: Value::Null, answer: json!({"n": ask}) }).unwrap();
            }
        })
        .await;
    let line = |n| json!({"answer": {"n": n}, "ask": n, "reason": "?"}).to_string();
    assert_eq!(ended, Ended::Complete(Output::Inline(json!(format!("{}\n{}", line(1), line(2))))));
}

#[tokio::test]
async fn an_answer_to_what_a_program_has_not_asked_answers_none_of_its_questions() {
    let mut bench = Bench::script("read -r work; echo '::lattice {\"escalate\": {\"reason\": \"mine?\"}}'; read -r answer; exit 0");
    bench.command(&["./work.sh"]).interactive = true;
    let (ended, _) = bench
        .talk(|report, answers, _| {
            if matches!(report, Report::Escalate { .. }) {
                answers.try_send(Answer { ask: 1, reason: "theirs?".into(), context: Value::Null, answer: json!("yes") }).unwrap();
            }
        })
        .await;
    assert_eq!(ended, Ended::Parked);
}

#[tokio::test]
async fn a_program_need_not_read_its_input() {
    for body in ["echo done", "exec <&-; echo done"] {
        let mut bench = Bench::script(body);
        bench.assignment.task = big_task();
        assert_eq!(bench.output().await, "done");
    }
    let mut bench = Bench::script("echo done; exec sleep 0.2");
    bench.assignment.task = big_task();
    assert_eq!(bench.output().await, "done");
}

#[tokio::test]
async fn a_program_may_close_its_output_and_go_on_reading() {
    let mut bench = Bench::script("exec >&- 2>&-; sleep 0.1; wc -c > seen");
    bench.assignment.task = big_task();
    assert_eq!(bench.output().await, "");
    let seen: usize = std::fs::read_to_string(bench.agents().join("seen")).unwrap().trim().parse().unwrap();
    assert!(seen > 1 << 20, "{seen}");
}

#[tokio::test]
async fn invalid_utf8_is_replaced_in_small_and_large_results() {
    assert_eq!(Bench::script("printf 'a\\377b\\342\\202'").output().await, "a\u{fffd}b\u{fffd}");
    let bench = Bench::script("i=0; while [ $i -lt 4000 ]; do i=$((i+1)); printf '\\342\\202\\254\\377x'; done; printf '\\n'");
    let (blob, stored) = bench.blob().await;
    assert_eq!((blob.media, stored), (Media::Text, "€\u{fffd}x".repeat(4000).into_bytes()));
}

#[tokio::test]
async fn large_results_become_blobs() {
    let bench = Bench::with(|context| context.results.inline_max = bytes(10));
    for (body, media, expected) in [
        ("printf 01234567890", Media::Text, "01234567890"),
        ("printf '::lattice {\"result\": [1, 2, 3, 4, 5, 6]}'", Media::Json, "[1, 2, 3, 4, 5, 6]"),
        ("printf '::lattice {\"result\": \"0123456789\\\\n\"}'", Media::Text, "0123456789\n"),
    ] {
        bench.write("work.sh", body);
        let (blob, stored) = bench.blob().await;
        assert_eq!((blob.media, blob.size, String::from_utf8(stored).unwrap().as_str()), (media, expected.len() as u64, expected));
    }
    bench.write("work.sh", "printf '0123456789\\n'");
    assert_eq!(bench.output().await, "0123456789");
}

#[tokio::test]
async fn results_are_held_against_the_output_schema() {
    let mut bench = Bench::with(|context| context.runner.checked_max = bytes(100_000));
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]});
    bench.definition.manifest.output_schema = Some(schema);
    for (body, part) in [
        ("echo '{\"n\": \"x\"}'", Err((FailureKind::BadOutput, "/n"))),
        ("echo '::lattice {\"result\": {}}'", Err((FailureKind::BadOutput, "\"n\""))),
        ("echo no json", Err((FailureKind::BadOutput, "not JSON"))),
        ("", Err((FailureKind::BadOutput, "nothing"))),
        ("yes 1 | head -c 100002", Err((FailureKind::Limit, "runner.checked_max"))),
        ("echo '{\"n\": 5}'", Ok(json!({"n": 5}))),
        ("echo chatter; echo '::lattice {\"result\": {\"n\": 6}}'", Ok(json!({"n": 6}))),
    ] {
        bench.write("work.sh", body);
        match part {
            Ok(value) => assert_eq!(bench.output().await, value),
            Err((kind, part)) => {
                let failure = bench.failure().await;
                assert_eq!(failure.kind, kind, "{body}");
                assert!(failure.message.contains(part), "{}", failure.message);
            }
        }
    }
    bench.write("work.sh", "printf '{\"n\": 1, \"s\": \"'; yes x | head -n 20000 | tr -d '\\n'; printf '\"}'");
    let (blob, stored) = bench.blob().await;
    assert_eq!((blob.media, stored.len()), (Media::Json, 20_000 + 17));
    bench.definition.manifest.output_schema = Some(json!({"type": "no such type"}));
    assert_eq!(bench.failure().await.kind, FailureKind::Unstartable);
}

/// A store that cannot be reached so many times.
struct Away {
    blobs: Arc<dyn Blobs>,
    times: AtomicUsize,
}

#[async_trait]
impl Blobs for Away {
    async fn put(&self, source: &mut (dyn AsyncRead + Unpin + Send), media: Media) -> transport::Result<BlobRef> {
        self.blobs.put(source, media).await
    }

    async fn open(&self, sha256: &str, range: Range<u64>) -> transport::Result<Box<dyn AsyncRead + Unpin + Send>> {
        match self.times.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |times| times.checked_sub(1)) {
            Ok(_) => Err(transport::Error::Unreachable("away".into())),
            Err(_) => self.blobs.open(sha256, range).await,
        }
    }

    async fn size(&self, sha256: &str) -> transport::Result<u64> {
        self.blobs.size(sha256).await
    }
}

#[tokio::test]
async fn a_claim_that_cannot_be_looked_at_now_is_looked_at_later() {
    let mut away = None;
    let bench = Bench::with(|context| {
        let blobs = Arc::new(Away { blobs: context.blobs.clone(), times: AtomicUsize::new(1) });
        away = Some(blobs.clone());
        context.blobs = blobs;
    });
    let blob = bench.blobs.put(&mut &b"[1]"[..], Media::Json).await.unwrap();
    let criteria = Criteria { schema: Some(json!({"type": "array"})), ..Criteria::default() };
    let (result, stop) = (Output::Blob(blob), CancellationToken::new());
    let checks = bench.runners.check(&bench.order(), &criteria, &result, &stop).await.unwrap().unwrap();
    assert!(checks.iter().all(|check| check.ok), "{checks:?}");
    assert_eq!(away.as_ref().unwrap().times.swap(usize::MAX, Ordering::SeqCst), 0, "it was away once");
    // Whoever stops the attempt need not wait for it.
    stop.cancel();
    assert_eq!(bench.runners.check(&bench.order(), &criteria, &result, &stop).await.unwrap(), None);
}

#[tokio::test]
async fn a_program_named_on_the_path_keeps_its_name() {
    let mut bench = Bench::new();
    bench.definition.runner = RunnerSpec::Command(command(&["sh", "-c", "echo $0"]));
    assert_eq!(bench.output().await, "sh");
}
