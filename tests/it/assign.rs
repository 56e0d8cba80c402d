//! The command line's `assign`: all or nothing, its own works only, and an interrupt stops them.

use std::process::Stdio;

use crate::lifecycle::{Place, eventually};
use crate::rpc::binary;

async fn run(place: &Place, args: &[&str]) -> (i32, String, String) {
    let output = binary(place.data.path(), place.agents.path()).args(args).stdin(Stdio::null()).output().await.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn assign_prints_results_and_assigns_all_or_nothing() {
    let place = Place::new();
    place.agent("reverse", "", "printf '%s' \"$LATTICE_TASK\" | rev");
    let (code, out, _) = run(&place, &["assign", "upper,reverse", "abc"]).await;
    assert_eq!(code, 0);
    assert!(out.contains("ABC") && out.contains("cba"), "{out}");
    let (code, _, error) = run(&place, &["assign", "upper,nobody", "lost"]).await;
    assert_eq!(code, 3, "{error}");
    assert!(error.contains("nobody") && error.contains("upper"), "{error}");
    let (_, outstanding, _) = run(&place, &["work", "--json"]).await;
    assert_eq!(outstanding, "[]");
}

#[tokio::test(flavor = "multi_thread")]
async fn assign_leaves_the_works_of_others_alone() {
    let place = Place::new();
    place.agent("other", "", "echo x >> ran; sleep 300");
    let (code, _, _) = run(&place, &["assign", "upper", "so that the agents are known"]).await;
    assert_eq!(code, 0);
    let (code, id, _) = run(&place, &["assign", "other", "later", "--no-wait"]).await;
    assert_eq!(code, 0);
    let (code, out, _) = run(&place, &["assign", "upper", "mine"]).await;
    assert_eq!((code, out.as_str()), (0, "MINE"));
    assert_eq!(place.file("ran"), "", "the other work waits for a station that stays");
    let (_, outstanding, _) = run(&place, &["work", "--json"]).await;
    assert!(outstanding.contains(&id) && outstanding.contains("PENDING"), "{outstanding}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_stops_the_work() {
    let place = Place::new();
    place.agent("long", "", "echo $$ > pid; sleep 300");
    let child = binary(place.data.path(), place.agents.path()).args(["assign", "long", "x"]).stderr(Stdio::piped()).spawn().unwrap();
    eventually("it runs", async || (!place.file("pid").is_empty()).then_some(())).await;
    let pid = child.id().unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("CANCELLED"));
    let (_, outstanding, _) = run(&place, &["work", "--json"]).await;
    assert_eq!(outstanding, "[]");
}
