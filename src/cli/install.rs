//! `install`, `uninstall`: an entry for this program in the configuration of MCP clients.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde_json::{Value, json};

use super::Common;
use super::failure::{Exit, Failure};
use super::session::Session;
use super::table::Table;
use crate::config::{user_data_dir, without_password};
use crate::install::{
    Around, Change, Client, Done, Installer, Order, Place, Platform, Scope, Server, file_of, is_found, lasting_name, snippet,
};

const NAME: &str = env!("CARGO_PKG_NAME");
const NAME_MAX: usize = 64;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "The common options that say which lattice it is (--nats, --lattice, --station, --config, --agents, --data-dir, --log) \
                        become arguments of the entry.\n\nThe file as it was is kept; exit code 1 means that nothing was changed, 4 that the \
                        client's file is broken."
)]
pub(super) struct Args {
    /// Where to register; without one, every client is listed with what it has of ours
    #[arg(value_name = "CLIENT", value_parser = client_parser())]
    clients: Vec<Client>,
    /// Every client that is found on this machine
    #[arg(long, conflicts_with = "clients")]
    all_found: bool,
    /// Show the entry and where it belongs, and write nothing
    #[arg(long)]
    print: bool,
    /// The entry calls a server that runs already, such as :8765, instead of starting one
    #[arg(long, value_name = "URL")]
    http: Option<String>,
    /// The variable with the token that the client sends to --http
    #[arg(long, value_name = "VARIABLE", requires = "http", value_parser = parse_variable)]
    token_env: Option<String>,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, clap::Args)]
pub(super) struct Removal {
    /// Where to take it out
    #[arg(value_name = "CLIENT", value_parser = client_parser(), required_unless_present = "all")]
    clients: Vec<Client>,
    /// Every entry of this program in every client, of the user and of this folder
    #[arg(long, conflicts_with_all = ["clients", "name", "scope", "force"])]
    all: bool,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, clap::Args)]
struct Target {
    /// The entry's name
    #[arg(long, value_name = "NAME", default_value = NAME, value_parser = parse_name)]
    name: String,
    /// Whose entry: the user's, or that of everybody who works in this folder
    #[arg(long, value_name = "user|project", default_value = "user", value_parser = scope_parser(), hide_possible_values = true)]
    scope: Scope,
    /// Also if an entry of that name is somebody else's
    #[arg(long)]
    force: bool,
}

/// The common flags that an entry takes along.
pub(super) struct Carried {
    args: Vec<String>,
}

impl Carried {
    /// The flags as arguments that mean the same in every folder.
    pub(super) fn of(common: &Common) -> Result<Self, Failure> {
        let cwd = std::env::current_dir().unwrap_or_default();
        let absolute = |path: &str| match path.starts_with("~/") {
            true => path.to_owned(),
            false => cwd.join(path).to_string_lossy().into_owned(),
        };
        let config = match common.config.as_deref().map(Path::to_str) {
            Some(None) => return Err(Failure::new(Exit::Usage, "--config: a client's file cannot hold a path that is not UTF-8")),
            Some(Some(path)) => Some(absolute(path)),
            None => None,
        };
        let flags = [
            ("--config", config),
            ("--data-dir", common.data_dir.as_deref().map(absolute)),
            ("--lattice", common.lattice.clone()),
            ("--station", common.station.clone()),
            ("--nats", common.nats.clone()),
            ("--log", common.log.clone().filter(|filter| !filter.is_empty())),
        ];
        let mut args: Vec<String> = Vec::new();
        flags.into_iter().filter_map(|(flag, value)| Some([flag.to_owned(), value?])).for_each(|pair| args.extend(pair));
        common.agents.iter().for_each(|dir| args.extend(["--agents".to_owned(), absolute(dir)]));
        Ok(Self { args })
    }
}

