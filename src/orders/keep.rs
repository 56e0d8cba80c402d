//! Looks after orders for as long as a process lives: when something happened to what they wait for, and now and then anyway.

use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::below::because;
use super::{Error, Orders, Result};
use crate::model::id::WorkId;
use crate::model::map;
use crate::runs::{self, Waiting};
use crate::transport;

/// How soon after something came to its hook a process looks whether that is held back.
const LOOK_PAUSE: Duration = Duration::from_secs(1);

impl Orders {
    /// Looks after all that waits in the lattice until cancelled. `own` is for a process that hardly ever reads the run store: it
    /// looks after what its own hook holds back, and only now and then after the rest.
    pub async fn keep(&self, own: bool, cancel: CancellationToken) {
        tokio::select! {
            () = cancel.cancelled() => {}
            () = self.keep_on(own) => {}
        }
    }

    async fn keep_on(&self, own: bool) {
        let mut stirred = self.0.runs.stirred();
        let mut signal = self.0.transport.queue.signal(&self.0.me.station);
        // What happened while nobody was there comes first.
        let (mut all, mut all_at) = (true, Instant::now());
        let mut looked: Option<Instant> = None;
        loop {
            // However much happens in between.
            if all_at <= Instant::now() {
                (all, all_at) = (true, Instant::now() + self.0.config.lattice.work.recheck.get());
            }
            // Whoever hardly ever reads the run store does so for as long as something waits here.
            let holds_back = own && self.holds_back().await;
            if !own || holds_back || looked.is_none_or(|at| at.elapsed() >= runs::SELDOM) {
                looked = Some(Instant::now());
                match self.round(std::mem::take(&mut all)).await {
                    Ok(()) | Err(Error::Transport(transport::Error::Unreachable(_) | transport::Error::Unanswered(_))) => {}
                    Err(error) => tracing::warn!(%error, "could not look after works that wait for others; trying again"),
                }
            }
            let read = async {
                if holds_back {
                    self.0.runs.follow().await;
                }
                signal.changed().await;
                tokio::time::sleep(LOOK_PAUSE).await;
            };
            tokio::select! {
                () = read, if own => {}
                stirred = stirred.changed() => if stirred.is_err() { return },
                () = tokio::time::sleep_until(all_at) => {}
            }
        }
    }

    /// Whether this station's hook has anything that somebody has to wake.
    async fn holds_back(&self) -> bool {
        let load = self.0.transport.queue.load(&self.0.me.station).await;
        load.is_ok_and(|lanes| lanes.iter().any(|lane| lane.held_back > 0 || lane.lane == map::LANE))
    }

    /// Does what is due. What concerns neither a hook nor an order of this station is left to others, unless they had their time.
    async fn round(&self, all: bool) -> Result<()> {
        self.0.runs.catch_up().await?;
        let mine = |waiting: &Waiting| all || [&waiting.target, &waiting.origin].contains(&&self.0.me.station);
        let mut away = false;
        for orphan in self.0.runs.orphans().await?.into_iter().filter(mine) {
            self.see_to(&orphan, &mut away, self.stop_with_its_parent(orphan.work_id)).await?;
        }
        for waiting in self.0.runs.waiting(all).await?.into_iter().filter(mine) {
            self.see_to(&waiting, &mut away, self.look_after(waiting.work_id)).await?;
        }
        Ok(())
    }

    async fn stop_with_its_parent(&self, id: WorkId) -> Result<()> {
        let Some(work) = self.0.works.get(id).await? else { return Ok(()) };
        let Some(parent) = work.assignment.as_ref().and_then(|order| order.parent_work_id) else { return Ok(()) };
        if self.called_off_with(parent).await?.is_some() { self.stop(&work, Some(because(parent))).await } else { Ok(()) }
    }

    /// One that cannot be seen to keeps no other waiting. Once the server was found away, the rest of the round is for what lives here.
    async fn see_to(&self, waiting: &Waiting, away: &mut bool, see: impl Future<Output = Result<()>>) -> Result<()> {
        if *away && !self.0.transport.log.is_here(waiting.work_id).await? {
            return Ok(());
        }
        match see.await {
            Err(Error::Transport(transport::Error::Denied(_))) | Ok(()) => Ok(()),
            Err(Error::Transport(transport::Error::Unreachable(_) | transport::Error::Unanswered(_))) => {
                *away = true;
                Ok(())
            }
            Err(error @ Error::Runs(_)) => Err(error),
            Err(error) => {
                tracing::warn!(work_id = %waiting.work_id, %error, "could not look after a work that waits for others; trying again");
                Ok(())
            }
        }
    }
}
