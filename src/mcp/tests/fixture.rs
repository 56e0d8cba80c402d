//! The lattice whose server the tests speak to, and what happens in it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::FutureExt;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::client::Client;
use crate::agents::Catalog;
use crate::audit::Audit;
use crate::config::Config;
use crate::dispatcher::{Caller, Dispatcher};
use crate::mcp::{Parts, Server, serve_lines};
use crate::model::agent::{Definition, Limits, Manifest, Prompt, RunnerSpec};
use crate::model::event::{Ask, Event, Kind, Needs, Side};
use crate::model::id::WorkId;
use crate::model::output::Output;
use crate::model::size::Size;
use crate::registry::{Identity, Registry};
use crate::runs::Runs;
use crate::telemetry::{new_instance, now};
use crate::transport::local::{self, Local};
use crate::transport::{Reach, Transport};
use crate::works::{Works, record};

pub(in crate::mcp) fn manifest(name: &str, description: &str) -> Manifest {
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

pub(super) fn catalog(manifests: Vec<Manifest>) -> Arc<Catalog> {
    let definition =
        |manifest: Manifest| Definition { manifest, prompt: Prompt::Plain(String::new()), runner: RunnerSpec::Echo, source: None };
    let definitions: BTreeMap<_, _> = manifests.into_iter().map(|m| (m.name.clone(), Arc::new(definition(m)))).collect();
    Arc::new(Catalog { definitions, problems: Vec::new() })
}

/// A lattice of one station, in a folder of its own.
pub(super) struct Fixture {
    pub(super) dispatcher: Dispatcher,
    pub(super) server: Server,
    pub(super) tasks: TaskTracker,
    pub(super) woken: Arc<AtomicUsize>,
    pub(super) store: Local,
    _dir: tempfile::TempDir,
}

/// A server that knows nothing but what its dispatcher does.
pub(super) fn server(dispatcher: &Dispatcher, woken: &Arc<AtomicUsize>, tasks: &TaskTracker) -> Server {
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
    pub(super) fn new() -> Self {
        Self::with(Config::default())
    }

    pub(super) fn with(config: Config) -> Self {
        Self::reaching(config, Reach::Alone)
    }

    /// Whose transport says that it reaches this.
    pub(super) fn reaching(config: Config, reach: Reach) -> Self {
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

    pub(super) async fn offer(&self, names: &[&str]) {
        self.offer_all(names.iter().map(|name| manifest(name, "Does what it is told")).collect()).await;
    }

    pub(super) async fn offer_all(&self, manifests: Vec<Manifest>) {
        self.dispatcher.registry().offer(catalog(manifests)).await.unwrap();
    }

    /// A connection that has said hello in the older protocol.
    pub(super) async fn client(&self) -> Client {
        self.client_with(json!({})).await
    }

    pub(super) async fn client_with(&self, capabilities: Value) -> Client {
        let mut client = self.raw(Size::mib(16));
        let hello = json!({"protocolVersion": "2025-11-25", "capabilities": capabilities, "clientInfo": {"name": "test", "version": "0"}});
        let welcome = client.request("initialize", hello).await;
        assert_eq!(welcome["result"]["serverInfo"]["name"], "lattice-mcp", "{welcome}");
        client.send(&json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
        client
    }

    /// A connection of which nothing has been said yet.
    pub(super) fn raw(&self, line_max: Size) -> Client {
        self.connect(self.server.for_connection(), line_max)
    }

    pub(super) fn connect(&self, server: Server, line_max: Size) -> Client {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let (read, write) = tokio::io::split(theirs);
        let served = self.tasks.spawn(serve_lines(server, read, write, line_max));
        let (read, write) = tokio::io::split(ours);
        Client::new(read, write, served)
    }

    /// What a leaf, or somebody else, says of a work.
    pub(super) async fn happens(&self, id: &Value, attempt: u32, kind: Kind) {
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
    pub(super) async fn asks_a_person(&self, client: &mut Client, agent: &str) -> Value {
        let id = client.assign(agent).await;
        self.happens(&id, 1, Kind::Accepted).await;
        let ask = Ask { ask: 1, reason: "may I?".into(), context: Value::Null, needs: Needs::Human, parked: false };
        self.happens(&id, 1, Kind::Escalate(ask)).await;
        id
    }

    pub(super) async fn answer_of(&self, id: &Value) -> (Option<Value>, Option<Needs>) {
        let work = self.dispatcher.check(id.as_str().unwrap().parse().unwrap()).await.unwrap();
        let exchange = work.exchanges.last().unwrap();
        (exchange.answer.clone(), exchange.answered_by.as_ref().map(|by| by.who))
    }

    pub(super) async fn completes(&self, id: &Value, result: Value) {
        self.happens(id, 1, Kind::Accepted).await;
        self.happens(id, 1, Kind::Complete { result: Output::Inline(result), duration_ms: 7, checks: vec![] }).await;
    }
}
