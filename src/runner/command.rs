//! The command runner: one program per attempt, started directly and talked to over its standard streams.

mod claim;
mod directive;
mod environment;
mod folder;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod log;
mod orphans;
mod placeholder;
mod progress;
mod prompt;
mod result;
mod schema;
mod shared;
mod shell;
mod spool;
mod start;
mod stdin;
mod streams;
mod tree;

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::pin::pin;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rustix::process::{Pid, Signal};
use serde_json::json;
use tokio::process::Child;
use tokio::sync::{OnceCell, mpsc};

use self::folder::{Base, Folder};
use self::log::Log;
use self::progress::Throttle;
use self::result::Check;
use self::schema::Schemas;
use self::shared::Shared;
use self::spool::Spool;
use self::start::Start;
use self::streams::{GRACE, Heard, Stdout, read_stderr};
use self::tree::{Mark, Tree};
use super::input::Input;
use super::{Answer, Context, Ended, Line, Order, Runner, kind_of};
use crate::model::agent;
use crate::model::budget::Usage;
use crate::model::event::{Failure, FailureKind};
use crate::model::id::InstanceId;

/// EX_TEMPFAIL of sysexits.h.
const TRY_AGAIN: i32 = 75;
/// How long the end of a stopped program is waited for, once nothing of it was found alive.
const REAP_MAX: Duration = Duration::from_secs(5);

/// What all programs of a station share.
pub struct Shop {
    context: Context,
    schemas: Schemas,
    base: OnceCell<Arc<Base>>,
}

impl Shop {
    /// Nothing is touched on disk before the first run.
    pub fn new(context: Context) -> Self {
        Self { context, schemas: Schemas::default(), base: OnceCell::new() }
    }

    fn supervisor(&self) -> String {
        format!("{}:{}", std::process::id(), self.context.instance)
    }

    /// Removes logs that nobody has written to for this long.
    pub(in crate::runner) async fn drop_old_logs(&self, max_age: std::time::Duration) {
        let logs = self.context.data_dir.join("logs");
        let dropped = blocking(move || log::drop_older(&logs, max_age)).await;
        if let Err(failure) = dropped {
            tracing::warn!(reason = failure.message, "old logs could not be removed");
        }
    }

    /// Holds this process's lock, if it is not held yet.
    pub(in crate::runner) async fn attest(&self) -> Result<(), Failure> {
        self.base().await.map(|_| ())
    }

    /// Whether a process that held its lock in this data folder is dead.
    pub(in crate::runner) async fn is_gone(&self, process: InstanceId) -> bool {
        let data_dir = self.context.data_dir.clone();
        let looked = tokio::task::spawn_blocking(move || folder::is_gone(&data_dir, &process.to_string()));
        process != self.context.instance && looked.await.unwrap_or(false)
    }

    async fn base(&self) -> Result<Arc<Base>, Failure> {
        let open = || async {
            let (data_dir, instance) = (self.context.data_dir.clone(), self.context.instance.to_string());
            let opened = tokio::task::spawn_blocking(move || Base::open(&data_dir, &instance)).await;
            opened.map_err(std::io::Error::other).flatten().map(Arc::new)
        };
        let opened = self.base.get_or_try_init(open).await;
        opened
            .cloned()
            .map_err(|error| Failure::new(kind_of(&error, FailureKind::Unstartable), format!("the data folder cannot be used: {error}")))
    }

    fn check(&self, definition: &agent::Definition) -> Result<Option<Check>, Failure> {
        let Some(schema) = &definition.manifest.output_schema else { return Ok(None) };
        match self.schemas.get(schema) {
            Ok(validator) => Ok(Some(Check { schema: Arc::new(schema.clone()), validator })),
            Err(error) => {
                let text = format!("the output schema of agent {} is not a JSON Schema: {error}", definition.manifest.name);
                Err(Failure::new(FailureKind::Unstartable, text))
            }
        }
    }

