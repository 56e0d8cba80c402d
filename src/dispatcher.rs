//! Assign, check, await, cancel, answer, escalate: what an orchestrator does.
//!
//! Every verb works on any work of the lattice, in any process of it: there is no table of pending works here.
//! It does not know MCP, nor how work is executed.

mod after;
mod assign;
mod keys;
mod nested;
mod redrive;
mod sight;
mod wait;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value};

pub use self::assign::Schemas;
pub use self::wait::Mode;
use crate::config::Config;
use crate::model::accept::Criteria;
use crate::model::access::{Access, Principal, Scope as Permit};
use crate::model::after::After;
use crate::model::budget::{Budget, Excess};
use crate::model::event::{Answerer, Ask, Event, Kind, Needs, Side};
use crate::model::id::{self, AgentName, RunId, StationId, WorkId};
use crate::model::owner::Owner;
use crate::model::run::Run;
use crate::model::size::Size;
use crate::model::time::{Span, Timestamp};
use crate::model::work::{Exchange, Status, Work};
use crate::orders::{self, Orders};
use crate::registry::Registry;
use crate::runs::{self, Outlook, Runs, Scope};
use crate::telemetry::{TraceContext, new_answer_id, now};
use crate::transport::{self, Transport};
use crate::works::{Works, record};

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

/// Whoever calls: one per connection, or one per request where there are no connections.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    bound: Option<Bound>,
    owner: Option<Owner>,
    /// The root that this connection's first assignment opened.
    root: Option<Arc<tokio::sync::Mutex<Option<Opened>>>>,
    /// The questions whose answers it has had.
    had: Arc<Mutex<HashSet<(WorkId, u32)>>>,
    /// What its credentials allow; everything when it needs none.
    access: Option<Arc<Access>>,
    /// Who ordered the work that its agent executes, once that was looked up.
    behind: Arc<tokio::sync::OnceCell<Option<Principal>>>,
}

/// The work that a connection's agent executes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bound {
    /// The work.
    pub work_id: WorkId,
    /// Its run: what the connection assigns is its child.
    pub run_id: RunId,
    /// The attempt.
    pub attempt: u32,
}

/// A root run, and numbers of its children that nobody else has.
#[derive(Debug)]
struct Opened {
    root: RunId,
    free: std::ops::Range<u64>,
    /// How many numbers are fetched next time.
    block: u64,
}

impl Caller {
    /// A caller of whom nothing is remembered: each assignment opens a root of its own.
    pub fn stateless() -> Self {
        Self::default()
    }

    /// A connection: its first assignment opens a root run that the later ones join.
    pub fn connection() -> Self {
        Self { root: Some(Arc::default()), ..Self::default() }
    }

    /// The connection of an agent that executes a work.
    pub fn bound(bound: Bound) -> Self {
        Self { bound: Some(bound), ..Self::default() }
    }

    /// The same caller, whose works are this owner's.
    #[must_use]
    pub fn owned_by(self, owner: Option<Owner>) -> Self {
        Self { owner, ..self }
    }

    /// Whose the works are that it assigns.
    pub fn owner(&self) -> Option<&Owner> {
        self.owner.as_ref()
    }

    /// The same caller, as whoever came with these credentials: what it assigns is theirs.
    #[must_use]
    pub fn with_access(self, access: Arc<Access>) -> Self {
        let owner = match &access.principal {
            Some(principal) => self.owner.as_ref().map(|owner| owner.for_principal(principal)),
            None => self.owner,
        };
        Self { owner, access: Some(access), ..self }
    }

    /// What its credentials allow; none when it needs no credentials.
    pub fn access(&self) -> Option<&Access> {
        self.access.as_deref()
    }

    /// Whether it may do what needs this scope.
    pub fn may(&self, needed: Permit) -> bool {
        self.access.as_ref().is_none_or(|access| access.allows(needed))
    }

    fn has_had(&self, id: WorkId, ask: u32) -> bool {
        self.had.lock().unwrap_or_else(PoisonError::into_inner).contains(&(id, ask))
    }

