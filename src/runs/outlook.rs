//! What a caller that remembers nothing must know: what is outstanding, what waits for an answer, what settled since it last looked.
//!
//! However many works there are, an index leads to the few that are shown, and the settled ones are counted by their numbers.

use rusqlite::{Connection, OptionalExtension, params};

use super::{Result, Runs, rows};
use crate::model::id::RunId;
use crate::model::owner::Owner;
use crate::model::run::Run;

/// How many runs below a run are gone through.
const BELOW_MAX: u32 = 10_000;
const ESCALATED: &str = "ESCALATED";

/// Whose works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// An owner's; those of nobody when absent.
    Of(Option<Owner>),
    /// Those that a run's agent has assigned, and theirs.
    Below(RunId),
}

/// What there is to know of a caller's works.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outlook {
    /// How many are not settled, by status.
    pub counts: Vec<(String, u64)>,
    /// Those that wait for an answer, for longest first.
    pub asking: Vec<Run>,
    /// The others that are not settled, the most recent first.
    pub open: Vec<Run>,
    /// How many have settled since the last look.
    pub news: u64,
    /// Those that settled last, the last one first; also those that were told of before.
    pub settled: Vec<Run>,
    /// How many works of others are not settled.
    pub elsewhere: u64,
}

impl Outlook {
    /// How many are not settled.
    pub fn outstanding(&self) -> u64 {
        self.counts.iter().map(|(_, count)| count).sum()
    }
}

impl Runs {
    /// What there is to know of these works, with at most `shown` of each kind. What has settled counts as told from now on.
    ///
    /// # Errors
    /// The store's.
    pub async fn outlook(&self, scope: Scope, shown: u32) -> Result<Outlook> {
        let key = scope.key();
        let (outlook, upto, before) = self.reader.call(move |db| scope.look(db, shown)).await?;
        if upto > before {
            let told = move |db: &mut Connection| {
                db.prepare_cached(
                    "INSERT INTO looks (owner, upto) VALUES (?1, ?2) ON CONFLICT (owner) DO UPDATE SET upto = max(upto, excluded.upto)",
                )?
                .execute(params![key, upto])
            };
            self.writer.call(told).await?;
        }
        Ok(outlook)
    }
}

impl Scope {
    /// Under what its looks are remembered.
    fn key(&self) -> String {
        match self {
            Self::Of(owner) => owner.as_ref().map_or_else(String::new, |owner| owner.as_str().to_owned()),
            Self::Below(run) => run.as_str().to_owned(),
        }
    }

    /// What is there, the number of the last settled one, and up to which one was told before.
    fn look(&self, db: &Connection, shown: u32) -> rusqlite::Result<(Outlook, i64, i64)> {
        let before: Option<i64> =
            db.prepare_cached("SELECT upto FROM looks WHERE owner = ?1")?.query_row(params![self.key()], |row| row.get(0)).optional()?;
        let before = before.unwrap_or(0);
        let (mut outlook, upto) = match self {
            Self::Of(owner) => of_owner(db, owner.as_ref().map(Owner::as_str), shown)?,
            Self::Below(run) => below(db, run, shown)?,
        };
        outlook.news = u64::try_from(upto - before).unwrap_or(0);
        Ok((outlook, upto, before))
    }
}

