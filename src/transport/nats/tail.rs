//! Going along with a stream: what the server says again is heard, what was missed is read.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use async_nats::Subscriber;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::watch;
use tokio::time::Instant;

use super::link::Fault;
use super::stream::{AWAY_PAUSE, PAGE_MAX, Page, Stored, Stream};
use super::told::{Heard, Told};
use crate::model::id::WorkId;
use crate::transport::{Error, Result};

/// When a follower looks at the stream although nobody told it anything: soon after it began, then seldom.
const LOOKS: [Duration; 3] = [Duration::from_millis(250), Duration::from_secs(2), Duration::from_secs(30)];
/// How many messages a follower of few remembers before it looks at the stream.
const SEEN_MAX: usize = 1024;

impl Stream {
    /// Goes along with the messages of a subject filter after a sequence. `told` is where the server says them again;
    /// `whole` says that the filter covers (nearly) all of the stream, so that a gap in the sequences means something missed.
    pub(super) async fn tail(self: &Arc<Self>, filter: String, told: String, after: u64, whole: bool) -> Result<Tail> {
        let mut interruptions = self.link.interruptions.clone();
        interruptions.mark_unchanged();
        let told = self.link.client.subscribe(told).await.map_err(|error| self.explain(Fault::Silent(error.to_string())))?;
        Ok(self.tail_of(filter, Source::Own(told), after, whole, interruptions))
    }

    /// The same, where others hear it as well.
    pub(super) fn tail_beside(self: &Arc<Self>, filter: String, told: Arc<Told>, work: Option<WorkId>, after: u64) -> Tail {
        let mut interruptions = self.link.interruptions.clone();
        interruptions.mark_unchanged();
        let heard = told.listen(work);
        self.tail_of(filter, Source::Shared { told, work, heard }, after, work.is_none(), interruptions)
    }

    /// What others have heard of a work lately, and a reader that looks at the stream only after a while.
    pub(super) fn tail_lately(self: &Arc<Self>, filter: String, told: Arc<Told>, work: WorkId) -> (Vec<Stored>, Tail) {
        let mut interruptions = self.link.interruptions.clone();
        interruptions.mark_unchanged();
        let (lately, heard) = told.listen_lately(work);
        let mut tail = self.tail_of(filter, Source::Shared { told, work: Some(work), heard }, 0, false, interruptions);
        tail.seen = lately.iter().map(|stored| stored.seq).collect();
        tail.looks = 1;
        tail.put_off();
        (lately, tail)
    }

    fn tail_of(self: &Arc<Self>, filter: String, told: Source, after: u64, whole: bool, interruptions: watch::Receiver<u64>) -> Tail {
        Tail {
            stream: Arc::clone(self),
            filter,
            told,
            at: after,
            whole,
            seen: BTreeSet::new(),
            interruptions,
            due: Instant::now(),
            looks: 0,
            looking: Looking::default(),
            life: self.life_known(),
            anew: false,
        }
    }
}

