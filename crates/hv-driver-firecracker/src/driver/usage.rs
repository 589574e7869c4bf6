//! How much an instance uses: the VMM's process, the metrics that it writes, and what its guest tells.

use std::time::Duration;

use hv_driver::{DriverError, Result, Stats};
use hv_types::InstanceId;

use super::FirecrackerDriver;
use crate::api::types::Action;
use crate::files::{LOG, METRICS};
use crate::metrics;
use crate::problem::Problem;

/// How long the guest's own figures are waited for; they are an addition.
const BALLOON_TIMEOUT: Duration = Duration::from_millis(200);

impl FirecrackerDriver {
    pub(super) async fn usage(&self, id: &InstanceId) -> Result<Stats> {
        let (machine, live) = self.live(id, "stats").await?;
        let failed = |problem: Problem| DriverError::failed(id, "stats", problem);
        let mut sums = live.sums.lock().await;
        let mut api = live.api().await.map_err(failed)?;
        api.act(Action::FlushMetrics).await.map_err(failed)?;
        let (cpu_time_ns, memory_used_bytes) =
            live.process.usage().map_err(Problem::Process).map_err(failed)?;
        let path = live.root.join(METRICS);
        sums.advance(&machine.dir, &path).map_err(Problem::file("read", &path)).map_err(failed)?;
        if let Err(error) = metrics::trim_log(&live.root.join(LOG)) {
            tracing::debug!(instance = %id, %error, "the log of firecracker was not trimmed");
        }
        // Refused as long as the guest has no driver for it.
        let told = tokio::time::timeout(BALLOON_TIMEOUT, api.balloon_statistics()).await;
        let cache = told.ok().and_then(|told| told.ok()?.disk_caches);
        Ok(Stats {
            cpu_time_ns,
            memory_used_bytes,
            memory_cache_bytes: cache.unwrap_or(0),
            disk_read_bytes: sums.disk_read_bytes,
            disk_write_bytes: sums.disk_write_bytes,
            network_rx_bytes: sums.network_rx_bytes,
            network_tx_bytes: sums.network_tx_bytes,
        })
    }
}
