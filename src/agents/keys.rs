//! Reading keys out of front matter, with complaints that name key and line.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::Value;

use super::{Flaw, Place, claude, schema};
use crate::config::yaml::{Content, Node};
use crate::model::agent::{Command, Limits, RunnerSpec};
use crate::model::id::AgentName;
use crate::model::retry::{Backoff, Retried, Rules};
use crate::model::time::Span;

/// Keys that only our own format has.
pub(super) const OWN: [&str; 7] = ["runner", "input", "output", "limits", "retry", "capabilities", "examples"];
const LIKE: f64 = 0.7;
const NAME: &str = "name";

/// Refuses keys that are not among these.
pub(super) fn only(node: &Node, section: &str, known: &[&str]) -> Result<(), Flaw> {
    for entry in node.entries() {
        if !known.contains(&entry.key.as_str()) {
            return Err(unknown(&entry.key, entry.line, section, known));
        }
    }
    Ok(())
}

/// Refuses keys that are not among these but look like one of ours: other programs may have keys of their own.
pub(super) fn no_typos(node: &Node, known: &[&str]) -> Result<(), Flaw> {
    let like = |key: &str| OWN.iter().chain(&[NAME, "description"]).any(|own| strsim::normalized_damerau_levenshtein(own, key) >= LIKE);
    for entry in node.entries() {
        if !known.contains(&entry.key.as_str()) && like(&entry.key) {
            return Err(unknown(&entry.key, entry.line, "", known));
        }
    }
    Ok(())
}

fn unknown(key: &str, line: usize, section: &str, known: &[&str]) -> Flaw {
    let full = if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
    let nearest = crate::config::nearest(key, known.iter().copied()).unwrap_or_default();
    Flaw::at(line, format!("unknown key {full:?}: the nearest known key is {nearest:?}"))
}

/// A key that must be one text.
pub(super) fn text(tree: &Node, key: &str) -> Result<Option<String>, Flaw> {
    let Some(node) = tree.get(key).filter(|node| !node.is_null()) else { return Ok(None) };
    let text = node.text().ok_or_else(|| Flaw::at(node.line, format!("{key} must be a text")))?;
    Ok(Some(text.to_owned()).filter(|text| !text.trim().is_empty()))
}

/// A key that is a list of texts.
pub(super) fn texts(tree: &Node, key: &str) -> Result<Vec<String>, Flaw> {
    let Some(node) = tree.get(key).filter(|node| !node.is_null()) else { return Ok(Vec::new()) };
    let Content::List(items) = &node.content else {
        return Err(Flaw::at(node.line, format!("{key} must be a list of texts, like [a, b]")));
    };
    let item = |item: &Node| item.text().map(str::to_owned).ok_or_else(|| Flaw::at(item.line, format!("each of {key} must be a text")));
    items.iter().map(item).collect()
}

/// The agent's name: the key, else what the file's name gives.
pub(super) fn name(tree: &Node, from_file: &str) -> Result<AgentName, Flaw> {
    match (tree.get(NAME), text(tree, NAME)?) {
        (Some(node), Some(text)) => text.trim().parse().map_err(|error| Flaw::at(node.line, format!("{error}"))),
        _ => from_file.parse().map_err(|error| Flaw::new(format!("name is missing, and the file's own name does not do: {error}"))),
    }
}

