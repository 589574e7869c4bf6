//! Stopping a microVM: its guest is asked, or its VMM is killed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hv_driver::{Exit, StopMode};

use super::{Done, KILL_TIMEOUT, Live, Machine};
use crate::api::types::Action;
use crate::files::{ASKED, EXIT, OfRun, StoredExit};
use crate::problem::{Outcome, Problem};

/// A guest that boots does not hear the keyboard yet, so the keys are pressed again.
const ASK_INTERVAL: Duration = Duration::from_secs(3);

impl Machine {
    pub(crate) async fn stop(self: &Arc<Self>, mode: StopMode) -> Done<()> {
        let _change = self.change.lock().await;
        self.stop_held(mode, "stop").await
    }

    /// `change` is held.
    pub(crate) async fn stop_held(self: &Arc<Self>, mode: StopMode, operation: &'static str) -> Done<()> {
        let Some(live) = self.live_held(operation).await? else { return Ok(()) };
        live.stopping.store(true, Ordering::Release);
        let outcome = self.stop_live(&live, mode, operation).await;
        if outcome.is_err() {
            live.stopping.store(false, Ordering::Release);
        }
        outcome
    }

    async fn stop_live(&self, live: &Live, mode: StopMode, operation: &'static str) -> Done<()> {
        let asked = OfRun { run: live.run.number };
        if let StopMode::Graceful(timeout) = mode {
            self.dir.note(ASKED, &asked).map_err(self.failed(operation))?;
            if tokio::time::timeout(timeout, self.ask(live)).await.is_ok() {
                return Ok(());
            }
        }
        // A killed process says nothing, so it is written down first.
        let exit = StoredExit { run: live.run.number, exit: Exit::Stopped };
        self.dir.note(EXIT, &exit).map_err(self.failed(operation))?;
        live.process.kill().map_err(Problem::Process).map_err(self.failed(operation))?;
        match live.gone_within(KILL_TIMEOUT).await {
            true => Ok(()),
            false => Err(self.too_slow(operation, KILL_TIMEOUT)),
        }
    }

    /// Presses ctrl-alt-del until the machine is gone.
    async fn ask(&self, live: &Live) {
        loop {
            if let Err(error) = press(live).await {
                tracing::debug!(instance = %self.id, %error, "ctrl-alt-del could not be pressed");
            }
            if live.gone_within(ASK_INTERVAL).await {
                return;
            }
        }
    }
}

async fn press(live: &Live) -> Outcome<()> {
    // A machine that stands still hears nothing.
    if live.is_paused().await {
        live.set_paused(false).await?;
    }
    live.api().await?.act(Action::SendCtrlAltDel).await
}
