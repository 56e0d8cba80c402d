//! A work as tools show it: small, and without what is empty.

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::sync::Arc;

use rmcp::model::Resource;
use serde_json::{Map, Value, json};

use super::agents::Loads;
use crate::config::Config;
use crate::dispatcher::Dispatcher;
use crate::model::event::{Ask, Failure, Needs};
use crate::model::id::{AgentName, WorkId};
use crate::model::output::Output;
use crate::model::run::Run;
use crate::model::status::Status;
use crate::model::time::{Span, Timestamp};
use crate::model::work::{Attempt, Outcome, Work};
use crate::registry::{Agent, Snapshot};
use crate::results;
use crate::runs::Outlook;

/// How much of a failure's evidence, or of a question's context, a report shows.
const EVIDENCE_MAX: usize = 4096;
/// How long the whole list of what is outstanding may be: 400 tokens.
const OUTSTANDING_MAX: usize = 1600;
/// How many of the works that a work waits for a report names.
const WAITS_SHOWN_MAX: usize = 10;
/// How to read what does not stand in a report.
const READ_PRINTED: &str = "call check_work with this work_id and lines, grep or bytes";
/// How to read the whole context of a question.
const READ_CONTEXT: &str = "call check_work with this work_id and lines, grep, jsonpath or bytes for the whole";
/// How many settled works stand beside what is outstanding.
const SETTLED_SHOWN_MAX: usize = 3;
/// How many works that ask for help are shown.
pub(super) const ASKING_SHOWN_MAX: usize = 3;
/// How much of a question stands in a list.
const QUESTION_SHOWN_MAX: usize = 80;

/// Writes reports that together hold a bounded amount of results.
pub(super) struct Reporter<'a> {
    config: &'a Config,
    snapshot: Arc<Snapshot>,
    room: usize,
    links: Vec<Resource>,
    /// Until when agents pause that works wait for.
    pauses: HashMap<AgentName, Timestamp>,
    /// What is said of work elsewhere while the server is away.
    away: Option<String>,
}

impl<'a> Reporter<'a> {
    /// Reports on a single work: its result stands inline if it is small enough to.
    pub(super) fn single(dispatcher: &'a Dispatcher) -> Self {
        let away = dispatcher.away().map(|(since, reason)| unreachable(since, &reason));
        let (config, snapshot) = (dispatcher.config(), dispatcher.registry().snapshot());
        Self { config, snapshot, room: usize::MAX, links: Vec::new(), pauses: HashMap::new(), away }
    }

    /// Looks whether the agents pause that these works wait for.
    pub(super) async fn heed_pauses(&mut self, dispatcher: &Dispatcher, works: impl IntoIterator<Item = &Work>) {
        let waits = |work: &&Work| matches!(work.status, Status::Pending(_));
        let names = works.into_iter().filter(waits).filter_map(|work| Some(&work.assignment.as_ref()?.agent_name));
        let agents: BTreeMap<&AgentName, &Agent> = names.filter_map(|name| self.snapshot.agents.get_key_value(name)).collect();
        match Loads::of(dispatcher, agents.values().copied()).await {
            Ok(loads) => {
                let until = |(name, agent): (&AgentName, &Agent)| Some((name.clone(), loads.paused_until(agent)?));
                self.pauses = agents.into_iter().filter_map(until).collect();
            }
            Err(problem) => tracing::debug!(reason = problem.text(), "it is not known whether the agents that works wait for pause"),
        }
    }

    /// Reports on several works, whose inline results together stay within what one selection may give.
    pub(super) fn several(dispatcher: &'a Dispatcher) -> Self {
        Self { room: dispatcher.config().results.selection_max.as_usize(), ..Self::single(dispatcher) }
    }

    /// Links to the results that were too large to stand in a report.
    pub(super) fn into_links(self) -> Vec<Resource> {
        self.links
    }

