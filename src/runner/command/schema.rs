//! Results held against an agent's output schema.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use jsonschema::Validator;
use serde_json::Value;

use crate::agents::schema::compile;

const KEPT_MAX: usize = 1024;
const SHOWN_MAX: usize = 300;
const ERRORS_MAX: usize = 3;

/// Schemas that have been compiled.
#[derive(Default)]
pub(super) struct Schemas(Mutex<HashMap<String, Arc<Validator>>>);

impl Schemas {
    /// The validator of a schema, compiled once.
    ///
    /// # Errors
    /// What makes it no schema.
    pub(super) fn get(&self, schema: &Value) -> Result<Arc<Validator>, String> {
        let key = schema.to_string();
        if let Some(known) = self.kept().get(&key) {
            return Ok(known.clone());
        }
        let compiled = Arc::new(compile(schema).map_err(|reason| shown(&reason))?);
        let mut kept = self.kept();
        if kept.len() >= KEPT_MAX {
            kept.clear();
        }
        kept.insert(key, compiled.clone());
        Ok(compiled)
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Validator>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a result is not as the schema says, what was expected there and what came.
pub(super) fn mismatch(validator: &Validator, schema: &Value, value: &Value) -> Option<String> {
    let errors: Vec<String> = validator
        .iter_errors(value)
        .take(ERRORS_MAX)
        .map(|error| {
            let at = error.instance_path().to_string();
            let rule = error.schema_path().to_string();
            let expected = schema.pointer(&rule).map_or_else(String::new, |rule_value| {
                let keyword = rule.rsplit('/').next().unwrap_or_default();
                format!(" (expected {keyword}: {})", shown(&rule_value.to_string()))
            });
            let came = shown(&error.instance().to_string());
            let what = shown(&error.masked_with("this").to_string());
            format!("at {}: {what}{expected}, and came {came}", if at.is_empty() { "the top" } else { &at })
        })
        .collect();
    (!errors.is_empty()).then(|| errors.join("; "))
}

/// A text, cut to what a message can hold.
pub(super) fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN_MAX) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_mismatch_names_path_expectation_and_value() {
        let schema = json!({"type": "object", "properties": {"a": {"items": {"type": "integer"}}}, "required": ["b"]});
        let schemas = Schemas::default();
        let validator = schemas.get(&schema).unwrap();
        let text = mismatch(&validator, &schema, &json!({"a": [1, "two"], "b": 1})).unwrap();
        assert!(text.contains("/a/1") && text.contains("integer") && text.contains("\"two\""), "{text}");
        let text = mismatch(&validator, &schema, &json!({"a": []})).unwrap();
        assert!(text.contains("the top") && text.contains("\"b\""), "{text}");
        assert_eq!(mismatch(&validator, &schema, &json!({"b": 1})), None);
        assert!(Arc::ptr_eq(&validator, &schemas.get(&schema).unwrap()));
        assert!(schemas.get(&json!({"type": "no such type"})).is_err());
    }
}