    /// The client configuration through which a run uses the lattice's tools.
    fn mesh_config(&self, order: &Order) -> String {
        let mesh = &self.context.mesh;
        let bound = [
            ("LATTICE_BOUND_WORK", order.assignment.work_id.to_string()),
            ("LATTICE_BOUND_RUN", order.assignment.orchestrator_run_id.to_string()),
            ("LATTICE_BOUND_ATTEMPT", order.attempt.to_string()),
        ];
        let mut env: BTreeMap<&str, &str> = mesh.env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        env.extend(bound.iter().map(|(name, value)| (*name, value.as_str())));
        let server = json!({ "command": mesh.program.to_string_lossy(), "args": mesh.args, "env": env });
        json!({"mcpServers": {"lattice": server}}).to_string()
    }
}

/// Executes an agent by its program.
pub struct Program {
    shop: Arc<Shop>,
    spec: agent::Command,
}

#[async_trait]
impl Runner for Program {
    async fn run(&self, order: Order, line: Line) -> Ended {
        let Line { reports, answers, stop } = line;
        let shared = Shared::new(reports, stop);
        // Without anybody to read them, answers are refused rather than kept.
        let answers = Some(answers).filter(|_| self.spec.interactive);
        self.attempt(&order, answers, &shared).await.unwrap_or_else(Ended::Failed)
    }
}

impl Program {
    /// Runs this program for each of its attempts.
    pub fn new(shop: Arc<Shop>, spec: agent::Command) -> Self {
        Self { shop, spec }
    }

    async fn attempt(&self, order: &Order, answers: Option<mpsc::Receiver<Answer>>, shared: &Shared) -> Result<Ended, Failure> {
        let shop = &*self.shop;
        let context = &shop.context;
        let check = shop.check(&order.definition)?;
        let input = Input::of(&order.assignment, &context.blobs).await?.with_refuted(order.refuted.as_ref());
        let mut start = Start::prepare(&self.spec, order, &input, &context.runner.env_pass).await?;
        let base = shop.base().await?;
        if order.attempt > 1 {
            shop.stop_older_attempts(order.assignment.work_id, order.attempt).await;
        }
        if shared.stop.is_cancelled() {
            return Ok(Ended::Stopped);
        }
        let name = format!("{}.{}", order.assignment.work_id, order.attempt);
        let folder = {
            let (running, name, supervisor, mesh) = (base.running.clone(), name.clone(), shop.supervisor(), shop.mesh_config(order));
            blocking(move || Folder::create(&running, &name, &supervisor, &mesh)).await?
        };
        let log_path = base.logs.join(format!("{name}.log"));
        let log = Log::create(&log_path, context.runner.log_max).await;
        let log = log.map_err(|error| unusable(&folder::named(&log_path, &error)))?;
        start.environment.insert("LATTICE_SUPERVISOR".into(), shop.supervisor().into());
        start.environment.insert("LATTICE_MCP_CONFIG".into(), folder.mesh_config().into());
        let child = start.spawn().await?;
        let tree = Tree::new(Mark {
            group: child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)),
            entries: vec![
                format!("LATTICE_WORK_ID={}", order.assignment.work_id),
                format!("LATTICE_ATTEMPT={}", order.attempt),
                format!("LATTICE_SUPERVISOR={}", shop.supervisor()),
            ],
        });
        let run =
            Run { context, shared, child, tree, spool: Spool::new(folder.path.join("output"), context.results.inline_max.as_usize()) };
        let begin = stdin::start(order, &start.prompt);
        let ended = match run.finish(begin, &input, answers, log).await {
            Done::Stopped(heard) => {
                if let Some(output) = result::printed(context, *heard).await {
                    shared.printed(output).await;
                }
                Ok(Ended::Stopped)
            }
            Done::Exited { status, heard, evidence } => match verdict(status, heard.failure.clone(), evidence) {
                Some(failure) => Err(failure),
                None if shared.is_asking() && heard.result.is_none() => Ok(Ended::Parked),
                None => result::deliver(context, check, *heard).await.map(Ended::Complete),
            },
            Done::Trouble(failure) => Err(failure),
        };
        let _ = tokio::task::spawn_blocking(move || drop(folder)).await;
        ended
    }
}

async fn blocking<T: Send + 'static>(act: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(act).await;
    done.map_err(std::io::Error::other).flatten().map_err(|error| unusable(&error))
}

/// The disk may have room again for the next attempt.
fn unusable(error: &std::io::Error) -> Failure {
    Failure::new(kind_of(error, FailureKind::Crashed), format!("the run's files could not be made: {error}"))
}

