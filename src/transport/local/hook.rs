//! The steps of the hooks' transactions.
//!
//! An item is ready, delayed until it is due, held until it is due, or parked because its deadline has passed. `attempt` counts its
//! takings; while `holder` is set, the delivery of that attempt is good, also after the lease has lapsed and until somebody else takes it.

use std::cmp::Reverse;
use std::time::Duration;

use bytes::Bytes;
use rusqlite::{OptionalExtension, Row, params};

use super::writer::{Batch, Failure, Step};
use crate::model::id::{InstanceId, StationId, WorkId};
use crate::model::time::Timestamp;
use crate::transport::{Delivery, Error, Item, Pushed, Record, Take, Taken, Want};

const READY: i64 = 0;
const DELAYED: i64 = 1;
const HELD: i64 = 2;
const PARKED: i64 = 3;

/// An item as a step finds it.
struct Found {
    id: i64,
    lane: i64,
    state: i64,
    due: Option<i64>,
}

impl Found {
    fn row(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self { id: row.get(0)?, lane: row.get(1)?, state: row.get(2)?, due: row.get(3)? })
    }

    fn is_held(&self, now: Timestamp) -> bool {
        self.state == HELD && self.due.is_some_and(|due| due > now.as_millis())
    }
}

fn find(batch: &mut Batch<'_>, hook: i64, id: WorkId) -> rusqlite::Result<Option<Found>> {
    let mut query = batch.conn.prepare_cached("SELECT id, lane, state, due FROM item WHERE work = ?1 AND hook = ?2")?;
    query.query_row(params![id.as_bytes(), hook], Found::row).optional()
}

/// The item of a delivery, unless the delivery is void.
fn find_held(batch: &mut Batch<'_>, delivery: &Delivery) -> rusqlite::Result<Option<(i64, Found)>> {
    let Some(hook) = batch.hook(&delivery.station)? else {
        return Ok(None);
    };
    let sql = "SELECT id, lane, state, due FROM item WHERE work = ?1 AND hook = ?2 AND attempt = ?3 AND holder IS NOT NULL";
    let mut query = batch.conn.prepare_cached(sql)?;
    let found = query.query_row(params![delivery.id.as_bytes(), hook, delivery.attempt], Found::row).optional()?;
    Ok(found.map(|found| (hook, found)))
}

/// Keeps the counters right when an item goes from one state to another, or away.
fn count(batch: &mut Batch<'_>, hook: i64, lane: i64, from: Option<i64>, to: Option<i64>) {
    let waiting = |state: Option<i64>| i64::from(state.is_some_and(|state| state != HELD));
    let held = |state: Option<i64>| i64::from(state == Some(HELD));
    batch.count(hook, lane, waiting(to) - waiting(from), held(to) - held(from));
}

fn delete(batch: &mut Batch<'_>, hook: i64, item: &Found) -> rusqlite::Result<()> {
    batch.conn.prepare_cached("DELETE FROM item WHERE id = ?1")?.execute([item.id])?;
    batch.conn.prepare_cached("DELETE FROM body WHERE item = ?1")?.execute([item.id])?;
    count(batch, hook, item.lane, Some(item.state), None);
    Ok(())
}

pub(super) fn push(batch: &mut Batch<'_>, station: &StationId, item: &Item, limit: u32, announce: Option<&Record>) -> Step<Pushed> {
    let hook = batch.hook_made(station)?;
    if batch.waiting(hook)? >= i64::from(limit) {
        return match find(batch, hook, item.id)? {
            Some(_) => Ok(Pushed::Known),
            None => Err(Failure::Refused(Error::Full { station: station.clone(), limit })),
        };
    }
    let lane = batch.lane_made(hook, &item.lane)?;
    let mut insert = batch.conn.prepare_cached(
        "INSERT OR IGNORE INTO item (work, hook, lane, priority, state, deadline, attempt) VALUES (?1, ?2, ?3, ?4, 0, ?5, 0)",
    )?;
    let deadline = item.deadline.as_millis();
    if insert.execute(params![item.id.as_bytes(), hook, lane, item.priority, deadline])? == 0 {
        return Ok(Pushed::Known);
    }
    let id = batch.conn.last_insert_rowid();
    batch.conn.prepare_cached("INSERT INTO body (item, body) VALUES (?1, ?2)")?.execute(params![id, &item.body[..]])?;
    count(batch, hook, lane, None, Some(READY));
    if let Some(record) = announce {
        batch.append(std::slice::from_ref(record))?;
    }
    batch.raise(hook, station);
    Ok(Pushed::New)
}

