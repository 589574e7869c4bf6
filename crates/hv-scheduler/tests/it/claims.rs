//! Claims about rules and ranking.

use std::sync::Arc;

use hv_scheduler::{Ask, Fleet, Images, NEAR, NodeView, Rule, Strategy as Ranking, fullness, order};
use hv_types::placement::{PlacementRules, Taint, Toleration};
use hv_types::{InstanceRecord, InstanceType, Resources};
use proptest::prelude::*;

use crate::world::{amount, ask, instance, instance_id, labels, node, node_id, rng, selector, with_priority};

fn fleet(nodes: impl IntoIterator<Item = NodeView>) -> Fleet {
    let mut fleet = Fleet::new();
    for node in nodes {
        fleet.upsert_node(node);
    }
    fleet
}

fn rules(record: &mut InstanceRecord) -> &mut PlacementRules {
    Arc::make_mut(&mut record.placement)
}

#[test]
fn each_rule_rejects_and_is_counted_once() {
    let check = |rule: Rule, spoil: fn(&mut NodeView, &mut InstanceRecord)| {
        let (mut bad, mut wanted) = (node("n1", 4, 1024), instance("i", 2, 512));
        assert_eq!(
            fleet([bad.clone()]).place(&Ask::of(&wanted), Ranking::Spread, &mut rng()).map(|p| p.node),
            Ok(bad.id.clone())
        );
        spoil(&mut bad, &mut wanted);
        let rejections = fleet([bad]).place(&Ask::of(&wanted), Ranking::Spread, &mut rng()).unwrap_err();
        assert_eq!(rejections.counts().collect::<Vec<_>>(), [(rule, 1)]);
    };
    check(Rule::PreferredNode, |_, i| rules(i).preferred_node = Some(node_id("n2")));
    check(Rule::NotReady, |n, _| n.live = false);
    check(Rule::Cordoned, |n, _| n.open = false);
    check(Rule::InstanceType, |n, _| n.types.clear());
    check(Rule::Region, |_, i| rules(i).region = "r2".into());
    check(Rule::Zone, |_, i| rules(i).zone = "z2".into());
    check(Rule::Labels, |_, i| rules(i).node_selector = selector(&[("gpu", "*")]));
    check(Rule::Labels, |_, i| rules(i).node_selector = selector(&[("hypervisor/hostname", "n2")]));
    check(Rule::Taint, |n, _| n.taints = vec![taint("gpu", true)]);
    check(Rule::Image, |n, _| n.images.any.clear());
    check(Rule::Cpu, |n, _| n.schedulable.cpu_cores = 1);
    check(Rule::Memory, |n, _| n.schedulable.memory_bytes = 511 << 20);
    check(Rule::Disk, |n, i| {
        n.schedulable.disk_bytes = 0;
        let disk = hv_types::DiskSpec { size_bytes: 1, ..Default::default() };
        Arc::make_mut(&mut i.spec).disks.push(disk);
    });
}

#[test]
fn an_image_that_can_be_fetched_rejects_nobody_and_yet_is_preferred_where_it_is() {
    let reference = "oci://registry/tiny:1";
    let fetching = |name: &str| {
        let mut view = node(name, 8, 1024);
        view.images = Images { fetched: vec![InstanceType::Vm], ..Images::default() };
        view
    };
    let mut wanted = instance("i", 1, 64);
    Arc::make_mut(&mut wanted.spec).image = reference.into();
    let ask = Ask::of(&wanted);
    let mut having = fetching("n2");
    having.images.local.insert((InstanceType::Vm, reference.into()));
    let mut nodes = fleet([fetching("n1"), having, fetching("n3")]);
    for _ in 0..20 {
        assert_eq!(nodes.place(&ask, Ranking::Spread, &mut rng()).unwrap().node, node_id("n2"));
    }
    assert!(fleet([fetching("n1")]).place(&ask, Ranking::Spread, &mut rng()).is_ok());
    // A name is no reference: nobody knows where from.
    Arc::make_mut(&mut wanted.spec).image = "tiny".into();
    assert!(fleet([fetching("n1")]).place(&Ask::of(&wanted), Ranking::Spread, &mut rng()).is_err());
}

