//! What must hold before an agent's word that it is done counts, and what came out when that was looked at.

use std::path::{Component, Path};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::time::Span;

/// How many words a command may have.
const WORDS_MAX: usize = 256;
/// How many paths may be named.
const PATHS_MAX: usize = 64;
const PATH_LEN_MAX: usize = 4096;
/// How large all of it may be as JSON.
const CRITERIA_MAX: usize = 64 << 10;
const SHOWN_MAX: usize = 80;

/// What whoever assigns a work asks of its result.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Criteria {
    /// A program and its arguments that must end with exit code 0; never a shell's line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// How long that program may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
    /// A JSON schema that the result must fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<Value>,
    /// What must exist in the agent's directory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<String>,
}

/// Why something says nothing that could be checked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It asks for nothing.
    #[error("accept asks for nothing: give command, schema or paths")]
    Empty,
    /// A key that does not exist.
    #[error("accept has no {0:?}: it takes command, timeout, schema and paths")]
    UnknownKey(String),
    /// A value of the wrong kind.
    #[error("accept.{key} must be {wanted}, and this is {shown}")]
    Bad {
        /// The key.
        key: &'static str,
        /// What it should be.
        wanted: &'static str,
        /// The value.
        shown: String,
    },
    /// A path that leads elsewhere.
    #[error("accept.paths has {path:?}, which {why}: paths start in the agent's directory and stay there, like \"out/report.md\"")]
    Path {
        /// The path.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// It is too large.
    #[error("accept is {size} bytes, and at most {CRITERIA_MAX} are taken")]
    TooLarge {
        /// How large.
        size: usize,
    },
}

impl Criteria {
    /// Reads it from what a caller gave.
    ///
    /// # Errors
    /// The first thing that is wrong, with its key and value.
    pub fn read(given: &Map<String, Value>) -> Result<Self, Error> {
        let size = serde_json::to_string(given).map_or(0, |text| text.len());
        if size > CRITERIA_MAX {
            return Err(Error::TooLarge { size });
        }
        let mut criteria = Self::default();
        for (key, value) in given.iter().filter(|(_, value)| !value.is_null()) {
            match key.as_str() {
                "command" => criteria.command = command(value)?,
                "timeout" => criteria.timeout = Some(timeout(value)?),
                "schema" if value.is_object() => criteria.schema = Some(value.clone()),
                "schema" => return Err(bad("schema", "a JSON schema, as an object", value)),
                "paths" => criteria.paths = paths(value)?,
                _ => return Err(Error::UnknownKey(key.chars().take(SHOWN_MAX).collect())),
            }
        }
        if criteria.command.is_empty() && criteria.schema.is_none() && criteria.paths.is_empty() {
            return Err(Error::Empty);
        }
        Ok(criteria)
    }
}

fn bad(key: &'static str, wanted: &'static str, value: &Value) -> Error {
    Error::Bad { key, wanted, shown: value.to_string().chars().take(SHOWN_MAX).collect() }
}

fn command(value: &Value) -> Result<Vec<String>, Error> {
    const WANTED: &str = "a program and its arguments as a list, never a shell's line: [\"cargo\", \"test\"]";
    let words = texts(value).filter(|words| words.len() <= WORDS_MAX).ok_or_else(|| bad("command", WANTED, value))?;
    let good = words.first().is_some_and(|program| !program.trim().is_empty()) && !words.iter().any(|word| word.contains('\0'));
    if good { Ok(words) } else { Err(bad("command", WANTED, value)) }
}

fn timeout(value: &Value) -> Result<Span, Error> {
    let span = value.as_str().and_then(|text| text.parse().ok()).filter(|span| *span > Span::millis(0));
    span.ok_or_else(|| bad("timeout", "a duration above 0s with its unit, such as \"30s\" or \"5m\"", value))
}

