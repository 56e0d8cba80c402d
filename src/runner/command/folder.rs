//! Files of running works, and the mark of the process that looks after them.
//!
//! A station's process holds a lock on `running/<instance>.lock` for as long as it lives, whatever ends it. Who finds that lock free
//! knows that the runs of that instance have nobody any more. So the file stays after its process, for whoever comes to ask; where
//! there is none, nothing is known.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

/// A folder without its owner's name is still being made, unless it is older than this.
const MADE_WITHIN: Duration = Duration::from_secs(60);
/// How many locks are kept; of what ran under older ones nobody asks any more.
const LOCKS_MAX: usize = 256;
const OWNER: &str = "supervisor";

/// The folders of a station's data.
#[derive(Debug)]
pub(super) struct Base {
    /// Where running works have theirs.
    pub(super) running: PathBuf,
    /// Where logs are kept.
    pub(super) logs: PathBuf,
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
        let held = hold(&lock_path(&running, instance))?;
        Ok(Self { running, logs, _held: held })
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
        if stands_at(&file, path) {
            return Ok(file);
        }
    }
}

fn stands_at(file: &File, path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| file.metadata().is_ok_and(|ours| ours.ino() == found.ino()))
}

/// Whether the process of this instance is dead for certain: it had a lock in this data folder, and holds it no more.
pub(super) fn is_gone(data_dir: &Path, instance: &str) -> bool {
    let lock = File::options().write(true).open(lock_path(&data_dir.join("running"), instance));
    // Others who look at the same moment keep nobody from seeing that.
    lock.is_ok_and(|file| file.try_lock_shared().is_ok())
}

/// Whether the process that looked after these runs is no more; it is written as `<pid>:<instance>`.
pub(super) fn is_dead(running: &Path, supervisor: &str) -> bool {
    let Some((pid, instance)) = supervisor.trim().split_once(':') else { return false };
    match File::options().write(true).open(lock_path(running, instance)) {
        Ok(file) => file.try_lock_shared().is_ok(),
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
    let (mut removed, mut locks) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(running)? {
        let path = entry?.path();
        if path.is_dir() && is_stale(running, &path) {
            match fs::remove_dir_all(&path) {
                Ok(()) => removed.push(path),
                Err(error) => tracing::warn!(path = %path.display(), %error, "a stale folder cannot be removed"),
            }
        } else if path.extension().is_some_and(|extension| extension == "lock") {
            let made = fs::metadata(&path).and_then(|found| found.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            locks.push((made, path));
        }
    }
    locks.sort_unstable_by(|a, b| b.cmp(a));
    locks.iter().skip(LOCKS_MAX).for_each(|(_, path)| remove_free(path));
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
        && stands_at(&file, path)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_gone_only_if_it_was_here_and_holds_nothing_any_more() {
        let data = tempfile::tempdir().unwrap();
        assert!(!is_gone(data.path(), "of-another-machine"));
        let base = Base::open(data.path(), "one").unwrap();
        let look = || is_gone(data.path(), "one");
        assert!(!look());
        sweep(&base.running).unwrap();
        assert!(!look(), "whoever sweeps says nothing of the living");
        drop(base);
        assert!(look() && look(), "looking takes nothing away");
        let other = Base::open(data.path(), "two").unwrap();
        sweep(&other.running).unwrap();
        assert!(look(), "it is known also after others have begun");
    }

    #[test]
    fn locks_of_the_dead_are_not_kept_for_ever() {
        let data = tempfile::tempdir().unwrap();
        let oldest = Base::open(data.path(), "oldest").unwrap();
        let set = |name: &str, age: u64| {
            let file = File::options().create(true).truncate(false).write(true).open(lock_path(&oldest.running, name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        };
        set("oldest", 9_000);
        (0..LOCKS_MAX + 20).for_each(|n| set(&format!("dead-{n}"), 10 + n as u64));
        sweep(&oldest.running).unwrap();
        let locks: Vec<_> = fs::read_dir(&oldest.running).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert_eq!(locks.len(), LOCKS_MAX + 1);
        assert!(locks.contains(&"oldest.lock".to_owned()) && locks.contains(&"dead-0.lock".to_owned()));
        assert!(!locks.contains(&format!("dead-{LOCKS_MAX}.lock")));
    }
}
