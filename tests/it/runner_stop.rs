//! The runners: how a run ends, and that nothing of it is left.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lattice_mcp::model::event::FailureKind;
use lattice_mcp::model::output::Output;
use lattice_mcp::model::size::Size;
use lattice_mcp::runner::{Ended, Line, Report, Runners};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::runner_bench::{Bench, LONG, bytes, context, is_alive};

const READY: &str = "echo '::lattice {\"progress\": 1}'";

impl Bench {
    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.agents().join(name)).unwrap()
    }

    /// Runs, and stops when the program says that it is ready.
    async fn stopped(&self) -> Ended {
        let stop_when_ready = |report: &Report, _: &_, stop: &CancellationToken| {
            if matches!(report, Report::Progress { .. }) {
                stop.cancel();
            }
        };
        self.talk(stop_when_ready).await.0
    }
}

#[tokio::test]
async fn a_stop_asks_the_whole_group_first() {
    let body = format!("trap 'echo bye >&2; exit 0' TERM; sleep 1000 & echo $! > child; {READY}; wait");
    let bench = Bench::script(&body);
    assert_eq!(bench.stopped().await, Ended::Stopped);
    assert_eq!(std::fs::read_to_string(bench.log()).unwrap(), "bye\n");
    assert!(!is_alive(&bench.file("child")));
}

#[tokio::test]
async fn a_program_that_ignores_term_is_killed() {
    let bench = Bench::with(|context| context.kill_after = Duration::from_millis(300));
    bench.write("work.sh", &format!("trap '' TERM; echo $$ > pid; {READY}; while :; do sleep 1000; done"));
    assert_eq!(bench.stopped().await, Ended::Stopped);
    assert!(!is_alive(&bench.file("pid")));
}

#[tokio::test]
async fn a_stop_finds_what_has_left_the_group() {
    let body = format!(
        "setsid sh -c 'echo $$ > pid1; exec sleep 1000' &
        (setsid sh -c '(echo hidden; sh -c \"echo \\$\\$ > pid2; exec sleep 1000\") & exit' &)
        env -i setsid sh -c 'echo $$ > pid3; exec sleep 1000' &
        while [ ! -s pid1 ] || [ ! -s pid2 ] || [ ! -s pid3 ]; do sleep 0.01; done; {READY}; wait"
    );
    let bench = Bench::script(&body);
    assert_eq!(bench.stopped().await, Ended::Stopped);
    for name in ["pid1", "pid2", "pid3"] {
        assert!(!is_alive(&bench.file(name)), "{name} is left");
    }
}

#[tokio::test]
async fn what_forks_and_leaves_neither_blocks_nor_stays() {
    let wait = "while [ ! -s pid1 ] || [ ! -s pid2 ]; do sleep 0.01; done";
    for close in ["", ">/dev/null 2>&1"] {
        let body = format!(
            "setsid sh -c 'echo $$ > pid1; exec sleep 1000' {close} &
            (sh -c '(setsid sh -c \"trap : TERM; echo \\$\\$ > pid2; sleep 1000\" &)' {close} &)
            {wait}; echo printed"
        );
        let bench = Bench::with(|context| context.kill_after = Duration::from_millis(300));
        bench.write("work.sh", &body);
        let began = Instant::now();
        assert_eq!(bench.output().await, "printed");
        assert!(began.elapsed() < Duration::from_secs(60));
        assert!(!is_alive(&bench.file("pid1")) && !is_alive(&bench.file("pid2")));
    }
}

#[tokio::test]
async fn what_a_child_prints_just_after_its_parent_counts() {
    assert_eq!(Bench::script("(sleep 0.05; echo later) & echo now").output().await, "now\nlater");
}

