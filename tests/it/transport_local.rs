//! What the embedded store does beyond the contract: it meets damaged, foreign, full and shared files.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a behaviour that fails should say where")]
#![expect(clippy::print_stdout, reason = "a process that plays a part reports on standard output")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

use lattice_mcp::config::{Durability, Storage};
use lattice_mcp::model::id::StationId;
use lattice_mcp::model::output::Media;
use lattice_mcp::model::size::Size;
use lattice_mcp::model::time::{Span, Timestamp};
use lattice_mcp::transport::local::{self, Local, Options};
use lattice_mcp::transport::{Error, Expect, Filter, Position, Want};
use rusqlite::Connection;
use tokio::io::AsyncReadExt;

use crate::lifecycle::eventually;
use crate::transport::{HOUR, LEASE, audit, bodies, collect, everything, item, response, station, status, take_one, want, within, work};

fn open(dir: &Path) -> Local {
    local::open(dir, &Storage::default()).unwrap()
}

/// Why a folder can't be opened.
fn refusal(dir: &Path) -> String {
    let error = local::open(dir, &Storage::default()).err().expect("it was opened").to_string();
    let looking = local::open_read_only(dir).err().expect("it was opened to look at").to_string();
    for text in [&error, &looking] {
        assert!(text.contains("lattice.db"), "the error does not name the file: {text}");
    }
    error
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    Timestamp::from_millis(i64::try_from(since.as_millis()).unwrap())
}

async fn filled(dir: &Path) {
    let store = open(dir);
    let t = store.transport();
    for n in 0..50 {
        let id = work();
        t.queue.push(&station("s"), item(id, "a", n, now()), 1000, Some(status(id, vec![b'x'; 2000]))).await.unwrap();
    }
}

#[tokio::test]
async fn the_folder_is_the_owners_alone() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a").join("b");
    let store = open(&data);
    store.transport().blobs.put(&mut &b"x"[..], Media::Text).await.unwrap();
    for folder in [&data, &data.join("blobs"), &data.join("blobs").join("tmp")] {
        assert_eq!(fs::metadata(folder).unwrap().permissions().mode() & 0o777, 0o700, "{folder:?}");
    }
}

#[tokio::test]
async fn a_newer_store_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path()).await;
    let file = dir.path().join("lattice.db");
    Connection::open(&file).unwrap().pragma_update(None, "user_version", 7000).unwrap();
    let before = fs::read(&file).unwrap();
    let error = refusal(dir.path());
    assert!(error.contains("version 7000") && error.contains("versions up to 4") && error.contains("newer program"), "{error}");
    assert!(fs::read(&file).unwrap() == before, "the file was changed");
}

#[tokio::test]
async fn another_programs_database_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("lattice.db");
    Connection::open(&file).unwrap().execute_batch("CREATE TABLE cats (name TEXT)").unwrap();
    let before = fs::read(&file).unwrap();
    let error = refusal(dir.path());
    assert!(error.contains("something else"), "{error}");
    assert!(fs::read(&file).unwrap() == before, "the file was changed");
}

#[tokio::test]
async fn a_damaged_store_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path()).await;
    let file = dir.path().join("lattice.db");
    let whole = fs::read(&file).unwrap();
    let garbage: Vec<u8> = (0..whole.len()).map(|n| u8::try_from(n * 31 % 251).unwrap()).collect();
    let mut torn_header = whole.clone();
    torn_header[..64].fill(0xff);
    for (what, bytes) in
        [("garbage", &garbage[..]), ("cut in half", &whole[..whole.len() / 2]), ("cut in a page", &whole[..1000]), ("header", &torn_header)]
    {
        fs::write(&file, bytes).unwrap();
        let error = refusal(dir.path());
        assert!(error.contains("damaged") && error.contains("backup"), "{what}: {error}");
        assert!(fs::read(&file).unwrap() == bytes, "{what}: the file was changed");
        for leftover in ["lattice.db-wal", "lattice.db-shm"] {
            let _ = fs::remove_file(dir.path().join(leftover));
        }
    }
    fs::write(&file, &whole).unwrap();
    assert_eq!(everything(&open(dir.path()).transport(), Filter::AllWork).await.len(), 50);
}

