//! What fuzzing does with what other stations put into the registry's tables.

use bytes::Bytes;

use super::rows::{bytes_of, claim_of, sign_of};
use crate::transport::Row;

/// A row's key, and below its line its value.
pub(crate) fn presence(bytes: &[u8]) {
    let line = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let key = String::from_utf8_lossy(&bytes[..line]).into_owned();
    let row = |value| Row { key: key.clone(), value, revision: 1 };
    let given = row(Bytes::copy_from_slice(bytes.get(line + 1..).unwrap_or_default()));
    if let Some((name, (claim, _))) = claim_of(&given) {
        let again = claim_of(&row(bytes_of(&claim)));
        assert!(again.is_some_and(|(again, (held, _))| again == name && held.station == claim.station), "a claim survives the wire");
    }
    if let Some((_, sign)) = sign_of(&given) {
        let again = sign_of(&row(bytes_of(&sign)));
        assert!(again.is_some_and(|(_, again)| again == sign), "a sign of life survives the wire");
    }
}
