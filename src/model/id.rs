//! Names and ids. Each is parsed once, at the edge; inside, a value is already valid.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::time::Timestamp;

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The text is empty.
    #[error("a {0} is empty: it takes 1 to 64 letters, digits, '-' or '_'")]
    Empty(&'static str),
    /// The text is longer than 64 characters.
    #[error("{noun} {start:?}… has {len} characters: at most 64 are allowed")]
    TooLong {
        /// What was parsed.
        noun: &'static str,
        /// How the text begins.
        start: String,
        /// How long it is.
        len: usize,
    },
    /// A character is not allowed.
    #[error("{noun} {text:?} has {bad:?} at position {at}: only letters, digits, '-' and '_' are allowed")]
    BadCharacter {
        /// What was parsed.
        noun: &'static str,
        /// The whole text.
        text: String,
        /// The character.
        bad: char,
        /// Its position, from 1.
        at: usize,
    },
    /// A work id is not a UUID.
    #[error("{0:?} is not a work id: it looks like 0198f2c4-7d3e-7000-8000-1b2c3d4e5f60, as assign_work returned it")]
    NotAWork(String),
    /// A run id is not a UUID followed by child numbers.
    #[error("{0:?} is not a run id: it is a UUID, for a child followed by numbers: 0198f2c4-7d3e-7000-8000-1b2c3d4e5f60-1-2")]
    NotARun(String),
}

const NAME_MAX: usize = 64;
const RUN_DEPTH_MAX: usize = 64;

fn name(noun: &'static str, text: &str) -> Result<(), Error> {
    if text.is_empty() {
        return Err(Error::Empty(noun));
    }
    let shown = |text: &str| text.chars().take(80).collect::<String>();
    let ok = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if let Some((at, bad)) = text.chars().enumerate().find(|(_, c)| !ok(*c)) {
        return Err(Error::BadCharacter { noun, text: shown(text), bad, at: at + 1 });
    }
    if text.len() > NAME_MAX {
        return Err(Error::TooLong { noun, start: text.chars().take(20).collect(), len: text.len() });
    }
    Ok(())
}

macro_rules! name_id {
    ($(#[$doc:meta])* $name:ident, $noun:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// The text of the name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self, Error> {
                name($noun, text)?;
                Ok(Self(text.into()))
            }
        }
        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(text: String) -> Result<Self, Error> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.into()
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }
    };
}

name_id!(
    /// The name of a mesh.
    LatticeId, "lattice id"
);
name_id!(
    /// The name of a member of the lattice; replicas share it.
    StationId, "station name"
);
name_id!(
    /// The name of an agent, unique in the lattice.
    AgentName, "agent name"
);

impl StationId {
    /// Makes a station's name out of a host's: each other character becomes `-`, cut at 64.
    pub fn from_host(host: &str) -> Self {
        let name: String = host.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' }).take(NAME_MAX).collect();
        Self(if name.is_empty() { "station".into() } else { name.into() })
    }
}

/// One process of a station, for as long as it lives.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InstanceId(Uuid);

impl InstanceId {
    /// Eight of its bytes, the most random ones.
    pub fn low_bytes(&self) -> [u8; 8] {
        let bytes = self.0.as_bytes();
        std::array::from_fn(|n| bytes[n + 8])
    }

    /// Wraps a UUID that the caller made.
    pub const fn new(uuid: Uuid) -> Self {
        Self(uuid)
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for InstanceId {
    type Err = uuid::Error;
    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        Uuid::try_parse(text).map(Self)
    }
}

/// One unit of work.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct WorkId(Uuid);

impl WorkId {
    /// Wraps a UUID (v7) that the caller made.
    pub const fn new(uuid: Uuid) -> Self {
        Self(uuid)
    }

    /// The bytes, for stores.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// When it was made, by its maker's clock.
    pub fn made_at(&self) -> Timestamp {
        let (seconds, nanos) = self.0.get_timestamp().map_or((0, 0), |at| at.to_unix());
        Timestamp::from_millis(i64::try_from(seconds).unwrap_or(i64::MAX).saturating_mul(1000).saturating_add(i64::from(nanos / 1_000_000)))
    }

    /// The work of these bytes, when there are 16.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        Uuid::from_slice(bytes).ok().map(Self)
    }
}

impl FromStr for WorkId {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let canonical = text.len() == 36;
        Uuid::try_parse(text).ok().filter(|_| canonical).map(Self).ok_or_else(|| Error::NotAWork(text.chars().take(80).collect()))
    }
}