/// A look that is under way; never locked, only shared between threads as a whole.
#[derive(Default)]
struct Looking(std::sync::Mutex<Option<BoxFuture<'static, Result<Look>>>>);

/// Which stream of its name was looked at, and what it had.
type Look = (u64, Page);

/// Where a reader hears what the server says again.
enum Source {
    /// On a subscription of its own.
    Own(Subscriber),
    /// On one that it shares.
    Shared { told: Arc<Told>, work: Option<WorkId>, heard: Heard },
}

/// What a reader hears.
enum News {
    Some(Stored),
    /// What is none of this stream.
    Nothing,
    /// Something may have been missed.
    Missed,
    /// Nothing comes any more.
    Over,
}

impl Source {
    async fn next(&mut self, stream: &str) -> News {
        match self {
            Self::Own(subscriber) => match subscriber.next().await {
                Some(message) => Stored::read(stream, message).map_or(News::Nothing, News::Some),
                None => News::Over,
            },
            Self::Shared { told, work, heard } => match heard.next().await {
                Some(stored) => News::Some(stored),
                None if told.is_over() => News::Over,
                None => {
                    *heard = told.listen(*work);
                    News::Missed
                }
            },
        }
    }
}

/// A reader that goes along with a stream.
pub(super) struct Tail {
    stream: Arc<Stream>,
    filter: String,
    told: Source,
    /// Everything of the filter up to here has been given.
    at: u64,
    whole: bool,
    /// What was given after `at`.
    seen: BTreeSet<u64>,
    interruptions: watch::Receiver<u64>,
    /// When the stream itself is looked at; at once after an interruption.
    due: Instant,
    looks: usize,
    /// A look that is under way; whoever waits may come and go.
    looking: Looking,
    /// Which stream of this name the places are of.
    life: u64,
    anew: bool,
}

impl Tail {
    /// The next messages; waits until there are some, or all that was given before is gone. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Result<Vec<Stored>> {
        loop {
            if self.looking.0.get_mut().is_ok_and(|looking| looking.is_some()) || self.due <= Instant::now() {
                let was_anew = self.anew;
                let found = match self.look().await {
                    Ok((found, _)) => found,
                    // Whoever follows waits until the server is back, and has until then what was heard before it went.
                    Err(Error::Unreachable(_) | Error::Unanswered(_)) => {
                        let heard = self.heard()?;
                        self.due = Instant::now() + AWAY_PAUSE;
                        if !heard.is_empty() {
                            return Ok(heard);
                        }
                        tokio::select! {
                            () = tokio::time::sleep_until(self.due) => {}
                            _ = self.interruptions.changed() => self.due = Instant::now(),
                        }
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                // Whoever keeps what was given must hear that it is gone, though there is nothing new.
                if !found.is_empty() || self.anew != was_anew {
                    return Ok(found);
                }
                continue;
            }
            let due = self.due;
            tokio::select! {
                biased;
                changed = self.interruptions.changed() => {
                    if changed.is_err() {
                        return Err(Error::Closed);
                    }
                    self.looks = 0;
                    self.due = Instant::now();
                }
                told = self.told.next(&self.stream.name) => {
                    let news = self.hear_on(Some(told))?;
                    if !news.is_empty() {
                        return Ok(news);
                    }
                }
                () = tokio::time::sleep_until(due) => {}
            }
        }
    }

    /// Everything that is there now.
    pub(super) async fn all(&mut self) -> Result<Vec<Stored>> {
        let mut all = Vec::new();
        loop {
            let (found, whole) = self.look().await?;
            all.extend(found);
            if whole {
                return Ok(all);
            }
        }
    }

    /// Whether the server had lost the stream, or the end of it, and everything is given from the beginning.
    pub(super) fn is_anew(&self) -> bool {
        self.anew
    }

    /// Everything up to here has been given.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// What was heard and has not been given yet.
    fn heard(&mut self) -> Result<Vec<Stored>> {
        let told = self.told.next(&self.stream.name).now_or_never();
        self.hear_on(told)
    }

    /// Takes in what is told, and all that was told by then.
    fn hear_on(&mut self, mut told: Option<News>) -> Result<Vec<Stored>> {
        let mut news = Vec::new();
        while let Some(some) = told {
            match some {
                News::Some(stored) => self.hear(stored, &mut news),
                News::Nothing => {}
                // What was missed comes before what is heard next.
                News::Missed => {
                    self.due = Instant::now();
                    break;
                }
                News::Over if news.is_empty() => return Err(Error::Closed),
                News::Over => break,
            }
            told = self.told.next(&self.stream.name).now_or_never();
        }
        Ok(news)
    }

    fn hear(&mut self, stored: Stored, news: &mut Vec<Stored>) {
        if stored.seq <= self.at || self.seen.contains(&stored.seq) {
            return;
        }
        if self.whole {
            if stored.seq == self.at + 1 {
                self.at = stored.seq;
                news.push(stored);
            } else {
                // The stream has what was missed, and this one.
                self.due = Instant::now();
            }
            return;
        }
        self.seen.insert(stored.seq);
        if self.seen.len() > SEEN_MAX {
            self.due = Instant::now();
        }
        news.push(stored);
    }

    /// Reads a page of the stream itself; says whether that was the last one.
    async fn look(&mut self) -> Result<(Vec<Stored>, bool)> {
        let Ok(looking) = self.looking.0.get_mut() else { return Err(Error::Closed) };
        let under_way = looking.get_or_insert_with(|| {
            let (stream, filter, at, known) = (Arc::clone(&self.stream), self.filter.clone(), self.at, self.life);
            let look = async move {
                let life = stream.life().await.map_err(|fault| stream.explain(fault))?;
                // The places of another stream say nothing of this one.
                let at = if life == known { at } else { 0 };
                Ok((life, stream.page(Some(&filter), at, PAGE_MAX).await?))
            };
            look.boxed()
        });
        let found = under_way.await;
        *looking = None;
        let (life, page) = found?;
        if life != self.life {
            (self.life, self.at, self.anew) = (life, 0, true);
            self.seen.clear();
        }
        let whole = page.pending == 0 && page.messages.len() < PAGE_MAX;
        if let Some(last) = page.messages.last() {
            self.at = self.at.max(last.seq);
        }
        let found: Vec<Stored> = page.messages.into_iter().filter(|stored| !self.seen.contains(&stored.seq)).collect();
        self.seen = self.seen.split_off(&(self.at + 1));
        self.due = Instant::now();
        if whole {
            self.put_off();
        }
        Ok((found, whole))
    }

    fn put_off(&mut self) {
        let wait = LOOKS[self.looks.min(LOOKS.len() - 1)];
        self.looks += 1;
        self.due = Instant::now() + wait + wait.mul_f64(0.25 * rand_unit());
    }
}

/// A number from 0 to 1, so that not all look at the same moment.
pub(super) fn rand_unit() -> f64 {
    f64::from(uuid::Uuid::new_v4().as_bytes()[0]) / 255.0
}
