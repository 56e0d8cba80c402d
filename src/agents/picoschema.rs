//! Picoschema, the short way in which dotprompt files write schemas, turned into JSON Schema.

use serde_json::{Map, Value, json};

use super::Flaw;
use crate::config::yaml::{Content, Entry, Node};

const SCALARS: [&str; 5] = ["string", "boolean", "null", "number", "integer"];

/// Turns a schema into JSON Schema; one that is JSON Schema already stays as it is.
///
/// # Errors
/// What cannot be understood, and in which line.
pub fn to_json_schema(node: &Node) -> Result<Value, Flaw> {
    let type_of = node.get("type").and_then(Node::text);
    if type_of.is_some_and(|name| SCALARS.contains(&name) || ["object", "array"].contains(&name)) {
        return Ok(node.to_json());
    }
    let is_json_schema = ["$schema", "$ref", "anyOf", "oneOf", "allOf"].iter().any(|key| node.get(key).is_some());
    if is_json_schema {
        return Ok(node.to_json());
    }
    if node.get("properties").is_some_and(|properties| matches!(properties.content, Content::Map(_))) {
        let mut schema = node.to_json();
        if let Some(map) = schema.as_object_mut() {
            map.insert("type".into(), "object".into());
        }
        return Ok(schema);
    }
    convert(node)
}

fn convert(node: &Node) -> Result<Value, Flaw> {
    match &node.content {
        Content::Scalar(..) => {
            let text = node.text().or_else(|| node.is_null().then_some("null"));
            scalar(text.unwrap_or_default(), node.line)
        }
        Content::Map(entries) => object(entries),
        Content::List(_) => {
            Err(Flaw::at(node.line, "a list is no schema: write (array) behind the key and the items' schema as its value"))
        }
    }
}

fn scalar(text: &str, line: usize) -> Result<Value, Flaw> {
    let (name, description) = described(text);
    let mut schema = Map::new();
    if SCALARS.contains(&name) {
        schema.insert("type".into(), name.into());
    } else if name != "any" {
        return Err(Flaw::at(line, format!("{name:?} is not a type: known are {}, any, (array), (object) and (enum)", SCALARS.join(", "))));
    }
    describe(&mut schema, description);
    Ok(Value::Object(schema))
}

fn object(entries: &[Entry]) -> Result<Value, Flaw> {
    let mut properties = Map::new();
    let mut required = Vec::new();
    let mut others = Value::Bool(false);
    for entry in entries {
        if entry.key == "(*)" {
            others = convert(&entry.node)?;
            continue;
        }
        let (name, kind) = entry.key.split_once('(').map_or((entry.key.as_str(), None), |(name, kind)| (name, Some(kind)));
        let (name, is_optional) = name.trim().strip_suffix('?').map_or((name.trim(), false), |name| (name, true));
        if name.is_empty() {
            return Err(Flaw::at(entry.line, format!("{:?} names no property", entry.key)));
        }
        if !is_optional {
            required.push(name.to_owned());
        }
        properties.insert(name.to_owned(), property(entry, kind, is_optional)?);
    }
    let mut schema = Map::from_iter([
        ("type".to_owned(), json!("object")),
        ("properties".to_owned(), Value::Object(properties)),
        ("additionalProperties".to_owned(), others),
    ]);
    if !required.is_empty() {
        schema.insert("required".into(), required.into());
    }
    Ok(Value::Object(schema))
}

