//! A lattice on a real nats-server as a fixture, with a clock that stands still until time is let pass.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use lattice_mcp::config::Storage;
use lattice_mcp::model::output::Media;
use lattice_mcp::model::time::Timestamp;
use lattice_mcp::transport::mesh::{self, Place};
use lattice_mcp::transport::nats::{Nats, Options};
use lattice_mcp::transport::{Error, Filter, Item, Position, Pushed, Reach, Transport, Wire, local};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Fixture;
use crate::lifecycle::eventually;
use crate::nats_server::NatsServer;

const BLOB_MAX_AGE: Duration = Duration::from_secs(86400);

/// A server, and handles on one lattice of it.
pub(crate) struct Server {
    clock: Arc<AtomicI64>,
    first: Nats,
    others: Vec<Nats>,
    server: NatsServer,
}

/// Connects, and opens the lattice. A server that has just started may not listen yet, nor serve JetStream, and tells nobody when.
async fn open(port: u16, clock: &Arc<AtomicI64>) -> Nats {
    let begun = Instant::now();
    loop {
        match open_now(port, clock).await {
            Ok(nats) => return nats,
            Err(error) => assert!(begun.elapsed() < Duration::from_secs(60), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn open_now(port: u16, clock: &Arc<AtomicI64>) -> Result<Nats, Box<dyn std::error::Error + Send + Sync>> {
    let (raised, interruptions) = watch::channel(0);
    let raised = Arc::new(raised);
    let told = async_nats::ConnectOptions::new().event_callback(move |event| {
        let raised = Arc::clone(&raised);
        async move {
            if matches!(event, async_nats::Event::Connected | async_nats::Event::SlowConsumer(_)) {
                raised.send_modify(|count| *count += 1);
            }
        }
    });
    let client = told.connect(format!("127.0.0.1:{port}")).await?;
    let clock = Arc::clone(clock);
    let options = Options {
        lattice: "x".parse()?,
        station: "here".parse()?,
        settings: lattice_mcp::config::Nats::default(),
        blob_max_age: BLOB_MAX_AGE,
        clock: Arc::new(move || Timestamp::from_millis(clock.load(Ordering::SeqCst))),
        interruptions,
        denials: tokio::sync::broadcast::Sender::new(16),
        tasks: TaskTracker::new(),
    };
    Ok(Nats::open(client, options).await?)
}

#[async_trait]
impl super::Fixture for Server {
    async fn start() -> Self {
        let server = NatsServer::start();
        let clock = Arc::new(AtomicI64::new(1_800_000_000_000));
        Self { first: open(server.port(), &clock).await, others: Vec::new(), clock, server }
    }

    fn transport(&self) -> Transport {
        self.first.transport()
    }

    async fn second(&mut self) -> Transport {
        let second = open(self.server.port(), &self.clock).await;
        let transport = second.transport();
        self.others.push(second);
        transport
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.clock.load(Ordering::SeqCst))
    }

    async fn pass(&self, span: Duration) {
        self.clock.fetch_add(i64::try_from(span.as_millis()).unwrap(), Ordering::SeqCst);
    }

    async fn restart(&mut self) -> Transport {
        self.others.clear();
        self.first.close();
        self.server.kill();
        self.server.revive();
        self.first = open(self.server.port(), &self.clock).await;
        self.first.transport()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_pusher_did_not_come_to_say_is_said_by_whoever_pushes_again() {
    let server = Server::start().await;
    let transport = server.transport();
    let (station, id) = (super::station("there"), super::work());
    let item = super::item(id, "lane", 0, server.now());
    assert_eq!(transport.queue.push(&station, item.clone(), 10, None).await.unwrap(), Pushed::New);
    for _ in 0..2 {
        let record = super::status(id, "assigned");
        assert_eq!(transport.queue.push(&station, item.clone(), 10, Some(record)).await.unwrap(), Pushed::Known);
        let entries = super::everything(&transport, Filter::Work(id)).await;
        assert_eq!(super::bodies(&entries), ["assigned"], "once, and not twice");
    }
}

/// The room that is kept for what is on its way to a hook is free again, however that ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_push_leaves_no_room_taken_however_it_ends() {
    let mut server = Server::start().await;
    let transport = server.transport();
    let (station, now) = (super::station("there"), server.now());
    let push = async |item: Item, limit: u32| transport.queue.push(&station, item, limit, None).await;
    let new = || super::item(super::work(), "lane", 0, now);
    let has_room = async |after: &str| {
        // What was given up may have arrived all the same, and waits then.
        eventually(&format!("there is room for one more after what {after}"), async || {
            let waiting: u32 = transport.queue.load(&station).await.ok()?.iter().map(|lane| lane.waiting).sum();
            match push(new(), waiting + 1).await {
                Ok(Pushed::New) => Some(()),
                Err(Error::Full { .. } | Error::Unreachable(_) | Error::Unanswered(_)) => None,
                other => panic!("{other:?}"),
            }
        })
        .await;
    };
    let first = new();
    assert_eq!(push(first.clone(), 9).await.unwrap(), Pushed::New);
    has_room("was accepted").await;
    // The server knows it again, though the hook does not.
    assert!(transport.queue.remove(&station, first.id, Vec::new()).await.unwrap());
    assert_eq!(push(first, 9).await.unwrap(), Pushed::Known);
    has_room("was a duplicate").await;
    let too_large = Item { lane: "l".repeat(2 << 20), ..new() };
    assert!(matches!(push(too_large, 9).await, Err(Error::Store(_))));
    has_room("was refused").await;
    // After each of its steps: at once, or when what that one waited for has come.
    for waits in [false, true] {
        let mut steps = 1;
        loop {
            let (mut given_up, mut taken) = (Box::pin(push(new(), 99)), 0);
            let was_pushed = std::future::poll_fn(|cx| {
                if taken == steps {
                    return Poll::Ready(false);
                }
                taken += 1;
                match given_up.as_mut().poll(cx) {
                    Poll::Pending if taken == steps && !waits => Poll::Ready(false),
                    polled => polled.map(|pushed| pushed.unwrap() == Pushed::New),
                }
            })
            .await;
            drop(given_up);
            has_room(&format!("its caller gave up after {steps} steps")).await;
            match was_pushed {
                false => steps += 1,
                // Whoever is put off within its first step may find that all has been answered by the end of it.
                true if steps == 1 => {}
                true => break,
            }
        }
    }
    server.server.kill();
    assert!(push(new(), 99).await.is_err());
    server.server.revive();
    has_room("could not be sent").await;
}

async fn purge_blobs(server: &Server) {
    let client = async_nats::connect(server.server.url()).await.unwrap();
    let stream = Wire::new("x".parse().unwrap()).blob_stream();
    client.request(format!("$JS.API.STREAM.PURGE.{stream}"), "".into()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_is_old_or_gone_is_not_taken_for_one_that_is_there() {
    let mut server = Server::start().await;
    let (t, second) = (server.transport(), server.second().await);
    let blob = t.blobs.put(&mut &b"the same bytes"[..], Media::Text).await.unwrap();
    assert!(t.blobs.is_fresh(&blob.sha256).await.unwrap() && second.blobs.is_fresh(&blob.sha256).await.unwrap());
    server.pass(BLOB_MAX_AGE / 2).await;
    assert!(!t.blobs.is_fresh(&blob.sha256).await.unwrap(), "it is there, but ends before what is put now does");
    assert_eq!(second.blobs.size(&blob.sha256).await.unwrap(), blob.size);
    t.blobs.put(&mut &b"the same bytes"[..], Media::Text).await.unwrap();
    assert!(second.blobs.is_fresh(&blob.sha256).await.unwrap(), "whoever knew the old one finds the new one");

    purge_blobs(&server).await;
    assert!(!t.blobs.is_fresh(&blob.sha256).await.unwrap());
    t.blobs.put(&mut &b"the same bytes"[..], Media::Text).await.unwrap();
    assert_eq!(server.second().await.blobs.size(&blob.sha256).await.unwrap(), blob.size);
}

/// A station that keeps what it makes on its own disk as well has to send it to the server all the same, each time that is due.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_result_again_stays_on_the_server_as_long_as_any_other() {
    let mut server = Server::start().await;
    let (dir, second) = (tempfile::tempdir().unwrap(), server.second().await);
    let near = local::open(dir.path(), &Storage::default()).unwrap();
    let place = Place { station: super::station("here"), instance: super::holder(), forwards: false, goes_on: |_| true };
    let (_opened, far) = watch::channel(Some(server.transport()));
    let reach = watch::channel(Reach::Connected).1;
    let mesh = mesh::compose(near.transport(), far, reach, place, TaskTracker::new(), CancellationToken::new());
    let put = async || mesh.blobs.put(&mut &b"the same bytes"[..], Media::Text).await.unwrap();
    let blob = put().await;
    assert!(second.blobs.is_fresh(&blob.sha256).await.unwrap());
    server.pass(BLOB_MAX_AGE / 2).await;
    put().await;
    assert!(second.blobs.is_fresh(&blob.sha256).await.unwrap(), "it ends with the first one");
    purge_blobs(&server).await;
    put().await;
    assert_eq!(server.second().await.blobs.size(&blob.sha256).await.unwrap(), blob.size);

    // Nor does a record stand on the server without what it names.
    purge_blobs(&server).await;
    let body = serde_json::json!({ "result_ref": blob }).to_string();
    mesh.log.append(vec![super::response(super::work(), body)]).await.unwrap();
    assert_eq!(server.second().await.blobs.size(&blob.sha256).await.unwrap(), blob.size);
    near.close();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_two_processes_forward_stands_once_and_is_marked() {
    let mut server = Server::start().await;
    let (first, second) = (server.transport(), server.second().await);
    let id = super::work();
    let mut follow = second.log.follow(Filter::AllWork, Position::default()).await.unwrap();
    let said = super::response(id, "said at home");
    for transport in [&first, &second] {
        transport.log.forward(said.clone(), &format!("{id}.7")).await.unwrap();
    }
    first.log.append(vec![super::status(id, "said elsewhere")]).await.unwrap();
    let read = first.log.read(Filter::Work(id), Position::default(), 9).await.unwrap();
    let heard = super::collect(&mut follow, 2).await;
    for entries in [read, heard] {
        assert_eq!(super::bodies(&entries), ["said at home", "said elsewhere"]);
        assert_eq!(entries.iter().map(|entry| entry.is_forwarded).collect::<Vec<_>>(), [true, false]);
    }
}
