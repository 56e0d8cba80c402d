//! Every parser that untrusted bytes reach, and the laws that it keeps whatever they are.
//!
//! A target is a function of bytes that panics when a law is broken. libFuzzer drives them (`fuzz/`), and a test here plays the kept
//! corpus through the same functions, so that what was found once stays mended. Built for tests and fuzzing only: no product has it.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use tokio::io::AsyncRead;
use tokio::runtime::Runtime;

use crate::agents::{self, Place};
use crate::model::agent::Manifest;
use crate::model::assignment::Assignment;
use crate::model::audit::Fact;
use crate::model::event::{Event, Kind, Side};
use crate::model::id::{AgentName, LatticeId, RunId, WorkId};
use crate::model::output::{BlobRef, Media, Output};
use crate::model::size::Size;
use crate::model::time::{Span, Timestamp};
use crate::model::work::Work;
use crate::results::{self, Selector};
use crate::telemetry::TraceContext;
use crate::transport::subject::Place as Row;
use crate::transport::{self, Blobs, Bucket, Wire};
use crate::{config, http, mcp, registry, runner};

/// A target: its name, which is that of its corpus, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 14] = [
    ("address", address),
    ("agent_file", agent_file),
    ("config_file", config_file),
    ("hook", transport::nats::fuzz::hook),
    ("message", message),
    ("placeholders", runner::command::fuzz::placeholders),
    ("presence", registry::fuzz::presence),
    ("runner_output", runner::command::fuzz::output),
    ("schema", runner::command::fuzz::schema),
    ("selector", selector),
    ("subject", subject),
    ("tool_arguments", mcp::fuzz::arguments),
    ("wire_event", wire_event),
    ("words", words),
];

/// The target of a name.
///
/// # Panics
/// There is none.
pub fn target(name: &str) -> fn(&[u8]) {
    let found = TARGETS.iter().find(|(known, _)| *known == name);
    let Some((_, run)) = found else { panic!("no target is called {name}") };
    *run
}

fn agent_file(bytes: &[u8]) {
    static SETTINGS: OnceLock<config::Agents> = OnceLock::new();
    let Some((kind, bytes)) = bytes.split_first() else { return };
    let (root, file) = match kind {
        b'p' => ("/nowhere/agents", "/nowhere/agents/some.prompt"),
        b'c' => ("/nowhere/.claude/agents", "/nowhere/.claude/agents/some.md"),
        _ => ("/nowhere/agents", "/nowhere/agents/some.md"),
    };
    let settings = SETTINGS.get_or_init(config::Agents::default);
    match agents::read(bytes, Place { file: Path::new(file), root: Path::new(root), settings, path_env: None }) {
        Ok(None) => {}
        Ok(Some(definition)) => {
            let claimed = serde_json::to_vec(&definition.manifest).unwrap_or_default();
            let read = serde_json::from_slice::<Manifest>(&claimed);
            assert!(read.is_ok_and(|manifest| manifest.name == definition.manifest.name), "no other station reads this agent");
            runner::command::fuzz::prompt(&definition);
        }
        Err(flaw) => {
            let lines = bytes.iter().filter(|byte| matches!(byte, b'\n' | b'\r')).count() + 1;
            assert!(!flaw.reason.trim().is_empty(), "a flaw says what is wrong");
            assert!(flaw.line.is_none_or(|line| (1..=lines + 1).contains(&line)), "{flaw:?} is outside of {lines} lines");
        }
    }
}

