//! Progress passes at once up to so many reports a second; above that the latest waits its turn.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::runner::Report;

const WINDOW: Duration = Duration::from_secs(1);

/// Merges progress.
pub(super) struct Throttle {
    per_window: usize,
    sent: VecDeque<Instant>,
    waiting: Option<Report>,
}

impl Throttle {
    /// At most this many reports a second.
    pub(super) fn new(per_second: u32) -> Self {
        Self { per_window: per_second.max(1) as usize, sent: VecDeque::new(), waiting: None }
    }

    /// Takes a report; it replaces the one that waits.
    pub(super) fn put(&mut self, report: Report) {
        self.waiting = Some(match (report, self.waiting.take()) {
            (Report::Progress { pct, message }, Some(Report::Progress { pct: pct_before, message: before })) => {
                Report::Progress { pct: pct.or(pct_before), message: message.or(before) }
            }
            (report, _) => report,
        });
    }

    /// When the report that waits may go; `None` when none waits.
    pub(super) fn due(&self) -> Option<Instant> {
        let free = (self.sent.len() < self.per_window).then(Instant::now);
        self.waiting.as_ref().and(free.or(self.sent.front().map(|oldest| *oldest + WINDOW)))
    }

    /// The report that waits, if it may go now.
    pub(super) fn ready(&mut self, now: Instant) -> Option<Report> {
        while self.sent.front().is_some_and(|oldest| now.duration_since(*oldest) >= WINDOW) {
            self.sent.pop_front();
        }
        if self.waiting.is_none() || self.sent.len() >= self.per_window {
            return None;
        }
        self.sent.push_back(now);
        self.waiting.take()
    }

    /// The report that waits, because nothing will follow or something else must not overtake it.
    pub(super) fn last(&mut self) -> Option<Report> {
        self.waiting.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(pct: f64) -> Report {
        Report::Progress { pct: Some(pct), message: None }
    }

    #[test]
    fn reports_pass_at_once_until_there_are_too_many() {
        let mut throttle = Throttle::new(2);
        let now = Instant::now();
        for pct in [1.0, 2.0] {
            throttle.put(at(pct));
            assert_eq!(throttle.ready(now), Some(at(pct)));
        }
        throttle.put(Report::Progress { pct: None, message: Some("m".into()) });
        throttle.put(at(4.0));
        assert_eq!(throttle.ready(now), None);
        assert_eq!(throttle.due(), Some(now + WINDOW));
        assert_eq!(throttle.ready(now + WINDOW), Some(Report::Progress { pct: Some(4.0), message: Some("m".into()) }));
        throttle.put(at(5.0));
        assert_eq!(throttle.last(), Some(at(5.0)));
        assert_eq!(throttle.due(), None);
    }
}
