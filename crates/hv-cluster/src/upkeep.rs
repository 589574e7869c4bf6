//! The leader's upkeep of the store: forgetting what was superseded, giving room back.

use hv_store::upkeep::{Upkeep, run};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::Cluster;
use crate::election::{Leadership, in_each_term};

impl Cluster {
    /// Looks after the store while this server leads, until `stop`. Two at once would do no harm.
    pub async fn run_store_upkeep(
        &self,
        leading: watch::Receiver<Option<Leadership>>,
        stop: CancellationToken,
    ) {
        in_each_term(leading, stop, |_| run(self.store.clone(), Upkeep::default(), std::future::pending()))
            .await;
    }
}
