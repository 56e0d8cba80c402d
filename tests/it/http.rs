//! The HTTP door over real sockets.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use lattice_mcp::config::{self, Secret};
use lattice_mcp::http::{self, Kind, Parts};
use lattice_mcp::model::audit::Turned;
use lattice_mcp::model::size::Size;
use lattice_mcp::model::time::Span;
use lattice_mcp::transport::{Bucket, Error, Expect, Result, Row, Table, Watch};
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CallToolResult, ContentBlock, ListToolsResult, PaginatedRequestParams, ServerCapabilities,
    ServerConfig, SubscriptionFilter,
};
use rmcp::service::{NotificationContext, RequestContext};
use rmcp::{ErrorData, RoleServer, ServerHandler};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::lifecycle::eventually;
use crate::web::{Ask, Reply, Wire, call, initialize, modern, session};

/// Rows with revisions and expiry, as a store would keep them.
#[derive(Default)]
pub(crate) struct Memory(Mutex<HashMap<String, (Row, Option<Instant>)>>);

impl Memory {
    pub(crate) fn rows(&self) -> usize {
        self.0.lock().unwrap().values().filter(|(_, end)| end.is_none_or(|end| end > Instant::now())).count()
    }
}

#[async_trait]
impl Table for Memory {
    async fn get(&self, _: Bucket, key: &str) -> Result<Option<Row>> {
        let rows = self.0.lock().unwrap();
        Ok(rows.get(key).filter(|(_, end)| end.is_none_or(|end| end > Instant::now())).map(|(row, _)| row.clone()))
    }

    async fn put(&self, bucket: Bucket, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> Result<u64> {
        let found = self.get(bucket, key).await?.map(|row| row.revision);
        if matches!(expect, Expect::Revision(revision) if found != Some(revision)) {
            return Err(Error::Conflict { bucket: bucket.name(), key: key.into() });
        }
        let revision = found.unwrap_or_default() + 1;
        let row = Row { key: key.into(), value, revision };
        self.0.lock().unwrap().insert(key.into(), (row, ttl.map(|ttl| Instant::now() + ttl)));
        Ok(revision)
    }

    async fn remove(&self, _: Bucket, key: &str, _: Expect) -> Result<bool> {
        Ok(self.0.lock().unwrap().remove(key).is_some())
    }

    async fn list(&self, _: Bucket) -> Result<Vec<Row>> {
        Ok(self.0.lock().unwrap().values().map(|(row, _)| row.clone()).collect())
    }

    async fn watch(&self, _: Bucket) -> Result<Box<dyn Watch>> {
        Err(Error::Closed)
    }

    async fn next(&self, _: Bucket, _: &str, floor: u64, _: u64) -> Result<u64> {
        Ok(floor)
    }
}

/// A table that is as slow as a test wants: a row is written when there is a permit.
struct Slow {
    rows: Arc<Memory>,
    permits: Semaphore,
    waiting: AtomicUsize,
}

#[async_trait]
impl Table for Slow {
    async fn get(&self, bucket: Bucket, key: &str) -> Result<Option<Row>> {
        self.rows.get(bucket, key).await
    }

    async fn put(&self, bucket: Bucket, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> Result<u64> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.permits.acquire().await.unwrap().forget();
        self.rows.put(bucket, key, value, expect, ttl).await
    }

    async fn remove(&self, bucket: Bucket, key: &str, expect: Expect) -> Result<bool> {
        self.rows.remove(bucket, key, expect).await
    }

    async fn list(&self, bucket: Bucket) -> Result<Vec<Row>> {
        self.rows.list(bucket).await
    }

    async fn watch(&self, bucket: Bucket) -> Result<Box<dyn Watch>> {
        self.rows.watch(bucket).await
    }

    async fn next(&self, bucket: Bucket, key: &str, floor: u64, step: u64) -> Result<u64> {
        self.rows.next(bucket, key, floor, step).await
    }
}

/// An MCP server that says for whom it was made, and sleeps for as long as it is told.
struct Sleeper(Kind, #[expect(dead_code, reason = "it is counted")] Arc<()>);

impl ServerHandler for Sleeper {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().enable_tool_list_changed().build())
    }

