//! Nodes that the rules cannot tell apart, as groups: the unit in which rules are evaluated.
//!
//! # Theory of operation
//! A [`Class`] is all that the rules see of a node, except what is its own: its id, its host name, and what is bound to it.
//! Nodes of one class make a [`Group`]. A fleet of ten thousand nodes has a few dozen: so many kinds of machines times
//! zones times label sets. A group's class never changes; a node that changes moves to another group. So what a rule once
//! said of a group holds as long as the group exists, and nothing has to be invalidated; groups that come are told by
//! [`Groups::births`].

use std::collections::HashMap;
use std::sync::Arc;

use hv_types::image::is_reference;
use hv_types::placement::{PlacementRules, Taint};
use hv_types::{InstanceType, Labels, Resources};

use crate::ask::Ask;
use crate::explanation::Verdict;
use crate::lattice::Lattice;
use crate::node::NodeView;
use crate::rejection::Rule;
use crate::score::Score;

/// Stands where no group is: the node is not in the fleet, only something that is bound to it.
pub(crate) const NO_GROUP: u32 = u32::MAX;
/// The label that is each node's own, and so is not part of its class.
pub(crate) const HOSTNAME_LABEL: &str = "hypervisor/hostname";
/// How many births are remembered; who missed more of them looks at every group.
const BIRTHS_KEPT: usize = 4096;

/// All that the rules see of a node, except what is its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Class {
    pub(crate) live: bool,
    open: bool,
    types: Vec<InstanceType>,
    any_image: Vec<InstanceType>,
    fetches: Vec<InstanceType>,
    images: Arc<Vec<(InstanceType, String)>>,
    region: String,
    zone: String,
    labels: Labels,
    taints: Vec<Taint>,
    schedulable: Resources,
}

impl Class {
    /// The class of a node, and its own host name label.
    pub(crate) fn of(node: NodeView) -> (Self, Option<String>) {
        let sorted = |mut types: Vec<InstanceType>| {
            types.sort_unstable();
            types.dedup();
            types
        };
        let mut images: Vec<_> = node.images.local.into_iter().collect();
        images.sort_unstable();
        let mut labels = node.labels;
        let hostname = labels.remove(HOSTNAME_LABEL);
        let class = Self {
            live: node.live,
            open: node.open,
            types: sorted(node.types),
            any_image: sorted(node.images.any),
            fetches: sorted(node.images.fetched),
            images: images.into(),
            region: node.region,
            zone: node.zone,
            labels,
            taints: node.taints,
            schedulable: node.schedulable,
        };
        (class, hostname)
    }

    /// The same, with a lease that lives or not.
    pub(crate) fn with_live(self, live: bool) -> Self {
        Self { live, ..self }
    }

    /// What the rules say that depend on class and shape alone.
    pub(crate) fn judge(&self, ask: &Ask) -> Fixed {
        let rules = ask.placement();
        let instance_type = ask.instance_type();
        let tolerated = |taint: &Taint| ask.tolerates(taint);
        let verdict = Verdict::default()
            .with(Rule::NotReady, !self.live)
            .with(Rule::Cordoned, !self.open)
            .with(Rule::InstanceType, !self.types.contains(&instance_type))
            .with(Rule::Region, !rules.region.is_empty() && rules.region != self.region)
            .with(Rule::Zone, !rules.zone.is_empty() && rules.zone != self.zone)
            .with(Rule::Labels, !self.has_labels(rules))
            .with(Rule::Taint, self.taints.iter().any(|taint| taint.hard && !tolerated(taint)))
            .with(Rule::Image, !self.has_image(instance_type, ask.image()));
        let soft = self.taints.iter().filter(|taint| !taint.hard && !tolerated(taint)).count();
        Fixed {
            verdict,
            soft_taints: u16::try_from(soft).unwrap_or(u16::MAX),
            must_fetch: !self.starts_at_once(instance_type, ask.image()),
        }
    }

    fn has_labels(&self, rules: &PlacementRules) -> bool {
        let mut wanted = rules.node_selector.requirements().iter();
        wanted.all(|(key, want)| {
            let met = |have: &String| want == hv_types::Selector::ANY || have == want;
            key == HOSTNAME_LABEL || self.labels.get(key).is_some_and(met)
        })
    }

    /// Whether it can start from the image, be it after it fetched it.
    fn has_image(&self, instance_type: InstanceType, image: &str) -> bool {
        let is_fetched = is_reference(image) && self.fetches.contains(&instance_type);
        is_fetched || self.starts_at_once(instance_type, image)
    }

