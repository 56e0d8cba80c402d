//! Subagents of Claude Code: what their files say, and how one is run by the `claude` program.

use std::path::{Path, PathBuf};

use super::{Flaw, Place, keys, program};
use crate::config::yaml::{Content, Node};
use crate::model::agent::{Command, RunnerSpec};

/// Keys of Claude Code's subagents that our own format does not have.
pub(super) const KEYS: [&str; 16] = [
    "tools",
    "disallowedTools",
    "model",
    "color",
    "permissionMode",
    "skills",
    "hooks",
    "mcpServers",
    "maxTurns",
    "memory",
    "background",
    "effort",
    "isolation",
    "initialPrompt",
    "version",
    "author",
];
/// Keys that hold an agent back; dropping them silently would let it do more than its author allows.
pub(super) const BOUNDS: [&str; 3] = ["tools", "disallowedTools", "permissionMode"];
const ENV_PASS: [&str; 10] = [
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "ANTHROPIC_BASE_URL",
    "ANTHROPIC_MODEL",
    "CLAUDE_CONFIG_DIR",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_VERTEX",
    "HTTPS_PROXY",
    "NO_PROXY",
];

/// Whether a file stands in a folder that belongs to Claude Code.
pub(super) fn is_home(file: &Path) -> bool {
    home(file).is_some()
}

/// The folder that holds the `.claude/agents` of a file.
fn home(file: &Path) -> Option<&Path> {
    let agents = file.ancestors().skip(1).find(|dir| dir.ends_with(".claude/agents"))?;
    agents.parent()?.parent()
}

/// How a subagent is run: by `claude`, in the project that its folder belongs to.
pub(super) fn runner(tree: &Node, place: Place<'_>) -> Result<RunnerSpec, Flaw> {
    let model = keys::text(tree, "model")?.filter(|model| model != "inherit");
    let allowed = tools(tree, "tools")?;
    let denied = tools(tree, "disallowedTools")?;
    let mode = keys::text(tree, "permissionMode")?;
    if program::find("claude", place.path_env).is_none() {
        return Ok(RunnerSpec::Missing(
            "the file names no runner, and there is no claude program on PATH: install Claude Code, give the file a runner, or set \
             agents.default_runner in lattice.yaml"
                .into(),
        ));
    }
    let mut command: Vec<String> = ["claude", "--print", "--append-system-prompt", "{prompt}"].map(str::to_owned).into();
    let flags = [("--model", model), ("--allowedTools", allowed), ("--disallowedTools", denied), ("--permission-mode", mode)];
    for (flag, value) in flags.into_iter().filter_map(|(flag, value)| Some((flag, value?))) {
        command.extend([flag.to_owned(), value]);
    }
    command.extend(["--".to_owned(), "{task}".to_owned()]);
    Ok(RunnerSpec::Command(Command {
        command,
        interactive: false,
        cwd: project(place),
        env_pass: ENV_PASS.map(str::to_owned).into(),
        env: Default::default(),
    }))
}

/// The folder to work in: the one that holds `.claude`, else the one that holds the folder of agents.
fn project(place: Place<'_>) -> Option<PathBuf> {
    let root = std::path::absolute(place.root).ok()?;
    let file = std::path::absolute(place.file).ok()?;
    home(&file).or_else(|| root.parent()).map(Path::to_owned)
}

/// A list of tools, which stands there as a list or with commas.
fn tools(tree: &Node, key: &str) -> Result<Option<String>, Flaw> {
    let list = match tree.get(key).map(|node| &node.content) {
        Some(Content::List(_)) => keys::texts(tree, key)?.join(","),
        _ => keys::text(tree, key)?.map(|text| text.split(',').map(str::trim).collect::<Vec<_>>().join(",")).unwrap_or_default(),
    };
    Ok(Some(list).filter(|list| !list.is_empty() && list != "*"))
}