    async fn list_tools(
        &self,
        _: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> std::result::Result<ListToolsResult, ErrorData> {
        Ok(ListToolsResult::default())
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        _: RequestContext<RoleServer>,
    ) -> std::result::Result<CallToolResponse, ErrorData> {
        let ms = request.arguments.and_then(|arguments| arguments.get("ms")?.as_u64()).unwrap_or_default();
        // What it does takes as long as its caller says; nobody waits for it blindly.
        tokio::time::sleep(Duration::from_millis(ms)).await;
        Ok(CallToolResult::success(vec![ContentBlock::text(format!("{:?}", self.0))]).into())
    }

    async fn on_initialized(&self, context: NotificationContext<RoleServer>) {
        let _ = context.peer.notify_tool_list_changed().await;
    }

    fn accepted_subscription_filter(&self, requested: &SubscriptionFilter) -> Option<SubscriptionFilter> {
        Some(requested.clone())
    }
}

/// A running door.
pub(crate) struct Door {
    pub(crate) at: SocketAddr,
    pub(crate) url: String,
    stop: CancellationToken,
    served: JoinHandle<()>,
    /// The refused requests that it told of.
    pub(crate) turned: Arc<Mutex<Vec<Turned>>>,
    alive: Weak<()>,
}

impl Door {
    pub(crate) async fn open(config: config::Http) -> Self {
        Self::on(config, Arc::new(Memory::default())).await
    }

    pub(crate) async fn on(config: config::Http, table: Arc<dyn Table>) -> Self {
        let one = Arc::new(());
        let alive = Arc::downgrade(&one);
        Self::of(config, table, Arc::new(move |kind| Sleeper(kind, one.clone())), alive).await
    }

    /// A door to such servers, of which each holds one of what is counted.
    pub(crate) async fn of<S: ServerHandler>(config: config::Http, table: Arc<dyn Table>, make: http::Make<S>, alive: Weak<()>) -> Self {
        let listen = config.listen.as_deref().unwrap_or("0").parse().unwrap();
        let bound = http::bind(&config, listen).await.unwrap();
        let (at, url) = (bound.address(), bound.url());
        let turned: Arc<Mutex<Vec<Turned>>> = Arc::default();
        let told = turned.clone();
        let stop = CancellationToken::new();
        let parts = Parts {
            make,
            table,
            stop: stop.clone(),
            tasks: TaskTracker::new(),
            health: Arc::new(|| json!({ "lattice": "default", "station": "box" })),
            grace: Duration::from_secs(2),
            needs: lattice_mcp::mcp::needs,
            tell: Arc::new(move |turned| told.lock().unwrap().push(turned)),
        };
        let served = tokio::spawn(async move { bound.serve(parts).await.unwrap() });
        Self { at, url, stop, served, turned, alive }
    }

    /// How many MCP servers live behind it.
    pub(crate) fn servers(&self) -> usize {
        self.alive.strong_count().saturating_sub(1)
    }

