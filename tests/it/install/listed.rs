//! Whether the clients' own programs find what was written for them, and reach the lattice by it.

use std::process::Command;

use serde_json::{Value, json};

use super::{Home, PROGRAM};
use crate::harness::{Lattice, TOKEN};
use crate::hosts::{self, CODEX, GEMINI, Host, OPENCODE, OPENCODE_ALONE};

/// Where entries say that the token is.
const TOKEN_VAR: &str = "LATTICE_TEST_TOKEN";

/// What a client's program says of its servers: on a terminal, it would be in colours.
fn listed(home: &Home, host: &Host, further: &[&str]) -> String {
    let mut command: Command = hosts::program(host);
    command.args(["mcp", "list"]).args(further).current_dir(home.dir().join("project")).env_clear();
    command.env("HOME", home.dir()).env("TMPDIR", home.dir()).env("PATH", std::env::var_os("PATH").unwrap_or_default());
    // Nothing beyond loopback is there.
    command.env("HTTPS_PROXY", "http://127.0.0.1:9").env("HTTP_PROXY", "http://127.0.0.1:9").env("NO_PROXY", "127.0.0.1,localhost");
    command.env(TOKEN_VAR, TOKEN).env("NO_COLOR", "1").env("GEMINI_API_KEY", "none").envs(OPENCODE_ALONE.map(|name| (name, "1")));
    let output = hosts::to_its_end(command);
    let (Ok(output) | Err(output)) = &output;
    let (printed, logged) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{printed}{logged}");
    // Some say it on standard error.
    if further.is_empty() { format!("{printed}{logged}") } else { printed.into_owned() }
}

/// A client that says whether it reached each of its servers.
fn connects(client: &str, host: &Host, none: &str) {
    let (home, lattice) = (Home::new(), Lattice::new());
    let server = lattice.serve();
    // Servers of a folder that nobody trusts are left alone; its user is asked once.
    let project = home.dir().join("project");
    home.file(".gemini/trustedFolders.json", json!({ project.to_str().unwrap(): "TRUST_FOLDER" }).to_string());
    let before = listed(&home, host, &[]);
    assert!(before.contains(none) && !before.contains("lattice"), "{before}");
    let stdio: &[&str] = &["install", client];
    let http: &[&str] = &["install", client, "--http", &server.url, "--token-env", TOKEN_VAR];
    for (arguments, shown) in [(stdio, format!("{PROGRAM} --stdio")), (http, server.url.clone())] {
        home.said(arguments);
        let after = listed(&home, host, &[]);
        let is_there = after.contains("\u{2713} lattice-mcp") && after.contains(&shown) && after.to_lowercase().contains("connected");
        assert!(is_there && !after.to_lowercase().contains("disconnected"), "{client} does not reach {shown}:\n{after}");
    }
    home.said(&["uninstall", client]);
    let gone = listed(&home, host, &[]);
    assert!(gone.contains(none) && !gone.contains("lattice-mcp"), "{gone}");
}

#[test]
fn opencode_connects_by_what_is_written_for_it() {
    connects("opencode", &OPENCODE, "No MCP servers configured");
}

#[test]
fn gemini_cli_connects_by_what_is_written_for_it() {
    connects("gemini-cli", &GEMINI, "No MCP servers configured");
}

#[test]
fn codex_reads_what_is_written_for_it() {
    let home = Home::new();
    let servers = || serde_json::from_str::<Value>(&listed(&home, &CODEX, &["--json"])).unwrap();
    assert_eq!(servers(), json!([]));
    home.said(&["install", "codex"]);
    let known = servers();
    let ours = &known[0];
    assert_eq!((known.as_array().unwrap().len(), &ours["name"], &ours["enabled"]), (1, &json!("lattice-mcp"), &json!(true)), "{known}");
    let transport = &ours["transport"];
    assert_eq!((&transport["type"], &transport["command"], &transport["args"]), (&json!("stdio"), &json!(PROGRAM), &json!(["--stdio"])));
    let url = "http://127.0.0.1:8765/mcp";
    home.said(&["install", "codex", "--http", url, "--token-env", TOKEN_VAR]);
    let known = servers();
    let (ours, transport) = (&known[0], &known[0]["transport"]);
    assert_eq!(
        (known.as_array().unwrap().len(), &ours["enabled"], &ours["auth_status"]),
        (1, &json!(true), &json!("bearer_token")),
        "{known}"
    );
    assert_eq!((&transport["url"], &transport["bearer_token_env_var"]), (&json!(url), &json!(TOKEN_VAR)), "{known}");
    home.said(&["uninstall", "codex"]);
    assert_eq!(servers(), json!([]));
}
