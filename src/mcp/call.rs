//! The arguments and the circumstances of one tool call.
//!
//! Arguments are read leniently where a model errs often: a number as text, a context as JSON text, an empty text for an
//! argument that is left out, unknown arguments. Anything else is a problem that names the argument and shows the value.

use std::sync::Arc;
use std::time::Duration;

use rmcp::ErrorData;
use rmcp::handler::server::common::FromContextPart;
use rmcp::handler::server::tool::ToolCallContext;
use rmcp::model::{ClientCapabilities, Extensions, InputResponses, JsonObject, ProtocolVersion, RequestMetaObject};
use rmcp::service::{Peer, RoleServer};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::problem::Problem;
use crate::dispatcher::{Bound, Caller, Items};
use crate::model::access::Access;
use crate::model::after::{After, IfFailed};
use crate::model::id::WorkId;
use crate::model::time::Span;
use crate::telemetry::TraceContext;

/// The tools that may have to ask a person.
const ASKS_PEOPLE: [&str; 3] = ["await_work", "answer_work", "escalate"];
/// How much of a bad value an error shows.
const SHOWN_MAX: usize = 80;

/// One tool call.
pub(super) struct Call {
    /// What the client gave.
    pub(super) arguments: Arguments,
    meta: RequestMetaObject,
    extensions: Extensions,
    /// Fires when the client cancels the call.
    pub(super) ct: CancellationToken,
    /// The client.
    pub(super) peer: Peer<RoleServer>,
    /// What the client says a person said, on its second try.
    pub(super) input_responses: Option<InputResponses>,
    /// What we gave it to bring back on its second try.
    pub(super) request_state: Option<String>,
    /// Tells this request from any other, but not from its second try.
    pub(super) digest: [u8; 32],
    capabilities: Option<ClientCapabilities>,
    version: Option<ProtocolVersion>,
}

/// The arguments of one tool call; each is taken out once.
pub(super) struct Arguments(pub(super) JsonObject);

impl<S> FromContextPart<ToolCallContext<'_, S>> for Call {
    fn from_context_part(context: &mut ToolCallContext<'_, S>) -> Result<Self, ErrorData> {
        let arguments = context.arguments.take().unwrap_or_default();
        let request = &mut context.request_context;
        let version = request.protocol_version();
        // Only newer clients try again, and only what may ask a person.
        let may_return = is_modern(version.as_ref()) && ASKS_PEOPLE.contains(&&*context.name);
        let digest = if may_return { digest_of(&context.name, &arguments) } else { [0; 32] };
        Ok(Self {
            arguments: Arguments(arguments),
            input_responses: context.input_responses.take(),
            request_state: context.request_state.take(),
            digest,
            capabilities: request.client_capabilities(),
            version,
            meta: std::mem::take(&mut request.meta),
            extensions: std::mem::take(&mut request.extensions),
            ct: request.ct.clone(),
            peer: request.peer.clone(),
        })
    }
}

impl Call {
    /// The token under which the client wants to hear of progress.
    pub(super) fn progress_token(&self) -> Option<rmcp::model::ProgressToken> {
        self.meta.get_progress_token()
    }

    /// The trace that the client is in.
    pub(super) fn trace(&self) -> Option<TraceContext> {
        TraceContext::parse(self.meta.get_traceparent()?)
    }

    /// Who calls: the work or the principal that the HTTP door found behind the request's credentials, else the connection's caller.
    pub(super) fn caller(&self, connection: &Caller) -> Caller {
        caller(&self.extensions, connection)
    }
}

/// Who calls, by what came with a request.
pub(super) fn caller(extensions: &Extensions, connection: &Caller) -> Caller {
    let Some(parts) = extensions.get::<http::request::Parts>() else { return connection.clone() };
    match (parts.extensions.get::<Bound>(), parts.extensions.get::<Arc<Access>>()) {
        (Some(bound), _) => Caller::bound(bound.clone()),
        (None, Some(access)) => connection.clone().with_access(access.clone()),
        (None, None) => connection.clone(),
    }
}

