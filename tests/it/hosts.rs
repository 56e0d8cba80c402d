//! Full coding agents as MCP clients: each works by itself, with its own configuration file, a model that follows a script
//! (`tests/hosts/model.py`), and this program. The world beyond loopback is closed to them.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Lattice, TOKEN};
use crate::matrix::{Report, Row};

/// How long one agent may take for all scenarios.
const PATIENCE: Duration = Duration::from_secs(120);
/// How much of an agent's output a failure shows.
const SHOWN_MAX: usize = 8 << 10;
/// When an agent cuts a silent call, in seconds: sooner than the lattice says that it is still there, and than `quiet` is done.
const CUT_SECS: u64 = 4;
/// Runs a program, and keeps what it is told in a file.
const LISTEN: &str = r#"tee "$0" | "$@""#;
/// The environment variable in which an agent finds its token.
const TOKEN_VAR: &str = "LATTICE_TEST_TOKEN";

/// What keeps opencode from looking for things elsewhere.
pub(crate) const OPENCODE_ALONE: [&str; 4] =
    ["OPENCODE_DISABLE_AUTOUPDATE", "OPENCODE_DISABLE_DEFAULT_PLUGINS", "OPENCODE_DISABLE_LSP_DOWNLOAD", "OPENCODE_DISABLE_MODELS_FETCH"];

/// What every agent does, in the order of the script.
const SCENARIOS: [&str; 11] = ["tools", "unknown", "assign", "await", "escalate", "alone", "cancel", "large", "cut", "changes", "late"];
/// What no agent is asked to do here, and why.
const UNABLE: [(&str, &str); 5] = [
    ("person", "it works alone: no person sees a form, and the question stays open"),
    ("progress", "its model does not see progress"),
    ("prompts", "they are for a person, and none is there"),
    ("resources", "not tried: its model reads results with `check_work`"),
    ("subscription", "not tried: its model waits with `await_work`"),
];

/// A coding agent.
pub(crate) struct Host {
    name: &'static str,
    /// How it has its model call tools, where there are several ways.
    how: &'static str,
    /// The protocol that it must have come to speak.
    speaks: &'static str,
    /// Its package, which says its version.
    package: &'static str,
    /// Its program in that package, and whether Node runs it.
    program: &'static str,
    is_script: bool,
    /// Whether it lists the tools again when it is told that they changed; an agent that came late can be given work anyway.
    lists_again: bool,
    /// What makes it work alone on a prompt.
    arguments: &'static [&'static str],
    /// Where in its home it looks for its configuration, and what stands there.
    config_path: &'static str,
    config: fn(&Door, &Model) -> String,
    environment: fn(&Model) -> Vec<(&'static str, String)>,
    /// The agent's last words, out of what it printed.
    words: fn(&str) -> Option<String>,
    /// What it did over stdio and over HTTP: it runs once, however many ask.
    ran: [OnceLock<Report>; 2],
}

const fn codex(how: &'static str, config: fn(&Door, &Model) -> String) -> Host {
    Host {
        name: "codex",
        how,
        speaks: "2025-06-18",
        package: "@openai/codex",
        program: "bin/codex.js",
        is_script: true,
        lists_again: false,
        arguments: &["exec", "--skip-git-repo-check", "--json"],
        config_path: ".codex/config.toml",
        config,
        environment: |_| Vec::new(),
        words: |printed| {
            let items = printed.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let said = items.rev().find(|event| event["item"]["type"] == "agent_message");
            said?["item"]["text"].as_str().map(str::to_owned)
        },
        ran: [OnceLock::new(), OnceLock::new()],
    }
}

/// It has this model search for tools.
pub(crate) static CODEX: Host = codex("", |door, model| codex_config("gpt-5.5", door, model));

/// It has this model write JavaScript that calls tools.
static CODEX_IN_CODE: Host = codex("code mode", |door, model| codex_config("gpt-5.6-sol", door, model));