    /// The work that the connection's agent executes.
    pub fn work(&self) -> Option<&Bound> {
        self.bound.as_ref()
    }
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

/// Why a verb was refused.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// No such agent.
    #[error("no agent named {name} is registered in this lattice")]
    UnknownAgent {
        /// The name.
        name: String,
        /// Those that exist, the closest names first.
        known: Vec<AgentName>,
    },
    /// The agent is elsewhere.
    #[error("agent {agent} is held by station {holder}, not by {asked}")]
    WrongStation {
        /// The agent.
        agent: AgentName,
        /// Who holds it.
        holder: StationId,
        /// Who was asked for.
        asked: StationId,
    },
    /// The agent cannot run.
    #[error("agent {agent} cannot run: {reason}")]
    Unavailable {
        /// The agent.
        agent: AgentName,
        /// Why, and what to do.
        reason: String,
    },
    /// The context does not fit the agent's input schema.
    #[error("context does not fit the input schema of agent {agent}: {}", problems.join("; "))]
    BadInput {
        /// The agent.
        agent: AgentName,
        /// Each with its JSON path.
        problems: Vec<String>,
    },
    /// A schema of the agent is broken.
    #[error("the input schema of agent {agent} is broken: {reason}")]
    BadSchema {
        /// The agent.
        agent: AgentName,
        /// Why.
        reason: String,
    },
    /// The task and its context are too large.
    #[error("task and context are {size} bytes, and at most {max} are taken (lattice.work.input_max)")]
    TooLarge {
        /// How large.
        size: usize,
        /// How large they may be.
        max: Size,
    },
    /// A text is too large.
    #[error("{name} is {size} bytes, and at most {max} are taken (lattice.work.text_max)")]
    LongText {
        /// Which one.
        name: &'static str,
        /// How large.
        size: usize,
        /// How large it may be.
        max: Size,
    },
    /// The priority is out of bounds.
    #[error("priority {priority} is out of bounds: it goes from -{max} to {max}, and higher is more urgent")]
    Priority {
        /// The priority.
        priority: i64,
        /// The bound.
        max: i32,
    },
    /// The timeout is out of bounds.
    #[error("{name} {timeout} is out of bounds: it goes from 1ms to {max}")]
    Timeout {
        /// Which one.
        name: &'static str,
        /// The timeout.
        timeout: Span,
        /// The bound.
        max: Span,
    },
    /// The run is not known.
    #[error("no run {0} is known in this lattice")]
    UnknownRun(RunId),
    /// Works assign works too deep.
    #[error("run {run_id} is {max} levels deep, and no deeper is allowed (lattice.work.depth_max)")]
    TooDeep {
        /// The parent.
        run_id: RunId,
        /// The bound.
        max: u32,
    },
    /// A work assigns too many works.
    #[error("{used} works were assigned {place}, and no more than {max} are allowed ({key})")]
    TooWide {
        /// How many.
        used: u64,
        /// Where.
        place: String,
        /// The bound.
        max: u32,
        /// The bound's key.
        key: &'static str,
    },
    /// A budget is used up.
    #[error(transparent)]
    Budget(#[from] Excess),
    /// What is asked of the result is no schema.
    #[error("accept.schema is not a JSON Schema: {0}")]
    BadCriteria(String),
    /// An idempotency key that cannot be one.
    #[error("an idempotency_key has 1 to 256 characters, and this one has {0}")]
    BadKey(usize),
    /// Another order under the same key.
    #[error("idempotency_key {key:?} was used for another order (work {work_id})")]
    KeyReused {
        /// The key.
        key: String,
        /// The first order's work.
        work_id: WorkId,
    },
    /// No such work.
    #[error("no work {0} is known in this lattice")]
    UnknownWork(WorkId),
    /// Too many works in one call.
    #[error("{given} works were named, and at most {max} are taken (mcp.works_max)")]
    TooMany {
        /// How many.
        given: usize,
        /// How many may be.
        max: u32,
    },
    /// Only what has failed can be given out anew.
    #[error("work {work_id} is {status}: only work that FAILED can be redriven")]
    NotFailed {
        /// The work.
        work_id: WorkId,
        /// Where it stands.
        status: &'static str,
    },
    /// It was given out anew before.
    #[error("work {work_id} was redriven before, as work {redriven_as}")]
    RedrivenAlready {
        /// The work.
        work_id: WorkId,
        /// The one in its stead.
        redriven_as: WorkId,
    },
    /// What was ordered is not known any more.
    #[error("the order of work {0} is older than the log (lattice.storage.max_age), and cannot be given out anew")]
    OrderForgotten(WorkId),
    /// Nobody waits for an answer.
    #[error("work {work_id} is {status}, and waits for no answer")]
    NotEscalated {
        /// The work.
        work_id: WorkId,
        /// Where it stands.
        status: &'static str,
    },
    /// Somebody answered first.
    #[error("question {ask} of work {work_id} was answered already: it waits for no answer")]
    AnsweredAlready {
        /// The work.
        work_id: WorkId,
        /// The question.
        ask: u32,
    },
    /// The answer is to a question that was never asked, or not yet.
    #[error("work {work_id} has asked no question {ask}; question {open} is open")]
    OtherQuestion {
        /// The work.
        work_id: WorkId,
        /// The question that was meant.
        ask: u32,
        /// The question that is open.
        open: u32,
    },
    /// An agent would answer a question that its own work asks.
    #[error("question {ask} of work {work_id} is this agent's own, and no agent answers itself")]
    OwnQuestion {
        /// The work.
        work_id: WorkId,
        /// The question.
        ask: u32,
    },
    /// An agent would answer what a person was asked.
    #[error("question {ask} of work {work_id} is for a person, and an agent is none")]
    ForAPerson {
        /// The work.
        work_id: WorkId,
        /// The question.
        ask: u32,
    },
    /// The work does not run, so it cannot ask.
    #[error("work {work_id} is {status}: only work that runs can escalate")]
    NotRunning {
        /// The work.
        work_id: WorkId,
        /// Where it stands.
        status: &'static str,
    },
    /// Nobody said which work escalates.
    #[error("which work escalates is not known here")]
    NoWork,
    /// The caller's own work was called off.
    #[error("{0}: nothing is assigned below it any more")]
    CalledOff(String),
    /// Too many works to wait for.
    #[error("after names {given} works, and at most {max} are taken (lattice.work.after_max)")]
    ManyAfter {
        /// How many.
        given: usize,
        /// How many may be.
        max: u32,
    },
    /// A work to wait for is not known.
    #[error("after names work {0}, which is not known in this lattice")]
    UnknownAfter(WorkId),
    /// A work to wait for has ended without a result.
    #[error("after names a work that has no result and will get none: {0}")]
    NoResult(String),
    /// It would wait for itself.
    #[error("after names work {named}, which can't settle before this one: {why}")]
    Cycle {
        /// The work that was named.
        named: WorkId,
        /// How that hangs together.
        why: String,
    },
    /// Where the results go there is something already.
    #[error("context has a member named {0:?}, which is where the agent finds the results of the works in after")]
    Occupied(&'static str),
    /// There are no items.
    #[error("map has no items")]
    NoItems,
    /// Too many items.
    #[error("map has {given} items, and at most {max} are taken (lattice.work.map_max)")]
    ManyItems {
        /// How many.
        given: usize,
        /// How many may be.
        max: u32,
    },
    /// The budget has not enough works for the items.
    #[error("budget.works is {given}, and an order over {items} items is {needed} works: itself, and one per item")]
    ItemsOverBudget {
        /// How many works the budget allows.
        given: u64,
        /// How many items there are.
        items: usize,
        /// How many works that makes.
        needed: u64,
    },
    /// How many items are worked on at once is out of bounds.
    #[error("parallel {given} is out of bounds: it goes from 1 to {max} (lattice.work.map_max)")]
    Parallel {
        /// How many.
        given: i64,
        /// How many may be.
        max: u32,
    },
    /// An id is malformed.
    #[error(transparent)]
    Id(#[from] id::Error),
    /// The transport failed.
    #[error(transparent)]
    Transport(#[from] transport::Error),
    /// The run store failed.
    #[error(transparent)]
    Runs(#[from] runs::Error),
    /// What travels with an order cannot be read.
    #[error("{0}")]
    Unreadable(String),
}

impl From<orders::Error> for Error {
    fn from(error: orders::Error) -> Self {
        match error {
            orders::Error::Transport(error) => Self::Transport(error),
            orders::Error::Runs(error) => Self::Runs(error),
            error @ orders::Error::Unreadable { .. } => Self::Unreadable(error.to_string()),
        }
    }
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

    /// Answers a question of a work, the open one unless it is named; the same work goes on. Of several answers the first one on the
    /// log counts, and only whoever gave that is not refused. An agent answers neither itself nor in a person's stead.
    ///
    /// # Errors
    /// `NotEscalated`, `AnsweredAlready`, `OtherQuestion`, `OwnQuestion`, `ForAPerson`, `LongText`, `UnknownWork`, or the
    /// transport's.
    pub async fn answer(&self, caller: &Caller, id: WorkId, reply: Reply) -> Result<Arc<Work>> {
        self.vet_text("answer", reply.value.as_str().map_or_else(|| reply.value.to_string().len(), str::len))?;
        let work = self.check(id).await?;
        let ask = which_question(&work, reply.ask)?;
        if let Some(bound) = caller.work() {
            may_answer(bound, &work, ask)?;
        }
        let by = Answerer { who: reply.who, id: new_answer_id() };
        let event = self.event(&work, 0, Kind::Answered { ask, answer: reply.value, by: Some(by.clone()) });
        let deadline = work.assignment.as_ref().map(|assignment| assignment.deadline().after(work.waited(now())));
        self.0.transport.queue.wake(&self.target(&work), id, deadline, vec![record(event)]).await?;
        let (_, work) = self.history(id).await?;
        let stands = work.exchanges.iter().find(|exchange| exchange.ask.ask == ask).and_then(|exchange| exchange.answered_by.as_ref());
        match stands {
            Some(stands) if *stands == by => Ok(work),
            Some(_) => Err(Error::AnsweredAlready { work_id: id, ask }),
            // It settled in between, or its question was answered by an older version.
            None => Err(which_question(&work, Some(ask)).err().unwrap_or(Error::AnsweredAlready { work_id: id, ask })),
        }
    }

    /// Waits while a question is open, at most for `patience`; gives the work as it is then.
    ///
    /// # Errors
    /// `UnknownWork`, or the transport's.
    pub async fn while_open(&self, id: WorkId, ask: u32, patience: std::time::Duration) -> Result<Arc<Work>> {
        self.wait_until(id, patience, |work| work.open_question().is_none_or(|open| open.ask != ask)).await
    }

    /// Asks for help on behalf of a running work; gives the work and the question's number. The same question asked again while it
    /// is open is not a second one.
    ///
    /// # Errors
    /// `NoWork`, `NotRunning`, `LongText`, `UnknownWork`, or the transport's.
    pub async fn escalate(&self, caller: &Caller, work_id: Option<WorkId>, question: Question) -> Result<(WorkId, u32)> {
        self.vet_text("reason", question.reason.len())?;
        let id = work_id.or(caller.work().map(|bound| bound.work_id)).ok_or(Error::NoWork)?;
        Ok((id, self.ask(caller, id, question).await?))
    }

    /// Waits for the answer to a question; `None` when `patience` ran out first.
    ///
    /// # Errors
    /// `UnknownWork`, or the transport's.
    pub async fn answer_to(&self, caller: &Caller, id: WorkId, ask: u32, patience: std::time::Duration) -> Result<Option<Value>> {
        let answered =
            |work: &Work| work.exchanges.iter().find(|exchange| exchange.ask.ask == ask).and_then(|exchange| exchange.answer.clone());
        let work = self.wait_until(id, patience, |work| work.status.is_settled() || answered(work).is_some()).await?;
        let answer = answered(&work);
        if answer.is_some() {
            caller.had.lock().unwrap_or_else(PoisonError::into_inner).insert((id, ask));
        }
        Ok(answer)
    }

    /// Puts a question; gives its number.
    async fn ask(&self, caller: &Caller, id: WorkId, question: Question) -> Result<u32> {
        loop {
            let work = self.check(id).await?;
            let attempt = match (caller.work().filter(|bound| bound.work_id == id), work.status.mark()) {
                (_, None) => return Err(Error::NotRunning { work_id: id, status: work.status.label() }),
                (Some(bound), Some(_)) => bound.attempt,
                (None, Some(mark)) => mark.attempt,
            };
            // The same question again picks up the open one, or an answer that this caller has not had yet.
            let same = |ask: &Ask| ask.reason == question.reason && ask.context == question.context;
            let fresh = |exchange: &&Exchange| same(&exchange.ask) && (exchange.answer.is_none() || !caller.has_had(id, exchange.ask.ask));
            let known = work.exchanges.iter().rev().find(fresh);
            // One that an attempt asked which then died is put again, under its number.
            if let Some(known) = known.filter(|known| known.answer.is_some() || matches!(work.status, Status::Escalated { .. })) {
                return Ok(known.ask.ask);
            }
            if matches!(work.status, Status::Pending(_)) {
                return Err(Error::NotRunning { work_id: id, status: work.status.label() });
            }
            let next = || work.exchanges.iter().map(|exchange| exchange.ask.ask).max().unwrap_or(0) + 1;
            let number = known.map_or_else(next, |known| known.ask.ask);
            let ask = Ask {
                ask: number,
                reason: question.reason.clone(),
                context: question.context.clone(),
                needs: question.needs,
                parked: false,
            };
            // The agent itself asks through a process of its own station; anybody else asks in its stead.
            let side = if self.target(&work) == self.0.registry.me().station { Side::Leaf } else { Side::Assigner };
            let event = Event { side, ..self.event(&work, attempt, Kind::Escalate(ask)) };
            self.0.transport.log.append(vec![record(event)]).await?;
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

/// The question that an answer is for.
fn which_question(work: &Work, meant: Option<u32>) -> Result<u32> {
    let (work_id, last) = (work.work_id, work.exchanges.last());
    let answered = |ask: u32| work.exchanges.iter().any(|exchange| exchange.ask.ask == ask && exchange.answer.is_some());
    match (work.status, meant) {
        (status, _) if status.is_settled() => Err(Error::NotEscalated { work_id, status: status.label() }),
        (_, Some(ask)) if answered(ask) => Err(Error::AnsweredAlready { work_id, ask }),
        (Status::Escalated { ask: open, .. }, Some(ask)) if ask != open => Err(Error::OtherQuestion { work_id, ask, open }),
        (Status::Escalated { ask, .. }, _) => Ok(ask),
        // Its agent died with the question open; the next attempt finds the answer.
        (_, Some(ask)) if work.exchanges.iter().any(|exchange| exchange.ask.ask == ask) => Ok(ask),
        (status, None) => match (work.interrupted_question(), last) {
            (Some(asked), _) => Ok(asked.ask),
            (None, Some(last)) => Err(Error::AnsweredAlready { work_id, ask: last.ask.ask }),
            (None, None) => Err(Error::NotEscalated { work_id, status: status.label() }),
        },
        (status, Some(_)) => Err(Error::NotEscalated { work_id, status: status.label() }),
    }
}

/// Whether an agent may answer a question. It need not be open: one that an agent died with is still for whom it was.
fn may_answer(agent: &Bound, work: &Work, ask: u32) -> Result<()> {
    let work_id = work.work_id;
    let is_for_a_person = |exchange: &Exchange| exchange.ask.ask == ask && exchange.ask.needs == Needs::Human;
    if agent.work_id == work_id {
        return Err(Error::OwnQuestion { work_id, ask });
    }
    if work.exchanges.iter().any(is_for_a_person) { Err(Error::ForAPerson { work_id, ask }) } else { Ok(()) }
}

/// An answer to a question.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The answer: data for the agent.
    pub value: Value,
    /// The question's number; the open one when absent.
    pub ask: Option<u32>,
    /// Who gives it: a person themself, or an orchestrator.
    pub who: Needs,
}

/// A question on behalf of a work.
#[derive(Debug, Clone)]
pub struct Question {
    /// What is needed.
    pub reason: String,
    /// What helps to decide.
    pub context: Value,
    /// Who is asked.
    pub needs: Needs,
}
