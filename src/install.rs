//! An entry for this program in the configuration files of MCP clients: put in, looked for, taken out.
//!
//! What is there stays as it is, to the byte: comments, order, formatting. Taking an entry out again gives the file back as it was, where
//! nobody else has changed it since; else it takes out the entry and nothing more. It knows nothing of what clients do with their entries.

mod client;
mod file;
mod format;
mod jsonc;
mod node;
mod place;
mod record;
mod toml;

use std::path::{Path, PathBuf};

use serde_json::Value;

pub use self::client::{Client, Lack, Place, Scope, Server};
use self::client::{address, starts_us};
pub use self::file::Error as FileError;
use self::file::Replaced;
pub use self::format::{Format, How, Trouble};
pub use self::node::Node;
pub use self::place::{Around, Nowhere, Platform, file_of, marks_of};
use self::record::{Kept, Record, Records};

/// How often a file that somebody else writes at the same time is read again.
const TRIES_MAX: usize = 20;
const BOM: char = '\u{feff}';

/// What is to be registered.
#[derive(Debug, Clone)]
pub struct Order {
    /// Where.
    pub place: Place,
    /// Under which name.
    pub name: String,
    /// What the entry says.
    pub entry: Node,
    /// Keys of our own that may not stay.
    pub obsolete: Vec<&'static str>,
    /// Whether an entry that is not ours gives way.
    pub force: bool,
}

impl Order {
    /// What a client is to be told.
    ///
    /// # Errors
    /// The client has no way to say it.
    pub fn new(place: Place, name: &str, server: &Server, force: bool) -> Result<Self, Lack> {
        let (entry, obsolete) = (place.client.entry(server)?, place.client.obsolete(server));
        Ok(Self { place, name: name.to_owned(), entry, obsolete, force })
    }
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// What happened to the entry.
    pub change: Change,
    /// The file that it is in, behind all links.
    pub file: PathBuf,
    /// Where the file as it was is kept.
    pub backup: Option<PathBuf>,
}

/// What happened to an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// There was none.
    Added,
    /// It said something else.
    Updated,
    /// It is as it should be already.
    Kept,
    /// It is gone.
    Removed,
    /// There was none to take out.
    Absent,
}

/// Why nothing was done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is not what the client writes.
    #[error("{}: {trouble}; nothing was changed. Mend it, or add by hand what lattice-mcp install {} --print shows", file.display(), client.name())]
    Broken {
        /// The file.
        file: PathBuf,
        /// The client.
        client: Client,
        /// What is wrong.
        trouble: Trouble,
    },
    /// Somebody else has the name.
    #[error("{} has an entry {name} that is not lattice-mcp's: --name OTHER stands beside it, --force takes its place", file.display())]
    Taken {
        /// The file.
        file: PathBuf,
        /// The name.
        name: String,
    },
    /// The entry is not ours to take out.
    #[error("the entry {name} in {} is not lattice-mcp's: --force takes it out all the same", file.display())]
    Foreign {
        /// The file.
        file: PathBuf,
        /// The name.
        name: String,
    },
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// What was done could not be kept, so nothing was done.
    #[error("nothing was changed, for its backup cannot be kept in {}: {reason}", dir.display())]
    Records {
        /// Where.
        dir: PathBuf,
        /// Why.
        reason: std::io::Error,
    },
}

/// What a client's file has of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The names of the entries that start this program, or that were put in by it.
    pub entries: Vec<String>,
    /// Why it cannot be said.
    pub problem: Option<String>,
}

/// The keeper of what is written where.
#[derive(Debug, Clone)]
pub struct Installer {
    records: PathBuf,
}

/// A client's file as it was read.
struct Opened {
    client: Client,
    /// Behind all links.
    file: PathBuf,
    text: Option<String>,
    section: &'static [&'static str],
    record: Record,
    /// Whether the file is to the byte what the record says.
    is_known: bool,
}

impl Installer {
    /// With a folder of its own among the user's data.
    pub fn new(records: PathBuf) -> Self {
        Self { records }
    }

    /// Registers this program; does nothing where it is registered already.
    ///
    /// # Errors
    /// The file is broken, cannot be written, or has somebody else's entry of this name. It is as it was.
    pub fn install(&self, order: &Order) -> Result<Done, Error> {
        let records = self.open()?;
        self.retry(&order.place, || {
            let opened = Opened::read(&order.place, &records)?;
            let found = opened.entry(&order.name)?;
            let change = match &found {
                None => Change::Added,
                Some(entry) if says(entry, &order.entry, &order.obsolete) => return Ok(Some(opened.done(Change::Kept, None))),
                Some(entry) if opened.is_ours(&order.name, entry) || order.force => Change::Updated,
                Some(_) => return Err(Error::Taken { file: opened.file, name: order.name.clone() }),
            };
            let ours = found.as_ref().is_some_and(|entry| opened.is_ours(&order.name, entry));
            // One that somebody pasted in by hand was there before, and still is to go with ours.
            let is_known = opened.is_known && (!ours || opened.has_recorded(&order.name));
            let mut record = if is_known { opened.record.clone() } else { opened.rebased(ours.then_some(order.name.as_str()))? };
            let kept = Kept { name: order.name.clone(), entry: order.entry.clone() };
            match record.entries.iter_mut().find(|known| known.name == order.name) {
                Some(known) => *known = kept,
                None => record.entries.push(kept),
            }
            let after = if is_known {
                opened.replay(&record)?
            } else {
                let how = if ours { How::Over(&order.obsolete) } else { How::Whole };
                opened.edit(|text| order.place.client.format().put(text, opened.section, &order.name, &order.entry, how))?
            };
            let backup = self.keep(&records, &record, &opened)?;
            match file::replace(&opened.file, opened.text.as_deref(), &after)? {
                Replaced::Done => Ok(Some(opened.done(change, backup))),
                Replaced::NoLonger => Ok(None),
            }
        })
    }

