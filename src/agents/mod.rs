//! Agents out of files: our own Markdown format, Claude Code subagents and dotprompt files.
//!
//! A Markdown file is a Claude Code subagent when it has none of our own keys (`runner`, `input`, `output`, `limits`,
//! `retry`, `capabilities`, `examples`); every other one is ours. This module reads files and judges them. It does not know who
//! runs an agent, nor who else has one of the same name.

mod claude;
mod dotprompt;
mod files;
mod front_matter;
mod keys;
mod markdown;
pub mod picoschema;
pub mod program;
pub mod schema;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::config;
use crate::model::agent::{Definition, RunnerSpec};
use crate::model::hex::hex;
use crate::model::id::AgentName;

pub use watch::{Pace, Watcher};

/// Every agent of some folders, and what is wrong with the files that gave none.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Catalog {
    /// The agents.
    pub definitions: BTreeMap<AgentName, Arc<Definition>>,
    /// What is wrong, in the order of the files.
    pub problems: Vec<Problem>,
}

/// Why a file gives no agent, or not the newest one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file, or the folder.
    pub file: PathBuf,
    /// The line, when it is known.
    pub line: Option<usize>,
    /// What is wrong.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file.display(), self.reason),
            None => write!(f, "{}: {}", self.file.display(), self.reason),
        }
    }
}

impl Catalog {
    /// This catalog, with the last good version of each agent whose file is broken now.
    pub fn keeping(mut self, previous: &Self) -> Self {
        for (name, old) in &previous.definitions {
            let Some(source) = &old.source else { continue };
            let problem = self.problems.iter().find(|problem| source.starts_with(&problem.file));
            let renamed = || self.definitions.values().any(|new| new.source.as_ref() == Some(source));
            if problem.is_none() || self.definitions.contains_key(name) || renamed() || !source.exists() {
                continue;
            }
            self.definitions.insert(name.clone(), Arc::clone(old));
        }
        self
    }
}

/// Where a file stands and what may run its agent: all that reading it depends on besides its text.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The file.
    pub file: &'a Path,
    /// The folder of agents that it was found under.
    pub root: &'a Path,
    /// The settings.
    pub settings: &'a config::Agents,
    /// Where programs are looked for.
    pub path_env: Option<&'a OsStr>,
}

/// What is wrong with a text, before it is known which file it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flaw {
    /// The line, when it is known.
    pub line: Option<usize>,
    /// What is wrong.
    pub reason: String,
}

impl Flaw {
    fn new(reason: impl Into<String>) -> Self {
        Self { line: None, reason: reason.into() }
    }

    fn at(line: usize, reason: impl Into<String>) -> Self {
        Self { line: Some(line), reason: reason.into() }
    }
}

/// Reads every agent file below these folders; a folder that does not exist holds none.
pub fn load(dirs: &[PathBuf], settings: &config::Agents, path_env: Option<&OsStr>) -> Catalog {
    load_after(dirs, settings, path_env, &Catalog::default())
}

/// The same when there was a catalog before: an agent's own file comes before a newer one that claims its name.
fn load_after(dirs: &[PathBuf], settings: &config::Agents, path_env: Option<&OsStr>, previous: &Catalog) -> Catalog {
    let mut found = files::find(dirs);
    let known: BTreeSet<&Path> = previous.definitions.values().filter_map(|definition| definition.source.as_deref()).collect();
    found.files.sort_by_key(|file| !known.contains(file.path.as_path()));
    let mut catalog = Catalog::default();
    for file in std::mem::take(&mut found.files) {
        let place = Place { file: &file.path, root: &file.root, settings, path_env };
        if let Err(flaw) = take_in(place, &mut catalog) {
            catalog.problems.push(Problem { file: file.path.clone(), line: flaw.line, reason: flaw.reason });
        }
    }
    catalog.problems.extend(found.problems);
    catalog
}

fn take_in(place: Place<'_>, catalog: &mut Catalog) -> Result<(), Flaw> {
    let bytes = files::read(place.file, place.settings.file_max)?;
    let Some(definition) = read(&bytes, place)? else { return Ok(()) };
    let name = definition.manifest.name.clone();
    if let Some(first) = catalog.definitions.get(&name) {
        let holder = first.source.as_deref().unwrap_or(Path::new("the program itself"));
        return Err(Flaw::new(format!("the agent name {name} is taken by {}: give one of the two another name", holder.display())));
    }
    let max = place.settings.count_max;
    if catalog.definitions.len() >= max as usize {
        return Err(Flaw::new(format!("there are {max} agents already: raise agents.count_max, or remove some")));
    }
    catalog.definitions.insert(name, Arc::new(definition));
    Ok(())
}

/// Reads one file's bytes; none when the file is no agent and need not be one, like a README.
///
/// # Errors
/// What is wrong with it, and in which line.
pub fn read(bytes: &[u8], place: Place<'_>) -> Result<Option<Definition>, Flaw> {
    let text = std::str::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
    let text = text.ok_or_else(|| Flaw::new("it is a binary file: an agent's file is UTF-8 text"))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let is_prompt = place.file.extension().is_some_and(|extension| extension == "prompt");
    let definition = if is_prompt {
        dotprompt::read(text, place)?
    } else if files::need_not_be_an_agent(place.file) && !front_matter::begins(text) {
        return Ok(None);
    } else {
        markdown::read(text, place)?
    };
    Ok(Some(definition))
}

/// Whether and why an agent cannot run at the moment.
pub fn unavailable(runner: &RunnerSpec, file: &Path, path_env: Option<&OsStr>) -> Option<String> {
    match runner {
        RunnerSpec::Command(command) => program::missing(command, file, path_env),
        RunnerSpec::Missing(text) => Some(text.clone()),
        RunnerSpec::Echo => None,
    }
}

/// A short name of a file's place, the same in every process: 8 hex digits of its canonical path's SHA-256.
pub fn source_id(path: &Path) -> String {
    let canonical = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let digest = Sha256::digest(canonical.as_os_str().as_encoded_bytes());
    hex(&digest[..4])
}
