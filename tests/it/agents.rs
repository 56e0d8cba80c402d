//! Agent files: what is taken, what is refused and why, and what is noticed.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lattice_mcp::agents::{self, Catalog, Pace, Place, Watcher};
use lattice_mcp::config;
use lattice_mcp::model::agent::{Command, Definition, Prompt, RunnerSpec};
use lattice_mcp::model::size::Size;
use lattice_mcp::model::time::Span;
use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

const HELLO: &str = "---\nname: hello\ndescription: Says hello\nrunner: { kind: echo }\n---\nYou greet.\n";

fn write(dir: &Path, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, text).unwrap();
    path
}

fn executable(dir: &Path, name: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let path = write(dir, name, "#!/bin/sh\n");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn load(dir: &Path) -> Catalog {
    agents::load(&[dir.to_owned()], &config::Agents::default(), Some(OsStr::new("/usr/bin:/bin")))
}

fn one(name: &str, text: impl AsRef<[u8]>) -> Catalog {
    let dir = TempDir::new().unwrap();
    write(dir.path(), name, text);
    load(dir.path())
}

fn get(catalog: &Catalog, name: &str) -> Arc<Definition> {
    let found = catalog.definitions.get(&name.parse().unwrap());
    Arc::clone(found.unwrap_or_else(|| panic!("no agent {name}: {:?}", catalog.problems)))
}

fn command(definition: &Definition) -> &Command {
    match &definition.runner {
        RunnerSpec::Command(command) => command,
        other => panic!("not a command: {other:?}"),
    }
}

/// The only problem of the only file: its line and reason.
fn problem(text: impl AsRef<[u8]>) -> (Option<usize>, String) {
    let catalog = one("x.md", text);
    assert!(catalog.definitions.is_empty(), "{:?}", catalog.definitions);
    assert_eq!(catalog.problems.len(), 1, "{:?}", catalog.problems);
    assert!(catalog.problems[0].file.ends_with("x.md"));
    (catalog.problems[0].line, catalog.problems[0].reason.clone())
}

#[test]
fn our_own_format_gives_all_it_says() {
    let dir = TempDir::new().unwrap();
    executable(dir.path(), "scan.sh");
    let file = write(
        dir.path(),
        "scanner.md",
        "---\n\
         name: security-vuln-scanner\n\
         description: Finds known CVEs\n\
         capabilities: [security, dependencies]\n\
         input:  { schema: { type: object, properties: { path: { type: string } }, required: [path] } }\n\
         output: { schema: { type: object } }\n\
         examples: [\"scan ./services/api\"]\n\
         runner: { kind: command, command: [\"./scan.sh\", \"{task}\"], interactive: true, cwd: sub, env_pass: [TOKEN], env: { LEVEL: 007 } }\n\
         limits: { timeout: 10m, silence: 2m, max_parallel: 2, max_attempts: 3 }\n\
         ---\n\
         You are a scanner.\n",
    );
    let catalog = load(dir.path());
    assert_eq!(catalog.problems, []);
    let agent = get(&catalog, "security-vuln-scanner");
    assert_eq!(agent.manifest.capabilities, ["security", "dependencies"]);
    assert_eq!(agent.manifest.input_schema.as_ref().unwrap()["required"], json!(["path"]));
    assert_eq!(agent.manifest.examples, ["scan ./services/api"]);
    assert_eq!(agent.manifest.limits.timeout, Some(Span::secs(600)));
    assert_eq!(agent.manifest.limits.max_parallel, Some(2));
    assert_eq!(agent.manifest.unavailable, None);
    assert_eq!(agent.prompt, Prompt::Plain("You are a scanner.".into()));
    assert_eq!(agent.source, Some(file));
    let command = command(&agent);
    assert_eq!(command.command, [dir.path().join("./scan.sh").to_str().unwrap(), "{task}"]);
    assert!(command.interactive);
    assert_eq!(command.cwd, Some(dir.path().join("sub")));
    assert_eq!(command.env["LEVEL"], "007");
}

#[test]
fn complaints_name_line_and_reason() {
    let head = "---\nname: x\ndescription: d\n";
    for (text, line, expected) in [
        ("no front matter\n".to_owned(), Some(1), "front matter is missing"),
        (String::new(), Some(1), "front matter is missing"),
        ("---\nname: x\n".into(), Some(1), "front matter is not closed"),
        ("---\nname: [\n---\n".into(), None, "broken YAML"),
        ("---\nname: x\nname: y\n---\n".into(), Some(3), "broken YAML: duplicate"),
        ("---\nname: x\n---\n".into(), Some(2), "description is missing"),
        ("---\nname: x.y\ndescription: d\n---\n".into(), Some(2), "agent name \"x.y\" has '.' at position 2"),
        (
            format!("{head}runner: {{ kind: echo }}\ncapabilites: []\n---\n"),
            Some(5),
            "unknown key \"capabilites\": the nearest known key is \"capabilities\"",
        ),
        (format!("{head}runer: {{ kind: echo }}\n---\n"), Some(4), "unknown key \"runer\": the nearest known key is \"runner\""),
        (format!("{head}limits:\n  timout: 5m\n---\n"), Some(5), "unknown key \"limits.timout\": the nearest known key is \"timeout\""),
        (format!("{head}limits:\n  timeout: 600\n---\n"), Some(5), "limits.timeout: \"600\" is not a duration"),
        (format!("{head}limits: {{ max_attempts: 0 }}\n---\n"), Some(4), "limits.max_attempts must be a whole number of at least 1"),
        (format!("{head}limits: {{ per_minute: 0 }}\n---\n"), Some(4), "limits.per_minute must be a whole number of at least 1"),
        (format!("{head}limits: {{ queue: 0s }}\n---\n"), Some(4), "limits.queue must be above 0s"),
        (format!("{head}retry: often\n---\n"), Some(4), "retry must be a mapping"),
        (format!("{head}retry:\n  backof: fixed\n---\n"), Some(5), "unknown key \"retry.backof\": the nearest known key is \"backoff\""),
        (format!("{head}retry:\n  backoff: cubic\n---\n"), Some(5), "retry.backoff is \"cubic\": known are exponential, linear, fixed"),
        (format!("{head}retry:\n  on: [bored]\n---\n"), Some(5), "retry.on has \"bored\": known are transient, crashed"),
        (format!("{head}retry:\n  enabled: 7\n---\n"), Some(5), "retry.enabled must be true or false"),
        (
            format!("{head}retry: {{ initial_delay: 1m, max_delay: 1s }}\n---\n"),
            Some(4),
            "retry.initial_delay is 1m: it is at most retry.max_delay",
        ),
        (format!("{head}runner: {{ kind: command }}\n---\n"), Some(4), "runner.command is empty"),
        (format!("{head}runner: {{ kind: command, command: [] }}\n---\n"), Some(4), "runner.command is empty"),
        (format!("{head}runner: {{ kind: command, command: ./x.sh }}\n---\n"), Some(4), "program and arguments stand apart"),
        (format!("{head}runner: ./x.sh\n---\n"), Some(4), "runner must be a mapping"),
        (format!("{head}runner:\n  kind: shell\n---\n"), Some(5), "there is no runner of kind \"shell\""),
        (format!("{head}input: {{ schema: {{ type: strnig }} }}\n---\n"), Some(4), "input.schema: at /type: "),
        (format!("{head}output: {{ schema: {{ $ref: \"https://example.com/x\" }} }}\n---\n"), Some(4), "never fetched"),
        (format!("{head}runner: {{ kind: echo }}\ntools: Read\n---\n"), Some(5), "\"tools\" has no effect beside a runner"),
    ] {
        let (found, reason) = problem(&text);
        assert!(reason.contains(expected), "{text}\n{reason}");
        assert!(line.is_none() || found == line, "{text}\n{found:?} {reason}");
    }
}

#[test]
fn files_that_are_no_texts_are_refused() {
    assert!(problem(b"---\nname: x\0\n---\n").1.contains("binary"));
    assert!(problem(b"\xff\xfe---").1.contains("binary"));
    let dir = TempDir::new().unwrap();
    write(dir.path(), "large.md", vec![b'x'; 2000]);
    let settings = config::Agents { file_max: Size::bytes(1000), ..Default::default() };
    let catalog = agents::load(&[dir.path().to_owned()], &settings, None);
    assert_eq!(catalog.problems[0].reason, "it is larger than 1000: make it smaller, or raise agents.file_max");
}

#[test]
fn odd_things_in_a_folder_harm_nobody() {
    let dir = TempDir::new().unwrap();
    write(dir.path(), "hello.md", HELLO);
    write(dir.path(), "README.md", "# not an agent\n");
    write(dir.path(), ".hidden/x.md", "broken");
    write(dir.path(), ".swap.md", "broken");
    write(dir.path(), "notes.txt", "broken");
    write(dir.path(), "team/deep/other.md", HELLO.replace("name: hello", "name: other"));
    std::fs::create_dir(dir.path().join("folder.md")).unwrap();
    std::os::unix::fs::symlink("loop.md", dir.path().join("loop.md")).unwrap();
    std::os::unix::fs::symlink("..", dir.path().join("team/up")).unwrap();
    std::os::unix::fs::symlink("hello.md", dir.path().join("same.md")).unwrap();
    let catalog = load(dir.path());
    assert_eq!(catalog.definitions.keys().map(|name| name.as_str()).collect::<Vec<_>>(), ["hello", "other"]);
    let reasons: Vec<String> =
        catalog.problems.iter().map(|problem| problem.to_string().replace(dir.path().to_str().unwrap(), "")).collect();
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    assert_eq!(reasons[0], "/folder.md: it is a folder, and its name is that of a file");
    assert!(reasons[1].starts_with("/loop.md: it cannot be read: "), "{reasons:?}");
}

#[test]
fn the_first_file_keeps_a_name() {
    let dir = TempDir::new().unwrap();
    let first = write(dir.path(), "a.md", HELLO);
    let second = write(dir.path(), "b.md", HELLO);
    let catalog = load(dir.path());
    assert_eq!(get(&catalog, "hello").source, Some(first.clone()));
    assert_eq!(catalog.problems[0].file, second);
    assert!(catalog.problems[0].reason.contains(first.to_str().unwrap()), "{:?}", catalog.problems);
}

#[test]
fn there_is_a_limit_to_how_many_agents_are_taken() {
    let dir = TempDir::new().unwrap();
    for n in 0..4 {
        write(dir.path(), &format!("a{n}.md"), HELLO.replace("name: hello", &format!("name: a{n}")));
    }
    let settings = config::Agents { count_max: 3, ..Default::default() };
    let catalog = agents::load(&[dir.path().to_owned()], &settings, None);
    assert_eq!(catalog.definitions.len(), 3);
    assert!(catalog.problems[0].to_string().contains("a3.md: there are 3 agents already"), "{:?}", catalog.problems);
}

#[test]
fn a_missing_program_makes_an_agent_unavailable() {
    let dir = TempDir::new().unwrap();
    let agent =
        |name: &str, program: &str| format!("---\nname: {name}\ndescription: d\nrunner: {{ kind: command, command: [{program}] }}\n---\n");
    write(dir.path(), "plain.txt", "");
    write(dir.path(), "a.md", agent("a", "no-such-program-here"));
    write(dir.path(), "b.md", agent("b", "./none.sh"));
    write(dir.path(), "c.md", agent("c", "./plain.txt"));
    write(dir.path(), "d.md", agent("d", "sh"));
    let catalog = load(dir.path());
    let text = |name: &str| get(&catalog, name).manifest.unavailable.clone();
    assert!(text("a").unwrap().contains("not on PATH"));
    assert!(text("b").unwrap().contains("does not exist"));
    assert!(text("c").unwrap().contains("chmod +x"));
    assert_eq!(text("d"), None);
}

#[test]
fn a_claude_subagent_works_as_it_is() {
    let dir = TempDir::new().unwrap();
    let bin = TempDir::new().unwrap();
    executable(bin.path(), "claude");
    let text =
        "---\nname: reviewer\ndescription: Reviews code\ntools: Read, Grep\nmodel: opus\ncolor: blue\nsomeNewKey: 1\n---\n\nYou review.\n";
    write(dir.path(), ".claude/agents/team/reviewer.md", text);
    let dirs = [dir.path().join(".claude/agents")];
    let catalog = agents::load(&dirs, &config::Agents::default(), Some(bin.path().as_os_str()));
    assert_eq!(catalog.problems, []);
    let agent = get(&catalog, "reviewer");
    let found = command(&agent);
    assert_eq!(
        found.command,
        ["claude", "--print", "--append-system-prompt", "{prompt}", "--model", "opus", "--allowedTools", "Read,Grep", "--", "{task}"]
    );
    assert_eq!(found.cwd, Some(dir.path().to_owned()));
    assert!(found.env_pass.contains(&"ANTHROPIC_API_KEY".to_owned()));
    assert_eq!(agent.prompt, Prompt::Plain("You review.".into()));

    let without = agents::load(&dirs, &config::Agents::default(), None);
    let agent = get(&without, "reviewer");
    assert!(matches!(&agent.runner, RunnerSpec::Missing(text) if text.contains("agents.default_runner")));
    assert!(agent.manifest.unavailable.as_ref().unwrap().contains("install Claude Code"));

    let settings = config::Agents { default_runner: Some(RunnerSpec::Echo), ..Default::default() };
    let configured = agents::load(&dirs, &settings, Some(bin.path().as_os_str()));
    assert_eq!(get(&configured, "reviewer").runner, RunnerSpec::Echo);
}

#[test]
fn an_inherited_model_and_a_list_of_tools_are_understood() {
    let dir = TempDir::new().unwrap();
    let bin = TempDir::new().unwrap();
    executable(bin.path(), "claude");
    write(dir.path(), "x.md", "---\ndescription: d\nmodel: inherit\ntools: [Read, \"Bash(git log:*)\"]\n---\n");
    let catalog = agents::load(&[dir.path().to_owned()], &config::Agents::default(), Some(bin.path().as_os_str()));
    let agent = get(&catalog, "x");
    assert_eq!(command(&agent).command[4..], ["--allowedTools", "Read,Bash(git log:*)", "--", "{task}"]);
}

#[test]
fn dotprompt_files_become_agents() {
    let dir = TempDir::new().unwrap();
    let text = "---\n\
                model: googleai/gemini-2.0-flash\n\
                config: { temperature: 0.5 }\n\
                input:\n  schema:\n    name: string, who\n    tone?: string\n    lang: string\n  default: { lang: en }\n\
                output:\n  format: json\n  schema:\n    words(array): string\n\
                ---\n\
                {{role \"system\"}}Greet {{name}}{{#if tone}} in a {{tone}} tone{{/if}}.\n";
    write(dir.path(), "greet.formal.prompt", text);
    write(dir.path(), "bare.prompt", "Just {{text}}.\n");
    write(dir.path(), "_part.prompt", "{{#if broken}}");
    let catalog = load(dir.path());
    assert_eq!(catalog.problems, []);
    let agent = get(&catalog, "greet-formal");
    let input = agent.manifest.input_schema.clone().unwrap();
    assert_eq!(input["properties"]["name"], json!({"type": "string", "description": "who"}));
    assert_eq!(input["properties"]["lang"], json!({"type": "string", "default": "en"}));
    assert_eq!(input["required"], json!(["name"]));
    assert_eq!(agent.manifest.output_schema.as_ref().unwrap()["properties"]["words"]["items"], json!({"type": "string"}));
    assert!(matches!(&agent.prompt, Prompt::Template(text) if text.starts_with("{{role")));
    assert!(matches!(&agent.runner, RunnerSpec::Missing(_)));
    assert_eq!(get(&catalog, "bare").manifest.description, "the prompt bare");
}

#[test]
fn a_broken_template_names_its_line() {
    let catalog = one("x.prompt", "---\nname: x\n---\nfine\n{{#if a}}\n");
    assert!(catalog.problems[0].reason.starts_with("the template is broken"), "{:?}", catalog.problems);
    assert!(catalog.problems[0].line >= Some(4), "{:?}", catalog.problems);
    let long = one("long.prompt", "{{a}}\n".repeat(12_000));
    assert!(long.problems[0].reason.contains("12000 expressions"), "{:?}", long.problems);
    for deep in [
        "{{#a}}".repeat(20_000),
        format!("{{{{{}", "(a ".repeat(50_000)),
        "{{#if a}}".repeat(60) + &"{{/if}}".repeat(60),
        "{{".repeat(60_000),
        "{{a ".repeat(30_000),
        "{{a.".repeat(30_000),
        format!("{{{{{}}}}}", "a.".repeat(60_000)),
        "{{!--".repeat(30_000),
        "{{{{a}}}}".repeat(60),
        "{{else}}".repeat(20_000),
        "{{a | b".repeat(20_000),
        format!("{{{{a {}}}}}", "b=".repeat(60_000)),
        format!("{{{{a {}", "\"".repeat(60_001)),
    ] {
        let began = std::time::Instant::now();
        let _ = one("deep.prompt", &deep);
        assert!(began.elapsed() < Duration::from_secs(5), "{}", &deep[..20]);
    }
}

#[test]
fn source_ids_are_short_and_stable() {
    let dir = TempDir::new().unwrap();
    let file = write(dir.path(), "a.md", HELLO);
    let id = agents::source_id(&file);
    assert_eq!(id.len(), 8);
    assert_eq!(id, agents::source_id(&dir.path().join("./a.md")));
    assert_ne!(id, agents::source_id(dir.path()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), front in "[ -~\\n\\té]{0,120}", body in "[ -~\\n{}#/é]{0,60}") {
        let settings = config::Agents::default();
        for name in ["/a/x.md", "/a/x.prompt", "/a/.claude/agents/x.md"] {
            let place = Place { file: Path::new(name), root: Path::new("/a"), settings: &settings, path_env: None };
            let _ = agents::read(&bytes, place);
            let _ = agents::read(format!("---\n{front}\n---\n{body}").as_bytes(), place);
            let _ = agents::read(format!("---\nname: x\ndescription: d\ninput: {{ schema: {{ {front} }} }}\n---\n{body}").as_bytes(), place);
        }
    }
}

struct Watched {
    dir: TempDir,
    catalogs: tokio::sync::watch::Receiver<Arc<Catalog>>,
    cancel: CancellationToken,
    run: std::pin::Pin<Box<dyn Future<Output = ()>>>,
}

impl Watched {
    fn start(sub: &str, pace: Pace) -> Self {
        let dir = TempDir::new().unwrap();
        write(dir.path(), "kept/hello.md", HELLO);
        let (watcher, catalogs) = Watcher::new(&[dir.path().join(sub)], config::Agents::default(), Some("/usr/bin:/bin".into()), pace);
        let cancel = CancellationToken::new();
        let run = Box::pin(watcher.run(cancel.clone()));
        Self { dir, catalogs, cancel, run }
    }

    /// Waits until a catalog is as it should be, and says how long that took.
    async fn until(&mut self, holds: impl Fn(&Catalog) -> bool) -> Duration {
        let began = std::time::Instant::now();
        let seen = tokio::time::timeout(Duration::from_secs(10), self.catalogs.wait_for(|catalog| holds(catalog)));
        tokio::select! {
            () = &mut self.run => panic!("the watcher ended"),
            seen = seen => { seen.expect("no such catalog within 10 s").unwrap(); }
        }
        began.elapsed()
    }

    fn has(name: &str) -> impl Fn(&Catalog) -> bool {
        move |catalog| catalog.definitions.contains_key(&name.parse().unwrap())
    }
}

/// No polling: whatever is seen was noticed.
fn noticing() -> Pace {
    Pace { poll: Duration::from_secs(3600), ..Pace::default() }
}

#[tokio::test]
async fn a_saved_file_is_in_force_within_a_second() {
    let mut watched = Watched::start("kept", noticing());
    watched.until(Watched::has("hello")).await;
    let path = watched.dir.path().join("kept");
    write(&path, "other.md", HELLO.replace("name: hello", "name: other"));
    assert!(watched.until(Watched::has("other")).await < Duration::from_secs(20));
    // As editors do it: written beside, then moved into place.
    let draft = write(&path, ".draft", HELLO.replace("Says hello", "Says more"));
    std::fs::rename(draft, path.join("hello.md")).unwrap();
    let says_more = |catalog: &Catalog| get(catalog, "hello").manifest.description == "Says more";
    assert!(watched.until(says_more).await < Duration::from_secs(20));
    std::fs::remove_file(path.join("hello.md")).unwrap();
    assert!(watched.until(|catalog| !Watched::has("hello")(catalog)).await < Duration::from_secs(20));
    // A new folder below counts as well.
    write(&path, "team/deep.md", HELLO.replace("name: hello", "name: deep"));
    write(&path, "touch.md", HELLO.replace("name: hello", "name: touch"));
    assert!(watched.until(|catalog| Watched::has("deep")(catalog) && Watched::has("touch")(catalog)).await < Duration::from_secs(20));
    watched.cancel.cancel();
    tokio::time::timeout(Duration::from_secs(5), watched.run).await.expect("the watcher did not end");
}

#[tokio::test]
async fn a_broken_file_leaves_the_last_good_version() {
    let mut watched = Watched::start("kept", noticing());
    let path = watched.dir.path().join("kept");
    write(&path, "hello.md", "---\nname: hello\ndescription: [\n");
    watched.until(|catalog| !catalog.problems.is_empty()).await;
    let catalog = watched.catalogs.borrow().clone();
    assert_eq!(get(&catalog, "hello").manifest.description, "Says hello");
    assert!(catalog.problems[0].file.ends_with("hello.md"));
    write(&path, "hello.md", HELLO.replace("Says hello", "Is well again"));
    watched.until(|catalog| catalog.problems.is_empty()).await;
    assert_eq!(get(&watched.catalogs.borrow(), "hello").manifest.description, "Is well again");
    write(&path, "hello.md", "broken");
    watched.until(|catalog| !catalog.problems.is_empty()).await;
    std::fs::remove_file(path.join("hello.md")).unwrap();
    watched.until(|catalog| catalog.definitions.is_empty() && catalog.problems.is_empty()).await;
}

#[tokio::test]
async fn a_newer_file_does_not_take_a_name_away() {
    let mut watched = Watched::start("kept", noticing());
    let path = watched.dir.path().join("kept");
    write(&path, "aaa.md", HELLO.replace("Says hello", "Intrudes"));
    watched.until(|catalog| !catalog.problems.is_empty()).await;
    let catalog = watched.catalogs.borrow().clone();
    assert_eq!(get(&catalog, "hello").manifest.description, "Says hello");
    assert!(catalog.problems[0].to_string().contains("aaa.md") && catalog.problems[0].to_string().contains("hello.md"));
    std::fs::remove_file(path.join("hello.md")).unwrap();
    watched.until(|catalog| catalog.problems.is_empty()).await;
    assert_eq!(get(&watched.catalogs.borrow(), "hello").manifest.description, "Intrudes", "once the name is free");
}

#[tokio::test]
async fn a_folder_that_comes_later_is_noticed() {
    let mut watched = Watched::start("later/agents", noticing());
    watched.until(|catalog| catalog.definitions.is_empty()).await;
    let path = watched.dir.path().join("later/agents");
    write(&path, "hello.md", HELLO);
    assert!(watched.until(Watched::has("hello")).await < Duration::from_secs(20));
    // It may also go, and come again.
    std::fs::remove_dir_all(&path).unwrap();
    watched.until(|catalog| catalog.definitions.is_empty()).await;
    write(&path, "again.md", HELLO.replace("name: hello", "name: again"));
    watched.until(Watched::has("again")).await;
    write(&path, "more.md", HELLO.replace("name: hello", "name: more"));
    assert!(watched.until(Watched::has("more")).await < Duration::from_secs(20));
}

#[tokio::test]
async fn a_file_that_is_away_for_a_moment_does_not_flap() {
    let quiet = Duration::from_millis(500);
    let mut watched = Watched::start("kept", Pace { quiet, ..noticing() });
    let path = watched.dir.path().join("kept");
    write(&path, "other.md", HELLO.replace("name: hello", "name: other"));
    watched.until(Watched::has("other")).await;
    let mut catalogs = watched.catalogs.clone();
    catalogs.mark_unchanged();
    // Away for longer than the quiet that lets the folder be read once, and back before it is read again.
    let editor = async {
        std::fs::rename(path.join("hello.md"), path.join("hello.md~")).unwrap();
        tokio::time::sleep(quiet * 3 / 2).await;
        write(&path, ".draft", HELLO.replace("Says hello", "Says more"));
        std::fs::rename(path.join(".draft"), path.join("hello.md")).unwrap();
        // The next catalog of all is the whole one.
        tokio::time::timeout(Duration::from_secs(10), catalogs.changed()).await.unwrap().unwrap();
    };
    tokio::select! {
        () = &mut watched.run => panic!("the watcher ended"),
        () = editor => {}
    }
    assert_eq!(get(&watched.catalogs.borrow(), "hello").manifest.description, "Says more");
}

#[tokio::test]
async fn a_program_that_is_installed_later_makes_its_agent_available() {
    let mut watched = Watched::start("kept", Pace { poll: Duration::from_millis(50), ..Pace::default() });
    let path = watched.dir.path().join("kept");
    let text = "---\nname: tool\ndescription: d\nrunner: { kind: command, command: [\"../bin/tool\"] }\n---\n";
    write(&path, "tool.md", text);
    let is_away = |catalog: &Catalog| catalog.definitions.get(&"tool".parse().unwrap()).map(|tool| tool.manifest.unavailable.is_some());
    watched.until(|catalog| is_away(catalog) == Some(true)).await;
    executable(watched.dir.path(), "bin/tool");
    watched.until(|catalog| is_away(catalog) == Some(false)).await;
}

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/agents")
}

