//! The fleet compared with the reference, over random histories.

use std::sync::Arc;

use hv_scheduler::{Ask, Fleet, NEAR, NodeView, Rule, Strategy as Ranking};
use hv_types::placement::{AffinityRule, Peers, PlacementRules, SpreadRule, Taint, Toleration, Topology};
use hv_types::{InstanceType, Labels, Metadata, Resources};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::reference::Reference;
use crate::world::{amount, instance, instance_id, labels, node, node_id, selector};

#[derive(Clone, Debug)]
enum Change {
    Upsert(Box<NodeView>),
    Remove(usize),
    SetLive(usize, bool),
    Bind(Box<Ask>, usize),
    Unbind(usize),
    Place(Box<Ask>, Ranking),
}

/// An image that some nodes have and some would fetch.
const FETCHED: &str = "oci://registry/tiny:1";

const NODES: usize = 7;
const INSTANCES: usize = 24;

fn node_name(index: usize) -> String {
    format!("n{index}")
}

fn topology() -> impl Strategy<Value = Topology> {
    prop_oneof![Just(Topology::Node), Just(Topology::Zone), Just(Topology::Region)]
}

fn some_labels() -> impl Strategy<Value = Labels> {
    prop_oneof![
        3 => Just(labels(&[])),
        2 => Just(labels(&[("app", "web")])),
        1 => Just(labels(&[("app", "db")])),
        1 => Just(labels(&[("app", "web"), ("tier", "x")])),
    ]
}

fn some_peers() -> impl Strategy<Value = Peers> {
    let by_label = prop_oneof![
        Just(labels(&[("app", "web")])),
        Just(labels(&[("app", "*")])),
        Just(labels(&[("tier", "x")])),
    ];
    prop_oneof![
        4 => by_label.prop_map(|l| Peers { labels: hv_types::Selector::new(l).unwrap(), instance_name: String::new() }),
        1 => (0..INSTANCES).prop_map(|i| Peers { labels: selector(&[]), instance_name: format!("i{i}") }),
        1 => (0..INSTANCES).prop_map(|i| Peers { labels: selector(&[("app", "*")]), instance_name: format!("i{i}") }),
    ]
}

fn some_node() -> impl Strategy<Value = NodeView> {
    let place = (
        prop_oneof![Just(""), Just("z1"), Just("z2"), Just("z3")],
        prop_oneof![Just(""), Just("r1")],
        prop_oneof![3 => Just(labels(&[])), 1 => Just(labels(&[("disk", "ssd")]))],
    );
    let taints = prop_oneof![
        4 => Just(Vec::new()),
        1 => Just(vec![Taint { key: "gpu".into(), value: "a".into(), hard: true }]),
        1 => Just(vec![Taint { key: "old".into(), value: String::new(), hard: false }]),
    ];
    let size = (
        prop_oneof![Just(0u32), Just(4), Just(16), Just(63), Just(64), Just(200)],
        prop_oneof![Just(0u64), Just(64), Just(1000), Just(4096)],
        prop_oneof![Just(0u64), Just(100)],
        0u32..3,
    );
    let flags = (prop::bool::weighted(0.85), prop::bool::weighted(0.85), prop::bool::weighted(0.9), 0u8..4);
    (0..NODES, place, taints, size, flags).prop_map(|(index, (zone, region, own), taints, size, flags)| {
        let (cores, memory, disk_bytes, gpu_count) = size;
        let mut view = node(&node_name(index), cores, memory);
        view.schedulable = Resources { disk_bytes, gpu_count, ..view.schedulable };
        (view.zone, view.region, view.taints) = (zone.into(), region.into(), taints);
        view.labels.extend(own);
        (view.live, view.open) = (flags.0, flags.1);
        if !flags.2 {
            view.types.clear();
        }
        if flags.3 > 0 {
            view.images.any.clear();
            view.images.local.insert((InstanceType::Vm, "tiny".into()));
        }
        if flags.3 > 1 {
            view.images.fetched.push(InstanceType::Vm);
        }
        if flags.3 > 2 {
            view.images.local.insert((InstanceType::Vm, FETCHED.into()));
        }
        view
    })
}

