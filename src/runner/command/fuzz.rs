//! What fuzzing does with what programs print, and with what is put into their arguments and prompts.

use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::directive::{Directive, Piece, Splitter};
use super::placeholder::{self, Piece as Stretch, Values};
use super::prompt::render;
use super::schema::mismatch;
use crate::agents::schema::compile;
use crate::model::agent::Definition;
use crate::model::time::Timestamp;

const LINE_MAX: usize = 256;

/// A size of chunks, and a program's output.
pub(crate) fn output(bytes: &[u8]) {
    let Some((step, output)) = bytes.split_first() else { return };
    let whole = split(output, output.len(), LINE_MAX);
    assert_eq!(split(output, usize::from(*step), LINE_MAX), whole, "chunks make no difference");
    for line in whole.1 {
        match Directive::parse(line.trim_ascii_end()) {
            Err(reason) => assert!(!reason.is_empty()),
            Ok(said) => {
                assert!(said != Directive::default(), "a directive says something");
                let pct = said.progress.as_ref().and_then(|(pct, _)| *pct);
                assert!(pct.is_none_or(|pct| (0.0..=100.0).contains(&pct)), "{pct:?} of a hundred");
                assert!(said.usage.is_none_or(|usage| usage.is_plausible()));
                assert!(said.result.is_none_or(|raw| serde_json::from_str::<IgnoredAny>(&raw).is_ok()), "a result is JSON");
                let now = Timestamp::from_millis(1_700_000_000_000);
                assert!(said.fail.is_none_or(|fail| !fail.into_failure(now).message.trim().is_empty()));
            }
        }
    }
}

/// The text and the marked lines of an output that comes in pieces of so many bytes.
pub(super) fn split(output: &[u8], step: usize, line_max: usize) -> (Vec<u8>, Vec<Vec<u8>>) {
    let mut splitter = Splitter::new(line_max);
    let (mut text, mut marked) = (Vec::new(), Vec::new());
    let mut put = |piece: Piece<'_>| match piece {
        Piece::Text(bytes) => text.extend_from_slice(&bytes),
        Piece::Marked(line) => marked.push(line),
    };
    for mut chunk in output.chunks(step.max(1)) {
        while let Some(piece) = splitter.next(&mut chunk) {
            put(piece);
        }
    }
    splitter.end().into_iter().for_each(put);
    (text, marked)
}

/// An argument of a program, and below its line the context of a work.
pub(crate) fn placeholders(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (argument, context) = text.split_once('\n').unwrap_or((text, ""));
    let context: Map<String, Value> = serde_json::from_str(context).unwrap_or_default();
    let values = Values {
        task: Some("{prompt}"),
        prompt: "{task}",
        prompt_is_filled: true,
        work_id: "w",
        run_id: "r",
        agent: "a",
        attempt: "1",
        context: &context,
    };
    let mut left = argument;
    for piece in placeholder::pieces(argument) {
        let written = match piece {
            Stretch::Text(text) => text.to_owned(),
            Stretch::Filled(name) => {
                assert!(name.value(&values).is_some(), "{name:?} has a value");
                let _ = name.is_foreign(&values);
                format!("{{{}}}", name.0)
            }
        };
        // A doubled brace stands for one: `{{task}}` is `{task}`, and nothing is looked at twice.
        let rest = left.strip_prefix(&written).or_else(|| left.strip_prefix('{')?.strip_prefix(&written)?.strip_prefix('}'));
        let Some(rest) = rest else { panic!("{written:?} is not how {left:?} begins") };
        left = rest;
    }
    assert!(left.is_empty(), "{left:?} of {argument:?} is lost");
}

/// Fills an agent's prompt with nothing.
pub(crate) fn prompt(definition: &Definition) {
    if let Err(reason) = render(&definition.prompt, &Map::new(), definition.manifest.input_schema.as_ref()) {
        assert!(!reason.is_empty());
    }
}

/// A JSON Schema, and below its line a value.
pub(crate) fn schema(bytes: &[u8]) {
    let mut lines = bytes.splitn(2, |byte| *byte == b'\n').map(serde_json::from_slice::<Value>);
    let (Some(Ok(schema)), value) = (lines.next(), lines.next()) else { return };
    match (compile(&schema), value) {
        (Err(reason), _) => assert!(!reason.is_empty()),
        (Ok(validator), Some(Ok(value))) => {
            let wrong = mismatch(&validator, &schema, &value);
            assert_eq!(wrong.is_none(), validator.is_valid(&value), "{wrong:?}");
        }
        (Ok(_), _) => {}
    }
}
