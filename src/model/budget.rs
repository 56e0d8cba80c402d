//! What a run and everything below it may use, and what it has used.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::id::RunId;

const SHOWN_MAX: usize = 80;
/// More than this of anything is no report that could be meant; sums of many such still fit.
const REPORTED_MAX: u64 = 1_000_000_000_000;

/// The most that may be used; what is absent has no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Budget {
    /// Tokens of models.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// US dollars.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_usd: Option<f64>,
    /// Turns of models.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turns: Option<u64>,
    /// Works, the one that the budget was given with included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub works: Option<u64>,
}

/// A budget, and the run that it was given to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Allowance {
    /// The run; all below it counts as well.
    pub run_id: RunId,
    /// The budget.
    #[serde(flatten)]
    pub budget: Budget,
}

/// What agents said that they have used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of models.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub tokens: u64,
    /// US dollars.
    #[serde(default, skip_serializing_if = "is_free")]
    pub cost_usd: f64,
    /// Turns of models.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub turns: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_free(cost: &f64) -> bool {
    *cost <= 0.0
}

impl Usage {
    /// Whether nothing was reported.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it can be meant.
    pub fn is_plausible(&self) -> bool {
        let counts = self.tokens <= REPORTED_MAX && self.turns <= REPORTED_MAX;
        counts && self.cost_usd.is_finite() && (0.0..=1e9).contains(&self.cost_usd)
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, more: Self) -> Self {
        Self {
            tokens: self.tokens.saturating_add(more.tokens).min(REPORTED_MAX),
            cost_usd: self.cost_usd + more.cost_usd,
            turns: self.turns.saturating_add(more.turns).min(REPORTED_MAX),
        }
    }

    /// The larger of both in each respect: a later report of the same attempt holds the earlier one.
    #[must_use]
    pub fn or_more(self, other: Self) -> Self {
        Self { tokens: self.tokens.max(other.tokens), cost_usd: self.cost_usd.max(other.cost_usd), turns: self.turns.max(other.turns) }
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tokens, {} USD, {} turns", self.tokens, self.cost_usd, self.turns)
    }
}

/// What a run and everything below it have used.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Spent {
    /// What its agents reported.
    pub usage: Usage,
    /// How many works there are.
    pub works: u64,
}

/// A budget that is used up.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("the budget of run {run_id} is used up: {used} of {limit} {what}")]
pub struct Excess {
    /// The run that it was given to.
    pub run_id: RunId,
    /// What is used up.
    pub what: &'static str,
    /// How much was used.
    pub used: String,
    /// How much might be.
    pub limit: String,
}

impl Allowance {
    /// What does not allow another attempt, if anything does not; the attempt's own work is one of `spent.works`.
    pub fn before_attempt(&self, spent: &Spent) -> Option<Excess> {
        let works = self.budget.works.filter(|limit| spent.works > *limit);
        self.used_up(&spent.usage).or_else(|| works.map(|limit| self.excess("works", spent.works, limit)))
    }

    /// What does not allow another work, if anything does not.
    pub fn before_work(&self, spent: &Spent) -> Option<Excess> {
        let works = self.budget.works.filter(|limit| spent.works >= *limit);
        self.used_up(&spent.usage).or_else(|| works.map(|limit| self.excess("works", spent.works, limit)))
    }

    fn used_up(&self, used: &Usage) -> Option<Excess> {
        let Budget { tokens, cost_usd, turns, .. } = self.budget;
        let tokens = tokens.filter(|limit| used.tokens >= *limit).map(|limit| self.excess("tokens", used.tokens, limit));
        let cost = cost_usd.filter(|limit| used.cost_usd >= *limit).map(|limit| self.excess("cost_usd", used.cost_usd, limit));
        let turns = turns.filter(|limit| used.turns >= *limit).map(|limit| self.excess("turns", used.turns, limit));
        tokens.or(cost).or(turns)
    }

    fn excess<T: fmt::Display>(&self, what: &'static str, used: T, limit: T) -> Excess {
        Excess { run_id: self.run_id.clone(), what, used: used.to_string(), limit: limit.to_string() }
    }

