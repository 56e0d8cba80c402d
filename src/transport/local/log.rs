//! The log: append, read, follow.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use rusqlite::{Connection, Row, params};

use super::Shared;
use super::hub::{Found, Mailbox};
use crate::model::id::WorkId;
use crate::transport::{Entry, Error, Filter, Follow, Log, Position, Record, Result, Subject};

/// How many entries a follower reads at once.
const READ_MAX: usize = 512;
/// How many bytes of bodies one read gives, unless the first body alone is larger.
const READ_BYTES_MAX: usize = 4 << 20;

/// The log of one store.
pub(super) struct LocalLog(pub(super) Arc<Shared>);

#[async_trait]
impl Log for LocalLog {
    async fn append(&self, records: Vec<Record>) -> Result<Position> {
        self.0.write(move |batch| Ok(batch.append(&records)?)).await
    }

    async fn read(&self, filter: Filter, after: Position, limit: usize) -> Result<Vec<Entry>> {
        let mut all = Vec::new();
        let mut after = after;
        while all.len() < limit {
            let room = limit - all.len();
            let page = self.0.read(move |conn| page(conn, filter, after, room)).await?;
            after = page.entries.last().map_or(after, |entry| entry.position);
            all.extend(page.entries);
            if page.end {
                break;
            }
        }
        Ok(all)
    }

    async fn follow(&self, filter: Filter, after: Position) -> Result<Box<dyn Follow>> {
        let (mailbox, dispatched) = self.0.hub.join(filter);
        Ok(Box::new(Follower { shared: Arc::clone(&self.0), filter, mailbox, position: after.seq, stored: dispatched }))
    }

    async fn replay(&self, filter: Filter) -> Result<(Vec<Entry>, Box<dyn Follow>)> {
        // Whoever joins first misses nothing; what is both read and handed over is told apart by its position.
        let (mailbox, dispatched) = self.0.hub.join(filter);
        let mut follower = Follower { shared: Arc::clone(&self.0), filter, mailbox, position: dispatched, stored: dispatched };
        let entries = self.read(filter, Position::default(), usize::MAX).await?;
        if let Some(last) = entries.last() {
            follower.position = follower.position.max(last.position.seq);
        }
        follower.stored = follower.position;
        Ok((entries, Box::new(follower)))
    }

    async fn head(&self) -> Result<Position> {
        let head = self.0.read(head).await?;
        Ok(Position::of(u64::try_from(head).unwrap_or(0)))
    }
}

/// Goes along with the log: what is stored up to `stored` is read, what comes later is in the mailbox.
struct Follower {
    shared: Arc<Shared>,
    filter: Filter,
    mailbox: Arc<Mailbox>,
    position: u64,
    stored: u64,
}

#[async_trait]
impl Follow for Follower {
    async fn next(&mut self) -> Result<Vec<Entry>> {
        loop {
            if self.position < self.stored {
                let (filter, after) = (self.filter, Position::of(self.position));
                let page = self.shared.read(move |conn| page(conn, filter, after, READ_MAX)).await?;
                if let Some(last) = page.entries.last() {
                    self.position = last.position.seq;
                }
                if page.end {
                    self.position = self.position.max(self.stored);
                }
                if !page.entries.is_empty() {
                    return Ok(page.entries);
                }
                continue;
            }
            match self.mailbox.open() {
                Found::Entries(mut entries) => {
                    entries.retain(|entry| entry.position.seq > self.position);
                    if let Some(last) = entries.back() {
                        self.position = last.position.seq;
                        return Ok(entries.into());
                    }
                }
                Found::Lagged => self.stored = self.shared.hub.rejoin(&self.mailbox),
                Found::Closed => return Err(Error::Closed),
                Found::Nothing => self.mailbox.ready.notified().await,
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.shared.hub.leave(self.filter, &self.mailbox);
    }
}

/// The last position that was ever given.
pub(super) fn head(conn: &Connection) -> rusqlite::Result<i64> {
    let sql = "SELECT max(coalesce((SELECT max(seq) FROM log), 0), coalesce((SELECT value FROM meta WHERE name = 'pruned'), 0))";
    conn.prepare_cached(sql)?.query_row([], |row| row.get(0))
}

/// Some entries, and whether the log had no more when they were read.
pub(super) struct Page {
    pub(super) entries: Vec<Entry>,
    pub(super) end: bool,
}

/// Entries after a position, in order.
pub(super) fn page(conn: &Connection, filter: Filter, after: Position, limit: usize) -> rusqlite::Result<Page> {
    let (sql, work) = match &filter {
        Filter::AllWork => {
            ("SELECT seq, work, channel, audit, body FROM log NOT INDEXED WHERE seq > ?1 AND work IS NOT NULL ORDER BY seq", None)
        }
        Filter::AllStatus => {
            ("SELECT seq, work, channel, audit, body FROM log NOT INDEXED WHERE seq > ?1 AND channel = 1 ORDER BY seq", None)
        }
        Filter::Audit => ("SELECT seq, work, channel, audit, body FROM log WHERE seq > ?1 AND channel = 2 ORDER BY seq", None),
        Filter::Work(id) => {
            ("SELECT seq, work, channel, audit, body FROM log WHERE seq > ?1 AND work = ?2 ORDER BY seq", Some(id.as_bytes()))
        }
    };
    let after = i64::try_from(after.seq).unwrap_or(i64::MAX);
    let mut query = conn.prepare_cached(sql)?;
    let rows = match work {
        Some(work) => query.query(params![after, work.as_slice()])?,
        None => query.query([after])?,
    };
    take_page(rows, limit)
}

/// Entries of every kind after a position.
pub(super) fn page_of_all(conn: &Connection, after: u64) -> rusqlite::Result<Page> {
    let mut query = conn.prepare_cached("SELECT seq, work, channel, audit, body FROM log WHERE seq > ?1 ORDER BY seq")?;
    let rows = query.query([i64::try_from(after).unwrap_or(i64::MAX)])?;
    take_page(rows, READ_MAX)
}

fn take_page(mut rows: rusqlite::Rows<'_>, limit: usize) -> rusqlite::Result<Page> {
    let mut entries = Vec::new();
    let mut bytes = 0;
    while entries.len() < limit && bytes < READ_BYTES_MAX {
        let Some(row) = rows.next()? else {
            return Ok(Page { entries, end: true });
        };
        let entry = entry(row)?;
        bytes += entry.body.len();
        entries.push(entry);
    }
    Ok(Page { entries, end: false })
}

fn entry(row: &Row<'_>) -> rusqlite::Result<Entry> {
    let position = Position::of(u64::try_from(row.get::<_, i64>(0)?).unwrap_or(0));
    let work = row.get_ref(1)?.as_blob_or_null()?.and_then(WorkId::from_slice);
    let subject = match (work, row.get::<_, i64>(2)?) {
        (Some(id), 0) => Subject::Response(id),
        (Some(id), 1) => Subject::Status(id),
        (None, 2) => {
            let audit: String = row.get(3)?;
            let (noun, verb) = audit.split_once('.').unwrap_or((&audit, ""));
            Subject::Audit { noun: noun.to_owned().into(), verb: verb.to_owned().into() }
        }
        (_, channel) => return Err(rusqlite::Error::IntegralValueOutOfRange(2, channel)),
    };
    Ok(Entry { position, subject, by: None, is_forwarded: false, body: Bytes::from(row.get::<_, Vec<u8>>(4)?) })
}
