//! One container: whether it runs, and the operations on it.
//!
//! # Theory of operation
//! At first nothing is known (`Unknown`); the first look takes over a container that runs, or reads how the last run
//! ended. From then on only this process starts it, and a task waits for its end, so the phase is always true. That
//! it runs is told by the kernel (its first process, held by a pidfd, is in its control group), so containerd may come
//! and go. Changing operations hold `change`; reads do not wait for them.

use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::snapshots::MountsRequest;
use containerd_client::types::Mount as WireMount;
use hv_driver::{DriverError, DriverEvent, Exit, Observed, Running};
use hv_types::InstanceId;
use parking_lot::Mutex;
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::ContainerdOptions;
use crate::cgroup::Cgroup;
use crate::client::{Client, call};
use crate::files::{EXIT, InstanceDir, RUN, Stored, StoredExit, StoredRun};
use crate::network::Network;
use crate::problem::{Gone as _, Outcome};
use crate::process::Process;

mod ending;
mod starting;
mod stopping;

pub(crate) use stopping::remove;

/// What all containers of a driver share.
pub(crate) struct Shared {
    pub(crate) client: Client,
    pub(crate) options: ContainerdOptions,
    pub(crate) network: Network,
    pub(crate) keeper: std::path::PathBuf,
    pub(crate) events: broadcast::Sender<DriverEvent>,
    /// Whether containerd answers, as far as known.
    pub(crate) is_up: watch::Sender<bool>,
    /// Ends every task when the driver is dropped. The containers run on.
    pub(crate) cancelled: CancellationToken,
}

/// A container that runs.
pub(crate) struct Live {
    pub(crate) process: Process,
    pub(crate) run: StoredRun,
    /// How it ends if the driver ends it: decided before the first signal.
    verdict: Mutex<Option<Exit>>,
    pub(crate) ended: watch::Receiver<bool>,
}

impl Live {
    /// Whether it is gone within a time.
    pub(crate) async fn gone_within(&self, timeout: Duration) -> bool {
        let mut ended = self.ended.clone();
        // If the sender is gone nobody will say it any more, and that is an end too.
        tokio::time::timeout(timeout, ended.wait_for(|ended| *ended)).await.is_ok()
    }
}

#[derive(Clone)]
enum Phase {
    Unknown,
    Down(Exit),
    Up(Arc<Live>),
}

/// A container that was completely created.
pub(crate) struct Container {
    pub(crate) id: InstanceId,
    pub(crate) dir: InstanceDir,
    pub(crate) cgroup: Cgroup,
    pub(crate) shared: Arc<Shared>,
    stored: Mutex<Arc<Stored>>,
    change: tokio::sync::Mutex<()>,
    phase: Mutex<Phase>,
}

pub(crate) type Done<T> = Result<T, DriverError>;

impl Container {
    pub(crate) fn new(dir: InstanceDir, stored: Stored, shared: Arc<Shared>) -> Self {
        let id = stored.config.id.clone();
        Self {
            cgroup: Cgroup::new(&shared.options.cgroup_parent, id.as_str()),
            id,
            dir,
            stored: Mutex::new(Arc::new(stored)),
            shared,
            change: tokio::sync::Mutex::default(),
            phase: Mutex::new(Phase::Unknown),
        }
    }

    pub(crate) fn stored(&self) -> Arc<Stored> {
        self.stored.lock().clone()
    }

    /// The running container, if it runs.
    pub(crate) async fn live(self: &Arc<Self>, operation: &'static str) -> Done<Option<Arc<Live>>> {
        if matches!(*self.phase.lock(), Phase::Unknown) {
            let _change = self.change.lock().await;
            self.look().await.map_err(|problem| problem.told(&self.id, operation))?;
        }
        match &*self.phase.lock() {
            Phase::Up(live) => Ok(Some(live.clone())),
            Phase::Unknown | Phase::Down(_) => Ok(None),
        }
    }

    pub(crate) async fn observe(self: &Arc<Self>) -> Done<Observed> {
        self.live("observe").await?;
        let phase = self.phase.lock().clone();
        Ok(match phase {
            Phase::Unknown => Observed::Stopped(Exit::Lost),
            Phase::Down(exit) => Observed::Stopped(exit),
            Phase::Up(live) => {
                let running = Running { since: Some(live.run.since()), ip: live.run.ip };
                match self.cgroup.is_frozen() {
                    true => Observed::Paused(running),
                    false => Observed::Running(running),
                }
            }
        })
    }

    /// Whether it runs, as far as is known without looking.
    pub(crate) fn is_up(&self) -> bool {
        matches!(*self.phase.lock(), Phase::Up(_))
    }

    /// Finds out what is the case, once. `change` is held.
    async fn look(self: &Arc<Self>) -> Outcome<()> {
        if !matches!(*self.phase.lock(), Phase::Unknown) {
            return Ok(());
        }
        let run = self.dir.read::<StoredRun>(RUN)?;
        let exit = self.dir.read::<StoredExit>(EXIT)?;
        let Some(run) = run else {
            *self.phase.lock() = Phase::Down(Exit::NeverStarted);
            return Ok(());
        };
        let process = Process::open_in(run.pid, &self.cgroup)?;
        match process {
            Some(process) if run.is_begun => {
                // Written by a stop that was cut short: it is not how this run ends.
                if exit.is_some_and(|exit| exit.run == run.number) {
                    self.dir.remove(EXIT)?;
                }
                tracing::info!(instance = %self.id, pid = process.pid, "took over a running container");
                self.abandon_commands().await;
                self.up(process, run);
            }
            _ => {
                let exit = match exit {
                    Some(exit) if exit.run == run.number => exit.exit,
                    _ => self.end_unseen(run).await?,
                };
                *self.phase.lock() = Phase::Down(exit);
            }
        }
        Ok(())
    }

    /// From here on the container runs, and its end is waited for.
    fn up(self: &Arc<Self>, process: Process, run: StoredRun) {
        let (end, ended) = watch::channel(false);
        let live = Arc::new(Live { process, run, verdict: Mutex::default(), ended });
        *self.phase.lock() = Phase::Up(live.clone());
        let cancelled = self.shared.cancelled.clone();
        let (container, watched) = (self.clone(), live.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = cancelled.cancelled() => {}
                () = container.watch(&watched, end) => {}
            }
        });
        if self.stored().config.spec.health_check.is_some() {
            let (container, cancelled) = (self.clone(), self.shared.cancelled.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = cancelled.cancelled() => {}
                    () = crate::health::watch(&container, &live) => {}
                }
            });
        }
    }

    /// The mounts of its root file system.
    pub(crate) async fn root(&self) -> Outcome<Vec<WireMount>> {
        let client = &self.shared.client;
        let request = MountsRequest { snapshotter: client.snapshotter.clone(), key: self.id.to_string() };
        let answer = call("snapshot mounts", client.snapshots().mounts(client.request(request))).await?;
        Ok(answer.mounts)
    }

    /// Takes away what a run left in containerd and on the network. Nothing of it runs.
    async fn clear(&self) -> Outcome<()> {
        self.shared.client.delete_task(self.id.as_str()).await.or_gone()?;
        self.shared.network.disconnect(self.id.as_str()).await
    }
}
