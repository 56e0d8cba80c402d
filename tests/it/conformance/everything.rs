//! The tools, resources and prompts that the conformance suite calls, each as the suite describes it, and nothing of the lattice.

#![expect(deprecated, reason = "the suite calls for sampling and logging")]

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use lattice_mcp::http::Kind;
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CallToolResult, CancelTaskParams, ClientCapabilities, CompleteRequestParams, CompleteResult,
    CreateMessageRequest, ElicitRequest, GetPromptRequestParams, GetPromptResponse, GetPromptResult, GetTaskParams, GetTaskResult,
    InputRequiredResult, ListPromptsResult, ListResourceTemplatesResult, ListResourcesResult, ListToolsResult, LoggingLevel,
    LoggingMessageNotificationParam, PaginatedRequestParams, ProgressNotificationParam, ReadResourceRequestParams, ReadResourceResponse,
    RequestStateCodec, ResourceContents, ServerCapabilities, ServerConfig, ServerRequest, SetLevelRequestMethod, SetLevelRequestParams,
    SubscribeRequestParams, SubscriptionFilter, Tool, UnsubscribeRequestParams, UpdateTaskParams,
};
use rmcp::service::{RequestContext, RoleServer, SubscriptionContext};
use rmcp::{ErrorData, ServerHandler};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use super::jobs::Jobs;

/// The smallest PNG: one transparent pixel.
const PIXEL: &[u8] = &[
    0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a, 0x00, 0x00, 0x00, 0x0d, 0x49, 0x48, 0x44, 0x52, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00,
    0x00, 0x01, 0x08, 0x06, 0x00, 0x00, 0x00, 0x1f, 0x15, 0xc4, 0x89, 0x00, 0x00, 0x00, 0x0d, 0x49, 0x44, 0x41, 0x54, 0x78, 0xda, 0x63,
    0x64, 0x60, 0xf8, 0x5f, 0x0f, 0x00, 0x02, 0x87, 0x01, 0x80, 0xeb, 0x47, 0xba, 0x92, 0x00, 0x00, 0x00, 0x00, 0x49, 0x45, 0x4e, 0x44,
    0xae, 0x42, 0x60, 0x82,
];
/// A WAV file with no sample in it.
const SILENCE: &[u8] = b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x40\x1f\0\0\x40\x1f\0\0\x01\0\x08\0data\0\0\0\0";
/// How long the suite wants between two notifications.
const STEP: Duration = Duration::from_millis(50);

pub(super) type Outcome = Result<CallToolResponse, ErrorData>;

/// What all sessions and requests share.
pub(crate) struct Shared {
    tools_changed: watch::Sender<u64>,
    prompts_changed: watch::Sender<u64>,
    codec: RequestStateCodec,
    jobs: Jobs,
}

impl Shared {
    pub(crate) fn new() -> Arc<Self> {
        let codec = RequestStateCodec::try_new(*b"a key of 32 bytes, for the tests").unwrap();
        Arc::new(Self { tools_changed: watch::Sender::new(0), prompts_changed: watch::Sender::new(0), codec, jobs: Jobs::default() })
    }
}

/// The server of one session of an older client, or of one request of a newer one.
pub(crate) struct Everything {
    shared: Arc<Shared>,
    /// Changes since the session or request began: a client may cause one as soon as it is told that it is listening.
    tools_changed: watch::Receiver<u64>,
    prompts_changed: watch::Receiver<u64>,
    level: Mutex<LoggingLevel>,
    watched: Mutex<BTreeSet<String>>,
}

impl Everything {
    pub(crate) fn new(shared: &Arc<Shared>, _: Kind) -> Self {
        Self {
            tools_changed: shared.tools_changed.subscribe(),
            prompts_changed: shared.prompts_changed.subscribe(),
            shared: shared.clone(),
            level: Mutex::new(LoggingLevel::Info),
            watched: Mutex::default(),
        }
    }

    /// Asks the client for input, with a sealed state to bring back.
    fn ask(&self, requests: Value, state: Option<&str>) -> InputRequiredResult {
        let sealed = state.map(|state| self.shared.codec.seal_json(&state).unwrap());
        InputRequiredResult::new(Some(of(requests)), sealed)
    }

    /// The state that a client brought back.
    fn state(&self, sealed: Option<&str>) -> Result<Option<String>, ErrorData> {
        let opened = sealed.map(|sealed| self.shared.codec.open_json(sealed)).transpose();
        opened.map_err(|error| ErrorData::invalid_params(error.to_string(), None))
    }