#[tokio::test]
async fn damage_that_is_met_later_is_an_error_and_no_panic() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path()).await;
    let file = dir.path().join("lattice.db");
    let mut bytes = fs::read(&file).unwrap();
    let len = bytes.len();
    bytes[8 * 4096..len].fill(0xa5);
    fs::write(&file, &bytes).unwrap();
    let error = match local::open(dir.path(), &Storage::default()) {
        Err(error) => error,
        Ok(store) => {
            let t = store.transport();
            let id = work();
            let read = t.log.read(Filter::AllWork, Position::default(), 1000).await.err();
            let written = t.queue.push(&station("s"), item(id, "a", 0, now()), 1000, Some(status(id, vec![1; 9000]))).await.err();
            read.or(written).expect("nobody noticed")
        }
    };
    assert!(error.to_string().contains("damaged"), "{error}");
}

#[tokio::test]
async fn looking_at_no_store_makes_none() {
    let dir = tempfile::tempdir().unwrap();
    let error = local::open_read_only(dir.path()).err().unwrap().to_string();
    assert!(error.contains("does not exist") && error.contains("start a station"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    assert!(local::open_read_only(&dir.path().join("no")).is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn looking_sees_everything_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path()).await;
    let before = fs::read(dir.path().join("lattice.db")).unwrap();
    {
        let looking = local::open_read_only(dir.path()).unwrap();
        let t = looking.transport();
        assert_eq!(everything(&t, Filter::AllWork).await.len(), 50);
        assert_eq!(t.queue.load(&station("s")).await.unwrap()[0].waiting, 50);
        let error = t.log.append(vec![audit("a", "b")]).await.unwrap_err().to_string();
        assert!(error.contains("nothing can be changed"), "{error}");
        assert!(t.blobs.put(&mut &b"x"[..], Media::Text).await.is_err());
    }
    assert!(fs::read(dir.path().join("lattice.db")).unwrap() == before);
    assert!(!dir.path().join("lattice.db-wal").exists());
    // Beside a process that writes, it follows.
    let store = open(dir.path());
    let looking = local::open_read_only(dir.path()).unwrap();
    let head = looking.transport().log.head().await.unwrap();
    let mut follow = looking.transport().log.follow(Filter::Audit, head).await.unwrap();
    store.transport().log.append(vec![audit("lease", "taken")]).await.unwrap();
    assert_eq!(collect(&mut follow, 1).await.len(), 1);
}

#[tokio::test]
async fn a_full_disk_loses_nothing_and_is_got_over() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { max_pages: Some(100), ..Options::default() };
    let store = local::open_with(dir.path(), &Storage::default(), options).unwrap();
    let t = store.transport();
    let at = station("s");
    let mut acknowledged = Vec::new();
    let error = loop {
        let id = work();
        let mut large = item(id, "a", 0, now());
        large.body = vec![b'x'; 5000].into();
        match t.queue.push(&at, large, 1000, Some(status(id, id.to_string()))).await {
            Ok(_) => acknowledged.push(id.to_string()),
            Err(error) => break error,
        }
    };
    assert!(error.to_string().contains("disk is full") && error.to_string().contains("lattice.db"), "{error}");
    assert_eq!(bodies(&everything(&t, Filter::AllStatus).await), acknowledged);
    // Among small requests, only the large one is refused.
    let huge = t.table.put(lattice_mcp::transport::Bucket::Keys, "huge", vec![1; 300_000].into(), Expect::Any, None);
    let five = want(&[("a", 5)], 5);
    let small = t.queue.take(&at, &five);
    let (huge, small) = tokio::join!(huge, small);
    assert!(matches!(huge, Err(Error::Store(_))));
    for taken in small.unwrap().taken {
        assert!(t.queue.settle(&taken.delivery, vec![]).await.unwrap());
    }
    let id = work();
    t.queue.push(&at, item(id, "a", 0, now()), 1000, Some(status(id, "after"))).await.unwrap();
    drop(store);
    let t = open(dir.path());
    let all = bodies(&everything(&t.transport(), Filter::AllStatus).await);
    assert_eq!(all[..acknowledged.len()], acknowledged);
    assert_eq!(all[acknowledged.len()..], ["after"]);
}

#[tokio::test]
async fn closing_carries_out_what_was_asked_and_ends_every_wait() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let t = store.transport();
    let id = work();
    let mut follow = t.log.follow(Filter::Work(work()), Position::default()).await.unwrap();
    let mut watch = t.table.watch(lattice_mcp::transport::Bucket::Agents).await.unwrap();
    watch.next().await.unwrap();
    let mut asked = tokio::task::JoinSet::new();
    for n in 0..100 {
        let t = t.clone();
        asked.spawn(async move { t.log.append(vec![response(id, n.to_string())]).await });
    }
    // The first is through, so that all are on their way or will find the store closed.
    asked.join_next().await;
    store.close();
    store.close();
    let mut done = 1;
    while let Some(result) = asked.join_next().await {
        match result.unwrap() {
            Ok(_) => done += 1,
            Err(Error::Closed) => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert!(matches!(within(follow.next()).await, Err(Error::Closed)));
    assert!(matches!(within(watch.next()).await, Err(Error::Closed)));
    assert!(matches!(t.log.head().await, Err(Error::Closed)));
    assert!(matches!(t.blobs.put(&mut &b"x"[..], Media::Text).await, Err(Error::Closed)));
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    assert_eq!(everything(&open(dir.path()).transport(), Filter::AllWork).await.len(), done);
}

#[tokio::test]
async fn power_durability_writes_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Storage { durability: Durability::Power, ..Storage::default() };
    let store = local::open(dir.path(), &settings).unwrap();
    let t = store.transport();
    t.log.append(vec![audit("a", "b")]).await.unwrap();
    let blob = t.blobs.put(&mut &b"kept"[..], Media::Text).await.unwrap();
    let mut text = String::new();
    t.blobs.open(&blob.sha256, 0..4).await.unwrap().read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "kept");
}

