//! One order over many items: what each item's own work is asked to do.
//!
//! Everything about an item's work follows from the order, its number among them included: whoever goes on with the order, in
//! whatever process, makes the same works.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::assignment::Assignment;
use super::id::WorkId;
use super::time::Timestamp;

/// The items of an order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// The items; empty when they are in the order's `input_ref`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub items: Vec<Value>,
    /// How many there are.
    pub count: u32,
    /// How many of their works are unsettled at once.
    pub parallel: u32,
    /// The lane of the agent.
    pub lane: String,
}

/// The lane where an order over many items waits for its works: no agent serves it.
pub const LANE: &str = "*map";

/// What the place of an item in a task's text is called.
const ITEM: &str = "{item}";

/// An item's task and context: an object's members join the context, anything else stands there as `item`; `{item}` in the task
/// becomes the item's text.
pub fn input(task: &str, context: &Map<String, Value>, item: &Value) -> (String, Map<String, Value>) {
    let text = match item {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let mut context = context.clone();
    match item {
        Value::Object(members) => context.extend(members.clone()),
        other => _ = context.insert("item".into(), other.clone()),
    }
    (task.replace(ITEM, &text), context)
}

/// The work of the `number`th item, from 1.
pub fn work_id(map: WorkId, number: u32) -> WorkId {
    let mut bytes = *map.as_bytes();
    // The version, the variant and the time stay; what is random is mixed with the number, spread over all of it.
    let mixed = spread(u64::from_be_bytes(std::array::from_fn(|n| bytes[n + 8])), number);
    let mixed = mixed.to_be_bytes();
    bytes[8] = (bytes[8] & 0xc0) | (mixed[0] & 0x3f);
    bytes[9..].copy_from_slice(&mixed[1..]);
    WorkId::new(uuid::Uuid::from_bytes(bytes))
}

/// One of the 2^62 numbers that share their highest two bits: each `number` gives another one.
fn spread(seed: u64, number: u32) -> u64 {
    const MASK: u64 = (1 << 62) - 1;
    // Odd factors permute the numbers below a power of two.
    (seed & MASK).wrapping_add(u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15)) & MASK
}

/// The order of the `number`th item, from 1; its task and context are put in by whoever has them.
pub fn order(map: &Assignment, number: u32, now: Timestamp, span_id: String) -> Assignment {
    Assignment {
        work_id: work_id(map.work_id, number),
        orchestrator_run_id: map.orchestrator_run_id.child(u64::from(number)),
        parent_work_id: Some(map.work_id),
        task: String::new(),
        context: Map::new(),
        input_ref: None,
        assigned_at: now,
        span_id,
        map: None,
        redrives: None,
        ..map.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    proptest! {
        #[test]
        fn each_item_has_a_work_of_its_own(bits in any::<u128>()) {
            let map = WorkId::new(uuid::Builder::from_unix_timestamp_millis(1, &bits.to_be_bytes()[..10].try_into().unwrap()).into_uuid());
            let ids: std::collections::HashSet<WorkId> = (1..=1000).map(|number| work_id(map, number)).collect();
            prop_assert_eq!(ids.len(), 1000);
            prop_assert!(!ids.contains(&map));
            for id in ids {
                prop_assert_eq!(id.to_string().parse::<WorkId>(), Ok(id));
                prop_assert_eq!(uuid::Uuid::from_bytes(*id.as_bytes()).get_version_num(), 7);
            }
        }
    }

    #[test]
    fn an_object_joins_the_context_and_anything_else_is_the_item() {
        let context = json!({"deep": true, "path": "none"}).as_object().unwrap().clone();
        let (task, merged) = input("scan {item} and {path}", &context, &json!("a {item} b"));
        assert_eq!((task.as_str(), &merged["item"], &merged["deep"]), ("scan a {item} b and {path}", &json!("a {item} b"), &json!(true)));
        let (task, merged) = input("scan", &context, &json!({"path": "src"}));
        assert_eq!((task.as_str(), Value::Object(merged)), ("scan", json!({"deep": true, "path": "src"})));
    }
}
