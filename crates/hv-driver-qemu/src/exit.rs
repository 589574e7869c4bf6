//! How it came that a QEMU process is gone, read from what it left behind.
//!
//! # Theory of operation
//! QEMU writes its events to `events.log` itself, so the reason is known even if no agent watched. A powerdown that we
//! asked for shows there too, which tells a guest that was stopped from one that powered off by itself. Before we kill,
//! the exit is written down, because a killed process says nothing.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::process::ExitStatus;

use hv_driver::Exit;
use serde_json::Value;

use crate::files::{EVENTS, EXIT, InstanceDir, PID, RUN, STDERR, StoredExit, StoredRun};
use crate::problem::Outcome;

/// How much of the end of a log is looked at.
const TAIL_BYTES: u64 = 64 << 10;
/// How many lines of QEMU's complaints a reason repeats.
const REASON_LINES: usize = 3;

/// How the last run ended; asked only when nothing runs.
pub(crate) fn last_exit(dir: &InstanceDir) -> Outcome<Exit> {
    let Some(run) = dir.read::<StoredRun>(RUN)? else { return Ok(Exit::NeverStarted) };
    let before = dir.read::<StoredExit>(EXIT)?;
    match before {
        Some(known) if known.run == run.number => Ok(known.exit),
        earlier => {
            let earlier = earlier.map_or(Exit::NeverStarted, |known| known.exit);
            Ok(classify(dir, None).unwrap_or(earlier))
        }
    }
}

/// How the present run ended; `None` if it never began.
pub(crate) fn classify(dir: &InstanceDir, status: Option<ExitStatus>) -> Option<Exit> {
    let events = tail(&dir.file(EVENTS));
    if let Some(exit) = from_events(&events) {
        return Some(exit);
    }
    let complaint = complaint(dir);
    match status {
        Some(status) if status.success() => Some(Exit::Lost),
        Some(status) if complaint.is_empty() => Some(Exit::Failed(format!("qemu ended with {status}"))),
        Some(status) => Some(Exit::Failed(format!("qemu ended with {status}: {complaint}"))),
        // QEMU removes its pid file unless it is killed.
        None if dir.file(PID).exists() => Some(Exit::Lost),
        None if complaint.is_empty() => None,
        None => Some(Exit::Failed(complaint)),
    }
}

/// QEMU's last complaints, in one line.
pub(crate) fn complaint(dir: &InstanceDir) -> String {
    let text = tail(&dir.file(STDERR));
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(REASON_LINES)..].join("; ")
}

/// The meaning of the last `SHUTDOWN` event (qapi/run-state.json of QEMU: `ShutdownCause`).
fn from_events(log: &str) -> Option<Exit> {
    let mut asked = false;
    let mut exit = None;
    for line in log.lines() {
        let Ok(event) = serde_json::from_str::<Value>(line) else { continue };
        match event["event"].as_str() {
            Some("POWERDOWN") => asked = true,
            Some("SHUTDOWN") => {
                exit = Some(match event["data"]["reason"].as_str().unwrap_or_default() {
                    "guest-shutdown" if asked => Exit::Stopped,
                    "guest-shutdown" | "guest-reset" => Exit::Finished,
                    "guest-panic" => Exit::Failed("the guest panicked".to_owned()),
                    "host-qmp-quit" | "host-qmp-system-reset" => Exit::Stopped,
                    "host-error" => Exit::Failed("qemu met an error".to_owned()),
                    // Somebody else sent a signal; the host going down, as a rule.
                    _ => Exit::Lost,
                });
            }
            _ => {}
        }
    }
    exit
}

fn tail(path: &Path) -> String {
    let read = || {
        let mut file = fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    // What cannot be read tells nothing.
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_shutdown_event_tells_the_reason() {
        let shutdown =
            |reason: &str| format!("{{\"event\": \"SHUTDOWN\", \"data\": {{\"reason\": \"{reason}\"}}}}\n");
        let powerdown = "{\"event\": \"POWERDOWN\"}\n";
        let cases = [
            (String::new(), None),
            (format!("{{\"QMP\": {{}}}}\n{powerdown}"), None),
            (shutdown("guest-shutdown"), Some(Exit::Finished)),
            (powerdown.to_owned() + &shutdown("guest-shutdown"), Some(Exit::Stopped)),
            (shutdown("host-qmp-quit"), Some(Exit::Stopped)),
            (shutdown("host-signal"), Some(Exit::Lost)),
            (shutdown("guest-panic"), Some(Exit::Failed("the guest panicked".to_owned()))),
            (shutdown("guest-shutdown") + "half a li", Some(Exit::Finished)),
        ];
        for (log, expected) in cases {
            assert_eq!(from_events(&log), expected, "{log}");
        }
    }
}
