//! Large values on both sides: first on this machine's disk, and on the server before anything there names them.

use std::collections::BTreeSet;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::io::AsyncRead;

use super::Mesh;
use crate::model::output::{BlobRef, Media};
use crate::transport::{Blobs, Error, Result, Transport};

/// The member of an event's JSON that names a blob.
const DIGEST: &str = "sha256";

impl Mesh {
    /// Uploads what these bodies name and is here, so that whoever reads them finds it. They themselves were not sent yet, so whatever
    /// goes wrong, nothing was done.
    pub(super) async fn bring_blobs(&self, far: &Transport, bodies: impl Iterator<Item = &Bytes> + Send) -> Result<()> {
        for body in bodies {
            self.take_blobs_along(far, body).await.map_err(|error| match error {
                Error::Unanswered(reason) => Error::Unreachable(reason),
                other => other,
            })?;
        }
        Ok(())
    }

    /// Uploads the blobs that an event names.
    pub(super) async fn take_blobs_along(&self, far: &Transport, body: &[u8]) -> Result<()> {
        // Most bodies name none.
        if !body.windows(DIGEST.len()).any(|part| part == DIGEST.as_bytes()) {
            return Ok(());
        }
        let Ok(value) = serde_json::from_slice::<serde_json::Value>(body) else { return Ok(()) };
        let digests: BTreeSet<String> = digests(&value).into_iter().collect();
        for sha256 in digests {
            self.upload(far, &sha256, Media::Text).await?;
        }
        Ok(())
    }

    /// Sends to the server what is here, unless it is there as good as new.
    async fn upload(&self, far: &Transport, sha256: &str, media: Media) -> Result<()> {
        let mut source = match self.local.blobs.open(sha256, 0..u64::MAX).await {
            Err(Error::NoBlob(_)) => return Ok(()),
            opened => opened?,
        };
        if !far.blobs.is_fresh(sha256).await? {
            far.blobs.put(&mut *source, media).await?;
        }
        Ok(())
    }
}

/// Every digest that an event names.
fn digests(value: &serde_json::Value) -> Vec<String> {
    match value {
        serde_json::Value::Object(map) => map
            .iter()
            .flat_map(|(key, value)| match (key.as_str(), value.as_str()) {
                (DIGEST, Some(digest)) => vec![digest.to_owned()],
                _ => digests(value),
            })
            .collect(),
        serde_json::Value::Array(values) => values.iter().flat_map(digests).collect(),
        _ => Vec::new(),
    }
}

