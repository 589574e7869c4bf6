//! The leader's slow work: what must become true sooner or later, whoever is interrupted in between.
//!
//! Failover, operations, and the removal of what is kept no longer run side by side while this server leads; a term that
//! ends drops them where they stand. Beside them every server, leading or not, notes which nodes it sees being lost.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::Cluster;
use crate::election::{Leadership, in_each_term};

impl Cluster {
    /// Reconciles while this server leads, until `stop`.
    pub async fn run_reconciler(
        &self,
        leading: watch::Receiver<Option<Leadership>>,
        stop: CancellationToken,
    ) {
        let terms = in_each_term(leading, stop.clone(), |leadership| async move {
            tokio::join!(
                self.fail_over_while_leading(&leadership),
                self.operate_while_leading(&leadership),
                self.migrate_while_leading(&leadership),
                self.snapshot_while_leading(&leadership),
                self.pull_images_while_leading(&leadership),
                self.trim_operations_while_leading(&leadership),
            );
        });
        tokio::join!(terms, self.watch_liveness(stop));
    }
}
