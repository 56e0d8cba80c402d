//! A run as a row.

use rusqlite::types::Type;
use rusqlite::{Connection, Row, params};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::model::access::Principal;
use crate::model::budget::Usage;
use crate::model::event::Failure;
use crate::model::id::WorkId;
use crate::model::output::{BlobRef, Output};
use crate::model::run::Run;
use crate::model::time::Timestamp;
use crate::model::work::{Outcome, Work};
use crate::transport::Position;

/// The columns that `read` expects, in order.
pub(super) const COLUMNS: &str = "local, work, run, parent, root, origin, target, trace, agent, task, status, event, \
     assigned_at, accepted_at, settled_at, attempt, duration_ms, outcome, checks, tokens, cost, turns, budget, principal";

/// How much of a task a row keeps.
const TASK_MAX: usize = 2048;

/// What is written of a work.
pub(super) struct Folded {
    pub(super) work: Work,
    /// The last of its events, in the log where it lives.
    pub(super) upto: Position,
}

/// How a work ended, as its row keeps it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Ended {
    Result(Value),
    ResultRef(BlobRef),
    Error(Failure),
    Cancelled(Option<String>),
}

impl From<&Outcome> for Ended {
    fn from(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Complete(Output::Inline(value)) => Self::Result(value.clone()),
            Outcome::Complete(Output::Blob(blob)) => Self::ResultRef(blob.clone()),
            Outcome::Failed(failure) => Self::Error(failure.clone()),
            Outcome::Cancelled(reason) => Self::Cancelled(reason.clone()),
        }
    }
}

impl From<Ended> for Outcome {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Result(value) => Self::Complete(Output::Inline(value)),
            Ended::ResultRef(blob) => Self::Complete(Output::Blob(blob)),
            Ended::Error(failure) => Self::Failed(failure),
            Ended::Cancelled(reason) => Self::Cancelled(reason),
        }
    }
}

/// Writes a work's row; one that was folded further already stays, and what has settled stays so while it is folded anew.
pub(super) fn write(db: &Connection, folded: &Folded) -> rusqlite::Result<()> {
    let work = &folded.work;
    // A work whose order has not been seen yet is written once it has.
    let Some(order) = &work.assignment else { return Ok(()) };
    let task: String = order.task.chars().take(TASK_MAX).collect();
    let outcome = work.outcome.as_ref().map(|outcome| serde_json::to_string(&Ended::from(outcome)).unwrap_or_default());
    // What was given out anew is nobody's worry any more.
    let dead = matches!(&work.outcome, Some(Outcome::Failed(failure)) if failure.dead_letter) && work.redriven_as.is_none();
    let checks = (!work.checks.is_empty()).then(|| serde_json::to_string(&work.checks).unwrap_or_default());
    let usage = work.usage();
    let budget = work.budget().map(|allowance| serde_json::to_string(&allowance.budget).unwrap_or_default());
    let attempt = work.attempts.last().map_or(0, |attempt| attempt.number);
    let mut insert = db.prepare_cached(
        "INSERT INTO runs (work, run, parent, root, origin, target, trace, agent, task, status, event,
                           assigned_at, accepted_at, settled_at, attempt, duration_ms, outcome, dead, seen_seq, seen_far, checks, tokens, cost, turns,
                           budget, label, owner, principal, seen)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21, ?22, ?23, ?24, ?25,
                 ?26, ifnull(?27, (SELECT owner FROM runs WHERE run = ?3)), ?28, 0)
         ON CONFLICT (work) DO UPDATE SET status = excluded.status, label = excluded.label, event = excluded.event, accepted_at = excluded.accepted_at,
             settled_at = excluded.settled_at, attempt = excluded.attempt, duration_ms = excluded.duration_ms,
             outcome = excluded.outcome, dead = excluded.dead,
             seen_seq = max(excluded.seen_seq, runs.seen_seq), seen_far = max(excluded.seen_far, runs.seen_far),
             checks = excluded.checks, tokens = excluded.tokens, cost = excluded.cost, turns = excluded.turns
         WHERE (excluded.seen_seq > runs.seen_seq OR excluded.seen_far > runs.seen_far)
             AND (excluded.settled_at IS NOT NULL OR runs.settled_at IS NULL)",
    )?;
    let changed = insert.execute(params![
        order.work_id.as_bytes(),
        order.orchestrator_run_id.as_str(),
        order.orchestrator_run_id.parent().as_ref().map(|parent| parent.as_str()),
        order.orchestrator_run_id.root().as_str(),
        order.originating_station.as_str(),
        order.target_station.as_str(),
        order.trace_id,
        order.agent_name.as_str(),
        task,
        serde_json::to_string(&work.status).unwrap_or_default(),
        work.event,
        order.assigned_at.as_millis(),
        work.attempts.first().map(|attempt| attempt.started_at.as_millis()),
        work.settled_at.map(Timestamp::as_millis),
        attempt,
        work.duration_ms.map(|ms| i64::try_from(ms).unwrap_or(i64::MAX)),
        outcome,
        dead,
        kept(folded.upto.seq),
        kept(folded.upto.far),
        checks,
        i64::try_from(usage.tokens).unwrap_or(i64::MAX),
        usage.cost_usd,
        i64::try_from(usage.turns).unwrap_or(i64::MAX),
        budget,
        work.status.label(),
        order.owner.as_ref().map(|owner| owner.as_str()),
        order.principal.as_ref().map(|principal| principal.as_str()),
    ])?;
    if work.settled_at.is_some() {
        number(db, order.work_id)?;
    }
    if changed > 0 { super::waits::write(db, work, order) } else { Ok(()) }
}

