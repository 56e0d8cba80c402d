use std::ops::Range;

use async_trait::async_trait;
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::*;
use crate::model::output::BlobRef;

/// A blob that is made while it is read, so that only the reader's memory counts.
struct Made {
    size: u64,
    /// Writes the bytes from a place on.
    fill: fn(u64, &mut [u8]),
}

#[async_trait]
impl Blobs for Made {
    async fn put(&self, _: &mut (dyn AsyncRead + Unpin + Send), _: Media) -> transport::Result<BlobRef> {
        Err(transport::Error::Closed)
    }

    async fn open(&self, _: &str, range: Range<u64>) -> transport::Result<Box<dyn AsyncRead + Unpin + Send>> {
        let (fill, end) = (self.fill, range.end.min(self.size));
        let mut at = range.start;
        let reader = std::iter::from_fn(move || {
            let mut piece = vec![b'x'; usize::try_from((end - at).min(65_536)).unwrap()];
            fill(at, &mut piece);
            at += piece.len() as u64;
            (!piece.is_empty()).then(|| Ok::<_, std::io::Error>(::bytes::Bytes::from(piece)))
        });
        Ok(Box::new(tokio_util::io::StreamReader::new(futures_util::stream::iter(reader))))
    }

    async fn size(&self, _: &str) -> transport::Result<u64> {
        Ok(self.size)
    }
}

/// Blobs with a body, given in pieces of every size.
struct Held(Vec<u8>);

#[async_trait]
impl Blobs for Held {
    async fn put(&self, _: &mut (dyn AsyncRead + Unpin + Send), _: Media) -> transport::Result<BlobRef> {
        Err(transport::Error::Closed)
    }

    async fn open(&self, _: &str, range: Range<u64>) -> transport::Result<Box<dyn AsyncRead + Unpin + Send>> {
        let place = |at: u64| usize::try_from(at).unwrap().min(self.0.len());
        let part = self.0[place(range.start)..place(range.end)].to_vec();
        let pieces: Vec<_> = part.chunks(7001).map(|piece| Ok::<_, std::io::Error>(::bytes::Bytes::copy_from_slice(piece))).collect();
        Ok(Box::new(tokio_util::io::StreamReader::new(futures_util::stream::iter(pieces))))
    }

    async fn size(&self, _: &str) -> transport::Result<u64> {
        Ok(self.0.len() as u64)
    }
}

fn blob(size: u64, media: Media) -> Output {
    Output::Blob(BlobRef { sha256: "0".repeat(64), size, media })
}

fn limits(max: u64) -> config::Results {
    config::Results { selection_max: Size::bytes(max), search_timeout: Span::secs(300), ..config::Results::default() }
}

fn ask_within(bytes: &[u8], media: Media, selector: &Selector, limits: &config::Results) -> Result<Selection, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let blobs: Arc<dyn Blobs> = Arc::new(Held(bytes.to_vec()));
    runtime.block_on(select(&blobs, &blob(bytes.len() as u64, media), selector, limits))
}

fn ask(text: &str, selector: &Selector) -> Selection {
    ask_within(text.as_bytes(), Media::Text, selector, &limits(1 << 20)).unwrap()
}

fn at(document: &Value, path: &str) -> Result<Selection, Error> {
    ask_within(document.to_string().as_bytes(), Media::Json, &Selector::jsonpath(path)?, &limits(1 << 20))
}

fn note(selection: &Selection) -> &str {
    selection.note.as_deref().unwrap_or("")
}

#[test]
fn ranges_are_strict() {
    assert_eq!(Selector::lines("10-40").unwrap(), Selector::Lines { from: 10, to: 40 });
    assert_eq!(Selector::lines("10").unwrap(), Selector::Lines { from: 10, to: 10 });
    assert_eq!(Selector::lines(" 10 - ").unwrap(), Selector::Lines { from: 10, to: u64::MAX });
    assert_eq!(Selector::bytes("0-1023").unwrap(), Selector::Bytes { from: 0, to: 1023 });
    assert_eq!(Selector::lines("1-99999999999999999999").unwrap(), Selector::Lines { from: 1, to: u64::MAX });
    for bad in ["", "0", "0-3", "-3", "4-3", "a", "1-2-3", "1,2", "+1", "1.5", "-", "٣", "1--2"] {
        let error = Selector::lines(bad).unwrap_err().to_string();
        assert!(error.contains(&format!("{bad:?}")) && error.contains("10-40"), "{error}");
    }
    assert!(Selector::bytes("-5").is_err());
}

