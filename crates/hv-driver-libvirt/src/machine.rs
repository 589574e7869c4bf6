//! One virtual machine: what it is doing, and the operations on it.
//!
//! # Theory of operation
//! libvirtd knows whether it runs and is asked each time; the directory knows what libvirtd forgets: how the last run
//! ended, since when it runs, and that it was handed over. Changing operations hold `change`; reads do not wait for
//! them. While libvirtd is away the lock still tells whether the machine runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hv_driver::fence::{self, Zeal};
use hv_driver::{DriverError, DriverEvent, Exit, FenceTarget, StopMode};
use hv_machine::console::{ConsoleHub, end_of};
use hv_types::InstanceId;
use parking_lot::Mutex;
use tokio::sync::{broadcast, watch};

use crate::NAME;
use crate::console;
use crate::daemon::Daemon;
use crate::domain;
use crate::files::{
    CONSOLE, EXIT, InstanceDir, LOCK, MIGRATION, PERMIT, RUN, Stored, StoredExit, StoredMigration, StoredPhase,
    StoredRun, now_ms, write_atomically,
};
use crate::incoming::Relay;
use crate::link::Link;
use crate::node::Node;
use crate::problem::{Outcome, Problem};
use crate::rescue;

/// A guest that boots does not hear the power button yet, so it is pressed again.
const POWERDOWN_INTERVAL: Duration = Duration::from_secs(3);
/// How long a killed process may take to be gone; longer is a process stuck in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);
/// How often the lock is looked at meanwhile.
pub(crate) const LOCK_INTERVAL: Duration = Duration::from_millis(5);

/// What all machines of a driver share.
pub(crate) struct Shared {
    pub(crate) events: broadcast::Sender<DriverEvent>,
    pub(crate) link: Arc<Link>,
}

/// What is there for as long as it runs.
pub(crate) struct Live {
    pub(crate) console: ConsoleHub,
    end: watch::Sender<bool>,
}

impl Live {
    pub(crate) async fn gone_within(&self, timeout: Duration) -> bool {
        let mut ended = self.end.subscribe();
        tokio::time::timeout(timeout, end_of(&mut ended)).await.is_ok()
    }
}

/// What a look at it shows.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Seen {
    Running,
    Paused,
    HandedOver,
    Down(Exit),
}

/// A virtual machine that was completely created.
pub(crate) struct Machine {
    pub(crate) id: InstanceId,
    pub(crate) dir: Arc<InstanceDir>,
    stored: Mutex<Arc<Stored>>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) change: tokio::sync::Mutex<()>,
    pub(crate) live: Mutex<Option<Arc<Live>>>,
    /// Between counting a run and libvirtd's answer: what the directory says is not yet so.
    pub(crate) starting: AtomicBool,
    /// Its end is asked for, and no news.
    pub(crate) stopping: AtomicBool,
    pub(crate) last_exit: Mutex<Exit>,
    pub(crate) noting: Mutex<()>,
    /// Memory and disks are being sent by a task of this process.
    pub(crate) sending: Mutex<Option<crate::migrate::Sending>>,
    pub(crate) relay: Mutex<Option<Relay>>,
}

pub(crate) type Done<T> = Result<T, DriverError>;

/// Sets a flag as long as it is there.
pub(crate) struct Raised<'a>(&'a AtomicBool);

impl<'a> Raised<'a> {
    fn new(flag: &'a AtomicBool) -> Self {
        flag.store(true, Ordering::Release);
        Self(flag)
    }
}

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

pub(crate) fn fence_target(dir: &std::path::Path) -> FenceTarget {
    FenceTarget::Permitted { lock: dir.join(LOCK), permit: dir.join(PERMIT) }
}

impl Machine {
    pub(crate) fn new(dir: InstanceDir, stored: Stored, shared: Arc<Shared>) -> Self {
        Self {
            id: stored.config.id.clone(),
            dir: Arc::new(dir),
            stored: Mutex::new(Arc::new(stored)),
            shared,
            change: tokio::sync::Mutex::default(),
            live: Mutex::default(),
            starting: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            last_exit: Mutex::new(Exit::NeverStarted),
            noting: Mutex::default(),
            sending: Mutex::default(),
            relay: Mutex::default(),
        }
    }

