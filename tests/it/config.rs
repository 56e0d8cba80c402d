//! Configuration: which layer wins, what is refused, and where a value is said to come from.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use std::path::Path;

use lattice_mcp::config::yaml::Node;
use lattice_mcp::config::{self, Config, Given, Loaded, Origin, Sources, load};
use lattice_mcp::init;
use lattice_mcp::model::agent::RunnerSpec;
use lattice_mcp::model::size::Size;
use lattice_mcp::model::time::Span;
use tempfile::TempDir;

fn sources(dir: &TempDir, file: &str) -> Sources {
    if !file.is_empty() {
        std::fs::write(dir.path().join("lattice.yaml"), file).unwrap();
    }
    Sources { cwd: dir.path().to_owned(), ..Sources::default() }
}

fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn from_file(file: &str) -> Result<Loaded, String> {
    let dir = TempDir::new().unwrap();
    load(&sources(&dir, file)).map_err(|error| error.to_string().replace(&format!("{}/", dir.path().display()), ""))
}

fn from_env(pairs: &[(&str, &str)]) -> Result<Loaded, String> {
    let dir = TempDir::new().unwrap();
    load(&Sources { env: env(pairs), ..sources(&dir, "") }).map_err(|error| error.to_string())
}

#[test]
fn flags_beat_environment_beats_file_beats_defaults() {
    let dir = TempDir::new().unwrap();
    let mut sources = sources(&dir, "lattice:\n  id: of-file\n  station: of-file\n  work:\n    max_parallel: 3\n");
    sources.env = env(&[("LATTICE_STATION", "of-env"), ("LATTICE_WORK_MAX_PARALLEL", "4"), ("LATTICE_HTTP_LISTEN", "8765")]);
    sources.flags = vec![("lattice.work.max_parallel".into(), Given::One("5".into()), "--max-parallel".into())];
    let loaded = load(&sources).unwrap();
    let lattice = &loaded.config.lattice;
    assert_eq!(lattice.id.as_str(), "of-file");
    assert_eq!(lattice.station.as_ref().unwrap().as_str(), "of-env");
    assert_eq!(lattice.work.max_parallel, 5);
    assert_eq!(lattice.work.queue_size, Config::default().lattice.work.queue_size);
    assert_eq!(loaded.config.http.address().unwrap().unwrap().to_string(), "127.0.0.1:8765");

    let file = dir.path().join("lattice.yaml");
    assert_eq!(loaded.file.as_deref(), Some(file.as_path()));
    assert_eq!(loaded.origin["lattice.id"], Origin::File { path: file.clone(), line: 2 });
    assert_eq!(loaded.origin["lattice.id"].to_string(), format!("{}:2", file.display()));
    assert_eq!(loaded.origin["lattice.station"].to_string(), "LATTICE_STATION");
    assert_eq!(loaded.origin["lattice.work.max_parallel"].to_string(), "--max-parallel");
    assert_eq!(loaded.origin["lattice.work.queue_size"].to_string(), "default");
    assert_eq!(loaded.warnings, Vec::<String>::new());
}

#[test]
fn every_key_has_its_variable() {
    let names = config::variables();
    for (name, key) in [
        ("LATTICE_ID", "lattice.id"),
        ("LATTICE_STATION", "lattice.station"),
        ("LATTICE_DATA_DIR", "lattice.data_dir"),
        ("LATTICE_HTTP_LISTEN", "http.listen"),
        ("LATTICE_LOG_FILTER", "log.filter"),
        ("LATTICE_WORK_MAX_PARALLEL", "lattice.work.max_parallel"),
    ] {
        assert_eq!(names.get(name).map(String::as_str), Some(key));
    }
    // Two keys must not fold to one variable, and no setting may hide behind a variable that a run gets.
    let keys = load(&Sources::default()).unwrap().table().len();
    assert_eq!(names.len(), keys);
    for reserved in ["LATTICE_WORK_ID", "LATTICE_RUN_ID", "LATTICE_AGENT", "LATTICE_TASK", "LATTICE_CONTEXT", "LATTICE_MCP_CONFIG"] {
        assert!(!names.contains_key(reserved), "{reserved}");
    }
}

#[test]
fn a_run_s_own_variables_are_no_settings_and_others_are_warned_about() {
    let loaded = from_env(&[
        ("LATTICE_WORK_ID", "x"),
        ("LATTICE_ATTEMPT", "1"),
        ("LATTICE_SUPERVISOR", "1"),
        ("LATTICE_BOUND_RUN", "x"),
        ("LATTICE_STATOIN", "x"),
        ("HOME", "/x"),
        ("LATTICE_ID", ""),
        ("LATTICE_LOG", "debug"),
    ])
    .unwrap();
    assert_eq!(loaded.warnings, ["the variable LATTICE_STATOIN is not a setting and is ignored: the nearest known one is LATTICE_STATION"]);
    assert_eq!(loaded.config.log.filter, "debug");
    assert_eq!(loaded.config.lattice.id.as_str(), "default");
}

