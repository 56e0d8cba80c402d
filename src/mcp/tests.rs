//! The server over an in-memory pair of streams and the embedded store. The tests play the leaf: they append what a leaf would.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream, Lines, ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Parts, Server, serve_lines};
use crate::agents::Catalog;
use crate::audit::Audit;
use crate::config::Config;
use crate::dispatcher::{Bound, Caller, Dispatcher, Question};
use crate::model::access::{self, Access, Scope};
use crate::model::agent::{Definition, Limits, Manifest, Prompt, RunnerSpec};
use crate::model::event::{Ask, Event, Failure, FailureKind, Kind, Needs, Side};
use crate::model::id::WorkId;
use crate::model::output::{BlobRef, Media, Output};
use crate::model::owner::{Owner, Principal, Workspace};
use crate::model::size::Size;
use crate::model::time::Span;
use crate::registry::{Identity, Registry};
use crate::runs::Runs;
use crate::telemetry::{new_instance, new_secret, now};
use crate::transport::local::{self, Local};
use crate::transport::{Bucket, Expect, Reach, SEAL, Transport};
use crate::works::{Works, record};

const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn manifest(name: &str, description: &str) -> Manifest {
    Manifest {
        name: name.parse().unwrap(),
        description: description.into(),
        capabilities: Vec::new(),
        input_schema: None,
        output_schema: None,
        examples: Vec::new(),
        limits: Limits::default(),
        retry: Default::default(),
        unavailable: None,
    }
}

fn catalog(manifests: Vec<Manifest>) -> Arc<Catalog> {
    let definition =
        |manifest: Manifest| Definition { manifest, prompt: Prompt::Plain(String::new()), runner: RunnerSpec::Echo, source: None };
    let definitions: BTreeMap<_, _> = manifests.into_iter().map(|m| (m.name.clone(), Arc::new(definition(m)))).collect();
    Arc::new(Catalog { definitions, problems: Vec::new() })
}

/// A lattice of one station, in a folder of its own.
struct Fixture {
    dispatcher: Dispatcher,
    server: Server,
    tasks: TaskTracker,
    woken: Arc<AtomicUsize>,
    store: Local,
    _dir: tempfile::TempDir,
}

/// A server that knows nothing but what its dispatcher does.
fn server(dispatcher: &Dispatcher, woken: &Arc<AtomicUsize>, tasks: &TaskTracker) -> Server {
    let count = woken.clone();
    Server::new(Parts {
        dispatcher: dispatcher.clone(),
        caller: Caller::connection(),
        wake: Arc::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
            async { Ok(()) }.boxed()
        }),
        stop: CancellationToken::new(),
        tasks: tasks.clone(),
    })
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.store.close();
    }
}

impl Fixture {
    fn new() -> Self {
        Self::with(Config::default())
    }

    fn with(config: Config) -> Self {
        Self::reaching(config, Reach::Alone)
    }

    /// Whose transport says that it reaches this.
    fn reaching(config: Config, reach: Reach) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = local::open(dir.path(), &config.lattice.storage).unwrap();
        let transport = Transport { reach: watch::channel(reach).1, ..store.transport() };
        let me = Identity { station: "here".parse().unwrap(), instance: new_instance(), by_name: false };
        let audit = Audit::new(transport.log.clone(), config.lattice.id.clone());
        let registry = Registry::new(transport.table.clone(), audit, me, config.lattice.presence.clone());
        let runs = Runs::open(dir.path(), transport.log.clone()).unwrap();
        let works = Works::new(transport.log.clone());
        let dispatcher = Dispatcher::new(transport, works, registry, runs, Arc::new(config));
        let woken = Arc::new(AtomicUsize::new(0));
        let tasks = TaskTracker::new();
        let server = server(&dispatcher, &woken, &tasks);
        Self { dispatcher, server, tasks, woken, store, _dir: dir }
    }

    async fn offer(&self, names: &[&str]) {
        self.offer_all(names.iter().map(|name| manifest(name, "Does what it is told")).collect()).await;
    }

    async fn offer_all(&self, manifests: Vec<Manifest>) {
        self.dispatcher.registry().offer(catalog(manifests)).await.unwrap();
    }

    /// A connection that has said hello in the older protocol.
    async fn client(&self) -> Client {
        self.client_with(json!({})).await
    }

    async fn client_with(&self, capabilities: Value) -> Client {
        let mut client = self.raw(Size::mib(16));
        let hello = json!({"protocolVersion": "2025-11-25", "capabilities": capabilities, "clientInfo": {"name": "test", "version": "0"}});
        let welcome = client.request("initialize", hello).await;
        assert_eq!(welcome["result"]["serverInfo"]["name"], "lattice-mcp", "{welcome}");
        client.send(&json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
        client
    }

    /// A connection of which nothing has been said yet.
    fn raw(&self, line_max: Size) -> Client {
        self.connect(self.server.for_connection(), line_max)
    }

    fn connect(&self, server: Server, line_max: Size) -> Client {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let (read, write) = tokio::io::split(theirs);
        let served = self.tasks.spawn(serve_lines(server, read, write, line_max));
        let (read, write) = tokio::io::split(ours);
        Client {
            lines: BufReader::new(read).lines(),
            write: Some(write),
            next: 1,
            notifications: Vec::new(),
            served: Some(served),
            modern: false,
            capabilities: json!({}),
        }
    }

    /// What a leaf, or somebody else, says of a work.
    async fn happens(&self, id: &Value, attempt: u32, kind: Kind) {
        let id: WorkId = id.as_str().unwrap().parse().unwrap();
        let work = self.dispatcher.check(id).await.unwrap();
        let me = self.dispatcher.registry().me();
        let event = Event {
            work_id: id,
            run_id: work.run_id.clone(),
            at: now(),
            station: me.station.clone(),
            instance: me.instance,
            side: if attempt == 0 { Side::Assigner } else { Side::Leaf },
            attempt,
            kind,
        };
        self.dispatcher.transport().log.append(vec![record(event)]).await.unwrap();
    }

    /// A work of this agent, which asks a person.
    async fn asks_a_person(&self, client: &mut Client, agent: &str) -> Value {
        let id = client.assign(agent).await;
        self.happens(&id, 1, Kind::Accepted).await;
        let ask = Ask { ask: 1, reason: "may I?".into(), context: Value::Null, needs: Needs::Human, parked: false };
        self.happens(&id, 1, Kind::Escalate(ask)).await;
        id
    }

    async fn answer_of(&self, id: &Value) -> (Option<Value>, Option<Needs>) {
        let work = self.dispatcher.check(id.as_str().unwrap().parse().unwrap()).await.unwrap();
        let exchange = work.exchanges.last().unwrap();
        (exchange.answer.clone(), exchange.answered_by.as_ref().map(|by| by.who))
    }

    async fn completes(&self, id: &Value, result: Value) {
        self.happens(id, 1, Kind::Accepted).await;
        self.happens(id, 1, Kind::Complete { result: Output::Inline(result), duration_ms: 7, checks: vec![] }).await;
    }
}

struct Client {
    lines: Lines<BufReader<ReadHalf<DuplexStream>>>,
    write: Option<WriteHalf<DuplexStream>>,
    next: u64,
    notifications: Vec<Value>,
    served: Option<tokio::task::JoinHandle<Result<(), super::Error>>>,
    modern: bool,
    capabilities: Value,
}

impl Client {
    async fn send(&mut self, message: &Value) {
        self.send_bytes(format!("{message}\n").as_bytes()).await;
    }

    async fn send_bytes(&mut self, bytes: &[u8]) {
        self.write.as_mut().unwrap().write_all(bytes).await.unwrap();
    }

    async fn receive(&mut self) -> Value {
        let line = tokio::time::timeout(PATIENCE, self.lines.next_line()).await.expect("an answer in time").unwrap().expect("a line");
        serde_json::from_str(&line).unwrap()
    }

    async fn begin(&mut self, method: &str, mut params: Value) -> u64 {
        let id = self.next;
        self.next += 1;
        if self.modern {
            params["_meta"]["io.modelcontextprotocol/protocolVersion"] = "2026-07-28".into();
            params["_meta"]["io.modelcontextprotocol/clientInfo"] = json!({"name": "test", "version": "0"});
            params["_meta"]["io.modelcontextprotocol/clientCapabilities"] = self.capabilities.clone();
        }
        self.send(&json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params})).await;
        id
    }

    async fn answer(&mut self, id: u64) -> Value {
        loop {
            let message = self.receive().await;
            if message.get("method").is_some() {
                self.notifications.push(message);
            } else {
                assert_eq!(message["id"], id, "{message}");
                return message;
            }
        }
    }

    /// The next request of the server.
    async fn asked(&mut self, method: &str) -> Value {
        let request = self.notified(method).await;
        assert!(request["id"].is_number() || request["id"].is_string(), "{request}");
        request
    }

    async fn reply(&mut self, request: &Value, result: Value) {
        self.send(&json!({"jsonrpc": "2.0", "id": request["id"], "result": result})).await;
    }

    async fn request(&mut self, method: &str, params: Value) -> Value {
        let id = self.begin(method, params).await;
        self.answer(id).await
    }

    /// The next notification of a method.
    async fn notified(&mut self, method: &str) -> Value {
        loop {
            if let Some(at) = self.notifications.iter().position(|notification| notification["method"] == method) {
                return self.notifications.remove(at);
            }
            let message = self.receive().await;
            self.notifications.push(message);
        }
    }

    /// What a tool gave; its text says the same.
    async fn call(&mut self, tool: &str, arguments: Value) -> Value {
        let answer = self.request("tools/call", json!({"name": tool, "arguments": arguments})).await;
        let result = &answer["result"];
        assert_ne!(result["isError"], true, "{answer}");
        let text: Value = serde_json::from_str(result["content"][0]["text"].as_str().unwrap()).unwrap();
        assert_eq!(text, result["structuredContent"]);
        text
    }

    /// What a tool said was wrong.
    async fn refused(&mut self, tool: &str, arguments: Value) -> String {
        let answer = self.request("tools/call", json!({"name": tool, "arguments": arguments})).await;
        assert_eq!(answer["result"]["isError"], true, "{tool} {arguments}: {answer}");
        answer["result"]["content"][0]["text"].as_str().unwrap().to_owned()
    }

    async fn assign(&mut self, agent: &str) -> Value {
        self.call("assign_work", json!({"agent_name": agent, "task": "do it"})).await["work_id"].clone()
    }

    /// Hangs up, and waits until the server has noticed.
    async fn leave(mut self) -> Duration {
        drop(self.write.take());
        // Dropping one half does not close the stream; the other half goes with it.
        let served = self.served.take().unwrap();
        let begun = Instant::now();
        drop(self);
        tokio::time::timeout(PATIENCE, served).await.expect("the server ends").unwrap().unwrap();
        begun.elapsed()
    }
}