/// A store whose clock stands still until it is moved.
fn open_with_clock(dir: &Path, settings: &Storage) -> (Local, Arc<AtomicI64>) {
    let clock = Arc::new(AtomicI64::new(1_800_000_000_000));
    let told = Arc::clone(&clock);
    let options = Options { clock: Arc::new(move || Timestamp::from_millis(told.load(Ordering::SeqCst))), ..Options::default() };
    (local::open_with(dir, settings, options).unwrap(), clock)
}

/// Waits until the log holds exactly these bodies.
async fn until_left(store: &Local, expected: &[&str]) {
    let t = store.transport();
    eventually("the rest is dropped", async || {
        let left: Vec<String> = bodies(&everything(&t, Filter::AllWork).await);
        assert!(expected.iter().all(|kept| left.iter().any(|left| left == kept)), "too much was dropped: {left:?}");
        (left == expected).then_some(())
    })
    .await;
}

#[tokio::test]
async fn records_that_are_too_old_go_work_by_work() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Storage { max_age: Span::secs(3600), ..Storage::default() };
    let (store, clock) = open_with_clock(dir.path(), &settings);
    let t = store.transport();
    let at = station("s");
    let (old, waiting, going_on) = (work(), work(), work());
    let mut order = item(waiting, "a", 0, Timestamp::from_millis(clock.load(Ordering::SeqCst)));
    order.deadline = order.deadline.after(HOUR * 9);
    t.log.append(vec![status(old, "old 1"), response(going_on, "going on 1"), audit("station", "joined")]).await.unwrap();
    t.queue.push(&at, order, 9, Some(status(waiting, "waiting 1"))).await.unwrap();
    t.log.append(vec![response(old, "old 2")]).await.unwrap();
    clock.fetch_add(3_600_001, Ordering::SeqCst);
    let head = t.log.append(vec![response(going_on, "going on 2")]).await.unwrap();
    until_left(&store, &["going on 1", "waiting 1", "going on 2"]).await;
    let taken = take_one(&t, &at, "a").await;
    t.queue.settle(&taken.delivery, vec![]).await.unwrap();
    clock.fetch_add(3_600_001, Ordering::SeqCst);
    until_left(&store, &[]).await;
    assert!(everything(&t, Filter::Audit).await.is_empty());
    // Positions go on rising, also after a restart.
    assert_eq!(t.log.head().await.unwrap(), head);
    drop(store);
    let t = open(dir.path());
    assert!(!head.reaches(t.transport().log.append(vec![audit("a", "b")]).await.unwrap()));
}

