//! Every setting, its default, and where its value came from.

mod check;
mod http;
mod load;
mod nats;
mod network;
pub mod yaml;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::model::agent::RunnerSpec;
use crate::model::id::{LatticeId, StationId};
use crate::model::retry::{Policy, Retried};
use crate::model::size::Size;
use crate::model::time::Span;

pub use crate::model::retry::Backoff;
pub(crate) use check::is_trustworthy;
pub use http::{Algorithm, Http, HttpTls, OAuth};
#[cfg(any(test, fuzzing))]
pub(crate) use load::of_text;
pub use load::{Error, Given, Loaded, Origin, Sources, load, variables};
pub(crate) use load::{nearest, without_password};
pub use nats::{EmbeddedNats, Nats, NatsAuth, NatsTls};
pub use network::Network;

/// The name of our folders below the user's.
const FOLDER: &str = "lattice-mcp";

/// All settings.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The lattice and this station's part in it.
    pub lattice: Lattice,
    /// Where agents come from, and how they are run.
    pub agents: Agents,
    /// Limits of a run's process.
    pub runner: Runner,
    /// What answers hold of results.
    pub results: Results,
    /// The HTTP door.
    pub http: Http,
    /// The MCP tools.
    pub mcp: Mcp,
    /// What is logged to standard error, as a `tracing` filter.
    pub log: Log,
}

impl Config {
    /// Where everything is kept; none when the user has no home and no folder was given.
    pub fn data_dir(&self) -> Option<PathBuf> {
        self.lattice.data_dir.clone().or_else(user_data_dir)
    }

    /// This station's name: the one that was given, else the host's.
    pub fn station(&self) -> StationId {
        let host = || StationId::from_host(&rustix::system::uname().nodename().to_string_lossy());
        self.lattice.station.clone().unwrap_or_else(host)
    }

    /// The folders whose agent files count, the first first.
    pub fn agent_dirs(&self, cwd: &Path) -> Vec<PathBuf> {
        if !self.agents.dirs.is_empty() {
            return self.agents.dirs.iter().map(|dir| cwd.join(dir)).collect();
        }
        let user = user_dir().map(|dir| dir.join("agents"));
        [cwd.join("agents"), cwd.join(".claude/agents")].into_iter().chain(user).collect()
    }
}

/// The folder that is worked in: the nearest one above that a repository or a `lattice.yaml` marks, else this one.
pub fn workspace_of(cwd: &Path) -> &Path {
    cwd.ancestors().find(|dir| dir.join(".git").exists() || dir.join("lattice.yaml").is_file()).unwrap_or(cwd)
}

/// Our folder among the user's data, whatever folder was given; none when the user has no home.
pub fn user_data_dir() -> Option<PathBuf> {
    etcetera::choose_base_strategy().ok().map(|base| etcetera::BaseStrategy::data_dir(&base).join(FOLDER))
}

/// Our folder in the user's configuration folder; none when the user has no home.
pub fn user_dir() -> Option<PathBuf> {
    etcetera::choose_base_strategy().ok().map(|base| etcetera::BaseStrategy::config_dir(&base).join(FOLDER))
}

/// The lattice and this station's part in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lattice {
    /// The mesh's name.
    pub id: LatticeId,
    /// This station's name; the host's when absent.
    pub station: Option<StationId>,
    /// Which processes of a station may run each other's works.
    pub replicas: Replicas,
    /// Where everything is kept; the user's data folder when absent.
    pub data_dir: Option<PathBuf>,
    /// Limits of works.
    pub work: Work,
    /// What happens after a failure that is worth another try.
    pub retry: Retry,
    /// Signs of life.
    pub presence: Presence,
    /// The embedded store.
    pub storage: Storage,
    /// The server through which machines share the lattice.
    pub nats: Nats,
    /// A server of our own.
    pub embedded_nats: EmbeddedNats,
}

impl Default for Lattice {
    fn default() -> Self {
        Self {
            id: "default".parse().unwrap_or_else(|_| unreachable!("a valid name")),
            station: None,
            replicas: Replicas::Auto,
            data_dir: None,
            work: Work::default(),
            retry: Retry::default(),
            presence: Presence::default(),
            storage: Storage::default(),
            nats: Nats::default(),
            embedded_nats: EmbeddedNats::default(),
        }
    }
}

/// Which processes of a station are replicas: works that are given to an agent may be run by any of them.
///
/// One machine may have a station's name in many projects, whose agents of one name differ: there the folder decides. A fleet
/// has one set of agents in a different place on each machine: there the name does. Nothing but their owner's word tells the two
/// apart, and `leaf` under a name that was chosen for it is such a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Replicas {
    /// `by_name` for `lattice-mcp leaf` whose station is named by flag, variable or its own file; else `by_folder`.
    Auto,
    /// Those that have an agent of the name, wherever its file stands.
    ByName,
    /// Those that read the very same file.
    ByFolder,
}