    /// Takes an entry out, and nothing else.
    ///
    /// # Errors
    /// The file is broken or cannot be written, or the entry is not ours. It is as it was.
    pub fn uninstall(&self, place: &Place, name: &str, force: bool) -> Result<Done, Error> {
        let records = self.open()?;
        self.retry(place, || {
            let opened = Opened::read(place, &records)?;
            let Some(entry) = opened.entry(name)? else { return Ok(Some(opened.done(Change::Absent, None))) };
            if !opened.is_ours(name, &entry) && !force {
                return Err(Error::Foreign { file: opened.file, name: name.to_owned() });
            }
            let is_exact = opened.is_known && opened.has_recorded(name);
            let mut record = if is_exact { opened.record.clone() } else { opened.rebased(Some(name))? };
            record.entries.retain(|known| known.name != name);
            let is_last = record.entries.is_empty();
            let after = match (is_exact, is_last) {
                (true, true) => record.before.clone(),
                (true, false) => Some(opened.replay(&record)?),
                (false, _) => Some(opened.without(name)?),
            };
            let backup = self.keep(&records, &record, &opened)?;
            let replaced = match &after {
                Some(after) => file::replace(&opened.file, opened.text.as_deref(), after)?,
                None => file::remove(&opened.file, opened.text.as_deref().unwrap_or_default(), &record.folders)?,
            };
            if replaced == Replaced::NoLonger {
                return Ok(None);
            }
            if is_last {
                records.forget(&opened.file, is_exact);
            }
            Ok(Some(opened.done(Change::Removed, backup.filter(|_| !(is_last && is_exact)))))
        })
    }

    /// Which entries of a client are ours.
    pub fn look(&self, place: &Place) -> Seen {
        let seen = || -> Result<Vec<String>, Error> {
            let opened = Opened::read(place, &Records::unlocked(&self.records))?;
            let entries = opened.entries()?;
            Ok(entries.iter().filter(|(name, entry)| opened.is_ours(name, entry)).map(|(name, _)| name.clone()).collect())
        };
        match seen() {
            Ok(entries) => Seen { entries, problem: None },
            Err(error) => Seen { entries: Vec::new(), problem: Some(error.to_string()) },
        }
    }

    fn open(&self) -> Result<Records, Error> {
        Records::open(&self.records).map_err(|reason| Error::Records { dir: self.records.clone(), reason })
    }

    fn keep(&self, records: &Records, record: &Record, opened: &Opened) -> Result<Option<PathBuf>, Error> {
        let kept = records.keep(record, opened.text.as_deref());
        kept.map_err(|reason| Error::Records { dir: self.records.clone(), reason })
    }

    /// Reads and writes anew while somebody else writes in between.
    fn retry(&self, place: &Place, mut step: impl FnMut() -> Result<Option<Done>, Error>) -> Result<Done, Error> {
        for _ in 0..TRIES_MAX {
            if let Some(done) = step()? {
                return Ok(done);
            }
        }
        Err(FileError::Changing { file: place.file.clone() }.into())
    }
}

impl Opened {
    fn read(place: &Place, records: &Records) -> Result<Self, Error> {
        let client = place.client;
        let file = file::target_of(&place.file)?;
        let text = file::read(&file)?;
        let fresh = Record { file: file.clone(), folders: file::missing_folders(&file), before: text.clone(), entries: Vec::new() };
        let record = records.of(&file).filter(|_| text.is_some());
        let mut opened = Self { client, section: &[], text, record: fresh, is_known: true, file };
        opened.section = client.section(plain(opened.text.as_deref().unwrap_or_default()));
        if let Some(record) = record {
            opened.is_known = opened.replay(&record).is_ok_and(|text| Some(text) == opened.text);
            opened.record = record;
        }
        // A file that is as it was before has nothing of ours, whatever was recorded.
        if !opened.is_known && opened.text == opened.record.before {
            opened.record.entries.clear();
            opened.is_known = true;
        }
        Ok(opened)
    }

