//! `events`: what happened to stations, agents and works, in one list in the log's order; goes on with it if asked to.

use std::collections::VecDeque;
use std::time::Duration;

use serde_json::Value;

use super::failure::{Exit, Failure};
use super::session::{Session, Use};
use super::show;
use super::table::Rolling;
use crate::model::audit::{self, Fact};
use crate::model::event::{Event, Kind};
use crate::model::time::{Span, Timestamp};
use crate::telemetry::now;
use crate::transport::{Entry, Filter, Follow, Log, Position, Result};
use crate::works::event_of;

const PAGE: usize = 512;
/// How often a follower looks whether anybody still reads what it writes.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Fits a UUID, and most names.
const WIDTHS: [usize; 5] = [24, 16, 12, 36, 0];

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Go on with what happens next, until interrupted
    #[arg(long, short)]
    follow: bool,
    /// How far to look back
    #[arg(long, value_name = "DURATION", default_value = "1h")]
    since: Span,
    /// Only events of this kind (repeatable)
    #[arg(long, value_name = "KIND")]
    kind: Vec<About>,
    /// The progress that works report as well
    #[arg(long)]
    progress: bool,
}

/// What events are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum About {
    Station,
    Agent,
    Work,
}

pub(super) async fn run(session: &mut Session, args: Args) -> std::result::Result<(), Failure> {
    let Some(reader) = session.open(Use::Look).await? else {
        let text = session.no_store();
        return match (args.follow, session.screen.json) {
            (true, _) => Err(Failure::new(Exit::NotFound, text)),
            (false, true) => Ok(()),
            (false, false) => Ok(session.screen.line(&text)?),
        };
    };
    let log = &reader.dispatcher.transport().log;
    let mut list = List { table: Rolling::new(["TIME", "EVENT", "STATION", "SUBJECT", "DETAILS"], WIDTHS), some: false, args };
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    tokio::select! {
        ended = list.show(session, log.as_ref()) => ended,
        // Whoever follows ends it so; otherwise it is an interruption.
        said = &mut interrupted => match said {
            Ok(()) if list.args.follow => Ok(()),
            Ok(()) => Err(Failure::new(Exit::Failed, "interrupted")),
            Err(error) => Err(Failure::new(Exit::Failed, format!("signals cannot be heard: {error}"))),
        },
    }
}

/// The list as it is written.
struct List {
    table: Rolling<5>,
    some: bool,
    args: Args,
}

impl List {
    async fn show(&mut self, session: &mut Session, log: &dyn Log) -> std::result::Result<(), Failure> {
        let back = i64::try_from(self.args.since.get().as_millis()).unwrap_or(i64::MAX);
        let since = Timestamp::from_millis(now().as_millis().saturating_sub(back));
        let head = log.head().await?;
        let mut pasts = Vec::new();
        for filter in self.filters() {
            pasts.push(Past { filter, after: first_since(log, filter, since, head).await?, page: VecDeque::new(), ended: false });
        }
        while let Some(entry) = earliest(log, &mut pasts, head).await? {
            self.write(session, &entry, since)?;
        }
        if self.args.follow {
            return self.go_on(session, log, head).await;
        }
        if !self.some && !session.screen.json {
            let text = format!("nothing has happened in the last {}; --since looks further back", self.args.since);
            session.screen.line(&text)?;
        }
        Ok(())
    }

