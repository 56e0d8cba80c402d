use super::file::{SCHEMA, VERSION, connect};
use super::*;
use crate::config::Config;
use crate::model::assignment::Assignment;
use crate::model::event::{Event, Kind, Side};
use crate::model::output::Output;
use crate::telemetry::{new_instance, new_root, new_work_id};
use crate::transport::mesh::Sides;
use crate::transport::{Record, local};
use crate::works::record;

/// A work that is given out, taken and done.
fn story() -> [Record; 3] {
    let assignment: Assignment = serde_json::from_value(serde_json::json!({
        "work_id": new_work_id(), "orchestrator_run_id": new_root().child(1), "originating_station": "here", "target_station": "here",
        "agent_name": "a", "task": "x", "assigned_at": now(), "timeout": "5m", "trace_id": "", "span_id": ""
    }))
    .unwrap();
    let (work_id, run_id) = (assignment.work_id, assignment.orchestrator_run_id.clone());
    let done = Kind::Complete { result: Output::Inline("y".into()), duration_ms: 1, checks: Vec::new() };
    let events = [(Side::Assigner, 0, Kind::Assigned(Box::new(assignment))), (Side::Leaf, 1, Kind::Accepted), (Side::Leaf, 1, done)];
    events.map(|(side, attempt, kind)| {
        let (run_id, station) = (run_id.clone(), "here".parse().unwrap());
        record(Event { work_id, run_id, at: now(), station, instance: new_instance(), side, attempt, kind })
    })
}

async fn open_works(runs: &Runs) -> u64 {
    runs.open_works(None, 9).await.unwrap().0
}

#[tokio::test]
async fn what_a_follower_brings_of_one_log_counts_however_far_the_other_one_was_read() {
    let dir = tempfile::tempdir().unwrap();
    let sides = Sides::new();
    let (near, far) = (&sides.near, &sides.far);
    let (both, _opened) = sides.mesh(Some(far.clone()));
    let (alone, _away) = sides.mesh(None);
    let runs = Runs::open(dir.path(), both.log.clone()).unwrap();
    let [order, accepted, done] = story();
    near.log.append(vec![order]).await.unwrap();
    runs.catch_up().await.unwrap();
    // The follower has not come to what the server says yet; whoever catches up has.
    let after = runs.state.lock().await.upto;
    let mut follow = alone.log.follow(Filter::AllWork, after).await.unwrap();
    far.log.append(story().to_vec()).await.unwrap();
    runs.catch_up().await.unwrap();
    near.log.append(vec![accepted]).await.unwrap();
    runs.take_next(&mut *follow).await.unwrap();
    assert_eq!(runs.state.lock().await.upto, Position { seq: 2, far: 3 });
    near.log.append(vec![done]).await.unwrap();
    runs.take_next(&mut *follow).await.unwrap();
    assert_eq!(open_works(&runs).await, 0, "what was done here is known");
    // Once more, from its beginning: nothing is folded twice.
    let mut again = both.log.follow(Filter::AllWork, Position::default()).await.unwrap();
    runs.take_next(&mut *again).await.unwrap();
    assert_eq!(runs.state.lock().await.upto, Position { seq: 3, far: 3 });
}

#[tokio::test]
async fn of_two_processes_each_writes_what_the_other_one_has_not_seen() {
    let dir = tempfile::tempdir().unwrap();
    let sides = Sides::new();
    let (near, far) = (&sides.near, &sides.far);
    let (both, _opened) = sides.mesh(Some(far.clone()));
    let (alone, _away) = sides.mesh(None);
    let (with, without) = (Runs::open(dir.path(), both.log).unwrap(), Runs::open(dir.path(), alone.log).unwrap());
    let [order, accepted, done] = story();
    near.log.append(vec![order, accepted]).await.unwrap();
    far.log.append(story().to_vec()).await.unwrap();
    with.catch_up().await.unwrap();
    assert_eq!(open_works(&with).await, 1);
    near.log.append(vec![done]).await.unwrap();
    // It has not come to the server, and so not as far there.
    without.catch_up().await.unwrap();
    assert_eq!(open_works(&without).await, 0, "what was done here is known");
    far.log.append(story().to_vec()).await.unwrap();
    with.catch_up().await.unwrap();
    let later = Runs::open(dir.path(), with.log.clone()).unwrap();
    let mut folds = Folds::default();
    later.begin(&mut folds).await.unwrap();
    assert_eq!(folds.upto, Position { seq: 3, far: 6 });
    assert_eq!(open_works(&later).await, 0);
}

