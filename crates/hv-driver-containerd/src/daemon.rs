//! Whether containerd is there: its stream of events ends at once when it dies, and begins again when it is back.

use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::SubscribeRequest;
use hv_driver::DriverEvent;
use hv_types::InstanceId;

use crate::client::bounded;
use crate::container::Shared;

/// How often containerd is looked for while it is away.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);
/// How long a look may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);
/// How often it is asked whether it still answers while it says nothing.
const QUIET_INTERVAL: Duration = Duration::from_secs(1);
/// So many looks in vain, one after the other, and it is away: a busy machine may miss one.
const MAX_MISSED: u32 = 3;

/// Follows containerd until the driver is dropped. `running`: who is to be told when it goes and comes.
pub(crate) async fn watch(shared: Arc<Shared>, running: impl Fn() -> Vec<InstanceId>) {
    let tell = |what: &str| {
        for id in running() {
            // Nobody listening is no error.
            let _ = shared.events.send(DriverEvent { id, what: what.to_owned() });
        }
    };
    let mut was_up = None;
    loop {
        let is_up = shared.client.version_text(LOOK_TIMEOUT).await.is_ok();
        if is_up {
            shared.is_up.send_replace(true);
            if was_up == Some(false) {
                tracing::info!("containerd is back");
                tell("containerd is back");
            }
            was_up = Some(true);
            follow(&shared).await;
        }
        shared.is_up.send_replace(false);
        if was_up == Some(true) {
            tracing::warn!("containerd does not answer any more; the containers run on");
            tell("containerd does not answer any more; the container runs on, but cannot be changed");
        }
        was_up = Some(false);
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

/// Returns when containerd has gone away.
async fn follow(shared: &Shared) {
    let filter = format!("namespace=={}", shared.client.namespace_name);
    let request = shared.client.request(SubscribeRequest { filters: vec![filter] });
    let mut events = shared.client.events();
    let Ok(mut stream) = bounded("subscribe", LOOK_TIMEOUT, events.subscribe(request)).await else {
        // Some versions answer with the first event only; then asking has to do.
        return ask(shared).await;
    };
    let mut missed = 0;
    while missed < MAX_MISSED {
        match tokio::time::timeout(QUIET_INTERVAL, stream.message()).await {
            // What ended is told by the kernel; that something came is enough.
            Ok(Ok(Some(_))) => missed = 0,
            Ok(Ok(None) | Err(_)) => return,
            Err(_) => match shared.client.version_text(LOOK_TIMEOUT).await {
                Ok(_) => missed = 0,
                Err(_) => missed += 1,
            },
        }
    }
}

async fn ask(shared: &Shared) {
    let mut missed = 0;
    while missed < MAX_MISSED {
        // One that is gone refuses at once, and is known to be gone soon.
        tokio::time::sleep(if missed == 0 { QUIET_INTERVAL } else { RETRY_INTERVAL }).await;
        match shared.client.version_text(LOOK_TIMEOUT).await {
            Ok(_) => missed = 0,
            Err(_) => missed += 1,
        }
    }
}
