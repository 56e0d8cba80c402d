use super::*;
use crate::model::turn::Turn;
use crate::telemetry::new_work_id;
use crate::transport::{Item, Subject};

#[tokio::test]
async fn a_word_on_a_work_of_which_much_was_said_comes_home_once() {
    // The order, and more than is read at once, or was ever compared.
    const MUCH: usize = 1 + 5000;
    let sides = Sides::new();
    let (near, far) = (&sides.near, &sides.far);
    let station: StationId = "here".parse().unwrap();
    let (server, opened) = watch::channel(None);
    let mesh = sides.process(opened, true);
    let (id, turn) = (new_work_id(), Turn::new("here", 0, now(), Duration::from_secs(1)));
    let deadline = now().after(Duration::from_secs(600));
    let item = Item { id, lane: "a".into(), turn, deadline, held_back: false, beside: None, body: "{}".into() };
    let word = |text: &'static str| Record { subject: Subject::Status(id), body: text.into() };
    mesh.queue.push(&station, item, 9, Some(word("{}"))).await.unwrap();
    let said = |n: usize| Record { subject: Subject::Response(id), body: n.to_string().into() };
    near.log.append((1..MUCH).map(said).collect()).await.unwrap();

    let (mut here, mut there) = (
        near.log.follow(Filter::AllWork, Position::default()).await.unwrap(),
        far.log.follow(Filter::AllWork, Position::default()).await.unwrap(),
    );
    let upto = async |follow: &mut Box<dyn crate::transport::Follow>, seen: &mut Vec<Bytes>, count: usize| {
        while seen.len() < count {
            let more = tokio::time::timeout(Duration::from_secs(60), follow.next()).await.expect("more").unwrap();
            seen.extend(more.into_iter().map(|entry| entry.body));
        }
    };
    let (mut heard, mut forwarded) = (Vec::new(), Vec::new());
    server.send_replace(Some(far.clone()));
    upto(&mut there, &mut forwarded, MUCH).await;
    far.log.append(vec![word("first")]).await.unwrap();
    // What comes home is forwarded like all else, and that is all.
    upto(&mut there, &mut forwarded, MUCH + 2).await;
    far.log.append(vec![word("second")]).await.unwrap();
    upto(&mut here, &mut heard, MUCH + 2).await;
    assert_eq!(heard[MUCH..], [Bytes::from("first"), Bytes::from("second")]);
    sides.cancel.cancel();
    sides.tasks.close();
    sides.tasks.wait().await;
}

/// A folder that has had a server all along, and a process that forwards between the two and brings back.
struct Joined {
    sides: Sides,
    mesh: Transport,
    _server: watch::Sender<Option<Transport>>,
    station: StationId,
}

impl Joined {
    /// `server` makes the server's log.
    async fn new(server: impl FnOnce(Arc<dyn Log>) -> Arc<dyn Log>) -> Self {
        let sides = Sides::new();
        sides.near.table.put(Bucket::Keys, FORWARDED, Bytes::from("0"), Expect::Absent, None).await.unwrap();
        let far = &sides.far;
        let (server, opened) = watch::channel(Some(Transport { log: server(Arc::clone(&far.log)), ..far.clone() }));
        let mesh = sides.process(opened, true);
        Self { sides, mesh, _server: server, station: "here".parse().unwrap() }
    }

    /// A work that another process of this folder has pushed here, and of which the server knows.
    async fn work(&self) -> WorkId {
        let (id, turn) = (new_work_id(), Turn::new("here", 0, now(), Duration::from_secs(1)));
        let deadline = now().after(Duration::from_secs(600));
        let item = Item { id, lane: "a".into(), turn, deadline, held_back: false, beside: None, body: "{}".into() };
        self.sides.near.queue.push(&self.station, item, 9, Some(said(id, "{}"))).await.unwrap();
        heard(&self.sides.far, id, "{}").await;
        id
    }

    async fn close(self) {
        self.sides.cancel.cancel();
        self.sides.tasks.close();
        self.sides.tasks.wait().await;
    }
}

