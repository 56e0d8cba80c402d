//! `station`: who else may join a lattice whose server is ours.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::failure::{Exit, Failure};
use super::session::Session;
use crate::config::{self, Nats, NatsAuth, Secret};
use crate::model::id::StationId;
use crate::transport::nats::embedded::{self, Guest, Permissions, Plan};
use crate::transport::nats::{self, connect};

/// How long our server may take to start, and to let somebody new in.
const SERVER_MAX: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(200);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Let another station join this lattice's own server, and print what to paste there
    Add(Add),
    /// Shut a station out again
    Remove {
        /// The station
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// List the stations that were let in
    List,
}

#[derive(Debug, clap::Args)]
struct Add {
    /// The new station's name
    #[arg(value_name = "NAME")]
    name: String,
    /// This machine, as the other one calls it [default: the server's address, or the host's name]
    #[arg(long, value_name = "HOST")]
    host: Option<String>,
    /// With all rights, for a machine that assigns work as well
    #[arg(long)]
    full: bool,
    /// Give a station that was added before a new password
    #[arg(long)]
    replace: bool,
    /// Write a configuration for the other machine instead of printing a line with the password
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
}

pub(super) async fn run(session: &mut Session, args: Args) -> Result<(), Failure> {
    let setting = session.setting();
    let config = &setting.config;
    let plan = Plan::new(config, &setting.lattice_dir()?);
    match args.verb {
        Verb::Add(add) => self::add(session, &plan, add).await,
        Verb::Remove { name } => {
            let name = parse(&name)?;
            if !plan.dismiss(&name)? {
                return Err(Failure::new(Exit::NotFound, format!("station {name} was never added: see lattice-mcp station list")));
            }
            match session.screen.json {
                true => session.screen.json(&json!({"removed": name}))?,
                false => session.screen.line(&format!("the server lets station {name} in no more"))?,
            }
            Ok(())
        }
        Verb::List => {
            let guests = plan.guests();
            match (session.screen.json, guests.is_empty()) {
                (true, _) => session.screen.json(&json!(guests))?,
                (false, true) => session.screen.line("no station was added yet: lattice-mcp station add NAME")?,
                (false, false) => guests.iter().try_for_each(|guest| session.screen.line(guest.as_str()))?,
            }
            Ok(())
        }
    }
}

fn parse(name: &str) -> Result<StationId, Failure> {
    name.parse().map_err(|error| Failure::new(Exit::Usage, format!("{error}")))
}

async fn add(session: &mut Session, plan: &Plan, add: Add) -> Result<(), Failure> {
    let setting = session.setting();
    let lattice = &setting.config.lattice;
    let station = parse(&add.name)?;
    let permissions = (!add.full).then(|| Permissions::of_leaf(&lattice.id, &station));
    let guest = Guest::new(&station, permissions);
    if !lattice.nats.is_embedded() {
        let reason = match &lattice.nats.url {
            Some(url) => format!(
                "the server of lattice {} is not ours but {}: give it this user yourself, with a password of yours:\n{}",
                lattice.id,
                config::without_password(url),
                serde_json::to_string_pretty(&json!({"user": guest.user, "permissions": guest.permissions})).unwrap_or_default(),
            ),
            None => format!(
                "lattice {} has no server that another machine could join: set lattice.nats.url to embedded (--nats embedded), and call this again",
                lattice.id
            ),
        };
        return Err(Failure::new(Exit::Configuration, reason));
    }
    if plan.guests().contains(&station) && !add.replace {
        let text =
            format!("station {station} was added before: --replace gives it a new password, lattice-mcp station remove {station} ends it");
        return Err(Failure::new(Exit::Failed, text));
    }
    let host = add.host.clone().unwrap_or_else(|| plan.host());
    // It is pasted into a shell and a URL.
    if host.is_empty() || !host.chars().all(|c| c.is_ascii_alphanumeric() || ".-_[]:".contains(c)) {
        return Err(Failure::new(Exit::Usage, format!("--host {host:?} is no name or address of a machine")));
    }
    admit(&setting, plan, &station, &guest).await?;
    let port = plan.port();
    let url = format!("nats://{}:{}@{host}:{port}", guest.user, guest.password);
    let line = format!("LATTICE_NATS_URL='{url}' lattice-mcp leaf --lattice {} --station {station}", lattice.id);
    let command = match &add.write {
        None => line,
        Some(path) => {
            let yaml = format!(
                "# How station {station} joins lattice {}. It holds a password.\nlattice:\n  id: \"{}\"\n  station: \"{station}\"\n  nats:\n    \
                 url: nats://{host}:{port}\n    auth: {{ user: \"{station}\", password: \"{}\" }}\n",
                lattice.id, lattice.id, guest.password
            );
            let written = embedded::write_private(path, yaml.as_bytes());
            written.map_err(|error| Failure::new(Exit::Failed, format!("{} cannot be written: {error}", path.display())))?;
            format!("lattice-mcp leaf --config {}", path.display())
        }
    };
    if plan.is_loopback() {
        tracing::warn!(
            "the server listens on this machine's loopback only, which other machines cannot reach: set lattice.embedded_nats.address (such as 0.0.0.0), \
             start this lattice's stations again, and see that {host} is a name by which the other machine knows this one"
        );
    }
    if session.screen.json {
        let password = add.write.is_none().then_some(&guest.password);
        let shown = json!({"station": station, "host": host, "port": port, "password": password, "full": add.full, "command": command, "file": add.write});
        return Ok(session.screen.json(&shown)?);
    }
    match &add.write {
        None => session.screen.line(&command)?,
        Some(path) => session.screen.line(&format!("wrote {}; take it to the other machine, and there: {command}", path.display()))?,
    }
    Ok(())
}

