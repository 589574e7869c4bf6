//! Runs histories, each in a process of its own: what one leaves behind in statics must not reach the next.
#![allow(unsafe_code, reason = "fork, waitpid and _exit are calls of the C library")]

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::history::{History, Violation};
use super::planted::Bug;
use super::world::World;
use super::{entropy, host};

/// How long one history may take, in seconds of processor time, before it counts as one that never ends.
const CPU_LIMIT_SECONDS: u64 = 20;

/// How a history went.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its seed.
    pub seed: u64,
    /// A hash of everything that happened; the same for the same seed and program.
    pub hash: u64,
    /// How many things happened.
    pub events: u64,
    /// The first breach of an invariant, if there was one.
    pub violation: Option<Violation>,
    /// The last of what happened.
    pub tail: Vec<String>,
}

/// Lives through one history in this process. Call it once in a process: see [`run`].
fn live(seed: u64, bug: Option<Bug>, dir: &Path, prints: bool) -> Outcome {
    entropy::begin(seed);
    host::watch_crash_points();
    let history = History::new(prints);
    let mut world = World::new(seed, bug, dir, history.clone());
    world.run();
    drop(world);
    let (hash, events, violation, tail) = history.end();
    Outcome { seed, hash, events, violation, tail }
}

/// A history in a process of its own, begun and not yet ended.
pub struct Started {
    seed: u64,
    pid: libc::pid_t,
    answer: fs::File,
    dir: PathBuf,
}

/// Begins a history in a process of its own. This process should have no other threads that hold locks.
///
/// # Errors
/// No process can be made, or no directory.
pub fn start(seed: u64, bug: Option<Bug>, prints: bool) -> io::Result<Started> {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let mut fds = [0; 2];
    // SAFETY: there is room for two descriptors.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both were just made and belong to nobody else.
    let (reader, writer) = unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
    // The path has no part in what happens: it is as long for every seed.
    let dir = place.join(format!("hypervisor-sim-{:010}-{seed:020}", std::process::id()));
    fs::create_dir_all(&dir)?;
    // SAFETY: the child uses nothing that another thread may hold: it runs on this thread only, and allocates with
    // the C library's allocator, which is safe after a fork.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(reader);
            let limit = libc::rlimit { rlim_cur: CPU_LIMIT_SECONDS, rlim_max: CPU_LIMIT_SECONDS };
            // SAFETY: the limit is valid.
            unsafe { libc::setrlimit(libc::RLIMIT_CPU, &raw const limit) };
            let outcome = std::panic::catch_unwind(|| live(seed, bug, &dir, prints));
            let code = match outcome {
                Ok(outcome) => {
                    i32::from(fs::File::from(writer).write_all(encode(&outcome).as_bytes()).is_err())
                }
                Err(_) => 2,
            };
            let _ = io::stdout().flush();
            // SAFETY: it ends the child and nothing else; the parent's buffers are not written a second time.
            unsafe { libc::_exit(code) }
        }
        pid => Ok(Started { seed, pid, answer: reader.into(), dir }),
    }
}

impl Started {
    /// Waits for its end.
    ///
    /// # Errors
    /// What it answered cannot be read.
    pub fn wait(mut self) -> io::Result<Outcome> {
        let mut text = String::new();
        self.answer.read_to_string(&mut text)?;
        let mut status = 0;
        // SAFETY: it is a child of this process that nobody else waits for.
        unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
        fs::remove_dir_all(&self.dir)?;
        Ok(decode(self.seed, &text).unwrap_or_else(|| Outcome {
            seed: self.seed,
            hash: 0,
            events: 0,
            violation: Some(Violation {
                invariant: 5,
                what: format!(
                    "the history did not end (status {status:#x}): a panic, or more than {CPU_LIMIT_SECONDS} s"
                ),
            }),
            tail: Vec::new(),
        }))
    }
}

fn encode(outcome: &Outcome) -> String {
    json!({
        "hash": outcome.hash,
        "events": outcome.events,
        "invariant": outcome.violation.as_ref().map(|v| v.invariant),
        "what": outcome.violation.as_ref().map(|v| &v.what),
        // Only a failure is worth its lines.
        "tail": outcome.violation.as_ref().map(|_| &outcome.tail),
    })
    .to_string()
}

fn decode(seed: u64, text: &str) -> Option<Outcome> {
    let value: Value = serde_json::from_str(text).ok()?;
    let lines = value["tail"].as_array().cloned().unwrap_or_default();
    let violation = value["invariant"].as_u64().map(|invariant| Violation {
        invariant: u8::try_from(invariant).unwrap_or_default(),
        what: value["what"].as_str().unwrap_or_default().to_owned(),
    });
    Some(Outcome {
        seed,
        hash: value["hash"].as_u64()?,
        events: value["events"].as_u64()?,
        violation,
        tail: lines.iter().filter_map(|line| line.as_str().map(str::to_owned)).collect(),
    })
}

/// One history from its begin to its end.
///
/// # Errors
/// No process can be made.
pub fn run(seed: u64, bug: Option<Bug>, prints: bool) -> io::Result<Outcome> {
    start(seed, bug, prints)?.wait()
}

/// Histories of these seeds, `jobs` at a time; `each` sees them in the order of the seeds and says whether to go on.
///
/// # Errors
/// No process can be made.
pub fn run_all(
    seeds: std::ops::Range<u64>,
    jobs: usize,
    bug: Option<Bug>,
    mut each: impl FnMut(Outcome) -> bool,
) -> io::Result<()> {
    let mut running = std::collections::VecDeque::new();
    let mut seeds = seeds;
    loop {
        while running.len() < jobs.max(1) {
            let Some(seed) = seeds.next() else { break };
            running.push_back(start(seed, bug, false)?);
        }
        let Some(first) = running.pop_front() else { return Ok(()) };
        if !each(first.wait()?) {
            break;
        }
    }
    running.into_iter().try_for_each(|started| started.wait().map(drop))
}
