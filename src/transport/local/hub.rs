//! Who in this process waits for what: followers of the log, takers of hooks, watchers of buckets.
//! It hands things on and reads nothing from the store.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};

use crate::model::id::{StationId, WorkId};
use crate::transport::{Bucket, Entry, Filter};

/// How many entries wait for a follower before it has to read them from the store.
const MAIL_MAX: usize = 4096;
/// How many bytes of entries wait for a follower before it has to read them from the store.
const MAIL_BYTES_MAX: usize = 8 << 20;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was handed to a follower and not yet picked up.
pub(super) struct Mailbox {
    mail: Mutex<Mail>,
    pub(super) ready: Notify,
}

#[derive(Default)]
struct Mail {
    entries: VecDeque<Entry>,
    bytes: usize,
    lagged: bool,
    closed: bool,
}

/// What a follower finds in its mailbox.
pub(super) enum Found {
    Entries(VecDeque<Entry>),
    Nothing,
    /// Entries were left out: the store has them.
    Lagged,
    Closed,
}

impl Mailbox {
    fn new() -> Arc<Self> {
        Arc::new(Self { mail: Mutex::default(), ready: Notify::new() })
    }

    /// Takes what is there.
    pub(super) fn open(&self) -> Found {
        let mut mail = lock(&self.mail);
        if mail.lagged {
            Found::Lagged
        } else if !mail.entries.is_empty() {
            mail.bytes = 0;
            Found::Entries(std::mem::take(&mut mail.entries))
        } else if mail.closed {
            Found::Closed
        } else {
            Found::Nothing
        }
    }

    fn deliver<'a>(&self, entries: impl Iterator<Item = &'a Entry>) {
        let mut mail = lock(&self.mail);
        let before = mail.entries.len();
        for entry in entries {
            if mail.lagged {
                return;
            }
            if mail.entries.len() >= MAIL_MAX || mail.bytes >= MAIL_BYTES_MAX {
                mail.entries = VecDeque::new();
                mail.bytes = 0;
                mail.lagged = true;
                break;
            }
            mail.bytes += entry.body.len();
            mail.entries.push_back(entry.clone());
        }
        if mail.lagged || mail.entries.len() > before {
            drop(mail);
            self.ready.notify_one();
        }
    }

    fn close(&self) {
        lock(&self.mail).closed = true;
        self.ready.notify_one();
    }
}

#[derive(Default)]
struct Followers {
    /// Everything up to here has been handed out.
    dispatched: u64,
    closed: bool,
    works: HashMap<WorkId, Vec<Arc<Mailbox>>>,
    wide: Vec<(Filter, Arc<Mailbox>)>,
}

impl Followers {
    fn mailboxes(&mut self) -> impl Iterator<Item = &Arc<Mailbox>> {
        self.works.values().flatten().chain(self.wide.iter().map(|(_, mailbox)| mailbox))
    }
}

struct Taker {
    counter: watch::Sender<u64>,
    /// The hook's own count of raises when we last looked; none before the first look.
    raised: Option<i64>,
}

/// Who waits for what.
pub(super) struct Hub {
    followers: Mutex<Followers>,
    takers: Mutex<HashMap<StationId, Taker>>,
    buckets: Mutex<Option<[watch::Sender<i64>; Bucket::ALL.len()]>>,
}

impl Hub {
    pub(super) fn new(head: u64) -> Self {
        Self {
            followers: Mutex::new(Followers { dispatched: head, ..Followers::default() }),
            takers: Mutex::default(),
            buckets: Mutex::new(Some(std::array::from_fn(|_| watch::Sender::new(0)))),
        }
    }

    /// Enters a follower; everything after the position that comes back will be in its mailbox.
    pub(super) fn join(&self, filter: Filter) -> (Arc<Mailbox>, u64) {
        let mailbox = Mailbox::new();
        let mut followers = lock(&self.followers);
        if followers.closed {
            mailbox.close();
        } else if let Filter::Work(id) = filter {
            followers.works.entry(id).or_default().push(Arc::clone(&mailbox));
        } else {
            followers.wide.push((filter, Arc::clone(&mailbox)));
        }
        (mailbox, followers.dispatched)
    }

    /// Lets a follower whose mailbox was full go on; the store has everything up to the position that comes back.
    pub(super) fn rejoin(&self, mailbox: &Mailbox) -> u64 {
        let followers = lock(&self.followers);
        lock(&mailbox.mail).lagged = false;
        followers.dispatched
    }