fn taint(key: &str, hard: bool) -> Taint {
    Taint { key: key.into(), value: String::new(), hard }
}

#[test]
fn a_tolerated_taint_does_not_matter_and_a_soft_one_is_taken_last() {
    let (mut hard, mut soft) = (node("hard", 4, 1024), node("soft", 4, 1024));
    (hard.taints, soft.taints) = (vec![taint("gpu", true)], vec![taint("old", false)]);
    let mut record = instance("i", 1, 64);
    rules(&mut record).tolerations = vec![Toleration { key: "gpu".into(), value: "*".into() }];
    let mut fleet = fleet([hard, soft]);
    let mut rng = rng();
    let (tolerant, plain) = (Ask::of(&record), ask("j", 1, 64));
    assert_eq!(fleet.place(&tolerant, Ranking::Spread, &mut rng).unwrap().node, node_id("hard"));
    assert_eq!(fleet.place(&plain, Ranking::Spread, &mut rng).unwrap().node, node_id("soft"));
    // Even a node that is nearly full comes before one with a soft taint.
    fleet.bind(&instance_id("filler"), &ask("filler", 3, 900), &node_id("hard"));
    assert_eq!(fleet.place(&tolerant, Ranking::Spread, &mut rng).unwrap().node, node_id("hard"));
}

#[test]
fn bin_pack_takes_the_fullest_and_spread_the_emptiest() {
    let mut fleet = fleet([node("empty", 8, 8192), node("full", 8, 8192)]);
    fleet.bind(&instance_id("x"), &ask("x", 4, 4096), &node_id("full"));
    let wanted = ask("i", 1, 512);
    assert_eq!(fleet.place(&wanted, Ranking::BinPack, &mut rng()).unwrap().node, node_id("full"));
    assert_eq!(fleet.place(&wanted, Ranking::Spread, &mut rng()).unwrap().node, node_id("empty"));
}

#[test]
fn equal_nodes_share_the_load() {
    for ranking in [Ranking::Spread, Ranking::BinPack] {
        let mut fleet = fleet((0..4).map(|i| node(&format!("n{i}"), 8, 8192)));
        let mut rng = rng();
        let mut seen = [0; 4];
        for _ in 0..400 {
            let placed = fleet.place(&ask("i", 1, 512), ranking, &mut rng).unwrap();
            seen[placed.node.as_str()[1..].parse::<usize>().unwrap()] += 1;
        }
        assert!(seen.iter().all(|count| *count > 70), "{seen:?}");
    }
}

#[test]
fn a_cluster_of_equal_nodes_fills_evenly() {
    let mut fleet = fleet((0..100).map(|i| node(&format!("n{i}"), 64, 65536)));
    let mut rng = rng();
    for index in 0..3200 {
        let name = format!("i{index}");
        let wanted = ask(&name, 1, 1024);
        let placed = fleet.place(&wanted, Ranking::Spread, &mut rng).unwrap();
        fleet.bind_at(wanted.id(), &wanted, placed.index);
    }
    let free = (0..100).map(|i| fleet.free(&node_id(&format!("n{i}"))).unwrap().cpu_cores);
    let (least, most) = (free.clone().min().unwrap(), free.max().unwrap());
    assert!(most - least <= 3, "{least} to {most} cores are free");
}

