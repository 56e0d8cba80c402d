//! What happens to a work, as the log keeps it and as the wire writes it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::accept::Check;
use super::assignment::Assignment;
use super::budget::Usage;
use super::id::{InstanceId, RunId, StationId, WorkId};
use super::output::{BlobRef, Output};
use super::time::Timestamp;

/// One thing that happened to one work.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The work.
    pub work_id: WorkId,
    /// The work's own run.
    pub run_id: RunId,
    /// When it happened, by the clock of who says so.
    pub at: Timestamp,
    /// The station that says so.
    pub station: StationId,
    /// The process that says so.
    pub instance: InstanceId,
    /// As whom it says so. Where the record stands tells that, and not its body: a transport can guard a place, not a text.
    pub side: Side,
    /// The attempt it belongs to; 0 when it is the assigner's word and no attempt's.
    pub attempt: u32,
    /// What happened.
    pub kind: Kind,
}

/// As whom a station speaks of a work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// As the one whose hook has the work.
    Leaf,
    /// As whoever assigned it, or sees to it in the assigner's stead: answers, cancels, and settles it when its time is up.
    Assigner,
    /// As `Assigner`, and the machine where the work lives, another one than has this log, has heard it.
    Heard,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// The order was given.
    Assigned(Box<Assignment>),
    /// A leaf started an attempt.
    Accepted,
    /// The agent reports how far it is.
    Progress {
        /// 0 to 100.
        pct: Option<f64>,
        /// What it is doing.
        message: Option<String>,
    },
    /// The agent delivered.
    Complete {
        /// What it delivered.
        result: Output,
        /// How long the attempt took.
        duration_ms: u64,
        /// What its claim was held against; nothing when nobody looked.
        checks: Vec<Check>,
    },
    /// The work failed for good.
    Failed {
        /// Why.
        failure: Failure,
        /// How long the attempt took.
        duration_ms: u64,
    },
    /// The agent asks for help.
    Escalate(Ask),
    /// The help arrived.
    Answered {
        /// The number of the question, from 1.
        ask: u32,
        /// The answer: data for the agent.
        answer: Value,
        /// Who gave it; not known of events of older versions.
        by: Option<Answerer>,
    },
    /// The attempt ended without settling the work; another will follow.
    Retrying {
        /// Why this one ended.
        failure: Failure,
        /// Not before this moment.
        next_at: Timestamp,
    },
    /// From the assigner: please stop. From a leaf: it has stopped.
    Cancelled {
        /// Why, in the caller's words.
        reason: Option<String>,
    },
    /// The agent reports what its attempt has used so far.
    Used(Usage),
    /// The work failed, and was given out anew as another one.
    Redriven {
        /// The new work.
        work_id: WorkId,
    },
    /// All that it waited for has settled, and it may start.
    Released,
    /// What an attempt that was stopped had printed.
    Printed(Output),
    /// An event type of another version: kept and skipped.
    Other(String),
}

/// A question of a running agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ask {
    /// Its number in the work, from 1.
    pub ask: u32,
    /// What the agent needs.
    pub reason: String,
    /// What helps to decide.
    pub context: Value,
    /// Who is asked.
    pub needs: Needs,
    /// The agent has ended and is started again with the answer.
    pub parked: bool,
}

impl Ask {
    /// Whether whoever answers this answers `other` as well: the same words, to nobody whose word is worth less.
    pub fn covers(&self, other: &Self) -> bool {
        let same = self.reason == other.reason && self.context == other.context;
        same && (self.needs == other.needs || self.needs == Needs::Human)
    }
}

/// Who is asked for help.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Needs {
    /// Whoever orchestrates.
    #[default]
    Orchestrator,
    /// A person.
    Human,
}

/// Who answered a question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answerer {
    /// A person themself, in a form or at the command line, or an orchestrator's model.
    pub who: Needs,
    /// Tells this answer from any other, also from one with the same words.
    pub id: uuid::Uuid,
}

/// Why an attempt or a work failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// The kind of failure.
    pub kind: FailureKind,
    /// One sentence for whoever reads the status.
    pub message: String,
    /// The program's exit code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The end of standard error, or of the output that was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<String>,
    /// All attempts are used up.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dead_letter: bool,
    /// What the agent's claim was held against, when that is why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<Check>,
    /// When another attempt makes sense, as the agent says; of a quota, when it is there again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Timestamp>,
}

impl Failure {
    /// A failure with nothing but a sentence.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), exit_code: None, evidence: None, dead_letter: false, checks: Vec::new(), retry_at: None }
    }
}

