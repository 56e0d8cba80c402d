//! Calls, starts and memory, of the bare server and of ours.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::bare;
use crate::load::{Measured, Pipes, Server, Speaks, median};
use crate::table::{Table, micros, per_second};

/// The program itself.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_lattice-mcp");
/// An agent that answers with its task.
pub(crate) const ECHO: &str = "---\nname: echo\ndescription: Answers with its task\nrunner: { kind: echo }\n---\n";
const AT_ONCE: usize = 64;
const WARM_UP: usize = 200;
/// The two servers take turns, so that whatever else this machine does hits both.
const TURNS: usize = 4;
/// How long a process is left alone before its memory is read.
const IDLE: Duration = Duration::from_secs(1);

/// Measures and prints.
pub(crate) async fn run(quick: bool) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::create_dir(dir.path().join("agents"))?;
    std::fs::write(dir.path().join("agents/echo.md"), ECHO)?;
    calls(dir.path(), if quick { 256 } else { 2048 }).await?;
    starts(dir.path(), if quick { 5 } else { 20 }).await?;
    Ok(())
}

/// The command of a bare server.
pub(crate) fn bare(argument: &str) -> anyhow::Result<Vec<String>> {
    let this = std::env::current_exe()?;
    Ok(vec![this.to_str().context("a path of text")?.to_owned(), argument.to_owned()])
}

/// The command of a lattice of this folder.
pub(crate) fn ours(dir: &Path, data: &str, door: &[&str]) -> Vec<String> {
    let text = |path: std::path::PathBuf| path.display().to_string();
    let folders = ["--data-dir".into(), text(dir.join(data)), "--agents".into(), text(dir.join("agents"))];
    std::iter::once(PROGRAM.to_owned()).chain(door.iter().map(|&part| part.to_owned())).chain(folders).collect()
}

/// The arguments of a check on work that is settled.
fn checked(assigned: &Value) -> anyhow::Result<Value> {
    Ok(json!({ "work_id": assigned["work_id"].as_str().context("no work_id")? }))
}

async fn calls(dir: &Path, count: usize) -> anyhow::Result<()> {
    let head = ["check_work on settled work", "bare", "p99", "calls/s", "lattice", "p99", "calls/s", "times bare", "of its calls/s"];
    let mut table = Table::new("A tool call, beside a bare rmcp server that answers the same from memory", &head);
    let order = json!({ "agent_name": "echo", "task": "hello" });
    let nothing = json!({ "work_id": "0192f0c1-2345-7890-abcd-0123456789ab" });

    let (mut plain, mut mesh) = (Pipes::open(&bare(bare::STDIO)?).await?, Pipes::open(&ours(dir, "data", &["--stdio"])).await?);
    let work = checked(&mesh.call("assign_work", &order).await?)?;
    mesh.call("await_work", &work).await?;
    for at_once in [1, AT_ONCE] {
        plain.load(WARM_UP, at_once, "check_work", &nothing).await?;
        mesh.load(WARM_UP, at_once, "check_work", &work).await?;
        let (mut reference, mut measured) = (Measured::default(), Measured::default());
        for _ in 0..TURNS {
            reference.add(plain.load(count / TURNS, at_once, "check_work", &nothing).await?);
            measured.add(mesh.load(count / TURNS, at_once, "check_work", &work).await?);
        }
        row(&mut table, &format!("stdio, {}", crowd(at_once)), &reference, &measured);
    }
    plain.close().await?;
    mesh.close().await?;

    let (plain, mesh) = (Server::start(&bare(bare::HTTP)?).await?, Server::start(&ours(dir, "data", &["--http", "127.0.0.1:0"])).await?);
    let work = checked(&mesh.call("assign_work", &order).await?)?;
    mesh.call("await_work", &work).await?;
    for (speaks, name) in [(Speaks::Legacy, "HTTP 2025-11-25"), (Speaks::Modern, "HTTP 2026-07-28")] {
        for at_once in [1, AT_ONCE] {
            plain.load(speaks, WARM_UP, at_once, "check_work", &nothing).await?;
            mesh.load(speaks, WARM_UP, at_once, "check_work", &work).await?;
            let (mut reference, mut measured) = (Measured::default(), Measured::default());
            for _ in 0..TURNS {
                reference.add(plain.load(speaks, count / TURNS, at_once, "check_work", &nothing).await?);
                measured.add(mesh.load(speaks, count / TURNS, at_once, "check_work", &work).await?);
            }
            row(&mut table, &format!("{name}, {}", crowd(at_once)), &reference, &measured);
        }
    }
    table.print();
    Ok(())
}

/// How many at once, in words.
pub(crate) fn crowd(at_once: usize) -> String {
    if at_once == 1 { "one at a time".to_owned() } else { format!("{at_once} at once") }
}

/// A row of what is measured beside its reference.
pub(crate) fn row(table: &mut Table, name: &str, bare: &Measured, ours: &Measured) {
    table.row(&[
        name,
        &micros(bare.percentile(50)),
        &micros(bare.percentile(99)),
        &per_second(bare.per_second()),
        &micros(ours.percentile(50)),
        &micros(ours.percentile(99)),
        &per_second(ours.per_second()),
        &format!("{:.2}", ours.percentile(50).as_secs_f64() / bare.percentile(50).as_secs_f64()),
        &format!("{:.0} %", 100.0 * ours.per_second() / bare.per_second()),
    ]);
}

async fn starts(dir: &Path, rounds: usize) -> anyhow::Result<()> {
    let head = ["start on stdio, until the tools are listed", "median", "memory when idle"];
    let mut table = Table::new("A fresh process", &head);
    let reference = bare(bare::STDIO)?;
    let existing = ours(dir, "data", &["--stdio"]);
    let mut kinds: [(&str, Vec<Duration>, Option<u64>); 3] =
        [("bare rmcp", vec![], None), ("lattice, existing store", vec![], None), ("lattice, first start ever", vec![], None)];
    for round in 0..rounds {
        let first = ours(dir, &format!("fresh-{round}"), &["--stdio"]);
        for ((_, samples, memory), argv) in kinds.iter_mut().zip([&reference, &existing, &first]) {
            let began = Instant::now();
            let mut pipes = Pipes::open(argv).await?;
            pipes.list_tools().await?;
            samples.push(began.elapsed());
            if round == 0 {
                tokio::time::sleep(IDLE).await;
                *memory = pipes.memory();
            }
            pipes.close().await?;
        }
    }
    for (name, samples, memory) in kinds {
        let memory = memory.map_or_else(|| "unknown here".to_owned(), |kib| format!("{:.1} MiB", kib as f64 / 1024.0));
        table.row(&[name, &micros(median(samples)), &memory]);
    }
    let server = Server::start(&ours(dir, "data", &["--http", "127.0.0.1:0"])).await?;
    tokio::time::sleep(IDLE).await;
    let memory = server.memory().map_or_else(|| "unknown here".to_owned(), |kib| format!("{:.1} MiB", kib as f64 / 1024.0));
    table.row(&["lattice, serving HTTP", "", &memory]);
    table.print();
    Ok(())
}
