//! Real MCP clients, of both generations, over both transports.

use std::io::{BufRead as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Lattice, PROGRAM, TOKEN};

/// How long all scenarios of one client may take.
const PATIENCE: Duration = Duration::from_secs(180);

/// What every client does, in this order.
const SCENARIOS: [&str; 11] =
    ["tools", "work", "cancel", "escalate", "person", "lost", "unknown", "changes", "resources", "prompts", "subscription"];

/// A client, and the protocol that it must have come to speak.
struct Client {
    program: &'static str,
    script: &'static str,
    arguments: &'static [&'static str],
    speaks: &'static str,
}

const PYTHON_2_3: Client =
    Client { program: "python-modern/bin/python", script: "client.py", arguments: &["--mode", "auto"], speaks: "2026-07-28" };
const PYTHON_2_3_LEGACY: Client =
    Client { program: "python-modern/bin/python", script: "client.py", arguments: &["--mode", "legacy"], speaks: "2025-11-25" };
const PYTHON_1_30: Client = Client { program: "python-legacy/bin/python", script: "client.py", arguments: &[], speaks: "2025-11-25" };
const TYPESCRIPT_2_4: Client = Client { program: "bin/node", script: "client.mjs", arguments: &["--sdk", "client"], speaks: "2025-11-25" };
const TYPESCRIPT_2_4_AUTO: Client =
    Client { program: "bin/node", script: "client.mjs", arguments: &["--sdk", "client", "--mode", "auto"], speaks: "2026-07-28" };
const TYPESCRIPT_1_32: Client = Client { program: "bin/node", script: "client.mjs", arguments: &["--sdk", "sdk"], speaks: "2025-11-25" };

macro_rules! clients {
    ($($name:ident: $client:expr, $transport:ident;)*) => {$(
        #[test]
        fn $name() {
            $transport(&$client);
        }
    )*};
}

clients! {
    python_2_3_over_stdio: PYTHON_2_3, stdio;
    python_2_3_over_http: PYTHON_2_3, http;
    python_2_3_legacy_over_stdio: PYTHON_2_3_LEGACY, stdio;
    python_2_3_legacy_over_http: PYTHON_2_3_LEGACY, http;
    python_1_30_over_stdio: PYTHON_1_30, stdio;
    python_1_30_over_http: PYTHON_1_30, http;
    typescript_2_4_over_stdio: TYPESCRIPT_2_4, stdio;
    typescript_2_4_over_http: TYPESCRIPT_2_4, http;
    typescript_2_4_auto_over_stdio: TYPESCRIPT_2_4_AUTO, stdio;
    typescript_2_4_auto_over_http: TYPESCRIPT_2_4_AUTO, http;
    typescript_1_32_over_stdio: TYPESCRIPT_1_32, stdio;
    typescript_1_32_over_http: TYPESCRIPT_1_32, http;
}

fn stdio(client: &Client) {
    let lattice = Lattice::new();
    let argv = serde_json::to_string(&lattice.command(&["--stdio"])).expect("JSON");
    passes(client, &lattice, &["--stdio", &argv]);
}

fn http(client: &Client) {
    let lattice = Lattice::new();
    let server = lattice.serve();
    passes(client, &lattice, &["--url", &server.url, "--token", TOKEN]);
}

fn passes(client: &Client, lattice: &Lattice, server: &[&str]) {
    let report = run(client, lattice, server);
    assert_eq!(report["protocol"], client.speaks, "{report}");
    assert_eq!(report["passed"], serde_json::json!(SCENARIOS), "{report}");
}

#[test]
fn the_example_of_a_registration_starts_this_program() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(repository.join("mcp.json.example")).expect("the example");
    let example: Value = serde_json::from_str(&text).expect("JSON");
    let server = &example["mcpServers"]["lattice"];
    assert_eq!(server["command"], "lattice-mcp");
    let arguments: Vec<String> = serde_json::from_value(server["args"].clone()).expect("arguments");

    let lattice = Lattice::new();
    let mut child = Command::new(PROGRAM)
        .args(arguments)
        .env("LATTICE_DATA_DIR", lattice.path().join("data"))
        .current_dir(lattice.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program");
    let mut stdin = child.stdin.take().expect("its input");
    writeln!(stdin, "{}", crate::web::initialize()).expect("a message is taken");
    let mut line = String::new();
    std::io::BufReader::new(child.stdout.take().expect("its output")).read_line(&mut line).expect("an answer");
    let answer: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
    assert!(answer["result"]["serverInfo"].is_object(), "{answer}");
    drop(stdin);
    assert!(child.wait().expect("its end").success());
}

/// Runs a client's script to its end; its report.
fn run(client: &Client, lattice: &Lattice, server: &[&str]) -> Value {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = tool(repository, client.program);
    let mut child = Command::new(&program)
        .arg(repository.join("tests/clients").join(client.script))
        .args(client.arguments)
        .args(server)
        .arg("--agents")
        .arg(lattice.agents())
        .current_dir(lattice.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child process") {
            break Some(status);
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let (stdout, stderr) = (stdout.join().expect("its output"), stderr.join().expect("its errors"));
    let ended = status.map_or_else(|| format!("did not end within {PATIENCE:?}"), |status| status.to_string());
    assert!(status.is_some_and(|status| status.success()), "the client {ended}\n{stderr}");
    serde_json::from_str(stdout.trim()).unwrap_or_else(|error| panic!("no report ({error}): {stdout}\n{stderr}"))
}

pub(crate) fn drain(pipe: Option<impl std::io::Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// A program that the setup installs.
pub(crate) fn tool(repository: &Path, name: &str) -> PathBuf {
    let tools = repository.join(".tools");
    let program = tools.join(name);
    assert!(
        program.exists() && tools.join("stamp").exists(),
        "the MCP clients are not installed: run ./tests/clients/setup.sh (or ./tests/run, which does)"
    );
    program
}
