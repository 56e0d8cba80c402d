//! The run store: the fold of the log, kept in SQLite with its lineage.
//!
//! Nothing is written here that the log does not say; what is lost is read again. Several processes may keep one store:
//! each row remembers the place up to which it was folded, in the log where its work lives, and never goes back.

mod file;
mod fold;
mod outlook;
mod rows;
mod spent;
mod waits;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;

pub use self::file::Opening;
use self::file::Thread;
use self::fold::Folds;
pub use self::outlook::{Outlook, Scope};
pub use self::waits::Waiting;
use crate::model::access::Principal;
use crate::model::id::{RunId, WorkId};
use crate::model::run::Run;
use crate::telemetry::now;
use crate::transport::{self, Entry, Filter, Follow, Log, Position};

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

const BATCH: usize = 512;
const GATHER: Duration = Duration::from_millis(100);
const FOLLOW_PAUSE: Duration = Duration::from_secs(1);
/// How often a process that hardly ever reads the store takes in what the log says.
pub const SELDOM: Duration = Duration::from_secs(60);
const PRUNE_BATCH: u32 = 500;
const PRUNE_EVERY: Duration = Duration::from_secs(60);

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

#[cfg(test)]
mod tests;
