//! From an order to an item on a hook.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use jsonschema::Validator;
use serde_json::{Map, Value};

use super::caller::Opened;
use super::keys::{Key, Reserved};
use super::nested::Nested;
use super::{Assigned, Bound, Caller, Dispatcher, Error, Items, Request, Result};
use crate::agents::schema;
use crate::model::after::After;
use crate::model::assignment::Assignment;
use crate::model::budget::Allowance;
use crate::model::id::{AgentName, RunId, WorkId};
use crate::model::map::{self, Spec};
use crate::model::time::Span;
use crate::orders::{CONTEXT, Input};
use crate::registry::Agent;
use crate::telemetry::{new_root, new_span_id, new_work_id, now, trace_of};
use crate::transport::{self, Bucket};

/// How many numbers of children a connection fetches at once at most.
const CHILD_BLOCK_MAX: u64 = 64;
const PROBLEMS_SHOWN_MAX: usize = 5;

/// Compiled input schemas, by agent.
pub struct Schemas(Mutex<Compiled>);

type Compiled = HashMap<AgentName, (Value, Arc<Validator>)>;

impl Dispatcher {
    /// Hands work to an agent. When it returns, the station's hook has the work, durably.
    ///
    /// # Errors
    /// Each way in which an order can be wrong, and the transport's.
    pub async fn assign(&self, caller: &Caller, request: Request) -> Result<Assigned> {
        let (agent, priority, timeout) = self.vet(&request)?;
        let key = Key::of(caller, &request)?;
        if let Some(key) = &key
            && let Some(known) = self.recall(key, &agent).await?
        {
            return Ok(known);
        }
        if let Some(after) = &request.after {
            self.vet_after(caller, after).await?;
        }
        self.not_called_off(caller).await?;
        // The turn is held until the log has the order.
        let nested = self.nest(caller).await?;
        let nested = nested.as_ref();
        let Some(key) = key else {
            let ids = (new_work_id(), self.open_run(caller, nested, &request).await?);
            return self.hand_over(caller, nested, &agent, request, ids, priority, timeout).await;
        };
        let (keyed, revision) = match self.reserve(&key, caller, nested, &request, &agent).await? {
            Reserved::Known(known) => return Ok(known),
            Reserved::New(keyed, revision) => (keyed, Some(revision)),
            Reserved::TakenOver(keyed) => (keyed, None),
        };
        let ids = (keyed.work_id, keyed.run_id.clone());
        let assigned = self.hand_over(caller, nested, &agent, request, ids, priority, timeout).await;
        match &assigned {
            Ok(_) => self.note_done(&key, keyed).await,
            // Nothing was done: the key may be used anew. Whoever took the order over cannot know that of others.
            Err(Error::Transport(transport::Error::Full { .. } | transport::Error::Unreachable(_) | transport::Error::Denied(_)))
                if let Some(revision) = revision =>
            {
                self.forget(&key, revision).await;
            }
            Err(_) => {}
        }
        assigned
    }

    /// Puts an order that is good on its hook.
    #[expect(clippy::too_many_arguments, reason = "the parts of an order, each decided elsewhere")]
    async fn hand_over(
        &self,
        caller: &Caller,
        nested: Option<&Nested<'_>>,
        agent: &Agent,
        request: Request,
        (work_id, run_id): (WorkId, RunId),
        priority: i32,
        timeout: Span,
    ) -> Result<Assigned> {
        let assigned = Assigned {
            work_id,
            agent: agent.manifest.name.clone(),
            station: agent.station.clone(),
            root_run_id: run_id.root(),
            run_id: run_id.clone(),
            online: agent.online,
            known: false,
        };
        let above = nested.map_or(&[][..], |nested| &nested.budgets);
        let order = self.order(caller, agent, request, (work_id, run_id), above, priority, timeout).await?;
        self.put(order, agent.lane.clone()).await?;
        // Whoever called off the caller's work meanwhile may not have seen this one.
        if let Err(refused) = self.not_called_off(caller).await {
            if let Some(work) = self.orders().standing(work_id).await? {
                self.orders().stop(&work, Some(refused.to_string())).await?;
            }
            return Err(refused);
        }
        Ok(assigned)
    }

