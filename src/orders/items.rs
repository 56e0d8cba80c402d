//! Orders over many items: each item's work is given out as earlier ones settle, and the order settles with the last.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::release::ending;
use super::{Error, Input, Orders, Result};
use crate::model::after::Verdict;
use crate::model::assignment::Assignment;
use crate::model::event::{Failure, FailureKind, Kind};
use crate::model::map::{self, Spec};
use crate::model::output::{Media, Output};
use crate::model::status::Status;
use crate::model::work::{Outcome, Work};
use crate::telemetry::{new_span_id, now};
use crate::transport::{self, Pushed};
use crate::works::record;

/// All that is said of an order itself belongs to one attempt.
const ATTEMPT: u32 = 1;
/// How many items without a result a failure names.
const NAMED_MAX: usize = 20;

/// Where each item's work stands, by the item's number; those that have none yet are left out.
type Standing = BTreeMap<u32, Status>;

impl Orders {
    pub(super) async fn go_on(&self, work: &Work, order: &Assignment, spec: &Spec) -> Result<()> {
        if let Some(after) = work.waits_for() {
            match self.verdict(after).await?.0 {
                Verdict::Wait => return Ok(()),
                Verdict::Start => {}
                ended => return self.end(order, ended).await,
            }
        }
        let mut standing = self.items_of(order, spec).await?;
        if work.is_called_off() {
            return self.call_off(order, spec).await;
        }
        if matches!(work.status, Status::Pending(_)) {
            self.0.transport.log.append(vec![record(self.event(order, ATTEMPT, Kind::Accepted))]).await?;
        }
        self.give_out(order, spec, &mut standing).await?;
        let settled = standing.values().filter(|status| status.is_settled()).count();
        if settled == spec.count as usize { self.settle(work, order, spec).await } else { self.tell(work, order, spec, settled).await }
    }

    async fn items_of(&self, order: &Assignment, spec: &Spec) -> Result<Standing> {
        self.0.runs.catch_up().await?;
        let children = self.0.runs.children(&order.orchestrator_run_id).await?;
        let number = |run: &str| run.rsplit('-').next()?.parse().ok().filter(|number| (1..=spec.count).contains(number));
        Ok(children.into_iter().filter_map(|(run, status)| Some((number(run.as_str())?, status))).collect())
    }

    /// Gives out as many further items as may run beside the others.
    async fn give_out(&self, order: &Assignment, spec: &Spec, standing: &mut Standing) -> Result<()> {
        let open = standing.values().filter(|status| !status.is_settled()).count();
        let room = (spec.parallel as usize).saturating_sub(open);
        let next: Vec<u32> = (1..=spec.count).filter(|number| !standing.contains_key(number)).take(room).collect();
        if next.is_empty() {
            return Ok(());
        }
        let Input { task, context, items } = self.input(order).await?;
        let is_here = self.lives_here(order, standing).await?;
        for number in next {
            let known = match self.0.works.get(map::work_id(order.work_id, number)).await {
                // It lives where its order does, and there nothing is known of it.
                Err(transport::Error::Unreachable(_)) if is_here => None,
                known => known?,
            };
            if let Some(known) = known {
                standing.insert(number, known.status);
                continue;
            }
            let Some(item) = items.get(number as usize - 1) else {
                let reason = format!("there are {} of {}", items.len(), spec.count).into();
                return Err(Error::Unreadable { work_id: order.work_id, reason });
            };
            let (task, context) = map::input(&task, &context, item);
            let mut child = map::order(order, number, now(), new_span_id());
            self.pack(&mut child, Input { task, context, items: Vec::new() }).await?;
            match self.push_beside(Some(order.work_id), child, spec.lane.clone(), false).await {
                Ok(Pushed::New | Pushed::Known) => _ = standing.insert(number, Status::default()),
                // The order lives on a machine that this one only hears of, and its own processes give out the rest; or it has settled.
                Ok(Pushed::Elsewhere) => break,
                // There is room again when some of what waits there has settled; whoever has more rights gives out the rest.
                Err(Error::Transport(transport::Error::Full { .. } | transport::Error::Denied(_))) => break,
                Err(error) => return Err(error),
            }
        }
        // Whoever called it off meanwhile may not have seen these.
        match self.0.works.get(order.work_id).await? {
            Some(work) if work.is_called_off() => self.stop_below(&work).await,
            _ => Ok(()),
        }
    }

