//! Where each client keeps its configuration: a function of the platform, the environment and what is there, so that every platform's
//! places can be told on any of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::client::{Client, Scope};

/// An operating system, as far as places depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "they are names")]
pub enum Platform {
    Linux,
    MacOs,
    Windows,
}

impl Platform {
    /// The one this program runs on; what is neither of the others keeps its files as Linux does.
    pub fn here() -> Self {
        match std::env::consts::OS {
            "macos" => Self::MacOs,
            "windows" => Self::Windows,
            _ => Self::Linux,
        }
    }
}

/// What a place depends on.
pub struct Around<'a> {
    /// The operating system.
    pub platform: Platform,
    /// The environment.
    pub env: &'a BTreeMap<String, String>,
    /// The folder of a project.
    pub project: &'a Path,
    /// Whether something is there.
    pub exists: &'a dyn Fn(&Path) -> bool,
}

/// Why there is no place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Nowhere {
    /// A variable is missing.
    #[error("{0} is not set, and without it nobody knows where the file is")]
    Unset(String),
    /// The client knows only the user's servers.
    #[error("it has no servers of a project: leave out --scope project")]
    NoProject,
}

/// The file of a client.
///
/// # Errors
/// There is none for this scope, or the environment does not say where.
pub fn file_of(client: Client, scope: Scope, around: &Around<'_>) -> Result<PathBuf, Nowhere> {
    match scope {
        Scope::User => of_user(client, around),
        Scope::Project => of_project(client, around).ok_or(Nowhere::NoProject),
    }
}

/// The folders whose presence tells that a client is installed; the file itself tells as well.
pub fn marks_of(client: Client, around: &Around<'_>) -> Vec<PathBuf> {
    let file = of_user(client, around).ok();
    match client {
        // Its file stands in the home folder.
        Client::ClaudeCode => around.home().map(|home| around.join(home, &[".claude"])).into_iter().chain(file).collect(),
        _ => file.as_deref().and_then(|file| around.parent(file)).into_iter().collect(),
    }
}

fn of_user(client: Client, around: &Around<'_>) -> Result<PathBuf, Nowhere> {
    let home = |parts: &[&str]| around.home().map(|home| around.join(home, parts));
    match client {
        Client::ClaudeDesktop => claude_desktop(around),
        Client::ClaudeCode => match around.variable("CLAUDE_CONFIG_DIR") {
            Some(dir) => Ok(around.join(dir, &[".claude.json"])),
            None => home(&[".claude.json"]),
        },
        Client::Cursor => home(&[".cursor", "mcp.json"]),
        Client::VsCode => around.app(&["Code", "User", "mcp.json"]),
        Client::Codex => match around.variable("CODEX_HOME") {
            Some(dir) => Ok(around.join(dir, &["config.toml"])),
            None => home(&[".codex", "config.toml"]),
        },
        Client::Opencode => {
            let dir = around.xdg_config().map(|base| around.join(&base, &["opencode"]))?;
            Ok(around.either(&dir, "opencode.json", "opencode.jsonc"))
        }
        Client::GeminiCli => match around.variable("GEMINI_CLI_HOME") {
            Some(dir) => Ok(around.join(dir, &[".gemini", "settings.json"])),
            None => home(&[".gemini", "settings.json"]),
        },
        Client::Zed => match around.platform {
            Platform::Windows => around.app(&["Zed", "settings.json"]),
            Platform::MacOs => home(&[".config", "zed", "settings.json"]),
            Platform::Linux => around.xdg_config().map(|base| around.join(&base, &["zed", "settings.json"])),
        },
        Client::Windsurf => home(&[".codeium", "windsurf", "mcp_config.json"]),
    }
}

fn of_project(client: Client, around: &Around<'_>) -> Option<PathBuf> {
    let project = around.project.to_str()?;
    let below = |parts: &[&str]| Some(around.join(project, parts));
    match client {
        Client::ClaudeDesktop | Client::Windsurf => None,
        Client::ClaudeCode => below(&[".mcp.json"]),
        Client::Cursor => below(&[".cursor", "mcp.json"]),
        Client::VsCode => below(&[".vscode", "mcp.json"]),
        Client::Codex => below(&[".codex", "config.toml"]),
        Client::Opencode => Some(around.either(around.project, "opencode.json", "opencode.jsonc")),
        Client::GeminiCli => below(&[".gemini", "settings.json"]),
        Client::Zed => below(&[".zed", "settings.json"]),
    }
}

fn claude_desktop(around: &Around<'_>) -> Result<PathBuf, Nowhere> {
    const FILE: &str = "claude_desktop_config.json";
    if around.platform == Platform::Windows
        && let Some(local) = around.variable("LOCALAPPDATA")
    {
        // The packaged program sees a folder of its own instead of the usual one.
        let package = around.join(local, &["Packages", "Claude_pzs8sxrjxfjjc"]);
        if (around.exists)(&package) {
            return Ok(around.join(&package.to_string_lossy(), &["LocalCache", "Roaming", "Claude", FILE]));
        }
    }
    around.app(&["Claude", FILE])
}

impl Around<'_> {
    fn variable(&self, name: &str) -> Option<&str> {
        self.env.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn need(&self, name: &str) -> Result<&str, Nowhere> {
        self.variable(name).ok_or_else(|| Nowhere::Unset(name.to_owned()))
    }

    fn home(&self) -> Result<&str, Nowhere> {
        self.need(if self.platform == Platform::Windows { "USERPROFILE" } else { "HOME" })
    }

    /// Where programs with windows keep their settings.
    fn app(&self, parts: &[&str]) -> Result<PathBuf, Nowhere> {
        match self.platform {
            Platform::Windows => self.need("APPDATA").map(|base| self.join(base, parts)),
            Platform::MacOs => self.home().map(|home| self.join(home, &[&["Library", "Application Support"], parts].concat())),
            Platform::Linux => self.xdg_config().map(|base| self.join(&base, parts)),
        }
    }

    /// `XDG_CONFIG_HOME`, which some programs heed on every platform; a relative one counts for nothing.
    fn xdg_config(&self) -> Result<String, Nowhere> {
        match self.variable("XDG_CONFIG_HOME").filter(|base| self.platform == Platform::Windows || base.starts_with('/')) {
            Some(base) => Ok(base.to_owned()),
            None => self.home().map(|home| self.join(home, &[".config"]).to_string_lossy().into_owned()),
        }
    }

    /// The second file where only that one is there.
    fn either(&self, dir: &Path, usual: &str, other: &str) -> PathBuf {
        let [usual, other] = [usual, other].map(|name| self.join(&dir.to_string_lossy(), &[name]));
        if !(self.exists)(&usual) && (self.exists)(&other) { other } else { usual }
    }

    /// A path as this platform writes it.
    fn join(&self, base: &str, parts: &[&str]) -> PathBuf {
        let separator = if self.platform == Platform::Windows { '\\' } else { '/' };
        let mut path = base.trim_end_matches(separator).to_owned();
        for part in parts {
            path.push(separator);
            path.push_str(part);
        }
        PathBuf::from(path)
    }

    fn parent(&self, file: &Path) -> Option<PathBuf> {
        let separator = if self.platform == Platform::Windows { '\\' } else { '/' };
        file.to_str()?.rsplit_once(separator).map(|(parent, _)| PathBuf::from(parent))
    }
}
