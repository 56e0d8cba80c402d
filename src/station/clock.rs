//! The clock that all processes of a folder go by: who has not reached the server yet corrects it as the others do, or what they
//! wrote of the same work would stand an hour apart.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::telemetry::{clock_correction, correct_clock};

/// By how many milliseconds the processes of this folder correct this machine's clock.
const FILE: &str = "clock";
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// No clock is wrong by more than a hundred years.
const WRONG_MAX_MS: i64 = 100 * 365 * 86_400_000;

/// Corrects this process's clock as the folder says; gives what it says.
pub(super) fn adopt(dir: &Path) -> i64 {
    let Some(correction) = kept(std::fs::read_to_string(dir.join(FILE))) else { return 0 };
    correct_clock(correction);
    correction
}

/// Tells the folder how this process corrects its clock, and corrects it as others tell; `known` is what it said last.
pub(super) async fn share(dir: &Path, mut known: i64, cancel: CancellationToken) {
    loop {
        let said = kept(tokio::fs::read_to_string(dir.join(FILE)).await).unwrap_or(0);
        let own = clock_correction();
        if own != known {
            known = own;
            if own != said
                && let Err(error) = keep(dir, own).await
            {
                tracing::warn!(%error, "others of this folder cannot be told how far this machine's clock is off");
            }
        } else if said != known {
            known = said;
            correct_clock(said);
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

fn kept(text: io::Result<String>) -> Option<i64> {
    text.ok()?.trim().parse().ok().filter(|correction: &i64| correction.saturating_abs() <= WRONG_MAX_MS)
}

async fn keep(dir: &Path, correction: i64) -> io::Result<()> {
    let draft = dir.join(format!("{FILE}.{}", std::process::id()));
    tokio::fs::write(&draft, correction.to_string()).await?;
    tokio::fs::rename(&draft, dir.join(FILE)).await
}
