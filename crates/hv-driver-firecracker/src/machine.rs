//! One microVM: whether it runs, and the operations on it.
//!
//! # Theory of operation
//! At first nothing is known (`Unknown`); the first look takes over a VMM that runs, or reads how the last one ended.
//! From then on only this process starts a VMM, and a task waits for its end, so the phase is always true. Changing
//! operations hold `change`; reads do not wait for them.
//!
//! # Failure and recovery
//! A VMM that was started and whose machine does not run yet is of no use to anybody and is killed. One that stands still
//! for a snapshot of an agent that died goes on.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use hv_driver::{DriverError, DriverEvent, Exit, Observed, Running};
use hv_machine::console::{ConsoleHub, end_of};
use hv_machine::process::Process;
use hv_types::InstanceId;
use parking_lot::Mutex;
use tokio::process::Child;
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::FirecrackerOptions;
use crate::api::Api;
use crate::api::types::{State, VmState};
use crate::console;
use crate::exit;
use crate::files::{EXIT, HELD, InstanceDir, OfRun, RUN, Stored, StoredExit, StoredRun, root_of};
use crate::metrics::Sums;
use crate::problem::{Outcome, Problem};
use crate::process::{self, try_lock};
use crate::snapshot;

mod start;
mod stop;

/// How long a VMM that was found may take to answer before it is taken as running all the same.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often its socket is tried meanwhile.
const ADOPT_RETRY: Duration = Duration::from_millis(20);
/// How long a look at the machine may take before the last known state is told.
const OBSERVE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a killed process may take to be gone; longer is a process stuck in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// What all machines of a driver share.
pub(crate) struct Shared {
    pub(crate) options: FirecrackerOptions,
    pub(crate) events: broadcast::Sender<DriverEvent>,
    /// Ends every task when the driver is dropped. The machines run on.
    pub(crate) cancelled: CancellationToken,
}

/// A machine that runs.
pub(crate) struct Live {
    pub(crate) process: Process,
    pub(crate) console: ConsoleHub,
    pub(crate) root: PathBuf,
    pub(crate) run: StoredRun,
    /// Counters so far; one reading at a time.
    pub(crate) sums: tokio::sync::Mutex<Sums>,
    paused: AtomicBool,
    stopping: AtomicBool,
    ended: watch::Receiver<bool>,
}

impl Live {
    /// Whether it is gone within a time.
    pub(crate) async fn gone_within(&self, timeout: Duration) -> bool {
        let mut ended = self.ended.clone();
        tokio::time::timeout(timeout, end_of(&mut ended)).await.is_ok()
    }

    pub(crate) async fn api(&self) -> Outcome<Api> {
        let unreachable =
            |e: std::io::Error| Problem::Unreachable { request: "connect".to_owned(), source: e.into() };
        Api::connect(&self.root).await.map_err(unreachable)
    }

    /// Asks the VMM whether its machine stands still.
    pub(crate) async fn is_paused(&self) -> bool {
        let asked = async { self.api().await?.describe().await };
        if let Ok(Ok(info)) = tokio::time::timeout(OBSERVE_TIMEOUT, asked).await {
            self.paused.store(info.state == State::Paused, Ordering::Relaxed);
        }
        self.paused.load(Ordering::Relaxed)
    }

    /// Holds it still, or lets it go on.
    pub(crate) async fn set_paused(&self, pause: bool) -> Outcome<()> {
        let state = if pause { VmState::Paused } else { VmState::Resumed };
        self.api().await?.set_state(state).await?;
        self.paused.store(pause, Ordering::Relaxed);
        Ok(())
    }
}

#[derive(Clone)]
enum Phase {
    Unknown,
    Down(Exit),
    Up(Arc<Live>),
}

/// A microVM that was completely created.
pub(crate) struct Machine {
    pub(crate) id: InstanceId,
    pub(crate) dir: Arc<InstanceDir>,
    stored: Mutex<Stored>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) change: tokio::sync::Mutex<()>,
    phase: Mutex<Phase>,
}

pub(crate) type Done<T> = Result<T, DriverError>;

