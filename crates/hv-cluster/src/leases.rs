//! Leases that many short-lived keys share, so that forgetting costs nothing per key.

use std::time::Duration;

use hv_store::{LeaseId, SharedStore, StoreError};
use tokio::sync::Mutex;
use tokio::time::Instant;

/// A lease that is replaced by a new one from time to time and never renewed: its keys live for at least the time
/// asked for, and at most [`SHARE`] longer.
#[derive(Default)]
pub(crate) struct RollingLease {
    current: Mutex<Option<(LeaseId, Instant)>>,
}

/// How long new keys join the same lease.
const SHARE: Duration = Duration::from_secs(600);

impl RollingLease {
    /// The lease that a key of this moment ends with.
    pub(crate) async fn current(&self, store: &SharedStore, ttl: Duration) -> Result<LeaseId, StoreError> {
        let mut current = self.current.lock().await;
        if let Some((lease, granted)) = *current
            && granted.elapsed() < SHARE
        {
            return Ok(lease);
        }
        let lease = store.lease_grant(ttl + SHARE).await?;
        *current = Some((lease, Instant::now()));
        Ok(lease)
    }

    /// Grants a new lease next time, if the current one is still `ended` (0 where it is not known), which is gone.
    pub(crate) async fn forget(&self, ended: LeaseId) {
        let mut current = self.current.lock().await;
        if current.is_some_and(|(lease, _)| lease == ended || ended.0 == 0) {
            *current = None;
        }
    }
}
