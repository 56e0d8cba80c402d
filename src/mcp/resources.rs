//! Agents, works, results and runs as resources, and the completion of their names.
//!
//! A read gives a whole resource or none: a result that is larger than one read may give is refused with the way to read it in
//! parts, since a client that took a beginning for the whole would act on half a result.

use std::fmt;
use std::str::FromStr;

use rmcp::ErrorData;
use rmcp::model::{
    CompleteRequestParams, CompletionInfo, ListResourceTemplatesResult, ListResourcesResult, ReadResourceResult, Reference, Resource,
    ResourceContents, ResourceTemplate,
};
use serde_json::{Map, Value, json};

use super::problem::Problem;
use super::report::Reporter;
use super::{agents, prompts};
use crate::dispatcher::{Caller, Dispatcher};
use crate::model::event::{Event, Kind};
use crate::model::id::{AgentName, RunId, WorkId};
use crate::model::output::Media;
use crate::model::run::{Run, Tree};
use crate::model::work::{Outcome, Work};
use crate::results;

/// How many resources one page lists.
const PAGE: usize = 100;
/// Among how many recent runs ids are completed.
const COMPLETED_AMONG: u32 = 200;
/// How many events of a work its resource shows.
const HISTORY_MAX: usize = 200;

/// The address of a resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Uri {
    /// An agent's manifest.
    Agent(AgentName),
    /// A work and what happened to it.
    Work(WorkId),
    /// A work's result, whole.
    Result(WorkId),
    /// A run and everything below it.
    Run(RunId),
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent(name) => write!(f, "agent://{name}"),
            Self::Work(id) => write!(f, "work://{id}"),
            Self::Result(id) => write!(f, "work://{id}/result"),
            Self::Run(run_id) => write!(f, "run://{run_id}"),
        }
    }
}

impl FromStr for Uri {
    type Err = Problem;
    fn from_str(text: &str) -> Result<Self, Problem> {
        let Some((scheme, rest)) = text.split_once("://") else { return Err(unknown(text)) };
        Ok(match (scheme, rest.strip_suffix("/result")) {
            ("agent", None) => Self::Agent(rest.parse()?),
            ("work", Some(id)) => Self::Result(id.parse()?),
            ("work", None) => Self::Work(rest.parse()?),
            ("run", None) => Self::Run(rest.parse()?),
            _ => return Err(unknown(text)),
        })
    }
}

fn unknown(text: &str) -> Problem {
    let shown: String = text.chars().take(200).collect();
    Problem::new(
        format_args!("there is no resource {shown:?}"),
        "Resources are agent://NAME, work://WORK_ID, work://WORK_ID/result and run://RUN_ID; resources/list shows those of now.",
    )
}

/// Agents, then outstanding works, a page at a time.
pub(super) async fn list(dispatcher: &Dispatcher, caller: &Caller, cursor: Option<String>) -> Result<ListResourcesResult, ErrorData> {
    let bad = |cursor: &str| {
        let wrong = format!("cursor {:?} is not one that resources/list gave", cursor.chars().take(80).collect::<String>());
        Problem::new(wrong, "Begin again without a cursor.").into_invalid_params()
    };
    let from = match &cursor {
        Some(cursor) => cursor.parse::<usize>().map_err(|_| bad(cursor))?,
        None => 0,
    };
    let snapshot = dispatcher.registry().snapshot();
    let known = snapshot.agents.len();
    let mut page: Vec<Resource> = snapshot.agents.values().skip(from).take(PAGE).map(agent).collect();
    let works_from = from.saturating_sub(known);
    let room = PAGE - page.len();
    let max = dispatcher.config().mcp.works_max;
    let limit = u32::try_from(works_from + room + 1).unwrap_or(max).min(max);
    let (_, open) = dispatcher.outstanding(caller, limit).await.map_err(|error| Problem::from(error).into_invalid_params())?;
    page.extend(open.iter().skip(works_from).take(room).map(work));
    let end = from + page.len();
    let mut result = ListResourcesResult::with_all_items(page);
    if end > from && end < known + open.len() {
        result.next_cursor = Some(end.to_string());
    }
    Ok(result)
}

fn agent(agent: &crate::registry::Agent) -> Resource {
    let name = &agent.manifest.name;
    Resource::new(Uri::Agent(name.clone()).to_string(), name.as_str())
        .with_title(format!("Agent {name}"))
        .with_description(agents::one_line(&agent.manifest.description, 200))
        .with_mime_type("application/json")
}

fn work(run: &Run) -> Resource {
    Resource::new(Uri::Work(run.work_id).to_string(), format!("work {}", run.work_id))
        .with_title(format!("{} of {}", run.status.label(), run.agent))
        .with_description(agents::one_line(&run.task, 120))
        .with_mime_type("application/json")
}

