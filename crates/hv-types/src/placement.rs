//! Where an instance may go: what a user asks for, and what an operator decides about nodes.

use serde::{Deserialize, Serialize};

use crate::id::NodeId;
use crate::label::{Labels, MAX_ENTRIES, Selector, validate_labels};
use crate::resources::Resources;
use crate::validate::{self, Invalid};

/// Most affinity rules, and most spread rules, of one instance.
pub const MAX_RULES: usize = 16;
/// Highest priority; the lowest is its negative.
pub const MAX_PRIORITY: i32 = 1000;
/// The highest overcommit, in percent: a hundred times what there is.
pub const MAX_OVERCOMMIT_PERCENT: u32 = 10_000;

/// Where an instance may be placed. All rules must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct PlacementRules {
    /// Only this node; any if `None`.
    pub preferred_node: Option<NodeId>,
    /// Only this region; any if empty.
    pub region: String,
    /// Only this zone; any if empty.
    pub zone: String,
    /// Only nodes with these labels.
    pub node_selector: Selector,
    /// Near to other instances, or away from them.
    pub affinity: Vec<AffinityRule>,
    /// Evenly over places.
    pub spread: Vec<SpreadRule>,
    /// Which taints of nodes do not matter.
    pub tolerations: Vec<Toleration>,
    /// Higher is placed first.
    pub priority: i32,
}

/// Other instances of the same project: all that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Peers {
    /// With these labels.
    pub labels: Selector,
    /// The one with this name; any if empty.
    pub instance_name: String,
}

impl Peers {
    /// Whether an instance is meant.
    #[must_use]
    pub fn matches(&self, name: &str, labels: &Labels) -> bool {
        (self.instance_name.is_empty() || self.instance_name == name) && self.labels.matches(labels)
    }

    fn validate(&self, field: &str) -> Result<(), Invalid> {
        if self.labels.is_empty() && self.instance_name.is_empty() {
            let expected = "must name an instance or have labels";
            return Err(Invalid::new(format!("{field}.peers"), "", expected));
        }
        if !self.instance_name.is_empty() {
            validate::name(&format!("{field}.peers.instance_name"), &self.instance_name)?;
        }
        Ok(())
    }
}

/// What a rule counts as one place. A node without zone or region is in the one without a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Topology {
    /// Each node.
    #[default]
    Node,
    /// All nodes of a zone.
    Zone,
    /// All nodes of a region.
    Region,
}

impl Topology {
    /// As people see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Zone => "zone",
            Self::Region => "region",
        }
    }
}

/// Near to other instances, or away from them. Instances that a rule of another keeps away are kept away from it too.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AffinityRule {
    /// Away from them.
    pub anti: bool,
    /// From whom.
    pub peers: Peers,
    /// What is the same place.
    pub topology: Topology,
    /// Whether it must hold; otherwise such nodes are preferred.
    pub required: bool,
}

/// Evenly over places.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SpreadRule {
    /// Who is counted.
    pub peers: Peers,
    /// What is a place.
    pub topology: Topology,
    /// By how many the fullest place may exceed the emptiest, at least 1.
    pub max_skew: u32,
    /// Whether it must hold; otherwise such nodes are preferred.
    pub required: bool,
}

/// Keeps instances off a node unless they tolerate it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Taint {
    /// As a label's key.
    pub key: String,
    /// As a label's value; may be empty.
    pub value: String,
    /// Whether the node is out of the question; otherwise it is taken only if nothing else fits.
    pub hard: bool,
}

/// What an instance tolerates.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Toleration {
    /// The taint's key; empty for every taint.
    pub key: String,
    /// The taint's value; [`Selector::ANY`] for any.
    pub value: String,
}

impl Toleration {
    /// Whether the taint does not matter.
    #[must_use]
    pub fn covers(&self, taint: &Taint) -> bool {
        self.key.is_empty()
            || (self.key == taint.key && (self.value == Selector::ANY || self.value == taint.value))
    }
}

/// How much more may be promised than there is, in percent: 100 is as much as there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Overcommit {
    /// Of processor cores.
    pub cpu_percent: u32,
    /// Of memory.
    pub memory_percent: u32,
    /// Of disk.
    pub disk_percent: u32,
}

impl Default for Overcommit {
    fn default() -> Self {
        Self { cpu_percent: 100, memory_percent: 100, disk_percent: 100 }
    }
}