pub(crate) static OPENCODE: Host = Host {
    name: "opencode",
    how: "",
    speaks: "2025-11-25",
    package: "opencode-linux-x64-baseline",
    program: "bin/opencode",
    is_script: false,
    lists_again: true,
    arguments: &["run", "--pure", "--format", "json"],
    config_path: ".config/opencode/opencode.json",
    config: opencode_config,
    environment: |_| OPENCODE_ALONE.map(|name| (name, "1".to_owned())).to_vec(),
    words: |printed| {
        let events = printed.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let said = events.rev().find(|event| event["type"] == "text");
        said?["part"]["text"].as_str().map(str::to_owned)
    },
    ran: [OnceLock::new(), OnceLock::new()],
};

pub(crate) static GEMINI: Host = Host {
    name: "gemini-cli",
    how: "",
    speaks: "2025-06-18",
    package: "@google/gemini-cli",
    program: "bundle/gemini.js",
    is_script: true,
    lists_again: true,
    arguments: &["--yolo", "--model", "gemini-2.5-flash", "--output-format", "json", "--prompt"],
    config_path: ".gemini/settings.json",
    config: gemini_config,
    environment: |model| vec![("GEMINI_API_KEY", "none".into()), ("GOOGLE_GEMINI_BASE_URL", format!("http://127.0.0.1:{}", model.port))],
    words: |printed| serde_json::from_str::<Value>(printed).ok()?["response"].as_str().map(str::to_owned),
    ran: [OnceLock::new(), OnceLock::new()],
};

fn codex_config(name: &str, door: &Door, model: &Model) -> String {
    // A JSON text is a TOML text, and a list of them a list.
    let server = match door {
        Door::Stdio(argv) => format!("command = {}\nargs = {}", json!(argv[0]), json!(argv[1..])),
        Door::Http(url) => format!("url = {}\nbearer_token_env_var = {}", json!(url), json!(TOKEN_VAR)),
    };
    // Nobody is there to approve of a call: without that last key, codex refuses what may change the world.
    format!(
        "model = \"{name}\"
model_provider = \"script\"
approval_policy = \"never\"
sandbox_mode = \"read-only\"
check_for_update_on_startup = false
[features]
plugins = false
apps = false
[analytics]
enabled = false
[feedback]
enabled = false
[model_providers.script]
name = \"script\"
base_url = \"http://127.0.0.1:{}/v1\"
wire_api = \"responses\"
request_max_retries = 0
stream_max_retries = 0
[mcp_servers.lattice]
{server}
tool_timeout_sec = {CUT_SECS}
default_tools_approval_mode = \"approve\"
",
        model.port
    )
}

fn opencode_config(door: &Door, model: &Model) -> String {
    let mut server = match door {
        Door::Stdio(argv) => json!({"type": "local", "command": argv}),
        Door::Http(url) => {
            json!({"type": "remote", "url": url, "headers": {"Authorization": format!("Bearer {{env:{TOKEN_VAR}}}")}, "oauth": false})
        }
    };
    server["timeout"] = json!(CUT_SECS * 1000);
    let provider = json!({
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": format!("http://127.0.0.1:{}/v1", model.port), "apiKey": "none"},
        "models": {"script": {"tool_call": true, "limit": {"context": 200_000, "output": 8_000}}},
    });
    let config = json!({
        "autoupdate": false, "share": "disabled", "snapshot": false, "lsp": false, "formatter": false,
        "model": "script/script", "small_model": "script/script", "provider": {"script": provider}, "enabled_providers": ["script"],
        "permission": "allow", "mcp": {"lattice": server},
    });
    config.to_string()
}

fn gemini_config(door: &Door, _: &Model) -> String {
    let mut server = match door {
        Door::Stdio(argv) => json!({"command": argv[0], "args": argv[1..]}),
        Door::Http(url) => json!({"httpUrl": url, "headers": {"Authorization": format!("Bearer ${TOKEN_VAR}")}}),
    };
    server["timeout"] = json!(CUT_SECS * 1000);
    server["trust"] = true.into();
    let config = json!({
        "general": {"enableAutoUpdate": false, "enableAutoUpdateNotification": false},
        "privacy": {"usageStatisticsEnabled": false}, "telemetry": {"enabled": false},
        "security": {"auth": {"selectedType": "gemini-api-key"}, "folderTrust": {"enabled": false}},
        "mcpServers": {"lattice": server},
    });
    config.to_string()
}

