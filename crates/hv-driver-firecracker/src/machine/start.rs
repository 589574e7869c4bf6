//! Starting a microVM: a new VMM, told what its machine is or from which snapshot it goes on.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hv_driver::{DriverError, Exit};
use hv_machine::process::Process;
use parking_lot::Mutex;
use tokio::process::Child;

use super::{Done, Machine, Phase};
use crate::api::Api;
use crate::boot::{self, After};
use crate::exit;
use crate::files::{CONSOLE, EXIT, HELD, RESTORE, RUN, STDERR, Stored, StoredExit, StoredRun, now_ms};
use crate::images::Boot;
use crate::jail;
use crate::platform::Platform;
use crate::problem::{Outcome, Problem};
use crate::process::try_lock;
use crate::rescue;
use crate::snapshot::{self, Restore};
use crate::tap;

/// How long a VMM may take from its start until its machine runs.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How often its socket is tried; a try takes some 20 us.
const START_RETRY: Duration = Duration::from_millis(1);
/// How long a VMM that refused may take to end by itself, before it is killed.
const DYING_TIMEOUT: Duration = Duration::from_millis(500);

impl Machine {
    /// `rescue`: what it boots from in place of its own, if it is in rescue.
    pub(crate) async fn start(self: &Arc<Self>, platform: &Platform, rescue: Option<Boot>) -> Done<()> {
        let _change = self.change.lock().await;
        self.start_held(platform, "start", rescue).await
    }

    /// `change` is held.
    pub(crate) async fn start_held(
        self: &Arc<Self>,
        platform: &Platform,
        operation: &'static str,
        rescue: Option<Boot>,
    ) -> Done<()> {
        if let Some(live) = self.live_held(operation).await? {
            return match live.is_paused().await {
                true => Err(DriverError::wrong_state(&self.id, operation, "it is paused; resume it")),
                false => Ok(()),
            };
        }
        let failed = self.failed(operation);
        let Some(lock) = try_lock(&self.dir).map_err(&failed)? else {
            // A start of ours that was given up half-way.
            return match self.adopt(operation).await? {
                true => Ok(()),
                false => Err(DriverError::failed(&self.id, operation, "an earlier VMM is just ending")),
            };
        };
        let restore = match rescue {
            // It boots another image than its own, so there is nothing to go on with.
            Some(_) => None,
            None => snapshot::pending(&self.dir, &self.stored()).map_err(&failed)?,
        };
        // A snapshot is of the machine as it was; a change waits until it boots.
        if restore.is_none() {
            self.apply_next().map_err(&failed)?;
        }
        let stored = self.laid_for(rescue).await.map_err(&failed)?;
        let run = self.clear(restore.as_ref()).map_err(&failed)?;
        let root = jail::prepare_root(&self.dir, &stored, platform).map_err(&failed)?;
        if stored.has_interface() {
            let owner = if platform.jailer.is_some() { stored.uid } else { 0 };
            tap::make(self.tap_place(), stored.uid, owner).await.map_err(&failed)?;
        }
        let mut unfinished = Unfinished(Some(&self.phase));
        let mut child = self.spawn(lock, platform, &stored, &root).map_err(&failed)?;
        let begun = self.begin(&mut child, &root, &stored, restore.as_ref());
        let begun = tokio::time::timeout(START_TIMEOUT, begun).await.unwrap_or_else(|_| {
            let timeout_ms = u64::try_from(START_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
            Err(Problem::Timeout { what: "the start of firecracker".to_owned(), timeout_ms })
        });
        let process = match begun {
            Ok(process) => process,
            Err(problem) => {
                self.give_up(&mut child, &run, restore.as_ref(), &problem).await.map_err(&failed)?;
                unfinished.0 = None;
                return Err(failed(problem));
            }
        };
        let stands = restore.as_ref().is_some_and(|restore| restore.after() == After::Stand);
        self.dir.remove(RESTORE).map_err(&failed)?;
        let live = self.up(process, Some(child), run).map_err(&failed)?;
        live.paused.store(stands, Ordering::Relaxed);
        unfinished.0 = None;
        Ok(())
    }

    /// What it is started as, once that lies in its root.
    async fn laid_for(&self, rescue: Option<Boot>) -> Outcome<Stored> {
        let (stored, root) = (self.stored(), self.root());
        let laid = tokio::task::spawn_blocking(move || match rescue {
            None => rescue::clear(&root).map(|()| stored),
            Some(boot) => rescue::lay(&root, &boot).map(|()| rescue::as_started(&stored, &boot)),
        });
        laid.await.map_err(|panicked| Problem::Process(std::io::Error::other(panicked)))?
    }

    /// Dead already, or of no use. A snapshot that cannot be loaded is not tried for ever: the next start boots.
    async fn give_up(
        &self,
        child: &mut Child,
        run: &StoredRun,
        restore: Option<&Restore>,
        problem: &Problem,
    ) -> Outcome<()> {
        let _ = child.kill().await;
        if restore.is_some() && matches!(problem, Problem::Refused { .. } | Problem::DiedStarting(_)) {
            self.dir.remove(RESTORE)?;
        }
        let exit = StoredExit { run: run.number, exit: Exit::Failed(problem.to_string()) };
        self.dir.note(EXIT, &exit)?;
        *self.phase.lock() = Phase::Down(exit.exit);
        Ok(())
    }

    pub(crate) fn tap_place(&self) -> tap::Place<'_> {
        let options = &self.shared.options;
        let wants_network = self.stored.lock().config.spec.network.is_some();
        let bridge = options.bridge.as_deref().filter(|_| wants_network);
        tap::Place { netns: options.netns.as_deref(), bridge }
    }

