//! The clock and ids of a running process, and where its logs go.

use std::io::IsTerminal as _;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use crate::model::id::{InstanceId, RunId, WorkId};
use crate::model::time::Timestamp;

/// How far this machine's clock is behind the lattice's, in milliseconds.
static BEHIND_MS: AtomicI64 = AtomicI64::new(0);

/// The moment, by the lattice's clock: the server's where there is one, else this machine's.
pub fn now() -> Timestamp {
    let machine = machine_now();
    Timestamp::from_millis(machine.as_millis().saturating_add(BEHIND_MS.load(Ordering::Relaxed)))
}

/// The moment, by this machine's own clock.
pub fn machine_now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// Corrects what `now` says by so many milliseconds, so that machines whose clocks differ agree on deadlines.
pub fn correct_clock(behind_ms: i64) {
    BEHIND_MS.store(behind_ms, Ordering::Relaxed);
}

/// By how many milliseconds what `now` says is corrected.
pub fn clock_correction() -> i64 {
    BEHIND_MS.load(Ordering::Relaxed)
}

/// A new work's id.
pub fn new_work_id() -> WorkId {
    WorkId::new(Uuid::now_v7())
}

/// A new root run's id.
pub fn new_root() -> RunId {
    RunId::root_of(Uuid::now_v7())
}

/// A new process's id.
pub fn new_instance() -> InstanceId {
    InstanceId::new(Uuid::now_v7())
}

/// A new answer's id.
pub fn new_answer_id() -> Uuid {
    Uuid::now_v7()
}

/// A text that nobody can guess, and that stands in an address as it is.
pub fn new_secret() -> String {
    format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())
}

/// A new span's id, 16 hex digits, never all zero.
pub fn new_span_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(1);
    let (_, low) = Uuid::new_v4().as_u64_pair();
    let id = low ^ COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{:016x}", id.max(1))
}

/// The trace that a root run opens: its UUID's digits.
pub fn trace_of(root: &RunId) -> String {
    root.as_str().chars().filter(|c| *c != '-').take(32).collect()
}

/// A trace context as W3C writes it, `00-<trace>-<span>-<flags>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    /// 32 hex digits.
    pub trace_id: String,
    /// 16 hex digits.
    pub span_id: String,
}

impl TraceContext {
    /// Reads a `traceparent`; a malformed one is no context.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let (version, trace_id, span_id, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let hex = |text: &str, len| text.len() == len && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let some = |text: &str| text.bytes().any(|b| b != b'0');
        let good = hex(version, 2) && version != "ff" && hex(trace_id, 32) && some(trace_id) && hex(span_id, 16) && some(span_id);
        (good && hex(flags, 2)).then(|| Self { trace_id: trace_id.into(), span_id: span_id.into() })
    }
}

/// Sends logs to standard error, filtered.
///
/// # Errors
/// The filter is malformed, or logging has been set up already.
pub fn init(filter: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal()).try_init()
}
