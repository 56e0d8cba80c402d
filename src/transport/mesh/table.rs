//! The rows of both sides: sessions are this machine's, keys are on both, the others are the server's.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::{CHILDREN_APART, Far, Mesh};
use crate::model::keyed::work_of;
use crate::transport::{Bucket, Change, Error, Expect, Result, Row, Table, Watch};

#[async_trait]
impl Table for Mesh {
    async fn get(&self, bucket: Bucket, key: &str) -> Result<Option<Row>> {
        match bucket {
            Bucket::Sessions => self.local.table.get(bucket, key).await,
            Bucket::Keys => self.keyed(key).await,
            _ => self.far()?.table.get(bucket, key).await,
        }
    }

    async fn put(&self, bucket: Bucket, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> Result<u64> {
        match bucket {
            Bucket::Sessions => self.local.table.put(bucket, key, value, expect, ttl).await,
            Bucket::Keys => match (work_of(&value), expect) {
                (Some(id), Expect::Absent) => self.bind(id, key, value, ttl).await,
                (Some(id), Expect::Revision(found)) => self.take_over(id, key, value, found, ttl).await,
                (Some(id), Expect::Any) => self.note_done(id, key, value, ttl).await,
                (None, _) => self.put_plain(key, value, expect, ttl).await,
            },
            _ => self.far()?.table.put(bucket, key, value, expect, ttl).await,
        }
    }

    async fn remove(&self, bucket: Bucket, key: &str, expect: Expect) -> Result<bool> {
        match bucket {
            Bucket::Sessions => self.local.table.remove(bucket, key, expect).await,
            Bucket::Keys => self.free(key, expect).await,
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
