//! `assign`: hands work to agents and waits for it, as a script does.

use std::io::Write as _;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::failure::{Exit, Failure};
use super::session::Session;
use super::show;
use crate::dispatcher::{Caller, Dispatcher, Mode, Request};
use crate::model::accept::Criteria;
use crate::model::budget::Budget;
use crate::model::event::{Event, Kind};
use crate::model::id::{self, AgentName, WorkId};
use crate::model::output::Output;
use crate::model::time::Span;
use crate::model::work::{Outcome, Work};
use crate::station::{self, Station};

/// A wait is taken up again after this long, for as long as the work goes on.
const WAIT: Duration = Duration::from_secs(3600);
/// How long a station may take to notice that a work is to stop, besides the time that its program has.
const CANCEL_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The agent, or several with commas between: each gets the same task, all at once
    #[arg(value_name = "AGENT", value_parser = names)]
    names: Names,
    /// What it is asked to do
    #[arg(value_name = "TASK")]
    task: String,
    /// Structured input, a JSON object
    #[arg(long, value_name = "JSON", value_parser = object)]
    context: Option<Map<String, Value>>,
    /// How long the work may take in all, such as 30s or 5m
    #[arg(long, value_name = "SPAN")]
    timeout: Option<Span>,
    /// Higher is more urgent
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    priority: i64,
    /// What is checked before the work counts as done: {"command": [...], "timeout": "1m", "schema": {...}, "paths": [...]}
    #[arg(long, value_name = "JSON", value_parser = criteria)]
    accept: Option<Criteria>,
    /// What the work and all that it assigns may use: {"tokens": N, "cost_usd": N, "turns": N, "works": N}
    #[arg(long, value_name = "JSON", value_parser = budget)]
    budget: Option<Budget>,
    /// Print the work's id at once, and leave the work to the stations that run
    #[arg(long)]
    no_wait: bool,
}

#[derive(Debug, Clone)]
struct Names(Vec<AgentName>);

fn names(text: &str) -> Result<Names, String> {
    text.split(',').map(|name| name.trim().parse().map_err(|error: id::Error| error.to_string())).collect::<Result<_, _>>().map(Names)
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))
}

fn criteria(text: &str) -> Result<Criteria, String> {
    object(text).and_then(|given| Criteria::read(&given).map_err(|error| error.to_string()))
}

fn budget(text: &str) -> Result<Budget, String> {
    object(text).and_then(|given| Budget::read(&given).map_err(|error| error.to_string()))
}

pub(super) async fn run(session: &mut Session, args: Args) -> Result<(), Failure> {
    let mut setting = session.setting();
    setting.bound = station::bound_by(|name| std::env::var(name).ok())?;
    setting.orchestrates_only = args.no_wait;
    let station = Station::open(setting.clone())?;
    let caller = setting.caller();
    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    tasks.spawn(station::heed_signals(station.clone(), stop.clone()));
    // What others have left on the hook is none of this process's business: it ends with its own works.
    station.keep_to(Vec::new());
    station.wake().await?;
    let works = match assign(station.dispatcher(), &caller, &args).await {
        Ok(works) => works,
        Err(failure) => {
            station.close().await;
            return Err(failure);
        }
    };
    station.keep_to(works.clone());
    let ended = if args.no_wait {
        list(session, &works).map_err(Failure::from)
    } else {
        tokio::select! {
            ended = wait(session, station.dispatcher(), &works) => ended,
            () = stop.cancelled() => interrupted(&station, &works).await,
        }
    };
    station.close().await;
    ended
}

/// Whoever interrupts wants the works stopped, not run by somebody else later.
async fn interrupted(station: &Station, works: &[WorkId]) -> Result<(), Failure> {
    let _ = writeln!(std::io::stderr(), "cancelling {} works; a second signal leaves at once", works.len());
    let dispatcher = station.dispatcher();
    let patience = dispatcher.config().lattice.work.kill_after.get() + CANCEL_PATIENCE;
    let reason = || Some("interrupted on the command line".to_owned());
    let cancelled = futures_util::future::join_all(works.iter().map(|id| dispatcher.cancel(*id, reason(), patience))).await;
    for work in cancelled.into_iter().flatten() {
        let _ = writeln!(std::io::stderr(), "work {} is {}", work.work_id, work.status.label());
    }
    Err(Failure::new(Exit::Failed, "interrupted"))
}