/// The kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// Nobody started it in time.
    QueueTimeout,
    /// The agent said nothing for too long.
    SilenceTimeout,
    /// It took too long in all.
    TotalTimeout,
    /// The agent said that trying again may help (exit code 75).
    Transient,
    /// The process that ran it died.
    Crashed,
    /// The station gave the work back: it stopped, or its system had no room for one more file or program.
    HandedBack,
    /// The agent failed.
    Agent,
    /// What the agent uses has no quota left: no failure, but a state that passes.
    Quota,
    /// The agent can do nothing with what it was given.
    BadInput,
    /// The agent tried, and gave up.
    GaveUp,
    /// The agent could not be started.
    Unstartable,
    /// The result does not fit the agent's output schema.
    BadOutput,
    /// A limit of the configuration was reached.
    Limit,
    /// The agent said that it is done, and what was asked of its result does not hold.
    Refuted,
    /// A budget of the run is used up.
    Budget,
    /// A work that it waited for, or one of its items, did not complete.
    Dependency,
    /// A kind of another version.
    #[serde(other)]
    Unknown,
}

impl FailureKind {
    /// Whether the attempt counts against `max_attempts`.
    pub const fn burns_attempt(self) -> bool {
        !matches!(self, Self::HandedBack | Self::Quota)
    }
}

/// Why bytes are not an event.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not the JSON of an event.
    #[error("not an event: {0}")]
    Json(#[from] serde_json::Error),
    /// A field that this type of event needs is absent.
    #[error("a {kind} of work {work_id} has no {field}")]
    Missing {
        /// The event's type.
        kind: String,
        /// The work.
        work_id: WorkId,
        /// The field.
        field: &'static str,
    },
}

impl Kind {
    /// The type's name on the wire.
    pub fn wire_type(&self) -> &str {
        match self {
            Self::Assigned(_) => "WORK_ASSIGNED",
            Self::Accepted => "WORK_ACCEPTED",
            Self::Progress { .. } => "WORK_PROGRESS",
            Self::Complete { .. } => "WORK_COMPLETE",
            Self::Failed { .. } => "WORK_FAILED",
            Self::Escalate(_) => "WORK_ESCALATE",
            Self::Answered { .. } => "WORK_ANSWERED",
            Self::Retrying { .. } => "WORK_RETRYING",
            Self::Cancelled { .. } => "WORK_CANCELLED",
            Self::Used(_) => "WORK_USAGE",
            Self::Redriven { .. } => "WORK_REDRIVEN",
            Self::Released => "WORK_RELEASED",
            Self::Printed(_) => "WORK_PRINTED",
            Self::Other(kind) => kind,
        }
    }
}

/// The flat shape that every event has on the wire.
#[derive(Serialize, Deserialize)]
struct Wire {
    work_id: WorkId,
    orchestrator_run_id: RunId,
    #[serde(rename = "type")]
    kind: String,
    timestamp: Timestamp,
    station_id: StationId,
    instance_id: InstanceId,
    #[serde(default)]
    attempt: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    assignment: Option<Box<Assignment>>,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "present")]
    result: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    result_ref: Option<BlobRef>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    progress_pct: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    progress_msg: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    escalation_reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    escalation_context: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    needs: Option<Needs>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ask: Option<u32>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    parked: bool,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "present")]
    answer: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    answered_by: Option<Answerer>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    next_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    duration_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    checks: Vec<Check>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tokens: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cost_usd: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    turns: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    redriven_as: Option<WorkId>,
}

/// Keeps the difference between an absent value and `null`.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

fn output(blob: Option<BlobRef>, inline: Option<Value>) -> Output {
    blob.map_or_else(|| Output::Inline(inline.unwrap_or(Value::Null)), Output::Blob)
}