fn validate(tool: &Value, answer: &Value) {
    let schema = &tool["outputSchema"];
    let problems: Vec<String> =
        jsonschema::validator_for(schema).unwrap().iter_errors(answer).map(|error| format!("{}: {error}", error.instance_path())).collect();
    assert!(problems.is_empty(), "{} gives {answer}: {problems:?}", tool["name"]);
}

#[tokio::test]
async fn the_tools_are_the_golden_ones_and_cost_under_2500_tokens() {
    let fixture = Fixture::new();
    let mut client = fixture.client().await;
    let listed = client.request("tools/list", json!({})).await;
    let size = listed.to_string().chars().count();
    println!("tools/list without agents: {size} characters, {} tokens", size / 4);
    assert!(size < 10_000, "{size} characters");
    assert!(!listed.to_string().contains("\"format\""), "no client needs formats");
    let tools = &listed["result"]["tools"];
    for tool in tools.as_array().unwrap() {
        for field in ["title", "description", "inputSchema", "outputSchema", "annotations"] {
            assert!(!tool[field].is_null(), "{} has no {field}", tool["name"]);
        }
        for schema in [&tool["inputSchema"], &tool["outputSchema"]] {
            assert_eq!(schema["type"], "object");
            jsonschema::validator_for(schema).unwrap();
        }
    }
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas/tools.json");
    if std::env::var_os("UPDATE_GOLDEN").is_some_and(|value| value == "1") {
        std::fs::write(&golden, format!("{}\n", serde_json::to_string_pretty(tools).unwrap())).unwrap();
    }
    let kept: Value = serde_json::from_str(&std::fs::read_to_string(&golden).unwrap()).unwrap();
    assert_eq!(&kept, tools, "the tools changed: look at them, then run the tests with UPDATE_GOLDEN=1");
}

/// Gemini refuses all tools when one parameter has no type, and hosts that convert schemas lose what has none.
#[test]
fn every_parameter_of_every_tool_says_its_type() {
    fn untyped(schema: &Value, path: &str, found: &mut Vec<String>) {
        let choices = schema["anyOf"].as_array();
        match (schema["type"].as_str(), choices) {
            (Some("array"), None) => untyped(&schema["items"], &format!("{path}[]"), found),
            (Some(kind), None) if kind == "string" || schema.get("enum").is_none() => {}
            (None, Some(choices)) => choices.iter().for_each(|choice| untyped(choice, path, found)),
            _ => found.push(path.to_owned()),
        }
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            untyped(property, &format!("{path}.{name}"), found);
        }
    }
    let mut found = Vec::new();
    let tools = Server::agent_tools() + Server::work_tools() + Server::waiting_tools() + Server::question_tools();
    for tool in tools.list_all() {
        let tool = serde_json::to_value(tool).unwrap();
        untyped(&tool["inputSchema"], tool["name"].as_str().unwrap(), &mut found);
    }
    assert!(found.is_empty(), "{found:?}");
}

#[tokio::test]
async fn what_changes_while_the_station_wakes_is_in_the_first_lists_and_not_told() {
    let mut fixture = Fixture::new();
    let registry = fixture.dispatcher.registry().clone();
    let wake = move || {
        let registry = registry.clone();
        async move { registry.offer(catalog(vec![manifest("early", "Is there")])).await.map_err(|error| error.to_string()) }.boxed()
    };
    fixture.server = Server::new(Parts {
        dispatcher: fixture.dispatcher.clone(),
        caller: Caller::connection(),
        wake: Arc::new(wake),
        stop: CancellationToken::new(),
        tasks: fixture.tasks.clone(),
    });
    let mut client = fixture.client().await;
    // By its answer, the server has seen that the client is ready.
    client.request("ping", json!({})).await;
    let listed = client.request("tools/list", json!({})).await;
    assert!(listed.to_string().contains("- **early** (local)"), "{listed}");
    client.request("ping", json!({})).await;
    assert!(client.notifications.is_empty(), "{:?}", client.notifications);
    fixture.offer(&["early", "late"]).await;
    client.notified("notifications/tools/list_changed").await;
    client.notified("notifications/resources/list_changed").await;
    assert!(client.request("tools/list", json!({})).await.to_string().contains("- **late** (local)"));
    assert!(client.notifications.is_empty(), "{:?}", client.notifications);
}

