//! The two logs as one: an entry has the number of the log where it stands, a reader one for each.

use async_trait::async_trait;

use super::{Far, Homes, Mesh};
use crate::model::id::WorkId;
use crate::transport::{Entry, Error, Filter, Follow, Log, Position, Record, Result};

/// A place of the server's log, beside this machine's.
const fn beside(position: Position) -> Position {
    Position { seq: 0, far: position.seq }
}

/// The same on the server's log by itself.
const fn there(position: Position) -> Position {
    Position::of(position.far)
}

fn all_beside(mut entries: Vec<Entry>) -> Vec<Entry> {
    for entry in &mut entries {
        entry.position = beside(entry.position);
    }
    entries
}

impl Mesh {
    /// What the server's log has that the local one has not; without the server, what is known here is all there is.
    async fn read_far(&self, filter: Filter, mut after: Position, limit: usize) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let Ok(far) = self.far() else { return Ok(entries) };
        while entries.len() < limit {
            let (room, epoch) = (limit - entries.len(), self.epoch());
            match far.log.read(filter, there(after), room).await {
                Ok(more) => {
                    // However much of it was forwarded from here: that is not the end of the server's log.
                    let is_end = more.len() < room;
                    let more = all_beside(more);
                    // Whoever leaves this log out stands behind all that it will ever have: only what was read is there.
                    if let Some(last) = more.last() {
                        self.saw(epoch, last.position.far);
                    }
                    after = after.past(&more);
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
}

#[async_trait]
impl Log for Mesh {
    async fn append(&self, records: Vec<Record>) -> Result<Position> {
        if self.home_of(&records).await? == Some(true) {
            return self.local.log.append(records).await;
        }
        let far = self.far()?;
        self.bring_blobs(&far, records.iter().map(|record| &record.body)).await?;
        let epoch = self.epoch();
        let at = far.log.append(records).await?;
        self.saw(epoch, at.seq);
        Ok(beside(at))
    }

    async fn read(&self, filter: Filter, after: Position, limit: usize) -> Result<Vec<Entry>> {
        if let Filter::Work(id) = filter {
            if self.is_local(id).await? {
                return self.local.log.read(filter, after, limit).await;
            }
            let far = async { self.far()?.log.read(filter, there(after), limit).await };
            let entries = far.await;
            if entries.as_ref().map_or(true, Vec::is_empty) {
                self.homes.forget(id);
            }
            return entries.map(all_beside);
        }
        let mut entries = self.local.log.read(filter, after, limit).await?;
        entries.extend(self.read_far(filter, after, limit - entries.len()).await?);
        Ok(entries)
    }

    async fn follow(&self, filter: Filter, after: Position) -> Result<Box<dyn Follow>> {
        if let Filter::Work(id) = filter {
            if self.is_local(id).await? {
                return self.local.log.follow(filter, after).await;
            }
            return Ok(Box::new(Beside(self.far()?.log.follow(filter, there(after)).await?)));
        }
        let local = self.local.log.follow(filter, after).await?;
        Ok(Box::new(Two { local, far: None, opened: self.far.clone(), filter, after, homes: self.homes.clone() }))
    }

    async fn replay(&self, filter: Filter) -> Result<(Vec<Entry>, Box<dyn Follow>)> {
        if let Filter::Work(id) = filter {
            if self.is_local(id).await? {
                return self.local.log.replay(filter).await;
            }
            let (entries, follow) = self.far()?.log.replay(filter).await?;
            return Ok((all_beside(entries), Box::new(Beside(follow))));
        }
        let entries = self.read(filter, Position::default(), usize::MAX).await?;
        let after = Position::default().past(&entries);
        Ok((entries, self.follow(filter, after).await?))
    }

    async fn lately(&self, filter: Filter) -> Result<Option<(Vec<Entry>, Box<dyn Follow>)>> {
        let Filter::Work(id) = filter else { return Ok(None) };
        if self.is_local(id).await? {
            return Ok(None);
        }
        let Some((entries, follow)) = self.far()?.log.lately(filter).await? else { return Ok(None) };
        Ok(Some((all_beside(entries), Box::new(Beside(follow)))))
    }

    async fn is_here(&self, id: WorkId) -> Result<bool> {
        self.is_local(id).await
    }

    async fn head(&self) -> Result<Position> {
        let (local, epoch) = (self.local.log.head().await?, self.epoch());
        let far = match self.far() {
            Ok(far) => match far.log.head().await {
                Ok(head) => {
                    self.saw(epoch, head.seq);
                    head.seq
                }
                Err(Error::Unreachable(_) | Error::Unanswered(_)) => self.far_head(),
                Err(error) => return Err(error),
            },
            Err(_) => self.far_head(),
        };
        Ok(Position { far, ..local })
    }

    fn epoch(&self) -> u64 {
        self.far().map_or(0, |far| 1 + far.log.epoch())
    }

    async fn has(&self, seq: u64, digest: &str) -> Result<bool> {
        self.far()?.log.has(seq, digest).await
    }
}

/// Goes along with the server's log.
struct Beside(Box<dyn Follow>);

#[async_trait]
impl Follow for Beside {
    async fn next(&mut self) -> Result<Vec<Entry>> {
        self.0.next().await.map(all_beside)
    }
}

/// Goes along with both logs; with the server's once that has been reached.
struct Two {
    local: Box<dyn Follow>,
    far: Option<Beside>,
    opened: Far,
    filter: Filter,
    after: Position,
    homes: Homes,
}

#[async_trait]
impl Follow for Two {
    async fn next(&mut self) -> Result<Vec<Entry>> {
        loop {
            if self.far.is_none() {
                let far = self.opened.borrow_and_update().clone();
                if let Some(far) = far {
                    self.far = Some(Beside(far.log.follow(self.filter, there(self.after)).await?));
                }
            }
            tokio::select! {
                entries = self.local.next() => return entries,
                entries = async { match &mut self.far { Some(far) => far.next().await, None => std::future::pending().await } } => {
                    let entries = self.homes.not_local(entries?).await?;
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
    use super::*;
    use crate::telemetry::new_work_id;
    use crate::transport::Subject;
    use crate::transport::mesh::Sides;

    #[tokio::test]
    async fn what_stands_behind_much_that_was_forwarded_is_read() {
        const PAGE: usize = 64;
        let sides = Sides::new();
        let (near, far) = (&sides.near, &sides.far);
        let (mesh, _opened) = sides.mesh(Some(far.clone()));
        let word = |id| Record { subject: Subject::Status(id), body: "{}".into() };
        // Far more than a page of works that live here, all of which the server's log has as well.
        let ours: Vec<Record> = (0..3 * PAGE).map(|_| word(new_work_id())).collect();
        near.log.append(ours.clone()).await.unwrap();
        far.log.append(ours.clone()).await.unwrap();
        let theirs = new_work_id();
        far.log.append(vec![word(theirs)]).await.unwrap();

        let (mut read, mut after) = (Vec::new(), Position::default());
        loop {
            let page = mesh.log.read(Filter::AllWork, after, PAGE).await.unwrap();
            let is_end = page.len() < PAGE;
            after = after.past(&page);
            read.extend(page);
            if is_end {
                break;
            }
        }
        assert_eq!(read.len(), ours.len() + 1, "each once");
        assert_eq!(read.last().and_then(|entry| entry.subject.work()), Some(theirs));
        assert!(mesh.log.read(Filter::AllWork, after, PAGE).await.unwrap().is_empty());
    }
}