pub(super) fn run(session: &mut Session, args: Args, carried: Carried) -> Result<(), Failure> {
    let here = Here::new(session);
    if args.clients.is_empty() && !args.all_found {
        return list(session, &here);
    }
    let server = server(session, &args, carried)?;
    let clients: Vec<Client> = match args.all_found {
        true => Client::ALL.into_iter().filter(|client| is_found(*client, &here.around())).collect(),
        false => args.clients,
    };
    if clients.is_empty() {
        let next = "lattice-mcp install CLIENT registers in one that is still to come";
        return Err(Failure::new(Exit::NotFound, format!("no client was found on this machine: {next}")));
    }
    let target = &args.target;
    if args.print {
        let shown: Result<Vec<_>, Failure> = clients.iter().map(|client| here.order(*client, target, &server)).collect();
        return print(session, &shown?);
    }
    let installer = installer()?;
    let install = |client: Client| -> Result<Done, Failure> { Ok(installer.install(&here.order(client, target, &server)?)?) };
    let outcomes = clients.into_iter().map(|client| (client, target.scope, target.name.clone(), install(client))).collect();
    report(session, outcomes)
}

pub(super) fn undo(session: &mut Session, args: Removal) -> Result<(), Failure> {
    let here = Here::new(session);
    let installer = installer()?;
    let mut outcomes = Vec::new();
    if args.all {
        for place in here.places() {
            for name in installer.look(&place).entries {
                let done = installer.uninstall(&place, &name, false).map_err(Failure::from);
                outcomes.push((place.client, place.scope, name, done));
            }
        }
        if outcomes.is_empty() && !session.screen.json {
            return Ok(session.screen.line("no client has an entry of this program")?);
        }
        return report(session, outcomes);
    }
    let target = &args.target;
    for client in args.clients {
        let done = here
            .place(client, target.scope)
            .and_then(|place| installer.uninstall(&place, &target.name, target.force).map_err(Failure::from));
        outcomes.push((client, target.scope, target.name.clone(), done));
    }
    report(session, outcomes)
}

/// What the places of files depend on, in this process.
struct Here {
    env: BTreeMap<String, String>,
    project: PathBuf,
}

impl Here {
    fn new(session: &Session) -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        Self { env: std::env::vars_os().filter_map(text).collect(), project: session.cwd.clone() }
    }

    fn around(&self) -> Around<'_> {
        Around { platform: Platform::here(), env: &self.env, project: &self.project, exists: &|path: &Path| path.exists() }
    }

    fn place(&self, client: Client, scope: Scope) -> Result<Place, Failure> {
        let file = file_of(client, scope, &self.around());
        let file = file.map_err(|reason| Failure::new(Exit::Usage, format!("{}: {reason}", client.title())))?;
        Ok(Place { client, scope, file })
    }

    /// Every place that there is, of the user and of this folder.
    fn places(&self) -> impl Iterator<Item = Place> {
        let both = Client::ALL.into_iter().flat_map(|client| [(client, Scope::User), (client, Scope::Project)]);
        both.filter_map(|(client, scope)| self.place(client, scope).ok())
    }

    fn order(&self, client: Client, target: &Target, server: &Server) -> Result<Order, Failure> {
        let place = self.place(client, target.scope)?;
        let order = Order::new(place, &target.name, server, target.force);
        order.map_err(|lack| Failure::new(Exit::Usage, format!("{}: {lack}", client.title())))
    }
}

fn installer() -> Result<Installer, Failure> {
    let none = || Failure::new(Exit::Failed, "HOME is not set, and the file as it was could be kept nowhere");
    // No lattice can have this name, and take the folder for its own.
    Ok(Installer::new(user_data_dir().ok_or_else(none)?.join("clients.d")))
}

