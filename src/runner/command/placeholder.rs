//! `{task}`, `{context.path}` and their like in a program's arguments.
//!
//! One pass, left to right: a value is never looked at again. What is no placeholder stays as it is, so that `{print $1}` and
//! `{{.Names}}` need no care; `{{task}}` is how to write `{task}` itself.

use serde_json::{Map, Value};

/// What placeholders stand for.
pub(super) struct Values<'a> {
    /// The task; absent when it is too long for any argument.
    pub(super) task: Option<&'a str>,
    /// The agent's prompt.
    pub(super) prompt: &'a str,
    /// The prompt holds text of the client.
    pub(super) prompt_is_filled: bool,
    /// The work.
    pub(super) work_id: &'a str,
    /// The run.
    pub(super) run_id: &'a str,
    /// The agent.
    pub(super) agent: &'a str,
    /// The attempt.
    pub(super) attempt: &'a str,
    /// The context.
    pub(super) context: &'a Map<String, Value>,
}

/// A stretch of an argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// Taken as it is.
    Text(&'a str),
    /// Replaced.
    Filled(Placeholder<'a>),
}

/// A placeholder, as it is written in its braces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Placeholder<'a>(pub(super) &'a str);

const NAMES: [&str; 6] = ["task", "prompt", "work_id", "run_id", "agent", "attempt"];

impl Placeholder<'_> {
    /// Whether it stands for a part of the context.
    pub(super) fn is_context(self) -> bool {
        self.0.starts_with("context")
    }

    /// Whether a client decides what stands here.
    pub(super) fn is_foreign(self, values: &Values<'_>) -> bool {
        self.0 == "task" || self.is_context() || (self.0 == "prompt" && values.prompt_is_filled)
    }

    /// The text it stands for; `None` when that is longer than any argument may be.
    pub(super) fn value(self, values: &Values<'_>) -> Option<String> {
        Some(match self.0 {
            "task" => values.task?.to_owned(),
            "prompt" => values.prompt.to_owned(),
            "work_id" => values.work_id.to_owned(),
            "run_id" => values.run_id.to_owned(),
            "agent" => values.agent.to_owned(),
            "attempt" => values.attempt.to_owned(),
            "context" => Value::Object(values.context.clone()).to_string(),
            path => match steps(path).and_then(|steps| find(values.context, &steps)) {
                None => String::new(),
                Some(Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
            },
        })
    }
}

/// Takes an argument apart.
pub(super) fn pieces(argument: &str) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    let mut text = 0;
    let mut at = 0;
    while let Some(open) = argument[at..].find('{').map(|i| at + i) {
        let Some(name) = name(&argument[open + 1..]) else {
            let doubled = argument[open + 1..].starts_with('{').then(|| name(&argument[open + 2..])).flatten();
            let escaped = doubled.filter(|name| argument[open + 2 + name.len() + 1..].starts_with('}'));
            at = match escaped {
                Some(name) => {
                    pieces.push(Piece::Text(&argument[text..open]));
                    let end = open + 1 + name.len() + 2;
                    pieces.push(Piece::Text(&argument[open + 1..end]));
                    text = end + 1;
                    text
                }
                None => open + 1,
            };
            continue;
        };
        pieces.push(Piece::Text(&argument[text..open]));
        pieces.push(Piece::Filled(Placeholder(name)));
        at = open + 1 + name.len() + 1;
        text = at;
    }
    pieces.push(Piece::Text(&argument[text..]));
    pieces.retain(|piece| *piece != Piece::Text(""));
    pieces
}

/// The placeholder's name that this text begins with, if a brace closes it.
fn name(text: &str) -> Option<&str> {
    let name = &text[..text.find('}')?];
    (NAMES.contains(&name) || name == "context" || steps(name).is_some()).then_some(name)
}

enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

/// Reads `context.path.to[0].value`.
fn steps(path: &str) -> Option<Vec<Step<'_>>> {
    let mut rest = path.strip_prefix("context")?;
    let mut steps = Vec::new();
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('.') {
            let end = after.find(['.', '[']).unwrap_or(after.len());
            let key = &after[..end];
            if key.is_empty() || key.contains(['{', '}', ']', '"', '\n']) {
                return None;
            }
            steps.push(Step::Key(key));
            rest = &after[end..];
        } else {
            let (index, after) = rest.strip_prefix('[')?.split_once(']')?;
            steps.push(Step::Index(index.parse().ok()?));
            rest = after;
        }
    }
    (!steps.is_empty()).then_some(steps)
}

fn find<'a>(context: &'a Map<String, Value>, steps: &[Step<'_>]) -> Option<&'a Value> {
    let (first, rest) = steps.split_first()?;
    let Step::Key(first) = first else { return None };
    rest.iter().try_fold(context.get(*first)?, |value, step| match step {
        Step::Key(key) => value.get(*key),
        Step::Index(index) => value.get(*index),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fill(argument: &str) -> String {
        let Value::Object(context) = json!({"a": {"b": [{"c d": "x"}, 2]}, "n": null, "t": "{prompt} {task}"}) else { unreachable!() };
        let values = Values {
            task: Some("say {prompt} $(x)"),
            prompt: "P",
            prompt_is_filled: false,
            work_id: "W",
            run_id: "R",
            agent: "A",
            attempt: "1",
            context: &context,
        };
        let piece = |piece: Piece<'_>| match piece {
            Piece::Text(text) => text.to_owned(),
            Piece::Filled(placeholder) => placeholder.value(&values).unwrap(),
        };
        pieces(argument).into_iter().map(piece).collect()
    }

    #[test]
    fn placeholders_are_filled_whole_and_in_part_in_one_pass() {
        assert_eq!(fill("{task}"), "say {prompt} $(x)");
        assert_eq!(fill("--x={work_id}/{run_id}/{agent}/{attempt}:{prompt}"), "--x=W/R/A/1:P");
        assert_eq!(fill("{context.a.b[0].c d}{context.a.b[1]}"), "x2");
        assert_eq!(fill("{context.t}"), "{prompt} {task}");
        assert_eq!(fill("{context.a.b}"), r#"[{"c d":"x"},2]"#);
        assert_eq!(fill("<{context.no.such[7]}>"), "<>");
        assert_eq!(fill("{context.n}"), "null");
    }

    #[test]
    fn what_is_no_placeholder_stays() {
        for text in
            ["{print $1}", "{{.Names}}", "{}", "{", "}", "{tasks}", r#"{"task": 1}"#, "{context.}", "{context[x]}", "{context..a}", "ä{ö}"]
        {
            assert_eq!(fill(text), text);
        }
        assert_eq!(fill(r#"{"a":{attempt}}"#), r#"{"a":1}"#);
        assert_eq!(fill("a {{task}} b {{context.a.b}}"), "a {task} b {context.a.b}");
        assert_eq!(fill("{{{attempt}}}"), "{{attempt}}");
    }
}
