//! The server of one connection: capabilities, admission, and which method goes where.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use rmcp::handler::server::router::tool::ToolRouter;
use rmcp::handler::server::tool::ToolCallContext;
use rmcp::model::{
    CacheScope, CallToolRequestParams, CallToolResponse, CancelTaskMethod, CancelTaskParams, CompleteRequestParams, CompleteResult,
    ConstString, CustomRequest, CustomResult, ErrorCode, GetPromptRequestParams, GetPromptResponse, GetTaskMethod, GetTaskParams,
    GetTaskResult, Implementation, InitializeRequestParams, InitializeResult, ListPromptsResult, ListResourceTemplatesResult,
    ListResourcesResult, ListToolsResult, PaginatedRequestParams, ReadResourceRequestParams, ReadResourceResponse, ServerCapabilities,
    ServerConfig, SubscribeRequestParams, SubscriptionFilter, Tool, UnsubscribeRequestParams, UpdateTaskMethod, UpdateTaskParams,
};
use rmcp::service::{NotificationContext, RequestContext, RoleServer, SubscriptionContext};
use rmcp::{ErrorData, ServerHandler};
use tokio::sync::{Semaphore, SemaphorePermit, SetOnce, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use super::call::{caller, is_modern, takes_forms};
use super::problem::Problem;
use super::roots::Roots;
use super::tasks::Asking;
use super::{agents, changes, prompts, resources};
use crate::dispatcher::{Caller, Dispatcher};

/// For how long a client may keep the list of tools without asking again, in milliseconds.
const TOOLS_TTL_MS: u64 = 5_000;
/// How much of a name that means nothing a refusal repeats.
const NAME_SHOWN_MAX: usize = 80;

/// Announces the station and loads the registry before the first real request; cheap after the first time.
pub type Wake = Arc<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// What a server stands on.
pub struct Parts {
    /// Does what tools ask for.
    pub dispatcher: Dispatcher,
    /// Who calls over this connection.
    pub caller: Caller,
    /// Runs before the first request that is more than a probe.
    pub wake: Wake,
    /// Fires when the station stops.
    pub stop: CancellationToken,
    /// Holds the tasks that push changes.
    pub tasks: TaskTracker,
}

/// Serves MCP to one connection; cheap to clone.
#[derive(Clone)]
pub struct Server(Arc<Connection>);

pub(super) struct Connection {
    pub(super) shared: Arc<Shared>,
    pub(super) caller: Caller,
    /// Room for further requests.
    calls: Semaphore,
    /// Resources that an older client has subscribed to.
    pub(super) subscriptions: Mutex<HashMap<String, CancellationToken>>,
    /// The registry's changes since the connection began, or a newer client's request: a client hears of those, too, that come
    /// between the moment in which it is told that it is listening and the one in which it is.
    pub(super) changes: watch::Receiver<u64>,
    /// Fires when the connection ends or the station stops.
    pub(super) closing: CancellationToken,
    _closes: DropGuard,
}

pub(super) struct Shared {
    pub(super) dispatcher: Dispatcher,
    pub(super) tasks: TaskTracker,
    wake: Wake,
    /// How often the registry had changed when the station was awake: what the first lists show.
    pub(super) awake: SetOnce<u64>,
    pub(super) stop: CancellationToken,
    pub(super) roots: Roots,
    calls: Semaphore,
    router: ToolRouter<Server>,
    tools: Vec<Tool>,
    config: ServerConfig,
    /// What seals, or has sealed here, what newer clients bring back; the last is in use.
    pub(super) secrets: Mutex<Vec<Bytes>>,
}

impl Server {
    /// The server of a first connection.
    pub fn new(parts: Parts) -> Self {
        let router = Self::agent_tools() + Self::work_tools() + Self::waiting_tools() + Self::question_tools();
        let limits = &parts.dispatcher.config().mcp;
        let shared = Shared {
            calls: Semaphore::new(limits.calls_in_all_max as usize),
            dispatcher: parts.dispatcher,
            tasks: parts.tasks,
            wake: parts.wake,
            awake: SetOnce::new(),
            stop: parts.stop,
            roots: Roots::default(),
            tools: router.list_all(),
            router,
            config: config(),
            secrets: Mutex::default(),
        };
        Self::connect(Arc::new(shared), parts.caller)
    }

    /// The server of another connection, with a root run of its own; a bound caller stays bound.
    ///
    /// This is what an HTTP factory hands out: a session of an older client keeps its value, and a request of a newer one gets
    /// a value of its own, so that nothing is shared between such requests.
    #[must_use]
    pub fn for_connection(&self) -> Self {
        let caller = &self.0.caller;
        let new = || Caller::connection().owned_by(caller.owner().cloned());
        self.with_caller(if caller.work().is_some() { caller.clone() } else { new() })
    }

    /// The server of a single request: nothing is remembered of its caller.
    #[must_use]
    pub fn for_request(&self) -> Self {
        let caller = &self.0.caller;
        let new = || Caller::stateless().owned_by(caller.owner().cloned());
        self.with_caller(if caller.work().is_some() { caller.clone() } else { new() })
    }

    /// The server of another connection with this caller, over the same lattice.
    #[must_use]
    pub fn with_caller(&self, caller: Caller) -> Self {
        Self::connect(self.0.shared.clone(), caller)
    }

    fn connect(shared: Arc<Shared>, caller: Caller) -> Self {
        let closing = shared.stop.child_token();
        Self(Arc::new(Connection {
            caller,
            calls: Semaphore::new(shared.dispatcher.config().mcp.calls_max as usize),
            changes: shared.dispatcher.registry().changes(),
            shared,
            subscriptions: Mutex::default(),
            _closes: closing.clone().drop_guard(),
            closing,
        }))
    }

    pub(super) fn dispatcher(&self) -> &Dispatcher {
        &self.0.shared.dispatcher
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.0
    }

    /// Fires when the connection ends or the station stops.
    pub(super) fn closing(&self) -> &CancellationToken {
        &self.0.closing
    }

    pub(super) fn stop(&self) -> &CancellationToken {
        &self.0.shared.stop
    }

    /// Lets a request in, if there is room, once the station is awake.
    async fn enter(&self) -> Result<(SemaphorePermit<'_>, SemaphorePermit<'_>), Problem> {
        let limits = &self.0.shared.dispatcher.config().mcp;
        let busy = |max: u32, whose: &str, key: &str| {
            let wrong = format_args!("{max} requests {whose} are being served already ({key})");
            Problem::new(wrong, "Wait until some of them are answered.")
        };
        let own = self.0.calls.try_acquire().map_err(|_| busy(limits.calls_max, "of this connection", "mcp.calls_max"))?;
        let all = self.0.shared.calls.try_acquire().map_err(|_| busy(limits.calls_in_all_max, "of all clients", "mcp.calls_in_all_max"))?;
        if !self.0.shared.awake.initialized() {
            (self.0.shared.wake)().await.map_err(|reason| {
                tracing::error!(reason, "the station could not join the lattice");
                Problem::new(format_args!("the station could not join its lattice: {reason}"), "Try again once that is mended.")
            })?;
            // Whoever was first has said so.
            let _ = self.0.shared.awake.set(*self.dispatcher().registry().changes().borrow());
        }
        Ok((own, all))
    }

    async fn admit(&self) -> Result<(SemaphorePermit<'_>, SemaphorePermit<'_>), ErrorData> {
        self.enter().await.map_err(|problem| ErrorData::internal_error(problem.text().to_owned(), None))
    }

    fn caller_of(&self, context: &RequestContext<RoleServer>) -> Caller {
        caller(&context.extensions, &self.0.caller)
    }

    /// Who asks after a task; only newer clients do.
    fn asking<M: ConstString>(&self, context: &RequestContext<RoleServer>) -> Result<Asking, ErrorData> {
        if !is_modern(context.protocol_version().as_ref()) {
            return Err(ErrorData::method_not_found::<M>());
        }
        let caller = caller(&context.extensions, &self.0.caller);
        let takes_forms = caller.work().is_none() && takes_forms(context.client_capabilities().as_ref());
        Ok(Asking { caller, takes_forms })
    }

    /// The tools, with the live registry in the description of `assign_work`.
    pub(super) fn tools(&self) -> Vec<Tool> {
        let max = self.dispatcher().config().mcp.agents_described_max;
        let mut tools = self.0.shared.tools.clone();
        for tool in tools.iter_mut().filter(|tool| tool.name == "assign_work") {
            let agents = agents::described(&self.dispatcher().registry().snapshot(), max);
            tool.description = Some(Cow::Owned(format!("{}\n\n{agents}", tool.description.as_deref().unwrap_or_default())));
        }
        tools
    }
}

fn config() -> ServerConfig {
    let capabilities = ServerCapabilities::builder()
        .enable_tools()
        .enable_tool_list_changed()
        .enable_resources()
        .enable_resources_subscribe()
        .enable_resources_list_changed()
        .enable_prompts()
        .enable_completions()
        .enable_tasks()
        .build();
    ServerConfig::new(capabilities)
        .with_server_info(Implementation::new("lattice-mcp", env!("CARGO_PKG_VERSION")).with_title("Lattice"))
        .with_instructions(include_str!("../../prompts/instructions.md").trim())
}

impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        self.0.shared.config.clone()
    }

    async fn initialize(
        &self,
        request: InitializeRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<InitializeResult, ErrorData> {
        context.peer.set_peer_info(request.clone());
        let mut welcome = self.negotiate_initialize(&request)?;
        // Tasks belong to the newer protocol.
        welcome.capabilities.extensions = None;
        Ok(welcome)
    }

    async fn get_task(&self, request: GetTaskParams, context: RequestContext<RoleServer>) -> Result<GetTaskResult, ErrorData> {
        let asking = self.asking::<GetTaskMethod>(&context)?;
        let _room = self.admit().await?;
        self.task(&asking, &request.task_id).await
    }

    async fn update_task(&self, request: UpdateTaskParams, context: RequestContext<RoleServer>) -> Result<(), ErrorData> {
        let asking = self.asking::<UpdateTaskMethod>(&context)?;
        let _room = self.admit().await?;
        self.update_task_of(&asking, &request.task_id, &request.input_responses).await
    }

    async fn cancel_task(&self, request: CancelTaskParams, context: RequestContext<RoleServer>) -> Result<(), ErrorData> {
        let asking = self.asking::<CancelTaskMethod>(&context)?;
        let _room = self.admit().await?;
        self.cancel_task_of(&asking, &request.task_id).await
    }

    fn get_tool(&self, name: &str) -> Option<Tool> {
        self.0.shared.router.get(name).cloned()
    }

    async fn list_tools(&self, _: Option<PaginatedRequestParams>, _: RequestContext<RoleServer>) -> Result<ListToolsResult, ErrorData> {
        let _room = self.admit().await?;
        Ok(ListToolsResult::with_all_items(self.tools()).with_ttl_ms(TOOLS_TTL_MS).with_cache_scope(CacheScope::Private))
    }

    async fn call_tool(&self, request: CallToolRequestParams, context: RequestContext<RoleServer>) -> Result<CallToolResponse, ErrorData> {
        let shared = &self.0.shared;
        if !shared.router.has_route(&request.name) {
            let names: Vec<&str> = shared.tools.iter().map(|tool| &*tool.name).collect();
            let name: String = request.name.chars().take(NAME_SHOWN_MAX).collect();
            return Err(ErrorData::invalid_params(format!("no tool is named {name:?}; there are {}", names.join(", ")), None));
        }
        let _room = match self.enter().await {
            Ok(room) => room,
            Err(problem) => return Ok(problem.into_result().into()),
        };
        let needed = super::needs("tools/call", Some(&request.name));
        if !self.caller_of(&context).may(needed) {
            // The HTTP door has told the client so already; this is for whoever mounts the server elsewhere.
            let wrong = format_args!("{} needs the scope {needed}", request.name);
            return Ok(Problem::new(wrong, "Ask the user for credentials with that scope.").into_result().into());
        }
        let span = tracing::info_span!("tool", name = &*request.name);
        shared.router.call(ToolCallContext::new(self, request, context)).instrument(span).await
    }

    /// A request that rmcp could not read, or that it does not know.
    async fn on_custom_request(&self, request: CustomRequest, _: RequestContext<RoleServer>) -> Result<CustomResult, ErrorData> {
        if request.method != "tools/call" {
            // A name of megabytes is not sent back whole.
            let method: String = request.method.chars().take(NAME_SHOWN_MAX).collect();
            return Err(ErrorData::new(ErrorCode::METHOD_NOT_FOUND, method, None));
        }
        let named = request.params.as_ref().is_some_and(|params| params["name"].is_string());
        if !named {
            return Err(ErrorData::invalid_params("tools/call needs params with a name and arguments", None));
        }
        let problem = Problem::new("the arguments of a tool are a JSON object", "Call again with arguments as {\"name\": value, ...}.");
        Ok(CustomResult::new(serde_json::to_value(problem.into_result()).unwrap_or_default()))
    }

    async fn list_prompts(&self, _: Option<PaginatedRequestParams>, _: RequestContext<RoleServer>) -> Result<ListPromptsResult, ErrorData> {
        Ok(prompts::list())
    }

    async fn get_prompt(&self, request: GetPromptRequestParams, _: RequestContext<RoleServer>) -> Result<GetPromptResponse, ErrorData> {
        let _room = self.admit().await?;
        prompts::get(self.dispatcher(), &request).map(Into::into)
    }

    async fn complete(&self, request: CompleteRequestParams, context: RequestContext<RoleServer>) -> Result<CompleteResult, ErrorData> {
        let _room = self.admit().await?;
        Ok(CompleteResult::new(resources::complete(self.dispatcher(), &self.caller_of(&context), &request).await?))
    }

    async fn list_resources(
        &self,
        request: Option<PaginatedRequestParams>,
        context: RequestContext<RoleServer>,
    ) -> Result<ListResourcesResult, ErrorData> {
        let _room = self.admit().await?;
        resources::list(self.dispatcher(), &self.caller_of(&context), request.and_then(|request| request.cursor)).await
    }

    async fn list_resource_templates(
        &self,
        _: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListResourceTemplatesResult, ErrorData> {
        let _room = self.admit().await?;
        Ok(resources::templates())
    }

    async fn read_resource(
        &self,
        request: ReadResourceRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<ReadResourceResponse, ErrorData> {
        let _room = self.admit().await?;
        resources::read(self.dispatcher(), &self.caller_of(&context), &request.uri).await.map(Into::into)
    }

    /// Nothing is logged to clients, at no level; some older ones set one without asking whether it is.
    #[expect(deprecated, reason = "older clients set a level")]
    async fn set_level(&self, _: rmcp::model::SetLevelRequestParams, context: RequestContext<RoleServer>) -> Result<(), ErrorData> {
        if is_modern(context.protocol_version().as_ref()) {
            return Err(ErrorData::method_not_found::<rmcp::model::SetLevelRequestMethod>());
        }
        Ok(())
    }

    async fn on_initialized(&self, context: NotificationContext<RoleServer>) {
        changes::tell_of_lists(self.connection(), context.peer);
    }

    async fn subscribe(&self, request: SubscribeRequestParams, context: RequestContext<RoleServer>) -> Result<(), ErrorData> {
        let _room = self.admit().await?;
        changes::subscribe(self.connection(), &self.caller_of(&context), request.uri, context.peer).await
    }

    async fn unsubscribe(&self, request: UnsubscribeRequestParams, _: RequestContext<RoleServer>) -> Result<(), ErrorData> {
        changes::unsubscribe(self.connection(), &request.uri);
        Ok(())
    }

    fn accepted_subscription_filter(&self, requested: &SubscriptionFilter) -> Option<SubscriptionFilter> {
        Some(changes::accepted(requested, self.0.shared.dispatcher.config().mcp.subscriptions_max))
    }

    async fn listen(&self, context: SubscriptionContext) -> Result<(), ErrorData> {
        let _room = self.admit().await?;
        changes::listen(self.connection(), &self.caller_of(context.request_context()), &context).await
    }
}
