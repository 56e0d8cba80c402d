//! Layers of settings: flags beat environment beats file beats defaults, and each value knows its origin.
//!
//! What there is to set is read off `Config::default()`; nothing is listed twice.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::yaml::{Content, Node};
use super::{Config, Replicas, Secret, check, user_dir, yaml};

const FILE_NAME: &str = "lattice.yaml";
const FILE_MAX: u64 = 1 << 20;
const SECRETS: [&str; 3] = ["http.token", "lattice.nats.auth.password", "lattice.nats.auth.token"];
const PATHS: [&str; 14] = [
    "lattice.data_dir",
    "lattice.nats.auth.creds_file",
    "lattice.nats.auth.nkey_file",
    "lattice.nats.tls.ca",
    "lattice.nats.tls.cert",
    "lattice.nats.tls.key",
    "lattice.embedded_nats.store_dir",
    "lattice.embedded_nats.server",
    "http.token_file",
    "http.tokens_file",
    "http.oauth.ca",
    "http.tls.cert",
    "http.tls.key",
    "agents.dirs",
];
/// Sections that may be written as one value, and the key that it is then.
const SHORT: [(&str, &str); 1] = [("lattice.nats", "lattice.nats.url")];
/// Short names of variables, besides the ones that follow from the keys.
const ALIASES: [(&str, &str); 3] =
    [("LATTICE_LOG", "log.filter"), ("LATTICE_NATS", "lattice.nats.url"), ("LATTICE_NATS_SERVER", "lattice.embedded_nats.server")];
/// Variables that a runner sets for a run, that name the file, or that belong to a program we start: not settings.
const NOT_SETTINGS: [&str; 12] = [
    "LATTICE_CONFIG",
    "LATTICE_WORK_ID",
    "LATTICE_RUN_ID",
    "LATTICE_AGENT",
    "LATTICE_ATTEMPT",
    "LATTICE_TASK",
    "LATTICE_CONTEXT",
    "LATTICE_MCP_CONFIG",
    "LATTICE_SUPERVISOR",
    "LATTICE_BOUND_WORK",
    "LATTICE_BOUND_RUN",
    "LATTICE_BOUND_ATTEMPT",
];

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// A line of a file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// A variable of the environment.
    Env(String),
    /// A flag, with its dashes.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Env(name) | Self::Flag(name) => f.write_str(name),
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file that was named does not exist or cannot be read.
    #[error("cannot read {}: {reason}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// The file is not what a configuration looks like.
    #[error("{place}: {reason}")]
    Broken {
        /// Where.
        place: Origin,
        /// What is wrong.
        reason: String,
    },
    /// A key that does not exist.
    #[error("{place}: unknown key {key:?}: the nearest known key is {nearest:?}")]
    Unknown {
        /// Where.
        place: Origin,
        /// The key.
        key: String,
        /// The known key that is most like it.
        nearest: String,
    },
    /// A value that cannot be taken.
    #[error("{place}: {key} cannot be {shown}: expected {expected}")]
    Bad {
        /// Where.
        place: Origin,
        /// The key.
        key: String,
        /// The value, unless it is a secret.
        shown: String,
        /// What it should be.
        expected: String,
    },
}

/// What a flag was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Given {
    /// One value.
    One(String),
    /// As many values as the flag was repeated.
    Many(Vec<String>),
}

/// Everything settings can come from.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The file that was asked for; searched for when absent.
    pub file: Option<PathBuf>,
    /// The environment.
    pub env: Vec<(String, String)>,
    /// A key, what was given for it, and by which flag.
    pub flags: Vec<(String, Given, String)>,
    /// The working directory: relative paths of flags and variables start there.
    pub cwd: PathBuf,
    /// Our folder in the user's configuration folder, the last place where a file is looked for.
    pub user_dir: Option<PathBuf>,
}

impl Sources {
    /// The sources of this process, with the file and the flags of its command line.
    ///
    /// # Errors
    /// The working directory is gone.
    pub fn of_process(file: Option<PathBuf>, flags: Vec<(String, Given, String)>) -> std::io::Result<Self> {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        Ok(Self { file, env: std::env::vars_os().filter_map(text).collect(), flags, cwd: std::env::current_dir()?, user_dir: user_dir() })
    }

    fn variable(&self, name: &str) -> Option<&str> {
        self.env.iter().find(|(known, value)| known == name && !value.is_empty()).map(|(_, value)| value.as_str())
    }

