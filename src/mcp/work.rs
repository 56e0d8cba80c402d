//! Tools that hand work out, look at it and call it off.

use std::collections::HashMap;

use rmcp::{tool, tool_router};
use serde_json::{Map, Value, json};

use super::agents::find;
use super::answer::{Answer, fields, object};
use super::call::{Arguments, Call};
use super::problem::Problem;
use super::report::{self, Reporter};
use super::server::Server;
use crate::dispatcher::{Caller, Request};
use crate::model::accept::Criteria;
use crate::model::budget::Budget;
use crate::model::id::WorkId;
use crate::model::output::Output;
use crate::model::time::Span;
use crate::model::work::{Outcome, Work};
use crate::results::{self, Selector};
use crate::telemetry::now;

/// How long a cancelled program has, beyond the time between TERM and KILL, until its stop is confirmed.
const CONFIRM: Span = Span::secs(3);
/// How many works of each kind are looked at to show what there is.
const SHOWN_MAX: u32 = 12;

/// The schema of a report on one work, with further properties.
pub(super) fn report_schema(further: Value) -> Value {
    let mut schema = json!({
        "work_id": {"type": "string"}, "agent_name": {"type": "string"}, "run_id": {"type": "string"},
        "status": {"enum": ["PENDING", "ACCEPTED", "ESCALATED", "COMPLETE", "FAILED", "CANCELLED"]},
        "event": {"type": "string"}, "result": {},
        "result_ref": {"type": "object"}, "error": {"type": "object"}, "question": {"type": "object"},
        "progress": {"type": "object"}, "duration_ms": {"type": "integer"}, "attempt": {"type": "integer"},
        "note": {"type": "string"}, "next": {"type": "string"},
    });
    if let (Value::Object(schema), Value::Object(further)) = (&mut schema, further) {
        schema.extend(further);
    }
    schema
}

