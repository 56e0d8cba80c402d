//! `runs`: the most recent runs, or the tree of one.

use serde_json::{Map, Value};

use super::failure::{Exit, Failure};
use super::session::{Reader, Session, Use};
use super::show;
use super::table::Table;
use crate::model::id::{self, RunId, WorkId};
use crate::model::run::{Run, Tree};

/// The largest tree that is shown.
const TREE_MAX: u32 = 10_000;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Show a run and everything below it; a work's id does as well
    #[arg(long, value_name = "ID")]
    uuid: Option<RunId>,
    /// How many runs are listed
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000), conflicts_with = "uuid")]
    limit: u32,
}

pub(super) async fn run(session: &mut Session, args: Args) -> Result<(), Failure> {
    match args.uuid {
        Some(id) => tree(session, id).await,
        None => {
            let Some(reader) = session.open(Use::Look).await? else { return super::session_is_empty(session) };
            let runs = reader.dispatcher.runs().recent(None, args.limit, false).await?;
            list(session, &runs, "no work has been assigned yet")
        }
    }
}

/// Lists runs, or says why there are none.
pub(super) fn list(session: &mut Session, runs: &[Run], none: &str) -> Result<(), Failure> {
    if session.screen.json {
        return Ok(session.screen.json(&runs.iter().map(|run| Value::from(show::run_json(run))).collect())?);
    }
    if runs.is_empty() {
        return Ok(session.screen.line(none)?);
    }
    let mut table = Table::new(["WORK", "AGENT", "STATUS", "TRY", "TOOK", "STATION", "ASSIGNED", "RUN", "TASK"]).cut("TASK");
    for run in runs {
        table.row([
            run.work_id.to_string(),
            run.agent.to_string(),
            run.status.label().to_owned(),
            run.attempt.to_string(),
            show::duration(run),
            run.target_station.to_string(),
            session.screen.moment(run.assigned_at),
            run.run_id.to_string(),
            show::preview(&run.task),
        ]);
    }
    Ok(session.screen.table(&table)?)
}

async fn tree(session: &mut Session, id: RunId) -> Result<(), Failure> {
    let reader = session.open_for(Use::Look, &format!("run {id}")).await?;
    let (id, runs) = find(&reader, id).await?;
    if runs.len() >= TREE_MAX as usize {
        tracing::warn!("only the first {TREE_MAX} runs are shown; name a run further down with --uuid");
    }
    let tree = Tree::build(&id, runs);
    if session.screen.json {
        return Ok(session.screen.json(&Value::from(as_json(&tree)))?);
    }
    let mut table = Table::new(["RUN", "AGENT", "STATUS", "TOOK", "STATION", "TASK"]).cut("TASK");
    draw(&tree, tree.run_id.as_str(), "", "", &mut table);
    session.screen.table(&table)?;
    let mut lines = Vec::new();
    let usage = tree.spent().usage;
    if !usage.is_empty() {
        lines.push(format!("used in all: {usage}"));
    }
    if let Some(parent) = id.parent() {
        for allowance in reader.dispatcher.runs().budgets(&parent).await? {
            let spent = reader.dispatcher.runs().spent(&allowance.run_id, None).await?;
            lines.push(format!("budget of {} above it: {}", allowance.run_id, allowance.shown(&spent)));
        }
    }
    budgets(&tree, &mut lines);
    Ok(lines.iter().try_for_each(|line| session.screen.line(line))?)
}

/// What is used of each budget in a tree.
fn budgets(tree: &Tree, lines: &mut Vec<String>) {
    if let Some(allowance) = tree.run.as_ref().and_then(Run::allowance) {
        lines.push(format!("budget of {}: {}", tree.run_id, allowance.shown(&tree.spent())));
    }
    tree.children.iter().for_each(|child| budgets(child, lines));
}

