//! What fuzzing does with what MCP clients send.

use serde_json::Value;

use super::call::Arguments;
use super::forms;
use super::problem::Problem;
use super::resources::Uri;
use super::stdio::{Taken, take};
use super::work::selector;
use crate::model::accept::Criteria;
use crate::model::budget::Budget;

/// The longest that a problem with an argument may be: what is wrong is shown, and not all of it.
const PROBLEM_MAX: usize = 4 << 10;

/// The arguments of any tool, as a JSON object.
pub(crate) fn arguments(bytes: &[u8]) {
    let Ok(Value::Object(given)) = serde_json::from_slice(bytes) else { return };
    let read = || Arguments(given.clone());
    for name in given.keys() {
        said(read().text(name));
        said(read().optional(name));
        said(read().required(name, "something"));
        said(read().integer(name));
        said(read().span(name));
        said(read().list(name));
        said(read().word(name, &[("one", 1), ("two", 2)]));
        said(read().object(name));
        if let Some(object) = said(read().optional_object(name)).flatten() {
            said(Criteria::read(&object).map_err(Problem::from));
            said(Budget::read(&object).map_err(Problem::from));
        }
        let _ = read().any(name).map(|value| forms::read(&value));
    }
    said(read().after());
    said(read().work_id());
    said(selector(&mut read()));
    if let Some((ids, _)) = said(read().works()) {
        assert!(ids.iter().collect::<std::collections::HashSet<_>>().len() == ids.len(), "each work once");
    }
}

fn said<T>(read: Result<T, Problem>) -> Option<T> {
    read.inspect_err(|problem| {
        let text = problem.text();
        assert!(!text.is_empty() && text.len() <= PROBLEM_MAX, "a problem of {} bytes: {text:.400}", text.len());
    })
    .ok()
}

/// A resource's address.
pub(crate) fn address(text: &str) {
    if let Some(uri) = said(text.parse::<Uri>()) {
        let written = uri.to_string();
        assert!(written.parse().is_ok_and(|again: Uri| again == uri), "{written:?}");
    }
}

/// A line on standard input.
pub(crate) fn line(bytes: &[u8]) {
    if let Taken::Refused(reply) = take(bytes) {
        let Some((b'\n', text)) = reply.split_last() else { panic!("a reply is a line") };
        assert!(!text.contains(&b'\n'), "a reply is one line");
        let Ok(reply) = serde_json::from_slice::<Value>(text) else { panic!("a reply is JSON") };
        assert!(reply["jsonrpc"] == "2.0" && reply["error"]["code"].is_i64(), "{reply}");
        assert!(reply["error"]["message"].as_str().is_some_and(|said| said.len() <= PROBLEM_MAX), "a reply is short");
    }
}
