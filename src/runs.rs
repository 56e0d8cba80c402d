//! The run store: the fold of the log, kept in SQLite with its lineage.
//!
//! Nothing is written here that the log does not say; what is lost is read again. Several processes may keep one store:
//! each row remembers the place up to which it was folded, in the log where its work lives, and never goes back.

mod fold;
mod outlook;
mod rows;
mod spent;
mod waits;

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use self::fold::Folds;
pub use self::outlook::{Outlook, Scope};
pub use self::waits::Waiting;
use crate::model::access::Principal;
use crate::model::id::{RunId, WorkId};
use crate::model::run::Run;
use crate::telemetry::now;
use crate::transport::{self, Entry, Filter, Follow, Log, Position, local};

/// Why the run store did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The file is corrupt, read-only, of a newer version or otherwise refuses; the text says which and what to do.
    #[error("{0}")]
    Store(Arc<str>),
    /// The log failed.
    #[error(transparent)]
    Log(#[from] transport::Error),
    /// The store's thread has ended.
    #[error("the run store is closed")]
    Closed,
}

/// How long another process may keep the file to itself.
const BUSY_MAX: Duration = Duration::from_secs(10);

type Result<T> = std::result::Result<T, Error>;

/// The run store; cheap to clone.
#[derive(Clone)]
pub struct Runs {
    reader: Thread,
    writer: Thread,
    log: Arc<dyn Log>,
    state: Arc<Mutex<Folds>>,
    stirred: Arc<watch::Sender<u64>>,
}

/// A run store that is being opened while something else is done.
pub struct Opening(std::thread::JoinHandle<Result<(Connection, Connection)>>);

impl Opening {
    /// Begins to open `runs.db` in a folder; both are made if they are missing.
    pub fn begin(dir: &Path) -> Self {
        let dir = dir.to_owned();
        Self(std::thread::spawn(move || {
            let file = dir.join("runs.db");
            DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(|error| {
                Error::Store(format!("the folder {} can't be made: {error}; choose another data folder", dir.display()).into())
            })?;
            let (writer, version) = connect(&file).map_err(|error| refused(&file, &error))?;
            if let Err(text) = version {
                return Err(Error::Store(format!("{}: {text}", file.display()).into()));
            }
            let reader = connect(&file).map_err(|error| refused(&file, &error))?.0;
            Ok((reader, writer))
        }))
    }

    /// The store, as the fold of this log.
    ///
    /// # Errors
    /// `Store`, with the file's name and what to do.
    pub fn finish(self, log: Arc<dyn Log>) -> Result<Runs> {
        let (reader, writer) = self.0.join().map_err(|_| Error::Closed)??;
        Ok(Runs {
            reader: Thread::start("runs-read", reader)?,
            writer: Thread::start("runs-write", writer)?,
            log,
            state: Arc::default(),
            stirred: Arc::default(),
        })
    }
}

const VERSION: i64 = 1 + ADDED.len() as i64;
const BATCH: usize = 512;
const CALLS_MAX: usize = 1024;
const GATHER: Duration = Duration::from_millis(100);
const FOLLOW_PAUSE: Duration = Duration::from_secs(1);
/// How often a process that hardly ever reads the store takes in what the log says.
pub const SELDOM: Duration = Duration::from_secs(60);
const PRUNE_BATCH: u32 = 500;
const PRUNE_EVERY: Duration = Duration::from_secs(60);

