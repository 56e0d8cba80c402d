//! The runner that answers with its task at once: to try a lattice out, and to measure what the rest costs.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;

use super::input::Input;
use super::{Ended, Line, Order, Runner, unstored};
use crate::model::event::Failure;
use crate::model::output::{Media, Output};
use crate::model::size::Size;
use crate::transport::Blobs;

/// Answers with its task.
pub struct Echo {
    blobs: Arc<dyn Blobs>,
    inline_max: Size,
}

impl Echo {
    /// Keeps results above `inline_max` as blobs.
    pub fn new(blobs: Arc<dyn Blobs>, inline_max: Size) -> Self {
        Self { blobs, inline_max }
    }

    async fn answer(&self, order: &Order) -> Result<Output, Failure> {
        let task = match &order.assignment.input_ref {
            None => order.assignment.task.clone(),
            Some(_) => Input::of(&order.assignment, &self.blobs).await?.task().await?,
        };
        if task.len() <= self.inline_max.as_usize() {
            return Ok(Output::Inline(Value::String(task)));
        }
        let stored = self.blobs.put(&mut task.as_bytes(), Media::Text).await;
        stored.map(Output::Blob).map_err(|error| unstored(&error))
    }
}

#[async_trait]
impl Runner for Echo {
    async fn run(&self, order: Order, line: Line) -> Ended {
        tokio::select! {
            biased;
            () = line.stop.cancelled() => Ended::Stopped,
            answer = self.answer(&order) => answer.map_or_else(Ended::Failed, Ended::Complete),
        }
    }
}