#[async_trait]
impl Blobs for Mesh {
    async fn put(&self, source: &mut (dyn AsyncRead + Unpin + Send), media: Media) -> Result<BlobRef> {
        // First to the disk: a source is read once, and the server may go away in the middle.
        let blob = self.local.blobs.put(source, media).await?;
        if let Ok(far) = self.far() {
            match self.upload(&far, &blob.sha256, media).await {
                // It goes along with whatever names it.
                Ok(()) | Err(Error::Unreachable(_) | Error::Unanswered(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(blob)
    }

    async fn open(&self, sha256: &str, range: Range<u64>) -> Result<Box<dyn AsyncRead + Unpin + Send>> {
        match self.local.blobs.open(sha256, range.clone()).await {
            Err(Error::NoBlob(_)) => self.far()?.blobs.open(sha256, range).await,
            other => other,
        }
    }

    async fn size(&self, sha256: &str) -> Result<u64> {
        match self.local.blobs.size(sha256).await {
            Err(Error::NoBlob(_)) => self.far()?.blobs.size(sha256).await,
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::model::id::{StationId, WorkId};
    use crate::model::turn::Turn;
    use crate::telemetry::{new_work_id, now};
    use crate::transport::mesh::Sides;
    use crate::transport::{Delivery, Filter, Item, Position, Record, Subject};

    /// The server's store of large values, which takes nothing while it is told to say something else.
    struct Moody {
        blobs: Arc<dyn Blobs>,
        says: Mutex<Option<Error>>,
    }

    impl Moody {
        fn says(&self, error: Option<Error>) {
            *self.says.lock().unwrap() = error;
        }
    }

    #[async_trait]
    impl Blobs for Moody {
        async fn put(&self, source: &mut (dyn AsyncRead + Unpin + Send), media: Media) -> Result<BlobRef> {
            let says = self.says.lock().unwrap().clone();
            says.map_or(Ok(()), Err)?;
            self.blobs.put(source, media).await
        }

        async fn open(&self, sha256: &str, range: Range<u64>) -> Result<Box<dyn AsyncRead + Unpin + Send>> {
            self.blobs.open(sha256, range).await
        }

        async fn size(&self, sha256: &str) -> Result<u64> {
            self.blobs.size(sha256).await
        }
    }

    fn naming(id: WorkId, blob: &BlobRef) -> Record {
        Record { subject: Subject::Response(id), body: json!({ "result_ref": blob }).to_string().into() }
    }

    #[tokio::test]
    async fn the_server_has_what_a_record_there_names_before_it_has_the_record() {
        let sides = Sides::new();
        let far = &sides.far;
        let (mesh, opened) = sides.mesh(None);
        let (station, id): (StationId, _) = ("here".parse().unwrap(), new_work_id());
        let delivery = Delivery { station: station.clone(), id, attempt: 1 };
        let item = |blob: &BlobRef| Item {
            id: new_work_id(),
            lane: "a".into(),
            turn: Turn::new("here", 0, now(), Duration::from_secs(1)),
            deadline: now().after(Duration::from_secs(60)),
            held_back: false,
            beside: None,
            body: json!({ "input_ref": blob }).to_string().into(),
        };
        for verb in ["append", "push", "settle", "release", "wake", "remove"] {
            opened.send_replace(None);
            let blob = mesh.blobs.put(&mut verb.as_bytes(), Media::Text).await.unwrap();
            opened.send_replace(Some(far.clone()));
            let records = vec![naming(id, &blob)];
            match verb {
                "append" => drop(mesh.log.append(records).await.unwrap()),
                "push" => drop(mesh.queue.push(&station, item(&blob), 9, None).await.unwrap()),
                "settle" => drop(mesh.queue.settle(&delivery, records).await.unwrap()),
                "release" => drop(mesh.queue.release(&delivery, now(), None, records).await.unwrap()),
                "wake" => drop(mesh.queue.wake(&station, id, None, records).await.unwrap()),
                _ => drop(mesh.queue.remove(&station, id, records).await.unwrap()),
            }
            let size = far.blobs.size(&blob.sha256).await;
            assert_eq!(size.ok(), Some(verb.len() as u64), "{verb}: what the record names is on the server");
        }
    }

    #[tokio::test]
    async fn what_is_here_is_enough_until_something_on_the_server_names_it() {
        let sides = Sides::new();
        let far = &sides.far;
        let moody = Arc::new(Moody { blobs: far.blobs.clone(), says: Mutex::default() });
        let server = Transport { blobs: moody.clone(), ..far.clone() };
        let (mesh, _opened) = sides.mesh(Some(server));
        for error in [Error::Unreachable("away".into()), Error::Unanswered("interrupted".into())] {
            let id = new_work_id();
            moody.says(Some(error.clone()));
            let blob = mesh.blobs.put(&mut error.to_string().as_bytes(), Media::Text).await.unwrap();
            let refused = mesh.log.append(vec![naming(id, &blob)]).await.unwrap_err();
            assert!(matches!(refused, Error::Unreachable(_)), "nothing was sent: {refused:?}");
            assert!(far.log.read(Filter::Work(id), Position::default(), 9).await.unwrap().is_empty());

            moody.says(None);
            mesh.log.append(vec![naming(id, &blob)]).await.unwrap();
            assert_eq!(far.blobs.size(&blob.sha256).await.unwrap(), blob.size);
        }
        // What does not pass by itself is said at once.
        moody.says(Some(Error::Store("full".into())));
        assert!(matches!(mesh.blobs.put(&mut &b"more"[..], Media::Text).await, Err(Error::Store(_))));
    }
}