/// How clients are to reach us.
fn server(session: &Session, args: &Args, carried: Carried) -> Result<Server, Failure> {
    let usage = |text: String| Err(Failure::new(Exit::Usage, text));
    for flag in ["http.token_file", "http.allowed_origins"] {
        if let Some(crate::config::Origin::Flag(flag)) = session.loaded.origin.get(flag) {
            return usage(format!("{flag} is for a server over HTTP, and an entry starts none: leave it out"));
        }
    }
    let Some(http) = &args.http else {
        let secret = carried.args.iter().find(|value| without_password(value) != **value);
        if let Some(secret) = secret {
            let next = "put the password into a configuration file as lattice.nats.auth, and name that with --config";
            return usage(format!("{} would stand in the clients' files for everybody who reads them: {next}", without_password(secret)));
        }
        let args = std::iter::once("--stdio".to_owned()).chain(carried.args).collect();
        return Ok(Server::Stdio { command: program(&session.cwd)?, args });
    };
    if let Some(flag) = carried.args.first() {
        return usage(format!("{flag} belongs to the server at {http}, which runs already: leave it out here"));
    }
    let url = match http.strip_prefix(':') {
        Some(port) => format!("http://127.0.0.1:{port}/mcp"),
        None => http.clone(),
    };
    let parsed: Option<http::Uri> = url.parse().ok().filter(|url: &http::Uri| matches!(url.scheme_str(), Some("http" | "https")));
    let Some(parsed) =
        parsed.filter(|url| url.authority().is_some_and(|authority| authority.port_u16().is_some() || authority.port().is_none()))
    else {
        return usage(format!("--http {http:?} is no address of a server: it looks like http://127.0.0.1:8765/mcp, or :8765"));
    };
    if parsed.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        let next = "name a variable that holds the token: --token-env LATTICE_HTTP_TOKEN";
        return usage(format!("--http {}: a password does not belong into a client's file; {next}", without_password(http)));
    }
    Ok(Server::Http { url, token_env: args.token_env.clone() })
}

/// Where this program is, for somebody who starts it from anywhere.
fn program(cwd: &Path) -> Result<String, Failure> {
    let failed = |reason: String| Failure::new(Exit::Failed, format!("where this program is cannot be told: {reason}"));
    let program = std::env::current_exe().and_then(|path| path.canonicalize()).map_err(|error| failed(error.to_string()))?;
    let path = std::env::var("PATH").unwrap_or_default();
    let lasting = lasting_name(&program, &path, cwd);
    lasting.into_os_string().into_string().map_err(|path| failed(format!("{} is not UTF-8", path.display())))
}

fn list(session: &mut Session, here: &Here) -> Result<(), Failure> {
    let installer = installer()?;
    let mut rows = Vec::new();
    for client in Client::ALL {
        for scope in [Scope::User, Scope::Project] {
            let Ok(place) = here.place(client, scope) else { continue };
            let seen = installer.look(&place);
            // A folder is asked only for what it has.
            if scope == Scope::User || !seen.entries.is_empty() {
                rows.push((place, is_found(client, &here.around()), seen));
            }
        }
    }
    if session.screen.json {
        let row = |(place, found, seen): &(Place, bool, crate::install::Seen)| {
            json!({
                "client": place.client.name(), "scope": word_of(place.scope), "found": found, "entries": seen.entries,
                "file": place.file, "problem": seen.problem,
            })
        };
        return Ok(session.screen.json(&rows.iter().map(row).collect::<Value>())?);
    }
    let mut table = Table::new(["CLIENT", "FOUND", "REGISTERED AS", "FILE"]).cut("FILE");
    for (place, found, seen) in &rows {
        let entries = match (&seen.problem, seen.entries.is_empty()) {
            (Some(_), _) => "?".to_owned(),
            (None, true) => "-".to_owned(),
            (None, false) => seen.entries.join(", "),
        };
        let found = if *found { "yes" } else { "no" };
        table.row([place.client.name().to_owned(), found.to_owned(), entries, place.file.display().to_string()]);
    }
    session.screen.table(&table)?;
    for (_, _, seen) in &rows {
        if let Some(problem) = &seen.problem {
            session.screen.line(problem)?;
        }
    }
    Ok(session.screen.line("register with lattice-mcp install CLIENT, take out with lattice-mcp uninstall CLIENT")?)
}

