//! The clients: what each is called, how its file is written, and what an entry looks like in it.
//!
//! After each client's own documentation; where one has a command of its own that adds a server, the entry is what that command writes.

use std::path::PathBuf;

use serde_json::Value;

use super::format::Format;
use super::node::Node;

/// An MCP client that we know how to register in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "they are names")]
pub enum Client {
    ClaudeDesktop,
    ClaudeCode,
    Cursor,
    VsCode,
    Codex,
    Opencode,
    GeminiCli,
    Zed,
    Windsurf,
}

/// For whom an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// For this user, in every folder.
    User,
    /// For everybody who works in this folder.
    Project,
}

/// How a client reaches us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Server {
    /// It starts this program.
    Stdio {
        /// The program.
        command: String,
        /// Its arguments.
        args: Vec<String>,
    },
    /// It calls a server that runs already.
    Http {
        /// Where.
        url: String,
        /// The variable with the token that it sends.
        token_env: Option<String>,
    },
}

/// What a client cannot be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Lack {
    /// Its file has no servers over HTTP.
    #[error("its file takes no server over HTTP (Settings > Connectors does); leave out --http, so that it starts lattice-mcp itself")]
    Http,
    /// Its file can name no variable.
    #[error("its file can name no variable, and a token does not belong into it; leave out --token-env, or out --http")]
    TokenEnv,
}

impl Client {
    /// All of them, in the order in which they are listed.
    pub const ALL: [Self; 9] = [
        Self::ClaudeDesktop,
        Self::ClaudeCode,
        Self::Cursor,
        Self::VsCode,
        Self::Codex,
        Self::Opencode,
        Self::GeminiCli,
        Self::Zed,
        Self::Windsurf,
    ];