#[tokio::test]
async fn a_log_that_is_too_large_loses_its_oldest_settled_works() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Storage { max_bytes: Size::mib(2), ..Storage::default() };
    let (store, clock) = open_with_clock(dir.path(), &settings);
    let t = store.transport();
    let pinned = work();
    let order = item(pinned, "a", 0, Timestamp::from_millis(clock.load(Ordering::SeqCst)));
    t.queue.push(&station("s"), order, 9, Some(status(pinned, "pinned"))).await.unwrap();
    let mut last = pinned;
    for _ in 0..400 {
        last = work();
        t.log.append(vec![status(last, vec![b'x'; 10_000]), response(last, vec![b'y'; 10_000])]).await.unwrap();
    }
    eventually("the oldest are dropped", async || (everything(&t, Filter::AllWork).await.len() <= 220).then_some(())).await;
    assert_eq!(bodies(&everything(&t, Filter::Work(pinned)).await), ["pinned"]);
    assert_eq!(everything(&t, Filter::Work(last)).await.len(), 2);
}

#[tokio::test]
async fn old_blobs_go_and_fresh_ones_stay() {
    let dir = tempfile::tempdir().unwrap();
    let blob = |sha256: &str| dir.path().join("blobs").join(&sha256[..2]).join(sha256);
    let age = |path: &Path, span: Duration| {
        fs::File::options().write(true).open(path).unwrap().set_modified(SystemTime::now() - span).unwrap();
    };
    let settings = Storage { blob_max_age: Span::secs(3600), ..Storage::default() };
    let mut refs = Vec::new();
    {
        let store = local::open(dir.path(), &settings).unwrap();
        for text in [&b"old"[..], b"stored again", b"fresh"] {
            let mut source = text;
            refs.push(store.transport().blobs.put(&mut source, Media::Text).await.unwrap());
        }
        age(&blob(&refs[0].sha256), HOUR * 2);
        age(&blob(&refs[1].sha256), HOUR * 2);
        store.transport().blobs.put(&mut &b"stored again"[..], Media::Text).await.unwrap();
    }
    let tmp = dir.path().join("blobs").join("tmp");
    for (name, span) in [("stale", HOUR * 30), ("in use", HOUR)] {
        fs::write(tmp.join(name), "half").unwrap();
        age(&tmp.join(name), span);
    }
    let store = local::open(dir.path(), &settings).unwrap();
    eventually("what is old is removed", async || (!blob(&refs[0].sha256).exists() && !tmp.join("stale").exists()).then_some(())).await;
    assert!(matches!(store.transport().blobs.size(&refs[0].sha256).await, Err(Error::NoBlob(_))));
    assert_eq!(store.transport().blobs.size(&refs[1].sha256).await.unwrap(), 12);
    assert!(blob(&refs[2].sha256).exists() && tmp.join("in use").exists());
}

/// Which part a process that a test has started plays, and in which folder.
const PART: &str = "LATTICE_TEST_PART";
const FOLDER: &str = "LATTICE_TEST_FOLDER";

/// Starts this test program again to play a part beside us.
fn start(part: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "transport_local::a_part_beside_the_tests", "--nocapture", "--include-ignored"]);
    command.env(PART, part).env(FOLDER, dir).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