/// The shapes of addresses.
pub(super) fn templates() -> ListResourceTemplatesResult {
    let template = |uri: &str, name: &str, title: &str, description: &str| {
        ResourceTemplate::new(uri, name).with_title(title).with_description(description)
    };
    let json = "application/json";
    ListResourceTemplatesResult::with_all_items(vec![
        template("agent://{name}", "agent", "Agent", "What an agent does and takes").with_mime_type(json),
        template("work://{id}", "work", "Work", "Where a work stands, and what happened to it").with_mime_type(json),
        template("work://{id}/result", "result", "Result", "The result of a work, whole"),
        template("run://{id}", "run", "Run", "A run and everything below it, as a tree").with_mime_type(json),
    ])
}

/// Reads a resource.
pub(super) async fn read(dispatcher: &Dispatcher, caller: &Caller, uri: &str) -> Result<ReadResourceResult, ErrorData> {
    let read = async {
        let uri: Uri = uri.parse()?;
        if let Uri::Work(id) | Uri::Result(id) = &uri {
            dispatcher.must_see(caller, &[*id]).await?;
        }
        match uri {
            Uri::Agent(name) => {
                let agent = agents::find(dispatcher, name.as_str())?;
                Ok((Value::Object(agents::detailed(&agent, dispatcher.config())).to_string(), Media::Json))
            }
            Uri::Work(id) => Ok((Value::Object(work_in_full(dispatcher, id).await?).to_string(), Media::Json)),
            Uri::Result(id) => result(dispatcher, id).await,
            Uri::Run(run_id) => {
                let runs = dispatcher.check_run(caller, &run_id).await?;
                Ok((tree(dispatcher, &Tree::build(&run_id, runs)).to_string(), Media::Json))
            }
        }
    };
    let (text, media) = read.await.map_err(|problem: Problem| problem.into_not_found(uri))?;
    Ok(ReadResourceResult::new(vec![ResourceContents::text(text, uri).with_mime_type(media.mime())]))
}

async fn result(dispatcher: &Dispatcher, id: WorkId) -> Result<(String, Media), Problem> {
    let work = dispatcher.check(id).await?;
    let Some(Outcome::Complete(output)) = &work.outcome else {
        let wrong = format!("work {id} is {} and has no result", work.status.label());
        return Err(Problem::new(wrong, "Read work://ID for where it stands; await_work waits for it."));
    };
    let (max, kept) = (dispatcher.config().results.resource_max, dispatcher.config().lattice.storage.blob_max_age);
    let whole = results::whole(&dispatcher.transport().blobs, output, max.get()).await;
    let whole = whole.map_err(|error| Problem::of_result(error, &work, kept))?;
    if whole.truncated {
        let wrong = format!("the result of work {id} has {} bytes, and one read gives at most {max}", whole.total_bytes);
        return Err(Problem::new(wrong, "Read it in parts: check_work with this work_id and lines, grep, jsonpath or bytes."));
    }
    Ok((whole.text, whole.media))
}

async fn work_in_full(dispatcher: &Dispatcher, id: WorkId) -> Result<Map<String, Value>, Problem> {
    let (events, work) = dispatcher.history(id).await?;
    let mut shown = Reporter::single(dispatcher).work(&work);
    if let Some(assignment) = &work.assignment {
        shown.insert("task".into(), assignment.task.as_str().into());
        shown.insert("station".into(), assignment.target_station.as_str().into());
        shown.insert("priority".into(), assignment.priority.into());
        shown.insert("assigned_at".into(), assignment.assigned_at.to_string().into());
        shown.insert("deadline".into(), assignment.deadline().after(work.waited(crate::telemetry::now())).to_string().into());
        if let Some(principal) = &assignment.principal {
            shown.insert("principal".into(), principal.as_str().into());
        }
        shown.insert("trace_id".into(), assignment.trace_id.as_str().into());
        if !assignment.context.is_empty() {
            shown.insert("context".into(), Value::Object(assignment.context.clone()));
        }
    }
    if !work.exchanges.is_empty() {
        shown.insert("questions".into(), questions(&work));
    }
    let skipped = events.len().saturating_sub(HISTORY_MAX);
    if skipped > 0 {
        shown.insert("history_skipped".into(), skipped.into());
    }
    shown.insert("history".into(), events.iter().skip(skipped).map(happened).collect());
    Ok(shown)
}

fn questions(work: &Work) -> Value {
    let one = |exchange: &crate::model::work::Exchange| {
        let mut shown =
            json!({ "ask": exchange.ask.ask, "reason": exchange.ask.reason, "needs": exchange.ask.needs, "asked_at": exchange.asked_at });
        if let Some(answer) = &exchange.answer {
            shown["answer"] = answer.clone();
        }
        shown
    };
    work.exchanges.iter().map(one).collect()
}

