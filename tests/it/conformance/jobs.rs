//! Jobs as tasks. How one stands follows from when it began and what was said since: nothing runs.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rmcp::ErrorData;
use rmcp::model::{CreateTaskResult, DetailedTask, GetTaskResult, InputResponses, JsonObject, Task, TaskPayload, TaskStatus};
use serde_json::{Value, json};

use super::everything::{form, of};

#[derive(Default)]
pub(super) struct Jobs(Mutex<HashMap<String, Job>>);

struct Job {
    what: What,
    begun: Instant,
    at: String,
    said: InputResponses,
    cancelled: bool,
}

enum What {
    /// It ends by itself, with a result or an error.
    Takes(Duration, TaskPayload),
    /// It ends when all of these are answered.
    Asks(&'static [&'static str]),
}

impl Jobs {
    pub(super) fn begin(&self, tool: &str, arguments: &JsonObject, name: Option<&str>) -> CreateTaskResult {
        let seconds = Duration::from_secs(arguments.get("seconds").and_then(Value::as_u64).unwrap_or_default());
        let what = match tool {
            "confirm_delete" => What::Asks(&["confirm"]),
            "multi_input" => What::Asks(&["first", "second"]),
            "failing_job" => What::Takes(Duration::from_secs(1), result("it failed", true)),
            "protocol_error_job" => {
                let error = of(json!({"code": -32603, "message": "the job broke"}));
                What::Takes(Duration::from_millis(100), TaskPayload::Failed { error })
            }
            "test_tool_with_task" => What::Takes(Duration::ZERO, result(&format!("Hello, {}!", name.unwrap_or_default()), false)),
            _ => What::Takes(seconds, result("computed", false)),
        };
        let mut jobs = self.0.lock().unwrap();
        let id = format!("job-{}", jobs.len() + 1);
        let at = lattice_mcp::telemetry::now().to_string();
        let job = Job { what, begun: Instant::now(), at, said: InputResponses::new(), cancelled: false };
        let begun = CreateTaskResult::new(job.task(&id));
        jobs.insert(id, job);
        begun
    }

    fn with<T>(&self, id: &str, act: impl FnOnce(&mut Job) -> T) -> Result<T, ErrorData> {
        let mut jobs = self.0.lock().unwrap();
        jobs.get_mut(id).map(act).ok_or_else(|| ErrorData::invalid_params(format!("there is no task {id:?}"), None))
    }

    pub(super) fn get(&self, id: &str) -> Result<GetTaskResult, ErrorData> {
        self.with(id, |job| GetTaskResult::new(DetailedTask::new(job.task(id), job.payload())))
    }

    pub(super) fn update(&self, id: &str, said: InputResponses) -> Result<(), ErrorData> {
        self.with(id, |job| job.said.extend(said))
    }

    pub(super) fn cancel(&self, id: &str) -> Result<(), ErrorData> {
        self.with(id, |job| job.cancelled |= !job.payload().status().is_terminal())
    }
}

impl Job {
    fn task(&self, id: &str) -> Task {
        Task::new(id, TaskStatus::Working, &*self.at, &*self.at).with_ttl_ms(600_000).with_poll_interval_ms(100)
    }

    fn payload(&self) -> TaskPayload {
        if self.cancelled {
            return TaskPayload::Cancelled;
        }
        match &self.what {
            What::Takes(time, _) if self.begun.elapsed() < *time => TaskPayload::Working,
            What::Takes(_, end) => end.clone(),
            What::Asks(keys) => {
                let open = keys.iter().filter(|key| !self.said.contains_key(**key));
                let requests: serde_json::Map<_, _> = open.map(|&key| (key.to_owned(), form("Go on?", "confirm", "boolean"))).collect();
                if requests.is_empty() {
                    return result("confirmed", false);
                }
                TaskPayload::InputRequired { input_requests: of(requests.into()) }
            }
        }
    }
}

fn result(text: &str, is_error: bool) -> TaskPayload {
    TaskPayload::Completed { result: of(json!({"content": [{"type": "text", "text": text}], "isError": is_error})) }
}