fn of_owner(db: &Connection, owner: Option<&str>, shown: u32) -> rusqlite::Result<(Outlook, i64)> {
    let some = |rest: &str| {
        let sql = format!("SELECT {} FROM runs WHERE owner IS ?1 AND {rest} LIMIT ?2", rows::COLUMNS);
        db.prepare_cached(&sql)?.query_map(params![owner, shown], rows::read)?.collect::<rusqlite::Result<Vec<Run>>>()
    };
    let counts = db
        .prepare_cached("SELECT label, count(*) FROM runs WHERE settled_at IS NULL AND owner IS ?1 GROUP BY label")?
        .query_map(params![owner], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)))?
        .map(|row| row.map(|(label, count)| (label, u64::try_from(count).unwrap_or(0))))
        .collect::<rusqlite::Result<Vec<_>>>()?;
    let all: i64 = db.prepare_cached("SELECT count(*) FROM runs WHERE settled_at IS NULL")?.query_row([], |row| row.get(0))?;
    let upto: Option<i64> = db
        .prepare_cached("SELECT max(settled_no) FROM runs WHERE settled_no IS NOT NULL AND owner IS ?1")?
        .query_row(params![owner], |row| row.get(0))?;
    let mut outlook = Outlook {
        counts,
        asking: some(&format!("settled_at IS NULL AND label = '{ESCALATED}' ORDER BY local"))?,
        open: Vec::new(),
        news: 0,
        settled: some("settled_no IS NOT NULL ORDER BY settled_no DESC")?,
        elsewhere: 0,
    };
    for (label, _) in outlook.counts.iter().filter(|(label, _)| label != ESCALATED) {
        // One index entry after the other: a single query over all labels would sort all that is open.
        let sql = format!(
            "SELECT {} FROM runs WHERE settled_at IS NULL AND owner IS ?1 AND label = ?3 ORDER BY local DESC LIMIT ?2",
            rows::COLUMNS
        );
        let mut query = db.prepare_cached(&sql)?;
        outlook.open.extend(query.query_map(params![owner, shown, label], rows::read)?.collect::<rusqlite::Result<Vec<Run>>>()?);
    }
    outlook.open.sort_by_key(|run| std::cmp::Reverse(run.local_number));
    outlook.open.truncate(shown as usize);
    outlook.elsewhere = u64::try_from(all).unwrap_or(0).saturating_sub(outlook.outstanding());
    Ok((outlook, upto.unwrap_or(0)))
}

