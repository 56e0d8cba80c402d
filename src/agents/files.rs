//! Which files count, and reading one without being hurt by it.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{Flaw, Problem};
use crate::model::size::Size;

const DEPTH_MAX: usize = 8;
const ENTRIES_MAX: usize = 20_000;
/// Files that stand in such folders without being agents.
const PROSE: [&str; 8] = ["readme", "claude", "agents", "changelog", "contributing", "license", "code_of_conduct", "security"];

/// A candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) path: PathBuf,
    pub(super) root: PathBuf,
}

/// What a walk gave, in a stable order.
#[derive(Debug, Default)]
pub(super) struct Walk {
    pub(super) files: Vec<Found>,
    pub(super) problems: Vec<Problem>,
    seen: BTreeSet<PathBuf>,
    entries: usize,
}

/// How a file looked: when this is the same, so is the file.
pub(super) type Look = (PathBuf, Option<SystemTime>, u64, u64);

/// How some folders looked.
pub(super) type Looks = (Vec<Look>, Vec<Problem>);

/// Looks for agent files below these folders: by folder, then by path; each file once.
pub(super) fn find(dirs: &[PathBuf]) -> Walk {
    let mut walk = Walk::default();
    for dir in dirs {
        if fs::symlink_metadata(dir).is_ok() {
            walk.enter(dir, dir, 0);
        }
    }
    walk
}

/// How everything that could matter looks at the moment.
pub(super) fn looks(dirs: &[PathBuf]) -> Looks {
    let walk = find(dirs);
    let look = |found: Found| {
        let meta = fs::metadata(&found.path).ok();
        let inode = meta.as_ref().map_or(0, inode);
        (found.path, meta.as_ref().and_then(|meta| meta.modified().ok()), meta.as_ref().map_or(0, fs::Metadata::len), inode)
    };
    (walk.files.into_iter().map(look).collect(), walk.problems)
}

/// The change time notices a rewrite that keeps size and modification time.
#[cfg(unix)]
fn inode(meta: &fs::Metadata) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    meta.ino() ^ meta.ctime_nsec().unsigned_abs().rotate_left(32) ^ u64::from(meta.mode())
}

#[cfg(not(unix))]
fn inode(_: &fs::Metadata) -> u64 {
    0
}

/// The number of a file or folder, where there are such.
#[cfg(unix)]
pub(super) fn inode_number(meta: &fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(meta)
}

#[cfg(not(unix))]
pub(super) fn inode_number(_: &fs::Metadata) -> u64 {
    0
}

impl Walk {
    fn complain(&mut self, file: &Path, reason: impl Into<String>) {
        self.problems.push(Problem { file: file.to_owned(), line: None, reason: reason.into() });
    }

    fn enter(&mut self, dir: &Path, root: &Path, depth: usize) {
        let canonical = match dir.canonicalize() {
            Ok(canonical) => canonical,
            Err(error) => return self.complain(dir, format!("the folder cannot be read: {error}")),
        };
        if !self.seen.insert(canonical) {
            return;
        }
        if depth > DEPTH_MAX {
            return self.complain(dir, format!("the folder lies more than {DEPTH_MAX} folders deep: its agents are not read"));
        }
        let mut paths: Vec<PathBuf> = match fs::read_dir(dir) {
            Ok(entries) => entries.take(ENTRIES_MAX + 1).filter_map(Result::ok).map(|entry| entry.path()).collect(),
            Err(error) => return self.complain(dir, format!("the folder cannot be read: {error}")),
        };
        paths.sort();
        for path in paths {
            self.entries += 1;
            if self.entries > ENTRIES_MAX {
                if self.entries == ENTRIES_MAX + 1 {
                    self.complain(root, format!("there are more than {ENTRIES_MAX} files: point agents.dirs at a folder of agents only"));
                }
                return;
            }
            self.look_at(&path, root, depth);
        }
    }

    fn look_at(&mut self, path: &Path, root: &Path, depth: usize) {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let scratch = name.starts_with(['.', '#']) || name.ends_with('~');
        if scratch || name == "node_modules" {
            return;
        }
        let is_agent = name.ends_with(".md") || name.ends_with(".prompt");
        let meta = match fs::metadata(path) {
            Ok(meta) => meta,
            Err(error) if is_agent => return self.complain(path, format!("it cannot be read: {error}")),
            Err(_) => return,
        };
        if meta.is_dir() && is_agent {
            self.complain(path, "it is a folder, and its name is that of a file");
        } else if meta.is_dir() {
            self.enter(path, root, depth + 1);
        } else if is_agent && !meta.is_file() {
            self.complain(path, "it is not a regular file");
        } else if is_agent && !(name.starts_with('_') && name.ends_with(".prompt")) {
            // A dotprompt file that begins with `_` is a part of others.
            let canonical = path.canonicalize().unwrap_or_else(|_| path.to_owned());
            if self.seen.insert(canonical) {
                self.files.push(Found { path: path.to_owned(), root: root.to_owned() });
            }
        }
    }
}

/// Whether a file without front matter is prose that happens to stand here.
pub(super) fn need_not_be_an_agent(file: &Path) -> bool {
    let stem = file.file_stem().map(|stem| stem.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    PROSE.contains(&stem.as_str())
}

/// Reads a file that is not too large.
pub(super) fn read(file: &Path, max: Size) -> Result<Vec<u8>, Flaw> {
    let unreadable = |error: std::io::Error| Flaw::new(format!("it cannot be read: {error}"));
    let opened = fs::File::open(file).map_err(unreadable)?;
    let mut bytes = Vec::new();
    opened.take(max.get().saturating_add(1)).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > max.get() {
        return Err(Flaw::new(format!("it is larger than {max}: make it smaller, or raise agents.file_max")));
    }
    Ok(bytes)
}