/// The file's name without its last extension.
pub(super) fn stem(file: &Path) -> String {
    file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

/// What the agent is good for; required.
pub(super) fn description(tree: &Node) -> Result<String, Flaw> {
    let missing = || Flaw::at(2, "description is missing: say in a sentence what the agent is good for");
    text(tree, "description")?.map(|text| text.trim().to_owned()).ok_or_else(missing)
}

/// The `schema` of `input` or `output`, checked.
pub(super) fn schema(tree: &Node, section: &str) -> Result<Option<Value>, Flaw> {
    let Some(node) = tree.get(section).filter(|node| !node.is_null()) else { return Ok(None) };
    if !matches!(node.content, Content::Map(_)) {
        return Err(Flaw::at(node.line, format!("{section} must be a mapping with the key schema")));
    }
    only(node, section, &["schema"])?;
    let Some(found) = node.get("schema").filter(|node| !node.is_null()) else { return Ok(None) };
    let value = found.to_json();
    check_schema(&value, section, found.line)?;
    Ok(Some(value))
}

/// Refuses a schema that cannot be checked against.
pub(super) fn check_schema(value: &Value, section: &str, line: usize) -> Result<(), Flaw> {
    schema::compile(value).map(|_| ()).map_err(|reason| Flaw::at(line, format!("{section}.schema: {reason}")))
}

/// The agent's limits.
pub(super) fn limits(tree: &Node) -> Result<Limits, Flaw> {
    let Some(node) = tree.get("limits").filter(|node| !node.is_null()) else { return Ok(Limits::default()) };
    if !matches!(node.content, Content::Map(_)) {
        return Err(Flaw::at(node.line, "limits must be a mapping like { timeout: 10m }"));
    }
    only(node, "limits", &["timeout", "silence", "queue", "max_parallel", "max_attempts", "per_minute"])?;
    let span = |key: &str| -> Result<Option<Span>, Flaw> {
        let span: Option<Span> = parsed(node, "limits", key)?;
        match (span, node.get(key)) {
            (Some(span), Some(at)) if span == Span::millis(0) => Err(Flaw::at(at.line, format!("limits.{key} must be above 0s"))),
            _ => Ok(span),
        }
    };
    let count = |key: &str| -> Result<Option<u32>, Flaw> {
        let Some(found) = node.get(key).filter(|node| !node.is_null()) else { return Ok(None) };
        let n = found.text().and_then(|text| text.parse::<u32>().ok()).filter(|n| *n > 0);
        n.map(Some).ok_or_else(|| Flaw::at(found.line, format!("limits.{key} must be a whole number of at least 1")))
    };
    Ok(Limits {
        timeout: span("timeout")?,
        silence: span("silence")?,
        queue: span("queue")?,
        max_parallel: count("max_parallel")?,
        max_attempts: count("max_attempts")?,
        per_minute: count("per_minute")?,
    })
}

/// What the agent says of further attempts.
pub(super) fn retry(tree: &Node) -> Result<Rules, Flaw> {
    let Some(node) = tree.get("retry").filter(|node| !node.is_null()) else { return Ok(Rules::default()) };
    if !matches!(node.content, Content::Map(_)) {
        return Err(Flaw::at(node.line, "retry must be a mapping like { backoff: linear, initial_delay: 5s }"));
    }
    only(node, "retry", &["enabled", "backoff", "initial_delay", "max_delay", "on"])?;
    let enabled = match node.get("enabled").map(|found| (found.line, found.to_json())) {
        None | Some((_, Value::Null)) => None,
        Some((_, Value::Bool(enabled))) => Some(enabled),
        Some((line, _)) => return Err(Flaw::at(line, "retry.enabled must be true or false")),
    };
    let words = [("exponential", Backoff::Exponential), ("linear", Backoff::Linear), ("fixed", Backoff::Fixed)];
    let backoff = match text(node, "backoff")? {
        Some(word) => Some(among(&word, &words).map_err(|known| {
            let line = node.get("backoff").map_or(node.line, |found| found.line);
            Flaw::at(line, format!("retry.backoff is {word:?}: known are {known}"))
        })?),
        None => None,
    };
    let on = match node.get("on").filter(|found| !found.is_null()) {
        None => None,
        Some(found) => {
            let kind = |word: &String| {
                among(word, &Retried::ALL).map_err(|known| Flaw::at(found.line, format!("retry.on has {word:?}: known are {known}")))
            };
            Some(texts(node, "on")?.iter().map(kind).collect::<Result<_, _>>()?)
        }
    };
    let rules = Rules {
        enabled,
        backoff,
        initial_delay: parsed(node, "retry", "initial_delay")?,
        max_delay: parsed(node, "retry", "max_delay")?,
        on,
    };
    match (rules.initial_delay, rules.max_delay) {
        (Some(first), Some(max)) if first > max => {
            Err(Flaw::at(node.line, format!("retry.initial_delay is {first}: it is at most retry.max_delay, {max}")))
        }
        _ => Ok(rules),
    }
}

/// One of some words; else all of them.
fn among<T: Copy>(word: &str, known: &[(&str, T)]) -> Result<T, String> {
    let found = known.iter().find(|(name, _)| *name == word.trim()).map(|(_, value)| *value);
    found.ok_or_else(|| known.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", "))
}

