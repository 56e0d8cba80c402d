//! What went wrong, told to the model: one sentence with the values, and what to do next.

use std::fmt::Write as _;

use rmcp::ErrorData;
use rmcp::handler::server::tool::IntoCallToolResult;
use rmcp::model::{CallToolResponse, CallToolResult, ContentBlock};

use crate::dispatcher::Error;
use crate::model::id::{self, AgentName};
use crate::model::time::Span;
use crate::model::work::Work;
use crate::model::{accept, budget};
use crate::telemetry::now;
use crate::{results, transport};

/// How many agents an error lists.
const AGENTS_LISTED_MAX: usize = 20;

/// A tool error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem(String);

impl Problem {
    /// What is wrong, and what to do next.
    pub(super) fn new(wrong: impl std::fmt::Display, next: &str) -> Self {
        let mut text = wrong.to_string();
        if !text.ends_with(['.', '?', '!', '…']) {
            text.push('.');
        }
        if !next.is_empty() {
            let _ = write!(text, " {next}");
        }
        Self(text)
    }

    /// The text.
    pub(super) fn text(&self) -> &str {
        &self.0
    }

    /// The same as a JSON-RPC error, for what is no tool.
    pub(super) fn into_invalid_params(self) -> ErrorData {
        ErrorData::invalid_params(self.0, None)
    }

    /// Why a work's result could not be read. What is missing was dropped by age only if it is that old: two stations need not keep
    /// things for as long, nor be within reach of each other.
    pub(super) fn of_result(error: results::Error, work: &Work, kept: Span) -> Self {
        let results::Error::Store(error @ transport::Error::NoBlob(_)) = error else { return error.into() };
        // Bytes that were put a quarter of that time before are not put anew.
        if now().since(work.settled_at.unwrap_or(work.updated_at)) >= kept.get() / 4 * 3 {
            return Self::new(error, "It was dropped by age (lattice.storage.blob_max_age); assign the work anew.");
        }
        let made = work.assignment.as_ref().map_or("its own station", |order| order.target_station.as_str());
        let next = format!(
            "It is too young to have been dropped by age: it was made at {made}, and may be there alone. Do not assign the work anew for \
             that: try again when that station is online (list_available_agents), or have the user run `lattice-mcp work result {}` there.",
            work.work_id
        );
        Self::new(error, &next)
    }

    /// The same as the error of a resource that is not there.
    pub(super) fn into_not_found(self, uri: &str) -> ErrorData {
        ErrorData::resource_not_found(self.0, Some(serde_json::json!({ "uri": uri })))
    }

    /// A result of this problem.
    pub(super) fn into_result(self) -> CallToolResult {
        CallToolResult::error(vec![ContentBlock::text(self.0)])
    }
}

impl IntoCallToolResult for Problem {
    fn into_call_tool_result(self) -> Result<CallToolResponse, ErrorData> {
        Ok(self.into_result().into())
    }
}

impl From<id::Error> for Problem {
    fn from(error: id::Error) -> Self {
        let next = match &error {
            id::Error::NotAWork(_) => "Call check_work without arguments to see the works that are outstanding.",
            id::Error::NotARun(_) => "Use the run_id or root_run_id that assign_work returned, or leave run_id out.",
            id::Error::Empty(noun) | id::Error::TooLong { noun, .. } | id::Error::BadCharacter { noun, .. } => match *noun {
                "agent name" => "Call list_available_agents for the names that exist.",
                "station name" => "Leave station out: each agent's name is unique, and its work finds its station.",
                _ => "",
            },
        };
        Self::new(error, next)
    }
}

impl From<accept::Error> for Problem {
    fn from(error: accept::Error) -> Self {
        Self::new(error, "Correct accept and assign again; without accept the agent's word is only claimed.")
    }
}

impl From<budget::Error> for Problem {
    fn from(error: budget::Error) -> Self {
        Self::new(error, "Correct budget and assign again, or leave it out for no limit.")
    }
}