#[test]
fn what_is_bound_counts_before_its_node_comes_and_after_it_comes_back() {
    let mut fleet = Fleet::new();
    let wanted = ask("i", 3, 64);
    fleet.bind(wanted.id(), &wanted, &node_id("n1"));
    fleet.upsert_node(node("n1", 4, 1024));
    assert_eq!(fleet.free(&node_id("n1")).unwrap().cpu_cores, 1);
    assert!(fleet.remove_node(&node_id("n1")) && !fleet.remove_node(&node_id("n1")));
    assert!(fleet.place(&ask("j", 1, 64), Ranking::Spread, &mut rng()).is_err());
    fleet.upsert_node(node("n1", 4, 1024));
    assert_eq!(fleet.free(&node_id("n1")).unwrap().cpu_cores, 1);
    // Bound again elsewhere it counts there alone; and again there, once.
    fleet.upsert_node(node("n2", 4, 1024));
    fleet.bind(wanted.id(), &wanted, &node_id("n2"));
    fleet.bind(wanted.id(), &wanted, &node_id("n2"));
    assert_eq!(fleet.free(&node_id("n1")).unwrap().cpu_cores, 4);
    assert_eq!(fleet.free(&node_id("n2")).unwrap().cpu_cores, 1);
    assert_eq!(fleet.unbind(wanted.id()), Some(node_id("n2")));
    assert_eq!(fleet.unbind(wanted.id()), None);
}

#[test]
fn shapes_are_forgotten_and_decided_alike_ever_after() {
    let mut special = node("special", 4, 1024);
    special.labels.extend(labels(&[("n", "700")]));
    let mut fleet = fleet([node("plain", 4, 1024), special]);
    let mut rng = rng();
    for round in 0..2 {
        for index in 0..1000 {
            let mut record = instance("i", 1, 64);
            rules(&mut record).node_selector = selector(&[("n", &index.to_string())]);
            let placed = fleet.place(&Ask::of(&record), Ranking::Spread, &mut rng);
            assert_eq!(placed.is_ok(), index == 700, "round {round}, shape {index}");
            assert!(fleet.shapes() <= 512);
        }
    }
}

#[test]
fn a_verdict_is_taken_back_when_its_node_changes() {
    let mut fleet = fleet((0..3).map(|i| node(&format!("n{i}"), 4, 1024)));
    let mut rng = rng();
    let mut record = instance("i", 1, 64);
    rules(&mut record).node_selector = selector(&[("disk", "ssd")]);
    let wanted = Ask::of(&record);
    // Classes come and go more often than births are remembered.
    for turn in 0..5000 {
        let name = format!("n{}", turn % 3);
        let mut view = node(&name, 4, 1024);
        view.labels.extend(labels(&[("turn", &turn.to_string()), ("disk", "ssd")]));
        fleet.upsert_node(view);
        if turn % 7 == 0 || turn == 4999 {
            assert_eq!(
                fleet.place(&wanted, Ranking::Spread, &mut rng).map(|p| p.node.to_string().len()),
                Ok(2)
            );
        }
        fleet.upsert_node(node(&name, 4, 1024));
        if turn % 5 == 0 {
            let rejections = fleet.place(&wanted, Ranking::Spread, &mut rng).unwrap_err();
            assert_eq!(rejections.of(Rule::Labels), 3);
        }
    }
}

#[test]
fn a_shape_that_was_not_asked_for_in_a_long_time_knows_all_that_changed() {
    let mut fleet = fleet([node("n0", 4, 1024)]);
    let mut rng = rng();
    let wanted = |label: &str| {
        let mut record = instance("i", 1, 64);
        rules(&mut record).node_selector = selector(&[("turn", label)]);
        Ask::of(&record)
    };
    assert!(fleet.place(&wanted("4999"), Ranking::Spread, &mut rng).is_err());
    assert!(fleet.place(&wanted("0"), Ranking::Spread, &mut rng).is_err());
    for turn in 0..5000 {
        let mut view = node("n0", 4, 1024);
        view.labels.extend(labels(&[("turn", &turn.to_string())]));
        fleet.upsert_node(view);
        if turn == 0 {
            assert!(fleet.place(&wanted("0"), Ranking::Spread, &mut rng).is_ok());
        }
    }
    assert!(fleet.place(&wanted("4999"), Ranking::Spread, &mut rng).is_ok());
    assert!(fleet.place(&wanted("0"), Ranking::Spread, &mut rng).is_err());
}

