//! What an agent is asked to do, whether it came in the message or as a blob.
//!
//! A blob is scanned once for where its members stand; after that each is read on its own, or streamed.

use std::ops::Range;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::kind_of;
use crate::model::assignment::Assignment;
use crate::model::event::{Failure, FailureKind};
use crate::transport::Blobs;

/// The task and the context of an assignment.
pub(super) struct Input {
    assignment: Arc<Assignment>,
    blob: Option<Blob>,
    /// What the context has besides.
    added: Map<String, Value>,
}

/// Where an agent finds why its last claim was refuted.
const REFUTED: &str = "lattice_refuted";

struct Blob {
    blobs: Arc<dyn Blobs>,
    sha256: String,
    task: Range<u64>,
    context: Range<u64>,
}

impl Input {
    /// Finds out where task and context stand.
    pub(super) async fn of(assignment: &Arc<Assignment>, blobs: &Arc<dyn Blobs>) -> Result<Self, Failure> {
        let mut input = Self { assignment: assignment.clone(), blob: None, added: Map::new() };
        if let Some(reference) = &assignment.input_ref {
            let open = blobs.open(&reference.sha256, 0..reference.size).await.map_err(|error| unreadable(&error))?;
            let (task, context) = members(open).await.map_err(|error| unreadable(&error))?;
            input.blob = Some(Blob { blobs: blobs.clone(), sha256: reference.sha256.clone(), task, context });
        }
        Ok(input)
    }

    /// The same, whose context says why the last claim that the work is done was refuted.
    pub(super) fn with_refuted(mut self, refuted: Option<&Value>) -> Self {
        self.added.extend(refuted.map(|refuted| (REFUTED.to_owned(), refuted.clone())));
        self
    }

    /// The whole task.
    pub(super) async fn task(&self) -> Result<String, Failure> {
        match &self.blob {
            None => Ok(self.assignment.task.clone()),
            Some(blob) => blob.parse(&blob.task).await,
        }
    }

    /// The whole context.
    pub(super) async fn context(&self) -> Result<Map<String, Value>, Failure> {
        let mut context = match &self.blob {
            None => self.assignment.context.clone(),
            Some(blob) if blob.context.is_empty() => Map::new(),
            Some(blob) => blob.parse(&blob.context).await?,
        };
        context.extend(self.added.clone());
        Ok(context)
    }

    /// The task, unless its JSON is certain to hold more than `max` bytes of text.
    pub(super) async fn task_within(&self, max: usize) -> Result<Option<String>, Failure> {
        // An escape takes at most six bytes for one.
        let bound = (max as u64).saturating_mul(6).saturating_add(2);
        match &self.blob {
            Some(blob) if blob.task.end - blob.task.start > bound => Ok(None),
            _ => self.task().await.map(|task| (task.len() <= max).then_some(task)),
        }
    }

    /// The context as compact JSON, unless it is longer than `max`.
    pub(super) async fn context_within(&self, max: usize) -> Result<Option<String>, Failure> {
        let bound = (max as u64).saturating_mul(6);
        match &self.blob {
            Some(blob) if blob.context.end - blob.context.start > bound => Ok(None),
            _ => self.context().await.map(|context| Some(Value::Object(context).to_string()).filter(|text| text.len() <= max)),
        }
    }

    /// The task and context of the message; those of a blob are elsewhere.
    pub(super) fn message(&self) -> (&str, Map<String, Value>) {
        let mut context = self.assignment.context.clone();
        context.extend(self.added.clone());
        (&self.assignment.task, context)
    }