/// The lines that a part has said: each begins with a mark, for the test program prints things of its own.
fn said(child: &mut Child) -> impl Iterator<Item = String> + use<> {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.map_while(Result::ok).filter_map(|line| line.split_once("part: ").map(|(_, said)| said.to_owned()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// By itself it plays no part, and passing would say nothing.
#[ignore = "is started by other tests, as a process of its own"]
async fn a_part_beside_the_tests() {
    let (Ok(part), Ok(dir)) = (std::env::var(PART), std::env::var(FOLDER)) else {
        return;
    };
    let dir = Path::new(&dir);
    match part.as_str() {
        "write" => write_for_ever(dir).await,
        "write a thousand" => write_a_thousand(dir, 1000).await,
        "open" => match local::open(dir, &Storage::default()) {
            Ok(store) => match store.transport().log.append(vec![audit("a", "b")]).await {
                Ok(_) => println!("part: opened"),
                Err(error) => println!("part: {error}"),
            },
            Err(error) => println!("part: {error}"),
        },
        other => panic!("no part {other}"),
    }
}

/// Writes from many tasks and says what was acknowledged, until it is killed.
async fn write_for_ever(dir: &Path) {
    let store = open(dir);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let t = store.transport();
        tasks.spawn(async move {
            loop {
                let id = work();
                t.queue.push(&station("s"), item(id, "a", 0, now()), 1_000_000, Some(status(id, "1"))).await.unwrap();
                println!("part: pushed {id}");
                let taken = take_one(&t, &station("s"), "a").await;
                let id = taken.delivery.id;
                let records = vec![response(id, "2"), response(id, "3")];
                assert!(t.queue.settle(&taken.delivery, records).await.unwrap());
                println!("part: settled {id}");
            }
        });
    }
    tasks.join_all().await;
}

async fn write_a_thousand(dir: &Path, count: usize) {
    let store = open(dir);
    let t = store.transport();
    let id = work();
    println!("part: {id}");
    for n in 0..count {
        t.log.append(vec![response(id, n.to_string())]).await.unwrap();
    }
}

#[tokio::test]
async fn a_killed_process_loses_nothing_that_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..3 {
        let mut child = start("write", dir.path()).spawn().unwrap();
        let mut lines = said(&mut child);
        let mut heard: Vec<String> = lines.by_ref().take(400 * (round + 1)).collect();
        child.kill().unwrap();
        child.wait().unwrap();
        heard.extend(lines);
        let store = open(dir.path());
        let t = store.transport();
        let waiting = t.queue.load(&station("s")).await.unwrap().first().map_or(0, |lane| lane.waiting + lane.held);
        let mut settled = 0;
        let all = everything(&t, Filter::AllWork).await;
        let mut works = std::collections::HashMap::<_, Vec<String>>::new();
        for entry in &all {
            let body = String::from_utf8(entry.body.to_vec()).unwrap();
            works.entry(entry.subject.work().unwrap()).or_default().push(body);
        }
        for events in works.values() {
            // An append is there as a whole or not at all.
            assert!(events == &["1"] || events == &["1", "2", "3"], "{events:?}");
            settled += usize::from(events.len() == 3);
        }
        for line in heard.iter().filter(|line| line.ends_with(|c: char| c.is_ascii_hexdigit()) && line.len() > 42) {
            let (what, id) = line.split_once(' ').unwrap();
            // The last line may be cut by the kill.
            let Ok(id) = id.parse() else { continue };
            let events = works.get(&id).unwrap_or_else(|| panic!("{line} is lost"));
            assert!(what == "pushed" || events.len() == 3, "{line} is lost");
        }
        // The counters are right: what is not settled stands on the hook.
        assert_eq!(usize::try_from(waiting).unwrap(), works.len() - settled);
        drop(store);
        let check: String =
            Connection::open(dir.path().join("lattice.db")).unwrap().query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
        assert_eq!(check, "ok");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_write_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let t = store.transport();
    let mut follow = t.log.follow(Filter::AllWork, Position::default()).await.unwrap();
    let mut child = start("write a thousand", dir.path()).spawn().unwrap();
    let mut lines = said(&mut child);
    let theirs = lines.next().unwrap().parse().unwrap();
    let ours = work();
    for n in 0..1000 {
        t.log.append(vec![response(ours, n.to_string())]).await.unwrap();
    }
    let got = collect(&mut follow, 2000).await;
    assert!(got == everything(&t, Filter::AllWork).await, "the follower did not get what the log holds");
    let expected: Vec<String> = (0..1000).map(|n| n.to_string()).collect();
    for id in [ours, theirs] {
        assert_eq!(bodies(&everything(&t, Filter::Work(id)).await), expected);
    }
    assert!(child.wait().unwrap().success());
}

#[tokio::test]
async fn many_processes_open_a_new_store_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut children: Vec<Child> = (0..10).map(|_| start("open", dir.path()).spawn().unwrap()).collect();
    for child in &mut children {
        assert_eq!(said(child).next().as_deref(), Some("opened"));
        child.wait().unwrap();
    }
    assert_eq!(everything(&open(dir.path()).transport(), Filter::Audit).await.len(), 10);
}

#[tokio::test]
async fn a_store_that_may_not_be_written_says_so() {
    const NOBODY: u32 = 65534;
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path()).await;
    let file = dir.path().join("lattice.db");
    let before = fs::read(&file).unwrap();
    let is_root = fs::metadata(&file).map(|metadata| std::os::unix::fs::MetadataExt::uid(&metadata)).unwrap() == 0;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o444)).unwrap();
    for mode in [0o555, 0o755] {
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
        let mut command = start("open", dir.path());
        if is_root {
            // Permissions do not bind root, so somebody else tries.
            chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
            chown(&file, Some(NOBODY), Some(NOBODY)).unwrap();
            command.uid(NOBODY).gid(NOBODY);
        }
        let mut child = command.spawn().unwrap();
        let error = said(&mut child).next().unwrap();
        assert!(error.contains("lattice.db") && error.contains("check") && error.contains("permissions"), "{error}");
        child.wait().unwrap();
        assert!(fs::read(&file).unwrap() == before, "the file was changed");
    }
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
}