struct Candidate {
    priority: i64,
    id: i64,
    lane: usize,
}

pub(super) fn take(batch: &mut Batch<'_>, station: &StationId, want: &Want) -> Step<Take> {
    let Some(hook) = batch.hook(station)? else {
        return Ok(Take::default());
    };
    let mut lanes = Vec::with_capacity(want.lanes.len());
    let mut candidates = Vec::new();
    for (at, (name, room)) in want.lanes.iter().enumerate() {
        let Some(lane) = batch.lane(hook, name)? else {
            continue;
        };
        lanes.push(lane);
        if promote(batch, hook, lane)? {
            // Others who serve this lane may have room for what is left.
            batch.raise(hook, station);
        }
        urgent(batch, lane, at, (*room).min(want.room), want.only.as_deref(), &mut candidates)?;
    }
    candidates.sort_unstable_by_key(|candidate| (Reverse(candidate.priority), candidate.id));
    candidates.dedup_by_key(|candidate| candidate.id);
    candidates.truncate(usize::try_from(want.room).unwrap_or(usize::MAX));
    let due = batch.now.after(want.lease);
    let mut taken = Vec::with_capacity(candidates.len());
    for candidate in candidates {
        let name = &want.lanes[candidate.lane].0;
        let item = hold(batch, candidate.id, station, name, want.holder, due)?;
        if let Some(record) = want.accept.record(&item) {
            batch.append(std::slice::from_ref(&record))?;
        }
        taken.push(item);
        let lane = batch.lane_made(hook, name)?;
        count(batch, hook, lane, Some(READY), Some(HELD));
    }
    let mut next_at = None;
    for lane in lanes {
        next_at = [next_at, first_due(batch, lane)?].into_iter().flatten().min();
    }
    Ok(Take { taken, next_at: next_at.map(Timestamp::from_millis) })
}

fn first_due(batch: &Batch<'_>, lane: i64) -> rusqlite::Result<Option<i64>> {
    let mut query = batch.conn.prepare_cached("SELECT due FROM item WHERE lane = ?1 AND due IS NOT NULL ORDER BY due LIMIT 1")?;
    query.query_row([lane], |row| row.get(0)).optional()
}

