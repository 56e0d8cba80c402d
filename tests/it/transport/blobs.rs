//! Large values by digest.

use std::pin::Pin;
use std::task::{Context, Poll};

use lattice_mcp::model::output::{BlobRef, Media};
use lattice_mcp::transport::Error;
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};

use super::*;

/// So many bytes that are not all alike; fails at the end if told to.
struct Source {
    at: u64,
    len: u64,
    fails: bool,
}

impl AsyncRead for Source {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        if self.at >= self.len && self.fails {
            return Poll::Ready(Err(std::io::Error::other("the pipe broke")));
        }
        let block = [u8::try_from(self.at / 4096 % 251).unwrap(); 4096];
        let n = 4096
            .min(buf.remaining())
            .min(usize::try_from(self.len - self.at).unwrap())
            .min(4096 - usize::try_from(self.at % 4096).unwrap());
        buf.put_slice(&block[..n]);
        self.at += n as u64;
        Poll::Ready(Ok(()))
    }
}

async fn put(t: &Transport, bytes: &[u8]) -> BlobRef {
    let mut bytes = bytes;
    t.blobs.put(&mut bytes, Media::Text).await.unwrap()
}

async fn get(t: &Transport, sha256: &str, range: std::ops::Range<u64>) -> Vec<u8> {
    let mut all = Vec::new();
    t.blobs.open(sha256, range).await.unwrap().read_to_end(&mut all).await.unwrap();
    all
}

pub(crate) async fn a_blob_is_named_by_its_digest(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let blob = put(&t, b"abc").await;
    assert_eq!(blob.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_eq!((blob.size, blob.media), (3, Media::Text));
    assert_eq!(get(&t, &blob.sha256, 0..u64::MAX).await, b"abc");
    assert_eq!(t.blobs.size(&blob.sha256).await.unwrap(), 3);
    let empty = put(&t, b"").await;
    assert_eq!(empty.size, 0);
    assert!(get(&t, &empty.sha256, 0..9).await.is_empty());
}

pub(crate) async fn ranges_are_cut_at_the_end(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let blob = put(&t, b"0123456789").await;
    for (range, expected) in
        [(0..4, "0123"), (3..7, "3456"), (8..99, "89"), (10..12, ""), (50..60, ""), (5..5, ""), (0..u64::MAX, "0123456789")]
    {
        assert_eq!(get(&t, &blob.sha256, range.clone()).await, expected.as_bytes(), "{range:?}");
    }
}

pub(crate) async fn an_unknown_digest_is_an_error(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let unknown = "0".repeat(64);
    assert!(matches!(t.blobs.size(&unknown).await, Err(Error::NoBlob(digest)) if digest == unknown));
    assert!(matches!(t.blobs.open(&unknown, 0..1).await.err(), Some(Error::NoBlob(_))));
}

pub(crate) async fn a_digest_can_not_leave_the_store(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let up = format!("{}{}", "../".repeat(20), "abcd");
    assert_eq!(up.len(), 64);
    let upper = put(&t, b"abc").await.sha256.to_uppercase();
    for bad in ["", "..", "/etc/passwd", "é", &up, &upper, &"a".repeat(63), &"a".repeat(65)] {
        assert!(matches!(t.blobs.open(bad, 0..1).await.err(), Some(Error::NoBlob(_))), "{bad:?}");
        assert!(matches!(t.blobs.size(bad).await, Err(Error::NoBlob(_))), "{bad:?}");
    }
}

pub(crate) async fn the_same_bytes_are_one_blob(fixture: &mut impl Fixture) {
    let (t, second) = (fixture.transport(), fixture.second().await);
    let bytes = vec![7; 300_000];
    let (a, b) = tokio::join!(put(&t, &bytes), put(&second, &bytes));
    assert_eq!(a, b);
    let mut reader = t.blobs.open(&a.sha256, 0..300_000).await.unwrap();
    let mut start = vec![0; 1000];
    reader.read_exact(&mut start).await.unwrap();
    put(&second, &bytes).await;
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest.len(), 299_000);
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Whether this process runs one test only; if not, the test is run in a process of its own first. What a process holds in
/// memory is also that of the tests beside it.
fn is_alone() -> bool {
    const ALONE: &str = "LATTICE_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let test = std::thread::current().name().unwrap().to_owned();
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--exact", &test, "--nocapture"]).env(ALONE, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    false
}

pub(crate) async fn a_hundred_megabytes_pass_through_little_memory(fixture: &mut impl Fixture) {
    const LEN: u64 = 100 << 20;
    const MEMORY_MAX: u64 = 48 << 20;
    if !is_alone() {
        return;
    }
    let t = fixture.transport();
    let before = resident_bytes();
    let mut source = Source { at: 0, len: LEN, fails: false };
    let blob = t.blobs.put(&mut source, Media::Json).await.unwrap();
    assert_eq!((blob.size, blob.media), (LEN, Media::Json));
    assert!(resident_bytes().saturating_sub(before) < MEMORY_MAX, "storing held the blob in memory");
    let mut reader = t.blobs.open(&blob.sha256, 0..LEN).await.unwrap();
    let mut chunk = vec![0; 1 << 20];
    let mut at = 0u64;
    loop {
        let n = reader.read(&mut chunk).await.unwrap();
        if n == 0 {
            break;
        }
        assert_eq!(u64::from(chunk[0]), at / 4096 % 251);
        at += n as u64;
    }
    assert_eq!(at, LEN);
    assert!(resident_bytes().saturating_sub(before) < MEMORY_MAX, "reading held the blob in memory");
    let middle = get(&t, &blob.sha256, LEN / 2..LEN / 2 + 10).await;
    assert_eq!(middle, [u8::try_from(LEN / 2 / 4096 % 251).unwrap(); 10]);
}

pub(crate) async fn a_source_that_fails_leaves_nothing(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let mut whole = Source { at: 0, len: 500_000, fails: false };
    let expected = t.blobs.put(&mut whole, Media::Text).await.unwrap();
    let mut broken = Source { at: 0, len: 400_000, fails: true };
    let error = t.blobs.put(&mut broken, Media::Text).await.unwrap_err();
    assert!(error.to_string().contains("the pipe broke"), "{error}");
    assert_eq!(t.blobs.size(&expected.sha256).await.unwrap(), 500_000);
}

pub(crate) async fn another_process_reads_a_blob(fixture: &mut impl Fixture) {
    let (t, second) = (fixture.transport(), fixture.second().await);
    let blob = put(&t, b"over there").await;
    assert_eq!(get(&second, &blob.sha256, 5..10).await, b"there");
    let t = fixture.restart().await;
    assert_eq!(get(&t, &blob.sha256, 0..4).await, b"over");
}