    async fn go_on(&mut self, session: &mut Session, log: &dyn Log, head: Position) -> std::result::Result<(), Failure> {
        if !self.some && !session.screen.json {
            session.screen.rolling_head(&self.table)?;
            self.some = true;
        }
        session.screen.flush()?;
        let mut follows = Vec::new();
        for filter in self.filters() {
            follows.push(log.follow(filter, head).await?);
        }
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                entries = next(&mut follows) => {
                    for entry in entries? {
                        self.write(session, &entry, Timestamp::default())?;
                    }
                    session.screen.flush()?;
                }
                _ = look.tick() => if session.screen.nobody_reads() {
                    return Ok(());
                }
            }
        }
    }

    /// What has to be read for what is wanted.
    fn filters(&self) -> Vec<Filter> {
        let audit = self.wants(About::Station) || self.wants(About::Agent);
        let filters = [(audit, Filter::Audit), (self.wants(About::Work), Filter::AllWork)];
        filters.into_iter().filter(|(wanted, _)| *wanted).map(|(_, filter)| filter).collect()
    }

    fn wants(&self, about: About) -> bool {
        self.args.kind.is_empty() || self.args.kind.contains(&about)
    }

    fn write(&mut self, session: &mut Session, entry: &Entry, since: Timestamp) -> std::io::Result<()> {
        let Some(line) = Line::of(entry).filter(|line| self.shows(line) && line.at() >= since) else { return Ok(()) };
        let screen = &mut session.screen;
        if screen.json {
            // As it stands on the log, with what another version knows besides.
            return match serde_json::from_slice::<Value>(&entry.body) {
                Ok(value) => screen.json_line(&value),
                Err(_) => Ok(()),
            };
        }
        if !self.some {
            screen.rolling_head(&self.table)?;
            self.some = true;
        }
        screen.rolling_row(&mut self.table, line.cells())
    }

    fn shows(&self, line: &Line) -> bool {
        match line {
            Line::Work(event) => self.args.progress || !matches!(event.kind, Kind::Progress { .. } | Kind::Used(_)),
            Line::Fact(fact) => match fact.kind.noun_and_verb().0 {
                "station" => self.wants(About::Station),
                "agent" => self.wants(About::Agent),
                _ => self.args.kind.is_empty(),
            },
        }
    }
}

/// One line.
enum Line {
    Fact(Fact),
    Work(Box<Event>),
}

impl Line {
    fn of(entry: &Entry) -> Option<Self> {
        if entry.subject.work().is_some() {
            return event_of(entry).map(|event| Self::Work(Box::new(event)));
        }
        Fact::from_bytes(&entry.body)
            .map_err(|error| tracing::warn!(position = ?entry.position, %error, "skipped an audit record that cannot be read"))
            .ok()
            .map(Self::Fact)
    }

    fn at(&self) -> Timestamp {
        match self {
            Self::Fact(fact) => fact.at,
            Self::Work(event) => event.at,
        }
    }

    fn cells(&self) -> [String; 5] {
        let at = self.at().to_string();
        match self {
            Self::Work(event) => {
                let (kind, station) = (event.kind.wire_type().to_owned(), event.station.to_string());
                [at, kind, station, event.work_id.to_string(), show::details(event)]
            }
            Self::Fact(fact) => {
                let subject = fact.kind.agent().map_or_else(|| fact.instance.to_string(), ToString::to_string);
                [at, fact.kind.wire_type().to_owned(), fact.station.to_string(), subject, details(&fact.kind)]
            }
        }
    }
}

/// What a fact tells besides its type.
fn details(kind: &audit::Kind) -> String {
    match kind {
        audit::Kind::Lost { observer } => format!("no more sign of life; noticed by {observer}"),
        audit::Kind::Back => "its sign of life had expired".into(),
        audit::Kind::TakenOver { from, .. } => format!("from {from}, which is gone"),
        audit::Kind::Refused { holder, .. } => format!("the name is held by {holder}"),
        audit::Kind::Turned(turned) => {
            let who = turned.principal.as_ref().map(|principal| format!(", {principal}")).unwrap_or_default();
            let more = if turned.untold > 0 { format!(", and {} others before it", turned.untold) } else { String::new() };
            format!("from {}{who}: {}{more}", turned.peer, turned.cause)
        }
        _ => String::new(),
    }
}

/// What is there already of one filter.
struct Past {
    filter: Filter,
    after: Position,
    page: VecDeque<Entry>,
    ended: bool,
}