    /// Puts an order on its agent's hook, says so on the log, and does what is due for it when it waits for others.
    pub(super) async fn put(&self, order: Assignment, lane: String) -> Result<()> {
        let (work_id, held_back, waits) = (order.work_id, order.after.is_some(), order.after.is_some() || order.map.is_some());
        self.orders().push(order, lane, held_back).await?;
        if waits && let Err(error) = self.orders().look_after(work_id).await {
            // It is durable: whoever looks next goes on with it.
            tracing::warn!(%work_id, %error, "a work that waits could not be looked after at once");
        }
        Ok(())
    }

    /// Whether the work that the caller's connection executes goes on.
    async fn not_called_off(&self, caller: &Caller) -> Result<()> {
        let Some(bound) = caller.work() else { return Ok(()) };
        let called_off = self.orders().called_off_with(bound.work_id).await?;
        called_off.map_or(Ok(()), |_| Err(Error::CalledOff(format!("work {} was cancelled", bound.work_id))))
    }

    /// Whether an order is good, before anything is done about it: who takes it, how urgent it is, and how long it may take.
    ///
    /// # Errors
    /// Each way in which an order can be wrong.
    pub fn vet(&self, request: &Request) -> Result<(Agent, i32, Span)> {
        let agent = self.find(request)?;
        let limits = &self.config().lattice.work;
        let priority = i32::try_from(request.priority)
            .ok()
            .filter(|priority| priority.unsigned_abs() <= limits.priority_max.unsigned_abs())
            .ok_or(Error::Priority { priority: request.priority, max: limits.priority_max })?;
        let timeout = request.timeout.or(agent.manifest.limits.timeout).unwrap_or(limits.default_timeout);
        let named = [("queue_timeout", request.queue_timeout), ("silence_timeout", request.silence_timeout)];
        let given = named.into_iter().filter_map(|(name, span)| Some((name, span?)));
        for (name, timeout) in [("timeout", timeout)].into_iter().chain(given) {
            if timeout < Span::millis(1) || timeout > limits.timeout_max {
                return Err(Error::Timeout { name, timeout, max: limits.timeout_max });
            }
        }
        self.vet_waiting(request)?;
        match &request.map {
            None => self.0.schemas.check(&agent, &request.context, "context")?,
            Some(map) => self.vet_items(&agent, request, map)?,
        }
        let size = size_of(request);
        if size > limits.input_max.as_usize() {
            return Err(Error::TooLarge { size, max: limits.input_max });
        }
        if let Some(schema) = request.accept.as_ref().and_then(|criteria| criteria.schema.as_ref()) {
            schema::compile(schema).map_err(|reason| Error::BadCriteria(shorten(&reason)))?;
        }
        Ok((agent, priority, timeout))
    }

    fn vet_waiting(&self, request: &Request) -> Result<()> {
        let Some(After { work_ids, .. }) = &request.after else { return Ok(()) };
        let max = self.config().lattice.work.after_max;
        match work_ids.len() {
            given if given > max as usize => Err(Error::ManyAfter { given, max }),
            _ if request.context.contains_key(CONTEXT) => Err(Error::Occupied(CONTEXT)),
            _ => Ok(()),
        }
    }

    fn vet_items(&self, agent: &Agent, request: &Request, map: &Items) -> Result<()> {
        let max = self.config().lattice.work.map_max;
        if map.items.is_empty() {
            return Err(Error::NoItems);
        }
        if map.items.len() > max as usize {
            return Err(Error::ManyItems { given: map.items.len(), max });
        }
        if let Some(given) = map.parallel.filter(|parallel| !(1..=i64::from(max)).contains(parallel)) {
            return Err(Error::Parallel { given, max });
        }
        let needed = works_of(map);
        if let Some(given) = request.budget.as_ref().and_then(|budget| budget.works).filter(|given| *given < needed) {
            return Err(Error::ItemsOverBudget { given, items: map.items.len(), needed });
        }
        for (place, item) in map.items.iter().enumerate() {
            let (_, context) = map::input("", &request.context, item);
            self.0.schemas.check(agent, &context, &format!("the context of map[{place}]"))?;
            if request.after.is_some() && context.contains_key(CONTEXT) {
                return Err(Error::Occupied(CONTEXT));
            }
        }
        Ok(())
    }

