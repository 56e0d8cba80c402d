//! The table of clients in the README: what each of them reported, and nothing that was typed by hand.
//!
//! Whoever runs clients gives their rows here; a scenario that no column is for belongs to the tests only.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::{clients, hosts};

const BEGINS: &str = "<!-- The tests write this table: UPDATE_GOLDEN=1 ./tests/run matrix -->\n";
const ENDS: &str = "<!-- The end of the table that the tests write. -->\n";

/// The scenarios that have a column, and its head.
const COLUMNS: [(&str, &str); 10] = [
    ("tools", "list"),
    ("assign", "assign"),
    ("progress", "await with progress"),
    ("escalate", "answer"),
    ("person", "form"),
    ("changes", "`list_changed`"),
    ("cancel", "cancel"),
    ("resources", "resources"),
    ("subscription", "subscribe"),
    ("prompts", "prompts"),
];

/// What a client's script prints at its end.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Report {
    /// Its name and exact version.
    pub(crate) client: String,
    /// The protocol that it came to speak.
    pub(crate) protocol: String,
    pub(crate) passed: Vec<String>,
    /// What it has no way to do, and why.
    #[serde(default)]
    pub(crate) unable: BTreeMap<String, String>,
}

/// What one client did over the transports that it has.
pub(crate) struct Row {
    /// How it was set up, where there are several ways.
    pub(crate) how: &'static str,
    pub(crate) stdio: Report,
    pub(crate) http: Option<Report>,
}

impl Row {
    fn client(&self) -> String {
        match self.how {
            "" => self.stdio.client.clone(),
            how => format!("{}, {how}", self.stdio.client),
        }
    }

    fn over(&self) -> &'static str {
        if self.http.is_some() { "stdio, HTTP" } else { "stdio" }
    }

    /// `yes` where it passed over every transport; a note says why not where it can't.
    fn cell(&self, scenario: &str, notes: &mut Vec<String>) -> String {
        let reports = || std::iter::once(&self.stdio).chain(&self.http);
        if reports().all(|report| report.passed.iter().any(|passed| passed == scenario)) {
            return "yes".into();
        }
        let Some(why) = reports().find_map(|report| report.unable.get(scenario)) else { return "no".into() };
        let known = notes.iter().position(|note| note == why).unwrap_or_else(|| {
            notes.push(why.clone());
            notes.len() - 1
        });
        format!("- ({})", known + 1)
    }
}

/// The table, and below it why a client can't do what it can't.
fn table(rows: &[Row]) -> String {
    let heads: Vec<&str> = COLUMNS.iter().map(|(_, head)| *head).collect();
    let mut text = format!("| client | speaks | over | {} |\n", heads.join(" | "));
    text.push_str(&"| --- ".repeat(heads.len() + 3));
    text.push_str("|\n");
    let mut notes = Vec::new();
    for row in rows {
        let cells: Vec<String> = COLUMNS.iter().map(|(scenario, _)| row.cell(scenario, &mut notes)).collect();
        let _ = writeln!(text, "| {} | {} | {} | {} |", row.client(), row.stdio.protocol, row.over(), cells.join(" | "));
    }
    text.push('\n');
    for (at, note) in notes.iter().enumerate() {
        let _ = writeln!(text, "{}. {note}", at + 1);
    }
    text
}

#[test]
fn the_readme_says_what_the_clients_reported() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = fs::read_to_string(&file).unwrap();
    let (before, rest) = readme.split_once(BEGINS).expect("the README has a place for the table");
    let (known, after) = rest.split_once(ENDS).expect("the table in the README has an end");
    let said = format!("\n{}\n", table(&clients::rows().into_iter().chain(hosts::rows()).collect::<Vec<Row>>()));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&file, format!("{before}{BEGINS}{said}{ENDS}{after}")).unwrap();
        return;
    }
    assert_eq!(said, known, "the README says something else of the clients than they do; UPDATE_GOLDEN=1 rewrites it");
}

#[test]
fn a_cell_says_what_a_client_did_over_every_transport() {
    let report = |passed: &[&str]| Report {
        client: "C 1".into(),
        protocol: "2025-11-25".into(),
        passed: passed.iter().map(|&name| name.to_owned()).collect(),
        unable: BTreeMap::from([("person".to_owned(), "it shows no form".to_owned())]),
    };
    let mut notes = Vec::new();
    let row = Row { how: "auto", stdio: report(&["tools", "assign"]), http: Some(report(&["tools"])) };
    let cells: Vec<String> = ["tools", "assign", "person", "changes"].iter().map(|name| row.cell(name, &mut notes)).collect();
    assert_eq!(cells, ["yes", "no", "- (1)", "no"]);
    assert_eq!((notes, row.client()), (vec!["it shows no form".to_owned()], "C 1, auto".to_owned()));
}
