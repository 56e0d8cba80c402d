//! The two logs as one.

use std::sync::atomic::Ordering;

use async_trait::async_trait;

use super::{Far, Homes, Mesh, Side};
use crate::transport::{Entry, Error, Filter, Follow, Log, Position, Record, Result};

/// A place in both logs at once: everything up to here of the one and of the other.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Both {
    pub(super) far: u64,
    pub(super) local: u64,
}

/// Marks a place in both logs; a place without it is one of the local log, from before there was a server.
const MARK: u64 = 1 << 62;
const LOCAL_BITS: u32 = 28;
const LOCAL_MAX: u64 = (1 << LOCAL_BITS) - 1;

impl Both {
    pub(super) fn of(position: Position) -> Self {
        match position.0 & MARK {
            0 => Self { far: 0, local: position.0 },
            _ => Self { far: (position.0 & !MARK) >> LOCAL_BITS, local: position.0 & LOCAL_MAX },
        }
    }

    pub(super) fn position(self) -> Position {
        Position(MARK | (self.far << LOCAL_BITS) | self.local.min(LOCAL_MAX))
    }

    fn mark_local(&mut self, entries: &mut [Entry]) {
        for entry in entries {
            self.local = self.local.max(entry.position.0);
            entry.position = self.position();
        }
    }

    fn mark_far(&mut self, entries: &mut [Entry]) {
        for entry in entries {
            self.far = self.far.max(entry.position.0);
            entry.position = self.position();
        }
    }
}

#[async_trait]
impl Log for Mesh {
    async fn append(&self, records: Vec<Record>) -> Result<Position> {
        if self.home_of(&records).await? == Some(true) {
            let local = self.local.log.append(records).await?;
            return Ok(Both { far: self.far_head.load(Ordering::Relaxed), local: local.0 }.position());
        }
        let far = self.far()?.log.append(records).await?.0;
        self.saw(far);
        Ok(Both { far, local: 0 }.position())
    }

