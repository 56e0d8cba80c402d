//! The rows of both sides: sessions are this machine's, keys may have been noted while the server was away, the others are the server's.

use std::collections::HashMap;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::Value;

use super::{CHILDREN_APART, Far, HOMES_MAX, Mesh, Noted, Side};
use crate::model::id::WorkId;
use crate::transport::{Bucket, Change, Error, Expect, Filter, Position, Result, Row, Table, Watch};

#[async_trait]
impl Table for Mesh {
    async fn get(&self, bucket: Bucket, key: &str) -> Result<Option<Row>> {
        match bucket {
            Bucket::Sessions => self.local.table.get(bucket, key).await,
            Bucket::Keys => Ok(self.keyed(key).await?.map(|(row, _)| row)),
            _ => self.far()?.table.get(bucket, key).await,
        }
    }

    async fn put(&self, bucket: Bucket, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> Result<u64> {
        match bucket {
            Bucket::Sessions => self.local.table.put(bucket, key, value, expect, ttl).await,
            Bucket::Keys => {
                let is_here = match expect {
                    Expect::Absent => false,
                    // Its work may have gone to the server after all: then the key goes there as well.
                    Expect::Any => self.local.table.get(bucket, key).await?.is_some() && !self.is_of_work_elsewhere(&value).await?,
                    Expect::Revision(_) => matches!(self.keyed(key).await?, Some((_, Side::Local))),
                };
                if is_here && matches!(expect, Expect::Revision(_)) {
                    return self.take_over(key, value, expect, ttl).await;
                }
                if is_here {
                    return self.local.table.put(bucket, key, value, expect, ttl).await;
                }
                let put = match self.far() {
                    Ok(far) => far.table.put(bucket, key, value.clone(), expect, ttl).await,
                    Err(away) => Err(away),
                };
                match put {
                    // What is known by a revision is the server's, and stays so.
                    Err(Error::Unreachable(_)) if !matches!(expect, Expect::Revision(_)) => {
                        let revision = self.local.table.put(bucket, key, value.clone(), expect, ttl).await?;
                        self.note(key, value, ttl, revision, true);
                        Ok(revision)
                    }
                    other => other,
                }
            }
            _ => self.far()?.table.put(bucket, key, value, expect, ttl).await,
        }
    }

    async fn remove(&self, bucket: Bucket, key: &str, expect: Expect) -> Result<bool> {
        match bucket {
            Bucket::Sessions => self.local.table.remove(bucket, key, expect).await,
            Bucket::Keys if matches!(self.keyed(key).await?, Some((_, Side::Local))) => self.local.table.remove(bucket, key, expect).await,
            _ => self.far()?.table.remove(bucket, key, expect).await,
        }
    }

    async fn list(&self, bucket: Bucket) -> Result<Vec<Row>> {
        match bucket {
            Bucket::Sessions => self.local.table.list(bucket).await,
            _ => self.far()?.table.list(bucket).await,
        }
    }

    async fn list_of(&self, bucket: Bucket, head: &str) -> Result<Vec<Row>> {
        match bucket {
            Bucket::Sessions => self.local.table.list_of(bucket, head).await,
            _ => self.far()?.table.list_of(bucket, head).await,
        }
    }

    async fn watch(&self, bucket: Bucket) -> Result<Box<dyn Watch>> {
        match bucket {
            Bucket::Sessions => self.local.table.watch(bucket).await,
            _ => Ok(Box::new(Opening { bucket, opened: self.far.clone(), inner: None })),
        }
    }

    async fn next(&self, bucket: Bucket, key: &str, floor: u64, count: u64) -> Result<u64> {
        let far = match self.far() {
            Ok(far) => far.table.next(bucket, key, floor, count).await,
            Err(away) => Err(away),
        };
        match far {
            Err(Error::Unreachable(_)) => {
                // Each process counts in a range of its own: no other can have the same number.
                let apart = CHILDREN_APART + (u64::from_be_bytes(self.instance.low_bytes()) & 0xf_ffff) * (1 << 24);
                let own = format!("{key}@{}", self.instance);
                self.local.table.next(bucket, &own, floor.max(apart), count).await
            }
            other => other,
        }
    }
}

impl Mesh {
    pub(super) fn noted(&self) -> MutexGuard<'_, HashMap<WorkId, Noted>> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, key: &str, value: Bytes, ttl: Option<Duration>, revision: u64, apart: bool) {
        let Some(id) = work_of(&value) else { return };
        let mut noted = self.noted();
        if noted.len() >= HOMES_MAX {
            noted.clear();
        }
        noted.insert(id, Noted { key: key.to_owned(), value, ttl, revision, apart });
    }