    /// A work.
    pub(super) fn work(&mut self, work: &Work) -> Map<String, Value> {
        self.report(work, work.assignment.as_ref().map(|assignment| &assignment.agent_name))
    }

    /// The work of a run, as the run store has it.
    pub(super) fn run(&mut self, run: &Run) -> Map<String, Value> {
        let mut report = self.report(&Work::from_run(run), Some(&run.agent));
        if let Some(budget) = &run.budget {
            report.insert("budget".into(), json!(budget));
        }
        if run.attempt > 0 {
            report.insert("attempt".into(), run.attempt.into());
        }
        report
    }

    fn report(&mut self, work: &Work, agent: Option<&AgentName>) -> Map<String, Value> {
        let mut report = Map::new();
        report.insert("work_id".into(), work.work_id.to_string().into());
        report.insert("run_id".into(), work.run_id.as_str().into());
        report.insert("status".into(), work.status.label().into());
        if let Some(agent) = agent {
            report.insert("agent_name".into(), agent.as_str().into());
        }
        if !work.event.is_empty() {
            report.insert("event".into(), work.event.as_str().into());
        }
        if let Some(ms) = work.duration_ms {
            report.insert("duration_ms".into(), ms.into());
        }
        if let Some(attempt) = work.attempts.last() {
            report.insert("attempt".into(), attempt.number.into());
        }
        self.claimed(&mut report, work);
        if work.late_events > 0 {
            report.insert("late_events".into(), work.late_events.into());
        }
        if let Some(map) = work.assignment.as_ref().and_then(|order| order.map.as_ref()) {
            report.insert("items".into(), map.count.into());
        }
        if let Some(output) = &work.printed {
            report.insert("printed".into(), printed(output));
        }
        match &work.outcome {
            Some(Outcome::Complete(output)) => self.result(&mut report, work, output),
            Some(Outcome::Failed(failure)) => failed(&mut report, failure),
            Some(Outcome::Cancelled(Some(reason))) => {
                report.insert("reason".into(), reason.as_str().into());
            }
            Some(Outcome::Cancelled(None)) => {}
            None => self.unsettled(&mut report, work, agent),
        }
        report
    }

    /// What the agent's word is worth, with the evidence, and what was used.
    fn claimed(&mut self, report: &mut Map<String, Value>, work: &Work) {
        if let Some(claim) = work.claim() {
            report.insert("claim".into(), claim.label().into());
        }
        let failed = matches!(work.outcome, Some(Outcome::Failed(_)));
        let shown = work.checks.iter().map(|check| {
            let mut shown = json!({ "what": check.what, "ok": check.ok, "found": check.found });
            if let Some(code) = check.exit_code {
                shown["exit_code"] = code.into();
            }
            if let Some(sha256) = &check.sha256 {
                shown["sha256"] = sha256.as_str().into();
            }
            // A failure's evidence shows it already.
            if !check.output.is_empty() && !failed && check.output.len() <= self.room {
                self.room -= check.output.len();
                shown["output"] = check.output.as_str().into();
            }
            shown
        });
        let shown: Vec<Value> = shown.collect();
        if !shown.is_empty() {
            report.insert("checks".into(), shown.into());
        }
        if let Some(allowance) = work.budget() {
            report.insert("budget".into(), json!(allowance.budget));
        }
        let usage = work.usage();
        if !usage.is_empty() {
            report.insert("usage".into(), json!(usage));
        }
    }

    /// A question, with as much of what an agent says as an answer can hold.
    fn question(&mut self, work: &Work, ask: &Ask) -> Value {
        let reason_max = self.config.lattice.work.text_max.as_usize();
        let mut question = json!({ "ask": ask.ask, "reason": head(&ask.reason, reason_max), "needs": ask.needs });
        if ask.reason.len() > reason_max {
            question["reason_size"] = ask.reason.len().into();
            question["next"] = format!("read the resource work://{} for the whole reason", work.work_id).into();
        }
        if ask.context.is_null() {
            return question;
        }
        let (size, max) = (text_len(&ask.context), EVIDENCE_MAX.min(self.room));
        self.room -= size.min(max);
        question["context"] = match size <= max {
            true => ask.context.clone(),
            false => json!({ "begin": head(&Output::inline_text(&ask.context), max), "size": size, "next": READ_CONTEXT }),
        };
        question
    }

