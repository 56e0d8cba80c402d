//! Whether a program is there.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::model::agent::Command;

/// The program of this name, in the folders of a `PATH`.
pub fn find(name: &str, path_env: Option<&OsStr>) -> Option<PathBuf> {
    std::env::split_paths(path_env?).filter(|dir| !dir.as_os_str().is_empty()).map(|dir| dir.join(name)).find(|path| runs(path))
}

/// What to tell people when a command's program cannot be started.
pub fn missing(command: &Command, file: &Path, path_env: Option<&OsStr>) -> Option<String> {
    let program = command.command.first()?;
    // What a placeholder becomes is known only when work arrives.
    if program.contains('{') {
        return None;
    }
    if !program.contains('/') {
        let absent = find(program, path_env).is_none();
        return absent.then(|| format!("the program {program:?} is not on PATH: install it, or name its full path in runner.command"));
    }
    let path = file.parent().unwrap_or(Path::new("")).join(program);
    if !path.exists() {
        return Some(format!("the program {} does not exist", path.display()));
    }
    (!runs(&path)).then(|| format!("{} is not an executable file: chmod +x makes it one", path.display()))
}

#[cfg(unix)]
fn runs(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(not(unix))]
fn runs(path: &Path) -> bool {
    path.is_file()
}
