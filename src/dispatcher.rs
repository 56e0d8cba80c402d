//! Assign, check, await, cancel, answer, escalate: what an orchestrator does.
//!
//! Every verb works on any work of the lattice, in any process of it: there is no table of pending works here.
//! It does not know MCP, nor how work is executed.

mod after;
mod assign;
mod caller;
mod error;
mod keys;
mod nested;
mod questions;
mod redrive;
mod sight;
mod wait;

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Map, Value};

pub use self::assign::Schemas;
pub use self::caller::{Bound, Caller};
pub use self::error::Error;
pub(crate) use self::questions::which_question;
pub use self::questions::{Question, Reply};
pub use self::wait::Mode;
use crate::config::Config;
use crate::model::accept::Criteria;
use crate::model::after::After;
use crate::model::budget::Budget;
use crate::model::event::{Event, Kind, Side};
use crate::model::id::{AgentName, RunId, StationId, WorkId};
use crate::model::run::Run;
use crate::model::time::{Span, Timestamp};
use crate::model::work::Work;
use crate::orders::Orders;
use crate::registry::Registry;
use crate::runs::{Outlook, Runs, Scope};
use crate::telemetry::{TraceContext, now};
use crate::transport::{self, Transport};
use crate::works::Works;

/// Dispatches for every caller of this process; cheap to clone.
#[derive(Clone)]
pub struct Dispatcher(Arc<Inner>);

struct Inner {
    transport: Transport,
    works: Works,
    orders: Orders,
    registry: Registry,
    runs: Runs,
    config: Arc<Config>,
    schemas: Schemas,
    /// Held from the look at what is left of limits until the new work counts.
    nesting: tokio::sync::Mutex<()>,
}

/// An order, as a caller gives it.
#[derive(Debug, Clone)]
pub struct Request {
    /// The agent.
    pub agent: AgentName,
    /// What it is asked to do.
    pub task: String,
    /// Structured input.
    pub context: Map<String, Value>,
    /// The station that must hold the agent, if the caller cares.
    pub station: Option<StationId>,
    /// Higher is more urgent.
    pub priority: i64,
    /// How long the work may take in all.
    pub timeout: Option<Span>,
    /// How long it may wait for its first attempt.
    pub queue_timeout: Option<Span>,
    /// How long its agent may say nothing.
    pub silence_timeout: Option<Span>,
    /// A run whose root it joins.
    pub run_id: Option<RunId>,
    /// Makes repeating the order harmless.
    pub idempotency_key: Option<String>,
    /// The trace that the client is in.
    pub trace: Option<TraceContext>,
    /// What is asked of the result before the work counts as done.
    pub accept: Option<Criteria>,
    /// What the work and everything below it may use.
    pub budget: Option<Budget>,
    /// The works that it waits for.
    pub after: Option<After>,
    /// The items of which each becomes a work of its own.
    pub map: Option<Items>,
}

/// The items of an order.
#[derive(Debug, Clone, PartialEq)]
pub struct Items {
    /// The items.
    pub items: Vec<Value>,
    /// How many of their works are unsettled at once.
    pub parallel: Option<i64>,
}

/// An order that is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assigned {
    /// The work.
    pub work_id: WorkId,
    /// The agent.
    pub agent: AgentName,
    /// The station whose hook has it.
    pub station: StationId,
    /// The work's own run.
    pub run_id: RunId,
    /// The top of its tree.
    pub root_run_id: RunId,
    /// Whether a process that runs the agent is alive; else the work waits for one.
    pub online: bool,
    /// The idempotency key was known: this is the work of the first order.
    pub known: bool,
}

/// The result of a verb.
pub type Result<T> = std::result::Result<T, Error>;

impl Dispatcher {
    /// Dispatches over these parts.
    pub fn new(transport: Transport, works: Works, registry: Registry, runs: Runs, config: Arc<Config>) -> Self {
        let orders = Orders::new(transport.clone(), works.clone(), runs.clone(), registry.me().clone(), config.clone());
        Self(Arc::new(Inner {
            transport,
            works,
            orders,
            registry,
            runs,
            config,
            schemas: Schemas::new(HashMap::new()),
            nesting: tokio::sync::Mutex::default(),
        }))
    }

    /// The orders of the lattice.
    pub fn orders(&self) -> &Orders {
        &self.0.orders
    }

    /// The agents and stations of the lattice.
    pub fn registry(&self) -> &Registry {
        &self.0.registry
    }

    /// The run store.
    pub fn runs(&self) -> &Runs {
        &self.0.runs
    }

    /// The blobs, the log and the rest.
    pub fn transport(&self) -> &Transport {
        &self.0.transport
    }

    /// Since when, and why, the lattice's server cannot be reached.
    pub fn away(&self) -> Option<(Timestamp, Arc<str>)> {
        self.0.transport.away()
    }

    /// The settings.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Where a work stands, without waiting.
    ///
    /// # Errors
    /// `UnknownWork`, or the transport's.
    pub async fn check(&self, id: WorkId) -> Result<Arc<Work>> {
        match self.0.works.get(id).await {
            Ok(Some(work)) => return Ok(self.with_questions(work).await),
            Ok(None) => {}
            // As it was when the server was heard last; whoever reports it says so.
            Err(error) if is_away(&error) => {
                let run = self.0.runs.of_work(id).await?;
                return run.map(|run| Arc::new(Work::from_run(&run))).ok_or(Error::Transport(error));
            }
            Err(error) => return Err(error.into()),
        }
        // Its events may have been dropped by age; the run store keeps what became of it.
        let run = self.0.runs.of_work(id).await?;
        run.map(|run| Arc::new(Work::from_run(&run))).ok_or(Error::UnknownWork(id))
    }

