//! How often somebody may come: a bucket for each of them that fills up again with time.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How many are remembered; those who have not come for a second are forgotten first.
const REMEMBERED_MAX: usize = 65_536;
/// How long an empty bucket takes to fill.
const FULL_AGAIN: Duration = Duration::from_secs(1);

/// Buckets by whoever comes: each holds what may be taken in one second.
pub(super) struct Rates<K> {
    per_second: f64,
    known: Mutex<Known<K>>,
}

struct Known<K> {
    buckets: HashMap<K, Bucket>,
    /// When those that were full again were looked for.
    swept: Option<Instant>,
}

struct Bucket {
    left: f64,
    at: Instant,
}

impl<K: Hash + Eq + Clone> Rates<K> {
    pub(super) fn new(per_second: u32) -> Self {
        Self { per_second: per_second.into(), known: Mutex::new(Known { buckets: HashMap::new(), swept: None }) }
    }

    /// Takes one out of a bucket; false when there is none left.
    pub(super) fn take(&self, key: &K) -> bool {
        self.take_at(key, Instant::now())
    }

    fn take_at(&self, key: &K, now: Instant) -> bool {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let Known { buckets, swept } = &mut *known;
        if buckets.len() >= REMEMBERED_MAX && !buckets.contains_key(key) {
            // A bucket that is full again is as good as none. To look for those costs more than a request may, so it is done seldom.
            if swept.is_some_and(|swept| now.duration_since(swept) < FULL_AGAIN) {
                return false;
            }
            *swept = Some(now);
            buckets.retain(|_, bucket| now.duration_since(bucket.at) < FULL_AGAIN);
            if buckets.len() >= REMEMBERED_MAX {
                return false;
            }
        }
        let bucket = buckets.entry(key.clone()).or_insert(Bucket { left: self.per_second, at: now });
        let since = now.duration_since(bucket.at).as_secs_f64();
        bucket.left = since.mul_add(self.per_second, bucket.left).min(self.per_second);
        bucket.at = now;
        if bucket.left < 1.0 {
            return false;
        }
        bucket.left -= 1.0;
        true
    }
}

/// Whose an address is: a whole network of version 6 is one customer's.
pub(super) fn holder(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) if !v6.is_loopback() => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        other => other,
    }
}

/// How many of something each one holds, and all together.
pub(super) struct Held<K> {
    all: usize,
    each: usize,
    counts: Mutex<(usize, HashMap<K, usize>)>,
}

/// Which bound there was no room under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bound {
    All,
    Each,
}

impl<K: Hash + Eq + Clone> Held<K> {
    pub(super) fn new(all: u32, each: u32) -> Self {
        Self { all: all as usize, each: each as usize, counts: Mutex::default() }
    }

    /// Takes one more, until the hold is dropped.
    pub(super) fn take(self: &std::sync::Arc<Self>, key: K) -> Result<Hold<K>, Bound> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let (all, by_key) = &mut *counts;
        if *all >= self.all {
            return Err(Bound::All);
        }
        let own = by_key.entry(key.clone()).or_default();
        if *own >= self.each {
            return Err(Bound::Each);
        }
        *own += 1;
        *all += 1;
        Ok(Hold { of: self.clone(), key })
    }
}

/// One that is held.
pub(super) struct Hold<K: Hash + Eq + Clone> {
    of: std::sync::Arc<Held<K>>,
    key: K,
}

impl<K: Hash + Eq + Clone> Drop for Hold<K> {
    fn drop(&mut self) {
        let mut counts = self.of.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let (all, by_key) = &mut *counts;
        *all = all.saturating_sub(1);
        if let Some(own) = by_key.get_mut(&self.key) {
            *own -= 1;
            if *own == 0 {
                by_key.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_bucket_empties_and_fills_again() {
        let (rates, begun) = (Rates::new(5), Instant::now());
        let taken = |key: &str, ms: u64| (0..20).filter(|_| rates.take_at(&key.to_owned(), begun + Duration::from_millis(ms))).count();
        assert_eq!(taken("a", 0), 5);
        assert_eq!(taken("b", 0), 5, "everybody has a bucket of their own");
        assert_eq!(taken("a", 400), 2);
        assert_eq!(taken("a", 60_000), 5, "it holds no more than a second's worth");
    }

    #[test]
    fn many_who_come_at_once_are_not_all_remembered() {
        let (rates, begun) = (Rates::new(1), Instant::now());
        let let_in = (0..100_000u32).filter(|n| rates.take_at(n, begun)).count();
        assert_eq!(let_in, REMEMBERED_MAX);
        assert!(rates.take_at(&1_000_000, begun + Duration::from_secs(2)), "those of before are forgotten");
    }

    #[test]
    fn a_network_of_version_six_is_one() {
        let parsed = |text: &str| holder(text.parse().unwrap());
        assert_eq!(parsed("2001:db8:1:2::1"), parsed("2001:db8:1:2:ffff::9"));
        assert_ne!(parsed("2001:db8:1:2::1"), parsed("2001:db8:1:3::1"));
        assert_eq!(parsed("::ffff:10.0.0.1"), parsed("10.0.0.1"));
        assert_ne!(parsed("10.0.0.1"), parsed("10.0.0.2"));
    }

    #[test]
    fn what_is_held_is_bounded_for_each_and_for_all() {
        let held = Arc::new(Held::new(3, 2));
        let (one, two) = (held.take("a").unwrap(), held.take("a").unwrap());
        assert_eq!(held.take("a").err(), Some(Bound::Each));
        let three = held.take("b").unwrap();
        assert_eq!(held.take("c").err(), Some(Bound::All));
        drop((one, three));
        let _again = (held.take("a").unwrap(), held.take("c").unwrap());
        drop(two);
    }
}
