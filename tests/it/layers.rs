//! The order of the modules: each uses only what stands below it. Reads the sources, and fails on an upward import.

use std::fs;
use std::path::{Path, PathBuf};

/// From the top down. Modules of one line stand beside each other and may not use one another.
const LAYERS: [&[&str]; 18] = [
    &["fuzz", "main"],
    &["cli"],
    &["init", "install"],
    &["station"],
    &["http"],
    &["mcp"],
    &["dispatcher"],
    &["leaf"],
    &["orders"],
    &["registry"],
    &["runs"],
    &["results"],
    &["audit", "works"],
    &["runner"],
    &["transport"],
    &["agents", "telemetry"],
    &["config"],
    &["model"],
];

/// Crates that only some modules may name.
const FENCED: [(&str, &[&str]); 4] =
    [("async_nats", &["transport"]), ("rusqlite", &["transport/local", "runs"]), ("rmcp", &["mcp", "http"]), ("axum", &["http"])];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Each file below `src`, by its path there, with its code (comments and test modules left out).
fn code() -> Vec<(String, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    files
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            let code: Vec<&str> =
                text.split("#[cfg(test)]").next().unwrap().lines().filter(|line| !line.trim_start().starts_with("//")).collect();
            (path.strip_prefix(&src).unwrap().to_string_lossy().into_owned(), code.join("\n"))
        })
        .collect()
}

fn layer_of(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// The modules of our own crate that a text names: `crate::x` or `lattice_mcp::x`, also in braces.
fn imports(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for prefix in ["crate::", "lattice_mcp::"] {
        for (at, _) in code.match_indices(prefix) {
            let rest = &code[at + prefix.len()..];
            let names = match rest.strip_prefix('{') {
                Some(inner) => inner.split('}').next().unwrap_or_default().split(',').collect(),
                None => vec![rest],
            };
            for name in names {
                found.push(name.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
            }
        }
    }
    found
}

#[test]
fn modules_use_only_what_stands_below_them() {
    let mut upward = Vec::new();
    for (file, code) in code() {
        let module = file.split(['/', '.']).next().unwrap().to_owned();
        if module == "lib" {
            continue;
        }
        let Some(own) = layer_of(&module) else { panic!("src/{file}: the module {module} has no place in LAYERS") };
        for import in imports(&code) {
            match layer_of(&import) {
                Some(theirs) if theirs > own || import == module => {}
                Some(_) => upward.push(format!("src/{file} uses {import}, which stands above or beside {module}")),
                None => {}
            }
        }
    }
    assert!(upward.is_empty(), "{}", upward.join("\n"));
}

#[test]
fn fenced_crates_stay_where_they_belong() {
    let mut out = Vec::new();
    for (file, code) in code() {
        for (name, homes) in FENCED {
            let named = code.contains(&format!("{name}::")) || code.contains(&format!("use {name}"));
            if named && !homes.iter().any(|home| file.starts_with(home)) {
                out.push(format!("src/{file} names {name}"));
            }
        }
    }
    assert!(out.is_empty(), "{}", out.join("\n"));
}

#[test]
fn the_model_is_pure() {
    let forbidden = ["tokio", "std::fs", "std::io", "std::net", "std::process", "SystemTime", "Instant", "std::env", "now_v7", "new_v4"];
    let mut impure = Vec::new();
    for (file, code) in code().into_iter().filter(|(file, _)| file.starts_with("model")) {
        impure.extend(forbidden.iter().filter(|word| code.contains(**word)).map(|word| format!("src/{file} names {word}")));
    }
    assert!(impure.is_empty(), "{}", impure.join("\n"));
}

#[test]
fn only_the_subject_module_formats_subjects() {
    let mut out = Vec::new();
    for (file, code) in code().into_iter().filter(|(file, _)| file != "transport/subject.rs") {
        if code.contains("\"work.{") || code.contains(".response\"") || code.contains("\"lattice.{") || code.contains("\"events.{") {
            out.push(file);
        }
    }
    assert!(out.is_empty(), "{out:?}");
}
