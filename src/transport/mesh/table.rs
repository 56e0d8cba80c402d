//! The rows of both sides: sessions are this machine's, keys may have been noted while the server was away, the others are the server's.

use std::collections::HashSet;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::{CHILDREN_APART, Far, HOMES_MAX, Mesh, Side};
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
                        if let Some(id) = work_of(&value) {
                            self.apart().insert(id);
                        }
                        self.local.table.put(bucket, key, value, expect, ttl).await
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
    pub(super) fn apart(&self) -> MutexGuard<'_, HashSet<WorkId>> {
        let mut apart = self.apart.lock().unwrap_or_else(PoisonError::into_inner);
        if apart.len() >= HOMES_MAX {
            apart.clear();
        }
        apart
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
            there => {
                // The server is back, and nobody has used the key there: the work may go there now.
                if let Some(id) = here.as_ref().and_then(|row| work_of(&row.value)) {
                    self.apart().remove(&id);
                }
                there?
            }
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