#[test]
fn lines_come_as_they_are() {
    let text = "one\ntwo\r\n\nfour";
    assert_eq!(ask(text, &Selector::lines("2-3").unwrap()).text, "two\r\n\n");
    assert_eq!(ask(text, &Selector::lines("4").unwrap()).text, "four");
    assert_eq!(ask(text, &Selector::lines("2-").unwrap()).text, "two\r\n\nfour");
    let beyond = ask(text, &Selector::lines("7-9").unwrap());
    assert_eq!((beyond.text.as_str(), note(&beyond)), ("", "the result has 4 lines"));
    assert_eq!(note(&ask("", &Selector::lines("1").unwrap())), "the result has 0 lines");
    assert_eq!(note(&ask("a\n", &Selector::lines("2").unwrap())), "the result has 1 lines");
}

#[test]
fn lines_that_have_no_room_are_named_in_the_note() {
    let text: String = (1..=100).map(|n| format!("line {n}\n")).collect();
    let first = ask_within(text.as_bytes(), Media::Text, &Selector::lines("1-90").unwrap(), &limits(30)).unwrap();
    assert_eq!(first.text, "line 1\nline 2\nline 3\nline 4\n");
    assert!(first.truncated && note(&first).ends_with("go on with lines: \"5-90\""), "{}", note(&first));
}

#[test]
fn a_long_line_is_cut_and_the_rest_can_be_read_by_bytes() {
    let text = format!("short\n{}\nend\n", "ü".repeat(40_000));
    let several = ask(&text, &Selector::lines("1-").unwrap());
    assert!(several.truncated && several.text.starts_with("short\nüü") && several.text.ends_with("ü\nend\n"), "{}", several.text.len());
    assert_eq!(note(&several), "line 2 is cut: read on with bytes: \"16390-80010\"");
    let alone = ask_within(text.as_bytes(), Media::Text, &Selector::lines("2").unwrap(), &limits(101)).unwrap();
    assert_eq!((alone.text.len(), note(&alone)), (100, "line 2 is cut: read on with bytes: \"106-206\""));
}

#[test]
fn bytes_are_cut_to_whole_characters_and_nothing_is_lost_between_two_reads() {
    let text = "aé€😀z".repeat(50);
    let (mut from, mut read) = (0, String::new());
    loop {
        let part = ask_within(text.as_bytes(), Media::Text, &Selector::Bytes { from, to: u64::MAX }, &limits(7)).unwrap();
        assert!(!part.text.contains('\u{fffd}'));
        from += part.text.len() as u64;
        read.push_str(&part.text);
        if !part.truncated {
            break;
        }
        assert!(note(&part).contains(&format!("bytes: \"{from}-")), "{}", note(&part));
    }
    assert_eq!(read, text);
    let inside = ask("é€", &Selector::bytes("1-3").unwrap());
    assert_eq!((inside.text.as_str(), inside.truncated), ("\u{fffd}\u{fffd}", false));
    assert!(note(&ask("é€x", &Selector::bytes("1-").unwrap())).contains("the text is bytes 2-5"));
    assert_eq!(note(&ask("abc", &Selector::bytes("3").unwrap())), "the result has 3 bytes, counted from 0");
}

#[test]
fn grep_numbers_its_lines() {
    let text = "alpha\nbeta\r\ngamma\n";
    assert_eq!(ask(text, &Selector::grep("^.*a$").unwrap()).text, "1: alpha\n2: beta\n3: gamma\n");
    let none = ask(text, &Selector::grep("delta").unwrap());
    assert_eq!((none.text.as_str(), note(&none)), ("", "no line matches \"delta\""));
    let full = ask_within(text.as_bytes(), Media::Text, &Selector::grep("a").unwrap(), &limits(18)).unwrap();
    assert_eq!(full.text, "1: alpha\n2: beta\n");
    assert!(full.truncated && note(&full).contains("lines: \"3-\""), "{}", note(&full));
}