    fn find_file(&self) -> Option<PathBuf> {
        let named = self.file.clone().or_else(|| self.variable("LATTICE_CONFIG").map(PathBuf::from));
        if let Some(file) = named {
            return Some(self.cwd.join(file));
        }
        let places = [Some(self.cwd.as_path()), self.user_dir.as_deref()];
        places.into_iter().flatten().map(|dir| dir.join(FILE_NAME)).find(|file| file.exists())
    }
}

/// The configuration in force.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// Where each value came from, by key.
    pub origin: BTreeMap<String, Origin>,
    /// What looks like a mistake and is not an error.
    pub warnings: Vec<String>,
    /// The file that was read, if there was one.
    pub file: Option<PathBuf>,
}

impl Loaded {
    /// Whether this process shares its agents' works by their names, with whoever is of its station and says the same.
    pub fn shares_by_name(&self, is_leaf: bool) -> bool {
        let named = match self.origin.get("lattice.station") {
            None | Some(Origin::Default) => false,
            // The user's own file names the station of every project.
            Some(Origin::File { path, .. }) => user_dir().is_none_or(|dir| !path.starts_with(dir)),
            Some(Origin::Env(_) | Origin::Flag(_)) => true,
        };
        match self.config.lattice.replicas {
            Replicas::Auto => is_leaf && named,
            Replicas::ByName => true,
            Replicas::ByFolder => false,
        }
    }

    /// The settings of the lattice that no file holds, as variables: what another process needs to take part in the same way.
    pub fn handed_on(&self) -> Vec<(String, String)> {
        let tree = serde_json::to_value(&self.config).unwrap_or_default();
        let auth = &self.config.lattice.nats.auth;
        let text = |key: &str| {
            let secret = match key {
                "lattice.nats.auth.password" => auth.password.as_ref(),
                "lattice.nats.auth.token" => auth.token.as_ref(),
                _ => None,
            };
            match (secret, at(&tree, key)?) {
                (Some(secret), _) => Some(secret.expose().to_owned()),
                (None, Value::String(text)) => Some(text.clone()),
                (None, Value::Null | Value::Array(_) | Value::Object(_)) => None,
                (None, value) => Some(value.to_string()),
            }
        };
        let of_lattice = self.origin.iter().filter(|(key, _)| key.starts_with("lattice."));
        let no_file = of_lattice.filter(|(_, origin)| matches!(origin, Origin::Env(_) | Origin::Flag(_)));
        no_file.filter_map(|(key, _)| Some((variable_of(key), text(key)?))).collect()
    }

    /// Each key with its value and origin, fit for showing: secrets are hidden.
    pub fn table(&self) -> Vec<(String, String, Origin)> {
        let tree = serde_json::to_value(&self.config).unwrap_or_default();
        let row = |key: String| {
            let value = at(&tree, &key).cloned().unwrap_or_default();
            let origin = self.origin.get(&key).cloned().unwrap_or(Origin::Default);
            let shown = show(&key, &hide_variables(value));
            (key, shown, origin)
        };
        keys().into_keys().map(row).collect()
    }
}

/// The variable of each key: `lattice.work.max_parallel` is set by `LATTICE_WORK_MAX_PARALLEL`.
pub fn variables() -> BTreeMap<String, String> {
    keys().into_keys().map(|key| (variable_of(&key), key)).collect()
}

/// Reads, layers and checks the settings.
///
/// # Errors
/// The first thing that is wrong, with the place where it stands.
pub fn load(sources: &Sources) -> Result<Loaded, Error> {
    let known = keys();
    let mut layers = Layers { known: &known, values: BTreeMap::new() };
    let file = sources.find_file();
    if let Some(file) = &file {
        layers.take_file(file)?;
    }
    let warnings = layers.take_env(sources)?;
    for (key, given, flag) in &sources.flags {
        let origin = Origin::Flag(flag.clone());
        let texts = match given {
            Given::One(text) => vec![text.clone()],
            Given::Many(texts) => texts.clone(),
        };
        layers.take_texts(key, texts, origin, &sources.cwd)?;
    }
    let (config, origin) = layers.assemble()?;
    Ok(Loaded { config, origin, warnings, file })
}

/// What a file of this text would give; files that it names are not read.
#[cfg(any(test, fuzzing))]
pub(crate) fn of_text(text: &str) -> Result<Loaded, Error> {
    let known = keys();
    let mut layers = Layers { known: &known, values: BTreeMap::new() };
    layers.take_text(text, Path::new("/nowhere/lattice.yaml"))?;
    layers.values.remove("http.token_file");
    let (config, origin) = layers.assemble()?;
    Ok(Loaded { config, origin, warnings: Vec::new(), file: None })
}

