//! What a tool gives back, and the schemas that tools are declared with.

use std::sync::Arc;

use rmcp::ErrorData;
use rmcp::handler::server::tool::IntoCallToolResult;
use rmcp::model::{CallToolResponse, CallToolResult, ContentBlock, CreateTaskResult, InputRequiredResult, JsonObject, Resource};
use serde_json::{Map, Value};

use super::problem::Problem;

/// A structured answer; the client gets it as text as well.
pub(super) struct Answer {
    fields: Map<String, Value>,
    links: Vec<Resource>,
}

impl Answer {
    /// An answer without links.
    pub(super) fn new(fields: Map<String, Value>) -> Self {
        Self { fields, links: Vec::new() }
    }

    /// The same answer, pointing at resources.
    pub(super) fn with_links(self, links: Vec<Resource>) -> Self {
        Self { links, ..self }
    }
}

impl IntoCallToolResult for Answer {
    fn into_call_tool_result(self) -> Result<CallToolResponse, ErrorData> {
        let mut result = CallToolResult::structured(Value::Object(self.fields));
        result.content.extend(self.links.into_iter().map(ContentBlock::resource_link));
        Ok(result.into())
    }
}

/// What a tool gives that is not always an answer.
pub(super) enum Response {
    /// An answer.
    Answer(Answer),
    /// A person must say something first: the client asks them, and calls again.
    Form(InputRequiredResult),
    /// It goes on as a task.
    Task(CreateTaskResult),
    /// It went wrong.
    Problem(Problem),
    /// The request breaks the protocol.
    Refused(ErrorData),
}

impl From<Answer> for Response {
    fn from(answer: Answer) -> Self {
        Self::Answer(answer)
    }
}

impl IntoCallToolResult for Response {
    fn into_call_tool_result(self) -> Result<CallToolResponse, ErrorData> {
        match self {
            Self::Answer(answer) => answer.into_call_tool_result(),
            Self::Form(form) => Ok(form.into()),
            Self::Task(task) => Ok(task.into()),
            Self::Problem(problem) => problem.into_call_tool_result(),
            Self::Refused(error) => Err(error),
        }
    }
}

/// The fields of a JSON object that `json!` made.
pub(super) fn fields(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// A schema of an object with these properties, of which the named ones are required.
pub(super) fn object(properties: Value, required: &[&str]) -> Arc<JsonObject> {
    let mut schema = Map::new();
    schema.insert("type".into(), "object".into());
    schema.insert("properties".into(), properties);
    if !required.is_empty() {
        schema.insert("required".into(), required.iter().copied().collect());
    }
    Arc::new(schema)
}