fn happened(event: &Event) -> Value {
    let mut shown = json!({ "event": event.kind.wire_type(), "at": event.at, "station": event.station.as_str() });
    if event.attempt > 0 {
        shown["attempt"] = event.attempt.into();
    }
    let text = match &event.kind {
        Kind::Progress { message, .. } => message.as_deref(),
        Kind::Failed { failure, .. } | Kind::Retrying { failure, .. } => Some(failure.message.as_str()),
        Kind::Escalate(ask) => Some(ask.reason.as_str()),
        Kind::Cancelled { reason } => reason.as_deref(),
        _ => None,
    };
    if let Kind::Used(used) = &event.kind {
        shown["usage"] = json!(used);
    }
    if let Some(text) = text {
        shown["text"] = text.into();
    }
    if let Kind::Progress { pct: Some(pct), .. } = &event.kind {
        shown["pct"] = (*pct).into();
    }
    shown
}

fn tree(dispatcher: &Dispatcher, at: &Tree) -> Value {
    let mut shown = match &at.run {
        Some(run) => {
            // A tree shows how runs hang together; each result is one read away.
            let mut report = Reporter::single(dispatcher).run(run);
            report.remove("result");
            report.remove("next");
            report.insert("task".into(), agents::one_line(&run.task, 200).into());
            report.insert("station".into(), run.target_station.as_str().into());
            report
        }
        None => Map::new(),
    };
    shown.insert("run_id".into(), at.run_id.as_str().into());
    if !at.children.is_empty() {
        shown.insert("children".into(), at.children.iter().map(|child| tree(dispatcher, child)).collect());
    }
    Value::Object(shown)
}

/// Completes the name or id in an address, or the agents of a prompt.
pub(super) async fn complete(
    dispatcher: &Dispatcher,
    caller: &Caller,
    request: &CompleteRequestParams,
) -> Result<CompletionInfo, ErrorData> {
    let argument = &request.argument;
    let typed = argument.value.as_str();
    let candidates = match &request.r#ref {
        Reference::Resource(template) => match (template.uri.as_str(), argument.name.as_str()) {
            ("agent://{name}", "name") => agent_names(dispatcher),
            ("work://{id}" | "work://{id}/result", "id") => {
                recent(dispatcher, caller).await?.iter().map(|run| run.work_id.to_string()).collect()
            }
            ("run://{id}", "id") => {
                let runs = recent(dispatcher, caller).await?;
                let ids = runs.iter().flat_map(|run| [run.root_run_id.as_str().to_owned(), run.run_id.as_str().to_owned()]);
                let mut seen = std::collections::HashSet::new();
                ids.filter(|id| seen.insert(id.clone())).collect()
            }
            _ => Vec::new(),
        },
        Reference::Prompt(prompt) if prompt.name == prompts::DELEGATE && argument.name == "agents" => {
            let (before, last) = typed.rsplit_once(',').map_or(("", typed), |(before, last)| (before, last.trim_start()));
            let names = agent_names(dispatcher).into_iter().filter(|name| name.starts_with(last));
            names.map(|name| if before.is_empty() { name } else { format!("{before},{name}") }).collect()
        }
        _ => Vec::new(),
    };
    let fitting: Vec<String> = candidates.into_iter().filter(|candidate| candidate.starts_with(typed) || typed.contains(',')).collect();
    let total = u32::try_from(fitting.len()).unwrap_or(u32::MAX);
    let values: Vec<String> = fitting.into_iter().take(CompletionInfo::MAX_VALUES).collect();
    let more = values.len() < total as usize;
    CompletionInfo::with_pagination(values, Some(total), more).map_err(|error| ErrorData::internal_error(error, None))
}

fn agent_names(dispatcher: &Dispatcher) -> Vec<String> {
    dispatcher.registry().snapshot().agents.keys().map(ToString::to_string).collect()
}

async fn recent(dispatcher: &Dispatcher, caller: &Caller) -> Result<Vec<Run>, ErrorData> {
    let runs = dispatcher.recent(caller, COMPLETED_AMONG).await;
    runs.map_err(|error| ErrorData::internal_error(Problem::from(error).text().to_owned(), None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_and_write() {
        let id = "0198f2c4-7d3e-7000-8000-1b2c3d4e5f60";
        for text in ["agent://sec-scan".to_owned(), format!("work://{id}"), format!("work://{id}/result"), format!("run://{id}-1-2")] {
            assert_eq!(text.parse::<Uri>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_addresses_are_refused_with_what_there_is() {
        for bad in ["", "agent", "file:///etc/passwd", "agent://a/result", "mailto:x", "run://x/result"] {
            let problem = bad.parse::<Uri>().unwrap_err();
            assert!(problem.text().contains("work://WORK_ID"), "{}", problem.text());
        }
        for bad in ["agent://a.b", "work://1", "work:///result", "run://zz", "agent://"] {
            assert!(bad.parse::<Uri>().is_err(), "{bad} was taken");
        }
    }
}
