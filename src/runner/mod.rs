//! How an agent is executed: one trait, and one file per way to do it.
//!
//! A runner knows one attempt at one work. It does not know hooks, leases, retries or the log: it reports,
//! takes answers, and ends.

pub mod command;
pub mod echo;
mod input;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rustix::io::Errno;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config;
use crate::model::accept::{Check, Criteria};
use crate::model::agent::{Definition, RunnerSpec};
use crate::model::assignment::Assignment;
use crate::model::budget::Usage;
use crate::model::event::{Failure, FailureKind, Needs};
use crate::model::id::InstanceId;
use crate::model::output::Output;
use crate::model::work::Exchange;
use crate::transport::{self, Blobs};

/// One attempt at one work.
#[derive(Debug, Clone)]
pub struct Order {
    /// What was ordered.
    pub assignment: Arc<Assignment>,
    /// Which attempt this is, from 1.
    pub attempt: u32,
    /// The agent.
    pub definition: Arc<Definition>,
    /// Questions of earlier attempts, with their answers.
    pub exchanges: Vec<Exchange>,
    /// Why the last claim that it is done was refuted: the agent finds it in its context.
    pub refuted: Option<Value>,
}

/// What a running agent says.
#[derive(Debug, Clone, PartialEq)]
pub enum Report {
    /// How far it is.
    Progress {
        /// 0 to 100.
        pct: Option<f64>,
        /// What it is doing.
        message: Option<String>,
    },
    /// It asks for help.
    Escalate {
        /// What it needs.
        reason: String,
        /// What helps to decide.
        context: Value,
        /// Who is asked.
        needs: Needs,
    },
    /// It has used so much more.
    Used(Usage),
    /// It printed something: a sign of life.
    Alive,
    /// What it had printed when it was stopped.
    Printed(Output),
}

/// An answer on its way to a running agent.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The question's number.
    pub ask: u32,
    /// What the agent asked.
    pub reason: String,
    /// What it said to help with the decision.
    pub context: Value,
    /// The answer.
    pub answer: Value,
}

/// The line between a leaf and a running agent.
pub struct Line {
    /// Where the agent's reports go; when it is full, the runner waits.
    pub reports: mpsc::Sender<Report>,
    /// Where answers come from: to what the agent itself has asked over this line, and to nothing else.
    pub answers: mpsc::Receiver<Answer>,
    /// Cancelled when the agent must stop: TERM, then KILL.
    pub stop: CancellationToken,
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ended {
    /// It delivered.
    Complete(Output),
    /// It failed.
    Failed(Failure),
    /// It asked, cannot wait, and ended: the answer starts another attempt.
    Parked,
    /// It was stopped from outside, and its process tree is gone.
    Stopped,
}

/// A way to execute an agent.
#[async_trait]
pub trait Runner: Send + Sync {
    /// Runs one attempt to its end. It returns only when nothing of it runs any more.
    async fn run(&self, order: Order, line: Line) -> Ended;
}

/// What every run of a station shares.
#[derive(Clone)]
pub struct Context {
    /// Where large inputs come from and large results go.
    pub blobs: Arc<dyn Blobs>,
    /// Limits of a run's process.
    pub runner: config::Runner,
    /// What counts as a large result.
    pub results: config::Results,
    /// How long a program has between TERM and KILL.
    pub kill_after: Duration,
    /// Progress is merged above this many reports a second.
    pub progress_per_second: u32,
    /// Where logs and the files of running works are kept.
    pub data_dir: PathBuf,
    /// This process.
    pub instance: InstanceId,
    /// How a run reaches the lattice's tools.
    pub mesh: MeshAccess,
}

/// The stdio server through which a run uses the lattice's tools as a child.
#[derive(Clone)]
pub struct MeshAccess {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Settings that neither they nor a file have, as variables. They may be secret.
    pub env: Vec<(String, String)>,
}

/// How long a check that cannot be made now waits until it is tried again.
const CHECK_PAUSE: Duration = Duration::from_secs(1);

/// Another kind of failure than `usual` where the system has no room for one more file or program, and where the lattice's server is
/// away: nothing is wrong with the work then, nor with its agent. Only for what comes before the agent has done anything.
fn kind_of(error: &(dyn std::error::Error + 'static), usual: FailureKind) -> FailureKind {
    let has_no_room = |code: i32| [Errno::MFILE, Errno::NFILE, Errno::AGAIN, Errno::NOMEM].iter().any(|full| code == full.raw_os_error());
    let mut codes = causes(error).filter_map(|cause| cause.downcast_ref::<std::io::Error>()?.raw_os_error());
    if is_away(error) || codes.any(has_no_room) { FailureKind::HandedBack } else { usual }
}

/// Whether it is the lattice's server that is away.
fn is_away(error: &(dyn std::error::Error + 'static)) -> bool {
    causes(error).any(|cause| {
        // What a reader of the transport's hands on is no source of its error.
        let io = cause.downcast_ref::<std::io::Error>();
        let held = io.and_then(|io| io.get_ref()?.downcast_ref()).or_else(|| cause.downcast_ref::<transport::Error>());
        matches!(held, Some(transport::Error::Unreachable(_) | transport::Error::Unanswered(_) | transport::Error::Closed))
    })
}

fn causes<'a>(error: &'a (dyn std::error::Error + 'static)) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source())
}

/// The result is there, and nothing keeps it: an attempt was made, whatever else is full here.
fn unstored(error: &transport::Error) -> Failure {
    let kind = if is_away(error) { FailureKind::HandedBack } else { FailureKind::Crashed };
    Failure::new(kind, format!("the result could not be stored: {error}"))
}

/// The runners of a station; cheap to clone.
#[derive(Clone)]
pub struct Runners {
    shop: Arc<command::Shop>,
    echo: Arc<echo::Echo>,
}

impl Runners {
    /// Builds them once; nothing is touched on disk before the first run.
    pub fn new(context: Context) -> Self {
        let echo = Arc::new(echo::Echo::new(context.blobs.clone(), context.results.inline_max));
        Self { shop: Arc::new(command::Shop::new(context)), echo }
    }

    /// At a station's start: stops what an earlier process of this data folder left running, and removes its files.
    /// Gives how many runs were stopped; elsewhere than on Linux none can be found.
    ///
    /// # Errors
    /// When the data folder cannot be used.
    pub async fn sweep_orphans(&self) -> Result<usize, Failure> {
        self.shop.sweep_orphans().await
    }

    /// Lets whoever shares this data folder see that this process lives, from now on until it ends however that may be.
    ///
    /// # Errors
    /// When the data folder cannot be used.
    pub async fn attest(&self) -> Result<(), Failure> {
        self.shop.attest().await
    }

    /// Whether a process that ran work with this data folder is dead for certain. One that sleeps is not, and of one that never said
    /// here that it lived nobody knows.
    pub async fn is_gone(&self, process: InstanceId) -> bool {
        self.shop.is_gone(process).await
    }

    /// Removes logs of runs that are older than this, now and then, until cancelled.
    pub async fn keep_logs(&self, max_age: Duration, cancel: CancellationToken) {
        const EVERY: Duration = Duration::from_secs(600);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(EVERY) => self.shop.drop_old_logs(max_age).await,
            }
        }
    }

    /// Kills all that runs for this process, for a process that leaves at once.
    pub fn kill_all(&self) {
        self.shop.kill_all();
    }

    /// Whether a claim can be checked here at all, before anything is done for it.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn can_check(&self, definition: &Definition, criteria: &Criteria) -> Result<(), Failure> {
        self.shop.can_check(definition, criteria)
    }

