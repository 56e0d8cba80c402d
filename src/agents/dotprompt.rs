//! Dotprompt files: front matter, which may be absent, and a Handlebars template.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::front_matter::{self, FrontMatter};
use super::{Flaw, Place, keys, picoschema, unavailable};
use crate::config::yaml::{Content, Node};
use crate::model::agent::{Definition, Manifest, Prompt, RunnerSpec};

const KEYS: [&str; 11] =
    ["name", "description", "variant", "model", "config", "tools", "toolDefs", "metadata", "ext", "version", "maxTurns"];
/// Deeper nesting than this is no prompt, and costs the parser its stack.
const NESTING_MAX: usize = 64;
/// Handlebars takes the square of their number: thousands would cost seconds, and for each work anew.
const EXPRESSIONS_MAX: usize = 1000;

/// Reads an agent out of a dotprompt file.
pub(super) fn read(text: &str, place: Place<'_>) -> Result<Definition, Flaw> {
    let file = if front_matter::begins(text) {
        front_matter::split(text)?
    } else {
        FrontMatter { tree: Node { line: 1, content: Content::Map(Vec::new()) }, body: text, body_line: 1 }
    };
    let tree = &file.tree;
    let known: Vec<&str> = KEYS.into_iter().chain(keys::OWN).collect();
    keys::no_typos(tree, &known)?;
    check_template(&file)?;
    let name = keys::name(tree, &name_of(tree, place.file)?)?;
    let runner = runner(tree, place)?;
    let manifest = Manifest {
        description: keys::text(tree, "description")?.map_or_else(|| format!("the prompt {name}"), |text| text.trim().to_owned()),
        name,
        capabilities: keys::texts(tree, "capabilities")?,
        input_schema: input(tree)?,
        output_schema: schema(tree, "output")?,
        examples: keys::texts(tree, "examples")?,
        limits: keys::limits(tree)?,
        retry: keys::retry(tree)?,
        unavailable: unavailable(&runner, place.file, place.path_env),
    };
    Ok(Definition { manifest, prompt: Prompt::Template(file.body.trim().to_owned()), runner, source: Some(place.file.to_owned()) })
}

/// `greet.formal.prompt` is the variant `formal` of `greet`, and the agent `greet-formal`.
fn name_of(tree: &Node, file: &Path) -> Result<String, Flaw> {
    let stem = keys::stem(file);
    let (name, variant) = stem.split_once('.').map_or((stem.as_str(), None), |(name, variant)| (name, Some(variant.to_owned())));
    let variant = keys::text(tree, "variant")?.or(variant);
    Ok(variant.map_or_else(|| name.to_owned(), |variant| format!("{name}-{variant}")))
}

fn runner(tree: &Node, place: Place<'_>) -> Result<RunnerSpec, Flaw> {
    let default = || {
        place.settings.default_runner.clone().unwrap_or_else(|| {
            RunnerSpec::Missing("the prompt file names no runner: give it one, or set agents.default_runner in lattice.yaml".into())
        })
    };
    Ok(keys::runner(tree, place)?.unwrap_or_else(default))
}

fn section<'a>(tree: &'a Node, name: &str) -> Result<Option<&'a Node>, Flaw> {
    let Some(node) = tree.get(name).filter(|node| !node.is_null()) else { return Ok(None) };
    let is_map = matches!(node.content, Content::Map(_));
    is_map.then_some(Some(node)).ok_or_else(|| Flaw::at(node.line, format!("{name} must be a mapping with the key schema")))
}

fn schema(tree: &Node, name: &str) -> Result<Option<Value>, Flaw> {
    let Some(node) = section(tree, name)?.and_then(|node| node.get("schema")).filter(|node| !node.is_null()) else { return Ok(None) };
    let in_schema = |flaw: Flaw| Flaw { reason: format!("{name}.schema: {}", flaw.reason), ..flaw };
    let value = picoschema::to_json_schema(node).map_err(in_schema)?;
    keys::check_schema(&value, name, node.line)?;
    Ok(Some(value))
}

/// The input's schema, in which the properties that have a default say so and are not required.
fn input(tree: &Node) -> Result<Option<Value>, Flaw> {
    let found = schema(tree, "input")?;
    let default = section(tree, "input")?.and_then(|node| node.get("default")).map(Node::to_json);
    let Some(Value::Object(defaults)) = default else { return Ok(found) };
    let mut schema = found.unwrap_or_else(|| json!({"type": "object"}));
    let Some(map) = schema.as_object_mut() else { return Ok(Some(schema)) };
    if let Some(Value::Array(required)) = map.get_mut("required") {
        required.retain(|name| name.as_str().is_none_or(|name| !defaults.contains_key(name)));
    }
    let properties = map.entry("properties").or_insert_with(|| Value::Object(Map::new()));
    for (name, value) in defaults {
        let property = properties.as_object_mut().map(|properties| properties.entry(name).or_insert_with(|| json!({})));
        if let Some(Value::Object(property)) = property {
            property.insert("default".into(), value);
        }
    }
    Ok(Some(schema))
}

fn check_template(file: &FrontMatter<'_>) -> Result<(), Flaw> {
    if nesting(file.body) > NESTING_MAX {
        return Err(Flaw::at(file.body_line, format!("the template is nested more than {NESTING_MAX} deep")));
    }
    let expressions = file.body.matches("{{").count();
    if expressions > EXPRESSIONS_MAX {
        let reason = format!("the template has {expressions} expressions in {{{{ }}}}, and at most {EXPRESSIONS_MAX} are taken");
        return Err(Flaw::at(file.body_line, reason));
    }
    handlebars::Template::compile(file.body).map(|_| ()).map_err(|error| {
        let line = error.pos().map_or(file.body_line, |(line, _)| file.body_line + line.saturating_sub(1));
        Flaw::at(line, format!("the template is broken: {}", error.reason()).lines().next().unwrap_or_default())
    })
}

/// How deep blocks and parentheses may be nested at most.
fn nesting(body: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let bytes = body.as_bytes();
    for (at, byte) in bytes.iter().enumerate() {
        let rest = &bytes[at..];
        let opens = *byte == b'(' || *byte == b'[' || rest.starts_with(b"{{#") || rest.starts_with(b"{{~#") || rest.starts_with(b"{{{{");
        let closes = *byte == b')' || *byte == b']' || rest.starts_with(b"{{/") || rest.starts_with(b"{{~/");
        depth = if opens {
            depth + 1
        } else if closes {
            depth.saturating_sub(1)
        } else {
            depth
        };
        deepest = deepest.max(depth);
    }
    deepest
}