#[test]
fn grep_finds_what_stands_anywhere_in_a_long_line() {
    for place in [0, 1, 32_760, 32_768, 36_864, 65_530, 70_000, 199_990] {
        let mut line = vec![b'.'; 200_000];
        line[place..place + 6].copy_from_slice(b"needle");
        let text = format!("first\n{}\nlast", String::from_utf8(line).unwrap());
        let found = ask(&text, &Selector::grep("n[e]+dle").unwrap());
        assert_eq!(found.text.matches("needle").count(), 1, "at {place}: {}", found.text);
        assert!(found.text.starts_with(&format!("2 (byte {}): ", place + 6)), "at {place}: {}", found.text);
        assert!(note(&found).contains("surroundings"));
    }
}

#[test]
fn anchors_hold_at_the_ends_of_a_long_line_only() {
    let text = "ab".repeat(60_000);
    assert_eq!(ask(&text, &Selector::grep("^b").unwrap()).text, "");
    assert_eq!(ask(&text, &Selector::grep("a$").unwrap()).text, "");
    assert!(ask(&text, &Selector::grep("ab$").unwrap()).text.starts_with("1 (byte 119998): …"));
    assert!(ask(&text, &Selector::grep("^ab").unwrap()).text.starts_with("1 (byte 0): ab"));
}

#[test]
fn a_bad_pattern_shows_what_is_wrong() {
    let error = Selector::grep("a(b").unwrap_err().to_string();
    assert!(error.contains("\"a(b\"") && error.contains("unclosed group"), "{error}");
    assert!(Selector::grep(r"(?:\w{500}){500}").unwrap_err().to_string().contains("smaller repetitions"));
    assert!(Selector::grep(&"a".repeat(5000)).is_err());
}

