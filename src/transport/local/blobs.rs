//! Large values: one file each, named by the SHA-256 of its bytes.

use std::io::SeekFrom;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use sha2::{Digest, Sha256};
use tokio::fs;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use uuid::Uuid;

use super::Shared;
use crate::config::Durability;
use crate::model::hex::hex;
use crate::model::output::{BlobRef, Media};
use crate::transport::{Blobs, Error, Result};

/// How much of a blob is in memory at once while it is stored.
const CHUNK: usize = 256 << 10;
/// After this long, a temporary file belongs to a process that is gone.
const STALE_AFTER: Duration = Duration::from_secs(24 * 3600);

/// The folder of a store's blobs.
pub(super) struct Folder {
    dir: PathBuf,
    durability: Durability,
    shared: Arc<Shared>,
}

/// Removes a temporary file unless it has become a blob.
struct Temporary(Option<PathBuf>);

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // If it stays, the next clean-up takes it.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Folder {
    pub(super) fn new(dir: PathBuf, durability: Durability, shared: Arc<Shared>) -> Self {
        Self { dir, durability, shared }
    }

    fn path(&self, sha256: &str) -> Result<PathBuf> {
        let is_digest = sha256.len() == 64 && sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !is_digest {
            return Err(Error::NoBlob(sha256.chars().take(80).collect()));
        }
        Ok(self.dir.join(&sha256[..2]).join(sha256))
    }

    fn temporary(&self) -> PathBuf {
        self.dir.join("tmp").join(Uuid::new_v4().to_string())
    }

    fn open_for_use(&self) -> Result<()> {
        if self.shared.stopping() { Err(Error::Closed) } else { Ok(()) }
    }

    /// Removes blobs that nobody has stored for so long, and what dead processes left half written.
    pub(super) fn prune(&self, max_age: Duration) {
        let now = SystemTime::now();
        let older = |path: &Path, age: Duration| {
            let modified = path.metadata().and_then(|metadata| metadata.modified());
            modified.is_ok_and(|modified| now.duration_since(modified).is_ok_and(|since| since > age))
        };
        for folder in files(&self.dir) {
            let is_temporary = folder.file_name().is_some_and(|name| name == "tmp");
            for path in files(&folder) {
                if self.shared.stopping() {
                    return;
                }
                if is_temporary && older(&path, STALE_AFTER) {
                    let _ = std::fs::remove_file(&path);
                } else if !is_temporary && older(&path, max_age) {
                    // Set aside first: somebody may be storing the same bytes again just now.
                    let aside = self.temporary();
                    if std::fs::rename(&path, &aside).is_ok() {
                        let _ = if older(&aside, max_age) { std::fs::remove_file(&aside) } else { std::fs::rename(&aside, &path) };
                    }
                }
            }
        }
    }

    fn failed(path: &Path, error: &std::io::Error) -> Error {
        let advice = match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                "the disk is full: nothing of it was kept; free some space and try again"
            }
            std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => "check the permissions of its folder",
            _ => "check the disk",
        };
        Error::Store(format!("the blob {} could not be read or written ({error}): {advice}", path.display()).into())
    }

    async fn file(&self, sha256: &str) -> Result<(fs::File, u64)> {
        self.open_for_use()?;
        let path = self.path(sha256)?;
        let failed = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::NoBlob(sha256.to_owned()),
            _ => Self::failed(&path, &error),
        };
        let file = fs::File::open(&path).await.map_err(failed)?;
        let size = file.metadata().await.map_err(failed)?.len();
        Ok((file, size))
    }
}

fn files(dir: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

#[async_trait]
impl Blobs for Folder {
    async fn put(&self, source: &mut (dyn AsyncRead + Unpin + Send), media: Media) -> Result<BlobRef> {
        self.open_for_use()?;
        drop(self.shared.jobs()?);
        let path = self.temporary();
        let failed = |error: std::io::Error| Self::failed(&path, &error);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).await.map_err(failed)?;
        let mut temporary = Temporary(Some(path.clone()));
        let mut hash = Sha256::new();
        let mut size = 0;
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = source.read(&mut chunk).await;
            let read = read.map_err(|error| Error::Store(format!("the source of a blob could not be read: {error}").into()))?;
            if read == 0 {
                break;
            }
            hash.update(&chunk[..read]);
            file.write_all(&chunk[..read]).await.map_err(failed)?;
            size += read as u64;
        }
        file.flush().await.map_err(failed)?;
        if self.durability == Durability::Power {
            file.sync_all().await.map_err(failed)?;
        }
        let sha256 = hex(&hash.finalize());
        let target = self.path(&sha256)?;
        let folder = self.dir.join(&sha256[..2]);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).await.map_err(failed)?;
        // The same bytes may be there already: then they are as good as new, and stay as long.
        fs::rename(&path, &target).await.map_err(failed)?;
        temporary.0 = None;
        if self.durability == Durability::Power {
            for dir in [&folder, &self.dir] {
                fs::File::open(dir).await.map_err(failed)?.sync_all().await.map_err(failed)?;
            }
        }
        Ok(BlobRef { sha256, size, media })
    }

    async fn open(&self, sha256: &str, range: Range<u64>) -> Result<Box<dyn AsyncRead + Unpin + Send>> {
        let (mut file, size) = self.file(sha256).await?;
        let start = range.start.min(size);
        if start > 0 {
            file.seek(SeekFrom::Start(start)).await.map_err(|error| Self::failed(&self.dir.join(sha256), &error))?;
        }
        Ok(Box::new(file.take(range.end.min(size).saturating_sub(start))))
    }

    async fn size(&self, sha256: &str) -> Result<u64> {
        Ok(self.file(sha256).await?.1)
    }
}
