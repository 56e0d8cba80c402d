//! The command line, through the real binary: help texts, tables, JSON and exit codes.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use bytes::Bytes;
use lattice_mcp::config::Storage;
use lattice_mcp::model::assignment::Assignment;
use lattice_mcp::model::event::{Ask, Event, Failure, FailureKind, Kind, Needs, Side};
use lattice_mcp::model::id::{InstanceId, RunId, WorkId};
use lattice_mcp::model::output::{self, Media};
use lattice_mcp::model::time::Timestamp;
use lattice_mcp::model::turn::Turn;
use lattice_mcp::transport::{Item, Transport, local};
use lattice_mcp::works::record;
use serde_json::{Value, json};
use uuid::Uuid;

/// Runs the program in a folder of its own, which is its user's home as well.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    fn data(&self) -> PathBuf {
        self.dir().join("data/default")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lattice-mcp"));
        command.args(args).current_dir(self.dir()).env_clear().env("HOME", self.dir()).env("PATH", "/usr/bin:/bin");
        command.env("LATTICE_DATA_DIR", self.dir().join("data")).env("LATTICE_STATION", "here").stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Standard output of a command that succeeds.
    fn said(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let text = self.said(&[args, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?}: {error}: {text}"))
    }

    /// The exit code of a command that fails, and what it says.
    fn fails(&self, args: &[&str]) -> (i32, String) {
        let output = self.run(args);
        assert!(output.stdout.is_empty(), "{args:?} said {}", String::from_utf8_lossy(&output.stdout));
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }
}

#[test]
fn help_texts_stay_as_they_are() {
    let place = Place::new();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/help");
    let commands = ["", "leaf", "status", "stations", "agents", "runs", "work", "work cancel", "work answer", "events", "config", "init"];
    for command in commands.into_iter().chain(["install", "uninstall"]) {
        let words: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
        let file = golden.join(format!("{}.txt", if command.is_empty() { "lattice-mcp".into() } else { command.replace(' ', "-") }));
        let said = place.said(&words);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::create_dir_all(&golden).unwrap();
            fs::write(&file, &said).unwrap();
        }
        let known = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}; UPDATE_GOLDEN=1 writes it", file.display()));
        assert_eq!(said, known, "the help of {command:?} differs from {}; UPDATE_GOLDEN=1 rewrites it", file.display());
    }
}

#[test]
fn without_a_store_lists_are_empty_and_nothing_is_made() {
    let place = Place::new();
    for list in [&["stations"][..], &["agents"], &["runs"], &["work"], &["work", "--dead"]] {
        assert_eq!(place.json(list), json!([]), "{list:?}");
        assert_ne!(place.said(list), "", "{list:?}");
    }
    assert!(place.said(&["runs"]).contains("lattice-mcp --stdio"));
    assert_eq!(place.json(&["status"])["station"], "here");
    assert!(!place.dir().join("data").exists());
}

#[test]
fn exit_codes_mean_something() {
    let place = Place::new();
    let id = Uuid::now_v7().to_string();
    assert_eq!(place.fails(&["work", &id]).0, 3);
    assert_eq!(place.fails(&["runs", "--uuid", &id]).0, 3);
    let (code, said) = place.fails(&["work", "not-an-id"]);
    assert!(code == 2 && said.contains("not a work id"), "{said}");
    assert_eq!(place.fails(&["frobnicate"]).0, 2);
    assert_eq!(place.fails(&["--stdio", "status"]).0, 2);
    let (code, said) = place.fails(&[]);
    assert!(code == 2 && said.contains("--stdio"), "{said}");
    assert_eq!(place.fails(&["--lattice", "a.b", "status"]).0, 4);
    assert_eq!(place.fails(&["status", "--config", "nowhere.yaml"]).0, 4);
    fs::create_dir_all(place.data()).unwrap();
    fs::write(place.data().join("lattice.db"), "this is no database, and long enough to be looked at as one".repeat(100)).unwrap();
    let (code, said) = place.fails(&["runs"]);
    assert!(code == 5 && said.contains("lattice.db"), "{said}");
}

#[test]
fn config_shows_where_values_come_from() {
    let place = Place::new();
    fs::write(place.dir().join("lattice.yaml"), "lattice:\n  work:\n    max_parallel: 3\nhttp:\n  token: s3cret\n").unwrap();
    let shown = place.json(&["config", "--lattice", "mine"]);
    let setting = |key: &str| shown["settings"].as_array().unwrap().iter().find(|row| row["key"] == key).unwrap().clone();
    assert_eq!((setting("lattice.id")["value"].as_str(), setting("lattice.id")["origin"].as_str()), (Some("mine"), Some("--lattice")));
    assert_eq!(setting("lattice.station")["origin"], "LATTICE_STATION");
    assert!(setting("lattice.work.max_parallel")["origin"].as_str().unwrap().ends_with("lattice.yaml:3"));
    assert!(!shown.to_string().contains("s3cret") && !place.said(&["config"]).contains("s3cret"));
}