/// How an agent reaches the lattice.
enum Door {
    Stdio(Vec<String>),
    Http(String),
}

macro_rules! hosts {
    ($($host:ident: $stdio:ident, $http:ident;)*) => {
        $(
            #[test]
            fn $stdio() {
                over_stdio(&$host);
            }

            #[test]
            fn $http() {
                over_http(&$host);
            }
        )*

        /// The agents in the order of their rows.
        static ALL: &[&Host] = &[$(&$host),*];
    };
}

hosts! {
    CODEX: codex_over_stdio, codex_over_http;
    CODEX_IN_CODE: codex_in_code_mode_over_stdio, codex_in_code_mode_over_http;
    OPENCODE: opencode_over_stdio, opencode_over_http;
    GEMINI: gemini_cli_over_stdio, gemini_cli_over_http;
}

/// The rows of these agents in the table.
pub(crate) fn rows() -> Vec<Row> {
    let row = |host: &&'static Host| Row { how: host.how, stdio: over_stdio(host).clone(), http: Some(over_http(host).clone()) };
    ALL.iter().map(row).collect()
}

fn over_stdio(host: &'static Host) -> &'static Report {
    host.ran[0].get_or_init(|| {
        let lattice = lattice();
        let heard = lattice.path().join("heard");
        let mut argv = ["sh", "-c", LISTEN].map(str::to_owned).to_vec();
        argv.push(heard.display().to_string());
        argv.extend(lattice.command(&["--stdio"]));
        let report = orchestrates(host, &lattice, &Door::Stdio(argv));
        let heard = std::fs::read_to_string(heard).expect("what it said to the program");
        let hello: Value = serde_json::from_str(heard.lines().next().unwrap_or_default()).expect("its first message");
        assert_eq!(hello["params"]["protocolVersion"], host.speaks, "{hello}");
        report
    })
}

fn over_http(host: &'static Host) -> &'static Report {
    host.ran[1].get_or_init(|| {
        let lattice = lattice();
        let server = lattice.serve();
        orchestrates(host, &lattice, &Door::Http(server.url.clone()))
    })
}

/// One that has two agents besides the usual ones: `quiet` says nothing for longer than its callers wait, and `herald` brings `late`.
fn lattice() -> Lattice {
    let lattice = Lattice::new();
    let agents = lattice.agents().display().to_string();
    let herald = format!("sed 's/^name: upper/name: late/' {agents}/upper.md > {agents}/.late\nmv {agents}/.late {agents}/late.md");
    for (name, description, script) in
        [("quiet", "Thinks for a while", "sleep 7\nprintf done"), ("herald", "Says that another comes", &herald)]
    {
        let program = lattice.path().join(format!("{name}.sh"));
        std::fs::write(&program, script).expect("a script");
        let runner = format!("runner:\n  kind: command\n  command: [sh, {}]", program.display());
        let file = format!("---\nname: {name}\ndescription: {description}\n{runner}\n---\n");
        std::fs::write(lattice.agents().join(format!("{name}.md")), file).expect("an agent file");
    }
    lattice
}

/// Lets an agent play the whole script, and looks at what it said and at what the lattice has kept.
fn orchestrates(host: &Host, lattice: &Lattice, door: &Door) -> Report {
    let answer = format!("blue-{}", uuid::Uuid::new_v4());
    let mut model = Model::start(&answer);
    let output = run(host, lattice, door, &mut model);
    let report = model.report();
    let (printed, logged) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let shown = || format!("{report:#}\n{} printed:\n{}\nand logged:\n{}", host.name, end(&printed), end(&logged));
    assert_eq!(report["failed"], Value::Null, "{}", shown());
    assert!(output.status.success(), "{} ended with {}; {}", host.name, output.status, shown());

    let mut unable: BTreeMap<String, String> = UNABLE.map(|(scenario, why)| (scenario.to_owned(), why.to_owned())).into();
    if !host.lists_again {
        unable.insert("changes".into(), "it lists tools once; it gives work to an agent that came later all the same".into());
    }
    let passed = serde_json::from_value(report["passed"].clone()).expect("a list");
    let told = Report { client: format!("{} {}", host.name, version(host)), protocol: host.speaks.into(), passed, unable };
    let does: Vec<&str> = SCENARIOS.into_iter().filter(|scenario| !told.unable.contains_key(*scenario)).collect();
    assert_eq!(told.passed, does, "{}", shown());

    let words = (host.words)(&printed).unwrap_or_else(|| panic!("no last words; {}", shown()));
    assert_eq!(words, report["words"], "{}", shown());
    assert!(words.contains(&answer), "the answer is not in the last words: {words}");
    kept(lattice, &answer);
    assert!(!logged.contains("already registered"), "an agent was told of changes that it had seen: {}", end(&logged));
    told
}

/// The two works that ran side by side are in the store, settled, of one root, and the answer is in the result of the one that asked.
fn kept(lattice: &Lattice, answer: &str) {
    let argv = lattice.command(&["runs", "--json"]);
    let output = Command::new(&argv[0]).args(&argv[1..]).current_dir(lattice.path()).output().expect("the program");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let runs: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    let of = |agent: &str, task: &str| {
        let found: Vec<&Value> = runs.iter().filter(|run| run["agent_name"] == agent && run["task"] == task).collect();
        assert_eq!(found.len(), 1, "{agent} {task}: {runs:#?}");
        found[0].clone()
    };
    let (slow, asker) = (of("slow", "4"), of("asker", "paint"));
    for run in [&slow, &asker] {
        assert_eq!(run["status"], "COMPLETE", "{run:#}");
        assert_eq!(run["root_run_id"], slow["root_run_id"], "one conversation has one root: {run:#}");
    }
    assert_eq!(slow["result"], json!({"steps": 4}), "{slow:#}");
    assert!(asker["result"].to_string().contains(answer), "{asker:#}");
    let at = |run: &Value, moment: &str| run[moment].as_str().map(str::to_owned).unwrap_or_else(|| panic!("no {moment}: {run:#}"));
    assert!(at(&asker, "accepted_at") < at(&slow, "settled_at"), "not side by side: {slow:#} {asker:#}");
    assert_eq!(of("careful", "act")["status"], "CANCELLED");
    assert_eq!(of("quiet", "think")["attempt"], 1);
    assert_eq!(of("late", "new")["result"], "NEW");
    assert_eq!(runs.len(), 7, "an unknown agent's work was kept: {runs:#?}");
}

#[test]
fn the_lock_of_the_agents_names_no_place_to_get_them_from() {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts/package-lock.json")).expect("the lock");
    let lock: Value = serde_json::from_str(&text).expect("JSON");
    for (path, package) in lock["packages"].as_object().expect("packages").iter().filter(|(path, _)| !path.is_empty()) {
        assert!(package["resolved"].is_null(), "{path}: write the lock with omit-lockfile-registry-resolved=true in npm's configuration");
        assert!(package["integrity"].is_string(), "nothing tells whether {path} is what was tested");
    }
}

/// Runs an agent to its end, in a home of its own.
fn run(host: &Host, lattice: &Lattice, door: &Door, model: &mut Model) -> Output {
    let (home, work) = (lattice.path().join("home"), lattice.path().join("work"));
    let config = home.join(host.config_path);
    std::fs::create_dir_all(config.parent().expect("a folder")).expect("a home");
    std::fs::create_dir_all(&work).expect("a folder to work in");
    std::fs::write(&config, (host.config)(door, model)).expect("a configuration");

    let mut command = program(host);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let proxy = format!("http://127.0.0.1:{}", model.port);
    command.args(host.arguments).arg("Have the work done by agents of the lattice").current_dir(&work).env_clear();
    command.env("PATH", path).env("HOME", &home).env("TMPDIR", lattice.path()).env(TOKEN_VAR, TOKEN).envs((host.environment)(model));
    command.env("HTTPS_PROXY", &proxy).env("HTTP_PROXY", &proxy).env("NO_PROXY", "127.0.0.1,localhost");
    to_its_end(command).unwrap_or_else(|output| {
        let logged = String::from_utf8_lossy(&output.stderr);
        panic!("{} did not end within {PATIENCE:?}: {}\n{}", host.name, model.report(), end(&logged))
    })
}

/// An agent's program, and what runs it.
pub(crate) fn program(host: &Host) -> Command {
    let program = package(host).join(host.program);
    if !host.is_script {
        return Command::new(program);
    }
    let mut command = Command::new(tools().join("bin/node"));
    command.arg(program);
    command
}

/// Runs a program with all that it starts; what it printed is an error when it did not end by itself.
pub(crate) fn to_its_end(mut command: Command) -> Result<Output, Output> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let child = command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let group = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw).expect("a process group");
    let (ended, end_of) = mpsc::channel();
    let waiting = std::thread::spawn(move || drop(ended.send(child.wait_with_output())));
    let signal = |signal| {
        // It may be gone already.
        let _ = rustix::process::kill_process_group(group, signal);
    };
    let output = match end_of.recv_timeout(PATIENCE) {
        Ok(output) => Ok(output.expect("its output")),
        Err(_) => {
            signal(rustix::process::Signal::KILL);
            Err(end_of.recv().expect("its end").expect("its output"))
        }
    };
    // What it may have left behind.
    signal(rustix::process::Signal::TERM);
    waiting.join().expect("a thread that waits");
    output
}