impl Machine {
    pub(crate) fn new(dir: InstanceDir, stored: Stored, shared: Arc<Shared>) -> Self {
        Self {
            id: stored.config.id.clone(),
            dir: Arc::new(dir),
            stored: Mutex::new(stored),
            shared,
            change: tokio::sync::Mutex::default(),
            phase: Mutex::new(Phase::Unknown),
        }
    }

    pub(crate) fn failed(&self, operation: &'static str) -> impl Fn(Problem) -> DriverError + use<'_> {
        move |problem| DriverError::failed(&self.id, operation, problem)
    }

    /// What it was made of.
    pub(crate) fn stored(&self) -> Stored {
        self.stored.lock().clone()
    }

    /// What it is made of from its next start on. It is on disk already.
    pub(crate) fn set_stored(&self, stored: Stored) {
        *self.stored.lock() = stored;
    }

    /// Where its VMM lives.
    pub(crate) fn root(&self) -> PathBuf {
        root_of(&self.dir, &self.id)
    }

    /// The running machine, if it runs.
    pub(crate) async fn live(self: &Arc<Self>, operation: &'static str) -> Done<Option<Arc<Live>>> {
        if matches!(*self.phase.lock(), Phase::Unknown) {
            let _change = self.change.lock().await;
            self.look(operation).await?;
        }
        Ok(self.up_now())
    }

    /// As far as is known.
    pub(crate) fn up_now(&self) -> Option<Arc<Live>> {
        match &*self.phase.lock() {
            Phase::Up(live) => Some(live.clone()),
            Phase::Unknown | Phase::Down(_) => None,
        }
    }

    /// The running machine, while `change` is held.
    pub(crate) async fn live_held(self: &Arc<Self>, operation: &'static str) -> Done<Option<Arc<Live>>> {
        self.look(operation).await?;
        Ok(self.up_now())
    }

    /// Finds out what is the case, once. `change` is held.
    async fn look(self: &Arc<Self>, operation: &'static str) -> Done<()> {
        if !matches!(*self.phase.lock(), Phase::Unknown) {
            return Ok(());
        }
        snapshot::sweep(&self.dir, &self.root()).map_err(self.failed(operation))?;
        // Taken and let go at once: it is only asked whether a VMM has it.
        let is_free = try_lock(&self.dir).map_err(self.failed(operation))?.is_some();
        if !is_free && self.adopt(operation).await? {
            return Ok(());
        }
        let exit = exit::last_exit(&self.dir, &self.root()).map_err(self.failed(operation))?;
        *self.phase.lock() = Phase::Down(exit);
        Ok(())
    }

    /// Takes over a VMM that somebody else started. `false` if it ended meanwhile, or was of no use.
    async fn adopt(self: &Arc<Self>, operation: &'static str) -> Done<bool> {
        let failed = self.failed(operation);
        let Some(process) = process::find(&self.dir).await.map_err(&failed)? else { return Ok(false) };
        let run = self.dir.read::<StoredRun>(RUN).map_err(&failed)?.unwrap_or_default();
        let found = self.state_of_found(&process).await;
        if found == Some(State::NotStarted) {
            tracing::info!(instance = %self.id, pid = process.pid, "ends a VMM whose start was cut short");
            process.kill().map_err(Problem::Process).map_err(&failed)?;
            if tokio::time::timeout(KILL_TIMEOUT, process.ended(None)).await.is_err() {
                return Err(self.too_slow(operation, KILL_TIMEOUT));
            }
            return Ok(false);
        }
        // Written by a stop that was cut short: it is not how this run ends.
        if self.dir.read::<StoredExit>(EXIT).map_err(&failed)?.is_some_and(|exit| exit.run == run.number) {
            self.dir.remove(EXIT).map_err(&failed)?;
        }
        tracing::info!(instance = %self.id, pid = process.pid, "took over a running microVM");
        let live = self.up(process, None, run).map_err(&failed)?;
        live.paused.store(found == Some(State::Paused), Ordering::Relaxed);
        if found.is_some() {
            self.dir.remove(crate::files::RESTORE).map_err(&failed)?;
        }
        let held = self.dir.read::<OfRun>(HELD).map_err(&failed)?;
        if held.is_some_and(|held| held.run == live.run.number) {
            live.set_paused(false).await.map_err(&failed)?;
        }
        self.dir.remove(HELD).map_err(&failed)?;
        Ok(true)
    }

    /// What a VMM that was found does; `None` if it does not say so in time.
    async fn state_of_found(&self, process: &Process) -> Option<State> {
        let root = self.root();
        let ask = async {
            loop {
                if let Ok(mut api) = Api::connect(&root).await
                    && let Ok(info) = api.describe().await
                {
                    return info.state;
                }
                tokio::time::sleep(ADOPT_RETRY).await;
            }
        };
        tokio::select! {
            state = ask => Some(state),
            _ = process.ended(None) => Some(State::NotStarted),
            () = tokio::time::sleep(ADOPT_TIMEOUT) => None,
        }
    }

    fn too_slow(&self, operation: &'static str, within: Duration) -> DriverError {
        let timeout_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
        DriverError::Timeout { id: self.id.clone(), operation, timeout_ms }
    }

    /// From here on the machine runs, and its end is waited for.
    fn up(self: &Arc<Self>, process: Process, child: Option<Child>, run: StoredRun) -> Outcome<Arc<Live>> {
        let (end, ended) = watch::channel(false);
        let cancelled = self.shared.cancelled.clone();
        let sums = tokio::sync::Mutex::new(Sums::load(&self.dir, run.number)?);
        let live = Arc::new(Live {
            process,
            console: console::follow(&self.dir, ended.clone(), cancelled.clone()),
            root: self.root(),
            run,
            sums,
            paused: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            ended,
        });
        *self.phase.lock() = Phase::Up(live.clone());
        let (machine, watched) = (self.clone(), live.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = cancelled.cancelled() => {}
                () = machine.watch(&watched, child, end) => {}
            }
        });
        Ok(live)
    }

    async fn watch(&self, live: &Live, mut child: Option<Child>, end: watch::Sender<bool>) {
        let status = live.process.ended(child.as_mut()).await;
        let was_asked = live.stopping.load(Ordering::Acquire);
        let exit = match was_asked {
            true => Exit::Stopped,
            false => exit::classify(&self.dir, &live.root, live.run.number, status).unwrap_or(Exit::Lost),
        };
        let what = format!("the microVM ended: {exit:?}");
        if let Err(error) = self.dir.note(EXIT, &StoredExit { run: live.run.number, exit: exit.clone() }) {
            // Found out anew when it is next looked at.
            tracing::warn!(instance = %self.id, %error, "how the microVM ended could not be noted");
        }
        *self.phase.lock() = Phase::Down(exit);
        // Whoever waits may be gone; nobody listening is no error.
        let _ = end.send(true);
        if !was_asked {
            let _ = self.shared.events.send(DriverEvent { id: self.id.clone(), what });
        }
    }

    pub(crate) async fn set_paused(self: &Arc<Self>, pause: bool) -> Done<()> {
        let operation = if pause { "pause" } else { "resume" };
        let _change = self.change.lock().await;
        let Some(live) = self.live_held(operation).await? else {
            return Err(DriverError::wrong_state(&self.id, operation, "it does not run; start it first"));
        };
        // Asking for what is the case is refused by some versions.
        if live.is_paused().await == pause {
            return Ok(());
        }
        live.set_paused(pause).await.map_err(self.failed(operation))
    }

    pub(crate) async fn observe(self: &Arc<Self>) -> Done<Observed> {
        if let Some(live) = self.live("observe").await? {
            let is_paused = live.is_paused().await;
            // It may have ended while it was asked.
            if !*live.ended.borrow() {
                let since: SystemTime = live.run.since();
                let running = Running { since: Some(since), ip: None };
                return Ok(if is_paused { Observed::Paused(running) } else { Observed::Running(running) });
            }
        }
        match &*self.phase.lock() {
            Phase::Down(exit) => Ok(Observed::Stopped(exit.clone())),
            Phase::Unknown | Phase::Up(_) => Ok(Observed::Stopped(Exit::Lost)),
        }
    }
}