impl From<results::Error> for Problem {
    fn from(error: results::Error) -> Self {
        match error {
            results::Error::Store(error) => error.into(),
            results::Error::Read(reason) => {
                tracing::error!(%reason, "a result could not be read");
                Self::new("the result could not be read; the station's log says why", "Try again in a moment.")
            }
            error => Self::new(error, "Call check_work again with such a selector."),
        }
    }
}

impl From<transport::Error> for Problem {
    fn from(error: transport::Error) -> Self {
        match error {
            transport::Error::Full { waits, .. } => {
                let key = match waits {
                    transport::Waits::ToStart => "queue_size",
                    transport::Waits::HeldBack => "held_back_max",
                };
                let next = format!(
                    "Wait until some of them are done (await_work), then assign again; nothing was assigned now. The limit is \
                     lattice.work.{key}."
                );
                Self::new(error, &next)
            }
            transport::Error::Unreachable(_) => Self::new(
                error,
                "Nothing was done. Agents of this station work all the same (list_available_agents shows them as local); \
                 for the others try again in a moment, or ask the user to look at the server (lattice-mcp doctor).",
            ),
            transport::Error::Unanswered(_) => Self::new(
                error,
                "It may or may not have been done. After assign_work look with check_work (without arguments) before you assign again.",
            ),
            transport::Error::Closed => Self::new("this station is stopping", "Nothing is lost: connect again and call check_work."),
            transport::Error::NoBlob(_) => Self::new(
                error,
                "Neither this station nor the server has it: it was dropped by age (lattice.storage.blob_max_age), or is only where it was \
                 made. Try again in a moment before you assign anything anew.",
            ),
            error => {
                tracing::error!(%error, "the transport failed a request of a client");
                Self::new(
                    "the lattice's store failed this call",
                    "Try again in a moment (after assign_work: first look with check_work). If it stays so, ask the user to look at the \
                     station's log: it names the file and what to do, for example to free space on a full disk.",
                )
            }
        }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        match error {
            Error::UnknownAgent { ref name, ref known } => unknown_agent(name, known),
            Error::Transport(error) => error.into(),
            Error::Id(error) => error.into(),
            Error::Runs(error) => {
                tracing::error!(%error, "the run store failed a request of a client");
                Self::new("the run store of this station failed; its log says why", "Try again in a moment.")
            }
            error => {
                let next = next_step(&error);
                Self::new(error, &next)
            }
        }
    }
}