    /// Until this is dropped, what the directory says of the present run is not yet so.
    pub(crate) fn raise_starting(&self, exit: Exit) -> Raised<'_> {
        *self.last_exit.lock() = exit;
        Raised::new(&self.starting)
    }

    /// Until this is dropped, its end is no news.
    pub(crate) fn raise_stopping(&self) -> Raised<'_> {
        Raised::new(&self.stopping)
    }

    pub(crate) fn stored(&self) -> Arc<Stored> {
        self.stored.lock().clone()
    }

    /// Writes down what it is from now on.
    pub(crate) fn store(&self, stored: Stored) -> Outcome<()> {
        self.dir.write(crate::files::CONFIG, &stored)?;
        *self.stored.lock() = Arc::new(stored);
        Ok(())
    }

    pub(crate) fn failed(&self, operation: &'static str) -> impl Fn(Problem) -> DriverError + use<'_> {
        move |problem| {
            if problem.is_away() {
                return DriverError::Unavailable { driver: NAME, reason: problem.to_string() };
            }
            DriverError::failed(&self.id, operation, problem)
        }
    }

    pub(crate) async fn daemon(&self) -> Outcome<Arc<Daemon>> {
        self.shared.link.daemon().await
    }

    pub(crate) fn note(&self) -> Outcome<Option<StoredMigration>> {
        self.dir.read(MIGRATION)
    }

    /// What goes on for as long as it runs: begun when it is first seen running.
    pub(crate) fn live(&self) -> Arc<Live> {
        let mut live = self.live.lock();
        let begin = || {
            let (end, ended) = watch::channel(false);
            let console = console::follow(&self.dir, ended, self.shared.link.cancelled.clone());
            Arc::new(Live { console, end })
        };
        live.get_or_insert_with(begin).clone()
    }

    /// What goes on already.
    pub(crate) fn known_live(&self) -> Option<Arc<Live>> {
        self.live.lock().clone()
    }

    pub(crate) fn ended(&self) -> bool {
        let live = self.live.lock().take();
        // Nobody waiting is no error.
        live.map(|live| live.end.send_replace(true)).is_some()
    }

    /// What was taken over runs: an exit written by a stop that was cut short is not how this run ends.
    pub(crate) async fn adopt(self: &Arc<Self>, node: Option<Arc<Node>>) -> Outcome<Seen> {
        if let Some(note) = self.note()? {
            match (&note.phase, node) {
                (StoredPhase::Awaited, Some(node)) => self.wait_again(&note, &node).await?,
                (StoredPhase::Sending, _) if !self.is_sending() => self.send(note),
                _ => {}
            }
        }
        let seen = self.look().await?;
        if matches!(seen, Seen::Running | Seen::Paused)
            && let (Some(run), Some(exit)) = (self.dir.read::<StoredRun>(RUN)?, self.dir.read::<StoredExit>(EXIT)?)
            && run.number == exit.run
        {
            self.dir.remove(EXIT)?;
        }
        Ok(seen)
    }

    /// Makes sure that it runs, and returns what is there for as long as it does.
    pub(crate) async fn running(&self, operation: &'static str) -> Done<Arc<Live>> {
        match self.look().await.map_err(self.failed(operation))? {
            Seen::Running | Seen::Paused => Ok(self.live()),
            Seen::Down(_) => {
                Err(DriverError::wrong_state(&self.id, operation, "it does not run; start it first"))
            }
            Seen::HandedOver => Err(self.handed_over(operation)),
        }
    }

    pub(crate) fn handed_over(&self, operation: &'static str) -> DriverError {
        let reason = "it was handed over to another node; abort the migration if it is not to run there";
        DriverError::wrong_state(&self.id, operation, reason)
    }

    pub(crate) async fn start(&self, node: &Node) -> Done<()> {
        let _change = self.change.lock().await;
        let exit = match self.look().await.map_err(self.failed("start"))? {
            Seen::Running => return Ok(()),
            Seen::Paused => return Err(DriverError::wrong_state(&self.id, "start", "it is paused; resume it")),
            Seen::HandedOver => return Err(self.handed_over("start")),
            Seen::Down(exit) => exit,
        };
        if self.note().map_err(self.failed("start"))?.is_some_and(|note| note.phase == StoredPhase::GivenUp) {
            let reason = "it never arrived here; delete it, it runs where it came from";
            return Err(DriverError::wrong_state(&self.id, "start", reason));
        }
        let starting = self.raise_starting(exit);
        let outcome = self.run(node).await;
        drop(starting);
        outcome.map_err(self.failed("start"))
    }

    async fn run(&self, node: &Node) -> Outcome<()> {
        let daemon = self.daemon().await?;
        let stored = self.stored();
        rescue::lay(self).await?;
        let started = rescue::as_started(&stored, &self.dir);
        let domain = daemon.define(&domain::describe(&started, &self.dir, node)).await?;
        rescue::defined(self)?;
        let run = self.count_run()?;
        let outcome = daemon.create(&domain).await;
        let problem = match outcome {
            Ok(()) => {
                self.live();
                return Ok(());
            }
            Err(problem) => problem,
        };
        if matches!(problem, Problem::Refused { .. }) {
            self.dir.remove(PERMIT)?;
            let exit = StoredExit { run: run.number, exit: Exit::Failed(problem.to_string()) };
            self.dir.write(EXIT, &exit)?;
        }
        Err(problem)
    }

    /// Counts a run that is about to begin, and permits it.
    pub(crate) fn count_run(&self) -> Outcome<StoredRun> {
        let number = self.dir.read::<StoredRun>(RUN)?.map_or(1, |run| run.number + 1);
        let run = StoredRun { number, started_ms: now_ms() };
        self.dir.write(RUN, &run)?;
        self.dir.remove(MIGRATION)?;
        self.dir.touch(CONSOLE, 0o600)?;
        self.permit()?;
        Ok(run)
    }

    /// From here on a QEMU of this instance may come to run.
    pub(crate) fn permit(&self) -> Outcome<()> {
        write_atomically(&self.dir.file(PERMIT), b"")
    }

    pub(crate) async fn stop(&self, mode: StopMode) -> Done<()> {
        let _change = self.change.lock().await;
        let _stopping = self.raise_stopping();
        let sending = self.abandon_migration();
        let outcome = self.stop_now(mode).await;
        if let Some(sending) = sending {
            // Whether it ended here or there is known when its task is over.
            sending.over_within(KILL_TIMEOUT).await;
        }
        outcome
    }

    async fn stop_now(&self, mode: StopMode) -> Done<()> {
        match self.look().await {
            Ok(Seen::Down(_)) => Ok(()),
            Ok(seen) => {
                self.note_stop().map_err(self.failed("stop"))?;
                if let StopMode::Graceful(timeout) = mode
                    && seen != Seen::HandedOver
                    && tokio::time::timeout(timeout, self.power_down(&seen)).await.is_ok()
                {
                    return self.settle_down().map_err(self.failed("stop"));
                }
                self.kill().await?;
                self.settle_down().map_err(self.failed("stop"))
            }
            // How it ended is not known, but it is over.
            Err(problem) if problem.is_away() => self.kill().await,
            Err(other) => Err(self.failed("stop")(other)),
        }
    }

    /// What is awaited is awaited no more, and what is being sent is sent no more.
    fn abandon_migration(&self) -> Option<crate::migrate::Sending> {
        drop(self.relay.lock().take());
        let sending = self.sending.lock().clone()?;
        sending.cancel();
        Some(sending)
    }

    /// After a stop nothing of it starts, and nothing is awaited.
    pub(crate) fn settle_down(&self) -> Outcome<()> {
        self.dir.remove(PERMIT)?;
        match self.note()? {
            Some(note) if matches!(note.phase, StoredPhase::Awaited | StoredPhase::Arrived) => {
                self.dir.write(MIGRATION, &StoredMigration { phase: StoredPhase::GivenUp, ..note })
            }
            _ => Ok(()),
        }
    }

    /// Written before it ends: libvirtd does not know who asked for it.
    pub(crate) fn note_stop(&self) -> Outcome<()> {
        let run = self.dir.read::<StoredRun>(RUN)?.unwrap_or_default();
        self.dir.write(EXIT, &StoredExit { run: run.number, exit: Exit::Stopped })
    }

    /// Pulls the plug, with libvirtd or without it.
    async fn kill(&self) -> Done<()> {
        self.dir.remove(PERMIT).map_err(self.failed("stop"))?;
        let destroyed = match self.daemon().await {
            Ok(daemon) => daemon.destroy(&self.stored().domain()).await,
            Err(problem) => Err(problem),
        };
        if let Err(problem) = &destroyed {
            tracing::warn!(instance = %self.id, %problem, "libvirtd does not stop it; its process is killed");
        }
        let target = fence_target(&self.dir.path);
        let gone = async {
            loop {
                let target = target.clone();
                let is_gone = match &destroyed {
                    Ok(()) => fence::may_run(&target) == Some(false),
                    Err(_) => tokio::task::spawn_blocking(move || fence::kill(&target, Zeal::Instance))
                        .await
                        .is_ok_and(|outcome| outcome == fence::Outcome::Gone),
                };
                if is_gone {
                    return;
                }
                tokio::time::sleep(LOCK_INTERVAL).await;
            }
        };
        if tokio::time::timeout(KILL_TIMEOUT, gone).await.is_err() {
            let timeout_ms = u64::try_from(KILL_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
            return Err(DriverError::Timeout { id: self.id.clone(), operation: "stop", timeout_ms });
        }
        self.ended();
        Ok(())
    }

    /// Presses the power button until the machine is gone.
    async fn power_down(&self, seen: &Seen) {
        let live = self.live();
        let mut is_paused = *seen == Seen::Paused;
        loop {
            let pressed = async {
                let daemon = self.daemon().await?;
                let domain = self.stored().domain();
                if is_paused {
                    // A machine that stands still hears nothing.
                    daemon.resume(&domain).await?;
                    is_paused = false;
                }
                daemon.press_power_button(&domain).await
            };
            if let Err(error) = pressed.await {
                tracing::debug!(instance = %self.id, %error, "the power button could not be pressed");
            }
            // Its end is told by an event, which may be lost with its connection.
            if live.gone_within(POWERDOWN_INTERVAL).await || matches!(self.look().await, Ok(Seen::Down(_))) {
                return;
            }
        }
    }

    pub(crate) async fn pause(&self) -> Done<()> {
        let _change = self.change.lock().await;
        self.running("pause").await?;
        let daemon = self.daemon().await.map_err(self.failed("pause"))?;
        let outcome = daemon.suspend(&self.stored().domain()).await;
        match (outcome, self.look().await) {
            // It was paused already, or not there yet.
            (Ok(()), _) | (_, Ok(Seen::Paused)) => Ok(()),
            (Err(problem), _) => Err(self.failed("pause")(problem)),
        }
    }

    pub(crate) async fn resume(&self) -> Done<()> {
        let _change = self.change.lock().await;
        self.running("resume").await?;
        if self.note().map_err(self.failed("resume"))?.is_some_and(|note| {
            matches!(note.phase, StoredPhase::Awaited | StoredPhase::Arrived)
        }) {
            return self.take_over().await;
        }
        let daemon = self.daemon().await.map_err(self.failed("resume"))?;
        let outcome = daemon.resume(&self.stored().domain()).await;
        match (outcome, self.look().await) {
            (Ok(()), _) | (_, Ok(Seen::Running)) => Ok(()),
            (Err(problem), _) => Err(self.failed("resume")(problem)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_is_lowered_whatever_happens() {
        let flag = AtomicBool::new(false);
        {
            let _raised = Raised::new(&flag);
            assert!(flag.load(Ordering::Acquire));
        }
        assert!(!flag.load(Ordering::Acquire));
    }
}