#[tokio::test]
async fn both_generations_are_told_exactly_what_is_served() {
    let fixture = Fixture::new();
    let wanted = json!({
        "completions": {}, "prompts": {}, "resources": {"listChanged": true, "subscribe": true}, "tools": {"listChanged": true}
    });
    let mut old = fixture.raw(Size::mib(1));
    let hello = json!({"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}});
    let welcome = old.request("initialize", hello).await;
    assert_eq!(welcome["result"]["capabilities"], wanted);
    assert_eq!(welcome["result"]["protocolVersion"], "2025-06-18");
    let mut new = fixture.raw(Size::mib(1));
    new.modern = true;
    let discovered = new.request("server/discover", json!({})).await;
    let mut wanted = wanted;
    wanted["extensions"] = json!({"io.modelcontextprotocol/tasks": {}});
    assert_eq!(discovered["result"]["capabilities"], wanted, "{discovered}");
    assert!(discovered["result"]["instructions"].as_str().unwrap().contains("check_work"));
    assert_eq!(fixture.woken.load(Ordering::SeqCst), 0, "a probe wakes nobody");
    let listed = new.request("tools/list", json!({})).await;
    assert_eq!(listed["result"]["tools"].as_array().unwrap().len(), 8, "{listed}");
    assert_eq!(listed["result"]["cacheScope"], "private");
    assert_eq!(fixture.woken.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn work_goes_from_assignment_to_its_result_by_the_schemas() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let listed = client.request("tools/list", json!({})).await;
    let tools = listed["result"]["tools"].as_array().unwrap().clone();
    let tool = |name: &str| tools.iter().find(|tool| tool["name"] == name).unwrap().clone();
    assert!(tool("assign_work")["description"].as_str().unwrap().ends_with("Agents:\n- **worker** (local): Does what it is told"));

    let agents = client.call("list_available_agents", json!({"query": "TOLD", "capability": ""})).await;
    validate(&tool("list_available_agents"), &agents);
    assert_eq!(agents["agents"][0]["name"], "worker");
    assert_eq!(agents["agents"][0]["load"], json!({"running": 0, "waiting": 0}));
    let schema = client.call("get_agent_schema", json!({"agent_name": "worker"})).await;
    validate(&tool("get_agent_schema"), &schema);
    assert_eq!(schema["limits"]["timeout"], "5m");

    let assigned = client.call("assign_work", json!({"agent_name": "worker", "task": "do it", "priority": "3"})).await;
    validate(&tool("assign_work"), &assigned);
    assert_eq!(assigned["status"], "ASSIGNED");
    assert_eq!(assigned["run_id"], format!("{}-1", assigned["root_run_id"].as_str().unwrap()));
    let second = client.call("assign_work", json!({"agent_name": "worker", "task": "do more"})).await;
    assert_eq!(second["root_run_id"], assigned["root_run_id"], "one connection, one root");
    let id = &assigned["work_id"];
    let pending = client.call("check_work", json!({"work_id": id})).await;
    validate(&tool("check_work"), &pending);
    assert_eq!((&pending["status"], &pending["event"]), (&json!("PENDING"), &json!("WORK_ASSIGNED")));
    let everything = client.call("check_work", json!({})).await;
    validate(&tool("check_work"), &everything);
    assert_eq!(everything["outstanding"], 2);

    fixture.completes(id, json!({"found": 3})).await;
    for verb in ["check_work", "await_work", "await_work"] {
        let done = client.call(verb, json!({"work_id": id})).await;
        validate(&tool(verb), &done);
        assert_eq!((&done["status"], &done["result"]), (&json!("COMPLETE"), &json!({"found": 3})));
        assert_eq!((&done["event"], &done["duration_ms"], &done["attempt"]), (&json!("WORK_COMPLETE"), &json!(7), &json!(1)));
    }
    let both = client.call("check_work", json!({"work_ids": [id, second["work_id"]]})).await;
    validate(&tool("check_work"), &both);
    assert_eq!(both["works"][1]["status"], "PENDING");
    let tree = client.call("check_work", json!({"run_id": assigned["root_run_id"]})).await;
    validate(&tool("check_work"), &tree);
    assert_eq!(tree["works"].as_array().unwrap().len(), 2);
    let cancelled = client.call("cancel_work", json!({"work_id": second["work_id"], "reason": "enough"})).await;
    validate(&tool("cancel_work"), &cancelled);
    assert_eq!((&cancelled["status"], &cancelled["reason"]), (&json!("CANCELLED"), &json!("enough")));
    let late = client.call("cancel_work", json!({"work_id": id})).await;
    assert_eq!(late["status"], "COMPLETE");
    let nothing = client.call("check_work", json!({})).await;
    assert_eq!(nothing["outstanding"], 0);
    assert_eq!(nothing["settled_last"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn bad_arguments_are_tool_errors_that_say_what_to_do() {
    let fixture = Fixture::new();
    fixture.offer(&["worker", "writer"]).await;
    let mut client = fixture.client().await;
    let unknown = "0198f2c4-7d3e-7000-8000-1b2c3d4e5f60";
    let long = "x".repeat(65);
    let order = |further: Value| {
        let mut order = json!({"agent_name": "worker", "task": "t"});
        order.as_object_mut().unwrap().extend(further.as_object().unwrap().clone());
        order
    };
    let cases = [
        ("assign_work", json!({}), "agent_name is missing"),
        ("assign_work", json!({"agent_name": "worker"}), "task is missing"),
        ("assign_work", json!({"agent_name": "a.b", "task": "t"}), "'.' at position 2"),
        ("assign_work", json!({"agent_name": "a b", "task": "t"}), "' ' at position 2"),
        ("assign_work", json!({"agent_name": long, "task": "t"}), "65 characters"),
        ("assign_work", json!({"agent_name": "worke", "task": "t"}), "closest first: worker, writer"),
        ("assign_work", json!({"agent_name": ["worker"], "task": "t"}), "agent_name must be a text"),
        ("assign_work", order(json!({"priority": 1.5})), "priority must be a whole number"),
        ("assign_work", order(json!({"priority": -9_000_000_000_000_000_000_i64})), "out of bounds"),
        ("assign_work", order(json!({"priority": 1e300})), "priority must be a whole number"),
        ("assign_work", order(json!({"timeout": "soon"})), "is not a duration"),
        ("assign_work", order(json!({"timeout": -5})), "timeout must be a duration"),
        ("assign_work", order(json!({"timeout": "0s"})), "out of bounds"),
        ("assign_work", order(json!({"context": [1]})), "context must be a JSON object"),
        ("assign_work", order(json!({"station": "x.y"})), "station name"),
        ("assign_work", order(json!({"station": "elsewhere"})), "held by station here"),
        ("assign_work", order(json!({"run_id": "nope"})), "not a run id"),
        ("assign_work", order(json!({"run_id": unknown})), "no run"),
        ("assign_work", order(json!({"idempotency_key": ""})), "1 to 256 characters"),
        ("await_work", json!({}), "both missing"),
        ("await_work", json!({"work_ids": []}), "both missing"),
        ("await_work", json!({"work_id": unknown}), "no work"),
        ("await_work", json!({"work_id": "42"}), "not a work id"),
        ("await_work", json!({"work_id": unknown, "mode": "some"}), "mode must be \"all\" or \"any\""),
        ("await_work", json!({"work_id": unknown, "timeout": "45"}), "is not a duration"),
        ("check_work", json!({"work_id": {"id": 1}}), "work_id must be a text"),
        ("check_work", json!({"work_ids": [unknown]}), "no work"),
        ("check_work", json!({"lines": "1-4"}), "read the result of one work"),
        ("check_work", json!({"work_id": unknown, "lines": "1-4", "grep": "x"}), "more than one"),
        ("check_work", json!({"work_id": unknown, "lines": "a-b"}), "lines"),
        ("check_work", json!({"run_id": unknown}), "no run"),
        ("cancel_work", json!({}), "work_id is missing"),
        ("cancel_work", json!({"work_id": unknown}), "no work"),
        ("answer_work", json!({"work_id": unknown}), "answer is missing"),
        ("answer_work", json!({"work_id": unknown, "answer": "yes"}), "no work"),
        ("escalate", json!({"reason": "help"}), "which work escalates"),
        ("escalate", json!({"work_id": unknown}), "reason is missing"),
        ("escalate", json!({"work_id": unknown, "reason": "r", "needs": "god"}), "needs must be"),
        ("get_agent_schema", json!({}), "agent_name is missing"),
        ("get_agent_schema", json!({"agent_name": "größe"}), "'ö'"),
    ];
    for (tool, arguments, expected) in cases {
        let text = client.refused(tool, arguments.clone()).await;
        assert!(text.contains(expected), "{tool} {arguments}: {text}");
        assert!(text.contains(". "), "{tool} {arguments} says no next step: {text}");
    }
    let many: Vec<String> = (0..1001).map(|n| format!("0198f2c4-7d3e-7000-8000-{n:012}")).collect();
    for verb in ["await_work", "check_work"] {
        assert!(client.refused(verb, json!({"work_ids": many})).await.contains("at most 1000"));
    }
    let text = client.request("tools/call", json!({"name": "check_work", "arguments": ["x"]})).await;
    assert_eq!(text["result"]["isError"], true, "{text}");
    let none = client.request("tools/call", json!({"name": "no_such_tool", "arguments": {}})).await;
    assert_eq!(none["error"]["code"], -32602, "{none}");
    assert!(none["error"]["message"].as_str().unwrap().contains("assign_work"));
}

#[tokio::test]
async fn progress_rises_strictly_and_the_wait_ends_with_the_work() {
    let mut config = Config::default();
    config.lattice.work.progress_interval = crate::model::time::Span::millis(50);
    let fixture = Fixture::with(config);
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let id = client.assign("worker").await;
    let arguments = json!({"work_id": id, "timeout": "20s"});
    let request =
        client.begin("tools/call", json!({"name": "await_work", "arguments": arguments, "_meta": {"progressToken": "tok"}})).await;
    let first = client.notified("notifications/progress").await;
    assert!(first["params"]["message"].as_str().unwrap().starts_with("still working"), "{first}");
    fixture.happens(&id, 1, Kind::Accepted).await;
    for pct in [10.0, 20.0, 30.0] {
        fixture.happens(&id, 1, Kind::Progress { pct: Some(pct), message: Some("step\nby step".into()) }).await;
    }
    fixture.happens(&id, 1, Kind::Complete { result: Output::Inline(json!("done")), duration_ms: 1, checks: vec![] }).await;
    let answer = client.answer(request).await;
    assert_eq!(answer["result"]["structuredContent"]["result"], "done", "{answer}");
    let progress: Vec<&Value> =
        client.notifications.iter().filter(|n| n["method"] == "notifications/progress").map(|n| &n["params"]).collect();
    let mut last = first["params"]["progress"].as_f64().unwrap();
    for params in &progress {
        assert_eq!(params["progressToken"], "tok");
        let value = params["progress"].as_f64().unwrap();
        assert!(value > last, "{value} after {last}");
        last = value;
    }
    for text in ["10% step by step", "20% step by step", "30% step by step"] {
        assert!(progress.iter().any(|params| params["message"] == text), "no {text}: {progress:?}");
    }
}

#[tokio::test]
async fn a_wait_that_runs_out_or_is_cancelled_leaves_the_work_alone() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let id = client.assign("worker").await;
    let waited = client.call("await_work", json!({"work_id": id, "timeout": "20ms"})).await;
    assert_eq!((&waited["status"], &waited["note"]), (&json!("PENDING"), &json!("still working, call await_work again")));
    let request = client.begin("tools/call", json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "1h"}})).await;
    client.send(&json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": request}})).await;
    client.send(&json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}})).await;
    assert_eq!(client.call("check_work", json!({"work_id": id})).await["status"], "PENDING");
    // A wait in any mode ends with the first; one that hangs up ends its waits.
    let other = client.assign("worker").await;
    fixture.completes(&other, json!("x")).await;
    let any = client.call("await_work", json!({"work_ids": [id, other], "mode": "any", "timeout": "10s"})).await;
    assert_eq!(any["works"][1]["status"], "COMPLETE");
    assert!(any.get("note").is_none(), "{any}");
    client.begin("tools/call", json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "1h"}})).await;
    assert!(client.leave().await < Duration::from_secs(2));
}

#[tokio::test]
async fn a_question_is_seen_answered_and_the_asker_gets_the_answer() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let id = client.assign("worker").await;
    fixture.happens(&id, 1, Kind::Accepted).await;
    let work = fixture.dispatcher.check(id.as_str().unwrap().parse().unwrap()).await.unwrap();
    let bound = Bound { work_id: work.work_id, run_id: work.run_id.clone(), attempt: 1 };
    let mut agent = fixture.connect(fixture.server.with_caller(Caller::bound(bound)), Size::mib(1));
    agent.modern = true;
    let asking =
        agent.begin("tools/call", json!({"name": "escalate", "arguments": {"reason": "which colour?", "context": {"of": "shed"}}})).await;
    let seen = client.call("await_work", json!({"work_id": id, "timeout": "10s"})).await;
    assert_eq!(seen["status"], "ESCALATED");
    assert_eq!(seen["question"], json!({"ask": 1, "reason": "which colour?", "context": {"of": "shed"}, "needs": "orchestrator"}));
    assert!(seen["next"].as_str().unwrap().contains("answer_work"));
    let brief = client.call("check_work", json!({})).await;
    assert_eq!(brief["counts"], json!({"ESCALATED": 1}));
    let after = client.call("answer_work", json!({"work_id": id, "answer": "red"})).await;
    assert_eq!(after["status"], "ACCEPTED");
    let answered = agent.answer(asking).await;
    assert_eq!(answered["result"]["structuredContent"]["answer"], "red", "{answered}");
    let again = client.refused("answer_work", json!({"work_id": id, "answer": "blue"})).await;
    assert!(again.contains("waits for no answer"), "{again}");
    // What the agent assigns is its run's child.
    let child = agent.call("assign_work", json!({"agent_name": "worker", "task": "paint"})).await;
    assert_eq!(child["run_id"], format!("{}-1", work.run_id));
}