#[tokio::test]
async fn a_store_that_left_out_one_log_for_the_other_is_folded_again() {
    let dir = tempfile::tempdir().unwrap();
    let sides = Sides::new();
    let (near, far) = (&sides.near, &sides.far);
    let (both, _opened) = sides.mesh(Some(far.clone()));
    let [order, accepted, done] = story();
    near.log.append(vec![order, accepted]).await.unwrap();
    let runs = Runs::open(dir.path(), both.log.clone()).unwrap();
    runs.catch_up().await.unwrap();
    drop(runs);
    // As an earlier version wrote it: it stands behind all there is, with a work that was done in between.
    let place = |far: i64, seq: i64| 1 << 62 | far << 28 | seq;
    let old = Connection::open(dir.path().join("runs.db")).unwrap();
    old.execute_batch(
        "ALTER TABLE folded DROP COLUMN seq; ALTER TABLE folded DROP COLUMN far;
         ALTER TABLE runs DROP COLUMN seen_seq; ALTER TABLE runs DROP COLUMN seen_far;
         ALTER TABLE folded DROP COLUMN marked; ALTER TABLE folded DROP COLUMN mark;",
    )
    .unwrap();
    old.execute("UPDATE folded SET upto = ?1", [place(300, 3)]).unwrap();
    old.execute("UPDATE runs SET seen = ?1", [place(300, 2)]).unwrap();
    old.pragma_update(None, "user_version", VERSION - 2).unwrap();
    drop(old);
    near.log.append(vec![done]).await.unwrap();
    let runs = Runs::open(dir.path(), both.log).unwrap();
    runs.catch_up().await.unwrap();
    assert_eq!(open_works(&runs).await, 0);
}

#[tokio::test]
async fn a_servers_log_that_begins_anew_is_folded_from_its_beginning() {
    let dir = tempfile::tempdir().unwrap();
    let sides = Sides::new();
    let far = &sides.far;
    let settings = Config::default().lattice.storage;
    let stores = ["shorter", "longer"].map(|name| local::open(&dir.path().join(name), &settings).unwrap());
    let [shorter, longer] = stores.each_ref().map(local::Local::transport);
    let of_the_mark = |db: &Connection| db.query_row("SELECT far, marked FROM folded", [], |row| Ok((row.get(0)?, row.get(1)?)));
    far.log.append([story(), story()].concat()).await.unwrap();
    let mut open = story();
    shorter.log.append(open[..2].to_vec()).await.unwrap();
    longer.log.append([story(), story(), story()].concat()).await.unwrap();
    open = story();
    longer.log.append(open[..1].to_vec()).await.unwrap();
    let (both, server) = sides.mesh(Some(far.clone()));
    let runs = Runs::open(dir.path(), both.log).unwrap();
    for (store, works, unsettled, upto) in [(far, 2, 0, 6), (&shorter, 3, 1, 2), (far, 3, 1, 6), (&longer, 7, 2, 10)] {
        // As after another start, or on another connection.
        *runs.state.lock().await = Folds::default();
        server.send_replace(None);
        runs.catch_up().await.unwrap();
        server.send_replace(Some(store.clone()));
        runs.catch_up().await.unwrap();
        assert_eq!((runs.recent(None, 99, false).await.unwrap().len(), open_works(&runs).await), (works, unsettled));
        let mark: (i64, i64) = runs.reader.call(move |db| of_the_mark(db)).await.unwrap();
        assert_eq!(mark, (upto, upto));
    }
}

#[tokio::test]
async fn a_store_of_an_earlier_version_whose_servers_log_is_another_one_is_folded_again() {
    let dir = tempfile::tempdir().unwrap();
    let sides = Sides::new();
    let far = &sides.far;
    let (both, _opened) = sides.mesh(Some(far.clone()));
    far.log.append(story()[..2].to_vec()).await.unwrap();
    drop(Runs::open(dir.path(), both.log.clone()).unwrap());
    let old = Connection::open(dir.path().join("runs.db")).unwrap();
    old.execute_batch("ALTER TABLE folded DROP COLUMN marked; ALTER TABLE folded DROP COLUMN mark; UPDATE folded SET far = 300").unwrap();
    old.pragma_update(None, "user_version", VERSION - 1).unwrap();
    drop(old);
    let runs = Runs::open(dir.path(), both.log).unwrap();
    runs.catch_up().await.unwrap();
    assert_eq!((open_works(&runs).await, runs.state.lock().await.upto.far), (1, 2));
}