const SCHEMA: &str = "
    CREATE TABLE runs (
        local INTEGER PRIMARY KEY,
        work BLOB NOT NULL,
        run TEXT NOT NULL,
        parent TEXT,
        root TEXT NOT NULL,
        origin TEXT NOT NULL,
        target TEXT NOT NULL,
        trace TEXT NOT NULL,
        agent TEXT NOT NULL,
        task TEXT NOT NULL,
        status TEXT NOT NULL,
        event TEXT NOT NULL,
        assigned_at INTEGER NOT NULL,
        accepted_at INTEGER,
        settled_at INTEGER,
        attempt INTEGER NOT NULL,
        duration_ms INTEGER,
        outcome TEXT,
        dead INTEGER NOT NULL,
        seen INTEGER NOT NULL
    );
    CREATE UNIQUE INDEX runs_work ON runs (work);
    CREATE INDEX runs_run ON runs (run);
    CREATE INDEX runs_parent ON runs (parent);
    CREATE INDEX runs_root ON runs (root, local);
    CREATE INDEX runs_open ON runs (local) WHERE settled_at IS NULL;
    CREATE INDEX runs_settled ON runs (settled_at) WHERE settled_at IS NOT NULL;
    CREATE INDEX runs_dead ON runs (local) WHERE dead = 1;
    CREATE TABLE folded (one INTEGER PRIMARY KEY CHECK (one = 1), upto INTEGER NOT NULL);
    INSERT INTO folded VALUES (1, 0);
";

/// What the second version has besides: whose works are whose, and up to where each owner has been told what settled.
const OWNERS: &str = "
    ALTER TABLE runs ADD COLUMN owner TEXT;
    ALTER TABLE runs ADD COLUMN label TEXT NOT NULL DEFAULT '';
    ALTER TABLE runs ADD COLUMN settled_no INTEGER;
    UPDATE runs SET label = CASE
        WHEN status LIKE '%Pending%' THEN 'PENDING' WHEN status LIKE '%Accepted%' THEN 'ACCEPTED'
        WHEN status LIKE '%Escalated%' THEN 'ESCALATED' ELSE upper(trim(status, '\"')) END;
    CREATE INDEX runs_owner_open ON runs (owner, label, local) WHERE settled_at IS NULL;
    CREATE INDEX runs_owner_settled ON runs (owner, settled_no) WHERE settled_no IS NOT NULL;
    CREATE TABLE looks (owner TEXT PRIMARY KEY, upto INTEGER NOT NULL) WITHOUT ROWID;
";
/// What each later version adds; the first of them leads from version 1 to 2.
const ADDED: [&str; 7] = [
    OWNERS,
    "ALTER TABLE runs ADD COLUMN checks TEXT",
    "ALTER TABLE runs ADD COLUMN tokens INTEGER NOT NULL DEFAULT 0;
     ALTER TABLE runs ADD COLUMN cost REAL NOT NULL DEFAULT 0;
     ALTER TABLE runs ADD COLUMN turns INTEGER NOT NULL DEFAULT 0;
     ALTER TABLE runs ADD COLUMN budget TEXT",
    waits::SCHEMA,
    "ALTER TABLE runs ADD COLUMN principal TEXT",
    APART,
    MARKED,
];
/// Which entry of the server's log was the last that was folded: a server may lose its store, and count anew.
const MARKED: &str = "
    ALTER TABLE folded ADD COLUMN marked INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE folded ADD COLUMN mark TEXT;
";
/// A number for each log, where one stood for both: the server's above the lower 28 bits and a mark, or this machine's without it.
/// What was folded on such a number may have left out the one log for the other: all is folded again. `upto` and `seen` stay for
/// an earlier version that still runs.
const APART: &str = "
    ALTER TABLE folded ADD COLUMN seq INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE folded ADD COLUMN far INTEGER NOT NULL DEFAULT 0;
    UPDATE folded SET seq = upto WHERE upto < 1 << 62;
    ALTER TABLE runs ADD COLUMN seen_seq INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN seen_far INTEGER NOT NULL DEFAULT 0;
    UPDATE runs SET seen_seq = seen WHERE seen < 1 << 62;
    UPDATE runs SET seen_seq = seen & ((1 << 28) - 1), seen_far = (seen - (1 << 62)) >> 28 WHERE seen >= 1 << 62;
";