#[test]
fn init_gives_agents_that_the_list_shows() {
    let place = Place::new();
    assert!(place.said(&["init"]).contains("wrote ./agents/hello.md"));
    assert!(place.said(&["init"]).contains("kept ./agents/hello.md"));
    assert_eq!(place.json(&["agents"])[0]["status"], "not running");
}

/// A store with a tree of works, each in another state.
struct Seed {
    place: Place,
    root: RunId,
    done: WorkId,
    large: WorkId,
    failed: WorkId,
    asking: WorkId,
    waiting: WorkId,
}

const LARGE: usize = 48 << 20;

impl Seed {
    fn new() -> Self {
        let place = Place::new();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let id = || WorkId::new(Uuid::now_v7());
        let root = RunId::root_of(Uuid::now_v7());
        let seed = Self { place, root, done: id(), large: id(), failed: id(), asking: id(), waiting: id() };
        runtime.block_on(seed.fill());
        seed
    }

    async fn fill(&self) {
        let store = local::open(&self.place.data(), &Storage::default()).unwrap();
        let transport = store.transport();
        let (first, second) = (self.root.child(1), self.root.child(2));
        let done = output::Output::Inline(json!({"answer": [1, 2]}));
        self.tell(&transport, self.done, &first, "count\nthem", &[(1, Kind::Accepted), (1, complete(done))]).await;
        let body = vec![b'x'; LARGE];
        let large = transport.blobs.put(&mut &body[..], Media::Text).await.unwrap();
        let large = complete(output::Output::Blob(large));
        self.tell(&transport, self.large, &first.child(1), "a lot", &[(1, Kind::Accepted), (1, large)]).await;
        let failure = Failure { dead_letter: true, ..Failure::new(FailureKind::Agent, "broke\x1b[31m in two") };
        let failed = Kind::Failed { failure, duration_ms: 70 };
        self.tell(&transport, self.failed, &first.child(2), "\x1b]0;evil\x07", &[(1, Kind::Accepted), (1, failed)]).await;
        let ask = Ask { ask: 1, reason: "which one?".into(), context: json!({}), needs: Needs::Orchestrator, parked: false };
        self.tell(&transport, self.asking, &second, "choose", &[(1, Kind::Accepted), (1, Kind::Escalate(ask))]).await;
        self.tell(&transport, self.waiting, &self.root.child(3), "later", &[]).await;
        tokio::task::spawn_blocking(move || store.close()).await.unwrap();
    }

    async fn tell(&self, transport: &Transport, work: WorkId, run: &RunId, task: &str, then: &[(u32, Kind)]) {
        let order = Assignment {
            work_id: work,
            orchestrator_run_id: run.clone(),
            parent_work_id: None,
            originating_station: "here".parse().unwrap(),
            target_station: "there".parse().unwrap(),
            agent_name: "counter".parse().unwrap(),
            task: task.into(),
            context: serde_json::Map::new(),
            input_ref: None,
            assigned_at: now(),
            timeout: lattice_mcp::model::time::Span::secs(3600),
            queue_timeout: None,
            silence_timeout: None,
            redrives: None,
            priority: 0,
            trace_id: "1".repeat(32),
            span_id: "2".repeat(16),
            owner: None,
            principal: None,
            accept: None,
            budgets: vec![],
            after: None,
            map: None,
        };
        let event = |attempt, kind| Event {
            work_id: work,
            run_id: run.clone(),
            at: now(),
            station: "there".parse().unwrap(),
            instance: InstanceId::new(Uuid::now_v7()),
            side: if attempt == 0 { Side::Assigner } else { Side::Leaf },
            attempt,
            kind,
        };
        let deadline = order.deadline();
        let item = Item {
            id: work,
            lane: "counter".into(),
            turn: Turn::new("here", 0, Timestamp::from_millis(0), std::time::Duration::from_secs(1)),
            deadline,
            held_back: false,
            beside: None,
            body: Bytes::from_static(b"{}"),
        };
        let announce = record(event(0, Kind::Assigned(Box::new(order))));
        transport.queue.push(&"there".parse().unwrap(), item, 100, Some(announce)).await.unwrap();
        for (attempt, kind) in then {
            transport.log.append(vec![record(event(*attempt, kind.clone()))]).await.unwrap();
        }
    }
}

fn complete(result: output::Output) -> Kind {
    Kind::Complete { result, duration_ms: 1500, checks: vec![] }
}

fn now() -> Timestamp {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    Timestamp::from_millis(i64::try_from(since.as_millis()).unwrap())
}

#[test]
fn a_store_is_shown_and_changed() {
    let seed = Seed::new();
    let place = &seed.place;
    lists_show_what_is_there(&seed);
    trees_show_lineage(&seed);
    histories_show_every_event(&seed);
    results_are_written_whole_and_in_little_memory(&seed);
    logs_are_those_of_the_attempt(&seed);

    let answered = place.json(&["work", "answer", &seed.asking.to_string(), "the red one"]);
    assert_eq!((answered["status"].as_str(), answered["event"].as_str()), (Some("ACCEPTED"), Some("WORK_ANSWERED")));
    assert_eq!(place.fails(&["work", "answer", &seed.asking.to_string(), "the blue one"]).0, 1);
    assert!(place.said(&["work", "cancel", &seed.waiting.to_string(), "not needed"]).contains("is CANCELLED"));
    assert_eq!(place.json(&["work", &seed.waiting.to_string()])["reason"], "not needed");
    assert_eq!(place.json(&["work", "cancel", &seed.done.to_string()])["status"], "COMPLETE");
}