    pub(crate) async fn close(self) {
        self.stop.cancel();
        self.served.await.unwrap();
    }
}

fn with_token() -> config::Http {
    config::Http { token: Some(Secret::new("s3cret")), ..Default::default() }
}

fn text_of(reply: &Reply) -> String {
    reply.json()["result"]["content"][0]["text"].as_str().unwrap_or_else(|| panic!("no text in {reply:?}")).to_owned()
}

pub(crate) fn in_session(message: &Value, id: &str) -> Ask {
    Ask::mcp(message).with("Mcp-Session-Id", id)
}

#[tokio::test]
async fn everybody_who_names_the_server_learns_that_it_is_well_and_who_may_look_how_the_lattice_is() {
    let whole = json!({ "status": "ok", "version": env!("CARGO_PKG_VERSION"), "lattice": "default", "station": "box" });
    let door = Door::open(with_token()).await;
    let ask = Ask::new("GET", "/health");
    let reply = ask.at(door.at).await;
    assert_eq!((reply.status(), reply.json()), (200, json!({ "status": "ok" })));
    let known = ask.clone().with("Authorization", "Bearer s3cret").at(door.at).await;
    assert_eq!((known.status(), known.json()), (200, whole.clone()));
    assert_eq!(ask.clone().with("Authorization", "Bearer wrong").at(door.at).await.status(), 401);
    let open = Door::open(config::Http::default()).await;
    assert_eq!(ask.at(open.at).await.json(), whole, "whoever reaches it may look anyway");
    assert_eq!(Ask::new("GET", "/health").with("Host", "evil.example").at(door.at).await.status(), 403);
    let post = Ask::new("POST", "/health").at(door.at).await;
    assert_eq!((post.status(), post.get("allow")), (405, Some("GET")));
}

#[tokio::test]
async fn other_paths_say_where_things_are() {
    let door = Door::open(config::Http::default()).await;
    let reply = Ask::new("GET", "/").at(door.at).await;
    assert_eq!(reply.status(), 404);
    assert!(reply.error().contains("/mcp") && reply.error().contains("/health"), "{reply:?}");
    let put = Ask::new("PUT", "/mcp").at(door.at).await;
    assert_eq!((put.status(), put.get("allow")), (405, Some("GET, POST, DELETE")));
    let told: Vec<String> = door.turned.lock().unwrap().iter().map(|turned| turned.cause.clone()).collect();
    assert_eq!(told, ["path", "method"]);
}

#[tokio::test]
async fn the_token_is_asked_for_and_explained() {
    let door = Door::open(with_token()).await;
    let ask = Ask::mcp(&initialize());
    let without = ask.at(door.at).await;
    assert_eq!((without.status(), without.get("www-authenticate")), (401, Some("Bearer")));
    assert!(without.error().contains("Authorization: Bearer"), "{without:?}");
    for value in ["Bearer wrong", "Bearer s3cret2", "Bearer", "Basic s3cret", "s3cret"] {
        assert_eq!(ask.clone().with("Authorization", value).at(door.at).await.status(), 401, "{value}");
    }
    let query = Ask::new("POST", "/mcp?token=s3cret&access_token=s3cret").at(door.at).await;
    assert_eq!(query.status(), 401);
    for value in ["Bearer s3cret", "bearer s3cret"] {
        assert_eq!(ask.clone().with("Authorization", value).at(door.at).await.status(), 200, "{value}");
    }
    assert_eq!(Ask::new("GET", "/.well-known/oauth-protected-resource").at(door.at).await.status(), 404);
}

#[tokio::test]
async fn the_token_may_stand_in_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "  from-file \nmore\n").unwrap();
    let door = Door::open(config::Http { token_file: Some(file.clone()), ..Default::default() }).await;
    assert_eq!(Ask::mcp(&initialize()).with("Authorization", "Bearer from-file").at(door.at).await.status(), 200);

    std::fs::write(&file, "\n").unwrap();
    for (config, said) in [
        (config::Http { token_file: Some(file), ..Default::default() }, "is empty"),
        (config::Http { token_file: Some(dir.path().join("none")), ..Default::default() }, "cannot read the token file"),
        (config::Http { token: Some(Secret::new("two words")), ..Default::default() }, "no header can carry"),
    ] {
        let error = http::bind(&config, "0".parse().unwrap()).await.err().unwrap().to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[tokio::test]
async fn an_address_open_to_the_network_needs_a_token() {
    let refused = http::bind(&config::Http::default(), "0.0.0.0:0".parse().unwrap()).await.err().unwrap().to_string();
    assert!(refused.contains("without a token") && refused.contains("LATTICE_HTTP_TOKEN"), "{refused}");
    let short = http::bind(&with_token(), "0.0.0.0:0".parse().unwrap()).await.err().unwrap().to_string();
    assert!(short.contains("could be guessed"), "{short}");
    let long = config::Http { token: Some(Secret::new("0123456789abcdef")), ..Default::default() };
    assert!(http::bind(&long, "0.0.0.0:0".parse().unwrap()).await.is_ok());
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let door = Door::open(config::Http::default()).await;
    let error = http::bind(&config::Http::default(), door.at.port().to_string().parse().unwrap()).await.err().unwrap().to_string();
    assert!(error.contains(&format!("port {} of 127.0.0.1 is in use", door.at.port())), "{error}");
}

#[tokio::test]
async fn other_names_than_the_servers_own_are_refused() {
    let door = Door::open(config::Http { allowed_hosts: vec!["lattice.example".into()], ..Default::default() }).await;
    let ask = Ask::mcp(&initialize());
    for host in ["localhost", "localhost:1", "127.0.0.1:8765", "[::1]", "lattice.example:443"] {
        assert_eq!(ask.clone().with("Host", host).at(door.at).await.status(), 200, "{host}");
    }
    let evil = ask.clone().with("Host", "evil.example").at(door.at).await;
    assert_eq!(evil.status(), 403);
    assert!(evil.error().contains("http.allowed_hosts"), "{evil:?}");
    assert_eq!(ask.with("Host", "").at(door.at).await.status(), 400);
}

#[tokio::test]
async fn only_pages_of_listed_origins_may_call() {
    let door = Door::open(config::Http { allowed_origins: vec!["http://localhost:5173".into()], ..Default::default() }).await;
    let ask = Ask::mcp(&initialize());
    let page = ask.clone().with("Origin", "http://localhost:5173").at(door.at).await;
    assert_eq!((page.status(), page.get("access-control-allow-origin")), (200, Some("http://localhost:5173")));
    assert!(page.get("access-control-expose-headers").unwrap().contains("Mcp-Session-Id"));
    for origin in ["http://localhost:3000", "https://evil.example", "null"] {
        let reply = ask.clone().with("Origin", origin).at(door.at).await;
        assert_eq!((reply.status(), reply.get("access-control-allow-origin")), (403, None), "{origin}");
        assert!(reply.error().contains("http.allowed_origins"), "{reply:?}");
    }
}

#[tokio::test]
async fn pages_of_the_server_itself_may_call_and_those_of_its_neighbours_may_not() {
    let door = Door::open(config::Http::default()).await;
    let port = door.at.port();
    let (ask, own) = (Ask::mcp(&initialize()).with("Host", &format!("127.0.0.1:{port}")), format!("http://127.0.0.1:{port}"));
    let page = ask.clone().with("Origin", &own).at(door.at).await;
    assert_eq!((page.status(), page.get("access-control-allow-origin")), (200, Some(&*own)));
    let neighbours = [format!("http://127.0.0.1:{}", port ^ 1), "http://127.0.0.1".into(), format!("https://127.0.0.1:{port}")];
    for origin in neighbours.into_iter().chain([format!("http://localhost:{port}"), format!("http://evil.example:{port}")]) {
        let reply = ask.clone().with("Origin", &origin).at(door.at).await;
        assert_eq!((reply.status(), reply.get("access-control-allow-origin")), (403, None), "{origin}");
    }
}

#[tokio::test]
async fn browsers_on_a_listed_origin_get_their_preflight() {
    let door = Door::open(config::Http { allowed_origins: vec!["http://localhost:5173".into()], ..with_token() }).await;
    let asks = "authorization, content-type, mcp-param-x";
    let ask = Ask::new("OPTIONS", "/mcp").with("Access-Control-Request-Method", "POST").with("Access-Control-Request-Headers", asks);
    let reply = ask.clone().with("Origin", "http://localhost:5173").at(door.at).await;
    assert_eq!((reply.status(), reply.get("access-control-allow-headers")), (204, Some(asks)));
    assert!(reply.get("access-control-allow-methods").unwrap().contains("DELETE"));
    assert_eq!(ask.with("Origin", "https://evil.example").at(door.at).await.status(), 403);
}

#[tokio::test]
async fn bodies_are_bounded_however_they_are_sent() {
    let door = Door::open(config::Http { body_max: Size::kib(4), ..Default::default() }).await;
    let long = json!({ "jsonrpc": "2.0", "id": 1, "method": "x".repeat(5000) });
    let reply = Ask::mcp(&long).at(door.at).await;
    assert_eq!(reply.status(), 413);
    assert!(reply.error().contains("4096 bytes") && reply.error().contains("http.body_max"), "{reply:?}");

    let mut wire = Wire::open(door.at).await;
    let ask = Ask::mcp(&json!(0)).body("").with("Transfer-Encoding", "chunked");
    wire.send(ask.text()).await;
    for _ in 0..5 {
        wire.send(format!("400\r\n{}\r\n", " ".repeat(1024))).await;
    }
    wire.send("0\r\n\r\n").await;
    assert_eq!(wire.reply().await.status(), 413);
}

#[tokio::test]
async fn large_bodies_share_their_room_and_small_ones_need_none() {
    let door = Door::open(config::Http { body_max: Size::kib(64), bodies_max: Size::kib(64), ..Default::default() }).await;
    let small = modern(json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {} }));
    let large = small.clone().rebody(|text| format!("{text}{}", " ".repeat(40 * 1024)));
    assert_eq!(large.at(door.at).await.status(), 200);
    let mut still = Wire::open(door.at).await;
    let text = small.clone().rebody(|text| format!("{text}{}", " ".repeat(60 * 1024))).text();
    still.send(&text[..text.len() - 5]).await;
    let refused = eventually("there is no room", async || {
        let reply = large.at(door.at).await;
        (reply.status() != 200).then_some(reply)
    });
    let refused = refused.await;
    assert_eq!((refused.status(), refused.get("retry-after")), (503, Some("5")));
    assert!(refused.error().contains("http.bodies_max"), "{refused:?}");
    assert_eq!(small.at(door.at).await.status(), 200);
    still.send(&text[text.len() - 5..]).await;
    assert_eq!(still.reply().await.status(), 200);
    assert_eq!(large.at(door.at).await.status(), 200, "there is room again");
}