    /// Three notifications, for as long as the client wants them.
    async fn log(&self, context: &RequestContext<RoleServer>) {
        let wants = match is_modern(context) {
            true => context.meta.log_level().is_some(),
            false => matches!(*self.level.lock().unwrap(), LoggingLevel::Debug | LoggingLevel::Info),
        };
        for said in ["Tool execution started", "Tool processing data", "Tool execution completed"] {
            if wants {
                let _ = context.peer.notify_logging_message(LoggingMessageNotificationParam::new(LoggingLevel::Info, json!(said))).await;
            }
            tokio::time::sleep(STEP).await;
        }
    }

    /// Tools that ask for input as their result, each round of which is a call of its own.
    fn rounds(&self, request: &CallToolRequestParams, able: &ClientCapabilities) -> Outcome {
        let said = |key: &str| answer(request.input_responses.as_ref().and_then(|said| said.get(key)));
        let state = || self.state(request.request_state.as_deref());
        let asked = |requests, state| Ok(self.ask(requests, state).into());
        let confirm = json!({"confirm": form("Please confirm", "ok", "boolean")});
        match &*request.name {
            "test_input_required_result_elicitation" => match said("user_name").and_then(|name| name["content"]["name"].as_str()) {
                Some(name) => text(&format!("Hello, {name}!")),
                None => asked(json!({"user_name": form("What is your name?", "name", "string")}), None),
            },
            "test_input_required_result_sampling" => match said("capital_question") {
                Some(capital) => text(&capital["content"].to_string()),
                None => asked(json!({"capital_question": sample("What is the capital of France?", 100)}), None),
            },
            "test_input_required_result_list_roots" => match said("client_roots") {
                Some(roots) => text(&roots["roots"].to_string()),
                None => asked(json!({"client_roots": {"method": "roots/list", "params": {}}}), None),
            },
            "test_input_required_result_request_state" | "test_input_required_result_tampered_state" => match (state()?, said("confirm")) {
                (Some(state), Some(_)) if state == request.name => text("state-ok"),
                _ => asked(confirm, Some(&request.name)),
            },
            "test_input_required_result_multiple_inputs" => {
                let keys = ["user_name", "greeting", "client_roots"];
                if state()?.is_some() && keys.iter().all(|key| said(key).is_some()) {
                    return text("all three are here");
                }
                let requests = json!({
                    "user_name": form("What is your name?", "name", "string"),
                    "greeting": sample("Generate a greeting", 50),
                    "client_roots": {"method": "roots/list", "params": {}},
                });
                asked(requests, Some("three"))
            }
            "test_input_required_result_multi_round" => match state()?.as_deref() {
                Some("one") if said("step1").is_some() => {
                    asked(json!({"step2": form("Step 2: What is your favorite color?", "color", "string")}), Some("two"))
                }
                Some("two") if said("step2").is_some() => text("both steps are done"),
                _ => asked(json!({"step1": form("Step 1: What is your name?", "name", "string")}), Some("one")),
            },
            "test_input_required_result_capabilities" => {
                let mut requests = Map::new();
                if able.elicitation.is_some() {
                    requests.insert("user_name".into(), form("What is your name?", "name", "string"));
                }
                if able.sampling.is_some() {
                    requests.insert("greeting".into(), sample("Generate a greeting", 50));
                }
                asked(requests.into(), None)
            }
            "test_streaming_elicitation" => match said("confirm") {
                Some(_) => text("confirmed"),
                None => asked(confirm, None),
            },
            other => Err(ErrorData::invalid_params(format!("no tool is named {other:?}"), None)),
        }
    }

    /// A job as a task where the client knows tasks; else done at once.
    async fn job(&self, request: &CallToolRequestParams, able: &ClientCapabilities) -> Outcome {
        let arguments = request.arguments.clone().unwrap_or_default();
        let mut name = None;
        if request.name == "test_tool_with_task" {
            let said = request.input_responses.as_ref().and_then(|said| said.get("user_name"));
            name = answer(said).and_then(|name| name["content"]["name"].as_str());
            if name.is_none() {
                return Ok(self.ask(json!({"user_name": form("What is your name?", "name", "string")}), None).into());
            }
        }
        if able.supports_tasks() {
            return Ok(self.shared.jobs.begin(&request.name, &arguments, name).into());
        }
        if ["failing_job", "test_tool_with_task"].contains(&&*request.name) {
            let tasks = ClientCapabilities::builder().enable_tasks().build();
            return Err(ErrorData::missing_required_client_capability(tasks));
        }
        tokio::time::sleep(Duration::from_secs(arguments.get("seconds").and_then(Value::as_u64).unwrap_or_default())).await;
        text("done at once")
    }
}