impl Call {
    /// Whether the client speaks a protocol without `initialize`.
    pub(super) fn is_modern(&self) -> bool {
        is_modern(self.version.as_ref())
    }

    /// Whether the client can show a person a form.
    pub(super) fn takes_forms(&self) -> bool {
        takes_forms(self.capabilities.as_ref())
    }

    /// Whether the client knows tasks, by what this request says.
    pub(super) fn takes_tasks(&self) -> bool {
        self.is_modern() && self.capabilities.as_ref().is_some_and(ClientCapabilities::supports_tasks)
    }

    /// Whether the client knows resource links in answers.
    pub(super) fn takes_links(&self) -> bool {
        self.version.as_ref().is_some_and(|version| version.as_str() >= ProtocolVersion::V_2025_06_18.as_str())
    }
}

impl Arguments {
    /// An argument that may be left out: null and empty text count as left out.
    pub(super) fn optional(&mut self, name: &str) -> Result<Option<String>, Problem> {
        Ok(self.text(name)?.filter(|text| !text.trim().is_empty()))
    }

    /// A text, exactly as given.
    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, Problem> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(Some(value.to_string())),
            Some(other) => Err(bad(name, "a text", &other)),
        }
    }

    /// A text that must be there and not be empty.
    pub(super) fn required(&mut self, name: &str, what: &str) -> Result<String, Problem> {
        self.optional(name)?.ok_or_else(|| Problem::new(format_args!("{name} is missing"), &format!("Call again with {name}: {what}.")))
    }

    /// A whole number; a whole float and digits as text will do.
    pub(super) fn integer(&mut self, name: &str) -> Result<Option<i64>, Problem> {
        let value = match self.0.remove(name) {
            None | Some(Value::Null) => return Ok(None),
            Some(value) => value,
        };
        let number = match &value {
            Value::Number(number) => number.as_i64().or_else(|| number.as_f64().and_then(whole)),
            Value::String(text) => text.trim().parse().ok(),
            _ => None,
        };
        number.map(Some).ok_or_else(|| bad(name, "a whole number", &value))
    }

    /// A span of time.
    pub(super) fn span(&mut self, name: &str) -> Result<Option<Span>, Problem> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => text.parse().map(Some).map_err(|error| {
                Problem::new(format_args!("{name}: {error}"), &format!("Call again with such a {name}, or leave it out."))
            }),
            Some(other) => Err(bad(name, "a duration with its unit, as text, such as \"30s\", \"5m\" or \"1h30m\"", &other)),
        }
    }

    /// A JSON object; JSON text of one will do.
    pub(super) fn object(&mut self, name: &str) -> Result<Map<String, Value>, Problem> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(Map::new()),
            Some(Value::Object(object)) => Ok(object),
            Some(Value::String(text)) if text.trim().is_empty() => Ok(Map::new()),
            Some(Value::String(text)) => match serde_json::from_str(&text) {
                Ok(Value::Object(object)) => Ok(object),
                _ => Err(bad(name, "a JSON object", &Value::String(text))),
            },
            Some(other) => Err(bad(name, "a JSON object", &other)),
        }
    }

    /// A JSON object that may be left out; one that is there may be empty.
    pub(super) fn optional_object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, Problem> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
            Some(_) => self.object(name).map(Some),
        }
    }

    /// A list of any JSON values; JSON text of one will do.
    pub(super) fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, Problem> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
            Some(Value::String(text)) => match serde_json::from_str(&text) {
                Ok(Value::Array(list)) => Ok(Some(list)),
                _ => Err(bad(name, "a list", &Value::String(text))),
            },
            Some(other) => Err(bad(name, "a list", &other)),
        }
    }

    /// The works to wait for, each once, and what happens when one of them has no result.
    pub(super) fn after(&mut self) -> Result<Option<After>, Problem> {
        let choices = [("follow", IfFailed::Follow), ("fail", IfFailed::Fail), ("cancel", IfFailed::Cancel), ("run", IfFailed::Run)];
        let if_failed = self.word("if_failed", &choices)?;
        let list = match self.0.remove("after") {
            Some(Value::String(text)) => {
                text.split([',', ' ']).filter(|id| !id.is_empty()).map(|id| Value::from(id.trim_matches(['[', ']', '"']))).collect()
            }
            Some(Value::Array(list)) => list,
            None | Some(Value::Null) => Vec::new(),
            Some(other) => return Err(bad("after", "a list of work ids", &other)),
        };
        let mut work_ids: Vec<WorkId> = Vec::with_capacity(list.len());
        for item in &list {
            let Value::String(text) = item else { return Err(bad("after", "a list of work ids", item)) };
            let id = text.trim().parse()?;
            if !work_ids.contains(&id) {
                work_ids.push(id);
            }
        }
        if work_ids.is_empty() && if_failed.is_some() {
            return Err(Problem::new("if_failed was given without after", "Call again with after: the ids of the works to wait for."));
        }
        Ok((!work_ids.is_empty()).then(|| After { work_ids, if_failed: if_failed.unwrap_or_default() }))
    }

    /// The items of which each becomes a work, and how many of these go on at once.
    pub(super) fn items(&mut self) -> Result<Option<Items>, Problem> {
        let parallel = self.integer("parallel")?;
        match (self.list("map")?, parallel) {
            (Some(items), parallel) => Ok(Some(Items { items, parallel })),
            (None, None) => Ok(None),
            (None, Some(_)) => Err(Problem::new("parallel was given without map", "Call again with map: one entry per work.")),
        }
    }

    /// Any JSON value.
    pub(super) fn any(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    /// One of some words, in any case.
    pub(super) fn word<T: Copy>(&mut self, name: &str, words: &[(&str, T)]) -> Result<Option<T>, Problem> {
        let Some(text) = self.optional(name)? else { return Ok(None) };
        let wanted = text.trim().to_ascii_lowercase();
        let found = words.iter().find(|(word, _)| *word == wanted).map(|(_, value)| *value);
        found.map(Some).ok_or_else(|| {
            let names: Vec<String> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
            bad(name, &names.join(" or "), &Value::String(text))
        })
    }

    /// One work's id, if it was given.
    pub(super) fn work_id(&mut self) -> Result<Option<WorkId>, Problem> {
        match self.optional("work_id")? {
            Some(text) => Ok(Some(text.trim().parse()?)),
            None => Ok(None),
        }
    }

    /// The works that `work_id` and `work_ids` name, each once, and whether they were given as a list.
    pub(super) fn works(&mut self) -> Result<(Vec<WorkId>, bool), Problem> {
        let mut ids: Vec<WorkId> = self.work_id()?.into_iter().collect();
        let list = match self.0.remove("work_ids") {
            None | Some(Value::Null) => return Ok((ids, false)),
            Some(Value::Array(list)) => list,
            Some(Value::String(text)) if text.trim().is_empty() => return Ok((ids, false)),
            Some(Value::String(text)) => match serde_json::from_str(&text) {
                Ok(Value::Array(list)) => list,
                _ => text.split(',').map(|id| Value::String(id.to_owned())).collect(),
            },
            Some(other) => return Err(bad("work_ids", "a list of work ids", &other)),
        };
        let mut seen: std::collections::HashSet<WorkId> = ids.iter().copied().collect();
        for item in &list {
            let Value::String(text) = item else { return Err(bad("work_ids", "a list of work ids", item)) };
            let id = text.trim().parse()?;
            if seen.insert(id) {
                ids.push(id);
            }
        }
        let single = list.is_empty();
        Ok((ids, !single))
    }
}

