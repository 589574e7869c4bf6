//! Which operations on snapshots are under way: one at a time for each instance, in the order of their ids.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hv_types::OperationRecord;
use tokio::sync::{Notify, Semaphore};
use tracing::warn;

use super::SnapshotTask;
use super::drive::Drive;
use crate::Cluster;
use crate::cache::{Batch, Delta, State, Subscription, SubscriptionError};
use crate::election::Leadership;

/// How many nodes are asked at once.
const CALLS: usize = 64;
/// How often it is looked whether this server has a way to nodes by now.
const NO_AGENTS_PAUSE: Duration = Duration::from_secs(1);

fn is_active(operation: &OperationRecord) -> bool {
    !operation.state.is_final() && SnapshotTask::of(operation).is_some()
}

/// What a leader keeps in mind.
#[derive(Default)]
struct Work {
    /// Those that have not ended and are not worked on, with their instances.
    waiting: BTreeMap<String, String>,
    /// Those that are worked on, by instance.
    running: HashMap<String, (String, Arc<Notify>)>,
}

impl Work {
    fn of(state: &State) -> Self {
        let mut work = Self::default();
        state.operations_before(None).filter(|operation| is_active(operation)).for_each(|o| work.add(o));
        work
    }

    fn add(&mut self, operation: &OperationRecord) {
        let object = &operation.object_id;
        if self.running.get(object).is_none_or(|(id, _)| *id != operation.id) {
            self.waiting.insert(operation.id.clone(), object.clone());
        }
    }

    fn take(&mut self, batch: &Batch) {
        for delta in &batch.deltas {
            match delta {
                Delta::Operation { after: Some(operation), .. } if is_active(operation) => {
                    self.add(operation);
                    self.wake(&operation.object_id);
                }
                Delta::Operation { id, .. } => {
                    self.waiting.remove(id);
                }
                Delta::Instance { id, .. } => self.wake(id.as_str()),
                Delta::Node { .. } => self.running.values().for_each(|(_, changed)| changed.notify_one()),
                Delta::Event(_) | Delta::Hold { .. } => {}
            }
        }
    }

    fn wake(&self, object: &str) {
        if let Some((_, changed)) = self.running.get(object) {
            changed.notify_one();
        }
    }

    /// Those whose turn it is.
    fn next(&mut self) -> Vec<(String, String, Arc<Notify>)> {
        let mut taken = BTreeSet::new();
        let mut begun = Vec::new();
        for (id, object) in &self.waiting {
            if self.running.contains_key(object) || !taken.insert(object.clone()) {
                continue;
            }
            begun.push((id.clone(), object.clone(), Arc::new(Notify::new())));
        }
        for (id, object, changed) in &begun {
            self.waiting.remove(id);
            self.running.insert(object.clone(), (id.clone(), changed.clone()));
        }
        begun
    }
}

impl Cluster {
    /// Works on snapshots while this server leads.
    pub(crate) async fn snapshot_while_leading(&self, leadership: &Leadership) {
        loop {
            if let Err(error) = self.cache.wait_for(leadership.since).await {
                warn!(error = hv_telemetry::error_chain(error.service()), "snapshots wait for the cache");
                continue;
            }
            let (work, changes) = self.cache.subscribe(Work::of);
            self.snapshot_all(leadership, work, changes).await;
        }
    }

    /// Until changes were missed. What is worked on is dropped then, and goes on from its record.
    async fn snapshot_all(&self, leadership: &Leadership, mut work: Work, mut changes: Subscription) {
        let calls = Semaphore::new(CALLS);
        let mut running = FuturesUnordered::new();
        loop {
            let agents = self.agents.get();
            if let Some(agents) = &agents {
                for (id, object, changed) in work.next() {
                    let drive = Drive::new(self, leadership, agents.clone(), &calls, id, changed);
                    running.push(async move {
                        drive.run().await;
                        object
                    });
                }
            }
            tokio::select! {
                batch = changes.next() => match batch {
                    Ok(Some(batch)) => work.take(&batch),
                    Ok(None) => std::future::pending().await,
                    Err(SubscriptionError::Lagged | SubscriptionError::Expired) => return,
                },
                Some(object) = running.next(), if !running.is_empty() => {
                    work.running.remove(&object);
                }
                () = tokio::time::sleep(NO_AGENTS_PAUSE), if agents.is_none() && !work.waiting.is_empty() => {}
            }
        }
    }
}