/// Gives a settled work the next number of its owner's, once: what was settled since a look is what has a higher one.
fn number(db: &Connection, id: WorkId) -> rusqlite::Result<()> {
    db.prepare_cached(
        "UPDATE runs SET settled_no = 1 + max(
             ifnull((SELECT max(s.settled_no) FROM runs AS s WHERE s.settled_no IS NOT NULL AND s.owner IS runs.owner), 0),
             ifnull((SELECT upto FROM looks WHERE looks.owner = ifnull(runs.owner, '')), 0))
         WHERE work = ?1 AND settled_no IS NULL AND settled_at IS NOT NULL",
    )?
    .execute(params![id.as_bytes()])
    .map(|_| ())
}

/// Reads a row of `COLUMNS`.
pub(super) fn read(row: &Row<'_>) -> rusqlite::Result<Run> {
    let work: Vec<u8> = row.get(1)?;
    Ok(Run {
        local_number: row.get(0)?,
        work_id: WorkId::from_slice(&work).ok_or_else(|| unreadable(1, "a work id"))?,
        run_id: parsed(row, 2)?,
        parent_run_id: row.get::<_, Option<String>>(3)?.map(|text| text.parse().map_err(|_| unreadable(3, "a run id"))).transpose()?,
        root_run_id: parsed(row, 4)?,
        originating_station: parsed(row, 5)?,
        target_station: parsed(row, 6)?,
        trace_id: row.get(7)?,
        agent: parsed(row, 8)?,
        task: row.get(9)?,
        status: json(row, 10)?,
        event: row.get(11)?,
        assigned_at: Timestamp::from_millis(row.get(12)?),
        accepted_at: row.get::<_, Option<i64>>(13)?.map(Timestamp::from_millis),
        settled_at: row.get::<_, Option<i64>>(14)?.map(Timestamp::from_millis),
        attempt: row.get(15)?,
        duration_ms: row.get::<_, Option<i64>>(16)?.and_then(|ms| u64::try_from(ms).ok()),
        outcome: match row.get_ref(17)? {
            rusqlite::types::ValueRef::Null => None,
            _ => Some(json::<Ended>(row, 17)?.into()),
        },
        checks: if_present(row, 18)?.unwrap_or_default(),
        usage: Usage { tokens: unsigned(row.get(19)?), cost_usd: row.get(20)?, turns: unsigned(row.get(21)?) },
        budget: if_present(row, 22)?,
        principal: row.get::<_, Option<String>>(23)?.as_deref().map(Principal::kept),
    })
}

pub(super) fn parsed<T: std::str::FromStr>(row: &Row<'_>, column: usize) -> rusqlite::Result<T> {
    row.get::<_, String>(column)?.parse().map_err(|_| unreadable(column, "a name or an id"))
}

pub(super) fn json<T: serde::de::DeserializeOwned>(row: &Row<'_>, column: usize) -> rusqlite::Result<T> {
    serde_json::from_str(&row.get::<_, String>(column)?)
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(error)))
}

fn if_present<T: serde::de::DeserializeOwned>(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<T>> {
    match row.get_ref(column)? {
        rusqlite::types::ValueRef::Null => Ok(None),
        _ => json(row, column).map(Some),
    }
}

/// A number as a column keeps it.
pub(super) fn kept(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

pub(super) fn unreadable(column: usize, what: &'static str) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, Type::Text, format!("not {what}").into())
}
