//! What the service manager is told: that the process serves, that it still does, and that it stops (`sd_notify(3)`).
//!
//! # Theory of operation
//! A process whose threads wait for each other for ever looks alive from outside and serves nobody. So the signs of life
//! come from a task of the same runtime, after a look at what everything else needs too; where they stay away for the time
//! that `WatchdogSec=` gives, systemd ends the process and starts it anew. Without a service manager nothing is told.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// How many signs of life fit into the time after which the process is taken for dead.
const SIGNS: u32 = 4;

/// Says that the process is ready, then that it lives for as long as `look` returns, until `stop`.
pub async fn tell(look: impl Fn() + Send, stop: CancellationToken) {
    say(NotifyState::Ready);
    if let Some(patience) = sd_notify::watchdog_enabled().filter(|patience| !patience.is_zero()) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = live(patience, look) => {}
        }
    }
    stop.cancelled().await;
    say(NotifyState::Stopping);
}

async fn live(patience: Duration, look: impl Fn()) {
    let mut tick = tokio::time::interval(patience / SIGNS);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        look();
        say(NotifyState::Watchdog);
    }
}

fn say(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "the service manager cannot be told how the process is");
    }
}
