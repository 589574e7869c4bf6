//! The fencer's process: `hypervisor-agent fencer`, started by the agent, outliving it.
//!
//! # Theory of operation
//! One thread, no runtime: it waits (poll(2)) for the agent's messages, for the agent's end and for a timer that counts
//! suspended time too, and does what [`FencerCore`] says. It ends by itself when no agent lives and nothing is left to
//! be killed.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hv_driver::fence;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use super::LOCK;
use super::clock::{BootClock, Clock as _, Moment};
use super::core::{Action, FencerCore, Message, Reply};
use super::link::{frame, length, open_dir, socket_path};
use super::marks::Marks;

/// Longest wait without a look around.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// How long a fencer without an agent and without work waits for one.
const LINGER: Duration = Duration::from_secs(5);
/// How long an answer may take to be sent before the agent is given up.
const SEND_TIMEOUT: Duration = Duration::from_millis(500);
/// How much is read at once.
const READ_BYTES: usize = 64 << 10;
/// The highest ordinary priority (setpriority(2)).
const NICE: i32 = -20;

/// Why there is no fencer.
#[derive(Debug, thiserror::Error)]
pub enum FencerError {
    /// A file or directory cannot be used.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It was started by hand.
    #[error("the fencer is started by hypervisor-agent itself, with {} as its standard input", path.display())]
    NotByAgent {
        /// The lock.
        path: PathBuf,
    },
    /// There is one.
    #[error("a fencer has {} already", path.display())]
    Locked {
        /// The lock.
        path: PathBuf,
    },
    /// The system refuses what it lives on.
    #[error("cannot {action}")]
    System {
        /// What was attempted.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn system(action: &'static str) -> impl FnOnce(io::Error) -> FencerError {
    move |source| FencerError::System { action, source }
}

/// The agent at the other end.
struct Agent {
    process: OwnedFd,
    /// `None` when it hung up without having ended.
    stream: Option<UnixStream>,
    unread: Vec<u8>,
}

struct Fencer {
    core: FencerCore,
    clock: BootClock,
    marks: Marks,
    message: String,
    listener: UnixListener,
    timer: OwnedFd,
    agent: Option<Agent>,
    lonely_since: Instant,
}

/// Is the fencer of a state directory, until nothing is left to do.
///
/// # Errors
/// There is one already, or the system refuses what a fencer lives on.
pub fn run(state_dir: &Path) -> Result<(), FencerError> {
    let path = state_dir.join(super::DIRECTORY);
    let file = |action, path: &Path| {
        let path = path.to_owned();
        move |source| FencerError::File { action, path, source }
    };
    let dir = open_dir(&path).map_err(file("use", &path))?;
    take_lock(&path.join(LOCK))?;
    // A session of its own; where it leads one already, so be it.
    let _ = rustix::process::setsid();
    let message = raise();
    let socket = socket_path(&dir);
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).map_err(file("listen on", &path.join(super::link::SOCKET)))?;
    listener.set_nonblocking(true).map_err(system("set up the socket"))?;
    let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)
        .map_err(|e| system("make a timer")(e.into()))?;
    say(&format!("the fencer runs; {message}"));
    let mut fencer = Fencer {
        core: FencerCore::new(),
        clock: BootClock,
        marks: Marks::of(state_dir),
        message,
        listener,
        timer,
        agent: None,
        lonely_since: Instant::now(),
    };
    while !fencer.is_done() {
        fencer.wait()?;
        fencer.act();
    }
    let _ = fs::remove_file(&socket);
    say("no agent lives and nothing is left to be killed: the fencer ends");
    Ok(())
}

/// The lock is the standard input: whoever has it there *is* the fencer.
fn take_lock(path: &Path) -> Result<(), FencerError> {
    let stdin = io::stdin();
    let own = rustix::fs::fstat(stdin.as_fd()).ok().map(|stat| (stat.st_dev, stat.st_ino));
    let lock = fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
    if own.is_none() || own != lock {
        return Err(FencerError::NotByAgent { path: path.to_owned() });
    }
    rustix::fs::flock(stdin.as_fd(), FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| FencerError::Locked { path: path.to_owned() })
}