    fn unsettled(&mut self, report: &mut Map<String, Value>, work: &Work, agent: Option<&AgentName>) {
        if work.is_called_off() {
            report.insert("cancelling".into(), true.into());
        }
        let mut progress = Map::new();
        if let Some(pct) = work.progress_pct {
            progress.insert("pct".into(), pct.into());
        }
        if let Some(message) = &work.progress_msg {
            progress.insert("message".into(), message.as_str().into());
        }
        if !progress.is_empty() {
            report.insert("progress".into(), progress.into());
        }
        if let Some(after) = work.waits_for() {
            let shown: Vec<String> = after.work_ids.iter().take(WAITS_SHOWN_MAX).map(ToString::to_string).collect();
            if shown.len() < after.work_ids.len() {
                report.insert("waits_for_in_all".into(), after.work_ids.len().into());
            }
            report.insert("waits_for".into(), shown.into());
        }
        if let Some(at) = work.retry_at {
            report.insert("retry_at".into(), at.to_string().into());
        }
        if matches!(work.status, Status::Pending(_))
            && let Some(ended) = work.attempts.last().and_then(|attempt| attempt.ended.as_ref())
        {
            report.insert("last_attempt".into(), json!({ "kind": ended.kind, "message": ended.message }));
        }
        if let Some(ask) = work.open_question() {
            report.insert("question".into(), self.question(work, ask));
            report.insert("next".into(), how_to_answer(work, ask).into());
        }
        let asking = work.asking.iter().filter_map(|item| Some((item, item.open_question()?)));
        let shown: Vec<Value> = asking
            .map(|(item, ask)| {
                let mut shown = self.question(item, ask);
                shown["work_id"] = item.work_id.to_string().into();
                shown["next"] = how_to_answer(item, ask).into();
                shown
            })
            .collect();
        if !shown.is_empty() {
            report.insert("asking".into(), shown.into());
            report.insert("next".into(), "items in `asking` wait for an answer: answer_work takes the work_id that stands there".into());
        }
        let paused = agent.filter(|_| matches!(work.status, Status::Pending(_))).and_then(|name| self.pauses.get(name));
        if let Some(until) = paused {
            report.insert("paused_until".into(), until.to_string().into());
        }
        let is_here = agent.and_then(|name| self.snapshot.agents.get(name)).is_some_and(|agent| agent.here);
        if let Some(away) = self.away.as_ref().filter(|_| !is_here) {
            report.insert("note".into(), format!("as it was heard of last: {away}").into());
        } else if let Some(attempt) = work.running().filter(|attempt| !self.is_alive(attempt)) {
            report.insert("detail".into(), "outcome unknown".into());
            report.insert("note".into(), no_sign_of_life(attempt).into());
        } else if let Some(until) = paused {
            report.insert("note".into(), format!("the agent is out of quota and pauses until {until}: the work waits").into());
        } else if matches!(work.status, Status::Pending(_))
            && let Some(agent) = agent.and_then(|name| self.snapshot.agents.get(name)).filter(|agent| !agent.online)
        {
            report.insert("note".into(), offline(&agent.station).into());
        }
    }

    /// Whether the process of an attempt gives signs of life.
    fn is_alive(&self, attempt: &Attempt) -> bool {
        self.snapshot.stations.get(&attempt.station).is_some_and(|instances| instances.contains(&attempt.instance))
    }