#[tokio::test]
async fn a_lease_lapses_by_the_wall_clock() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let t = store.transport();
    let id = work();
    t.queue.push(&station("s"), item(id, "a", 0, now()), 9, None).await.unwrap();
    let mut short = want(&[("a", 1)], 1);
    short.lease = Duration::from_millis(50);
    assert!(short.lease < LEASE);
    let mut signal = t.queue.signal(&station("s"));
    assert_eq!(t.queue.take(&station("s"), &short).await.unwrap().taken.len(), 1);
    while t.queue.take(&station("s"), &short).await.unwrap().taken.is_empty() {
        within(signal.changed()).await;
    }
}

/// A store whose clock goes on as all do, but can be set.
fn open_with_settable_clock(dir: &Path, shift: &Arc<AtomicI64>) -> Local {
    let shift = Arc::clone(shift);
    let clock = move || Timestamp::from_millis(now().as_millis() + shift.load(Ordering::SeqCst));
    local::open_with(dir, &Storage::default(), Options { clock: Arc::new(clock), jumps: true, ..Options::default() }).unwrap()
}

#[tokio::test]
async fn a_clock_that_jumps_takes_nothing_from_who_lives() {
    let (dir, shift) = (tempfile::tempdir().unwrap(), Arc::new(AtomicI64::new(0)));
    let (one, other) = (open_with_settable_clock(dir.path(), &shift), open_with_settable_clock(dir.path(), &shift));
    let (mine, theirs, at, lease) = (one.transport(), other.transport(), station("s"), Duration::from_secs(2));
    let want = Want { lease, ..want(&[("a", 9)], 9) };
    let (alive, dead) = (work(), work());
    for id in [alive, dead] {
        mine.queue.push(&at, item(id, "a", 0, now()), 9, None).await.unwrap();
    }
    let taken = mine.queue.take(&at, &want).await.unwrap().taken;
    assert_eq!(taken.len(), 2);
    let alive = taken.iter().find(|taken| taken.delivery.id == alive).unwrap().delivery.clone();
    // The machine slept for ten minutes.
    shift.store(600_000, Ordering::SeqCst);
    let found = theirs.queue.take(&at, &want).await.unwrap();
    assert!(found.taken.is_empty(), "{found:?}");
    assert!(found.next_at.unwrap() > Timestamp::from_millis(now().as_millis() + 600_000), "whoever looks has no need to look at once");
    assert!(mine.queue.extend(std::slice::from_ref(&alive), Duration::from_secs(60), None).await.unwrap().is_empty());
    let taken = eventually("a hold has run out", async || {
        Some(theirs.queue.take(&at, &want).await.unwrap().taken).filter(|taken| !taken.is_empty())
    })
    .await;
    assert_eq!(taken.iter().map(|taken| (taken.delivery.id, taken.delivery.attempt)).collect::<Vec<_>>(), [(dead, 2)]);
    assert!(mine.queue.settle(&alive, vec![]).await.unwrap(), "it is still held");
}