impl Runs {
    /// Opens or makes `runs.db` in a folder, as the fold of this log.
    ///
    /// # Errors
    /// `Store`, with the file's name and what to do.
    pub fn open(dir: &Path, log: Arc<dyn Log>) -> Result<Self> {
        Opening::begin(dir).finish(log)
    }

    /// Folds what the log says into the store until cancelled, and drops the oldest runs once they settled `max_age` ago. Whoever
    /// reads catches up first: `seldom` is for a process that hardly ever does.
    pub async fn keep(&self, max_age: Duration, seldom: bool, cancel: CancellationToken) {
        let fold = async {
            loop {
                let folded = if seldom { self.catch_up().await } else { self.fold_on().await };
                match folded {
                    // The connection itself says so, once.
                    Ok(()) | Err(Error::Log(transport::Error::Unreachable(_) | transport::Error::Unanswered(_))) => {}
                    Err(error) => tracing::warn!(%error, "the run store fell behind the log; trying again"),
                }
                tokio::time::sleep(if seldom { SELDOM } else { Duration::from_secs(1) }).await;
            }
        };
        let prune = async {
            loop {
                tokio::time::sleep(PRUNE_EVERY).await;
                if let Err(error) = self.prune(max_age).await {
                    tracing::warn!(%error, "could not drop old runs");
                }
            }
        };
        tokio::select! {
            () = cancel.cancelled() => {}
            () = fold => {}
            () = prune => {}
        }
    }

    /// Takes in all that stands in the log now; what comes meanwhile is not waited for, however much that is.
    ///
    /// # Errors
    /// The store's or the log's.
    pub async fn catch_up(&self) -> Result<()> {
        let mut folds = self.state.lock().await;
        let mut head = None::<Position>;
        loop {
            self.begin(&mut folds).await?;
            let is_sure = folds.is_of(self.log.epoch());
            // One of two logs may grow as fast as it is read, and leave no room for the other one: what came meanwhile is left out.
            let after = match head {
                Some(head) if folds.upto.seq >= head.seq => Position { seq: u64::MAX, ..folds.upto },
                _ => folds.upto,
            };
            // Of a log that may be another one nothing is taken in.
            let after = if is_sure { after } else { Position { far: u64::MAX, ..after } };
            let entries = self.log.read(Filter::AllWork, after, BATCH).await?;
            if is_sure && !folds.is_of(self.log.epoch()) {
                continue;
            }
            let is_end = entries.len() < BATCH;
            self.take_in(&mut folds, entries).await?;
            // Where it ends is asked for by whoever is far behind only.
            let head = match head {
                _ if is_end => return Ok(()),
                Some(head) => head,
                None => *head.insert(self.log.head().await?),
            };
            if folds.upto.reaches(head) {
                return Ok(());
            }
        }
    }

    /// The run of a work.
    ///
    /// # Errors
    /// The store's.
    pub async fn of_work(&self, id: WorkId) -> Result<Option<Run>> {
        self.reader
            .call(move |db| {
                let sql = format!("SELECT {} FROM runs WHERE work = ?1", rows::COLUMNS);
                db.prepare_cached(&sql)?.query_row(params![id.as_bytes()], rows::read).optional()
            })
            .await
    }

    /// A run and everything below it, oldest first, at most `limit`.
    ///
    /// # Errors
    /// The store's.
    pub async fn tree(&self, run: &RunId, limit: u32) -> Result<Vec<Run>> {
        let (run, root) = (run.clone(), run.root());
        self.reader
            .call(move |db| {
                let sql = format!(
                    "SELECT {} FROM runs WHERE root = ?1 AND (run = ?2 OR substr(run, 1, length(?2) + 1) = ?2 || '-') ORDER BY local LIMIT ?3",
                    rows::COLUMNS
                );
                let mut query = db.prepare_cached(&sql)?;
                query.query_map(params![root.as_str(), run.as_str(), limit], rows::read)?.collect()
            })
            .await
    }

