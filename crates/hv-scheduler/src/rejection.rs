//! Why an instance could not be placed: how many nodes each rule rejected, and what would help.

use std::collections::BTreeMap;
use std::fmt;

use hv_types::InstanceRecord;
use hv_types::resources::MIB;

/// What keeps an instance off a node, in the order in which it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// It is not the node asked for.
    PreferredNode,
    /// Its agent does not answer.
    NotReady,
    /// The operator keeps it empty.
    Cordoned,
    /// It has no healthy driver for the type.
    InstanceType,
    /// It is in another region.
    Region,
    /// It is in another zone.
    Zone,
    /// It lacks labels.
    Labels,
    /// It lacks the image.
    Image,
    /// It has too few free cores.
    Cpu,
    /// It has too little free memory.
    Memory,
    /// It has too little free disk.
    Disk,
    /// It has too few free accelerators.
    Gpu,
}

impl Rule {
    /// Completes "2 nodes …".
    fn phrase(self, instance: &InstanceRecord) -> String {
        let need = instance.resources();
        let placement = &instance.placement;
        match self {
            Self::PreferredNode => "not the node asked for".into(),
            Self::NotReady => "not ready".into(),
            Self::Cordoned => "cordoned or draining".into(),
            Self::InstanceType => format!("without a healthy {} driver", instance.instance_type),
            Self::Region => format!("not in region {}", placement.region),
            Self::Zone => format!("not in zone {}", placement.zone),
            Self::Labels => "without the labels asked for".into(),
            Self::Image => format!("without image {}", instance.spec.image),
            Self::Cpu => format!("with fewer than {} free cores", need.cpu_cores),
            Self::Memory => format!("with less than {} MiB of free memory", need.memory_bytes.div_ceil(MIB)),
            Self::Disk => format!("with less than {} MiB of free disk", need.disk_bytes.div_ceil(MIB)),
            Self::Gpu => format!("with fewer than {} free accelerators", need.gpu_count),
        }
    }

    /// What an operator can do.
    fn remedy(self) -> &'static str {
        match self {
            Self::PreferredNode => "check the node's id",
            Self::NotReady => "start the agents of the nodes that are down",
            Self::Cordoned => "uncordon a node",
            Self::InstanceType => "see `node describe` for what the driver lacks",
            Self::Region | Self::Zone | Self::Labels => {
                "loosen the placement rules, or add a node that meets them"
            }
            Self::Image => "put the image on a node",
            Self::Cpu | Self::Memory | Self::Disk | Self::Gpu => "free room, ask for less, or add a node",
        }
    }
}

/// How many nodes each rule rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejections {
    total: usize,
    counts: BTreeMap<Rule, usize>,
}

impl Rejections {
    pub(crate) fn new(total: usize) -> Self {
        Self { total, counts: BTreeMap::new() }
    }

    pub(crate) fn count(&mut self, rule: Rule) {
        *self.counts.entry(rule).or_default() += 1;
    }

    /// How many nodes there are.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total
    }

    /// How many nodes each rule rejected.
    #[must_use]
    pub fn counts(&self) -> &BTreeMap<Rule, usize> {
        &self.counts
    }

    /// One sentence for people, with the remedy for the rule that came closest to a placement.
    #[must_use]
    pub fn explain(&self, instance: &InstanceRecord) -> String {
        if self.total == 0 {
            return "no node is registered: start hypervisor-agent on a machine".into();
        }
        let parts: Vec<String> =
            self.counts.iter().map(|(rule, count)| format!("{count} {}", rule.phrase(instance))).collect();
        let remedy = self.counts.keys().next_back().map_or("", |rule| rule.remedy());
        format!("none of {} nodes can take it: {}; {remedy}", self.total, parts.join(", "))
    }
}

impl fmt::Display for Rejections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of {} nodes", self.counts, self.total)
    }
}