#[test]
fn values_of_the_environment_have_their_type() {
    let loaded = from_env(&[
        ("LATTICE_RETRY_ENABLED", "false"),
        ("LATTICE_RETRY_BACKOFF", "linear"),
        ("LATTICE_HTTP_ALLOWED_ORIGINS", "https://a.example, http://localhost:3000"),
        ("LATTICE_RESULTS_INLINE_MAX", "4096"),
        ("LATTICE_WORK_DEFAULT_TIMEOUT", "2m"),
        ("LATTICE_ID", "42"),
        ("LATTICE_HTTP_TOKEN", "007"),
        ("LATTICE_AGENTS_DEFAULT_RUNNER", "{kind: echo}"),
        ("LATTICE_DATA_DIR", "data"),
    ])
    .unwrap();
    let config = &loaded.config;
    assert!(!config.lattice.retry.enabled);
    assert_eq!(config.lattice.retry.backoff, config::Backoff::Linear);
    assert_eq!(config.http.allowed_origins, ["https://a.example", "http://localhost:3000"]);
    assert_eq!(config.results.inline_max, Size::bytes(4096));
    assert_eq!(config.lattice.work.default_timeout, Span::secs(120));
    assert_eq!(config.lattice.id.as_str(), "42");
    assert_eq!(config.http.token.as_ref().unwrap().expose(), "007");
    assert_eq!(config.agents.default_runner, Some(RunnerSpec::Echo));
    assert!(config.lattice.data_dir.as_ref().unwrap().is_absolute());
}

#[test]
fn what_a_file_says_wrong_is_named_with_its_line() {
    for (file, expected) in [
        (
            "lattice:\n  work:\n    max_paralel: 3\n",
            "lattice.yaml:3: unknown key \"lattice.work.max_paralel\": the nearest known key is \"lattice.work.max_parallel\"",
        ),
        ("latice:\n  id: x\n", "lattice.yaml:1: unknown key \"latice\": the nearest known key is \"lattice\""),
        ("work: { lease: 10s }\n", "lattice.yaml:1: unknown key \"work\": the nearest known key is \"lattice.work\""),
        ("lattice:\n  nats: http://a\n", "lattice.yaml:2: lattice.nats.url cannot be \"http://a\": expected embedded, or addresses like"),
        ("lattice: { nats: { auth: { user: a } } }\n", "expected both lattice.nats.auth.user and lattice.nats.auth.password, or neither"),
        ("lattice: { nats: { auth: { token: a, nkey_file: b } } }\n", "expected one of user and password, token, creds_file and nkey_file"),
        ("lattice: { nats: { tls: { cert: a } } }\n", "expected both lattice.nats.tls.cert and lattice.nats.tls.key, or neither"),
        ("lattice: { nats: { replicas: 2 } }\n", "lattice.yaml:1: lattice.nats.replicas cannot be 2: expected 1, 3 or 5"),
        ("lattice: { embedded_nats: { port: 70000 } }\n", "lattice.yaml:1: lattice.embedded_nats.port cannot be \"70000\": expected u16"),
        ("lattice: 3\n", "lattice.yaml:1: lattice cannot be 3: expected a section with keys"),
        ("- x\n", "lattice.yaml:1: the file cannot be [\"x\"]: expected a section with keys"),
        (
            "lattice:\n  work:\n    max_parallel: many\n",
            "lattice.yaml:3: lattice.work.max_parallel cannot be \"many\": expected a whole number from 0 to 4294967295",
        ),
        (
            "lattice:\n  work: { max_parallel: 0 }\n",
            "lattice.yaml:2: lattice.work.max_parallel cannot be 0: expected a number of at least 1",
        ),
        ("lattice: { retry: { on: [bored] } }\n", "lattice.retry.on"),
        ("lattice: { retry: { jitter_percent: 101 } }\n", "lattice.retry.jitter_percent"),
        ("lattice: { retry: { quota_pause: 8d } }\n", "lattice.retry.quota_pause_max"),
        ("lattice: { work: { ageing: 0s } }\n", "lattice.work.ageing"),
        ("lattice: { retry: { enabled: maybe } }\n", "lattice.yaml:1: lattice.retry.enabled cannot be \"maybe\": expected true or false"),
        ("lattice: { id: a.b }\n", "lattice id \"a.b\" has '.' at position 2"),
        ("lattice: { work: { lease: 5 } }\n", "\"5\" is not a duration"),
        ("http: { token: 12345 }\n", "lattice.yaml:1: http.token cannot be (hidden): expected a text: put it into quotes"),
        (
            "lattice:\n  presence:\n    ttl: 5s\n",
            "lattice.yaml:3: lattice.presence.heartbeat cannot be \"10s\": expected a duration shorter than lattice.presence.ttl, 5s",
        ),
        ("mcp: { await_default: 2h }\n", "expected a duration of at most mcp.await_max, 1h"),
        ("lattice: { work: { lease: 1s } }\n", "expected a duration of at least 2s"),
        ("results: { inline_max: 65KiB }\n", "expected a size of at most 64KiB"),
        ("http: { allowed_origins: [\"https://a.example/x\"] }\n", "expected origins like https://app.example"),
        (
            "lattice: { storage: { blob_max_age: 8d } }\n",
            "lattice.yaml:1: lattice.storage.blob_max_age cannot be \"8d\": expected a duration longer than lattice.work.timeout_max and answer_timeout together",
        ),
        ("http: { listen: nowhere }\n", "lattice.yaml:1: http.listen cannot be \"nowhere\": expected an address like 127.0.0.1:8765"),
        ("http: { token_file: none }\n", "expected a file that can be read"),
        ("log: { filter: \"a=b=c\" }\n", "expected a filter like warn"),
        ("agents: { default_runner: { kind: shell } }\n", "lattice.yaml:1: agents.default_runner cannot be {\"kind\":\"shell\"}: expected"),
        ("agents: { default_runner: { kind: command, command: [] } }\n", "expected a runner whose command names a program"),
        ("lattice:\n  id: [\n", "lattice.yaml:"),
        ("a: 1\na: 2\n", "lattice.yaml:2: broken YAML: duplicate"),
    ] {
        let error = from_file(file).unwrap_err();
        assert!(error.contains(expected), "{file}\nexpected {expected}\nfound    {error}");
    }
}