/// Every key with its default.
fn keys() -> BTreeMap<String, Value> {
    fn walk(prefix: &str, value: Value, keys: &mut BTreeMap<String, Value>) {
        match value {
            Value::Object(map) => {
                for (name, value) in map {
                    walk(&join(prefix, &name), value, keys);
                }
            }
            leaf => _ = keys.insert(prefix.to_owned(), leaf),
        }
    }
    let mut keys = BTreeMap::new();
    walk("", serde_json::to_value(Config::default()).unwrap_or_default(), &mut keys);
    keys
}

fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

fn variable_of(key: &str) -> String {
    let short = key.strip_prefix("lattice.").unwrap_or(key);
    format!("LATTICE_{}", short.replace('.', "_").to_ascii_uppercase())
}

struct Layers<'a> {
    known: &'a BTreeMap<String, Value>,
    values: BTreeMap<String, (Value, Origin)>,
}

impl Layers<'_> {
    fn take_file(&mut self, file: &Path) -> Result<(), Error> {
        let unreadable = |reason: String| Error::Unreadable { file: file.to_owned(), reason };
        let mut bytes = Vec::new();
        let opened = std::fs::File::open(file).map_err(|error| unreadable(error.to_string()))?;
        opened.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(|error| unreadable(error.to_string()))?;
        if bytes.len() as u64 > FILE_MAX {
            return Err(unreadable(format!("it is larger than {FILE_MAX} bytes")));
        }
        let text = String::from_utf8(bytes).map_err(|_| unreadable("it is not UTF-8 text".into()))?;
        self.take_text(&text, file)
    }

    fn take_text(&mut self, text: &str, file: &Path) -> Result<(), Error> {
        let at_line = |line: usize| Origin::File { path: file.to_owned(), line };
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let tree = yaml::parse(text).map_err(|error| Error::Broken { place: at_line(error.line.unwrap_or(1)), reason: error.reason })?;
        self.take_section("", &tree, file)
    }

    fn take_section(&mut self, prefix: &str, node: &Node, file: &Path) -> Result<(), Error> {
        let place = |line| Origin::File { path: file.to_owned(), line };
        if !matches!(node.content, Content::Map(_)) && !node.is_null() {
            let key = if prefix.is_empty() { "the file" } else { prefix }.to_owned();
            return Err(Error::Bad {
                place: place(node.line),
                key,
                shown: shown_json(&node.to_json()),
                expected: "a section with keys".into(),
            });
        }
        for entry in node.entries() {
            let key = join(prefix, &entry.key);
            let short = SHORT.iter().find(|(section, _)| *section == key && entry.node.text().is_some());
            if let Some((_, whole)) = short {
                self.take_node(whole, &entry.node, place(entry.line), file)?;
            } else if self.known.contains_key(&key) {
                self.take_node(&key, &entry.node, place(entry.line), file)?;
            } else if self.is_section(&key) {
                self.take_section(&key, &entry.node, file)?;
            } else {
                return Err(self.unknown(key, place(entry.line)));
            }
        }
        Ok(())
    }

    fn is_section(&self, key: &str) -> bool {
        self.known.range(key.to_owned()..).any(|(known, _)| known.strip_prefix(key).is_some_and(|rest| rest.starts_with('.')))
    }

    fn unknown(&self, key: String, place: Origin) -> Error {
        let sections = self.known.keys().flat_map(|key| key.match_indices('.').map(|(at, _)| &key[..at]));
        let candidates = self.known.keys().map(String::as_str).chain(sections);
        let nearest = nearest(&key, candidates).unwrap_or_default();
        Error::Unknown { place, key, nearest }
    }

    fn take_node(&mut self, key: &str, node: &Node, origin: Origin, file: &Path) -> Result<(), Error> {
        if node.is_null() {
            return Ok(());
        }
        let mut candidates = vec![node.to_json()];
        // A name or address that looks like a number is meant as it was written; a secret must not be guessed.
        candidates.extend(node.text().filter(|_| !SECRETS.contains(&key)).map(Value::from));
        self.take(key, candidates, origin, file.parent().unwrap_or(Path::new("")))
    }

    fn take_env(&mut self, sources: &Sources) -> Result<Vec<String>, Error> {
        let names = variables();
        let mut warnings = Vec::new();
        let mut env: Vec<_> = sources.env.iter().filter(|(name, value)| name.starts_with("LATTICE_") && !value.is_empty()).collect();
        env.sort_by_key(|(name, _)| (ALIASES.iter().any(|(alias, _)| alias == name), name));
        for (name, value) in env {
            let alias = ALIASES.iter().find(|(alias, _)| alias == name).map(|(_, key)| *key);
            if let Some(key) = names.get(name).map(String::as_str).or(alias) {
                let is_list = self.known.get(key).is_some_and(Value::is_array);
                let texts = if is_list {
                    value.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
                } else {
                    vec![value.clone()]
                };
                self.take_texts(key, texts, Origin::Env(name.clone()), &sources.cwd)?;
            } else if NOT_SETTINGS.contains(&name.as_str()) {
                continue;
            } else {
                let candidates = names.keys().map(String::as_str).chain(ALIASES.iter().map(|(alias, _)| *alias));
                let nearest = nearest(name, candidates).unwrap_or_default();
                warnings.push(format!("the variable {name} is not a setting and is ignored: the nearest known one is {nearest}"));
            }
        }
        Ok(warnings)
    }

    /// Takes what somebody wrote outside of YAML: texts, which may mean numbers or truth values.
    fn take_texts(&mut self, key: &str, texts: Vec<String>, origin: Origin, base: &Path) -> Result<(), Error> {
        let Some(default) = self.known.get(key) else {
            return Err(self.unknown(key.to_owned(), origin));
        };
        if default.is_array() {
            return self.take(key, vec![Value::from(texts)], origin, base);
        }
        let text = texts.into_iter().next_back().unwrap_or_default();
        let parsed = yaml::parse(&text).ok().map(|node| node.to_json()).filter(|value| !value.is_null() && !value.is_string());
        self.take(key, [Value::from(text)].into_iter().chain(parsed).collect(), origin, base)
    }

    /// Takes the first candidate that fits the key's type.
    fn take(&mut self, key: &str, candidates: Vec<Value>, origin: Origin, base: &Path) -> Result<(), Error> {
        let mut refusal = None;
        for value in &candidates {
            match fits(key, value) {
                Ok(()) => {
                    let value = if PATHS.contains(&key) { based(value.clone(), base) } else { value.clone() };
                    self.values.insert(key.to_owned(), (value, origin));
                    return Ok(());
                }
                // The last candidate is the one that was read most closely.
                Err(expected) => refusal = Some((value, expected)),
            }
        }
        let (value, expected) = refusal.unwrap_or((&Value::Null, "a value".into()));
        let expected = if SECRETS.contains(&key) { "a text: put it into quotes".into() } else { expected };
        Err(Error::Bad { place: origin, key: key.to_owned(), shown: show_bad(key, value), expected })
    }

    fn assemble(self) -> Result<(Config, BTreeMap<String, Origin>), Error> {
        let mut tree = Value::Object(serde_json::Map::new());
        let mut origin: BTreeMap<String, Origin> = self.known.keys().map(|key| (key.clone(), Origin::Default)).collect();
        for (key, (value, from)) in self.values {
            tree = merged(tree, nest(&key, value));
            origin.insert(key, from);
        }
        let mut config: Config =
            serde_json::from_value(tree).map_err(|error| Error::Broken { place: Origin::Default, reason: error.to_string() })?;
        read_token(&mut config, &mut origin)?;
        match check::first(&config) {
            None => Ok((config, origin)),
            Some((key, expected)) => Err(complaint(&config, &origin, key, expected)),
        }
    }
}