/// Runs an agent's own command as a runner would, with these placeholders filled in and this standard input.
fn run(agent: &Definition, filled: &[(&str, &str)], input: &str) -> (i32, Vec<String>, String) {
    use std::io::Write as _;
    let found = command(agent);
    let fill = |argument: &String| filled.iter().fold(argument.clone(), |text, (name, value)| text.replace(name, value));
    let arguments: Vec<String> = found.command.iter().map(fill).collect();
    let folder = agent.source.as_ref().unwrap().parent().unwrap();
    let mut child = std::process::Command::new(&arguments[0])
        .args(&arguments[1..])
        .current_dir(found.cwd.as_deref().unwrap_or(folder))
        .env("LATTICE_AGENT", agent.manifest.name.as_str())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // A program that reads nothing may be gone already.
    _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).expect("the output is UTF-8");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap_or(-1), text.lines().map(str::to_owned).collect(), errors)
}

/// Runs an example that must deliver, and checks the result against its own schema.
fn deliver(name: &str, filled: &[(&str, &str)], input: &str) -> serde_json::Value {
    let agent = get(&load(&examples()), name);
    let (code, lines, errors) = run(&agent, filled, input);
    assert_eq!(code, 0, "{lines:?} {errors}");
    let mut result = None;
    let mut plain = String::new();
    for line in &lines {
        match line.strip_prefix("::lattice ") {
            Some(said) => {
                let said: serde_json::Value = serde_json::from_str(said).unwrap_or_else(|error| panic!("{said}: {error}"));
                result = said.get("result").cloned().or(result);
            }
            None => plain.push_str(line),
        }
    }
    let result = result.unwrap_or_else(|| serde_json::from_str(&plain).unwrap_or_else(|error| panic!("{plain}: {error}")));
    let schema = agents::schema::compile(agent.manifest.output_schema.as_ref().unwrap()).unwrap();
    let mismatches: Vec<String> = schema.iter_errors(&result).map(|error| error.to_string()).collect();
    assert!(mismatches.is_empty(), "{mismatches:?}: {result}");
    assert!(lines.iter().any(|line| line.starts_with("::lattice {\"progress\"")), "{lines:?}");
    result
}