/// The next entry of all, up to a position.
async fn earliest(log: &dyn Log, pasts: &mut [Past], upto: Position) -> Result<Option<Entry>> {
    for past in pasts.iter_mut() {
        while past.page.is_empty() && !past.ended {
            // What came meanwhile to one of two logs is left out, or it would stand before all of the other one.
            let seq = if past.after.seq >= upto.seq { u64::MAX } else { past.after.seq };
            let page = log.read(past.filter, Position { seq, ..past.after }, PAGE).await?;
            past.after = past.after.past(&page);
            past.ended = page.len() < PAGE || past.after.reaches(upto);
            past.page = page.into_iter().filter(|entry| upto.reaches(entry.position)).collect();
        }
    }
    let mut first = None::<&mut Past>;
    for past in pasts {
        let is_first = match (past.page.front(), first.as_ref().and_then(|first| first.page.front())) {
            (Some(entry), Some(first)) => is_before(entry, first),
            (entry, _) => entry.is_some(),
        };
        if is_first {
            first = Some(past);
        }
    }
    Ok(first.and_then(|past| past.page.pop_front()))
}

/// Entries of one log in its order, those of two as they were said.
fn is_before(one: &Entry, other: &Entry) -> bool {
    let at = |entry: &Entry| Line::of(entry).map(|line| line.at());
    match (one.position.reaches(other.position), other.position.reaches(one.position)) {
        (false, false) => at(one) < at(other),
        (_, is_before) => is_before,
    }
}

/// The position after which entries are of this moment or later, found by halving: a log is in the order of time, all but. Of two
/// logs the one is looked through while the other one is left out up to its head.
async fn first_since(log: &dyn Log, filter: Filter, since: Timestamp, head: Position) -> Result<Position> {
    let is_older = |entry: &Entry| head.reaches(entry.position) && Line::of(entry).is_none_or(|line| line.at() < since);
    let mut first = Position::default();
    let mut high = head.seq;
    while first.seq < high {
        let middle = first.seq + (high - first.seq) / 2;
        match log.read(filter, Position { seq: middle, ..head }, 1).await?.first() {
            Some(entry) if is_older(entry) => first.seq = entry.position.seq,
            _ => high = middle,
        }
    }
    let mut high = head.far;
    while first.far < high {
        let middle = first.far + (high - first.far) / 2;
        match log.read(filter, Position { far: middle, ..head }, 1).await?.first() {
            Some(entry) if is_older(entry) => first.far = entry.position.far,
            _ => high = middle,
        }
    }
    Ok(first)
}

/// The next entries of any of these.
async fn next(follows: &mut [Box<dyn Follow>]) -> Result<Vec<Entry>> {
    let (entries, _, _) = futures_util::future::select_all(follows.iter_mut().map(|follow| follow.next())).await;
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::event::Side;
    use crate::telemetry::{new_instance, new_root, new_work_id};
    use crate::transport::Record;
    use crate::transport::mesh::Sides;
    use crate::works::record;

    fn word(at: i64) -> Record {
        let (work_id, run_id, station) = (new_work_id(), new_root(), "here".parse().unwrap());
        let (at, instance) = (Timestamp::from_millis(at), new_instance());
        record(Event { work_id, run_id, at, station, instance, side: Side::Leaf, attempt: 1, kind: Kind::Accepted })
    }

    #[tokio::test]
    async fn of_two_logs_that_are_read_as_one_each_is_shown_from_the_same_moment_on() {
        let sides = Sides::new();
        let (near, far) = (&sides.near, &sides.far);
        near.log.append((0..5).map(word).chain([word(101), word(103)]).collect()).await.unwrap();
        far.log.append((0..50).map(word).chain([word(102)]).collect()).await.unwrap();
        let log = sides.mesh(Some(far.clone())).0.log;
        let head = log.head().await.unwrap();
        let after = first_since(&*log, Filter::AllWork, Timestamp::from_millis(100), head).await.unwrap();
        assert_eq!(after, Position { seq: 5, far: 50 });
        // What comes later is for whoever follows, however much that is.
        for store in [near, far] {
            store.log.append((0..2 * PAGE).map(|_| word(104)).collect()).await.unwrap();
        }
        let mut pasts = [Past { filter: Filter::AllWork, after, page: VecDeque::new(), ended: false }];
        let mut shown = Vec::new();
        while let Some(entry) = earliest(&*log, &mut pasts, head).await.unwrap() {
            shown.push(Line::of(&entry).unwrap().at().as_millis());
        }
        shown.sort_unstable();
        assert_eq!(shown, [101, 102, 103]);
    }
}
