//! An agent: what the lattice is told of it, and what its own station needs to run it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::id::AgentName;
use super::retry;
use super::time::Span;

/// What every registry knows of an agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its name, unique in the lattice.
    pub name: AgentName,
    /// What it is good for, in a sentence.
    pub description: String,
    /// Words to find it by.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capabilities: Vec<String>,
    /// JSON Schema that `context` is checked against.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_schema: Option<Value>,
    /// JSON Schema that its result is checked against.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_schema: Option<Value>,
    /// Tasks that show how to use it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub examples: Vec<String>,
    /// Its limits.
    #[serde(default)]
    pub limits: Limits,
    /// What it says of further attempts.
    #[serde(default, skip_serializing_if = "retry::Rules::is_empty")]
    pub retry: retry::Rules,
    /// Why it cannot run at the moment, for example a program that is not installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unavailable: Option<String>,
}

/// The limits of an agent; what is absent is decided by the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// How long a work may take in all, from its assignment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
    /// How long it may say nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silence: Option<Span>,
    /// How long a work may wait for its first attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<Span>,
    /// How many of its works may run at once in one process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_parallel: Option<u32>,
    /// How many attempts a work has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<u32>,
    /// How many attempts may start in any minute, on all replicas of the station together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_minute: Option<u32>,
}

/// An agent as its own station knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Definition {
    /// What the lattice is told.
    pub manifest: Manifest,
    /// Its prompt: the body of its file.
    pub prompt: Prompt,
    /// How it is executed.
    pub runner: RunnerSpec,
    /// The file it was read from; absent for agents that the program itself provides.
    pub source: Option<PathBuf>,
}

/// The body of an agent's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Taken as it stands.
    Plain(String),
    /// A dotprompt template: Handlebars over `context`.
    Template(String),
}

/// How an agent is executed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RunnerSpec {
    /// A program, started directly.
    Command(Command),
    /// Answers with its task at once: to try a lattice out.
    Echo,
    /// There is no way to run it yet; the text says what to do.
    #[serde(skip)]
    Missing(String),
}

impl RunnerSpec {
    /// Whether what it runs can be handed an answer while it runs.
    pub const fn hears_answers(&self) -> bool {
        matches!(self, Self::Command(Command { interactive: true, .. }))
    }
}

/// A program and how to talk to it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// Program and arguments, with placeholders; never re-parsed.
    pub command: Vec<String>,
    /// Standard input stays open, and answers arrive there as JSON lines.
    #[serde(default)]
    pub interactive: bool,
    /// Where it runs; the folder of the agent's file unless it says otherwise.
    #[serde(default)]
    pub cwd: Option<PathBuf>,
    /// Further variables to pass on from the environment, by name.
    #[serde(default)]
    pub env_pass: Vec<String>,
    /// Variables to set.
    #[serde(default)]
    pub env: std::collections::BTreeMap<String, String>,
}
