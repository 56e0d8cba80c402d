//! The formats of configuration files: what an entry of a section is, and how it is put in and taken out.
//!
//! Each edit is looked at before anybody writes it: the document that comes out must be the one that went in, but for this entry.

use serde_json::{Map, Value};

use super::jsonc::{self, Dialect};
use super::node::Node;
use super::toml;

/// How a configuration file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// JSON as the standard has it.
    Json,
    /// JSON with comments and trailing commas.
    Jsonc,
    /// TOML.
    Toml,
}

/// Why a text cannot be edited.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// It is not what the format wants.
    #[error("line {line}: {reason}")]
    Broken {
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// Something else stands where the entries belong.
    #[error("{key} is {found} and no table of entries")]
    NoTable {
        /// Where.
        key: String,
        /// What stands there.
        found: String,
    },
    /// A key stands there twice, and programs differ about which one counts.
    #[error("the key {key} stands there twice")]
    Twice {
        /// The key.
        key: String,
    },
    /// The edit would not be what it should.
    #[error("it is written in a way that cannot be edited without changing more than the entry")]
    Unsafe,
}

/// How an entry that is there already gives way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How<'a> {
    /// As a whole.
    Whole,
    /// Key by key: others' keys stay, all but these.
    Over(&'a [&'a str]),
}

impl Format {
    /// The whole document; an empty text is an empty one.
    pub(super) fn read(self, text: &str) -> Result<Value, Trouble> {
        let whole = match self {
            Self::Json => jsonc::read(text, Dialect::Strict)?,
            Self::Jsonc => jsonc::read(text, Dialect::WithComments)?,
            Self::Toml => Some(toml::read(text)?),
        };
        Ok(whole.unwrap_or_else(|| Value::Object(Map::new())))
    }

    /// The entries of a section, by name; none when there is no such section.
    pub(super) fn entries(self, text: &str, section: &[&str]) -> Result<Map<String, Value>, Trouble> {
        match self {
            Self::Json => jsonc::check(text, Dialect::Strict, section)?,
            Self::Jsonc => jsonc::check(text, Dialect::WithComments, section)?,
            Self::Toml => {}
        }
        match at(&self.read(text)?, section) {
            Some(Value::Object(entries)) => Ok(entries.clone()),
            Some(_) => Err(Trouble::NoTable { key: section.join("."), found: "something else".into() }),
            None => Ok(Map::new()),
        }
    }

    /// Whether a text has this section, with or without entries.
    pub(super) fn has_section(self, text: &str, section: &[&str]) -> bool {
        self.read(text).is_ok_and(|whole| at(&whole, section).is_some())
    }

    /// The text with an entry.
    pub(super) fn put(self, text: &str, section: &[&str], name: &str, entry: &Node, how: How<'_>) -> Result<String, Trouble> {
        let known = self.entries(text, section)?;
        if known.get(name) == Some(&entry.to_value()) {
            return Ok(text.to_owned());
        }
        let path = [section, &[name]].concat();
        let (wanted, edited) = match (known.get(name), how) {
            (Some(Value::Object(old)), How::Over(obsolete)) => {
                let (mut wanted, mut edited) = (old.clone(), text.to_owned());
                for (key, value) in entry.pairs() {
                    if old.get(key) != Some(&value.to_value()) {
                        edited = self.set(&edited, &[&path[..], &[key]].concat(), value)?;
                        wanted.insert(key.clone(), value.to_value());
                    }
                }
                for key in obsolete.iter().filter(|key| old.contains_key(**key)) {
                    edited = self.unset(&edited, &[&path[..], &[key]].concat())?;
                    wanted.remove(*key);
                }
                (Value::Object(wanted), edited)
            }
            _ => (entry.to_value(), self.set(text, &path, entry)?),
        };
        let mut whole = self.read(text)?;
        put_at(&mut whole, &path, wanted);
        let adds = !known.contains_key(name);
        if self.read(&edited)? != whole || (adds && !is_within(text, &edited)) {
            return Err(Trouble::Unsafe);
        }
        Ok(edited)
    }

    /// The text without an entry, and without its section when that has no other and is to go as well.
    pub(super) fn take(self, text: &str, section: &[&str], name: &str, section_too: bool) -> Result<String, Trouble> {
        let known = self.entries(text, section)?;
        if !known.contains_key(name) {
            return Ok(text.to_owned());
        }
        let path = if section_too && known.len() == 1 { section.to_vec() } else { [section, &[name]].concat() };
        let edited = self.unset(text, &path)?;
        let mut whole = self.read(text)?;
        take_at(&mut whole, &path);
        // A table that TOML only implied goes with the last entry.
        let mut bare = whole.clone();
        take_at(&mut bare, section);
        let found = self.read(&edited)?;
        let is_right = found == whole || (self == Self::Toml && known.len() == 1 && found == bare);
        if is_right && is_within(&edited, text) { Ok(edited) } else { Err(Trouble::Unsafe) }
    }

    fn set(self, text: &str, path: &[&str], node: &Node) -> Result<String, Trouble> {
        match self {
            Self::Json => jsonc::set(text, Dialect::Strict, path, node),
            Self::Jsonc => jsonc::set(text, Dialect::WithComments, path, node),
            Self::Toml => toml::set(text, path, node),
        }
    }

    fn unset(self, text: &str, path: &[&str]) -> Result<String, Trouble> {
        match self {
            Self::Json => jsonc::unset(text, Dialect::Strict, path),
            Self::Jsonc => jsonc::unset(text, Dialect::WithComments, path),
            Self::Toml => toml::unset(text, path),
        }
    }
}

fn at<'a>(whole: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(whole, |value, key| value.get(key))
}

fn put_at(whole: &mut Value, path: &[&str], value: Value) {
    let Some((last, way)) = path.split_last() else { return };
    let mut table = whole;
    for key in way.iter().chain([last]) {
        let Value::Object(map) = table else { return };
        table = map.entry(*key).or_insert_with(|| Value::Object(Map::new()));
    }
    *table = value;
}

fn take_at(whole: &mut Value, path: &[&str]) {
    let Some((last, way)) = path.split_last() else { return };
    let table = way.iter().try_fold(whole, |value, key| value.get_mut(key));
    if let Some(Value::Object(map)) = table {
        map.remove(*last);
    }
}

/// Whether every byte of one text stands in another, in the same order.
fn is_within(small: &str, large: &str) -> bool {
    let mut bytes = large.bytes();
    small.bytes().all(|wanted| bytes.any(|byte| byte == wanted))
}
