//! Markdown files: our own format, and Claude Code subagents, which are the same without our keys.

use super::{Flaw, Place, claude, front_matter, keys, unavailable};
use crate::config::yaml::Node;
use crate::model::agent::{Definition, Manifest, Prompt};

/// Reads an agent out of a Markdown file.
pub(super) fn read(text: &str, place: Place<'_>) -> Result<Definition, Flaw> {
    let file = front_matter::split(text)?;
    let tree = &file.tree;
    check_keys(tree, place)?;
    let name = keys::name(tree, &keys::stem(place.file))?;
    let description = keys::description(tree)?;
    let runner = keys::runner_or_default(tree, place)?;
    let manifest = Manifest {
        name,
        description,
        capabilities: keys::texts(tree, "capabilities")?,
        input_schema: keys::schema(tree, "input")?,
        output_schema: keys::schema(tree, "output")?,
        examples: keys::texts(tree, "examples")?,
        limits: keys::limits(tree)?,
        retry: keys::retry(tree)?,
        unavailable: unavailable(&runner, place.file, place.path_env),
    };
    Ok(Definition { manifest, prompt: Prompt::Plain(file.body.trim().to_owned()), runner, source: Some(place.file.to_owned()) })
}

/// In our own format a key that we don't know is an error. A subagent of Claude Code may have keys that are news to us,
/// unless they look like a slip of one of ours.
fn check_keys(tree: &Node, place: Place<'_>) -> Result<(), Flaw> {
    let known: Vec<&str> = ["name", "description"].into_iter().chain(keys::OWN).chain(claude::KEYS).collect();
    let is_ours = keys::OWN.iter().any(|key| tree.get(key).is_some());
    if claude::is_home(place.file) {
        return Ok(());
    }
    if !is_ours {
        return keys::no_typos(tree, &known);
    }
    keys::only(tree, "", &known)?;
    let bound = tree.entries().iter().find(|entry| claude::BOUNDS.contains(&entry.key.as_str()));
    match bound.filter(|_| tree.get("runner").is_some()) {
        Some(entry) => Err(Flaw::at(
            entry.line,
            format!("{:?} has no effect beside a runner: only Claude Code keeps to it, so say it in runner.command", entry.key),
        )),
        None => Ok(()),
    }
}
