//! Named values with revisions and expiry. Each change also stands, for a while, in a list that watchers read along.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::watch;

use super::Shared;
use super::writer::{Batch, Failure, Step};
use crate::model::time::Timestamp;
use crate::transport::{Bucket, Change, Error, Expect, Result, Row, Table, Watch};

/// How many changes of a bucket are kept for watchers; one that falls further behind is given the rows again.
const CHANGES_MAX: i64 = 1024;
/// How long a change is kept for watchers.
const CHANGES_AGE_MAX: Duration = Duration::from_secs(3600);
/// How many rows expire in one transaction.
const EXPIRE_MAX: i64 = 256;

/// The tables of one store.
pub(super) struct LocalTable(pub(super) Arc<Shared>);

#[async_trait]
impl Table for LocalTable {
    async fn get(&self, bucket: Bucket, key: &str) -> Result<Option<Row>> {
        let (key, now) = (key.to_owned(), self.0.now());
        self.0.read(move |conn| get(conn, bucket, &key, now)).await
    }

    async fn put(&self, bucket: Bucket, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> Result<u64> {
        let key = key.to_owned();
        self.0.write(move |batch| put(batch, bucket, &key, &value, expect, ttl)).await
    }

    async fn remove(&self, bucket: Bucket, key: &str, expect: Expect) -> Result<bool> {
        let key = key.to_owned();
        self.0.write(move |batch| remove(batch, bucket, &key, expect)).await
    }

    async fn list(&self, bucket: Bucket) -> Result<Vec<Row>> {
        let now = self.0.now();
        self.0.read(move |conn| list(conn, bucket, now)).await
    }

    async fn list_of(&self, bucket: Bucket, head: &str) -> Result<Vec<Row>> {
        let (head, now) = (head.to_owned(), self.0.now());
        self.0.read(move |conn| list_of(conn, bucket, &head, now)).await
    }

    async fn watch(&self, bucket: Bucket) -> Result<Box<dyn Watch>> {
        let news = self.0.hub.bucket(bucket).ok_or(Error::Closed)?;
        Ok(Box::new(Watcher { shared: Arc::clone(&self.0), bucket, news, revision: None, keys: HashSet::new() }))
    }

    async fn next(&self, bucket: Bucket, key: &str, floor: u64, count: u64) -> Result<u64> {
        const SQL: &str = "INSERT INTO number (bucket, key, n) VALUES (?1, ?2, ?3 + ?4)
            ON CONFLICT (bucket, key) DO UPDATE SET n = max(n, ?3) + ?4 RETURNING n - ?4 + 1";
        let key = key.to_owned();
        let (floor, count) = (i64::try_from(floor).unwrap_or(i64::MAX >> 1), i64::try_from(count).unwrap_or(1));
        self.0
            .write(move |batch| {
                let n: i64 = batch.conn.prepare_cached(SQL)?.query_row(params![bucket.name(), key, floor, count], |row| row.get(0))?;
                Ok(unsigned(n))
            })
            .await
    }
}

fn unsigned(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

/// A bucket's last revision.
pub(super) fn revision(conn: &Connection, bucket: Bucket) -> rusqlite::Result<i64> {
    let mut query = conn.prepare_cached("SELECT revision FROM clock WHERE bucket = ?1")?;
    Ok(query.query_row([bucket.name()], |row| row.get(0)).optional()?.unwrap_or(0))
}

fn get(conn: &Connection, bucket: Bucket, key: &str, now: Timestamp) -> rusqlite::Result<Option<Row>> {
    let sql = "SELECT key, value, revision FROM cell WHERE bucket = ?1 AND key = ?2 AND (expires IS NULL OR expires > ?3)";
    conn.prepare_cached(sql)?.query_row(params![bucket.name(), key, now.as_millis()], row).optional()
}

fn list(conn: &Connection, bucket: Bucket, now: Timestamp) -> rusqlite::Result<Vec<Row>> {
    let sql = "SELECT key, value, revision FROM cell WHERE bucket = ?1 AND (expires IS NULL OR expires > ?2) ORDER BY key";
    conn.prepare_cached(sql)?.query_map(params![bucket.name(), now.as_millis()], row)?.collect()
}

fn list_of(conn: &Connection, bucket: Bucket, head: &str, now: Timestamp) -> rusqlite::Result<Vec<Row>> {
    // The slash comes right after the dot.
    let sql = "SELECT key, value, revision FROM cell
        WHERE bucket = ?1 AND key > ?2 || '.' AND key < ?2 || '/' AND (expires IS NULL OR expires > ?3) ORDER BY key";
    conn.prepare_cached(sql)?.query_map(params![bucket.name(), head, now.as_millis()], row)?.collect()
}

fn row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
    Ok(Row { key: row.get(0)?, value: Bytes::from(row.get::<_, Vec<u8>>(1)?), revision: unsigned(row.get(2)?) })
}

fn check(bucket: Bucket, key: &str, found: Option<u64>, expect: Expect) -> Step<()> {
    let as_expected = match expect {
        Expect::Any => true,
        Expect::Absent => found.is_none(),
        Expect::Revision(revision) => found == Some(revision),
    };
    if as_expected { Ok(()) } else { Err(Failure::Refused(Error::Conflict { bucket: bucket.name(), key: key.to_owned() })) }
}

fn revision_of(batch: &Batch<'_>, bucket: Bucket, key: &str) -> rusqlite::Result<Option<u64>> {
    let sql = "SELECT revision FROM cell WHERE bucket = ?1 AND key = ?2 AND (expires IS NULL OR expires > ?3)";
    let mut query = batch.conn.prepare_cached(sql)?;
    Ok(query.query_row(params![bucket.name(), key, batch.now.as_millis()], |row| row.get(0)).optional()?.map(unsigned))
}

fn put(batch: &mut Batch<'_>, bucket: Bucket, key: &str, value: &[u8], expect: Expect, ttl: Option<Duration>) -> Step<u64> {
    if expect != Expect::Any {
        check(bucket, key, revision_of(batch, bucket, key)?, expect)?;
    }
    let expires = ttl.map(|ttl| batch.now.after(ttl).as_millis());
    let revision = record(batch, bucket, key, Some(value))?;
    let sql = "INSERT OR REPLACE INTO cell (bucket, key, revision, expires, value) VALUES (?1, ?2, ?3, ?4, ?5)";
    batch.conn.prepare_cached(sql)?.execute(params![bucket.name(), key, revision, expires, value])?;
    Ok(unsigned(revision))
}

fn remove(batch: &mut Batch<'_>, bucket: Bucket, key: &str, expect: Expect) -> Step<bool> {
    let Some(found) = revision_of(batch, bucket, key)? else {
        return Ok(false);
    };
    check(bucket, key, Some(found), expect)?;
    drop_row(batch, bucket, key)?;
    Ok(true)
}

fn drop_row(batch: &mut Batch<'_>, bucket: Bucket, key: &str) -> rusqlite::Result<()> {
    batch.conn.prepare_cached("DELETE FROM cell WHERE bucket = ?1 AND key = ?2")?.execute(params![bucket.name(), key])?;
    record(batch, bucket, key, None)?;
    Ok(())
}

/// Writes down a change for watchers; gives its revision.
fn record(batch: &mut Batch<'_>, bucket: Bucket, key: &str, value: Option<&[u8]>) -> rusqlite::Result<i64> {
    let revision = batch.revision(bucket)?;
    let mut insert = batch.conn.prepare_cached("INSERT INTO change (bucket, revision, at, key, value) VALUES (?1, ?2, ?3, ?4, ?5)")?;
    insert.execute(params![bucket.name(), revision, batch.now.as_millis(), key, value])?;
    let mut trim = batch.conn.prepare_cached("DELETE FROM change WHERE bucket = ?1 AND revision <= ?2")?;
    trim.execute(params![bucket.name(), revision - CHANGES_MAX])?;
    Ok(revision)
}

/// Whether rows wait to be removed because they have expired.
pub(super) fn has_expired(conn: &Connection, now: Timestamp) -> rusqlite::Result<bool> {
    conn.prepare_cached("SELECT EXISTS (SELECT 1 FROM cell WHERE expires <= ?1)")?.query_row([now.as_millis()], |row| row.get(0))
}

/// Removes rows that have expired.
pub(super) fn expire(batch: &mut Batch<'_>) -> Step<()> {
    for bucket in Bucket::ALL {
        let sql = "SELECT key FROM cell WHERE expires <= ?1 AND bucket = ?2 ORDER BY expires LIMIT ?3";
        let mut query = batch.conn.prepare_cached(sql)?;
        let keys = query.query_map(params![batch.now.as_millis(), bucket.name(), EXPIRE_MAX], |row| row.get(0))?;
        let keys: Vec<String> = keys.collect::<rusqlite::Result<_>>()?;
        for key in keys {
            drop_row(batch, bucket, &key)?;
        }
    }
    Ok(())
}

/// Forgets changes that every watcher has seen long ago.
pub(super) fn forget(batch: &mut Batch<'_>) -> Step<()> {
    let horizon = batch.now.as_millis().saturating_sub(i64::try_from(CHANGES_AGE_MAX.as_millis()).unwrap_or(i64::MAX));
    batch.conn.prepare_cached("DELETE FROM change WHERE at < ?1")?.execute([horizon])?;
    Ok(())
}

/// Goes along with a bucket.
struct Watcher {
    shared: Arc<Shared>,
    bucket: Bucket,
    news: watch::Receiver<i64>,
    /// Up to where it was told; none before the first rows.
    revision: Option<i64>,
    keys: HashSet<String>,
}

#[async_trait]
impl Watch for Watcher {
    async fn next(&mut self) -> Result<Vec<Change>> {
        loop {
            self.news.borrow_and_update();
            let (bucket, now, after) = (self.bucket, self.shared.now(), self.revision);
            let (revision, news) = self.shared.read(move |conn| news(conn, bucket, now, after)).await?;
            let changes = self.tell(news);
            self.revision = Some(revision);
            if !changes.is_empty() {
                return Ok(changes);
            }
            self.news.changed().await.map_err(|_| Error::Closed)?;
        }
    }
}

impl Watcher {
    /// Turns what was read into what the watcher has to be told.
    fn tell(&mut self, news: News) -> Vec<Change> {
        match news {
            News::Changes(listed) => listed.into_iter().filter_map(|(key, row)| self.tell_one(key, row)).collect(),
            News::Rows(rows) => {
                let keys: HashSet<String> = rows.iter().map(|row| row.key.clone()).collect();
                let gone: Vec<Change> = self.keys.difference(&keys).cloned().map(Change::Removed).collect();
                let is_first = self.revision.is_none();
                let after = unsigned(self.revision.unwrap_or(0));
                self.keys = keys;
                let put = rows.into_iter().filter(|row| row.revision > after).map(Change::Put);
                gone.into_iter().chain(put).chain(is_first.then_some(Change::Loaded)).collect()
            }
        }
    }