#[tokio::test]
async fn a_large_result_stands_as_digest_size_and_link() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let (small, large, huge) = (client.assign("worker").await, client.assign("worker").await, client.assign("worker").await);
    fixture.completes(&small, json!("x".repeat(16 << 10))).await;
    fixture.completes(&large, json!("line\n".repeat(5000))).await;
    let bytes = "0123456789".repeat(20_000).into_bytes();
    let blob = fixture.dispatcher.transport().blobs.put(&mut bytes.as_slice(), Media::Text).await.unwrap();
    fixture.happens(&huge, 1, Kind::Accepted).await;
    fixture.happens(&huge, 1, Kind::Complete { result: Output::Blob(blob.clone()), duration_ms: 1, checks: vec![] }).await;
    assert!(client.call("check_work", json!({"work_id": small})).await["result"].is_string());
    let report = client.call("check_work", json!({"work_id": large})).await;
    assert!(report.get("result").is_none());
    assert_eq!(report["result_ref"]["size"], 25_000);
    assert_eq!(report["result_ref"]["sha256"].as_str().unwrap().len(), 64);
    let uri = report["result_ref"]["uri"].as_str().unwrap();
    assert_eq!(uri, format!("work://{}/result", large.as_str().unwrap()));
    let part = client.call("check_work", json!({"work_id": large, "lines": "2-3"})).await;
    assert_eq!(part["selection"]["total_bytes"], 25_000, "{part}");
    assert!(part["selection"]["text"].as_str().unwrap().contains("line\nline"), "{part}");
    let whole = client.request("resources/read", json!({"uri": uri})).await;
    assert_eq!(whole["result"]["contents"][0]["text"].as_str().unwrap().len(), 25_000);
    assert_eq!(whole["result"]["contents"][0]["mimeType"], "text/plain");
    let report = client.request("tools/call", json!({"name": "check_work", "arguments": {"work_id": huge}})).await;
    assert_eq!(report["result"]["structuredContent"]["result_ref"]["sha256"], blob.sha256);
    assert_eq!(report["result"]["content"][1]["type"], "resource_link");
    let refused = client.request("resources/read", json!({"uri": format!("work://{}/result", huge.as_str().unwrap())})).await;
    let text = refused["error"]["message"].as_str().unwrap();
    assert!(text.contains("200000 bytes") && text.contains("check_work"), "{text}");
    // Several at once stay within what one selection may give.
    let mut ids = vec![small.clone()];
    for _ in 0..8 {
        let id = client.assign("worker").await;
        fixture.completes(&id, json!("y".repeat(16 << 10))).await;
        ids.push(id);
    }
    let all = client.call("check_work", json!({"work_ids": ids})).await;
    assert!(all.to_string().len() < 32_000, "{}", all.to_string().len());
}

#[tokio::test]
async fn a_missing_result_was_dropped_by_age_only_if_it_is_that_old() {
    for (kept, wanted, unwanted) in [(Span::secs(86_400), "may be there alone", "by age ("), (Span::millis(0), "by age (", "may be there")]
    {
        let mut config = Config::default();
        config.lattice.storage.blob_max_age = kept;
        let fixture = Fixture::with(config);
        fixture.offer(&["worker"]).await;
        let mut client = fixture.client().await;
        let id = client.assign("worker").await;
        let result = Output::Blob(BlobRef { sha256: "ab".repeat(32), size: 300_000, media: Media::Text });
        fixture.happens(&id, 1, Kind::Accepted).await;
        fixture.happens(&id, 1, Kind::Complete { result, duration_ms: 1, checks: vec![] }).await;
        let part = client.refused("check_work", json!({"work_id": id, "bytes": "0-9"})).await;
        let uri = format!("work://{}/result", id.as_str().unwrap());
        let whole = client.request("resources/read", json!({"uri": uri})).await["error"]["message"].as_str().unwrap().to_owned();
        for text in [part, whole] {
            assert!(text.contains("no blob has the digest") && text.contains(wanted) && !text.contains(unwanted), "{text}");
        }
    }
}

#[tokio::test]
async fn a_failure_says_its_kind_and_that_it_is_dead() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let id = client.assign("worker").await;
    fixture.happens(&id, 1, Kind::Accepted).await;
    let failure = Failure { dead_letter: true, exit_code: Some(1), ..Failure::new(FailureKind::Agent, "it broke") };
    fixture.happens(&id, 1, Kind::Failed { failure, duration_ms: 3 }).await;
    let report = client.call("check_work", json!({"work_id": id})).await;
    assert_eq!(report["error"], json!({"kind": "agent", "message": "it broke", "exit_code": 1}));
    assert_eq!(report["dead_letter"], true);
}

#[tokio::test]
async fn calls_of_one_connection_run_at_once() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let id = client.assign("worker").await;
    let begun = Instant::now();
    for _ in 0..10 {
        client.begin("tools/call", json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "300ms"}})).await;
    }
    for _ in 0..10 {
        client.receive().await;
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn more_calls_than_there_is_room_for_are_refused_clearly() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let id = client.assign("worker").await;
    for _ in 0..1030 {
        client.begin("tools/call", json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "30s"}})).await;
    }
    let refused = client.receive().await;
    assert!(refused["result"]["content"][0]["text"].as_str().unwrap().starts_with("1024 requests of this connection"), "{refused}");
    fixture.completes(&id, json!("x")).await;
    for _ in 0..1029 {
        client.receive().await;
    }
}

