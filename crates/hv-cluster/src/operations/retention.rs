//! How long ended operations are kept: by age and by number.

use std::time::{Duration, SystemTime};

use hv_store::{Compare, Op, Txn, TxnOutcome};
use tracing::warn;

use crate::Cluster;
use crate::election::Leadership;
use crate::error::Result;

/// How often it is looked for operations that are kept no longer.
const INTERVAL: Duration = Duration::from_secs(60);
/// Most operations removed in one transaction.
const BATCH: usize = 100;
/// Most transactions of one pass: what is left waits for the next.
const MAX_BATCHES: usize = 20;

impl Cluster {
    /// Removes what is kept no longer, from time to time, while this server leads.
    pub(crate) async fn trim_operations_while_leading(&self, leadership: &Leadership) {
        loop {
            tokio::time::sleep(INTERVAL).await;
            if let Err(error) = self.trim_operations(leadership, SystemTime::now()).await {
                warn!(
                    error = hv_telemetry::error_chain(error.service()),
                    "ended operations were not removed; it is tried again"
                );
            }
        }
    }

    async fn trim_operations(&self, leadership: &Leadership, now: SystemTime) -> Result<()> {
        for _ in 0..MAX_BATCHES {
            if self.is_frozen() {
                return Ok(());
            }
            let old = self.kept_no_longer(now);
            if old.is_empty() {
                return Ok(());
            }
            let mut txn = Txn { compares: vec![leadership.guard(), self.unfrozen()?], ..Txn::default() };
            for (id, revision) in old {
                let key = self.keys.operation(&id);
                txn.compares.push(Compare::ModRevision(key.clone(), revision));
                txn.then.push(Op::delete(key));
            }
            match self.store.txn(txn).await? {
                TxnOutcome::Committed(revision) => self.cache.wait_for(revision).await?,
                TxnOutcome::Refused(_) => self.sync().await.map(drop)?,
            }
        }
        Ok(())
    }

    /// The oldest operations that have ended and are too old or too many.
    #[must_use]
    pub fn kept_no_longer(&self, now: SystemTime) -> Vec<(String, hv_types::Revision)> {
        let max_age = self.config.operation_max_age;
        self.cache.read(|state| {
            let ended = state.operations_before(None).filter(|operation| operation.state.is_final());
            let aged = |ended: SystemTime| now.duration_since(ended).is_ok_and(|age| age > max_age);
            let mut old: Vec<_> = ended
                .enumerate()
                .filter(|(newer, operation)| {
                    *newer >= self.config.operation_limit
                        || aged(operation.finished_at.unwrap_or(operation.updated_at))
                })
                .map(|(_, operation)| (operation.id.clone(), operation.revision))
                .collect();
            old.reverse();
            old.truncate(BATCH);
            old
        })
    }
}
