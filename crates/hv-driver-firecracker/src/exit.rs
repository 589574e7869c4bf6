//! How it came that a VMM is gone, read from what it left behind.
//!
//! # Theory of operation
//! Firecracker ends with status 0 when its guest resets the processor, and says so in its log, so the reason is known
//! even if no agent watched. That a guest was asked to end is written down before it is asked, which tells a guest that
//! was stopped from one that ended by itself; before a VMM is killed the exit is written down, because what is killed says
//! nothing.

use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::process::ExitStatus;

use hv_driver::Exit;
use rustix::fs::OFlags;

use crate::files::{ASKED, EXIT, InstanceDir, LOG, OfRun, RUN, STDERR, StoredExit, StoredRun, open_in_root};
use crate::problem::Outcome;

/// How much of the end of a log is looked at.
const TAIL_BYTES: u64 = 64 << 10;
/// How many complaints a reason repeats.
const REASON_LINES: usize = 3;

/// How the last run ended; asked only when nothing runs.
pub(crate) fn last_exit(dir: &InstanceDir, root: &Path) -> Outcome<Exit> {
    let Some(run) = dir.read::<StoredRun>(RUN)? else { return Ok(Exit::NeverStarted) };
    match dir.read::<StoredExit>(EXIT)? {
        Some(known) if known.run == run.number => Ok(known.exit),
        _ => classify(dir, root, run.number, None),
    }
}

/// How a run ended.
pub(crate) fn classify(
    dir: &InstanceDir,
    root: &Path,
    run: u64,
    status: Option<ExitStatus>,
) -> Outcome<Exit> {
    let was_asked = dir.read::<OfRun>(ASKED)?.is_some_and(|asked| asked.run == run);
    let log = tail(&root.join(LOG));
    let code = status.and_then(|status| status.code()).or_else(|| logged_code(&log));
    Ok(match (code, status) {
        (Some(0), _) if was_asked => Exit::Stopped,
        (Some(0), _) => Exit::Finished,
        (Some(code), _) => {
            Exit::Failed(with_reason(&format!("firecracker ended with exit code {code}"), dir, root))
        }
        (None, Some(status)) => {
            Exit::Failed(with_reason(&format!("firecracker ended with {status}"), dir, root))
        }
        // Killed, or the host restarted.
        (None, None) => Exit::Lost,
    })
}

fn with_reason(what: &str, dir: &InstanceDir, root: &Path) -> String {
    match complaint(dir, root) {
        complaint if complaint.is_empty() => what.to_owned(),
        complaint => format!("{what}: {complaint}"),
    }
}

/// The last line that Firecracker logs: "Firecracker exiting …. exit_code=N".
fn logged_code(log: &str) -> Option<i32> {
    let line = log.lines().rev().find(|line| line.contains("Firecracker exiting"))?;
    line.rsplit_once("exit_code=")?.1.trim().parse().ok()
}

/// The last complaints of the jailer and of Firecracker, in one line.
pub(crate) fn complaint(dir: &InstanceDir, root: &Path) -> String {
    let (stderr, log) = (tail(&dir.file(STDERR)), tail(&root.join(LOG)));
    let said = stderr.lines().map(str::trim);
    let logged =
        log.lines().filter(|line| line.contains(":ERROR]")).filter_map(|line| Some(line.split_once("] ")?.1));
    let lines: Vec<_> = said.chain(logged).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(REASON_LINES)..].join("; ")
}

fn tail(path: &Path) -> String {
    let read = || {
        let mut file = open_in_root(path, OFlags::RDONLY)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok::<_, io::Error>(bytes)
    };
    // What cannot be read tells nothing.
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_of_the_log_tells_the_exit_code() {
        let line = |code| {
            format!("2026-01-01T00:00:00 [vm:main:INFO] Firecracker exiting successfully. exit_code={code}\n")
        };
        assert_eq!(logged_code(""), None);
        assert_eq!(logged_code("Running Firecracker v1.12.1\n"), None);
        assert_eq!(logged_code(&line(0)), Some(0));
        assert_eq!(logged_code(&(line(0) + &line(148))), Some(148));
    }
}
