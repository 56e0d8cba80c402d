//! The steps of the hooks' transactions.
//!
//! An item is ready, delayed until it is due, held until it is due, parked because its deadline has passed, or held back until somebody
//! wakes it. `attempt` counts its takings; while `holder` is set, the delivery of that attempt is good, also after the lease has lapsed and until somebody else takes it.
//! `lease` is how long its last hold was said to last: each holder has its own idea of that.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use rusqlite::{OptionalExtension, Row, params};

use super::steady::Steady;
use super::writer::{Batch, Failure, Step};
use crate::model::id::{InstanceId, StationId, WorkId};
use crate::model::pace::Pace;
use crate::model::time::Timestamp;
use crate::model::turn::{self, Head};
use crate::transport::{Delivery, Error, Item, Lapsed, Pushed, Record, Take, Taken, Waits, Want, takes_over};

const READY: i64 = 0;
const DELAYED: i64 = 1;
const HELD: i64 = 2;
const PARKED: i64 = 3;
const HELD_BACK: i64 = 4;
/// A hold that ends so much later than it lasts was said by a clock that was ahead.
const OVERLONG_MIN: Duration = Duration::from_secs(60);
/// How many of our leases a hold may last of which an earlier version did not say how long that is.
const OVERLONG_LEASES: u32 = 10;

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

    fn is_held(&self, lapsed: i64) -> bool {
        self.state == HELD && self.due.is_some_and(|due| due > lapsed)
    }
}

/// Holds that ended by then have run out.
fn lapsed(batch: &Batch<'_>) -> i64 {
    if batch.spared > batch.now { i64::MIN } else { batch.now.as_millis() }
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
    let is = |state: Option<i64>, what: i64| i64::from(state == Some(what));
    batch.count(hook, lane, waiting(to) - waiting(from), is(to, HELD) - is(from, HELD));
    batch.count_held_back(hook, is(to, HELD_BACK) - is(from, HELD_BACK));
}

fn delete(batch: &mut Batch<'_>, hook: i64, item: &Found) -> rusqlite::Result<()> {
    batch.conn.prepare_cached("DELETE FROM item WHERE id = ?1")?.execute([item.id])?;
    batch.conn.prepare_cached("DELETE FROM body WHERE item = ?1")?.execute([item.id])?;
    count(batch, hook, item.lane, Some(item.state), None);
    Ok(())
}

pub(super) fn push(batch: &mut Batch<'_>, station: &StationId, item: &Item, limit: u32, announce: Option<&Record>) -> Step<Pushed> {
    let hook = batch.hook_made(station)?;
    let waits = Waits::of(item);
    if let Some(beside) = item.beside
        && find(batch, hook, beside)?.is_none()
    {
        return Ok(if find(batch, hook, item.id)?.is_some() { Pushed::Known } else { Pushed::Elsewhere });
    }
    if batch.waiting(hook, waits)? >= i64::from(limit) {
        return match find(batch, hook, item.id)? {
            Some(_) => Ok(Pushed::Known),
            None => Err(Failure::Refused(Error::Full { station: station.clone(), limit, waits })),
        };
    }
    let lane = batch.lane_made(hook, &item.lane)?;
    let mut insert = batch.conn.prepare_cached(
        "INSERT OR IGNORE INTO item (work, hook, lane, priority, state, due, deadline, attempt, origin, urgency, since)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 0, ?8, ?9, ?10)",
    )?;
    let (deadline, turn) = (item.deadline.as_millis(), &item.turn);
    // Whose clock is ahead has not waited less than nothing.
    let since = turn.since.min(batch.now).as_millis();
    let (state, due) = if item.held_back { (HELD_BACK, Some(deadline)) } else { (READY, None) };
    let (origin, urgency) = (&*turn.origin, turn.urgency);
    let row = params![item.id.as_bytes(), hook, lane, turn.priority, state, due, deadline, origin, urgency, since];
    if insert.execute(row)? == 0 {
        return Ok(Pushed::Known);
    }
    let id = batch.conn.last_insert_rowid();
    batch.conn.prepare_cached("INSERT INTO body (item, body) VALUES (?1, ?2)")?.execute(params![id, &item.body[..]])?;
    count(batch, hook, lane, None, Some(state));
    if let Some(record) = announce {
        batch.append(std::slice::from_ref(record))?;
    }
    batch.raise(hook, station);
    Ok(Pushed::New)
}

/// A wanted lane while a take goes on.
struct Wanted<'a> {
    id: i64,
    name: &'a str,
    left: u32,
    pace: Option<(u32, Pace)>,
}