#[tokio::test]
async fn what_is_not_json_or_too_long_does_not_end_the_server() {
    let fixture = Fixture::new();
    let mut client = fixture.raw(Size::kib(64));
    for (bytes, code) in [
        (&b"{not json}\n"[..], -32700),
        (b"\xff\xfe\"broken\"\n", -32700),
        (b"[]\n", -32600),
        (b"42\n", -32600),
        (b"{\"jsonrpc\": \"2.0\", \"id\": {}, \"method\": \"ping\"}\n", -32600),
    ] {
        client.send_bytes(bytes).await;
        let answer = client.receive().await;
        assert_eq!((&answer["error"]["code"], &answer["id"]), (&json!(code), &Value::Null), "{answer}");
        assert!(answer.as_object().unwrap().contains_key("id"));
    }
    // Before the handshake nothing but a request reaches rmcp, which would end.
    client.send_bytes(b"\n\r\n  \n{\"jsonrpc\": \"2.0\", \"method\": \"notifications/cancelled\", \"params\": {\"requestId\": 3}}\n").await;
    client.send_bytes(b"{\"jsonrpc\": \"2.0\", \"id\": 1, \"result\": {}}\n").await;
    let early = client.request("tools/list", json!({})).await;
    assert!(early["error"]["message"].as_str().unwrap().contains("_meta"), "{early}");
    let hello = json!({"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}});
    client.request("initialize", hello).await;
    let long = format!("{{\"jsonrpc\": \"2.0\", \"id\": 7, \"method\": \"ping\", \"params\": {{\"x\": \"{}\"}}}}\n", "x".repeat(10 << 20));
    client.send_bytes(long.as_bytes()).await;
    let answer = client.receive().await;
    assert_eq!(answer["error"]["code"], -32600, "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("65536 bytes"));
    let unreadable = json!({"jsonrpc": "2.0", "id": 8, "method": "tools/call"});
    client.send(&unreadable).await;
    let answer = client.receive().await;
    assert_eq!(answer["id"], 8, "{answer}");
    assert_eq!(client.request("tools/list", json!({})).await["result"]["tools"].as_array().unwrap().len(), 8);
    assert!(client.leave().await < Duration::from_secs(2));
}

#[tokio::test]
async fn a_line_as_long_as_allowed_is_served_and_the_last_one_needs_no_newline() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let task = "t".repeat(7 << 20);
    let assigned = client.call("assign_work", json!({"agent_name": "worker", "task": task})).await;
    assert_eq!(assigned["status"], "ASSIGNED");
    client.send_bytes(br#"{"jsonrpc": "2.0", "id": 99, "method": "ping"}"#).await;
    client.write.as_mut().unwrap().shutdown().await.unwrap();
    let answer = client.answer(99).await;
    assert_eq!(answer["result"], json!({}));
}

#[tokio::test]
async fn old_and_new_clients_hear_of_changed_agents() {
    let fixture = Fixture::new();
    let mut old = fixture.client().await;
    old.request("tools/list", json!({})).await;
    let mut new = fixture.raw(Size::mib(1));
    new.modern = true;
    let wanted = json!({"toolsListChanged": true, "promptsListChanged": true, "resourceSubscriptions": ["agent://worker", "bad"]});
    let listening = new.begin("subscriptions/listen", json!({"notifications": wanted})).await;
    let acknowledged = new.notified("notifications/subscriptions/acknowledged").await;
    assert_eq!(
        acknowledged["params"]["notifications"],
        json!({"toolsListChanged": true, "resourceSubscriptions": ["agent://worker"]}),
        "{acknowledged}"
    );
    // The acknowledgement leaves before the server begins to listen: what happens in between is told all the same.
    fixture.offer(&["worker"]).await;
    old.notified("notifications/tools/list_changed").await;
    old.notified("notifications/resources/list_changed").await;
    let told = new.notified("notifications/tools/list_changed").await;
    assert_eq!(told["params"]["_meta"]["io.modelcontextprotocol/subscriptionId"], listening, "{told}");
    assert_eq!(new.notified("notifications/resources/updated").await["params"]["uri"], "agent://worker");
    let listed = old.request("tools/list", json!({})).await;
    assert!(listed.to_string().contains("- **worker** (local)"));
    assert!(new.leave().await < Duration::from_secs(2), "a listening client does not hold up the end");
    old.leave().await;
    assert_eq!(fixture.tasks.len(), 0, "a connection leaves no task behind");
}

#[tokio::test]
async fn subscribers_hear_of_works_and_runs() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let assigned = client.call("assign_work", json!({"agent_name": "worker", "task": "t"})).await;
    let id = &assigned["work_id"];
    let work = format!("work://{}", id.as_str().unwrap());
    let run = format!("run://{}", assigned["root_run_id"].as_str().unwrap());
    for uri in [&work, &run, &work] {
        let subscribed = client.request("resources/subscribe", json!({"uri": uri})).await;
        assert_eq!(subscribed["result"], json!({}), "{subscribed}");
    }
    fixture.happens(id, 1, Kind::Accepted).await;
    let mut told = Vec::new();
    for _ in 0..2 {
        told.push(client.notified("notifications/resources/updated").await["params"]["uri"].as_str().unwrap().to_owned());
    }
    told.sort();
    assert_eq!(told, [run.clone(), work.clone()]);
    client.request("resources/unsubscribe", json!({"uri": run})).await;
    client.request("resources/unsubscribe", json!({"uri": "work://x"})).await;
    fixture.completes(id, json!("x")).await;
    assert_eq!(client.notified("notifications/resources/updated").await["params"]["uri"], work.as_str());
    let unknown = client.request("resources/subscribe", json!({"uri": "work://0198f2c4-7d3e-7000-8000-1b2c3d4e5f60"})).await;
    assert_eq!(unknown["error"]["code"], -32002, "{unknown}");
    // One who listens to a run of nobody keeps the reader, and goes with it.
    client.request("resources/subscribe", json!({"uri": run})).await;
    client.leave().await;
    let no_task_is_left = async {
        while !fixture.tasks.is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), no_task_is_left).await.expect("the reader of runs ends with the last who listens");
}

#[tokio::test]
async fn resources_are_listed_read_and_completed() {
    let fixture = Fixture::new();
    fixture.offer_all((0..150).map(|n| manifest(&format!("agent-{n:03}"), "Helps")).collect()).await;
    let mut client = fixture.client().await;
    let assigned = client.call("assign_work", json!({"agent_name": "agent-007", "task": "t", "context": {"a": 1}})).await;
    let id = assigned["work_id"].as_str().unwrap().to_owned();
    let first = client.request("resources/list", json!({})).await;
    assert_eq!(first["result"]["resources"].as_array().unwrap().len(), 100);
    let cursor = &first["result"]["nextCursor"];
    let second = client.request("resources/list", json!({"cursor": cursor})).await;
    let rest = second["result"]["resources"].as_array().unwrap();
    assert_eq!((rest.len(), &rest[50]["uri"]), (51, &json!(format!("work://{id}"))));
    assert!(second["result"].get("nextCursor").is_none());
    assert_eq!(client.request("resources/list", json!({"cursor": "zz"})).await["error"]["code"], -32602);
    assert_eq!(client.request("resources/templates/list", json!({})).await["result"]["resourceTemplates"].as_array().unwrap().len(), 4);

    let mut read = async |uri: String| {
        let answer = client.request("resources/read", json!({"uri": uri})).await;
        match answer["result"]["contents"][0]["text"].as_str() {
            Some(text) => serde_json::from_str(text).unwrap(),
            None => answer,
        }
    };
    assert_eq!(read("agent://agent-007".into()).await["name"], "agent-007");
    let work = read(format!("work://{id}")).await;
    assert_eq!((&work["context"], &work["history"][0]["event"]), (&json!({"a": 1}), &json!("WORK_ASSIGNED")));
    let root = assigned["root_run_id"].as_str().unwrap();
    let tree = read(format!("run://{root}")).await;
    assert_eq!(tree["children"][0]["work_id"], id.as_str());
    for uri in ["file:///etc/passwd", "agent://nobody", "work://0198f2c4-7d3e-7000-8000-1b2c3d4e5f60", &format!("work://{id}/result")] {
        let missing = read(uri.to_owned()).await;
        assert_eq!(missing["error"]["code"], -32002, "{missing}");
        assert!(missing["error"]["message"].as_str().unwrap().contains(". "), "{missing}");
    }

    let complete = |reference: Value, name: &str, value: &str| json!({"ref": reference, "argument": {"name": name, "value": value}});
    let template = |uri: &str| json!({"type": "ref/resource", "uri": uri});
    let mut completed = async |params: Value| client.request("completion/complete", params).await["result"]["completion"].clone();
    let all = completed(complete(template("agent://{name}"), "name", "")).await;
    assert_eq!((all["values"].as_array().unwrap().len(), &all["total"], &all["hasMore"]), (100, &json!(150), &json!(true)));
    assert_eq!(completed(complete(template("agent://{name}"), "name", "agent-14")).await["total"], 10);
    assert_eq!(completed(complete(template("work://{id}"), "id", &id[..8])).await["values"], json!([id]));
    assert_eq!(completed(complete(template("run://{id}"), "id", root)).await["values"], json!([root, format!("{root}-1")]));
    let prompt = json!({"type": "ref/prompt", "name": "delegate"});
    assert_eq!(completed(complete(prompt, "agents", "agent-001,agent-149")).await["values"], json!(["agent-001,agent-149"]));
}

#[tokio::test]
async fn prompts_are_filled_in() {
    let fixture = Fixture::new();
    fixture.offer(&["painter", "worker"]).await;
    let mut client = fixture.client().await;
    assert_eq!(client.request("prompts/list", json!({})).await["result"]["prompts"].as_array().unwrap().len(), 2);
    let orchestrate = client.request("prompts/get", json!({"name": "orchestrate"})).await;
    assert!(orchestrate["result"]["messages"][0]["content"]["text"].as_str().unwrap().contains("After losing context"));
    let goal = "paint {agents} the shed {which}";
    let delegate = client.request("prompts/get", json!({"name": "delegate", "arguments": {"goal": goal, "agents": "painter"}})).await;
    let text = delegate["result"]["messages"][0]["content"]["text"].as_str().unwrap();
    assert!(text.contains("- **painter** (local)") && !text.contains("worker"), "{text}");
    assert!(text.ends_with(goal), "{text}");
    for (arguments, expected) in [(json!({}), "goal"), (json!({"goal": "g", "agents": "nobody"}), "painter")] {
        let refused = client.request("prompts/get", json!({"name": "delegate", "arguments": arguments})).await;
        assert!(refused["error"]["message"].as_str().unwrap().contains(expected), "{refused}");
    }
}

#[tokio::test]
async fn a_station_that_cannot_wake_says_so() {
    let fixture = Fixture::new();
    let server = Server::new(Parts {
        dispatcher: fixture.dispatcher.clone(),
        caller: Caller::stateless(),
        wake: Arc::new(|| async { Err("the store is read-only".to_owned()) }.boxed()),
        stop: CancellationToken::new(),
        tasks: fixture.tasks.clone(),
    });
    let mut client = fixture.connect(server, Size::mib(1));
    client.modern = true;
    assert!(client.refused("check_work", json!({})).await.contains("the store is read-only"));
    let listed = client.request("tools/list", json!({})).await;
    assert!(listed["error"]["message"].as_str().unwrap().contains("read-only"), "{listed}");
}

#[tokio::test]
async fn a_question_asked_again_after_a_later_one_was_answered_is_seen_by_somebody() {
    let fixture = Fixture::new();
    fixture.offer(&["helper"]).await;
    let mut client = fixture.client().await;
    let id = fixture.asks_a_person(&mut client, "helper").await;
    let work_id: WorkId = id.as_str().unwrap().parse().unwrap();
    fixture.happens(&id, 2, Kind::Accepted).await;
    let colour = Ask { ask: 2, reason: "which colour?".into(), context: Value::Null, needs: Needs::Orchestrator, parked: false };
    fixture.happens(&id, 2, Kind::Escalate(colour)).await;
    fixture.happens(&id, 0, Kind::Answered { ask: 2, answer: json!("red"), by: None }).await;

    let again = || Question { reason: "may I?".into(), context: Value::Null, needs: Needs::Human };
    let agent = |attempt| {
        let run_id = format!("{}-1", uuid::Uuid::from_u128(1)).parse().unwrap();
        Caller::bound(Bound { work_id, run_id, attempt })
    };
    let events = async || fixture.dispatcher.history(work_id).await.unwrap().0.len();
    let before = events().await;
    // The process of an attempt that another one has followed is not heard, and says nothing on the log.
    assert!(matches!(fixture.dispatcher.escalate(&agent(1), None, again()).await, Err(crate::dispatcher::Error::NotRunning { .. })));
    assert_eq!(events().await, before);
    for _ in 0..2 {
        assert_eq!(fixture.dispatcher.escalate(&agent(2), None, again()).await.unwrap(), (work_id, 3));
    }
    assert_eq!(events().await, before + 1, "it is put once");
    let work = fixture.dispatcher.check(work_id).await.unwrap();
    assert_eq!(work.open_question().map(|open| (open.ask, open.needs)), Some((3, Needs::Human)));
}

#[tokio::test]
async fn an_earlier_question_to_a_person_is_not_answered_by_a_model_whose_user_can_be_asked() {
    let fixture = Fixture::new();
    fixture.offer(&["helper"]).await;
    let mut client = fixture.client_with(json!({ "elicitation": {} })).await;
    let id = fixture.asks_a_person(&mut client, "helper").await;
    let colour = Ask { ask: 2, reason: "which colour?".into(), context: Value::Null, needs: Needs::Orchestrator, parked: false };
    fixture.happens(&id, 2, Kind::Accepted).await;
    fixture.happens(&id, 2, Kind::Escalate(colour)).await;
    for _ in 0..2 {
        let refused = client.refused("answer_work", json!({ "work_id": id, "ask": 1, "answer": "yes" })).await;
        assert!(refused.contains("for the user"), "{refused}");
        let work = fixture.dispatcher.check(id.as_str().unwrap().parse().unwrap()).await.unwrap();
        if work.open_question().is_some() {
            client.call("answer_work", json!({ "work_id": id, "ask": 2, "answer": "red" })).await;
        }
    }
    let work = fixture.dispatcher.check(id.as_str().unwrap().parse().unwrap()).await.unwrap();
    let answers: Vec<_> = work.exchanges.iter().map(|exchange| exchange.answer.clone()).collect();
    assert_eq!(answers, [None, Some(json!("red"))]);
}

#[tokio::test]
async fn a_question_that_its_agent_died_with_stops_no_clock_once_the_work_goes_on() {
    let fixture = Fixture::new();
    fixture.offer(&["helper"]).await;
    let mut client = fixture.client().await;
    let id = fixture.asks_a_person(&mut client, "helper").await;
    let work_id: WorkId = id.as_str().unwrap().parse().unwrap();
    let later = || now().after(Duration::from_secs(3600));
    let open = fixture.dispatcher.check(work_id).await.unwrap();
    assert!(open.waited(later()) >= Duration::from_secs(3600));
    fixture.happens(&id, 2, Kind::Accepted).await;
    let goes_on = fixture.dispatcher.check(work_id).await.unwrap();
    assert!(goes_on.waited(later()) < Duration::from_secs(600));
}

#[tokio::test]
async fn an_escalation_by_a_client_that_names_the_work_is_queued_when_nobody_answers() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    let id = client.assign("worker").await;
    let early = client.refused("escalate", json!({"work_id": id, "reason": "r"})).await;
    assert!(early.contains("only work that runs can escalate"), "{early}");
    fixture.happens(&id, 1, Kind::Accepted).await;
    let ask = Ask { ask: 1, reason: "r".into(), context: Value::Null, needs: Needs::Human, parked: false };
    fixture.happens(&id, 1, Kind::Escalate(ask)).await;
    fixture.happens(&id, 0, Kind::Answered { ask: 1, answer: json!({"go": true}), by: None }).await;
    let answered = client.call("escalate", json!({"work_id": id, "reason": "r", "needs": "HUMAN"})).await;
    assert_eq!((&answered["answered"], &answered["answer"]), (&json!(true), &json!({"go": true})));
}

