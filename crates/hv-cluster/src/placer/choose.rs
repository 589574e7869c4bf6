//! What the placer makes of a call, and of one that waits: a node, a reason, or others that give way.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use hv_scheduler::{Ask, Strategy};
use hv_types::{InstanceId, InstanceRecord, NodeId, Revision};
use rand::rngs::StdRng;
use tokio::time::Instant;

use super::decision::{self, Decision, Kind};
use super::queue::Wish;
use super::term::Term;
use super::waiting::Next;
use crate::Cluster;

/// How long those that give way may take before others are asked to.
const PATIENCE: Duration = Duration::from_secs(120);

/// Places what a call asks for, as far as it fits.
pub(super) fn seat(
    term: &mut Term,
    wish: &mut Wish,
    strategy: Strategy,
    rng: &mut StdRng,
    nodes: &mut HashMap<NodeId, (Revision, String)>,
) {
    let mut why: Option<String> = None;
    for record in &mut wish.records {
        // Members are alike: where one does not fit, none does.
        if let Some(why) = &why {
            record.state_reason.clone_from(why);
            continue;
        }
        match term.seat(record, strategy, rng) {
            Ok(node) => {
                decision::bind(record, &node);
                nodes.entry(node.id.clone()).or_insert_with(|| (node.revision, node.hostname.clone()));
            }
            Err(rejections) => {
                let reason = rejections.summary(&Ask::of(record));
                record.state_reason.clone_from(&reason);
                why = Some(reason);
            }
        }
    }
}

/// Tries one that waits.
pub(super) fn attempt(
    cluster: &Cluster,
    term: &mut Term,
    next: Next,
    rng: &mut StdRng,
    decisions: &mut Vec<Decision>,
) {
    let (record, why) = match next {
        Next::Known(record, why) => (record, why),
        Next::Try(record) => match term.seat(&record, cluster.config.strategy, rng) {
            Ok(node) => {
                let mut after = InstanceRecord::clone(&record);
                decision::bind(&mut after, &node);
                term.waiting.placed(&record);
                let kind = Kind::Bind(node.id.clone(), node.revision);
                decisions.push(Decision { before: record, after, kind });
                return;
            }
            Err(rejections) => {
                let ask = Ask::of(&record);
                if cluster.config.preemption {
                    make_room(cluster, term, &record, &ask, decisions);
                }
                (record, rejections.summary(&ask))
            }
        },
    };
    if term.waiting.failed(&record, &why) {
        decisions.push(tell(&record, why, true));
    }
}

pub(super) fn tell(record: &Arc<InstanceRecord>, why: String, first: bool) -> Decision {
    let after = InstanceRecord { state_reason: why, ..InstanceRecord::clone(record) };
    Decision { before: record.clone(), after, kind: Kind::Tell(first) }
}

/// Has others of lower priority give way, unless some are about to already.
fn make_room(
    cluster: &Cluster,
    term: &mut Term,
    record: &Arc<InstanceRecord>,
    ask: &Ask,
    decisions: &mut Vec<Decision>,
) {
    let leaves = |id: &InstanceId| {
        cluster.cache.read(|state| {
            let binding = state.instance(id).and_then(|record| record.binding.clone());
            binding.is_some_and(|binding| binding.release)
        })
    };
    if term.promised.get(&record.id).is_some_and(|(_, from)| from.iter().any(leaves)) {
        return;
    }
    let Some(found) = term.feed.fleet.preempt(ask) else { return };
    let victims: Option<Vec<_>> = cluster.cache.read(|state| {
        let still = |id: &InstanceId| {
            let record = state.instance(id)?;
            record.binding.as_ref().filter(|binding| !binding.release && binding.node_id == found.node)?;
            // What is moving gives way nowhere: it leaves by itself, or has just come.
            if record.migration.is_some() {
                return None;
            }
            Some(record.clone())
        };
        found.victims.iter().map(still).collect()
    });
    // Somebody of them goes already: what that brings is waited for.
    let Some(victims) = victims else { return };
    term.promised.insert(record.id.clone(), (Instant::now() + PATIENCE, found.victims));
    for victim in victims {
        let mut after = InstanceRecord::clone(&victim);
        decision::give_way(&mut after, record);
        decisions.push(Decision { before: victim, after, kind: Kind::GiveWay(record.name.clone()) });
    }
}