/// Whether a protocol has no `initialize`, and with it no requests from us to the client.
pub(super) fn is_modern(version: Option<&ProtocolVersion>) -> bool {
    version.is_some_and(|version| version.as_str() >= ProtocolVersion::V_2026_07_28.as_str())
}

/// Whether a client with these capabilities can show a person a form; one that names no mode means forms.
pub(super) fn takes_forms(capabilities: Option<&ClientCapabilities>) -> bool {
    let elicitation = capabilities.and_then(|capabilities| capabilities.elicitation.as_ref());
    elicitation.is_some_and(|elicitation| elicitation.form.is_some() || elicitation.url.is_none())
}

fn digest_of(tool: &str, arguments: &JsonObject) -> [u8; 32] {
    let mut digest = Sha256::new();
    digest.update(tool);
    digest.update(b"\0");
    digest.update(serde_json::to_vec(arguments).unwrap_or_default());
    digest.finalize().into()
}

/// How long a wait may take: what was asked for, or the default, within the bound.
pub(super) fn patience(asked: Option<Span>, default: Span, max: Span) -> Duration {
    asked.unwrap_or(default).min(max).get()
}

fn whole(number: f64) -> Option<i64> {
    const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
    #[expect(clippy::cast_possible_truncation, reason = "whole and within what a float holds exactly")]
    (number.fract() == 0.0 && number.abs() <= EXACT_MAX).then_some(number as i64)
}