    /// The agent of an order, if it can take it.
    pub(super) fn find(&self, request: &Request) -> Result<Agent> {
        let snapshot = self.0.registry.snapshot();
        let Some(agent) = snapshot.agents.get(&request.agent) else {
            return Err(self.unknown_agent(request.agent.as_str()));
        };
        if let Some(asked) = request.station.as_ref().filter(|asked| **asked != agent.station) {
            return Err(Error::WrongStation { agent: request.agent.clone(), holder: agent.station.clone(), asked: asked.clone() });
        }
        if let Some(reason) = &agent.manifest.unavailable {
            return Err(Error::Unavailable { agent: request.agent.clone(), reason: reason.clone() });
        }
        Ok(agent.clone())
    }

    /// The error for a name that nobody has: it lists the agents that exist, the closest names first.
    pub fn unknown_agent(&self, name: &str) -> Error {
        // It may well exist elsewhere.
        if let Some((_, reason)) = self.away() {
            let name: String = name.chars().take(80).collect();
            let reason = format!("agent {name} is none of this station's own, and no others can be seen: {reason}");
            return transport::Error::Unreachable(reason.into()).into();
        }
        let mut known: Vec<AgentName> = self.0.registry.snapshot().agents.keys().cloned().collect();
        let wanted = name.to_ascii_lowercase();
        known.sort_by_cached_key(|known| {
            let candidate = known.as_str().to_ascii_lowercase();
            let contains = candidate.contains(&wanted) || wanted.contains(&candidate);
            (!contains, strsim::damerau_levenshtein(&candidate, &wanted))
        });
        Error::UnknownAgent { name: name.chars().take(80).collect(), known }
    }

    /// A new run in the lineage of whoever calls.
    pub(super) async fn open_run(&self, caller: &Caller, nested: Option<&Nested<'_>>, request: &Request) -> Result<RunId> {
        let joins = request.run_id.as_ref();
        if let Some(Bound { run_id, .. }) = caller.work() {
            let max = self.config().lattice.work.depth_max;
            // Items are children of their order.
            if run_id.depth() + usize::from(request.map.is_some()) >= max as usize {
                return Err(Error::TooDeep { run_id: run_id.clone(), max });
            }
            if let Some(nested) = nested {
                // Items are works as well.
                let works = request.map.as_ref().map_or(1, works_of);
                self.leave_room(run_id, nested, works).await?;
            }
            return self.child_of(run_id, 0).await;
        }
        if let Some(run_id) = joins {
            let root = run_id.root();
            let of = self.kept_to(caller).await?;
            if !self.0.runs.knows_root(&root, of.clone()).await? {
                self.0.runs.catch_up().await?;
                if !self.0.runs.knows_root(&root, of).await? {
                    return Err(Error::UnknownRun(run_id.clone()));
                }
            }
            return self.child_of(&root, 1).await;
        }
        let Some(shared) = &caller.root else { return Ok(new_root().child(1)) };
        let mut shared = shared.lock().await;
        // A busy connection fetches its numbers in growing blocks; what it does not use of the last one stays unused.
        let opened = shared.get_or_insert_with(|| Opened { root: new_root(), free: 1..2, block: 1 });
        if opened.free.is_empty() {
            let first = self.0.transport.table.next(Bucket::Children, opened.root.as_str(), 1, opened.block).await?;
            opened.free = first..first + opened.block;
            opened.block = (opened.block * 2).min(CHILD_BLOCK_MAX);
        }
        let number = opened.free.next().unwrap_or(1);
        Ok(opened.root.child(number))
    }