fn some_rules() -> impl Strategy<Value = PlacementRules> {
    let affinity = (any::<bool>(), some_peers(), topology(), any::<bool>())
        .prop_map(|(anti, peers, topology, required)| AffinityRule { anti, peers, topology, required });
    let spread = (some_peers(), topology(), 1u32..3, any::<bool>())
        .prop_map(|(peers, topology, max_skew, required)| SpreadRule { peers, topology, max_skew, required });
    let fixed = (
        prop_oneof![8 => Just(None), 1 => (0..NODES).prop_map(|i| Some(node_id(&node_name(i))))],
        prop_oneof![6 => Just(""), 1 => Just("z1"), 1 => Just("z9")],
        prop_oneof![8 => Just(""), 1 => Just("r1")],
        prop_oneof![
            8 => Just(labels(&[])),
            1 => Just(labels(&[("disk", "ssd")])),
            1 => Just(labels(&[("hypervisor/hostname", "n1")])),
            1 => Just(labels(&[("hypervisor/hostname", "*"), ("disk", "*")])),
        ],
        prop_oneof![4 => Just(Vec::new()), 1 => Just(vec![Toleration { key: "gpu".into(), value: "*".into() }])],
    );
    let affinity = prop_oneof![
        3 => Just(Vec::new()),
        2 => prop::collection::vec(affinity, 1..3),
    ];
    let spread = prop_oneof![
        3 => Just(Vec::new()),
        1 => prop::collection::vec(spread, 1..3),
    ];
    (fixed, affinity, spread, -2i32..3).prop_map(|(fixed, affinity, spread, priority)| PlacementRules {
        preferred_node: fixed.0,
        zone: fixed.1.into(),
        region: fixed.2.into(),
        node_selector: hv_types::Selector::new(fixed.3).unwrap(),
        tolerations: fixed.4,
        affinity,
        spread,
        priority,
    })
}

fn some_ask() -> impl Strategy<Value = Ask> {
    let size = (
        0u32..9,
        0u64..600,
        prop_oneof![4 => Just(0u64), 1 => 1u64..60],
        prop_oneof![5 => Just(0u32), 1 => Just(1)],
    );
    let image = prop_oneof![5 => Just("tiny"), 1 => Just(""), 1 => Just("other"), 3 => Just(FETCHED)];
    (0..INSTANCES, size, image, some_labels(), some_rules(), any::<bool>()).prop_map(
        |(index, (cores, memory, disk_bytes, gpu_count), image, own, rules, other)| {
            let mut record = instance(&format!("i{index}"), cores, memory);
            Arc::make_mut(&mut record.spec).image = image.into();
            record.metadata = Arc::new(Metadata { labels: own, ..Metadata::default() });
            record.placement = Arc::new(rules);
            if other {
                record.project = "q".into();
            }
            Ask::of(&record).with_resources(Resources { disk_bytes, gpu_count, ..amount(cores, memory) })
        },
    )
}

fn ranking() -> impl Strategy<Value = Ranking> {
    prop_oneof![Just(Ranking::Spread), Just(Ranking::BinPack)]
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => some_node().prop_map(|node| Change::Upsert(Box::new(node))),
        1 => (0..NODES).prop_map(Change::Remove),
        1 => (0..NODES, any::<bool>()).prop_map(|(node, live)| Change::SetLive(node, live)),
        3 => (some_ask(), 0..NODES).prop_map(|(ask, node)| Change::Bind(Box::new(ask), node)),
        2 => (0..INSTANCES).prop_map(Change::Unbind),
        8 => (some_ask(), ranking()).prop_map(|(ask, ranking)| Change::Place(Box::new(ask), ranking)),
    ]
}

fn apply(
    fleet: &mut Fleet,
    model: &mut Reference,
    change: &Change,
    rng: &mut StdRng,
) -> Result<(), TestCaseError> {
    match change {
        Change::Upsert(node) => {
            fleet.upsert_node((**node).clone());
            model.nodes.insert(node.id.clone(), (**node).clone());
        }
        Change::Remove(index) => {
            let id = node_id(&node_name(*index));
            prop_assert_eq!(fleet.remove_node(&id), model.nodes.remove(&id).is_some());
        }
        Change::SetLive(index, live) => {
            let id = node_id(&node_name(*index));
            let known = model.nodes.get_mut(&id).map(|node| node.live = *live).is_some();
            prop_assert_eq!(fleet.set_live(&id, *live), known);
        }
        Change::Bind(ask, node) => {
            let node = node_id(&node_name(*node));
            fleet.bind(ask.id(), ask, &node);
            model.bound.insert(ask.id().clone(), ((**ask).clone(), node));
        }
        Change::Unbind(index) => {
            let id = instance_id(&format!("i{index}"));
            let before = model.bound.remove(&id).map(|(_, node)| node);
            prop_assert_eq!(fleet.unbind(&id), before);
        }
        Change::Place(ask, ranking) => {
            // As the placer does: what waits is bound nowhere.
            fleet.unbind(ask.id());
            model.bound.remove(ask.id());
            check_decision(fleet, model, ask, *ranking, rng)?;
        }
    }
    Ok(())
}

