//! Tools for the questions of agents: asking one, and answering it.

use std::time::Duration;

use rmcp::{tool, tool_router};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use super::answer::{Answer, Response, fields, object};
use super::call::Call;
use super::forms::{Asked, Came, Way};
use super::problem::Problem;
use super::server::Server;
use super::work::{report_schema, required_work};
use crate::dispatcher::{Question, Reply, which_question};
use crate::model::event::Needs;
use crate::model::id::WorkId;
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
            "answer": {"anyOf": [{"type": "string"}, {"type": "object"}], "description": "Text or any JSON"},
            "ask": {"type": "integer"},
        }), &["work_id", "answer"]),
        output_schema = object(report_schema(json!({})), &["work_id", "status"]),
        annotations(read_only_hint = false, destructive_hint = false, idempotent_hint = true, open_world_hint = false)
    )]
    async fn answer_work(&self, mut call: Call) -> Result<Response, Problem> {
        let id = required_work(&mut call)?;
        let Some(answer) = call.arguments.any("answer") else {
            return Err(Problem::new("answer is missing", "Call again with answer: text or any JSON; check_work shows the question."));
        };
        let ask = match call.arguments.integer("ask")?.map(u32::try_from) {
            None => None,
            Some(Ok(ask)) => Some(ask),
            Some(Err(_)) => {
                return Err(Problem::new("ask must be the number of a question, from 1", "Leave ask out where only one question is open."));
            }
        };
        let caller = call.caller(&self.connection().caller);
        self.dispatcher().must_see(&caller, &[id]).await?;
        let returned = call.request_state.is_some();
        let declined = match self.resume(&mut call).await {
            Ok(declined) => declined,
            Err(response) => return Ok(response),
        };
        if returned && declined.is_empty() {
            let work = self.dispatcher().check(id).await?;
            return Ok(self.report(&work, Map::new(), call.takes_links()).await.into());
        }
        let work = self.dispatcher().check(id).await?;
        let meant = which_question(&work, ask).ok().or(ask);
        // What a model says is not what a person says: where they can be asked themselves, they are.
        let person = Asked::of_person(&work).find(|(asked, _)| Some(asked.ask) == meant);
        let unanswered = work.exchanges.iter().filter(|exchange| exchange.answer.is_none()).map(|exchange| &exchange.ask);
        let interrupted = unanswered.filter(|asked| Some(asked.ask) == meant).find(|asked| asked.needs == Needs::Human);
        match (self.way(&call), person) {
            // The next attempt asks them again: nobody answers in their stead until then.
            (Some(_), None) if let Some(asked) = interrupted => {
                let wrong = format!("question {} of work {id} is for the user, who is asked again when its agent asks it anew", asked.ask);
                Err(Problem::new(wrong, &format!("Go on with await_work {id}.")))
            }
            (Some(_), Some((asked, _))) if declined.contains(&asked) => Err(not_allowed(id)),
            (Some(Way::Retry), Some((_, question))) => self.form_result(&call, &work, question, declined).await,
            (Some(Way::Elicit), Some((_, question))) => match self.elicit(&call, &work, question).await? {
                Came::Answered => {
                    let work = self.dispatcher().check(id).await?;
                    Ok(self.report(&work, Map::new(), call.takes_links()).await.into())
                }
                Came::Declined | Came::Failed(_) => Err(not_allowed(id)),
            },
            _ => {
                let work = self.dispatcher().answer(&caller, id, Reply { value: answer, ask, who: Needs::Orchestrator }).await?;
                Ok(self.report(&work, Map::new(), call.takes_links()).await.into())
            }
        }
    }

    #[tool(
        name = "escalate",
        title = "Ask for help",
        description = "Asks for help on behalf of running work, and waits for the answer. For an agent that executes work, \
                       when it cannot or must not decide alone.",
        input_schema = object(json!({
            "reason": {"type": "string", "description": "What is needed"},
            "context": {"type": "object", "description": "What helps to decide"},
            "work_id": {"type": "string", "description": "Only if the connection is not that of the work's agent"},
            "needs": {"type": "string", "enum": ["orchestrator", "human"]},
        }), &["reason"]),
        output_schema = object(json!({
            "work_id": {"type": "string"}, "answered": {"type": "boolean"}, "answer": {}, "status": {"type": "string"}, "note": {"type": "string"},
        }), &["work_id", "answered"]),
        annotations(read_only_hint = false, destructive_hint = false, idempotent_hint = true, open_world_hint = false)
    )]
    async fn escalate(&self, mut call: Call) -> Result<Response, Problem> {
        let caller = call.caller(&self.connection().caller);
        let arguments = &mut call.arguments;
        let needs = [("orchestrator", Needs::Orchestrator), ("human", Needs::Human)];
        let question = Question {
            reason: arguments.required("reason", "what is needed to go on")?,
            context: arguments.any("context").unwrap_or(Value::Null),
            needs: arguments.word("needs", &needs)?.unwrap_or_default(),
        };
        let work_id = arguments.work_id()?;
        self.dispatcher().must_see(&caller, work_id.as_slice()).await?;
        let declined = match self.resume(&mut call).await {
            Ok(declined) => declined,
            Err(response) => return Ok(response),
        };
        let (id, ask) = self.dispatcher().escalate(&caller, work_id, question).await?;
        let mut patience = ANSWER_WAIT.get();
        if !declined.is_empty() {
            patience = Duration::ZERO;
        } else if let Some(way) = self.way(&call) {
            let work = self.dispatcher().check(id).await?;
            match (way, Asked::of_person(&work).find(|(asked, _)| asked.ask == ask)) {
                (_, None) => {}
                (Way::Retry, Some((_, question))) => return self.form_result(&call, &work, question, declined).await,
                (Way::Elicit, Some((_, question))) => match self.elicit(&call, &work, question).await? {
                    Came::Answered => {}
                    Came::Declined | Came::Failed(_) => patience = Duration::ZERO,
                },
            }
        }
        let (_tell, heard) = mpsc::channel(1);
        let answer = self.dispatcher().answer_to(&caller, id, ask, patience);
        let answer = match self.heard(&call, heard, answer).await {
            Some(answer) => answer?,
            None => return Err(Problem::new("the connection is ending", "Connect again and call escalate with the same reason.")),
        };
        if let Some(answer) = answer {
            return Ok(Answer::new(fields(json!({ "work_id": id, "answered": true, "answer": answer }))).into());
        }
        let work = self.dispatcher().check(id).await?;
        let note = if work.status.is_settled() {
            "the work is settled: nobody will answer; stop working on it".to_owned()
        } else if caller.work().is_none() && Asked::of_person(&work).any(|(asked, _)| asked.ask == ask) {
            format!(
                "the question is queued for a person: ask your user, and pass on what they say with answer_work, or have them run \
                 `lattice-mcp work answer {id} TEXT --ask {ask}`; do not answer it yourself"
            )
        } else {
            "the question is queued; call escalate again with the same reason and context to wait on".to_owned()
        };
        let answer = json!({ "work_id": id, "answered": false, "status": work.status.label(), "note": note });
        Ok(Answer::new(fields(answer)).into())
    }
}

fn not_allowed(id: WorkId) -> Problem {
    let wrong =
        format!("the question of work {id} is for a person, and the client brought back no answer to the form it was given for them");
    Problem::new(
        wrong,
        &format!("Talk with the user; when they are ready, call answer_work again, or have them run `lattice-mcp work answer {id} TEXT`."),
    )
}
