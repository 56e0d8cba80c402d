use tokio::sync::watch;

use super::*;
use crate::model::turn::Turn;
use crate::telemetry::{new_work_id, now};
use crate::transport::mesh::Sides;
use crate::transport::{Change, Item, Pushed, Record, Subject, Transport};

/// Two processes of a station, with one store between them: the server is away for the first one only.
struct Folder {
    sides: Sides,
    cut_off: Transport,
    connected: Transport,
    server: watch::Sender<Option<Transport>>,
}

fn here_station() -> crate::model::id::StationId {
    "here".parse().unwrap()
}

impl Folder {
    fn new() -> Self {
        let sides = Sides::new();
        let (cut_off, server) = sides.mesh(None);
        let connected = sides.mesh(Some(sides.far.clone())).0;
        Self { sides, cut_off, connected, server }
    }

    async fn homes(&self, id: WorkId) -> (bool, bool) {
        let has = async |store: &Transport| !store.log.read(Filter::Work(id), Position::default(), 9).await.unwrap().is_empty();
        (has(&self.sides.near).await, has(&self.sides.far).await)
    }

    /// Waits until a row of the server's, or of this machine's, names a work.
    async fn names(&self, side: &Transport, key: &str, id: WorkId) -> Row {
        let mut watch = side.table.watch(Bucket::Keys).await.unwrap();
        let found = async {
            loop {
                for change in watch.next().await.unwrap() {
                    if let Change::Put(row) = change
                        && row.key == key
                        && work_of(&row.value) == Some(id)
                    {
                        return row;
                    }
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), found).await.expect("the row comes to name the work")
    }
}

fn row(id: WorkId) -> Bytes {
    Bytes::from(serde_json::json!({ "work_id": id, "done": false }).to_string())
}

async fn bind(process: &Transport, key: &str) -> Result<(WorkId, u64)> {
    let id = new_work_id();
    process.table.put(Bucket::Keys, key, row(id), Expect::Absent, None).await.map(|revision| (id, revision))
}

async fn bound(process: &Transport, key: &str) -> Option<WorkId> {
    process.table.get(Bucket::Keys, key).await.unwrap().and_then(|row| work_of(&row.value))
}

async fn take_over(process: &Transport, key: &str, id: WorkId) -> Result<u64> {
    let found = process.table.get(Bucket::Keys, key).await.unwrap().expect("it is noted");
    assert_eq!(work_of(&found.value), Some(id));
    process.table.put(Bucket::Keys, key, row(id), Expect::Revision(found.revision), None).await
}

async fn push(process: &Transport, id: WorkId) -> Result<Pushed> {
    let turn = Turn::new("me", 0, now(), Duration::from_secs(60));
    let body = Bytes::from_static(b"{}");
    let item = Item { id, lane: "a".into(), turn, deadline: now().after(Duration::from_secs(60)), held_back: false, beside: None, body };
    let announce = Record { subject: Subject::Status(id), body: "{}".into() };
    process.queue.push(&here_station(), item, 9, Some(announce)).await
}

async fn note_done(process: &Transport, key: &str, id: WorkId) {
    let value = Bytes::from(serde_json::json!({ "work_id": id, "done": true }).to_string());
    process.table.put(Bucket::Keys, key, value, Expect::Any, None).await.unwrap();
}

fn is_conflict<T>(result: &Result<T>) -> bool {
    matches!(result, Err(Error::Conflict { .. }))
}

#[tokio::test]
async fn a_key_has_one_work_in_a_folder_though_the_server_is_away_for_one_of_its_processes() {
    let folder = Folder::new();
    let Folder { sides, cut_off, connected, .. } = &folder;
    let Sides { near, far, .. } = sides;
    // Who reaches the server is first.
    let (id, _) = bind(connected, "first").await.unwrap();
    assert!(is_conflict(&bind(cut_off, "first").await), "two works under one key");
    assert_eq!(bound(cut_off, "first").await, Some(id));
    assert!(matches!(take_over(cut_off, "first", id).await, Err(Error::Unreachable(_))), "it may be on its way to the server");
    assert!(matches!(push(connected, id).await, Ok(Pushed::New)));
    note_done(connected, "first", id).await;
    assert!(is_conflict(&bind(cut_off, "first").await), "nor later");
    // Who does not is.
    let (id, revision) = bind(cut_off, "second").await.unwrap();
    assert!(is_conflict(&bind(connected, "second").await), "two works under one key");
    assert_eq!(bound(connected, "second").await, Some(id));
    // It gives up: the key is free for both.
    assert!(cut_off.table.remove(Bucket::Keys, "second", Expect::Revision(revision)).await.unwrap());
    let (id, revision) = bind(connected, "second").await.unwrap();
    assert_eq!(bound(cut_off, "second").await, Some(id));
    assert!(connected.table.remove(Bucket::Keys, "second", Expect::Revision(revision)).await.unwrap());
    for side in [near, far] {
        assert!(side.table.get(Bucket::Keys, "second").await.unwrap().is_none());
    }
    // Another station was first on the server: the key is that one's, and this machine's row is not in its way.
    let theirs = new_work_id();
    far.table.put(Bucket::Keys, "third", row(theirs), Expect::Absent, None).await.unwrap();
    assert!(is_conflict(&bind(connected, "third").await));
    assert_eq!(bound(connected, "third").await, Some(theirs));
    assert!(near.table.get(Bucket::Keys, "third").await.unwrap().is_none());
}

#[tokio::test]
async fn a_key_of_a_process_that_died_leads_to_its_order_and_to_no_second_work() {
    let folder = Folder::new();
    let Folder { sides, cut_off, connected, .. } = &folder;
    let Sides { near, far, .. } = sides;
    // Between the row here and the server's.
    let id = new_work_id();
    near.table.put(Bucket::Keys, "first", row(id), Expect::Absent, None).await.unwrap();
    take_over(connected, "first", id).await.unwrap();
    assert_eq!(work_of(&far.table.get(Bucket::Keys, "first").await.unwrap().unwrap().value), Some(id));
    assert!(matches!(push(connected, id).await, Ok(Pushed::New)));
    // Between both rows and the hook: whoever goes on with it must have the row here first.
    let (id, _) = bind(connected, "second").await.unwrap();
    let again = sides.mesh(Some(far.clone())).0;
    take_over(&again, "second", id).await.unwrap();
    assert!(matches!(push(&again, id).await, Ok(Pushed::New)));
    assert!(matches!(push(connected, id).await, Ok(Pushed::Known)), "it was not dead after all");
    // An older program knows the server's row only.
    let id = new_work_id();
    far.table.put(Bucket::Keys, "third", row(id), Expect::Absent, None).await.unwrap();
    take_over(connected, "third", id).await.unwrap();
    assert!(is_conflict(&bind(cut_off, "third").await), "two works under one key");
    // It noted the key while the server was away, and another station has used it since.
    let (_, revision) = bind(cut_off, "fourth").await.unwrap();
    let theirs = new_work_id();
    far.table.put(Bucket::Keys, "fourth", row(theirs), Expect::Absent, None).await.unwrap();
    take_over(connected, "fourth", theirs).await.unwrap();
    assert!(is_conflict(&cut_off.table.remove(Bucket::Keys, "fourth", Expect::Revision(revision)).await));
}

#[tokio::test]
async fn what_the_server_knows_by_its_key_never_gets_a_home_here() {
    let folder = Folder::new();
    let (id, revision) = {
        folder.server.send_replace(Some(folder.sides.far.clone()));
        bind(&folder.cut_off, "k").await.unwrap()
    };
    folder.server.send_replace(None);
    assert!(matches!(push(&folder.cut_off, id).await, Err(Error::Unreachable(_))));
    assert_eq!(folder.homes(id).await, (false, false));
    // Nothing was done: it may be ordered anew, here.
    folder.server.send_replace(Some(folder.sides.far.clone()));
    assert!(folder.cut_off.table.remove(Bucket::Keys, "k", Expect::Revision(revision)).await.unwrap());
    folder.server.send_replace(None);
    let (id, _) = bind(&folder.cut_off, "k").await.unwrap();
    assert!(matches!(push(&folder.cut_off, id).await, Ok(Pushed::New)));
    assert_eq!(folder.homes(id).await, (true, false));
}

#[tokio::test]
async fn keys_that_were_used_on_both_sides_of_an_outage_lead_everybody_to_one_work() {
    let folder = Folder::new();
    let Folder { sides, cut_off, connected, .. } = &folder;
    let Sides { near, far, .. } = sides;
    let mut here = Vec::new();
    for key in ["alone", "both", "ghost"] {
        let (id, _) = bind(cut_off, key).await.unwrap();
        assert!(matches!(push(cut_off, id).await, Ok(Pushed::New)));
        note_done(cut_off, key, id).await;
        here.push(id);
    }
    // Elsewhere one key leads to a work too, and one to nothing: whoever bound it has died.
    let (theirs, ghost) = (new_work_id(), new_work_id());
    let elsewhere = far.clone();
    elsewhere.table.put(Bucket::Keys, "both", row(theirs), Expect::Absent, None).await.unwrap();
    elsewhere.table.put(Bucket::Keys, "ghost", row(ghost), Expect::Absent, None).await.unwrap();
    push(&elsewhere, theirs).await.unwrap();
    assert_eq!(bound(connected, "ghost").await, Some(here[2]), "what was made here counts, and no second one");

    let _forwarding = sides.process(watch::channel(Some(far.clone())).1, true);
    for (key, id) in [("alone", here[0]), ("ghost", here[2])] {
        let told = folder.names(far, key, id).await;
        assert!(is_done(&told.value) && !lives_here(&told.value), "nobody takes it for an order to go on with: {:?}", told.value);
    }
    folder.names(near, "both", theirs).await;
    for process in [cut_off, connected] {
        assert_eq!(bound(process, "both").await, Some(theirs));
    }
    assert_eq!(work_of(&elsewhere.table.get(Bucket::Keys, "both").await.unwrap().unwrap().value), Some(theirs));
    assert_eq!((folder.homes(here[1]).await.0, folder.homes(theirs).await), (true, (false, true)), "both go on");
}

#[tokio::test]
async fn a_key_whose_work_is_about_to_be_pushed_here_is_told_to_the_server_once_it_is() {
    let folder = Folder::new();
    let Folder { sides, cut_off, .. } = &folder;
    let Sides { near, far, .. } = sides;
    // Whoever pushes the first one has come as far as to say that it will.
    let (first, _) = bind(cut_off, "first").await.unwrap();
    let marker = format!("{APART}.first");
    near.table.put(Bucket::Keys, &marker, Bytes::new(), Expect::Any, None).await.unwrap();
    let (second, _) = bind(cut_off, "second").await.unwrap();
    push(cut_off, second).await.unwrap();
    // Keys are looked at in their order.
    let _forwarding = sides.process(watch::channel(Some(far.clone())).1, true);
    folder.names(far, "second", second).await;
    assert!(near.table.get(Bucket::Keys, &marker).await.unwrap().is_some(), "nobody would tell the server of its key");
    // It goes on from there.
    near.table.put(Bucket::Keys, "first", claimed(&row(first)), Expect::Any, None).await.unwrap();
    push(&sides.process(watch::channel(None).1, false), first).await.unwrap();
    folder.names(far, "first", first).await;
    assert!(folder.homes(first).await.0);
}

#[tokio::test]
async fn a_work_whose_key_was_noted_while_the_server_was_away_gets_one_home() {
    let folder = Folder::new();
    let Folder { cut_off, connected, .. } = &folder;
    // It is taken over before whoever noted it has pushed it.
    let (id, revision) = bind(cut_off, "first").await.unwrap();
    take_over(connected, "first", id).await.unwrap();
    assert!(matches!(push(connected, id).await, Ok(Pushed::New)));
    assert!(matches!(push(cut_off, id).await, Err(Error::Unreachable(_))));
    assert_eq!(folder.homes(id).await, (false, true));
    let forgotten = cut_off.table.remove(Bucket::Keys, "first", Expect::Revision(revision)).await;
    assert!(matches!(forgotten, Err(Error::Conflict { .. })), "the key is not its own any more: {forgotten:?}");

    // And after that.
    let (id, _) = bind(cut_off, "second").await.unwrap();
    assert!(matches!(push(cut_off, id).await, Ok(Pushed::New)));
    take_over(connected, "second", id).await.unwrap();
    assert!(matches!(push(connected, id).await, Ok(Pushed::Known)));
    assert_eq!(folder.homes(id).await, (true, false));
}