#[tool_router(router = work_tools, vis = "pub(super)")]
impl Server {
    #[tool(
        name = "assign_work",
        title = "Assign work",
        description = "Gives work to an agent and returns at once with a work_id; the agent works in the background. \
                       Assign everything that can run in parallel before waiting for any of it.",
        input_schema = object(json!({
            "agent_name": {"type": "string"},
            "task": {"type": "string", "description": "What to do, in full: the agent sees nothing of this conversation"},
            "context": {"type": "object", "description": "Structured input, as the agent's input_schema asks"},
            "station": {"type": "string", "description": "Refuse if another station holds the agent"},
            "priority": {"type": "integer", "description": "Higher is more urgent; default 0"},
            "timeout": {"type": "string", "description": "For everything, waiting included: \"30s\", \"5m\""},
            "queue_timeout": {"type": "string"}, "silence_timeout": {"type": "string"},
            "run_id": {"type": "string", "description": "Join the run of earlier work"},
            "idempotency_key": {"type": "string", "description": "The same key never assigns twice"},
            "accept": {"type": "object", "description": "Checked before it counts as done: {command: [argv], timeout, schema: of the result, paths: [must exist]}"},
            "budget": {"type": "object", "description": "For it and all it assigns: {tokens, cost_usd, turns, works}"},
            "after": {"type": "array", "items": {"type": "string"}, "description": "Works that must complete first; the agent gets their results"},
            "if_failed": {"type": "string", "enum": ["follow", "fail", "cancel", "run"], "description": "If one of them does not complete"},
            "map": {"type": "array", "items": {"anyOf": [{"type": "object"}, {"type": "string"}]}, "description": "One work per item under one work_id: objects join context, else {item} in task"},
            "parallel": {"type": "integer", "description": "Items at once"},
        }), &["agent_name", "task"]),
        output_schema = object(json!({
            "work_id": {"type": "string"}, "agent_name": {"type": "string"}, "station": {"type": "string"},
            "run_id": {"type": "string", "description": "This work's own run"}, "root_run_id": {"type": "string"},
            "status": {"const": "ASSIGNED"}, "note": {"type": "string"},
        }), &["work_id", "agent_name", "station", "run_id", "root_run_id", "status"]),
        annotations(read_only_hint = false, destructive_hint = false, idempotent_hint = false, open_world_hint = true)
    )]
    async fn assign_work(&self, mut call: Call) -> Result<Answer, Problem> {
        let caller = call.caller(&self.connection().caller);
        let trace = call.trace();
        let arguments = &mut call.arguments;
        let name = arguments.required("agent_name", "the name of an agent, as list_available_agents shows it")?;
        let agent = find(self.dispatcher(), &name)?.manifest.name;
        let request = Request {
            agent,
            task: arguments.required("task", "what the agent is asked to do, in full")?,
            context: arguments.object("context")?,
            station: arguments.optional("station")?.map(|text| text.trim().parse()).transpose()?,
            priority: arguments.integer("priority")?.unwrap_or(0),
            timeout: arguments.span("timeout")?,
            queue_timeout: arguments.span("queue_timeout")?,
            silence_timeout: arguments.span("silence_timeout")?,
            run_id: arguments.optional("run_id")?.map(|text| text.trim().parse()).transpose()?,
            idempotency_key: arguments.text("idempotency_key")?,
            trace,
            accept: arguments.optional_object("accept")?.map(|given| Criteria::read(&given)).transpose()?,
            budget: arguments.optional_object("budget")?.map(|given| Budget::read(&given)).transpose()?,
            after: arguments.after()?,
            map: arguments.items()?,
        };
        let waits = match (&request.map, &request.after) {
            (Some(map), _) => Some(format!("{} items under this one work_id: await_work waits for all of them", map.items.len())),
            (None, Some(_)) => Some("it starts once the works in after are complete, and its timeout counts from then".to_owned()),
            (None, None) => None,
        };
        let assigned = self.dispatcher().assign(&caller, request).await?;
        let mut answer = fields(json!({
            "work_id": assigned.work_id,
            "agent_name": assigned.agent,
            "station": assigned.station,
            "run_id": assigned.run_id,
            "root_run_id": assigned.root_run_id,
            "status": "ASSIGNED",
        }));
        if let Some(note) = waits.filter(|_| !assigned.known) {
            answer.insert("note".into(), note.into());
        }
        if assigned.known {
            answer.insert("note".into(), "this idempotency_key was known: this is the work of the first order".into());
        } else if !assigned.online {
            answer.insert("note".into(), report::offline(&assigned.station).into());
        }
        Ok(Answer::new(answer))
    }

    #[tool(
        name = "check_work",
        title = "Check work",
        description = "Shows where work stands, without waiting. Without arguments: all that this workspace has outstanding, newly settled or \
                       waiting for an answer (use it after losing context). \
                       Reads large results in parts with one of lines, grep, jsonpath, bytes.",
        input_schema = object(json!({
            "work_id": {"type": "string"},
            "work_ids": {"type": "array", "items": {"type": "string"}},
            "run_id": {"type": "string", "description": "This run and everything below it"},
            "lines": {"type": "string", "description": "\"10-40\""},
            "grep": {"type": "string", "description": "Regex; gives the lines that match"},
            "jsonpath": {"type": "string", "description": "\"$.items[0]\""},
            "bytes": {"type": "string", "description": "\"0-1023\""},
        }), &[]),
        output_schema = object(report_schema(json!({
            "works": {"type": "array", "items": {"type": "object"}},
            "outstanding": {"type": "integer"},
            "selection": {"type": "object", "properties": {
                "text": {"type": "string"}, "total_bytes": {"type": "integer"}, "truncated": {"type": "boolean"},
            }},
        })), &[]),
        annotations(read_only_hint = true, open_world_hint = false)
    )]
    async fn check_work(&self, mut call: Call) -> Result<Answer, Problem> {
        let caller = call.caller(&self.connection().caller);
        let selector = selector(&mut call.arguments)?;
        let run_id = call.arguments.optional("run_id")?;
        let (ids, list) = call.arguments.works()?;
        if let Some(selector) = selector {
            let [id] = ids[..] else {
                return Err(Problem::new("lines, grep, jsonpath and bytes read the result of one work", "Call again with its work_id."));
            };
            self.dispatcher().must_see(&caller, &[id]).await?;
            return self.part(id, &selector).await;
        }
        if let Some(run_id) = run_id {
            if !ids.is_empty() {
                return Err(Problem::new("run_id and work ids were both given", "Call again with one of the two."));
            }
            return self.check_run(&caller, &run_id).await;
        }
        self.dispatcher().must_see(&caller, &ids).await?;
        match ids[..] {
            [] => self.look_around(&caller).await,
            [id] if !list => {
                let work = self.dispatcher().check(id).await?;
                Ok(self.report(&work, Map::new(), call.takes_links()).await)
            }
            _ => {
                let works = self.check_all(&ids).await?;
                Ok(self.reports(&works, Map::new(), call.takes_links()).await)
            }
        }
    }

    #[tool(
        name = "cancel_work",
        title = "Cancel work",
        description = "Stops work: waiting work never starts, running work is ended. Settled work stays as it is.",
        input_schema = object(json!({"work_id": {"type": "string"}, "reason": {"type": "string"}}), &["work_id"]),
        output_schema = object(report_schema(json!({})), &["work_id", "status"]),
        annotations(read_only_hint = false, destructive_hint = true, idempotent_hint = true, open_world_hint = false)
    )]
    async fn cancel_work(&self, mut call: Call) -> Result<Answer, Problem> {
        let id = required_work(&mut call)?;
        let reason = call.arguments.optional("reason")?;
        self.dispatcher().must_see(&call.caller(&self.connection().caller), &[id]).await?;
        let before = self.dispatcher().check(id).await?;
        let patience = self.dispatcher().config().lattice.work.kill_after.get() + CONFIRM.get();
        let mut further = Map::new();
        let work = if before.status.is_settled() {
            further.insert("note".into(), format!("it was {} already, and stays so", before.status.label()).into());
            before
        } else {
            self.dispatcher().cancel(id, reason, patience).await?
        };
        if !work.status.is_settled() {
            further.insert("note".into(), "the stop was asked for and is not confirmed yet".into());
            further.insert("next".into(), "call await_work to see it confirmed".into());
        }
        Ok(self.report(&work, further, call.takes_links()).await)
    }
}

