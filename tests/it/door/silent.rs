//! Clients that open a stream and never read what comes: they cost little, hold nobody up, and are dropped in the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lattice_mcp::config;
use lattice_mcp::http::{Kind, Make};
use lattice_mcp::model::time::Span;
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CallToolResult, ListToolsResult, PaginatedRequestParams, ProgressNotificationParam,
    ResourceUpdatedNotificationParam, ServerCapabilities, ServerConfig, SubscriptionFilter,
};
use rmcp::service::{NotificationContext, RequestContext, SubscriptionContext};
use rmcp::{ErrorData, RoleServer, ServerHandler};
use serde_json::{Value, json};

use super::lists;
use crate::http::{Door, Memory, in_session};
use crate::lifecycle::eventually;
use crate::web::{Ask, Wire, call, initialize, modern, session};

/// How much it says at once.
const WORDS: usize = 64 * 1024;
/// How much of what nobody reads may be under way: most of it in the system's own buffers.
const UNREAD_MAX: usize = (24 << 20) / WORDS;
/// How soon others are answered.
const SOON: Duration = Duration::from_secs(5);

/// An MCP server that goes on talking for as long as it is let.
struct Talker {
    /// It begins by itself, in a session.
    greets: bool,
    said: Arc<AtomicUsize>,
    /// Counts it, and each of its talks.
    alive: Arc<()>,
}

impl Talker {
    /// Goes on after something was said: as fast as a busy lattice, not as fast as it goes. Nothing is awaited by it.
    async fn go_on(&self) {
        self.said.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

impl ServerHandler for Talker {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().enable_resources().enable_resources_subscribe().build())
    }

    async fn list_tools(&self, _: Option<PaginatedRequestParams>, _: RequestContext<RoleServer>) -> Result<ListToolsResult, ErrorData> {
        Ok(ListToolsResult::default())
    }

    async fn call_tool(&self, _: CallToolRequestParams, context: RequestContext<RoleServer>) -> Result<CallToolResponse, ErrorData> {
        let token = context.meta.get_progress_token().unwrap();
        let _one = self.alive.clone();
        let told = || ProgressNotificationParam::new(token.clone(), 1.0).with_message("x".repeat(WORDS));
        let talk = async {
            while context.peer.notify_progress(told()).await.is_ok() {
                self.go_on().await;
            }
        };
        tokio::select! {
            () = talk => {}
            () = context.ct.cancelled() => {}
        }
        Ok(CallToolResult::success(Vec::new()).into())
    }

    async fn on_initialized(&self, context: NotificationContext<RoleServer>) {
        let _one = self.alive.clone();
        let told = || ResourceUpdatedNotificationParam::new("x".repeat(WORDS));
        while self.greets && context.peer.notify_resource_updated(told()).await.is_ok() {
            self.go_on().await;
        }
    }

    fn accepted_subscription_filter(&self, requested: &SubscriptionFilter) -> Option<SubscriptionFilter> {
        Some(requested.clone())
    }

    async fn listen(&self, context: SubscriptionContext) -> Result<(), ErrorData> {
        let uri = context.accepted().resource_subscriptions.iter().flatten().next().cloned().unwrap();
        let _one = self.alive.clone();
        let talk = async {
            while context.sink().notify_resource_updated(&uri).await.is_ok() {
                self.go_on().await;
            }
        };
        tokio::select! {
            () = talk => {}
            () = context.cancelled() => {}
        }
        Ok(())
    }
}

struct Talkers {
    door: Door,
    said: Arc<AtomicUsize>,
    sessions: Arc<Memory>,
}

impl Talkers {
    async fn open(greets: bool) -> Self {
        let (said, one): (Arc<AtomicUsize>, _) = (Arc::default(), Arc::new(()));
        let (counted, alive) = (said.clone(), Arc::downgrade(&one));
        let make: Make<Talker> = Arc::new(move |_: Kind| Talker { greets, said: counted.clone(), alive: one.clone() });
        let config =
            config::Http { write_stall: Span::secs(2), session_idle: Span::millis(500), streams_per_principal: 1, ..Default::default() };
        let sessions = Arc::new(Memory::default());
        Self { door: Door::of(config, sessions.clone(), make, alive).await, said, sessions }
    }

    /// Asks for a stream of which nothing will be read.
    async fn ask(&self, ask: &Ask) -> Wire {
        let mut silent = Wire::narrow(self.door.at).await;
        silent.send(ask.text()).await;
        silent
    }

    /// Others are served while a stream is not read, and it is gone in the end.
    async fn drops(&self, mut silent: Wire) {
        let begun = Instant::now();
        eventually("it is dropped", async || {
            let asked = Instant::now();
            assert_eq!(lists().at(self.door.at).await.status(), 200);
            assert!(asked.elapsed() < SOON, "others waited for {:?}", asked.elapsed());
            let said = self.said.load(Ordering::SeqCst);
            let is_open = silent.try_send(" ").await.is_ok();
            assert!(!is_open || said <= UNREAD_MAX, "{said} pieces of {WORDS} bytes are kept for somebody who reads nothing");
            (!is_open).then_some(())
        })
        .await;
        assert!(begun.elapsed() >= Duration::from_secs(2), "it was dropped after {:?}", begun.elapsed());
        assert!(self.said.load(Ordering::SeqCst) >= 16, "it had nothing to read");
        eventually("nothing is left of it", async || (self.door.servers() == 0 && self.sessions.rows() == 0).then_some(())).await;
    }
}

/// The same call, whose progress is told.
fn with_progress(mut message: Value) -> Value {
    message["params"]["_meta"]["progressToken"] = json!("p");
    message
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_stream_is_never_read_is_dropped_and_ends() {
    let talkers = Talkers::open(true).await;
    let opened = Ask::mcp(&initialize()).at(talkers.door.at).await;
    let id = opened.get("mcp-session-id").unwrap();
    let stream = talkers.ask(&Ask::new("GET", "/mcp").with("Accept", "text/event-stream").with("Mcp-Session-Id", id)).await;
    let greeting = in_session(&json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }), id);
    assert_eq!(greeting.at(talkers.door.at).await.status(), 202);
    talkers.drops(stream).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_call_is_never_read_is_dropped_and_ends() {
    let talkers = Talkers::open(false).await;
    let id = session(talkers.door.at).await;
    talkers.drops(talkers.ask(&in_session(&with_progress(call(2, "talk", &json!({}))), &id)).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_client_that_listens_and_never_reads_is_dropped() {
    let talkers = Talkers::open(false).await;
    let filter = json!({ "notifications": { "resourceSubscriptions": [format!("x:{}", "x".repeat(WORDS))] } });
    let listen = modern(json!({ "jsonrpc": "2.0", "id": 4, "method": "subscriptions/listen", "params": filter }));
    for _ in 0..2 {
        // The one stream that there may be is free again.
        talkers.said.store(0, Ordering::SeqCst);
        talkers.drops(talkers.ask(&listen).await).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_clients_call_that_is_never_read_is_dropped() {
    let talkers = Talkers::open(false).await;
    let ask = modern(call(2, "talk", &json!({})));
    let ask = ask.rebody(|body| with_progress(serde_json::from_str(body).unwrap()).to_string());
    talkers.drops(talkers.ask(&ask).await).await;
}
