//! The thread that keeps the store within its limits: the oldest settled works and blobs go first.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::params;

use super::writer::{Batch, Step};
use super::{Shared, blobs, table};

/// How often the limits are looked at.
const EVERY: Duration = Duration::from_secs(2);
/// How long the writer is left alone between two parts of a round.
const PAUSE: Duration = Duration::from_millis(10);
/// How often old blobs are looked for.
const BLOBS_EVERY: Duration = Duration::from_secs(600);
/// How many records one part of a round looks at.
const PART: i64 = 1024;

/// How old and how large a store may become.
pub(super) struct Limits {
    pub(super) max_age: Duration,
    pub(super) blob_max_age: Duration,
    pub(super) max_bytes: u64,
}

/// Keeps the limits until the store is closed.
pub(super) fn run(limits: &Limits, blobs: &blobs::Folder, shared: &Arc<Shared>) {
    let mut blobs_at: Option<Instant> = None;
    while !shared.stopping() {
        if blobs_at.is_none_or(|at| at.elapsed() >= BLOBS_EVERY) {
            blobs_at = Some(Instant::now());
            blobs.prune(limits.blob_max_age);
        }
        round(limits, shared);
        std::thread::park_timeout(EVERY);
    }
}

fn round(limits: &Limits, shared: &Shared) {
    let max_age = i64::try_from(limits.max_age.as_millis()).unwrap_or(i64::MAX);
    let max_bytes = limits.max_bytes;
    let mut after = Some(0);
    while let Some(from) = after
        && !shared.stopping()
    {
        let part = shared.write_blocking(move |batch| {
            let horizon = batch.now.as_millis().saturating_sub(max_age);
            prune(batch, from, horizon, max_bytes)
        });
        after = part.unwrap_or_else(|error| {
            tracing::debug!(%error, "the log keeps old records for now");
            None
        });
        if after.is_some() {
            std::thread::park_timeout(PAUSE);
        }
    }
    if let Err(error) = shared.write_blocking(table::forget) {
        tracing::debug!(%error, "the tables keep old changes for now");
    }
}

/// Drops old records after a position, whole works at a time; gives where to go on, if there may be more to drop.
fn prune(batch: &mut Batch<'_>, after: i64, horizon: i64, max_bytes: u64) -> Step<Option<i64>> {
    let mut query = batch.conn.prepare_cached("SELECT seq, work, at FROM log WHERE seq > ?1 ORDER BY seq LIMIT ?2")?;
    let oldest: Vec<(i64, Option<Vec<u8>>, i64)> =
        query.query_map([after, PART], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?.collect::<rusqlite::Result<_>>()?;
    drop(query);
    let mut seen = HashSet::new();
    let mut head = None;
    for (seq, work, at) in &oldest {
        let too_large = used(batch)? > max_bytes;
        if !too_large && *at >= horizon {
            return Ok(None);
        }
        if work.as_ref().is_some_and(|work| !seen.insert(work.clone())) {
            continue;
        }
        if head.is_none() {
            // Positions go on rising when the last record is dropped.
            head = Some(super::log::head(batch.conn)?);
            batch.conn.prepare_cached("INSERT OR REPLACE INTO meta (name, value) VALUES ('pruned', ?1)")?.execute([head])?;
        }
        match work {
            None => batch.conn.prepare_cached("DELETE FROM log WHERE seq = ?1")?.execute([seq])?,
            // A work goes as a whole, once it is off every hook and its last record is old enough too.
            Some(work) => batch
                .conn
                .prepare_cached(
                    "DELETE FROM log WHERE work = ?1 AND NOT EXISTS (SELECT 1 FROM item WHERE item.work = ?1)
                     AND (?2 OR (SELECT at FROM log WHERE work = ?1 ORDER BY seq DESC LIMIT 1) < ?3)",
                )?
                .execute(params![work, too_large, horizon])?,
        };
    }
    Ok(oldest.last().filter(|_| i64::try_from(oldest.len()).unwrap_or(0) == PART).map(|(seq, _, _)| *seq))
}

/// How many bytes the store's contents take in its file.
fn used(batch: &Batch<'_>) -> rusqlite::Result<u64> {
    let number = |pragma: &str| batch.conn.prepare_cached(pragma)?.query_row([], |row| row.get::<_, i64>(0));
    let pages = number("PRAGMA page_count")? - number("PRAGMA freelist_count")?;
    Ok(u64::try_from(pages * number("PRAGMA page_size")?).unwrap_or(0))
}
