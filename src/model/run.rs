//! A run as the run store keeps it, and the tree that its lineage makes.

use std::collections::{BTreeMap, BTreeSet};

use super::accept::Check;
use super::access::Principal;
use super::budget::{Allowance, Budget, Spent, Usage};
use super::id::{AgentName, RunId, StationId, WorkId};
use super::status::Status;
use super::time::Timestamp;
use super::work::Outcome;

/// One execution of an agent, and its place in the lineage.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// This machine's number for it.
    pub local_number: i64,
    /// Its id.
    pub run_id: RunId,
    /// The run it is a child of.
    pub parent_run_id: Option<RunId>,
    /// The top of its tree.
    pub root_run_id: RunId,
    /// The station that ordered it.
    pub originating_station: StationId,
    /// The station whose hook got it.
    pub target_station: StationId,
    /// W3C trace id.
    pub trace_id: String,
    /// The work.
    pub work_id: WorkId,
    /// The agent.
    pub agent: AgentName,
    /// What it was asked to do (its beginning).
    pub task: String,
    /// Where it stands.
    pub status: Status,
    /// The type of the last event that counted.
    pub event: String,
    /// When it was ordered.
    pub assigned_at: Timestamp,
    /// When the first attempt began.
    pub accepted_at: Option<Timestamp>,
    /// When it settled.
    pub settled_at: Option<Timestamp>,
    /// The highest attempt.
    pub attempt: u32,
    /// How long the settling attempt took.
    pub duration_ms: Option<u64>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// What the last claim that it is done was held against.
    pub checks: Vec<Check>,
    /// What its attempts have reported to have used.
    pub usage: Usage,
    /// What it and everything below it may use.
    pub budget: Option<Budget>,
    /// Who ordered it by credentials of their own.
    pub principal: Option<Principal>,
}

impl Run {
    /// The budget that was given with it.
    pub fn allowance(&self) -> Option<Allowance> {
        self.budget.map(|budget| Allowance { run_id: self.run_id.clone(), budget })
    }
}

/// A run and its children, in the order of their numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Tree {
    /// The id at this place.
    pub run_id: RunId,
    /// What ran here; a root that no agent executes has none.
    pub run: Option<Run>,
    /// Its children.
    pub children: Vec<Tree>,
}

impl Tree {
    /// Builds the tree below `root` from runs in any order; ancestors without a run of their own are filled in.
    pub fn build(root: &RunId, runs: Vec<Run>) -> Self {
        let mut children: BTreeMap<RunId, BTreeSet<(u64, RunId)>> = BTreeMap::new();
        let mut known: BTreeMap<RunId, Run> = BTreeMap::new();
        for run in runs {
            let mut id = run.run_id.clone();
            known.insert(id.clone(), run);
            while let Some(parent) = id.parent().filter(|_| id != *root) {
                let number = id.as_str().rsplit('-').next().and_then(|n| n.parse().ok()).unwrap_or(0);
                if !children.entry(parent.clone()).or_default().insert((number, id)) {
                    break;
                }
                id = parent;
            }
        }
        Self::grow(root.clone(), &mut children, &mut known)
    }

    /// What was used here and everywhere below.
    pub fn spent(&self) -> Spent {
        let own = self.run.as_ref().map_or_else(Spent::default, |run| Spent { usage: run.usage, works: 1 });
        self.children
            .iter()
            .map(Self::spent)
            .fold(own, |sum, below| Spent { usage: sum.usage.plus(below.usage), works: sum.works + below.works })
    }

    fn grow(id: RunId, children: &mut BTreeMap<RunId, BTreeSet<(u64, RunId)>>, known: &mut BTreeMap<RunId, Run>) -> Self {
        let below = children.remove(&id).unwrap_or_default();
        let children = below.into_iter().map(|(_, child)| Self::grow(child, children, known)).collect();
        Self { run: known.remove(&id), run_id: id, children }
    }
}
