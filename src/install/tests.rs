//! Places on every platform, and edits of every format: pure, and many.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::format::{Format, How, Trouble};
use super::*;

fn entry() -> Node {
    Node::map([("command", Node::text("/opt/lattice-mcp")), ("args", Node::List(vec!["--stdio".into()]))])
}

fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn place(platform: Platform, pairs: &[(&str, &str)], client: Client, scope: Scope, there: &[&str]) -> Result<String, Nowhere> {
    let project = if platform == Platform::Windows { r"D:\work\engine" } else { "/work/engine" };
    let exists = |path: &Path| there.iter().any(|known| path == Path::new(known));
    let around = Around { platform, env: &env(pairs), project: Path::new(project), exists: &exists };
    file_of(client, scope, &around).map(|file| file.to_string_lossy().into_owned())
}

const LINUX: &[(&str, &str)] = &[("HOME", "/home/ada")];
const MAC: &[(&str, &str)] = &[("HOME", "/Users/ada")];
const WINDOWS: &[(&str, &str)] =
    &[("USERPROFILE", r"C:\Users\Ada"), ("APPDATA", r"C:\Users\Ada\AppData\Roaming"), ("LOCALAPPDATA", r"C:\Users\Ada\AppData\Local")];

#[test]
fn each_client_has_its_own_place_on_each_platform() {
    use Client as C;
    let rows = [
        (
            C::ClaudeDesktop,
            "/home/ada/.config/Claude/claude_desktop_config.json",
            "/Users/ada/Library/Application Support/Claude/claude_desktop_config.json",
            r"C:\Users\Ada\AppData\Roaming\Claude\claude_desktop_config.json",
        ),
        (C::ClaudeCode, "/home/ada/.claude.json", "/Users/ada/.claude.json", r"C:\Users\Ada\.claude.json"),
        (C::Cursor, "/home/ada/.cursor/mcp.json", "/Users/ada/.cursor/mcp.json", r"C:\Users\Ada\.cursor\mcp.json"),
        (
            C::VsCode,
            "/home/ada/.config/Code/User/mcp.json",
            "/Users/ada/Library/Application Support/Code/User/mcp.json",
            r"C:\Users\Ada\AppData\Roaming\Code\User\mcp.json",
        ),
        (C::Codex, "/home/ada/.codex/config.toml", "/Users/ada/.codex/config.toml", r"C:\Users\Ada\.codex\config.toml"),
        (
            C::Opencode,
            "/home/ada/.config/opencode/opencode.json",
            "/Users/ada/.config/opencode/opencode.json",
            r"C:\Users\Ada\.config\opencode\opencode.json",
        ),
        (C::GeminiCli, "/home/ada/.gemini/settings.json", "/Users/ada/.gemini/settings.json", r"C:\Users\Ada\.gemini\settings.json"),
        (
            C::Zed,
            "/home/ada/.config/zed/settings.json",
            "/Users/ada/.config/zed/settings.json",
            r"C:\Users\Ada\AppData\Roaming\Zed\settings.json",
        ),
        (
            C::Windsurf,
            "/home/ada/.codeium/windsurf/mcp_config.json",
            "/Users/ada/.codeium/windsurf/mcp_config.json",
            r"C:\Users\Ada\.codeium\windsurf\mcp_config.json",
        ),
    ];
    assert_eq!(rows.map(|row| row.0), Client::ALL);
    for (client, linux, mac, windows) in rows {
        for (platform, pairs, wanted) in
            [(Platform::Linux, LINUX, linux), (Platform::MacOs, MAC, mac), (Platform::Windows, WINDOWS, windows)]
        {
            assert_eq!(place(platform, pairs, client, Scope::User, &[]).as_deref(), Ok(wanted), "{client:?} on {platform:?}");
        }
    }
}