    /// Holds what an agent says is done against what was asked of it, outside the agent; nothing of it runs any more when this
    /// returns. `None` when it was stopped.
    ///
    /// # Errors
    /// What kept the checks from being made.
    pub async fn check(
        &self,
        order: &Order,
        criteria: &Criteria,
        result: &Output,
        stop: &CancellationToken,
    ) -> Result<Option<Vec<Check>>, Failure> {
        loop {
            match self.shop.check_claim(order, criteria, result, stop).await {
                // The agent has done its part: nothing of that is done again because nobody can look at it now.
                Err(failure) if failure.kind == FailureKind::HandedBack => {
                    tracing::warn!(reason = failure.message, "a claim cannot be checked now; trying again");
                    tokio::select! {
                        () = stop.cancelled() => return Ok(None),
                        () = tokio::time::sleep(CHECK_PAUSE) => {}
                    }
                }
                checked => return checked,
            }
        }
    }

    /// The way to execute an agent that says this.
    pub fn runner_for(&self, spec: &RunnerSpec) -> Arc<dyn Runner> {
        match spec {
            RunnerSpec::Command(spec) => Arc::new(command::Program::new(self.shop.clone(), spec.clone())),
            RunnerSpec::Echo => self.echo.clone(),
            RunnerSpec::Missing(text) => Arc::new(Missing(text.clone())),
        }
    }
}

/// Stands in for a runner that does not exist.
struct Missing(String);

#[async_trait]
impl Runner for Missing {
    async fn run(&self, _order: Order, _line: Line) -> Ended {
        Ended::Failed(Failure::new(FailureKind::Unstartable, self.0.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_nobodys_crash() {
        let kind = |error: &(dyn std::error::Error + 'static)| kind_of(error, FailureKind::Crashed);
        for away in [transport::Error::Unreachable("away".into()), transport::Error::Unanswered("lost".into()), transport::Error::Closed] {
            assert_eq!(kind(&away), FailureKind::HandedBack);
            assert_eq!(kind(&std::io::Error::other(away)), FailureKind::HandedBack, "as a reader says it");
        }
        let full = transport::Error::Store("full".into());
        assert_eq!(unstored(&full).kind, FailureKind::Crashed);
        assert_eq!(kind(&std::io::Error::other(full)), FailureKind::Crashed);
    }

    #[test]
    fn a_full_system_is_nobodys_crash() {
        for full in [Errno::MFILE, Errno::NFILE, Errno::AGAIN, Errno::NOMEM] {
            let full = std::io::Error::from_raw_os_error(full.raw_os_error());
            assert_eq!(kind_of(&full, FailureKind::Unstartable), FailureKind::HandedBack);
        }
    }
}
