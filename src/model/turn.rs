//! Whose turn it is among works that wait: urgency that grows with age, and orchestrators one after the other.
//!
//! Among the works of one orchestrator each counts as one priority more urgent for every `ageing` that it has waited. All age
//! alike, so their order never changes: it is a number, fixed when the work comes. Between orchestrators, each speaks for its
//! most urgent work, which counts as waiting since it came, or since its orchestrator was served last if that is later. So
//! equals take turns however much one of them has waiting, and nobody waits longer than its priority is worth.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::time::Timestamp;

/// Where an item stands when it waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// Who ordered it: those of one orchestrator are one line.
    pub origin: Arc<str>,
    /// Higher is more urgent.
    pub priority: i32,
    /// Since when it waits.
    pub since: Timestamp,
    /// Its place in its line: higher goes first, and among equals the older.
    pub urgency: i64,
}

impl Turn {
    /// The place of what has waited since a moment.
    pub fn new(origin: impl Into<Arc<str>>, priority: i32, since: Timestamp, ageing: Duration) -> Self {
        Self { origin: origin.into(), priority, since, urgency: urgency(priority, since, ageing) }
    }
}

fn urgency(priority: i32, since: Timestamp, ageing: Duration) -> i64 {
    let step = i64::try_from(ageing.as_millis()).unwrap_or(i64::MAX);
    i64::from(priority).saturating_mul(step).saturating_sub(since.as_millis())
}

/// How good a line's claim to the next turn is: the greatest goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Claim {
    strength: i64,
    urgency: i64,
    older: Reverse<u64>,
}

/// The first item of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Its urgency.
    pub urgency: i64,
    /// Since when it waits.
    pub since: Timestamp,
    /// Its number: the older, the lower.
    pub number: u64,
}

/// The claim of a line whose most urgent item has this priority, and whose orchestrator was served last at that moment.
pub fn claim(top: i32, head: Head, served: Option<Timestamp>, ageing: Duration) -> Claim {
    let since = served.map_or(head.since, |served| served.max(head.since));
    Claim { strength: urgency(top, since, ageing), urgency: head.urgency, older: Reverse(head.number) }
}

/// The lines of one lane, in memory.
#[derive(Debug, Default)]
pub struct Lines(BTreeMap<Arc<str>, Line>);

#[derive(Debug, Default)]
struct Line {
    order: BTreeMap<(Reverse<i64>, u64), Timestamp>,
    /// How many items have each priority.
    priorities: BTreeMap<i32, u32>,
}

impl Lines {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Lets an item wait.
    pub fn insert(&mut self, turn: &Turn, number: u64) {
        let line = self.0.entry(turn.origin.clone()).or_default();
        if line.order.insert((Reverse(turn.urgency), number), turn.since).is_none() {
            *line.priorities.entry(turn.priority).or_default() += 1;
        }
    }

    /// Takes an item out, if it waits.
    pub fn remove(&mut self, turn: &Turn, number: u64) {
        let Some(line) = self.0.get_mut(&turn.origin) else { return };
        if line.order.remove(&(Reverse(turn.urgency), number)).is_none() {
            return;
        }
        if let Some(count) = line.priorities.get_mut(&turn.priority) {
            *count -= 1;
            if *count == 0 {
                line.priorities.remove(&turn.priority);
            }
        }
        if line.order.is_empty() {
            self.0.remove(&turn.origin);
        }
    }

