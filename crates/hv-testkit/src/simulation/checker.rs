//! The invariants, held against every revision of the store and against what the drivers really have.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hv_proto::v1;
use hv_store::Change;
use hv_store::keys::{Key, Keys};
use hv_store::record::Record;
use hv_types::{Epoch, InstanceId, InstanceRecord, InstanceState, NodeId, NodeRecord, Resources, Wanted};
use parking_lot::Mutex;

use super::core::Core;
use super::driver::Truth;
use super::history::History;

/// What users asked for and were told.
#[derive(Default)]
pub(crate) struct Asked {
    /// Answers to each request key: the instance's id, and the whole answer.
    pub(crate) answers: BTreeMap<String, (String, v1::Instance)>,
    /// For each name the keys that it was asked for with.
    pub(crate) names: BTreeMap<String, BTreeSet<String>>,
    /// For each instance how many mutations may have been made: one for each key.
    pub(crate) mutations: BTreeMap<String, BTreeSet<String>>,
    /// Of which a deletion was asked.
    pub(crate) deletions: BTreeSet<String>,
    /// Of which a deletion by force was asked.
    pub(crate) forced: BTreeSet<String>,
    /// What was removed from the store.
    pub(crate) removed: BTreeSet<String>,
    /// Instances that were acknowledged and not looked for yet.
    pub(crate) acknowledged: Vec<String>,
}

/// Holds the invariants against what happens.
pub(crate) struct Checker {
    keys: Keys,
    history: History,
    truth: Arc<Mutex<Truth>>,
    pub(crate) asked: Arc<Mutex<Asked>>,
    pub(crate) instances: BTreeMap<InstanceId, InstanceRecord>,
    pub(crate) nodes: BTreeMap<NodeId, NodeRecord>,
    pub(crate) live: BTreeSet<NodeId>,
    ever: BTreeSet<String>,
    names: BTreeMap<String, BTreeSet<InstanceId>>,
    ever_bound: BTreeSet<(NodeId, InstanceId)>,
    releases: BTreeMap<InstanceId, u64>,
    /// The epoch in which what a node has of an instance was made.
    made_in: BTreeMap<(usize, InstanceId), Epoch>,
}

/// The node of this number.
pub(crate) fn node_id(node: usize) -> NodeId {
    format!("node-{node}").parse().expect("a valid id")
}

fn number_of(id: &NodeId) -> usize {
    id.as_str().rsplit('-').next().and_then(|number| number.parse().ok()).unwrap_or(usize::MAX)
}

impl Checker {
    pub(crate) fn new(history: History, truth: Arc<Mutex<Truth>>) -> Self {
        Self {
            keys: Keys::default(),
            history,
            truth,
            asked: Arc::default(),
            instances: BTreeMap::new(),
            nodes: BTreeMap::new(),
            live: BTreeSet::new(),
            ever: BTreeSet::new(),
            names: BTreeMap::new(),
            ever_bound: BTreeSet::new(),
            releases: BTreeMap::new(),
            made_in: BTreeMap::new(),
        }
    }

    /// Looks at every revision since the last time, one after the other.
    pub(crate) fn look(&mut self, core: &mut Core) {
        for logged in core.unseen() {
            let mut touched = BTreeSet::new();
            for change in &logged.changes {
                self.see(change, logged.revision, &mut touched);
            }
            for node in touched {
                self.check_room(&node);
            }
        }
        self.check_acknowledged();
        self.check_nodes();
    }

    /// A node touches only what was bound to it at some time, and destroys what is bound to it only if asked.
    fn check_nodes(&mut self) {
        let news = std::mem::take(&mut self.truth.lock().news);
        for (node, id, came) in news {
            if came && !self.ever_bound.contains(&(node_id(node), id.clone())) {
                self.history.violation(6, format_args!("node {node} has {id}, which was never bound to it"));
            }
            let record = self.instances.get(&id).filter(|record| record.node_id() == Some(&node_id(node)));
            if came {
                let epoch = record.map(|record| record.epoch).unwrap_or_default();
                self.made_in.insert((node, id), epoch);
                continue;
            }
            let made_in = self.made_in.remove(&(node, id));
            let Some(record) = record.filter(|record| Some(record.epoch) == made_in) else { continue };
            let may_go =
                record.wanted == Wanted::Deleted || record.binding.as_ref().is_some_and(|b| b.release);
            if !may_go {
                self.history.violation(
                    3,
                    format_args!("node {node} destroyed {}, which is bound to it", record.name),
                );
            }
        }
    }