#[test]
fn a_bad_variable_or_flag_is_named() {
    assert_eq!(
        from_env(&[("LATTICE_WORK_MAX_PARALLEL", "-1")]).unwrap_err(),
        "LATTICE_WORK_MAX_PARALLEL: lattice.work.max_parallel cannot be -1: expected a whole number from 0 to 4294967295"
    );
    assert_eq!(
        from_env(&[("LATTICE_NATS", "http://x")]).unwrap_err(),
        "LATTICE_NATS: lattice.nats.url cannot be \"http://x\": expected embedded, or addresses like nats://host:4222 or tls://host:4222, \
         with commas between them"
    );
    let flags = vec![("lattice.station".to_owned(), Given::One("a b".into()), "--station".to_owned())];
    let error = load(&Sources { flags, ..Sources::default() }).unwrap_err().to_string();
    assert!(error.starts_with("--station: lattice.station cannot be \"a b\": expected"), "{error}");
}

#[test]
fn files_are_looked_for_in_order() {
    let (cwd, user, other) = (TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap());
    let put = |dir: &TempDir, id: &str| std::fs::write(dir.path().join("lattice.yaml"), format!("lattice: {{ id: {id} }}\n")).unwrap();
    let mut sources = Sources { cwd: cwd.path().to_owned(), user_dir: Some(user.path().to_owned()), ..Sources::default() };
    let id = |sources: &Sources| load(sources).unwrap().config.lattice.id.to_string();
    assert_eq!(id(&sources), "default");
    put(&user, "user");
    assert_eq!(id(&sources), "user");
    put(&cwd, "cwd");
    assert_eq!(id(&sources), "cwd");
    put(&other, "other");
    sources.env = env(&[("LATTICE_CONFIG", other.path().join("lattice.yaml").to_str().unwrap())]);
    assert_eq!(id(&sources), "other");
    sources.file = Some("none.yaml".into());
    let error = load(&sources).unwrap_err().to_string();
    assert!(error.starts_with(&format!("cannot read {}: ", cwd.path().join("none.yaml").display())), "{error}");
}