    /// A work's events, in order, and its state.
    ///
    /// # Errors
    /// `UnknownWork`, or the transport's.
    pub async fn history(&self, id: WorkId) -> Result<(Vec<Event>, Arc<Work>)> {
        let (events, work) = self.0.works.history(id).await?;
        match work {
            Some(work) => Ok((events, Arc::new(work))),
            None => Ok((events, self.check(id).await?)),
        }
    }

    /// The works of a run and of everything below it, as far as the caller may see them.
    ///
    /// # Errors
    /// `UnknownRun`, or the store's.
    pub async fn check_run(&self, caller: &Caller, run_id: &RunId) -> Result<Vec<Run>> {
        self.0.runs.catch_up().await?;
        let runs = self.visible(caller, self.0.runs.tree(run_id, self.0.config.mcp.works_max).await?).await?;
        if runs.is_empty() { Err(Error::UnknownRun(run_id.clone())) } else { Ok(runs) }
    }

    /// What has not settled yet of what the caller may see: how many, and the most recent of them.
    ///
    /// # Errors
    /// The store's.
    pub async fn outstanding(&self, caller: &Caller, limit: u32) -> Result<(u64, Vec<Run>)> {
        self.0.runs.catch_up().await?;
        Ok(self.0.runs.open_works(self.kept_to(caller).await?, limit).await?)
    }

    /// The most recent runs that the caller may see.
    ///
    /// # Errors
    /// The store's.
    pub async fn recent(&self, caller: &Caller, limit: u32) -> Result<Vec<Run>> {
        Ok(self.0.runs.recent(self.kept_to(caller).await?, limit, false).await?)
    }

    /// What a caller that remembers nothing must know of its works; what has settled counts as told from now on.
    ///
    /// # Errors
    /// The store's.
    pub async fn look_around(&self, caller: &Caller, shown: u32) -> Result<Outlook> {
        self.0.runs.catch_up().await?;
        let scope = match caller.work() {
            Some(bound) => Scope::Below(bound.run_id.clone()),
            None => Scope::Of(caller.owner().cloned()),
        };
        let mut outlook = self.0.runs.outlook(scope, shown).await?;
        if self.kept_to(caller).await?.is_some() {
            // How busy others are is theirs to know.
            outlook.elsewhere = 0;
        }
        Ok(outlook)
    }

    /// Asks that a work and all that hangs below it be stopped, and waits until that is confirmed for the work itself, or `patience`
    /// has run out; gives the work as it is then. Work that nobody runs is cancelled at once; settled work stays as it is.
    ///
    /// # Errors
    /// `LongText`, `UnknownWork`, or the transport's.
    pub async fn cancel(&self, id: WorkId, reason: Option<String>, patience: std::time::Duration) -> Result<Arc<Work>> {
        self.vet_text("reason", reason.as_ref().map_or(0, String::len))?;
        let work = self.check(id).await?;
        if work.status.is_settled() {
            // Whoever called it off may have died before it came to what hangs below.
            if work.is_called_off() {
                self.0.orders.stop_below(&work).await?;
            }
            return Ok(work);
        }
        self.0.orders.stop(&work, reason).await?;
        self.0.orders.stop_below(&work).await?;
        if work.is_map() {
            return self.cancelled_with_its_items(&work, patience).await;
        }
        let waited = self.wait(&[id], Mode::SettledOnly, patience, &mut |_, _| {}).await?;
        waited.into_iter().next().ok_or(Error::UnknownWork(id))
    }

    /// Waits until an order over many items is cancelled, which is so once its items have settled; nobody else may be there to say so.
    async fn cancelled_with_its_items(&self, work: &Work, patience: std::time::Duration) -> Result<Arc<Work>> {
        const STEP: std::time::Duration = std::time::Duration::from_millis(200);
        let until = tokio::time::Instant::now() + patience;
        loop {
            self.0.orders.look_after(work.work_id).await?;
            let left = until.saturating_duration_since(tokio::time::Instant::now());
            let now = self.wait_until(work.work_id, left.min(STEP), |work| work.status.is_settled()).await?;
            if now.status.is_settled() || left.is_zero() {
                return Ok(now);
            }
        }
    }

    fn vet_text(&self, name: &'static str, size: usize) -> Result<()> {
        let max = self.0.config.lattice.work.text_max;
        if size > max.as_usize() { Err(Error::LongText { name, size, max }) } else { Ok(()) }
    }

    fn event(&self, work: &Work, attempt: u32, kind: Kind) -> Event {
        let me = self.0.registry.me();
        Event {
            work_id: work.work_id,
            run_id: work.run_id.clone(),
            at: now(),
            station: me.station.clone(),
            instance: me.instance,
            side: Side::Assigner,
            attempt,
            kind,
        }
    }

    fn target(&self, work: &Work) -> StationId {
        work.assignment.as_ref().map_or_else(|| self.0.registry.me().station.clone(), |assignment| assignment.target_station.clone())
    }
}

/// Whether an error says that the lattice's server is away.
fn is_away(error: &transport::Error) -> bool {
    matches!(error, transport::Error::Unreachable(_) | transport::Error::Unanswered(_))
}
