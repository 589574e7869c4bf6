//! One virtual machine: whether it runs, and the operations on it.
//!
//! # Theory of operation
//! At first nothing is known (`Unknown`); the first look takes over a QEMU that runs, or reads how the last one ended.
//! From then on only this process starts QEMU, and a task waits for its end, so the phase is always true. Changing
//! operations hold `change`; reads do not wait for them.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, SystemTime};

use hv_driver::{DriverError, DriverEvent, Exit, Observed, Running, StopMode};
use hv_machine::console::end_of;
use hv_machine::notify::Notify;
use hv_machine::process::Process;
use hv_telemetry::crash::{self, Point};
use hv_types::InstanceId;
use parking_lot::{Mutex, RwLock};
use tokio::process::{Child, Command};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::argv::{self, Launch};
use crate::console;
use crate::create::Tools;
use crate::exit;
use crate::files::{
    AGENT_SOCKET, CONSOLE, CONSOLE_SOCKET, EVENTS, EVENTS_SOCKET, EXIT, InstanceDir, LOCK, MONITOR_SOCKET,
    OUTGOING, PID, RUN, STARTED, STDERR, Stored, StoredExit, StoredRun, VNC_SOCKET, now_ms,
};
use crate::limits;
use crate::live::{Live, Status};
use crate::migration;
use crate::platform::Platform;
use crate::problem::{Outcome, Problem};
use crate::process;
use crate::qmp::{Monitor, Qmp};
use crate::rescue;

/// How long QEMU may take from its start until its monitor answers.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How often the monitor's socket is tried while nothing is heard of it; a notice makes it at once.
const START_RETRY: Duration = Duration::from_millis(20);
/// How often the event log of a QEMU that is just starting is tried.
const EVENT_LOG_RETRY: Duration = Duration::from_millis(250);
/// A guest that boots does not hear the power button yet, so it is pressed again.
const POWERDOWN_INTERVAL: Duration = Duration::from_secs(3);
/// How long QEMU may take to quit when told to, before it is killed.
const QUIT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a killed process may take to be gone; longer is a process stuck in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// What all machines of a driver share.
pub(crate) struct Shared {
    pub(crate) events: broadcast::Sender<DriverEvent>,
    /// Ends every task when the driver is dropped. The machines run on.
    pub(crate) cancelled: CancellationToken,
}

#[derive(Clone)]
enum Phase {
    Unknown,
    Down(Exit),
    Up(Arc<Live>),
}

/// A virtual machine that was completely created.
pub(crate) struct Machine {
    pub(crate) id: InstanceId,
    pub(crate) dir: Arc<InstanceDir>,
    stored: RwLock<Arc<Stored>>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) change: tokio::sync::Mutex<()>,
    /// Who notes how far a hand-over is.
    pub(crate) notes: Mutex<()>,
    /// Whether somebody drives its hand-over to another node.
    pub(crate) leaving: Mutex<Option<tokio::task::JoinHandle<()>>>,
    phase: Mutex<Phase>,
    /// One command at a time can talk to the guest's agent.
    pub(crate) agent: tokio::sync::Mutex<()>,
}

type Done<T> = Result<T, DriverError>;

impl Machine {
    pub(crate) fn new(dir: InstanceDir, stored: Stored, shared: Arc<Shared>) -> Self {
        Self {
            id: stored.config.id.clone(),
            dir: Arc::new(dir),
            stored: RwLock::new(Arc::new(stored)),
            shared,
            notes: Mutex::default(),
            leaving: Mutex::default(),
            change: tokio::sync::Mutex::default(),
            phase: Mutex::new(Phase::Unknown),
            agent: tokio::sync::Mutex::default(),
        }
    }

    /// What it is made of.
    pub(crate) fn stored(&self) -> Arc<Stored> {
        self.stored.read().clone()
    }

    /// The processors of the host that its own are bound to; empty: to none.
    pub(crate) fn given_cpus(&self) -> Vec<u32> {
        self.stored().config.devices.as_ref().map_or_else(Vec::new, |grant| grant.cpus.clone())
    }

    /// Makes it something else from now on.
    pub(crate) fn store(&self, stored: Stored) -> Outcome<()> {
        self.dir.write(crate::files::CONFIG, &stored)?;
        *self.stored.write() = Arc::new(stored);
        Ok(())
    }