#[tokio::test]
async fn slow_heads_and_bodies_do_not_hold_connections() {
    let brief = Span::millis(300);
    let door = Door::open(config::Http { head_timeout: brief, body_stall: brief, ..config::Http::default() }).await;
    let mut head = Wire::open(door.at).await;
    head.send("POST /mcp HTTP/1.1\r\nHost: loc").await;
    let mut body = Wire::open(door.at).await;
    let text = Ask::mcp(&initialize()).text();
    body.send(&text[..text.len() - 5]).await;
    let mut silent = Wire::open(door.at).await;

    let reply = body.reply().await;
    assert_eq!(reply.status(), 408, "{reply:?}");
    assert!(body.is_closed().await && head.is_closed().await && silent.is_closed().await);
    assert!(door.turned.lock().unwrap().iter().any(|turned| turned.cause == "body"));
}

#[tokio::test]
async fn what_is_no_message_is_explained() {
    let door = Door::open(config::Http::default()).await;
    let ask = Ask::mcp(&initialize());
    for (body, said) in
        [("{", "no JSON"), ("[]", "batches"), ("{\"method\":1}", "no JSON-RPC message"), ("{\"a\":1}", "no JSON-RPC message")]
    {
        let reply = ask.clone().body(body).at(door.at).await;
        assert!(matches!(reply.status(), 400 | 415), "{reply:?}");
        assert!(reply.error().contains(said), "{reply:?}");
    }
    let json_only = ask.clone().with("Accept", "application/json").at(door.at).await;
    assert_eq!(json_only.status(), 406);
    assert!(json_only.error().contains("text/event-stream"), "{json_only:?}");
    assert_eq!(ask.with("Content-Type", "text/plain").at(door.at).await.status(), 415);
    assert!(door.turned.lock().unwrap().iter().all(|turned| turned.cause == "message"));
}

