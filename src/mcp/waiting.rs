//! The tool that waits for work, and what a client hears while it waits.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use rmcp::model::ProgressNotificationParam;
use rmcp::{tool, tool_router};
use serde_json::{Map, json};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::answer::{Answer, Response, object};
use super::call::{Call, patience};
use super::forms::{self, Asked, Way};
use super::problem::Problem;
use super::server::Server;
use super::work::report_schema;
use crate::dispatcher::Mode;
use crate::model::event::{Ask, Event, Kind};
use crate::model::id::WorkId;
use crate::model::time::Timestamp;
use crate::model::work::Work;
use crate::telemetry::now;

/// How many progress messages may wait for a slow client; further ones are left out.
const PROGRESS_WAITING_MAX: usize = 64;
/// The longest silence while a client waits.
const HEARTBEAT_MAX: Duration = Duration::from_secs(10);
/// How long the last progress messages may take to leave before the answer does.
const FLUSH: Duration = Duration::from_millis(500);
/// How much of an agent's message a progress message holds.
const MESSAGE_MAX: usize = 1000;

#[tool_router(router = waiting_tools, vis = "pub(super)")]
impl Server {
    #[tool(
        name = "await_work",
        title = "Wait for work",
        description = "Waits until work is done, or asks for help (ESCALATED: see `next`). If the wait runs out, the work goes on: \
                       call await_work again. Ending the wait never ends the work.",
        input_schema = object(json!({
            "work_id": {"type": "string"},
            "work_ids": {"type": "array", "items": {"type": "string"}},
            "mode": {"type": "string", "enum": ["all", "any"], "description": "Wait for all (default) or any of them"},
            "timeout": {"type": "string", "description": "Of this wait, default \"45s\""},
        }), &[]),
        output_schema = object(report_schema(json!({"works": {"type": "array", "items": {"type": "object"}}})), &[]),
        annotations(read_only_hint = true, open_world_hint = false)
    )]
    async fn await_work(&self, mut call: Call) -> Result<Response, Problem> {
        let (ids, list) = call.arguments.works()?;
        let mode = call.arguments.word("mode", &[("all", Mode::All), ("any", Mode::Any)])?.unwrap_or(Mode::All);
        let limits = &self.dispatcher().config().mcp;
        let asked_for = call.arguments.span("timeout")?;
        let patience = patience(asked_for, limits.await_default, limits.await_max);
        if ids.is_empty() {
            return Err(Problem::new(
                "work_id and work_ids are both missing",
                "Name the works to wait for, as assign_work returned them; check_work without arguments lists outstanding works.",
            ));
        }
        self.dispatcher().must_see(&call.caller(&self.connection().caller), &ids).await?;
        let wait = Wait { ids, list, mode };
        let declined = match self.resume(&mut call).await {
            Ok(declined) => declined,
            Err(response) => return Ok(response),
        };
        let ends = asked_for.map(|_| now().after(patience));
        self.wait_in_line(&call, &wait, patience, ends, declined).await
    }
}

/// What a client waits for.
pub(super) struct Wait {
    pub(super) ids: Vec<WorkId>,
    /// They were given as a list, and are answered with one.
    pub(super) list: bool,
    pub(super) mode: Mode,
}

/// The first question that waits for a person who has not declined to answer it.
fn question_of_person(works: &[Arc<Work>], declined: &[Asked]) -> Option<(Arc<Work>, Ask)> {
    works.iter().flat_map(|work| std::iter::once(work).chain(&work.asking)).find_map(|work| {
        let (_, ask) = Asked::of_person(work).find(|(asked, _)| !declined.contains(asked))?;
        Some((work.clone(), ask.clone()))
    })
}

impl Server {
    /// Waits, and shows the forms of what only a person may answer; goes on as a task where the client knows those, until `ends` if given.
    async fn wait_in_line(
        &self,
        call: &Call,
        wait: &Wait,
        patience: Duration,
        ends: Option<Timestamp>,
        mut declined: Vec<Asked>,
    ) -> Result<Response, Problem> {
        let (way, mut until) = (self.way(call), Instant::now() + patience);
        let mut in_line = call.takes_tasks().then(|| Instant::now() + self.dispatcher().config().mcp.task_after.get());
        let mut note = None;
        loop {
            let for_person = |works: &[Arc<Work>]| way.and_then(|way| Some((way, question_of_person(works, &declined)?)));
            let this_far = in_line.map_or(until, |in_line| in_line.min(until));
            let works = self.wait(wait, this_far, call, &|works| wait.mode.is_over(works) || for_person(works).is_some()).await?;
            let Some((way, (work, ask))) = for_person(&works) else {
                let goes_on = !wait.mode.is_over(&works) && Instant::now() < until && !call.ct.is_cancelled();
                if in_line.take().is_none() || !goes_on {
                    return Ok(self.waited(wait, &works, note, call.takes_links()).await.into());
                }
                match self.begin_task(&call.caller(&self.connection().caller), wait, ends, declined.clone()).await {
                    Ok(task) => return Ok(task.into()),
                    Err(error) => tracing::warn!(%error, "a wait could not become a task: it stays in line"),
                }
                continue;
            };
            if way == Way::Retry {
                return self.form_result(call, &work, &ask, declined).await;
            }
            let shown = Instant::now();
            let came = self.elicit(call, &work, &ask).await?;
            // A person takes their time; what is waited for is the work.
            until += shown.elapsed();
            if let Some(text) = forms::no_answer(&came) {
                note = Some(text);
                declined.push(Asked { work_id: work.work_id, ask: ask.ask });
            }
        }
    }