fn config_file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match config::of_text(text) {
        Ok(loaded) => {
            let all = loaded.table().len();
            assert!(all > 0 && loaded.handed_on().len() <= all);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// One event a line, after a letter that says whose.
fn wire_event(bytes: &[u8]) {
    let _ = serde_json::from_slice::<Assignment>(bytes).map(|order| order_is_sound(&order));
    if let Ok(fact) = Fact::from_bytes(bytes) {
        assert!(Fact::from_bytes(&fact.to_bytes()).is_ok_and(|again| again == fact), "a fact survives the wire");
    }
    let read = |line: &[u8]| {
        let (side, body) = line.split_first()?;
        let side = if *side == b'l' { Side::Leaf } else { Side::Assigner };
        Event::from_bytes(body, side).inspect_err(|error| assert!(!error.to_string().is_empty())).ok()
    };
    let events: Vec<Event> = bytes.split(|byte| *byte == b'\n').filter_map(read).collect();
    let mut folded: Option<Work> = None;
    for event in &events {
        let again = Event::from_bytes(&event.to_bytes(), event.side);
        assert!(
            again.is_ok_and(|again| (again.work_id, again.at, again.attempt) == (event.work_id, event.at, event.attempt)
                && again.kind.wire_type() == event.kind.wire_type()),
            "an event survives the wire: {event:?}"
        );
        if let Kind::Assigned(order) = &event.kind {
            order_is_sound(order);
        }
        let work = folded.get_or_insert_with(|| Work::begin(event));
        let before = work.status;
        work.apply(event);
        assert!(!before.is_settled() || work.status == before, "a settled work stays as it is");
        work_is_sound(work);
    }
    assert_eq!(Work::fold(&events).map(|work| work.status), folded.map(|work| work.status));
}

fn order_is_sound(order: &Assignment) {
    assert!(order.start_by() <= order.deadline());
    let written = serde_json::to_vec(order).unwrap_or_default();
    assert!(serde_json::from_slice::<Assignment>(&written).is_ok_and(|again| again.work_id == order.work_id));
}

fn work_is_sound(work: &Work) {
    let now = Timestamp::from_millis(1_700_000_000_000);
    let _ = (work.waited(now), work.usage(), work.budget(), work.open_question(), work.claim(), work.refuted(), work.running());
    let _ = (work.attempts_burnt(1), work.text_len(), work.is_called_off(), work.waits_for());
}

fn subject(bytes: &[u8]) {
    static WIRE: OnceLock<Option<Wire>> = OnceLock::new();
    let wire = WIRE.get_or_init(|| "default".parse::<LatticeId>().ok().map(Wire::new));
    let (Some(wire), Ok(text)) = (wire, std::str::from_utf8(bytes)) else { return };
    let (text, long) = text.split_once('\n').map_or((text, None), |(text, long)| (text, Some(long)));
    if let Some((subject, by)) = wire.parse_record(text) {
        let again = by.as_ref().map(|by| wire.record(&subject, by));
        if let Some(again) = again {
            assert_eq!(wire.parse_record(&again), Some((subject, by)), "{text:?} and {again:?} are one place");
        }
    }
    let _ = (wire.station_of_hook(text), wire.told(text));
    for bucket in Bucket::ALL {
        if let Some(Row::Row(key)) = wire.parse_row(bucket, text, long)
            && let Ok(station) = "north".parse()
        {
            let (place, long) = (wire.row(bucket, &key, &station), wire.long_key(bucket, &key));
            let again = wire.parse_row(bucket, &place, long.as_deref());
            assert!(matches!(again, Some(Row::Row(again)) if again == key), "a row keeps its key: {key:?}");
        }
    }
}

/// Ids, spans, sizes, times and trace contexts: what is read can be written and read again.
fn words(bytes: &[u8]) {
    fn same<T: std::str::FromStr + ToString + PartialEq>(text: &str) {
        if let Ok(value) = text.parse::<T>() {
            let written = value.to_string();
            assert!(written.parse::<T>().is_ok_and(|again| again == value), "{text:?} is written as {written:?}, which is another");
        }
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    same::<AgentName>(text);
    same::<WorkId>(text);
    same::<RunId>(text);
    same::<Span>(text);
    same::<Size>(text);
    same::<Timestamp>(text);
    let _ = TraceContext::parse(text);
    if let (Ok(span), Ok(at)) = (text.parse::<Span>(), "2026-01-01T00:00:00Z".parse::<Timestamp>()) {
        assert!(at.after(span.get()) >= at);
    }
}

/// A result of a given text.
struct Held(Vec<u8>);

#[async_trait]
impl Blobs for Held {
    async fn put(&self, _: &mut (dyn AsyncRead + Unpin + Send), _: Media) -> transport::Result<BlobRef> {
        Err(transport::Error::Closed)
    }

    async fn open(&self, _: &str, range: std::ops::Range<u64>) -> transport::Result<Box<dyn AsyncRead + Unpin + Send>> {
        let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(self.0.len());
        Ok(Box::new(std::io::Cursor::new(self.0[place(range.start)..place(range.end)].to_vec())))
    }

    async fn size(&self, _: &str) -> transport::Result<u64> {
        Ok(self.0.len() as u64)
    }
}

/// A letter for the kind, the selector, and below its line the result.
fn selector(bytes: &[u8]) {
    static RUNTIME: OnceLock<Option<Runtime>> = OnceLock::new();
    const GIVEN_MAX: u64 = 512;
    let line = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let (Ok(head), result) = (std::str::from_utf8(&bytes[..line]), bytes.get(line + 1..).unwrap_or_default()) else { return };
    let mut head = head.chars();
    let parsed = match head.next() {
        Some('l') => Selector::lines(head.as_str()),
        Some('b') => Selector::bytes(head.as_str()),
        Some('g') => Selector::grep(head.as_str()),
        Some('j') => Selector::jsonpath(head.as_str()),
        _ => return,
    };
    let selector = match parsed {
        Ok(selector) => selector,
        Err(error) => return assert!(error.to_string().len() < 8 << 10, "a refusal does not repeat all of the selector"),
    };
    let runtime = RUNTIME.get_or_init(|| tokio::runtime::Builder::new_current_thread().enable_all().build().ok());
    let Some(runtime) = runtime else { return };
    let size = result.len() as u64;
    let media = if matches!(selector, Selector::JsonPath(_)) { Media::Json } else { Media::Text };
    let output = Output::Blob(BlobRef { sha256: "0".repeat(64), size, media });
    let limits = config::Results { selection_max: Size::bytes(GIVEN_MAX), ..config::Results::default() };
    let blobs: Arc<dyn Blobs> = Arc::new(Held(result.to_vec()));
    if let Ok(found) = runtime.block_on(results::select(&blobs, &output, &selector, &limits)) {
        assert_eq!(found.total_bytes, size);
        // A byte that is no text is shown as a character of three.
        assert!(found.text.len() as u64 <= 3 * GIVEN_MAX, "{} bytes were given", found.text.len());
        assert!(found.note.is_some() || !found.truncated, "what is cut is said to be");
    }
}

fn address(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    mcp::fuzz::address(text);
    http::fuzz::names(text);
    http::fuzz::hops(text);
}

fn message(bytes: &[u8]) {
    mcp::fuzz::line(bytes);
    http::fuzz::body(bytes);
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// How long one input may take; a debug build of a busy machine is far slower than what is shipped.
    const SLOW: Duration = Duration::from_secs(10);

    #[test]
    fn the_kept_corpus_breaks_no_law_and_takes_no_time() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        let mut broken = Vec::new();
        for (name, run) in TARGETS {
            let dir = corpus.join(name);
            let entries = std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
            let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
            files.sort();
            assert!(!files.is_empty(), "{name} has no corpus");
            for file in files {
                let bytes = std::fs::read(&file).unwrap();
                let began = Instant::now();
                let kept = std::panic::catch_unwind(|| run(&bytes)).is_ok();
                if !kept || began.elapsed() > SLOW {
                    broken.push(format!("{} ({:?})", file.display(), began.elapsed()));
                }
            }
        }
        assert!(broken.is_empty(), "{}", broken.join("\n"));
    }

    #[test]
    fn every_target_can_be_fuzzed() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
        for (name, _) in TARGETS {
            let program = std::fs::read_to_string(fuzz.join(format!("targets/{name}.rs"))).unwrap();
            assert!(program.contains(&format!("{name:?}")), "{name}");
            assert!(manifest.contains(&format!("name = {name:?}\n")), "{name}");
        }
    }
}