/// A program that runs.
struct Run<'a> {
    context: &'a Context,
    shared: &'a Shared,
    child: Child,
    tree: Tree,
    spool: Spool,
}

/// How a program ended.
enum Done {
    Exited { status: ExitStatus, heard: Box<Heard>, evidence: Option<String> },
    Stopped(Box<Heard>),
    Trouble(Failure),
}

impl Run<'_> {
    /// Talks to the program until nothing of it runs any more.
    async fn finish(mut self, begin: String, input: &Input, answers: Option<mpsc::Receiver<Answer>>, log: Log) -> Done {
        let (context, shared) = (self.context, self.shared);
        let pipes = (self.child.stdin.take(), self.child.stdout.take(), self.child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
            return Done::Trouble(Failure::new(FailureKind::Crashed, "the program was started without its streams"));
        };
        let reader = Stdout {
            shared,
            spool: self.spool,
            throttle: Throttle::new(context.progress_per_second),
            line_max: context.runner.line_max,
            output_max: context.runner.output_max,
            used: Usage::default(),
        };
        let listening = async {
            let both = tokio::join!(reader.read(stdout), read_stderr(stderr, log, shared));
            shared.heard.cancel();
            both
        };
        // Standard input closes when all is written, or with this future: when the program has ended.
        let feeding = stdin::feed(stdin, begin, input, answers, shared);
        let (child, tree) = (&mut self.child, &mut self.tree);
        let supervising = async move {
            let status = {
                let mut feeding = pin!(feeding);
                let mut fed = false;
                loop {
                    tokio::select! {
                        biased;
                        status = child.wait() => break Some(status),
                        () = shared.stop.cancelled() => break None,
                        () = shared.raised.cancelled() => break None,
                        () = &mut feeding, if !fed => fed = true,
                    }
                }
            };
            if status.is_some() {
                // Whatever it started may still print what belongs to the result, but not for long.
                let _ = tokio::time::timeout(GRACE, shared.heard.cancelled()).await;
            }
            tree.stop(context.kill_after).await;
            shared.drain.cancel();
            match status {
                Some(status) => Some(status),
                None => {
                    let _ = tokio::time::timeout(REAP_MAX, child.wait()).await;
                    None
                }
            }
        };
        let ((heard, mut log), status) = tokio::join!(listening, supervising);
        if let Some(note) = shared.noted() {
            let _ = log.note(note).await;
        }
        match (shared.trouble(), status) {
            (Some(failure), Some(_)) => Done::Trouble(failure.clone()),
            (Some(failure), None) if !shared.stop.is_cancelled() => Done::Trouble(failure.clone()),
            (_, None) => Done::Stopped(Box::new(heard)),
            (_, Some(Ok(status))) => Done::Exited { status, heard: Box::new(heard), evidence: log.evidence() },
            (_, Some(Err(error))) => Done::Trouble(Failure::new(FailureKind::Crashed, format!("its end could not be awaited: {error}"))),
        }
    }
}

/// The failure that the program's own word, or else its exit status, stands for, if it does.
fn verdict(status: ExitStatus, said: Option<Failure>, evidence: Option<String>) -> Option<Failure> {
    if let Some(said) = said {
        return Some(Failure { exit_code: status.code(), evidence, ..said });
    }
    let (kind, text) = match (status.code(), status.signal()) {
        (Some(0), _) => return None,
        (Some(TRY_AGAIN), _) => (FailureKind::Transient, "the program asked to be tried again (exit code 75)".to_owned()),
        (Some(code), _) => (FailureKind::Agent, format!("the program ended with exit code {code}")),
        (None, Some(signal)) => (FailureKind::Agent, format!("the program was killed by {}", signal_name(signal))),
        (None, None) => (FailureKind::Agent, format!("the program ended unexpectedly: {status}")),
    };
    Some(Failure { exit_code: status.code(), evidence, ..Failure::new(kind, text) })
}

fn signal_name(raw: i32) -> String {
    match Signal::from_named_raw(raw) {
        Some(Signal::KILL) => "SIGKILL, which may mean that memory ran out".to_owned(),
        Some(signal) => format!("{signal:?}").replace("Signal::", "SIG"),
        None => format!("signal {raw}"),
    }
}