#[test]
fn each_client_has_its_own_place_in_a_project() {
    use Client as C;
    let rows = [
        (C::ClaudeCode, ".mcp.json"),
        (C::Cursor, ".cursor/mcp.json"),
        (C::VsCode, ".vscode/mcp.json"),
        (C::Codex, ".codex/config.toml"),
        (C::Opencode, "opencode.json"),
        (C::GeminiCli, ".gemini/settings.json"),
        (C::Zed, ".zed/settings.json"),
    ];
    for (client, below) in rows {
        assert_eq!(place(Platform::Linux, LINUX, client, Scope::Project, &[]), Ok(format!("/work/engine/{below}")));
        let windows = format!(r"D:\work\engine\{}", below.replace('/', r"\"));
        assert_eq!(place(Platform::Windows, WINDOWS, client, Scope::Project, &[]), Ok(windows));
    }
    for client in [C::ClaudeDesktop, C::Windsurf] {
        assert_eq!(place(Platform::Linux, LINUX, client, Scope::Project, &[]), Err(Nowhere::NoProject));
    }
}

#[test]
fn variables_and_what_is_there_move_a_place() {
    use Client as C;
    let moved = |pairs: &[(&str, &str)], client| place(Platform::Linux, &[LINUX, pairs].concat(), client, Scope::User, &[]).unwrap();
    assert_eq!(moved(&[("CLAUDE_CONFIG_DIR", "/etc/claude/")], C::ClaudeCode), "/etc/claude/.claude.json");
    assert_eq!(moved(&[("CODEX_HOME", "/srv/codex")], C::Codex), "/srv/codex/config.toml");
    assert_eq!(moved(&[("GEMINI_CLI_HOME", "/srv/g")], C::GeminiCli), "/srv/g/.gemini/settings.json");
    for client in [C::ClaudeDesktop, C::VsCode, C::Opencode, C::Zed] {
        assert!(moved(&[("XDG_CONFIG_HOME", "/x")], client).starts_with("/x/"), "{client:?}");
        assert!(moved(&[("XDG_CONFIG_HOME", "relative")], client).starts_with("/home/ada/.config/"), "{client:?}");
    }
    let jsonc = "/home/ada/.config/opencode/opencode.jsonc";
    assert_eq!(place(Platform::Linux, LINUX, C::Opencode, Scope::User, &[jsonc]).as_deref(), Ok(jsonc));
    let package = r"C:\Users\Ada\AppData\Local\Packages\Claude_pzs8sxrjxfjjc";
    let packaged = place(Platform::Windows, WINDOWS, C::ClaudeDesktop, Scope::User, &[package]).unwrap();
    assert_eq!(packaged, format!(r"{package}\LocalCache\Roaming\Claude\claude_desktop_config.json"));
    assert_eq!(place(Platform::Linux, &[], C::Cursor, Scope::User, &[]), Err(Nowhere::Unset("HOME".into())));
    assert_eq!(place(Platform::Windows, &[], C::Zed, Scope::User, &[]), Err(Nowhere::Unset("APPDATA".into())));
}

#[test]
fn a_client_is_found_by_its_folder_or_its_program() {
    let found = |client, there: &[&str]| {
        let exists = |path: &Path| there.iter().any(|known| path == Path::new(known));
        let env = env(&[("HOME", "/home/ada"), ("PATH", "/usr/bin:/opt/bin")]);
        is_found(client, &Around { platform: Platform::Linux, env: &env, project: Path::new("/"), exists: &exists })
    };
    assert!(found(Client::Cursor, &["/home/ada/.cursor"]) && found(Client::VsCode, &["/opt/bin/code"]));
    // The home folder alone tells nothing of a program whose file stands in it.
    assert!(!found(Client::ClaudeCode, &["/home/ada"]) && found(Client::ClaudeCode, &["/home/ada/.claude"]));
}

#[test]
fn an_entry_over_http_names_the_token_and_never_holds_it() {
    let server = Server::Http { url: "http://h:1/mcp".into(), token_env: Some("TOKEN".into()) };
    for client in Client::ALL {
        match client.entry(&server) {
            Ok(entry) => assert!(entry.to_value().to_string().contains("TOKEN"), "{client:?}"),
            Err(Lack::Http) => assert_eq!(client, Client::ClaudeDesktop),
            Err(Lack::TokenEnv) => assert_eq!(client, Client::Zed),
        }
    }
    let codex = Client::Codex.entry(&server).unwrap().to_value();
    assert_eq!(codex, json!({"url": "http://h:1/mcp", "bearer_token_env_var": "TOKEN"}));
}

#[test]
fn one_of_ours_is_known_wherever_its_program_stands() {
    let ours = [
        json!({"command": "lattice-mcp"}),
        json!({"command": "/usr/bin/lattice-mcp", "args": []}),
        json!({"command": r"C:\bin\lattice-mcp.exe"}),
        json!({"command": ["/opt/lattice-mcp", "--stdio"]}),
        json!({"command": {"path": "/opt/lattice-mcp"}}),
    ];
    assert!(ours.iter().all(client::starts_us));
    let others = [json!({"command": "my-lattice-mcp"}), json!({"command": "npx", "args": ["lattice-mcp"]}), json!({"url": "x"}), json!(7)];
    assert!(!others.iter().any(client::starts_us));
}

#[test]
fn opencode_has_two_places_for_servers_and_ours_stands_with_the_others() {
    let section = |text: &str| Client::Opencode.section(text);
    assert_eq!(section(""), ["mcp"]);
    assert_eq!(section(r#"{"mcp": {"sentry": {"type": "remote", "url": "x"}}}"#), ["mcp"]);
    assert_eq!(section(r#"{"mcp": {"servers": {"sentry": {"type": "remote", "url": "x"}}}}"#), ["mcp", "servers"]);
    // A server of that name in the older form.
    assert_eq!(section(r#"{"mcp": {"servers": {"type": "local", "command": ["x"]}}}"#), ["mcp"]);
}

#[test]
fn what_somebody_else_writes_in_between_is_not_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mcp.json");
    assert_eq!(file::replace(&path, None, "one").unwrap(), Replaced::Done);
    assert_eq!(file::replace(&path, None, "two").unwrap(), Replaced::NoLonger);
    assert_eq!(file::replace(&path, Some("zero"), "two").unwrap(), Replaced::NoLonger);
    assert_eq!(file::remove(&path, "zero", &[]).unwrap(), Replaced::NoLonger);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "one");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a draft is left");
    assert_eq!(file::replace(&path, Some("one"), "two").unwrap(), Replaced::Done);
    assert_eq!(file::remove(&path, "two", &[]).unwrap(), Replaced::Done);
}

fn put(format: Format, text: &str) -> Result<String, Trouble> {
    let section: &[&str] = if format == Format::Toml { &["mcp_servers"] } else { &["mcpServers"] };
    format.put(text, section, "lattice-mcp", &entry(), How::Whole)
}

fn take(format: Format, text: &str) -> Result<String, Trouble> {
    let section: &[&str] = if format == Format::Toml { &["mcp_servers"] } else { &["mcpServers"] };
    format.take(text, section, "lattice-mcp", false)
}

#[test]
fn json_is_laid_out_like_its_surroundings() {
    let added = |text: &str| put(Format::Jsonc, text).unwrap();
    let alone = "{\n  \"mcpServers\": {\n    \"lattice-mcp\": {\n      \"command\": \"/opt/lattice-mcp\",\n      \"args\": [\"--stdio\"]\n    }\n  }\n}";
    assert_eq!(added(""), format!("{alone}\n"));
    assert_eq!(added("{}"), alone);
    assert_eq!(added("// mine\n{}\n"), format!("// mine\n{alone}\n"));
    let flat = r#"{"mcpServers":{"a":{"url":"x"}},"z":1}"#;
    let wanted = r#"{"mcpServers":{"a":{"url":"x"},"lattice-mcp":{"command":"/opt/lattice-mcp","args":["--stdio"]}},"z":1}"#;
    assert_eq!(added(flat), wanted);
    assert_eq!(take(Format::Jsonc, wanted).unwrap(), flat);
    let remarks = "{\r\n\t\"mcpServers\": {\r\n\t\t\"a\": {}, // why\r\n\t\t/* b */\r\n\t}\r\n}";
    let wanted = "{\r\n\t\"mcpServers\": {\r\n\t\t\"a\": {}, // why\r\n\t\t\"lattice-mcp\": {\r\n\t\t\t\"command\": \"/opt/lattice-mcp\",\r\n\t\t\t\"args\": [\"--stdio\"]\r\n\t\t},\r\n\t\t/* b */\r\n\t}\r\n}";
    assert_eq!(added(remarks), wanted);
    assert_eq!(take(Format::Jsonc, wanted).unwrap(), remarks);
}

#[test]
fn toml_keeps_its_lines_whatever_their_ends() {
    let plain = "# mine\nmodel = \"x\" # why\n\n[mcp_servers.a]\ncommand = 'a'\n\n# about tui\n[tui]\nx = [\n  1, # one\n]\n# end";
    for text in [plain.to_owned(), plain.replace('\n', "\r\n"), plain.replacen('\n', "\r\n", 3), format!("{plain}\n")] {
        let after = put(Format::Toml, &text).unwrap();
        let entry = "[mcp_servers.lattice-mcp]\ncommand = \"/opt/lattice-mcp\"\nargs = [\"--stdio\"]\n";
        assert!(after.replace("\r\n", "\n").contains(entry), "{after:?}");
        assert_eq!(take(Format::Toml, &after).unwrap(), text, "{after:?}");
        assert_eq!(after.matches("\r\n").count() > 0, text.contains("\r\n"));
    }
    for text in ["", "mcp_servers = { a = { command = \"a\" } }\n", "[mcp_servers]\n", "mcp_servers.a.command = \"a\"\n"] {
        let after = put(Format::Toml, text).unwrap();
        assert_eq!(Format::Toml.read(&after).unwrap()["mcp_servers"]["lattice-mcp"], entry().to_value(), "{after}");
        assert_eq!(take(Format::Toml, &after).unwrap(), text, "{after}");
    }
}

#[test]
fn what_is_no_place_for_an_entry_is_told_with_its_line() {
    let trouble = |format, text: &str| put(format, text).unwrap_err().to_string();
    assert!(trouble(Format::Json, "{\n  \"a\": 1,\n}").starts_with("line 2: "));
    assert!(trouble(Format::Json, "{\n  // no\n}").starts_with("line 2: "));
    assert!(trouble(Format::Jsonc, "{\"a\": 1 \"b\": 2}").starts_with("line 1: "));
    assert!(trouble(Format::Jsonc, &"[".repeat(100_000)).contains("depth"));
    assert!(trouble(Format::Toml, "a = 1\nb = \n").starts_with("line 2: "));
    assert!(trouble(Format::Toml, &format!("a = {}", "[".repeat(100_000))).starts_with("line 1: "));
    assert!(trouble(Format::Jsonc, "[]").contains("the file is a list"));
    assert!(trouble(Format::Jsonc, "{\"mcpServers\": []}").contains("mcpServers is"));
    assert!(trouble(Format::Jsonc, "{\"mcpServers\": {}, \"mcpServers\": {}}").contains("twice"));
    assert!(trouble(Format::Toml, "[[mcp_servers]]\na = 1\n").contains("mcp_servers is"));
    assert!(trouble(Format::Jsonc, "{} {}").starts_with("line 1: "));
}

/// A value, and the gaps before its key, before it, and behind it.
type Parts = (&'static str, &'static str, &'static str, &'static str);

/// A document in some layout: each gap is chosen on its own.
fn document() -> impl Strategy<Value = String> {
    let gap = prop::sample::select(vec!["", " ", "\n  ", "\n\t", " // no, \"not\"\n", " /* { */ ", "\r\n    ", "\n\n"]);
    let scalar = prop::sample::select(vec!["1", "\"a, b\"", "null", "true", "[1, 2]", "\"// \\\" }\"", "{}", "-0.5e3", "[ ]"]);
    let key = prop::sample::select(vec!["a", "b", "mcp Servers", "ü", "c}"]);
    let pairs = prop::collection::btree_map(key, (scalar, gap.clone(), gap.clone(), gap.clone()), 0..4);
    let object = (pairs, gap.clone(), any::<bool>()).prop_map(|(pairs, inside, comma)| {
        let last = pairs.len();
        let pair = |(index, (key, (value, before, middle, after))): (usize, (&str, Parts))| {
            let comma = if index + 1 < last || comma { "," } else { "" };
            format!("{before}\"{key}\":{middle}{value}{after}{comma}")
        };
        format!("{{{}{inside}}}", pairs.into_iter().enumerate().map(pair).collect::<String>())
    });
    (object.clone(), object, 0..3usize, gap.clone(), gap).prop_map(|(root, section, how, before, after)| match how {
        0 => format!("{before}{root}{after}"),
        1 => format!("{before}{{{before}\"mcpServers\":{section}{after}}}"),
        _ => format!("{{\"mcpServers\":{after}{section}{before},{after}\"z\": [{before}]}}{after}"),
    })
}

proptest! {
    #[test]
    fn an_entry_comes_and_goes_in_every_layout(text in document()) {
        let before = Format::Jsonc.read(&text).unwrap();
        let after = put(Format::Jsonc, &text).unwrap();
        prop_assert_eq!(&Format::Jsonc.read(&after).unwrap()["mcpServers"]["lattice-mcp"], &entry().to_value());
        prop_assert_eq!(put(Format::Jsonc, &after).unwrap(), after.clone(), "not idempotent");
        let gone = Format::Jsonc.take(&after, &["mcpServers"], "lattice-mcp", before.get("mcpServers").is_none()).unwrap();
        prop_assert_eq!(Format::Jsonc.read(&gone).unwrap(), before);
        // No remark gets lost on the way.
        prop_assert_eq!(gone.matches("// no").count(), text.matches("// no").count());
        prop_assert_eq!(gone.matches("/* { */").count(), text.matches("/* { */").count());
    }

    #[test]
    fn no_text_breaks_the_editor(text in "[\\[\\]{}\",:/* \n\rmcpServers=#'a.1]{0,60}") {
        for format in [Format::Json, Format::Jsonc, Format::Toml] {
            if let Ok(after) = put(format, &text) {
                let whole: Value = format.read(&after).unwrap();
                prop_assert!(whole.to_string().contains("/opt/lattice-mcp"));
                prop_assert!(take(format, &after).is_ok());
            }
        }
    }
}
