//! The thread that notices what other processes wrote, and what has become due meanwhile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OptionalExtension, params};

use super::{Shared, table, writer};
use crate::model::id::StationId;
use crate::model::time::Timestamp;
use crate::transport::Bucket;

/// How often other processes' changes are looked for.
const LOOK_EVERY: Duration = Duration::from_millis(15);
/// How often the hooks are looked at for items that have become due.
const DUE_EVERY: Duration = Duration::from_millis(100);
/// How often rows that have expired are looked for.
const EXPIRED_EVERY: Duration = Duration::from_millis(250);

/// Looks until the store is closed.
pub(super) fn run(conn: &Connection, shared: &Arc<Shared>) {
    let mut version = None;
    let mut due_from = shared.now();
    let (mut due_at, mut expired_at) = (Instant::now(), Instant::now());
    while !shared.stopping() {
        let looked = look(conn, shared, &mut version).and_then(|()| {
            if due_at.elapsed() >= DUE_EVERY {
                due_at = Instant::now();
                let now = shared.now();
                // Seldom looked at, a clock that drifts would seem to jump.
                shared.steady.as_ref().map(|steady| steady.look(now));
                due(conn, shared, due_from, now)?;
                due_from = now;
            }
            if expired_at.elapsed() >= EXPIRED_EVERY {
                expired_at = Instant::now();
                expire(conn, shared)?;
            }
            Ok(())
        });
        if let Err(error) = looked {
            tracing::warn!(error = %shared.file.error(&error), "the store could not be watched");
            std::thread::park_timeout(Duration::from_secs(1));
        }
        std::thread::park_timeout(LOOK_EVERY);
    }
}

fn look(conn: &Connection, shared: &Shared, version: &mut Option<i64>) -> rusqlite::Result<()> {
    let seen = conn.prepare_cached("PRAGMA data_version")?.query_row([], |row| row.get(0))?;
    if *version != Some(seen) {
        shared.catch_up(conn)?;
        for bucket in Bucket::ALL {
            shared.hub.changed(bucket, table::revision(conn, bucket)?);
        }
        for station in shared.hub.stations() {
            let mut query = conn.prepare_cached("SELECT raised FROM hook WHERE station = ?1")?;
            if let Some(count) = query.query_row([station.as_str()], |row| row.get(0)).optional()? {
                shared.hub.raised(&station, count);
            }
        }
        *version = Some(seen);
    }
    Ok(())
}

/// Wakes the takers of hooks where a delay or a lease has ended since the last look.
fn due(conn: &Connection, shared: &Shared, from: Timestamp, to: Timestamp) -> rusqlite::Result<()> {
    const SQL: &str = "SELECT EXISTS (SELECT 1 FROM lane JOIN item ON item.lane = lane.id AND item.due > ?2 AND item.due <= ?3
        WHERE lane.hook = (SELECT id FROM hook WHERE station = ?1))";
    let any = |station: &StationId| {
        let mut query = conn.prepare_cached(SQL)?;
        query.query_row(params![station.as_str(), from.as_millis(), to.as_millis()], |row| row.get(0))
    };
    for station in shared.hub.stations() {
        if any(&station)? {
            shared.hub.due(&station);
        }
    }
    Ok(())
}

fn expire(conn: &Connection, shared: &Shared) -> rusqlite::Result<()> {
    if shared.read_only || !table::has_expired(conn, shared.now())? {
        return Ok(());
    }
    let (job, _) = writer::call(table::expire);
    // If the writer is too busy, the next look asks again.
    if let Ok(jobs) = shared.jobs() {
        let _ = jobs.try_send(job);
    }
    Ok(())
}