impl Wire {
    fn of(event: Event) -> Self {
        let mut wire = Self {
            work_id: event.work_id,
            orchestrator_run_id: event.run_id,
            kind: event.kind.wire_type().to_owned(),
            timestamp: event.at,
            station_id: event.station,
            instance_id: event.instance,
            attempt: event.attempt,
            assignment: None,
            result: None,
            result_ref: None,
            error: None,
            progress_pct: None,
            progress_msg: None,
            escalation_reason: None,
            escalation_context: None,
            needs: None,
            ask: None,
            parked: false,
            answer: None,
            answered_by: None,
            reason: None,
            next_at: None,
            duration_ms: None,
            checks: Vec::new(),
            tokens: None,
            cost_usd: None,
            turns: None,
            redriven_as: None,
        };
        match event.kind {
            Kind::Assigned(assignment) => wire.assignment = Some(assignment),
            Kind::Accepted | Kind::Released | Kind::Other(_) => {}
            Kind::Printed(Output::Inline(value)) => wire.result = Some(value),
            Kind::Printed(Output::Blob(blob)) => wire.result_ref = Some(blob),
            Kind::Progress { pct, message } => (wire.progress_pct, wire.progress_msg) = (pct, message),
            Kind::Complete { result, duration_ms, checks } => {
                (wire.duration_ms, wire.checks) = (Some(duration_ms), checks);
                match result {
                    Output::Inline(value) => wire.result = Some(value),
                    Output::Blob(blob) => wire.result_ref = Some(blob),
                }
            }
            Kind::Failed { failure, duration_ms } => (wire.error, wire.duration_ms) = (Some(failure), Some(duration_ms)),
            Kind::Escalate(ask) => {
                wire.escalation_reason = Some(ask.reason);
                wire.escalation_context = Some(ask.context);
                wire.needs = Some(ask.needs);
                wire.ask = Some(ask.ask);
                wire.parked = ask.parked;
            }
            Kind::Answered { ask, answer, by } => (wire.ask, wire.answer, wire.answered_by) = (Some(ask), Some(answer), by),
            Kind::Retrying { failure, next_at } => (wire.error, wire.next_at) = (Some(failure), Some(next_at)),
            Kind::Cancelled { reason } => wire.reason = reason,
            Kind::Used(Usage { tokens, cost_usd, turns }) => {
                (wire.tokens, wire.cost_usd, wire.turns) = (Some(tokens), Some(cost_usd), Some(turns));
            }
            Kind::Redriven { work_id } => wire.redriven_as = Some(work_id),
        }
        wire
    }

    fn into_event(self, side: Side) -> Result<Event, Error> {
        let missing = |field| Error::Missing { kind: self.kind.clone(), work_id: self.work_id, field };
        let kind = match self.kind.as_str() {
            "WORK_ASSIGNED" => Kind::Assigned(self.assignment.ok_or_else(|| missing("assignment"))?),
            "WORK_ACCEPTED" => Kind::Accepted,
            "WORK_PROGRESS" => Kind::Progress { pct: self.progress_pct, message: self.progress_msg },
            "WORK_COMPLETE" => Kind::Complete {
                result: output(self.result_ref, self.result),
                duration_ms: self.duration_ms.unwrap_or(0),
                checks: self.checks,
            },
            "WORK_FAILED" => {
                Kind::Failed { failure: self.error.ok_or_else(|| missing("error"))?, duration_ms: self.duration_ms.unwrap_or(0) }
            }
            "WORK_ESCALATE" => Kind::Escalate(Ask {
                ask: self.ask.unwrap_or(1),
                reason: self.escalation_reason.ok_or_else(|| missing("escalation_reason"))?,
                context: self.escalation_context.unwrap_or(Value::Null),
                needs: self.needs.unwrap_or_default(),
                parked: self.parked,
            }),
            "WORK_ANSWERED" => {
                Kind::Answered { ask: self.ask.unwrap_or(1), answer: self.answer.ok_or_else(|| missing("answer"))?, by: self.answered_by }
            }
            "WORK_RETRYING" => {
                Kind::Retrying { failure: self.error.ok_or_else(|| missing("error"))?, next_at: self.next_at.unwrap_or(self.timestamp) }
            }
            "WORK_CANCELLED" => Kind::Cancelled { reason: self.reason },
            "WORK_USAGE" => {
                let reported =
                    Usage { tokens: self.tokens.unwrap_or(0), cost_usd: self.cost_usd.unwrap_or(0.0), turns: self.turns.unwrap_or(0) };
                Kind::Used(Some(reported).filter(Usage::is_plausible).unwrap_or_default())
            }
            "WORK_REDRIVEN" => Kind::Redriven { work_id: self.redriven_as.ok_or_else(|| missing("redriven_as"))? },
            "WORK_RELEASED" => Kind::Released,
            "WORK_PRINTED" => Kind::Printed(output(self.result_ref, self.result)),
            _ => Kind::Other(self.kind),
        };
        Ok(Event {
            work_id: self.work_id,
            run_id: self.orchestrator_run_id,
            at: self.timestamp,
            station: self.station_id,
            instance: self.instance_id,
            side,
            attempt: self.attempt,
            kind,
        })
    }
}

impl Event {
    /// The event as JSON bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.clone().into_bytes()
    }

    /// As `to_bytes`, without a copy of what the event holds.
    pub fn into_bytes(self) -> Vec<u8> {
        // A `Wire` has string keys only, so writing it into memory does not fail.
        serde_json::to_vec(&Wire::of(self)).unwrap_or_default()
    }

    /// Reads an event that stands where this side writes; unknown fields are ignored, unknown types kept as `Other`.
    pub fn from_bytes(bytes: &[u8], side: Side) -> Result<Self, Error> {
        serde_json::from_slice::<Wire>(bytes)?.into_event(side)
    }
}
