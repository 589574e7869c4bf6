//! One pull of an image, driven by its leader: nodes are asked in parallel, and what they say is written down.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use hv_proto::{convert, v1};
use hv_store::record::Record;
use hv_store::{Compare, Op, Txn, TxnOutcome};
use hv_types::{InstanceType, NodeId, OperationRecord, OperationState, ServiceError};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;
use tracing::{info, warn};

use super::{DIGEST, MAX_PARALLEL, PARALLEL, REFERENCE, Standing, TYPE, parameter, standings};
use crate::Cluster;
use crate::cache::State;
use crate::election::Leadership;
use crate::error::Result;
use crate::operations::Nodes;

/// How often what nodes say is written, where no node has ended.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// The first pause after a node did not do it; it doubles.
const RETRY_BASE: Duration = Duration::from_millis(500);
/// The longest such pause.
const RETRY_MAX: Duration = Duration::from_secs(8);
/// How often a node is asked that says each time that it may do it later, and gets no further. Together the pauses outlast an
/// agent's restart, of which nothing but broken connections tells.
const MAX_TRIES: u32 = 8;
/// How long a node that is away is waited for, in all.
const AWAY_LIMIT: Duration = Duration::from_mins(10);
/// How many nodes that failed the message of the operation names; their parameters tell of all.
const NAMED: usize = 3;

/// How nodes stand that this leader asks, as they were last heard of.
type Heard = Mutex<BTreeMap<NodeId, Standing>>;

/// One operation and who drives it.
pub(super) struct Drive<'a> {
    cluster: &'a Cluster,
    leadership: &'a Leadership,
    nodes: Arc<dyn Nodes>,
    calls: &'a Semaphore,
    id: String,
    changed: Arc<Notify>,
    /// Tells that a node came or went.
    fleet: watch::Receiver<()>,
}

impl<'a> Drive<'a> {
    pub(super) fn new(
        cluster: &'a Cluster,
        leadership: &'a Leadership,
        nodes: Arc<dyn Nodes>,
        calls: &'a Semaphore,
        id: String,
        changed: Arc<Notify>,
        fleet: watch::Receiver<()>,
    ) -> Self {
        Self { cluster, leadership, nodes, calls, id, changed, fleet }
    }

    fn operation(&self) -> Option<Arc<OperationRecord>> {
        let found = self.cluster.cache.read(|state| state.operation(&self.id).cloned());
        found.filter(|operation| !operation.state.is_final())
    }

    /// Drives it to its end.
    pub(super) async fn run(self) {
        let Some(operation) = self.operation() else { return };
        let heard = Heard::default();
        let parallel = operation.parameters.get(PARALLEL).and_then(|text| text.parse().ok());
        let turns = Semaphore::new(parallel.unwrap_or(MAX_PARALLEL as usize).max(1));
        let request = request(&operation);
        let asked = standings(&operation).filter(|(_, standing)| !standing.is_final());
        let mut asked: FuturesUnordered<_> =
            asked.map(|(node, _)| self.have(node, &request, &turns, &heard)).collect();
        loop {
            match self.write(&heard).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    let error = hv_telemetry::error_chain(error.service());
                    warn!(operation = self.id, error, "a step of an operation failed; it is tried again");
                }
            }
            let mut pause = pin!(tokio::time::sleep(TELL_EVERY));
            loop {
                // What nodes say in between is written at the pause's end; a result or a cancellation at once.
                tokio::select! {
                    Some(()) = asked.next(), if !asked.is_empty() => {
                        // What ended in the same moment is written in the same transaction.
                        while let Some(Some(())) = asked.next().now_or_never() {}
                        break;
                    }
                    () = self.changed.notified() => {
                        if self.operation().is_none_or(|operation| operation.cancel_requested) {
                            break;
                        }
                    }
                    () = &mut pause => break,
                }
            }
        }
    }

    /// Has one node fetch it, and notes what came of it.
    async fn have(&self, node: NodeId, request: &v1::PullImageRequest, turns: &Semaphore, heard: &Heard) {
        let outcome = self.ask(&node, request, turns, heard).await;
        info!(operation = self.id, %node, ?outcome, "a node was asked for an image");
        let standing = outcome.map_or_else(Standing::Failed, |()| Standing::Done);
        heard.lock().insert(node, standing);
    }

    async fn ask(
        &self,
        node: &NodeId,
        request: &v1::PullImageRequest,
        turns: &Semaphore,
        heard: &Heard,
    ) -> std::result::Result<(), String> {
        let mut tries = 0;
        let furthest = AtomicU64::new(0);
        loop {
            let before = furthest.load(Ordering::Relaxed);
            self.until_live(node).await?;
            let answer = {
                // They are never closed.
                let _turn = turns.acquire().await.ok();
                let _call = self.calls.acquire().await.ok();
                let progress = |phase: &str, done: u64, total: u64| {
                    furthest.fetch_max(done, Ordering::Relaxed);
                    let standing = Standing::Working { phase: phase.to_owned(), done, total };
                    heard.lock().insert(node.clone(), standing);
                };
                self.nodes.pull_image(node, request.clone(), &progress).await
            };
            tries = if furthest.load(Ordering::Relaxed) > before { 1 } else { tries + 1 };
            match answer {
                Ok(()) => {
                    self.until_reported(node, request).await;
                    return Ok(());
                }
                Err(error) if error.code().retryable() && tries < MAX_TRIES => {
                    self.note_retry(node, &error, heard);
                    tokio::time::sleep((RETRY_BASE * (1 << (tries - 1))).min(RETRY_MAX)).await;
                }
                Err(error) => return Err(error.message().to_owned()),
            }
        }
    }

    async fn until_reported(&self, node: &NodeId, request: &v1::PullImageRequest) {
        if let Ok(Some(instance_type)) = convert::instance_type_from(request.r#type) {
            self.cluster.until_image_reported(node, &request.name, instance_type).await;
        }
    }

    fn note_retry(&self, node: &NodeId, error: &ServiceError, heard: &Heard) {
        let error = hv_telemetry::error_chain(error);
        warn!(operation = self.id, %node, error, "a node did not fetch an image; it is asked again");
        heard.lock().insert(node.clone(), Standing::Waiting);
    }

    /// Until the node answers; an error if it does not come back, or is gone for good.
    async fn until_live(&self, node: &NodeId) -> std::result::Result<(), String> {
        let give_up = Instant::now() + AWAY_LIMIT;
        let mut fleet = self.fleet.clone();
        loop {
            // Before the look, so that what changes after it is seen.
            fleet.mark_unchanged();
            let live = self.cluster.cache.read(|state| {
                let entry = state.node(node)?;
                entry.record.as_ref()?;
                Some(entry.is_live())
            });
            match live {
                Some(true) => return Ok(()),
                None => return Err("the node was removed".to_owned()),
                Some(false) => {}
            }
            if tokio::time::timeout_at(give_up, fleet.changed()).await.is_err() {
                let minutes = AWAY_LIMIT.as_secs() / 60;
                return Err(format!("the node did not answer for {minutes} minutes"));
            }
        }
    }

    /// Writes what was heard; true once the operation has ended.
    async fn write(&self, heard: &Heard) -> Result<bool> {
        let Some(before) = self.operation() else { return Ok(true) };
        if self.cluster.is_frozen() {
            return Ok(false);
        }
        let heard = heard.lock().clone();
        let after = self.cluster.cache.read(|state| next(&before, &heard, |node| name(state, node)));
        if after == *before {
            return Ok(false);
        }
        let ended = after.state.is_final();
        let key = self.cluster.keys.operation(&before.id);
        let txn = Txn {
            compares: vec![
                self.leadership.guard(),
                self.cluster.unfrozen()?,
                Compare::ModRevision(key.clone(), before.revision),
            ],
            then: vec![Op::put(key, after.encode())],
            ..Txn::default()
        };
        match self.cluster.store.txn(txn).await? {
            TxnOutcome::Committed(revision) => {
                self.cluster.cache.wait_for(revision).await?;
                Ok(ended)
            }
            // Cancelled meanwhile, or another leads: the next look tells.
            TxnOutcome::Refused(_) => {
                self.cluster.sync().await?;
                self.changed.notify_one();
                Ok(false)
            }
        }
    }
}

