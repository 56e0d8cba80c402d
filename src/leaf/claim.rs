//! What stands between an agent's word and a settled work: the budgets before an attempt, the checks after it.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::attempt::Attempt;
use crate::model::accept::Check;
use crate::model::budget::{Excess, Usage};
use crate::model::event::{Failure, FailureKind};
use crate::model::output::Output;
use crate::model::work::Work;
use crate::runner::{Ended, Order, Report};
use crate::{runs, transport};

/// While a claim is checked the agent is not silent.
const ALIVE_EVERY: Duration = Duration::from_millis(100);
/// How much of a refuted result is evidence.
const EVIDENCE_MAX: usize = 1024;

impl Attempt<'_> {
    /// What keeps this attempt from being made, if anything does: a budget that is used up, or a claim that cannot be checked here.
    pub(super) async fn hindrance(&self, work: &Work) -> transport::Result<Option<Failure>> {
        let order = &self.assignment;
        if let Some(criteria) = &order.accept
            && let Err(failure) = self.leaf.runners.can_check(&self.definition, criteria)
        {
            return Ok(Some(failure));
        }
        for allowance in &order.budgets {
            let runs = &self.leaf.runs;
            let spent = self.retrying(|| async { runs.spent(&allowance.run_id, Some(order.work_id)).await.map_err(unread) }).await?;
            if let Some(excess) = allowance.before_attempt(&spent) {
                return Ok(Some(over_budget(&excess, work)));
            }
        }
        Ok(None)
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

fn unread(error: runs::Error) -> transport::Error {
    match error {
        runs::Error::Log(error) => error,
        runs::Error::Store(text) => transport::Error::Store(text),
        runs::Error::Closed => transport::Error::Closed,
    }
}

fn over_budget(excess: &Excess, work: &Work) -> Failure {
    let text = format!("{excess}; assign the work again with a larger budget, or do with what there is");
    let last = work.attempts.iter().rev().find_map(|attempt| Some((attempt.number, attempt.ended.as_ref()?)));
    let evidence = last.map(|(number, failure)| format!("attempt {number} had ended: {}", failure.message));
    Failure { evidence, ..Failure::new(FailureKind::Budget, text) }
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

/// Adds up what an attempt reports to have used, and says when that is due on the log.
pub(super) struct Meter {
    used: Usage,
    told: Usage,
    told_at: Option<Instant>,
    pause: Duration,
}

impl Meter {
    /// Tells at most so often in a second.
    pub(super) fn new(per_second: u32) -> Self {
        Self { used: Usage::default(), told: Usage::default(), told_at: None, pause: Duration::from_secs(1) / per_second.max(1) }
    }

    /// Takes in some more.
    pub(super) fn add(&mut self, more: Usage) {
        self.used = self.used.plus(more);
    }

    /// When what was added is due; `None` when all was told.
    pub(super) fn due(&self) -> Option<Instant> {
        (self.used != self.told).then(|| self.told_at.map_or_else(Instant::now, |at| at + self.pause))
    }

    /// All that was used, if not all of it was told.
    pub(super) fn tell(&mut self) -> Option<Usage> {
        if self.used == self.told {
            return None;
        }
        (self.told, self.told_at) = (self.used, Some(Instant::now()));
        Some(self.used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_is_told_once_and_not_too_often() {
        let mut meter = Meter::new(1);
        assert_eq!((meter.due(), meter.tell()), (None, None));
        let one = Usage { tokens: 1, ..Usage::default() };
        meter.add(one);
        assert!(meter.due().is_some_and(|due| due <= Instant::now()), "the first is due at once");
        assert_eq!(meter.tell(), Some(one));
        meter.add(one);
        assert!(meter.due().is_some_and(|due| due > Instant::now()), "the next one waits");
        assert_eq!(meter.tell(), Some(Usage { tokens: 2, ..Usage::default() }));
        assert_eq!((meter.due(), meter.tell()), (None, None));
    }
}
