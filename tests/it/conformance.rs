//! The official conformance suite: over its own fixtures on our HTTP stack, and over the program itself.
//!
//! Whatever does not pass stands in `conformance/baseline.txt`, with a reason that is not ours.

mod everything;
mod jobs;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use lattice_mcp::config::{self, Storage};
use lattice_mcp::http::{self, Parts};
use lattice_mcp::model::access::Scope;
use lattice_mcp::transport::local::{self, Options};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clients::tool;
use crate::harness::Lattice;
use everything::{Everything, Shared, prompts, resources, tools};

/// The protocol versions, how the suite is asked for one, and how many scenarios it then has.
const RUNS: [(&str, &[&str], usize); 3] = [
    ("2025-06-18", &["--suite", "all", "--spec-version", "2025-06-18"], 27),
    ("2025-11-25", &["--requirements", "2025-11-25"], 33),
    ("2026-07-28", &["--requirements", "2026-07-28"], 50),
];
/// How long one run may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// What the suite adds to a scenario's name: when it ran.
const WHEN: usize = "-2026-07-28T00-00-00-000Z".len();

/// Whether each check of a run passed, by `scenario:check`.
type Checks = BTreeMap<String, bool>;

/// What became of a run.
struct Run {
    version: &'static str,
    checks: Checks,
    /// The suite's own verdict, which counts only what it scores.
    conforms: bool,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_http_stack_passes_the_suite() {
    let dir = tempfile::tempdir().unwrap();
    let store = local::open_with(dir.path(), &Storage::default(), Options::default()).unwrap();
    let bound = http::bind(&config::Http::default(), "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let (url, stop, shared) = (bound.url(), CancellationToken::new(), Shared::new());
    let parts = Parts {
        make: Arc::new(move |kind| Everything::new(&shared, kind)),
        table: store.transport().table,
        stop: stop.clone(),
        tasks: TaskTracker::new(),
        health: Arc::new(|| Value::Null),
        grace: Duration::from_secs(2),
        needs: |_, _| Scope::Read,
        tell: Arc::new(|_| {}),
    };
    let served = tokio::spawn(bound.serve(parts));
    let runs = runs(&url).await;
    stop.cancel();
    served.await.unwrap().unwrap();
    assert_eq!(Baseline::read("fixtures").contradictions(&runs), [""; 0]);
    assert!(runs.iter().all(|run| run.conforms), "the suite itself says that we do not conform");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_program_passes_what_needs_no_fixture() {
    let lattice = Lattice::new();
    let server = lattice.serve_to_anybody();
    assert_eq!(Baseline::read("program").contradictions(&runs(&server.url).await), [""; 0]);
}

#[test]
fn a_baseline_is_wrong_when_a_check_fails_unannounced_and_when_one_passes_or_is_gone_after_all() {
    let run = |checks: &[(&str, bool)]| {
        let checks = checks.iter().map(|&(check, passed)| (check.to_owned(), passed)).collect();
        Run { version: "2025-11-25", checks, conforms: true }
    };
    let baseline = Baseline(vec![Line { version: None, check: "ping:ping".into(), why: "for a test".into() }]);
    assert_eq!(baseline.contradictions(&[run(&[("ping:ping", false), ("tools-list:tools-list", true)])]), [""; 0]);
    assert_eq!(baseline.contradictions(&[run(&[("ping:ping", false), ("tools-list:tools-list", false)])]).len(), 1);
    for no_more in [&[("ping:ping", true)][..], &[]] {
        assert_eq!(baseline.contradictions(&[run(no_more)]).len(), 1, "{no_more:?}");
    }
}

#[test]
fn what_only_the_program_does_not_pass_needs_a_fixture_that_the_suite_has() {
    let mut fixtures = named(&prompts(), "name");
    fixtures.extend(tools().iter().map(|tool| tool.name.to_string()));
    fixtures.extend(named(&resources(), "uri"));
    fixtures.push("test://template/{id}/data".to_owned());
    let everywhere: BTreeSet<_> = Baseline::read("fixtures").0.into_iter().map(|line| line.check).collect();
    for line in Baseline::read("program").0.iter().filter(|line| !everywhere.contains(&line.check)) {
        let needs = line.why.strip_prefix("needs ").unwrap_or_else(|| panic!("{} does not say what it needs", line.check));
        assert!(fixtures.iter().any(|fixture| fixture == needs), "{}: the suite has no fixture {needs:?}", line.check);
    }
}

/// What the entries of a list call themselves.
fn named(list: &Value, key: &str) -> Vec<String> {
    list.as_array().unwrap().iter().map(|one| one[key].as_str().unwrap().to_owned()).collect()
}

/// Every run of the suite against a server.
async fn runs(url: &str) -> Vec<Run> {
    let mut runs = Vec::new();
    for (version, arguments, scenarios) in RUNS {
        let (checks, conforms) = run(url, arguments).await;
        let names: BTreeSet<&str> = checks.keys().filter_map(|check| Some(check.split_once(':')?.0)).collect();
        assert_eq!(names.len(), scenarios, "the suite ran other scenarios for {version}: {names:?}");
        runs.push(Run { version, checks, conforms });
    }
    runs
}

async fn run(url: &str, arguments: &[&str]) -> (Checks, bool) {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().unwrap();
    let suite = repository.join("tests/clients/node_modules/@modelcontextprotocol/conformance/dist/index.js");
    let ran = tokio::process::Command::new(tool(repository, "bin/node"))
        .arg(suite)
        .args(["server", "--url", url])
        .args(arguments)
        .arg("--output-dir")
        .arg(out.path())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let ran = tokio::time::timeout(PATIENCE, ran).await.expect("the suite ends in time").expect("Node runs");
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(said.contains("=== SUMMARY ==="), "the suite did not get to its end\n{said}\n{}", String::from_utf8_lossy(&ran.stderr));
    let folders = std::fs::read_dir(out.path()).unwrap().map(|folder| folder.unwrap().path());
    let mut all = Checks::new();
    for (check, passed) in folders.flat_map(|folder| checks(&folder)) {
        *all.entry(check).or_insert(true) &= passed;
    }
    (all, ran.status.success())
}

/// The checks of one scenario: a warning is a failure, what the suite skips or merely tells of is none.
fn checks(folder: &Path) -> Vec<(String, bool)> {
    let name = folder.file_name().and_then(|name| name.to_str()).unwrap();
    let scenario = name.strip_prefix("server-").and_then(|name| name.get(..name.len() - WHEN)).unwrap();
    let text = std::fs::read_to_string(folder.join("checks.json")).unwrap();
    let checks: Vec<Value> = serde_json::from_str(&text).unwrap();
    let passed = |check: &Value| !matches!(check["status"].as_str(), Some("FAILURE" | "WARNING"));
    let check = |check: &Value| (format!("{scenario}:{}", check["id"].as_str().unwrap()), passed(check));
    checks.iter().map(check).collect()
}

/// One line of the baseline.
struct Line {
    /// The protocol version for which it holds; every one if none.
    version: Option<String>,
    check: String,
    why: String,
}

/// What of the suite does not pass on a server.
struct Baseline(Vec<Line>);

impl Baseline {
    /// Reads the lines of one server: `server version scenario:check whose: why`.
    fn read(server: &str) -> Self {
        let text = include_str!("conformance/baseline.txt");
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(|line| {
            let [of, version, check, whose, why] = line.splitn(5, ' ').collect::<Vec<_>>()[..] else {
                panic!("{line:?} is not `server version scenario:check whose: why`");
            };
            assert!(["fixtures", "program"].contains(&of), "{line:?} is about neither the fixtures nor the program");
            assert!(["rmcp:", "suite:"].contains(&whose), "{line:?} does not say whether the reason is rmcp's or the suite's");
            assert!(why.len() > 10, "{line:?} has no reason");
            let version = (version != "*").then(|| version.to_owned());
            (of == server).then(|| Line { version, check: check.to_owned(), why: why.to_owned() })
        });
        Self(lines.collect::<Vec<_>>().into_iter().flatten().collect())
    }

    /// What fails and does not stand here, and what stands here and does not fail.
    fn contradictions(&self, runs: &[Run]) -> Vec<String> {
        let mut found = Vec::new();
        for Run { version, checks, .. } in runs {
            let known = |check: &str| self.0.iter().any(|line| line.check == check && line.is_for(version));
            let failed = checks.iter().filter(|(check, passed)| !**passed && !known(check));
            found.extend(failed.map(|(check, _)| format!("{version} {check} does not pass")));
        }
        for line in &self.0 {
            let mut of = runs.iter().filter(|run| line.is_for(run.version)).filter_map(|run| run.checks.get(&line.check)).peekable();
            if of.peek().is_none() || of.any(|passed| *passed) {
                found.push(format!("{} passes or is gone: take its line out of the baseline", line.check));
            }
        }
        found
    }
}

impl Line {
    fn is_for(&self, version: &str) -> bool {
        self.version.as_deref().is_none_or(|only| only == version)
    }
}
