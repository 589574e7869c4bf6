//! Why an instance is where it is, why it cannot be placed, and where instances would go: on any server.
//!
//! # Theory of operation
//! Each server that is asked builds a fleet from its cache, keeps it by the cache's changes, and lets it go when nobody
//! has asked for a while. It is apart from the leader's own: that one also counts what is being written.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::FutureExt;
use hv_proto::v1;
use hv_scheduler::{Ask, Explanation, Fleet, Strategy};
use hv_types::{InstanceId, InstanceRecord, InstanceState, Invalid, NodeId, Wanted};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::Cluster;
use crate::cache::{Delta, Subscription};
use crate::error::Result;
use crate::placer::{FleetFeed, Snapshot};

/// Most instances of one preview.
pub const MAX_PREVIEW: u32 = 1000;
/// How long the fleet is kept after the last question.
const IDLE: Duration = Duration::from_secs(300);

/// The fleet that questions are answered from.
#[derive(Default)]
pub(crate) struct Outlook {
    kept: Mutex<Option<Kept>>,
}

struct Kept {
    feed: FleetFeed,
    changes: Subscription,
    used: Instant,
}

impl Outlook {
    /// Lets the fleet go if nobody has asked for a while.
    pub(crate) fn forget_if_idle(&self) {
        if let Ok(mut kept) = self.kept.try_lock()
            && kept.as_ref().is_some_and(|kept| kept.used.elapsed() > IDLE)
        {
            *kept = None;
        }
    }
}

impl Kept {
    fn new(cluster: &Cluster) -> Self {
        let (snapshot, changes) = cluster.cache.subscribe(Snapshot::of);
        let feed = FleetFeed::new(&snapshot, cluster.config.preemption);
        Self { feed, changes, used: Instant::now() }
    }

    /// Takes over what changed; false if some of it was missed.
    fn catch_up(&mut self) -> bool {
        self.used = Instant::now();
        while let Some(change) = self.changes.next().now_or_never() {
            let Ok(Some(batch)) = change else { return false };
            for delta in &batch.deltas {
                match delta {
                    Delta::Instance { id, before, after } => {
                        self.feed.set_instance(id, before.as_ref(), after.as_ref());
                    }
                    Delta::Node { id, after, .. } => {
                        self.feed.set_node(id, after.as_ref());
                    }
                    Delta::Hold { id, held } => {
                        self.feed.set_hold(id, *held);
                    }
                    _ => {}
                }
            }
        }
        true
    }
}

impl Cluster {
    /// Looks at the fleet as it is now.
    async fn with_fleet<T>(&self, look: impl FnOnce(&mut FleetFeed) -> T) -> Result<T> {
        self.sync().await?;
        let mut kept = self.outlook.kept.lock().await;
        let known = kept.take().and_then(|mut kept| kept.catch_up().then_some(kept));
        let kept = kept.insert(known.unwrap_or_else(|| Kept::new(self)));
        Ok(look(&mut kept.feed))
    }

    /// Why an instance is where it is, as things are now; or why it cannot be placed, and what would help.
    ///
    /// # Errors
    /// There is no such instance, or the store does not answer.
    pub async fn explain_instance(&self, id: &InstanceId) -> Result<v1::PlacementExplanation> {
        let record = self.instance(id).await?;
        let strategy = self.config.strategy;
        self.with_fleet(|feed| {
            let ask = Ask::of(&record);
            // It must not stand in its own way.
            let counted = feed.ask(&record);
            feed.fleet.unbind(id);
            let explanation = feed.fleet.explain(&ask, strategy);
            if let Some(node) = record.node_id() {
                feed.fleet.bind(id, &counted, node);
            }
            explained(&feed.fleet, &record, explanation)
        })
        .await
    }

    /// Where `count` instances like `template` would go now. Nothing is recorded.
    ///
    /// # Errors
    /// The count is out of bounds, no node could ever take one, or the store does not answer.
    pub async fn preview_placement(
        &self,
        template: InstanceRecord,
        count: u32,
    ) -> Result<v1::PreviewPlacementResponse> {
        if count == 0 || count > MAX_PREVIEW {
            return Err(Invalid::new("count", count, format!("must be between 1 and {MAX_PREVIEW}")).into());
        }
        self.check_placeable(&template).await?;
        let strategy = self.config.strategy;
        self.with_fleet(|feed| preview(&mut feed.fleet, &template, count, strategy)).await?
    }
}