/// JSON as what it is of rmcp's.
pub(super) fn of<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{error}: {value}"))
}

pub(super) fn text(said: &str) -> Outcome {
    content(json!([{"type": "text", "text": said}]))
}

fn content(blocks: Value) -> Outcome {
    Ok(CallToolResult::success(of(blocks)).into())
}

fn base64(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn image() -> Value {
    json!({"type": "image", "data": base64(PIXEL), "mimeType": "image/png"})
}

fn embedded(uri: &str, kind: &str, text: &str) -> Value {
    json!({"type": "resource", "resource": {"uri": uri, "mimeType": kind, "text": text}})
}

/// A form with one field.
pub(super) fn form(message: &str, field: &str, kind: &str) -> Value {
    let schema = json!({"type": "object", "properties": {field: {"type": kind}}, "required": [field]});
    json!({"method": "elicitation/create", "params": {"mode": "form", "message": message, "requestedSchema": schema}})
}

fn sample(prompt: &str, tokens: u32) -> Value {
    json!({"method": "sampling/createMessage", "params": {"messages": [said_by_user(prompt)], "maxTokens": tokens}})
}

fn said_by_user(text: &str) -> Value {
    json!({"role": "user", "content": {"type": "text", "text": text}})
}

/// What a client answered, if that is an answer at all.
fn answer(said: Option<&Value>) -> Option<&Value> {
    said.filter(|said| said.is_object())
}

fn is_modern(context: &RequestContext<RoleServer>) -> bool {
    context.protocol_version().is_some_and(|version| !version.has_initialize())
}

/// The form with a default of each kind.
fn defaults() -> Value {
    json!({"type": "object", "properties": {
        "name": {"type": "string", "default": "John Doe"},
        "age": {"type": "integer", "default": 30},
        "score": {"type": "number", "default": 95.5},
        "status": {"type": "string", "enum": ["active", "inactive", "pending"], "default": "active"},
        "verified": {"type": "boolean", "default": true},
    }})
}

/// The form with a choice of each kind.
fn choices() -> Value {
    let titled =
        json!([{"const": "value1", "title": "First"}, {"const": "value2", "title": "Second"}, {"const": "value3", "title": "Third"}]);
    let plain = json!(["option1", "option2", "option3"]);
    json!({"type": "object", "properties": {
        "untitledSingle": {"type": "string", "enum": plain},
        "titledSingle": {"type": "string", "oneOf": titled},
        "legacyEnum": {"type": "string", "enum": ["opt1", "opt2", "opt3"], "enumNames": ["One", "Two", "Three"]},
        "untitledMulti": {"type": "array", "items": {"type": "string", "enum": plain}},
        "titledMulti": {"type": "array", "items": {"anyOf": titled}},
    }})
}

/// The schema with every keyword that a server might drop.
fn schema_2020_12() -> Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "$defs": {"address": {
            "$anchor": "addressDef",
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
        }},
        "properties": {
            "name": {"type": "string"},
            "address": {"$ref": "#/$defs/address"},
            "contactMethod": {"type": "string", "enum": ["phone", "email"]},
            "phone": {"type": "string"},
            "email": {"type": "string"},
        },
        "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
        "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
        "then": {"required": ["phone"]},
        "else": {"required": ["email"]},
        "additionalProperties": false,
    })
}

/// Tools without arguments, in the order in which they are listed: the suite calls the first one with none.
const PLAIN: [&str; 26] = [
    "test_simple_text",
    "test_image_content",
    "test_audio_content",
    "test_embedded_resource",
    "test_multiple_content_types",
    "test_tool_with_logging",
    "test_logging_tool",
    "test_error_handling",
    "test_tool_with_progress",
    "test_elicitation_sep1034_defaults",
    "test_elicitation_sep1330_enums",
    "test_reconnection",
    "test_missing_capability",
    "test_streaming_elicitation",
    "test_trigger_tool_change",
    "test_trigger_prompt_change",
    "test_input_required_result_elicitation",
    "test_input_required_result_sampling",
    "test_input_required_result_list_roots",
    "test_input_required_result_request_state",
    "test_input_required_result_tampered_state",
    "test_input_required_result_multiple_inputs",
    "test_input_required_result_multi_round",
    "test_input_required_result_capabilities",
    "multi_input",
    "test_tool_with_task",
];

