//! Runs, works and events as JSON and as cells of tables.

use serde_json::{Map, Value, json};

use super::screen::{escape, took};
use crate::model::accept::Check;
use crate::model::event::{Event, Failure, FailureKind, Kind};
use crate::model::output::Output;
use crate::model::run::Run;
use crate::model::work::{Attempt, Outcome, Work};
use crate::telemetry::now;

/// How much of a result or a task stands in a line.
const PREVIEW_MAX: usize = 200;

/// A run as an object; absent values are left out.
pub(super) fn run_json(run: &Run) -> Map<String, Value> {
    let mut object = object([
        ("run_id", json!(run.run_id)),
        ("work_id", json!(run.work_id)),
        ("agent_name", json!(run.agent)),
        ("status", json!(run.status.label())),
        ("event", json!(run.event)),
        ("station", json!(run.target_station)),
        ("originating_station", json!(run.originating_station)),
        ("parent_run_id", json!(run.parent_run_id)),
        ("root_run_id", json!(run.root_run_id)),
        ("local_run_id", json!(run.local_number)),
        ("attempt", json!(run.attempt)),
        ("task", json!(run.task)),
        ("trace_id", json!(run.trace_id)),
        ("assigned_at", json!(run.assigned_at)),
        ("accepted_at", json!(run.accepted_at)),
        ("settled_at", json!(run.settled_at)),
        ("duration_ms", json!(run.duration_ms)),
        ("claim", json!(Work::from_run(run).claim())),
        ("usage", json!(Some(run.usage).filter(|usage| !usage.is_empty()))),
        ("budget", json!(run.budget)),
    ]);
    object.extend(outcome_json(run.outcome.as_ref()));
    object
}

/// A work as an object; absent values are left out.
pub(super) fn work_json(work: &Work) -> Map<String, Value> {
    let order = work.assignment.as_deref();
    let question = work.open_question();
    let mut object = object([
        ("work_id", json!(work.work_id)),
        ("run_id", json!(work.run_id)),
        ("root_run_id", json!(work.run_id.root())),
        ("agent_name", json!(order.map(|order| &order.agent_name))),
        ("status", json!(work.status.label())),
        ("event", json!(work.event)),
        ("station", json!(order.map(|order| &order.target_station))),
        ("originating_station", json!(order.map(|order| &order.originating_station))),
        ("attempt", json!(work.attempts.last().map(|attempt| attempt.number))),
        ("task", json!(order.map(|order| &order.task))),
        ("context", json!(order.map(|order| &order.context).filter(|context| !context.is_empty()))),
        ("priority", json!(order.map(|order| order.priority))),
        ("progress_pct", json!(work.progress_pct)),
        ("progress_msg", json!(work.progress_msg)),
        ("escalation_reason", json!(question.map(|ask| &ask.reason))),
        ("escalation_context", json!(question.map(|ask| &ask.context))),
        ("retry_at", json!(work.retry_at)),
        (
            "attempts",
            json!(work.attempts.iter().map(attempt_json).collect::<Vec<_>>())
                .as_array()
                .filter(|all| !all.is_empty())
                .map_or(Value::Null, |all| json!(all)),
        ),
        ("redrives", json!(order.and_then(|order| order.redrives))),
        ("redriven_as", json!(work.redriven_as)),
        ("assigned_at", json!(order.map(|order| order.assigned_at))),
        ("settled_at", json!(work.settled_at)),
        ("duration_ms", json!(work.duration_ms)),
        ("claim", json!(work.claim())),
        ("checks", json!(Some(&work.checks).filter(|checks| !checks.is_empty()))),
        ("usage", json!(Some(work.usage()).filter(|usage| !usage.is_empty()))),
        ("budget", json!(work.budget().map(|allowance| &allowance.budget))),
        ("accept", json!(order.and_then(|order| order.accept.as_ref()))),
    ]);
    if let Some(after) = work.waits_for() {
        object.insert("waits_for".into(), json!(after.work_ids));
    }
    match &work.printed {
        Some(Output::Inline(value)) => _ = object.insert("printed".into(), value.clone()),
        Some(Output::Blob(blob)) => _ = object.insert("printed_ref".into(), json!(blob)),
        None => {}
    }
    object.extend(outcome_json(work.outcome.as_ref()));
    object
}

fn attempt_json(attempt: &Attempt) -> Map<String, Value> {
    object([
        ("attempt", json!(attempt.number)),
        ("station", json!(attempt.station)),
        ("instance_id", json!(attempt.instance)),
        ("started_at", json!(attempt.started_at)),
        ("error", json!(attempt.ended)),
    ])
}