impl Server {
    /// An answer with one work.
    pub(super) async fn report(&self, work: &Work, further: Map<String, Value>, links: bool) -> Answer {
        let mut reporter = Reporter::single(self.dispatcher());
        reporter.heed_pauses(self.dispatcher(), [work]).await;
        let mut answer = reporter.work(work);
        answer.extend(further);
        let links = if links { reporter.into_links() } else { Vec::new() };
        Answer::new(answer).with_links(links)
    }

    /// An answer with several works.
    pub(super) async fn reports(&self, works: &[std::sync::Arc<Work>], further: Map<String, Value>, links: bool) -> Answer {
        let mut reporter = Reporter::several(self.dispatcher());
        reporter.heed_pauses(self.dispatcher(), works.iter().map(|work| &**work)).await;
        let shown: Vec<Value> = works.iter().map(|work| Value::Object(reporter.work(work))).collect();
        let mut answer = further;
        answer.insert("works".into(), shown.into());
        let links = if links { reporter.into_links() } else { Vec::new() };
        Answer::new(answer).with_links(links)
    }

    /// Works as they are now, in the order they were named.
    pub(super) async fn check_all(&self, ids: &[WorkId]) -> Result<Vec<std::sync::Arc<Work>>, Problem> {
        let max = self.dispatcher().config().mcp.works_max;
        if ids.len() > max as usize {
            return Err(crate::dispatcher::Error::TooMany { given: ids.len(), max }.into());
        }
        let mut works = Vec::with_capacity(ids.len());
        for id in ids {
            works.push(self.dispatcher().check(*id).await?);
        }
        Ok(works)
    }

    async fn look_around(&self, caller: &Caller) -> Result<Answer, Problem> {
        let outlook = self.dispatcher().look_around(caller, SHOWN_MAX).await?;
        let mut questions = HashMap::new();
        for run in outlook.asking.iter().take(report::ASKING_SHOWN_MAX) {
            let work = self.dispatcher().check(run.work_id).await?;
            questions.extend(work.open_question().map(|ask| (run.work_id, ask.reason.clone())));
        }
        Ok(Answer::new(report::outlook(&outlook, &questions, now())))
    }

    async fn check_run(&self, caller: &Caller, run_id: &str) -> Result<Answer, Problem> {
        let run_id = run_id.trim().parse()?;
        let runs = self.dispatcher().check_run(caller, &run_id).await?;
        let mut reporter = Reporter::several(self.dispatcher());
        let works: Vec<Value> = runs.iter().map(|run| Value::Object(reporter.run(run))).collect();
        Ok(Answer::new(fields(json!({ "run_id": run_id, "works": works }))))
    }

    async fn part(&self, id: WorkId, selector: &Selector) -> Result<Answer, Problem> {
        let work = self.dispatcher().check(id).await?;
        let asked = work.open_question().map(|ask| Output::Inline(ask.context.clone()));
        let asked = asked.filter(|context| *context != Output::Inline(Value::Null));
        let output = match &work.outcome {
            Some(Outcome::Complete(output)) => Some(output),
            // What an agent asks with, or had printed when it was stopped, is all there is.
            _ => asked.as_ref().or(work.printed.as_ref()),
        };
        let Some(output) = output else {
            let next = if work.status.is_settled() { "Call check_work with the work_id alone." } else { "Wait for it with await_work." };
            return Err(Problem::new(format_args!("work {id} is {} and has no result", work.status.label()), next));
        };
        let dispatcher = self.dispatcher();
        let config = dispatcher.config();
        let selected = results::select(&dispatcher.transport().blobs, output, selector, &config.results).await;
        let selection = selected.map_err(|error| Problem::of_result(error, &work, config.lattice.storage.blob_max_age))?;
        let mut answer = fields(json!({
            "work_id": id,
            "status": work.status.label(),
            "selection": { "text": selection.text, "total_bytes": selection.total_bytes, "truncated": selection.truncated },
        }));
        if let Some(note) = selection.note {
            answer.insert("note".into(), note.into());
        }
        Ok(Answer::new(answer))
    }
}

/// The work that a call must name.
pub(super) fn required_work(call: &mut Call) -> Result<WorkId, Problem> {
    call.arguments.work_id()?.ok_or_else(|| {
        Problem::new("work_id is missing", "Call again with work_id: the id that assign_work returned; check_work lists outstanding works.")
    })
}

pub(super) fn selector(arguments: &mut Arguments) -> Result<Option<Selector>, Problem> {
    type Parse = fn(&str) -> Result<Selector, results::Error>;
    let kinds: [(&str, Parse); 4] =
        [("lines", Selector::lines), ("grep", Selector::grep), ("jsonpath", Selector::jsonpath), ("bytes", Selector::bytes)];
    let mut selector = None;
    for (name, parse) in kinds {
        let Some(text) = arguments.optional(name)? else { continue };
        if selector.is_some() {
            return Err(Problem::new("more than one of lines, grep, jsonpath and bytes was given", "Call again with one of them."));
        }
        selector = Some(parse(&text)?);
    }
    Ok(selector)
}