fn paths(value: &Value) -> Result<Vec<String>, Error> {
    let found = texts(value).filter(|paths| (1..=PATHS_MAX).contains(&paths.len()));
    let paths = found.ok_or_else(|| bad("paths", "a list of 1 to 64 relative paths", value))?;
    match paths.iter().find_map(|path| Some((path, stray(path)?))) {
        Some((path, why)) => Err(Error::Path { path: path.chars().take(SHOWN_MAX).collect(), why }),
        None => Ok(paths),
    }
}

/// What is wrong with a path, if anything is.
fn stray(path: &str) -> Option<&'static str> {
    if path.trim().is_empty() {
        return Some("is empty");
    }
    if path.contains('\0') || path.len() > PATH_LEN_MAX {
        return Some("is no path");
    }
    Path::new(path).components().find_map(|part| match part {
        Component::Normal(_) | Component::CurDir => None,
        Component::ParentDir => Some("leads upwards"),
        Component::RootDir | Component::Prefix(_) => Some("is absolute"),
    })
}

fn texts(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
}

/// What a claim was held against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// Paths that must exist.
    Paths,
    /// A schema of the result.
    Schema,
    /// A program.
    Command,
    /// Something of another version.
    #[serde(other)]
    Unknown,
}

/// One thing that was looked at, and the evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What it was.
    pub what: What,
    /// Whether it was as it should be.
    pub ok: bool,
    /// What was found, in a sentence.
    pub found: String,
    /// The program's exit code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The end of what the program printed.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub output: String,
    /// SHA-256 of all that it printed, in lower-case hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

impl Check {
    /// A check without a program.
    pub fn new(what: What, ok: bool, found: impl Into<String>) -> Self {
        Self { what, ok, found: found.into(), exit_code: None, output: String::new(), sha256: None }
    }
}

/// What an agent's word that it is done is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Claim {
    /// Nobody has looked.
    Claimed,
    /// It was looked at outside the agent, and holds.
    Verified,
    /// It was looked at, and does not hold.
    Refuted,
}

impl Claim {
    /// Its word.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Claimed => "claimed",
            Self::Verified => "verified",
            Self::Refuted => "refuted",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value) -> Result<Criteria, Error> {
        let Value::Object(given) = value else { panic!("not an object") };
        Criteria::read(&given)
    }

    #[test]
    fn criteria_are_read() {
        let criteria =
            read(json!({"command": ["make", "check"], "timeout": "90s", "schema": {"type": "object"}, "paths": ["./out/a", "b"]}));
        let criteria = criteria.unwrap();
        assert_eq!((criteria.command.len(), criteria.timeout, criteria.paths.len()), (2, Some(Span::secs(90)), 2));
        let back: Criteria = serde_json::from_value(serde_json::to_value(&criteria).unwrap()).unwrap();
        assert_eq!(back, criteria);
    }

    #[test]
    fn bad_criteria_are_named() {
        for (given, word) in [
            (json!({}), "nothing"),
            (json!({"timeout": "5s"}), "nothing"),
            (json!({"commands": ["x"]}), "commands"),
            (json!({"command": "cargo test; rm -rf /"}), "shell"),
            (json!({"command": []}), "[]"),
            (json!({"command": [" "]}), "list"),
            (json!({"command": ["a\0b"]}), "list"),
            (json!({"command": ["a", 5]}), "5"),
            (json!({"command": vec!["x"; 257]}), "list"),
            (json!({"command": ["x"], "timeout": "0s"}), "0s"),
            (json!({"command": ["x"], "timeout": "-1s"}), "-1s"),
            (json!({"command": ["x"], "timeout": 5}), "unit"),
            (json!({"schema": "text"}), "schema"),
            (json!({"paths": []}), "1 to 64"),
            (json!({"paths": "a"}), "list"),
            (json!({"paths": ["a", "/etc/passwd"]}), "absolute"),
            (json!({"paths": ["a/../../b"]}), "upwards"),
            (json!({"paths": [""]}), "empty"),
            (json!({"paths": ["a\0"]}), "no path"),
            (json!({"schema": {"description": "x".repeat(70_000)}}), "65536"),
        ] {
            let error = read(given.clone()).unwrap_err().to_string();
            assert!(error.contains(word), "{given}: {error}");
        }
    }
}
