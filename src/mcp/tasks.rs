//! A wait as a task: a newer client that knows tasks gets a handle instead of holding a call open, and asks after it.
//!
//! A task is a row with the names of its works and nothing that they come to: any process of the lattice answers for it from the
//! works themselves. Its id can't be guessed, and only whoever it was given to may use it. To cancel it ends the wait, never the work.

use bytes::Bytes;
use rmcp::ErrorData;
use rmcp::handler::server::tool::IntoCallToolResult;
use rmcp::model::{
    CallToolResponse, CreateTaskResult, DetailedTask, ElicitRequest, GetTaskResult, InputRequest, InputRequests, InputResponses,
    JsonObject, Task, TaskPayload, TaskStatus,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::agents::one_line;
use super::answer::Response;
use super::forms::{self, Asked, Said};
use super::problem::Problem;
use super::server::Server;
use super::waiting::Wait;
use crate::dispatcher::{Caller, Mode};
use crate::model::event::Ask;
use crate::model::id::WorkId;
use crate::model::time::{Span, Timestamp};
use crate::model::work::Work;
use crate::telemetry::{new_secret, now};
use crate::transport::{self, Bucket, Expect};

/// How much of an agent's progress a task's status shows.
const MESSAGE_MAX: usize = 200;
/// How often a task's row is written anew when others write it at the same time.
const TRIES_MAX: u32 = 32;
/// How many questions a task remembers that a person did not answer.
const DECLINED_MAX: usize = 256;

/// What is kept of a task.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Kept {
    /// Whose it is.
    who: String,
    works: Vec<WorkId>,
    list: bool,
    any: bool,
    begun: Timestamp,
    /// When the wait runs out, if the call said so.
    until: Option<Timestamp>,
    /// For how long it is kept from its beginning.
    ttl: Span,
    /// Questions that a person was asked and did not answer.
    declined: Vec<Asked>,
    cancelled_at: Option<Timestamp>,
    /// What it came to, where that can't be told from its works any more: an ended task stays as it is.
    ended: Option<JsonObject>,
}

/// A task's row.
struct Row {
    kept: Kept,
    revision: u64,
}

/// Who asks after a task, and what they can show.
pub(super) struct Asking {
    pub(super) caller: Caller,
    pub(super) takes_forms: bool,
}

impl Kept {
    fn wait(&self) -> Wait {
        Wait { ids: self.works.clone(), list: self.list, mode: if self.any { Mode::Any } else { Mode::All } }
    }

    fn has_run_out(&self, now: Timestamp) -> bool {
        self.until.is_some_and(|until| now >= until)
    }

    fn task(&self, id: &str, status: TaskStatus, poll: Span) -> Task {
        let begun = self.begun.to_string();
        let mut task = Task::new(id, status, begun.clone(), begun).with_ttl_ms(millis(self.ttl));
        task.poll_interval_ms = Some(millis(poll));
        task
    }

    /// The open questions that a person has not declined to answer.
    fn questions<'a>(&'a self, works: &'a [std::sync::Arc<Work>]) -> impl Iterator<Item = (Asked, &'a Work, &'a Ask)> {
        let all = works.iter().flat_map(|work| std::iter::once(work).chain(&work.asking));
        let open = all.flat_map(|work| Asked::open(work).map(|(asked, ask)| (asked, &**work, ask)));
        open.filter(|(asked, _, _)| !self.declined.contains(asked))
    }
}

impl Server {
    /// Begins a task that goes on with a wait, until a moment if the call named one.
    pub(super) async fn begin_task(
        &self,
        caller: &Caller,
        wait: &Wait,
        until: Option<Timestamp>,
        declined: Vec<Asked>,
    ) -> Result<CreateTaskResult, transport::Error> {
        let limits = &self.dispatcher().config().mcp;
        let kept = Kept {
            who: forms::who(caller),
            works: wait.ids.clone(),
            list: wait.list,
            any: wait.mode == Mode::Any,
            begun: now(),
            until,
            ttl: limits.task_ttl,
            declined,
            cancelled_at: None,
            ended: None,
        };
        let id = new_secret();
        self.save_task(&id, &kept, Expect::Absent).await?;
        let message = "the work goes on; ask after the task, or call check_work";
        Ok(CreateTaskResult::new(kept.task(&id, TaskStatus::Working, limits.task_poll).with_status_message(message)))
    }