    /// What is used of what, in a line.
    pub fn shown(&self, spent: &Spent) -> String {
        let Budget { tokens, cost_usd, turns, works } = self.budget;
        let of = |used: &dyn fmt::Display, limit: Option<&dyn fmt::Display>, what| limit.map(|limit| format!("{used} of {limit} {what}"));
        let parts = [
            of(&spent.usage.tokens, tokens.as_ref().map(|limit| limit as _), "tokens"),
            of(&spent.usage.cost_usd, cost_usd.as_ref().map(|limit| limit as _), "USD"),
            of(&spent.usage.turns, turns.as_ref().map(|limit| limit as _), "turns"),
            of(&spent.works, works.as_ref().map(|limit| limit as _), "works"),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

/// Why something is no budget.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It limits nothing.
    #[error("budget limits nothing: give tokens, cost_usd, turns or works")]
    Empty,
    /// A key that does not exist.
    #[error("budget has no {0:?}: it takes tokens, cost_usd, turns and works")]
    UnknownKey(String),
    /// A value that is no limit.
    #[error("budget.{key} must be {wanted}, and this is {shown}")]
    Bad {
        /// The key.
        key: &'static str,
        /// What it should be.
        wanted: &'static str,
        /// The value.
        shown: String,
    },
}

impl Budget {
    /// Reads it from what a caller gave; numbers as text will do.
    ///
    /// # Errors
    /// The first thing that is wrong, with its key and value.
    pub fn read(given: &Map<String, Value>) -> Result<Self, Error> {
        let mut budget = Self::default();
        for (key, value) in given.iter().filter(|(_, value)| !value.is_null()) {
            match key.as_str() {
                "tokens" => budget.tokens = Some(count("tokens", value)?),
                "cost_usd" => budget.cost_usd = Some(cost(value)?),
                "turns" => budget.turns = Some(count("turns", value)?),
                "works" => budget.works = Some(count("works", value)?),
                _ => return Err(Error::UnknownKey(key.chars().take(SHOWN_MAX).collect())),
            }
        }
        if budget == Self::default() { Err(Error::Empty) } else { Ok(budget) }
    }
}

fn bad(key: &'static str, wanted: &'static str, value: &Value) -> Error {
    Error::Bad { key, wanted, shown: value.to_string().chars().take(SHOWN_MAX).collect() }
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

fn count(key: &'static str, value: &Value) -> Result<u64, Error> {
    const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
    let whole = number(value).filter(|number| number.fract() == 0.0 && (1.0..=EXACT_MAX).contains(number));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole, positive and within what a float holds exactly")]
    whole.map(|number| number as u64).ok_or_else(|| bad(key, "a whole number of at least 1", value))
}

fn cost(value: &Value) -> Result<f64, Error> {
    number(value).filter(|cost| cost.is_finite() && *cost > 0.0).ok_or_else(|| bad("cost_usd", "a number above 0", value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn read(value: Value) -> Result<Budget, Error> {
        let Value::Object(given) = value else { panic!("not an object") };
        Budget::read(&given)
    }

    fn allowance(budget: Budget) -> Allowance {
        Allowance { run_id: RunId::root_of(uuid::Uuid::from_u128(1)).child(1), budget }
    }

    #[test]
    fn budgets_are_read_and_bad_ones_are_named() {
        let budget = read(json!({"tokens": 5000, "cost_usd": "0.5", "turns": 3.0, "works": "7"})).unwrap();
        assert_eq!(budget, Budget { tokens: Some(5000), cost_usd: Some(0.5), turns: Some(3), works: Some(7) });
        for (given, word) in [
            (json!({}), "nothing"),
            (json!({"tokens": null}), "nothing"),
            (json!({"tokens": 0}), "this is 0"),
            (json!({"tokens": -5}), "this is -5"),
            (json!({"works": 1.5}), "this is 1.5"),
            (json!({"turns": "many"}), "many"),
            (json!({"cost_usd": 0}), "above 0"),
            (json!({"cost_usd": -0.1}), "-0.1"),
            (json!({"cost_usd": "NaN"}), "NaN"),
            (json!({"cost_usd": "inf"}), "inf"),
            (json!({"tokens": 1e300}), "whole number"),
            (json!({"tokens": []}), "[]"),
            (json!({"dollars": 5}), "dollars"),
        ] {
            let error = read(given.clone()).unwrap_err().to_string();
            assert!(error.contains(word), "{given}: {error}");
        }
    }

    #[test]
    fn an_excess_names_the_budget_and_what_is_used() {
        let allowance = allowance(Budget { tokens: Some(100), works: Some(2), ..Budget::default() });
        let spent = |tokens, works| Spent { usage: Usage { tokens, ..Usage::default() }, works };
        assert_eq!(allowance.before_work(&spent(99, 1)), None);
        assert_eq!(allowance.before_attempt(&spent(99, 2)), None, "the attempt's own work is counted already");
        let text = allowance.before_work(&spent(99, 2)).unwrap().to_string();
        assert!(text.contains("2 of 2 works") && text.contains(allowance.run_id.as_str()), "{text}");
        assert_eq!(allowance.before_attempt(&spent(100, 1)).unwrap().what, "tokens");
        assert_eq!(allowance.shown(&spent(99, 1)), "99 of 100 tokens, 1 of 2 works");
    }

    #[test]
    fn an_allowance_is_one_flat_object() {
        let allowance = allowance(Budget { cost_usd: Some(0.5), ..Budget::default() });
        let text = serde_json::to_value(&allowance).unwrap();
        assert_eq!(text, json!({"run_id": allowance.run_id.as_str(), "cost_usd": 0.5}));
        assert_eq!(serde_json::from_value::<Allowance>(text).unwrap(), allowance);
    }

    proptest! {
        #[test]
        fn whoever_may_assign_no_work_had_used_all_of_something(tokens in 0u64..200, cost in 0.0..2.0f64, turns in 0u64..20, works in 1u64..9) {
            let limits = Budget { tokens: Some(100), cost_usd: Some(1.0), turns: Some(10), works: Some(5) };
            let spent = Spent { usage: Usage { tokens, cost_usd: cost, turns }, works };
            let allowance = allowance(limits);
            let over = tokens >= 100 || cost >= 1.0 || turns >= 10;
            prop_assert_eq!(allowance.before_work(&spent).is_some(), over || works >= 5);
            prop_assert_eq!(allowance.before_attempt(&spent).is_some(), over || works > 5);
        }

        #[test]
        fn sums_never_overflow(tokens in prop::collection::vec(any::<u64>(), 0..9)) {
            let usage = tokens.into_iter().fold(Usage::default(), |sum, tokens| sum.plus(Usage { tokens, ..Usage::default() }));
            prop_assert!(usage.is_plausible());
        }
    }
}
