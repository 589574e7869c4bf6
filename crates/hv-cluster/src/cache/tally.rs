//! Counts that are kept up with every change, so that nobody has to look at the whole fleet to know them.

use std::collections::HashMap;

use hv_types::{InstanceState, InstanceType, NodeStatus, Resources};

use super::state::NodeEntry;

const STATES: usize = InstanceState::ALL.len();
const TYPES: usize = InstanceType::ALL.len();

/// How many instances there are of each type, by the state that users see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Census([[usize; STATES]; TYPES]);

impl Census {
    fn of(&mut self, instance_type: InstanceType, state: InstanceState) -> &mut usize {
        &mut self.0[instance_type as usize][state as usize]
    }

    /// How many there are; `None` is any.
    pub(super) fn count(&self, instance_type: Option<InstanceType>, state: Option<InstanceState>) -> usize {
        let types = InstanceType::ALL.into_iter().filter(|t| instance_type.is_none_or(|wanted| wanted == *t));
        types
            .map(|t| {
                let counts = &self.0[t as usize];
                state.map_or_else(|| counts.iter().sum(), |state| counts[state as usize])
            })
            .sum()
    }
}

/// The counts of everything.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Tally {
    pub(super) all: Census,
    pub(super) projects: HashMap<String, Census>,
    statuses: [usize; 4],
    allocatable: Resources,
    allocated: Resources,
}

/// What the fleet comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Nodes that have a record.
    pub nodes: usize,
    /// Those that take instances.
    pub ready: usize,
    /// What instances may use of the nodes together.
    pub allocatable: Resources,
    /// What is promised of it.
    pub allocated: Resources,
    /// All instances.
    pub instances: usize,
    /// Instances that wait for a node.
    pub unbound: usize,
    states: [usize; STATES],
}

impl Counts {
    /// How many instances users see in a state.
    #[must_use]
    pub fn in_state(&self, state: InstanceState) -> usize {
        self.states[state as usize]
    }
}

impl Tally {
    pub(super) fn add_instance(&mut self, project: &str, t: InstanceType, state: InstanceState) {
        *self.all.of(t, state) += 1;
        if let Some(census) = self.projects.get_mut(project) {
            *census.of(t, state) += 1;
        } else {
            let mut census = Census::default();
            *census.of(t, state) += 1;
            self.projects.insert(project.to_owned(), census);
        }
    }

    pub(super) fn remove_instance(&mut self, project: &str, t: InstanceType, state: InstanceState) {
        *self.all.of(t, state) -= 1;
        if let Some(census) = self.projects.get_mut(project) {
            *census.of(t, state) -= 1;
            if *census == Census::default() {
                self.projects.remove(project);
            }
        }
    }

    pub(super) fn add_node(&mut self, entry: &NodeEntry) {
        let Some(record) = &entry.record else { return };
        self.statuses[status_index(entry.status())] += 1;
        self.allocatable = self.allocatable.plus(record.allocatable);
        self.allocated = self.allocated.plus(entry.allocated);
    }

    pub(super) fn remove_node(&mut self, entry: &NodeEntry) {
        let Some(record) = &entry.record else { return };
        self.statuses[status_index(entry.status())] -= 1;
        self.allocatable = self.allocatable.minus(record.allocatable);
        self.allocated = self.allocated.minus(entry.allocated);
    }

    pub(super) fn counts(&self, unbound: usize) -> Counts {
        let mut states = [0; STATES];
        for state in InstanceState::ALL {
            states[state as usize] = self.all.count(None, Some(state));
        }
        Counts {
            nodes: self.statuses.iter().sum(),
            ready: self.statuses[status_index(NodeStatus::Ready)],
            allocatable: self.allocatable,
            allocated: self.allocated,
            instances: states.iter().sum(),
            unbound,
            states,
        }
    }
}

fn status_index(status: NodeStatus) -> usize {
    match status {
        NodeStatus::Ready => 0,
        NodeStatus::NotReady => 1,
        NodeStatus::Maintenance => 2,
        NodeStatus::Draining => 3,
    }
}
