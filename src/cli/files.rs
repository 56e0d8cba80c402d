//! How many files this process may have open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Agents' programs inherit the limit, and some programs walk through all that it allows: more than is needed here only slows them.
const WANTED: u64 = 65_536;
/// What systems give that refuse that much.
const MODEST: u64 = 10_240;

/// Asks for as many as a server needs: connections, agents and the store live on them, and most systems start programs with few.
pub(super) fn raise() {
    let Rlimit { current: Some(current), maximum } = getrlimit(Resource::Nofile) else { return };
    for wanted in [WANTED, MODEST].map(|wanted| maximum.map_or(wanted, |maximum| wanted.min(maximum))) {
        if wanted <= current {
            return;
        }
        match setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum }) {
            Ok(()) => return,
            Err(error) => tracing::debug!(%error, wanted, current, "the limit of open files stays as it is"),
        }
    }
}
