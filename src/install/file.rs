//! Files of others: read within limits, and replaced whole or not at all.
//!
//! A new version is written beside the old one, reaches the disk, and takes its name; mode, owner and links stay as they were.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use uuid::Uuid;

/// How large a client's configuration may be.
const FILE_MAX: u64 = 64 << 20;
const LINKS_MAX: usize = 40;
/// What nobody else may read, until its owner says otherwise.
const PRIVATE: u32 = 0o600;

/// Why a file cannot be read or replaced.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system says no.
    #[error("{} cannot be {verb}: {reason}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What was tried.
        verb: &'static str,
        /// Why it failed.
        reason: io::Error,
    },
    /// It is no text that could be edited.
    #[error("{} is {what}", file.display())]
    Odd {
        /// The file.
        file: PathBuf,
        /// What it is.
        what: String,
    },
    /// Somebody else wrote it in between.
    #[error("{} changes all the time: close the program that writes it, and call this again", file.display())]
    Changing {
        /// The file.
        file: PathBuf,
    },
}

/// The file that a path leads to, through links; it need not be there.
pub(super) fn target_of(path: &Path) -> Result<PathBuf, Error> {
    let mut path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for _ in 0..LINKS_MAX {
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.file_type().is_symlink() => {
                let target = fs::read_link(&path).map_err(io_error(&path, "followed"))?;
                path = path.parent().unwrap_or(Path::new("/")).join(target);
            }
            Err(error) if !is_absent(&error) => return Err(io_error(&path, "looked at")(error)),
            _ => return Ok(one_name_of(path)),
        }
    }
    Err(Error::Odd { file: path, what: "a link that leads back to itself".into() })
}

/// The one name of a file, also where a folder on the way is a link, and whether or not the last folders are there yet.
fn one_name_of(path: PathBuf) -> PathBuf {
    let there = path.ancestors().skip(1).find_map(|folder| Some((folder.canonicalize().ok()?, folder)));
    let renamed = there.and_then(|(real, folder)| Some(real.join(path.strip_prefix(folder).ok()?)));
    renamed.unwrap_or(path)
}

/// What a file holds; none when there is none.
pub(super) fn read(file: &Path) -> Result<Option<String>, Error> {
    let Some(meta) = look(file)? else { return Ok(None) };
    let odd = |what: String| Error::Odd { file: file.to_owned(), what };
    if meta.is_dir() {
        return Err(odd("a folder, where a file should be: move it away".into()));
    }
    // A pipe would be waited for.
    if !meta.is_file() {
        return Err(odd("no file of the usual kind".into()));
    }
    let mut bytes = Vec::new();
    let opened = File::open(file).map_err(io_error(file, "read"))?;
    opened.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(io_error(file, "read"))?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(odd(format!("larger than {FILE_MAX} bytes, which no configuration is: make it smaller")));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let wide = matches!(error.as_bytes(), [0xff, 0xfe, ..] | [0xfe, 0xff, ..]);
        odd(if wide { "UTF-16: save it as UTF-8".into() } else { format!("not UTF-8 (at byte {at}): save it as UTF-8") })
    })?;
    Ok(Some(text))
}

/// The folders that are missing on the way to a file, the outermost first.
pub(super) fn missing_folders(file: &Path) -> Vec<PathBuf> {
    let mut missing: Vec<PathBuf> = file.ancestors().skip(1).take_while(|folder| !folder.exists()).map(Path::to_owned).collect();
    missing.reverse();
    missing
}

/// Puts a text in the place of what was read, or of nothing. Says so when something else stands there by now.
pub(super) fn replace(file: &Path, before: Option<&str>, after: &str) -> Result<Replaced, Error> {
    let failed = |reason| Error::Io { file: file.to_owned(), verb: "written", reason };
    let meta = look(file)?;
    if let Some(meta) = &meta {
        may_change(file, meta)?;
    }
    let folder = file.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).map_err(failed)?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let draft = folder.join(format!(".{name}.{}", Uuid::new_v4().simple()));
    let written = write_draft(&draft, meta.as_ref(), after.as_bytes()).map_err(failed).and_then(|()| {
        if read(file)?.as_deref() != before {
            return Ok(Replaced::NoLonger);
        }
        fs::rename(&draft, file).map_err(failed)?;
        // The name is what a power cut could take back.
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
        Ok(Replaced::Done)
    });
    if !matches!(written, Ok(Replaced::Done)) {
        let _ = fs::remove_file(&draft);
    }
    written
}

/// Whether a file was replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Replaced {
    Done,
    /// What stands there is not what was read.
    NoLonger,
}

/// Removes a file that holds what was read, and the folders that were made for it, as far as they are empty.
pub(super) fn remove(file: &Path, before: &str, folders: &[PathBuf]) -> Result<Replaced, Error> {
    if read(file)?.as_deref() != Some(before) {
        return Ok(Replaced::NoLonger);
    }
    fs::remove_file(file).map_err(io_error(file, "removed"))?;
    // Others may have put something into them.
    folders.iter().rev().for_each(|folder| _ = fs::remove_dir(folder));
    Ok(Replaced::Done)
}

fn write_draft(draft: &Path, old: Option<&Metadata>, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(PRIVATE).open(draft)?;
    file.write_all(bytes)?;
    if let Some(old) = old {
        let new = file.metadata()?;
        if (new.uid(), new.gid()) != (old.uid(), old.gid()) {
            std::os::unix::fs::fchown(&file, Some(old.uid()), Some(old.gid()))?;
        }
        file.set_permissions(fs::Permissions::from_mode(old.mode() & 0o7777))?;
    }
    file.sync_all()
}

/// A file that its owner has locked against writing is not ours to replace, though the folder would let us.
fn may_change(file: &Path, meta: &Metadata) -> Result<(), Error> {
    let odd = |what: String| Err(Error::Odd { file: file.to_owned(), what });
    let denied = rustix::fs::access(file, rustix::fs::Access::WRITE_OK).is_err();
    if meta.permissions().readonly() || denied {
        let mode = meta.mode() & 0o7777;
        return odd(format!("read-only (mode {mode:04o}): make it writable, or add what --print shows where it comes from"));
    }
    if meta.nlink() > 1 {
        return odd(format!("one file under {} names, which a new version would part: add what --print shows by hand", meta.nlink()));
    }
    Ok(())
}

fn look(file: &Path) -> Result<Option<Metadata>, Error> {
    match fs::metadata(file) {
        Ok(meta) => Ok(Some(meta)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(io_error(file, "read")(error)),
    }
}

fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

fn io_error(file: &Path, verb: &'static str) -> impl FnOnce(io::Error) -> Error {
    let file = file.to_owned();
    move |reason| Error::Io { file, verb, reason }
}
