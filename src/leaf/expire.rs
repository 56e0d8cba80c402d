//! Works whose time is up while nobody holds them.

use std::time::Duration;

use super::Inner;
use super::attempt::{event, refuse};
use crate::model::assignment::Assignment;
use crate::model::event::{Failure, FailureKind, Kind};
use crate::model::id::WorkId;
use crate::model::status::Status;
use crate::model::time::Timestamp;
use crate::model::work::Work;
use crate::telemetry::now;
use crate::transport::{Delivery, Lapsed, Result, Taken};
use crate::works::record;

/// Settles work whose time ran out while nobody held it.
pub(super) async fn expire(leaf: &Inner, taken: &Taken) {
    let settled = async {
        let (_, work) = leaf.works.history(taken.delivery.id).await?;
        let assignment = match serde_json::from_slice::<Assignment>(&taken.body) {
            Ok(assignment) => assignment,
            Err(error) => {
                refuse(leaf, &taken.delivery, &error).await;
                return Ok(());
            }
        };
        let records = match &work {
            Some(work) if work.status.is_settled() => Vec::new(),
            Some(work) if work.status.mark().is_some_and(|mark| mark.cancelling) => {
                let kind = Kind::Cancelled { reason: work.cancel_reason.clone() };
                vec![record(event(leaf, &assignment.orchestrator_run_id, &taken.delivery, kind))]
            }
            _ => {
                if let Some(work) = &work
                    && let Some(deadline) = still_time(&assignment, work, now())
                {
                    // Its first attempt began in time; whoever began it, or answered its last question, died or fell asleep before it
                    // could say how long there is.
                    let queue = &leaf.transport.queue;
                    match work.running() {
                        Some(_) => _ = queue.extend(std::slice::from_ref(&taken.delivery), Duration::ZERO, Some(deadline)).await?,
                        None => _ = queue.release(&taken.delivery, now(), Some(deadline), Vec::new()).await?,
                    }
                    return Ok(());
                }
                let failure = match &work {
                    Some(work) if work.waits_for().is_some() || assignment.map.is_some() => waited_too_long(work),
                    Some(work) if !work.attempts.is_empty() => out_of_time(&assignment, work),
                    _ => never_began(&assignment, paused_until(leaf, taken).await?),
                };
                let kind = Kind::Failed { failure, duration_ms: 0 };
                vec![record(event(leaf, &assignment.orchestrator_run_id, &taken.delivery, kind))]
            }
        };
        leaf.transport.queue.settle(&taken.delivery, records).await.map(|_| ())
    };
    if let Err(error) = settled.await {
        tracing::warn!(work_id = %taken.delivery.id, %error, "could not settle work whose time is up; trying again");
    }
}

/// Those of these works whose time is up indeed: whoever gives no sign of life may only sleep, and an attempt that began in time has
/// all of its work's. It keeps its hold then, so that it can go on with it.
pub(super) async fn over(leaf: &Inner, lapsed: Vec<Lapsed>) -> Vec<Delivery> {
    let mut over = Vec::new();
    for Lapsed { delivery, .. } in lapsed {
        match goes_on(leaf, &delivery).await {
            Ok(true) => {}
            Ok(false) => over.push(delivery),
            Err(error) => tracing::warn!(work_id = %delivery.id, %error, "it is not known whether a work's time is up; trying again"),
        }
    }
    over
}

async fn goes_on(leaf: &Inner, delivery: &Delivery) -> Result<bool> {
    // It was us who slept: its own clock goes on soon.
    if leaf.running().get(&delivery.id).is_some_and(|running| running.delivery == *delivery) {
        return Ok(true);
    }
    let Some(work) = leaf.works.get(delivery.id).await? else { return Ok(false) };
    let runs = work.running().is_some() && work.status.mark().is_some_and(|mark| !mark.cancelling);
    let deadline = work.assignment.as_deref().filter(|_| runs).and_then(|order| still_time(order, &work, now()));
    let Some(deadline) = deadline else { return Ok(false) };
    leaf.transport.queue.wake(&delivery.station, delivery.id, Some(deadline), Vec::new()).await?;
    tracing::debug!(work_id = %delivery.id, attempt = delivery.attempt, %deadline, "nobody holds on to this attempt, and it has time left");
    Ok(true)
}

/// Until when there is still time for a work that began in time, though its item's deadline has passed.
fn still_time(assignment: &Assignment, work: &Work, now: Timestamp) -> Option<Timestamp> {
    let waits = matches!(work.status, Status::Pending(_) | Status::Accepted(_));
    let deadline = assignment.deadline().after(work.waited(now));
    (waits && !work.attempts.is_empty() && now < deadline).then_some(deadline)
}

/// Until when the lane is paused in which a work's time ran out.
async fn paused_until(leaf: &Inner, taken: &Taken) -> Result<Option<Timestamp>> {
    let lanes = leaf.transport.queue.load(&taken.delivery.station).await?;
    Ok(lanes.into_iter().find(|load| load.lane == taken.lane).and_then(|load| load.paused_until))
}

fn never_began(assignment: &Assignment, paused: Option<Timestamp>) -> Failure {
    let Assignment { target_station: station, agent_name: agent, timeout, .. } = assignment;
    let waited = assignment.queue_timeout.map_or(*timeout, |queue| queue.min(*timeout));
    let why = match paused {
        Some(until) => format!("agent {agent} is out of quota and pauses until {until}"),
        None => format!("no process that runs agent {agent} took it"),
    };
    Failure::new(FailureKind::QueueTimeout, format!("timed out after {waited} in the queue of station {station}: {why}"))
}

fn waited_too_long(work: &Work) -> Failure {
    match work.waits_for() {
        Some(after) => {
            let text = format!("timed out: what it waits for did not settle in time: {}", shown(&after.work_ids));
            Failure::new(FailureKind::QueueTimeout, text)
        }
        None => Failure::new(FailureKind::TotalTimeout, "timed out: its items did not settle in time (lattice.work.wait_max)"),
    }
}

fn out_of_time(assignment: &Assignment, work: &Work) -> Failure {
    if let Some(ask) = work.open_question() {
        let text = format!("timed out: nobody answered question {} ({}) in time", ask.ask, ask.reason);
        return Failure::new(FailureKind::TotalTimeout, text);
    }
    let last = work.attempts.last().map_or(0, |attempt| attempt.number);
    let ended = match work.attempts.last().and_then(|attempt| attempt.ended.as_ref()) {
        Some(failure) => format!("attempt {last} had ended: {}", failure.message),
        None => format!("attempt {last} had no more sign of life from its process, and what came of it is unknown"),
    };
    Failure::new(FailureKind::TotalTimeout, format!("timed out after {} in all; {ended}", assignment.timeout))
}

fn shown(ids: &[WorkId]) -> String {
    const SHOWN_MAX: usize = 5;
    let named: Vec<String> = ids.iter().take(SHOWN_MAX).map(ToString::to_string).collect();
    if ids.len() > SHOWN_MAX { format!("{} and {} more", named.join(", "), ids.len() - SHOWN_MAX) } else { named.join(", ") }
}