    /// Unsettled works, of one principal if one is given: how many, and the most recent of them.
    ///
    /// # Errors
    /// The store's.
    pub async fn open_works(&self, of: Option<Principal>, limit: u32) -> Result<(u64, Vec<Run>)> {
        self.reader
            .call(move |db| {
                let (only, whose) = whose(of.as_ref());
                let count = db
                    .prepare_cached(&format!("SELECT count(*) FROM runs WHERE settled_at IS NULL AND {only}"))?
                    .query_row(params![whose], |row| row.get::<_, i64>(0))?;
                let sql = format!("SELECT {} FROM runs WHERE settled_at IS NULL AND {only} ORDER BY local DESC LIMIT ?2", rows::COLUMNS);
                let runs = db.prepare_cached(&sql)?.query_map(params![whose, limit], rows::read)?.collect::<rusqlite::Result<Vec<_>>>()?;
                Ok((u64::try_from(count).unwrap_or(0), runs))
            })
            .await
    }

    /// The most recent runs, of one principal if one is given, of dead letters only if so asked.
    ///
    /// # Errors
    /// The store's.
    pub async fn recent(&self, of: Option<Principal>, limit: u32, dead: bool) -> Result<Vec<Run>> {
        self.reader
            .call(move |db| {
                let (only, whose) = whose(of.as_ref());
                let dead = if dead { "dead = 1 AND" } else { "" };
                let sql = format!("SELECT {} FROM runs WHERE {dead} {only} ORDER BY local DESC LIMIT ?2", rows::COLUMNS);
                db.prepare_cached(&sql)?.query_map(params![whose, limit], rows::read)?.collect()
            })
            .await
    }

    /// Whether any run has this root, of one principal if one is given.
    ///
    /// # Errors
    /// The store's.
    pub async fn knows_root(&self, root: &RunId, of: Option<Principal>) -> Result<bool> {
        let root = root.clone();
        self.reader
            .call(move |db| {
                let (only, whose) = whose(of.as_ref());
                let sql = format!("SELECT 1 FROM runs WHERE {only} AND root = ?2 LIMIT 1");
                db.prepare_cached(&sql)?.exists(params![whose, root.as_str()])
            })
            .await
    }

    /// Keeps up with the log until cancelled, for a process that seldom does so otherwise.
    pub async fn follow(&self) {
        loop {
            if let Err(error) = self.fold_on().await {
                tracing::debug!(%error, "cannot keep up with the log now");
            }
            tokio::time::sleep(FOLLOW_PAUSE).await;
        }
    }

    async fn fold_on(&self) -> Result<()> {
        self.catch_up().await?;
        let after = self.state.lock().await.upto;
        let mut follow = self.log.follow(Filter::AllWork, after).await?;
        loop {
            self.take_next(&mut *follow).await?;
            // Nobody reads this store without catching up, if the log can be reached: what comes within a moment is written together.
            tokio::time::sleep(GATHER).await;
        }
    }

    /// Takes in what comes next, without what somebody who caught up has taken in meanwhile.
    async fn take_next(&self, follow: &mut dyn Follow) -> Result<()> {
        let mut entries = follow.next().await?;
        let mut folds = self.state.lock().await;
        if !folds.is_of(self.log.epoch()) {
            // What these say stands in the log, if that is the one they are of.
            drop(folds);
            return self.catch_up().await;
        }
        let upto = folds.upto;
        entries.retain(|entry| !upto.reaches(entry.position));
        self.take_in(&mut folds, entries).await
    }

    async fn begin(&self, folds: &mut Folds) -> Result<()> {
        if folds.upto == Position::default() {
            folds.upto = self.reader.call(|db| folded(db)).await?;
        }
        let epoch = self.log.epoch();
        if folds.epoch != Some(epoch) && self.see_to_the_mark().await? {
            // What was folded here, by this process or another one, goes for the log as it is now.
            folds.reset();
            (folds.upto, folds.epoch) = (self.reader.call(|db| folded(db)).await?, Some(epoch));
        }
        Ok(())
    }