pub(super) fn tools() -> Vec<Tool> {
    let string = |name: &str| json!({"type": "object", "properties": {name: {"type": "string"}}, "required": [name]});
    let header = json!({"type": "object", "properties": {"region": {"type": "string", "x-mcp-header": "Region"}}, "required": ["region"]});
    let seconds = json!({"type": "object", "properties": {"seconds": {"type": "integer"}, "label": {"type": "string"}}});
    let with_arguments = [
        ("test_sampling", string("prompt")),
        ("test_elicitation", string("message")),
        ("test_custom_header", header),
        ("json_schema_2020_12_tool", schema_2020_12()),
        ("greet", string("name")),
        ("slow_compute", seconds),
        ("confirm_delete", string("filename")),
        ("failing_job", json!({"type": "object"})),
        ("protocol_error_job", json!({"type": "object"})),
    ];
    let plain = PLAIN.into_iter().map(|name| (name, json!({"type": "object", "properties": {}})));
    let tool = |(name, schema): (&str, Value)| of(json!({"name": name, "description": "A fixture", "inputSchema": schema}));
    plain.chain(with_arguments).map(tool).collect()
}

pub(super) fn prompts() -> Value {
    let argument = |name: &str| json!({"name": name, "description": "An argument", "required": true});
    json!([
        {"name": "test_simple_prompt", "description": "A fixture"},
        {"name": "test_prompt_with_arguments", "description": "A fixture", "arguments": [argument("arg1"), argument("arg2")]},
        {"name": "test_prompt_with_embedded_resource", "description": "A fixture", "arguments": [argument("resourceUri")]},
        {"name": "test_prompt_with_image", "description": "A fixture"},
        {"name": "test_input_required_result_prompt", "description": "A fixture"},
    ])
}

pub(super) fn resources() -> Value {
    json!([
        {"uri": "test://static-text", "name": "static text", "mimeType": "text/plain"},
        {"uri": "test://static-binary", "name": "static binary", "mimeType": "image/png"},
        {"uri": "test://watched-resource", "name": "watched", "mimeType": "text/plain"},
    ])
}

fn resource(uri: &str) -> Option<Value> {
    let text = |kind: &str, text: &str| Some(json!({"uri": uri, "mimeType": kind, "text": text}));
    match uri {
        "test://static-text" => text("text/plain", "This is the content of the static text resource."),
        "test://watched-resource" => text("text/plain", "Watched"),
        "test://static-binary" => Some(json!({"uri": uri, "mimeType": "image/png", "blob": base64(PIXEL)})),
        _ => {
            let id = uri.strip_prefix("test://template/")?.strip_suffix("/data")?;
            text("application/json", &json!({"id": id, "templateTest": true, "data": format!("Data for ID: {id}")}).to_string())
        }
    }
}

impl ServerHandler for Everything {
    fn get_info(&self) -> ServerConfig {
        let capabilities: ServerCapabilities = of(json!({
            "tools": {"listChanged": true},
            "prompts": {"listChanged": true},
            "resources": {"subscribe": true},
            "completions": {},
            "logging": {},
            "extensions": {"io.modelcontextprotocol/tasks": {}},
        }));
        ServerConfig::new(capabilities).with_server_info(of(json!({"name": "fixtures", "version": "1"})))
    }

    fn get_tool(&self, name: &str) -> Option<Tool> {
        tools().into_iter().find(|tool| tool.name == name)
    }

    async fn list_tools(&self, _: Option<PaginatedRequestParams>, _: RequestContext<RoleServer>) -> Result<ListToolsResult, ErrorData> {
        Ok(ListToolsResult::with_all_items(tools()))
    }

