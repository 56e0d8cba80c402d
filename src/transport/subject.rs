//! Where a record belongs, and which records a reader wants. The only place that formats a subject.

use std::borrow::Cow;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};

use super::Bucket;
use crate::model::id::{LatticeId, StationId, WorkId};

/// A key that takes more than this in a subject is named by its digest there.
const KEY_MAX: usize = 200;
/// Stands before the numbers of a bucket; no key is written like this.
const NUMBERS: &str = "n=.";

/// Where a record belongs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A leaf's event on a work.
    Response(WorkId),
    /// The assigner's event on a work, for everybody to observe.
    Status(WorkId),
    /// An audit event: `noun.verb`.
    Audit {
        /// What it is about.
        noun: Cow<'static, str>,
        /// What happened.
        verb: Cow<'static, str>,
    },
}

impl Subject {
    /// The work it belongs to.
    pub fn work(&self) -> Option<WorkId> {
        match self {
            Self::Response(id) | Self::Status(id) => Some(*id),
            Self::Audit { .. } => None,
        }
    }
}

impl fmt::Display for Subject {
    /// The subject below `lattice.{lattice_id}.`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Response(id) => write!(f, "work.{id}.response"),
            Self::Status(id) => write!(f, "work.{id}.status"),
            Self::Audit { noun, verb } => write!(f, "events.{noun}.{verb}"),
        }
    }
}

/// Which records a reader wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Filter {
    /// Every event of every work.
    AllWork,
    /// Every event of one work.
    Work(WorkId),
    /// The assigners' events of every work.
    AllStatus,
    /// Audit events.
    Audit,
}

impl Filter {
    /// Whether a record of this subject is wanted.
    pub fn wants(&self, subject: &Subject) -> bool {
        match self {
            Self::AllWork => subject.work().is_some(),
            Self::Work(id) => subject.work() == Some(*id),
            Self::AllStatus => matches!(subject, Subject::Status(_)),
            Self::Audit => matches!(subject, Subject::Audit { .. }),
        }
    }
}

/// Names and subjects of one lattice on a NATS server.
#[derive(Debug, Clone)]
pub struct Wire {
    lattice: LatticeId,
}

impl Wire {
    /// The names of this lattice.
    pub fn new(lattice: LatticeId) -> Self {
        Self { lattice }
    }

    /// Everything of the lattice that is stored in its log and hooks.
    pub fn all(&self) -> String {
        format!("lattice.{}.>", self.lattice)
    }

    /// Where the server says again what it has stored.
    pub fn told_all(&self) -> String {
        format!("lattice.{}.told.>", self.lattice)
    }

    /// The log's stream.
    pub fn log_stream(&self) -> String {
        format!("lattice_{}_log", self.lattice)
    }

    /// What the log's stream takes.
    pub fn log_subjects(&self) -> [String; 2] {
        [format!("lattice.{}.work.>", self.lattice), format!("lattice.{}.events.>", self.lattice)]
    }

    /// Where a record is published; a leaf's carries the station that says it, and so does an audit event.
    pub fn record(&self, subject: &Subject, by: &StationId) -> String {
        match subject {
            Subject::Response(_) | Subject::Audit { .. } => format!("lattice.{}.{subject}.{by}", self.lattice),
            Subject::Status(_) => format!("lattice.{}.{subject}", self.lattice),
        }
    }

    /// What a record's subject says: where it belongs, and which station said so.
    pub fn parse_record(&self, text: &str) -> Option<(Subject, Option<StationId>)> {
        let rest = text.strip_prefix("lattice.")?.strip_prefix(self.lattice.as_str())?.strip_prefix('.')?;
        let tokens: Vec<&str> = rest.split('.').collect();
        match tokens.as_slice() {
            ["work", id, "status"] => Some((Subject::Status(id.parse().ok()?), None)),
            ["work", id, "response"] => Some((Subject::Response(id.parse().ok()?), None)),
            ["work", id, "response", by] => Some((Subject::Response(id.parse().ok()?), Some(by.parse().ok()?))),
            ["events", noun, verb, by @ ..] if by.len() <= 1 => {
                let by = by.first().map(|by| by.parse()).transpose().ok()?;
                Some((Subject::Audit { noun: (*noun).to_owned().into(), verb: (*verb).to_owned().into() }, by))
            }
            _ => None,
        }
    }

    /// The subjects that a filter covers.
    pub fn filter(&self, filter: Filter) -> String {
        match filter {
            Filter::AllWork => format!("lattice.{}.work.>", self.lattice),
            Filter::Work(id) => format!("lattice.{}.work.{id}.>", self.lattice),
            Filter::AllStatus => format!("lattice.{}.work.*.status", self.lattice),
            Filter::Audit => format!("lattice.{}.events.>", self.lattice),
        }
    }

