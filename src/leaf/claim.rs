//! What stands between an agent's word and a settled work: what was asked of its result.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::attempt::Attempt;
use crate::model::accept::Check;
use crate::model::event::{Failure, FailureKind};
use crate::model::output::Output;
use crate::runner::{Ended, Order, Report};

/// While a claim is checked the agent is not silent.
const ALIVE_EVERY: Duration = Duration::from_millis(100);
/// How much of a refuted result is evidence.
const EVIDENCE_MAX: usize = 1024;

impl Attempt<'_> {
    /// What keeps this attempt from being made, if anything does: a claim that cannot be checked here.
    pub(super) fn hindrance(&self) -> Option<Failure> {
        let criteria = self.assignment.accept.as_ref()?;
        self.leaf.runners.can_check(&self.definition, criteria).err()
    }

    /// Holds a claim against what was asked of it; what came out of that is left in `checks`.
    pub(super) async fn examine(
        &self,
        order: &Order,
        result: Output,
        checks: &mut Vec<Check>,
        reports: mpsc::Sender<Report>,
        stop: &CancellationToken,
    ) -> Ended {
        let Some(criteria) = &self.assignment.accept else { return Ended::Complete(result) };
        let message = Some("the agent says that it is done; that is being checked".to_owned());
        let _ = reports.send(Report::Progress { pct: None, message }).await;
        let alive = async {
            loop {
                tokio::time::sleep(ALIVE_EVERY).await;
                let _ = reports.try_send(Report::Alive);
            }
        };
        let made = tokio::select! {
            made = self.leaf.runners.check(order, criteria, &result, stop) => made,
            never = alive => never,
        };
        match made {
            Ok(None) => Ended::Stopped,
            Err(failure) => Ended::Failed(failure),
            Ok(Some(made)) if made.iter().all(|check| check.ok) => {
                *checks = made;
                Ended::Complete(result)
            }
            Ok(Some(made)) => Ended::Failed(refuted(made, &result)),
        }
    }
}

fn refuted(checks: Vec<Check>, result: &Output) -> Failure {
    let wrong: Vec<&str> = checks.iter().filter(|check| !check.ok).map(|check| check.found.as_str()).collect();
    let text = format!("the agent said that it is done, and that was refuted: {}", wrong.join("; "));
    let exit_code = checks.iter().find_map(|check| check.exit_code);
    let printed = checks.iter().find(|check| !check.ok && !check.output.is_empty()).map(|check| check.output.clone());
    let delivered = || match result {
        Output::Inline(value) => format!("it delivered: {}", Output::inline_text(value).chars().take(EVIDENCE_MAX).collect::<String>()),
        Output::Blob(blob) => format!("it delivered {} bytes, sha256 {}", blob.size, blob.sha256),
    };
    Failure { exit_code, evidence: Some(printed.unwrap_or_else(delivered)), checks, ..Failure::new(FailureKind::Refuted, text) }
}

/// What the next attempt is told of a refuted claim.
pub(super) fn refutation(attempt: u32, failure: &Failure) -> Value {
    let wrong: Vec<&Check> = failure.checks.iter().filter(|check| !check.ok).collect();
    json!({ "attempt": attempt, "message": failure.message, "checks": wrong })
}
