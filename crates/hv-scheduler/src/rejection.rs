//! Why an instance could not be placed: how many nodes each rule rejected, and what would help.

use std::fmt;

use hv_types::resources::MIB;

use crate::ask::Ask;

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
    /// It has a taint that is not tolerated.
    Taint,
    /// It lacks the image.
    Image,
    /// It is not near the instances that it is to be near.
    Affinity,
    /// It is near instances that are to be kept apart from it.
    AntiAffinity,
    /// Its place has more of the instances to be spread than others have.
    Spread,
    /// It has too few free cores.
    Cpu,
    /// It has too little free memory.
    Memory,
    /// It has too little free disk.
    Disk,
    /// It has too few free accelerators.
    Gpu,
    /// It has too few devices that no other instance has.
    Devices,
}

impl Rule {
    /// Every rule, in the order in which it is asked.
    pub const ALL: [Self; 17] = [
        Self::PreferredNode,
        Self::NotReady,
        Self::Cordoned,
        Self::InstanceType,
        Self::Region,
        Self::Zone,
        Self::Labels,
        Self::Taint,
        Self::Image,
        Self::Affinity,
        Self::AntiAffinity,
        Self::Spread,
        Self::Cpu,
        Self::Memory,
        Self::Disk,
        Self::Gpu,
        Self::Devices,
    ];

    /// In CamelCase, for machines.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PreferredNode => "PreferredNode",
            Self::NotReady => "NotReady",
            Self::Cordoned => "Cordoned",
            Self::InstanceType => "InstanceType",
            Self::Region => "Region",
            Self::Zone => "Zone",
            Self::Labels => "Labels",
            Self::Taint => "Taint",
            Self::Image => "Image",
            Self::Affinity => "Affinity",
            Self::AntiAffinity => "AntiAffinity",
            Self::Spread => "Spread",
            Self::Cpu => "Cpu",
            Self::Memory => "Memory",
            Self::Disk => "Disk",
            Self::Gpu => "Gpu",
            Self::Devices => "Devices",
        }
    }

    /// Completes "2 nodes …".
    pub(crate) fn phrase(self, ask: &Ask) -> String {
        let need = ask.resources();
        let placement = ask.placement();
        match self {
            Self::PreferredNode => "not the node asked for".into(),
            Self::NotReady => "not ready".into(),
            Self::Cordoned => "cordoned or draining".into(),
            Self::InstanceType => format!("without a healthy {} driver", ask.instance_type()),
            Self::Region => format!("not in region {}", placement.region),
            Self::Zone => format!("not in zone {}", placement.zone),
            Self::Labels => "without the labels asked for".into(),
            Self::Taint => "with a taint that it does not tolerate".into(),
            Self::Image => format!("without image {}", ask.image()),
            Self::Affinity => "away from the instances that it is to be near".into(),
            Self::AntiAffinity => "near instances that are to be kept apart from it".into(),
            Self::Spread => "where there are too many of those it is to be spread with".into(),
            Self::Cpu => format!("with fewer than {} free cores", need.cpu_cores),
            Self::Memory => format!("with less than {} MiB of free memory", need.memory_bytes.div_ceil(MIB)),
            Self::Disk => format!("with less than {} MiB of free disk", need.disk_bytes.div_ceil(MIB)),
            Self::Gpu => format!("with fewer than {} free accelerators", need.gpu_count),
            Self::Devices => {
                let need = ask.devices().map(ToString::to_string).unwrap_or_default();
                format!("without {need} to give")
            }
        }
    }

    /// What an operator can do.
    pub(crate) fn remedy(self) -> &'static str {
        match self {
            Self::PreferredNode => "check the node's id",
            Self::NotReady => "start the agents of the nodes that are down",
            Self::Cordoned => "uncordon a node",
            Self::InstanceType => "see `node describe` for what the driver lacks",
            Self::Region | Self::Zone | Self::Labels => {
                "loosen the placement rules, or add a node that meets them"
            }
            Self::Taint => "tolerate the taint, or take it off a node",
            Self::Image => "put the image on a node",
            Self::Affinity => "place the instances that it is to be near first, or loosen its affinity",
            Self::AntiAffinity => "add a node or a zone, or loosen the anti-affinity",
            Self::Spread => "make room where there are few of them, or allow a greater skew",
            Self::Devices => {
                "delete what has them, or have a node give more away (agent.devices); `node describe` shows what is free"
            }
            Self::Cpu | Self::Memory | Self::Disk | Self::Gpu => "free room, ask for less, or add a node",
        }
    }
}

/// How many nodes each rule rejected. A node counts for the first rule that rejects it, so the counts add up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rejections {
    total: u32,
    counts: [u32; Rule::ALL.len()],
}

impl Rejections {
    pub(crate) fn new(total: usize) -> Self {
        Self { total: u32::try_from(total).unwrap_or(u32::MAX), ..Self::default() }
    }

    /// One node more.
    pub(crate) fn grow(&mut self) {
        self.total += 1;
    }

    pub(crate) fn count(&mut self, rule: Rule) {
        self.add(rule, 1);
    }

    pub(crate) fn add(&mut self, rule: Rule, nodes: usize) {
        self.counts[rule as usize] += u32::try_from(nodes).unwrap_or(u32::MAX);
    }

    /// How many nodes there are.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total as usize
    }

    /// How many nodes the rule rejected.
    #[must_use]
    pub fn of(&self, rule: Rule) -> usize {
        self.counts[rule as usize] as usize
    }

    /// The rules that rejected nodes, in the order in which they are asked, with how many.
    pub fn counts(&self) -> impl DoubleEndedIterator<Item = (Rule, usize)> {
        let counts = self.counts.map(|nodes| nodes as usize);
        Rule::ALL.into_iter().zip(counts).filter(|(_, nodes)| *nodes > 0)
    }

    /// How many nodes were rejected.
    #[must_use]
    pub fn rejected(&self) -> usize {
        self.counts().map(|(_, nodes)| nodes).sum()
    }

    /// One sentence for people, with the remedy for the rule that came closest to a placement.
    #[must_use]
    pub fn summary(&self, ask: &Ask) -> String {
        if self.total == 0 {
            return "no node is registered: start hypervisor-agent on a machine".into();
        }
        let parts: Vec<_> = self.counts().map(|(rule, n)| format!("{n} {}", rule.phrase(ask))).collect();
        let remedy = self.counts().next_back().map_or("", |(rule, _)| rule.remedy());
        format!("none of {} nodes can take it: {}; {remedy}", self.total, parts.join(", "))
    }
}

impl fmt::Display for Rejections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<_> = self.counts().collect();
        write!(f, "{counts:?} of {} nodes", self.total)
    }
}