/// Limits of works.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Work {
    /// How long a work may take in all, from its assignment, unless the call or the agent says otherwise.
    pub default_timeout: Span,
    /// The longest timeout that a call may ask for.
    pub timeout_max: Span,
    /// How long an agent may say nothing; absent: as long as its timeout.
    pub silence: Option<Span>,
    /// How long a work may wait for its first attempt; absent: as long as its timeout.
    pub queue_timeout: Option<Span>,
    /// How many works run at once in one process of a station: each further process of it adds as many.
    /// One that something runs below counts for nothing: it has lent its place.
    pub max_parallel: u32,
    /// How many works that may start can wait on a station's hook.
    pub queue_size: u32,
    /// How many more may wait there for other works, or for their own items.
    pub held_back_max: u32,
    /// How many bytes a task and its context may have together.
    pub input_max: Size,
    /// How many bytes an answer, or the reason of a question or of a cancel, may have.
    pub text_max: Size,
    /// Progress of a work is merged to at most this many events a second.
    pub progress_per_second: u32,
    /// While an agent says nothing, clients that wait hear from us this often.
    pub progress_interval: Span,
    /// An attempt whose process gives no sign of life for this long is taken over.
    pub lease: Span,
    /// How long running work may go on when the station stops.
    pub grace: Span,
    /// How long a program has between TERM and KILL.
    pub kill_after: Span,
    /// How long an escalated work waits for its answer.
    pub answer_timeout: Span,
    /// How long an outcome is tried to be stored while the store refuses it, as a full disk does; then another attempt follows.
    pub outcome_patience: Span,
    /// How many questions one attempt at a work may ask.
    pub questions_max: u32,
    /// The priority's bounds: from minus this to plus this.
    pub priority_max: i32,
    /// A work that has waited this long counts as one priority more urgent.
    pub ageing: Span,
    /// How deep works may assign further works.
    pub depth_max: u32,
    /// How many works one work may assign.
    pub children_max: u32,
    /// How many works there may be in all below one that no work assigned.
    pub descendants_max: u32,
    /// How many works one work may wait for.
    pub after_max: u32,
    /// How long a work may wait for others.
    pub wait_max: Span,
    /// How many items one order may have. With the order itself they fit into `descendants_max`, as it is by default.
    pub map_max: u32,
    /// How many of an order's items are worked on at once, unless the call says otherwise.
    pub map_parallel: u32,
    /// How often works that wait for others are looked at although nothing was heard.
    pub recheck: Span,
}

impl Default for Work {
    fn default() -> Self {
        Self {
            default_timeout: Span::secs(300),
            timeout_max: Span::secs(7 * 86_400),
            silence: None,
            queue_timeout: None,
            max_parallel: 10,
            queue_size: 100,
            held_back_max: 1000,
            input_max: Size::mib(8),
            text_max: Size::kib(16),
            progress_per_second: 20,
            progress_interval: Span::secs(5),
            lease: Span::secs(5),
            grace: Span::secs(10),
            kill_after: Span::secs(5),
            answer_timeout: Span::secs(24 * 3600),
            outcome_patience: Span::secs(600),
            questions_max: 100,
            priority_max: 1000,
            ageing: Span::secs(10),
            depth_max: 16,
            children_max: 100,
            descendants_max: 500,
            after_max: 100,
            wait_max: Span::secs(3 * 86_400),
            map_max: 400,
            map_parallel: 10,
            recheck: Span::secs(10),
        }
    }
}

/// What happens after a failure that is worth another try.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retry {
    /// Whether failed attempts are tried again at all.
    pub enabled: bool,
    /// How many attempts a work has.
    pub max_attempts: u32,
    /// How the wait grows.
    pub backoff: Backoff,
    /// The wait after the first failed attempt.
    pub initial_delay: Span,
    /// The longest wait.
    pub max_delay: Span,
    /// How much shorter an exponential wait may be, in percent, so that works that failed together come back apart.
    pub jitter_percent: u32,
    /// The kinds of failure that another attempt follows.
    pub on: Vec<Retried>,
    /// How long an agent pauses that is out of quota and does not say until when.
    pub quota_pause: Span,
    /// The longest that an agent may pause for its quota.
    pub quota_pause_max: Span,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            enabled: true,
            max_attempts: 3,
            backoff: Backoff::Exponential,
            initial_delay: Span::secs(1),
            max_delay: Span::secs(300),
            jitter_percent: 25,
            on: vec![Retried::Transient, Retried::Crashed, Retried::Refuted],
            quota_pause: Span::secs(60),
            quota_pause_max: Span::secs(7 * 86_400),
        }
    }
}

impl Retry {
    /// What holds for agents that say nothing of their own.
    pub fn policy(&self) -> Policy {
        Policy {
            max_attempts: if self.enabled { self.max_attempts } else { 1 },
            backoff: self.backoff,
            initial_delay: self.initial_delay.get(),
            max_delay: self.max_delay.get(),
            jitter_percent: self.jitter_percent,
            on: self.on.clone(),
        }
    }
}

/// Signs of life.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Presence {
    /// How often a station gives one.
    pub heartbeat: Span,
    /// How long it may be silent before it counts as offline.
    pub ttl: Span,
}

impl Default for Presence {
    fn default() -> Self {
        Self { heartbeat: Span::secs(10), ttl: Span::secs(30) }
    }
}

