//! `doctor`: whether everything that this lattice needs is there and in order.

use serde_json::json;

use super::failure::{Exit, Failure};
use super::session::{STORE_FILE, Session};
use super::table::Table;
use crate::agents;
use crate::config::without_password;
use crate::transport::local;
use crate::transport::nats::Member;
use crate::transport::nats::embedded::Plan;
use crate::transport::nats::examine::{Finding, Grade, Syncs, examine};

pub(super) async fn run(session: &mut Session) -> Result<(), Failure> {
    let mut findings = Vec::new();
    findings.push(configuration(session));
    findings.push(store(session));
    findings.extend(agents(session));
    findings.extend(server(session).await);
    if session.screen.json {
        let shown = |finding: &Finding| json!({"what": finding.what, "grade": word(finding.grade), "text": finding.text});
        session.screen.json(&findings.iter().map(shown).collect())?;
    } else {
        let mut table = Table::new(["", "WHAT", "FOUND"]);
        for finding in &findings {
            table.row([word(finding.grade).to_owned(), finding.what.clone(), finding.text.clone()]);
        }
        session.screen.table(&table)?;
    }
    let bad = findings.iter().filter(|finding| finding.grade == Grade::Bad).count();
    if bad > 0 {
        return Err(Failure::new(Exit::Failed, format!("{bad} of {} findings are bad: see above", findings.len())));
    }
    Ok(())
}

fn word(grade: Grade) -> &'static str {
    match grade {
        Grade::Good => "ok",
        Grade::Odd => "note",
        Grade::Bad => "bad",
    }
}

fn configuration(session: &Session) -> Finding {
    let loaded = &session.loaded;
    let file = match &loaded.file {
        Some(file) => file.display().to_string(),
        None => "no file was read (lattice-mcp init writes one)".to_owned(),
    };
    match loaded.warnings.as_slice() {
        [] => Finding::new("configuration", Grade::Good, file),
        warnings => Finding::new("configuration", Grade::Odd, format!("{file}; {}", warnings.join("; "))),
    }
}

fn store(session: &Session) -> Finding {
    let dir = match session.setting().lattice_dir() {
        Ok(dir) => dir,
        Err(error) => return Finding::new("data folder", Grade::Bad, error.to_string()),
    };
    let shown = dir.display();
    if !dir.join(STORE_FILE).exists() {
        return Finding::new("data folder", Grade::Good, format!("{shown}: nothing is kept there yet"));
    }
    match local::open_read_only(&dir) {
        Ok(_) => Finding::new("data folder", Grade::Good, format!("{shown}: the store can be read")),
        Err(error) => Finding::new("data folder", Grade::Bad, error.to_string()),
    }
}

fn agents(session: &Session) -> Vec<Finding> {
    let config = &session.loaded.config;
    let dirs = config.agent_dirs(&session.cwd);
    let files = agents::load(&dirs, &config.agents, std::env::var_os("PATH").as_deref());
    let mut findings: Vec<Finding> = files.problems.iter().map(|problem| Finding::new("agent", Grade::Bad, problem.to_string())).collect();
    for (name, definition) in &files.definitions {
        if let Some(reason) = &definition.manifest.unavailable {
            findings.push(Finding::new("agent", Grade::Odd, format!("{name} cannot run here: {reason}")));
        }
    }
    let dirs: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
    let text = format!("{} in {}", files.definitions.len(), dirs.join(", "));
    findings.insert(0, Finding::new("agents", Grade::Good, text));
    findings
}

async fn server(session: &Session) -> Vec<Finding> {
    let setting = session.setting();
    let lattice = &setting.config.lattice;
    let member =
        Member { lattice: lattice.id.clone(), station: setting.config.station(), blob_max_age: lattice.storage.blob_max_age.get() };
    let Some(url) = &lattice.nats.url else {
        return vec![Finding::new("server", Grade::Good, "none: this lattice is one machine's (--nats embedded or --nats URL for more)")];
    };
    if !lattice.nats.is_embedded() {
        let mut findings = vec![Finding::new("server's place", Grade::Good, without_password(url))];
        findings.extend(examine(&member, &lattice.nats, Syncs::Unknown).await);
        return findings;
    }
    let plan = match setting.lattice_dir() {
        Ok(dir) => Plan::new(&setting.config, &dir),
        Err(error) => return vec![Finding::new("server", Grade::Bad, error.to_string())],
    };
    let mut findings = vec![match plan.found() {
        Ok((program, version)) => Finding::new("server's program", Grade::Good, format!("{}, version {version}", program.display())),
        Err(error) => Finding::new("server's program", Grade::Bad, error.to_string()),
    }];
    let asked = plan.clone();
    match tokio::task::spawn_blocking(move || asked.running()).await.ok().flatten() {
        Some(running) => findings.extend(examine(&member, &running, plan.syncs()).await),
        None => {
            let text = "it does not run at the moment: it starts with this lattice's first station (lattice-mcp leaf, --stdio or --http)";
            findings.push(Finding::new("server", Grade::Odd, text));
        }
    }
    if plan.is_loopback() {
        let text = format!("{}: other machines cannot reach it (lattice.embedded_nats.address)", plan.host());
        findings.push(Finding::new("server's address", Grade::Odd, text));
    }
    findings
}
