//! Claims about placement.

use hv_types::instance::{PlacementRules, StopOptions};
use hv_types::{Epoch, InstanceId, InstanceSpec, InstanceState, Metadata, Revision, Selector, Wanted};
use proptest::prelude::{prop, prop_assert, prop_assert_eq, proptest};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;

fn instance(cores: u32, memory_mib: u64) -> InstanceRecord {
    InstanceRecord {
        id: InstanceId::generate(),
        name: "a".into(),
        project: "default".into(),
        instance_type: InstanceType::Vm,
        spec: InstanceSpec {
            image: "tiny".into(),
            cpu_cores: cores,
            memory_bytes: memory_mib << 20,
            ..InstanceSpec::default()
        },
        metadata: Metadata::default(),
        placement: PlacementRules::default(),
        wanted: Wanted::Running,
        generation: 1,
        restart_generation: 0,
        stop: StopOptions::default(),
        binding: None,
        epoch: Epoch::default(),
        state: InstanceState::Pending,
        state_reason: String::new(),
        observed_generation: 0,
        ip_address: String::new(),
        created_at: std::time::UNIX_EPOCH,
        started_at: None,
        revision: Revision::default(),
    }
}

fn node(name: &str, cores: u32, memory_mib: u64) -> Candidate {
    Candidate {
        id: name.parse().unwrap(),
        hostname: name.into(),
        live: true,
        open: true,
        types: vec![InstanceType::Vm],
        images: Images { any: vec![InstanceType::Vm], local: Default::default() },
        region: "r1".into(),
        zone: "z1".into(),
        labels: Labels::new(),
        allocatable: Resources {
            cpu_cores: cores,
            memory_bytes: memory_mib << 20,
            disk_bytes: 1 << 40,
            gpu_count: 0,
        },
        allocated: Resources::default(),
    }
}

fn rng() -> StdRng {
    StdRng::seed_from_u64(7)
}

#[test]
fn each_rule_rejects_and_is_counted_once() {
    let check = |rule: Rule, spoil: fn(&mut Candidate, &mut InstanceRecord)| {
        let (mut bad, mut wanted) = (node("n1", 4, 1024), instance(2, 512));
        assert_eq!(reject(&bad, &wanted), None);
        spoil(&mut bad, &mut wanted);
        let rejections = place(&[bad], &wanted, Strategy::Spread, &mut rng()).unwrap_err();
        assert_eq!(rejections.counts().iter().collect::<Vec<_>>(), [(&rule, &1)]);
    };
    check(Rule::PreferredNode, |_, i| i.placement.preferred_node = Some("n2".parse().unwrap()));
    check(Rule::NotReady, |n, _| n.live = false);
    check(Rule::Cordoned, |n, _| n.open = false);
    check(Rule::InstanceType, |n, _| n.types.clear());
    check(Rule::Region, |_, i| i.placement.region = "r2".into());
    check(Rule::Zone, |_, i| i.placement.zone = "z2".into());
    check(Rule::Labels, |_, i| {
        i.placement.node_selector = Selector::new([("gpu".to_owned(), "*".to_owned())].into()).unwrap();
    });
    check(Rule::Image, |n, _| n.images.any.clear());
    check(Rule::Cpu, |n, _| n.allocated.cpu_cores = 3);
    check(Rule::Memory, |n, _| n.allocated.memory_bytes = 1 << 30);
    check(Rule::Disk, |n, i| {
        n.allocated.disk_bytes = 1 << 40;
        i.spec.disks.push(hv_types::DiskSpec { size_bytes: 1, ..Default::default() });
    });
}

#[test]
fn the_explanation_counts_per_rule_and_names_the_remedy() {
    let mut down = node("n1", 4, 1024);
    down.live = false;
    let nodes = [down, node("n2", 1, 1024), node("n3", 1, 1024)];
    let wanted = instance(2, 512);
    let text = place(&nodes, &wanted, Strategy::Spread, &mut rng()).unwrap_err().explain(&wanted);
    assert_eq!(
        text,
        "none of 3 nodes can take it: 1 not ready, 2 with fewer than 2 free cores; free room, ask for less, or add a node"
    );
}

#[test]
fn bin_pack_takes_the_fullest_and_spread_the_emptiest() {
    let mut full = node("full", 8, 8192);
    full.allocated = Resources { cpu_cores: 4, memory_bytes: 4 << 30, ..Resources::default() };
    let nodes = [node("empty", 8, 8192), full];
    let wanted = instance(1, 512);
    assert_eq!(place(&nodes, &wanted, Strategy::BinPack, &mut rng()), Ok(1));
    assert_eq!(place(&nodes, &wanted, Strategy::Spread, &mut rng()), Ok(0));
}

#[test]
fn equal_nodes_share_the_load() {
    let nodes: Vec<_> = (0..4).map(|i| node(&format!("n{i}"), 8, 8192)).collect();
    let mut rng = rng();
    let mut seen = [0; 4];
    for _ in 0..400 {
        seen[place(&nodes, &instance(1, 512), Strategy::Spread, &mut rng).unwrap()] += 1;
    }
    assert!(seen.iter().all(|count| *count > 50), "{seen:?}");
}

proptest! {
    #[test]
    fn filling_never_exceeds_any_node(
        sizes in prop::collection::vec((1u32..8, 1u64..4096), 1..80),
        nodes in prop::collection::vec((1u32..32, 1u64..16384), 1..8),
        pack: bool,
    ) {
        let mut nodes: Vec<_> = nodes.into_iter().enumerate().map(|(i, (c, m))| node(&format!("n{i}"), c, m)).collect();
        let strategy = if pack { Strategy::BinPack } else { Strategy::Spread };
        let mut rng = rng();
        for (cores, memory) in sizes {
            let wanted = instance(cores, memory);
            match place(&nodes, &wanted, strategy, &mut rng) {
                Ok(index) => {
                    nodes[index].allocated = nodes[index].allocated.plus(wanted.resources());
                    prop_assert!(nodes[index].allocated.fits_in(nodes[index].allocatable));
                }
                Err(rejections) => {
                    prop_assert_eq!(rejections.counts().values().sum::<usize>(), nodes.len());
                    prop_assert!(nodes.iter().all(|n| !wanted.resources().fits_in(n.free())));
                }
            }
        }
    }
}