    pub(crate) fn failed(&self, operation: &'static str) -> impl FnOnce(Problem) -> DriverError + use<'_> {
        move |problem| DriverError::failed(&self.id, operation, problem)
    }

    /// The running machine, if it runs.
    pub(crate) async fn live(self: &Arc<Self>, operation: &'static str) -> Done<Option<Arc<Live>>> {
        if matches!(*self.phase.lock(), Phase::Unknown) {
            let _change = self.change.lock().await;
            self.look(operation).await?;
        }
        Ok(self.known_live())
    }

    /// The running machine, if it is known to run.
    pub(crate) fn known_live(&self) -> Option<Arc<Live>> {
        match &*self.phase.lock() {
            Phase::Up(live) => Some(live.clone()),
            Phase::Unknown | Phase::Down(_) => None,
        }
    }

    /// The running machine as far as it is known. `change` is held.
    pub(crate) async fn live_now(self: &Arc<Self>, operation: &'static str) -> Done<Option<Arc<Live>>> {
        self.look(operation).await?;
        Ok(self.known_live())
    }

    /// Finds out what is the case, once. `change` is held.
    async fn look(self: &Arc<Self>, operation: &'static str) -> Done<()> {
        if !matches!(*self.phase.lock(), Phase::Unknown) {
            return Ok(());
        }
        // Taken and let go at once: it is only asked whether QEMU has it.
        let is_free = self.dir.try_lock(LOCK).map_err(self.failed(operation))?.is_some();
        if !is_free && self.adopt(operation).await? {
            return Ok(());
        }
        let exit = exit::last_exit(&self.dir).map_err(self.failed(operation))?;
        *self.phase.lock() = Phase::Down(exit);
        Ok(())
    }

    /// Takes over a QEMU that somebody else started. `false` if it ended meanwhile.
    async fn adopt(self: &Arc<Self>, operation: &'static str) -> Done<bool> {
        let Some(process) = process::find(&self.dir).await.map_err(self.failed(operation))? else {
            return Ok(false);
        };
        let run = self.dir.read::<StoredRun>(RUN).map_err(self.failed(operation))?.unwrap_or_default();
        // Written by a stop that was cut short: it is not how this run ends.
        if self
            .dir
            .read::<StoredExit>(EXIT)
            .map_err(self.failed(operation))?
            .is_some_and(|exit| exit.run == run.number)
        {
            self.dir.remove(EXIT).map_err(self.failed(operation))?;
        }
        tracing::info!(instance = %self.id, pid = process.pid, "took over a running virtual machine");
        let live = self.up(process, None, None, run);
        // It may be so young that it has no sockets yet.
        let (dir, cancelled, ended) = (self.dir.clone(), self.shared.cancelled.clone(), live.ended.clone());
        tokio::spawn(async move { log_events(&dir, &cancelled, ended).await });
        live.status().await;
        limits::apply(self, &live).await;
        Ok(true)
    }

    /// From here on the machine runs, and its end is waited for.
    fn up(
        self: &Arc<Self>,
        process: Process,
        child: Option<Child>,
        qmp: Option<Qmp>,
        run: StoredRun,
    ) -> Arc<Live> {
        let (end, ended) = watch::channel(false);
        let cancelled = self.shared.cancelled.clone();
        let live = Arc::new(Live {
            process,
            monitor: Monitor::new(self.dir.clone(), cancelled.clone(), qmp),
            console: console::follow(&self.dir, ended.clone(), cancelled.clone()),
            run,
            status: AtomicU8::new(Status::Running as u8),
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
        live
    }

    async fn watch(&self, live: &Live, mut child: Option<Child>, end: watch::Sender<bool>) {
        let status = live.process.ended(child.as_mut()).await;
        let was_asked = live.stopping.load(Ordering::Acquire);
        let exit = match was_asked {
            true => Exit::Stopped,
            false => exit::classify(&self.dir, status).unwrap_or(Exit::Lost),
        };
        let what = format!("the virtual machine ended: {exit:?}");
        if let Err(error) = self.dir.write(EXIT, &StoredExit { run: live.run.number, exit: exit.clone() }) {
            // Found out anew when it is next looked at.
            tracing::warn!(instance = %self.id, %error, "how the virtual machine ended could not be noted");
        }
        *self.phase.lock() = Phase::Down(exit);
        // Whoever waits may be gone; nobody listening is no error.
        let _ = end.send(true);
        if !was_asked {
            let _ = self.shared.events.send(DriverEvent { id: self.id.clone(), what });
        }
    }

    pub(crate) async fn start(
        self: &Arc<Self>,
        platform: &Platform,
        machine_type: &str,
        tools: &Tools,
    ) -> Done<()> {
        let _change = self.change.lock().await;
        let live = self.live_now("start").await?;
        let refused = |reason: &str| Err(DriverError::wrong_state(&self.id, "start", reason));
        if migration::is_handed_over(self, live.as_deref()).await.map_err(self.failed("start"))? {
            return refused("it was handed over to another node");
        }
        match live {
            None if !migration::target::inherit(self).map_err(self.failed("start"))? => {
                refused("what was to be handed over to it never arrived; delete it")
            }
            None => {
                rescue::lay(self, tools).await.map_err(self.failed("start"))?;
                self.launch(platform, machine_type, Launch::Run).await.map(drop)
            }
            Some(live) => match live.status().await {
                Status::Running => Ok(()),
                Status::Still if migration::keeps_still(self).map_err(self.failed("start"))? => Ok(()),
                Status::Still => refused("it is paused; resume it"),
                Status::Waiting => refused("it waits for what another node hands over"),
                Status::HandedOver => refused("it was handed over to another node"),
            },
        }
    }

    /// Starts QEMU for a machine that is down. `change` is held.
    pub(crate) async fn launch(
        self: &Arc<Self>,
        platform: &Platform,
        machine_type: &str,
        launch: Launch,
    ) -> Done<Option<Arc<Live>>> {
        let Some(lock) = self.dir.try_lock(LOCK).map_err(self.failed("start"))? else {
            // A start of ours that was given up half-way.
            return match self.adopt("start").await? {
                true => self.live_now("start").await,
                false => Err(DriverError::failed(&self.id, "start", "an earlier qemu is just ending")),
            };
        };
        let run = self.clear().map_err(self.failed("start"))?;
        let mut unfinished = Unfinished(Some(&self.phase));
        crash::reach(Point::QemuStartBeforeSpawn);
        let mut child = self.spawn(lock, platform, machine_type, launch).map_err(self.failed("start"))?;
        crash::reach(Point::QemuStartAfterSpawn);
        let ready = tokio::time::timeout(START_TIMEOUT, self.ready(&mut child)).await.unwrap_or_else(|_| {
            let timeout_ms = u64::try_from(START_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
            Err(Problem::Timeout { what: "the start of qemu".to_owned(), timeout_ms })
        });
        let ready = match ready {
            Ok((process, qmp)) => self.pin_processors(&qmp).await.map(|()| (process, qmp)),
            Err(problem) => Err(problem),
        };
        let (process, qmp) = match ready {
            Ok(ready) => ready,
            Err(problem) => {
                // Dead already, or of no use.
                let _ = child.kill().await;
                let exit = StoredExit { run: run.number, exit: Exit::Failed(problem.to_string()) };
                self.dir.write(EXIT, &exit).map_err(self.failed("start"))?;
                unfinished.0 = None;
                *self.phase.lock() = Phase::Down(exit.exit);
                return Err(DriverError::failed(&self.id, "start", problem));
            }
        };
        crash::reach(Point::QemuStartAfterQmp);
        if let Err(error) = open_event_log(&self.dir, &self.shared.cancelled).await {
            tracing::warn!(instance = %self.id, %error, "qemu does not log its events");
        }
        unfinished.0 = None;
        let live = self.up(process, Some(child), Some(qmp), run);
        limits::apply(self, &live).await;
        Ok(Some(live))
    }

    /// Takes away what the last run left, and counts this one.
    fn clear(&self) -> Outcome<StoredRun> {
        for name in [OUTGOING, PID, MONITOR_SOCKET, EVENTS_SOCKET, CONSOLE_SOCKET, AGENT_SOCKET, VNC_SOCKET] {
            self.dir.remove(name)?;
        }
        // How the last run ended must be on record before its traces go.
        if let Phase::Down(exit) = &*self.phase.lock()
            && let Some(last) = self.dir.read::<StoredRun>(RUN)?
            && self.dir.read::<StoredExit>(EXIT)?.is_none_or(|known| known.run != last.number)
        {
            self.dir.write(EXIT, &StoredExit { run: last.number, exit: exit.clone() })?;
        }
        let number = self.dir.read::<StoredRun>(RUN)?.map_or(1, |run| run.number + 1);
        for log in [EVENTS, STDERR] {
            self.dir.empty(log)?;
        }
        self.dir.append(CONSOLE)?;
        let run = StoredRun { number, started_ms: now_ms() };
        self.dir.write(STARTED, &*self.stored())?;
        self.dir.write(RUN, &run)?;
        Ok(run)
    }

    fn spawn(
        &self,
        lock: std::fs::File,
        platform: &Platform,
        machine_type: &str,
        launch: Launch,
    ) -> Outcome<Child> {
        let log = self.dir.append(STDERR)?;
        let also_log = log.try_clone().map_err(Problem::file("open", &self.dir.file(STDERR)))?;
        let mut command = Command::new(&platform.binary);
        command.args(argv::arguments(&rescue::as_started(&self.stored()), machine_type, platform, launch));
        command.current_dir(&self.dir.path);
        command.stdin(Stdio::from(lock)).stdout(Stdio::from(log)).stderr(Stdio::from(also_log));
        // A group of its own: what ends the agent's group does not end the guests.
        command.process_group(0).kill_on_drop(false);
        let remedy = "apt-get install --reinstall qemu-system-x86";
        command.spawn().map_err(|source| Problem::Spawn { tool: "qemu".to_owned(), remedy, source })
    }

    /// Waits until the monitor answers, which it does when the machine runs.
    async fn ready(&self, child: &mut Child) -> Outcome<(Process, Qmp)> {
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or_default();
        let process = Process::open(pid).map_err(Problem::Process)?;
        let notify = Notify::entries_of(&self.dir.path).map_err(Problem::file("watch", &self.dir.path))?;
        let socket = self.dir.socket(MONITOR_SOCKET);
        loop {
            if let Ok(stream) = tokio::net::UnixStream::connect(&socket).await {
                let connected = async {
                    let qmp = Qmp::over(stream, self.shared.cancelled.clone()).await?;
                    qmp.command("query-status", None, START_TIMEOUT).await?;
                    Ok(qmp)
                };
                return match connected.await {
                    Ok(qmp) => Ok((process, qmp)),
                    // If it is dying, what it says itself tells more.
                    Err(problem) => match tokio::time::timeout(QUIT_TIMEOUT, child.wait()).await {
                        Ok(_) => Err(Problem::DiedStarting(exit::complaint(&self.dir))),
                        Err(_) => Err(problem),
                    },
                };
            }
            tokio::select! {
                _ = child.wait() => return Err(Problem::DiedStarting(exit::complaint(&self.dir))),
                changed = notify.changed() => changed.map_err(Problem::file("watch", &self.dir.path))?,
                () = tokio::time::sleep(START_RETRY) => {}
            }
        }
    }

    pub(crate) async fn stop(self: &Arc<Self>, mode: StopMode) -> Done<()> {
        let _change = self.change.lock().await;
        self.stop_now(mode).await
    }

    /// Stops it. `change` is held.
    pub(crate) async fn stop_now(self: &Arc<Self>, mode: StopMode) -> Done<()> {
        let Some(live) = self.live_now("stop").await? else { return Ok(()) };
        migration::source::settle(self, &live).await.map_err(self.failed("stop"))?;
        // A machine that was handed over, or waits for it, hears no power button and must not be let go on.
        let mode = match live.status().await {
            Status::Running | Status::Still => mode,
            Status::Waiting | Status::HandedOver => StopMode::Force,
        };
        live.stopping.store(true, Ordering::Release);
        let outcome = self.stop_live(&live, mode).await;
        if outcome.is_err() {
            live.stopping.store(false, Ordering::Release);
        }
        outcome
    }

    async fn stop_live(&self, live: &Live, mode: StopMode) -> Done<()> {
        if let StopMode::Graceful(timeout) = mode
            && tokio::time::timeout(timeout, self.power_down(live)).await.is_ok()
        {
            return Ok(());
        }
        // A killed process says nothing, so it is written down first.
        let exit = StoredExit { run: live.run.number, exit: Exit::Stopped };
        self.dir.write(EXIT, &exit).map_err(self.failed("stop"))?;
        // If it does not hear, it is killed.
        let quit = live.monitor.command_within("quit", None, QUIT_TIMEOUT).await;
        if quit.is_err() || !live.gone_within(QUIT_TIMEOUT).await {
            live.process.kill().map_err(Problem::Process).map_err(self.failed("stop"))?;
        }
        crash::reach(Point::QemuStopAfterKill);
        if live.gone_within(KILL_TIMEOUT).await {
            return Ok(());
        }
        let timeout_ms = u64::try_from(KILL_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
        Err(DriverError::Timeout { id: self.id.clone(), operation: "stop", timeout_ms })
    }

    /// Presses the power button until the machine is gone.
    async fn power_down(&self, live: &Live) {
        loop {
            // A machine that stands still hears nothing; one that runs is not disturbed.
            let pressed = async {
                live.monitor.command("cont", None).await?;
                live.monitor.command("system_powerdown", None).await
            };
            if let Err(error) = pressed.await {
                tracing::debug!(instance = %self.id, %error, "the power button could not be pressed");
            }
            crash::reach(Point::QemuStopAfterPowerdown);
            if live.gone_within(POWERDOWN_INTERVAL).await {
                return;
            }
        }
    }

    pub(crate) async fn set_paused(self: &Arc<Self>, pause: bool) -> Done<()> {
        let (operation, command) = if pause { ("pause", "stop") } else { ("resume", "cont") };
        let _change = self.change.lock().await;
        let Some(live) = self.live_now(operation).await? else {
            return Err(DriverError::wrong_state(&self.id, operation, "it does not run; start it first"));
        };
        if migration::is_handed_over(self, Some(&live)).await.map_err(self.failed(operation))? {
            return Err(DriverError::wrong_state(&self.id, operation, "it was handed over to another node"));
        }
        // For others it runs, and it must not go on before that is over.
        if migration::goes_on(self).map_err(self.failed(operation))? {
            let reason = "it is being handed over to another node; wait for that, or abort it";
            return if pause { Err(DriverError::wrong_state(&self.id, operation, reason)) } else { Ok(()) };
        }
        match live.status().await {
            Status::Waiting if pause => return Ok(()),
            Status::Waiting if !migration::target::has_arrived(&live).await => {
                let reason = "what another node hands over has not arrived yet";
                return Err(DriverError::wrong_state(&self.id, operation, reason));
            }
            _ => {}
        }
        if !pause {
            migration::target::take_over(self, &live).await.map_err(self.failed(operation))?;
        }
        live.monitor.command(command, None).await.map_err(self.failed(operation))?;
        if !pause {
            migration::target::taken_over(self).map_err(self.failed(operation))?;
        }
        Ok(())
    }

    pub(crate) async fn observe(self: &Arc<Self>) -> Done<Observed> {
        let live = self.live("observe").await?;
        if migration::is_handed_over(self, live.as_deref()).await.map_err(self.failed("observe"))? {
            return Ok(Observed::HandedOver);
        }
        if let Some(live) = live {
            let is_paused = matches!(live.status().await, Status::Still | Status::Waiting)
                && !migration::keeps_still(self).map_err(self.failed("observe"))?;
            // It may have ended while it was asked.
            if !live.has_ended() {
                let since: SystemTime = live.run.since();
                let running = Running { since: Some(since), ip: Some(argv::GUEST_ADDRESS.into()) };
                return Ok(if is_paused { Observed::Paused(running) } else { Observed::Running(running) });
            }
        }
        match &*self.phase.lock() {
            Phase::Down(exit) => Ok(Observed::Stopped(exit.clone())),
            Phase::Unknown | Phase::Up(_) => Ok(Observed::Stopped(Exit::Lost)),
        }
    }
}

/// A start that is given up half-way leaves a QEMU that nobody knows; the next look finds it.
struct Unfinished<'a>(Option<&'a Mutex<Phase>>);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(phase) = self.0 {
            *phase.lock() = Phase::Unknown;
        }
    }
}

/// QEMU reports events on a monitor only after a client has said once that it understands them; then it goes on in
/// the log with nobody connected.
async fn open_event_log(dir: &InstanceDir, cancelled: &CancellationToken) -> Outcome<()> {
    Qmp::connect(&dir.socket(EVENTS_SOCKET), cancelled.clone()).await.map(drop)
}

async fn log_events(dir: &InstanceDir, cancelled: &CancellationToken, mut ended: watch::Receiver<bool>) {
    loop {
        if open_event_log(dir, cancelled).await.is_ok() {
            return;
        }
        tokio::select! {
            () = cancelled.cancelled() => return,
            () = end_of(&mut ended) => return,
            () = tokio::time::sleep(EVENT_LOG_RETRY) => {}
        }
    }
}