    async fn read(&self, filter: Filter, after: Position, limit: usize) -> Result<Vec<Entry>> {
        let mut at = Both::of(after);
        if let Filter::Work(id) = filter {
            if self.is_local(id).await? {
                let mut entries = self.local.log.read(filter, Position(at.local), limit).await?;
                at.mark_local(&mut entries);
                return Ok(entries);
            }
            let mut entries = self.far()?.log.read(filter, Position(at.far), limit).await?;
            at.mark_far(&mut entries);
            return Ok(entries);
        }
        let mut entries = self.local.log.read(filter, Position(at.local), limit).await?;
        at.mark_local(&mut entries);
        // Without the server, what is known here is all there is.
        let Ok(far) = self.far() else { return Ok(entries) };
        while entries.len() < limit {
            let room = limit - entries.len();
            match far.log.read(filter, Position(at.far), room).await {
                Ok(mut more) => {
                    // However much of it was forwarded from here: that is not the end of the server's log.
                    let is_end = more.len() < room;
                    at.mark_far(&mut more);
                    self.saw(at.far);
                    entries.extend(self.not_local(more).await?);
                    if is_end {
                        break;
                    }
                }
                Err(Error::Unreachable(_) | Error::Unanswered(_)) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(entries)
    }

    async fn follow(&self, filter: Filter, after: Position) -> Result<Box<dyn Follow>> {
        let at = Both::of(after);
        if let Filter::Work(id) = filter {
            let (inner, side) = if self.is_local(id).await? {
                (self.local.log.follow(filter, Position(at.local)).await?, Side::Local)
            } else {
                (self.far()?.log.follow(filter, Position(at.far)).await?, Side::Far)
            };
            return Ok(Box::new(One { inner, side, at }));
        }
        let local = self.local.log.follow(filter, Position(at.local)).await?;
        Ok(Box::new(Two { local, far: None, opened: self.far.clone(), filter, at, homes: self.homes.clone() }))
    }

    async fn replay(&self, filter: Filter) -> Result<(Vec<Entry>, Box<dyn Follow>)> {
        let mut at = Both::default();
        if let Filter::Work(id) = filter {
            if self.is_local(id).await? {
                let (mut entries, inner) = self.local.log.replay(filter).await?;
                at.mark_local(&mut entries);
                return Ok((entries, Box::new(One { inner, side: Side::Local, at })));
            }
            let (mut entries, inner) = self.far()?.log.replay(filter).await?;
            at.mark_far(&mut entries);
            return Ok((entries, Box::new(One { inner, side: Side::Far, at })));
        }
        let entries = self.read(filter, Position::default(), usize::MAX).await?;
        let after = entries.last().map_or(Position::default(), |entry| entry.position);
        Ok((entries, self.follow(filter, after).await?))
    }

    async fn lately(&self, filter: Filter) -> Result<Option<(Vec<Entry>, Box<dyn Follow>)>> {
        let Filter::Work(id) = filter else { return Ok(None) };
        if self.is_local(id).await? {
            return Ok(None);
        }
        let Some((mut entries, inner)) = self.far()?.log.lately(filter).await? else { return Ok(None) };
        let mut at = Both::default();
        at.mark_far(&mut entries);
        Ok(Some((entries, Box::new(One { inner, side: Side::Far, at }))))
    }

    async fn head(&self) -> Result<Position> {
        let local = self.local.log.head().await?.0;
        let far = match self.far() {
            Ok(far) => match far.log.head().await {
                Ok(head) => {
                    self.saw(head.0);
                    head.0
                }
                Err(Error::Unreachable(_) | Error::Unanswered(_)) => self.far_head.load(Ordering::Relaxed),
                Err(error) => return Err(error),
            },
            Err(_) => self.far_head.load(Ordering::Relaxed),
        };
        Ok(Both { far, local }.position())
    }
}

/// Goes along with one work where it lives.
struct One {
    inner: Box<dyn Follow>,
    side: Side,
    at: Both,
}

#[async_trait]
impl Follow for One {
    async fn next(&mut self) -> Result<Vec<Entry>> {
        let mut entries = self.inner.next().await?;
        match self.side {
            Side::Local => self.at.mark_local(&mut entries),
            Side::Far => self.at.mark_far(&mut entries),
        }
        Ok(entries)
    }
}

/// Goes along with both logs; with the server's once that has been reached.
struct Two {
    local: Box<dyn Follow>,
    far: Option<Box<dyn Follow>>,
    opened: Far,
    filter: Filter,
    at: Both,
    homes: Homes,
}

#[async_trait]
impl Follow for Two {
    async fn next(&mut self) -> Result<Vec<Entry>> {
        loop {
            if self.far.is_none() {
                let far = self.opened.borrow_and_update().clone();
                if let Some(far) = far {
                    self.far = Some(far.log.follow(self.filter, Position(self.at.far)).await?);
                }
            }
            tokio::select! {
                entries = self.local.next() => {
                    let mut entries = entries?;
                    self.at.mark_local(&mut entries);
                    return Ok(entries);
                }
                entries = async { match &mut self.far { Some(far) => far.next().await, None => std::future::pending().await } } => {
                    let mut entries = entries?;
                    self.at.mark_far(&mut entries);
                    let entries = self.homes.not_local(entries).await?;
                    if !entries.is_empty() {
                        return Ok(entries);
                    }
                }
                changed = self.opened.changed(), if self.far.is_none() => changed.map_err(|_| Error::Closed)?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;
    use tokio_util::sync::CancellationToken;
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::config::Config;
    use crate::telemetry::{new_instance, new_work_id};
    use crate::transport::mesh::{Place, compose};
    use crate::transport::{Reach, Subject, local};

    #[tokio::test]
    async fn what_stands_behind_much_that_was_forwarded_is_read() {
        const PAGE: usize = 64;
        let (near, far) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let settings = Config::default().lattice.storage;
        let (near, far) = (local::open(near.path(), &settings).unwrap(), local::open(far.path(), &settings).unwrap());
        let place = Place { station: "here".parse().unwrap(), instance: new_instance(), forwards: false };
        let (_opened, opened) = watch::channel(Some(far.transport()));
        let (_reach, reach) = watch::channel(Reach::Connected);
        let mesh = compose(near.transport(), opened, reach, place, TaskTracker::new(), CancellationToken::new());
        let word = |id| Record { subject: Subject::Status(id), body: "{}".into() };
        // Far more than a page of works that live here, all of which the server's log has as well.
        let ours: Vec<Record> = (0..3 * PAGE).map(|_| word(new_work_id())).collect();
        near.transport().log.append(ours.clone()).await.unwrap();
        far.transport().log.append(ours.clone()).await.unwrap();
        let theirs = new_work_id();
        far.transport().log.append(vec![word(theirs)]).await.unwrap();

        let (mut read, mut after) = (Vec::new(), Position::default());
        loop {
            let page = mesh.log.read(Filter::AllWork, after, PAGE).await.unwrap();
            let is_end = page.len() < PAGE;
            after = page.last().map_or(after, |entry| entry.position);
            read.extend(page);
            if is_end {
                break;
            }
        }
        assert_eq!(read.len(), ours.len() + 1, "each once");
        assert_eq!(read.last().and_then(|entry| entry.subject.work()), Some(theirs));
        assert!(mesh.log.read(Filter::AllWork, after, PAGE).await.unwrap().is_empty());
        near.close();
        far.close();
    }
}
