//! The one writer: it gathers requests into transactions and answers each after its commit.
//! It knows the log's positions, the hooks' counters and the buckets' revisions, not what a request is for.

use std::collections::HashMap;
use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::{mpsc, oneshot};

use super::Shared;
use super::steady::Steady;
use crate::model::id::StationId;
use crate::model::time::Timestamp;
use crate::transport::{Bucket, Entry, Error, Position, Record, Result, Subject, Waits};

/// How many requests may wait for the writer.
pub(super) const WAITING_MAX: usize = 4096;
/// How many requests share a transaction at most.
const BATCH_MAX: usize = 512;

/// Why a request was not carried out.
pub(super) enum Failure {
    /// The request's own fault; nothing was written for it, the others are not touched.
    Refused(Error),
    /// The store's; the transaction is undone.
    Store(rusqlite::Error),
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Store(error)
    }
}

/// What a request's part of a transaction gives.
pub(super) type Step<T> = std::result::Result<T, Failure>;

/// A request that waits for the writer.
pub(super) trait Job: Send {
    /// Does its part of a transaction; may be called again after the transaction was undone.
    fn run(&mut self, batch: &mut Batch<'_>) -> rusqlite::Result<()>;
    /// Answers, after the commit or with why there was none.
    fn finish(self: Box<Self>, failed: Option<&Error>);
}

struct Call<T, F> {
    work: F,
    outcome: Option<Result<T>>,
    reply: oneshot::Sender<Result<T>>,
}

impl<T: Send, F: FnMut(&mut Batch<'_>) -> Step<T> + Send> Job for Call<T, F> {
    fn run(&mut self, batch: &mut Batch<'_>) -> rusqlite::Result<()> {
        self.outcome = Some(match (self.work)(batch) {
            Ok(value) => Ok(value),
            Err(Failure::Refused(error)) => Err(error),
            Err(Failure::Store(error)) => return Err(error),
        });
        Ok(())
    }

    fn finish(self: Box<Self>, failed: Option<&Error>) {
        let outcome = match failed {
            Some(error) => Err(error.clone()),
            None => self.outcome.unwrap_or(Err(Error::Closed)),
        };
        // Whoever asked may have gone; the work is done all the same.
        let _ = self.reply.send(outcome);
    }
}

/// A request and the place where its answer arrives.
pub(super) fn call<T, F>(work: F) -> (Box<dyn Job>, oneshot::Receiver<Result<T>>)
where
    T: Send + 'static,
    F: FnMut(&mut Batch<'_>) -> Step<T> + Send + 'static,
{
    let (reply, answer) = oneshot::channel();
    (Box::new(Call { work, outcome: None, reply }), answer)
}

/// Ids of hooks and lanes, which never change once they are committed.
#[derive(Default)]
struct Ids {
    hooks: HashMap<StationId, i64>,
    lanes: HashMap<i64, HashMap<String, i64>>,
}

#[derive(Default)]
struct HookDelta {
    station: Option<StationId>,
    /// How many waited and were held back before this transaction.
    before: Option<(i64, i64)>,
    waiting: i64,
    held_back: i64,
    raised: bool,
}

#[derive(Default)]
struct LaneDelta {
    waiting: i64,
    held: i64,
}

/// A transaction in the making.
pub(super) struct Batch<'a> {
    pub(super) conn: &'a Connection,
    pub(super) now: Timestamp,
    /// Until then holds that have run out are left alone.
    pub(super) spared: Timestamp,
    pub(super) steady: Option<&'a Steady>,
    ids: &'a mut Ids,
    appended: Vec<Entry>,
    next_seq: Option<i64>,
    hooks: HashMap<i64, HookDelta>,
    lanes: HashMap<i64, LaneDelta>,
    revisions: [Option<i64>; Bucket::ALL.len()],
}

/// What others want to know about a transaction after its commit.
#[derive(Default)]
pub(super) struct Committed {
    pub(super) entries: Vec<Entry>,
    pub(super) raised: Vec<(StationId, i64)>,
    pub(super) revisions: [Option<i64>; Bucket::ALL.len()],
}

impl<'a> Batch<'a> {
    fn new(conn: &'a Connection, shared: &'a Shared, ids: &'a mut Ids) -> Self {
        let (now, steady) = (shared.now(), shared.steady.as_ref());
        Self {
            conn,
            now,
            spared: steady.map_or(now, |steady| steady.look(now)),
            steady,
            ids,
            appended: Vec::new(),
            next_seq: None,
            hooks: HashMap::new(),
            lanes: HashMap::new(),
            revisions: Default::default(),
        }
    }