fn property(entry: &Entry, kind: Option<&str>, is_optional: bool) -> Result<Value, Flaw> {
    let mut schema;
    let mut description = None;
    if let Some(kind) = kind {
        let inner = kind.trim_end().strip_suffix(')');
        let inner = inner.ok_or_else(|| Flaw::at(entry.line, format!("{:?} has no closing parenthesis", entry.key)))?;
        let (kind, said) = described(inner);
        description = said;
        schema = match kind {
            "array" => Map::from_iter([("type".to_owned(), json!("array")), ("items".to_owned(), convert(&entry.node)?)]),
            "object" => convert(&entry.node)?.as_object().cloned().unwrap_or_default(),
            "enum" => enumeration(entry, is_optional)?,
            other => {
                return Err(Flaw::at(entry.line, format!("({other}) is not a kind of property: known are (array), (object) and (enum)")));
            }
        };
    } else {
        schema = convert(&entry.node)?.as_object().cloned().unwrap_or_default();
    }
    // As in dotprompt itself, what is optional may also be null.
    if let Some(Value::String(name)) = schema.get("type").filter(|_| is_optional) {
        let both = json!([name, "null"]);
        schema.insert("type".into(), both);
    }
    describe(&mut schema, description);
    Ok(Value::Object(schema))
}

fn enumeration(entry: &Entry, is_optional: bool) -> Result<Map<String, Value>, Flaw> {
    let Value::Array(mut values) = entry.node.to_json() else {
        return Err(Flaw::at(entry.line, "the value of an (enum) is the list of what is allowed"));
    };
    if is_optional && !values.contains(&Value::Null) {
        values.push(Value::Null);
    }
    Ok(Map::from_iter([("enum".to_owned(), Value::Array(values))]))
}

fn described(text: &str) -> (&str, Option<&str>) {
    match text.split_once(',') {
        Some((name, description)) => (name.trim(), Some(description.trim())),
        None => (text.trim(), None),
    }
}

fn describe(schema: &mut Map<String, Value>, description: Option<&str>) {
    if let Some(text) = description.filter(|text| !text.is_empty()) {
        schema.insert("description".into(), text.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::yaml;

    fn converted(text: &str) -> Value {
        to_json_schema(&yaml::parse(text).unwrap()).unwrap()
    }

    #[test]
    fn scalars_and_optional_properties() {
        assert_eq!(converted("string, a name"), json!({"type": "string", "description": "a name"}));
        assert_eq!(
            converted("name: string, the name, in full\nage?: integer\nextra: any\n"),
            json!({
                "type": "object",
                "properties": {
                    "name": {"type": "string", "description": "the name, in full"},
                    "age": {"type": ["integer", "null"]},
                    "extra": {},
                },
                "required": ["name", "extra"],
                "additionalProperties": false,
            })
        );
    }

    #[test]
    fn arrays_objects_enums_and_wildcards() {
        assert_eq!(
            converted("tags(array, all tags): string\nto?(object):\n  city: string\nmood?(enum, how): [good, bad]\n(*): number\n"),
            json!({
                "type": "object",
                "properties": {
                    "tags": {"type": "array", "items": {"type": "string"}, "description": "all tags"},
                    "to": {
                        "type": ["object", "null"],
                        "properties": {"city": {"type": "string"}},
                        "required": ["city"],
                        "additionalProperties": false,
                    },
                    "mood": {"enum": ["good", "bad", null], "description": "how"},
                },
                "required": ["tags"],
                "additionalProperties": {"type": "number"},
            })
        );
    }

    #[test]
    fn json_schema_stays_as_it_is() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]});
        assert_eq!(converted(&schema.to_string()), schema);
        assert_eq!(converted("properties: { a: { type: string } }")["type"], "object");
    }

    #[test]
    fn mistakes_are_named() {
        for (text, expected) in [
            ("a: strnig", "\"strnig\" is not a type"),
            ("a(list): string", "(list) is not a kind"),
            ("a(array: string", "no closing parenthesis"),
            ("a(enum): x", "the list of what is allowed"),
            ("[a]", "a list is no schema"),
            ("?: string", "names no property"),
        ] {
            let found = yaml::parse(text).map(|node| to_json_schema(&node));
            match found {
                Ok(found) => assert!(found.clone().is_err_and(|flaw| flaw.reason.contains(expected)), "{text}: {found:?}"),
                Err(error) => assert_eq!(text, "?: string", "{error:?}"),
            }
        }
    }
}
