//! Whether and when another attempt follows a failed one.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::agent::Limits;
use super::event::{Failure, FailureKind};
use super::id::WorkId;
use super::time::{Span, Timestamp};

/// How the wait between attempts grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backoff {
    /// Doubles each time, less a part that differs from work to work.
    Exponential,
    /// Grows by the initial delay each time.
    Linear,
    /// Stays the same.
    Fixed,
}

/// The kinds of failure that may be followed by another attempt, if whoever configures it wants that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Retried {
    /// The agent said that trying again may help.
    Transient,
    /// The process that ran it died.
    Crashed,
    /// The agent failed.
    Agent,
    /// The agent gave up.
    GaveUp,
    /// The agent can do nothing with what it was given.
    BadInput,
    /// The result does not fit.
    BadOutput,
    /// The agent's claim that it is done did not hold.
    Refuted,
    /// The agent said nothing for too long.
    SilenceTimeout,
    /// The agent could not be started.
    Unstartable,
    /// A kind of another version.
    #[serde(other)]
    Unknown,
}

impl Retried {
    /// All that may be configured.
    pub const ALL: [(&str, Self); 9] = [
        ("transient", Self::Transient),
        ("crashed", Self::Crashed),
        ("agent", Self::Agent),
        ("gave_up", Self::GaveUp),
        ("bad_input", Self::BadInput),
        ("bad_output", Self::BadOutput),
        ("refuted", Self::Refuted),
        ("silence_timeout", Self::SilenceTimeout),
        ("unstartable", Self::Unstartable),
    ];

    /// What a kind of failure is called here; none of what is never, or always, tried again.
    fn of(kind: FailureKind) -> Option<Self> {
        Some(match kind {
            FailureKind::Transient => Self::Transient,
            FailureKind::Crashed => Self::Crashed,
            FailureKind::Agent => Self::Agent,
            FailureKind::GaveUp => Self::GaveUp,
            FailureKind::BadInput => Self::BadInput,
            FailureKind::BadOutput => Self::BadOutput,
            FailureKind::Refuted => Self::Refuted,
            FailureKind::SilenceTimeout => Self::SilenceTimeout,
            FailureKind::Unstartable => Self::Unstartable,
            _ => return None,
        })
    }
}

/// What an agent says of its own attempts; what is absent is the lattice's policy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rules {
    /// Whether there are further attempts at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// How the wait grows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backoff: Option<Backoff>,
    /// The wait after the first failed attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial_delay: Option<Span>,
    /// The longest wait.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_delay: Option<Span>,
    /// The kinds of failure that another attempt follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on: Option<Vec<Retried>>,
}

impl Rules {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What holds for the attempts of a work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// How many attempts it has in all.
    pub max_attempts: u32,
    /// How the wait grows.
    pub backoff: Backoff,
    /// The wait after the first failed attempt.
    pub initial_delay: Duration,
    /// The longest wait.
    pub max_delay: Duration,
    /// How much shorter a growing wait may be, in percent.
    pub jitter_percent: u32,
    /// The kinds of failure that another attempt follows.
    pub on: Vec<Retried>,
}

impl Policy {
    /// This policy, where an agent says nothing else.
    #[must_use]
    pub fn with(mut self, rules: &Rules, limits: &Limits) -> Self {
        if let Some(max) = limits.max_attempts {
            self.max_attempts = max;
        }
        if rules.enabled == Some(false) {
            self.max_attempts = 1;
        }
        self.backoff = rules.backoff.unwrap_or(self.backoff);
        self.initial_delay = rules.initial_delay.map_or(self.initial_delay, Span::get);
        self.max_delay = rules.max_delay.map_or(self.max_delay, Span::get).max(self.initial_delay);
        self.on = rules.on.clone().unwrap_or(self.on);
        self
    }

    /// Whether this kind of failure is worth another attempt.
    pub fn retries(&self, kind: FailureKind) -> bool {
        kind == FailureKind::HandedBack || Retried::of(kind).is_some_and(|kind| self.on.contains(&kind))
    }

    /// How long to wait after so many failed attempts. Works that failed together do not come back together.
    pub fn delay(&self, burnt: u32, id: WorkId) -> Duration {
        let first = self.initial_delay;
        let grown = match self.backoff {
            Backoff::Fixed => first,
            Backoff::Linear => first.saturating_mul(burnt.max(1)),
            Backoff::Exponential => first.saturating_mul(1u32.checked_shl(burnt.saturating_sub(1)).unwrap_or(u32::MAX)),
        };
        let longest = grown.min(self.max_delay);
        match self.backoff {
            Backoff::Exponential => longest - longest.mul_f64(f64::from(self.jitter_percent.min(100)) / 100.0 * share(id, burnt)),
            Backoff::Linear | Backoff::Fixed => longest,
        }
    }
}

/// A number from 0 to 1 that is the same for the same attempt of the same work.
fn share(id: WorkId, burnt: u32) -> f64 {
    // FNV-1a.
    let step = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    let hash = id.as_bytes().iter().chain(&burnt.to_le_bytes()).fold(0x811c_9dc5u32, step);
    // The low bits alone are spread well.
    f64::from((hash >> 8) & 0xffff) / 65_535.0
}

/// What follows a failed attempt.
#[derive(Debug, Clone, PartialEq)]
pub enum After {
    /// The work has failed for good.
    Fail(Failure),
    /// Another attempt follows, not before this moment.
    Retry(Failure, Timestamp),
}