/// The first item of a line.
struct First {
    lane: usize,
    origin: String,
    top: i32,
    head: Head,
    id: i64,
}

pub(super) fn take(batch: &mut Batch<'_>, station: &StationId, want: &Want) -> Step<Take> {
    let Some(hook) = batch.hook(station)? else {
        return Ok(Take::default());
    };
    let (mut lanes, mut next_at) = (Vec::with_capacity(want.lanes.len()), None);
    let (mut over, mut lapsed) = (Vec::new(), Vec::new());
    for (name, room) in &want.lanes {
        let Some(lane) = batch.lane(hook, name)? else {
            continue;
        };
        let due = promote(batch, hook, lane, want)?;
        if due.any {
            // Others who serve this lane may have room for what is left.
            batch.raise(hook, station);
        }
        over.extend(due.over);
        let left = |(id, attempt)| Lapsed { delivery: Delivery { station: station.clone(), id, attempt }, lane: name.clone() };
        lapsed.extend(due.lapsed.into_iter().map(left));
        let (wanted, free_at) = wanted(batch, lane, name, (*room).min(want.room), want.pace(name))?;
        next_at = [next_at, free_at].into_iter().flatten().min();
        lanes.push(wanted);
    }
    let mut firsts = Vec::new();
    for (at, lane) in lanes.iter().enumerate().filter(|(_, lane)| lane.left > 0) {
        match &want.only {
            Some(only) => named(batch, lane.id, at, only, &mut firsts)?,
            None => lines(batch, lane.id, at, &mut firsts)?,
        }
    }
    let mut served = if firsts.is_empty() { HashMap::new() } else { served(batch, hook)? };
    let lasting = lasting(batch, want.lease);
    let mut taken = Vec::new();
    while taken.len() < want.room as usize {
        let claim = |first: &First| turn::claim(first.top, first.head, served.get(&first.origin).copied(), want.ageing);
        let Some((best, _)) = firsts.iter().enumerate().max_by_key(|(_, first)| claim(first)) else { break };
        let First { lane: at, origin, id, .. } = firsts.swap_remove(best);
        let lane = &mut lanes[at];
        let item = hold(batch, id, station, lane.name, want.holder, &lasting)?;
        if let Some(record) = want.accept.record(&item) {
            batch.append(std::slice::from_ref(&record))?;
        }
        taken.push(item);
        count(batch, hook, lane.id, Some(READY), Some(HELD));
        lane.left -= 1;
        if let Some((_, pace)) = &mut lane.pace {
            pace.start(batch.now);
        }
        match (lane.left, &want.only) {
            (0, _) => firsts.retain(|first| first.lane != at),
            (_, None) => firsts.extend(first_of(batch, lane.id, at, &origin)?),
            _ => {}
        }
        serve(batch, hook, &origin)?;
        served.insert(origin, batch.now);
    }
    for lane in &lanes {
        if let Some((per_minute, pace)) = &lane.pace {
            keep_pace(batch, lane.id, pace)?;
            next_at = next_at.into_iter().chain(pace.next_at(*per_minute, batch.now)).min();
        }
        next_at = next_at.into_iter().chain(next_due(batch, lane.id)?.map(Timestamp::from_millis)).min();
    }
    if batch.spared > batch.now {
        next_at = next_at.into_iter().chain([batch.spared]).min();
    }
    for Over { id, lane, due } in over {
        // Others decide for themselves whether they take it over, and whether it goes on where its time is up.
        let mut update = batch.conn.prepare_cached("UPDATE item SET state = 2, due = ?2 WHERE id = ?1 AND state IN (0, 3)")?;
        if update.execute([id, due])? > 0 {
            count(batch, hook, lane, Some(READY), Some(HELD));
        }
    }
    Ok(Take { taken, next_at, lapsed })
}