fn complaint(config: &Config, origin: &BTreeMap<String, Origin>, key: &str, expected: String) -> Error {
    let tree = serde_json::to_value(config).unwrap_or_default();
    let shown = show_bad(key, at(&tree, key).unwrap_or(&Value::Null));
    let set = |key: &str| origin.get(key).filter(|origin| **origin != Origin::Default).cloned();
    // Two keys may contradict each other: the one that somebody set is the one to look at.
    let other = || origin.keys().filter(|other| expected.contains(&format!("{other},"))).find_map(|other| set(other));
    let place = set(key).or_else(other).unwrap_or(Origin::Default);
    Error::Bad { place, key: key.to_owned(), shown, expected }
}

fn read_token(config: &mut Config, origin: &mut BTreeMap<String, Origin>) -> Result<(), Error> {
    let Some(file) = &config.http.token_file else { return Ok(()) };
    let place = origin.get("http.token_file").cloned().unwrap_or(Origin::Default);
    let bad =
        |expected: String| Error::Bad { place: place.clone(), key: "http.token_file".into(), shown: file.display().to_string(), expected };
    if config.http.token.is_some() {
        let other = origin.get("http.token").unwrap_or(&Origin::Default);
        return Err(bad(format!("either http.token ({other}) or http.token_file, not both")));
    }
    let mut text = String::new();
    std::fs::File::open(file)
        .and_then(|opened| opened.take(64 * 1024).read_to_string(&mut text))
        .map_err(|error| bad(format!("a file that can be read ({error})")))?;
    let token = text.lines().next().unwrap_or_default().trim();
    if token.is_empty() {
        return Err(bad("a file whose first line is the token".into()));
    }
    config.http.token = Some(Secret::new(token));
    origin.insert("http.token".into(), place);
    Ok(())
}

