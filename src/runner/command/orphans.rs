//! What a dead process left running.
//!
//! Only Linux tells which process belongs to which run; elsewhere stale folders are removed, and nothing is stopped.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::Shop;
use super::folder::{is_dead, sweep};
use super::tree::{Mark, Orphan, Tree, kill_now, orphans};
use crate::model::event::Failure;
use crate::model::id::WorkId;

const IDENTITY: [&str; 4] = ["LATTICE_WORK_ID", "LATTICE_ATTEMPT", "LATTICE_SUPERVISOR", "LATTICE_MCP_CONFIG"];

impl Shop {
    /// Stops what earlier processes of this data folder left running, and removes its files; gives how many runs were stopped.
    pub(in crate::runner) async fn sweep_orphans(&self) -> Result<usize, Failure> {
        let running = self.base().await?.running.clone();
        let ours = running.clone();
        let stopped = self.stop_orphans(move |orphan| running_of(orphan).is_some_and(|running| running == ours)).await;
        super::blocking(move || sweep(&running)).await?;
        Ok(stopped)
    }

    /// Stops what dead processes left of a work's earlier attempts on this machine.
    pub(super) async fn stop_older_attempts(&self, work_id: WorkId, attempt: u32) {
        let work_id = work_id.to_string();
        let is_older = move |orphan: &Orphan| {
            let older = orphan.variable("LATTICE_ATTEMPT").and_then(|found| found.parse::<u32>().ok());
            orphan.variable("LATTICE_WORK_ID") == Some(&work_id) && older.is_some_and(|older| older < attempt)
        };
        self.stop_orphans(is_older).await;
    }

    /// Kills all that runs for this process, because it leaves at once.
    pub(in crate::runner) fn kill_all(&self) {
        kill_now(vec![format!("LATTICE_SUPERVISOR={}", self.supervisor())]);
    }

    async fn stop_orphans(&self, belongs: impl Fn(&Orphan) -> bool + Send + 'static) -> usize {
        let found = tokio::task::spawn_blocking(move || {
            let orphans = orphans();
            let abandoned = orphans.iter().filter(|orphan| belongs(orphan) && is_abandoned(orphan));
            abandoned.filter_map(identity).collect::<BTreeSet<_>>()
        });
        let runs = found.await.unwrap_or_default();
        let stopping = runs.into_iter().map(|entries| async {
            tracing::warn!(run = ?entries, "stopping what a dead process left running");
            Tree::new(Mark { group: None, entries }).stop(self.context.kill_after).await;
        });
        futures_util::future::join_all(stopping).await.len()
    }
}

/// The folder of running works that a process belongs to.
fn running_of(orphan: &Orphan) -> Option<PathBuf> {
    Path::new(orphan.variable("LATTICE_MCP_CONFIG")?).parent()?.parent().map(Path::to_owned)
}

fn is_abandoned(orphan: &Orphan) -> bool {
    let running = running_of(orphan);
    running.is_some_and(|running| orphan.variable("LATTICE_SUPERVISOR").is_some_and(|supervisor| is_dead(&running, supervisor)))
}

fn identity(orphan: &Orphan) -> Option<Vec<String>> {
    IDENTITY.iter().map(|name| orphan.variable(name).map(|value| format!("{name}={value}"))).collect()
}
