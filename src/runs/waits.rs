//! Which works wait for which others, and what hangs below works that were called off.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::rows::{self, unreadable};
use super::{Result, Runs};
use crate::model::assignment::Assignment;
use crate::model::id::{RunId, StationId, WorkId};
use crate::model::run::Run;
use crate::model::status::Status;
use crate::model::work::Work;

/// What a row of `waits` stands for; works that wait for their turn are looked at now and then only.
const FOR_ANOTHER: i64 = 0;
const FOR_ITS_ITEMS: i64 = 1;
const FOR_ITS_START: i64 = 2;
const FOR_ITS_TURN: i64 = 3;

pub(super) const SCHEMA: &str = "
    CREATE TABLE waits (work BLOB NOT NULL, dep BLOB NOT NULL, kind INTEGER NOT NULL, PRIMARY KEY (work, dep)) WITHOUT ROWID;
";

/// A work that somebody has to look after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// The work.
    pub work_id: WorkId,
    /// The station whose hook has it.
    pub target: StationId,
    /// The station that ordered it.
    pub origin: StationId,
}

/// Whether any work waits for what others do.
pub(super) fn any(db: &Connection) -> rusqlite::Result<bool> {
    db.prepare_cached("SELECT 1 FROM waits WHERE kind < ?1 LIMIT 1")?.exists([FOR_ITS_TURN])
}

/// Keeps the rows of a work that may wait.
pub(super) fn write(db: &Connection, work: &Work, order: &Assignment) -> rusqlite::Result<()> {
    if order.after.is_none() && order.map.is_none() && work.exchanges.is_empty() {
        return Ok(());
    }
    let id = work.work_id.as_bytes();
    db.prepare_cached("DELETE FROM waits WHERE work = ?1")?.execute([id])?;
    let mut insert = db.prepare_cached("INSERT OR IGNORE INTO waits (work, dep, kind) VALUES (?1, ?2, ?3)")?;
    let begun = !work.attempts.is_empty();
    match work.waits_for() {
        _ if work.status.is_settled() => Ok(()),
        Some(after) => after.work_ids.iter().try_for_each(|dep| insert.execute(params![id, dep.as_bytes(), FOR_ANOTHER]).map(|_| ())),
        None if order.map.is_some() => insert.execute(params![id, id, FOR_ITS_ITEMS]).map(|_| ()),
        // Whoever answered last may have died before it woke the item.
        None if work.is_answered() => insert.execute(params![id, id, FOR_ITS_TURN]).map(|_| ()),
        None if order.after.is_some() && !begun => insert.execute(params![id, id, FOR_ITS_START]).map(|_| ()),
        None => Ok(()),
    }
}

fn waiting(row: &Row<'_>) -> rusqlite::Result<Waiting> {
    let name = |column: usize| row.get::<_, String>(column)?.parse().map_err(|_| unreadable(column, "a station's name"));
    Ok(Waiting { work_id: work_id(row)?, target: name(1)?, origin: name(2)? })
}

fn work_id(row: &Row<'_>) -> rusqlite::Result<WorkId> {
    WorkId::from_slice(row.get_ref(0)?.as_blob()?).ok_or_else(|| unreadable(0, "a work id"))
}

impl Runs {
    /// Rises whenever something was folded that may matter to works that wait, or that hang below another.
    pub fn stirred(&self) -> tokio::sync::watch::Receiver<u64> {
        self.stirred.subscribe()
    }

    /// Works that wait for nothing any more, as far as is known here, and orders over many items; or whatever waits at all.
    ///
    /// # Errors
    /// The store's.
    pub async fn waiting(&self, all: bool) -> Result<Vec<Waiting>> {
        const SQL: &str = "SELECT DISTINCT r.work, r.target, r.origin FROM waits w JOIN runs r ON r.work = w.work
            WHERE ?1 OR w.kind = 1 OR (w.kind = 0 AND (
                NOT EXISTS (SELECT 1 FROM waits v LEFT JOIN runs d ON d.work = v.dep WHERE v.work = w.work AND d.settled_at IS NULL)
                OR EXISTS (SELECT 1 FROM waits v JOIN runs d ON d.work = v.dep
                           WHERE v.work = w.work AND d.settled_at IS NOT NULL AND d.status <> '\"Complete\"')))";
        self.reader.call(move |db| db.prepare_cached(SQL)?.query_map([all], waiting)?.collect()).await
    }

