//! Orders on their way to an agent: put on a hook, held back until what they wait for has settled, taken apart into items, called off.
//!
//! What is done here follows from the log alone. Any process of the lattice may do it, several at once do no harm, and what nobody
//! saw in time is found by whoever looks next. It does not know who calls, nor how work is executed.

mod below;
mod items;
mod keep;
mod release;

pub use self::release::CONTEXT;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::io::AsyncReadExt;

use crate::config::Config;
use crate::model::assignment::Assignment;
use crate::model::event::{Event, Kind, Side};
use crate::model::id::WorkId;
use crate::model::map;
use crate::model::output::{BlobRef, Media};
use crate::model::turn::Turn;
use crate::model::work::Work;
use crate::registry::Identity;
use crate::runs::{self, Runs};
use crate::telemetry::now;
use crate::transport::{self, Item, Pushed, Transport};
use crate::works::{Works, record};

/// A larger input travels as a blob.
const INPUT_INLINE_MAX: usize = 64 << 10;
/// How much of a task stays readable in the record when the whole is a blob.
const TASK_SHOWN_MAX: usize = 1024;

/// Why an order could not be seen to.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The transport failed.
    #[error(transparent)]
    Transport(#[from] transport::Error),
    /// The run store failed.
    #[error(transparent)]
    Runs(#[from] runs::Error),
    /// The input of an order over many items is not what it was.
    #[error("the items of work {work_id} cannot be read: {reason}")]
    Unreadable {
        /// The work.
        work_id: WorkId,
        /// Why.
        reason: Arc<str>,
    },
}

type Result<T> = std::result::Result<T, Error>;

/// The orders of a lattice, as one process sees to them; cheap to clone.
#[derive(Clone)]
pub struct Orders(Arc<Inner>);

struct Inner {
    transport: Transport,
    works: Works,
    runs: Runs,
    me: Identity,
    config: Arc<Config>,
}

/// What an agent is asked to do: as it travels with its order, or as a blob if that is too large.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Input {
    /// The task.
    pub task: String,
    /// Structured input.
    #[serde(default)]
    pub context: Map<String, Value>,
    /// The items, of an order over many.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub items: Vec<Value>,
}

impl Input {
    /// About how many bytes it has.
    pub fn size(&self) -> usize {
        let json_len = |value: &dyn Fn() -> serde_json::Result<Vec<u8>>| value().map_or(usize::MAX, |json| json.len());
        let context = if self.context.is_empty() { 0 } else { json_len(&|| serde_json::to_vec(&self.context)) };
        let items = if self.items.is_empty() { 0 } else { json_len(&|| serde_json::to_vec(&self.items)) };
        self.task.len().saturating_add(context).saturating_add(items)
    }
}

impl Orders {
    /// Sees to orders over these parts.
    pub fn new(transport: Transport, works: Works, runs: Runs, me: Identity, config: Arc<Config>) -> Self {
        Self(Arc::new(Inner { transport, works, runs, me, config }))
    }

    /// Puts a work on its station's hook; durable when it returns. What waits for other works, its own items among them, is held back
    /// there.
    ///
    /// # Errors
    /// The transport's; `Full` when the hook is.
    pub async fn push(&self, order: Assignment, lane: String, held_back: bool) -> Result<()> {
        self.push_beside(None, order, lane, held_back).await.map(|_| ())
    }

    /// As `push`, for a work that lives where another one does, if given.
    async fn push_beside(&self, beside: Option<WorkId>, order: Assignment, lane: String, held_back: bool) -> Result<Pushed> {
        let (lane, deadline) = match (&order.map, held_back) {
            (None, false) => (lane, order.start_by()),
            (None, true) => (lane, order.deadline().after(self.wait_max())),
            (Some(_), _) => (map::LANE.to_owned(), order.deadline().after(self.wait_max())),
        };
        let item = Item {
            id: order.work_id,
            lane,
            turn: Turn::new(order.originating_station.as_str(), order.priority, order.assigned_at, self.0.config.lattice.work.ageing.get()),
            deadline,
            held_back: held_back || order.map.is_some(),
            beside,
            body: Bytes::from(serde_json::to_vec(&order).unwrap_or_default()),
        };
        let limits = &self.0.config.lattice.work;
        let limit = if item.held_back { limits.held_back_max } else { limits.queue_size };
        let station = order.target_station.clone();
        let event = Event {
            work_id: order.work_id,
            run_id: order.orchestrator_run_id.clone(),
            at: order.assigned_at,
            station: self.0.me.station.clone(),
            instance: self.0.me.instance,
            side: Side::Assigner,
            attempt: 0,
            kind: Kind::Assigned(Box::new(order)),
        };
        Ok(self.0.transport.queue.push(&station, item, limit, Some(record(event))).await?)
    }