/// What may be taken of a lane, and when its pause ends.
fn wanted<'a>(
    batch: &Batch<'_>,
    id: i64,
    name: &'a str,
    room: u32,
    per_minute: Option<u32>,
) -> rusqlite::Result<(Wanted<'a>, Option<Timestamp>)> {
    let paused: Option<i64> = batch.conn.prepare_cached("SELECT paused FROM lane WHERE id = ?1")?.query_row([id], |row| row.get(0))?;
    let paused = paused.map(Timestamp::from_millis).filter(|until| *until > batch.now);
    let mut left = if paused.is_some() { 0 } else { room };
    let pace = match per_minute {
        Some(per_minute) => {
            let mut query = batch.conn.prepare_cached("SELECT second, n FROM start WHERE lane = ?1")?;
            let starts: Vec<(i64, u32)> = query.query_map([id], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<rusqlite::Result<_>>()?;
            let pace = Pace::of(starts);
            left = left.min(pace.left(per_minute, batch.now));
            Some((per_minute, pace))
        }
        None => None,
    };
    Ok((Wanted { id, name, left, pace }, paused))
}

fn keep_pace(batch: &Batch<'_>, lane: i64, pace: &Pace) -> rusqlite::Result<()> {
    let mut insert = batch.conn.prepare_cached("INSERT OR REPLACE INTO start (lane, second, n) VALUES (?1, ?2, ?3)")?;
    let (mut oldest, mut newest) = (i64::MAX, i64::MIN);
    for (second, n) in pace.starts() {
        (oldest, newest) = (oldest.min(second), newest.max(second));
        insert.execute(params![lane, second, n])?;
    }
    let mut delete = batch.conn.prepare_cached("DELETE FROM start WHERE lane = ?1 AND (second < ?2 OR second > ?3)")?;
    delete.execute(params![lane, oldest, newest])?;
    Ok(())
}

/// When each orchestrator was served last.
fn served(batch: &Batch<'_>, hook: i64) -> rusqlite::Result<HashMap<String, Timestamp>> {
    let mut query = batch.conn.prepare_cached("SELECT origin, at FROM served WHERE hook = ?1")?;
    query.query_map([hook], |row| Ok((row.get(0)?, Timestamp::from_millis(row.get(1)?))))?.collect()
}

fn serve(batch: &Batch<'_>, hook: i64, origin: &str) -> rusqlite::Result<()> {
    let mut update = batch.conn.prepare_cached("INSERT OR REPLACE INTO served (hook, origin, at) VALUES (?1, ?2, ?3)")?;
    update.execute(params![hook, origin, batch.now.as_millis()])?;
    Ok(())
}

/// The first items of all lines of a lane.
fn lines(batch: &Batch<'_>, lane: i64, at: usize, firsts: &mut Vec<First>) -> rusqlite::Result<()> {
    let mut query =
        batch.conn.prepare_cached("SELECT origin FROM item WHERE lane = ?1 AND state = 0 AND origin > ?2 ORDER BY origin LIMIT 1")?;
    let mut last = String::new();
    while let Some(origin) = query.query_row(params![lane, last], |row| row.get::<_, String>(0)).optional()? {
        firsts.extend(first_of(batch, lane, at, &origin)?);
        last = origin;
    }
    Ok(())
}

/// The first item of a line; parks those that it meets past their deadline, so that nobody meets them again.
fn first_of(batch: &Batch<'_>, lane: i64, at: usize, origin: &str) -> rusqlite::Result<Option<First>> {
    let sql =
        "SELECT id, urgency, since, deadline FROM item WHERE lane = ?1 AND origin = ?2 AND state = 0 ORDER BY urgency DESC, id LIMIT 1";
    let mut query = batch.conn.prepare_cached(sql)?;
    loop {
        let row = |row: &Row<'_>| Ok((row.get::<_, i64>(0)?, row.get(1)?, row.get(2)?, row.get::<_, i64>(3)?));
        let Some((id, urgency, since, deadline)) = query.query_row(params![lane, origin], row).optional()? else { return Ok(None) };
        if deadline <= batch.now.as_millis() {
            batch.conn.prepare_cached("UPDATE item SET state = ?2 WHERE id = ?1")?.execute([id, PARKED])?;
            continue;
        }
        let mut top = batch.conn.prepare_cached("SELECT max(priority) FROM item WHERE lane = ?1 AND origin = ?2 AND state = 0")?;
        let top = top.query_row(params![lane, origin], |row| row.get(0))?;
        let head = Head { urgency, since: Timestamp::from_millis(since), number: u64::try_from(id).unwrap_or(0) };
        return Ok(Some(First { lane: at, origin: origin.to_owned(), top, head, id }));
    }
}

/// Those of a lane that are named.
fn named(batch: &Batch<'_>, lane: i64, at: usize, only: &[WorkId], firsts: &mut Vec<First>) -> rusqlite::Result<()> {
    let sql = "SELECT id, origin, priority, urgency, since FROM item WHERE lane = ?1 AND work = ?2 AND state = 0 AND deadline > ?3";
    let mut query = batch.conn.prepare_cached(sql)?;
    for work in only {
        let row = |row: &Row<'_>| {
            let id: i64 = row.get(0)?;
            let head = Head { urgency: row.get(3)?, since: Timestamp::from_millis(row.get(4)?), number: u64::try_from(id).unwrap_or(0) };
            Ok(First { lane: at, origin: row.get(1)?, top: row.get(2)?, head, id })
        };
        firsts.extend(query.query_row(params![lane, work.as_bytes(), batch.now.as_millis()], row).optional()?);
    }
    Ok(())
}

