//! What a program reads: the work as one JSON object, and answers as further lines.

use serde_json::{Map, Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::ChildStdin;
use tokio::sync::mpsc;

use super::shared::Shared;
use crate::runner::input::{Input, unreadable};
use crate::runner::{Answer, Order};

/// Writes the work, then every answer if there are to be any; ends when there is nothing more to write.
pub(super) async fn feed(mut stdin: ChildStdin, start: String, input: &Input, answers: Option<mpsc::Receiver<Answer>>, shared: &Shared) {
    // A program that does not read its input closes it or leaves it, and is free to.
    let _ = work(&mut stdin, start, input, shared).await;
    let Some(mut answers) = answers else { return };
    while let Some(answer) = answers.recv().await {
        let said = json!({"answer": answer.answer, "ask": answer.ask, "reason": answer.reason});
        let line = format!("{said}\n");
        let written = async {
            stdin.write_all(line.as_bytes()).await?;
            stdin.flush().await
        };
        if written.await.is_ok() {
            shared.answered(&answer);
        }
    }
}

/// The object's text up to its task: all that is not large, nor for the assigner's own use.
pub(super) fn start(order: &Order, prompt: &str) -> String {
    let mut fields = match serde_json::to_value(&*order.assignment) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    };
    for left_out in ["task", "context", "input_ref", "owner", "principal"] {
        fields.remove(left_out);
    }
    fields.entry("parent_work_id").or_insert(Value::Null);
    fields.insert("timeout".into(), order.assignment.timeout.to_string().into());
    fields.insert("attempt".into(), order.attempt.into());
    if !prompt.is_empty() {
        fields.insert("prompt".into(), prompt.into());
    }
    if !order.exchanges.is_empty() {
        let exchanges = order.exchanges.iter().map(|exchange| {
            let ask = &exchange.ask;
            json!({"ask": ask.ask, "reason": ask.reason, "context": ask.context, "answer": exchange.answer})
        });
        fields.insert("exchanges".into(), exchanges.collect());
    }
    let mut text = Value::Object(fields).to_string();
    text.pop();
    text.push_str(",\"task\":");
    text
}

async fn work(stdin: &mut ChildStdin, start: String, input: &Input, shared: &Shared) -> std::io::Result<()> {
    stdin.write_all(start.as_bytes()).await?;
    match input.streams().await {
        Ok(None) => {
            let (task, context) = input.message();
            stdin.write_all(Value::String(task.to_owned()).to_string().as_bytes()).await?;
            stdin.write_all(b",\"context\":").await?;
            stdin.write_all(Value::Object(context).to_string().as_bytes()).await?;
        }
        Ok(Some([mut task, mut context])) => {
            pump(&mut task, stdin, shared).await?;
            stdin.write_all(b",\"context\":").await?;
            pump(&mut context, stdin, shared).await?;
        }
        Err(failure) => shared.raise(failure),
    }
    stdin.write_all(b"}\n").await?;
    stdin.flush().await
}

async fn pump(source: &mut (dyn tokio::io::AsyncRead + Unpin + Send), stdin: &mut ChildStdin, shared: &Shared) -> std::io::Result<()> {
    let mut chunk = vec![0; 64 * 1024];
    loop {
        match source.read(&mut chunk).await {
            Ok(0) => return Ok(()),
            Ok(read) => stdin.write_all(&chunk[..read]).await?,
            Err(error) => {
                // Half an object must not pass for the work.
                shared.raise(unreadable(&error));
                return Err(error);
            }
        }
    }
}