fn forms() -> Value {
    json!({"elicitation": {"form": {}}})
}

#[tokio::test]
async fn an_older_clients_person_answers_in_a_form_while_the_wait_goes_on() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client_with(forms()).await;
    let id = fixture.asks_a_person(&mut client, "worker").await;
    let waiting = client.begin("tools/call", json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "20s"}})).await;
    let form = client.asked("elicitation/create").await;
    assert!(form["params"]["message"].as_str().unwrap().contains("Agent worker asks"), "{form}");
    client.reply(&form, json!({"action": "accept", "content": {"answer": "go on"}})).await;
    // The wait outlives the form: the work goes on with the answer.
    while fixture.answer_of(&id).await != (Some(json!("go on")), Some(Needs::Human)) {
        tokio::task::yield_now().await;
    }
    fixture.happens(&id, 1, Kind::Complete { result: Output::Inline(json!("done")), duration_ms: 1, checks: Vec::new() }).await;
    let done = client.answer(waiting).await;
    assert_eq!(done["result"]["structuredContent"]["status"], "COMPLETE", "{done}");
}

#[tokio::test]
async fn a_form_that_is_not_filled_in_is_no_answer_and_one_that_is_late_is_taken_back() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client_with(forms()).await;
    let id = fixture.asks_a_person(&mut client, "worker").await;
    for says in
        [json!({"action": "decline"}), json!({"action": "cancel"}), json!({"action": "accept", "content": {}}), json!({"answer": "yes"})]
    {
        let waiting = client.begin("tools/call", json!({"name": "await_work", "arguments": {"work_id": id}})).await;
        let form = client.asked("elicitation/create").await;
        client.reply(&form, says.clone()).await;
        let seen = client.answer(waiting).await["result"]["structuredContent"].clone();
        assert_eq!(seen["status"], "ESCALATED", "{says}: {seen}");
        assert!(seen["note"].as_str().unwrap().contains("it stays open"), "{seen}");
        assert!(seen["next"].as_str().unwrap().contains("ask your user"), "{seen}");
    }
    // A model's word is no person's word where the person can be asked.
    let answering = client.begin("tools/call", json!({"name": "answer_work", "arguments": {"work_id": id, "answer": "yes"}})).await;
    let form = client.asked("elicitation/create").await;
    client.reply(&form, json!({"action": "decline"})).await;
    let refused = client.answer(answering).await;
    assert_eq!(refused["result"]["isError"], true, "{refused}");
    assert_eq!(fixture.answer_of(&id).await, (None, None));

    let waiting = client.begin("tools/call", json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "20s"}})).await;
    let form = client.asked("elicitation/create").await;
    let mut other = fixture.client().await;
    let told = other.call("check_work", json!({"work_id": id})).await;
    assert!(told["next"].as_str().unwrap().contains(&format!("lattice-mcp work answer {} TEXT", id.as_str().unwrap())), "{told}");
    other.call("answer_work", json!({"work_id": id, "answer": "they say go"})).await;
    let taken_back = client.notified("notifications/cancelled").await;
    assert_eq!(taken_back["params"]["requestId"], form["id"], "{taken_back}");
    fixture.happens(&id, 1, Kind::Complete { result: Output::Inline(json!("done")), duration_ms: 1, checks: Vec::new() }).await;
    assert_eq!(client.answer(waiting).await["result"]["structuredContent"]["status"], "COMPLETE");
}

#[tokio::test]
async fn a_newer_clients_person_answers_between_two_tries_and_nothing_else_passes() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.raw(Size::mib(1));
    (client.modern, client.capabilities) = (true, forms());
    let id = fixture.asks_a_person(&mut client, "worker").await;
    let call = json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "20s"}});
    let form = client.request("tools/call", call.clone()).await["result"].clone();
    assert_eq!(form["resultType"], "input_required", "{form}");
    let (key, request) = form["inputRequests"].as_object().unwrap().iter().next().unwrap();
    assert_eq!(request["method"], "elicitation/create");
    let retry = |state: &str, key: &str, said: Value, call: &Value| {
        let mut call = call.clone();
        call["requestState"] = state.into();
        call["inputResponses"] = json!({ key: said });
        call
    };
    let (state, yes) = (form["requestState"].as_str().unwrap(), json!({"action": "accept", "content": {"answer": "yes"}}));
    let mut tampered = state.to_owned();
    let last = tampered.pop().unwrap();
    tampered.push(if last == 'A' { 'B' } else { 'A' });
    let other = json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "21s"}});
    let escalate = json!({"name": "escalate", "arguments": {"work_id": id, "reason": "may I?"}});
    for (what, bad) in [
        ("a tampered state", retry(&tampered, key, yes.clone(), &call)),
        ("no state at all", retry("", key, yes.clone(), &call)),
        ("garbage", retry("yes", key, yes.clone(), &call)),
        ("another request", retry(state, key, yes.clone(), &other)),
        ("another tool", retry(state, key, yes.clone(), &escalate)),
        ("another question", retry(state, "x", yes.clone(), &call)),
        ("no form", retry(state, key, json!("yes"), &call)),
        ("a form without an answer", retry(state, key, json!({"action": "accept", "content": {"answer": 5}}), &call)),
    ] {
        let refused = client.request("tools/call", bad).await;
        assert_eq!(refused["error"]["code"], -32602, "{what}: {refused}");
    }
    let mut alone = call.clone();
    alone["inputResponses"] = json!({ key: yes });
    let refused = client.request("tools/call", alone).await;
    assert!(refused["error"]["message"].as_str().unwrap().contains("without the requestState"), "{refused}");
    // Another caller brings it back: an agent, whose connection is bound to a run.
    let work = fixture.dispatcher.check(id.as_str().unwrap().parse().unwrap()).await.unwrap();
    let bound = Bound { work_id: work.work_id, run_id: work.run_id.clone(), attempt: 1 };
    let mut agent = fixture.connect(fixture.server.with_caller(Caller::bound(bound)), Size::mib(1));
    (agent.modern, agent.capabilities) = (true, forms());
    let refused = agent.request("tools/call", retry(state, key, yes.clone(), &call)).await;
    assert_eq!(refused["error"]["code"], -32602, "{refused}");
    assert_eq!(fixture.answer_of(&id).await, (None, None));

    let waiting = client.begin("tools/call", retry(state, key, yes.clone(), &call)).await;
    while fixture.answer_of(&id).await != (Some(json!("yes")), Some(Needs::Human)) {
        tokio::task::yield_now().await;
    }
    fixture.happens(&id, 1, Kind::Complete { result: Output::Inline(json!("done")), duration_ms: 1, checks: Vec::new() }).await;
    assert_eq!(client.answer(waiting).await["result"]["structuredContent"]["status"], "COMPLETE");
    // The same form twice: it is told that its answer came too late.
    let late = client.request("tools/call", retry(state, key, yes, &call)).await;
    assert_eq!(late["result"]["isError"], true, "{late}");
}

#[tokio::test]
async fn a_form_that_was_sealed_while_the_server_was_away_is_taken_by_everybody_afterwards() {
    let fixture = Fixture::reaching(Config::default(), Reach::Connected);
    fixture.offer(&["worker"]).await;
    let modern = |server: Server| {
        let mut client = fixture.connect(server, Size::mib(1));
        (client.modern, client.capabilities) = (true, forms());
        client
    };
    let elsewhere = || modern(server(&fixture.dispatcher, &fixture.woken, &fixture.tasks));
    let mut client = modern(fixture.server.for_connection());
    let id = fixture.asks_a_person(&mut client, "worker").await;
    let call = json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "20s"}});
    let declined = |form: &Value| {
        let (mut call, key) = (call.clone(), form["inputRequests"].as_object().unwrap().keys().next().unwrap().clone());
        call["requestState"] = form["requestState"].clone();
        call["inputResponses"] = json!({ key: {"action": "decline"} });
        call
    };
    let form = client.request("tools/call", call.clone()).await["result"].clone();
    let refused = |answer: &Value| answer["error"]["code"] == -32602;
    // The lattice has another seal, and this one's stands beside it.
    let table = &fixture.dispatcher.transport().table;
    let ours = table.get(Bucket::Keys, SEAL).await.unwrap().unwrap().value;
    table.put(Bucket::Keys, SEAL, new_secret().into(), Expect::Any, None).await.unwrap();
    assert!(refused(&elsewhere().request("tools/call", declined(&form)).await), "it is not known there");
    assert!(!refused(&client.request("tools/call", declined(&form)).await), "who sealed it knows it");
    let beside = format!("{SEAL}.ours");
    table.put(Bucket::Keys, &beside, ours, Expect::Any, None).await.unwrap();
    assert!(!refused(&elsewhere().request("tools/call", declined(&form)).await));
    // From now on one seal is enough.
    table.remove(Bucket::Keys, &beside, Expect::Any).await.unwrap();
    let form = client.request("tools/call", call.clone()).await["result"].clone();
    assert!(!refused(&elsewhere().request("tools/call", declined(&form)).await));
}