fn request(operation: &OperationRecord) -> v1::PullImageRequest {
    let text = |name: &str| operation.parameters.get(name).cloned().unwrap_or_default();
    let instance_type = text(TYPE).parse::<InstanceType>().ok();
    v1::PullImageRequest {
        image_ref: text(REFERENCE),
        r#type: instance_type.map_or(0, |known| convert::instance_type_to(known).into()),
        name: operation.object_id.clone(),
        digest: text(DIGEST),
        ..v1::PullImageRequest::default()
    }
}

/// What people call a node.
fn name(state: &State, node: &NodeId) -> String {
    let record = state.node(node).and_then(|entry| entry.record.as_ref());
    record.map_or_else(|| node.to_string(), |record| record.hostname.clone())
}

/// The operation with what was heard of its nodes.
fn next(
    before: &OperationRecord,
    heard: &BTreeMap<NodeId, Standing>,
    name: impl Fn(&NodeId) -> String,
) -> OperationRecord {
    let mut after = before.clone();
    let (mut total, mut done, mut open) = (0, 0, 0);
    let mut failed: Vec<(NodeId, String)> = Vec::new();
    for (node, written) in standings(before) {
        let standing =
            if written.is_final() { written } else { heard.get(&node).cloned().unwrap_or(written) };
        let given_up = before.cancel_requested && !standing.is_final();
        let standing = if given_up { Standing::Cancelled } else { standing };
        after.parameters.insert(parameter(&node), standing.text());
        total += 1;
        match standing {
            Standing::Done => done += 1,
            Standing::Failed(why) => failed.push((node, why)),
            Standing::Cancelled => {}
            Standing::Waiting | Standing::Working { .. } => open += 1,
        }
    }
    (after.done, after.total) = (done, total);
    let have = format!("{done} of {total} nodes have it");
    let why = || why(&failed, &name);
    (after.state, after.message) = match (open, failed.len() as u64) {
        (0, cannot) if done + cannot != total => (OperationState::Cancelled, format!("given up; {have}")),
        (0, 0) => (OperationState::Succeeded, have),
        (0, 1) if total == 1 => (OperationState::Failed, why()),
        (0, cannot) => {
            (OperationState::Failed, format!("{cannot} of {total} nodes could not fetch it: {}", why()))
        }
        (_, 0) => (OperationState::Running, have),
        (_, cannot) => (OperationState::Running, format!("{have}, {cannot} cannot: {}", why())),
    };
    after.phase = if open > 0 { "fetching".into() } else { "ended".into() };
    if after != *before {
        after.updated_at = SystemTime::now();
        after.finished_at = after.state.is_final().then_some(after.updated_at);
    }
    after
}

/// Which nodes could not fetch it, and why; the first ones.
fn why(failed: &[(NodeId, String)], name: impl Fn(&NodeId) -> String) -> String {
    let named = failed.iter().take(NAMED).map(|(node, why)| format!("{}: {why}", name(node)));
    let more = (failed.len() > NAMED).then(|| format!("and {} more", failed.len() - NAMED));
    named.chain(more).collect::<Vec<_>>().join("; ")
}
