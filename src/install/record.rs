//! What was done to whose file: the file as it was before, and the entries that were put into it.
//!
//! The record is what lets an entry be taken out to the last byte. It is written before the file is: an entry of ours never stands in a
//! file without one, and a record that speaks of more than the file holds does no harm. Kept among the user's data, where nobody else may
//! read it, for these files may hold secrets.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::node::Node;
use crate::model::hex::hex;
use crate::transport::nats::embedded::{private_dir, write_private};

const RECORD: &str = "record.json";
const BEFORE: &str = "before";

/// Where records are kept, by one process at a time.
pub(super) struct Records {
    dir: PathBuf,
    _lock: Option<File>,
}

/// An entry that was put into a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) name: String,
    pub(super) entry: Node,
}

/// What was done to one file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) file: PathBuf,
    /// Folders that were made for it, the outermost first.
    pub(super) folders: Vec<PathBuf>,
    /// In the order in which they were put in.
    pub(super) entries: Vec<Kept>,
    /// The file without them; none when there was no file.
    #[serde(skip)]
    pub(super) before: Option<String>,
}

impl Records {
    /// Opens them, and waits for whoever else has them open.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        private_dir(dir)?;
        let lock = OpenOptions::new().create(true).write(true).truncate(false).mode(0o600).open(dir.join("lock"))?;
        lock.lock()?;
        Ok(Self { dir: dir.to_owned(), _lock: Some(lock) })
    }

    /// To look at, without a place among those who write; makes nothing.
    pub(super) fn unlocked(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), _lock: None }
    }

    /// The record of a file; one that cannot be read is as good as none.
    pub(super) fn of(&self, file: &Path) -> Option<Record> {
        let dir = self.dir_of(file);
        let mut record: Record = serde_json::from_slice(&fs::read(dir.join(RECORD)).ok()?).ok()?;
        record.before = match fs::read_to_string(dir.join(BEFORE)) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(_) => return None,
        };
        (record.file == file).then_some(record)
    }

    /// Keeps a record, and a copy of the file as it is now; says where the copy is.
    pub(super) fn keep(&self, record: &Record, now: Option<&str>) -> io::Result<Option<PathBuf>> {
        let dir = self.dir_of(&record.file);
        private_dir(&dir)?;
        let copy = self.copy_of(&record.file);
        if let Some(now) = now {
            write_private(&copy, now.as_bytes())?;
        }
        match &record.before {
            Some(before) => write_private(&dir.join(BEFORE), before.as_bytes())?,
            None => match fs::remove_file(dir.join(BEFORE)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            },
        }
        write_private(&dir.join(RECORD), &serde_json::to_vec_pretty(record)?)?;
        Ok(now.map(|_| copy))
    }

    /// Forgets a file whose entries are all gone; the copy goes as well where the file is as it was.
    pub(super) fn forget(&self, file: &Path, copy_too: bool) {
        let dir = self.dir_of(file);
        if copy_too {
            let _ = fs::remove_dir_all(dir);
        } else {
            [RECORD, BEFORE].iter().for_each(|name| _ = fs::remove_file(dir.join(name)));
        }
    }

    fn copy_of(&self, file: &Path) -> PathBuf {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.dir_of(file).join(format!("backup-{}", name.trim_start_matches('.')))
    }

    fn dir_of(&self, file: &Path) -> PathBuf {
        let digest = Sha256::digest(file.as_os_str().as_encoded_bytes());
        self.dir.join(hex(&digest[..8]))
    }
}