fn check_decision(
    fleet: &mut Fleet,
    model: &mut Reference,
    ask: &Ask,
    ranking: Ranking,
    rng: &mut StdRng,
) -> Result<(), TestCaseError> {
    let others = model.others(ask);
    let rejecting: Vec<_> =
        model.nodes.values().map(|node| (node, model.rejecting(node, ask, &others))).collect();
    let fitting: Vec<_> =
        rejecting.iter().filter(|(_, rules)| rules.is_empty()).map(|(node, _)| *node).collect();
    prop_assert_eq!(fleet.fitting(ask), fitting.iter().map(|node| node.id.clone()).collect::<Vec<_>>());
    let value = |node: &NodeView| model.score(node, ask, &others).value(ranking);
    let best = fitting.iter().map(|node| value(node)).fold(f64::NEG_INFINITY, f64::max);
    let explanation = fleet.explain(ask, ranking);
    prop_assert_eq!(explanation.total, model.nodes.len());
    prop_assert_eq!(explanation.fitting, fitting.len());
    let counted = explanation.rejected.iter().map(|rejected| rejected.nodes).sum::<usize>();
    prop_assert_eq!(counted + explanation.fitting, explanation.total);
    match fleet.place(ask, ranking, rng) {
        Ok(placed) => {
            let node = &model.nodes[&placed.node];
            prop_assert!(fitting.iter().any(|other| other.id == node.id), "{} does not fit", node.id);
            prop_assert!(value(node) >= best - NEAR - 1e-9, "{} is not near {best}", value(node));
            prop_assert!((explanation.best[0].score - best).abs() < 1e-9);
            prop_assert_eq!(fleet.hostname(placed.index), &node.hostname);
            fleet.bind_at(ask.id(), ask, placed.index);
            model.bound.insert(ask.id().clone(), (ask.clone(), placed.node.clone()));
            prop_assert_eq!(fleet.allocated(&placed.node), model.used(&placed.node));
        }
        Err(rejections) => {
            prop_assert!(fitting.is_empty());
            prop_assert_eq!(rejections.rejected(), model.nodes.len());
            for rule in Rule::ALL {
                let first = rejecting.iter().filter(|(_, rules)| rules.first() == Some(&rule)).count();
                prop_assert_eq!(rejections.of(rule), first, "{:?}", rule);
            }
            prop_assert_eq!(rejections.summary(ask), explanation.summary());
            check_preemption(fleet, model, ask)?;
        }
    }
    Ok(())
}

/// Whoever has to go is of lower priority, and without them the ask fits.
fn check_preemption(fleet: &Fleet, model: &Reference, ask: &Ask) -> Result<(), TestCaseError> {
    let Some(preemption) = fleet.preempt(ask) else { return Ok(()) };
    prop_assert!(!preemption.victims.is_empty());
    let mut after = fleet.clone();
    for victim in &preemption.victims {
        let (of, node) = &model.bound[victim];
        prop_assert!(of.priority() < ask.priority());
        prop_assert_eq!(node, &preemption.node);
        after.unbind(victim);
    }
    prop_assert!(after.fitting(ask).contains(&preemption.node));
    for spared in &preemption.victims {
        let (of, node) = &model.bound[spared];
        let mut with_one = after.clone();
        with_one.bind(spared, of, node);
        prop_assert!(!with_one.fitting(ask).contains(&preemption.node), "{spared} need not go");
    }
    Ok(())
}

proptest! {
    #[test]
    fn the_fleet_decides_as_the_reference_and_history_leaves_no_trace(
        changes in prop::collection::vec(change(), 1..60),
        asks in prop::collection::vec(some_ask(), 1..6),
        seed: u64,
    ) {
        let (mut fleet, mut model) = (Fleet::new(), Reference::default());
        let mut rng = StdRng::seed_from_u64(seed);
        for change in &changes {
            apply(&mut fleet, &mut model, change, &mut rng)?;
        }
        let mut fresh = Fleet::new();
        for (id, (ask, node)) in &model.bound {
            fresh.bind(id, ask, node);
        }
        for node in model.nodes.values().rev() {
            fresh.upsert_node(node.clone());
        }
        prop_assert_eq!(fleet.nodes(), fresh.nodes());
        prop_assert_eq!(fleet.instances(), fresh.instances());
        for ask in &asks {
            for ranking in [Ranking::Spread, Ranking::BinPack] {
                prop_assert_eq!(fleet.explain(ask, ranking), fresh.explain(ask, ranking));
            }
            prop_assert_eq!(fleet.preempt(ask).map(|p| (p.node, p.victims)), fresh.preempt(ask).map(|p| (p.node, p.victims)));
            check_decision(&mut fleet, &mut model, ask, Ranking::Spread, &mut rng)?;
            fleet.unbind(ask.id());
            model.bound.remove(ask.id());
            fresh.unbind(ask.id());
        }
        for id in model.bound.keys() {
            fleet.unbind(id);
        }
        prop_assert_eq!(fleet.instances(), 0);
        for node in model.nodes.values() {
            prop_assert_eq!(fleet.free(&node.id), Some(node.schedulable));
        }
    }
}