#[test]
fn a_search_that_runs_out_of_time_says_how_far_it_got() {
    let limits = config::Results { search_timeout: Span::millis(60), ..config::Results::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let blobs: Arc<dyn Blobs> =
        Arc::new(Made { size: 1 << 40, fill: |_, piece| piece.iter_mut().step_by(64).for_each(|byte| *byte = b'\n') });
    for selector in [Selector::Grep("^y".into()), Selector::Lines { from: 1 << 50, to: u64::MAX }] {
        let started = std::time::Instant::now();
        let found = runtime.block_on(select(&blobs, &blob(1 << 40, Media::Text), &selector, &limits)).unwrap();
        assert!(started.elapsed() < std::time::Duration::from_secs(2));
        assert!(found.truncated && note(&found).contains("stopped after 60ms (results.search_timeout) at byte"), "{}", note(&found));
    }
}

#[test]
fn paths_lead_where_they_say() {
    let document = json!({
        "a": {"b": [0, 1, 2, {"c": "deep"}]}, "x y": 1, "it's": 2, "ü": 3, "q\"": 4,
        "items": [{"name": "n0"}, {"name": "n1"}, {"other": 1}, {"name": "n3"}]
    });
    for (path, text) in [
        ("$.a.b[3].c", "\"deep\""),
        ("$['x y']", "1"),
        ("$[\"it's\"]", "2"),
        ("$['it\\'s']", "2"),
        ("$.ü", "3"),
        ("$['q\"']", "4"),
        ("$.items[*].name", "[\"n0\",\"n1\",\"n3\"]"),
        ("$.items[0:2]", "[{\"name\":\"n0\"},{\"name\":\"n1\"}]"),
        ("$.items[ 1 : ].name", "[\"n1\",\"n3\"]"),
        ("$.a.b[::2]", "[0,2]"),
        ("$.items[-1].name", "\"n3\""),
        ("$.items[-2:].name", "[\"n3\"]"),
        ("$..c", "[\"deep\"]"),
        ("$.items[?@.name=='n1'].name", "[\"n1\"]"),
    ] {
        let found = at(&document, path).unwrap();
        assert_eq!((found.text.as_str(), found.truncated, found.note.as_deref()), (text, false, None), "{path}");
    }
    let none = at(&document, "$.a.nothing").unwrap();
    assert_eq!((none.text.as_str(), note(&none)), ("", "nothing in the result matches \"$.a.nothing\""));
    assert_eq!(at(&document, "$.items[9:]").unwrap().text, "[]");
    assert_eq!(at(&json!([1]), "$").unwrap().text, "[1]");
}

#[test]
fn a_bad_path_shows_what_is_wrong() {
    for bad in ["", "a.b", "$.", "$[", "$.a[01]", "$['a]", "$.a b", "$[?", "$.1a", "$[99999999999999999999]"] {
        let error = Selector::jsonpath(bad).unwrap_err().to_string();
        assert!(error.contains("$.items[0].name"), "{bad}: {error}");
    }
    for hostile in [format!("$[?{}", "(".repeat(4000)), format!("$[?{}", "!".repeat(4000)), "$[?@".repeat(1000), "$..*".repeat(500)] {
        assert!(Selector::jsonpath(&hostile).is_err());
    }
    assert!(Selector::jsonpath(&format!("${}", "[0,0]".repeat(60))).is_err());
}

#[test]
fn text_has_no_paths_unless_it_is_json_after_all() {
    let path = Selector::jsonpath("$.a").unwrap();
    for text in ["plain words", "", "12 apples", "{\"b\":1", "{'a': 1}"] {
        let error = ask_within(text.as_bytes(), Media::Text, &path, &limits(100)).unwrap_err();
        assert_eq!(error.to_string(), "the result is plain text; use lines, grep or bytes", "{text}");
    }
    assert_eq!(ask(" {\"a\": [1, 2]}\n", &path).text, "[1,2]");
    let error = ask_within(b"{\"b\":1,}", Media::Json, &path, &limits(100)).unwrap_err().to_string();
    assert!(error.contains("not valid JSON at byte 7") && error.contains("a key in quotes"), "{error}");
    let document = Selector::jsonpath("$..a").unwrap();
    let error = ask_within(b"{\"b\":1,}", Media::Json, &document, &limits(100)).unwrap_err().to_string();
    assert!(error.contains("not valid JSON at byte 7"), "{error}");
}

#[test]
fn matches_that_have_no_room_are_named_in_the_note() {
    let document: Value = (0..1000).map(|n| json!({"name": format!("name {n}")})).collect();
    let mut path = "$[*].name".to_owned();
    let mut all: Vec<String> = Vec::new();
    loop {
        let part = ask_within(document.to_string().as_bytes(), Media::Json, &Selector::jsonpath(&path).unwrap(), &limits(3000)).unwrap();
        all.extend(serde_json::from_str::<Vec<String>>(&part.text).unwrap());
        assert!(part.text.len() <= 3000);
        if !part.truncated {
            break;
        }
        path = serde_json::from_str(note(&part).rsplit_once("jsonpath: ").unwrap().1).unwrap();
    }
    assert_eq!(all, (0..1000).map(|n| format!("name {n}")).collect::<Vec<_>>());

    let text = json!({"log": "x".repeat(5000)}).to_string();
    let cut = ask_within(text.as_bytes(), Media::Json, &Selector::jsonpath("$.log").unwrap(), &limits(100)).unwrap();
    assert!(cut.truncated && cut.text.len() == 100 && note(&cut).contains("bytes: \"7-106\""), "{}", note(&cut));
}

#[test]
fn a_path_that_needs_the_document_says_which_do_not() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let blobs: Arc<dyn Blobs> = Arc::new(Made { size: 9 << 20, fill: |_, _| {} });
    let (output, path) = (blob(9 << 20, Media::Json), Selector::jsonpath("$[-1]").unwrap());
    let error = runtime.block_on(select(&blobs, &output, &path, &limits(100))).unwrap_err().to_string();
    assert!(error.contains("8MiB") && error.contains("$.items[0:10]"), "{error}");
}

#[tokio::test]
async fn whole_results_are_cut_between_characters() {
    let blobs: Arc<dyn Blobs> = Arc::new(Held("aéé".into()));
    let output = blob(5, Media::Text);
    let cut = whole(&blobs, &output, 4).await.unwrap();
    assert_eq!(cut, Whole { text: "aé".into(), media: Media::Text, total_bytes: 5, truncated: true });
    assert_eq!(whole(&blobs, &output, 5).await.unwrap().text, "aéé");
    let inline = whole(&blobs, &Output::Inline(json!({"a": [1]})), 100).await.unwrap();
    assert_eq!((inline.text.as_str(), inline.media, inline.truncated), ("{\"a\":[1]}", Media::Json, false));
}

