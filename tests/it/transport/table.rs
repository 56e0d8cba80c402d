//! Named values with revisions and expiry.

use std::collections::BTreeSet;
use std::time::Instant;

use lattice_mcp::transport::{Bucket, Change, Error, Expect, Watch};
use tokio::task::JoinSet;

use super::*;

const AGENTS: Bucket = Bucket::Agents;

async fn put(t: &Transport, key: &str, value: &'static str) -> u64 {
    t.table.put(AGENTS, key, value.into(), Expect::Any, None).await.unwrap()
}

async fn value(t: &Transport, key: &str) -> Option<Bytes> {
    t.table.get(AGENTS, key).await.unwrap().map(|row| row.value)
}

async fn keys(t: &Transport) -> Vec<String> {
    t.table.list(AGENTS).await.unwrap().into_iter().map(|row| row.key).collect()
}

fn is_conflict<T>(result: Result<T, Error>, at: &str) -> bool {
    matches!(result, Err(Error::Conflict { bucket: "agents", key }) if key == at)
}

/// What a watcher is told, up to the change that is waited for.
async fn until(watch: &mut Box<dyn Watch>, last: impl Fn(&Change) -> bool) -> Vec<Change> {
    let mut all: Vec<Change> = Vec::new();
    while !all.iter().any(&last) {
        let next = within(watch.next()).await.unwrap();
        assert!(!next.is_empty(), "a watcher was told nothing");
        all.extend(next);
    }
    all
}

/// A change as a short text.
fn said(changes: &[Change]) -> Vec<String> {
    let say = |change: &Change| match change {
        Change::Put(row) => format!("{}={}", row.key, String::from_utf8_lossy(&row.value)),
        Change::Removed(key) => format!("-{key}"),
        Change::Loaded => "loaded".to_owned(),
    };
    changes.iter().map(say).collect()
}

pub(crate) async fn rows_are_listed_by_the_first_part_of_their_keys(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    for key in ["north.1", "north.2", "northern.3", "south.1", "north"] {
        t.table.put(Bucket::Stations, key, key.into(), Expect::Any, None).await.unwrap();
    }
    t.table.remove(Bucket::Stations, "north.2", Expect::Any).await.unwrap();
    t.table.put(Bucket::Stations, "north.4", "short".into(), Expect::Any, Some(Duration::from_millis(1))).await.unwrap();
    fixture.pass(Duration::from_secs(1)).await;
    let keys = async |head: &str| -> Vec<String> {
        t.table.list_of(Bucket::Stations, head).await.unwrap().into_iter().map(|row| row.key).collect()
    };
    assert_eq!(keys("north").await, ["north.1"]);
    assert_eq!(keys("south").await, ["south.1"]);
    assert!(keys("west").await.is_empty());
}

pub(crate) async fn what_is_put_is_there(fixture: &mut impl Fixture) {
    let (t, second) = (fixture.transport(), fixture.second().await);
    assert_eq!(t.table.get(AGENTS, "scan").await.unwrap(), None);
    let first = put(&t, "scan", "one").await;
    let row = second.table.get(AGENTS, "scan").await.unwrap().unwrap();
    assert_eq!((row.key.as_str(), &row.value[..], row.revision), ("scan", &b"one"[..], first));
    let other = put(&second, "a b/ü", "two").await;
    assert!(other > first);
    let third = put(&t, "scan", "three").await;
    assert!(third > other);
    assert_eq!(keys(&second).await, ["a b/ü", "scan"]);
    assert_eq!(value(&second, "scan").await.unwrap(), "three");
}

pub(crate) async fn expectations_are_kept(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let put = |value: &'static str, expect| t.table.put(AGENTS, "k", value.into(), expect, None);
    assert!(is_conflict(put("x", Expect::Revision(1)).await, "k"));
    let first = put("a", Expect::Absent).await.unwrap();
    assert!(is_conflict(put("x", Expect::Absent).await, "k"));
    let second = put("b", Expect::Revision(first)).await.unwrap();
    assert!(is_conflict(put("x", Expect::Revision(first)).await, "k"));
    assert_eq!(value(&t, "k").await.unwrap(), "b");
    assert!(put("c", Expect::Any).await.unwrap() > second);
}

pub(crate) async fn one_of_many_creates_a_key(fixture: &mut impl Fixture) {
    let handles = [fixture.transport(), fixture.second().await];
    let mut tasks = JoinSet::new();
    for n in 0..64u32 {
        let t = handles[n as usize % 2].clone();
        tasks.spawn(async move {
            let mine = Bytes::from(n.to_string());
            match t.table.put(AGENTS, "name", mine.clone(), Expect::Absent, None).await {
                Ok(_) => Some(mine),
                Err(Error::Conflict { .. }) => None,
                Err(error) => panic!("{error}"),
            }
        });
    }
    let winners: Vec<Bytes> = within(tasks.join_all()).await.into_iter().flatten().collect();
    assert_eq!(winners.len(), 1);
    assert_eq!(value(&handles[0], "name").await, Some(winners[0].clone()));
}

