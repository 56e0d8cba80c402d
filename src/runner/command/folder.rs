//! Files of running works, and the mark of the process that looks after them.
//!
//! A station's process holds a lock on `running/<instance>.lock` for as long as it lives, whatever ends it. Who finds that lock free
//! knows that the runs of that instance have nobody any more.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

/// A folder without its owner's name is still being made, unless it is older than this.
const MADE_WITHIN: Duration = Duration::from_secs(60);
const OWNER: &str = "supervisor";

/// The folders of a station's data.
#[derive(Debug)]
pub(super) struct Base {
    /// Where running works have theirs.
    pub(super) running: PathBuf,
    /// Where logs are kept.
    pub(super) logs: PathBuf,
    lock: PathBuf,
    _held: File,
}

impl Base {
    /// Makes the folders and takes this instance's lock.
    pub(super) fn open(data_dir: &Path, instance: &str) -> io::Result<Self> {
        let (running, logs) = (data_dir.join("running"), data_dir.join("logs"));
        for folder in [&running, &logs] {
            make(folder)?;
        }
        // Names in the environment of programs must be the same for every process of this data folder.
        let running = fs::canonicalize(running)?;
        let lock = lock_path(&running, instance);
        let held = hold(&lock)?;
        Ok(Self { running, logs, lock, _held: held })
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        // Nothing of ours runs any more; the file is only litter.
        let _ = fs::remove_file(&self.lock);
    }
}

fn make(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|error| named(folder, &error))
}

/// An error that names its file.
pub(super) fn named(path: &Path, error: &io::Error) -> io::Error {
    let text = format!("{}: {error}", path.display());
    io::Error::new(error.kind(), Named { text, source: error.raw_os_error().map(io::Error::from_raw_os_error) })
}

/// An error with its file in the text; the system's own code is still there to ask for.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
struct Named {
    text: String,
    source: Option<io::Error>,
}

fn lock_path(running: &Path, instance: &str) -> PathBuf {
    running.join(format!("{instance}.lock"))
}

fn hold(path: &Path) -> io::Result<File> {
    loop {
        let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(path).map_err(|error| named(path, &error))?;
        file.lock().map_err(|error| named(path, &error))?;
        // Somebody who sweeps may have removed it before we held it.
        let same = fs::metadata(path).is_ok_and(|found| file.metadata().is_ok_and(|ours| ours.ino() == found.ino()));
        if same {
            return Ok(file);
        }
    }
}

/// Whether the process that looked after these runs is no more; it is written as `<pid>:<instance>`.
pub(super) fn is_dead(running: &Path, supervisor: &str) -> bool {
    let Some((pid, instance)) = supervisor.trim().split_once(':') else { return false };
    match File::options().write(true).open(lock_path(running, instance)) {
        Ok(file) => file.try_lock().is_ok(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // Ours, and no lock: a number that was given to another process before us.
            let is_ours = pid.parse() == Ok(std::process::id());
            let pid = pid.parse().ok().and_then(Pid::from_raw);
            is_ours || pid.is_none_or(|pid| test_kill_process(pid) == Err(Errno::SRCH))
        }
        Err(_) => false,
    }
}

/// Removes what dead instances left behind; gives the folders that were removed.
pub(super) fn sweep(running: &Path) -> io::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for entry in fs::read_dir(running)? {
        let path = entry?.path();
        if path.is_dir() && is_stale(running, &path) {
            match fs::remove_dir_all(&path) {
                Ok(()) => removed.push(path),
                Err(error) => tracing::warn!(path = %path.display(), %error, "a stale folder cannot be removed"),
            }
        } else if path.extension().is_some_and(|extension| extension == "lock") {
            remove_free(&path);
        }
    }
    Ok(removed)
}

fn is_stale(running: &Path, folder: &Path) -> bool {
    match fs::read_to_string(folder.join(OWNER)) {
        Ok(owner) if owner.contains(':') => is_dead(running, &owner),
        _ => {
            let changed = fs::metadata(folder).and_then(|found| found.modified());
            changed.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > MADE_WITHIN))
        }
    }
}

fn remove_free(path: &Path) {
    if let Ok(file) = File::options().write(true).open(path)
        && file.try_lock().is_ok()
    {
        let _ = fs::remove_file(path);
    }
}

/// One run's folder; dropping it removes it.
#[derive(Debug)]
pub(super) struct Folder {
    /// Where it is.
    pub(super) path: PathBuf,
}

impl Folder {
    /// Makes it, with its owner's name and the configuration that leads to the lattice's tools.
    pub(super) fn create(running: &Path, name: &str, supervisor: &str, mesh: &str) -> io::Result<Self> {
        let path = running.join(name);
        let _ = fs::remove_dir_all(&path);
        make(&path)?;
        let folder = Self { path };
        folder.write(OWNER, supervisor)?;
        folder.write("mcp.json", mesh)?;
        Ok(folder)
    }

    /// Where that configuration is.
    pub(super) fn mesh_config(&self) -> PathBuf {
        self.path.join("mcp.json")
    }

    fn write(&self, name: &str, text: &str) -> io::Result<()> {
        let path = self.path.join(name);
        let file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|error| named(&path, &error))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a run's folder cannot be removed");
        }
    }
}
