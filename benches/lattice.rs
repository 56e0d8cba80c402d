//! What the lattice costs beside a bare rmcp server that answers the same kind of call from memory.
//!
//! `cargo bench` prints tables and asserts nothing; `cargo bench -- --quick` takes fewer samples.
#![expect(clippy::expect_used, reason = "a bench that cannot go on ends")]
#![expect(clippy::print_stdout, reason = "tables are what this program is for")]

#[path = "lattice/bare.rs"]
mod bare;
#[path = "lattice/compare.rs"]
mod compare;
#[path = "lattice/inprocess.rs"]
mod inprocess;
#[path = "lattice/load.rs"]
mod load;
#[path = "lattice/table.rs"]
mod table;

fn main() -> anyhow::Result<()> {
    let has = |wanted: &str| std::env::args().any(|argument| argument == wanted);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    if has(bare::STDIO) {
        return runtime.block_on(bare::stdio());
    }
    if has(bare::HTTP) {
        return runtime.block_on(bare::http());
    }
    let quick = has("--quick");
    runtime.block_on(compare::run(quick))?;
    runtime.block_on(inprocess::run(quick));
    Ok(())
}
