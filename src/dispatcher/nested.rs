//! What bounds works that works assign: budgets of the runs above, and how many there may be.
//!
//! The log is the truth, and every process counts what stands there. In one process a new work is on the log before the next one is
//! counted. Of two processes that assign at the same moment both may find room; a leaf looks again before each attempt, and of works
//! the log's order says which one is too many.

use tokio::sync::MutexGuard;

use super::{Bound, Caller, Dispatcher, Error, Result, is_away};
use crate::model::budget::{Allowance, Spent};
use crate::model::id::RunId;

/// The turn to assign below a run.
pub(super) struct Nested<'a> {
    /// The budgets of the runs above.
    pub(super) budgets: Vec<Allowance>,
    _turn: MutexGuard<'a, ()>,
}

impl Dispatcher {
    /// Takes the turn to assign on behalf of a work; whoever is bound to none needs none.
    pub(super) async fn nest(&self, caller: &Caller) -> Result<Option<Nested<'_>>> {
        let Some(Bound { work_id, run_id, .. }) = caller.work() else { return Ok(None) };
        let turn = self.0.nesting.lock().await;
        let budgets = match self.0.works.get(*work_id).await {
            Ok(work) => work.and_then(|work| Some(work.assignment.as_ref()?.budgets.clone())).unwrap_or_default(),
            // Local work goes on without the server, by what was heard of the budgets before.
            Err(error) if is_away(&error) => self.0.runs.budgets(run_id).await?,
            Err(error) => return Err(error.into()),
        };
        Ok(Some(Nested { budgets, _turn: turn }))
    }

    /// Whether one more work has room below a run; `works` is how many it is with its items.
    pub(super) async fn leave_room(&self, run_id: &RunId, nested: &Nested<'_>, works: u64) -> Result<()> {
        let limits = &self.config().lattice.work;
        let top = top_of(run_id);
        let (own, below) = self.0.runs.fan_out(run_id, &top).await?;
        if own >= u64::from(limits.children_max) {
            let place = format!("by run {run_id}");
            return Err(Error::TooWide { used: own, place, max: limits.children_max, key: "lattice.work.children_max" });
        }
        if below.saturating_add(works) > u64::from(limits.descendants_max) {
            let place = format!("below run {top}");
            return Err(Error::TooWide { used: below, place, max: limits.descendants_max, key: "lattice.work.descendants_max" });
        }
        for allowance in &nested.budgets {
            let spent = self.0.runs.spent(&allowance.run_id, None).await?;
            let spent = Spent { works: spent.works.saturating_add(works - 1), ..spent };
            if let Some(excess) = allowance.before_work(&spent) {
                return Err(excess.into());
            }
        }
        Ok(())
    }
}

/// The run of the work at the top of a tree that no work assigned: the root's child that this one is, or is below.
fn top_of(run_id: &RunId) -> RunId {
    let mut top = run_id.clone();
    while let Some(parent) = top.parent().filter(|parent| parent.parent().is_some()) {
        top = parent;
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_top_of_a_tree_is_the_roots_child() {
        let root = RunId::root_of(uuid::Uuid::from_u128(7));
        for below in [root.child(3), root.child(3).child(1), root.child(3).child(2).child(9)] {
            assert_eq!(top_of(&below), root.child(3));
        }
    }
}
