//! The leader's moves: one future for each, side by side, as each waits for nodes.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hv_types::{InstanceId, OperationKind, OperationRecord};
use tokio::sync::Notify;
use tracing::warn;

use super::drive::Drive;
use crate::Cluster;
use crate::cache::{Batch, Delta, State, Subscription, SubscriptionError};
use crate::election::Leadership;

/// Moves that are worked on at once; the others wait for their turn, the oldest first.
const MAX_AT_ONCE: usize = 64;
/// The pause before it is looked again whether this server can reach nodes.
const NO_AGENTS_PAUSE: Duration = Duration::from_secs(1);

/// What is worked on and what waits for a turn.
#[derive(Default)]
struct Work {
    waiting: BTreeSet<String>,
    running: HashMap<String, Arc<Notify>>,
    instances: HashMap<InstanceId, String>,
}

fn is_active(operation: &OperationRecord) -> bool {
    operation.kind == OperationKind::MigrateInstance && !operation.state.is_final()
}

impl Work {
    fn of(state: &State) -> Self {
        let active = state.operations_before(None).filter(|operation| is_active(operation));
        Self { waiting: active.map(|operation| operation.id.clone()).collect(), ..Self::default() }
    }

    fn take(&mut self, batch: &Batch) {
        for delta in &batch.deltas {
            let id = match delta {
                Delta::Operation { id, after: Some(operation), .. } if is_active(operation) => {
                    if !self.running.contains_key(id) {
                        self.waiting.insert(id.clone());
                    }
                    Some(id)
                }
                Delta::Operation { id, .. } => Some(id),
                Delta::Instance { id, .. } => self.instances.get(id),
                Delta::Node { .. } => {
                    self.running.values().for_each(|changed| changed.notify_one());
                    None
                }
                Delta::Event(_) | Delta::Hold { .. } => None,
            };
            if let Some(changed) = id.and_then(|id| self.running.get(id)) {
                changed.notify_one();
            }
        }
    }

    /// The next whose turn it is.
    fn next(&mut self, state: &State) -> Option<(String, Arc<Notify>)> {
        while self.running.len() < MAX_AT_ONCE {
            let id = self.waiting.pop_first()?;
            let Some(operation) = state.operation(&id).filter(|operation| is_active(operation)) else {
                continue;
            };
            let changed = Arc::new(Notify::new());
            self.running.insert(id.clone(), changed.clone());
            self.instances.extend(operation.object_id.parse().ok().map(|instance| (instance, id.clone())));
            return Some((id, changed));
        }
        None
    }

    fn ended(&mut self, id: &str) {
        self.running.remove(id);
        self.instances.retain(|_, operation| operation != id);
    }
}

impl Cluster {
    /// Works on moves while this server leads.
    pub(crate) async fn migrate_while_leading(&self, leadership: &Leadership) {
        loop {
            if let Err(error) = self.cache.wait_for(leadership.since).await {
                warn!(error = hv_telemetry::error_chain(error.service()), "moves wait for the cache");
                continue;
            }
            let (work, changes) = self.cache.subscribe(Work::of);
            self.migrate_all(leadership, work, changes).await;
        }
    }

    /// Until changes were missed. What is worked on is dropped then, and goes on from its record.
    async fn migrate_all(&self, leadership: &Leadership, mut work: Work, mut changes: Subscription) {
        let mut running = FuturesUnordered::new();
        loop {
            let agents = self.agents.get();
            if let Some(agents) = &agents {
                while let Some((id, changed)) = self.cache.read(|state| work.next(state)) {
                    running.push(Drive::new(self, leadership, agents.clone(), id, changed).run());
                }
            }
            tokio::select! {
                batch = changes.next() => match batch {
                    Ok(Some(batch)) => work.take(&batch),
                    Ok(None) => std::future::pending().await,
                    Err(SubscriptionError::Lagged | SubscriptionError::Expired) => return,
                },
                Some(id) = running.next(), if !running.is_empty() => work.ended(&id),
                () = tokio::time::sleep(NO_AGENTS_PAUSE), if agents.is_none() && !work.waiting.is_empty() => {}
            }
        }
    }
}