    /// Takes away what the last run left, and counts this one.
    fn clear(&self, restore: Option<&Restore>) -> Outcome<StoredRun> {
        self.dir.remove(HELD)?;
        let last = self.dir.read::<StoredRun>(RUN)?;
        // How the last run ended must be on record before its traces go.
        if let Phase::Down(exit) = &*self.phase.lock()
            && let Some(last) = &last
            && self.dir.read::<StoredExit>(EXIT)?.is_none_or(|known| known.run != last.number)
        {
            self.dir.note(EXIT, &StoredExit { run: last.number, exit: exit.clone() })?;
        }
        let number = last.map_or(1, |run| run.number + 1);
        self.dir.empty(STDERR)?;
        self.dir.append(CONSOLE)?;
        let tracked_since =
            restore.and_then(Restore::own_name).filter(|_| self.shared.options.diff_snapshots);
        let run = StoredRun { number, started_ms: now_ms(), tracked_since };
        self.dir.note(RUN, &run)?;
        Ok(run)
    }

    fn spawn(
        &self,
        lock: std::fs::File,
        platform: &Platform,
        stored: &Stored,
        root: &Path,
    ) -> Outcome<Child> {
        let (console, complaints) = (self.dir.append(CONSOLE)?, self.dir.append(STDERR)?);
        let mut command = jail::command(&self.shared.options, platform, &self.dir, stored, root);
        command.stdin(Stdio::from(lock)).stdout(Stdio::from(console)).stderr(Stdio::from(complaints));
        // A group of its own: what ends the agent's group does not end the guests.
        command.process_group(0).kill_on_drop(false).env_clear();
        let remedy = "check that it is executable";
        command.spawn().map_err(|source| Problem::Spawn { tool: "firecracker".to_owned(), remedy, source })
    }

    /// Waits until the API answers, and tells it what is to run.
    async fn begin(
        &self,
        child: &mut Child,
        root: &Path,
        stored: &Stored,
        restore: Option<&Restore>,
    ) -> Outcome<Process> {
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or_default();
        let process = Process::open(pid).map_err(Problem::Process)?;
        let mut api = self.ready(child, root).await?;
        let track = self.shared.options.diff_snapshots;
        let told = match restore {
            None => boot::boot(&mut api, stored, track).await,
            Some(restore) => boot::load(&mut api, stored, track, restore.after()).await,
        };
        let Err(problem) = told else { return Ok(process) };
        // What refuses to load a snapshot ends, and its own words tell more than a broken connection.
        let is_dead = tokio::time::timeout(DYING_TIMEOUT, child.wait()).await.is_ok();
        match problem {
            Problem::Unreachable { .. } if is_dead => {
                Err(Problem::DiedStarting(exit::complaint(&self.dir, root)))
            }
            other => Err(other),
        }
    }

    /// Tries again and again: to watch for the socket would be to close the watch afterwards, which takes the kernel
    /// longer (it waits until nobody reads its marks, up to 15 ms) than Firecracker takes to be there.
    async fn ready(&self, child: &mut Child, root: &Path) -> Outcome<Api> {
        loop {
            if let Ok(api) = Api::connect(root).await {
                return Ok(api);
            }
            tokio::select! {
                _ = child.wait() => return Err(Problem::DiedStarting(exit::complaint(&self.dir, root))),
                () = tokio::time::sleep(START_RETRY) => {}
            }
        }
    }
}

/// A start that is given up half-way leaves a VMM that nobody knows; the next look finds it.
struct Unfinished<'a>(Option<&'a Mutex<Phase>>);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(phase) = self.0 {
            *phase.lock() = Phase::Unknown;
        }
    }
}