    fn done(&self, change: Change, backup: Option<PathBuf>) -> Done {
        Done { change, file: self.file.clone(), backup }
    }

    fn entries(&self) -> Result<serde_json::Map<String, Value>, Error> {
        let text = plain(self.text.as_deref().unwrap_or_default());
        self.client.format().entries(text, self.section).map_err(|trouble| self.broken(trouble))
    }

    fn entry(&self, name: &str) -> Result<Option<Value>, Error> {
        Ok(self.entries()?.remove(name))
    }

    /// Whether an entry starts this program, or is the one that was put in.
    fn is_ours(&self, name: &str, entry: &Value) -> bool {
        let kept = self.record.entries.iter().find(|kept| kept.name == name).map(|kept| kept.entry.to_value());
        starts_us(entry) || kept.is_some_and(|kept| kept == *entry || (address(&kept).is_some() && address(&kept) == address(entry)))
    }

    fn has_recorded(&self, name: &str) -> bool {
        self.record.entries.iter().any(|kept| kept.name == name)
    }

    /// The file with the recorded entries, from what it was before.
    fn replay(&self, record: &Record) -> Result<String, Error> {
        let base = record.before.as_deref().unwrap_or(self.client.seed());
        let section = self.client.section(plain(base));
        edited(base, |text| {
            record
                .entries
                .iter()
                .try_fold(text.to_owned(), |text, kept| self.client.format().put(&text, section, &kept.name, &kept.entry, How::Whole))
        })
        .map_err(|trouble| self.broken(trouble))
    }

    fn edit(&self, edit: impl FnOnce(&str) -> Result<String, Trouble>) -> Result<String, Error> {
        edited(self.text.as_deref().unwrap_or_default(), edit).map_err(|trouble| self.broken(trouble))
    }

    /// The file without an entry, and without the section if that came with us.
    fn without(&self, name: &str) -> Result<String, Error> {
        let format = self.client.format();
        let had_section = match (&self.record.before, self.record.entries.is_empty()) {
            (Some(before), false) => format.has_section(plain(before), self.section),
            (None, false) => false,
            (_, true) => true,
        };
        self.edit(|text| format.take(text, self.section, name, !had_section))
    }

    /// A record of a file that others have changed: as it would be now without what is ours.
    fn rebased(&self, also: Option<&str>) -> Result<Record, Error> {
        let entries = self.entries()?;
        let mut rest =
            Self { text: self.text.clone(), section: self.section, record: self.record.clone(), file: self.file.clone(), ..*self };
        let mut record = self.record.clone();
        record.entries.retain(|kept| entries.get(&kept.name).is_some_and(|entry| self.is_ours(&kept.name, entry)));
        let names: Vec<&str> = record.entries.iter().map(|kept| kept.name.as_str()).chain(also).collect();
        for name in names {
            rest.text = Some(rest.without(name)?);
        }
        record.before = rest.text;
        Ok(record)
    }

    fn broken(&self, trouble: Trouble) -> Error {
        Error::Broken { file: self.file.clone(), client: self.client, trouble }
    }
}

/// Whether an entry says what it should, whatever others have added to it.
fn says(entry: &Value, wanted: &Node, obsolete: &[&str]) -> bool {
    wanted.pairs().iter().all(|(key, value)| entry.get(key) == Some(&value.to_value()))
        && obsolete.iter().all(|key| entry.get(key).is_none())
}

/// A text without the mark that some editors put in front.
fn plain(text: &str) -> &str {
    text.strip_prefix(BOM).unwrap_or(text)
}

/// An edit of what stands behind the mark.
fn edited(text: &str, edit: impl FnOnce(&str) -> Result<String, Trouble>) -> Result<String, Trouble> {
    let bare = plain(text);
    Ok([&text[..text.len() - bare.len()], &edit(bare)?].concat())
}

/// What is to be written by hand: a file that holds this entry and nothing else.
pub fn snippet(client: Client, name: &str, entry: &Node) -> String {
    client.format().put("", client.section(""), name, entry, How::Whole).unwrap_or_default()
}

/// Whether a client seems to be installed: its folder is there, or one of its programs is on the path.
pub fn is_found(client: Client, around: &Around<'_>) -> bool {
    let path = around.env.get("PATH").map(String::as_str).unwrap_or_default();
    let on_path = || std::env::split_paths(path).any(|dir| client.programs().iter().any(|program| (around.exists)(&dir.join(program))));
    marks_of(client, around).iter().any(|mark| (around.exists)(mark)) || on_path()
}

/// Where this program can be called from for long: the name on the path that leads to it, else itself.
pub fn lasting_name(program: &Path, path: &str, cwd: &Path) -> PathBuf {
    let Some(name) = program.file_name() else { return program.to_owned() };
    let same = |candidate: &PathBuf| candidate.canonicalize().is_ok_and(|found| found == program);
    std::env::split_paths(path).map(|dir| cwd.join(dir).join(name)).find(same).unwrap_or_else(|| program.to_owned())
}

#[cfg(test)]
mod tests;