    fn result(&mut self, report: &mut Map<String, Value>, work: &Work, output: &Output) {
        if let Output::Inline(value) = output {
            let size = text_len(value);
            if size <= self.config.results.inline_max.as_usize() && size <= self.room {
                self.room -= size;
                report.insert("result".into(), value.clone());
                return;
            }
        }
        let (sha256, size) = results::digest(output);
        let uri = format!("work://{}/result", work.work_id);
        let mime = output.media().mime();
        let link = Resource::new(uri.clone(), format!("result of work {}", work.work_id)).with_mime_type(mime).with_size(size);
        self.links.push(link);
        report.insert("result_ref".into(), json!({ "sha256": sha256, "size": size, "media_type": mime, "uri": uri }));
        report
            .insert("next".into(), "too large to stand here: call check_work with this work_id and lines, grep, jsonpath or bytes".into());
    }
}

fn how_to_answer(work: &Work, ask: &Ask) -> String {
    let more = match work.open_questions().count() {
        0 | 1 => String::new(),
        open => format!("; it waits for the answers to {open} questions, one after the other"),
    };
    match ask.needs {
        Needs::Orchestrator => format!("call answer_work with the answer and ask {}; the same work goes on{more}", ask.ask),
        Needs::Human => format!(
            "only a person may answer this: ask your user, and pass on what they say with answer_work and ask {ask}, or have them run \
             `lattice-mcp work answer {id} TEXT --ask {ask}`; do not answer it yourself{more}",
            ask = ask.ask,
            id = work.work_id
        ),
    }
}

/// What is said while the lattice's server is away.
pub(super) fn unreachable(since: Timestamp, reason: &str) -> String {
    format!("{reason} (since {since}). Work for other stations waits until it is back; agents of this station work all the same")
}

/// What is said of work that waits for a station.
pub(super) fn offline(station: &crate::model::id::StationId) -> String {
    format!("station {station} is offline for this agent: the work waits until a process of it that runs the agent is back")
}

/// What is said of work whose attempt is not heard of.
fn no_sign_of_life(attempt: &Attempt) -> String {
    format!(
        "the process of station {} that runs attempt {} gives no sign of life: it may be slow or asleep, and what came of the attempt is \
         unknown until it is back, another attempt settles the work, or its time is up",
        attempt.station, attempt.number
    )
}

/// What a stopped agent had printed: its end, and how to read all of it.
fn printed(output: &Output) -> Value {
    let (sha256, size) = results::digest(output);
    match output {
        Output::Inline(value) if text_len(value) <= EVIDENCE_MAX => json!(Output::inline_text(value)),
        Output::Inline(value) => json!({ "end": tail(&Output::inline_text(value), EVIDENCE_MAX), "size": size, "next": READ_PRINTED }),
        Output::Blob(_) => json!({ "sha256": sha256, "size": size, "next": READ_PRINTED }),
    }
}

fn failed(report: &mut Map<String, Value>, failure: &Failure) {
    let mut error = json!({ "kind": failure.kind, "message": failure.message });
    if let Some(code) = failure.exit_code {
        error["exit_code"] = code.into();
    }
    if let Some(evidence) = &failure.evidence {
        error["evidence"] = tail(evidence, EVIDENCE_MAX).into();
    }
    report.insert("error".into(), error);
    if failure.dead_letter {
        report.insert("dead_letter".into(), true.into());
        let next = "all attempts are used up: see what went wrong in `error`, mend it, and assign it anew; \
                    the user can as well, with `lattice-mcp work redrive` and the work_id";
        report.insert("next".into(), next.into());
    }
}