fn lists_show_what_is_there(seed: &Seed) {
    let place = &seed.place;
    assert_eq!(place.json(&["runs"]).as_array().unwrap().len(), 5);
    assert_eq!(place.json(&["runs", "--limit", "2"]).as_array().unwrap().len(), 2);
    let outstanding = place.json(&["work"]);
    let mut ids: Vec<&str> = outstanding.as_array().unwrap().iter().map(|work| work["work_id"].as_str().unwrap()).collect();
    ids.sort_unstable();
    assert_eq!(ids, [seed.asking.to_string(), seed.waiting.to_string()]);
    let dead = place.json(&["work", "--dead"]);
    assert_eq!((dead[0]["agent_name"].as_str(), dead[0]["error"]["kind"].as_str()), (Some("counter"), Some("agent")));
    let table = place.said(&["runs"]);
    assert!(table.starts_with("WORK ") && table.contains("count…") && table.contains("\\u{1b}]0;evil\\u{7}"), "{table}");
    assert!(!table.contains('\x1b'));
    let status = place.json(&["status"]);
    assert_eq!((status["works_outstanding"].as_i64(), status["works_dead"].as_i64()), (Some(2), Some(1)));
    assert!(place.said(&["stations"]).contains("no station"));
}

fn trees_show_lineage(seed: &Seed) {
    let place = &seed.place;
    let tree = place.json(&["runs", "--uuid", seed.root.as_str()]);
    assert_eq!(tree["run_id"], seed.root.as_str());
    assert_eq!(tree["children"][0]["work_id"], seed.done.to_string());
    assert_eq!(tree["children"][0]["children"][1]["work_id"], seed.failed.to_string());
    let below = place.said(&["runs", "--uuid", seed.root.child(1).as_str()]);
    assert!(below.contains("├─ -1") && below.contains("└─ -2") && !below.contains("ESCALATED"), "{below}");
    assert_eq!(place.said(&["runs", "--uuid", &seed.done.to_string()]), below);
}

fn histories_show_every_event(seed: &Seed) {
    let place = &seed.place;
    let work = place.json(&["work", &seed.done.to_string()]);
    assert_eq!(work["result"], json!({"answer": [1, 2]}));
    let types: Vec<&str> = work["events"].as_array().unwrap().iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["WORK_ASSIGNED", "WORK_ACCEPTED", "WORK_COMPLETE"]);
    let text = place.said(&["work", &seed.failed.to_string()]);
    assert!(text.contains("FAILED (WORK_FAILED)") && text.contains("broke\\u{1b}[31m in two [dead letter]"), "{text}");
    assert!(!text.contains('\x1b'));
    let asking = place.said(&["work", &seed.asking.to_string()]);
    assert!(asking.contains("which one?") && asking.contains(&format!("lattice-mcp work answer {} TEXT", seed.asking)), "{asking}");
}

fn results_are_written_whole_and_in_little_memory(seed: &Seed) {
    let place = &seed.place;
    assert_eq!(place.said(&["work", &seed.done.to_string(), "--result"]), "{\"answer\":[1,2]}");
    let (code, said) = place.fails(&["work", &seed.waiting.to_string(), "--result"]);
    assert!(code == 1 && said.contains("PENDING"), "{said}");

    let large = seed.large.to_string();
    let mut child = place.command(&["work", &large, "--result"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut most = vec![0; LARGE - (1 << 20)];
    out.read_exact(&mut most).unwrap();
    #[cfg(target_os = "linux")]
    {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        // Not what it maps of its own file, which is large in a debug build.
        let held: u64 =
            status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap().trim().trim_end_matches(" kB").parse().unwrap();
        assert!(held < LARGE as u64 / 2 / 1024, "the program holds {held} KiB");
    }
    let mut rest = Vec::new();
    out.read_to_end(&mut rest).unwrap();
    assert!(most.iter().chain(&rest).all(|byte| *byte == b'x') && most.len() + rest.len() == LARGE);
    assert_eq!(child.wait().unwrap().code(), Some(0));

    let mut child = place.command(&["work", &large, "--result"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), ended.stderr.as_slice()), (Some(0), &b""[..]), "a reader that leaves is no failure");
}

fn logs_are_those_of_the_attempt(seed: &Seed) {
    let place = &seed.place;
    assert_eq!(place.fails(&["work", &seed.done.to_string(), "--log"]).0, 3);
    fs::create_dir_all(place.data().join("logs")).unwrap();
    fs::write(place.data().join(format!("logs/{}.1.log", seed.done)), "first\nsecond\n").unwrap();
    assert_eq!(place.said(&["work", &seed.done.to_string(), "--log"]), "first\nsecond\n");
    assert_eq!(place.fails(&["work", &seed.done.to_string(), "--log", "--attempt", "2"]).0, 3);
}