fn next_due(batch: &Batch<'_>, lane: i64) -> rusqlite::Result<Option<i64>> {
    let mut query = batch.conn.prepare_cached("SELECT due FROM item WHERE lane = ?1 AND due > ?2 ORDER BY due LIMIT 1")?;
    query.query_row([lane, batch.now.as_millis()], |row| row.get(0)).optional()
}

/// What was due in a lane.
#[derive(Default)]
struct Due {
    /// Whether anything was made ready.
    any: bool,
    /// What was made ready for this taker only.
    over: Vec<Over>,
    /// The work and the attempt of what stays as it is.
    lapsed: Vec<(WorkId, u32)>,
}

/// An item whose hold has lapsed at this moment.
struct Over {
    id: i64,
    lane: i64,
    due: i64,
}

/// Makes ready what is due in a lane; of what was held, what may be taken over.
fn promote(batch: &mut Batch<'_>, hook: i64, lane: i64, want: &Want) -> rusqlite::Result<Due> {
    let mut query = batch.conn.prepare_cached(
        "SELECT id, state, due, work, attempt FROM item WHERE lane = ?1 AND due <= ?2 AND (state <> 2 OR due <= ?3) ORDER BY due",
    )?;
    let row = |row: &Row<'_>| {
        let (work, held) = (WorkId::from_slice(row.get_ref(3)?.as_blob()?), row.get::<_, i64>(1)? == HELD);
        Ok((Over { id: row.get(0)?, lane, due: row.get(2)? }, row.get::<_, i64>(1)?, work.filter(|_| held), row.get::<_, u32>(4)?))
    };
    let items = query.query_map([lane, batch.now.as_millis(), lapsed(batch)], row)?.collect::<rusqlite::Result<Vec<_>>>()?;
    let mut due = Due::default();
    for (item, state, held, attempt) in items {
        match held {
            Some(work) if !want.takes_over(work, attempt) => {
                due.lapsed.push((work, attempt));
                continue;
            }
            Some(_) if want.over.is_some() => due.over.push(Over { id: item.id, lane, due: item.due }),
            _ => due.any = true,
        }
        batch.conn.prepare_cached("UPDATE item SET state = 0, due = NULL WHERE id = ?1")?.execute([item.id])?;
        count(batch, hook, lane, Some(state), Some(READY));
    }
    Ok(due)
}

/// A hold that begins, or is said again.
struct Hold {
    due: i64,
    lease: i64,
}

/// What is held from now on.
fn lasting(batch: &Batch<'_>, lease: Duration) -> Hold {
    if let Some(steady) = batch.steady {
        steady.lasts(lease);
    }
    Hold { due: batch.now.after(lease).as_millis(), lease: millis(lease) }
}

fn millis(span: Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX)
}

/// The clock was set back: of those that hold, who lives soon says so again, and the others are not waited for. `lease` is for those
/// whose rows do not say how long they hold.
fn shorten(batch: &Batch<'_>, lease: Duration) -> rusqlite::Result<()> {
    let longest = millis(lease.saturating_mul(OVERLONG_LEASES));
    let mut update = batch
        .conn
        .prepare_cached("UPDATE item SET due = ?1 + coalesce(lease, ?2) WHERE state = 2 AND due - ?1 - ?4 > coalesce(lease, ?3)")?;
    update.execute([batch.now.as_millis(), millis(lease), longest, millis(OVERLONG_MIN)])?;
    Ok(())
}

pub(super) fn pause(batch: &mut Batch<'_>, station: &StationId, name: &str, until: Timestamp) -> Step<()> {
    let hook = batch.hook_made(station)?;
    let lane = batch.lane_made(hook, name)?;
    let until = Some(until).filter(|until| *until > batch.now).map(Timestamp::as_millis);
    // The later of both, unless it is taken back.
    let sql = "UPDATE lane SET paused = CASE WHEN ?2 IS NULL THEN NULL ELSE max(?2, coalesce(paused, 0)) END WHERE id = ?1";
    batch.conn.prepare_cached(sql)?.execute(params![lane, until])?;
    batch.raise(hook, station);
    Ok(())
}