pub(crate) async fn one_of_many_changes_a_row(fixture: &mut impl Fixture) {
    let handles = [fixture.transport(), fixture.second().await];
    put(&handles[0], "count", "0").await;
    let mut tasks = JoinSet::new();
    for n in 0..16usize {
        let t = handles[n % 2].clone();
        tasks.spawn(async move {
            loop {
                let row = t.table.get(AGENTS, "count").await.unwrap().unwrap();
                let n: u32 = std::str::from_utf8(&row.value).unwrap().parse().unwrap();
                let next = Bytes::from((n + 1).to_string());
                if t.table.put(AGENTS, "count", next, Expect::Revision(row.revision), None).await.is_ok() {
                    break;
                }
            }
        });
    }
    within(tasks.join_all()).await;
    assert_eq!(value(&handles[1], "count").await.unwrap(), "16");
}

pub(crate) async fn removing_keeps_to_what_is_expected(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    assert!(!t.table.remove(AGENTS, "k", Expect::Any).await.unwrap());
    assert!(!t.table.remove(AGENTS, "k", Expect::Revision(3)).await.unwrap());
    let revision = put(&t, "k", "v").await;
    assert!(is_conflict(t.table.remove(AGENTS, "k", Expect::Revision(revision + 1)).await, "k"));
    assert!(value(&t, "k").await.is_some());
    assert!(t.table.remove(AGENTS, "k", Expect::Revision(revision)).await.unwrap());
    assert_eq!(value(&t, "k").await, None);
    assert!(!t.table.remove(AGENTS, "k", Expect::Any).await.unwrap());
    let again = t.table.put(AGENTS, "k", "w".into(), Expect::Absent, None).await.unwrap();
    assert!(again > revision, "a revision came twice");
}

pub(crate) async fn buckets_do_not_mix(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    for bucket in Bucket::ALL {
        t.table.put(bucket, "k", bucket.name().into(), Expect::Absent, None).await.unwrap();
    }
    for bucket in Bucket::ALL {
        assert_eq!(t.table.list(bucket).await.unwrap()[0].value, bucket.name());
    }
    t.table.remove(Bucket::Keys, "k", Expect::Any).await.unwrap();
    assert_eq!(keys(&t).await, ["k"]);
}

pub(crate) async fn numbers_are_given_once(fixture: &mut impl Fixture) {
    let handles = [fixture.transport(), fixture.second().await];
    let mut tasks = JoinSet::new();
    for n in 0..64usize {
        let t = handles[n % 2].clone();
        tasks.spawn(async move { t.table.next(Bucket::Children, "run", 0, 1).await.unwrap() });
    }
    let numbers: BTreeSet<u64> = within(tasks.join_all()).await.into_iter().collect();
    assert_eq!(numbers, (1..=64).collect());
}

pub(crate) async fn numbers_begin_above_their_floor(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let next = |key: &'static str, floor| t.table.next(Bucket::Children, key, floor, 1);
    assert_eq!(next("a", 0).await.unwrap(), 1);
    assert_eq!(next("a", 0).await.unwrap(), 2);
    assert_eq!(next("b", 7).await.unwrap(), 8);
    assert_eq!(next("b", 3).await.unwrap(), 9);
    assert_eq!(next("b", 20).await.unwrap(), 21);
    let t = fixture.restart().await;
    assert_eq!(t.table.next(Bucket::Children, "a", 0, 1).await.unwrap(), 3);
    assert_eq!(t.table.next(Bucket::Children, "a", 0, 10).await.unwrap(), 4, "the first of ten");
    assert_eq!(t.table.next(Bucket::Children, "a", 0, 1).await.unwrap(), 14);
}

pub(crate) async fn a_row_expires(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let ttl = Some(Duration::from_secs(30));
    let revision = t.table.put(AGENTS, "k", "v".into(), Expect::Absent, ttl).await.unwrap();
    put(&t, "stays", "v").await;
    fixture.pass(Duration::from_secs(29)).await;
    assert!(value(&t, "k").await.is_some());
    fixture.pass(Duration::from_secs(1)).await;
    assert_eq!(value(&t, "k").await, None);
    assert_eq!(keys(&t).await, ["stays"]);
    assert!(is_conflict(t.table.put(AGENTS, "k", "x".into(), Expect::Revision(revision), None).await, "k"));
    assert!(!t.table.remove(AGENTS, "k", Expect::Any).await.unwrap());
    assert!(t.table.put(AGENTS, "k", "w".into(), Expect::Absent, None).await.unwrap() > revision);
}