/// A folder whose names would break careless quoting.
fn awkward() -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let odd = dir.path().join("-n \"odd\" $(x)\n*é");
    write(&odd, "a=b\\c.txt", "one\n// TODO: mend \"this\"\tsoon\nTODOLIST\n# FIXME\n");
    (dir, odd)
}

#[test]
fn the_examples_are_whole() {
    let catalog = load(&examples());
    assert_eq!(catalog.problems, []);
    let names: Vec<_> = catalog.definitions.keys().map(|name| name.as_str()).collect();
    assert_eq!(names, ["disk-usage-report", "log-error-digest", "release-approver", "repo-todo-scan", "secrets-scan"]);
    for definition in catalog.definitions.values() {
        assert_eq!(definition.manifest.unavailable, None);
        assert!(definition.manifest.input_schema.is_some() && definition.manifest.output_schema.is_some());
        let (code, _, errors) = run(definition, &[("{context.path}", ""), ("{context.version}", "")], "{}\n");
        assert_eq!(code, 1, "{errors}");
        assert!(errors.contains("is missing"), "{errors}");
    }
}

#[test]
fn the_todo_scan_finds_marks_whatever_the_names() {
    let (dir, odd) = awkward();
    write(dir.path(), ".git/x", "TODO no\n");
    write(dir.path(), "bin", b"\xff\xfe TODO \0 x\n");
    for path in [dir.path(), odd.as_path()] {
        let result = deliver("repo-todo-scan", &[("{context.path}", path.to_str().unwrap())], "{}\n");
        let found = result["findings"].as_array().unwrap();
        let here: Vec<_> = found.iter().filter(|found| found["file"] == odd.join("a=b\\c.txt").to_str().unwrap()).collect();
        assert_eq!(here.len(), 2, "{result}");
        assert_eq!((&here[0]["line"], &here[0]["text"]), (&json!(2), &json!("TODO: mend \"this\"\tsoon")));
        assert_eq!(here[1]["mark"], "FIXME");
        assert!(!found.iter().any(|found| found["file"].as_str().unwrap().contains(".git")));
    }
}

