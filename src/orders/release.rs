//! Works that wait for others: started, failed or cancelled as those end.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{Orders, Result};
use crate::model::after::{After, Verdict};
use crate::model::assignment::Assignment;
use crate::model::event::Kind;
use crate::model::output::Output;
use crate::model::work::{Outcome, Work};
use crate::telemetry::now;
use crate::works::record;

impl Orders {
    /// What is to be done about a work that waits, and the works that it waits for, as far as they are known.
    ///
    /// # Errors
    /// The transport's or the store's.
    pub async fn verdict(&self, after: &After) -> Result<(Verdict, Vec<Option<Arc<Work>>>)> {
        let mut works = Vec::with_capacity(after.work_ids.len());
        for id in &after.work_ids {
            works.push(self.standing(*id).await?);
        }
        let ends: Vec<Option<&Outcome>> = works.iter().map(|work| work.as_ref()?.outcome.as_ref()).collect();
        Ok((after.verdict(&ends), works))
    }

    pub(super) async fn release(&self, work: &Work, order: &Assignment, after: &After) -> Result<()> {
        if !work.attempts.is_empty() {
            return Ok(());
        }
        let queue = &self.0.transport.queue;
        if work.waits_for().is_none() {
            // Whoever released it may have died before it woke the item.
            let deadline = order.start_by().after(work.waited(now()));
            queue.wake(&order.target_station, work.work_id, Some(deadline), Vec::new()).await?;
            return Ok(());
        }
        match self.verdict(after).await?.0 {
            Verdict::Wait => Ok(()),
            Verdict::Start => {
                let released = self.event(order, 0, Kind::Released);
                let deadline = order.start_by().after(released.at.since(order.assigned_at));
                queue.wake(&order.target_station, work.work_id, Some(deadline), vec![record(released)]).await?;
                Ok(())
            }
            ended => self.end(order, ended).await,
        }
    }

    /// Frees an item again whose work waits for no answer any more, with the time that it has left.
    pub(super) async fn wake(&self, work: &Work, order: &Assignment) -> Result<()> {
        let deadline = order.deadline().after(work.waited(now()));
        self.0.transport.queue.wake(&order.target_station, work.work_id, Some(deadline), Vec::new()).await?;
        Ok(())
    }

    /// Ends a work that never started.
    pub(super) async fn end(&self, order: &Assignment, verdict: Verdict) -> Result<()> {
        let event = match verdict {
            Verdict::Fail(failure) => self.event(order, 0, Kind::Failed { failure, duration_ms: 0 }),
            Verdict::Cancel(reason) => {
                let event = self.event(order, 0, Kind::Cancelled { reason: Some(reason) });
                // From a leaf this is no wish but its end, which belongs to an attempt.
                let attempt = u32::from(event.side == crate::model::event::Side::Leaf);
                crate::model::event::Event { attempt, ..event }
            }
            Verdict::Wait | Verdict::Start => return Ok(()),
        };
        self.0.transport.queue.remove(&order.target_station, order.work_id, vec![record(event)]).await?;
        Ok(())
    }

    /// An order as its agent gets it: how those that it waited for have ended stands in its context, as `after`.
    ///
    /// # Errors
    /// When the input cannot be read, or the transport's.
    pub async fn filled(&self, order: &Assignment, works: &[Option<Arc<Work>>]) -> Result<Assignment> {
        let input = self.input(order).await?;
        let mut filled = Assignment { task: input.task, context: input.context, input_ref: None, ..order.clone() };
        let results = works.iter().flatten().map(|work| Value::Object(ending(work)));
        filled.context.insert(CONTEXT.to_owned(), results.collect());
        Ok(filled)
    }
}

/// Where an agent finds how the works have ended that its own waited for.
pub const CONTEXT: &str = "after";

/// How a work has ended, as data for an agent.
pub(super) fn ending(work: &Work) -> Map<String, Value> {
    let mut end = Map::new();
    end.insert("work_id".into(), work.work_id.to_string().into());
    if let Some(order) = &work.assignment {
        end.insert("agent_name".into(), order.agent_name.as_str().into());
    }
    end.insert("status".into(), work.status.label().into());
    match &work.outcome {
        Some(Outcome::Complete(Output::Inline(value))) => _ = end.insert("result".into(), value.clone()),
        Some(Outcome::Complete(Output::Blob(blob))) => _ = end.insert("result_ref".into(), json!(blob)),
        Some(Outcome::Failed(failure)) => _ = end.insert("error".into(), json!({ "kind": failure.kind, "message": failure.message })),
        Some(Outcome::Cancelled(Some(reason))) => _ = end.insert("reason".into(), reason.as_str().into()),
        Some(Outcome::Cancelled(None)) | None => {}
    }
    end
}