    /// Takes over an order whose key was noted here, by this process or another one. From then on nobody else gives it a home here,
    /// unless somebody has said before that this is where it lives.
    async fn take_over(&self, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> Result<u64> {
        let row = self.local.table.get(Bucket::Keys, key).await?;
        let is_claimed = row.is_some_and(|row| lives_here(&row.value));
        let kept = if is_claimed { claimed(&value) } else { value.clone() };
        let revision = self.local.table.put(Bucket::Keys, key, kept, expect, ttl).await?;
        self.note(key, value.clone(), ttl, revision, is_claimed);
        if !is_claimed && let Ok(far) = self.far() {
            match far.table.put(Bucket::Keys, key, value, Expect::Absent, ttl).await {
                Ok(_) | Err(Error::Unreachable(_) | Error::Unanswered(_)) => {}
                // Somebody has used it there meanwhile.
                Err(error) => return Err(error),
            }
        }
        Ok(revision)
    }

    /// Says in the row of a work's key that the work lives here, unless another process has taken the order over.
    pub(super) async fn claim(&self, id: WorkId, noted: Noted) -> Result<()> {
        let Noted { key, value, ttl, revision, .. } = noted;
        match self.local.table.put(Bucket::Keys, &key, claimed(&value), Expect::Revision(revision), ttl).await {
            Ok(revision) => {
                self.note(&key, value, ttl, revision, true);
                Ok(())
            }
            Err(Error::Conflict { .. }) => {
                let row = self.local.table.get(Bucket::Keys, &key).await?;
                if row.is_some_and(|row| work_of(&row.value) == Some(id) && lives_here(&row.value)) {
                    return Ok(());
                }
                Err(Error::Unreachable("another process of this station gives this order out; ask again".into()))
            }
            Err(error) => Err(error),
        }
    }

    /// A row of `Keys`, and which side has it: one that was written while the server was away is known here only. Of a key whose work
    /// does not live here the server's word counts, if it has one.
    async fn keyed(&self, key: &str) -> Result<Option<(Row, Side)>> {
        let here = self.local.table.get(Bucket::Keys, key).await?;
        if let Some(row) = &here
            && !self.is_of_work_elsewhere(&row.value).await?
        {
            return Ok(here.map(|row| (row, Side::Local)));
        }
        let there = match self.far() {
            Ok(far) => far.table.get(Bucket::Keys, key).await,
            Err(away) => Err(away),
        };
        let there = match there {
            Err(Error::Unreachable(_)) => None,
            there => there?,
        };
        Ok(there.map(|row| (row, Side::Far)).or(here.map(|row| (row, Side::Local))))
    }

    /// Whether a row names a work that does not live here. That is looked up each time: another process may be about to push it.
    async fn is_of_work_elsewhere(&self, value: &[u8]) -> Result<bool> {
        let Some(work_id) = work_of(value) else { return Ok(false) };
        Ok(self.local.log.read(Filter::Work(work_id), Position::default(), 1).await?.is_empty())
    }
}

/// The work that a row names.
fn work_of(value: &[u8]) -> Option<WorkId> {
    #[derive(serde::Deserialize)]
    struct Named {
        work_id: WorkId,
    }
    serde_json::from_slice(value).ok().map(|named: Named| named.work_id)
}

/// The mark of a row whose work lives in this machine's store.
const HERE: &str = "here";

/// Whether a row says that its work lives here.
fn lives_here(value: &[u8]) -> bool {
    serde_json::from_slice::<Value>(value).is_ok_and(|row| row[HERE] == true)
}

/// The same row, which says that its work lives here.
fn claimed(value: &Bytes) -> Bytes {
    match serde_json::from_slice::<Value>(value) {
        Ok(Value::Object(mut row)) => {
            row.insert(HERE.to_owned(), true.into());
            Bytes::from(Value::Object(row).to_string())
        }
        _ => value.clone(),
    }
}

/// A watch that begins when the server has been reached.
struct Opening {
    bucket: Bucket,
    opened: Far,
    inner: Option<Box<dyn Watch>>,
}

#[async_trait]
impl Watch for Opening {
    async fn next(&mut self) -> Result<Vec<Change>> {
        loop {
            if let Some(inner) = &mut self.inner {
                return inner.next().await;
            }
            let far = self.opened.borrow_and_update().clone();
            match far {
                Some(far) => self.inner = Some(far.table.watch(self.bucket).await?),
                None => self.opened.changed().await.map_err(|_| Error::Closed)?,
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
    use crate::model::turn::Turn;
    use crate::telemetry::{new_instance, new_work_id, now};
    use crate::transport::mesh::{Place, compose};
    use crate::transport::{Item, Pushed, Reach, Record, Subject, Transport, local};

    /// Two processes of a station, with one store between them: the server is away for the first one only.
    #[tokio::test]
    async fn a_work_whose_key_was_noted_while_the_server_was_away_gets_one_home() {
        let (near, far) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let settings = Config::default().lattice.storage;
        let (near, far) = (local::open(near.path(), &settings).unwrap(), local::open(far.path(), &settings).unwrap());
        let (_reach, reach) = watch::channel(Reach::Connected);
        let station: crate::model::id::StationId = "here".parse().unwrap();
        let process = |server: Option<Transport>| {
            let place = Place { station: station.clone(), instance: new_instance(), forwards: false };
            let (keep, opened) = watch::channel(server);
            std::mem::forget(keep);
            compose(near.transport(), opened, reach.clone(), place, TaskTracker::new(), CancellationToken::new())
        };
        let (cut_off, connected) = (process(None), process(Some(far.transport())));
        let row = |id: WorkId| Bytes::from(serde_json::json!({ "work_id": id, "done": false }).to_string());
        let push = async |process: &Transport, id| {
            let turn = Turn::new("me", 0, now(), Duration::from_secs(60));
            let body = Bytes::from_static(b"{}");
            let item =
                Item { id, lane: "a".into(), turn, deadline: now().after(Duration::from_secs(60)), held_back: false, beside: None, body };
            let announce = Record { subject: Subject::Status(id), body: "{}".into() };
            process.queue.push(&station, item, 9, Some(announce)).await
        };
        let homes = async |id| {
            let has = async |store: &Transport| !store.log.read(Filter::Work(id), Position::default(), 9).await.unwrap().is_empty();
            (has(&near.transport()).await, has(&far.transport()).await)
        };
        let note = async |key: &str, id| cut_off.table.put(Bucket::Keys, key, row(id), Expect::Absent, None).await.unwrap();
        let take_over = async |key: &str, id| {
            let found = connected.table.get(Bucket::Keys, key).await.unwrap().expect("it is noted");
            assert_eq!(work_of(&found.value), Some(id));
            connected.table.put(Bucket::Keys, key, row(id), Expect::Revision(found.revision), None).await.unwrap()
        };

        // It is taken over before whoever noted it has pushed it.
        let id = new_work_id();
        let revision = note("first", id).await;
        take_over("first", id).await;
        assert!(matches!(push(&connected, id).await, Ok(Pushed::New)));
        assert!(matches!(push(&cut_off, id).await, Err(Error::Unreachable(_))));
        assert_eq!(homes(id).await, (false, true));
        let forgotten = cut_off.table.remove(Bucket::Keys, "first", Expect::Revision(revision)).await;
        assert!(matches!(forgotten, Err(Error::Conflict { .. })), "the key is not its own any more: {forgotten:?}");

        // And after that.
        let id = new_work_id();
        note("second", id).await;
        assert!(matches!(push(&cut_off, id).await, Ok(Pushed::New)));
        assert!(connected.table.get(Bucket::Keys, "second").await.unwrap().is_some());
        take_over("second", id).await;
        assert!(matches!(push(&connected, id).await, Ok(Pushed::Known)));
        assert_eq!(homes(id).await, (true, false));
        near.close();
        far.close();
    }
}