    /// The answer to a wait that is over, or has run out.
    pub(super) async fn waited(&self, wait: &Wait, works: &[Arc<Work>], note: Option<String>, links: bool) -> Answer {
        let mut further = Map::new();
        if !wait.mode.is_over(works) {
            further.insert("note".into(), "still working, call await_work again".into());
        } else if let Some(note) = note {
            further.insert("note".into(), note.into());
        }
        match works {
            [work] if !wait.list => self.report(work, further, links).await,
            _ => self.reports(works, further, links).await,
        }
    }

    async fn wait(
        &self,
        wait: &Wait,
        until: Instant,
        call: &Call,
        is_over: &(dyn Fn(&[Arc<Work>]) -> bool + Send + Sync),
    ) -> Result<Vec<Arc<Work>>, Problem> {
        let (tell, heard) = mpsc::channel(PROGRESS_WAITING_MAX);
        let named = wait.ids.len() > 1;
        let mut observe = |work: &Work, event: &Event| {
            if let Some(text) = progress_text(work, event, named) {
                // Full: the client is slower than the agents, and hears the next one.
                let _ = tell.try_send(text);
            }
        };
        let patience = until.saturating_duration_since(Instant::now());
        let waiting = self.dispatcher().wait_for(&wait.ids, patience, &mut observe, is_over);
        match self.heard(call, heard, waiting).await {
            Some(works) => Ok(works?),
            None => self.check_all(&wait.ids).await,
        }
    }

    /// Runs a wait and tells the client of it as it goes on; `None` when the call, the connection or the station ended first.
    pub(super) async fn heard<T>(&self, call: &Call, heard: mpsc::Receiver<String>, wait: impl Future<Output = T>) -> Option<T> {
        let interval = self.dispatcher().config().lattice.work.progress_interval.get().min(HEARTBEAT_MAX);
        let (done, over) = tokio::sync::oneshot::channel();
        let beat = beat(call, heard, interval, over);
        tokio::pin!(beat);
        let waited = tokio::select! {
            biased;
            waited = wait => Some(waited),
            () = call.ct.cancelled() => None,
            () = self.closing().cancelled() => None,
            () = &mut beat => None,
        };
        drop(done);
        // What came before the end is told before the answer; a client that does not read is not waited for.
        let _ = tokio::time::timeout(FLUSH, beat).await;
        waited
    }
}

/// Sends each message as it comes, and a sign of life when none came for an interval; ends once `over` fires and all is sent.
async fn beat(call: &Call, mut heard: mpsc::Receiver<String>, interval: Duration, mut over: tokio::sync::oneshot::Receiver<()>) {
    let Some(token) = call.progress_token() else {
        let _ = over.await;
        return;
    };
    let begun = Instant::now();
    let mut last: Option<String> = None;
    let mut progress = 0.0;
    loop {
        let message = tokio::select! {
            biased;
            Some(text) = heard.recv() => last.insert(text).clone(),
            _ = &mut over => return,
            () = tokio::time::sleep(interval) => {
                let so_far = format!("still working after {}s", begun.elapsed().as_secs());
                last.as_ref().map_or_else(|| so_far.clone(), |last| format!("{so_far}: {last}"))
            }
        };
        // Milliseconds since the call; two within one of them still rise.
        progress = (begun.elapsed().as_secs_f64() * 1000.0).floor().max(progress + 1.0);
        let notification = ProgressNotificationParam::new(token.clone(), progress).with_message(message);
        if call.peer.notify_progress(notification).await.is_err() {
            let _ = over.await;
            return;
        }
    }
}

fn progress_text(work: &Work, event: &Event, named: bool) -> Option<String> {
    let text = match &event.kind {
        Kind::Progress { pct, message } => match (pct, message) {
            (Some(pct), Some(message)) => format!("{pct}% {message}"),
            (Some(pct), None) => format!("{pct}%"),
            (None, Some(message)) => message.clone(),
            (None, None) => return None,
        },
        Kind::Accepted => format!("attempt {} started", event.attempt),
        Kind::Retrying { failure, .. } => format!("attempt {} ended, another follows: {}", event.attempt, failure.message),
        _ => return None,
    };
    let text = super::agents::one_line(&text, MESSAGE_MAX);
    let agent = work.assignment.as_ref().map(|assignment| &assignment.agent_name);
    Some(match agent.filter(|_| named) {
        Some(agent) => format!("{agent}: {text}"),
        None => text,
    })
}
