//! The clock that all processes of a folder go by: who has not reached the server yet corrects it as the others do, or what they
//! wrote of the same work would stand an hour apart. A correction is of this machine's clock as it was: once that was set, or the
//! machine was started again, it says nothing any more.

use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio_util::sync::CancellationToken;

use crate::telemetry::{clock_correction, correct_clock, machine_now};

/// By how many milliseconds the processes of this folder correct this machine's clock, and when and how that one says it was started.
const FILE: &str = "clock";
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// No clock is wrong by more than a hundred years.
const WRONG_MAX_MS: i64 = 100 * 365 * 86_400_000;
/// A clock that says so much else of when its machine was started has been set.
const SET_MIN_MS: i64 = 1000;
/// How often two clocks are read until they are taken to be read at once.
const READS: usize = 8;
/// What tells one start of a machine from the next.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";
/// Runs on while the machine sleeps.
#[cfg(target_os = "linux")]
const UPTIME: ClockId = ClockId::Boottime;
#[cfg(not(target_os = "linux"))]
const UPTIME: ClockId = ClockId::Monotonic;

/// When this machine was started, by its own clock: another moment once that has been set.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Started {
    at_ms: i64,
    boot: String,
}

impl Started {
    fn look() -> Self {
        let boot = std::fs::read_to_string(BOOT).map(|text| text.trim().to_owned()).ok().filter(|id| !id.is_empty());
        Self { at_ms: started_ms(), boot: boot.unwrap_or_else(|| "-".to_owned()) }
    }

    fn look_again(&mut self) {
        self.at_ms = started_ms();
    }

    /// Whether the clock has not been set in between.
    fn is_as(&self, other: &Self) -> bool {
        self.boot == other.boot && self.at_ms.abs_diff(other.at_ms) < SET_MIN_MS.unsigned_abs()
    }
}

fn uptime_ms() -> i64 {
    let up = Duration::try_from(clock_gettime(UPTIME)).unwrap_or_default();
    i64::try_from(up.as_millis()).unwrap_or(i64::MAX)
}

fn started_ms() -> i64 {
    let read = |_| {
        let (before, wall, after) = (uptime_ms(), machine_now().as_millis(), uptime_ms());
        (after - before, wall - before)
    };
    // Whoever is put off between two readings sees another difference.
    (0..READS).map(read).min().map_or(0, |(_, started)| started)
}

/// How this process corrects its clock, and of what clock that is.
#[derive(Debug, Clone)]
pub(super) struct Known {
    correction: i64,
    of: Started,
}

/// Corrects this process's clock as the folder says.
pub(super) fn adopt(dir: &Path) -> Known {
    let of = Started::look();
    let said = std::fs::read_to_string(dir.join(FILE)).ok().and_then(|text| said(&text, &of));
    if let Some(correction) = said {
        correct_clock(correction);
    }
    Known { correction: said.unwrap_or(0), of }
}

/// Tells the folder how this process corrects its clock, and corrects it as others tell; `known` is how it did so at first.
pub(super) async fn share(dir: &Path, mut known: Known, cancel: CancellationToken) {
    let mut started = known.of.clone();
    loop {
        let text = tokio::fs::read_to_string(dir.join(FILE)).await;
        started.look_again();
        let (own, said) = (clock_correction(), text.ok().and_then(|text| said(&text, &started)));
        if own != known.correction {
            known = Known { correction: own, of: started.clone() };
            if own != said.unwrap_or(0)
                && let Err(error) = keep(dir, &known).await
            {
                tracing::warn!(%error, "others of this folder cannot be told how far this machine's clock is off");
            }
        } else if let Some(said) = said {
            known = Known { correction: said, of: started.clone() };
            if said != own {
                correct_clock(said);
            }
        } else if !started.is_as(&known.of) {
            // As whoever starts now goes by it: whoever reaches the server finds out soon how far off it is.
            known = Known { correction: 0, of: started.clone() };
            if own != 0 {
                correct_clock(0);
            }
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

/// How a file says to correct the clock of a machine that was started then; nothing, if it was kept of another clock.
fn said(text: &str, started: &Started) -> Option<i64> {
    let mut words = text.split_whitespace();
    let (correction, at_ms, boot) = (words.next()?.parse::<i64>().ok()?, words.next()?.parse().ok()?, words.next()?.to_owned());
    let is_sane = correction.saturating_abs() <= WRONG_MAX_MS && started.is_as(&Started { at_ms, boot });
    is_sane.then_some(correction)
}

async fn keep(dir: &Path, known: &Known) -> io::Result<()> {
    let draft = dir.join(format!("{FILE}.{}", std::process::id()));
    tokio::fs::write(&draft, known.to_string()).await?;
    tokio::fs::rename(&draft, dir.join(FILE)).await
}

impl std::fmt::Display for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.correction, self.of.at_ms, self.of.boot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_correction_is_of_the_clock_that_it_was_kept_of() {
        let of = Started { at_ms: 1_800_000_000_000, boot: "a".into() };
        let text = Known { correction: -3_600_000, of: of.clone() }.to_string();
        let at = |at_ms: i64, boot: &str| said(&text, &Started { at_ms, boot: boot.into() });
        assert_eq!(at(of.at_ms, "a"), Some(-3_600_000));
        assert_eq!(at(of.at_ms + 999, "a"), Some(-3_600_000));
        assert_eq!((at(of.at_ms + 3_600_000, "a"), at(of.at_ms - 1000, "a"), at(i64::MIN, "a")), (None, None, None), "it was set");
        assert_eq!(at(of.at_ms, "b"), None, "the machine was started again");
        // As an earlier version wrote it, and as nobody does.
        for text in ["3600000", "", "x 1800000000000 a", "3600000 x a", "9223372036854775807 1800000000000 a", "0 1800000000000"] {
            assert_eq!(said(text, &of), None, "{text}");
        }
    }

    #[test]
    fn a_machine_was_started_at_one_moment() {
        let (one, mut other) = (Started::look(), Started::look());
        other.look_again();
        assert!(one.is_as(&other), "{one:?} {other:?}");
        assert!(one.at_ms <= machine_now().as_millis());
    }
}