    /// Puts an input into its order, or beside it if it is too large for a message.
    ///
    /// # Errors
    /// The transport's.
    pub async fn pack(&self, order: &mut Assignment, input: Input) -> Result<()> {
        if input.size() > INPUT_INLINE_MAX {
            let whole = serde_json::to_vec(&input).unwrap_or_default();
            order.input_ref = Some(self.0.transport.blobs.put(&mut whole.as_slice(), Media::Json).await?);
            order.task = input.task.chars().take(TASK_SHOWN_MAX).collect();
            return Ok(());
        }
        let Input { task, context, items } = input;
        (order.task, order.context) = (task, context);
        if let Some(map) = &mut order.map {
            map.items = items;
        }
        Ok(())
    }

    /// The whole input of an order, wherever it is.
    ///
    /// # Errors
    /// `Unreadable`, or the transport's.
    pub async fn input(&self, order: &Assignment) -> Result<Input> {
        let Some(BlobRef { sha256, size, .. }) = &order.input_ref else {
            let items = order.map.as_ref().map(|map| map.items.clone()).unwrap_or_default();
            return Ok(Input { task: order.task.clone(), context: order.context.clone(), items });
        };
        let unreadable = |reason: String| Error::Unreadable { work_id: order.work_id, reason: reason.into() };
        let mut text = Vec::new();
        let mut blob = self.0.transport.blobs.open(sha256, 0..*size).await?;
        blob.read_to_end(&mut text).await.map_err(|error| unreadable(error.to_string()))?;
        serde_json::from_slice(&text).map_err(|error| unreadable(error.to_string()))
    }

    /// A work as of now: from its events, or from the run store when those were dropped by age.
    ///
    /// # Errors
    /// The transport's or the store's.
    pub async fn standing(&self, id: WorkId) -> Result<Option<Arc<Work>>> {
        if let Some(work) = self.0.works.get(id).await? {
            return Ok(Some(work));
        }
        Ok(self.0.runs.of_work(id).await?.map(|run| Arc::new(Work::from_run(&run))))
    }

    /// Does what is due for a work that waits for others: lets it start, goes on with its items, or ends it. One that has all its
    /// answers is woken.
    ///
    /// # Errors
    /// The transport's or the store's.
    pub async fn look_after(&self, id: WorkId) -> Result<()> {
        let Some(work) = self.0.works.get(id).await? else { return Ok(()) };
        // One that lives on another machine is seen to there.
        let is_ours = !work.status.is_settled() && !work.is_elsewhere;
        let Some(order) = work.assignment.as_deref().filter(|_| is_ours) else { return Ok(()) };
        match (&order.map, &order.after) {
            (Some(spec), _) => self.go_on(&work, order, spec).await,
            _ if work.is_answered() => self.wake(&work, order).await,
            (None, Some(after)) => self.release(&work, order, after).await,
            (None, None) => Ok(()),
        }
    }

    /// How long a work may wait for others: never longer than events are kept.
    fn wait_max(&self) -> Duration {
        let lattice = &self.0.config.lattice;
        lattice.work.wait_max.min(lattice.storage.max_age).min(lattice.nats.log_max_age).get()
    }

    /// What happens to a work, said as its leaf by its own station, and in its assigner's stead by any other.
    fn event(&self, order: &Assignment, attempt: u32, kind: Kind) -> Event {
        let me = &self.0.me;
        let side = if order.target_station == me.station { Side::Leaf } else { Side::Assigner };
        Event {
            work_id: order.work_id,
            run_id: order.orchestrator_run_id.clone(),
            at: now(),
            station: me.station.clone(),
            instance: me.instance,
            side,
            attempt,
            kind,
        }
    }
}