/// The runs from this one down; a work's id leads to its run.
async fn find(reader: &Reader, id: RunId) -> Result<(RunId, Vec<Run>), Failure> {
    let runs = reader.dispatcher.runs();
    let found = runs.tree(&id, TREE_MAX).await?;
    if !found.is_empty() {
        return Ok((id, found));
    }
    let of_work = match id.as_str().parse::<WorkId>() {
        Ok(work) => runs.of_work(work).await?,
        Err(id::Error::NotAWork(_)) => None,
        Err(other) => return Err(Failure::new(Exit::Usage, other)),
    };
    let unknown = || Failure::new(Exit::NotFound, format!("no run {id} is known in this lattice; lattice-mcp runs lists the recent ones"));
    let run = of_work.ok_or_else(unknown)?.run_id;
    let found = runs.tree(&run, TREE_MAX).await?;
    Ok((run, found))
}

fn as_json(tree: &Tree) -> Map<String, Value> {
    let mut object = tree.run.as_ref().map(show::run_json).unwrap_or_default();
    object.insert("run_id".into(), Value::from(tree.run_id.to_string()));
    if tree.run.as_ref().is_some_and(|run| run.budget.is_some()) {
        let spent = tree.spent();
        let mut used = serde_json::to_value(spent.usage).unwrap_or_default();
        used["works"] = spent.works.into();
        object.insert("budget_used".into(), used);
    }
    object.insert("children".into(), tree.children.iter().map(|child| Value::from(as_json(child))).collect());
    object
}

/// One row per run; the first column shows who is whose child.
fn draw(tree: &Tree, name: &str, here: &str, below: &str, table: &mut Table) {
    let place = format!("{here}{name}");
    match &tree.run {
        Some(run) => table.row([
            place,
            run.agent.to_string(),
            run.status.label().to_owned(),
            show::duration(run),
            run.target_station.to_string(),
            show::preview(&run.task),
        ]),
        None => table.row([place]),
    }
    for (at, child) in tree.children.iter().enumerate() {
        let (fork, pass) = if at + 1 == tree.children.len() { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        let suffix = &child.run_id.as_str()[tree.run_id.as_str().len()..];
        draw(child, suffix, &format!("{below}{fork}"), &format!("{below}{pass}"), table);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::status::Status;
    use crate::model::time::Timestamp;

    fn run(id: RunId) -> Run {
        Run {
            local_number: 1,
            parent_run_id: id.parent(),
            root_run_id: id.root(),
            run_id: id,
            originating_station: "here".parse().unwrap(),
            target_station: "there".parse().unwrap(),
            trace_id: "0".repeat(32),
            work_id: "0198f2c4-7d3e-7000-8000-1b2c3d4e5f60".parse().unwrap(),
            agent: "echo".parse().unwrap(),
            task: "say\nit".into(),
            status: Status::Complete,
            event: "WORK_COMPLETE".into(),
            assigned_at: Timestamp::from_millis(0),
            accepted_at: None,
            settled_at: None,
            attempt: 1,
            duration_ms: Some(1500),
            outcome: None,
            checks: Vec::new(),
            usage: crate::model::budget::Usage::default(),
            budget: None,
            principal: None,
        }
    }

    #[test]
    fn a_tree_shows_who_is_whose_child() {
        let root: RunId = "0198f2c4-7d3e-7000-8000-1b2c3d4e5f61".parse().unwrap();
        let runs = vec![run(root.child(1)), run(root.child(1).child(1)), run(root.child(2))];
        let mut table = Table::new(["RUN", "AGENT", "STATUS", "TOOK", "STATION", "TASK"]);
        let tree = Tree::build(&root, runs);
        draw(&tree, root.as_str(), "", "", &mut table);
        let mut out = Vec::new();
        table.write(&mut out, None).unwrap();
        let text = String::from_utf8(out).unwrap();
        let names: Vec<&str> = text.lines().map(|line| line.split("  ").next().unwrap()).collect();
        assert_eq!(names, ["RUN", root.as_str(), "├─ -1", "│", "└─ -2"]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[3].starts_with("│  └─ -1  "), "{text}");
        assert!(lines[2].ends_with("  echo   COMPLETE  1.5s  there    say…"), "{text}");
        let agent = |line: &str| line.chars().collect::<Vec<_>>().windows(4).position(|part| part == ['e', 'c', 'h', 'o']);
        assert_eq!((agent(lines[2]), agent(lines[3])), (Some(38), Some(38)));
        assert_eq!(as_json(&tree)["children"][0]["children"][0]["agent_name"], "echo");
    }
}