    fn tell_one(&mut self, key: String, row: Option<Row>) -> Option<Change> {
        match row {
            Some(row) => {
                self.keys.insert(key);
                Some(Change::Put(row))
            }
            None => self.keys.remove(&key).then_some(Change::Removed(key)),
        }
    }
}

/// What a watcher reads.
enum News {
    /// Each change since the last time: the key, and the row unless it was removed.
    Changes(Vec<(String, Option<Row>)>),
    /// All rows: the changes are not known, or not any more.
    Rows(Vec<Row>),
}

/// What has happened after a revision, and the revision that this brings the watcher to.
fn news(conn: &Connection, bucket: Bucket, now: Timestamp, after: Option<i64>) -> rusqlite::Result<(i64, News)> {
    // One transaction, so that rows, changes and revision are of the same moment.
    let tx = conn.unchecked_transaction()?;
    let revision = revision(&tx, bucket)?;
    let Some(after) = after else {
        return Ok((revision, News::Rows(list(&tx, bucket, now)?)));
    };
    let mut query = tx.prepare_cached("SELECT revision, key, value FROM change WHERE bucket = ?1 AND revision > ?2 ORDER BY revision")?;
    let listed: Vec<(String, Option<Row>)> = query
        .query_map(params![bucket.name(), after], |row| {
            let (revision, key): (i64, String) = (row.get(0)?, row.get(1)?);
            let value: Option<Vec<u8>> = row.get(2)?;
            Ok((key.clone(), value.map(|value| Row { key, value: Bytes::from(value), revision: unsigned(revision) })))
        })?
        .collect::<rusqlite::Result<_>>()?;
    let all_there = i64::try_from(listed.len()).unwrap_or(i64::MAX) >= revision - after;
    Ok((revision, if all_there { News::Changes(listed) } else { News::Rows(list(&tx, bucket, now)?) }))
}
