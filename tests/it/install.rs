//! Registering in MCP clients, through the real binary, on files as their users have them.

mod listed;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use super::harness::PROGRAM;

/// A user's home, and a project in it.
struct Home(tempfile::TempDir);

/// Each client, the sample of its file, where that stands, and the keys below which its entries are.
const CLIENTS: [(&str, &str, &str, &[&str]); 9] = [
    ("claude-desktop", "claude-desktop.json", ".config/Claude/claude_desktop_config.json", &["mcpServers"]),
    ("claude-code", "claude-code.json", ".claude.json", &["mcpServers"]),
    ("cursor", "cursor.json", ".cursor/mcp.json", &["mcpServers"]),
    ("vscode", "vscode.json", ".config/Code/User/mcp.json", &["servers"]),
    ("codex", "codex.toml", ".codex/config.toml", &["mcp_servers"]),
    ("opencode", "opencode.jsonc", ".config/opencode/opencode.jsonc", &["mcp"]),
    ("gemini-cli", "gemini-cli.json", ".gemini/settings.json", &["mcpServers"]),
    ("zed", "zed.json", ".config/zed/settings.json", &["context_servers"]),
    ("windsurf", "windsurf.json", ".codeium/windsurf/mcp_config.json", &["mcpServers"]),
];

impl Home {
    fn new() -> Self {
        let home = Self(tempfile::tempdir().unwrap());
        fs::create_dir(home.dir().join("project")).unwrap();
        home
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file below the home.
    fn file(&self, path: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let file = self.dir().join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, text).unwrap();
        file
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(args).current_dir(self.dir().join("project")).env_clear().env("HOME", self.dir()).env("PATH", "/usr/bin:/bin");
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What a command that succeeds says.
    fn said(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The one outcome of a command that succeeds.
    fn outcome(&self, args: &[&str]) -> Value {
        let said: Value = serde_json::from_str(&self.said(&[args, &["--json"]].concat())).unwrap();
        assert_eq!(said.as_array().unwrap().len(), 1, "{said}");
        said[0].clone()
    }

    /// The exit code of a command that fails, and what it says.
    fn fails(&self, args: &[&str]) -> (i32, String) {
        let output = self.run(args);
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }

    /// What is kept about files that have entries of ours.
    fn records(&self) -> Vec<PathBuf> {
        let dir = self.dir().join(".local/share/lattice-mcp/clients.d");
        fs::read_dir(dir).map(|found| found.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect()).unwrap_or_default()
    }

    /// Whether nothing unfinished is left beside a file.
    fn is_tidy(&self, file: &Path) -> bool {
        let names = fs::read_dir(file.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let name = file.file_name().unwrap().to_str().unwrap().to_owned();
        names.filter(|other| *other != name).all(|other| !other.contains(&name))
    }
}

fn sample(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/samples/clients").join(name)).unwrap()
}

/// A client's file as its client reads it.
fn parsed(text: &str, is_toml: bool) -> Value {
    let text = text.trim_start_matches('\u{feff}');
    if !is_toml {
        return Value::from(jsonc_parser::parse_to_ast(text, &Default::default(), &Default::default()).unwrap().value.unwrap());
    }
    fn of(item: &toml_edit::Item) -> Value {
        match item {
            toml_edit::Item::Value(value) if value.is_array() => {
                value.as_array().unwrap().iter().map(|value| json!(value.as_str().unwrap_or_default())).collect()
            }
            item => match item.as_table_like() {
                Some(table) => Value::Object(table.iter().map(|(key, item)| (key.to_owned(), of(item))).collect()),
                None => json!(item.as_str().unwrap_or("?")),
            },
        }
    }
    of(text.parse::<toml_edit::DocumentMut>().unwrap().as_item())
}

fn entry_in(text: &str, is_toml: bool, section: &[&str], name: &str) -> Value {
    let whole = parsed(text, is_toml);
    section.iter().fold(&whole, |value, key| &value[*key])[name].clone()
}

/// The words with which an entry starts this program.
fn words(entry: &Value) -> Vec<String> {
    let list = |value: &Value| value.as_array().into_iter().flatten().map(|word| word.as_str().unwrap().to_owned()).collect::<Vec<_>>();
    let first = entry["command"].as_str().map(str::to_owned);
    first.into_iter().chain(list(&entry["command"])).chain(list(&entry["args"])).collect()
}

fn is_within(small: &str, large: &str) -> bool {
    let mut bytes = large.bytes();
    small.bytes().all(|wanted| bytes.any(|byte| byte == wanted))
}

#[test]
fn each_client_gets_its_entry_and_loses_it_to_the_last_byte() {
    for (client, name, path, section) in CLIENTS {
        let (plain, is_toml) = (sample(name), name.ends_with("toml"));
        let crlf = plain.replace('\n', "\r\n");
        for text in [plain.clone(), crlf.clone(), format!("\u{feff}{crlf}"), plain.trim_end().to_owned(), format!("\n\n{plain}\n\n")] {
            let home = Home::new();
            let file = home.file(path, &text);
            let added = home.outcome(&["install", client]);
            assert_eq!((&added["change"], &added["name"]), (&json!("added"), &json!("lattice-mcp")), "{client}");
            let after = fs::read_to_string(&file).unwrap();
            assert!(is_within(&text, &after), "{client} lost something:\n{after}");
            assert_eq!(words(&entry_in(&after, is_toml, section, "lattice-mcp")), [PROGRAM, "--stdio"], "{client}:\n{after}");
            assert_eq!(fs::read_to_string(added["backup"].as_str().unwrap()).unwrap(), text);
            assert_eq!(home.outcome(&["install", client])["change"], "kept");
            assert_eq!(fs::read_to_string(&file).unwrap(), after, "{client} is not idempotent");
            assert_eq!(home.outcome(&["uninstall", client])["change"], "removed");
            assert_eq!(fs::read_to_string(&file).unwrap(), text, "{client}");
            assert_eq!(home.outcome(&["uninstall", client])["change"], "absent");
            assert!(home.is_tidy(&file) && home.records().is_empty(), "{client} leaves something behind");
        }
    }
}

#[test]
fn what_is_written_reads_as_if_its_user_had_written_it() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/samples/clients/registered");
    for (client, name, path, _) in CLIENTS {
        let home = Home::new();
        let file = home.file(path, sample(name));
        home.said(&["install", client, "--nats", "nats://hub:4222", "--station", "desk"]);
        let after = fs::read_to_string(&file).unwrap().replace(PROGRAM, "/usr/local/bin/lattice-mcp");
        let known = golden.join(name);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::create_dir_all(&golden).unwrap();
            fs::write(&known, &after).unwrap();
        }
        let wanted = fs::read_to_string(&known).unwrap_or_else(|error| panic!("{}: {error}; UPDATE_GOLDEN=1 writes it", known.display()));
        assert_eq!(after, wanted, "{client}");
    }
}

#[test]
fn a_client_without_a_file_gets_one_and_is_left_without_one() {
    for (client, _, _, section) in CLIENTS {
        let home = Home::new();
        let added = home.outcome(&["install", client]);
        let file = PathBuf::from(added["file"].as_str().unwrap());
        assert_eq!((&added["change"], &added["backup"]), (&json!("added"), &Value::Null));
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(words(&entry_in(&text, client == "codex", section, "lattice-mcp")), [PROGRAM, "--stdio"], "{text}");
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(home.outcome(&["uninstall", client])["change"], "removed");
        let left: Vec<_> = fs::read_dir(home.dir()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert!(!file.exists() && left.iter().all(|name| name == "project" || name == ".local"), "{client} leaves {left:?}");
    }
}

#[test]
fn an_empty_file_and_one_with_nothing_but_remarks_are_filled() {
    for (client, path, text) in [
        ("cursor", ".cursor/mcp.json", ""),
        ("claude-code", ".claude.json", " \n"),
        ("zed", ".config/zed/settings.json", "// later"),
        ("codex", ".codex/config.toml", "# later"),
    ] {
        let home = Home::new();
        let file = home.file(path, text);
        home.said(&["install", client]);
        assert!(fs::read_to_string(&file).unwrap().contains(PROGRAM));
        home.said(&["uninstall", client]);
        assert_eq!(fs::read_to_string(&file).unwrap(), text);
    }
}

#[test]
fn what_others_change_in_between_stays() {
    for (client, name, path, section) in CLIENTS {
        let (home, text) = (Home::new(), sample(name));
        let file = home.file(path, &text);
        home.said(&["install", client]);
        // Its user adds something at the top, and a setting of the entry.
        let with_entry = fs::read_to_string(&file).unwrap();
        let changed = match name.ends_with("toml") {
            true => format!("added = true\n{with_entry}").replace(r#"args = ["--stdio"]"#, "args = [\"--stdio\"]\nenabled = false"),
            false => with_entry.replacen('{', "{\n  \"added\": true,", 1),
        };
        fs::write(&file, &changed).unwrap();
        let updated = home.outcome(&["install", client, "--lattice", "mine"]);
        assert_eq!(updated["change"], "updated");
        assert_eq!(fs::read_to_string(updated["backup"].as_str().unwrap()).unwrap(), changed);
        let after = fs::read_to_string(&file).unwrap();
        let entry = entry_in(&after, name.ends_with("toml"), section, "lattice-mcp");
        assert_eq!(words(&entry), [PROGRAM, "--stdio", "--lattice", "mine"]);
        assert!(client != "codex" || after.contains("enabled = false"), "{after}");
        home.said(&["uninstall", client]);
        let wanted = match name.ends_with("toml") {
            true => format!("added = true\n{text}"),
            false => text.replacen('{', "{\n  \"added\": true,", 1),
        };
        assert_eq!(fs::read_to_string(&file).unwrap(), wanted, "{client}");
    }
}

#[test]
fn several_names_stand_beside_each_other_and_go_in_any_order() {
    for (client, name, path, section) in CLIENTS {
        let (home, text) = (Home::new(), sample(name));
        let file = home.file(path, &text);
        home.said(&["install", client]);
        home.said(&["install", client, "--name", "far_away", "--nats", "nats://hub:4222"]);
        home.said(&["install", client, "--name", "third"]);
        for gone in ["far_away", "lattice-mcp", "third"] {
            home.said(&["uninstall", client, "--name", gone]);
            let left = fs::read_to_string(&file).unwrap();
            assert_eq!(entry_in(&left, name.ends_with("toml"), section, gone), Value::Null, "{left}");
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), text, "{client}");
    }
}

#[test]
fn somebody_elses_entry_of_the_same_name_is_left_alone() {
    let home = Home::new();
    let text = r#"{"mcpServers": {"lattice-mcp": {"command": "npx", "args": ["-y", "another-lattice"]}}}"#;
    let file = home.file(".cursor/mcp.json", text);
    let (code, said) = home.fails(&["install", "cursor"]);
    assert!(code == 1 && said.contains("--name") && said.contains("--force"), "{said}");
    let (code, said) = home.fails(&["uninstall", "cursor"]);
    assert!(code == 1 && said.contains("--force"), "{said}");
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
    assert_eq!(home.outcome(&["install", "cursor", "--force"])["change"], "updated");
    assert!(fs::read_to_string(&file).unwrap().contains(PROGRAM));
    home.said(&["uninstall", "cursor"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), text, "what --force put aside is back");
    assert_eq!(home.outcome(&["uninstall", "cursor", "--force"])["change"], "removed");
    assert_eq!(fs::read_to_string(&file).unwrap(), r#"{"mcpServers": {}}"#);
}

#[test]
fn an_entry_that_was_pasted_in_is_ours_too() {
    let home = Home::new();
    let text = "{\n  \"mcpServers\": {\n    \"lattice-mcp\": { \"command\": \"lattice-mcp\", \"args\": [\"--stdio\"], \"env\": { \"A\": \"b\" } }\n  }\n}\n";
    let file = home.file(".cursor/mcp.json", text);
    assert_eq!(home.outcome(&["install", "cursor"])["change"], "updated");
    let after = fs::read_to_string(&file).unwrap();
    assert!(after.contains(PROGRAM) && after.contains(r#""env": { "A": "b" }"#), "{after}");
    home.said(&["uninstall", "cursor"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "{\n  \"mcpServers\": {}\n}\n");
}

#[test]
fn a_file_that_cannot_be_edited_is_left_as_it_is() {
    let broken = "{\n  \"mcpServers\": {\n    \"a\": {},\n  }\n";
    let cases: [(&str, &str, &[u8], i32, &str); 9] = [
        ("cursor", ".cursor/mcp.json", broken.as_bytes(), 4, "line "),
        ("claude-desktop", ".config/Claude/claude_desktop_config.json", b"{\n  // no\n}", 4, "line 2"),
        ("codex", ".codex/config.toml", b"a = 1\n[b\n", 4, "line 2"),
        ("cursor", ".cursor/mcp.json", b"[]", 4, "list"),
        ("cursor", ".cursor/mcp.json", b"{\"mcpServers\": null}", 4, "mcpServers"),
        ("cursor", ".cursor/mcp.json", b"{\"a\": \"\xff\"}", 1, "not UTF-8 (at byte 7)"),
        ("cursor", ".cursor/mcp.json", b"\xff\xfe{\0}\0", 1, "UTF-16"),
        ("cursor", ".cursor/mcp.json", b"{\"mcpServers\": {}, \"mcpServers\": {}}", 4, "twice"),
        ("cursor", ".cursor/mcp.json", b"{\"a\": 1}\0", 4, "line 1"),
    ];
    for (client, path, bytes, exit, wanted) in cases {
        let home = Home::new();
        let file = home.file(path, bytes);
        for verb in ["install", "uninstall"] {
            let (code, said) = home.fails(&[verb, client]);
            assert!(code == exit && said.contains(wanted) && said.contains(file.to_str().unwrap()), "{verb} {client}: {code} {said}");
            assert_eq!(fs::read(&file).unwrap(), bytes);
        }
        let listed = home.said(&["install"]);
        assert!(listed.contains(wanted), "{listed}");
        assert!(home.is_tidy(&file) && home.records().is_empty());
    }
}

#[test]
fn a_folder_a_pipe_and_a_huge_file_are_refused() {
    let home = Home::new();
    fs::create_dir_all(home.dir().join(".cursor/mcp.json")).unwrap();
    let (code, said) = home.fails(&["install", "cursor"]);
    assert!(code == 1 && said.contains("a folder"), "{said}");
    fs::create_dir_all(home.dir().join(".gemini")).unwrap();
    let made = Command::new("mkfifo").arg(home.dir().join(".gemini/settings.json")).status().unwrap();
    assert!(made.success());
    let (code, said) = home.fails(&["install", "gemini-cli"]);
    assert!(code == 1 && said.contains("no file of the usual kind"), "{said}");
    let huge = home.file(".codex/config.toml", "");
    fs::File::options().write(true).open(&huge).unwrap().set_len((64 << 20) + 1).unwrap();
    let (code, said) = home.fails(&["install", "codex"]);
    assert!(code == 1 && said.contains("larger than"), "{said}");
    // A way that leads through a file.
    home.file(".codeium", "");
    let (code, said) = home.fails(&["install", "windsurf"]);
    assert!(code == 1 && said.contains(".codeium"), "{said}");
}

#[test]
fn mode_owner_and_links_stay_as_they_are() {
    let home = Home::new();
    let target = home.file("dotfiles/cursor.json", "{}");
    fs::set_permissions(&target, fs::Permissions::from_mode(0o640)).unwrap();
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&target, Some(4242), Some(4243)).unwrap();
    }
    let before = target.metadata().unwrap();
    fs::create_dir(home.dir().join(".cursor")).unwrap();
    let link = home.dir().join(".cursor/mcp.json");
    symlink("../dotfiles/cursor.json", &link).unwrap();
    let done = home.outcome(&["install", "cursor"]);
    assert!(done["file"].as_str().unwrap().ends_with("dotfiles/cursor.json"), "{done}");
    assert!(link.symlink_metadata().unwrap().file_type().is_symlink());
    let after = target.metadata().unwrap();
    assert_eq!((after.mode(), after.uid(), after.gid()), (before.mode(), before.uid(), before.gid()));
    assert!(fs::read_to_string(&target).unwrap().contains(PROGRAM));
    home.said(&["uninstall", "cursor"]);
    assert_eq!(fs::read_to_string(&target).unwrap(), "{}");
    // A link to what is still to come is filled, not replaced.
    fs::remove_file(&target).unwrap();
    home.said(&["install", "cursor"]);
    assert!(link.symlink_metadata().unwrap().file_type().is_symlink() && target.is_file());
    home.said(&["uninstall", "cursor"]);
    assert!(link.symlink_metadata().is_ok() && !target.exists());
    fs::remove_file(&link).unwrap();
    symlink("mcp.json", &link).unwrap();
    let (code, said) = home.fails(&["install", "cursor"]);
    assert!(code == 1 && said.contains("leads back to itself"), "{said}");
}

#[test]
fn a_file_that_is_not_to_be_written_is_not() {
    let home = Home::new();
    let file = home.file(".cursor/mcp.json", "{}");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o444)).unwrap();
    let (code, said) = home.fails(&["install", "cursor"]);
    assert!(code == 1 && said.contains("read-only (mode 0444)") && said.contains("--print"), "{said}");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    fs::hard_link(&file, home.dir().join("other")).unwrap();
    let (code, said) = home.fails(&["install", "cursor"]);
    assert!(code == 1 && said.contains("2 names"), "{said}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "{}");
    assert!(home.is_tidy(&file));
}

#[test]
fn a_disk_that_is_full_leaves_the_file_whole() {
    let home = Home::new();
    // As large as a file may be here: its copy fits, and its next version does not.
    let text = format!("{{\"a\": \"{}\"}}", "x".repeat(8192 - 9));
    let file = home.file(".cursor/mcp.json", &text);
    assert_eq!(text.len(), 8192);
    let script = r#"trap '' XFSZ; ulimit -f 16; exec "$0" install cursor"#;
    let mut shell = Command::new("sh");
    shell.args(["-c", script, PROGRAM]).current_dir(home.dir()).env_clear().env("HOME", home.dir()).env("PATH", "/usr/bin:/bin");
    let output = shell.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && said.contains("mcp.json cannot be written"), "{said}");
    assert_eq!(said.matches("os error").count(), 1, "{said}");
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
    assert!(home.is_tidy(&file));
    // What was recorded for it does no harm.
    home.said(&["install", "cursor"]);
    home.said(&["uninstall", "cursor"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
}

#[test]
fn many_at_once_lose_nothing_of_each_other() {
    let home = Home::new();
    let (text, names) = (sample("vscode.json"), ["a", "b", "c", "d", "e", "f", "lattice-mcp", "lattice-mcp"]);
    let file = home.file(".config/Code/User/mcp.json", &text);
    let start = |verb: &str| -> Vec<_> {
        let command = |name: &&str| home.command(&[verb, "vscode", "--name", name]).stdout(Stdio::null()).spawn().unwrap();
        names.iter().map(command).collect()
    };
    for mut child in start("install") {
        assert!(child.wait().unwrap().success());
    }
    let whole = parsed(&fs::read_to_string(&file).unwrap(), false);
    assert_eq!(whole["servers"].as_object().unwrap().len(), 8, "{whole}");
    for mut child in start("uninstall") {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
}

#[test]
fn the_entry_carries_what_the_command_line_said() {
    let home = Home::new();
    let project = home.dir().join("project").canonicalize().unwrap();
    fs::write(project.join("mine.yaml"), "lattice: { id: other }\n").unwrap();
    home.said(&[
        "install",
        "cursor",
        "--scope",
        "project",
        "--config",
        "mine.yaml",
        "--data-dir",
        "/var/lib/l",
        "--nats",
        "nats://hub:4222",
        "--agents",
        "agents",
        "--agents",
        "/srv/agents",
        "--log",
        "info",
    ]);
    let text = fs::read_to_string(project.join(".cursor/mcp.json")).unwrap();
    let (config, agents) = (project.join("mine.yaml").display().to_string(), project.join("agents").display().to_string());
    let wanted = [
        PROGRAM,
        "--stdio",
        "--config",
        &config,
        "--data-dir",
        "/var/lib/l",
        "--nats",
        "nats://hub:4222",
        "--log",
        "info",
        "--agents",
        &agents,
        "--agents",
        "/srv/agents",
    ];
    assert_eq!(words(&entry_in(&text, false, &["mcpServers"], "lattice-mcp")), wanted);
    assert!(!home.dir().join(".cursor").exists(), "the user's own file is another");
    // The words are a command line that works.
    let shown = home.run(&[&wanted[2..], &["config"]].concat());
    assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
}

#[test]
fn secrets_do_not_get_into_clients_files() {
    let home = Home::new();
    let (code, said) = home.fails(&["install", "cursor", "--nats", "nats://hub:4222,nats://ada:s3cret@hub:4223"]);
    assert!(code == 2 && said.contains("lattice.nats.auth") && !said.contains("s3cret"), "{said}");
    let (code, said) = home.fails(&["install", "cursor", "--http", "http://ada:s3cret@hub/mcp"]);
    assert!(code == 2 && said.contains("--token-env") && !said.contains("s3cret"), "{said}");
    let (code, _) = home.fails(&["install", "cursor", "--http", ":8765", "--token-env", "s3cret-itself"]);
    assert_eq!(code, 2);
    assert!(!home.dir().join(".cursor").exists());
    // What is kept of others' files is for nobody else's eyes.
    home.file(".cursor/mcp.json", r#"{"mcpServers": {"x": {"env": {"KEY": "s3cret"}}}}"#);
    let backup = home.outcome(&["install", "cursor"])["backup"].as_str().map(PathBuf::from).unwrap();
    assert_eq!(backup.metadata().unwrap().mode() & 0o777, 0o600);
    assert_eq!(backup.parent().unwrap().metadata().unwrap().mode() & 0o777, 0o700);
}

#[test]
fn a_server_that_runs_already_is_called_over_http() {
    let home = Home::new();
    let file = home.file(".cursor/mcp.json", "{}");
    home.said(&["install", "cursor", "--http", ":8765", "--token-env", "LATTICE_HTTP_TOKEN"]);
    let entry = entry_in(&fs::read_to_string(&file).unwrap(), false, &["mcpServers"], "lattice-mcp");
    assert_eq!(entry, json!({"url": "http://127.0.0.1:8765/mcp", "headers": {"Authorization": "Bearer ${env:LATTICE_HTTP_TOKEN}"}}));
    // Another kind of entry leaves nothing of the first.
    home.said(&["install", "cursor"]);
    let entry = entry_in(&fs::read_to_string(&file).unwrap(), false, &["mcpServers"], "lattice-mcp");
    assert_eq!(entry, json!({"type": "stdio", "command": PROGRAM, "args": ["--stdio"]}));
    home.said(&["uninstall", "cursor"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "{}");
    for args in
        [&["--http", "8765"][..], &["--http", "ftp://x/mcp"], &["--http", ":8765", "--nats", "nats://x"], &["--allow-origin", "http://x"]]
    {
        assert_eq!(home.fails(&[&["install", "cursor"], args].concat()).0, 2, "{args:?}");
    }
    let (code, said) = home.fails(&["install", "claude-desktop", "--http", ":8765"]);
    assert!(code == 2 && said.contains("Connectors"), "{said}");
}

#[test]
fn print_shows_what_would_be_written_and_writes_nothing() {
    let home = Home::new();
    home.file(".cursor/mcp.json", "broken");
    for (client, ..) in CLIENTS {
        let said = home.said(&["install", client, "--print"]);
        assert!(said.contains(PROGRAM) && said.contains(home.dir().to_str().unwrap()), "{said}");
    }
    let shown = home.outcome(&["install", "codex", "--print"]);
    let snippet = shown["snippet"].as_str().unwrap();
    assert_eq!(snippet, format!("[mcp_servers.lattice-mcp]\ncommand = \"{PROGRAM}\"\nargs = [\"--stdio\"]\n"));
    assert!(!home.dir().join(".codex").exists() && !home.dir().join(".local").exists());
}

#[test]
fn without_a_client_all_are_listed_with_what_they_have() {
    let home = Home::new();
    fs::create_dir(home.dir().join(".gemini")).unwrap();
    home.said(&["install", "cursor"]);
    home.said(&["install", "zed", "--scope", "project", "--name", "ours"]);
    let rows: Value = serde_json::from_str(&home.said(&["install", "--json"])).unwrap();
    let row = |client: &str, scope: &str| {
        let found = rows.as_array().unwrap().iter().find(|row| row["client"] == client && row["scope"] == scope);
        found.map(|row| (row["found"].as_bool().unwrap(), row["entries"].clone()))
    };
    assert_eq!(row("cursor", "user"), Some((true, json!(["lattice-mcp"]))));
    assert_eq!(row("zed", "project"), Some((false, json!(["ours"]))));
    assert_eq!(row("gemini-cli", "user"), Some((true, json!([]))));
    assert_eq!((row("codex", "user"), row("codex", "project")), (Some((false, json!([]))), None));
    let table = home.said(&["install"]);
    assert!(table.contains("REGISTERED AS") && table.contains(".cursor/mcp.json"), "{table}");
    // Those that are there, all in one go; and out of all again.
    let said: Value = serde_json::from_str(&home.said(&["install", "--all-found", "--json"])).unwrap();
    let changes: Vec<_> =
        said.as_array().unwrap().iter().map(|one| (one["client"].as_str().unwrap(), one["change"].as_str().unwrap())).collect();
    assert_eq!(changes, [("cursor", "kept"), ("gemini-cli", "added")]);
    home.said(&["uninstall", "--all"]);
    assert!(home.said(&["uninstall", "--all"]).contains("no client"));
    assert!(!home.dir().join(".cursor").exists() && !home.dir().join("project/.zed").exists() && home.dir().join(".gemini").exists());
}

#[test]
fn one_that_fails_does_not_keep_the_others() {
    let home = Home::new();
    home.file(".cursor/mcp.json", "{");
    let output = home.run(&["install", "cursor", "gemini-cli", "--json"]);
    assert_eq!(output.status.code(), Some(4));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&said[0]["change"], &said[1]["change"]), (&json!("failed"), &json!("added")));
    assert!(home.dir().join(".gemini/settings.json").exists());
}

#[test]
fn a_wrong_command_line_says_what_would_be_right() {
    let home = Home::new();
    let (code, said) = home.fails(&["install", "curser"]);
    assert!(code == 2 && said.contains("cursor"), "{said}");
    let (code, said) = home.fails(&["install", "windsurf", "--scope", "project"]);
    assert!(code == 2 && said.contains("--scope project"), "{said}");
    let (code, said) = home.fails(&["install", "cursor", "--name", "a b"]);
    assert!(code == 2 && said.contains("' '"), "{said}");
    assert_eq!(home.fails(&["uninstall"]).0, 2);
    let mut homeless = home.command(&["install", "cursor"]);
    let said = homeless.env_remove("HOME").output().unwrap();
    assert_eq!(said.status.code(), Some(2), "{}", String::from_utf8_lossy(&said.stderr));
}

#[test]
fn the_name_on_the_path_is_what_is_written() {
    let home = Home::new();
    let bin = home.dir().join("bin");
    fs::create_dir(&bin).unwrap();
    symlink(PROGRAM, bin.join("lattice-mcp")).unwrap();
    let file = home.file(".cursor/mcp.json", "{}");
    let done = home.command(&["install", "cursor"]).env("PATH", format!("/usr/bin:{}", bin.display())).output().unwrap();
    assert!(done.status.success());
    let entry = entry_in(&fs::read_to_string(&file).unwrap(), false, &["mcpServers"], "lattice-mcp");
    assert_eq!(entry["command"], bin.join("lattice-mcp").to_str().unwrap());
}