    async fn call_tool(&self, request: CallToolRequestParams, context: RequestContext<RoleServer>) -> Outcome {
        let able = context.client_capabilities().unwrap_or_default();
        let argument = |name: &str| request.arguments.as_ref().and_then(|all| all.get(name)?.as_str()).unwrap_or_default().to_owned();
        let elicit = async |message: &str, schema: Value| {
            let params = of(json!({"mode": "form", "message": message, "requestedSchema": schema}));
            asked(&context, ServerRequest::ElicitRequest(ElicitRequest::new(params))).await
        };
        match &*request.name {
            "test_simple_text" => text("This is a simple text response for testing."),
            "test_image_content" => content(json!([image()])),
            "test_audio_content" => content(json!([{"type": "audio", "data": base64(SILENCE), "mimeType": "audio/wav"}])),
            "test_embedded_resource" => {
                content(json!([embedded("test://embedded-resource", "text/plain", "This is an embedded resource content.")]))
            }
            "test_multiple_content_types" => content(json!([
                {"type": "text", "text": "Multiple content types test:"},
                image(),
                embedded("test://mixed-content-resource", "application/json", r#"{"test":"data","value":123}"#),
            ])),
            "test_tool_with_logging" | "test_logging_tool" => {
                self.log(&context).await;
                text("it was told")
            }
            "test_error_handling" => {
                let blocks = of(json!([{"type": "text", "text": "This tool intentionally returns an error for testing"}]));
                Ok(CallToolResult::error(blocks).into())
            }
            "test_tool_with_progress" => {
                for progress in [0.0, 50.0, 100.0] {
                    if let Some(token) = context.meta.get_progress_token() {
                        let told = ProgressNotificationParam::new(token, progress).with_total(100.0);
                        context.peer.notify_progress(told).await.map_err(gone)?;
                    }
                    tokio::time::sleep(STEP).await;
                }
                text("it was told")
            }
            "test_sampling" => {
                let params = of(json!({"messages": [said_by_user(&argument("prompt"))], "maxTokens": 100}));
                asked(&context, ServerRequest::CreateMessageRequest(CreateMessageRequest::new(params))).await
            }
            "test_elicitation" => {
                let fields = json!({"username": {"type": "string"}, "email": {"type": "string"}});
                elicit(&argument("message"), json!({"type": "object", "properties": fields, "required": ["username", "email"]})).await
            }
            "test_elicitation_sep1034_defaults" => elicit("What shall it be?", defaults()).await,
            "test_elicitation_sep1330_enums" => elicit("Which?", choices()).await,
            "test_missing_capability" if able.sampling.is_none() => {
                Err(ErrorData::missing_required_client_capability(of(json!({"sampling": {}}))))
            }
            "test_trigger_tool_change" => {
                self.shared.tools_changed.send_modify(|changes| *changes += 1);
                text("changed")
            }
            "test_trigger_prompt_change" => {
                self.shared.prompts_changed.send_modify(|changes| *changes += 1);
                text("changed")
            }
            "greet" => text(&format!("Hello, {}!", argument("name"))),
            "test_custom_header" | "json_schema_2020_12_tool" | "test_reconnection" | "test_missing_capability" => text("done"),
            "slow_compute" | "confirm_delete" | "multi_input" | "failing_job" | "protocol_error_job" | "test_tool_with_task" => {
                self.job(&request, &able).await
            }
            _ => self.rounds(&request, &able),
        }
    }

    async fn get_task(&self, request: GetTaskParams, _: RequestContext<RoleServer>) -> Result<GetTaskResult, ErrorData> {
        self.shared.jobs.get(&request.task_id)
    }

    async fn update_task(&self, request: UpdateTaskParams, _: RequestContext<RoleServer>) -> Result<(), ErrorData> {
        self.shared.jobs.update(&request.task_id, request.input_responses)
    }

    async fn cancel_task(&self, request: CancelTaskParams, _: RequestContext<RoleServer>) -> Result<(), ErrorData> {
        self.shared.jobs.cancel(&request.task_id)
    }

    async fn list_prompts(&self, _: Option<PaginatedRequestParams>, _: RequestContext<RoleServer>) -> Result<ListPromptsResult, ErrorData> {
        Ok(ListPromptsResult::with_all_items(of(prompts())))
    }

    async fn get_prompt(&self, request: GetPromptRequestParams, _: RequestContext<RoleServer>) -> Result<GetPromptResponse, ErrorData> {
        let argument = |name: &str| request.arguments.as_ref().and_then(|all| all.get(name)?.as_str()).unwrap_or_default();
        let messages = match request.name.as_str() {
            "test_simple_prompt" => json!([said_by_user("This is a simple prompt for testing.")]),
            "test_prompt_with_arguments" => {
                let (one, two) = (argument("arg1"), argument("arg2"));
                json!([said_by_user(&format!("Prompt with arguments: arg1='{one}', arg2='{two}'"))])
            }
            "test_prompt_with_embedded_resource" => json!([
                {"role": "user", "content": embedded(argument("resourceUri"), "text/plain", "Embedded resource content for testing.")},
                said_by_user("Please process the embedded resource above."),
            ]),
            "test_prompt_with_image" => json!([{"role": "user", "content": image()}, said_by_user("Please analyze the image above.")]),
            "test_input_required_result_prompt" => {
                let said = request.input_responses.as_ref().and_then(|said| said.get("user_context"));
                match answer(said) {
                    Some(context) => json!([said_by_user(&context["content"].to_string())]),
                    None => {
                        let asked = json!({"user_context": form("What context should the prompt use?", "context", "string")});
                        return Ok(GetPromptResponse::InputRequired(self.ask(asked, None)));
                    }
                }
            }
            other => return Err(ErrorData::invalid_params(format!("no prompt is named {other:?}"), None)),
        };
        Ok(GetPromptResult::new(of(messages)).into())
    }

    async fn complete(&self, _: CompleteRequestParams, _: RequestContext<RoleServer>) -> Result<CompleteResult, ErrorData> {
        Ok(CompleteResult::new(of(json!({"values": ["test"], "hasMore": false}))))
    }

    async fn list_resources(
        &self,
        _: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListResourcesResult, ErrorData> {
        Ok(ListResourcesResult::with_all_items(of(resources())))
    }

    async fn list_resource_templates(
        &self,
        _: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListResourceTemplatesResult, ErrorData> {
        Ok(ListResourceTemplatesResult::with_all_items(of(json!([{"uriTemplate": "test://template/{id}/data", "name": "template"}]))))
    }

    async fn read_resource(
        &self,
        request: ReadResourceRequestParams,
        _: RequestContext<RoleServer>,
    ) -> Result<ReadResourceResponse, ErrorData> {
        let Some(found) = resource(&request.uri) else {
            return Err(ErrorData::resource_not_found("there is no such resource", Some(json!({"uri": request.uri}))));
        };
        let contents: ResourceContents = of(found);
        Ok(rmcp::model::ReadResourceResult::new(vec![contents]).into())
    }

    async fn set_level(&self, request: SetLevelRequestParams, context: RequestContext<RoleServer>) -> Result<(), ErrorData> {
        if is_modern(&context) {
            return Err(ErrorData::method_not_found::<SetLevelRequestMethod>());
        }
        *self.level.lock().unwrap() = request.level;
        Ok(())
    }

    async fn subscribe(&self, request: SubscribeRequestParams, _: RequestContext<RoleServer>) -> Result<(), ErrorData> {
        self.watched.lock().unwrap().insert(request.uri);
        Ok(())
    }

    async fn unsubscribe(&self, request: UnsubscribeRequestParams, _: RequestContext<RoleServer>) -> Result<(), ErrorData> {
        self.watched.lock().unwrap().remove(&request.uri);
        Ok(())
    }

    fn accepted_subscription_filter(&self, requested: &SubscriptionFilter) -> Option<SubscriptionFilter> {
        Some(requested.clone())
    }

    async fn listen(&self, context: SubscriptionContext) -> Result<(), ErrorData> {
        let (mut tools, mut prompts) = (self.tools_changed.clone(), self.prompts_changed.clone());
        let (accepted, sink) = (context.accepted(), context.sink());
        loop {
            tokio::select! {
                () = context.cancelled() => return Ok(()),
                Ok(()) = tools.changed(), if accepted.tools_list_changed == Some(true) => {
                    sink.notify_tool_list_changed().await.map_err(gone)?;
                }
                Ok(()) = prompts.changed(), if accepted.prompts_list_changed == Some(true) => {
                    sink.notify_prompt_list_changed().await.map_err(gone)?;
                }
            }
        }
    }
}

/// Asks an older client while its call goes on; what it answered.
async fn asked(context: &RequestContext<RoleServer>, request: ServerRequest) -> Outcome {
    let said = context.peer.send_request(request).await.map_err(gone)?;
    text(&format!("They said {}", json!(said)))
}

fn gone(error: impl std::fmt::Display) -> ErrorData {
    ErrorData::internal_error(error.to_string(), None)
}
