//! The readers: a few threads with a connection each.

use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::Connection;
use tokio::sync::mpsc;

/// How many threads read.
pub(super) const READERS: usize = 2;
/// How many questions may wait for them.
pub(super) const WAITING_MAX: usize = 1024;

/// A question to the store.
pub(super) type Question = Box<dyn FnOnce(&Connection) + Send>;

/// Answers questions until nobody can ask any more.
pub(super) fn run(questions: &Arc<Mutex<mpsc::Receiver<Question>>>, conn: &Connection) {
    loop {
        let question = questions.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        match question {
            Some(question) => question(conn),
            None => return,
        }
    }
}