/// Lets the station in, and does not return before it has found the door open.
async fn admit(setting: &crate::station::Setting, plan: &Plan, station: &StationId, guest: &Guest) -> Result<(), Failure> {
    let lattice = &setting.config.lattice;
    let before = std::fs::read(plan.guest_file(station)).ok();
    plan.admit(station, guest)?;
    let (known, mut settings) = watch::channel(None::<Nats>);
    let (trouble, mut troubles) = watch::channel(None::<Arc<str>>);
    let cancel = CancellationToken::new();
    // Beside a station that runs it is one of those who share the server, else it starts it for this moment.
    let member = embedded::Member::join(plan.clone(), known, trouble)?;
    let running = tokio::task::spawn_blocking({
        let cancel = cancel.clone();
        move || member.run(&cancel)
    });
    let why = Mutex::new(String::new());
    let again = |reason: String| {
        tracing::debug!(reason, "the server is not ready");
        *why.lock().unwrap_or_else(PoisonError::into_inner) = format!(": {reason}");
        tokio::time::sleep(PAUSE)
    };
    let work = async {
        let settings = tokio::select! {
            known = settings.wait_for(Option::is_some) => known.ok().and_then(|known| known.clone()),
            trouble = troubles.wait_for(Option::is_some) => {
                return Err(trouble.ok().and_then(|trouble| trouble.as_deref().map(str::to_owned)).unwrap_or_default());
            }
        };
        let settings = settings.ok_or("the server did not start")?;
        let me = nats::Member {
            lattice: lattice.id.clone(),
            station: setting.config.station(),
            blob_max_age: lattice.storage.blob_max_age.get(),
        };
        while let Err(reason) = nats::provide(&me, &settings, station).await {
            again(reason).await;
        }
        let auth = NatsAuth { user: Some(guest.user.clone()), password: Some(Secret::new(&*guest.password)), ..NatsAuth::default() };
        let as_guest = Nats { auth, ..settings };
        let inbox = crate::transport::Wire::new(lattice.id.clone()).inbox(station);
        while let Err(error) = connect::connect(&as_guest, "lattice-mcp station add", &inbox).await {
            again(error.to_string()).await;
        }
        Ok(())
    };
    let ended = tokio::time::timeout(SERVER_MAX, work).await.unwrap_or_else(|_| {
        let why = why.lock().unwrap_or_else(PoisonError::into_inner);
        Err(format!("the server did not let the station in in time{why}"))
    });
    cancel.cancel();
    let _ = running.await;
    if let Err(reason) = ended {
        // As it was.
        match before {
            Some(bytes) => _ = embedded::write_private(&plan.guest_file(station), &bytes),
            None => _ = plan.dismiss(station),
        }
        return Err(Failure::new(Exit::Failed, format!("station {station} was not added: {reason}")));
    }
    Ok(())
}