fn said(id: WorkId, text: &'static str) -> Record {
    Record { subject: Subject::Status(id), body: text.into() }
}

/// Waits until a side has heard this of a work.
async fn heard(side: &Transport, id: WorkId, text: &str) {
    let mut follow = side.log.follow(Filter::Work(id), Position::default()).await.unwrap();
    let heard = async { while !follow.next().await.unwrap().iter().any(|entry| entry.body == text) {} };
    tokio::time::timeout(Duration::from_secs(20), heard).await.unwrap_or_else(|_| panic!("nobody hears {text}"));
}

#[tokio::test]
async fn who_leaves_the_servers_log_out_makes_nobody_deaf_to_it() {
    let joined = Joined::new(|far| far).await;
    joined.sides.far.log.append(vec![said(new_work_id(), "before")]).await.unwrap();
    // As whoever is not sure that this is the log which it has read.
    let beyond = Position { seq: 0, far: u64::MAX };
    assert!(joined.mesh.log.read(Filter::AllWork, beyond, 9).await.unwrap().is_empty());
    // It is looked whether any work lives here, and none does.
    let queue = &joined.sides.near.queue;
    queue.pause(&joined.station, "a", now()).await.unwrap();
    for _ in 0..20 {
        assert!(queue.load(&joined.station).await.unwrap().iter().all(|lane| lane.waiting + lane.held == 0));
    }
    let id = joined.work().await;
    joined.sides.far.log.append(vec![said(id, "elsewhere")]).await.unwrap();
    heard(&joined.sides.near, id, "elsewhere").await;
    joined.close().await;
}

/// A server's log, of which another one can take the place.
struct Lossy {
    log: Mutex<Arc<dyn Log>>,
    lost: std::sync::atomic::AtomicU64,
}

impl Lossy {
    fn log(&self) -> Arc<dyn Log> {
        Arc::clone(&self.log.lock().unwrap())
    }

    fn lose(&self, instead: Arc<dyn Log>) {
        *self.log.lock().unwrap() = instead;
        self.lost.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }
}

#[async_trait::async_trait]
impl Log for Lossy {
    async fn append(&self, records: Vec<Record>) -> Result<Position> {
        self.log().append(records).await
    }

    async fn read(&self, filter: Filter, after: Position, limit: usize) -> Result<Vec<Entry>> {
        self.log().read(filter, after, limit).await
    }

    async fn follow(&self, filter: Filter, after: Position) -> Result<Box<dyn crate::transport::Follow>> {
        self.log().follow(filter, after).await
    }

    async fn replay(&self, filter: Filter) -> Result<(Vec<Entry>, Box<dyn crate::transport::Follow>)> {
        self.log().replay(filter).await
    }

    async fn head(&self) -> Result<Position> {
        self.log().head().await
    }

    fn epoch(&self) -> u64 {
        self.lost.load(std::sync::atomic::Ordering::SeqCst)
    }

    async fn identity(&self) -> Result<String> {
        Ok(self.epoch().to_string())
    }
}

#[tokio::test]
async fn what_is_said_on_the_log_that_takes_the_place_of_a_lost_one_is_heard() {
    let mut server = None;
    let joined = Joined::new(|log| server.insert(Arc::new(Lossy { log: Mutex::new(log), lost: Default::default() })).clone()).await;
    let (server, others) = (server.unwrap(), Sides::new());
    let anew = &others.near;
    joined.sides.far.log.append((0..9).map(|_| said(new_work_id(), "before")).collect()).await.unwrap();
    let id = joined.work().await;
    joined.sides.far.log.append(vec![said(id, "first")]).await.unwrap();
    heard(&joined.sides.near, id, "first").await;
    // Whoever listens is not told by the reader that it has.
    server.lose(Arc::clone(&anew.log));
    anew.log.append(vec![said(id, "second")]).await.unwrap();
    heard(&joined.sides.near, id, "second").await;
    joined.close().await;
}
