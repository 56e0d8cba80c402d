//! What becomes of holds when the clock jumps: a machine that slept, or a clock that was set, has made nobody's hold old.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::model::time::Timestamp;

/// A difference between two clocks that no drift between two looks explains.
const JUMP_MIN_MS: i64 = 500;
/// How long a hold is thought to last before anybody has said so.
const LEASE: Duration = Duration::from_secs(10);

/// Compares the clock with one that never jumps.
pub(super) struct Steady(Mutex<Seen>);

struct Seen {
    /// Both clocks at the last look.
    wall: Timestamp,
    at: Instant,
    /// How long holds last.
    lease: Duration,
    /// Until then everybody who lives has time to say that it holds what it holds.
    spared: Timestamp,
    /// There may be holds that end later than anybody who lives would have said.
    overlong: bool,
}

impl Steady {
    /// Begins to compare, with a clock that shows this now.
    pub(super) fn new(wall: Timestamp) -> Self {
        let (at, spared) = (Instant::now(), Timestamp::from_millis(i64::MIN));
        Self(Mutex::new(Seen { wall, at, lease: LEASE, spared, overlong: true }))
    }

    /// Until when holds that have run out are left alone; past, when the clock has not jumped lately.
    pub(super) fn look(&self, wall: Timestamp) -> Timestamp {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = seen.at.elapsed();
        seen.at += passed;
        seen.step(wall, passed);
        seen.spared
    }

    /// Somebody holds for so long; who lets go at once says nothing of that.
    pub(super) fn lasts(&self, lease: Duration) {
        if !lease.is_zero() {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).lease = lease;
        }
    }

    /// Whether there may be holds that end too late, once for each time that the clock was set back.
    pub(super) fn take_overlong(&self) -> bool {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner).overlong)
    }
}

impl Seen {
    fn step(&mut self, wall: Timestamp, passed: Duration) {
        let passed = i64::try_from(passed.as_millis()).unwrap_or(i64::MAX);
        let ahead = wall.as_millis().saturating_sub(self.wall.as_millis()).saturating_sub(passed);
        self.wall = wall;
        if ahead.abs() >= JUMP_MIN_MS {
            // Holders extend what they hold several times in a lease.
            self.spared = wall.after(self.lease / 2);
            self.overlong |= ahead < 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_that_ends_at_once_says_nothing_of_how_long_holds_last() {
        let steady = Steady::new(Timestamp::from_millis(0));
        steady.lasts(Duration::from_secs(8));
        steady.lasts(Duration::ZERO);
        assert_eq!(steady.look(Timestamp::from_millis(3_600_000)), Timestamp::from_millis(3_604_000));
    }

    #[test]
    fn only_a_jump_spares_holds_and_only_one_back_makes_them_overlong() {
        let at = Timestamp::from_millis;
        let mut seen = Seen { wall: at(0), at: Instant::now(), lease: Duration::from_secs(8), spared: at(i64::MIN), overlong: false };
        for step in 1..100 {
            seen.step(at(step * 1_050), Duration::from_secs(1));
        }
        assert_eq!((seen.spared, seen.overlong), (at(i64::MIN), false), "drift is no jump");
        seen.step(at(3_600_000), Duration::from_secs(1));
        assert_eq!((seen.spared, seen.overlong), (at(3_604_000), false));
        seen.step(at(60_000), Duration::from_secs(1));
        assert_eq!((seen.spared, seen.overlong), (at(64_000), true));
        seen.step(at(i64::MAX), Duration::MAX);
        seen.step(at(i64::MIN), Duration::ZERO);
    }
}