/// What a commit survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// The death of every process.
    Process,
    /// A power cut: each commit reaches the disk before it counts.
    Power,
}

/// The embedded store.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Storage {
    /// What a commit survives.
    pub durability: Durability,
    /// How long events are kept.
    pub max_age: Span,
    /// How long large inputs and results are kept: longer than any work may take and wait for an answer.
    pub blob_max_age: Span,
    /// How long settled runs are kept in the run store.
    pub runs_max_age: Span,
    /// How large the log may become before its oldest settled works are dropped.
    pub max_bytes: Size,
}

impl Default for Storage {
    fn default() -> Self {
        Self {
            durability: Durability::Process,
            max_age: Span::secs(7 * 86_400),
            blob_max_age: Span::secs(30 * 86_400),
            runs_max_age: Span::secs(90 * 86_400),
            max_bytes: Size::mib(1024),
        }
    }
}

/// Where agents come from, and how they are run.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Agents {
    /// Folders of agent files; empty: `./agents`, `./.claude/agents` and the user's `agents` folder.
    pub dirs: Vec<PathBuf>,
    /// The largest agent file.
    pub file_max: Size,
    /// How many agents one process takes in.
    pub count_max: u32,
    /// Runs agents whose file names no runner.
    pub default_runner: Option<RunnerSpec>,
}

impl Default for Agents {
    fn default() -> Self {
        Self { dirs: Vec::new(), file_max: Size::kib(256), count_max: 1000, default_runner: None }
    }
}

/// Limits of a run's process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Runner {
    /// Further variables of our own environment that programs may see, by name.
    pub env_pass: Vec<String>,
    /// How many bytes a program may print as its result.
    pub output_max: Size,
    /// How long one `::lattice` line may be.
    pub line_max: Size,
    /// How much of standard error is kept.
    pub log_max: Size,
    /// How large a result with an output schema may be: it is checked in memory.
    pub checked_max: Size,
    /// Whether whoever assigns work may name a program that checks its result here (`accept.command`).
    pub accept_commands: bool,
    /// How long such a program may take, unless the order says otherwise.
    pub accept_timeout: Span,
    /// How much such a program may print.
    pub accept_output_max: Size,
}

impl Default for Runner {
    fn default() -> Self {
        Self {
            env_pass: Vec::new(),
            output_max: Size::mib(256),
            line_max: Size::mib(1),
            log_max: Size::mib(10),
            checked_max: Size::mib(16),
            accept_commands: true,
            accept_timeout: Span::secs(60),
            accept_output_max: Size::mib(1),
        }
    }
}

/// What answers hold of results.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Results {
    /// A larger result is kept as a blob, and answers hold its digest, size and link.
    pub inline_max: Size,
    /// How much of results and of agents one answer gives at most: less than what hosts cut from an answer, also once it is escaped.
    pub selection_max: Size,
    /// The largest result that is read as a resource.
    pub resource_max: Size,
    /// How long a search in a result may take.
    pub search_timeout: Span,
}

impl Default for Results {
    fn default() -> Self {
        Self { inline_max: Size::kib(16), selection_max: Size::kib(24), resource_max: Size::kib(64), search_timeout: Span::secs(2) }
    }
}

/// The MCP tools.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mcp {
    /// How long `await_work` waits unless it is asked for longer.
    pub await_default: Span,
    /// The longest wait it may be asked for.
    pub await_max: Span,
    /// How many works one call may name.
    pub works_max: u32,
    /// How many characters the list of agents in a description may have.
    pub agents_described_max: Size,
    /// The longest message line on standard input.
    pub line_max: Size,
    /// How many requests of one connection are served at once.
    pub calls_max: u32,
    /// How many requests of all clients together are served at once.
    pub calls_in_all_max: u32,
    /// How many resources one connection may be subscribed to.
    pub subscriptions_max: u32,
    /// The workspace whose works `check_work` shows without arguments, and whose idempotency keys are shared; the folder that is worked in when absent.
    pub workspace: Option<String>,
    /// How long a person has to fill in a form.
    pub form_timeout: Span,
    /// How long a client that knows tasks waits in line before its wait becomes one.
    pub task_after: Span,
    /// How long a task is kept.
    pub task_ttl: Span,
    /// How often clients are told to ask after a task.
    pub task_poll: Span,
}

impl Default for Mcp {
    fn default() -> Self {
        Self {
            await_default: Span::secs(45),
            await_max: Span::secs(3600),
            works_max: 1000,
            agents_described_max: Size::kib(4),
            line_max: Size::mib(16),
            calls_max: 1024,
            calls_in_all_max: 16_384,
            subscriptions_max: 256,
            workspace: None,
            form_timeout: Span::secs(600),
            task_after: Span::secs(5),
            task_ttl: Span::secs(86_400),
            task_poll: Span::secs(1),
        }
    }
}

/// What is logged to standard error.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// A `tracing` filter.
    pub filter: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { filter: "warn,rmcp=error,async_nats=off".into() }
    }
}

/// A text that is never shown, nor written.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that compares it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("(hidden)")
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(hidden)")
    }
}