async fn assign(dispatcher: &Dispatcher, caller: &Caller, args: &Args) -> Result<Vec<WorkId>, Failure> {
    let requests = args.names.0.iter().map(|agent| Request {
        agent: agent.clone(),
        task: args.task.clone(),
        context: args.context.clone().unwrap_or_default(),
        station: None,
        priority: args.priority,
        timeout: args.timeout,
        queue_timeout: None,
        silence_timeout: None,
        run_id: None,
        idempotency_key: None,
        trace: None,
        accept: args.accept.clone(),
        budget: args.budget,
        after: None,
        map: None,
    });
    let requests: Vec<Request> = requests.collect();
    // All are good, or none is assigned.
    for request in &requests {
        let (agent, ..) = dispatcher.vet(request)?;
        if !agent.here && !args.no_wait {
            let waits = if agent.online { "" } else { ", where no process runs it now: the work waits" };
            let _ = writeln!(std::io::stderr(), "{}: given to station {}{waits}", request.agent, agent.station);
        }
    }
    let mut works = Vec::with_capacity(requests.len());
    for request in requests {
        works.push(dispatcher.assign(caller, request).await?.work_id);
    }
    Ok(works)
}

fn list(session: &mut Session, works: &[WorkId]) -> std::io::Result<()> {
    if session.screen.json {
        return session.screen.json(&works.iter().map(ToString::to_string).collect());
    }
    works.iter().try_for_each(|id| session.screen.line(&id.to_string()))
}

/// Waits for all, tells on standard error what happens, and prints each result.
async fn wait(session: &mut Session, dispatcher: &Dispatcher, ids: &[WorkId]) -> Result<(), Failure> {
    let works = loop {
        let works = dispatcher.wait(ids, Mode::SettledOnly, WAIT, &mut |work, event| tell(work, event)).await?;
        if works.iter().all(|work| work.status.is_settled()) {
            break works;
        }
    };
    if session.screen.json {
        session.screen.json(&works.iter().map(|work| Value::from(show::work_json(work))).collect())?;
    } else {
        for work in &works {
            print(session, work, works.len() > 1)?;
        }
    }
    match works.iter().filter(|work| !matches!(work.outcome, Some(Outcome::Complete(_)))).count() {
        0 => Ok(()),
        1 if works.len() == 1 => Err(Failure::new(Exit::Failed, format!("the work is {}", works[0].status.label()))),
        n => Err(Failure::new(Exit::Failed, format!("{n} of {} works have no result", works.len()))),
    }
}

fn print(session: &mut Session, work: &Work, several: bool) -> std::io::Result<()> {
    if several {
        let agent = work.assignment.as_ref().map(|order| order.agent_name.to_string()).unwrap_or_default();
        session.screen.line(&format!("== {agent} ({})", work.work_id))?;
    }
    match &work.outcome {
        Some(Outcome::Complete(Output::Inline(value))) => Output::inline_text(value).lines().try_for_each(|line| session.screen.line(line)),
        Some(Outcome::Complete(output)) => {
            session.screen.line(&show::output(output))?;
            session.screen.line(&format!("all of it: lattice-mcp work {} --result", work.work_id))
        }
        Some(Outcome::Failed(failure)) => {
            session.screen.line(&show::failure(failure))?;
            failure.evidence.iter().flat_map(|evidence| evidence.lines()).try_for_each(|line| session.screen.line(line))
        }
        Some(Outcome::Cancelled(_)) | None => session.screen.line(work.status.label()),
    }
}

/// Progress and questions, on standard error.
fn tell(work: &Work, event: &Event) {
    let agent = work.assignment.as_ref().map(|order| order.agent_name.as_str()).unwrap_or_default();
    let mut text = show::details(event);
    if let Kind::Escalate(asked) = &event.kind {
        text = format!("{text}; answer with: lattice-mcp work answer {} TEXT --ask {}", work.work_id, asked.ask);
    }
    if matches!(event.kind, Kind::Progress { .. } | Kind::Escalate(_) | Kind::Retrying { .. }) {
        let _ = writeln!(std::io::stderr(), "{agent}: {text}");
    }
}