fn parsed<T: FromStr>(node: &Node, section: &str, key: &str) -> Result<Option<T>, Flaw>
where
    T::Err: std::fmt::Display,
{
    let Some(found) = node.get(key).filter(|node| !node.is_null()) else { return Ok(None) };
    let text = found.text().ok_or_else(|| Flaw::at(found.line, format!("{section}.{key} must be a text")))?;
    text.parse().map(Some).map_err(|error| Flaw::at(found.line, format!("{section}.{key}: {error}")))
}

/// The runner that the file names, if it names one.
pub(super) fn runner(tree: &Node, place: Place<'_>) -> Result<Option<RunnerSpec>, Flaw> {
    let Some(node) = tree.get("runner").filter(|node| !node.is_null()) else { return Ok(None) };
    let kind = node.get("kind").and_then(Node::text).ok_or_else(|| {
        Flaw::at(node.line, "runner must be a mapping with a kind, like { kind: command, command: [\"./scan.sh\", \"{task}\"] }")
    })?;
    match kind {
        "echo" => only(node, "runner", &["kind"]).map(|()| Some(RunnerSpec::Echo)),
        "command" => command(node, place).map(|command| Some(RunnerSpec::Command(command))),
        other => Err(Flaw::at(
            node.get("kind").map_or(node.line, |kind| kind.line),
            format!("there is no runner of kind {other:?}: known are \"command\" and \"echo\""),
        )),
    }
}

fn command(node: &Node, place: Place<'_>) -> Result<Command, Flaw> {
    only(node, "runner", &["kind", "command", "interactive", "cwd", "env_pass", "env"])?;
    let line = node.get("command").map_or(node.line, |command| command.line);
    let as_list = |flaw: Flaw| Flaw {
        reason: format!("runner.{}: program and arguments stand apart, as in [\"./scan.sh\", \"{{task}}\"]", flaw.reason),
        ..flaw
    };
    let mut command = texts(node, "command").map_err(as_list)?;
    let Some(program) = command.first_mut().filter(|program| !program.trim().is_empty()) else {
        return Err(Flaw::at(line, "runner.command is empty: it names a program and its arguments"));
    };
    let folder = folder(place.file);
    // A path is meant from the agent's file, wherever the program will run.
    if program.contains('/') && !program.contains('{') {
        *program = folder.join(&*program).to_string_lossy().into_owned();
    }
    let interactive = match node.get("interactive").map(|node| (node.line, node.to_json())) {
        None | Some((_, Value::Null)) => false,
        Some((_, Value::Bool(interactive))) => interactive,
        Some((line, _)) => return Err(Flaw::at(line, "runner.interactive must be true or false")),
    };
    Ok(Command {
        command,
        interactive,
        cwd: text(node, "cwd")?.map(|cwd| folder.join(cwd)),
        env_pass: texts(node, "env_pass")?,
        env: variables(node)?,
    })
}

/// The folder of a file, which is absolute when it can be.
fn folder(file: &Path) -> PathBuf {
    let folder = file.parent().unwrap_or(Path::new(""));
    std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned())
}

fn variables(node: &Node) -> Result<BTreeMap<String, String>, Flaw> {
    let Some(env) = node.get("env").filter(|node| !node.is_null()) else { return Ok(BTreeMap::new()) };
    if !matches!(env.content, Content::Map(_)) {
        return Err(Flaw::at(env.line, "runner.env must be a mapping of variables"));
    }
    let variable = |entry: &crate::config::yaml::Entry| {
        let value = entry.node.text().ok_or_else(|| Flaw::at(entry.line, format!("runner.env.{} must be a text", entry.key)))?;
        if entry.key.is_empty() || entry.key.contains(['=', '\0']) {
            return Err(Flaw::at(entry.line, format!("runner.env: {:?} is not the name of a variable", entry.key)));
        }
        Ok((entry.key.clone(), value.to_owned()))
    };
    env.entries().iter().map(variable).collect()
}

/// The runner for a file that names none: the configured one, else Claude Code for its own subagents.
pub(super) fn runner_or_default(tree: &Node, place: Place<'_>) -> Result<RunnerSpec, Flaw> {
    if let Some(runner) = runner(tree, place)? {
        return Ok(runner);
    }
    Ok(match &place.settings.default_runner {
        Some(runner) => runner.clone(),
        None => claude::runner(tree, place)?,
    })
}
