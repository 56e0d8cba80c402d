//! Real MCP clients, of both generations, over both transports. What they report becomes a table in the README.

use std::io::{BufRead as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Lattice, PROGRAM, TOKEN};
use crate::matrix::{Report, Row};

/// How long all scenarios of one client may take.
const PATIENCE: Duration = Duration::from_secs(180);

/// What every client does, in this order, as far as it can.
const SCENARIOS: [&str; 12] =
    ["tools", "assign", "progress", "cancel", "escalate", "person", "lost", "unknown", "changes", "resources", "prompts", "subscription"];

/// A client, what of it a person would have to know, and the protocol that it must have come to speak.
struct Client {
    program: &'static str,
    script: &'static str,
    arguments: &'static [&'static str],
    how: &'static str,
    speaks: &'static str,
    /// What it has no way to do, or its script does not try.
    lacks: &'static [&'static str],
    ran: [OnceLock<Result<Report, String>>; 2],
}

impl Client {
    const fn new(
        program: &'static str,
        script: &'static str,
        arguments: &'static [&'static str],
        how: &'static str,
        speaks: &'static str,
    ) -> Self {
        Self { program, script, arguments, how, speaks, lacks: &[], ran: [OnceLock::new(), OnceLock::new()] }
    }

    const fn lacking(mut self, lacks: &'static [&'static str]) -> Self {
        self.lacks = lacks;
        self
    }
}

const MODERN: &str = "python-modern/bin/python";
const LEGACY: &str = "python-legacy/bin/python";
const FASTMCP: &str = "python-fastmcp/bin/python";
const NODE: &str = "bin/node";
/// What takes a connection that stays.
const NO_CONNECTION: &[&str] = &["progress", "person", "lost", "changes", "subscription"];

static PYTHON_2_3: Client = Client::new(MODERN, "client.py", &["--mode", "auto"], "auto", "2026-07-28");
static PYTHON_2_3_PINNED: Client = Client::new(MODERN, "client.py", &["--mode", "2026-07-28"], "pinned", "2026-07-28");
static PYTHON_2_3_LEGACY: Client = Client::new(MODERN, "client.py", &["--mode", "legacy"], "legacy", "2025-11-25");
static PYTHON_1_30: Client = Client::new(LEGACY, "client.py", &[], "", "2025-11-25");
static FASTMCP_4_1: Client =
    Client::new(FASTMCP, "client.py", &["--mode", "auto"], "auto", "2026-07-28").lacking(&["changes", "subscription"]);
static FASTMCP_4_1_LEGACY: Client =
    Client::new(FASTMCP, "client.py", &["--mode", "legacy"], "legacy", "2025-11-25").lacking(&["subscription"]);
static TYPESCRIPT_2_4: Client = Client::new(NODE, "client.mjs", &["--sdk", "client"], "", "2025-11-25");
static TYPESCRIPT_2_4_AUTO: Client = Client::new(NODE, "client.mjs", &["--sdk", "client", "--mode", "auto"], "auto", "2026-07-28");
static TYPESCRIPT_2_4_PINNED: Client =
    Client::new(NODE, "client.mjs", &["--sdk", "client", "--mode", "2026-07-28"], "pinned", "2026-07-28");
static TYPESCRIPT_1_32: Client = Client::new(NODE, "client.mjs", &["--sdk", "sdk"], "", "2025-11-25");
static INSPECTOR: Client = Client::new(NODE, "inspector.mjs", &[], "", "2025-11-25").lacking(NO_CONNECTION);
static INSPECTOR_MODERN: Client = Client::new(NODE, "inspector.mjs", &["--mode", "modern"], "modern", "2026-07-28").lacking(NO_CONNECTION);

macro_rules! clients {
    ($($client:ident: $stdio:ident, $http:ident;)*) => {
        $(
            #[test]
            fn $stdio() {
                passes(&$client, Transport::Stdio);
            }

            #[test]
            fn $http() {
                passes(&$client, Transport::Http);
            }
        )*

        /// The clients in the order of their rows.
        static ALL: &[&Client] = &[$(&$client),*];
    };
}

