//! What `init` puts into a folder: a configuration that explains itself, and an agent that works at once.

use std::io::Write as _;
use std::path::{Path, PathBuf};

/// The configuration: every key with its default, commented out.
pub const LATTICE_YAML: &str = include_str!("init/lattice.yaml");
const FILES: [(&str, &str); 3] =
    [("lattice.yaml", LATTICE_YAML), ("agents/hello.md", HELLO), ("agents/hello.sh", include_str!("init/hello.sh"))];
const HELLO: &str = include_str!("init/hello.md");

/// What was done with each file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Files that are new.
    pub written: Vec<PathBuf>,
    /// Files that were there and stay as they are.
    pub kept: Vec<PathBuf>,
}

/// A file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {source}", file.display())]
pub struct Error {
    /// The file.
    pub file: PathBuf,
    /// Why.
    source: std::io::Error,
}

/// Writes the files that are not there yet; never over one that is.
///
/// # Errors
/// The first file that cannot be written; those before it stay.
pub fn write(dir: &Path) -> Result<Report, Error> {
    let mut report = Report::default();
    for (name, text) in FILES {
        let file = dir.join(name);
        let written = create(&file, text).map_err(|source| Error { file: file.clone(), source })?;
        if written { report.written.push(file) } else { report.kept.push(file) }
    }
    Ok(report)
}

/// Whether the file is new.
fn create(file: &Path, text: &str) -> std::io::Result<bool> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match std::fs::File::create_new(file) {
        Ok(mut new) => new.write_all(text.as_bytes()).map(|()| true),
        // Whatever bears the name stays, also a folder or a dangling link.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}