/// Makes ready what is due in a lane.
fn promote(batch: &mut Batch<'_>, hook: i64, lane: i64) -> rusqlite::Result<bool> {
    let now = batch.now.as_millis();
    if first_due(batch, lane)?.is_none_or(|due| due > now) {
        return Ok(false);
    }
    let mut query = batch.conn.prepare_cached("SELECT id, state FROM item WHERE lane = ?1 AND due <= ?2")?;
    let due: Vec<(i64, i64)> = query.query_map([lane, now], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<rusqlite::Result<_>>()?;
    for (id, state) in due {
        batch.conn.prepare_cached("UPDATE item SET state = 0, due = NULL WHERE id = ?1")?.execute([id])?;
        count(batch, hook, lane, Some(state), Some(READY));
    }
    Ok(true)
}

/// Finds a lane's most urgent ready items; parks those that it meets past their deadline, so that nobody meets them again.
fn urgent(
    batch: &Batch<'_>,
    lane: i64,
    at: usize,
    room: u32,
    only: Option<&[WorkId]>,
    candidates: &mut Vec<Candidate>,
) -> rusqlite::Result<()> {
    if room == 0 {
        return Ok(());
    }
    if let Some(only) = only {
        let mut query =
            batch.conn.prepare_cached("SELECT id, priority FROM item WHERE lane = ?1 AND work = ?2 AND state = 0 AND deadline > ?3")?;
        for work in only {
            let named = params![lane, work.as_bytes(), batch.now.as_millis()];
            let found = query.query_row(named, |row| Ok(Candidate { id: row.get(0)?, priority: row.get(1)?, lane: at })).optional()?;
            candidates.extend(found);
        }
        return Ok(());
    }
    let mut query =
        batch.conn.prepare_cached("SELECT id, priority, deadline FROM item WHERE lane = ?1 AND state = 0 ORDER BY priority DESC, id")?;
    let mut rows = query.query([lane])?;
    let mut expired = Vec::new();
    let mut found = 0;
    while found < room
        && let Some(row) = rows.next()?
    {
        let id = row.get(0)?;
        if row.get::<_, i64>(2)? <= batch.now.as_millis() {
            expired.push(id);
        } else {
            candidates.push(Candidate { priority: row.get(1)?, id, lane: at });
            found += 1;
        }
    }
    drop(rows);
    for id in expired {
        let id: i64 = id;
        batch.conn.prepare_cached("UPDATE item SET state = ?2 WHERE id = ?1")?.execute([id, PARKED])?;
    }
    Ok(())
}

fn hold(batch: &Batch<'_>, id: i64, station: &StationId, lane: &str, holder: InstanceId, due: Timestamp) -> rusqlite::Result<Taken> {
    let mut update = batch.conn.prepare_cached(
        "UPDATE item SET state = 2, due = ?2, holder = ?3, attempt = attempt + 1 WHERE id = ?1 RETURNING work, attempt, deadline",
    )?;
    let (work, attempt, deadline) = update.query_row(params![id, due.as_millis(), holder.to_string()], |row| {
        let work = row.get_ref(0)?.as_blob()?;
        let work = WorkId::from_slice(work).ok_or(rusqlite::Error::InvalidColumnType(0, "work".into(), rusqlite::types::Type::Blob))?;
        Ok((work, row.get(1)?, Timestamp::from_millis(row.get(2)?)))
    })?;
    let mut query = batch.conn.prepare_cached("SELECT body FROM body WHERE item = ?1")?;
    let body: Vec<u8> = query.query_row([id], |row| row.get(0))?;
    let delivery = Delivery { station: station.clone(), id: work, attempt };
    Ok(Taken { delivery, lane: lane.to_owned(), body: Bytes::from(body), deadline })
}

pub(super) fn take_expired(batch: &mut Batch<'_>, holder: InstanceId, lease: Duration, limit: usize) -> Step<Vec<Taken>> {
    let sql = "SELECT item.id, item.hook, item.lane, item.state, hook.station, lane.name
        FROM item JOIN hook ON hook.id = item.hook JOIN lane ON lane.id = item.lane
        WHERE item.deadline <= ?1 AND (item.due IS NULL OR item.due <= ?1 OR item.state = 1) ORDER BY item.deadline LIMIT ?2";
    let mut query = batch.conn.prepare_cached(sql)?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let expired: Vec<(i64, i64, i64, i64, String, String)> = query
        .query_map([batch.now.as_millis(), limit], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?))
        })?
        .collect::<rusqlite::Result<_>>()?;
    let due = batch.now.after(lease);
    let mut taken = Vec::with_capacity(expired.len());
    for (id, hook, lane, state, station, name) in expired {
        let station: StationId =
            station.parse().map_err(|_| rusqlite::Error::InvalidColumnType(4, "station".into(), rusqlite::types::Type::Text))?;
        taken.push(hold(batch, id, &station, &name, holder, due)?);
        count(batch, hook, lane, Some(state), Some(HELD));
    }
    Ok(taken)
}