#[tokio::test]
async fn too_much_output_ends_the_run() {
    let bench = Bench::with(|context| context.runner.output_max = bytes(100_000));
    bench.write("work.sh", "echo $$ > pid; echo first; yes 0123456789; echo never");
    let failure = bench.failure().await;
    assert_eq!(failure.kind, FailureKind::Limit);
    assert!(failure.message.contains("runner.output_max") && failure.message.contains("100000"), "{}", failure.message);
    let evidence = failure.evidence.unwrap();
    assert!(evidence.starts_with("first\n0123") && evidence.contains("[...]") && evidence.len() < 4096, "{evidence}");
    assert!(!is_alive(&bench.file("pid")));
    bench.write("work.sh", "yes 012345678 | head -c 100000");
    assert!(matches!(bench.run().await.0, Ended::Complete(Output::Blob(blob)) if blob.size == 99_999));
}

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[tokio::test]
async fn a_gigabyte_of_output_is_refused_with_flat_memory() {
    let bench = Bench::script("yes 'a line of output: with a colon' | head -c 1000000000");
    let before = resident();
    let most = std::cell::Cell::new(0);
    let watch = async {
        loop {
            most.set(resident().max(most.get()));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let failure = tokio::select! { failure = bench.failure() => failure, () = watch => unreachable!() };
    assert_eq!(failure.kind, FailureKind::Limit);
    assert!(failure.message.contains("256MiB"), "{}", failure.message);
    let grown = most.get().saturating_sub(before);
    assert!(grown < 50 << 20, "grew by {grown}");
}

#[tokio::test]
async fn a_large_result_is_stored_with_flat_memory() {
    let bench = Bench::with(|context| context.runner.output_max = Size::mib(200));
    bench.write("work.sh", "yes 0123456 | head -c 100000000");
    let before = resident();
    assert!(matches!(bench.run().await.0, Ended::Complete(Output::Blob(blob)) if blob.size == 99_999_999));
    let grown = resident().saturating_sub(before);
    assert!(grown < 50 << 20, "grew by {grown}");
}

#[tokio::test]
async fn reports_that_nobody_takes_do_not_hold_up_a_stop() {
    let bench = Bench::script("while :; do echo '::lattice {\"escalate\": {\"reason\": \"?\"}}'; done");
    let (reports, mut heard) = mpsc::channel(1);
    let (_answer, answers) = mpsc::channel(1);
    let stop = CancellationToken::new();
    let runner = bench.runners.runner_for(&bench.definition.runner);
    let run = runner.run(bench.order(), Line { reports, answers, stop: stop.clone() });
    let some = async {
        heard.recv().await.unwrap();
        stop.cancel();
    };
    let (ended, ()) = tokio::time::timeout(LONG, async { tokio::join!(run, some) }).await.unwrap();
    assert_eq!(ended, Ended::Stopped);
}

#[tokio::test]
async fn a_run_that_is_dropped_leaves_nothing() {
    let bench =
        Bench::script(&format!("setsid sh -c 'echo $$ > pid; exec sleep 1000' & while [ ! -s pid ]; do sleep 0.01; done; {READY}; wait"));
    let (reports, mut heard) = mpsc::channel(4);
    let (_answer, answers) = mpsc::channel(1);
    let runner = bench.runners.runner_for(&bench.definition.runner);
    let run = runner.run(bench.order(), Line { reports, answers, stop: CancellationToken::new() });
    let ready = async { while !matches!(heard.recv().await, Some(Report::Progress { .. })) {} };
    tokio::time::timeout(LONG, async {
        tokio::select! { _ = run => panic!("it ended"), () = ready => {} }
    })
    .await
    .unwrap();
    let pid = bench.file("pid");
    let gone = async {
        while is_alive(&pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LONG, gone).await.unwrap();
}

/// A process that looks like one of a run.
fn pretend(bench: &Bench, work_id: &str, attempt: u32, supervisor: &str) -> std::process::Child {
    let folder = bench.data().join(format!("running/{work_id}.{attempt}"));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("supervisor"), supervisor).unwrap();
    let running = bench.data().join("running").canonicalize().unwrap();
    let mut command = Command::new("sleep");
    command.arg("1000").stdin(Stdio::null()).stdout(Stdio::null());
    command.env("LATTICE_WORK_ID", work_id).env("LATTICE_ATTEMPT", attempt.to_string());
    command.env("LATTICE_SUPERVISOR", supervisor);
    command.env("LATTICE_MCP_CONFIG", running.join(format!("{work_id}.{attempt}/mcp.json")));
    command.spawn().unwrap()
}

/// A number that no process has any more.
fn dead_pid() -> u32 {
    let mut child = Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    child.id()
}

#[tokio::test]
async fn orphans_of_dead_stations_are_swept_and_live_runs_are_not() {
    let bench = Bench::script(&format!("echo $$ > pid; {READY}; while [ ! -e go ]; do sleep 0.01; done; echo done"));
    let other = Runners::new(context(&bench.data(), bench.blobs.clone()));
    let elsewhere = Bench::new();
    let (swept, go) = (Arc::new(std::sync::Mutex::new(None)), bench.agents().join("go"));
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    let mut ready = Some(ready);
    let sweep = async {
        is_ready.await.unwrap();
        let dead = format!("{}:{}", dead_pid(), uuid::Uuid::new_v4());
        let reused = format!("{}:{}", std::process::id(), uuid::Uuid::new_v4());
        let mut orphans = [pretend(&bench, "w1", 1, &dead), pretend(&bench, "w2", 3, &reused)];
        let mut foreign = pretend(&elsewhere, "w1", 1, &dead);
        let count = other.sweep_orphans().await.unwrap();
        let left = |name: &str| bench.data().join("running").join(name).exists();
        let alive = orphans.iter_mut().filter_map(|orphan| orphan.try_wait().unwrap()).count();
        let foreign_alive = foreign.try_wait().unwrap().is_none();
        let ours = is_alive(&bench.file("pid")) && left(&format!("{}.1", bench.assignment.work_id));
        *swept.lock().unwrap() = Some((count, alive, left("w1.1") || left("w2.3"), foreign_alive, ours));
        foreign.kill().unwrap();
        foreign.wait().unwrap();
        std::fs::write(&go, "").unwrap();
    };
    let run = bench.talk(|report, _, _| {
        if matches!(report, Report::Progress { .. }) {
            let _ = ready.take().unwrap().send(());
        }
    });
    let ((ended, _), ()) = tokio::join!(run, sweep);
    assert_eq!(*swept.lock().unwrap(), Some((2, 2, false, true, true)));
    assert_eq!(ended, Ended::Complete(Output::Inline(json!("done"))));
}

#[tokio::test]
async fn a_new_attempt_stops_what_dead_ones_left() {
    let mut bench = Bench::script("echo done");
    bench.attempt = 3;
    let work_id = bench.assignment.work_id.to_string();
    let dead = format!("{}:{}", dead_pid(), uuid::Uuid::new_v4());
    let mut older = pretend(&bench, &work_id, 2, &dead);
    let mut newer = pretend(&bench, &work_id, 4, &dead);
    assert_eq!(bench.output().await, "done");
    assert!(older.try_wait().unwrap().is_some() && newer.try_wait().unwrap().is_none());
    newer.kill().unwrap();
    newer.wait().unwrap();
}