    /// Appends records to the log; gives the last one's position, or the head's when there are none.
    pub(super) fn append(&mut self, records: &[Record]) -> rusqlite::Result<Position> {
        let mut next = match self.next_seq {
            Some(next) => next,
            None => super::log::head(self.conn)? + 1,
        };
        let mut insert =
            self.conn.prepare_cached("INSERT INTO log (seq, work, channel, at, audit, body) VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?;
        for record in records {
            let (channel, audit) = match &record.subject {
                Subject::Response(_) => (0, None),
                Subject::Status(_) => (1, None),
                Subject::Audit { noun, verb } => (2, Some(format!("{noun}.{verb}"))),
            };
            let work = record.subject.work();
            let work = work.as_ref().map(|id| id.as_bytes().as_slice());
            insert.execute(params![next, work, channel, self.now.as_millis(), audit, &record.body[..]])?;
            let position = Position::of(u64::try_from(next).unwrap_or(0));
            self.appended.push(Entry {
                position,
                subject: record.subject.clone(),
                by: None,
                is_forwarded: false,
                body: record.body.clone(),
            });
            next += 1;
        }
        self.next_seq = Some(next);
        Ok(Position::of(u64::try_from(next - 1).unwrap_or(0)))
    }

    /// The id of a station's hook, if it has ever had one.
    pub(super) fn hook(&mut self, station: &StationId) -> rusqlite::Result<Option<i64>> {
        if let Some(id) = self.ids.hooks.get(station) {
            return Ok(Some(*id));
        }
        let mut query = self.conn.prepare_cached("SELECT id FROM hook WHERE station = ?1")?;
        let id: Option<i64> = query.query_row([station.as_str()], |row| row.get(0)).optional()?;
        if let Some(id) = id {
            self.ids.hooks.insert(station.clone(), id);
        }
        Ok(id)
    }

    /// The id of a station's hook, which is made if need be.
    pub(super) fn hook_made(&mut self, station: &StationId) -> rusqlite::Result<i64> {
        if let Some(id) = self.hook(station)? {
            return Ok(id);
        }
        self.conn.prepare_cached("INSERT INTO hook (station) VALUES (?1)")?.execute([station.as_str()])?;
        let id = self.conn.last_insert_rowid();
        self.ids.hooks.insert(station.clone(), id);
        Ok(id)
    }

    /// The id of a lane of a hook, if it has ever held an item.
    pub(super) fn lane(&mut self, hook: i64, name: &str) -> rusqlite::Result<Option<i64>> {
        if let Some(id) = self.ids.lanes.get(&hook).and_then(|lanes| lanes.get(name)) {
            return Ok(Some(*id));
        }
        let mut query = self.conn.prepare_cached("SELECT id FROM lane WHERE hook = ?1 AND name = ?2")?;
        let id: Option<i64> = query.query_row(params![hook, name], |row| row.get(0)).optional()?;
        if let Some(id) = id {
            self.ids.lanes.entry(hook).or_default().insert(name.to_owned(), id);
        }
        Ok(id)
    }

    /// The id of a lane of a hook, which is made if need be.
    pub(super) fn lane_made(&mut self, hook: i64, name: &str) -> rusqlite::Result<i64> {
        if let Some(id) = self.lane(hook, name)? {
            return Ok(id);
        }
        self.conn.prepare_cached("INSERT INTO lane (hook, name) VALUES (?1, ?2)")?.execute(params![hook, name])?;
        let id = self.conn.last_insert_rowid();
        self.ids.lanes.entry(hook).or_default().insert(name.to_owned(), id);
        Ok(id)
    }

    /// How many items of a hook wait for this, as of this request.
    pub(super) fn waiting(&mut self, hook: i64, waits: Waits) -> rusqlite::Result<i64> {
        let delta = self.hooks.entry(hook).or_default();
        let (waiting, held_back) = match delta.before {
            Some(before) => before,
            None => {
                let mut query = self.conn.prepare_cached("SELECT waiting, held_back FROM hook WHERE id = ?1")?;
                let before = query.query_row([hook], |row| Ok((row.get(0)?, row.get(1)?)))?;
                delta.before = Some(before);
                before
            }
        };
        let held_back = held_back + delta.held_back;
        Ok(match waits {
            Waits::HeldBack => held_back,
            Waits::ToStart => waiting + delta.waiting - held_back,
        })
    }

    /// Counts items that wait until somebody wakes them in or out of a hook.
    pub(super) fn count_held_back(&mut self, hook: i64, held_back: i64) {
        self.hooks.entry(hook).or_default().held_back += held_back;
    }

    /// Counts items in or out of a lane.
    pub(super) fn count(&mut self, hook: i64, lane: i64, waiting: i64, held: i64) {
        self.hooks.entry(hook).or_default().waiting += waiting;
        let lane = self.lanes.entry(lane).or_default();
        lane.waiting += waiting;
        lane.held += held;
    }

    /// Wakes the takers of a station's hook after the commit.
    pub(super) fn raise(&mut self, hook: i64, station: &StationId) {
        let delta = self.hooks.entry(hook).or_default();
        delta.raised = true;
        delta.station.get_or_insert_with(|| station.clone());
    }

    /// The next revision of a bucket.
    pub(super) fn revision(&mut self, bucket: Bucket) -> rusqlite::Result<i64> {
        let slot = &mut self.revisions[bucket as usize];
        let next = match *slot {
            Some(last) => last + 1,
            None => super::table::revision(self.conn, bucket)? + 1,
        };
        *slot = Some(next);
        Ok(next)
    }

    /// Writes what was counted on the way.
    fn flush(self) -> rusqlite::Result<Committed> {
        let mut raised = Vec::new();
        for (id, delta) in self.hooks {
            if delta.raised || delta.waiting != 0 || delta.held_back != 0 {
                let mut update = self.conn.prepare_cached(
                    "UPDATE hook SET waiting = waiting + ?2, raised = raised + ?3, held_back = held_back + ?4 WHERE id = ?1 RETURNING raised",
                )?;
                let count = update.query_row(params![id, delta.waiting, delta.raised, delta.held_back], |row| row.get(0))?;
                raised.extend(delta.station.filter(|_| delta.raised).map(|station| (station, count)));
            }
        }
        for (id, delta) in self.lanes {
            if delta.waiting != 0 || delta.held != 0 {
                let mut update = self.conn.prepare_cached("UPDATE lane SET waiting = waiting + ?2, held = held + ?3 WHERE id = ?1")?;
                update.execute(params![id, delta.waiting, delta.held])?;
            }
        }
        for bucket in Bucket::ALL {
            if let Some(revision) = self.revisions[bucket as usize] {
                let mut update = self.conn.prepare_cached("INSERT OR REPLACE INTO clock (bucket, revision) VALUES (?1, ?2)")?;
                update.execute(params![bucket.name(), revision])?;
            }
        }
        Ok(Committed { entries: self.appended, raised, revisions: self.revisions })
    }
}

/// Carries out requests until nobody can send one any more, then folds the write-ahead log into the file.
pub(super) fn run(mut requests: mpsc::Receiver<Box<dyn Job>>, conn: Connection, shared: &Arc<Shared>) {
    let mut ids = Ids::default();
    let mut jobs: Vec<Box<dyn Job>> = Vec::with_capacity(BATCH_MAX);
    while requests.blocking_recv_many(&mut jobs, BATCH_MAX) > 0 {
        if let Err(error) = commit(&mut jobs, &conn, &mut ids, shared) {
            if jobs.len() == 1 {
                jobs.drain(..).for_each(|job| job.finish(Some(&error)));
                continue;
            }
            // One request may be what the store refuses: the others must not suffer for it.
            for job in std::mem::take(&mut jobs) {
                let mut alone = vec![job];
                if let Err(error) = commit(&mut alone, &conn, &mut ids, shared) {
                    alone.drain(..).for_each(|job| job.finish(Some(&error)));
                }
            }
        }
    }
    if let Err(error) = conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())) {
        tracing::debug!(%error, "the write-ahead log stays for the next process");
    }
}

/// Carries out requests in one transaction and answers them; on an error nothing has happened and they are still there.
fn commit(jobs: &mut Vec<Box<dyn Job>>, conn: &Connection, ids: &mut Ids, shared: &Shared) -> Result<()> {
    match transaction(jobs, conn, ids, shared) {
        Ok(committed) => {
            shared.publish(conn, committed);
            jobs.drain(..).for_each(|job| job.finish(None));
            Ok(())
        }
        Err(error) => {
            *ids = Ids::default();
            if !conn.is_autocommit()
                && let Err(error) = conn.execute_batch("ROLLBACK")
            {
                tracing::error!(%error, "a transaction could not be undone");
            }
            Err(shared.file.error(&error))
        }
    }
}

fn transaction(jobs: &mut [Box<dyn Job>], conn: &Connection, ids: &mut Ids, shared: &Shared) -> rusqlite::Result<Committed> {
    conn.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
    let mut batch = Batch::new(conn, shared, ids);
    for job in jobs {
        job.run(&mut batch)?;
    }
    let committed = batch.flush()?;
    conn.prepare_cached("COMMIT")?.execute([])?;
    Ok(committed)
}
