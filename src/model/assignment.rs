//! The order: what a work was given out with.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::accept::Criteria;
use super::access::Principal;
use super::after::After;
use super::budget::Allowance;
use super::id::{AgentName, RunId, StationId, WorkId};
use super::map;
use super::output::BlobRef;
use super::owner::Owner;
use super::time::{Span, Timestamp};

/// The order: everything that a leaf needs to know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    /// The work.
    pub work_id: WorkId,
    /// The work's own run.
    pub orchestrator_run_id: RunId,
    /// The work whose agent ordered this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_work_id: Option<WorkId>,
    /// The station that ordered it.
    pub originating_station: StationId,
    /// The station whose hook holds it.
    pub target_station: StationId,
    /// The agent.
    pub agent_name: AgentName,
    /// What the agent is asked to do; only its beginning when `input_ref` is set.
    pub task: String,
    /// Structured input; empty when `input_ref` is set.
    #[serde(default)]
    pub context: Map<String, Value>,
    /// A blob with the whole `{"task": ..., "context": ...}` when that is too large for a message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_ref: Option<BlobRef>,
    /// When it was ordered.
    pub assigned_at: Timestamp,
    /// How long it may take in all, from the assignment.
    pub timeout: Span,
    /// How long it may wait for its first attempt; as long as for everything when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_timeout: Option<Span>,
    /// How long its agent may say nothing, if the caller decides that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silence_timeout: Option<Span>,
    /// Higher is more urgent.
    #[serde(default)]
    pub priority: i32,
    /// W3C trace id, 32 hex digits.
    pub trace_id: String,
    /// W3C span id of the assignment, 16 hex digits.
    pub span_id: String,
    /// Whose it is; what an agent orders is its own orderer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// Who ordered it by credentials of their own; what an agent orders is its own orderer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub principal: Option<Principal>,
    /// What is asked of its result before it counts as done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accept: Option<Criteria>,
    /// The budgets that it falls under: those of the runs above it first, its own last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub budgets: Vec<Allowance>,
    /// The work that failed, of which this is another try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redrives: Option<WorkId>,
    /// The works that it waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<After>,
    /// The items of which each is a work of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<map::Spec>,
}

impl Assignment {
    /// The moment at which it is too late.
    pub fn deadline(&self) -> Timestamp {
        self.assigned_at.after(self.timeout.get())
    }

    /// The moment at which it is too late to begin.
    pub fn start_by(&self) -> Timestamp {
        self.queue_timeout.map_or(self.deadline(), |queue| self.assigned_at.after(queue.get()).min(self.deadline()))
    }
}