    /// Whether an order lives on this machine, with all its items of which something is known: an older program put those of one that
    /// does on the server, once that was back.
    async fn lives_here(&self, order: &Assignment, standing: &Standing) -> Result<bool> {
        let log = &self.0.transport.log;
        for id in std::iter::once(order.work_id).chain(standing.keys().map(|number| map::work_id(order.work_id, *number))) {
            if !log.is_here(id).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Says how far it is; nothing when that was said already.
    async fn tell(&self, work: &Work, order: &Assignment, spec: &Spec, settled: usize) -> Result<()> {
        let percent = u32::try_from(settled * 100 / (spec.count as usize).max(1)).unwrap_or(0);
        let known = work.progress_pct.unwrap_or(0.0);
        if f64::from(percent) <= known {
            return Ok(());
        }
        let message = format!("{settled} of {} items have settled", spec.count);
        let progress = Kind::Progress { pct: Some(percent.into()), message: Some(message) };
        self.0.transport.log.append(vec![record(self.event(order, ATTEMPT, progress))]).await?;
        Ok(())
    }

    /// Settles an order whose items all have.
    async fn settle(&self, work: &Work, order: &Assignment, spec: &Spec) -> Result<()> {
        let (mut results, mut without) = (Vec::with_capacity(spec.count as usize), Vec::new());
        for number in 1..=spec.count {
            let run = self.0.runs.of_run(&order.orchestrator_run_id.child(u64::from(number))).await?;
            let Some(item) = run.map(|run| Work::from_run(&run)) else { return Ok(()) };
            if !matches!(item.outcome, Some(Outcome::Complete(_))) {
                without.push((number, item.status.label()));
            }
            results.push(Value::Object(ending(&item)));
        }
        let began = work.attempts.first().map_or(order.assigned_at, |attempt| attempt.started_at);
        let duration_ms = u64::try_from(now().since(began).as_millis()).unwrap_or(u64::MAX);
        let kind = if without.is_empty() {
            Kind::Complete { result: self.output(results.into()).await?, duration_ms, checks: Vec::new() }
        } else if self.0.works.get(order.work_id).await?.is_some_and(|work| work.is_called_off()) {
            // It was called off since this round began, and its items with it.
            Kind::Cancelled { reason: None }
        } else {
            Kind::Failed { failure: incomplete(order, spec, &without, &results), duration_ms }
        };
        self.finish(order, kind).await
    }

    async fn output(&self, results: Value) -> Result<Output> {
        let text = results.to_string();
        if text.len() <= self.0.config.results.inline_max.as_usize() {
            return Ok(Output::Inline(results));
        }
        Ok(Output::Blob(self.0.transport.blobs.put(&mut text.as_bytes(), Media::Json).await?))
    }

    /// Calls off its items; it is cancelled once all of them have settled.
    async fn call_off(&self, order: &Assignment, spec: &Spec) -> Result<()> {
        if let Some(work) = self.0.works.get(order.work_id).await? {
            self.stop_below(&work).await?;
        }
        let standing = self.items_of(order, spec).await?;
        if standing.values().all(|status| status.is_settled()) {
            self.finish(order, Kind::Cancelled { reason: None }).await?;
        }
        Ok(())
    }

    async fn finish(&self, order: &Assignment, kind: Kind) -> Result<()> {
        let end = record(self.event(order, ATTEMPT, kind));
        self.0.transport.queue.remove(&order.target_station, order.work_id, vec![end]).await?;
        Ok(())
    }
}

fn incomplete(order: &Assignment, spec: &Spec, without: &[(u32, &str)], results: &[Value]) -> Failure {
    let named: Vec<String> = without.iter().take(NAMED_MAX).map(|(number, status)| format!("{number} ({status})")).collect();
    let more = if without.len() > NAMED_MAX { ", …" } else { "" };
    let text = format!(
        "{} of {} items have no result: {}{more}; check_work with run_id {} shows each item's work",
        without.len(),
        spec.count,
        named.join(", "),
        order.orchestrator_run_id
    );
    let evidence: Vec<&Value> = without.iter().take(NAMED_MAX).filter_map(|(number, _)| results.get(*number as usize - 1)).collect();
    Failure { evidence: Some(json!(evidence).to_string()), ..Failure::new(FailureKind::Dependency, text) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::Config;
    use crate::model::id::RunId;
    use crate::model::time::Span;
    use crate::registry::Identity;
    use crate::runs::Runs;
    use crate::telemetry::{new_instance, new_work_id};
    use crate::transport::local;
    use crate::works::Works;

    fn order(items: u32) -> Assignment {
        let run = RunId::root_of(uuid::Uuid::from_u128(7)).child(1);
        Assignment {
            work_id: new_work_id(),
            orchestrator_run_id: run,
            parent_work_id: None,
            originating_station: "here".parse().unwrap(),
            target_station: "here".parse().unwrap(),
            agent_name: "worker".parse().unwrap(),
            task: String::new(),
            context: serde_json::Map::new(),
            input_ref: None,
            assigned_at: now(),
            timeout: Span::millis(3_600_000),
            queue_timeout: None,
            silence_timeout: None,
            priority: 0,
            trace_id: "0".repeat(32),
            span_id: new_span_id(),
            owner: None,
            principal: None,
            accept: None,
            budgets: Vec::new(),
            redrives: None,
            after: None,
            map: Some(Spec { items: Vec::new(), count: items, parallel: items, lane: "worker".into() }),
        }
    }

    #[tokio::test]
    async fn an_order_that_was_called_off_since_a_round_began_is_cancelled_and_has_not_failed() {
        let (dir, config) = (tempfile::tempdir().unwrap(), Arc::new(Config::default()));
        let store = local::open(dir.path(), &config.lattice.storage).unwrap();
        let transport = store.transport();
        let (runs, works) = (Runs::open(dir.path(), transport.log.clone()).unwrap(), Works::new(transport.log.clone()));
        let me = Identity { station: "here".parse().unwrap(), instance: new_instance(), by_name: false };
        let orders = Orders::new(transport, works.clone(), runs, me, config);
        let mut order = order(3);
        let input = Input { task: "{item}".into(), items: vec![json!(1), json!(2), json!(3)], ..Input::default() };
        orders.pack(&mut order, input).await.unwrap();
        orders.push(order.clone(), "worker".into(), false).await.unwrap();
        orders.look_after(order.work_id).await.unwrap();
        let begun = works.get(order.work_id).await.unwrap().unwrap();
        assert!(matches!(begun.status, Status::Accepted(_)));
        // Somebody calls it off while a round goes on with what it saw before.
        orders.stop(&begun, Some("enough".into())).await.unwrap();
        orders.stop_below(&begun).await.unwrap();
        orders.go_on(&begun, &order, order.map.as_ref().unwrap()).await.unwrap();
        let ended = works.get(order.work_id).await.unwrap().unwrap();
        assert_eq!(ended.outcome, Some(Outcome::Cancelled(Some("enough".into()))));
        store.close();
    }
}