    fn see(&mut self, change: &Change, revision: u64, touched: &mut BTreeSet<NodeId>) {
        let keys = self.keys.clone();
        match change {
            Change::Put(kv) => match keys.parse(&kv.key) {
                Key::Instance(_) => match InstanceRecord::decode(kv) {
                    Ok(record) => self.written(record, revision, touched),
                    Err(error) => self.history.violation(5, format_args!("a record cannot be read: {error}")),
                },
                Key::Node(_) => {
                    if let Ok(node) = NodeRecord::decode(kv) {
                        self.history.note(format_args!("r{revision} {}: {:?}", node.id, node.schedulability));
                        touched.insert(node.id.clone());
                        self.nodes.insert(node.id.clone(), node);
                    }
                }
                Key::NodeLease(id) => {
                    if let Ok(id) = id.parse::<NodeId>()
                        && self.live.insert(id.clone())
                    {
                        self.history.note(format_args!("r{revision} {id} is alive"));
                    }
                }
                _ => {}
            },
            Change::Deleted { key, .. } => match keys.parse(key) {
                Key::Instance(id) => {
                    if let Ok(id) = id.parse::<InstanceId>() {
                        self.removed(&id, revision);
                    }
                }
                Key::Node(id) => {
                    if let Ok(id) = id.parse::<NodeId>() {
                        self.nodes.remove(&id);
                    }
                }
                Key::NodeLease(id) => {
                    if let Ok(id) = id.parse::<NodeId>() {
                        self.live.remove(&id);
                        self.history.note(format_args!("r{revision} {id} is silent"));
                    }
                }
                _ => {}
            },
        }
    }

    fn written(&mut self, after: InstanceRecord, revision: u64, touched: &mut BTreeSet<NodeId>) {
        let id = after.id.clone();
        let before = self.instances.insert(id.clone(), after.clone());
        self.history.note(format_args!(
            "r{revision} {} ({id}): wanted {:?}, generation {}/{}, {:?} epoch {}{}, {} {:?}",
            after.name,
            after.wanted,
            after.observed_generation,
            after.generation,
            after.node_id().map(NodeId::as_str),
            after.epoch,
            if after.binding.as_ref().is_some_and(|b| b.release) { " release" } else { "" },
            after.state.name(),
            after.state_reason,
        ));
        match &before {
            None => self.created(&after),
            Some(before) => self.changed(before, &after),
        }
        if let Some(node) = after.node_id() {
            touched.insert(node.clone());
            self.ever_bound.insert((node.clone(), id.clone()));
            let runs = matches!(after.state, InstanceState::Running | InstanceState::Paused);
            let bound_now = before.as_ref().is_none_or(|before| before.epoch != after.epoch);
            if runs && (bound_now || !self.truth.lock().started.contains(&(number_of(node), id))) {
                self.history.violation(
                    3,
                    format_args!("{} is said to run on {node}, which never started it", after.name),
                );
            }
        }
        if after.state == InstanceState::Failed && after.state_reason.is_empty() {
            self.history.violation(5, format_args!("{} failed without a reason", after.name));
        }
        self.check_generation(&after);
    }

    fn created(&mut self, record: &InstanceRecord) {
        self.ever.insert(record.id.to_string());
        let of_name = self.names.entry(record.name.clone()).or_default();
        of_name.insert(record.id.clone());
        let made = of_name.len();
        let asked = self.asked.lock().names.get(&record.name).map_or(0, BTreeSet::len);
        if made > asked {
            self.history.violation(
                4,
                format_args!("{} was made {made} times and asked for with {asked} keys", record.name),
            );
        }
    }

    fn changed(&mut self, before: &InstanceRecord, after: &InstanceRecord) {
        let name = &after.name;
        if after.generation < before.generation || after.epoch < before.epoch {
            self.history.violation(
                3,
                format_args!(
                    "{name} went back from generation {} epoch {} to generation {} epoch {}",
                    before.generation, before.epoch, after.generation, after.epoch
                ),
            );
        }
        let (old, new) = (before.node_id(), after.node_id());
        let rebound = new.is_some() && (old != new || before.epoch != after.epoch);
        if rebound && after.epoch <= before.epoch {
            self.history.violation(1, format_args!("{name} was bound again without a new epoch"));
        }
        if let Some(old) = old.filter(|_| old != new) {
            self.check_left(after, old);
        }
        let released = |record: &InstanceRecord| record.binding.as_ref().is_some_and(|b| b.release);
        // A failover raises the generation too.
        let is_lost = old.is_some() && new.is_none() && after.generation > before.generation;
        if is_lost || (released(after) && !released(before)) {
            *self.releases.entry(after.id.clone()).or_default() += 1;
        }
    }

    /// An instance was taken from a node: nothing of it may run there.
    fn check_left(&self, record: &InstanceRecord, node: &NodeId) {
        let forced = self.asked.lock().forced.contains(record.id.as_str());
        if !forced && self.truth.lock().runs_on(&record.id, number_of(node)) {
            self.history
                .violation(1, format_args!("{} was taken from {node} while it runs there", record.name));
        }
    }