#[test]
fn the_secrets_scan_shows_no_secret() {
    let (dir, _) = awkward();
    let key = format!("AKIA{}", "ABCDEFGHIJKLMNOP");
    write(dir.path(), "cfg", format!("key = {key}\npassword: \"correct-horse\"\n-----BEGIN RSA {}-----\n", "PRIVATE KEY"));
    let result = deliver("secrets-scan", &[("{context.path}", dir.path().to_str().unwrap())], "{}\n");
    let kinds: Vec<_> = result["findings"].as_array().unwrap().iter().map(|found| found["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["aws_access_key", "assigned_in_clear", "private_key"]);
    assert!(!result.to_string().contains("ABCDEFGH") && !result.to_string().contains("horse"), "{result}");
}

#[test]
fn the_disk_report_names_the_largest_folders() {
    let (dir, odd) = awkward();
    write(&odd, "big", vec![1; 300_000]);
    write(dir.path(), "small/x", "x");
    let result = deliver("disk-usage-report", &[("{context.path}", dir.path().to_str().unwrap())], "{}\n");
    let largest = result["largest"].as_array().unwrap();
    assert_eq!(largest.len(), 3, "{result}");
    assert_eq!(largest[1]["path"], odd.to_str().unwrap());
    assert!(result["total_kib"].as_u64() >= Some(290) && result["complete"] == true, "{result}");
}

#[test]
fn the_log_digest_counts_what_is_the_same() {
    let dir = TempDir::new().unwrap();
    let log = "2026-01-01T00:00:00Z INFO start\n\
               2026-01-01T00:00:01.250Z ERROR request 17 failed: \"timeout\"\n\
               2026-01-01T00:00:02.125Z ERROR request 18 failed: \"timeout\"\n\
               2026-01-01T00:00:03Z WARN slow\n\
               2026-01-02T10:00:00Z panic at 0xdeadbeef\n";
    let file = write(dir.path(), "app \"x\".log", log);
    let result = deliver("log-error-digest", &[("{context.path}", file.to_str().unwrap())], "{}\n");
    assert_eq!((&result["errors"], &result["warnings"], &result["kinds"]), (&json!(3), &json!(1), &json!(2)), "{result}");
    assert_eq!((&result["first"], &result["last"]), (&json!("2026-01-01T00:00:00"), &json!("2026-01-02T10:00:00")));
    assert_eq!(result["top"][0]["message"], "ERROR request # failed: \"timeout\"");
    assert_eq!((&result["top"][0]["count"], &result["top"][0]["last_line"]), (&json!(2), &json!(3)));
    // A log that is away for a moment is worth another try.
    let agent = get(&load(&examples()), "log-error-digest");
    assert_eq!(run(&agent, &[("{context.path}", "/no/such.log")], "{}\n").0, 75);
    assert_eq!(run(&agent, &[("{context.path}", dir.path().to_str().unwrap())], "{}\n").0, 1);
}

#[test]
fn the_release_approver_goes_on_with_the_answer() {
    for (answer, approved) in [
        (r#"{"ask":1,"answer":"Approve"}"#, true),
        (r#"{"ask":1,"answer":{"approved": true}}"#, true),
        (r#"{"ask":1,"answer":"yes, go"}"#, true),
        (r#"{"ask":1,"answer":"reject"}"#, false),
        (r#"{"ask":1,"answer":"yesterday was better"}"#, false),
        (r#"{"ask":1,"answer":"do not approve"}"#, false),
    ] {
        let result = deliver("release-approver", &[("{context.version}", "1.4\"0")], &format!("{{\"task\":\"x\"}}\n{answer}\n"));
        assert_eq!(result, json!({"version": "1.4\"0", "approved": approved}), "{answer}");
    }
    let agent = get(&load(&examples()), "release-approver");
    let (code, lines, _) = run(&agent, &[("{context.version}", "1")], "{}\n");
    assert_eq!(code, 75);
    assert!(lines.iter().any(|line| line.starts_with("::lattice {\"escalate\"")), "{lines:?}");
}

#[test]
fn the_agent_that_init_writes_works() {
    let dir = TempDir::new().unwrap();
    lattice_mcp::init::write(dir.path()).unwrap();
    let catalog = load(&dir.path().join("agents"));
    assert_eq!(catalog.problems, []);
    let (code, lines, _) = run(&get(&catalog, "hello"), &[("{task}", "$(exit 3) \"hi\" 'x")], "{}\n");
    assert_eq!(code, 0);
    assert_eq!(lines[1], "Hello from hello! You asked: $(exit 3) \"hi\" 'x");
}