#[tokio::test]
async fn a_form_that_a_newer_clients_person_declines_is_not_shown_again_in_that_wait() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.raw(Size::mib(1));
    (client.modern, client.capabilities) = (true, forms());
    let id = fixture.asks_a_person(&mut client, "worker").await;
    let mut call = json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "20s"}});
    let form = client.request("tools/call", call.clone()).await["result"].clone();
    call["requestState"] = form["requestState"].clone();
    let key = form["inputRequests"].as_object().unwrap().keys().next().unwrap().clone();
    call["inputResponses"] = json!({ key: {"action": "decline"} });
    let seen = client.request("tools/call", call).await["result"]["structuredContent"].clone();
    assert_eq!(seen["status"], "ESCALATED", "{seen}");
    assert!(seen["next"].as_str().unwrap().contains("ask your user"), "{seen}");
}

#[tokio::test]
async fn of_two_who_answer_at_once_one_wins_and_the_other_is_told_also_when_they_say_the_same() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client().await;
    for _ in 0..20 {
        let id = fixture.asks_a_person(&mut client, "worker").await;
        let answer = json!({"name": "answer_work", "arguments": {"work_id": id, "answer": "yes"}});
        let (mut one, mut two) = (fixture.client().await, fixture.client().await);
        let (one, two) = tokio::join!(one.request("tools/call", answer.clone()), two.request("tools/call", answer));
        let refused: Vec<&Value> = [&one, &two].into_iter().filter(|answer| answer["result"]["isError"] == true).collect();
        assert_eq!(refused.len(), 1, "{one} {two}");
        assert!(refused[0].to_string().contains("was answered already"), "{}", refused[0]);
    }
    let id = fixture.asks_a_person(&mut client, "worker").await;
    let wrong = client.refused("answer_work", json!({"work_id": id, "answer": "yes", "ask": 2})).await;
    assert!(wrong.contains("has asked no question 2; question 1 is open"), "{wrong}");
    let wrong = client.refused("answer_work", json!({"work_id": id, "answer": "yes", "ask": -1})).await;
    assert!(wrong.contains("ask must be"), "{wrong}");
}

#[tokio::test]
async fn whoever_escalates_to_a_person_asks_their_own_user_where_they_can() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let mut client = fixture.client_with(forms()).await;
    let id = client.assign("worker").await;
    fixture.happens(&id, 1, Kind::Accepted).await;
    let question = json!({"work_id": id, "reason": "may I?", "needs": "human"});
    let asking = client.begin("tools/call", json!({"name": "escalate", "arguments": question})).await;
    let form = client.asked("elicitation/create").await;
    client.reply(&form, json!({"action": "decline"})).await;
    let queued = client.answer(asking).await["result"]["structuredContent"].clone();
    assert_eq!(queued["answered"], false, "{queued}");
    assert!(queued["note"].as_str().unwrap().contains("ask your user"), "{queued}");
    let asking = client.begin("tools/call", json!({"name": "escalate", "arguments": question})).await;
    let form = client.asked("elicitation/create").await;
    client.reply(&form, json!({"action": "accept", "content": {"answer": "yes"}})).await;
    let answered = client.answer(asking).await["result"]["structuredContent"].clone();
    assert_eq!((&answered["answered"], &answered["answer"]), (&json!(true), &json!("yes")));
    assert_eq!(fixture.answer_of(&id).await, (Some(json!("yes")), Some(Needs::Human)));
}

#[tokio::test]
async fn each_workspace_sees_its_own_works_and_what_is_new_to_it() {
    let fixture = Fixture::new();
    fixture.offer(&["worker"]).await;
    let owner = |name| Some(Owner::of(Principal::User, &Workspace::Named(name)));
    let at = |name| fixture.connect(fixture.server.with_caller(Caller::connection().owned_by(owner(name))), Size::mib(1));
    let (mut one, mut two) = (at("one"), at("two"));
    (one.modern, two.modern) = (true, true);
    let (done, open) = (one.assign("worker").await, one.assign("worker").await);
    fixture.completes(&done, json!(1)).await;
    let asking = fixture.asks_a_person(&mut one, "worker").await;
    let theirs = two.assign("worker").await;

    let seen = one.call("check_work", json!({})).await;
    assert_eq!(
        (&seen["outstanding"], &seen["settled_since_last_look"], &seen["of_other_workspaces"]),
        (&json!(2), &json!(1), &json!(1)),
        "{seen}"
    );
    assert_eq!((&seen["works"][0]["work_id"], &seen["works"][0]["question"]), (&asking, &json!("may I?")), "{seen}");
    assert_eq!((&seen["works"][1]["work_id"], &seen["works"][1]["status"]), (&open, &json!("PENDING")), "{seen}");
    assert_eq!((&seen["settled_last"][0]["work_id"], &seen["settled_last"][0]["new"]), (&done, &json!(true)), "{seen}");
    let mut again = at("one");
    again.modern = true;
    let seen = again.call("check_work", json!({})).await;
    assert_eq!((&seen["settled_since_last_look"], &seen["settled_last"][0]["new"]), (&json!(0), &Value::Null), "{seen}");
    let seen = two.call("check_work", json!({})).await;
    assert_eq!(
        (&seen["works"][0]["work_id"], &seen["outstanding"], &seen["settled_since_last_look"]),
        (&theirs, &json!(1), &json!(0)),
        "{seen}"
    );

    // An agent sees what it has assigned itself, and that counts as its orderer's.
    let work = fixture.dispatcher.check(open.as_str().unwrap().parse().unwrap()).await.unwrap();
    let bound = Bound { work_id: work.work_id, run_id: work.run_id.clone(), attempt: 1 };
    let mut agent = fixture.connect(fixture.server.with_caller(Caller::bound(bound)), Size::mib(1));
    agent.modern = true;
    assert_eq!(agent.call("check_work", json!({})).await["outstanding"], 0);
    let child = agent.assign("worker").await;
    assert_eq!(agent.call("check_work", json!({})).await["works"][0]["work_id"], child);
    assert_eq!(one.call("check_work", json!({})).await["outstanding"], 3);
    fixture.completes(&child, json!(2)).await;
    let seen = agent.call("check_work", json!({})).await;
    assert_eq!((&seen["outstanding"], &seen["settled_since_last_look"]), (&json!(0), &json!(1)), "{seen}");
    assert_eq!(agent.call("check_work", json!({})).await["settled_since_last_look"], 0);
}

fn knows_tasks() -> Value {
    json!({"elicitation": {}, "extensions": {"io.modelcontextprotocol/tasks": {}}})
}

fn soon_tasks() -> Config {
    let mut config = Config::default();
    config.mcp.task_after = Span::millis(50);
    config
}

impl Fixture {
    fn modern(&self, owner: &str, capabilities: Value) -> Client {
        let owner = Some(Owner::of(Principal::User, &Workspace::Named(owner)));
        let mut client = self.connect(self.server.with_caller(Caller::connection().owned_by(owner)), Size::mib(1));
        (client.modern, client.capabilities) = (true, capabilities);
        client
    }
}

impl Client {
    /// Waits for works, which becomes a task.
    async fn task(&mut self, arguments: Value) -> String {
        let made = self.request("tools/call", json!({"name": "await_work", "arguments": arguments})).await["result"].clone();
        assert_eq!((&made["resultType"], &made["status"]), (&json!("task"), &json!("working")), "{made}");
        assert_eq!((&made["ttlMs"], &made["pollIntervalMs"]), (&json!(86_400_000), &json!(1000)), "{made}");
        made["taskId"].as_str().unwrap().to_owned()
    }

    async fn of_task(&mut self, method: &str, id: &str, responses: Option<Value>) -> Value {
        let mut params = json!({"taskId": id});
        if let Some(responses) = responses {
            params["inputResponses"] = responses;
        }
        self.request(method, params).await
    }

    /// How a task stands.
    async fn stands(&mut self, id: &str) -> Value {
        self.of_task("tasks/get", id, None).await["result"].clone()
    }
}

#[tokio::test]
async fn a_wait_in_line_becomes_a_task_that_is_answered_and_ends_with_the_work() {
    let fixture = Fixture::with(soon_tasks());
    fixture.offer(&["worker"]).await;
    let mut client = fixture.modern("one", knows_tasks());
    let id = client.assign("worker").await;
    let task = client.task(json!({"work_id": id})).await;
    fixture.happens(&id, 1, Kind::Accepted).await;
    fixture.happens(&id, 1, Kind::Progress { pct: Some(50.0), message: Some("half way".into()) }).await;
    let working = client.stands(&task).await;
    assert_eq!((&working["status"], &working["resultType"]), (&json!("working"), &json!("complete")), "{working}");
    assert!(working["statusMessage"].as_str().unwrap().contains("half way"), "{working}");

    let ask = Ask { ask: 1, reason: "which colour?".into(), context: Value::Null, needs: Needs::Orchestrator, parked: false };
    fixture.happens(&id, 1, Kind::Escalate(ask)).await;
    let asking = client.stands(&task).await;
    assert_eq!(asking["status"], "input_required", "{asking}");
    let (key, request) = asking["inputRequests"].as_object().unwrap().iter().next().unwrap();
    assert_eq!(request["method"], "elicitation/create", "{asking}");
    for bad in [json!("blue"), json!({"action": "accept"}), json!({"action": "maybe"})] {
        let refused = client.of_task("tasks/update", &task, Some(json!({ key: bad }))).await;
        assert_eq!(refused["error"]["code"], -32602, "{refused}");
    }
    let ignored = client.of_task("tasks/update", &task, Some(json!({"unknown": {"action": "accept", "content": {"answer": "x"}}}))).await;
    assert_eq!(ignored["result"]["resultType"], "complete", "{ignored}");
    assert_eq!(fixture.answer_of(&id).await, (None, None));
    let blue = json!({ key: {"action": "accept", "content": {"answer": "blue"}} });
    let taken = client.of_task("tasks/update", &task, Some(blue.clone())).await;
    assert_eq!(taken["result"]["resultType"], "complete", "{taken}");
    assert_eq!(fixture.answer_of(&id).await, (Some(json!("blue")), Some(Needs::Human)));
    let twice = client.of_task("tasks/update", &task, Some(blue)).await;
    assert!(twice["error"]["message"].as_str().unwrap().contains("answered already"), "{twice}");
    assert_eq!(client.stands(&task).await["status"], "working");

    fixture.happens(&id, 1, Kind::Complete { result: Output::Inline(json!({"n": 1})), duration_ms: 3, checks: Vec::new() }).await;
    for _ in 0..2 {
        let done = client.stands(&task).await;
        assert_eq!((&done["status"], &done["result"]["structuredContent"]["result"]), (&json!("completed"), &json!({"n": 1})), "{done}");
        let ended = client.of_task("tasks/cancel", &task, None).await;
        assert_eq!(ended["result"]["resultType"], "complete", "an ended task stays as it is: {ended}");
    }
    // Settled work needs no task.
    let at_once = client.call("await_work", json!({"work_id": id})).await;
    assert_eq!(at_once["status"], "COMPLETE");
}