    /// The JSON of the task and of the context, when they are too large to be held.
    pub(super) async fn streams(&self) -> Result<Option<[Box<dyn AsyncRead + Unpin + Send>; 2]>, Failure> {
        let Some(blob) = &self.blob else { return Ok(None) };
        let open = |range: &Range<u64>| {
            let range = range.clone();
            async move { blob.blobs.open(&blob.sha256, range).await.map_err(|error| unreadable(&error)) }
        };
        let task = open(&blob.task).await?;
        if !self.added.is_empty() {
            let context = Value::Object(self.context().await?).to_string();
            return Ok(Some([task, Box::new(std::io::Cursor::new(context))]));
        }
        let context: Box<dyn AsyncRead + Unpin + Send> = match blob.context.is_empty() {
            true => Box::new(&b"{}"[..]),
            false => open(&blob.context).await?,
        };
        Ok(Some([task, context]))
    }
}

impl Blob {
    async fn parse<T: DeserializeOwned>(&self, range: &Range<u64>) -> Result<T, Failure> {
        let mut open = self.blobs.open(&self.sha256, range.clone()).await.map_err(|error| unreadable(&error))?;
        let mut bytes = Vec::new();
        open.read_to_end(&mut bytes).await.map_err(|error| unreadable(&error))?;
        serde_json::from_slice(&bytes).map_err(|error| unreadable(&error))
    }
}

/// The store may be back for the next attempt.
pub(super) fn unreadable(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::new(kind_of(error, FailureKind::Crashed), format!("the work's input could not be read: {error}"))
}

async fn members(mut source: Box<dyn AsyncRead + Unpin + Send>) -> std::io::Result<(Range<u64>, Range<u64>)> {
    let mut scan = Scan::default();
    let mut chunk = vec![0; 64 * 1024];
    loop {
        let read = source.read(&mut chunk).await?;
        if read == 0 {
            break;
        }
        chunk[..read].iter().for_each(|byte| scan.take(*byte));
    }
    match scan.task {
        Some(task) if scan.closed => Ok((task, scan.context.unwrap_or(0..0))),
        _ => Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "it is not {\"task\": ..., \"context\": ...}")),
    }
}

/// Walks over a JSON object and notes where the values of its own members stand.
#[derive(Default)]
struct Scan {
    at: u64,
    depth: u32,
    string: bool,
    escaped: bool,
    value: bool,
    key: Vec<u8>,
    start: Option<u64>,
    task: Option<Range<u64>>,
    context: Option<Range<u64>>,
    closed: bool,
}

const KEY_MAX: usize = 16;

impl Scan {
    fn take(&mut self, byte: u8) {
        let at = self.at;
        self.at += 1;
        if self.string {
            return self.within_string(byte);
        }
        if byte.is_ascii_whitespace() {
            return;
        }
        let own = self.depth == 1;
        if own && self.value && self.start.is_none() && byte != b':' {
            self.start = Some(at);
        }
        match byte {
            b'"' => {
                self.string = true;
                if own && !self.value {
                    self.key.clear();
                }
            }
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                if own {
                    self.finish(at);
                    self.closed = true;
                }
                self.depth = self.depth.saturating_sub(1);
            }
            b',' if own => self.finish(at),
            b':' if own => self.value = true,
            _ => {}
        }
    }

    fn within_string(&mut self, byte: u8) {
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' => self.escaped = true,
            b'"' => self.string = false,
            _ if self.depth == 1 && !self.value && self.key.len() < KEY_MAX => self.key.push(byte),
            _ => {}
        }
    }

    fn finish(&mut self, at: u64) {
        if let Some(start) = self.start.take() {
            match self.key.as_slice() {
                b"task" => self.task = Some(start..at),
                b"context" => self.context = Some(start..at),
                _ => {}
            }
        }
        self.value = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_found_where_they_stand() {
        let text = r#" {"x":{"task":1,"y":[1,2]}, "task" : "a\"},{b" ,"context":{"task":"no","n":[{}]} } "#;
        let mut scan = Scan::default();
        text.bytes().for_each(|byte| scan.take(byte));
        let at = |range: Option<Range<u64>>| range.map(|range| text[range.start as usize..range.end as usize].trim()).unwrap();
        assert!(scan.closed);
        assert_eq!(at(scan.task), r#""a\"},{b""#);
        assert_eq!(at(scan.context), r#"{"task":"no","n":[{}]}"#);
    }
}