impl TryFrom<String> for WorkId {
    type Error = Error;
    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<WorkId> for String {
    fn from(id: WorkId) -> String {
        id.0.to_string()
    }
}

impl fmt::Display for WorkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for WorkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One execution's place in its lineage: a root's UUID, or the parent's id and a child's number.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunId(Box<str>);

const UUID_LEN: usize = 36;

impl RunId {
    /// A root run of a UUID (v7) that the caller made.
    pub fn root_of(uuid: Uuid) -> Self {
        Self(uuid.to_string().into())
    }

    /// The `n`th child of this run.
    pub fn child(&self, n: u64) -> Self {
        Self(format!("{}-{n}", self.0).into())
    }

    /// The run at the top of this one's tree.
    pub fn root(&self) -> Self {
        Self(self.0[..UUID_LEN].into())
    }

    /// The run that this one is a child of.
    pub fn parent(&self) -> Option<Self> {
        let (parent, _) = self.0.rsplit_once('-').filter(|_| self.0.len() > UUID_LEN)?;
        Some(Self(parent.into()))
    }

    /// Whether it is this run, or one below it.
    pub fn is_within(&self, above: &Self) -> bool {
        self.0.strip_prefix(&*above.0).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    }

    /// How many runs stand above this one.
    pub fn depth(&self) -> usize {
        self.0[UUID_LEN..].bytes().filter(|b| *b == b'-').count()
    }

    /// The text of the id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RunId {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::NotARun(text.chars().take(80).collect());
        let uuid = text.get(..UUID_LEN).ok_or_else(bad)?;
        Uuid::try_parse(uuid).map_err(|_| bad())?;
        let rest = &text[UUID_LEN..];
        let child = |n: &str| !n.is_empty() && n.len() <= 19 && !n.starts_with('0') && n.bytes().all(|b| b.is_ascii_digit());
        let well_formed = rest.is_empty()
            || rest.strip_prefix('-').is_some_and(|rest| rest.split('-').all(child) && rest.split('-').count() <= RUN_DEPTH_MAX);
        if !well_formed {
            return Err(bad());
        }
        Ok(Self(text.to_ascii_lowercase().into()))
    }
}

impl TryFrom<String> for RunId {
    type Error = Error;
    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<RunId> for String {
    fn from(id: RunId) -> String {
        id.0.into()
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_name_says_which_character() {
        let error = "secu.rity".parse::<AgentName>().unwrap_err();
        assert_eq!(error.to_string(), "agent name \"secu.rity\" has '.' at position 5: only letters, digits, '-' and '_' are allowed");
        assert!("a b".parse::<StationId>().is_err());
        assert!("".parse::<LatticeId>().is_err());
        assert!("x".repeat(64).parse::<AgentName>().is_ok());
        assert!("x".repeat(65).parse::<AgentName>().unwrap_err().to_string().contains("65 characters"));
        assert!("größe".parse::<AgentName>().unwrap_err().to_string().contains('ö'));
    }

    #[test]
    fn a_host_name_becomes_a_station_name() {
        assert_eq!(StationId::from_host("build-7.eu.example").as_str(), "build-7-eu-example");
        assert_eq!(StationId::from_host(&"h".repeat(99)).as_str().len(), 64);
        assert_eq!(StationId::from_host("").as_str(), "station");
    }

    #[test]
    fn lineage_reads_off_the_id() {
        let root = RunId::root_of(Uuid::from_u128(0x550e));
        let grandchild = root.child(2).child(1);
        assert_eq!(grandchild.parent(), Some(root.child(2)));
        assert_eq!(grandchild.root(), root);
        assert_eq!(root.parent(), None);
        assert!(grandchild.is_within(&root.child(2)) && grandchild.is_within(&grandchild) && grandchild.is_within(&root));
        assert!(!root.child(21).is_within(&root.child(2)) && !root.is_within(&grandchild));
        assert_eq!(grandchild.depth(), 2);
        assert_eq!(grandchild.as_str().parse::<RunId>(), Ok(grandchild.clone()));
    }

    #[test]
    fn broken_run_ids_are_refused() {
        let root = Uuid::from_u128(7).to_string();
        for bad in [
            "",
            "1",
            "x-1",
            &root[1..],
            &format!("{root}-"),
            &format!("{root}-0"),
            &format!("{root}-1-"),
            &format!("{root}1"),
            &format!("{root}-1 "),
            "é",
        ] {
            assert!(bad.parse::<RunId>().is_err(), "{bad:?} was taken");
        }
        assert!(format!("{root}-é").parse::<RunId>().is_err());
    }
}