clients! {
    PYTHON_2_3: python_2_3_over_stdio, python_2_3_over_http;
    PYTHON_2_3_PINNED: python_2_3_pinned_over_stdio, python_2_3_pinned_over_http;
    PYTHON_2_3_LEGACY: python_2_3_legacy_over_stdio, python_2_3_legacy_over_http;
    PYTHON_1_30: python_1_30_over_stdio, python_1_30_over_http;
    FASTMCP_4_1: fastmcp_4_1_over_stdio, fastmcp_4_1_over_http;
    FASTMCP_4_1_LEGACY: fastmcp_4_1_legacy_over_stdio, fastmcp_4_1_legacy_over_http;
    TYPESCRIPT_2_4: typescript_2_4_over_stdio, typescript_2_4_over_http;
    TYPESCRIPT_2_4_AUTO: typescript_2_4_auto_over_stdio, typescript_2_4_auto_over_http;
    TYPESCRIPT_2_4_PINNED: typescript_2_4_pinned_over_stdio, typescript_2_4_pinned_over_http;
    TYPESCRIPT_1_32: typescript_1_32_over_stdio, typescript_1_32_over_http;
    INSPECTOR: inspector_over_stdio, inspector_over_http;
    INSPECTOR_MODERN: inspector_modern_over_stdio, inspector_modern_over_http;
}

#[derive(Debug, Clone, Copy)]
enum Transport {
    Stdio,
    Http,
}

/// The rows of these clients in the table.
pub(crate) fn rows() -> Vec<Row> {
    std::thread::scope(|scope| {
        for transport in [Transport::Stdio, Transport::Http] {
            scope.spawn(move || {
                for client in ALL {
                    let _ = ran(client, transport);
                }
            });
        }
    });
    let row = |client: &&Client| {
        let report = |transport| match ran(client, transport) {
            Ok(report) => report.clone(),
            Err(why) => panic!("{} {} over {transport:?}: {why}", client.script, client.how),
        };
        Row { how: client.how, stdio: report(Transport::Stdio), http: Some(report(Transport::Http)) }
    };
    ALL.iter().map(row).collect()
}

fn passes(client: &Client, transport: Transport) {
    let report = ran(client, transport).as_ref().unwrap_or_else(|why| panic!("{why}"));
    assert_eq!(report.protocol, client.speaks, "{report:?}");
    let does: Vec<&str> = SCENARIOS.into_iter().filter(|scenario| !client.lacks.contains(scenario)).collect();
    assert_eq!(report.passed, does, "{report:?}");
    assert!(report.unable.keys().all(|scenario| client.lacks.contains(&scenario.as_str())), "{report:?}");
}

/// What became of a client: it runs once, however many ask.
fn ran(client: &Client, transport: Transport) -> &Result<Report, String> {
    client.ran[transport as usize].get_or_init(|| {
        let lattice = Lattice::new();
        match transport {
            Transport::Stdio => {
                let argv = serde_json::to_string(&lattice.command(&["--stdio"])).expect("JSON");
                run(client, &lattice, &["--stdio", &argv])
            }
            Transport::Http => {
                let server = lattice.serve();
                run(client, &lattice, &["--url", &server.url, "--token", TOKEN])
            }
        }
    })
}

#[test]
fn the_lock_of_the_packages_names_no_place_to_get_them_from() {
    let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/package-lock.json");
    let text = std::fs::read_to_string(lock).expect("the lock");
    assert!(!text.contains("\"resolved\""), "write the lock with omit-lockfile-registry-resolved=true in npm's configuration");
    let lock: Value = serde_json::from_str(&text).expect("JSON");
    let packages = lock["packages"].as_object().expect("packages").iter().filter(|(path, _)| !path.is_empty());
    let unchecked: Vec<&String> = packages.filter(|(_, package)| package["integrity"].is_null()).map(|(path, _)| path).collect();
    assert!(unchecked.is_empty(), "nothing tells whether these are what was tested: {unchecked:?}");
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
fn run(client: &Client, lattice: &Lattice, server: &[&str]) -> Result<Report, String> {
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
    let status = ended(&mut child, PATIENCE);
    let (stdout, stderr) = (stdout.join().expect("its output"), stderr.join().expect("its errors"));
    let ended = status.map_or_else(|| format!("did not end within {PATIENCE:?}"), |status| status.to_string());
    if !status.is_some_and(|status| status.success()) {
        return Err(format!("the client {ended}\n{stderr}"));
    }
    serde_json::from_str(stdout.trim()).map_err(|error| format!("no report ({error}): {stdout}\n{stderr}"))
}

/// How a program ended; nothing when it had to be killed, for it took too long. A child's end gives no other sign while its output
/// is read elsewhere.
pub(crate) fn ended(child: &mut std::process::Child, patience: Duration) -> Option<std::process::ExitStatus> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait().expect("a child process") {
            return Some(status);
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
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