    /// How a task stands.
    pub(super) async fn task(&self, asking: &Asking, id: &str) -> Result<GetTaskResult, ErrorData> {
        for _ in 0..TRIES_MAX {
            let row = self.task_row(asking, id).await?;
            self.dispatcher().must_see(&asking.caller, &row.kept.works).await.map_err(|error| internal(error.into()))?;
            let works = self.check_all(&row.kept.works).await.map_err(internal)?;
            let payload = self.payload(asking, &row.kept, &works).await?;
            if let TaskPayload::Completed { result } = &payload
                && row.kept.ended.is_none()
                && !works.iter().all(|work| work.status.is_settled())
            {
                let ended = Kept { ended: Some(result.clone()), ..row.kept.clone() };
                match self.save_task(id, &ended, Expect::Revision(row.revision)).await {
                    Err(transport::Error::Conflict { .. }) => continue,
                    saved => saved.map_err(|error| internal(error.into()))?,
                };
            }
            let poll = self.dispatcher().config().mcp.task_poll;
            let mut task = row.kept.task(id, payload.status(), poll).with_status_message(message(&works, &payload));
            let updated = works.iter().map(|work| work.updated_at).chain(row.kept.cancelled_at).fold(row.kept.begun, Timestamp::max);
            task.last_updated_at = updated.to_string();
            return Ok(GetTaskResult::new(DetailedTask::new(task, payload)));
        }
        Err(contended())
    }

    /// Takes what a person said in the forms of a task. What is not one of its questions is left alone.
    pub(super) async fn update_task_of(&self, asking: &Asking, id: &str, responses: &InputResponses) -> Result<(), ErrorData> {
        let row = self.task_row(asking, id).await?;
        if row.kept.cancelled_at.is_some() {
            return Err(ErrorData::invalid_params("the task is cancelled: it takes no answers; its work may, with answer_work", None));
        }
        let works = self.check_all(&row.kept.works).await.map_err(internal)?;
        let mut said = Vec::new();
        for (key, response) in responses {
            let all = works.iter().flat_map(|work| std::iter::once(work).chain(&work.asking));
            let asked = all.flat_map(|work| work.exchanges.iter().map(|exchange| (work.work_id, exchange.ask.ask)));
            let asked = asked.map(|(work_id, ask)| Asked { work_id, ask }).find(|asked| asked.key() == *key);
            let Some(asked) = asked else { continue };
            let heard = forms::read(response).map_err(|text| ErrorData::invalid_params(format!("inputResponses {key:?}: {text}"), None))?;
            said.push((asked, heard));
        }
        if !said.is_empty() && !asking.takes_forms {
            let text = "inputResponses are what a person said in a form, and this client was shown none: it is an agent's, or did not \
                        declare elicitation; answer_work takes what you know yourself";
            return Err(ErrorData::invalid_params(text, None));
        }
        let mut declined = Vec::new();
        for (asked, heard) in said {
            match heard {
                Said::Answer(value) => self.take_word(&asking.caller, asked, value).await.map_err(Problem::into_invalid_params)?,
                Said::Nothing => declined.push(asked),
            }
        }
        if declined.is_empty() {
            return Ok(());
        }
        self.change_task(asking, id, |kept| {
            kept.declined.extend(declined.iter().filter(|asked| !kept.declined.contains(asked)).copied().collect::<Vec<_>>());
            kept.declined.truncate(DECLINED_MAX);
        })
        .await
    }

    /// Ends a task's wait; its works go on. One that has ended stays as it is.
    pub(super) async fn cancel_task_of(&self, asking: &Asking, id: &str) -> Result<(), ErrorData> {
        let state = self.task(asking, id).await?.task.status();
        if state.is_terminal() {
            return Ok(());
        }
        self.change_task(asking, id, |kept| kept.cancelled_at = kept.cancelled_at.or_else(|| Some(now()))).await
    }

