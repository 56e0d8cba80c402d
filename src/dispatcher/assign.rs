//! From an order to an item on a hook.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use jsonschema::Validator;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::nested::Nested;
use super::{Assigned, Bound, Caller, Dispatcher, Error, Opened, Request, Result};
use crate::model::budget::Allowance;
use crate::model::event::{Event, Kind, Side};
use crate::model::id::{AgentName, RunId, WorkId};
use crate::model::output::Media;
use crate::model::time::Span;
use crate::model::turn::Turn;
use crate::model::work::Assignment;
use crate::registry::Agent;
use crate::telemetry::{new_root, new_span_id, new_work_id, now, trace_of};
use crate::transport::{self, Bucket, Expect, Item};
use crate::works::record;

/// A larger input travels as a blob.
const INPUT_INLINE_MAX: usize = 64 << 10;
/// How much of a task stays readable in the record when the whole is a blob.
const TASK_SHOWN_MAX: usize = 1024;
const KEY_MAX: usize = 256;
/// How many numbers of children a connection fetches at once at most.
const CHILD_BLOCK_MAX: u64 = 64;
const PROBLEMS_SHOWN_MAX: usize = 5;

/// Compiled input schemas, by agent.
pub struct Schemas(Mutex<Compiled>);

type Compiled = HashMap<AgentName, (Value, Arc<Validator>)>;

/// What stands under an idempotency key.
#[derive(Serialize, Deserialize)]
pub(super) struct Keyed {
    pub(super) work_id: WorkId,
    pub(super) run_id: RunId,
    pub(super) order: String,
}

impl Dispatcher {
    /// Hands work to an agent. When it returns, the station's hook has the work, durably.
    ///
    /// # Errors
    /// Each way in which an order can be wrong, and the transport's.
    pub async fn assign(&self, caller: &Caller, request: Request) -> Result<Assigned> {
        let (agent, priority, timeout) = self.vet(&request)?;

        let nested = self.nest(caller).await?;
        let known = match &request.idempotency_key {
            Some(key) => self.keyed(caller, nested.as_ref(), key, &request).await?,
            None => None,
        };
        let (work_id, run_id) = match &known {
            Some(keyed) => (keyed.work_id, keyed.run_id.clone()),
            None => (new_work_id(), self.open_run(caller, nested.as_ref(), request.run_id.as_ref()).await?),
        };
        let root_run_id = run_id.root();
        let mut assigned = Assigned {
            work_id,
            agent: request.agent.clone(),
            station: agent.station.clone(),
            run_id: run_id.clone(),
            root_run_id,
            online: agent.online,
            known: false,
        };
        if known.is_some()
            && let Some(work) = self.0.works.get(work_id).await?
        {
            assigned.known = true;
            if let Some(order) = &work.assignment {
                assigned.station = order.target_station.clone();
            }
            return Ok(assigned);
        }
        let mut assignment = self.order(caller, &agent, request, work_id, run_id, priority, timeout).await?;
        let own = assignment.budgets.pop();
        assignment.budgets = nested.iter().flat_map(|nested| nested.budgets.clone()).chain(own).collect();
        // The turn is held until the log has the order.
        self.hand_over(agent, assignment).await?;
        Ok(assigned)
    }