/// The model that an agent talks to: a program that follows a script. It ends with this value.
struct Model {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    port: u16,
}

impl Model {
    /// One that gives this answer to the agent of the lattice that asks.
    fn start(answer: &str) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts/model.py");
        let mut command = Command::new(tools().join("python-modern/bin/python"));
        command.arg(script).args(["--answer", answer]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the scripted model");
        let (stdin, mut stdout) = (child.stdin.take(), BufReader::new(child.stdout.take().expect("its output")));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("the port of the scripted model");
        let port = line.trim().parse().unwrap_or_else(|error| panic!("the scripted model has no port ({error}): {line:?}"));
        Self { child, stdin, stdout, port }
    }

    /// What it was asked, and what went wrong; it ends with that.
    fn report(&mut self) -> Value {
        self.stdin = None;
        let mut report = String::new();
        self.stdout.read_to_string(&mut report).expect("the report of the scripted model");
        serde_json::from_str(&report).unwrap_or_else(|error| panic!("no report of the scripted model ({error}): {report:?}"))
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where the setup installs.
fn tools() -> PathBuf {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools");
    let installed = ["stamp", "hosts/stamp"].iter().all(|stamp| tools.join(stamp).exists());
    assert!(
        installed,
        "the coding agents are not installed: run ./tests/clients/setup.sh and ./tests/hosts/setup.sh (or ./tests/run, which does)"
    );
    tools
}

fn package(host: &Host) -> PathBuf {
    let package = tools().join("hosts/node_modules").join(host.package);
    assert!(
        package.exists(),
        "npm has no {} for this machine: name the package of its platform in tests/hosts/package.json, and run ./tests/hosts/setup.sh",
        host.package
    );
    package
}

fn version(host: &Host) -> String {
    let text = std::fs::read_to_string(package(host).join("package.json")).expect("a package");
    let package: Value = serde_json::from_str(&text).expect("JSON");
    package["version"].as_str().expect("a version").to_owned()
}

/// The end of a long text.
fn end(text: &str) -> &str {
    let mut start = text.len().saturating_sub(SHOWN_MAX);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}