#[tokio::test]
async fn one_connection_serves_both_generations() {
    let door = Door::open(config::Http::default()).await;
    let id = session(door.at).await;
    let mut wire = Wire::open(door.at).await;
    for _ in 0..2 {
        wire.send(in_session(&call(2, "kind", &json!({})), &id).text()).await;
        assert_eq!(text_of(&wire.reply().await), "Session");
        wire.send(modern(call(3, "kind", &json!({}))).text()).await;
        assert_eq!(text_of(&wire.reply().await), "Request");
    }
    let discover = modern(json!({ "jsonrpc": "2.0", "id": 4, "method": "server/discover", "params": {} })).at(door.at).await;
    assert!(discover.json()["result"].is_object(), "{discover:?}");
}

#[tokio::test]
async fn no_stream_begins_with_an_empty_event() {
    let door = Door::open(config::Http::default()).await;
    let first = |reply: &Reply| reply.text.lines().find(|line| line.starts_with("data:")).unwrap().to_owned();
    let opened = Ask::mcp(&initialize()).at(door.at).await;
    assert!(first(&opened).contains("protocolVersion") && !opened.text.contains("retry:"), "{opened:?}");
    let id = session(door.at).await;
    let answer = in_session(&call(2, "kind", &json!({})), &id).at(door.at).await;
    assert!(first(&answer).contains("Session") && !answer.text.contains("retry:"), "{answer:?}");
}

