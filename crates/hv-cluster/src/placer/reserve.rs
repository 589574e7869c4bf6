//! Room for instances that are to move while they run: promised by the placer, which alone knows what is being written.

use std::sync::Arc;

use hv_scheduler::{Ask, Strategy};
use hv_store::record::Record;
use hv_store::{Compare, Op};
use hv_types::{NodeId, NodeRecord, Revision};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::decision::{Decision, Kind};
use super::feed::FleetFeed;
use crate::Cluster;
use crate::cache::State;
use crate::operations::migrate;

/// How many may wait: more than are worked on at once.
const QUEUE: usize = 256;

/// What became of a wish for room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reserved {
    /// It is promised, since this revision.
    Made(Revision),
    /// No node can take it; says why.
    Impossible(String),
    /// Something changed in between, or this server does not place now: look again.
    Again,
}

/// The wish of an operation for room.
pub(super) struct Wanted {
    pub(super) operation: String,
    pub(super) answer: oneshot::Sender<Reserved>,
}

/// Where such wishes wait for the placer.
#[derive(Default)]
pub(crate) struct Reservations {
    sender: Mutex<Option<mpsc::Sender<Wanted>>>,
}

impl Reservations {
    /// The receiving end.
    pub(super) fn serve(&self) -> mpsc::Receiver<Wanted> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        *self.sender.lock() = Some(sender);
        receiver
    }
}

impl Cluster {
    /// Has the placer choose a node for the move that an operation is about, or check the one that it names, and promise
    /// room there.
    pub(crate) async fn reserve(&self, operation: &str) -> Reserved {
        let (answer, answered) = oneshot::channel();
        let wanted = Wanted { operation: operation.to_owned(), answer };
        let sender = self.reservations.sender.lock().clone();
        match sender {
            Some(sender) if sender.try_send(wanted).is_ok() => answered.await.unwrap_or(Reserved::Again),
            _ => Reserved::Again,
        }
    }
}

/// The decision to promise room, which the feed counts from now on; or what else there is to say.
pub(super) fn decide(
    cluster: &Cluster,
    state: &State,
    feed: &mut FleetFeed,
    operation: &str,
) -> std::result::Result<Decision, Reserved> {
    let (operation, named, copy_storage) = migrate::wants_room(state, operation).ok_or(Reserved::Again)?;
    // Somebody counts on that node's room for a moment.
    if named.as_ref().is_some_and(|named| state.is_held(named)) {
        return Err(Reserved::Again);
    }
    let id = operation.object_id.parse().map_err(|_| Reserved::Again)?;
    let record = state.instance(&id).ok_or(Reserved::Again)?.clone();
    let source = migrate::movable(state, &record, copy_storage)
        .map_err(|error| Reserved::Impossible(error.to_string()))?;
    // It must not stand in its own way.
    let (ask, counted) = (Ask::of(&record), feed.ask(&record));
    feed.fleet.unbind(&id);
    let chosen = choose(cluster.config.strategy, state, feed, &ask, named.as_ref(), |node| {
        migrate::unfit(&source, node, record.instance_type, copy_storage)
    });
    feed.fleet.bind(&id, &counted, &source.id);
    let target = chosen.map_err(|why| {
        if named.is_none() && state.nodes().any(|(node, _)| state.is_held(&node.id)) {
            return Reserved::Again;
        }
        Reserved::Impossible(format!("instance {} cannot be moved: {why}", record.name))
    })?;
    let (after_operation, after) = migrate::reserved(&operation, &record, &source, &target);
    feed.hold(&record, &target.id);
    let key = cluster.keys.operation(&operation.id);
    let beside =
        (Compare::ModRevision(key.clone(), operation.revision), Op::put(key, after_operation.encode()));
    let kind = Kind::Reserve { node: target.id.clone(), seen: target.revision, beside: Box::new(beside) };
    Ok(Decision { before: record, after, kind })
}

fn choose(
    strategy: Strategy,
    state: &State,
    feed: &FleetFeed,
    ask: &Ask,
    named: Option<&NodeId>,
    unfit: impl Fn(&NodeRecord) -> Option<String>,
) -> std::result::Result<Arc<NodeRecord>, String> {
    let record = |id: &NodeId| {
        let live = state.node(id).filter(|entry| entry.is_live());
        live.and_then(|entry| entry.record.clone())
    };
    let fitting = feed.fleet.fitting(ask);
    if let Some(named) = named {
        let node = record(named).ok_or_else(|| format!("node {named} does not answer, or was removed"))?;
        if let Some(why) = unfit(&node) {
            return Err(why);
        }
        if !fitting.contains(named) {
            return Err(format!(
                "node {} has no room for it, takes no instances, or its placement rules forbid it; see `hypervisor-ctl \
                 instance explain`",
                node.hostname
            ));
        }
        return Ok(node);
    }
    let explained = feed.fleet.explain(ask, strategy);
    let best = explained.best.iter().map(|best| &best.node);
    let mut first = None;
    for node in best.chain(&fitting).filter_map(record) {
        match unfit(&node) {
            None => return Ok(node),
            // That it is there already is the least of the reasons.
            Some(why) => first = first.or_else(|| Some(why).filter(|why| !why.starts_with("it is on node"))),
        }
    }
    Err(first.unwrap_or_else(|| format!("no other node can take it: {}", explained.summary())))
}