fn preview(
    fleet: &mut Fleet,
    template: &InstanceRecord,
    count: u32,
    strategy: Strategy,
) -> Result<v1::PreviewPlacementResponse> {
    let mut rng = StdRng::from_os_rng();
    let mut placed: BTreeMap<NodeId, u32> = BTreeMap::new();
    let mut seated = Vec::new();
    let first = fleet.explain(&Ask::of(template), strategy);
    let mut first_node = None;
    let mut unplaced = None;
    for number in 1..=count {
        let id: InstanceId = format!("preview-{number}").parse()?;
        let record = InstanceRecord { id: id.clone(), ..template.clone() };
        let ask = Ask::of(&record);
        match fleet.place(&ask, strategy, &mut rng) {
            Ok(found) => {
                fleet.bind_at(&id, &ask, found.index);
                first_node.get_or_insert_with(|| found.node.clone());
                *placed.entry(found.node).or_default() += 1;
                seated.push(id);
            }
            Err(_) => {
                unplaced = Some((fleet.explain(&ask, strategy), count - number + 1));
                break;
            }
        }
    }
    let hostname = |fleet: &Fleet, node: &NodeId| {
        fleet.index_of(node).map(|index| fleet.hostname(index).to_owned()).unwrap_or_default()
    };
    let nodes = placed.iter().map(|(node, count)| v1::PreviewedNode {
        node_id: node.to_string(),
        hostname: hostname(fleet, node),
        count: *count,
    });
    let nodes = nodes.collect();
    let (explanation, unplaced) = match unplaced {
        Some((why, count)) => (message(why, None), count),
        None => {
            let node = first_node.map(|node| (node.to_string(), hostname(fleet, &node)));
            (message(first, node), 0)
        }
    };
    for id in &seated {
        fleet.unbind(id);
    }
    Ok(v1::PreviewPlacementResponse { nodes, unplaced, explanation: Some(explanation) })
}

/// The explanation of an instance that exists.
fn explained(fleet: &Fleet, record: &InstanceRecord, explanation: Explanation) -> v1::PlacementExplanation {
    let Some(node) = record.node_id() else {
        let mut message = message(explanation, None);
        match (record.wanted, record.state) {
            (Wanted::Stopped, _) => {
                message.summary =
                    format!("it is stopped and waits for no node; if it were started: {}", message.summary);
            }
            (Wanted::Deleted, _) => {
                message.summary =
                    format!("it is being deleted and waits for no node; otherwise: {}", message.summary);
            }
            (Wanted::Running | Wanted::Paused, InstanceState::Pending) if message.fitting_nodes > 0 => {
                message.summary = format!("it is about to be placed: {}", message.summary);
            }
            (Wanted::Running | Wanted::Paused, _) => {}
        }
        return message;
    };
    let hostname = fleet.index_of(node).map_or("", |index| fleet.hostname(index)).to_owned();
    let (total, fitting) = (explanation.total, explanation.fitting);
    let here = explanation.best.iter().position(|best| best.node == *node);
    let standing = match here {
        Some(0) => "it would be chosen again".to_owned(),
        Some(place) => {
            format!("it would be number {} of the best; {}", place + 1, explanation.best[0].hostname)
        }
        None if fitting > 0 => format!("others would be better now, {} first", explanation.best[0].hostname),
        None => "it could not be placed anew".to_owned(),
    };
    let standing =
        if here.is_some_and(|place| place > 0) { format!("{standing} would be the first") } else { standing };
    let mut message = message(explanation, Some((node.to_string(), hostname.clone())));
    message.remedies.clear();
    message.summary = format!(
        "it is bound to node {hostname}; as things are now (not as they were when it was bound), {fitting} of {total} nodes \
         could take it, and {standing}"
    );
    message
}

fn message(explanation: Explanation, node: Option<(String, String)>) -> v1::PlacementExplanation {
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let (node_id, hostname) = node.unwrap_or_default();
    let summary = explanation.summary().to_owned();
    let rejections = explanation.rejected.into_iter().map(|rejected| v1::RuleRejection {
        rule: rejected.rule.name().to_owned(),
        nodes: count(rejected.nodes),
        message: rejected.message,
        examples: rejected.examples,
    });
    let best = explanation.best.into_iter().map(|scored| v1::ScoredNode {
        node_id: scored.node.to_string(),
        hostname: scored.hostname,
        score: scored.score,
        message: scored.message,
    });
    v1::PlacementExplanation {
        node_id,
        hostname,
        total_nodes: count(explanation.total),
        fitting_nodes: count(explanation.fitting),
        rejections: rejections.collect(),
        best: best.collect(),
        summary,
        remedies: explanation.remedies.into_iter().map(|remedy| remedy.message).collect(),
    }
}
