//! Why a verb was refused, in words that say what to do next.

use crate::model::budget::Excess;
use crate::model::id::{self, AgentName, RunId, StationId, WorkId};
use crate::model::size::Size;
use crate::model::time::Span;
use crate::{orders, runs, transport};

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
    /// More than one question is open, and the answer names none.
    #[error("work {work_id} waits for the answers to questions {questions}, and this one names none of them")]
    WhichQuestion {
        /// The work.
        work_id: WorkId,
        /// Their numbers, and how they begin.
        questions: String,
    },
    /// One attempt asks without end.
    #[error("work {work_id} has asked {max} questions in its attempt, and may ask no more (lattice.work.questions_max)")]
    ManyQuestions {
        /// The work.
        work_id: WorkId,
        /// How many one attempt may ask.
        max: u32,
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