#[tokio::test]
async fn a_task_is_its_callers_alone_and_only_of_those_who_know_tasks() {
    let fixture = Fixture::with(soon_tasks());
    fixture.offer(&["worker"]).await;
    let mut client = fixture.modern("one", knows_tasks());
    let id = client.assign("worker").await;
    let task = client.task(json!({"work_ids": [id]})).await;
    assert_eq!(task.len(), 64);
    let work = fixture.dispatcher.check(id.as_str().unwrap().parse().unwrap()).await.unwrap();
    let bound = Bound { work_id: work.work_id, run_id: work.run_id.clone(), attempt: 1 };
    let mut agent = fixture.connect(fixture.server.with_caller(Caller::bound(bound)), Size::mib(1));
    (agent.modern, agent.capabilities) = (true, knows_tasks());
    let mut other = fixture.modern("two", knows_tasks());
    let mut tampered = task.clone().into_bytes();
    tampered[0] = if tampered[0] == b'0' { b'1' } else { b'0' };
    let tampered = String::from_utf8(tampered).unwrap();
    for method in ["tasks/get", "tasks/cancel", "tasks/update"] {
        let responses = || (method == "tasks/update").then(|| json!({}));
        for who in [&mut agent, &mut other] {
            let refused = who.of_task(method, &task, responses()).await;
            assert_eq!(refused["error"]["code"], -32602, "{method}: {refused}");
        }
        for guess in [tampered.as_str(), "", "1", "../x", &"é".repeat(9999), id.as_str().unwrap()] {
            let refused = client.of_task(method, guess, responses()).await;
            assert_eq!(refused["error"]["code"], -32602, "{method}: {refused}");
            assert!(refused.to_string().len() < 600, "{refused}");
        }
        let mut without = fixture.modern("one", forms());
        let refused = without.of_task(method, &task, responses()).await;
        assert_eq!(refused["error"]["code"], -32021, "{method}: {refused}");
        let mut old = fixture.client_with(knows_tasks()).await;
        let refused = old.of_task(method, &task, responses()).await;
        assert_eq!(refused["error"]["code"], -32601, "{method}: {refused}");
    }
    for mut waiting in [fixture.modern("one", forms()), fixture.client_with(knows_tasks()).await] {
        let in_line = waiting.call("await_work", json!({"work_id": id, "timeout": "200ms"})).await;
        assert!(in_line["note"].as_str().unwrap().contains("still working"), "{in_line}");
    }
    assert_eq!(client.stands(&task).await["status"], "working");
    // Another connection of the same caller is the same caller.
    assert_eq!(fixture.modern("one", knows_tasks()).stands(&task).await["status"], "working");
}

#[tokio::test]
async fn whoever_has_a_name_finds_their_tasks_and_forms_at_another_door() {
    let fixture = Fixture::with(soon_tasks());
    fixture.offer(&["worker"]).await;
    let [mut here, mut there, mut other] = [("ann", "one"), ("ann", "two"), ("bob", "one")].map(|(name, workspace)| {
        let owner = Owner::of(Principal::Http, &Workspace::Named(workspace));
        let access = Access { principal: access::Principal::of_token(name), scope: Some(Scope::Assign) };
        let caller = Caller::connection().owned_by(Some(owner)).with_access(Arc::new(access));
        let mut client = fixture.connect(fixture.server.with_caller(caller), Size::mib(1));
        (client.modern, client.capabilities) = (true, knows_tasks());
        client
    });
    let id = here.assign("worker").await;
    let task = here.task(json!({"work_id": id})).await;
    assert_eq!(there.stands(&task).await["status"], "working");
    assert_eq!(other.of_task("tasks/get", &task, None).await["error"]["code"], -32602);
    // Earlier versions bound it to the workspace of the door, too.
    let (table, key) = (fixture.store.transport().table, format!("task.{task}"));
    let row = table.get(Bucket::Keys, &key).await.unwrap().unwrap();
    let mut kept: Value = serde_json::from_slice(&row.value).unwrap();
    assert_eq!(kept["who"], "principal token:ann");
    let owner = Owner::of(Principal::Http, &Workspace::Named("one")).for_principal(&access::Principal::kept("token:ann"));
    kept["who"] = format!("owner {}", owner.as_str()).into();
    table.put(Bucket::Keys, &key, kept.to_string().into(), Expect::Revision(row.revision), None).await.unwrap();
    assert_eq!(here.stands(&task).await["status"], "working");
    assert_eq!(other.of_task("tasks/get", &task, None).await["error"]["code"], -32602);

    fixture.happens(&id, 1, Kind::Accepted).await;
    let ask = Ask { ask: 1, reason: "may I?".into(), context: Value::Null, needs: Needs::Human, parked: false };
    fixture.happens(&id, 1, Kind::Escalate(ask)).await;
    for client in [&mut here, &mut there, &mut other] {
        client.capabilities = forms();
    }
    let mut call = json!({"name": "await_work", "arguments": {"work_id": id, "timeout": "20s"}});
    let form = here.request("tools/call", call.clone()).await["result"].clone();
    let key = form["inputRequests"].as_object().unwrap().keys().next().unwrap();
    call["requestState"] = form["requestState"].clone();
    call["inputResponses"] = json!({ key: {"action": "accept", "content": {"answer": "yes"}} });
    assert_eq!(other.request("tools/call", call.clone()).await["result"]["isError"], true);
    assert_eq!(fixture.answer_of(&id).await, (None, None));
    let waiting = there.begin("tools/call", call).await;
    while fixture.answer_of(&id).await != (Some(json!("yes")), Some(Needs::Human)) {
        tokio::task::yield_now().await;
    }
    fixture.happens(&id, 1, Kind::Complete { result: Output::Inline(json!(1)), duration_ms: 1, checks: Vec::new() }).await;
    assert_eq!(there.answer(waiting).await["result"]["structuredContent"]["status"], "COMPLETE");
}

#[tokio::test]
async fn a_cancelled_task_ends_the_wait_and_not_the_work() {
    let fixture = Fixture::with(soon_tasks());
    fixture.offer(&["worker"]).await;
    let mut client = fixture.modern("one", knows_tasks());
    let id = client.assign("worker").await;
    let task = client.task(json!({"work_id": id})).await;
    let taken = client.of_task("tasks/cancel", &task, None).await;
    assert_eq!(taken["result"]["resultType"], "complete", "{taken}");
    assert_eq!(client.stands(&task).await["status"], "cancelled");
    let refused = client.of_task("tasks/update", &task, Some(json!({}))).await;
    assert!(refused["error"]["message"].as_str().unwrap().contains("cancelled"), "{refused}");
    assert_eq!(client.call("check_work", json!({"work_id": id})).await["status"], "PENDING");
    fixture.completes(&id, json!(1)).await;
    assert_eq!(client.stands(&task).await["status"], "cancelled", "what has ended stays as it is");
    assert_eq!(client.call("await_work", json!({"work_id": id})).await["result"], 1);
}

#[tokio::test]
async fn a_task_that_has_ended_stays_as_it_is() {
    let fixture = Fixture::with(soon_tasks());
    fixture.offer(&["worker"]).await;
    let mut client = fixture.modern("one", knows_tasks());
    let id = client.assign("worker").await;
    let declined = client.task(json!({"work_id": id})).await;
    let run_out = client.task(json!({"work_id": id, "timeout": "100ms"})).await;
    let ended = loop {
        let stands = client.stands(&run_out).await;
        if stands["status"] != "working" {
            break stands;
        }
    };
    assert!(ended["result"]["structuredContent"]["note"].as_str().unwrap().contains("still working"), "{ended}");
    fixture.happens(&id, 1, Kind::Accepted).await;
    let ask = Ask { ask: 1, reason: "may I?".into(), context: Value::Null, needs: Needs::Human, parked: false };
    fixture.happens(&id, 1, Kind::Escalate(ask)).await;
    let asking = client.stands(&declined).await;
    let key = asking["inputRequests"].as_object().unwrap().keys().next().unwrap().clone();
    client.of_task("tasks/update", &declined, Some(json!({ key: {"action": "decline"} }))).await;
    let seen = client.stands(&declined).await;
    assert_eq!((&seen["status"], &seen["result"]["structuredContent"]["status"]), (&json!("completed"), &json!("ESCALATED")), "{seen}");
    assert_eq!(fixture.answer_of(&id).await, (None, None));
    // A client without forms gets the question as the task's result.
    let mut formless = fixture.modern("one", json!({"extensions": {"io.modelcontextprotocol/tasks": {}}}));
    let told = formless.call("await_work", json!({"work_id": id})).await;
    assert!(told["next"].as_str().unwrap().contains("ask your user"), "{told}");
    formless.call("answer_work", json!({"work_id": id, "answer": "yes"})).await;
    fixture.happens(&id, 1, Kind::Complete { result: Output::Inline(json!("done")), duration_ms: 3, checks: Vec::new() }).await;
    for (task, was) in [(&declined, seen), (&run_out, ended)] {
        assert_eq!(client.stands(task).await["result"], was["result"], "it changed after its end");
    }
}