    /// Looks whether the server's log still has the last entry that was folded, and lets all of it be folded again if not: it was lost
    /// with the server's store, or was dropped by age, and then what came after it is all that is left. Rows of works that the log
    /// says nothing of any more stay. False when it cannot be seen now.
    async fn see_to_the_mark(&self) -> Result<bool> {
        let (far, marked, mark) = self.reader.call(|db| marked(db)).await?;
        let stands = match &mark {
            _ if far == 0 => true,
            // As an earlier version wrote it: what it is of is not known.
            None => false,
            Some(mark) => match self.log.has(marked, mark).await {
                Err(transport::Error::Unreachable(_) | transport::Error::Unanswered(_)) => return Ok(false),
                stands => stands?,
            },
        };
        if !stands {
            tracing::info!(far, "the server's log is not the one that was read last, or has lost its end: it is read from its beginning");
            let begin_anew = move |db: &mut Connection| {
                let tx = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
                // Another process may have been first.
                let ours = "UPDATE folded SET far = 0, marked = 0, mark = NULL WHERE marked = ?1 AND mark IS ?2";
                if tx.execute(ours, params![rows::kept(marked), mark])? > 0 {
                    tx.execute("UPDATE runs SET seen_far = 0 WHERE seen_far > 0", [])?;
                }
                tx.commit()
            };
            self.writer.call(begin_anew).await?;
        }
        Ok(true)
    }

    /// Folds a batch and writes the rows of its works, unless another process has done so already.
    async fn take_in(&self, folds: &mut Folds, entries: Vec<Entry>) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let taken = Position::default().past(&entries);
        let last_far = entries.iter().filter(|entry| entry.position.far > 0).max_by_key(|entry| entry.position.far).map(Entry::digest);
        let rows = folds.take_in(&*self.log, &entries).await?;
        let calls_off = rows.iter().any(|row| row.work.is_called_off());
        let written = self
            .writer
            .call(move |db| {
                let tx = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
                let upto = folded(&tx)?;
                if !upto.reaches(taken) {
                    rows.iter().try_for_each(|row| rows::write(&tx, row))?;
                    if taken.far > upto.far {
                        let far = rows::kept(taken.far);
                        tx.prepare_cached("UPDATE folded SET marked = ?1, mark = ?2")?.execute(params![far, last_far])?;
                    }
                    let upto = upto.join(taken);
                    tx.prepare_cached("UPDATE folded SET seq = ?1, far = ?2")?.execute([rows::kept(upto.seq), rows::kept(upto.far)])?;
                }
                let some_wait = waits::any(&tx)?;
                tx.commit()?;
                Ok(some_wait)
            })
            .await;
        match &written {
            Ok(some_wait) => {
                folds.upto = folds.upto.join(taken);
                if calls_off || *some_wait {
                    self.stirred.send_modify(|count| *count += 1);
                }
            }
            // What was folded in memory is ahead of what was written: begin anew from the store.
            Err(_) => folds.reset(),
        }
        written.map(|_| ())
    }

    async fn prune(&self, max_age: Duration) -> Result<()> {
        let before = now().as_millis().saturating_sub(i64::try_from(max_age.as_millis()).unwrap_or(i64::MAX));
        loop {
            let dropped = self
                .writer
                .call(move |db| {
                    db.prepare_cached(
                        "DELETE FROM runs WHERE local IN (SELECT local FROM runs WHERE settled_at < ?1 ORDER BY settled_at LIMIT ?2)",
                    )?
                    .execute(params![before, PRUNE_BATCH])
                })
                .await?;
            if dropped < PRUNE_BATCH as usize {
                return Ok(());
            }
        }
    }
}

/// What leaves only the runs of one principal, and the value that goes with it as `?1`.
fn whose(of: Option<&Principal>) -> (&'static str, Option<&str>) {
    if of.is_some() { ("principal = ?1", of.map(Principal::as_str)) } else { ("?1 IS NULL", None) }
}

