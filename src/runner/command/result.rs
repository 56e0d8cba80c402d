//! From what a program printed to the work's result.

use std::sync::Arc;

use jsonschema::Validator;
use serde_json::Value;
use tokio::fs::File;
use tokio::io::AsyncRead;

use super::schema::{mismatch, shown};
use super::spool::{Printed, beginning};
use super::streams::{Heard, unkept};
use crate::model::event::{Failure, FailureKind};
use crate::model::output::{Media, Output};
use crate::runner::{Context, unstored};

const EVIDENCE_MAX: usize = 1024;

/// What a result is checked against.
#[derive(Clone)]
pub(super) struct Check {
    /// The schema itself, to quote from.
    pub(super) schema: Arc<Value>,
    /// The same, compiled.
    pub(super) validator: Arc<Validator>,
}

/// The result: checked, and stored if it is large.
pub(super) async fn deliver(context: &Context, check: Option<Check>, heard: Heard) -> Result<Output, Failure> {
    let evidence = heard.spool.evidence();
    if let Some(raw) = heard.result {
        return json(context, check, raw, "the result").await;
    }
    let printed = heard.spool.finish().await.map_err(|error| unkept(&error))?;
    match (printed, check) {
        (Printed::Memory(text), None) => Ok(Output::Inline(Value::String(text))),
        (Printed::File { path, .. }, None) => {
            let mut file = File::open(&path).await.map_err(|error| unkept(&error))?;
            store(context, &mut file, Media::Text).await
        }
        (Printed::Memory(text), check) => json(context, check, text, "the output").await,
        (Printed::File { size, .. }, Some(_)) if size > context.runner.checked_max.get() => {
            Err(Failure { evidence: Some(evidence), ..too_large(context, size) })
        }
        (Printed::File { path, .. }, check) => {
            let text = tokio::fs::read_to_string(&path).await.map_err(|error| unkept(&error))?;
            json(context, check, text, "the output").await
        }
    }
}

/// What a program had printed when it was stopped: kept as it stands, and unchecked.
pub(super) async fn printed(context: &Context, heard: Heard) -> Option<Output> {
    let kept = match heard.spool.finish().await {
        Ok(Printed::Memory(text)) if text.is_empty() => return heard.result.map(|raw| Output::Inline(Value::String(raw))),
        Ok(Printed::Memory(text)) => Ok(Output::Inline(Value::String(text))),
        Ok(Printed::File { path, .. }) => match File::open(&path).await {
            Ok(mut file) => store(context, &mut file, Media::Text).await,
            Err(error) => Err(unkept(&error)),
        },
        Err(error) => Err(unkept(&error)),
    };
    kept.inspect_err(|failure| tracing::warn!(reason = failure.message, "what a stopped program had printed is lost")).ok()
}

async fn json(context: &Context, check: Option<Check>, raw: String, noun: &'static str) -> Result<Output, Failure> {
    if check.is_some() && raw.len() as u64 > context.runner.checked_max.get() {
        return Err(too_large(context, raw.len() as u64));
    }
    let inline_max = context.results.inline_max.as_usize();
    let checked = tokio::task::spawn_blocking(move || checked(check.as_ref(), raw, noun, inline_max)).await;
    match checked.map_err(|error| Failure::new(FailureKind::Crashed, format!("the result could not be checked: {error}")))?? {
        Checked::Inline(value) => Ok(Output::Inline(value)),
        Checked::Large(text, media) => store(context, &mut text.as_bytes(), media).await,
    }
}

enum Checked {
    Inline(Value),
    Large(String, Media),
}

fn checked(check: Option<&Check>, raw: String, noun: &str, inline_max: usize) -> Result<Checked, Failure> {
    let bad =
        |text: String| Failure { evidence: Some(beginning(&raw, EVIDENCE_MAX).to_owned()), ..Failure::new(FailureKind::BadOutput, text) };
    let value: Value = serde_json::from_str(&raw).map_err(|error| {
        let came = if raw.trim().is_empty() { "nothing".to_owned() } else { shown(raw.trim()) };
        bad(format!("{noun} is not JSON, which the agent's output schema asks for ({error}): {came}"))
    })?;
    if let Some(check) = check
        && let Some(text) = mismatch(&check.validator, &check.schema, &value)
    {
        return Err(bad(format!("{noun} does not fit the agent's output schema: {text}")));
    }
    Ok(match value {
        Value::String(text) if text.len() > inline_max => Checked::Large(text, Media::Text),
        Value::String(text) => Checked::Inline(Value::String(text)),
        value if value.to_string().len() > inline_max => Checked::Large(raw.trim().to_owned(), Media::Json),
        value => Checked::Inline(value),
    })
}

fn too_large(context: &Context, size: u64) -> Failure {
    let max = context.runner.checked_max;
    let text = format!("the result has {size} bytes: with an output schema it is checked in memory, and runner.checked_max is {max}");
    Failure::new(FailureKind::Limit, text)
}

async fn store(context: &Context, source: &mut (dyn AsyncRead + Unpin + Send), media: Media) -> Result<Output, Failure> {
    let stored = context.blobs.put(source, media).await;
    stored.map(Output::Blob).map_err(|error| unstored(&error))
}