    async fn payload(&self, asking: &Asking, kept: &Kept, works: &[std::sync::Arc<Work>]) -> Result<TaskPayload, ErrorData> {
        if kept.cancelled_at.is_some() {
            return Ok(TaskPayload::Cancelled);
        }
        if let Some(result) = &kept.ended {
            return Ok(TaskPayload::Completed { result: result.clone() });
        }
        let settled = |work: &std::sync::Arc<Work>| work.status.is_settled();
        let is_settled = if kept.any { works.iter().any(settled) } else { works.iter().all(settled) };
        if !is_settled && asking.takes_forms {
            let mut input_requests = InputRequests::new();
            for (asked, work, ask) in kept.questions(works) {
                let form = forms::form(work, ask).map_err(internal)?;
                input_requests.insert(asked.key(), InputRequest::Elicitation(ElicitRequest::new(form)));
            }
            if !input_requests.is_empty() {
                return Ok(TaskPayload::InputRequired { input_requests });
            }
        }
        let wait = kept.wait();
        if !is_settled && !wait.mode.is_over(works) && !kept.has_run_out(now()) {
            return Ok(TaskPayload::Working);
        }
        // Newer clients know links.
        let answer = self.waited(&wait, works, None, true).await;
        match answer.into_call_tool_result()? {
            CallToolResponse::Complete(result) => match serde_json::to_value(result) {
                Ok(Value::Object(result)) => Ok(TaskPayload::Completed { result }),
                _ => Err(ErrorData::internal_error("the result of a task could not be written", None)),
            },
            _ => Err(ErrorData::internal_error("the result of a task is none", None)),
        }
    }

    /// The task's row, if it is this caller's; whoever guesses learns nothing.
    async fn task_row(&self, asking: &Asking, id: &str) -> Result<Row, ErrorData> {
        let unknown = || {
            let shown: String = id.chars().take(80).collect();
            let text =
                format!("no task {shown:?} of this caller is known; it may have expired: check_work without arguments shows the works");
            ErrorData::invalid_params(text, None)
        };
        if id.len() != 64 || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(unknown());
        }
        let row = self.dispatcher().transport().table.get(Bucket::Keys, &key(id)).await.map_err(|error| internal(error.into()))?;
        let row = row.ok_or_else(unknown)?;
        let kept: Kept = serde_json::from_slice(&row.value).map_err(|error| {
            tracing::warn!(%error, "a task's row cannot be read");
            unknown()
        })?;
        let names = [forms::who(&asking.caller), forms::who_there(&asking.caller)];
        if names.contains(&kept.who) { Ok(Row { kept, revision: row.revision }) } else { Err(unknown()) }
    }

    async fn change_task(&self, asking: &Asking, id: &str, change: impl Fn(&mut Kept)) -> Result<(), ErrorData> {
        for _ in 0..TRIES_MAX {
            let mut row = self.task_row(asking, id).await?;
            change(&mut row.kept);
            match self.save_task(id, &row.kept, Expect::Revision(row.revision)).await {
                Err(transport::Error::Conflict { .. }) => {}
                saved => return saved.map_err(|error| internal(error.into())),
            }
        }
        Err(contended())
    }

    async fn save_task(&self, id: &str, kept: &Kept, expect: Expect) -> Result<(), transport::Error> {
        let value = Bytes::from(serde_json::to_vec(kept).unwrap_or_default());
        // A little longer than promised: clocks differ.
        let left = kept.ttl.get().saturating_sub(now().since(kept.begun)) + std::time::Duration::from_secs(60);
        self.dispatcher().transport().table.put(Bucket::Keys, &key(id), value, expect, Some(left)).await.map(|_| ())
    }
}

fn key(id: &str) -> String {
    format!("task.{id}")
}

fn millis(span: Span) -> u64 {
    u64::try_from(span.get().as_millis()).unwrap_or(u64::MAX)
}

fn internal(problem: Problem) -> ErrorData {
    ErrorData::internal_error(problem.text().to_owned(), None)
}

fn contended() -> ErrorData {
    let text = "the task is written by others at the same time, again and again: try again in a moment; check_work shows its works";
    ErrorData::internal_error(text, None)
}

fn message(works: &[std::sync::Arc<Work>], payload: &TaskPayload) -> String {
    match payload {
        TaskPayload::Cancelled => return "the wait was cancelled; the work goes on, and cancel_work stops it".into(),
        TaskPayload::InputRequired { .. } => return "an agent waits for an answer".into(),
        _ => {}
    }
    let done = works.iter().filter(|work| work.status.is_settled()).count();
    let mut text = format!("{done} of {} works settled", works.len());
    let latest = works.iter().filter(|work| work.progress_msg.is_some() && !work.status.is_settled()).max_by_key(|work| work.updated_at);
    if let Some(message) = latest.and_then(|work| work.progress_msg.as_deref()) {
        text.push_str(": ");
        text.push_str(&one_line(message, MESSAGE_MAX));
    }
    text
}

impl From<CreateTaskResult> for Response {
    fn from(task: CreateTaskResult) -> Self {
        Self::Task(task)
    }
}