    /// Where the server says again what it has stored under a subject of this lattice.
    pub fn told(&self, subject: &str) -> String {
        let rest = subject.strip_prefix("lattice.").and_then(|rest| rest.strip_prefix(self.lattice.as_str()));
        match rest.and_then(|rest| rest.strip_prefix('.')) {
            Some(rest) => format!("lattice.{}.told.{rest}", self.lattice),
            None => format!("lattice.{}.told.{subject}", self.lattice),
        }
    }

    /// A station's hook. No id has a `=`, so no two hooks share a name.
    pub fn hook_stream(&self, station: &StationId) -> String {
        format!("lattice_{}_hook={station}", self.lattice)
    }

    /// What a hook's stream takes.
    pub fn hook_subjects(&self, station: &StationId) -> [String; 2] {
        [self.assign(station), self.hook(station)]
    }

    /// Everything of a hook.
    pub fn hook_all(&self, station: &StationId) -> String {
        format!("lattice.{}.station.{station}.work.*", self.lattice)
    }

    /// Any hook's items.
    pub fn assign_any(&self) -> String {
        format!("lattice.{}.station.*.work.assign", self.lattice)
    }

    /// Whose hook a stream is.
    pub fn station_of_hook(&self, stream: &str) -> Option<StationId> {
        stream.strip_prefix("lattice_")?.strip_prefix(self.lattice.as_str())?.strip_prefix("_hook=")?.parse().ok()
    }

    /// Where a hook's items are pushed.
    pub fn assign(&self, station: &StationId) -> String {
        format!("lattice.{}.station.{station}.work.assign", self.lattice)
    }

    /// Where what happens to a hook's items is agreed upon.
    pub fn hook(&self, station: &StationId) -> String {
        format!("lattice.{}.station.{station}.work.hook", self.lattice)
    }

    /// Where a station's processes get their answers: nobody else's.
    pub fn inbox(&self, station: &StationId) -> String {
        format!("_INBOX.lattice.{}.{station}", self.lattice)
    }

    /// A bucket's name, as NATS tools show it.
    pub fn bucket(&self, bucket: Bucket) -> String {
        format!("lattice_{}_{}", self.lattice, bucket.name())
    }

    /// A bucket's stream.
    pub fn bucket_stream(&self, bucket: Bucket) -> String {
        format!("KV_{}", self.bucket(bucket))
    }

    /// All rows of a bucket.
    pub fn rows(&self, bucket: Bucket) -> String {
        format!("$KV.{}.>", self.bucket(bucket))
    }

    /// The rows whose keys begin with this part.
    pub fn rows_of(&self, bucket: Bucket, head: &str) -> String {
        format!("$KV.{}.{}.*", self.bucket(bucket), place(bucket, head))
    }

    /// All rows of a bucket, as the server says them again.
    pub fn told_rows(&self, bucket: Bucket) -> String {
        format!("lattice.{}.told.table.{}.>", self.lattice, bucket.name())
    }

    /// Where a row is put. In `agents` each station has its own place for a key, so that the server can keep them apart.
    pub fn row(&self, bucket: Bucket, key: &str, by: &StationId) -> String {
        match bucket {
            Bucket::Agents => format!("$KV.{}.{}.{by}", self.bucket(bucket), place(bucket, key)),
            _ => self.row_any(bucket, key),
        }
    }

    /// Where a row may stand, whoever put it.
    pub fn row_any(&self, bucket: Bucket, key: &str) -> String {
        let any = if bucket == Bucket::Agents { ".*" } else { "" };
        format!("$KV.{}.{}{any}", self.bucket(bucket), place(bucket, key))
    }

    /// Where a key is counted up.
    pub fn number(&self, bucket: Bucket, key: &str) -> String {
        format!("$KV.{}.{NUMBERS}{}", self.bucket(bucket), place(bucket, key))
    }

    /// The key as it must go along with the row, because its subject has only a digest.
    pub fn long_key(&self, bucket: Bucket, key: &str) -> Option<String> {
        let text = escape(bucket, key);
        (text.len() > KEY_MAX).then_some(text)
    }

    /// What the subject of a bucket's message says; `long` is the key that went along with it.
    pub fn parse_row(&self, bucket: Bucket, subject: &str, long: Option<&str>) -> Option<Place> {
        let rest = subject.strip_prefix("$KV.")?.strip_prefix(self.bucket(bucket).as_str())?.strip_prefix('.')?;
        if rest.starts_with(NUMBERS) {
            return Some(Place::Number);
        }
        let (text, by) = match bucket {
            Bucket::Agents => rest.rsplit_once('.')?,
            _ => (rest, ""),
        };
        let key = unescape(if text.starts_with("==") { long? } else { text })?;
        if place(bucket, &key) != text {
            return None;
        }
        let vouched = bucket != Bucket::Agents || by.parse::<StationId>().is_ok();
        Some(if vouched { Place::Row(key) } else { Place::Nobodys(key) })
    }

