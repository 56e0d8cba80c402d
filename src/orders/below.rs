//! Works that are called off, and with each all that hangs below it.

use futures_util::{StreamExt, TryStreamExt, stream};

use super::{Error, Orders, Result};
use crate::model::event::{Event, Kind, Side};
use crate::model::id::WorkId;
use crate::model::status::Status;
use crate::model::work::Work;
use crate::telemetry::now;
use crate::transport;
use crate::works::record;

/// How many works are called off at once.
const AT_ONCE: usize = 32;

impl Orders {
    /// Asks that a work be stopped: one that nobody runs is cancelled at once, one that runs when its leaf confirms. Settled work, and
    /// what was asked before, stays as it is.
    ///
    /// # Errors
    /// The transport's.
    pub async fn stop(&self, work: &Work, reason: Option<String>) -> Result<()> {
        if work.status.is_settled() || work.is_called_off() {
            return Ok(());
        }
        let me = &self.0.me;
        let event = Event {
            work_id: work.work_id,
            run_id: work.run_id.clone(),
            at: now(),
            station: me.station.clone(),
            instance: me.instance,
            side: Side::Assigner,
            attempt: 0,
            kind: Kind::Cancelled { reason },
        };
        let records = vec![record(event)];
        let (transport, id) = (&self.0.transport, work.work_id);
        let station = work.assignment.as_ref().map_or(&me.station, |order| &order.target_station);
        match work.status {
            // It settles when its items have.
            Status::Accepted(_) if work.is_map() => _ = transport.log.append(records).await?,
            // Its leaf confirms; should that be gone, the item's time is up, and whoever sees to such items confirms.
            Status::Accepted(_) | Status::Escalated { parked: false, .. } => {
                transport.queue.wake(station, id, Some(now()), records).await?;
            }
            _ => _ = transport.queue.remove(station, id, records).await?,
        }
        Ok(())
    }

    /// Calls off all that hangs below a work that was called off, on whatever station.
    ///
    /// # Errors
    /// The transport's or the store's.
    pub async fn stop_below(&self, parent: &Work) -> Result<()> {
        self.0.runs.catch_up().await?;
        let below = self.0.runs.open_below(&parent.run_id).await?;
        let reason = because(parent.work_id);
        stream::iter(below)
            .map(|id| async move {
                if let Some(work) = self.0.works.get(id).await? { self.stop(&work, Some(because(parent.work_id))).await } else { Ok(()) }
            })
            .buffer_unordered(AT_ONCE)
            .try_collect::<()>()
            .await?;
        tracing::debug!(reason, "called off what hangs below a work");
        Ok(())
    }

    /// Why a work is called off without anybody having asked for it: its parent was. While the server is away that is not known, and
    /// local work goes on; whoever looks once it is back sees to it.
    ///
    /// # Errors
    /// The transport's or the store's.
    pub async fn called_off_with(&self, parent: WorkId) -> Result<Option<String>> {
        let parent = match self.standing(parent).await {
            Err(Error::Transport(transport::Error::Unreachable(_) | transport::Error::Unanswered(_))) => None,
            standing => standing?,
        };
        Ok(parent.filter(|parent| parent.is_called_off()).map(|parent| because(parent.work_id)))
    }
}

pub(super) fn because(parent: WorkId) -> String {
    format!("work {parent}, which it belongs to, was cancelled")
}