fn next_step(error: &Error) -> String {
    match error {
        Error::WrongStation { holder, .. } => format!("Leave station out, or say station {holder}."),
        Error::Unavailable { .. } => "Choose another agent (list_available_agents), or tell the user what is missing.".into(),
        Error::BadInput { agent, .. } => format!("Correct context and assign again; get_agent_schema {agent} shows what it takes."),
        Error::BadSchema { .. } => "This is a fault in the agent's file: tell the user, or choose another agent.".into(),
        Error::TooLarge { .. } => "Put large material into a file that the agent can read, and name it in the task.".into(),
        Error::LongText { .. } => {
            "Nothing was done: call again with less text; large material fits into a file, which the text names.".into()
        }
        Error::Priority { .. } => "Leave priority out for the usual 0.".into(),
        Error::Timeout { name, .. } => format!("Leave {name} out for the default, or give one such as \"5m\"."),
        Error::NotFailed { work_id, .. } | Error::OrderForgotten(work_id) => {
            format!("Look at it with check_work {work_id}, and assign what is still to be done.")
        }
        Error::RedrivenAlready { redriven_as, .. } => format!("Go on with await_work {redriven_as}."),
        Error::UnknownRun(_) => "Use a run_id that assign_work returned, or leave it out.".into(),
        Error::TooDeep { .. } => "Do this part of the work yourself instead of assigning it.".into(),
        Error::TooWide { .. } => "Do the rest of the work yourself, or give larger parts to fewer works.".into(),
        Error::Budget(_) => {
            "Finish with the results that you have and say what is missing; whoever set the budget may assign anew with more.".into()
        }
        Error::BadCriteria(_) => "Correct accept.schema and assign again.".into(),
        Error::BadKey(_) => "Use a short text that is unique to this order.".into(),
        Error::KeyReused { .. } => "Use another idempotency_key for another order, or repeat the first order unchanged.".into(),
        Error::UnknownWork(_) => {
            "Check the id against what assign_work returned; check_work without arguments lists outstanding works.".into()
        }
        Error::TooMany { .. } => "Name fewer at once, or check a whole run with check_work and run_id.".into(),
        Error::NotEscalated { work_id, .. } => format!("Look at it with check_work {work_id}."),
        Error::AnsweredAlready { work_id, .. } => format!("The first answer stands; go on with await_work {work_id}."),
        Error::OtherQuestion { work_id, .. } => format!("Read the question with check_work {work_id}, then answer that one."),
        Error::WhichQuestion { .. } => "Call answer_work again with ask: the number of the question that is answered.".into(),
        Error::ManyQuestions { .. } => "Decide with the answers that there are, or give up and say what is missing.".into(),
        Error::OwnQuestion { .. } => {
            "Whoever assigned the work answers: call escalate again with the same reason and context to wait on.".into()
        }
        Error::ForAPerson { .. } => "Leave it open: whoever has a person at hand asks them.".into(),
        Error::NotRunning { work_id, .. } => format!("Look at it with check_work {work_id}."),
        Error::CalledOff(_) => "Stop working on it: nobody waits for it any more.".into(),
        Error::ManyAfter { .. } => "Name fewer: a work over many items (map) is one work to wait for.".into(),
        Error::UnknownAfter(_) => "Name works that assign_work returned; check_work without arguments lists outstanding works.".into(),
        Error::NoResult(_) => {
            "Look at it with check_work and assign it anew first; or assign with if_failed: \"run\" to start all the same.".into()
        }
        Error::Cycle { .. } => "Leave it out of after: a work may wait for any work but those that it is part of.".into(),
        Error::Occupied(name) => format!("Rename {name} in context."),
        Error::NoItems => "Leave map out for a single work, or give it one entry per work.".into(),
        Error::ManyItems { .. } => "Assign them in several parts.".into(),
        Error::ItemsOverBudget { needed, .. } => format!("Allow at least {needed} works, give fewer items, or leave budget.works out."),
        Error::Parallel { .. } => "Leave parallel out for the default.".into(),
        Error::Unreadable(_) => "Assign the work anew.".into(),
        Error::NoWork => "Give the work_id of the running work that needs help.".into(),
        _ => String::new(),
    }
}