    /// The best claim among the lines, of their first items that fit.
    pub fn best(&self, ageing: Duration, served: impl Fn(&str) -> Option<Timestamp>, fits: impl Fn(u64) -> bool) -> Option<(Claim, u64)> {
        let claims = self.0.iter().filter_map(|(origin, line)| {
            let ((urgency, number), since) = line.order.iter().find(|((_, number), _)| fits(*number))?;
            let top = line.priorities.last_key_value().map_or(0, |(priority, _)| *priority);
            let head = Head { urgency: urgency.0, since: *since, number: *number };
            Some((claim(top, head, served(origin), ageing), *number))
        });
        claims.max_by_key(|(claim, _)| *claim)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use proptest::prelude::*;

    const AGEING: Duration = Duration::from_secs(10);

    /// A lane that one item is taken from each second.
    #[derive(Default)]
    struct Lane {
        lines: Lines,
        turns: HashMap<u64, Turn>,
        served: HashMap<Arc<str>, Timestamp>,
        number: u64,
    }

    fn second(n: i64) -> Timestamp {
        Timestamp::from_millis(n * 1000)
    }

    impl Lane {
        fn push(&mut self, origin: &str, priority: i32, at: i64) -> u64 {
            self.number += 1;
            let turn = Turn::new(origin, priority, second(at), AGEING);
            self.lines.insert(&turn, self.number);
            self.turns.insert(self.number, turn);
            self.number
        }

        fn take(&mut self, at: i64) -> Option<u64> {
            let (_, number) = self.lines.best(AGEING, |origin| self.served.get(origin).copied(), |_| true)?;
            let turn = self.turns.remove(&number).unwrap();
            self.lines.remove(&turn, number);
            self.served.insert(turn.origin, second(at));
            Some(number)
        }
    }

    #[test]
    fn the_most_urgent_goes_first_and_the_older_among_equals() {
        let mut lane = Lane::default();
        let numbers = [0, 5, 0, -5, 5].map(|priority| lane.push("one", priority, 0));
        let order: Vec<u64> = (0..5).filter_map(|at| lane.take(at)).collect();
        assert_eq!(order, [1, 4, 0, 2, 3].map(|at: usize| numbers[at]));
    }

    #[test]
    fn a_thousand_of_one_orchestrator_do_not_keep_another_waiting() {
        let mut lane = Lane::default();
        for _ in 0..1000 {
            lane.push("greedy", 0, 0);
        }
        (1..=500).for_each(|at| _ = lane.take(at));
        let late = [lane.push("modest", 0, 500), lane.push("modest", 0, 500)];
        let next: Vec<u64> = (501..506).filter_map(|at| lane.take(at)).collect();
        let places: Vec<usize> = late.iter().map(|number| next.iter().position(|taken| taken == number).unwrap()).collect();
        assert!(places[0] <= 1 && places[1] <= 3, "{places:?} of {next:?}");
    }

    #[test]
    fn an_orchestrator_that_is_always_urgent_leaves_turns_to_others() {
        let mut lane = Lane::default();
        let patient = lane.push("patient", 0, 0);
        let taken = (0..1000).find(|at| {
            lane.push("loud", 5, *at);
            lane.take(*at) == Some(patient)
        });
        // Five priorities of ten seconds each.
        assert_eq!(taken.map(|at| (45..=55).contains(&at)), Some(true), "{taken:?}");
    }

    proptest! {
        /// Whoever waits is served before long, whatever others push, at the rate of one taking a second and as many pushes.
        #[test]
        fn nothing_starves(
            priority in -20i32..=0,
            pushes in proptest::collection::vec((0usize..4, -20i32..=20), 800..1200),
            own in any::<bool>(),
        ) {
            let mut lane = Lane::default();
            let patient = lane.push(if own { "a" } else { "patient" }, priority, 0);
            let mut taken = None;
            for (at, (origin, priority)) in (1i64..).zip(&pushes) {
                lane.push(["a", "b", "c", "d"][*origin], *priority, at);
                if lane.take(at) == Some(patient) {
                    taken = Some(at);
                    break;
                }
            }
            // At worst it waits as long as the widest span of priorities is worth, once to lead its line and once for its line's turn.
            prop_assert!(taken.is_some_and(|at| at <= 2 * 40 * 10 + 50), "{taken:?}");
        }

        /// Of orchestrators that always have as urgent work waiting, none gets two turns more than another.
        #[test]
        fn equals_take_turns(backlogs in proptest::collection::vec(20usize..200, 2..6), priority in -5i32..5) {
            let mut lane = Lane::default();
            for (n, backlog) in backlogs.iter().enumerate() {
                for _ in 0..*backlog {
                    lane.push(&n.to_string(), priority, 0);
                }
            }
            let mut turns = vec![0i32; backlogs.len()];
            for at in 1..=20 * i64::try_from(backlogs.len()).unwrap() {
                let before: Vec<(u64, Arc<str>)> = lane.turns.iter().map(|(number, turn)| (*number, turn.origin.clone())).collect();
                let taken = lane.take(at).unwrap();
                let origin = before.iter().find(|(number, _)| *number == taken).unwrap().1.parse::<usize>().unwrap();
                turns[origin] += 1;
                let (low, high) = (turns.iter().min().unwrap(), turns.iter().max().unwrap());
                prop_assert!(high - low <= 1, "{turns:?}");
            }
        }
    }
}