/// Asks for what keeps it able to act when the machine is short of everything. What is refused is told, and no reason
/// not to run.
fn raise() -> String {
    use rustix::mm::{MlockAllFlags, mlockall};
    let mut refused = Vec::new();
    if rustix::process::setpriority_process(None, NICE).is_err() {
        refused.push("no high priority (LimitNICE=-20)");
    }
    if mlockall(MlockAllFlags::CURRENT | MlockAllFlags::ONFAULT).is_err() {
        refused.push("its memory is not locked (LimitMEMLOCK=infinity)");
    }
    if fs::write("/proc/self/oom_score_adj", "-1000").is_err() {
        refused.push("the memory killer may take it (CAP_SYS_RESOURCE)");
    }
    // What it will need when it matters has been used once, and is in memory.
    let rehearsal = hv_driver::FenceTarget::LockHolder { path: "/proc/self/exe".into() };
    let _ = fence::may_run(&rehearsal);
    let _ = fs::read_dir("/proc").map(Iterator::count);
    match refused.is_empty() {
        true => "with high priority and locked memory".to_owned(),
        false => refused.join(", "),
    }
}

fn say(text: &str) {
    // A log that cannot be written must not keep it from its work.
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let _ = writeln!(io::stderr(), "{} {}: {text}", since.as_secs(), std::process::id());
}

impl Fencer {
    /// Nobody is there, and nothing is to be done; or the state directory itself is gone.
    fn is_done(&self) -> bool {
        let is_removed = rustix::fs::fstat(io::stdin().as_fd()).is_ok_and(|stat| stat.st_nlink == 0);
        let is_lonely = self.agent.is_none() && self.lonely_since.elapsed() >= LINGER;
        self.agent.is_none() && (is_removed || (is_lonely && self.core.is_idle()))
    }