    /// The next child of a run. A root's first child is made with the root, before anybody else can know it.
    pub(super) async fn child_of(&self, parent: &RunId, floor: u64) -> Result<RunId> {
        Ok(parent.child(self.0.transport.table.next(Bucket::Children, parent.as_str(), floor, 1).await?))
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of an order, each decided elsewhere")]
    async fn order(
        &self,
        caller: &Caller,
        agent: &Agent,
        request: Request,
        (work_id, run_id): (WorkId, RunId),
        above: &[Allowance],
        priority: i32,
        timeout: Span,
    ) -> Result<Assignment> {
        let own = request.budget.map(|budget| Allowance { run_id: run_id.clone(), budget });
        let limits = &self.config().lattice.work;
        let parallel = |map: &Items| map.parallel.and_then(|parallel| u32::try_from(parallel).ok());
        let spec = |map: &Items| Spec {
            items: Vec::new(),
            count: u32::try_from(map.items.len()).unwrap_or(u32::MAX),
            parallel: parallel(map).unwrap_or(limits.map_parallel),
            lane: agent.lane.clone(),
        };
        let mut order = Assignment {
            work_id,
            trace_id: request.trace.map_or_else(|| trace_of(&run_id.root()), |trace| trace.trace_id),
            orchestrator_run_id: run_id,
            parent_work_id: caller.work().map(|bound| bound.work_id),
            originating_station: self.0.registry.me().station.clone(),
            target_station: agent.station.clone(),
            agent_name: request.agent,
            task: String::new(),
            context: Map::new(),
            input_ref: None,
            assigned_at: now(),
            timeout,
            queue_timeout: request.queue_timeout.or(agent.manifest.limits.queue).or(limits.queue_timeout),
            silence_timeout: request.silence_timeout,
            priority,
            span_id: new_span_id(),
            owner: caller.owner().cloned(),
            principal: self.principal_of(caller).await?,
            accept: request.accept,
            budgets: above.iter().cloned().chain(own).collect(),
            redrives: None,
            after: request.after,
            map: request.map.as_ref().map(spec),
        };
        let items = request.map.map(|map| map.items).unwrap_or_default();
        self.orders().pack(&mut order, Input { task: request.task, context: request.context, items }).await?;
        Ok(order)
    }
}

/// How many works an order over items is: itself, and one per item.
fn works_of(map: &Items) -> u64 {
    1 + map.items.len() as u64
}

/// How many bytes a task, its context and its items have together.
fn size_of(request: &Request) -> usize {
    let context = if request.context.is_empty() { 0 } else { serde_json::to_vec(&request.context).map_or(usize::MAX, |json| json.len()) };
    let items = request.map.as_ref().map_or(0, |map| serde_json::to_vec(&map.items).map_or(usize::MAX, |json| json.len()));
    request.task.len().saturating_add(context).saturating_add(items)
}

impl Schemas {
    pub(super) fn new(compiled: Compiled) -> Self {
        Self(Mutex::new(compiled))
    }

    /// Checks a context; `noun` says in problems which one it is.
    fn check(&self, agent: &Agent, context: &Map<String, Value>, noun: &str) -> Result<()> {
        let Some(schema) = &agent.manifest.input_schema else { return Ok(()) };
        let validator = self.compiled(&agent.manifest.name, schema)?;
        let context = Value::Object(context.clone());
        let problems: Vec<String> = validator
            .iter_errors(&context)
            .take(PROBLEMS_SHOWN_MAX)
            .map(|error| format!("at {noun}{}: {}", error.instance_path(), shorten(&error.to_string())))
            .collect();
        if problems.is_empty() { Ok(()) } else { Err(Error::BadInput { agent: agent.manifest.name.clone(), problems }) }
    }

    fn compiled(&self, agent: &AgentName, schema: &Value) -> Result<Arc<Validator>> {
        let mut compiled = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, validator)) = compiled.get(agent)
            && known == schema
        {
            return Ok(validator.clone());
        }
        let validator = schema::compile(schema).map_err(|reason| Error::BadSchema { agent: agent.clone(), reason: shorten(&reason) })?;
        let validator = Arc::new(validator);
        compiled.insert(agent.clone(), (schema.clone(), validator.clone()));
        Ok(validator)
    }
}

fn shorten(text: &str) -> String {
    const SHOWN_MAX: usize = 300;
    if text.chars().count() <= SHOWN_MAX { text.to_owned() } else { text.chars().take(SHOWN_MAX).chain("…".chars()).collect() }
}