    pub(super) fn leave(&self, filter: Filter, mailbox: &Arc<Mailbox>) {
        let mut followers = lock(&self.followers);
        if let Filter::Work(id) = filter {
            if let Some(mailboxes) = followers.works.get_mut(&id) {
                mailboxes.retain(|other| !Arc::ptr_eq(other, mailbox));
                if mailboxes.is_empty() {
                    followers.works.remove(&id);
                }
            }
        } else {
            followers.wide.retain(|(_, other)| !Arc::ptr_eq(other, mailbox));
        }
    }

    /// Up to where entries have been handed out.
    pub(super) fn dispatched(&self) -> u64 {
        lock(&self.followers).dispatched
    }

    /// Counts everything up to a position as handed out if nobody follows.
    pub(super) fn skip_to(&self, last: u64) -> bool {
        let mut followers = lock(&self.followers);
        let nobody = followers.works.is_empty() && followers.wide.is_empty();
        if nobody {
            followers.dispatched = followers.dispatched.max(last);
        }
        nobody
    }

    /// Hands out entries: all that the log has between the first of them and `last`. Says false, and does nothing, when the log
    /// has others before them that were not handed out yet.
    pub(super) fn dispatch(&self, first: u64, entries: &[Entry], last: u64) -> bool {
        let mut followers = lock(&self.followers);
        if followers.dispatched + 1 < first {
            return false;
        }
        let news = &entries[entries.partition_point(|entry| entry.position.seq <= followers.dispatched)..];
        if !followers.works.is_empty() {
            for entry in news {
                let mailboxes = entry.subject.work().and_then(|id| followers.works.get(&id));
                mailboxes.into_iter().flatten().for_each(|mailbox| mailbox.deliver(std::iter::once(entry)));
            }
        }
        for (filter, mailbox) in &followers.wide {
            mailbox.deliver(news.iter().filter(|entry| filter.wants(&entry.subject)));
        }
        followers.dispatched = followers.dispatched.max(last);
        true
    }

    /// The counter that is raised when something may have become free on a station's hook.
    pub(super) fn taker(&self, station: &StationId) -> watch::Receiver<u64> {
        let mut takers = lock(&self.takers);
        if lock(&self.followers).closed {
            return watch::Sender::new(0).subscribe();
        }
        let taker = takers.entry(station.clone()).or_insert_with(|| Taker { counter: watch::Sender::new(0), raised: None });
        taker.counter.subscribe()
    }

    /// The stations whose hooks somebody waits for.
    pub(super) fn stations(&self) -> Vec<StationId> {
        let mut takers = lock(&self.takers);
        takers.retain(|_, taker| taker.counter.receiver_count() > 0);
        takers.keys().cloned().collect()
    }

    /// Wakes takers if a hook was raised further than they know.
    pub(super) fn raised(&self, station: &StationId, count: i64) {
        if let Some(taker) = lock(&self.takers).get_mut(station)
            && taker.raised.is_none_or(|known| known < count)
        {
            taker.raised = Some(count);
            taker.counter.send_modify(|counter| *counter += 1);
        }
    }

    /// Wakes takers because time has passed.
    pub(super) fn due(&self, station: &StationId) {
        if let Some(taker) = lock(&self.takers).get(station) {
            taker.counter.send_modify(|counter| *counter += 1);
        }
    }

    /// Tells of a bucket's last revision.
    pub(super) fn changed(&self, bucket: Bucket, revision: i64) {
        if let Some(buckets) = &*lock(&self.buckets) {
            buckets[bucket as usize].send_if_modified(|known| {
                let news = revision > *known;
                *known = revision.max(*known);
                news
            });
        }
    }

    /// Follows a bucket's last revision; none once closed.
    pub(super) fn bucket(&self, bucket: Bucket) -> Option<watch::Receiver<i64>> {
        lock(&self.buckets).as_ref().map(|buckets| buckets[bucket as usize].subscribe())
    }

    /// Ends every wait.
    pub(super) fn close(&self) {
        let mut takers = lock(&self.takers);
        let mut followers = lock(&self.followers);
        followers.closed = true;
        followers.mailboxes().for_each(|mailbox| mailbox.close());
        takers.clear();
        *lock(&self.buckets) = None;
    }
}
