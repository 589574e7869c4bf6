//! The leader's placement: binds instances that wait to nodes that fit.
//!
//! # Theory of operation
//! A round takes the waiting instances, places them one after another over a snapshot of the nodes (each placement
//! counts against the next), and commits many bindings per transaction. The next round begins when the cache shows the
//! last one, so that nothing is promised twice. Rounds are started by changes that could help: a new instance, a node
//! that came or changed, room that became free; and by a slow timer, in case one of these is ever missed.
//!
//! # Invariants
//! - What is bound to a node never exceeds its allocatable resources: only a leader binds, its transactions carry the
//!   leader key, and it counts everything bound before it began.
//! - Nothing is bound to a node that was cordoned, drained or deregistered: the binding compares the node's record.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use hv_scheduler::{Candidate, Images, place};
use hv_store::{Compare, Txn, TxnOutcome};
use hv_telemetry::crash::{self, Point};
use hv_types::instance::Binding;
use hv_types::node::Schedulability;
use hv_types::{InstanceRecord, InstanceState, InstanceType, NodeRecord, Wanted};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::cache::{Delta, NodeEntry, State, SubscriptionError};
use crate::election::{Leadership, in_each_term};
use crate::error::{Error, Result};
use crate::events::About;
use crate::{Cluster, TXN_BYTES, op_bytes};

/// Bindings per transaction: each takes an operation and up to two compares (its own record, its node's), and the leader
/// key one compare more.
const BATCH: usize = 60;
/// How long a round may be delayed at most when nothing happens.
const SLOW_TIMER: Duration = Duration::from_secs(30);
/// How often in a row a commit may be overtaken before the round is given up for a pause: a leader that was deposed and
/// does not know it yet must not keep the store busy.
const OVERTAKEN_LIMIT: usize = 8;
/// The pause after a round that failed.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// One instance with where it goes, or why it cannot.
struct Decision {
    before: Arc<InstanceRecord>,
    after: InstanceRecord,
    node: Option<Arc<NodeRecord>>,
}

impl Cluster {
    /// Places instances while this server leads, until `stop`.
    pub async fn run_placer(&self, leading: watch::Receiver<Option<Leadership>>, stop: CancellationToken) {
        in_each_term(leading, stop, |leadership| async move { self.place_while_leading(&leadership).await })
            .await;
    }

    async fn place_while_leading(&self, leadership: &Leadership) {
        let mut rng = StdRng::from_os_rng();
        loop {
            let ((), mut changes) = self.cache.subscribe(|_| ());
            let mut delay = SLOW_TIMER;
            if let Err(error) = self.place_all(leadership, &mut rng).await {
                warn!(
                    error = hv_telemetry::error_chain(error.service()),
                    "placement failed; it is tried again"
                );
                delay = RETRY_PAUSE;
            }
            let helped = async {
                loop {
                    match changes.next().await {
                        Ok(Some(batch)) if batch.deltas.iter().any(could_help) => return,
                        Ok(Some(_)) => {}
                        Ok(None) => std::future::pending().await,
                        Err(SubscriptionError::Lagged | SubscriptionError::Expired) => return,
                    }
                }
            };
            // Whichever it is, everything is looked at afresh.
            let _ = tokio::time::timeout(delay, helped).await;
        }
    }

    /// Rounds until nothing more can be placed.
    async fn place_all(&self, leadership: &Leadership, rng: &mut StdRng) -> Result<()> {
        self.cache.wait_for(leadership.since).await?;
        self.sync().await?;
        let mut after = None;
        let mut overtaken = 0;
        loop {
            let decisions = self.cache.read(|state| self.decide(state, after.as_ref(), rng));
            let Some(last) = decisions.last() else { return Ok(()) };
            let next = Some(last.before.id.clone());
            let changed: Vec<_> = decisions.into_iter().filter(|d| *d.before != d.after).collect();
            if self.commit(leadership, &changed).await? {
                after = next;
                overtaken = 0;
            } else {
                overtaken += 1;
                if overtaken == OVERTAKEN_LIMIT {
                    return Err(Error::conflict("what waits for a node"));
                }
                // A user was faster with one of them, or another server leads: look again.
                self.sync().await?;
            }
        }
    }

