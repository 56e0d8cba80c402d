//! Assign -> settled of an agent that does nothing, in one process, beside the bare cost of its commits; then a full store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lattice_mcp::config::Config;
use lattice_mcp::dispatcher::{Caller, Dispatcher, Mode, Request};
use lattice_mcp::station::{Setting, Station};
use rusqlite::Connection;

use crate::table::{Table, micros, per_second};

const ECHO: &str = "---\nname: echo\ndescription: answers with its task\nrunner: { kind: echo }\nlimits: { max_parallel: 256 }\n---\n";

/// A station on a fresh folder, with one agent that does nothing.
struct Bench {
    station: Station,
    caller: Caller,
    _data: tempfile::TempDir,
}

impl Bench {
    async fn open() -> Self {
        let data = tempfile::TempDir::new().expect("a temporary folder");
        std::fs::write(data.path().join("echo.md"), ECHO).expect("an agent file");
        let mut config = Config::default();
        config.lattice.data_dir = Some(data.path().join("data"));
        config.lattice.work.max_parallel = 256;
        config.lattice.work.queue_size = 100_000;
        config.lattice.storage.max_bytes = lattice_mcp::model::size::Size::mib(64 << 10);
        config.agents.dirs = vec![data.path().to_owned()];
        let setting = Setting {
            config: Arc::new(config),
            file: None,
            cwd: data.path().to_owned(),
            bound: None,
            orchestrates_only: false,
            runs_only: false,
            handed_on: Vec::new(),
            by_name: false,
        };
        let station = Station::open(setting).expect("a station");
        station.wake().await.expect("it wakes");
        Self { station, caller: Caller::connection(), _data: data }
    }

    async fn one(&self) -> Duration {
        let began = Instant::now();
        one(self.station.dispatcher(), &self.caller).await;
        began.elapsed()
    }

    /// Many works, so many at once.
    async fn many(&self, count: usize, at_once: usize) -> f64 {
        let began = Instant::now();
        let lanes = (0..at_once).map(|_| {
            let (dispatcher, caller) = (self.station.dispatcher().clone(), self.caller.clone());
            let share = count / at_once;
            #[expect(clippy::disallowed_methods, reason = "a bench has no tracker")]
            tokio::spawn(async move {
                for _ in 0..share {
                    one(&dispatcher, &caller).await;
                }
            })
        });
        for lane in lanes.collect::<Vec<_>>() {
            lane.await.expect("a lane ends");
        }
        (count / at_once * at_once) as f64 / began.elapsed().as_secs_f64()
    }
}

/// Hands a work over and waits until it has settled.
pub(crate) async fn one(dispatcher: &Dispatcher, caller: &Caller) {
    let request = Request {
        agent: "echo".parse().expect("a name"),
        task: "nothing".into(),
        context: serde_json::Map::new(),
        station: None,
        priority: 0,
        timeout: None,
        queue_timeout: None,
        silence_timeout: None,
        run_id: None,
        idempotency_key: None,
        trace: None,
        accept: None,
        budget: None,
        after: None,
        map: None,
    };
    let assigned = dispatcher.assign(caller, request).await.expect("assigned");
    let works = dispatcher.wait(&[assigned.work_id], Mode::All, Duration::from_secs(60), &mut |_, _| {}).await.expect("waited");
    assert!(works[0].status.is_settled());
}

fn spread(mut samples: Vec<Duration>) -> (Duration, Duration) {
    samples.sort_unstable();
    (samples[samples.len() / 2], samples[samples.len() * 99 / 100])
}