#[test]
fn paths_start_where_they_were_written() {
    let (cwd, elsewhere) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let file = elsewhere.path().join("x.yaml");
    std::fs::write(&file, "lattice: { data_dir: data }\nagents: { dirs: [mine, /abs] }\n").unwrap();
    let mut sources = Sources { cwd: cwd.path().to_owned(), file: Some(file), ..Sources::default() };
    let config = load(&sources).unwrap().config;
    assert_eq!(config.data_dir(), Some(elsewhere.path().join("data")));
    assert_eq!(config.agent_dirs(cwd.path()), [elsewhere.path().join("mine"), "/abs".into()]);
    sources.flags = vec![("agents.dirs".into(), Given::Many(vec!["a".into(), "b,c".into()]), "--agents".into())];
    let config = load(&sources).unwrap().config;
    assert_eq!(config.agent_dirs(Path::new("/")), [cwd.path().join("a"), cwd.path().join("b,c")]);
    assert_eq!(Config::default().agent_dirs(Path::new("/x"))[..2], [Path::new("/x/agents"), Path::new("/x/.claude/agents")]);
    assert!(!Config::default().station().as_str().is_empty());
}

#[test]
fn secrets_are_never_shown() {
    let dir = TempDir::new().unwrap();
    let mut sources =
        sources(&dir, "http: { token_file: token }\nagents: { default_runner: { kind: command, command: [x], env: { KEY: s3cret } } }\n");
    std::fs::write(dir.path().join("token"), "s3cret\n").unwrap();
    let loaded = load(&sources).unwrap();
    assert_eq!(loaded.config.http.token.as_ref().unwrap().expose(), "s3cret");
    let table = loaded.table();
    let row = |key: &str| table.iter().find(|(found, _, _)| found == key).unwrap().clone();
    assert_eq!(row("http.token").1, "(hidden)");
    assert!(row("http.token").2.to_string().ends_with("lattice.yaml:1"));
    assert_eq!((row("lattice.station").1, row("lattice.station").2), (String::new(), Origin::Default));
    assert_eq!(row("lattice.work.lease").1, "5s");
    assert!(!format!("{table:?} {:?}", loaded.config.http).contains("s3cret"));
    sources.env = env(&[("LATTICE_HTTP_TOKEN", "other")]);
    let error = load(&sources).unwrap_err().to_string();
    assert!(error.contains("either http.token (LATTICE_HTTP_TOKEN) or http.token_file, not both"), "{error}");
    std::fs::write(dir.path().join("token"), "\n").unwrap();
    sources.env.clear();
    assert!(load(&sources).unwrap_err().to_string().contains("a file whose first line is the token"));
}

fn leaves(prefix: &str, node: &Node, found: &mut Vec<String>) {
    for entry in node.entries() {
        let key = if prefix.is_empty() { entry.key.clone() } else { format!("{prefix}.{}", entry.key) };
        if entry.node.entries().is_empty() { found.push(key) } else { leaves(&key, &entry.node, found) }
    }
}

#[test]
fn the_file_that_init_writes_has_every_key_with_its_default() {
    assert!(
        !init::LATTICE_YAML.lines().any(|line| line.trim_start().starts_with("#")
            && !line.trim_start().starts_with("# ")
            && !line.trim_start().starts_with("## "))
    );
    let live: String = init::LATTICE_YAML
        .lines()
        .filter(|line| !line.trim_start().starts_with("## "))
        .map(|line| line.replacen("# ", "", 1) + "\n")
        .collect();
    let mut keys = Vec::new();
    leaves("", &config::yaml::parse(&live).unwrap(), &mut keys);
    keys.sort();
    let known: Vec<String> = config::variables().into_values().collect::<std::collections::BTreeSet<_>>().into_iter().collect();
    assert_eq!(keys, known);

    let values = |loaded: Loaded| loaded.table().into_iter().map(|(key, value, _)| (key, value)).collect::<Vec<_>>();
    assert_eq!(values(from_file(&live).unwrap()), values(load(&Sources::default()).unwrap()));
    let untouched = from_file(init::LATTICE_YAML).unwrap();
    assert!(untouched.origin.values().all(|origin| *origin == Origin::Default));
}

#[test]
fn init_never_writes_over_a_file() {
    let dir = TempDir::new().unwrap();
    let (yaml, hello) = (dir.path().join("lattice.yaml"), dir.path().join("agents/hello.md"));
    std::fs::write(&yaml, "mine").unwrap();
    let report = init::write(dir.path()).unwrap();
    let script = dir.path().join("agents/hello.sh");
    assert_eq!(report, init::Report { written: vec![hello.clone(), script.clone()], kept: vec![yaml.clone()] });
    assert_eq!(std::fs::read_to_string(&yaml).unwrap(), "mine");
    assert_eq!(init::write(dir.path()).unwrap().kept, [yaml.clone(), hello, script]);
    let error = init::write(&yaml).unwrap_err().to_string();
    assert!(error.starts_with(&format!("cannot write {}/lattice.yaml", yaml.display())), "{error}");
}