impl Overcommit {
    /// What may be promised of `amount`, rounded down.
    #[must_use]
    pub fn of(self, amount: Resources) -> Resources {
        let times = |value: u64, percent: u32| {
            u64::try_from(u128::from(value) * u128::from(percent) / 100).unwrap_or(u64::MAX)
        };
        let cores = times(u64::from(amount.cpu_cores), self.cpu_percent);
        Resources {
            cpu_cores: u32::try_from(cores).unwrap_or(u32::MAX),
            memory_bytes: times(amount.memory_bytes, self.memory_percent),
            disk_bytes: times(amount.disk_bytes, self.disk_percent),
            gpu_count: amount.gpu_count,
        }
    }

    /// Checks what an operator sends.
    ///
    /// # Errors
    /// A part is 0 or beyond the bound.
    pub fn validate(self) -> Result<(), Invalid> {
        let parts = [
            ("overcommit.cpu_percent", self.cpu_percent),
            ("overcommit.memory_percent", self.memory_percent),
            ("overcommit.disk_percent", self.disk_percent),
        ];
        for (field, percent) in parts {
            if !(1..=MAX_OVERCOMMIT_PERCENT).contains(&percent) {
                let expected = format!("must be between 1 and {MAX_OVERCOMMIT_PERCENT} percent");
                return Err(Invalid::new(field, percent, expected));
            }
        }
        Ok(())
    }
}

/// Checks taints that an operator sends.
///
/// # Errors
/// Names the field that is refused.
pub fn validate_taints(taints: &[Taint]) -> Result<(), Invalid> {
    if taints.len() > MAX_ENTRIES {
        let expected = format!("must have at most {MAX_ENTRIES} entries");
        return Err(Invalid::new("taints", taints.len(), expected));
    }
    for taint in taints {
        validate_labels("taints", &[(taint.key.clone(), taint.value.clone())].into())?;
    }
    Ok(())
}

impl PlacementRules {
    /// Checks what a user sends.
    ///
    /// # Errors
    /// Names the field that is refused.
    pub fn validate(&self) -> Result<(), Invalid> {
        for (field, value) in [("region", &self.region), ("zone", &self.zone)] {
            if !value.is_empty() {
                validate::printable(field, value, crate::node::MAX_LOCATION_BYTES)?;
            }
        }
        let lengths = [
            ("placement.affinity", self.affinity.len(), MAX_RULES),
            ("placement.spread", self.spread.len(), MAX_RULES),
            ("placement.tolerations", self.tolerations.len(), MAX_ENTRIES),
        ];
        for (field, length, most) in lengths {
            if length > most {
                return Err(Invalid::new(field, length, format!("must have at most {most} entries")));
            }
        }
        for (index, rule) in self.affinity.iter().enumerate() {
            rule.peers.validate(&format!("placement.affinity[{index}]"))?;
        }
        for (index, rule) in self.spread.iter().enumerate() {
            rule.peers.validate(&format!("placement.spread[{index}]"))?;
            if rule.max_skew == 0 {
                let field = format!("placement.spread[{index}].max_skew");
                return Err(Invalid::new(field, 0, "must be at least 1"));
            }
        }
        for toleration in self.tolerations.iter().filter(|toleration| !toleration.key.is_empty()) {
            let pair = (toleration.key.clone(), toleration.value.clone());
            validate_labels("placement.tolerations", &[pair].into())?;
        }
        if self.priority.abs() > MAX_PRIORITY {
            let expected = format!("must be between -{MAX_PRIORITY} and {MAX_PRIORITY}");
            return Err(Invalid::new("placement.priority", self.priority, expected));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overcommit_scales_and_rounds_down() {
        let amount = Resources { cpu_cores: 3, memory_bytes: 101, disk_bytes: u64::MAX, gpu_count: 1 };
        let more = Overcommit { cpu_percent: 150, memory_percent: 100, disk_percent: 200 };
        let expected = Resources { cpu_cores: 4, memory_bytes: 101, disk_bytes: u64::MAX, gpu_count: 1 };
        assert_eq!(more.of(amount), expected);
    }

    #[test]
    fn a_toleration_covers_its_taint_and_no_other() {
        let taint = Taint { key: "gpu".into(), value: "a100".into(), hard: true };
        let covers =
            |key: &str, value: &str| Toleration { key: key.into(), value: value.into() }.covers(&taint);
        assert!(covers("gpu", "a100") && covers("gpu", "*") && covers("", ""));
        assert!(!covers("gpu", "") && !covers("gpu", "h100") && !covers("disk", "*"));
    }

    #[test]
    fn a_rule_without_peers_is_refused() {
        let rule =
            AffinityRule { anti: true, peers: Peers::default(), topology: Topology::Node, required: true };
        let rules = PlacementRules { affinity: vec![rule], ..PlacementRules::default() };
        assert_eq!(rules.validate().unwrap_err().field, "placement.affinity[0].peers");
    }
}