    /// The client of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|client| client.name() == name)
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::ClaudeDesktop => "claude-desktop",
            Self::ClaudeCode => "claude-code",
            Self::Cursor => "cursor",
            Self::VsCode => "vscode",
            Self::Codex => "codex",
            Self::Opencode => "opencode",
            Self::GeminiCli => "gemini-cli",
            Self::Zed => "zed",
            Self::Windsurf => "windsurf",
        }
    }

    /// Its name for people.
    pub fn title(self) -> &'static str {
        match self {
            Self::ClaudeDesktop => "Claude Desktop",
            Self::ClaudeCode => "Claude Code",
            Self::Cursor => "Cursor",
            Self::VsCode => "VS Code",
            Self::Codex => "Codex",
            Self::Opencode => "opencode",
            Self::GeminiCli => "Gemini CLI",
            Self::Zed => "Zed",
            Self::Windsurf => "Windsurf",
        }
    }

    /// The programs by which it is known to be installed.
    pub(super) fn programs(self) -> &'static [&'static str] {
        match self {
            Self::ClaudeDesktop => &["claude-desktop"],
            Self::ClaudeCode => &["claude"],
            Self::Cursor => &["cursor", "cursor-agent"],
            Self::VsCode => &["code"],
            Self::Codex => &["codex"],
            Self::Opencode => &["opencode"],
            Self::GeminiCli => &["gemini"],
            Self::Zed => &["zed", "zeditor"],
            Self::Windsurf => &["windsurf"],
        }
    }

    /// How its file is written.
    pub fn format(self) -> Format {
        match self {
            // These two read with a strict parser, and a file with comments would be none to them.
            Self::ClaudeDesktop | Self::ClaudeCode => Format::Json,
            Self::Codex => Format::Toml,
            _ => Format::Jsonc,
        }
    }

    /// The keys below which its entries stand.
    pub(super) fn section(self, text: &str) -> &'static [&'static str] {
        match self {
            Self::VsCode => &["servers"],
            Self::Codex => &["mcp_servers"],
            Self::Zed => &["context_servers"],
            // Version 2 has a table of its own for servers, and reads the older form as well.
            Self::Opencode if self.format().entries(text, &["mcp", "servers"]).is_ok_and(|servers| is_table_of_servers(&servers)) => {
                &["mcp", "servers"]
            }
            Self::Opencode => &["mcp"],
            _ => &["mcpServers"],
        }
    }

    /// What a file begins with when there is none.
    pub(super) fn seed(self) -> &'static str {
        match self {
            // It would put this line in by itself.
            Self::Opencode => "{\n  \"$schema\": \"https://opencode.ai/config.json\"\n}\n",
            _ => "",
        }
    }

    /// What has to happen before the client knows.
    pub fn next_step(self, scope: Scope) -> &'static str {
        match (self, scope) {
            (Self::ClaudeDesktop, _) => "quit Claude Desktop and start it again",
            (Self::ClaudeCode, Scope::User) => "the next session has it; claude mcp list shows it",
            (Self::ClaudeCode, Scope::Project) => "the next session in this folder asks whether to trust it",
            (Self::Cursor, _) => "switch it on under Settings > MCP",
            (Self::VsCode, _) => "run the command MCP: List Servers and start it",
            (Self::Codex, Scope::User) => "the next session has it; codex mcp list shows it",
            (Self::Codex, Scope::Project) => "the next session in this folder has it, if Codex trusts the folder",
            (Self::Opencode, _) => "the next session has it; opencode mcp list shows it",
            (Self::GeminiCli, _) => "the next session in a trusted folder has it; gemini mcp list shows it",
            (Self::Zed, _) => "Zed starts it by itself; the settings of its agent panel show it",
            (Self::Windsurf, _) => "press refresh under Cascade's MCP servers",
        }
    }

    /// What is written for a server.
    ///
    /// # Errors
    /// The client has no way to say it.
    pub fn entry(self, server: &Server) -> Result<Node, Lack> {
        match server {
            Server::Stdio { command, args } => Ok(self.stdio(command, args)),
            Server::Http { url, token_env } => self.http(url, token_env.as_deref()),
        }
    }

    fn stdio(self, command: &str, args: &[String]) -> Node {
        let (program, arguments) = (Node::text(command), Node::List(args.to_vec()));
        match self {
            Self::ClaudeCode | Self::Cursor | Self::VsCode => {
                Node::map([("type", Node::text("stdio")), ("command", program), ("args", arguments)])
            }
            Self::Opencode => {
                let whole = std::iter::once(command.to_owned()).chain(args.iter().cloned()).collect();
                Node::map([("type", Node::text("local")), ("command", Node::List(whole))])
            }
            Self::Zed => Node::map([("source", Node::text("custom")), ("command", program), ("args", arguments)]),
            _ => Node::map([("command", program), ("args", arguments)]),
        }
    }

    fn http(self, url: &str, token_env: Option<&str>) -> Result<Node, Lack> {
        let mut pairs = match self {
            Self::ClaudeDesktop => return Err(Lack::Http),
            Self::ClaudeCode | Self::VsCode => vec![("type", Node::text("http")), ("url", Node::text(url))],
            Self::Opencode => vec![("type", Node::text("remote")), ("url", Node::text(url))],
            Self::GeminiCli => vec![("httpUrl", Node::text(url))],
            Self::Windsurf => vec![("serverUrl", Node::text(url))],
            Self::Zed => vec![("source", Node::text("custom")), ("url", Node::text(url))],
            Self::Cursor | Self::Codex => vec![("url", Node::text(url))],
        };
        let bearer = |variable: String| ("headers", Node::map([("Authorization", Node::text(format!("Bearer {variable}")))]));
        match (self, token_env) {
            (_, None) => {}
            (Self::Zed, Some(_)) => return Err(Lack::TokenEnv),
            (Self::Codex, Some(name)) => pairs.push(("bearer_token_env_var", Node::text(name))),
            (Self::Cursor | Self::VsCode | Self::Windsurf, Some(name)) => pairs.push(bearer(format!("${{env:{name}}}"))),
            (Self::Opencode, Some(name)) => pairs.push(bearer(format!("{{env:{name}}}"))),
            (_, Some(name)) => pairs.push(bearer(format!("${{{name}}}"))),
        }
        Ok(Node::Map(pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()))
    }

    /// The keys of the other kind of entry, which may not stay when an entry changes its kind.
    pub(super) fn obsolete(self, server: &Server) -> Vec<&'static str> {
        let stdio = ["command", "args", "env", "environment"];
        let http = ["url", "httpUrl", "serverUrl", "headers", "bearer_token_env_var"];
        match server {
            Server::Stdio { .. } => http.to_vec(),
            Server::Http { .. } => stdio.to_vec(),
        }
    }
}

/// Whether an entry starts this program, wherever it stands.
pub(super) fn starts_us(entry: &Value) -> bool {
    let command = match entry.get("command") {
        Some(Value::String(command)) => command.as_str(),
        Some(Value::Array(parts)) => parts.first().and_then(Value::as_str).unwrap_or_default(),
        // Zed's older form.
        Some(Value::Object(inner)) => inner.get("path").and_then(Value::as_str).unwrap_or_default(),
        _ => return false,
    };
    let name = command.rsplit(['/', '\\']).next().unwrap_or_default();
    name.strip_suffix(".exe").unwrap_or(name) == env!("CARGO_PKG_NAME")
}

/// The address of an entry that calls a server.
pub(super) fn address(entry: &Value) -> Option<&str> {
    ["url", "httpUrl", "serverUrl"].iter().find_map(|key| entry.get(key)?.as_str())
}

fn is_table_of_servers(servers: &serde_json::Map<String, Value>) -> bool {
    !servers.is_empty() && servers.values().all(Value::is_object)
}

/// The entry's file, and whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The client.
    pub client: Client,
    /// For whom.
    pub scope: Scope,
    /// Where.
    pub file: PathBuf,
}