/// The same number of commits of the same size, and nothing else.
fn bare_commits(rounds: usize) -> (Duration, Duration) {
    let dir = tempfile::TempDir::new().expect("a temporary folder");
    let db = Connection::open(dir.path().join("bare.db")).expect("a database");
    db.pragma_update(None, "journal_mode", "WAL").expect("WAL");
    db.pragma_update(None, "synchronous", "NORMAL").expect("NORMAL");
    db.execute_batch("CREATE TABLE log (seq INTEGER PRIMARY KEY, work BLOB, body BLOB); CREATE INDEX log_work ON log (work, seq)")
        .expect("a table");
    let body = [7u8; 400];
    let samples = (0..rounds as u64).map(|n| {
        let began = Instant::now();
        // Child number, push with the order, take, accepted, completed with the removal: five commits.
        for step in 0..5u64 {
            let work = (n * 8 + step).to_be_bytes();
            let mut insert = db.prepare_cached("INSERT INTO log (work, body) VALUES (?1, ?2)").expect("prepared");
            insert.execute(rusqlite::params![&work[..], &body[..]]).expect("inserted");
        }
        began.elapsed()
    });
    spread(samples.collect())
}

/// Prints what one process does.
pub(crate) async fn run(quick: bool) {
    let rounds = if quick { 500 } else { 5000 };
    let mut table =
        Table::new("assign -> settled of an agent that does nothing, in one process", &["", "median", "p99", "works/s", "times bare"]);
    let (bare, bare99) = bare_commits(rounds);
    table.row(&["bare: five SQLite commits", &micros(bare), &micros(bare99), "", "1.0"]);
    let bench = Bench::open().await;
    for _ in 0..200 {
        bench.one().await;
    }
    let mut samples = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        samples.push(bench.one().await);
    }
    let (median, p99) = spread(samples);
    let times = |median: Duration| format!("{:.1}", median.as_secs_f64() / bare.as_secs_f64());
    table.row(&["one at a time", &micros(median), &micros(p99), &per_second(1.0 / median.as_secs_f64()), &times(median)]);
    let throughput = bench.many(if quick { 5_000 } else { 100_000 }, 64).await;
    table.row(&["64 at once", "", "", &per_second(throughput), ""]);
    let full = if quick { 20_000 } else { 1_000_000 };
    let began = Instant::now();
    bench.many(full, 128).await;
    let filled = began.elapsed();
    let mut samples = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        samples.push(bench.one().await);
    }
    let (median, p99) = spread(samples);
    table.row(&[
        &format!("one at a time, after {full} works"),
        &micros(median),
        &micros(p99),
        &per_second(1.0 / median.as_secs_f64()),
        &times(median),
    ]);
    let throughput = bench.many(if quick { 5_000 } else { 50_000 }, 64).await;
    table.row(&[&format!("64 at once, after {full} works"), "", "", &per_second(throughput), ""]);
    table.row(&[&format!("(filling took {:.0} s)", filled.as_secs_f64()), "", "", "", ""]);
    table.print();

    let runs = bench.station.dispatcher().runs();
    runs.catch_up().await.expect("the run store keeps up");
    let some = runs.recent(None, 1, false).await.expect("runs").remove(0);
    let caller = Caller::connection();
    for _ in 0..100 {
        one(bench.station.dispatcher(), &caller).await;
    }
    let _ = some;
    runs.catch_up().await.expect("the run store keeps up");
    let root = runs.recent(None, 1, false).await.expect("runs").remove(0).root_run_id;
    let mut samples = Vec::new();
    for _ in 0..50 {
        let began = Instant::now();
        let tree = runs.tree(&root, 1000).await.expect("a tree");
        assert_eq!(tree.len(), 100);
        samples.push(began.elapsed());
    }
    let (median, p99) = spread(samples);
    let mut table = Table::new("lineage", &["", "median", "p99"]);
    table.row(&[&format!("a tree of 100 among {full} runs"), &micros(median), &micros(p99)]);
    table.print();
    let mut samples = Vec::new();
    for _ in 0..50 {
        let began = Instant::now();
        bench.station.dispatcher().look_around(&caller, 12).await.expect("an outlook");
        samples.push(began.elapsed());
    }
    let (median, p99) = spread(samples);
    let mut table = Table::new("check_work without arguments", &["", "median", "p99"]);
    table.row(&[&format!("over {full} settled works"), &micros(median), &micros(p99)]);
    table.print();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let memory = status.lines().find(|line| line.starts_with("VmRSS")).unwrap_or("VmRSS: ?");
    let mut table = Table::new("memory of that process after all this", &[""]);
    table.row(&[memory]);
    table.print();
    bench.station.close().await;
}
