//! Idempotency keys: what a caller ordered under one is found again, in any process and after any restart.
//!
//! A caller is the owner of what it orders, or, while it executes a work, that work's run: nobody else's keys are its own.

use bytes::Bytes;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::nested::Nested;
use super::{Assigned, Caller, Dispatcher, Error, Request, Result};
use crate::model::hex::hex;
use crate::model::keyed::Keyed;
use crate::registry::Agent;
use crate::telemetry::new_work_id;
use crate::transport::{self, Bucket, Expect};

const KEY_MAX: usize = 256;

/// What an order with a key comes to.
pub(super) enum Reserved {
    /// A new work, whose row has this revision.
    New(Keyed, u64),
    /// Somebody bound the key to it of whose order nothing is known.
    TakenOver(Keyed),
    /// It has been given out.
    Known(Assigned),
}

/// A caller's key, and the order that came with it.
pub(super) struct Key {
    text: String,
    row: String,
    order: String,
}

impl Key {
    pub(super) fn of(caller: &Caller, request: &Request) -> Result<Option<Self>> {
        let Some(text) = &request.idempotency_key else { return Ok(None) };
        let len = text.chars().count();
        if len == 0 || len > KEY_MAX {
            return Err(Error::BadKey(len));
        }
        let whose = match caller.work() {
            Some(bound) => json!([bound.run_id, text]),
            None => json!([null, text, caller.owner()]),
        };
        Ok(Some(Self { text: text.clone(), row: digest(&whose), order: digest(&identity(caller, request)) }))
    }
}

/// All that makes two orders the same one.
fn identity(caller: &Caller, request: &Request) -> Value {
    let plain = json!([request.agent, request.task, request.context, request.station, request.priority, request.timeout]);
    // What an agent assigns joins no other run, whatever it says.
    let run_id = request.run_id.as_ref().filter(|_| caller.work().is_none());
    let further = [
        ("run", run_id.map(|run_id| json!(run_id))),
        ("accept", request.accept.as_ref().map(|criteria| json!(criteria))),
        ("budget", request.budget.as_ref().map(|budget| json!(budget))),
        ("queue_timeout", request.queue_timeout.map(|span| json!(span))),
        ("silence_timeout", request.silence_timeout.map(|span| json!(span))),
        ("after", request.after.as_ref().map(|after| json!(after))),
        ("map", request.map.as_ref().map(|map| json!([map.items, map.parallel]))),
    ];
    let further: Vec<_> = further.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
    // Without them an order is what it was before they existed.
    if further.is_empty() { plain } else { json!([plain, further]) }
}

impl Dispatcher {
    /// The work of an earlier order under this key, if there was one.
    pub(super) async fn recall(&self, key: &Key, agent: &Agent) -> Result<Option<Assigned>> {
        match self.kept(key).await? {
            Some((keyed, _)) => self.known(&keyed, agent).await,
            None => Ok(None),
        }
    }

    /// Binds a key to an order: to a new work, which gives the revision of its row, or to the one that somebody bound it to meanwhile.
    /// That one is taken over if nothing is known of it: whoever bound it to the work does not free it any more.
    pub(super) async fn reserve(
        &self,
        key: &Key,
        caller: &Caller,
        nested: Option<&Nested<'_>>,
        request: &Request,
        agent: &Agent,
    ) -> Result<Reserved> {
        loop {
            if let Some((keyed, revision)) = self.kept(key).await? {
                if let Some(known) = self.known(&keyed, agent).await? {
                    return Ok(Reserved::Known(known));
                }
                match self.keep(key, &keyed, Expect::Revision(revision)).await {
                    Ok(_) => return Ok(Reserved::TakenOver(keyed)),
                    Err(transport::Error::Conflict { .. }) => continue,
                    Err(error) => return Err(error.into()),
                }
            }
            let run_id = self.open_run(caller, nested, request).await?;
            let keyed = Keyed { work_id: new_work_id(), run_id, order: key.order.clone(), done: false };
            match self.keep(key, &keyed, Expect::Absent).await {
                Ok(revision) => return Ok(Reserved::New(keyed, revision)),
                Err(transport::Error::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Notes that the work of a key is on its hook. Should that fail, the log tells it as well.
    pub(super) async fn note_done(&self, key: &Key, keyed: Keyed) {
        if let Err(error) = self.keep(key, &Keyed { done: true, ..keyed }, Expect::Any).await {
            tracing::debug!(%error, "an idempotency key keeps its first note");
        }
    }

    /// Frees a key whose order was refused before anything was done about it; not if somebody else has taken it over.
    pub(super) async fn forget(&self, key: &Key, revision: u64) {
        if let Err(error) = self.transport().table.remove(Bucket::Keys, &key.row, Expect::Revision(revision)).await {
            tracing::debug!(%error, "the idempotency key of a refused order stays bound to it");
        }
    }

    /// The work of a key, once it has been given out.
    pub(super) async fn known(&self, keyed: &Keyed, agent: &Agent) -> Result<Option<Assigned>> {
        let work = match self.check(keyed.work_id).await {
            Ok(work) => Some(work),
            Err(Error::UnknownWork(_)) => None,
            Err(error) => return Err(error),
        };
        if work.is_none() && !keyed.done {
            return Ok(None);
        }
        let order = work.as_ref().and_then(|work| work.assignment.as_ref());
        Ok(Some(Assigned {
            work_id: keyed.work_id,
            agent: agent.manifest.name.clone(),
            station: order.map_or_else(|| agent.station.clone(), |order| order.target_station.clone()),
            run_id: keyed.run_id.clone(),
            root_run_id: keyed.run_id.root(),
            online: agent.online,
            known: true,
        }))
    }

    /// What stands under a key, and the revision of that.
    async fn kept(&self, key: &Key) -> Result<Option<(Keyed, u64)>> {
        let Some(row) = self.transport().table.get(Bucket::Keys, &key.row).await? else { return Ok(None) };
        let text = &key.text;
        let Ok(keyed) = serde_json::from_slice::<Keyed>(&row.value) else {
            return Err(transport::Error::Store(format!("the row of idempotency_key {text:?} cannot be read").into()).into());
        };
        if keyed.order == key.order {
            Ok(Some((keyed, row.revision)))
        } else {
            Err(Error::KeyReused { key: text.clone(), work_id: keyed.work_id })
        }
    }

    /// As long as anything may be remembered of the work.
    async fn keep(&self, key: &Key, keyed: &Keyed, expect: Expect) -> transport::Result<u64> {
        let lattice = &self.config().lattice;
        let kept = lattice.storage.runs_max_age.max(lattice.storage.max_age).max(lattice.nats.log_max_age).get();
        let value = Bytes::from(serde_json::to_vec(keyed).unwrap_or_default());
        self.transport().table.put(Bucket::Keys, &key.row, value, expect, Some(kept)).await
    }
}

pub(super) fn digest(value: &Value) -> String {
    hex(&Sha256::digest(value.to_string().as_bytes()))
}