    /// Waits for something to happen, and hears it.
    fn wait(&mut self) -> Result<(), FencerError> {
        self.set_timer()?;
        let longest = match &self.agent {
            None if self.core.is_idle() => LINGER.saturating_sub(self.lonely_since.elapsed()),
            _ => LOOK_EVERY,
        };
        let timeout =
            Timespec { tv_sec: longest.as_secs().cast_signed(), tv_nsec: longest.subsec_nanos().into() };
        let (connects, speaks, ended) = {
            let mut fds =
                vec![PollFd::new(&self.listener, PollFlags::IN), PollFd::new(&self.timer, PollFlags::IN)];
            if let Some(agent) = &self.agent {
                fds.push(PollFd::new(&agent.process, PollFlags::IN));
                fds.extend(agent.stream.as_ref().map(|stream| PollFd::new(stream, PollFlags::IN)));
            }
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(system("wait")(e.into())),
            }
            let is_ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
            (is_ready(0), is_ready(3), is_ready(2))
        };
        // Before anything is heard: a deadline that has passed has passed.
        self.act();
        if speaks {
            self.listen();
        }
        if ended {
            self.agent = None;
            self.lonely_since = Instant::now();
            self.core.agent_ended();
            say("the agent is gone");
        }
        if connects {
            self.accept();
        }
        Ok(())
    }

    fn set_timer(&self) -> Result<(), FencerError> {
        let at = self.core.next_wake().map_or(0, |at| at.0.max(1));
        let value = Timespec {
            tv_sec: (at / 1_000_000_000).cast_signed(),
            tv_nsec: (at % 1_000_000_000).cast_signed(),
        };
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        let when = Itimerspec { it_interval: none, it_value: value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &when)
            .map(drop)
            .map_err(|e| system("set the timer")(e.into()))
    }

    fn accept(&mut self) {
        let Ok((stream, _)) = self.listener.accept() else { return };
        let Some(agent) = Agent::behind(stream) else {
            return say("a stranger was turned away");
        };
        // One that was there before and lives is the same, or has lost its lock on the state directory.
        self.agent = Some(agent);
    }

    fn listen(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        let Some(stream) = &mut agent.stream else { return };
        let mut bytes = vec![0; READ_BYTES];
        let heard = match stream.read(&mut bytes) {
            Ok(count) if count > 0 => {
                agent.unread.extend_from_slice(&bytes[..count]);
                self.answer()
            }
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(e) => Err(e),
        };
        if heard.is_err()
            && let Some(agent) = &mut self.agent
        {
            // It may live on and start what it has announced: its end is still waited for.
            agent.stream = None;
        }
    }

    fn answer(&mut self) -> io::Result<()> {
        let Some(agent) = &mut self.agent else { return Ok(()) };
        while let Some((head, rest)) = agent.unread.split_first_chunk::<4>() {
            let length = length(*head)?;
            let Some(body) = rest.get(..length) else { break };
            let now: Moment = self.clock.now();
            let reply = match serde_json::from_slice::<Message>(body) {
                Ok(message) => self.core.hear(now, message),
                Err(error) => Reply::Refused { reason: format!("not understood: {error}") },
            };
            let reply = match reply {
                Reply::Standing(mut standing) => {
                    standing.message.clone_from(&self.message);
                    Reply::Standing(standing)
                }
                other => other,
            };
            agent.unread.drain(..4 + length);
            if let Some(stream) = &mut agent.stream {
                stream.write_all(&frame(&reply)?)?;
            }
        }
        Ok(())
    }

    /// Does what is due.
    fn act(&mut self) {
        let actions = self.core.tick(self.clock.now());
        let mut kills = Vec::new();
        for action in actions {
            match action {
                Action::Kill { id, target, zeal } => kills.push((id, target, zeal)),
                Action::EndAgent => self.end_agent(),
            }
        }
        if kills.is_empty() {
            return;
        }
        let targets: Vec<_> = kills.iter().map(|(_, target, zeal)| (target, *zeal)).collect();
        let outcomes = fence::kill_all(&targets);
        let mut over = Vec::new();
        for ((id, ..), outcome) in kills.iter().zip(&outcomes) {
            if self.core.tried(id, outcome) {
                over.push(id);
            } else {
                say(&format!("instance {id} is being killed: {outcome:?}"));
            }
        }
        // Last, because a disk may be slow.
        for id in over {
            say(&format!("the lease has ended: instance {id} does not run any more"));
            if let Err(error) = self.marks.mark(id, "fencer") {
                say(&format!("that instance {id} was fenced cannot be written down: {error}"));
            }
        }
    }

    /// It hangs in the middle of a start: only its end makes it certain that the start comes to nothing.
    fn end_agent(&mut self) {
        let Some(agent) = &self.agent else { return self.core.agent_ended() };
        say("the lease has ended in the middle of a start: the agent is ended");
        match pidfd_send_signal(&agent.process, Signal::KILL) {
            Ok(()) => {}
            Err(rustix::io::Errno::SRCH) => self.core.agent_ended(),
            Err(e) => say(&format!("the agent cannot be ended: {e}")),
        }
    }
}

impl Agent {
    /// The process at the other end, if it belongs to the same user.
    fn behind(stream: UnixStream) -> Option<Self> {
        let peer = rustix::net::sockopt::socket_peercred(&stream).ok()?;
        if peer.uid != rustix::process::geteuid() {
            return None;
        }
        let process =
            pidfd_open(Pid::from_raw(peer.pid.as_raw_nonzero().get())?, PidfdFlags::empty()).ok()?;
        stream.set_nonblocking(false).ok()?;
        stream.set_write_timeout(Some(SEND_TIMEOUT)).ok()?;
        Some(Self { process, stream: Some(stream), unread: Vec::new() })
    }
}