#[tokio::test]
async fn a_session_outlives_a_restart_and_ends_with_delete() {
    let table = Arc::new(Memory::default());
    let door = Door::on(config::Http::default(), table.clone()).await;
    let id = session(door.at).await;
    door.close().await;

    let door = Door::on(config::Http::default(), table.clone()).await;
    let answer = in_session(&call(2, "kind", &json!({})), &id).at(door.at).await;
    assert_eq!(text_of(&answer), "Session");
    assert_eq!(table.rows(), 1);

    assert_eq!(Ask::new("DELETE", "/mcp").with("Mcp-Session-Id", &id).at(door.at).await.status(), 204);
    assert_eq!(table.rows(), 0);
    let gone = in_session(&call(3, "kind", &json!({})), &id).at(door.at).await;
    assert_eq!(gone.status(), 404);
    assert!(gone.error().contains("initialize"), "{gone:?}");
    assert_eq!(Ask::new("DELETE", "/mcp").with("Mcp-Session-Id", &id).at(door.at).await.status(), 404);
}

#[tokio::test]
async fn a_client_listens_on_after_a_restart() {
    let table = Arc::new(Memory::default());
    let door = Door::on(config::Http::default(), table.clone()).await;
    let id = session(door.at).await;
    door.close().await;

    let door = Door::on(config::Http::default(), table).await;
    assert_eq!(text_of(&in_session(&call(2, "kind", &json!({})), &id).at(door.at).await), "Session");
    let mut wire = Wire::open(door.at).await;
    let listen = Ask::new("GET", "/mcp").with("Accept", "text/event-stream").with("Mcp-Session-Id", &id).with("Last-Event-ID", "7");
    wire.send(listen.text()).await;
    assert_eq!(wire.head().await.unwrap().status, 200);
    wire.until("list_changed").await;
    let ended = tokio::time::timeout(Duration::from_millis(300), wire.chunk()).await;
    assert!(ended.is_err(), "the stream ended: {ended:?}");
}

#[tokio::test]
async fn requests_without_or_with_an_unknown_session_say_what_to_do() {
    let door = Door::open(config::Http::default()).await;
    let without = Ask::mcp(&call(1, "kind", &json!({}))).at(door.at).await;
    assert_eq!(without.status(), 400);
    assert!(without.error().contains("initialize"), "{without:?}");
    let unknown = in_session(&call(1, "kind", &json!({})), "no-such-session").at(door.at).await;
    assert_eq!(unknown.status(), 404);
}

#[tokio::test]
async fn a_session_ends_when_it_is_idle_but_not_while_a_silent_call_runs() {
    let table = Arc::new(Memory::default());
    let config = config::Http { session_idle: Span::millis(400), ..Default::default() };
    let door = Door::on(config, table.clone()).await;
    let id = session(door.at).await;
    let silent = call(2, "sleep", &json!({ "ms": 1500 }));
    let answer = in_session(&silent, &id).at(door.at).await;
    assert_eq!(text_of(&answer), "Session");
    // Nor when the call says the version of its session.
    let mut versioned = silent;
    versioned["params"]["_meta"] = json!({ "io.modelcontextprotocol/protocolVersion": "2025-11-25" });
    let answer = in_session(&versioned, &id).with("MCP-Protocol-Version", "2025-11-25").at(door.at).await;
    assert_eq!(text_of(&answer), "Session");
    assert_eq!(table.rows(), 1);

    eventually("the session ends", async || (table.rows() == 0).then_some(())).await;
    assert_eq!(in_session(&call(3, "kind", &json!({})), &id).at(door.at).await.status(), 404);
}

#[tokio::test]
async fn the_idlest_session_makes_room_for_a_new_one() {
    let table = Arc::new(Memory::default());
    let door = Door::on(config::Http { sessions_max: 2, ..Default::default() }, table.clone()).await;
    let (first, second) = (session(door.at).await, session(door.at).await);
    assert_eq!(in_session(&call(2, "kind", &json!({})), &first).at(door.at).await.status(), 200);
    let third = session(door.at).await;
    assert_eq!(table.rows(), 2);
    for (id, status) in [(&first, 200), (&second, 404), (&third, 200)] {
        assert_eq!(in_session(&call(3, "kind", &json!({})), id).at(door.at).await.status(), status);
    }
}