#[test]
fn a_store_of_an_earlier_version_keeps_its_rows() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("runs.db");
    let old = Connection::open(&file).unwrap();
    old.execute_batch(SCHEMA).unwrap();
    old.pragma_update(None, "user_version", 1).unwrap();
    let pending = serde_json::to_string(&crate::model::status::Status::default()).unwrap();
    old.execute(
        "INSERT INTO runs (work, run, root, origin, target, trace, agent, task, status, event, assigned_at, attempt, dead, seen)
         VALUES (?1, ?2, ?2, 'a', 'a', '', 'a', 'old', ?3, 'WORK_ASSIGNED', 0, 0, 0, 1)",
        params![uuid::Uuid::from_u128(1).as_bytes(), uuid::Uuid::from_u128(2).to_string(), pending],
    )
    .unwrap();
    drop(old);
    for _ in 0..2 {
        let db = connect(&file).unwrap().0;
        let run = db.query_row(&format!("SELECT {} FROM runs", rows::COLUMNS), [], rows::read).unwrap();
        assert_eq!((run.task.as_str(), run.usage.is_empty(), run.checks.len(), run.budget), ("old", true, 0, None));
    }
}

#[test]
fn a_new_store_is_opened_by_many_at_once() {
    for _ in 0..100 {
        let dir = tempfile::tempdir().unwrap();
        let (file, all) = (dir.path().join("runs.db"), std::sync::Barrier::new(8));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    all.wait();
                    connect(&file).unwrap().1.unwrap();
                });
            }
        });
    }
}

/// A log to which more is added with each look at it.
struct Growing {
    end: std::sync::atomic::AtomicU64,
}

#[async_trait::async_trait]
impl Log for Growing {
    async fn append(&self, _: Vec<transport::Record>) -> transport::Result<Position> {
        unreachable!("nobody writes")
    }

    async fn read(&self, filter: Filter, after: Position, limit: usize) -> transport::Result<Vec<Entry>> {
        use std::sync::atomic::Ordering;
        // Of none of the works that others speak of.
        if let Filter::Work(_) = filter {
            return Ok(Vec::new());
        }
        let end = self.end.fetch_add(limit as u64, Ordering::Relaxed);
        let subject = transport::Subject::Status(crate::telemetry::new_work_id());
        let entry = |seq| Entry { position: Position::of(seq), subject: subject.clone(), by: None, is_forwarded: false, body: "{}".into() };
        Ok((after.seq.saturating_add(1)..=end).take(limit).map(entry).collect())
    }

    async fn follow(&self, _: Filter, _: Position) -> transport::Result<Box<dyn transport::Follow>> {
        unreachable!("nobody follows")
    }

    async fn replay(&self, _: Filter) -> transport::Result<(Vec<Entry>, Box<dyn transport::Follow>)> {
        unreachable!("nobody follows")
    }

    async fn head(&self) -> transport::Result<Position> {
        Ok(Position::of(self.end.load(std::sync::atomic::Ordering::Relaxed)))
    }
}

#[tokio::test]
async fn whoever_catches_up_with_a_log_that_grows_as_fast_comes_to_an_end() {
    let dir = tempfile::tempdir().unwrap();
    let log = Arc::new(Growing { end: (4 * BATCH as u64).into() });
    let runs = Runs::open(dir.path(), log.clone()).unwrap();
    tokio::time::timeout(Duration::from_secs(60), runs.catch_up()).await.expect("an end").unwrap();
    let upto = runs.state.lock().await.upto.seq;
    assert!(upto >= 4 * BATCH as u64, "{upto}: what was there is taken in");
}

#[tokio::test]
async fn whoever_catches_up_takes_in_the_servers_log_beside_one_that_grows_as_fast() {
    let dir = tempfile::tempdir().unwrap();
    let mut sides = Sides::new();
    sides.near.log = Arc::new(Growing { end: (4 * BATCH as u64).into() });
    let far = &sides.far;
    far.log.append((0..BATCH).flat_map(|_| story()).collect()).await.unwrap();
    let audit = transport::Subject::Audit { noun: "station".into(), verb: "joined".into() };
    far.log.append(vec![Record { subject: audit, body: "{}".into() }]).await.unwrap();
    let (both, _opened) = sides.mesh(Some(far.clone()));
    let runs = Runs::open(dir.path(), both.log).unwrap();
    tokio::time::timeout(Duration::from_secs(60), runs.catch_up()).await.expect("an end").unwrap();
    let upto = runs.state.lock().await.upto;
    assert!(upto.reaches(Position { seq: 4 * BATCH as u64, far: 3 * BATCH as u64 }), "{upto:?}: what was there is taken in");
    assert_eq!(open_works(&runs).await, 0);
}