#[test]
fn a_digest_is_that_of_the_text() {
    let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    assert_eq!(digest(&Output::Inline(json!("abc"))), (abc.into(), 3));
    assert_eq!(digest(&Output::Inline(json!({"b": 1}))).1, 7);
    assert_eq!(digest(&blob(9, Media::Json)), ("0".repeat(64), 9));
}

#[tokio::test]
async fn a_dropped_search_ends() {
    let (source, stops) = Source::new(Box::new(tokio::io::repeat(b'x').take(u64::MAX)), u64::MAX, Span::secs(300));
    let search = tokio::task::spawn_blocking(move || lines::select(source, 2, 2, &config::Results::default()));
    drop(stops);
    let ended = tokio::time::timeout(std::time::Duration::from_secs(20), search).await;
    assert!(ended.is_ok(), "the search went on although nobody waits");
}

#[cfg(target_os = "linux")]
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

/// One line of 100 MB that is one JSON document as well.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_result_of_100_mb_is_searched_without_holding_it() {
    const SIZE: u64 = 100_000_000;
    const HEAD: &[u8] = b"{\"big\":\"";
    const TAIL: &[u8] = b"\",\"end\":[7,8]}";
    let fill = |at: u64, piece: &mut [u8]| {
        let tail = SIZE - TAIL.len() as u64;
        for (begin, part) in [(0, HEAD), (tail, TAIL)] {
            for (place, byte) in (begin..).zip(part) {
                if let Some(there) = place.checked_sub(at).and_then(|place| piece.get_mut(usize::try_from(place).unwrap())) {
                    *there = *byte;
                }
            }
        }
    };
    let blobs: Arc<dyn Blobs> = Arc::new(Made { size: SIZE, fill });
    let output = blob(SIZE, Media::Json);
    let before = resident_kib();
    for (selector, wanted) in [
        (Selector::jsonpath("$.end[1]").unwrap(), "8"),
        (Selector::jsonpath("$.big").unwrap(), "\"xxx"),
        (Selector::jsonpath("$[*][0]").unwrap(), "[7]"),
        (Selector::grep("\"end\":").unwrap(), "1 (byte 99999988): …xxx"),
        (Selector::lines("1").unwrap(), "{\"big\":\"xxx"),
        (Selector::lines("1-2").unwrap(), "{\"big\":\"xxx"),
        (Selector::bytes("99999990-").unwrap(), "nd\":[7,8]}"),
    ] {
        let found = select(&blobs, &output, &selector, &limits(64 << 10)).await.unwrap();
        assert!(found.text.starts_with(wanted), "{selector:?}: {:.80} {:?}", found.text, found.note);
        assert!(found.text.len() <= 65 << 10);
        let grown = resident_kib().saturating_sub(before);
        assert!(grown < 20 << 10, "{selector:?} let memory grow by {grown} KiB");
    }
}

fn documents() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-1e9..1e9f64).prop_map(Value::from),
        ".{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 60, 6, |inner| {
        let key = prop_oneof!["[a-d]", Just("x y".to_owned()), Just("ü\"'\\\n".to_owned())];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(key, inner, 0..6).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn paths() -> impl Strategy<Value = String> {
    let step = prop_oneof![
        "\\.[a-d]",
        "\\[[0-5]\\]",
        "\\[[0-4]?:[0-9]?(:[1-3])?\\]",
        Just(".*".to_owned()),
        Just("[*]".to_owned()),
        Just("['x y']".to_owned()),
        Just("[\"ü\\\"'\\\\\\n\"]".to_owned()),
    ];
    prop::collection::vec(step, 0..5).prop_map(|steps| format!("${}", steps.concat()))
}

