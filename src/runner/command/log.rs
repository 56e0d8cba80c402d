//! A run's log: what its program writes to standard error, up to a limit, and the end of it as evidence.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::fs::File;
use tokio::io::AsyncWriteExt;

use super::spool::Tail;
use crate::model::size::Size;

const EVIDENCE_MAX: usize = 4 * 1024;

/// Removes the files of a folder that nobody has written to for this long; a folder that is not there has none.
pub(super) fn drop_older(folder: &Path, max_age: Duration) -> io::Result<()> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let written = entry.metadata().and_then(|metadata| metadata.modified());
        if written.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > max_age)) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// A log that is being written.
pub(super) struct Log {
    file: File,
    max: Size,
    left: u64,
    cut: bool,
    tail: Tail,
}

impl Log {
    /// Begins a log.
    pub(super) async fn create(path: &Path, max: Size) -> io::Result<Self> {
        let file = File::options().create(true).write(true).truncate(true).mode(0o600).open(path).await?;
        Ok(Self { file, max, left: max.get(), cut: false, tail: Tail::new(EVIDENCE_MAX) })
    }

    /// Takes in what the program writes.
    pub(super) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.tail.push(bytes);
        let kept = bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.left -= kept as u64;
        self.file.write_all(&bytes[..kept]).await?;
        if kept < bytes.len() && !std::mem::replace(&mut self.cut, true) {
            self.note(&format!("the rest is not kept: runner.log_max is {}", self.max)).await?;
        }
        self.file.flush().await
    }

    /// Adds a line of our own.
    pub(super) async fn note(&mut self, text: &str) -> io::Result<()> {
        self.file.write_all(format!("\n[lattice-mcp: {text}]\n").as_bytes()).await?;
        self.file.flush().await
    }

    /// The end of what the program wrote.
    pub(super) fn evidence(&self) -> Option<String> {
        Some(self.tail.text().trim_end().to_owned()).filter(|text| !text.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    #[test]
    fn only_old_logs_are_removed() {
        let folder = tempfile::TempDir::new().unwrap();
        let (old, new) = (folder.path().join("old.log"), folder.path().join("new.log"));
        std::fs::write(&new, "new").unwrap();
        let file = std::fs::File::create(&old).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(100)).unwrap();
        drop_older(folder.path(), Duration::from_secs(50)).unwrap();
        assert!(!old.exists() && new.exists());
        drop_older(&folder.path().join("none"), Duration::ZERO).unwrap();
    }
}