/// The beginning of a text.
fn head(text: &str, max: usize) -> &str {
    let mut end = max.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// The end of a text, where failures say why.
fn tail(text: &str, max: usize) -> &str {
    let mut start = text.len().saturating_sub(max);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

/// How many bytes a result has as text, without writing it out.
fn text_len(value: &Value) -> usize {
    struct Count(usize);
    impl std::io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    if let Value::String(text) = value {
        return text.len();
    }
    let mut count = Count(0);
    // Counting does not fail.
    let _ = serde_json::to_writer(&mut count, value).and_then(|()| count.flush().map_err(serde_json::Error::io));
    count.0
}

/// What a caller that remembers nothing must know, in under 400 tokens however much it is: what asks for help, what is new, what is
/// outstanding, what settled last. `questions` are those of the works that ask.
pub(super) fn outlook(outlook: &Outlook, questions: &HashMap<WorkId, String>, now: Timestamp) -> Map<String, Value> {
    let total = outlook.outstanding();
    let mut list = Map::new();
    list.insert("outstanding".into(), total.into());
    if total > 0 {
        let counts: BTreeMap<&str, u64> = outlook.counts.iter().map(|(label, count)| (label.as_str(), *count)).collect();
        list.insert("counts".into(), json!(counts));
    }
    list.insert("settled_since_last_look".into(), outlook.news.into());
    if outlook.elsewhere > 0 {
        list.insert("of_other_workspaces".into(), outlook.elsewhere.into());
    }
    list.insert("next".into(), next_of(outlook).into());

    // The braces, the names of the lists and the note on what was left out.
    const FRAME: usize = 120;
    let mut room = OUTSTANDING_MAX.saturating_sub(Value::Object(list.clone()).to_string().len() + FRAME);
    let mut fit = |brief: Value, list: &mut Vec<Value>| {
        let len = brief.to_string().len() + 1;
        if len <= room {
            room -= len;
            list.push(brief);
        }
    };
    let (mut works, mut settled) = (Vec::new(), Vec::new());
    for run in outlook.asking.iter().take(ASKING_SHOWN_MAX) {
        let mut brief = brief(run, now);
        if let Some(question) = questions.get(&run.work_id) {
            brief["question"] = super::agents::one_line(question, QUESTION_SHOWN_MAX).into();
        }
        fit(brief, &mut works);
    }
    let news = usize::try_from(outlook.news).unwrap_or(usize::MAX);
    for (place, run) in outlook.settled.iter().take(SETTLED_SHOWN_MAX).enumerate() {
        let mut brief = brief(run, now);
        if place < news {
            brief["new"] = true.into();
        }
        fit(brief, &mut settled);
    }
    for run in &outlook.open {
        fit(brief(run, now), &mut works);
    }
    let hidden = total.saturating_sub(works.len() as u64);
    if hidden > 0 {
        list.insert("not_shown".into(), hidden.into());
    }
    list.insert("works".into(), works.into());
    if !settled.is_empty() {
        list.insert("settled_last".into(), settled.into());
    }
    list
}

fn next_of(outlook: &Outlook) -> &'static str {
    if !outlook.asking.is_empty() {
        "check_work with a work_id shows its question in full; answer_work answers it"
    } else if outlook.outstanding() > 0 {
        "await_work waits for works; check_work with a work_id shows one"
    } else if outlook.news > 0 {
        "nothing is outstanding; check_work with a work_id shows a result"
    } else {
        "nothing is outstanding"
    }
}

fn brief(run: &Run, now: Timestamp) -> Value {
    let since = now.since(run.settled_at.unwrap_or(run.assigned_at)).as_secs();
    json!({
        "work_id": run.work_id.to_string(),
        "agent_name": run.agent.as_str(),
        "status": run.status.label(),
        "ago": Span::secs(since).to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::event::FailureKind;
    use crate::model::status::Mark;

    fn run(n: u128, status: Status, name: &str) -> Run {
        let run_id = crate::model::id::RunId::root_of(uuid::Uuid::from_u128(n));
        Run {
            local_number: 1,
            parent_run_id: None,
            root_run_id: run_id.clone(),
            run_id,
            originating_station: "here".parse().unwrap(),
            target_station: "there".parse().unwrap(),
            trace_id: String::new(),
            work_id: crate::model::id::WorkId::new(uuid::Uuid::from_u128(n)),
            agent: name.parse().unwrap(),
            task: "a task".into(),
            status,
            event: "WORK_ACCEPTED".into(),
            assigned_at: Timestamp::from_millis(0),
            accepted_at: None,
            settled_at: None,
            attempt: 1,
            duration_ms: None,
            outcome: None,
            checks: Vec::new(),
            usage: crate::model::budget::Usage::default(),
            budget: None,
            principal: None,
        }
    }

    fn seen(open: usize, asking: usize, settled: usize, factor: u64, name: &str) -> Outlook {
        let escalated = Status::Escalated { mark: Mark::default(), ask: 1, parked: false };
        let runs = |count: usize, status| (0..count).map(|n| run(n as u128, status, name)).collect::<Vec<Run>>();
        Outlook {
            counts: vec![("PENDING".into(), open as u64 * factor), ("ESCALATED".into(), asking as u64 * factor)],
            asking: runs(asking, escalated),
            open: runs(open, Status::default()),
            news: settled as u64 * factor,
            settled: runs(settled, Status::Complete),
            elsewhere: factor,
        }
    }

    #[test]
    fn what_there_is_to_know_stays_under_400_tokens_for_any_number() {
        let long = "n".repeat(64);
        for (open, asking, settled) in [(0, 0, 0), (1, 0, 0), (20, 20, 20), (20, 0, 20), (0, 20, 0), (0, 0, 20), (3, 3, 3)] {
            for factor in [1, 1_000_000_000_000] {
                let outlook_ = seen(open, asking, settled, factor, &long);
                let questions = outlook_.asking.iter().map(|run| (run.work_id, "\"why\"\u{1}\n".repeat(99))).collect();
                let text = Value::Object(outlook(&outlook_, &questions, Timestamp::from_millis(i64::MAX))).to_string();
                assert!(text.len() < OUTSTANDING_MAX, "{open} {asking} {settled}: {} characters", text.len());
            }
        }
    }

    #[test]
    fn what_asks_for_help_is_shown_first_and_what_is_new_is_marked() {
        let mut known = seen(9, 1, 3, 1, "worker");
        known.news = 1;
        let questions = HashMap::from([(known.asking[0].work_id, "which colour?".to_owned())]);
        let list = outlook(&known, &questions, Timestamp::from_millis(61_000));
        assert_eq!((&list["works"][0]["status"], &list["works"][0]["question"]), (&json!("ESCALATED"), &json!("which colour?")));
        assert_eq!(list["works"][1]["ago"], "1m1s");
        assert_eq!((&list["counts"]["PENDING"], &list["outstanding"]), (&json!(9), &json!(10)));
        assert_eq!(list["settled_last"][0]["new"], true);
        assert_eq!(list["settled_last"][1]["new"], Value::Null);
        let shown = list["works"].as_array().unwrap().len() as u64;
        assert_eq!(list["not_shown"].as_u64().unwrap() + shown, 10);
    }

    #[test]
    fn a_size_is_that_of_the_text() {
        assert_eq!(text_len(&json!("héllo")), 6);
        assert_eq!(text_len(&json!({"a": [1, 2]})), r#"{"a":[1,2]}"#.len());
    }

    #[test]
    fn evidence_is_cut_at_a_character() {
        assert_eq!(tail("aé", 1), "");
        assert_eq!(tail("aé", 2), "é");
        let mut report = Map::new();
        let failure = Failure { evidence: Some("x".repeat(9999)), ..Failure::new(FailureKind::Agent, "no") };
        let mut work = Work::from_run(&run(1, Status::Failed, "a"));
        work.events = 1;
        failed(&mut report, &failure);
        assert_eq!(report["error"]["evidence"].as_str().unwrap().len(), EVIDENCE_MAX);
        assert_eq!(report["error"]["kind"], "agent");
    }
}