fn bad(name: &str, wanted: &str, value: &Value) -> Problem {
    let text = value.to_string();
    let shown: String = text.chars().take(SHOWN_MAX).collect();
    let more = if shown.len() < text.len() { "…" } else { "" };
    Problem::new(format_args!("{name} must be {wanted}, and this is {shown}{more}"), &format!("Call again with a {name} of that kind."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn given(arguments: Value) -> Arguments {
        let Value::Object(arguments) = arguments else { panic!("not an object") };
        Arguments(arguments)
    }

    #[test]
    fn numbers_are_read_leniently_and_bad_ones_are_named() {
        for (value, meant) in [(json!(5), 5), (json!(-3), -3), (json!(2.0), 2), (json!("7"), 7), (json!(i64::MIN), i64::MIN)] {
            assert_eq!(given(json!({"priority": value})).integer("priority"), Ok(Some(meant)));
        }
        for bad in [json!(1.5), json!("high"), json!(1e300), json!(u64::MAX), json!([1]), json!(true)] {
            let problem = given(json!({"priority": bad})).integer("priority").unwrap_err();
            assert!(problem.text().starts_with("priority must be a whole number, and this is "), "{}", problem.text());
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(given(json!({"timeout": "1m30s"})).span("timeout"), Ok(Some(Span::secs(90))));
        for bad in [json!("5"), json!("soon"), json!("-5m"), json!(""), json!(30), json!({}), json!("99999999999d")] {
            let problem = given(json!({"timeout": bad})).span("timeout").unwrap_err();
            assert!(problem.text().contains("timeout") && problem.text().contains("30s") || problem.text().contains("365d"), "{problem:?}");
        }
    }

    #[test]
    fn a_context_may_be_json_text() {
        assert_eq!(given(json!({"context": "{\"a\": 1}"})).object("context").unwrap(), *json!({"a": 1}).as_object().unwrap());
        assert!(given(json!({"context": null})).object("context").unwrap().is_empty());
        for bad in [json!([1]), json!("x"), json!(5)] {
            assert!(given(json!({"context": bad})).object("context").unwrap_err().text().contains("JSON object"));
        }
    }

    #[test]
    fn works_are_named_once_each() {
        let (a, b) = ("0198f2c4-7d3e-7000-8000-000000000001", "0198f2c4-7d3e-7000-8000-000000000002");
        let (ids, list) = given(json!({"work_id": a, "work_ids": [a, b, b]})).works().unwrap();
        assert_eq!((ids.len(), list), (2, true));
        let (ids, list) = given(json!({"work_id": format!(" {a} "), "work_ids": []})).works().unwrap();
        assert_eq!((ids.len(), list), (1, false));
        assert_eq!(given(json!({"work_ids": format!("{a},{b}")})).works().unwrap().0.len(), 2);
        for bad in [json!({"work_id": "nope"}), json!({"work_ids": [5]}), json!({"work_ids": {}}), json!({"work_id": {}})] {
            assert!(given(bad.clone()).works().is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let problem = given(json!({"task": " "})).required("task", "what to do").unwrap_err();
        assert_eq!(problem.text(), "task is missing. Call again with task: what to do.");
    }
}