pub(crate) async fn putting_again_keeps_a_row_alive(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let ttl = Some(Duration::from_secs(30));
    for _ in 0..3 {
        t.table.put(AGENTS, "k", "v".into(), Expect::Any, ttl).await.unwrap();
        fixture.pass(Duration::from_secs(20)).await;
    }
    assert!(value(&t, "k").await.is_some());
    put(&t, "k", "for good").await;
    fixture.pass(HOUR).await;
    assert!(value(&t, "k").await.is_some());
}

pub(crate) async fn a_watcher_gets_rows_then_loaded_then_changes(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    put(&t, "b", "1").await;
    let first = put(&t, "a", "1").await;
    put(&t, "gone", "1").await;
    t.table.remove(AGENTS, "gone", Expect::Any).await.unwrap();
    let mut watch = t.table.watch(AGENTS).await.unwrap();
    assert_eq!(said(&until(&mut watch, |change| *change == Change::Loaded).await), ["a=1", "b=1", "loaded"]);
    t.table.put(Bucket::Stations, "other", "bucket".into(), Expect::Any, None).await.unwrap();
    put(&t, "a", "2").await;
    t.table.remove(AGENTS, "a", Expect::Any).await.unwrap();
    put(&t, "a", "3").await;
    let changes = until(&mut watch, |change| said(std::slice::from_ref(change)) == ["a=3"]).await;
    assert_eq!(said(&changes), ["a=2", "-a", "a=3"]);
    assert!(matches!(&changes[0], Change::Put(row) if row.revision > first));
    let (changes, _) = tokio::join!(watch.next(), put(&t, "c", "1"));
    assert_eq!(said(&changes.unwrap()), ["c=1"]);
}

pub(crate) async fn a_watcher_of_an_empty_bucket_is_told_so(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let mut watch = t.table.watch(AGENTS).await.unwrap();
    assert_eq!(within(watch.next()).await.unwrap(), [Change::Loaded]);
}

pub(crate) async fn a_watcher_is_told_of_expiry(fixture: &mut impl Fixture) {
    let (t, second) = (fixture.transport(), fixture.second().await);
    t.table.put(AGENTS, "k", "v".into(), Expect::Absent, Some(Duration::from_secs(30))).await.unwrap();
    for t in [&t, &second] {
        let mut watch = t.table.watch(AGENTS).await.unwrap();
        until(&mut watch, |change| *change == Change::Loaded).await;
        fixture.pass(Duration::from_secs(31)).await;
        assert_eq!(said(&until(&mut watch, |change| *change == Change::Removed("k".into())).await), ["-k"]);
        t.table.put(AGENTS, "k", "v".into(), Expect::Absent, Some(Duration::from_secs(30))).await.unwrap();
    }
}

pub(crate) async fn a_watcher_sees_another_process_within_50_ms(fixture: &mut impl Fixture) {
    let (t, second) = (fixture.transport(), fixture.second().await);
    let mut watch = second.table.watch(AGENTS).await.unwrap();
    until(&mut watch, |change| *change == Change::Loaded).await;
    let mut best = Duration::MAX;
    for _ in 0..20 {
        put(&t, "k", "v").await;
        let start = Instant::now();
        assert_eq!(said(&within(watch.next()).await.unwrap()), ["k=v"]);
        best = best.min(start.elapsed());
        t.table.remove(AGENTS, "k", Expect::Any).await.unwrap();
        assert_eq!(said(&within(watch.next()).await.unwrap()), ["-k"]);
    }
    assert!(best <= Duration::from_millis(50), "the quickest of twenty took {best:?}");
}

pub(crate) async fn a_watcher_that_falls_behind_ends_up_right(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    put(&t, "gone", "0").await;
    put(&t, "stays", "0").await;
    let mut watch = t.table.watch(AGENTS).await.unwrap();
    until(&mut watch, |change| *change == Change::Loaded).await;
    t.table.remove(AGENTS, "gone", Expect::Any).await.unwrap();
    for _ in 0..3000 {
        put(&t, "busy", "1").await;
    }
    put(&t, "last", "1").await;
    let changes = said(&until(&mut watch, |change| said(std::slice::from_ref(change)) == ["last=1"]).await);
    assert_eq!(changes.iter().filter(|change| *change == "-gone").count(), 1);
    assert!(changes.contains(&"busy=1".to_owned()) && !changes.contains(&"-stays".to_owned()));
}

pub(crate) async fn tables_survive_a_restart(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let revision = put(&t, "k", "v").await;
    let t = fixture.restart().await;
    assert_eq!(t.table.get(AGENTS, "k").await.unwrap().unwrap().revision, revision);
    assert!(put(&t, "k", "w").await > revision);
}