/// Whether a value has the type of its key; the error says what is expected.
fn fits(key: &str, value: &Value) -> Result<(), String> {
    let Err(error) = serde_json::from_value::<Config>(nest(key, value.clone())) else { return Ok(()) };
    let text = error.to_string();
    let expected = text.split_once("expected ").map_or(text.as_str(), |(_, expected)| expected);
    Err(match expected {
        "u32" => "a whole number from 0 to 4294967295".into(),
        "i32" => "a whole number".into(),
        "a boolean" => "true or false".into(),
        "a sequence" => "a list".into(),
        "path string" | "a string" => "a text".into(),
        other if other.len() < text.len() => other.replace('`', "\""),
        other => format!("something else: {other}"),
    })
}

fn nest(key: &str, value: Value) -> Value {
    key.rsplit('.').fold(value, |value, name| Value::Object([(name.to_owned(), value)].into_iter().collect()))
}

fn merged(under: Value, over: Value) -> Value {
    match (under, over) {
        (Value::Object(mut under), Value::Object(over)) => {
            for (name, value) in over {
                let value = match under.remove(&name) {
                    Some(old) => merged(old, value),
                    None => value,
                };
                under.insert(name, value);
            }
            Value::Object(under)
        }
        (_, over) => over,
    }
}

fn at<'a>(tree: &'a Value, key: &str) -> Option<&'a Value> {
    key.split('.').try_fold(tree, |tree, name| tree.get(name))
}

/// A path, or each path of a list, as seen from where it was written; `~/` is the user's home.
fn based(value: Value, base: &Path) -> Value {
    match value {
        Value::String(path) => {
            let home = path.strip_prefix("~/").and_then(|rest| etcetera::home_dir().ok().map(|home| home.join(rest)));
            let full = home.unwrap_or_else(|| base.join(&path));
            Value::from(full.to_string_lossy().into_owned())
        }
        Value::Array(paths) => paths.into_iter().map(|path| based(path, base)).collect(),
        other => other,
    }
}

fn show(key: &str, value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        _ if SECRETS.contains(&key) => "(hidden)".into(),
        Value::String(text) if key == "lattice.nats.url" => without_password(text),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.iter().all(Value::is_string) => items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// Addresses of servers, without what stands before their `@`.
pub(crate) fn without_password(urls: &str) -> String {
    let hide = |url: &str| match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => format!("{}(hidden){}", &url[..scheme + 3], &url[at..]),
        (None, Some(at)) => format!("(hidden){}", &url[at..]),
        _ => url.to_owned(),
    };
    urls.split(',').map(hide).collect::<Vec<_>>().join(",")
}

fn show_bad(key: &str, value: &Value) -> String {
    if SECRETS.contains(&key) { "(hidden)".into() } else { shown_json(&hide_variables(value.clone())) }
}

fn shown_json(value: &Value) -> String {
    value.to_string().chars().take(80).collect()
}

/// Variables that a runner sets may hold secrets.
fn hide_variables(mut value: Value) -> Value {
    if let Some(Value::Object(env)) = value.get_mut("env") {
        env.values_mut().for_each(|value| *value = "(hidden)".into());
    }
    value
}

/// The known word that is most like this one.
pub(crate) fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let last = |text: &str| text.rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
    let likeness = |candidate: &str| {
        let whole = strsim::normalized_damerau_levenshtein(&word.to_ascii_lowercase(), &candidate.to_ascii_lowercase());
        let name = strsim::normalized_damerau_levenshtein(&last(word), &last(candidate));
        whole + name / 2.0
    };
    known.into_iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)).then_with(|| b.cmp(a))).map(str::to_owned)
}
