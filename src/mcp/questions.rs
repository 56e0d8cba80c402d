//! Tools for the questions of agents: asking one, and answering it.

use rmcp::{tool, tool_router};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use super::answer::{Answer, fields, object};
use super::call::Call;
use super::problem::Problem;
use super::server::Server;
use super::work::{report_schema, required_work};
use crate::dispatcher::Question;
use crate::model::event::Needs;
use crate::model::time::Span;

/// How long `escalate` waits for an answer before it says that the question is queued: hosts cut silent calls at about 60 s.
const ANSWER_WAIT: Span = Span::secs(45);

#[tool_router(router = question_tools, vis = "pub(super)")]
impl Server {
    #[tool(
        name = "answer_work",
        title = "Answer work",
        description = "Answers the question of ESCALATED work; the same work goes on with it.",
        input_schema = object(json!({
            "work_id": {"type": "string"},
            "answer": {"description": "Text or any JSON"},
        }), &["work_id", "answer"]),
        output_schema = object(report_schema(json!({})), &["work_id", "status"]),
        annotations(read_only_hint = false, destructive_hint = false, idempotent_hint = true, open_world_hint = false)
    )]
    async fn answer_work(&self, mut call: Call) -> Result<Answer, Problem> {
        let id = required_work(&mut call)?;
        let Some(answer) = call.arguments.any("answer") else {
            return Err(Problem::new("answer is missing", "Call again with answer: text or any JSON; check_work shows the question."));
        };
        let work = self.dispatcher().answer(id, answer).await?;
        Ok(self.report(&work, Map::new(), &call).await)
    }

    #[tool(
        name = "escalate",
        title = "Ask for help",
        description = "Asks for help on behalf of running work, and waits for the answer. For an agent that executes work, \
                       when it cannot or must not decide alone.",
        input_schema = object(json!({
            "reason": {"type": "string", "description": "What is needed"},
            "context": {"description": "What helps to decide"},
            "work_id": {"type": "string", "description": "Only if the connection is not that of the work's agent"},
            "needs": {"enum": ["orchestrator", "human"]},
        }), &["reason"]),
        output_schema = object(json!({
            "work_id": {"type": "string"}, "answered": {"type": "boolean"}, "answer": {}, "status": {"type": "string"}, "note": {"type": "string"},
        }), &["work_id", "answered"]),
        annotations(read_only_hint = false, destructive_hint = false, idempotent_hint = true, open_world_hint = false)
    )]
    async fn escalate(&self, mut call: Call) -> Result<Answer, Problem> {
        let caller = call.caller(&self.connection().caller);
        let arguments = &mut call.arguments;
        let needs = [("orchestrator", Needs::Orchestrator), ("human", Needs::Human)];
        let question = Question {
            reason: arguments.required("reason", "what is needed to go on")?,
            context: arguments.any("context").unwrap_or(Value::Null),
            needs: arguments.word("needs", &needs)?.unwrap_or_default(),
        };
        let work_id = arguments.work_id()?;
        let (_tell, heard) = mpsc::channel(1);
        let asked = self.dispatcher().escalate(&caller, work_id, question, ANSWER_WAIT.get());
        let answered = match self.heard(&call, heard, asked).await {
            Some(answered) => answered?,
            None => return Err(Problem::new("the connection is ending", "Connect again and call escalate with the same reason.")),
        };
        if let (id, Some(answer)) = answered {
            return Ok(Answer::new(fields(json!({ "work_id": id, "answered": true, "answer": answer }))));
        }
        let work = self.dispatcher().check(answered.0).await?;
        let note = if work.status.is_settled() {
            "the work is settled: nobody will answer; stop working on it"
        } else {
            "the question is queued; call escalate again with the same reason and context to wait on"
        };
        Ok(Answer::new(fields(json!({ "work_id": answered.0, "answered": false, "status": work.status.label(), "note": note }))))
    }
}
