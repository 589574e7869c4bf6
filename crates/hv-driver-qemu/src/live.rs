//! A machine that is there: its process, its monitor, its console, and what it is doing.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use hv_machine::console::{ConsoleHub, end_of};
use hv_machine::process::Process;
use tokio::sync::watch;

use crate::files::StoredRun;
use crate::qmp::Monitor;

/// How long a look at the machine may take before the last known state is told.
const OBSERVE_TIMEOUT: Duration = Duration::from_secs(2);

/// A machine that runs.
pub(crate) struct Live {
    pub(crate) process: Process,
    pub(crate) monitor: Monitor,
    pub(crate) console: ConsoleHub,
    pub(crate) run: StoredRun,
    pub(crate) status: AtomicU8,
    pub(crate) stopping: AtomicBool,
    pub(crate) ended: watch::Receiver<bool>,
}

impl Live {
    /// Whether it is gone within a time.
    pub(crate) async fn gone_within(&self, timeout: Duration) -> bool {
        let mut ended = self.ended.clone();
        tokio::time::timeout(timeout, end_of(&mut ended)).await.is_ok()
    }

    /// Asks QEMU whether the machine stands still.
    pub(crate) async fn is_paused(&self) -> bool {
        self.status().await == Status::Still
    }

    /// Asks QEMU what the machine is doing; what was last heard if it does not answer.
    pub(crate) async fn status(&self) -> Status {
        if let Ok(status) = self.monitor.command_within("query-status", None, OBSERVE_TIMEOUT).await {
            let status = Status::of(status["status"].as_str().unwrap_or_default());
            self.status.store(status as u8, Ordering::Relaxed);
        }
        let last = self.status.load(Ordering::Relaxed);
        let all = [Status::Running, Status::Still, Status::Waiting, Status::HandedOver];
        all.into_iter().find(|status| *status as u8 == last).unwrap_or(Status::Running)
    }

    /// Whether its process is gone.
    pub(crate) fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }
}

/// What a machine that is there is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Running,
    Still,
    /// For what another node hands over.
    Waiting,
    /// Everything of it was sent to another node.
    HandedOver,
}

impl Status {
    /// From QEMU's `RunState` (qapi/run-state.json). A machine that is about to be handed over stands still for a
    /// moment, which is no pause.
    fn of(name: &str) -> Self {
        match name {
            "paused" | "prelaunch" | "restore-vm" => Self::Still,
            "inmigrate" => Self::Waiting,
            "postmigrate" => Self::HandedOver,
            _ => Self::Running,
        }
    }
}
