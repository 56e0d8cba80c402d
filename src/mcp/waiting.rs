//! The tool that waits for work, and what a client hears while it waits.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use rmcp::model::ProgressNotificationParam;
use rmcp::{tool, tool_router};
use serde_json::{Map, json};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::answer::{Answer, object};
use super::call::{Call, patience};
use super::problem::Problem;
use super::server::Server;
use super::work::report_schema;
use crate::dispatcher::Mode;
use crate::model::event::{Event, Kind};
use crate::model::id::WorkId;
use crate::model::work::{Status, Work};

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
        description = "Waits until work is done, or asks for help (ESCALATED: use answer_work). If the wait runs out, the work goes on: \
                       call await_work again. Ending the wait never ends the work.",
        input_schema = object(json!({
            "work_id": {"type": "string"},
            "work_ids": {"type": "array", "items": {"type": "string"}},
            "mode": {"enum": ["all", "any"], "description": "Wait for all (default) or any of them"},
            "timeout": {"type": "string", "description": "Of this wait, default \"45s\""},
        }), &[]),
        output_schema = object(report_schema(json!({"works": {"type": "array", "items": {"type": "object"}}})), &[]),
        annotations(read_only_hint = true, open_world_hint = false)
    )]
    async fn await_work(&self, mut call: Call) -> Result<Answer, Problem> {
        let (ids, list) = call.arguments.works()?;
        let mode = call.arguments.word("mode", &[("all", Mode::All), ("any", Mode::Any)])?.unwrap_or(Mode::All);
        let limits = &self.dispatcher().config().mcp;
        let patience = patience(call.arguments.span("timeout")?, limits.await_default, limits.await_max);
        if ids.is_empty() {
            return Err(Problem::new(
                "work_id and work_ids are both missing",
                "Name the works to wait for, as assign_work returned them; check_work without arguments lists outstanding works.",
            ));
        }
        let works = self.wait(&ids, mode, patience, &call).await?;
        let done = |work: &Arc<Work>| work.status.is_settled() || matches!(work.status, Status::Escalated { .. });
        let over = if mode == Mode::Any { works.iter().any(done) } else { works.iter().all(done) };
        let mut further = Map::new();
        if !over {
            further.insert("note".into(), "still working, call await_work again".into());
        }
        match works[..] {
            [ref work] if !list => Ok(self.report(work, further, &call).await),
            _ => Ok(self.reports(&works, further, &call).await),
        }
    }
}

impl Server {
    async fn wait(&self, ids: &[WorkId], mode: Mode, patience: Duration, call: &Call) -> Result<Vec<Arc<Work>>, Problem> {
        let (tell, heard) = mpsc::channel(PROGRESS_WAITING_MAX);
        let named = ids.len() > 1;
        let mut observe = |work: &Work, event: &Event| {
            if let Some(text) = progress_text(work, event, named) {
                // Full: the client is slower than the agents, and hears the next one.
                let _ = tell.try_send(text);
            }
        };
        let wait = self.dispatcher().wait(ids, mode, patience, &mut observe);
        match self.heard(call, heard, wait).await {
            Some(works) => Ok(works?),
            None => self.check_all(ids).await,
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