    /// Where the next waiting instances go.
    fn decide(&self, state: &State, after: Option<&hv_types::InstanceId>, rng: &mut StdRng) -> Vec<Decision> {
        let waiting: Vec<_> = state
            .unbound()
            .filter(|record| waits(record))
            .filter(|record| after.is_none_or(|after| record.id > *after))
            .take(BATCH)
            .cloned()
            .collect();
        if waiting.is_empty() {
            return Vec::new();
        }
        let nodes: Vec<_> = state.nodes().collect();
        let mut candidates: Vec<_> = nodes.iter().map(|(record, entry)| candidate(record, entry)).collect();
        let mut decisions = Vec::with_capacity(waiting.len());
        for before in waiting {
            let decision = match place(&candidates, &before, self.config.strategy, rng) {
                Ok(index) => {
                    let chosen = &mut candidates[index];
                    chosen.allocated = chosen.allocated.plus(before.resources());
                    let after = bound(&before, chosen);
                    Decision { node: Some(nodes[index].0.clone()), after, before }
                }
                Err(rejections) => {
                    let mut after = InstanceRecord::clone(&before);
                    after.state_reason = rejections.explain(&before);
                    Decision { node: None, after, before }
                }
            };
            decisions.push(decision);
        }
        decisions
    }

    /// Commits decisions; false if one of the records changed in between or this server does not lead any more.
    async fn commit(&self, leadership: &Leadership, decisions: &[Decision]) -> Result<bool> {
        let mut rest = decisions;
        while !rest.is_empty() {
            let mut txn = Txn { compares: vec![leadership.guard()], ..Txn::default() };
            let mut bytes = 0;
            let mut nodes = HashMap::new();
            let mut count = 0;
            for decision in rest {
                let (compare, op) = self.replace_instance(&decision.before, &decision.after);
                bytes += op_bytes(&op);
                if count > 0 && bytes > TXN_BYTES {
                    break;
                }
                count += 1;
                txn.compares.push(compare);
                txn.then.push(op);
                nodes.extend(decision.node.as_ref().map(|node| (&node.id, node.revision)));
            }
            let seen =
                nodes.into_iter().map(|(id, revision)| Compare::ModRevision(self.keys.node(id), revision));
            txn.compares.extend(seen);
            let (these, others) = rest.split_at(count);
            if !self.commit_together(txn, these).await? {
                return Ok(false);
            }
            rest = others;
        }
        Ok(true)
    }

    async fn commit_together(&self, txn: Txn, decisions: &[Decision]) -> Result<bool> {
        crash::reach(Point::ServerScheduleBeforeBind);
        let TxnOutcome::Committed(revision) = self.store.txn(txn).await? else {
            debug!("a placement was overtaken by another change");
            return Ok(false);
        };
        crash::reach(Point::ServerScheduleAfterBind);
        self.cache.wait_for(revision).await?;
        for decision in decisions {
            let about = About::Instance(&decision.after);
            match &decision.node {
                Some(node) => {
                    metrics::counter!("hypervisor_placements_total").increment(1);
                    let message = format!("bound to node {}", node.hostname);
                    self.events.record(about, "Scheduled", message, "scheduler");
                }
                None => {
                    let why = decision.after.state_reason.clone();
                    self.events.warn(about, "Unschedulable", why, "scheduler");
                }
            }
        }
        Ok(true)
    }
}

/// Whether an instance is to be placed. One that is to stand still is started on its node first.
fn waits(record: &InstanceRecord) -> bool {
    record.binding.is_none() && matches!(record.wanted, Wanted::Running | Wanted::Paused)
}

/// Whether a change may let something be placed that could not be.
fn could_help(delta: &Delta) -> bool {
    match delta {
        Delta::Instance { before, after, .. } => {
            let freed = before.as_ref().is_some_and(|before| {
                before.binding.is_some() && after.as_ref().is_none_or(|after| after.binding != before.binding)
            });
            let asks = after.as_ref().is_some_and(|after| waits(after))
                && before
                    .as_ref()
                    .is_none_or(|b| !waits(b) || b.generation != after.as_ref().map_or(0, |a| a.generation));
            freed || asks
        }
        Delta::Node { .. } => true,
        Delta::Event(_) => false,
    }
}

fn bound(before: &InstanceRecord, node: &Candidate) -> InstanceRecord {
    InstanceRecord {
        binding: Some(Binding { node_id: node.id.clone(), release: false }),
        epoch: before.epoch.next(),
        state: InstanceState::Creating,
        state_reason: format!("bound to node {}; waits for its agent", node.hostname),
        ..before.clone()
    }
}

fn candidate(record: &NodeRecord, entry: &NodeEntry) -> Candidate {
    let types: Vec<_> = InstanceType::ALL.into_iter().filter(|t| record.runs(*t)).collect();
    let any =
        types.iter().filter(|t| record.drivers.iter().any(|d| d.instance_type == **t && !d.images_are_local));
    let local: HashSet<_> =
        record.images.iter().map(|image| (image.instance_type, image.name.clone())).collect();
    Candidate {
        id: record.id.clone(),
        hostname: record.hostname.clone(),
        live: entry.is_live(),
        open: record.schedulability == Schedulability::Open,
        images: Images { any: any.copied().collect(), local },
        types,
        region: record.region.clone(),
        zone: record.zone.clone(),
        labels: record.scheduling_labels(),
        allocatable: record.allocatable,
        allocated: entry.allocated,
    }
}
