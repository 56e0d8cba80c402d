//! How often something may start: so many times in any minute.

use std::collections::BTreeMap;
use std::time::Duration;

use super::time::Timestamp;

const MINUTE_SECONDS: i64 = 60;
/// So far ahead may be the clocks of others who count.
const AHEAD_SECONDS: i64 = 5;

/// The starts of the last minute, by the second: a start counts until the second that it fell into is a minute past.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pace(BTreeMap<i64, u32>);

impl Pace {
    /// From starts that were kept.
    pub fn of(starts: impl IntoIterator<Item = (i64, u32)>) -> Self {
        Self(starts.into_iter().collect())
    }

    /// The starts to be kept: seconds since 1970, and how many fell into each.
    pub fn starts(&self) -> impl Iterator<Item = (i64, u32)> + '_ {
        self.0.iter().map(|(second, count)| (*second, *count))
    }

    /// Counts one start; forgets those that are past.
    pub fn start(&mut self, now: Timestamp) {
        let second = second(now);
        self.0.retain(|start, _| (second - MINUTE_SECONDS..=second + AHEAD_SECONDS).contains(start));
        let count = self.0.entry(second).or_default();
        *count = count.saturating_add(1);
    }

    /// Takes back one start.
    pub fn take_back(&mut self, at: Timestamp) {
        if let Some(count) = self.0.get_mut(&second(at)) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(&second(at));
            }
        }
    }

    /// How many more may start now.
    pub fn left(&self, per_minute: u32, now: Timestamp) -> u32 {
        let recent = self.recent(now).fold(0u32, |sum, (_, count)| sum.saturating_add(count));
        per_minute.saturating_sub(recent)
    }

    /// When the next one may start, if not now.
    pub fn next_at(&self, per_minute: u32, now: Timestamp) -> Option<Timestamp> {
        if self.left(per_minute, now) > 0 {
            return None;
        }
        let mut recent: u64 = self.recent(now).map(|(_, count)| u64::from(count)).sum();
        for (start, count) in self.recent(now) {
            recent -= u64::from(count);
            if recent < u64::from(per_minute) {
                let past = Timestamp::from_millis(start.saturating_add(MINUTE_SECONDS + 1).saturating_mul(1000));
                return Some(past.max(now.after(Duration::from_millis(1))));
            }
        }
        None
    }

    fn recent(&self, now: Timestamp) -> impl Iterator<Item = (i64, u32)> + '_ {
        // What started later was counted by a clock that has been set back since.
        let (since, until) = (second(now) - MINUTE_SECONDS, second(now) + AHEAD_SECONDS);
        self.0.range(since..=until).map(|(second, count)| (*second, *count))
    }
}

fn second(at: Timestamp) -> i64 {
    at.as_millis().div_euclid(1000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_minute_has_more_starts_than_it_may(per_minute in 1u32..20, steps in proptest::collection::vec(0i64..9000, 1..200)) {
            let (mut pace, mut now, mut starts) = (Pace::default(), 0i64, Vec::new());
            for step in steps {
                now += step;
                let at = Timestamp::from_millis(now);
                if pace.left(per_minute, at) > 0 {
                    pace.start(at);
                    starts.push(now);
                } else {
                    let next = pace.next_at(per_minute, at).unwrap();
                    prop_assert!(next > at && next <= Timestamp::from_millis(now + 61_000));
                    prop_assert!(pace.left(per_minute, next) > 0, "what was promised holds");
                }
            }
            for first in &starts {
                let within = starts.iter().filter(|start| (*first..first + 60_000).contains(*start)).count();
                prop_assert!(within <= per_minute as usize);
            }
        }
    }

    #[test]
    fn a_start_that_is_taken_back_does_not_count() {
        let (mut pace, now) = (Pace::default(), Timestamp::from_millis(5_500));
        pace.start(now);
        assert_eq!((pace.left(1, now), pace.next_at(1, now)), (0, Some(Timestamp::from_millis(66_000))));
        pace.take_back(now);
        assert_eq!((pace.left(1, now), pace.next_at(1, now)), (1, None));
    }

    #[test]
    fn a_clock_that_is_set_back_does_not_stop_everything() {
        let (ahead, now) = (Timestamp::from_millis(3_600_000), Timestamp::from_millis(5_500));
        let mut pace = Pace::default();
        pace.start(ahead);
        assert_eq!((pace.left(1, ahead), pace.left(1, now), pace.next_at(1, now)), (0, 1, None));
        pace.start(now);
        assert_eq!((pace.left(1, now), pace.starts().collect::<Vec<_>>()), (0, vec![(5, 1)]));
    }

    #[test]
    fn counts_that_nobody_can_have_reached_are_borne() {
        let now = Timestamp::from_millis(5_500);
        let mut pace = Pace::of([(5, u32::MAX), (6, u32::MAX), (i64::MAX, 1), (i64::MIN, 1)]);
        pace.start(now);
        assert_eq!(pace.left(1, now), 0);
        assert!(pace.next_at(1, now).is_some_and(|at| at > now));
    }
}
