//! What a run and everything below it have used, as far as the log can be reached.

use rusqlite::{OptionalExtension, params};

use super::{Error, Result, Runs};
use crate::model::budget::{Allowance, Spent, Usage};
use crate::model::id::{RunId, WorkId};
use crate::transport;

/// All runs below a run, itself included: `?1` is its root, `?2` the run.
const BELOW: &str = "root = ?1 AND (run = ?2 OR substr(run, 1, length(?2) + 1) = ?2 || '-')";

impl Runs {
    /// What a run and everything below it have used; of the works, those up to this one in the log's order, if one is given.
    ///
    /// Of two works that were assigned at once the log's order says which one came first.
    ///
    /// # Errors
    /// The store's.
    pub async fn spent(&self, run: &RunId, upto: Option<WorkId>) -> Result<Spent> {
        self.hear().await?;
        let (run, root) = (run.clone(), run.root());
        self.reader
            .call(move |db| {
                let sql = format!(
                    "SELECT total(tokens), total(cost), total(turns),
                         count(CASE WHEN ?3 IS NULL OR local <= (SELECT local FROM runs WHERE work = ?3) THEN 1 END)
                     FROM runs WHERE {BELOW}"
                );
                db.prepare_cached(&sql)?.query_row(params![root.as_str(), run.as_str(), upto.map(|id| id.as_bytes().to_vec())], |row| {
                    let usage = Usage { tokens: whole(row.get(0)?), cost_usd: row.get(1)?, turns: whole(row.get(2)?) };
                    Ok(Spent { usage, works: u64::try_from(row.get::<_, i64>(3)?).unwrap_or(0) })
                })
            })
            .await
    }

    /// How many works a run has assigned itself, and how many there are below a run in all.
    ///
    /// # Errors
    /// The store's.
    pub async fn fan_out(&self, run: &RunId, top: &RunId) -> Result<(u64, u64)> {
        self.hear().await?;
        let (run, top, root) = (run.clone(), top.clone(), run.root());
        self.reader
            .call(move |db| {
                let own = db.prepare_cached("SELECT count(*) FROM runs WHERE parent = ?1")?.query_row([run.as_str()], |row| row.get(0))?;
                let sql = format!("SELECT count(*) FROM runs WHERE {BELOW} AND run <> ?2");
                let below = db.prepare_cached(&sql)?.query_row([root.as_str(), top.as_str()], |row| row.get(0))?;
                Ok((own, below))
            })
            .await
            .map(|(own, below): (i64, i64)| (u64::try_from(own).unwrap_or(0), u64::try_from(below).unwrap_or(0)))
    }

    /// The budgets that a run falls under, as far as they are known here: those of the runs above it first.
    ///
    /// # Errors
    /// The store's.
    pub async fn budgets(&self, run: &RunId) -> Result<Vec<Allowance>> {
        let mut line = vec![run.clone()];
        while let Some(parent) = line.last().and_then(RunId::parent) {
            line.push(parent);
        }
        self.reader
            .call(move |db| {
                let mut query = db.prepare_cached("SELECT budget FROM runs WHERE run = ?1 AND budget IS NOT NULL")?;
                let mut budgets = Vec::new();
                for run_id in line.into_iter().rev() {
                    let text: Option<String> = query.query_row([run_id.as_str()], |row| row.get(0)).optional()?;
                    let budget = text.and_then(|text| serde_json::from_str(&text).ok());
                    budgets.extend(budget.map(|budget| Allowance { run_id, budget }));
                }
                Ok(budgets)
            })
            .await
    }

    /// Takes in what the log says; without the server, what is known here is all there is.
    async fn hear(&self) -> Result<()> {
        match self.catch_up().await {
            Err(Error::Log(error @ (transport::Error::Unreachable(_) | transport::Error::Unanswered(_)))) => {
                tracing::warn!(%error, "what runs have used is counted without what happened on other machines since");
                Ok(())
            }
            other => other,
        }
    }
}

/// SQLite sums up in floats, which do not overflow.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and sums of counts are not negative")]
fn whole(sum: f64) -> u64 {
    sum as u64
}