#[test]
fn asks_are_served_by_priority_then_age() {
    let mut asks = [
        with_priority("c", 1, 1, 0),
        with_priority("a", 1, 1, -5),
        with_priority("d", 1, 1, 7),
        with_priority("b", 1, 1, 0),
    ];
    order(&mut asks);
    assert_eq!(asks.map(|ask| ask.id().to_string()), ["d", "b", "c", "a"]);
}

fn some_cores() -> impl Strategy<Value = u32> {
    prop_oneof![Just(32u32), Just(64), Just(63), 1u32..300]
}

fn some_disk() -> impl Strategy<Value = u64> {
    prop_oneof![3 => Just(0u64), 1 => 1u64 << 36..1u64 << 39]
}

proptest! {

    #[test]
    fn a_fleet_that_fills_never_holds_too_much_and_always_takes_a_near_best(
        nodes in prop::collection::vec((some_cores(), 1u64..20_000), 1..30),
        sizes in prop::collection::vec((0u32..9, 1u64..2000, some_disk(), prop::option::weighted(0.3, any::<prop::sample::Index>())), 1..250),
        pack: bool,
    ) {
        let strategy = if pack { Ranking::BinPack } else { Ranking::Spread };
        let views: Vec<_> = nodes.iter().enumerate().map(|(i, (cores, memory))| node(&format!("n{i}"), *cores, *memory)).collect();
        let mut fleet = fleet(views.clone());
        let mut used = vec![Resources::default(); views.len()];
        let mut bound = Vec::new();
        let mut rng = rng();
        for (index, (cores, memory, disk_bytes, gone)) in sizes.into_iter().enumerate() {
            if let Some(gone) = gone && !bound.is_empty() {
                let (id, at, amount): (hv_types::InstanceId, usize, Resources) = bound.swap_remove(gone.index(bound.len()));
                prop_assert_eq!(fleet.unbind(&id), Some(views[at].id.clone()));
                used[at] = used[at].minus(amount);
            }
            let need = Resources { disk_bytes, ..amount(cores, memory) };
            let wanted = ask(&format!("i{index}"), 1, 1).with_resources(need);
            let free = |at: usize| views[at].schedulable.minus(used[at]);
            let value = |at: usize| {
                let fullness = fullness(views[at].schedulable, free(at), need);
                if pack { fullness } else { -fullness }
            };
            let fits = |at: &usize| need.fits_in(free(*at));
            let best = (0..views.len()).filter(fits).map(value).fold(f64::NEG_INFINITY, f64::max);
            match fleet.place(&wanted, strategy, &mut rng) {
                Ok(placed) => {
                    let at = placed.node.as_str()[1..].parse::<usize>().unwrap();
                    prop_assert!(fits(&at));
                    prop_assert!(value(at) >= best - NEAR - 1e-9, "{} of {best}", value(at));
                    used[at] = used[at].plus(need);
                    fleet.bind_at(wanted.id(), &wanted, placed.index);
                    bound.push((wanted.id().clone(), at, need));
                    prop_assert_eq!(fleet.allocated(&placed.node), used[at]);
                }
                Err(rejections) => {
                    prop_assert!((0..views.len()).all(|at| !fits(&at)));
                    let few = |at: &usize| cores > free(*at).cpu_cores;
                    let little = |at: &usize| need.memory_bytes > free(*at).memory_bytes;
                    let all = 0..views.len();
                    prop_assert_eq!(rejections.of(Rule::Cpu), all.clone().filter(few).count());
                    prop_assert_eq!(rejections.of(Rule::Memory), all.clone().filter(|at| !few(at) && little(at)).count());
                    prop_assert_eq!(rejections.of(Rule::Disk), all.filter(|at| !few(at) && !little(at)).count());
                }
            }
        }
    }
}