fn outcome_json(outcome: Option<&Outcome>) -> Map<String, Value> {
    let mut object = Map::new();
    match outcome {
        // A result that is null is a result.
        Some(Outcome::Complete(Output::Inline(value))) => _ = object.insert("result".into(), value.clone()),
        Some(Outcome::Complete(Output::Blob(blob))) => _ = object.insert("result_ref".into(), json!(blob)),
        Some(Outcome::Failed(failure)) => _ = object.insert("error".into(), json!(failure)),
        Some(Outcome::Cancelled(Some(reason))) => _ = object.insert("reason".into(), json!(reason)),
        Some(Outcome::Cancelled(None)) | None => {}
    }
    object
}

fn object<const N: usize>(pairs: [(&str, Value); N]) -> Map<String, Value> {
    pairs.into_iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.to_owned(), value)).collect()
}

/// How long a run took, or has been running.
pub(super) fn duration(run: &Run) -> String {
    let running = || run.accepted_at.filter(|_| run.settled_at.is_none()).map(|at| now().since(at).as_millis());
    let ms = run.duration_ms.or_else(|| running().and_then(|ms| u64::try_from(ms).ok()));
    ms.map(took).unwrap_or_default()
}

/// The beginning of a text, in one line.
pub(super) fn preview(text: &str) -> String {
    let line = escape(text.lines().next().unwrap_or_default()).into_owned();
    let cut = line.chars().count() > PREVIEW_MAX || text.trim_end().lines().count() > 1;
    let start: String = line.chars().take(PREVIEW_MAX).collect();
    if cut { start + "…" } else { start }
}

pub(super) fn output(output: &Output) -> String {
    match output {
        Output::Inline(value) => preview(&Output::inline_text(value)),
        Output::Blob(blob) => format!("{} bytes, sha256 {}", blob.size, blob.sha256),
    }
}

pub(super) fn failure(failure: &Failure) -> String {
    let said = failure.message.contains("exit code");
    let code = failure.exit_code.filter(|_| !said).map(|code| format!(" (exit code {code})")).unwrap_or_default();
    let dead = if failure.dead_letter { " [dead letter]" } else { "" };
    format!("{}: {}{code}{dead}", kind(failure.kind), failure.message)
}

/// What was looked at, and what was found.
pub(super) fn check(check: &Check) -> String {
    let what = json!(check.what).as_str().unwrap_or_default().to_owned();
    let digest = check.sha256.as_ref().map(|sha256| format!(" (output sha256 {sha256})")).unwrap_or_default();
    format!("{} {what}: {}{digest}", if check.ok { "ok" } else { "FAILED" }, preview(&check.found))
}

fn kind(kind: FailureKind) -> String {
    json!(kind).as_str().unwrap_or_default().to_owned()
}

/// What an event tells besides its type.
pub(super) fn details(event: &Event) -> String {
    match &event.kind {
        Kind::Assigned(order) => {
            let urgency = if order.priority == 0 { String::new() } else { format!(", priority {}", order.priority) };
            let timeout = order.timeout;
            format!("to {}, agent {}, timeout {timeout}{urgency}: {}", order.target_station, order.agent_name, preview(&order.task))
        }
        Kind::Accepted | Kind::Released | Kind::Other(_) => String::new(),
        Kind::Redriven { work_id } => format!("given out anew as work {work_id}"),
        Kind::Progress { pct, message } => {
            let parts = [pct.map(|pct| format!("{pct}%")), message.as_deref().map(preview)];
            parts.into_iter().flatten().collect::<Vec<_>>().join(" ")
        }
        Kind::Complete { result, duration_ms, checks } => {
            let worth = if checks.is_empty() { "" } else { ", verified" };
            format!("after {}{worth}: {}", took(*duration_ms), output(result))
        }
        Kind::Used(usage) => format!("{usage} so far"),
        Kind::Failed { failure: why, duration_ms } => format!("after {}: {}", took(*duration_ms), failure(why)),
        Kind::Escalate(ask) => {
            let waits = if ask.parked { ", the agent has ended" } else { "" };
            format!("question {} for the {}{waits}: {}", ask.ask, json!(ask.needs).as_str().unwrap_or_default(), preview(&ask.reason))
        }
        Kind::Printed(output) => self::output(output),
        Kind::Answered { ask, answer, .. } => format!("question {ask}: {}", preview(&Output::inline_text(answer))),
        Kind::Retrying { failure: why, next_at } => format!("not before {next_at}, after {}", failure(why)),
        Kind::Cancelled { reason } => {
            let who = if event.attempt == 0 { "asked for" } else { "confirmed" };
            reason.as_deref().map_or_else(|| who.to_owned(), |reason| format!("{who}: {}", preview(reason)))
        }
    }
}
