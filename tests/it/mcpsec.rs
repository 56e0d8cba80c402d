//! `mcpsec fuzz`, a fuzzer of MCP servers that others wrote, against the real binary.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::clients::{drain, ended, tool};
use crate::harness::{Lattice, TOKEN};

const PATIENCE: Duration = Duration::from_secs(400);
/// How long one answer may take before it counts as none.
const ANSWER_S: &str = "10";

/// Runs all cases of its default intensity; the names of those that got no answer.
fn fuzz(lattice: &Lattice, server: &[&str]) -> Vec<String> {
    let program = tool(Path::new(env!("CARGO_MANIFEST_DIR")), "python-mcpsec/bin/python");
    let mut child = Command::new(&program)
        .args(["-c", "from mcpsec.cli import app; app()", "fuzz", "-i", "medium", "-t", ANSWER_S, "-o", "report.json"])
        .args(server)
        .current_dir(lattice.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
    let (stdout, stderr) = (drain(child.stdout.take()), drain(child.stderr.take()));
    assert!(ended(&mut child, PATIENCE).is_some(), "mcpsec did not end within {PATIENCE:?}");
    let said = format!("{}{}", stdout.join().expect("its output"), stderr.join().expect("its errors"));
    let report = std::fs::read_to_string(lattice.path().join("report.json")).unwrap_or_else(|error| panic!("no report: {error}\n{said}"));
    let report: Value = serde_json::from_str(&report).expect("a report in JSON");
    assert!(report["total_tests"].as_u64().is_some_and(|count| count > 100), "not all cases were tried: {report}\n{said}");
    let (mut unanswered, mut crashes, mut killed) = (Vec::new(), Vec::new(), false);
    for case in report["interesting_cases"].as_array().expect("cases") {
        // mcpsec kills a server that gave no answer, and may take the next case for the cause of that.
        let own = killed && case["error"].as_str().is_some_and(|error| error.contains("Broken pipe"));
        if case["crashed"] == true && !own {
            crashes.push(case);
        }
        killed = case["timeout"] == true;
        if killed {
            unanswered.push(case["case_name"].as_str().unwrap_or_default().to_owned());
        }
    }
    assert!(crashes.is_empty(), "{crashes:?}\n{said}");
    unanswered
}

#[test]
fn mcpsec_neither_crashes_nor_hangs_the_server_on_stdio() {
    let lattice = Lattice::new();
    let unanswered = fuzz(&lattice, &["--stdio", &lattice.command(&["--stdio"]).join(" ")]);
    // JSON-RPC answers no line without a message, and mcpsec waits for that.
    assert_eq!(unanswered, ["empty_body"]);
    let logged = std::fs::read_to_string(lattice.path().join("mcpsec_fuzz_stderr.log")).unwrap_or_default();
    assert!(!logged.contains("panicked"), "{logged}");
}

#[test]
fn mcpsec_neither_crashes_nor_hangs_the_server_on_http() {
    let lattice = Lattice::new();
    let server = lattice.serve();
    let (token, accept) = (format!("Authorization: Bearer {TOKEN}"), "Accept: application/json, text/event-stream");
    let unanswered = fuzz(&lattice, &["--http", &server.url, "-H", &token, "-H", accept]);
    assert!(unanswered.is_empty(), "{unanswered:?} got no answer");
    assert!(server.is_alive());
}