fn print(session: &mut Session, orders: &[Order]) -> Result<(), Failure> {
    let text = |order: &Order| snippet(order.place.client, &order.name, &order.entry);
    if session.screen.json {
        let shown = |order: &Order| json!({"client": order.place.client.name(), "file": order.place.file, "snippet": text(order), "entry": order.entry.to_value()});
        return Ok(session.screen.json(&orders.iter().map(shown).collect::<Value>())?);
    }
    for order in orders {
        session.screen.line(&format!("{}, in {}:", order.place.client.title(), order.place.file.display()))?;
        text(order).lines().try_for_each(|line| session.screen.line(line))?;
    }
    Ok(())
}

type Outcome = (Client, Scope, String, Result<Done, Failure>);

/// Says what was done; one that failed does not keep the others.
fn report(session: &mut Session, outcomes: Vec<Outcome>) -> Result<(), Failure> {
    let all = outcomes.len();
    let (mut shown, mut failures) = (Vec::new(), Vec::new());
    for (client, scope, name, outcome) in outcomes {
        let done = match outcome {
            Ok(done) => done,
            Err(failure) => {
                shown.push(
                    json!({"client": client.name(), "scope": word_of(scope), "name": name, "change": "failed", "reason": failure.reason()}),
                );
                failures.push(failure);
                continue;
            }
        };
        let change = word(done.change);
        shown.push(json!({
            "client": client.name(), "scope": word_of(scope), "name": name, "change": change, "file": done.file, "backup": done.backup,
        }));
        if session.screen.json {
            continue;
        }
        let (title, file) = (client.title(), done.file.display());
        session.screen.line(&match done.change {
            Change::Added => format!("{title}: added {name} to {file}"),
            Change::Updated => format!("{title}: updated {name} in {file}"),
            Change::Kept => format!("{title}: {name} is in {file} already"),
            Change::Removed => format!("{title}: took {name} out of {file}"),
            Change::Absent => format!("{title}: there is no {name} in {file}"),
        })?;
        if let Some(backup) = &done.backup {
            session.screen.line(&format!("  as it was: {}", backup.display()))?;
        }
        if matches!(done.change, Change::Added | Change::Updated) {
            session.screen.line(&format!("  next: {}", client.next_step(scope)))?;
        }
    }
    if session.screen.json && (all > 1 || failures.is_empty()) {
        session.screen.json(&Value::Array(shown))?;
    }
    match failures.len() {
        0 => Ok(()),
        1 => Err(failures.remove(0)),
        many => {
            let reasons: Vec<String> = failures.iter().map(Failure::reason).collect();
            Err(Failure::new(Exit::Failed, format!("{many} of {all} clients were left as they are: {}", reasons.join("; "))))
        }
    }
}

fn word(change: Change) -> &'static str {
    match change {
        Change::Added => "added",
        Change::Updated => "updated",
        Change::Kept => "kept",
        Change::Removed => "removed",
        Change::Absent => "absent",
    }
}

fn word_of(scope: Scope) -> &'static str {
    match scope {
        Scope::User => "user",
        Scope::Project => "project",
    }
}

fn client_parser() -> impl TypedValueParser<Value = Client> {
    PossibleValuesParser::new(Client::ALL.map(Client::name)).try_map(|name| Client::named(&name).ok_or("no such client"))
}

fn scope_parser() -> impl TypedValueParser<Value = Scope> {
    PossibleValuesParser::new(["user", "project"]).map(|name| if name == "project" { Scope::Project } else { Scope::User })
}

/// What every client takes for a name.
fn parse_name(name: &str) -> Result<String, String> {
    let odd = name.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_')));
    match odd {
        Some(odd) => Err(format!("{odd:?} cannot stand in a name: letters, digits, - and _ can")),
        None if name.is_empty() || name.len() > NAME_MAX => Err(format!("a name has 1 to {NAME_MAX} characters")),
        None => Ok(name.to_owned()),
    }
}

fn parse_variable(name: &str) -> Result<String, String> {
    let fits =
        name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if fits { Ok(name.to_owned()) } else { Err("it is the name of a variable, such as LATTICE_HTTP_TOKEN, and never the token".into()) }
}
