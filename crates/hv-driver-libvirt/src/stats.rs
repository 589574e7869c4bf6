//! How much the machines use: one call to libvirtd for all of them, kept for a second.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hv_driver::Stats;
use uuid::Uuid;

use crate::daemon::Daemon;
use crate::problem::Outcome;
use crate::xdr::Params;

/// How long an answer is good.
const KEPT: Duration = Duration::from_secs(1);

/// The last answer.
#[derive(Default)]
pub(crate) struct StatsCache(tokio::sync::Mutex<Option<(Instant, HashMap<Uuid, Stats>)>>);

impl StatsCache {
    /// What a machine uses; `None` if libvirtd says nothing of it, because it does not run.
    pub(crate) async fn of(&self, daemon: &Daemon, uuid: Uuid) -> Outcome<Option<Stats>> {
        let mut kept = self.0.lock().await;
        if let Some((at, all)) = &*kept
            && at.elapsed() < KEPT
            && let Some(stats) = all.get(&uuid)
        {
            return Ok(Some(*stats));
        }
        let mut all = HashMap::new();
        for domain in daemon.all_stats().await? {
            // A machine that is busy with something tells its state and nothing else: the last numbers stand.
            let stats = read(&domain.params).or_else(|| kept.as_ref()?.1.get(&domain.uuid).copied());
            if let Some(stats) = stats {
                all.insert(domain.uuid, stats);
            }
        }
        let found = all.get(&uuid).copied();
        *kept = Some((Instant::now(), all));
        Ok(found)
    }
}

fn read(params: &Params) -> Option<Stats> {
    Some(Stats {
        cpu_time_ns: params.count("cpu.time")?,
        memory_used_bytes: params.count("balloon.rss")?.saturating_mul(1024),
        memory_cache_bytes: 0,
        disk_read_bytes: params.sum("block", "rd.bytes"),
        disk_write_bytes: params.sum("block", "wr.bytes"),
        network_rx_bytes: params.sum("net", "rx.bytes"),
        network_tx_bytes: params.sum("net", "tx.bytes"),
    })
}
