//! Which pulls of images are under way: each is driven by one future while this server leads.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hv_types::{OperationKind, OperationRecord};
use tokio::sync::{Notify, Semaphore, watch};
use tracing::warn;

use super::drive::Drive;
use crate::Cluster;
use crate::cache::{Batch, Delta, State, Subscription, SubscriptionError};
use crate::election::Leadership;

/// How many nodes fetch at once, over all operations.
const CALLS: usize = 64;
/// How often it is looked whether this server has a way to nodes by now.
const NO_AGENTS_PAUSE: Duration = Duration::from_secs(1);

fn is_active(operation: &OperationRecord) -> bool {
    operation.kind == OperationKind::PullImage && !operation.state.is_final()
}

/// What a leader keeps in mind.
#[derive(Default)]
struct Work {
    /// Those that are not driven yet.
    waiting: BTreeSet<String>,
    /// Those that are.
    running: HashMap<String, Arc<Notify>>,
    /// Tells those that wait for nodes that one came or went.
    fleet: watch::Sender<()>,
}

impl Work {
    fn of(state: &State) -> Self {
        let active = state.operations_before(None).filter(|operation| is_active(operation));
        Self { waiting: active.map(|operation| operation.id.clone()).collect(), ..Self::default() }
    }

    fn take(&mut self, batch: &Batch) {
        for delta in &batch.deltas {
            match delta {
                Delta::Operation { id, after, .. } => match (self.running.get(id), after) {
                    (Some(changed), _) => changed.notify_one(),
                    (None, Some(operation)) if is_active(operation) => drop(self.waiting.insert(id.clone())),
                    (None, _) => drop(self.waiting.remove(id)),
                },
                Delta::Node { before, after, .. } => {
                    let is_live = |node: &Option<(_, bool)>| node.as_ref().map(|(_, is_live)| *is_live);
                    if is_live(before) != is_live(after) {
                        self.fleet.send_replace(());
                    }
                }
                Delta::Instance { .. } | Delta::Event(_) | Delta::Hold { .. } => {}
            }
        }
    }
}

impl Cluster {
    /// Has images fetched while this server leads.
    pub(crate) async fn pull_images_while_leading(&self, leadership: &Leadership) {
        loop {
            if let Err(error) = self.cache.wait_for(leadership.since).await {
                warn!(
                    error = hv_telemetry::error_chain(error.service()),
                    "pulls of images wait for the cache"
                );
                continue;
            }
            let (work, changes) = self.cache.subscribe(Work::of);
            self.pull_images(leadership, work, changes).await;
        }
    }

    /// Until changes were missed. What is under way is dropped then, and goes on from its record.
    async fn pull_images(&self, leadership: &Leadership, mut work: Work, mut changes: Subscription) {
        let calls = Semaphore::new(CALLS);
        let mut running = FuturesUnordered::new();
        loop {
            let agents = self.agents.get();
            if let Some(agents) = &agents {
                for id in std::mem::take(&mut work.waiting) {
                    let changed = Arc::new(Notify::new());
                    work.running.insert(id.clone(), changed.clone());
                    let fleet = work.fleet.subscribe();
                    let drive =
                        Drive::new(self, leadership, agents.clone(), &calls, id.clone(), changed, fleet);
                    running.push(async move {
                        drive.run().await;
                        id
                    });
                }
            }
            tokio::select! {
                batch = changes.next() => match batch {
                    Ok(Some(batch)) => work.take(&batch),
                    Ok(None) => std::future::pending().await,
                    Err(SubscriptionError::Lagged | SubscriptionError::Expired) => return,
                },
                Some(id) = running.next(), if !running.is_empty() => drop(work.running.remove(&id)),
                () = tokio::time::sleep(NO_AGENTS_PAUSE), if agents.is_none() && !work.waiting.is_empty() => {}
            }
        }
    }
}