fn folded(db: &Connection) -> rusqlite::Result<Position> {
    let place = |row: &rusqlite::Row<'_>| Ok(Position { seq: rows::unsigned(row.get(0)?), far: rows::unsigned(row.get(1)?) });
    db.prepare_cached("SELECT seq, far FROM folded")?.query_row([], place)
}

/// How far the server's log was folded, and the place and digest of an entry there that was.
fn marked(db: &Connection) -> rusqlite::Result<(u64, u64, Option<String>)> {
    let mark = |row: &rusqlite::Row<'_>| Ok((rows::unsigned(row.get(0)?), rows::unsigned(row.get(1)?), row.get(2)?));
    db.prepare_cached("SELECT far, marked, mark FROM folded")?.query_row([], mark)
}

/// Opens a connection and brings the schema up to date; the inner error is a version that is newer than ours.
fn connect(file: &Path) -> rusqlite::Result<(Connection, std::result::Result<(), String>)> {
    let mut db = Connection::open(file)?;
    db.busy_timeout(BUSY_MAX)?;
    let version: i64 = db.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if version > VERSION {
        return Ok((db, Err(format!("the run store has version {version}, and this program knows up to {VERSION}: update lattice-mcp"))));
    }
    local::write_ahead(&db)?;
    db.pragma_update(None, "synchronous", "NORMAL")?;
    db.pragma_update(None, "cache_size", -2048)?;
    db.pragma_update(None, "wal_autocheckpoint", 4000)?;
    if version < VERSION {
        let tx = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        // Another process may have been first.
        let version = tx.pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0))?;
        if version == 0 {
            tx.execute_batch(SCHEMA)?;
        }
        if version < VERSION {
            let known = usize::try_from(version.max(1) - 1).unwrap_or(0);
            ADDED.iter().skip(known).try_for_each(|added| tx.execute_batch(added))?;
            tx.pragma_update(None, "user_version", VERSION)?;
        }
        tx.commit()?;
    }
    Ok((db, Ok(())))
}

fn refused(file: &Path, error: &rusqlite::Error) -> Error {
    Error::Store(
        format!("{}: {error}; the run store can be rebuilt from the log: move this file away and start again", file.display()).into(),
    )
}

type Call = Box<dyn FnOnce(&mut Connection) + Send>;

/// A connection on a thread of its own.
#[derive(Clone)]
struct Thread(mpsc::Sender<Call>);

impl Thread {
    fn start(name: &str, mut db: Connection) -> Result<Self> {
        let (sender, mut calls) = mpsc::channel::<Call>(CALLS_MAX);
        let run = move || {
            db.set_prepared_statement_cache_capacity(64);
            while let Some(call) = calls.blocking_recv() {
                call(&mut db);
            }
        };
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(run)
            .map_err(|error| Error::Store(format!("no thread for the run store: {error}").into()))?;
        Ok(Self(sender))
    }

