//! Ranges of bytes, cut inward to whole characters.

use std::sync::Arc;

use tokio::io::AsyncReadExt;

use super::{Error, Notes, Selection, read_error, source, text_of, whole_chars};
use crate::config;
use crate::model::output::Output;
use crate::transport::Blobs;

pub(super) async fn select(
    blobs: &Arc<dyn Blobs>,
    output: &Output,
    total: u64,
    from: u64,
    to: u64,
    limits: &config::Results,
) -> Result<Selection, Error> {
    if from >= total {
        let note = Some(format!("the result has {total} bytes, counted from 0"));
        return Ok(Selection { text: String::new(), total_bytes: total, truncated: false, note });
    }
    let max = limits.selection_max.get();
    let wanted = to.saturating_add(1).min(total);
    let end = wanted.min(from.saturating_add(max));
    let mut held = Vec::new();
    let reader = source::open(blobs, output, from..end).await?;
    reader.take(end - from).read_to_end(&mut held).await.map_err(read_error)?;
    let (first, last) = inward(&held, from > 0, end < total);
    let (begin, stop) = (from + first as u64, from + last as u64);
    let mut notes = Notes::default();
    let cut = begin > from || (stop < end && end == wanted);
    notes.say(cut.then(|| format!("the range cuts a character: the text is bytes {begin}-{}", stop - 1)));
    let truncated = end < wanted;
    if truncated {
        let next = stop.saturating_add(max).min(wanted) - 1;
        notes.say(format!(
            "at most {} are given at once (results.selection_max): read on with bytes: \"{stop}-{next}\"",
            limits.selection_max
        ));
    }
    let (text, lossy) = text_of(held[first..last].to_vec());
    notes.say(lossy);
    Ok(Selection { text, total_bytes: total, truncated, note: notes.into_note() })
}

/// The part that is whole characters; all of it when there would be nothing left.
fn inward(bytes: &[u8], cut_before: bool, cut_after: bool) -> (usize, usize) {
    let first = if cut_before { bytes.iter().take(3).take_while(|byte| (0x80..=0xbf).contains(*byte)).count() } else { 0 };
    let last = if cut_after { whole_chars(bytes) } else { bytes.len() };
    if first < last { (first, last) } else { (0, bytes.len()) }
}