fn hold(batch: &Batch<'_>, id: i64, station: &StationId, lane: &str, holder: InstanceId, hold: &Hold) -> rusqlite::Result<Taken> {
    let mut update = batch.conn.prepare_cached(
        "UPDATE item SET state = 2, due = ?2, lease = ?3, holder = ?4, attempt = attempt + 1 WHERE id = ?1 RETURNING work, attempt, deadline",
    )?;
    let (work, attempt, deadline) = update.query_row(params![id, hold.due, hold.lease, holder.to_string()], |row| {
        let work = row.get_ref(0)?.as_blob()?;
        let work = WorkId::from_slice(work).ok_or(rusqlite::Error::InvalidColumnType(0, "work".into(), rusqlite::types::Type::Blob))?;
        Ok((work, row.get(1)?, Timestamp::from_millis(row.get(2)?)))
    })?;
    let mut query = batch.conn.prepare_cached("SELECT body FROM body WHERE item = ?1")?;
    let body: Vec<u8> = query.query_row([id], |row| row.get(0))?;
    let delivery = Delivery { station: station.clone(), id: work, attempt };
    Ok(Taken { delivery, lane: lane.to_owned(), body: Bytes::from(body), deadline })
}

pub(super) fn take_expired(
    batch: &mut Batch<'_>,
    holder: InstanceId,
    lease: Duration,
    limit: usize,
    over: Option<&[Delivery]>,
) -> Step<Take> {
    if batch.steady.is_some_and(Steady::take_overlong) {
        shorten(batch, lease)?;
    }
    let sql = "SELECT item.id, item.hook, item.lane, item.state, hook.station, lane.name, item.work, item.attempt
        FROM item JOIN hook ON hook.id = item.hook JOIN lane ON lane.id = item.lane
        WHERE item.deadline <= ?1 AND (item.due IS NULL OR item.state = 1 OR item.due <= CASE item.state WHEN 2 THEN ?3 ELSE ?1 END)
        ORDER BY item.deadline LIMIT ?2";
    let mut query = batch.conn.prepare_cached(sql)?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    type Expired = (i64, i64, i64, i64, String, String, (Option<WorkId>, u32));
    let expired: Vec<Expired> = query
        .query_map([batch.now.as_millis(), limit, lapsed(batch)], |row| {
            let held = (WorkId::from_slice(row.get_ref(6)?.as_blob()?), row.get(7)?);
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?, held))
        })?
        .collect::<rusqlite::Result<_>>()?;
    let lasting = lasting(batch, lease);
    let mut take = Take::default();
    for (id, hook, lane, state, station, name, held) in expired {
        let station: StationId =
            station.parse().map_err(|_| rusqlite::Error::InvalidColumnType(4, "station".into(), rusqlite::types::Type::Text))?;
        if let (Some(work), attempt) = held
            && state == HELD
            && !takes_over(over, work, attempt)
        {
            take.lapsed.push(Lapsed { delivery: Delivery { station, id: work, attempt }, lane: name });
            continue;
        }
        take.taken.push(hold(batch, id, &station, &name, holder, &lasting)?);
        count(batch, hook, lane, Some(state), Some(HELD));
    }
    Ok(take)
}

pub(super) fn extend(batch: &mut Batch<'_>, held: &[Delivery], lease: Duration, deadline: Option<Timestamp>) -> Step<Vec<Delivery>> {
    let Hold { due, lease } = lasting(batch, lease);
    let mut lost = Vec::new();
    for delivery in held {
        let Some((hook, item)) = find_held(batch, delivery)? else {
            lost.push(delivery.clone());
            continue;
        };
        let mut update = batch
            .conn
            .prepare_cached("UPDATE item SET state = 2, due = ?2, lease = ?4, deadline = coalesce(?3, deadline) WHERE id = ?1")?;
        update.execute(params![item.id, due, deadline.map(Timestamp::as_millis), lease])?;
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
    if item.state == HELD {
        let mut update = batch.conn.prepare_cached("UPDATE item SET deadline = coalesce(?2, deadline) WHERE id = ?1")?;
        update.execute(params![item.id, deadline.map(Timestamp::as_millis)])?;
        let is_held = item.is_held(lapsed(batch));
        if !is_held {
            batch.raise(hook, station);
        }
        return Ok(!is_held);
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
    let lapsed = lapsed(batch);
    Ok(find(batch, hook, id)?.filter(|item| !item.is_held(lapsed)).map(|item| (hook, item)))
}