/// Decides after a failed attempt of a work; `burnt` counts this one too. The agent may have said when another one makes sense.
pub fn after(mut failure: Failure, burnt: u32, policy: &Policy, id: WorkId, now: Timestamp, deadline: Timestamp) -> After {
    if !policy.retries(failure.kind) {
        return After::Fail(failure);
    }
    let next_at = failure.retry_at.map_or_else(|| now.after(policy.delay(burnt, id)), |at| at.max(now));
    if burnt < policy.max_attempts && next_at < deadline {
        return After::Retry(failure, next_at);
    }
    if burnt < policy.max_attempts {
        failure.message = format!("{}; the next attempt would come at {next_at}, after the work's time is up", failure.message);
    }
    failure.dead_letter = true;
    After::Fail(failure)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn policy(backoff: Backoff) -> Policy {
        let (initial_delay, max_delay) = (Duration::from_secs(1), Duration::from_secs(300));
        let on = vec![Retried::Transient, Retried::Crashed];
        Policy { max_attempts: 3, backoff, initial_delay, max_delay, jitter_percent: 0, on }
    }

    fn work(n: u128) -> WorkId {
        WorkId::new(uuid::Uuid::from_u128(n))
    }

    const LATE: Timestamp = Timestamp::from_millis(1_000_000);
    const NOW: Timestamp = Timestamp::from_millis(0);

    #[test]
    fn waits_grow_as_configured() {
        let seconds = |backoff| [1, 2, 3].map(|burnt| policy(backoff).delay(burnt, work(1)).as_secs());
        assert_eq!(seconds(Backoff::Exponential), [1, 2, 4]);
        assert_eq!(seconds(Backoff::Linear), [1, 2, 3]);
        assert_eq!(seconds(Backoff::Fixed), [1, 1, 1]);
        assert_eq!(policy(Backoff::Exponential).delay(99, work(1)).as_secs(), 300);
    }

    #[test]
    fn works_that_failed_together_come_back_apart() {
        let policy = Policy { jitter_percent: 50, ..policy(Backoff::Exponential) };
        let mut waits: Vec<u128> = (0..200).map(|n| policy.delay(3, work(n)).as_millis()).collect();
        assert!(waits.iter().all(|wait| (2000..=4000).contains(wait)), "{waits:?}");
        waits.sort_unstable();
        assert!(waits[20] < 2600 && waits[180] > 3400, "{waits:?}");
    }

    #[test]
    fn only_failures_worth_it_are_retried() {
        let policy = policy(Backoff::Exponential);
        let transient = || Failure::new(FailureKind::Transient, "busy");
        let decide = |failure, burnt, deadline| after(failure, burnt, &policy, work(1), NOW, deadline);
        assert_eq!(decide(transient(), 1, LATE), After::Retry(transient(), Timestamp::from_millis(1000)));
        assert!(matches!(decide(transient(), 3, LATE), After::Fail(failure) if failure.dead_letter));
        assert!(
            matches!(decide(transient(), 1, NOW), After::Fail(failure) if failure.dead_letter && failure.message.contains("time is up"))
        );
        let agent = Failure::new(FailureKind::Agent, "no");
        assert_eq!(decide(agent.clone(), 1, LATE), After::Fail(agent));
        let off = policy.clone().with(&Rules { enabled: Some(false), ..Rules::default() }, &Limits::default());
        assert!(matches!(after(transient(), 1, &off, work(1), NOW, LATE), After::Fail(failure) if failure.dead_letter));
    }

    #[test]
    fn the_agent_may_say_when() {
        let at = Timestamp::from_millis(77_000);
        let failure = Failure { retry_at: Some(at), ..Failure::new(FailureKind::Transient, "busy") };
        assert_eq!(after(failure.clone(), 1, &policy(Backoff::Fixed), work(1), NOW, LATE), After::Retry(failure, at));
    }

    #[test]
    fn what_an_agent_says_stands_above_the_lattice() {
        let rules = Rules {
            backoff: Some(Backoff::Fixed),
            initial_delay: Some(Span::secs(7)),
            on: Some(vec![Retried::GaveUp]),
            ..Rules::default()
        };
        let limits = Limits { max_attempts: Some(9), ..Limits::default() };
        let mixed = policy(Backoff::Exponential).with(&rules, &limits);
        assert_eq!((mixed.max_attempts, mixed.delay(3, work(1)).as_secs(), mixed.max_delay.as_secs()), (9, 7, 300));
        assert!(mixed.retries(FailureKind::GaveUp) && !mixed.retries(FailureKind::Transient) && mixed.retries(FailureKind::HandedBack));
        for never in [FailureKind::TotalTimeout, FailureKind::QueueTimeout, FailureKind::Limit, FailureKind::Unknown] {
            assert!(!mixed.retries(never), "{never:?}");
        }
    }

    proptest! {
        #[test]
        fn no_wait_is_longer_than_the_longest(burnt in 0u32..200, n in any::<u128>(), jitter_percent in 0u32..=100) {
            for backoff in [Backoff::Exponential, Backoff::Linear, Backoff::Fixed] {
                let policy = Policy { jitter_percent, ..policy(backoff) };
                prop_assert!(policy.delay(burnt, work(n)) <= policy.max_delay);
            }
        }

        #[test]
        fn attempts_never_exceed_their_number(kinds in proptest::collection::vec(0usize..3, 1..20), max_attempts in 1u32..6) {
            let policy = Policy { max_attempts, ..policy(Backoff::Fixed) };
            let mut burnt = 0;
            for kind in kinds {
                let kind = [FailureKind::Transient, FailureKind::Crashed, FailureKind::HandedBack][kind];
                burnt += u32::from(kind.burns_attempt());
                match after(Failure::new(kind, ""), burnt.max(1), &policy, work(1), NOW, LATE) {
                    After::Retry(..) => prop_assert!(burnt < max_attempts),
                    After::Fail(failure) => {
                        prop_assert!(burnt.max(1) >= max_attempts && failure.dead_letter);
                        break;
                    }
                }
            }
        }
    }
}