    fn removed(&mut self, id: &InstanceId, revision: u64) {
        let Some(record) = self.instances.remove(id) else { return };
        self.asked.lock().removed.insert(id.to_string());
        self.history.note(format_args!("r{revision} {} ({id}) removed", record.name));
        if !self.asked.lock().deletions.contains(id.as_str()) {
            self.history.violation(3, format_args!("{} was removed, and nobody asked for it", record.name));
        }
        if let Some(node) = record.node_id() {
            self.check_left(&record, node);
        }
    }

    /// A request has one effect however often it was sent.
    fn check_generation(&self, record: &InstanceRecord) {
        let asked = self.asked.lock().mutations.get(record.id.as_str()).map_or(0, BTreeSet::len) as u64;
        let released = self.releases.get(&record.id).copied().unwrap_or(0);
        if record.generation > 1 + asked + released {
            self.history.violation(
                4,
                format_args!(
                    "{} is at generation {} after {asked} requests and {released} moves",
                    record.name, record.generation
                ),
            );
        }
    }

    fn promised(&self, node: &NodeId) -> Resources {
        self.instances
            .values()
            .filter(|record| record.node_id() == Some(node))
            .map(InstanceRecord::resources)
            .sum()
    }

    fn check_room(&self, id: &NodeId) {
        let Some(node) = self.nodes.get(id) else { return };
        let (promised, room) = (self.promised(id), node.schedulable());
        if !promised.fits_in(room) {
            self.history.violation(2, format_args!("{id} has {room:?} and {promised:?} is bound to it"));
        }
    }

    fn check_acknowledged(&self) {
        for id in std::mem::take(&mut self.asked.lock().acknowledged) {
            if !self.ever.contains(&id) {
                self.history.violation(3, format_args!("{id} was acknowledged and is not in the store"));
            }
        }
    }

    /// What is not settled yet; empty if nothing is stuck.
    pub(crate) fn unsettled(&self, nodes: usize) -> Vec<String> {
        let mut open = Vec::new();
        for node in (0..nodes).map(node_id) {
            if !self.live.contains(&node) {
                open.push(format!("{node} is silent"));
            }
        }
        let truth = self.truth.lock();
        for record in self.instances.values() {
            if let Some(why) = self.waits_for(record, &truth) {
                open.push(format!(
                    "{}: wanted {:?}, {} {:?}, generation {}/{}, on {:?}: {why}",
                    record.name,
                    record.wanted,
                    record.state.name(),
                    record.state_reason,
                    record.observed_generation,
                    record.generation,
                    record.node_id().map(NodeId::as_str),
                ));
            }
        }
        for (id, on) in &truth.exists {
            for node in on {
                let bound = self.instances.get(id).and_then(InstanceRecord::node_id);
                if bound != Some(&node_id(*node)) {
                    open.push(format!("node {node} still has {id}"));
                }
            }
        }
        open
    }

    fn waits_for(&self, record: &InstanceRecord, truth: &Truth) -> Option<String> {
        if record.wanted == Wanted::Deleted {
            return Some("is to be deleted".into());
        }
        let Some(node) = record.node_id() else { return self.waits_for_node(record) };
        if record.binding.as_ref().is_some_and(|binding| binding.release) {
            return Some("is to leave its node".into());
        }
        if record.observed_generation < record.generation {
            return Some("its node has not finished".into());
        }
        let runs = truth.runs_on(&record.id, number_of(node));
        let is_said = matches!(record.state, InstanceState::Running | InstanceState::Paused);
        // One that could not be stopped is FAILED and runs; its reason says so.
        if runs != is_said && record.state != InstanceState::Failed {
            return Some(format!("on its node it {}", if runs { "runs" } else { "does not run" }));
        }
        match (record.wanted, record.state) {
            (Wanted::Running, InstanceState::Running | InstanceState::Stopped | InstanceState::Failed)
            | (Wanted::Stopped, InstanceState::Stopped | InstanceState::Failed)
            | (Wanted::Paused, InstanceState::Paused | InstanceState::Stopped | InstanceState::Failed) => {
                None
            }
            _ => Some("is not what is wanted".into()),
        }
    }

    fn waits_for_node(&self, record: &InstanceRecord) -> Option<String> {
        if record.wanted == Wanted::Stopped {
            return (record.state != InstanceState::Stopped).then(|| "is not stopped".into());
        }
        if record.state != InstanceState::Pending || record.state_reason.is_empty() {
            return Some("has no node and no reason".into());
        }
        let fits = |node: &&NodeRecord| {
            node.schedulability == hv_types::node::Schedulability::Open
                && self.live.contains(&node.id)
                && self.promised(&node.id).plus(record.resources()).fits_in(node.schedulable())
        };
        self.nodes.values().find(fits).map(|node| format!("would fit on {}", node.id))
    }
}
