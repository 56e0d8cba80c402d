//! The reference: rmcp alone, with one tool that answers a small structured object from memory.

use std::io::Write as _;
use std::sync::Arc;

use anyhow::Context as _;
use axum::serve::ListenerExt as _;
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CallToolResult, JsonObject, ListToolsResult, PaginatedRequestParams, ServerCapabilities,
    ServerConfig, SubscribeRequestParams, SubscriptionFilter, Tool, UnsubscribeRequestParams,
};
use rmcp::service::{RequestContext, SubscriptionContext};
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use rmcp::{ErrorData, RoleServer, ServerHandler, ServiceExt as _};
use serde_json::json;

/// The argument that turns this program into the reference on standard input and output.
pub(crate) const STDIO: &str = "--bare-stdio";
/// The same, on HTTP.
pub(crate) const HTTP: &str = "--bare-http";

struct Bare;

impl ServerHandler for Bare {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().enable_resources().enable_resources_subscribe().build())
    }

    async fn list_tools(&self, _: Option<PaginatedRequestParams>, _: RequestContext<RoleServer>) -> Result<ListToolsResult, ErrorData> {
        let schema: JsonObject = serde_json::from_value(json!({ "type": "object" })).unwrap_or_default();
        Ok(ListToolsResult::with_all_items(vec![Tool::new("check_work", "Answers", Arc::new(schema))]))
    }

    async fn call_tool(&self, request: CallToolRequestParams, _: RequestContext<RoleServer>) -> Result<CallToolResponse, ErrorData> {
        let id = request.arguments.and_then(|arguments| arguments.get("work_id").cloned()).unwrap_or_default();
        let answer = json!({
            "work_id": id, "run_id": "0192f0c1-2345-7890-abcd-0123456789ab-1", "status": "COMPLETE", "agent_name": "echo",
            "event": "WORK_COMPLETE", "duration_ms": 1, "attempt": 1, "result": "hello",
        });
        Ok(CallToolResult::structured(answer).into())
    }

    async fn subscribe(&self, _: SubscribeRequestParams, _: RequestContext<RoleServer>) -> Result<(), ErrorData> {
        Ok(())
    }

    async fn unsubscribe(&self, _: UnsubscribeRequestParams, _: RequestContext<RoleServer>) -> Result<(), ErrorData> {
        Ok(())
    }

    fn accepted_subscription_filter(&self, requested: &SubscriptionFilter) -> Option<SubscriptionFilter> {
        Some(requested.clone())
    }

    async fn listen(&self, context: SubscriptionContext) -> Result<(), ErrorData> {
        context.cancelled().await;
        Ok(())
    }
}

/// Serves until standard input ends.
pub(crate) async fn stdio() -> anyhow::Result<()> {
    Bare.serve(rmcp::transport::io::stdio_pipes()).await?.waiting().await?;
    Ok(())
}

/// Serves until it is killed, and says where, as lattice-mcp does.
pub(crate) async fn http() -> anyhow::Result<()> {
    let config = StreamableHttpServerConfig::default().with_sse_retry(None);
    let mut sessions = LocalSessionManager::default();
    sessions.session_config.sse_retry = None;
    let service = StreamableHttpService::new(|| Ok(Bare), Arc::new(sessions), config);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.context("no free port")?;
    writeln!(std::io::stderr(), "listening on http://{}/mcp", listener.local_addr()?)?;
    let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
    axum::serve(listener, axum::Router::new().route_service("/mcp", service)).await?;
    Ok(())
}
