//! Goes along with a bucket: what the server says again of each change, and the time, since rows also expire.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::pin::pin;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

use super::row::{Cell, REMOVAL_KEPT, State};
use super::stream::Stored;
use super::table::{NatsTable, Rows};
use super::tail::Tail;
use crate::model::time::Timestamp;
use crate::transport::{Bucket, Change, Result, Row, Watch};

/// How often the clock is looked at while a row may expire.
const CLOCK_EVERY: Duration = Duration::from_millis(200);
/// After an interruption the rows are read anew if they were last read so long ago that removals may have been dropped meanwhile.
const RELOAD_AFTER: Duration = Duration::from_secs(REMOVAL_KEPT.as_secs() / 2);

/// A reader of a bucket's changes.
pub(super) struct Watcher {
    table: NatsTable,
    bucket: Bucket,
    tail: Tail,
    interruptions: tokio::sync::watch::Receiver<u64>,
    loaded: Instant,
    stale: bool,
    unread: VecDeque<Stored>,
    told: Told,
}

/// What the watcher has been told, and what it is to be told.
#[derive(Default)]
struct Told {
    rows: BTreeMap<String, Known>,
    expiring: BTreeSet<(Timestamp, String)>,
    changes: Vec<Change>,
}

#[derive(Clone, Copy)]
struct Known {
    revision: u64,
    expires: Option<Timestamp>,
}

impl Watcher {
    pub(super) async fn open(table: NatsTable, bucket: Bucket) -> Result<Self> {
        let mut interruptions = table.link().interruptions.clone();
        interruptions.mark_unchanged();
        let (tail, rows) = load(&table, bucket).await?;
        let mut told = Told::default();
        rows.into_iter().for_each(|(row, expires)| told.put(row, expires));
        told.changes.push(Change::Loaded);
        Ok(Self { table, bucket, tail, interruptions, loaded: Instant::now(), stale: false, unread: VecDeque::new(), told })
    }

    /// Reads everything anew and tells what is different.
    async fn reload(&mut self) -> Result<()> {
        let is_other = self.tail.is_anew();
        let (tail, rows) = load(&self.table, self.bucket).await?;
        let there: BTreeSet<&str> = rows.iter().map(|(row, _)| row.key.as_str()).collect();
        let lost: Vec<String> = self.told.rows.keys().filter(|key| !there.contains(key.as_str())).cloned().collect();
        lost.into_iter().for_each(|key| self.told.remove(key));
        for (row, expires) in rows {
            // Revisions of another stream say nothing of this one's.
            if is_other || self.told.rows.get(&row.key).is_none_or(|known| known.revision != row.revision) {
                self.told.put(row, expires);
            }
        }
        (self.tail, self.loaded, self.stale) = (tail, Instant::now(), false);
        self.unread.clear();
        Ok(())
    }

    async fn take_in(&mut self, stored: &Stored) -> Result<()> {
        let link = self.table.link();
        let Some(cell) = Cell::read(&link.wire, self.bucket, stored) else { return Ok(()) };
        match cell.state {
            State::Live(expires) if cell.state.is_live(link.now()) => match self.table.row(self.bucket, cell.key.clone(), stored).await? {
                Some(row) => self.told.put(row, expires),
                None => self.told.remove(cell.key),
            },
            State::Live(_) | State::Gone => self.told.remove(cell.key),
        }
        Ok(())
    }

    /// Waits until messages have come, a row has expired, or the connection was interrupted.
    async fn wait(&mut self) -> Result<()> {
        let Self { table, tail, told, interruptions, .. } = self;
        let mut news = pin!(tail.next());
        loop {
            let now = table.link().now();
            let tick = match told.expiring.first() {
                None => None,
                Some((at, _)) if *at <= now => return Ok(()),
                Some((at, _)) => Some(at.since(now).min(CLOCK_EVERY)),
            };
            tokio::select! {
                biased;
                news = &mut news => {
                    self.unread.extend(news?);
                    return Ok(());
                }
                // Otherwise the tail sees to it.
                Ok(()) = interruptions.changed(), if self.loaded.elapsed() > RELOAD_AFTER => {
                    self.stale = true;
                    return Ok(());
                }
                () = async { match tick { Some(tick) => tokio::time::sleep(tick).await, None => std::future::pending().await } } => {}
            }
        }
    }
}

#[async_trait]
impl Watch for Watcher {
    async fn next(&mut self) -> Result<Vec<Change>> {
        loop {
            if self.stale || self.tail.is_anew() {
                self.reload().await?;
            }
            while let Some(stored) = self.unread.front().cloned() {
                self.take_in(&stored).await?;
                self.unread.pop_front();
            }
            self.told.expire(self.table.link().now());
            if !self.told.changes.is_empty() {
                return Ok(std::mem::take(&mut self.told.changes));
            }
            self.wait().await?;
        }
    }
}

/// The bucket's rows, with when they expire, and a reader of what comes after them.
async fn load(table: &NatsTable, bucket: Bucket) -> Result<(Tail, Vec<(Row, Option<Timestamp>)>)> {
    let (link, stream) = (table.link(), table.stream(bucket).await?);
    let mut tail = stream.tail(link.wire.rows(bucket), link.wire.told_rows(bucket), 0, true).await?;
    let mut newest = Rows::default();
    tail.all().await?.into_iter().for_each(|stored| newest.take_in(link, bucket, stored));
    let mut rows = Vec::with_capacity(newest.0.len());
    for (key, stored) in newest.0 {
        let expires = match Cell::read(&link.wire, bucket, &stored).map(|cell| cell.state) {
            Some(State::Live(expires)) => expires,
            _ => None,
        };
        rows.extend(table.row(bucket, key, &stored).await?.map(|row| (row, expires)));
    }
    Ok((tail, rows))
}

impl Told {
    fn put(&mut self, row: Row, expires: Option<Timestamp>) {
        self.forget(&row.key);
        self.rows.insert(row.key.clone(), Known { revision: row.revision, expires });
        self.expiring.extend(expires.map(|at| (at, row.key.clone())));
        self.changes.push(Change::Put(row));
    }

    fn remove(&mut self, key: String) {
        if self.forget(&key) {
            self.changes.push(Change::Removed(key));
        }
    }

    fn forget(&mut self, key: &str) -> bool {
        let Some(known) = self.rows.remove(key) else { return false };
        if let Some(at) = known.expires {
            self.expiring.remove(&(at, key.to_owned()));
        }
        true
    }

    fn expire(&mut self, now: Timestamp) {
        while self.expiring.first().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, key)) = self.expiring.pop_first() {
                self.rows.remove(&key);
                self.changes.push(Change::Removed(key));
            }
        }
    }
}