    fn starts_at_once(&self, instance_type: InstanceType, image: &str) -> bool {
        let local = |(of, name): &(InstanceType, String)| (*of, name.as_str()).cmp(&(instance_type, image));
        image.is_empty()
            || self.any_image.contains(&instance_type)
            || self.images.binary_search_by(local).is_ok()
    }
}

/// What the fixed rules say of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fixed {
    pub(crate) verdict: Verdict,
    /// Soft taints that are not tolerated.
    pub(crate) soft_taints: u16,
    /// Whether its nodes would have to fetch the image.
    pub(crate) must_fetch: bool,
}

impl Fixed {
    /// What all nodes of the group have in common.
    pub(crate) fn score(self) -> Score {
        Score { soft_taints: u32::from(self.soft_taints), must_fetch: self.must_fetch, ..Score::default() }
    }
}

/// All nodes of one class.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) class: Arc<Class>,
    pub(crate) zone: u32,
    pub(crate) region: u32,
    pub(crate) nodes: u32,
    pub(crate) lattice: Lattice,
}

impl Group {
    /// What may be promised of each of its nodes.
    pub(crate) fn schedulable(&self) -> Resources {
        self.class.schedulable
    }
}

/// Numbers for names, as long as they are in use.
#[derive(Clone, Debug, Default)]
struct Names {
    numbers: HashMap<String, (u32, u32)>,
    spare: Vec<u32>,
}

impl Names {
    fn hold(&mut self, name: &str) -> u32 {
        if let Some((number, holders)) = self.numbers.get_mut(name) {
            *holders += 1;
            return *number;
        }
        // Numbers in use and spare ones are together as many as were ever in use at once.
        let number = self.spare.pop().unwrap_or(self.numbers.len() as u32);
        self.numbers.insert(name.to_owned(), (number, 1));
        number
    }

    fn let_go(&mut self, name: &str) {
        if let Some((number, holders)) = self.numbers.get_mut(name) {
            *holders -= 1;
            if *holders == 0 {
                self.spare.push(*number);
                self.numbers.remove(name);
            }
        }
    }
}

/// The groups of a fleet.
#[derive(Clone, Debug, Default)]
pub(crate) struct Groups {
    /// By number. A group without nodes is gone, and its number is another's later.
    pub(crate) slots: Vec<Group>,
    by_class: HashMap<Arc<Class>, u32>,
    spare: Vec<u32>,
    zones: Names,
    regions: Names,
    births: Vec<u32>,
    /// How many births are forgotten.
    forgotten: u64,
}

impl Groups {
    /// The number of the class's group, with one node more.
    pub(crate) fn enter(&mut self, class: Class) -> u32 {
        if let Some(&number) = self.by_class.get(&class) {
            self.slots[number as usize].nodes += 1;
            return number;
        }
        let class = Arc::new(class);
        let group = Group {
            zone: self.zones.hold(&class.zone),
            region: self.regions.hold(&class.region),
            nodes: 1,
            lattice: Lattice::new(class.schedulable),
            class: class.clone(),
        };
        let number = match self.spare.pop() {
            Some(number) => {
                self.slots[number as usize] = group;
                number
            }
            None => {
                self.slots.push(group);
                self.slots.len() as u32 - 1
            }
        };
        self.by_class.insert(class, number);
        if self.births.len() == BIRTHS_KEPT {
            self.births.clear();
            self.forgotten += BIRTHS_KEPT as u64;
        }
        self.births.push(number);
        number
    }

    /// One node less. Its cell must have been left before.
    pub(crate) fn leave(&mut self, number: u32) {
        let group = &mut self.slots[number as usize];
        group.nodes -= 1;
        if group.nodes == 0 {
            self.by_class.remove(&group.class);
            self.zones.let_go(&group.class.zone);
            self.regions.let_go(&group.class.region);
            self.spare.push(number);
        }
    }

    /// The groups that were born since `seen` births, and how many births there were; `None` for the groups if that is
    /// not remembered any more.
    pub(crate) fn births(&self, seen: u64) -> (Option<&[u32]>, u64) {
        let now = self.forgotten + self.births.len() as u64;
        let missed = seen.checked_sub(self.forgotten).and_then(|from| self.births.get(from as usize..));
        (missed, now)
    }
}
