//! Places of attempts that wait for works below them: such an attempt lends its place to one of those.
//!
//! Else a station whose places are all taken by agents that wait for what they have assigned to it would wait for ever. An attempt
//! counts unless something below it runs in this process, so the places stay as many as there are, and depth bounds what runs at once.

use std::collections::HashSet;
use std::sync::PoisonError;
use std::time::Duration;

use tokio::time::Instant;

use super::Leaf;
use crate::model::id::{RunId, WorkId};
use crate::transport::LaneLoad;

/// How often it is looked at most whether an attempt can lend its place, and at least while none is free.
pub(super) const EVERY: Duration = Duration::from_millis(500);
/// How much longer than a look took nobody looks again.
const REST: u32 = 4;
/// How many of the works below an attempt are looked at.
const BELOW_MAX: u32 = 200;

impl Leaf {
    /// How many places are free, at least: who lends is looked for only when none is.
    pub(super) fn room(&self) -> usize {
        let (running, places) = (self.0.running(), self.0.config.lattice.work.max_parallel as usize);
        if running.len() < places {
            return places - running.len();
        }
        let taken = running.len() - lenders(running.values().filter_map(|running| running.run_id.as_ref())).len();
        places.saturating_sub(taken)
    }

    /// Whether it is time to look who can lend its place.
    pub(super) fn may_lend(&self) -> bool {
        let takes_all = self.0.only.lock().unwrap_or_else(PoisonError::into_inner).is_none();
        let is_due = *self.0.lend_at.lock().unwrap_or_else(PoisonError::into_inner) <= Instant::now();
        takes_all && is_due && self.room() == 0
    }

    /// For each attempt that can lend its place: the works below it that wait.
    pub(super) async fn lent(&self) -> Vec<Vec<WorkId>> {
        let began = Instant::now();
        let found = self.find_lent().await;
        let rest = EVERY.max(began.elapsed() * REST);
        *self.0.lend_at.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now() + rest;
        found
    }

    async fn find_lent(&self) -> Vec<Vec<WorkId>> {
        let runs: Vec<RunId> = {
            let running = self.0.running();
            let lent = lenders(running.values().filter_map(|running| running.run_id.as_ref()));
            running.values().filter_map(|running| running.run_id.clone()).filter(|run| !lent.contains(run)).collect()
        };
        let found = async {
            let waits = |load: &LaneLoad| load.waiting > load.held_back;
            if !self.0.transport.queue.load(&self.0.registry.me().station).await?.iter().any(waits) {
                return Ok(Vec::new());
            }
            self.0.runs.catch_up().await?;
            let mut lent = Vec::new();
            for run in &runs {
                lent.push(self.0.runs.waiting_below(run, BELOW_MAX).await?);
            }
            Ok::<_, crate::runs::Error>(lent)
        };
        match found.await {
            Ok(lent) => lent.into_iter().filter(|works| !works.is_empty()).collect(),
            Err(error) => {
                tracing::debug!(%error, "it is not known whether attempts wait for works of this station");
                Vec::new()
            }
        }
    }
}

/// Those of these runs that are above others of them.
fn lenders<'a>(runs: impl Iterator<Item = &'a RunId> + Clone) -> HashSet<RunId> {
    let mut above = HashSet::new();
    for run in runs.clone() {
        let mut next = run.parent();
        while let Some(run) = next {
            next = run.parent();
            if !above.insert(run) {
                break;
            }
        }
    }
    runs.filter(|run| above.contains(run)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_counts_unless_something_below_it_runs() {
        let root = RunId::root_of(uuid::Uuid::from_u128(7));
        let (a, b) = (root.child(1), root.child(12));
        let count = |runs: &[RunId]| runs.len() - lenders(runs.iter()).len();
        assert_eq!(count(&[a.clone(), b.clone()]), 2);
        // The item of an order below it, which is no attempt itself.
        assert_eq!(count(&[a.clone(), a.child(1).child(3)]), 1);
        assert_eq!(count(&[a.clone(), a.child(1), a.child(1).child(1)]), 1);
        assert_eq!(count(&[a.clone(), a.child(1), a.child(2), b]), 3);
    }
}