pub(super) fn extend(batch: &mut Batch<'_>, held: &[Delivery], lease: Duration, deadline: Option<Timestamp>) -> Step<Vec<Delivery>> {
    let due = batch.now.after(lease).as_millis();
    let mut lost = Vec::new();
    for delivery in held {
        let Some((hook, item)) = find_held(batch, delivery)? else {
            lost.push(delivery.clone());
            continue;
        };
        let mut update =
            batch.conn.prepare_cached("UPDATE item SET state = 2, due = ?2, deadline = coalesce(?3, deadline) WHERE id = ?1")?;
        update.execute(params![item.id, due, deadline.map(Timestamp::as_millis)])?;
        count(batch, hook, item.lane, Some(item.state), Some(HELD));
    }
    Ok(lost)
}

pub(super) fn settle(batch: &mut Batch<'_>, delivery: &Delivery, records: &[Record]) -> Step<bool> {
    let found = find_held(batch, delivery)?;
    batch.append(records)?;
    match found {
        Some((hook, item)) => {
            delete(batch, hook, &item)?;
            Ok(true)
        }
        None => Ok(false),
    }
}

pub(super) fn release(
    batch: &mut Batch<'_>,
    delivery: &Delivery,
    at: Timestamp,
    deadline: Option<Timestamp>,
    records: &[Record],
) -> Step<bool> {
    let Some((hook, item)) = find_held(batch, delivery)? else {
        return Ok(false);
    };
    batch.append(records)?;
    batch.conn.prepare_cached("UPDATE item SET holder = NULL WHERE id = ?1")?.execute([item.id])?;
    let (state, due) = if at <= batch.now { (READY, None) } else { (DELAYED, Some(at.as_millis())) };
    set_free(batch, &delivery.station, hook, &item, state, due, deadline)?;
    Ok(true)
}

fn set_free(
    batch: &mut Batch<'_>,
    station: &StationId,
    hook: i64,
    item: &Found,
    state: i64,
    due: Option<i64>,
    deadline: Option<Timestamp>,
) -> rusqlite::Result<()> {
    let mut update = batch.conn.prepare_cached("UPDATE item SET state = ?2, due = ?3, deadline = coalesce(?4, deadline) WHERE id = ?1")?;
    update.execute(params![item.id, state, due, deadline.map(Timestamp::as_millis)])?;
    count(batch, hook, item.lane, Some(item.state), Some(state));
    batch.raise(hook, station);
    Ok(())
}

pub(super) fn wake(batch: &mut Batch<'_>, station: &StationId, id: WorkId, deadline: Option<Timestamp>, records: &[Record]) -> Step<bool> {
    let hook = batch.hook(station)?;
    let found = hook.map(|hook| find(batch, hook, id)).transpose()?.flatten();
    batch.append(records)?;
    let (Some(hook), Some(item)) = (hook, found) else {
        return Ok(false);
    };
    if item.is_held(batch.now) {
        let mut update = batch.conn.prepare_cached("UPDATE item SET deadline = coalesce(?2, deadline) WHERE id = ?1")?;
        update.execute(params![item.id, deadline.map(Timestamp::as_millis)])?;
        return Ok(false);
    }
    set_free(batch, station, hook, &item, READY, None, deadline)?;
    Ok(true)
}

pub(super) fn remove(batch: &mut Batch<'_>, station: &StationId, id: WorkId, records: &[Record]) -> Step<bool> {
    let found = free(batch, station, id)?;
    batch.append(records)?;
    let Some((hook, item)) = found else {
        return Ok(false);
    };
    delete(batch, hook, &item)?;
    Ok(true)
}

/// An item that is there and not held.
fn free(batch: &mut Batch<'_>, station: &StationId, id: WorkId) -> rusqlite::Result<Option<(i64, Found)>> {
    let Some(hook) = batch.hook(station)? else {
        return Ok(None);
    };
    let now = batch.now;
    Ok(find(batch, hook, id)?.filter(|item| !item.is_held(now)).map(|item| (hook, item)))
}