    /// Works whose parent was called off while they were not.
    ///
    /// # Errors
    /// The store's.
    pub async fn orphans(&self) -> Result<Vec<Waiting>> {
        const SQL: &str = "SELECT c.work, c.target, c.origin FROM runs c JOIN runs p ON p.run = c.parent
            WHERE c.settled_at IS NULL AND instr(c.status, '\"cancelling\":true') = 0
              AND (p.status = '\"Cancelled\"' OR instr(p.status, '\"cancelling\":true') > 0)";
        self.reader.call(move |db| db.prepare_cached(SQL)?.query_map([], waiting)?.collect()).await
    }

    /// The unsettled works below a run, at whatever depth.
    ///
    /// # Errors
    /// The store's.
    pub async fn open_below(&self, run: &RunId) -> Result<Vec<WorkId>> {
        const SQL: &str = "SELECT work FROM runs WHERE root = ?1 AND settled_at IS NULL AND substr(run, 1, length(?2) + 1) = ?2 || '-'";
        let (run, root) = (run.clone(), run.root());
        self.reader.call(move |db| db.prepare_cached(SQL)?.query_map(params![root.as_str(), run.as_str()], work_id)?.collect()).await
    }

    /// The children of a run, each with where it stands.
    ///
    /// # Errors
    /// The store's.
    pub async fn children(&self, run: &RunId) -> Result<Vec<(RunId, Status)>> {
        let run = run.clone();
        self.reader
            .call(move |db| {
                let mut query = db.prepare_cached("SELECT run, status FROM runs WHERE parent = ?1")?;
                query.query_map([run.as_str()], |row| Ok((rows::parsed(row, 0)?, rows::json(row, 1)?)))?.collect()
            })
            .await
    }

    /// Works below a run that wait to be taken, whatever is above them being unsettled too.
    ///
    /// # Errors
    /// The store's.
    pub async fn waiting_below(&self, run: &RunId, max: u32) -> Result<Vec<WorkId>> {
        const SQL: &str = "WITH RECURSIVE below (run, work, label) AS (
                SELECT run, work, label FROM runs WHERE parent = ?1 AND settled_at IS NULL
                UNION ALL SELECT runs.run, runs.work, runs.label FROM runs JOIN below ON runs.parent = below.run WHERE settled_at IS NULL
            ) SELECT work FROM below WHERE label = 'PENDING' LIMIT ?2";
        let run = run.clone();
        self.reader.call(move |db| db.prepare_cached(SQL)?.query_map(params![run.as_str(), max], work_id)?.collect()).await
    }

    /// The first few children of a run that wait for an answer.
    ///
    /// # Errors
    /// The store's.
    pub async fn asking_children(&self, run: &RunId, max: u32) -> Result<Vec<WorkId>> {
        const SQL: &str = "SELECT work FROM runs WHERE parent = ?1 AND label = 'ESCALATED' ORDER BY local LIMIT ?2";
        let run = run.clone();
        self.reader.call(move |db| db.prepare_cached(SQL)?.query_map(params![run.as_str(), max], work_id)?.collect()).await
    }

    /// One child of a run, with its result.
    ///
    /// # Errors
    /// The store's.
    pub async fn of_run(&self, run: &RunId) -> Result<Option<Run>> {
        let run = run.clone();
        self.reader
            .call(move |db| {
                let sql = format!("SELECT {} FROM runs WHERE run = ?1", rows::COLUMNS);
                db.prepare_cached(&sql)?.query_row([run.as_str()], rows::read).optional()
            })
            .await
    }
}
