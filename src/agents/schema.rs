//! JSON Schemas: checked when an agent's file is read, and never fetched from anywhere.

use jsonschema::{PatternOptions, Validator};
use serde_json::Value;

const DEPTH_MAX: usize = 64;
const PATTERN_MAX: usize = 1 << 20;
/// Patterns that look around are fine; those that try for ever are cut off.
const BACKTRACK_MAX: usize = 100_000;

/// Makes a schema ready for checking values.
///
/// # Errors
/// Where in the schema something is wrong, and what.
pub fn compile(schema: &Value) -> Result<Validator, String> {
    if !(schema.is_object() || schema.is_boolean()) {
        return Err("a schema is an object (or true, or false)".into());
    }
    if depth(schema) > DEPTH_MAX {
        return Err(format!("the schema is more than {DEPTH_MAX} levels deep"));
    }
    let patterns = PatternOptions::fancy_regex().size_limit(PATTERN_MAX).backtrack_limit(BACKTRACK_MAX);
    jsonschema::options().offline().with_pattern_options(patterns).build(schema).map_err(|error| {
        if let (jsonschema::error::ValidationErrorKind::Referencing(_), Some(reference)) = (error.kind(), remote(schema)) {
            return format!(
                "the schema refers to {reference:?}: references to other documents are never fetched, put the definition into $defs"
            );
        }
        let path = error.instance_path().to_string();
        let path = if path.is_empty() { "its top".to_owned() } else { path };
        format!("at {path}: {error}").chars().take(400).collect()
    })
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

fn remote(value: &Value) -> Option<&str> {
    match value {
        Value::Array(items) => items.iter().find_map(remote),
        Value::Object(map) => map.iter().find_map(|(key, value)| {
            let reference = value.as_str().filter(|_| matches!(key.as_str(), "$ref" | "$dynamicRef" | "$recursiveRef"));
            reference.filter(|text| !text.starts_with('#')).or_else(|| remote(value))
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_broken_schema_says_where() {
        let error = compile(&json!({"type": "object", "properties": {"path": {"type": "strnig"}}})).unwrap_err();
        assert!(error.starts_with("at /properties/path/type: "), "{error}");
        assert!(compile(&json!({"pattern": "("})).is_err());
        assert!(compile(&json!("string")).is_err());
        assert!(compile(&json!({"$ref": "#/$defs/none"})).is_err());
    }

    #[test]
    fn nothing_is_fetched() {
        for reference in ["https://example.com/a.json", "http://127.0.0.1:1/x", "file:///etc/passwd", "other.json", "/etc/x", "other"] {
            let error = compile(&json!({"properties": {"a": {"$ref": reference}}})).unwrap_err();
            assert!(error.contains(reference), "{error}");
        }
        assert!(compile(&json!({"$defs": {"a": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/a"}}})).is_ok());
        let own = json!({"$id": "https://a.example/s", "$defs": {"a": {"type": "string"}}, "properties": {"a": {"$ref": "https://a.example/s#/$defs/a"}}});
        assert!(compile(&own).is_ok());
        assert!(compile(&json!({"pattern": "^(?!x)"})).is_ok());
        assert!(compile(&json!({"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"})).is_ok());
    }
}