fn unknown_agent(name: &str, known: &[AgentName]) -> Problem {
    let wrong = format!("no agent named {name} is registered in this lattice");
    if known.is_empty() {
        return Problem::new(wrong, "There is no agent at all yet: the user adds agent files to ./agents, or runs `lattice-mcp init`.");
    }
    let mut next = String::from("Agents that exist, closest first: ");
    for (place, agent) in known.iter().take(AGENTS_LISTED_MAX).enumerate() {
        let _ = write!(next, "{}{agent}", if place == 0 { "" } else { ", " });
    }
    if known.len() > AGENTS_LISTED_MAX {
        let _ = write!(next, " and {} more", known.len() - AGENTS_LISTED_MAX);
    }
    next.push_str(". Use one of these names; list_available_agents says what each does.");
    Problem::new(wrong, &next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agents(names: &[&str]) -> Vec<AgentName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    #[test]
    fn an_unknown_agent_lists_those_that_exist() {
        let problem = Problem::from(Error::UnknownAgent { name: "secrity".into(), known: agents(&["security", "writer"]) });
        assert_eq!(
            problem.text(),
            "no agent named secrity is registered in this lattice. Agents that exist, closest first: security, writer. Use one of these \
             names; list_available_agents says what each does."
        );
        let many: Vec<AgentName> = (0..500).map(|n| format!("agent-{n}").parse().unwrap()).collect();
        let problem = Problem::from(Error::UnknownAgent { name: "x".into(), known: many });
        assert!(problem.text().contains("agent-19 and 480 more"), "{}", problem.text());
        let none = Problem::from(Error::UnknownAgent { name: "x".into(), known: Vec::new() });
        assert!(none.text().contains("no agent at all"), "{}", none.text());
    }

    #[test]
    fn every_refusal_says_what_to_do_next() {
        let work_id = "0198f2c4-7d3e-7000-8000-1b2c3d4e5f60".parse().unwrap();
        let run_id: crate::model::id::RunId = "0198f2c4-7d3e-7000-8000-1b2c3d4e5f60-1".parse().unwrap();
        let agent: AgentName = "a".parse().unwrap();
        let budget = budget::Budget { works: Some(1), ..budget::Budget::default() };
        let allowance = budget::Allowance { run_id: run_id.clone(), budget };
        let excess = allowance.before_work(&budget::Spent { works: 1, ..budget::Spent::default() }).unwrap();
        let errors = [
            Error::WrongStation { agent: agent.clone(), holder: "b".parse().unwrap(), asked: "c".parse().unwrap() },
            Error::Unavailable { agent: agent.clone(), reason: "scan is not installed".into() },
            Error::BadInput { agent: agent.clone(), problems: vec!["at context/path: 5 is not a string".into()] },
            Error::BadSchema { agent, reason: "nonsense".into() },
            Error::TooLarge { size: 9, max: crate::model::size::Size::bytes(8) },
            Error::LongText { name: "reason", size: 9, max: crate::model::size::Size::bytes(8) },
            Error::Priority { priority: -5000, max: 1000 },
            Error::Timeout { name: "timeout", timeout: crate::model::time::Span::secs(0), max: crate::model::time::Span::secs(9) },
            Error::UnknownRun(run_id.clone()),
            Error::TooDeep { run_id, max: 3 },
            Error::TooWide { used: 9, place: "by run x".into(), max: 9, key: "lattice.work.children_max" },
            Error::Budget(excess),
            Error::BadCriteria("nonsense".into()),
            Error::BadKey(0),
            Error::KeyReused { key: "k".into(), work_id },
            Error::UnknownWork(work_id),
            Error::TooMany { given: 2000, max: 1000 },
            Error::NotEscalated { work_id, status: "COMPLETE" },
            Error::AnsweredAlready { work_id, ask: 1 },
            Error::OtherQuestion { work_id, ask: 1, open: 2 },
            Error::WhichQuestion { work_id, questions: "1 (which colour?), 2 (which size?)".into() },
            Error::ManyQuestions { work_id, max: 100 },
            Error::OwnQuestion { work_id, ask: 1 },
            Error::ForAPerson { work_id, ask: 1 },
            Error::NotRunning { work_id, status: "PENDING" },
            Error::NotFailed { work_id, status: "PENDING" },
            Error::RedrivenAlready { work_id, redriven_as: work_id },
            Error::OrderForgotten(work_id),
            Error::NoWork,
            Error::CalledOff(format!("work {work_id} was cancelled")),
            Error::ManyAfter { given: 101, max: 100 },
            Error::UnknownAfter(work_id),
            Error::NoResult(format!("work {work_id} failed")),
            Error::Cycle { named: work_id, why: "its agent assigns this one".into() },
            Error::Occupied("after"),
            Error::NoItems,
            Error::ManyItems { given: 1001, max: 1000 },
            Error::ItemsOverBudget { given: 3, items: 8, needed: 9 },
            Error::Parallel { given: 0, max: 1000 },
            Error::Unreadable("the items are gone".into()),
            Error::Id("a.b".parse::<AgentName>().unwrap_err()),
            Error::Id("x".parse::<crate::model::id::WorkId>().unwrap_err()),
            Error::Transport(transport::Error::Full { station: "s".parse().unwrap(), limit: 100, waits: transport::Waits::HeldBack }),
            Error::Transport(transport::Error::Closed),
            Error::Transport(transport::Error::NoBlob("ab".into())),
        ];
        for error in errors {
            let shown = format!("{error}");
            let problem = Problem::from(error);
            let (_, next) = problem.text().split_once(". ").unwrap_or_default();
            assert!(next.len() > 20, "{shown} has no next step: {}", problem.text());
        }
    }

    #[test]
    fn internals_stay_in_the_log() {
        let problem = Problem::from(transport::Error::Store("disk I/O error at /home/me/lattice.db page 77".into()));
        assert!(!problem.text().contains("/home"), "{}", problem.text());
    }
}