proptest! {
    #[test]
    fn streamed_paths_find_what_the_document_holds(document in documents(), path in paths(), pretty in any::<bool>()) {
        let text = if pretty { serde_json::to_string_pretty(&document).unwrap() } else { document.to_string() };
        let selector = Selector::jsonpath(&path).unwrap();
        prop_assert!(matches!(path::parse(&path).unwrap(), path::Path::Streams(_)));
        let found = ask_within(text.as_bytes(), Media::Json, &selector, &limits(1 << 20)).unwrap();
        let wanted: Vec<&Value> = serde_json_path::JsonPath::parse(&path).unwrap().query(&document).all();
        let singular = !path.contains(['*', ':']);
        let got: Vec<Value> = match (singular, found.text.is_empty()) {
            (true, true) => vec![],
            (true, false) => vec![serde_json::from_str(&found.text).unwrap()],
            (false, _) => serde_json::from_str(&found.text).unwrap(),
        };
        prop_assert_eq!(got.iter().collect::<Vec<_>>(), wanted);
    }

    #[test]
    fn what_is_taken_as_a_simple_path_is_a_path(path in "\\$[.\\[\\]'\"a-c0-2:* \\\\-]{0,12}") {
        if path::parse(&path).is_ok() {
            prop_assert!(serde_json_path::JsonPath::parse(path.trim()).is_ok(), "{}", path);
        }
    }

    #[test]
    fn the_cursor_takes_what_serde_takes(text in "[\\[\\]{}\",:0-2.eE+ tfn\\\\u-]{0,16}|(true|null|\"a\"|[\\[\\]{},:]|1){0,12}") {
        let mut cursor = json::Cursor::new(text.as_bytes());
        let ours = cursor.skip().is_ok() && matches!(cursor.token(), Ok(None));
        prop_assert_eq!(ours, serde_json::from_str::<serde::de::IgnoredAny>(&text).is_ok(), "{}", text);
    }

    #[test]
    fn lines_are_those_of_the_text(text in "[a-cé\n]{0,60}", from in 1u64..8, more in 0u64..8) {
        let wanted: String = text.split_inclusive('\n').skip(from as usize - 1).take(more as usize + 1).collect();
        let found = ask(&text, &Selector::Lines { from, to: from + more });
        prop_assert_eq!(found.text, wanted);
        prop_assert!(!found.truncated);
    }

    #[test]
    fn reading_on_by_lines_gives_the_whole_text(text in "[a-c\n]{0,80}", max in 8u64..40) {
        let (mut from, mut read) = ("1-".to_owned(), String::new());
        loop {
            let part = ask_within(text.as_bytes(), Media::Text, &Selector::lines(&from).unwrap(), &limits(max)).unwrap();
            if part.note.as_deref().is_some_and(|note| note.contains("is cut")) {
                return Ok(());
            }
            read.push_str(&part.text);
            if !part.truncated {
                break;
            }
            from = note(&part).rsplit_once("lines: ").unwrap().1.trim_matches('"').to_owned();
        }
        prop_assert_eq!(read, text);
    }

    #[test]
    fn grep_finds_the_lines_that_match(text in "[a-c\n]{0,60}", pattern in "\\^?[a-c.]{0,3}\\$?") {
        let regex = regex::Regex::new(&pattern).unwrap();
        let lines = text.lines().enumerate().filter(|(_, line)| regex.is_match(line));
        let wanted: String = lines.map(|(n, line)| format!("{}: {line}\n", n + 1)).collect();
        prop_assert_eq!(ask(&text, &Selector::grep(&pattern).unwrap()).text, wanted);
    }

    #[test]
    fn bytes_are_those_of_the_text(text in ".{0,30}", from in 0u64..40, more in 0u64..40) {
        let found = ask(&text, &Selector::Bytes { from, to: from + more });
        let (start, end) = (from as usize, (from + more + 1).min(text.len() as u64) as usize);
        if let Some(wanted) = text.get(start..end.max(start)) {
            prop_assert_eq!(found.text, wanted);
        }
    }

    #[test]
    fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), selector in ".{0,20}", max in 1u64..50) {
        let selectors = [Selector::lines(&selector), Selector::bytes(&selector), Selector::grep(&selector), Selector::jsonpath(&selector)];
        let fixed = [Selector::lines("1-"), Selector::bytes("1-20"), Selector::grep("."), Selector::jsonpath("$[*]")];
        for selector in selectors.into_iter().chain(fixed).flatten() {
            let _ = ask_within(&bytes, Media::Json, &selector, &limits(max));
            let _ = ask_within(&bytes, Media::Text, &selector, &limits(max));
        }
    }
}
