//! `work`: what is outstanding, and one work's history, result and log; cancels and answers it.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use super::failure::{Exit, Failure};
use super::runs;
use super::screen::Plain;
use super::session::{Reader, Session, Use};
use super::show;
use super::table::Table;
use crate::dispatcher::{Caller, Reply};
use crate::model;
use crate::model::event::{Event, Needs};
use crate::model::id::WorkId;
use crate::model::output::Output;
use crate::model::work::{Outcome, Work};
use crate::station;

const CHUNK: usize = 64 << 10;
/// How long a station may take to notice that a work is to stop, besides the time that its program has.
const CANCEL_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
#[command(disable_help_subcommand = true)]
pub(super) struct Args {
    /// The work to show, with all its events; without one, list those that are not settled
    #[arg(value_name = "ID")]
    id: Option<WorkId>,
    /// List the works that failed for good after all their attempts
    #[arg(long, conflicts_with = "id")]
    dead: bool,
    /// How many works are listed
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000), conflicts_with = "id")]
    limit: u32,
    /// Write the whole result to standard output, as it is
    #[arg(long, requires = "id")]
    result: bool,
    /// Write what the agent said on standard error
    // The common --log FILTER has the same name, which clap allows for the same type: this one has no text.
    #[arg(long, requires = "id", conflicts_with = "result", num_args = 0, default_missing_value = "")]
    log: Option<String>,
    /// The attempt whose log is meant [default: the last one]
    #[arg(long, value_name = "N", requires = "log")]
    attempt: Option<u32>,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Stop a work
    Cancel {
        /// The work
        id: WorkId,
        /// Why, for the record
        reason: Option<String>,
    },
    /// Give out anew a work that failed: as a new work with the same order, fresh attempts and all of its time
    Redrive {
        /// The work
        id: WorkId,
    },
    /// Answer the question that a work waits with
    Answer {
        /// The work
        id: WorkId,
        /// The answer, handed to the agent as text
        text: String,
        /// The number of the question that is answered [default: the open one, if there is only one]
        #[arg(long, value_name = "N")]
        ask: Option<u32>,
    },
}

pub(super) async fn run(session: &mut Session, args: Args) -> Result<(), Failure> {
    match (args.verb, args.id) {
        (Some(_), Some(_)) => {
            Err(Failure::new(Exit::Usage, "the work's id stands after the verb: work cancel ID, work redrive ID, work answer ID TEXT"))
        }
        (Some(Verb::Cancel { id, reason }), None) => cancel(session, id, reason).await,
        (Some(Verb::Redrive { id }), None) => redrive(session, id).await,
        (Some(Verb::Answer { id, text, ask }), None) => answer(session, id, text, ask).await,
        (None, Some(id)) if args.result => result(session, id).await,
        (None, Some(id)) if args.log.as_deref() == Some("") => log(session, id, args.attempt).await,
        (None, Some(id)) => history(session, id).await,
        (None, None) => list(session, args.limit, args.dead).await,
    }
}

async fn list(session: &mut Session, limit: u32, dead: bool) -> Result<(), Failure> {
    let Some(reader) = session.open(Use::Look).await? else { return super::session_is_empty(session) };
    if dead {
        let works = reader.dispatcher.runs().recent(None, limit, true).await?;
        return runs::list(session, &works, "no work has failed for good");
    }
    let (count, works) = reader.dispatcher.runs().open_works(None, limit).await?;
    if count > works.len() as u64 {
        tracing::warn!("the {} most recent of {count} works are listed; --limit lists more", works.len());
    }
    runs::list(session, &works, "every work is settled; lattice-mcp runs lists the recent ones")
}

async fn open(session: &Session, access: Use, id: WorkId) -> Result<Reader, Failure> {
    session.open_for(access, &format!("work {id}")).await
}

