//! From a work that failed to another one with the same order. What has settled stays as it is: the new work names the old one,
//! and the old one's log says which work was given out in its stead.

use bytes::Bytes;
use serde_json::json;

use super::keys::digest;
use super::{Assigned, Caller, Dispatcher, Error, Items, Request, Result};
use crate::model::assignment::Assignment;
use crate::model::budget::Allowance;
use crate::model::event::Kind;
use crate::model::id::{RunId, WorkId};
use crate::model::keyed::Keyed;
use crate::model::map::Spec;
use crate::model::status::Status;
use crate::model::work::Work;
use crate::telemetry::{new_span_id, new_work_id, now};
use crate::transport::{self, Bucket, Expect};
use crate::works::record;

impl Dispatcher {
    /// Gives out anew what failed: the same order, with fresh attempts and all of its time, as another work beside the old one.
    /// Of several that do so at once, all get the same new work.
    ///
    /// # Errors
    /// `UnknownWork`, `NotFailed`, `RedrivenAlready`, `OrderForgotten`, what can be wrong with an order by now, or the transport's.
    pub async fn redrive(&self, id: WorkId) -> Result<Assigned> {
        let (_, Some(old)) = self.0.works.history(id).await? else {
            self.check(id).await?;
            return Err(Error::OrderForgotten(id));
        };
        if let Some(redriven_as) = old.redriven_as {
            return Err(Error::RedrivenAlready { work_id: id, redriven_as });
        }
        if old.status != Status::Failed {
            return Err(Error::NotFailed { work_id: id, status: old.status.label() });
        }
        let order = old.assignment.as_deref().ok_or(Error::OrderForgotten(id))?;
        let request = request(order);
        // A large input stands in a blob, and was checked when it came.
        let agent = if order.input_ref.is_some() { self.find(&request)? } else { self.vet(&request)?.0 };
        if let Some(after) = &order.after {
            self.vet_after(&Caller::stateless(), after).await?;
        }
        let (work_id, run_id) = self.named_anew(&old).await?;
        let mut assigned = Assigned {
            work_id,
            agent: order.agent_name.clone(),
            station: agent.station.clone(),
            root_run_id: run_id.root(),
            run_id: run_id.clone(),
            online: agent.online,
            known: false,
        };
        // Somebody who died, or is at it as well, may have come as far as this.
        match self.0.works.get(work_id).await? {
            Some(_) => assigned.known = true,
            None => {
                let again = Assignment {
                    work_id,
                    budgets: anew(&order.budgets, &old.run_id, &run_id),
                    orchestrator_run_id: run_id,
                    originating_station: self.0.registry.me().station.clone(),
                    target_station: agent.station.clone(),
                    assigned_at: now(),
                    span_id: new_span_id(),
                    redrives: Some(id),
                    map: order.map.clone().map(|spec| Spec { lane: agent.lane.clone(), ..spec }),
                    ..order.clone()
                };
                self.put(again, agent.lane).await?;
            }
        }
        let event = self.event(&old, 0, Kind::Redriven { work_id });
        self.0.transport.log.append(vec![record(event)]).await?;
        Ok(assigned)
    }

    /// The new work's ids, the same for everybody who redrives this one.
    async fn named_anew(&self, old: &Work) -> Result<(WorkId, RunId)> {
        let table = &self.0.transport.table;
        let key = digest(&json!(["redrive", old.work_id]));
        let kept = self.config().lattice.storage.max_age.get();
        loop {
            if let Some(row) = table.get(Bucket::Keys, &key).await? {
                let unreadable = |_| transport::Error::Store(format!("the row of redriven work {} cannot be read", old.work_id).into());
                let keyed: Keyed = serde_json::from_slice(&row.value).map_err(unreadable)?;
                // Whoever named it may be gone: then it is ours to give out.
                if self.0.works.get(keyed.work_id).await?.is_none() {
                    match table.put(Bucket::Keys, &key, row.value, Expect::Revision(row.revision), Some(kept)).await {
                        Ok(_) => {}
                        Err(transport::Error::Conflict { .. }) => continue,
                        Err(error) => return Err(error.into()),
                    }
                }
                return Ok((keyed.work_id, keyed.run_id));
            }
            let parent = old.run_id.parent().unwrap_or_else(|| old.run_id.clone());
            let floor = self.numbered(old, &parent).await?;
            let run_id = self.child_of(&parent, floor).await?;
            let keyed = Keyed { work_id: new_work_id(), run_id, order: "redriven".into(), done: false };
            let value = Bytes::from(serde_json::to_vec(&keyed).unwrap_or_default());
            match table.put(Bucket::Keys, &key, value, Expect::Absent, Some(kept)).await {
                Ok(_) => return Ok((keyed.work_id, keyed.run_id)),
                Err(transport::Error::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Dispatcher {
    /// How many children of a run have their number without having fetched it: a root's first one, and the items of an order.
    async fn numbered(&self, old: &Work, parent: &RunId) -> Result<u64> {
        if parent.parent().is_none() {
            return Ok(1);
        }
        let Some(above) = old.assignment.as_ref().and_then(|order| order.parent_work_id) else { return Ok(0) };
        let above = self.orders().standing(above).await?.and_then(|work| work.assignment.clone());
        Ok(above.and_then(|order| order.map.as_ref().map(|map| map.count.into())).unwrap_or(0))
    }
}

/// The budgets of an order: those of the runs above hold as they are, and its own counts from nothing.
fn anew(budgets: &[Allowance], old: &RunId, new: &RunId) -> Vec<Allowance> {
    let own = |allowance: &Allowance| if allowance.run_id == *old { new.clone() } else { allowance.run_id.clone() };
    budgets.iter().map(|allowance| Allowance { run_id: own(allowance), budget: allowance.budget }).collect()
}

/// The order as a request, to see whether it is still good.
fn request(order: &Assignment) -> Request {
    Request {
        agent: order.agent_name.clone(),
        task: order.task.clone(),
        context: order.context.clone(),
        station: None,
        priority: order.priority.into(),
        timeout: Some(order.timeout),
        queue_timeout: order.queue_timeout,
        silence_timeout: order.silence_timeout,
        run_id: None,
        idempotency_key: None,
        trace: None,
        accept: order.accept.clone(),
        budget: None,
        after: order.after.clone(),
        map: order.map.as_ref().map(|map| Items { items: map.items.clone(), parallel: Some(map.parallel.into()) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::budget::Budget;

    #[test]
    fn only_its_own_budget_counts_from_nothing() {
        let above = RunId::root_of(uuid::Uuid::from_u128(7)).child(1);
        let (old, new) = (above.child(1), above.child(2));
        let allowed =
            |run_id: &RunId, tokens| Allowance { run_id: run_id.clone(), budget: Budget { tokens: Some(tokens), ..Budget::default() } };
        assert_eq!(anew(&[allowed(&above, 9), allowed(&old, 5)], &old, &new), [allowed(&above, 9), allowed(&new, 5)]);
    }
}