fn below(db: &Connection, run: &RunId, shown: u32) -> rusqlite::Result<(Outlook, i64)> {
    let sql = format!(
        "SELECT {} FROM runs WHERE root = ?1 AND substr(run, 1, length(?2) + 1) = ?2 || '-' ORDER BY local LIMIT ?3",
        rows::COLUMNS
    );
    let root = run.root();
    let runs = db
        .prepare_cached(&sql)?
        .query_map(params![root.as_str(), run.as_str(), BELOW_MAX], rows::read)?
        .collect::<rusqlite::Result<Vec<Run>>>()?;
    let (mut settled, mut unsettled): (Vec<Run>, Vec<Run>) = runs.into_iter().partition(|run| run.status.is_settled());
    let upto = i64::try_from(settled.len()).unwrap_or(i64::MAX);
    settled.sort_by_key(|run| std::cmp::Reverse(run.settled_at));
    settled.truncate(shown as usize);
    let mut counts: Vec<(String, u64)> = Vec::new();
    for run in &unsettled {
        match counts.iter_mut().find(|(label, _)| label == run.status.label()) {
            Some((_, count)) => *count += 1,
            None => counts.push((run.status.label().to_owned(), 1)),
        }
    }
    let mut asking: Vec<Run> = unsettled.extract_if(.., |run| run.status.label() == ESCALATED).collect();
    asking.truncate(shown as usize);
    unsettled.reverse();
    unsettled.truncate(shown as usize);
    Ok((Outlook { counts, asking, open: unsettled, news: 0, settled, elsewhere: 0 }, upto))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Instant;

    use super::*;
    use crate::model::owner::{Principal, Workspace};
    use crate::runs::file::{SCHEMA, connect};

    const SETTLED: i64 = 100_000;

    fn owner() -> Owner {
        Owner::of(Principal::User, &Workspace::Named("mine"))
    }

    /// So many settled works, and 500 of each kind that is open, as the fold writes them.
    fn fill(db: &Connection, settled: i64) {
        let rows = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?1)
             INSERT INTO runs (work, run, root, origin, target, trace, agent, task, status, label, event, assigned_at, settled_at, attempt,
                               dead, seen, owner, settled_no)
             SELECT unhex(printf('%016x%016x', ?5, i)), printf('00000000-0000-7000-8000-%012x-%d', i, ?5),
                    printf('00000000-0000-7000-8000-%012x', i), 'here', 'here', '', 'worker', 'a task', ?2, ?3, 'WORK', i,
                    iif(?4, i, NULL), 1, 0, i, ?6, iif(?4, i, NULL) FROM n";
        let mark = r#"{"attempt":1,"answered":0,"cancelling":false}"#;
        let open = [
            (format!("{{\"Pending\":{mark}}}"), "PENDING"),
            (format!("{{\"Accepted\":{mark}}}"), "ACCEPTED"),
            (format!("{{\"Escalated\":{{\"mark\":{mark},\"ask\":1,\"parked\":false}}}}"), "ESCALATED"),
        ];
        let mine = owner();
        db.execute(rows, params![settled, "\"Complete\"", "COMPLETE", true, 1, mine.as_str()]).unwrap();
        for (place, (status, label)) in (2..).zip(&open) {
            db.execute(rows, params![500, status, label, false, place, mine.as_str()]).unwrap();
        }
        db.execute(rows, params![7, open[0].0, "PENDING", false, 9, "somebody else"]).unwrap();
    }

    fn opened(dir: &Path) -> Connection {
        let (db, version) = connect(&dir.join("runs.db")).unwrap();
        version.unwrap();
        db
    }

    #[test]
    fn an_outlook_over_100_000_settled_works_is_led_by_indexes() {
        let dir = tempfile::tempdir().unwrap();
        let db = opened(dir.path());
        fill(&db, SETTLED);
        let scope = Scope::Of(Some(owner()));
        let mut took = Vec::new();
        for _ in 0..21 {
            let began = Instant::now();
            let (outlook, upto, before) = scope.look(&db, 12).unwrap();
            took.push(began.elapsed());
            assert_eq!((upto, before, outlook.news), (SETTLED, 0, SETTLED as u64));
            assert_eq!((outlook.outstanding(), outlook.elsewhere), (1500, 7));
            assert_eq!((outlook.asking.len(), outlook.open.len(), outlook.settled.len()), (12, 12, 12));
            assert!(outlook.asking[0].local_number < outlook.asking[1].local_number, "who waits for longest comes first");
            assert!(outlook.open[0].local_number > outlook.open[1].local_number, "the most recent comes first");
            assert!(outlook.settled[0].settled_at > outlook.settled[1].settled_at, "what settled last comes first");
        }
        took.sort();
        println!("an outlook over {SETTLED} settled and 1507 open works: median {:?}, worst {:?}", took[10], took[20]);
        for sql in [
            "SELECT label, count(*) FROM runs WHERE settled_at IS NULL AND owner IS ?1 GROUP BY label",
            "SELECT max(settled_no) FROM runs WHERE settled_no IS NOT NULL AND owner IS ?1",
            "SELECT task FROM runs WHERE owner IS ?1 AND settled_no IS NOT NULL ORDER BY settled_no DESC LIMIT 20",
            "SELECT task FROM runs WHERE owner IS ?1 AND settled_at IS NULL AND label = 'ESCALATED' ORDER BY local LIMIT 20",
        ] {
            let mut plan = db.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
            let steps: Vec<String> = plan.query_map(params!["x"], |row| row.get(3)).unwrap().collect::<rusqlite::Result<_>>().unwrap();
            assert!(steps.iter().all(|step| step.starts_with("SEARCH") && step.contains("INDEX runs_owner_")), "{sql}: {steps:?}");
        }
    }

    #[test]
    fn a_store_of_the_first_version_learns_who_owns_what() {
        let dir = tempfile::tempdir().unwrap();
        let old = Connection::open(dir.path().join("runs.db")).unwrap();
        old.execute_batch(SCHEMA).unwrap();
        old.pragma_update(None, "user_version", 1).unwrap();
        let row = "INSERT INTO runs (work, run, root, origin, target, trace, agent, task, status, event, assigned_at, attempt, dead, seen)
             VALUES (randomblob(16), 'r', 'r', 'here', 'here', '', 'worker', 'a task', ?1, 'WORK', 1, 1, 0, 1)";
        for status in
            [r#"{"Pending":{}}"#, r#"{"Accepted":{}}"#, r#"{"Escalated":{"mark":{}}}"#, "\"Complete\"", "\"Failed\"", "\"Cancelled\""]
        {
            old.execute(row, params![status]).unwrap();
        }
        drop(old);
        let db = opened(dir.path());
        let mut query = db.prepare("SELECT label FROM runs ORDER BY local").unwrap();
        let labels: Vec<String> = query.query_map([], |row| row.get(0)).unwrap().collect::<rusqlite::Result<_>>().unwrap();
        assert_eq!(labels, ["PENDING", "ACCEPTED", "ESCALATED", "COMPLETE", "FAILED", "CANCELLED"]);
    }
}