#[tokio::test]
async fn a_new_session_is_refused_while_all_are_in_use() {
    let door = Door::on(config::Http { sessions_max: 1, ..Default::default() }, Arc::new(Memory::default())).await;
    let id = session(door.at).await;
    let mut busy = Wire::open(door.at).await;
    busy.send(in_session(&call(2, "sleep", &json!({ "ms": 600 })), &id).text()).await;
    assert_eq!(busy.head().await.unwrap().status, 200);
    let refused = Ask::mcp(&initialize()).at(door.at).await;
    assert_eq!(refused.status(), 503);
    assert!(refused.error().contains("http.sessions_max"), "{refused:?}");
    busy.until("Session").await;
}

#[tokio::test]
async fn a_session_whose_client_hangs_up_while_it_is_opened_counts_like_any_other() {
    let slow = Arc::new(Slow { rows: Arc::default(), permits: Semaphore::new(0), waiting: AtomicUsize::new(0) });
    let door = Door::on(config::Http { sessions_max: 2, ..Default::default() }, slow.clone()).await;
    for n in 1..=6 {
        let mut wire = Wire::open(door.at).await;
        wire.send(Ask::mcp(&initialize()).text()).await;
        eventually("its row is written", async || (slow.waiting.load(Ordering::SeqCst) == n).then_some(())).await;
        wire.hang_up().await;
        assert_eq!(wire.rest().await, "");
        slow.permits.add_permits(1);
        eventually("it is one of two at most", async || (door.servers() == slow.rows.rows() && slow.rows.rows() == n.min(2)).then_some(()))
            .await;
    }
    slow.permits.add_permits(10);
    assert_eq!(in_session(&call(2, "kind", &json!({})), &session(door.at).await).at(door.at).await.status(), 200);
    assert_eq!((slow.rows.rows(), door.servers()), (2, 2));
}

#[tokio::test]
async fn stopping_lets_running_calls_end_and_closes_the_streams() {
    let door = Door::open(config::Http::default()).await;
    let at = door.at;
    let id = session(at).await;
    let mut old = Wire::open(at).await;
    old.send(in_session(&call(2, "sleep", &json!({ "ms": 800 })), &id).text()).await;
    let mut new = Wire::open(at).await;
    new.send(modern(call(3, "sleep", &json!({ "ms": 800 }))).text()).await;
    let mut stream = Wire::open(at).await;
    stream.send(Ask::new("GET", "/mcp").with("Accept", "text/event-stream").with("Mcp-Session-Id", &id).text()).await;
    assert_eq!(stream.head().await.unwrap().status, 200);
    let mut listening = Wire::open(at).await;
    let filter = json!({ "notifications": { "toolsListChanged": true } });
    listening.send(modern(json!({ "jsonrpc": "2.0", "id": 4, "method": "subscriptions/listen", "params": filter })).text()).await;
    assert_eq!(listening.head().await.unwrap().status, 200);
    listening.until("acknowledged").await;

    let began = Instant::now();
    door.stop.cancel();
    while stream.chunk().await.is_some() {}
    while listening.chunk().await.is_some() {}
    assert!(began.elapsed() < Duration::from_millis(700), "streams ended after {:?}", began.elapsed());
    assert!(tokio::net::TcpStream::connect(at).await.is_err(), "still accepting");
    assert_eq!(text_of(&old.reply().await), "Session");
    assert_eq!(text_of(&new.reply().await), "Request");
    door.served.await.unwrap();
    assert!(began.elapsed() < Duration::from_millis(1900), "stopped after {:?}", began.elapsed());
}

#[tokio::test]
async fn stopping_breaks_off_calls_that_outlast_the_grace() {
    let door = Door::open(config::Http::default()).await;
    let id = session(door.at).await;
    let mut wire = Wire::open(door.at).await;
    wire.send(in_session(&call(2, "sleep", &json!({ "ms": 60_000 })), &id).text()).await;
    assert_eq!(wire.head().await.unwrap().status, 200);
    let began = Instant::now();
    door.close().await;
    assert!(began.elapsed() < Duration::from_secs(4), "stopped after {:?}", began.elapsed());
    assert!(wire.chunk().await.is_none());
}