    /// Puts an order on its agent's hook, and says so on the log.
    pub(super) async fn hand_over(&self, agent: Agent, assignment: Assignment) -> Result<()> {
        let (me, limits) = (self.0.registry.me(), &self.config().lattice.work);
        let item = Item {
            id: assignment.work_id,
            lane: agent.lane,
            turn: Turn::new(me.station.as_str(), assignment.priority, assignment.assigned_at, limits.ageing.get()),
            deadline: assignment.start_by(),
            body: Bytes::from(serde_json::to_vec(&assignment).unwrap_or_default()),
        };
        let event = Event {
            work_id: assignment.work_id,
            run_id: assignment.orchestrator_run_id.clone(),
            at: assignment.assigned_at,
            station: me.station.clone(),
            instance: me.instance,
            side: Side::Assigner,
            attempt: 0,
            kind: Kind::Assigned(Box::new(assignment)),
        };
        self.0.transport.queue.push(&agent.station, item, limits.queue_size, Some(record(&event))).await?;
        Ok(())
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
        self.0.schemas.check(&agent, request)?;
        let size = size_of(request);
        if size > limits.input_max.as_usize() {
            return Err(Error::TooLarge { size, max: limits.input_max });
        }
        if let Some(schema) = request.accept.as_ref().and_then(|criteria| criteria.schema.as_ref()) {
            jsonschema::validator_for(schema).map_err(|error| Error::BadCriteria(shorten(&error.to_string())))?;
        }
        Ok((agent, priority, timeout))
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
    async fn open_run(&self, caller: &Caller, nested: Option<&Nested<'_>>, joins: Option<&RunId>) -> Result<RunId> {
        if let Some(Bound { run_id, .. }) = caller.work() {
            let max = self.config().lattice.work.depth_max;
            if run_id.depth() >= max as usize {
                return Err(Error::TooDeep { run_id: run_id.clone(), max });
            }
            if let Some(nested) = nested {
                self.leave_room(run_id, nested).await?;
            }
            return self.child_of(run_id, 0).await;
        }
        if let Some(run_id) = joins {
            let root = run_id.root();
            if !self.0.runs.knows_root(&root).await? {
                self.0.runs.catch_up().await?;
                if !self.0.runs.knows_root(&root).await? {
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

    /// What an idempotency key stands for: it is bound to this order now, or was before.
    async fn keyed(&self, caller: &Caller, nested: Option<&Nested<'_>>, key: &str, request: &Request) -> Result<Option<Keyed>> {
        let len = key.chars().count();
        if len == 0 || len > KEY_MAX {
            return Err(Error::BadKey(len));
        }
        let table = &self.0.transport.table;
        let row_key = digest(&json!([caller.work().map(|bound| &bound.run_id), key]));
        let plain = json!([request.agent, request.task, request.context, request.station, request.priority, request.timeout]);
        let further = [
            ("accept", request.accept.as_ref().map(|criteria| json!(criteria))),
            ("budget", request.budget.as_ref().map(|budget| json!(budget))),
            ("queue_timeout", request.queue_timeout.map(|span| json!(span))),
            ("silence_timeout", request.silence_timeout.map(|span| json!(span))),
        ];
        let further: Vec<_> = further.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        // Without them an order has the digest that it had before they existed.
        let order = if further.is_empty() { digest(&plain) } else { digest(&json!([plain, further])) };
        loop {
            if let Some(row) = table.get(Bucket::Keys, &row_key).await? {
                let Ok(keyed) = serde_json::from_slice::<Keyed>(&row.value) else {
                    return Err(transport::Error::Store(format!("the row of idempotency_key {key:?} cannot be read").into()).into());
                };
                if keyed.order != order {
                    return Err(Error::KeyReused { key: key.to_owned(), work_id: keyed.work_id });
                }
                return Ok(Some(keyed));
            }
            let keyed = Keyed {
                work_id: new_work_id(),
                run_id: self.open_run(caller, nested, request.run_id.as_ref()).await?,
                order: order.clone(),
            };
            let value = Bytes::from(serde_json::to_vec(&keyed).unwrap_or_default());
            let kept = self.config().lattice.storage.max_age.get();
            match table.put(Bucket::Keys, &row_key, value, Expect::Absent, Some(kept)).await {
                Ok(_) => return Ok(Some(keyed)),
                Err(transport::Error::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of an order, each decided elsewhere")]
    async fn order(
        &self,
        caller: &Caller,
        agent: &Agent,
        request: Request,
        work_id: WorkId,
        run_id: RunId,
        priority: i32,
        timeout: Span,
    ) -> Result<Assignment> {
        let size = size_of(&request);
        let (mut task, mut context, mut input_ref) = (request.task, request.context, None);
        if size > INPUT_INLINE_MAX {
            let whole = serde_json::to_vec(&json!({"task": task, "context": context})).unwrap_or_default();
            input_ref = Some(self.0.transport.blobs.put(&mut whole.as_slice(), Media::Json).await?);
            context = serde_json::Map::new();
            task = task.chars().take(TASK_SHOWN_MAX).collect();
        }
        let budgets = request.budget.map(|budget| Allowance { run_id: run_id.clone(), budget }).into_iter().collect();
        let limits = &self.config().lattice.work;
        let trace_id = request.trace.map_or_else(|| trace_of(&run_id.root()), |trace| trace.trace_id);
        Ok(Assignment {
            work_id,
            orchestrator_run_id: run_id,
            parent_work_id: caller.work().map(|bound| bound.work_id),
            originating_station: self.0.registry.me().station.clone(),
            target_station: agent.station.clone(),
            agent_name: request.agent,
            task,
            context,
            input_ref,
            assigned_at: now(),
            timeout,
            queue_timeout: request.queue_timeout.or(agent.manifest.limits.queue).or(limits.queue_timeout),
            silence_timeout: request.silence_timeout,
            priority,
            trace_id,
            span_id: new_span_id(),
            owner: caller.owner().cloned(),
            accept: request.accept,
            budgets,
            redrives: None,
        })
    }
}

/// How many bytes a task and its context have together.
fn size_of(request: &Request) -> usize {
    let context = if request.context.is_empty() { 0 } else { serde_json::to_vec(&request.context).map_or(usize::MAX, |json| json.len()) };
    request.task.len().saturating_add(context)
}

pub(super) fn digest(value: &Value) -> String {
    let hash = Sha256::digest(value.to_string().as_bytes());
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Schemas {
    pub(super) fn new(compiled: Compiled) -> Self {
        Self(Mutex::new(compiled))
    }

    fn check(&self, agent: &Agent, request: &Request) -> Result<()> {
        let Some(schema) = &agent.manifest.input_schema else { return Ok(()) };
        let validator = self.compiled(&agent.manifest.name, schema)?;
        let context = Value::Object(request.context.clone());
        let problems: Vec<String> = validator
            .iter_errors(&context)
            .take(PROBLEMS_SHOWN_MAX)
            .map(|error| format!("at context{}: {}", error.instance_path(), shorten(&error.to_string())))
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
        let validator = jsonschema::validator_for(schema)
            .map_err(|error| Error::BadSchema { agent: agent.clone(), reason: shorten(&error.to_string()) })?;
        let validator = Arc::new(validator);
        compiled.insert(agent.clone(), (schema.clone(), validator.clone()));
        Ok(validator)
    }
}

fn shorten(text: &str) -> String {
    const SHOWN_MAX: usize = 300;
    if text.chars().count() <= SHOWN_MAX { text.to_owned() } else { text.chars().take(SHOWN_MAX).chain("…".chars()).collect() }
}