    /// The blobs' store, as NATS tools show it.
    pub fn blob_store(&self) -> String {
        format!("lattice_{}_blobs", self.lattice)
    }

    /// What a station that only runs agents may publish: its own responses, signs of life and claims, what happens to the items of
    /// its own hook, and what it asks of its server. It may make the server read, never write, anything of somebody else: no consumer
    /// is among it, since the server would publish for it wherever it says.
    pub fn leaf_publishes(&self, station: &StationId) -> Vec<String> {
        let lattice = &self.lattice;
        let own_hook = self.hook_stream(station);
        let mut all = vec![
            format!("lattice.{lattice}.work.*.response.{station}"),
            format!("lattice.{lattice}.events.*.*.{station}"),
            self.hook(station),
            format!("$KV.{}.*.{station}", self.bucket(Bucket::Agents)),
            format!("$KV.{}.{station}.*", self.bucket(Bucket::Stations)),
            format!("$O.{}.C.{station}.*", self.blob_store()),
            format!("$O.{}.M.*", self.blob_store()),
            "$JS.API.INFO".to_owned(),
            format!("$JS.API.STREAM.PURGE.{own_hook}"),
            format!("$JS.API.STREAM.MSG.DELETE.{own_hook}"),
        ];
        for stream in self.leaf_streams(station) {
            for verb in ["STREAM.INFO", "DIRECT.GET", "STREAM.MSG.GET"] {
                all.push(format!("$JS.API.{verb}.{stream}"));
            }
            all.push(format!("$JS.API.DIRECT.GET.{stream}.>"));
        }
        all
    }

    /// What a station that only runs agents may hear.
    pub fn leaf_hears(&self, station: &StationId) -> Vec<String> {
        let lattice = &self.lattice;
        vec![
            format!("{}.>", self.inbox(station)),
            format!("lattice.{lattice}.told.work.>"),
            format!("lattice.{lattice}.told.events.>"),
            self.told(&self.hook_all(station)),
            self.told_rows(Bucket::Agents),
            self.told_rows(Bucket::Stations),
        ]
    }

    /// The streams that a station which only runs agents has to do with. They are there before it comes: it may make none.
    pub fn leaf_streams(&self, station: &StationId) -> Vec<String> {
        vec![
            self.log_stream(),
            self.hook_stream(station),
            self.bucket_stream(Bucket::Agents),
            self.bucket_stream(Bucket::Stations),
            format!("OBJ_{}", self.blob_store()),
        ]
    }

    /// The blobs' stream.
    pub fn blob_stream(&self) -> String {
        format!("OBJ_{}", self.blob_store())
    }

    /// What the blobs' stream takes.
    pub fn blob_subjects(&self) -> [String; 2] {
        let store = self.blob_store();
        [format!("$O.{store}.C.>"), format!("$O.{store}.M.>")]
    }

    /// Where the bytes of one upload are.
    pub fn chunks(&self, upload: &str) -> String {
        format!("$O.{}.C.{upload}", self.blob_store())
    }

    /// Where a blob is described.
    pub fn blob(&self, sha256: &str) -> String {
        format!("$O.{}.M.{}", self.blob_store(), URL_SAFE.encode(sha256))
    }
}

/// What a message's subject says in a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The row of this key.
    Row(String),
    /// The row of this key, but in no station's place.
    Nobodys(String),
    /// How far a key has been counted up.
    Number,
}

/// A key in a subject: `.` separates tokens where none of them is empty, and in `agents` each key is one token.
fn place(bucket: Bucket, key: &str) -> String {
    let text = escape(bucket, key);
    if text.len() > KEY_MAX { format!("=={}", URL_SAFE_NO_PAD.encode(Sha256::digest(key))) } else { text }
}

fn escape(bucket: Bucket, key: &str) -> String {
    use fmt::Write;
    if key.is_empty() {
        return "=".to_owned();
    }
    let dots = bucket != Bucket::Agents && key.split('.').all(|token| !token.is_empty());
    key.bytes().fold(String::with_capacity(key.len()), |mut text, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => text.push(byte.into()),
            b'.' if dots => text.push('.'),
            _ => _ = write!(text, "={byte:02X}"),
        }
        text
    })
}

fn unescape(text: &str) -> Option<String> {
    if text == "=" {
        return Some(String::new());
    }
    let (mut key, mut rest) = (Vec::with_capacity(text.len()), text.bytes());
    while let Some(byte) = rest.next() {
        key.push(match byte {
            b'=' => hex(rest.next()?)? << 4 | hex(rest.next()?)?,
            byte => byte,
        });
    }
    String::from_utf8(key).ok()
}

fn hex(digit: u8) -> Option<u8> {
    u8::try_from(char::from(digit).to_digit(16)?).ok()
}
