//! Nodes, instances and rules to test with.

use std::sync::Arc;

use hv_scheduler::{Ask, Images, NodeView};
use hv_types::placement::{AffinityRule, Peers, PlacementRules, SpreadRule, Topology};
use hv_types::resources::MIB;
use hv_types::{
    InstanceId, InstanceRecord, InstanceSpec, InstanceType, Labels, Metadata, NodeId, Resources, Selector,
};
use rand::SeedableRng;
use rand::rngs::StdRng;

pub(crate) fn rng() -> StdRng {
    StdRng::seed_from_u64(7)
}

pub(crate) fn amount(cpu_cores: u32, memory_mib: u64) -> Resources {
    Resources { cpu_cores, memory_bytes: memory_mib * MIB, ..Resources::default() }
}

pub(crate) fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

pub(crate) fn selector(pairs: &[(&str, &str)]) -> Selector {
    Selector::new(labels(pairs)).unwrap()
}

pub(crate) fn node_id(name: &str) -> NodeId {
    name.parse().unwrap()
}

pub(crate) fn instance_id(name: &str) -> InstanceId {
    name.parse().unwrap()
}

/// A node in region r1, zone z1, with a tebibyte of disk, that runs virtual machines.
pub(crate) fn node(name: &str, cores: u32, memory_mib: u64) -> NodeView {
    NodeView {
        id: node_id(name),
        hostname: name.into(),
        live: true,
        open: true,
        types: vec![InstanceType::Vm],
        images: Images { any: vec![InstanceType::Vm], ..Images::default() },
        region: "r1".into(),
        zone: "z1".into(),
        labels: labels(&[("hypervisor/hostname", name)]),
        taints: Vec::new(),
        devices: Default::default(),
        schedulable: Resources { disk_bytes: 1 << 40, ..amount(cores, memory_mib) },
    }
}

/// A virtual machine from image `tiny` in project p.
pub(crate) fn instance(name: &str, cores: u32, memory_mib: u64) -> InstanceRecord {
    let spec = InstanceSpec {
        image: "tiny".into(),
        cpu_cores: cores,
        memory_bytes: memory_mib * MIB,
        ..InstanceSpec::default()
    };
    InstanceRecord {
        project: "p".into(),
        created_at: std::time::UNIX_EPOCH,
        ..InstanceRecord::pending(instance_id(name), name, InstanceType::Vm, Arc::new(spec))
    }
}

/// The ask of an instance with these labels and rules.
pub(crate) fn ask_with(name: &str, own: &[(&str, &str)], rules: PlacementRules) -> Ask {
    let mut record = instance(name, 1, 64);
    record.metadata = Arc::new(Metadata { labels: labels(own), ..Metadata::default() });
    record.placement = Arc::new(rules);
    Ask::of(&record)
}

pub(crate) fn ask(name: &str, cores: u32, memory_mib: u64) -> Ask {
    Ask::of(&instance(name, cores, memory_mib))
}

pub(crate) fn with_priority(name: &str, cores: u32, memory_mib: u64, priority: i32) -> Ask {
    let mut record = instance(name, cores, memory_mib);
    record.placement = Arc::new(PlacementRules { priority, ..PlacementRules::default() });
    Ask::of(&record)
}

pub(crate) fn peers(pairs: &[(&str, &str)]) -> Peers {
    Peers { labels: selector(pairs), instance_name: String::new() }
}

/// A rule about instances labelled `app: web`.
pub(crate) fn affinity(anti: bool, topology: Topology, required: bool) -> PlacementRules {
    let rule = AffinityRule { anti, peers: peers(&[("app", "web")]), topology, required };
    PlacementRules { affinity: vec![rule], ..PlacementRules::default() }
}

/// A rule to spread instances labelled `app: web`.
pub(crate) fn spread(topology: Topology, max_skew: u32, required: bool) -> PlacementRules {
    let rule = SpreadRule { peers: peers(&[("app", "web")]), topology, max_skew, required };
    PlacementRules { spread: vec![rule], ..PlacementRules::default() }
}