#[tokio::test]
async fn a_clock_that_is_set_back_keeps_nothing_from_who_comes_next() {
    let (dir, shift) = (tempfile::tempdir().unwrap(), Arc::new(AtomicI64::new(3_000_000)));
    let (at, id) = (station("s"), work());
    let want = Want { lease: Duration::from_secs(2), ..want(&[("a", 9)], 9) };
    let before = open_with_settable_clock(dir.path(), &shift);
    before.transport().queue.push(&at, item(id, "a", 0, now()), 9, None).await.unwrap();
    assert_eq!(before.transport().queue.take(&at, &want).await.unwrap().taken.len(), 1);
    // Its process dies, and the clock is set right.
    drop(before);
    shift.store(0, Ordering::SeqCst);
    let store = open_with_settable_clock(dir.path(), &shift);
    let after = store.transport();
    let taken = eventually("its hold has run out", async || {
        assert!(after.queue.take_expired(want.holder, want.lease, 9, None).await.unwrap().taken.is_empty());
        after.queue.take(&at, &want).await.unwrap().taken.pop()
    })
    .await;
    assert_eq!((taken.delivery.id, taken.delivery.attempt), (id, 2));
}

/// When a hold ends that a short lease looks at, in milliseconds from now.
async fn ends_in(store: &Local, at: &StationId) -> i64 {
    let want = Want { lease: Duration::from_secs(5), ..want(&[("a", 9)], 9) };
    let queue = store.transport().queue;
    assert!(queue.take_expired(want.holder, want.lease, 9, None).await.unwrap().taken.is_empty());
    let take = queue.take(at, &want).await.unwrap();
    assert!(take.taken.is_empty(), "{take:?}");
    take.next_at.unwrap().as_millis() - now().as_millis()
}

#[tokio::test]
async fn a_hold_ends_by_its_own_lease_whatever_that_of_others_is() {
    let (dir, shift, at) = (tempfile::tempdir().unwrap(), Arc::new(AtomicI64::new(0)), station("s"));
    let long = Want { lease: Duration::from_secs(600), ..want(&[("a", 9)], 9) };
    let holder = open_with_settable_clock(dir.path(), &shift);
    let mine = holder.transport().queue;
    mine.push(&at, item(work(), "a", 0, now()), 9, None).await.unwrap();
    let held = mine.take(&at, &long).await.unwrap().taken.remove(0).delivery;
    // Whoever starts beside it has a much shorter one.
    let starts = || open_with_settable_clock(dir.path(), &shift);
    assert!(ends_in(&starts(), &at).await > 500_000);
    // Extended while the clock was ahead.
    shift.store(3_600_000, Ordering::SeqCst);
    assert!(mine.extend(std::slice::from_ref(&held), long.lease, None).await.unwrap().is_empty());
    shift.store(0, Ordering::SeqCst);
    let ends = ends_in(&starts(), &at).await;
    assert!((500_000..=600_000).contains(&ends), "{ends}");
    // As an earlier version wrote it.
    Connection::open(dir.path().join("lattice.db")).unwrap().execute("UPDATE item SET lease = NULL", []).unwrap();
    assert!(ends_in(&starts(), &at).await <= 5_000);
}