    async fn call<T: Send + 'static>(&self, work: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let call: Call = Box::new(move |db| {
            let _ = reply.send(work(db));
        });
        self.0.send(call).await.map_err(|_| Error::Closed)?;
        answer.await.map_err(|_| Error::Closed)?.map_err(|error| Error::Store(format!("the run store refuses: {error}").into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::model::assignment::Assignment;
    use crate::model::event::{Event, Kind, Side};
    use crate::model::output::Output;
    use crate::telemetry::{new_instance, new_root, new_work_id};
    use crate::transport::local::{self, Local};
    use crate::transport::{Record, mesh};
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

    /// A store of this machine and one that stands for the server.
    fn two_stores(dir: &Path) -> (Local, Local) {
        let settings = Config::default().lattice.storage;
        (local::open(&dir.join("near"), &settings).unwrap(), local::open(&dir.join("far"), &settings).unwrap())
    }

    async fn open_works(runs: &Runs) -> u64 {
        runs.open_works(None, 9).await.unwrap().0
    }

    #[tokio::test]
    async fn what_a_follower_brings_of_one_log_counts_however_far_the_other_one_was_read() {
        let dir = tempfile::tempdir().unwrap();
        let (near, far) = two_stores(dir.path());
        let (both, _opened) = mesh::pair(near.transport(), Some(far.transport()));
        let (alone, _away) = mesh::pair(near.transport(), None);
        let runs = Runs::open(dir.path(), both.log.clone()).unwrap();
        let [order, accepted, done] = story();
        near.transport().log.append(vec![order]).await.unwrap();
        runs.catch_up().await.unwrap();
        // The follower has not come to what the server says yet; whoever catches up has.
        let after = runs.state.lock().await.upto;
        let mut follow = alone.log.follow(Filter::AllWork, after).await.unwrap();
        far.transport().log.append(story().to_vec()).await.unwrap();
        runs.catch_up().await.unwrap();
        near.transport().log.append(vec![accepted]).await.unwrap();
        runs.take_next(&mut *follow).await.unwrap();
        assert_eq!(runs.state.lock().await.upto, Position { seq: 2, far: 3 });
        near.transport().log.append(vec![done]).await.unwrap();
        runs.take_next(&mut *follow).await.unwrap();
        assert_eq!(open_works(&runs).await, 0, "what was done here is known");
        // Once more, from its beginning: nothing is folded twice.
        let mut again = both.log.follow(Filter::AllWork, Position::default()).await.unwrap();
        runs.take_next(&mut *again).await.unwrap();
        assert_eq!(runs.state.lock().await.upto, Position { seq: 3, far: 3 });
        near.close();
        far.close();
    }

    #[tokio::test]
    async fn of_two_processes_each_writes_what_the_other_one_has_not_seen() {
        let dir = tempfile::tempdir().unwrap();
        let (near, far) = two_stores(dir.path());
        let (both, _opened) = mesh::pair(near.transport(), Some(far.transport()));
        let (alone, _away) = mesh::pair(near.transport(), None);
        let (with, without) = (Runs::open(dir.path(), both.log).unwrap(), Runs::open(dir.path(), alone.log).unwrap());
        let [order, accepted, done] = story();
        near.transport().log.append(vec![order, accepted]).await.unwrap();
        far.transport().log.append(story().to_vec()).await.unwrap();
        with.catch_up().await.unwrap();
        assert_eq!(open_works(&with).await, 1);
        near.transport().log.append(vec![done]).await.unwrap();
        // It has not come to the server, and so not as far there.
        without.catch_up().await.unwrap();
        assert_eq!(open_works(&without).await, 0, "what was done here is known");
        far.transport().log.append(story().to_vec()).await.unwrap();
        with.catch_up().await.unwrap();
        let later = Runs::open(dir.path(), with.log.clone()).unwrap();
        let mut folds = Folds::default();
        later.begin(&mut folds).await.unwrap();
        assert_eq!(folds.upto, Position { seq: 3, far: 6 });
        assert_eq!(open_works(&later).await, 0);
        near.close();
        far.close();
    }

    #[tokio::test]
    async fn a_store_that_left_out_one_log_for_the_other_is_folded_again() {
        let dir = tempfile::tempdir().unwrap();
        let (near, far) = two_stores(dir.path());
        let (both, _opened) = mesh::pair(near.transport(), Some(far.transport()));
        let [order, accepted, done] = story();
        near.transport().log.append(vec![order, accepted]).await.unwrap();
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
        near.transport().log.append(vec![done]).await.unwrap();
        let runs = Runs::open(dir.path(), both.log).unwrap();
        runs.catch_up().await.unwrap();
        assert_eq!(open_works(&runs).await, 0);
        near.close();
        far.close();
    }

    #[tokio::test]
    async fn a_servers_log_that_begins_anew_is_folded_from_its_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let (near, far) = two_stores(dir.path());
        let settings = Config::default().lattice.storage;
        let [shorter, longer] = ["shorter", "longer"].map(|name| local::open(&dir.path().join(name), &settings).unwrap());
        let of_the_mark = |db: &Connection| db.query_row("SELECT far, marked FROM folded", [], |row| Ok((row.get(0)?, row.get(1)?)));
        far.transport().log.append([story(), story()].concat()).await.unwrap();
        let mut open = story();
        shorter.transport().log.append(open[..2].to_vec()).await.unwrap();
        longer.transport().log.append([story(), story(), story()].concat()).await.unwrap();
        open = story();
        longer.transport().log.append(open[..1].to_vec()).await.unwrap();
        let (both, server) = mesh::pair(near.transport(), Some(far.transport()));
        let runs = Runs::open(dir.path(), both.log).unwrap();
        for (store, works, unsettled, upto) in [(&far, 2, 0, 6), (&shorter, 3, 1, 2), (&far, 3, 1, 6), (&longer, 7, 2, 10)] {
            // As after another start, or on another connection.
            *runs.state.lock().await = Folds::default();
            server.send_replace(None);
            runs.catch_up().await.unwrap();
            server.send_replace(Some(store.transport()));
            runs.catch_up().await.unwrap();
            assert_eq!((runs.recent(None, 99, false).await.unwrap().len(), open_works(&runs).await), (works, unsettled));
            let mark: (i64, i64) = runs.reader.call(move |db| of_the_mark(db)).await.unwrap();
            assert_eq!(mark, (upto, upto));
        }
        for store in [near, far, shorter, longer] {
            store.close();
        }
    }

    #[tokio::test]
    async fn a_store_of_an_earlier_version_whose_servers_log_is_another_one_is_folded_again() {
        let dir = tempfile::tempdir().unwrap();
        let (near, far) = two_stores(dir.path());
        let (both, _opened) = mesh::pair(near.transport(), Some(far.transport()));
        far.transport().log.append(story()[..2].to_vec()).await.unwrap();
        drop(Runs::open(dir.path(), both.log.clone()).unwrap());
        let old = Connection::open(dir.path().join("runs.db")).unwrap();
        old.execute_batch("ALTER TABLE folded DROP COLUMN marked; ALTER TABLE folded DROP COLUMN mark; UPDATE folded SET far = 300")
            .unwrap();
        old.pragma_update(None, "user_version", VERSION - 1).unwrap();
        drop(old);
        let runs = Runs::open(dir.path(), both.log).unwrap();
        runs.catch_up().await.unwrap();
        assert_eq!((open_works(&runs).await, runs.state.lock().await.upto.far), (1, 2));
        near.close();
        far.close();
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
            let entry =
                |seq| Entry { position: Position::of(seq), subject: subject.clone(), by: None, is_forwarded: false, body: "{}".into() };
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
        let (near, far) = two_stores(dir.path());
        far.transport().log.append((0..BATCH).flat_map(|_| story()).collect()).await.unwrap();
        let audit = transport::Subject::Audit { noun: "station".into(), verb: "joined".into() };
        far.transport().log.append(vec![Record { subject: audit, body: "{}".into() }]).await.unwrap();
        let growing = Arc::new(Growing { end: (4 * BATCH as u64).into() });
        let (both, _opened) = mesh::pair(transport::Transport { log: growing, ..near.transport() }, Some(far.transport()));
        let runs = Runs::open(dir.path(), both.log).unwrap();
        tokio::time::timeout(Duration::from_secs(60), runs.catch_up()).await.expect("an end").unwrap();
        let upto = runs.state.lock().await.upto;
        assert!(upto.reaches(Position { seq: 4 * BATCH as u64, far: 3 * BATCH as u64 }), "{upto:?}: what was there is taken in");
        assert_eq!(open_works(&runs).await, 0);
        near.close();
        far.close();
    }
}
