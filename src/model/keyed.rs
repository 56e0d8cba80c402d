//! What stands under an idempotency key: the work that it was used for. Whoever keeps such rows in two places marks them besides.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::id::{RunId, WorkId};

/// The mark of a row whose work lives in this machine's store.
const HERE: &str = "here";
/// The mark of a row whose work has been given out: `Keyed::done`.
const DONE: &str = "done";

/// What stands under a key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Keyed {
    /// The work.
    pub work_id: WorkId,
    /// Its run.
    pub run_id: RunId,
    /// Tells the order from any other.
    pub order: String,
    /// The hook has had the work: it is not given out again, whatever has become of its events.
    #[serde(default)]
    pub done: bool,
}

/// The work that a row names; of one whose other parts cannot be read, too.
pub fn work_of(row: &[u8]) -> Option<WorkId> {
    #[derive(Deserialize)]
    struct Named {
        work_id: WorkId,
    }
    serde_json::from_slice(row).ok().map(|named: Named| named.work_id)
}

fn is_marked(row: &[u8], mark: &str) -> bool {
    serde_json::from_slice::<Value>(row).is_ok_and(|row| row[mark] == true)
}

/// Whether a row says that its work lives here.
pub fn lives_here(row: &[u8]) -> bool {
    is_marked(row, HERE)
}

/// Whether a row says that its work has been given out.
pub fn is_done(row: &[u8]) -> bool {
    is_marked(row, DONE)
}

/// The same row, which says that its work lives here.
pub fn claimed(row: &Bytes) -> Bytes {
    changed(row, |row| _ = row.insert(HERE.to_owned(), true.into()))
}

/// The same row as everybody may read it, which says that its work has been given out.
pub fn done(row: &Bytes) -> Bytes {
    changed(row, |row| {
        row.remove(HERE);
        row.insert(DONE.to_owned(), true.into());
    })
}

fn changed(row: &Bytes, change: impl FnOnce(&mut Map<String, Value>)) -> Bytes {
    match serde_json::from_slice::<Value>(row) {
        Ok(Value::Object(mut members)) => {
            change(&mut members);
            Bytes::from(Value::Object(members).to_string())
        }
        _ => row.clone(),
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_row_and_its_marks_are_read_back() {
        let id = WorkId::new(Uuid::from_u128(7));
        let keyed = Keyed { work_id: id, run_id: RunId::root_of(Uuid::from_u128(8)).child(1), order: "x".into(), done: false };
        let row = Bytes::from(serde_json::to_vec(&keyed).unwrap());
        assert_eq!((work_of(&row), is_done(&row), lives_here(&row)), (Some(id), false, false));
        let claimed = claimed(&row);
        assert!(lives_here(&claimed) && !is_done(&claimed));
        assert_eq!(serde_json::from_slice::<Keyed>(&claimed).unwrap(), keyed);
        let done = done(&claimed);
        assert!(is_done(&done) && !lives_here(&done));
        assert_eq!(serde_json::from_slice::<Keyed>(&done).unwrap(), Keyed { done: true, ..keyed });
        assert_eq!(work_of(b"no row"), None);
    }
}
