//! What the lattice costs beside a bare rmcp server that answers the same kind of call from memory.
//!
//! `cargo bench` prints tables and asserts nothing; `cargo bench -- --quick` takes fewer samples, and `--nats` measures only what
//! goes over a NATS server. `--soak [CLIENTS [SECONDS [SECONDS OF A ROUND]]]` is another thing: many clients for ten minutes, and it fails when the server does.
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
#[path = "lattice/nats.rs"]
mod nats;
#[path = "lattice/presence.rs"]
mod presence;
#[path = "lattice/raw.rs"]
mod raw;
#[path = "lattice/recovery.rs"]
mod recovery;
#[path = "lattice/server.rs"]
mod server;
#[path = "lattice/soak.rs"]
mod soak;
#[path = "lattice/table.rs"]
mod table;
#[path = "lattice/wire.rs"]
mod wire;

fn main() -> anyhow::Result<()> {
    let has = |wanted: &str| std::env::args().any(|argument| argument == wanted);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    if has(bare::STDIO) {
        return runtime.block_on(bare::stdio());
    }
    if has(bare::HTTP) {
        return runtime.block_on(bare::http());
    }
    let after = |wanted: &str| std::env::args().skip_while(|argument| argument != wanted).skip(1).collect::<Vec<_>>();
    if let [url, count] = after(presence::MEMBERS).as_slice() {
        return runtime.block_on(presence::members(url, count.parse()?));
    }
    if let [url] = after(presence::OBSERVER).as_slice() {
        return runtime.block_on(presence::observer(url));
    }
    if let Ok(filter) = std::env::var("RUST_LOG") {
        let _ = lattice_mcp::telemetry::init(&filter);
    }
    if has("--soak") {
        let numbers = after("--soak").iter().map_while(|text| text.parse::<u32>().ok()).collect::<Vec<_>>();
        let clients = numbers.first().map_or(500, |clients| *clients as usize);
        let length = std::time::Duration::from_secs(numbers.get(1).map_or(600, |seconds| u64::from(*seconds)));
        let round = std::time::Duration::from_secs(numbers.get(2).map_or(3, |seconds| u64::from(*seconds)));
        return runtime.block_on(soak::run(soak::Load { clients, length, round }));
    }
    let quick = has("--quick");
    if !has("--nats") {
        runtime.block_on(compare::run(quick))?;
        runtime.block_on(inprocess::run(quick));
    }
    runtime.block_on(nats::run(quick))?;
    runtime.block_on(presence::run(quick))?;
    runtime.block_on(recovery::run(quick))?;
    Ok(())
}