async fn history(session: &mut Session, id: WorkId) -> Result<(), Failure> {
    let reader = open(session, Use::Look, id).await?;
    let (events, work) = reader.dispatcher.history(id).await?;
    if session.screen.json {
        let mut object = show::work_json(&work);
        let wire = |event: &Event| serde_json::from_slice::<Value>(&event.to_bytes()).unwrap_or_default();
        object.insert("events".into(), events.iter().map(wire).collect());
        return Ok(session.screen.json(&Value::from(object))?);
    }
    session.screen.table(&summary(&work))?;
    session.screen.line("")?;
    let mut table = Table::new(["TIME", "EVENT", "TRY", "STATION", "DETAILS"]).cut("DETAILS");
    for event in &events {
        let attempt = if event.attempt == 0 { String::new() } else { event.attempt.to_string() };
        let at = event.at.to_string();
        table.row([at, event.kind.wire_type().to_owned(), attempt, event.station.to_string(), show::details(event)]);
    }
    if events.is_empty() {
        return Ok(session.screen.line("its events are older than the log; the run store kept how it ended")?);
    }
    Ok(session.screen.table(&table)?)
}

/// A work's final or present state.
fn summary(work: &Work) -> Table {
    let mut table = Table::pairs();
    table.pair("work", work.work_id.to_string());
    table.pair("run", work.run_id.to_string());
    if let Some(order) = &work.assignment {
        table.pair("agent", order.agent_name.to_string());
        table.pair("station", order.target_station.to_string());
        table.pair("task", show::preview(&order.task));
        if let Some(old) = order.redrives {
            table.pair("redrives", format!("work {old}"));
        }
    }
    table.pair("status", format!("{} ({})", work.status.label(), work.event));
    if let Some(ms) = work.duration_ms {
        table.pair("took", super::screen::took(ms));
    }
    if let Some(claim) = work.claim() {
        table.pair("claim", claim.label());
    }
    for check in &work.checks {
        table.pair("", show::check(check));
        // A failure's evidence is shown below.
        for line in check.output.lines().filter(|_| check.ok) {
            table.pair("", format!("  {line}"));
        }
    }
    if !work.usage().is_empty() {
        table.pair("used", work.usage().to_string());
    }
    if let Some(after) = work.waits_for() {
        table.pair("waits for", after.work_ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
    }
    if let Some(printed) = &work.printed {
        table.pair("printed", show::output(printed));
    }
    if let Some(ask) = work.open_question() {
        table.pair("question", ask.reason.clone());
        table.pair("next", format!("lattice-mcp work answer {} TEXT --ask {}", work.work_id, ask.ask));
    }
    match &work.outcome {
        Some(Outcome::Complete(output)) => {
            table.pair("result", show::output(output));
            if matches!(output, Output::Blob(_)) {
                table.pair("next", format!("lattice-mcp work {} --result", work.work_id));
            }
        }
        Some(Outcome::Failed(failure)) => {
            table.pair("error", show::failure(failure));
            evidence(&mut table, failure);
            match work.redriven_as {
                Some(anew) => table.pair("redriven", format!("as work {anew}")),
                None if failure.dead_letter => table.pair("next", format!("lattice-mcp work redrive {}", work.work_id)),
                None => {}
            }
        }
        Some(Outcome::Cancelled(Some(reason))) => table.pair("reason", reason.clone()),
        Some(Outcome::Cancelled(None)) | None => {}
    }
    for attempt in work.attempts.iter().take(work.attempts.len().saturating_sub(usize::from(work.outcome.is_some()))) {
        let Some(ended) = &attempt.ended else { continue };
        table.pair(&format!("attempt {}", attempt.number), show::failure(ended));
        evidence(&mut table, ended);
    }
    table
}

fn evidence(table: &mut Table, failure: &model::event::Failure) {
    for line in failure.evidence.iter().flat_map(|evidence| evidence.lines()) {
        table.pair("", line);
    }
}

async fn result(session: &mut Session, id: WorkId) -> Result<(), Failure> {
    let reader = open(session, Use::Look, id).await?;
    let work = reader.dispatcher.check(id).await?;
    let mut plain = Plain::default();
    let ends_line = match &work.outcome {
        Some(Outcome::Complete(Output::Inline(value))) => {
            let text = Output::inline_text(value);
            session.screen.raw(text.as_bytes(), &mut plain)?;
            text.ends_with('\n')
        }
        Some(Outcome::Complete(Output::Blob(blob))) => {
            let mut source = reader.dispatcher.transport().blobs.open(&blob.sha256, 0..blob.size).await?;
            let mut chunk = vec![0; CHUNK];
            let mut last = 0;
            loop {
                let unreadable = |error| Failure::new(Exit::Store, format!("the result of work {id} cannot be read: {error}"));
                let n = source.read(&mut chunk).await.map_err(unreadable)?;
                let Some(end) = chunk[..n].last() else { break };
                last = *end;
                session.screen.raw(&chunk[..n], &mut plain)?;
            }
            last == b'\n'
        }
        Some(Outcome::Failed(why)) => {
            return Err(Failure::new(Exit::Failed, format!("work {id} has no result, it failed: {}", show::failure(why))));
        }
        Some(Outcome::Cancelled(_)) => return Err(Failure::new(Exit::Failed, format!("work {id} has no result, it was cancelled"))),
        None => {
            let status = work.status.label();
            return Err(Failure::new(Exit::Failed, format!("work {id} is {status}, and has no result yet")));
        }
    };
    // A prompt should not stand behind a result; a file has it as it is.
    if session.screen.terminal && !ends_line {
        session.screen.line("")?;
    }
    Ok(())
}

async fn log(session: &mut Session, id: WorkId, attempt: Option<u32>) -> Result<(), Failure> {
    let reader = open(session, Use::Look, id).await?;
    let work = reader.dispatcher.check(id).await?;
    let path = |attempt: u32| reader.dir.join("logs").join(format!("{id}.{attempt}.log"));
    let attempts: Vec<u32> = match attempt {
        Some(attempt) => vec![attempt],
        None => work.attempts.iter().rev().map(|attempt| attempt.number).collect(),
    };
    let missing = || {
        let which = attempt.map(|attempt| format!("attempt {attempt} of ")).unwrap_or_default();
        let place = reader.dir.join("logs").display().to_string();
        Failure::new(Exit::NotFound, format!("{place} has no log of {which}work {id}: the station that ran it keeps it, for a while"))
    };
    let file: PathBuf = attempts.into_iter().map(path).find(|path| path.exists()).ok_or_else(missing)?;
    let unreadable = |error| Failure::new(Exit::Failed, format!("cannot read {}: {error}", file.display()));
    let mut source = std::fs::File::open(&file).map_err(unreadable)?;
    let (mut chunk, mut plain) = (vec![0; CHUNK], Plain::default());
    loop {
        let n = source.read(&mut chunk).map_err(unreadable)?;
        if n == 0 {
            return Ok(());
        }
        session.screen.raw(&chunk[..n], &mut plain)?;
    }
}

async fn cancel(session: &mut Session, id: WorkId, reason: Option<String>) -> Result<(), Failure> {
    let reader = open(session, Use::Change, id).await?;
    let patience = session.loaded.config.lattice.work.kill_after.get() + CANCEL_PATIENCE;
    let work = reader.dispatcher.cancel(id, reason, patience).await?;
    if session.screen.json {
        return Ok(session.screen.json(&Value::from(show::work_json(&work)))?);
    }
    let status = work.status.label();
    let text = if work.status.is_settled() {
        format!("work {id} is {status}")
    } else {
        format!("work {id} was asked to stop and is still {status}; lattice-mcp work {id} shows when its station has confirmed")
    };
    Ok(session.screen.line(&text)?)
}

async fn redrive(session: &mut Session, id: WorkId) -> Result<(), Failure> {
    let reader = open(session, Use::Change, id).await?;
    let anew = reader.dispatcher.redrive(id).await?;
    if session.screen.json {
        let agent = anew.agent.as_str();
        let said = json!({"work_id": anew.work_id, "redrives": id, "run_id": anew.run_id, "agent_name": agent, "station": anew.station});
        return Ok(session.screen.json(&said)?);
    }
    let waits = if anew.online { "" } else { ", where no process runs it now: the work waits" };
    let text = format!("work {id} is given out anew as work {} to agent {} of station {}{waits}", anew.work_id, anew.agent, anew.station);
    Ok(session.screen.line(&text)?)
}

async fn answer(session: &mut Session, id: WorkId, text: String, ask: Option<u32>) -> Result<(), Failure> {
    let reader = open(session, Use::Change, id).await?;
    // Whoever types it is a person, or speaks for one, unless it is the program of an agent.
    let bound = station::bound_by(|name| std::env::var(name).ok())?;
    let caller = bound.map_or_else(Caller::stateless, Caller::bound);
    let work = reader.dispatcher.answer(&caller, id, Reply { value: Value::from(text), ask, who: Needs::Human }).await?;
    if session.screen.json {
        return Ok(session.screen.json(&Value::from(show::work_json(&work)))?);
    }
    Ok(session.screen.line(&format!("work {id} has its answer and is {}", work.status.label()))?)
}
