//! Claims about rules that ask where other instances are.

use hv_scheduler::{Fleet, Rejections, Rule, Strategy};
use hv_types::placement::{AffinityRule, Peers, PlacementRules, Topology};
use hv_types::{NodeId, Selector};

use crate::world::{affinity, ask_with, node, node_id, rng, spread};

const WEB: &[(&str, &str)] = &[("app", "web")];

/// Two nodes in each of two zones.
fn fleet() -> Fleet {
    let mut fleet = Fleet::new();
    for (name, zone) in [("a1", "a"), ("a2", "a"), ("b1", "b"), ("b2", "b")] {
        let mut view = node(name, 8, 8192);
        view.zone = zone.into();
        fleet.upsert_node(view);
    }
    fleet
}

fn go(
    fleet: &mut Fleet,
    name: &str,
    own: &[(&str, &str)],
    rules: PlacementRules,
) -> Result<NodeId, Rejections> {
    let ask = ask_with(name, own, rules);
    let placed = fleet.place(&ask, Strategy::Spread, &mut rng())?;
    fleet.bind_at(ask.id(), &ask, placed.index);
    Ok(placed.node)
}

#[test]
fn required_anti_affinity_gives_each_its_own_place() {
    let mut apart = fleet();
    let mut nodes: Vec<_> = (0..4)
        .map(|i| go(&mut apart, &format!("w{i}"), WEB, affinity(true, Topology::Node, true)).unwrap())
        .collect();
    nodes.sort();
    nodes.dedup();
    assert_eq!(nodes.len(), 4);
    let rejections = go(&mut apart, "w4", WEB, affinity(true, Topology::Node, true)).unwrap_err();
    assert_eq!(rejections.of(Rule::AntiAffinity), 4);
    let mut zones = fleet();
    let first = go(&mut zones, "w0", WEB, affinity(true, Topology::Zone, true)).unwrap();
    let second = go(&mut zones, "w1", WEB, affinity(true, Topology::Zone, true)).unwrap();
    assert_ne!(first.as_str().as_bytes()[0], second.as_str().as_bytes()[0]);
    assert!(go(&mut zones, "w2", WEB, affinity(true, Topology::Zone, true)).is_err());
}

#[test]
fn whoever_is_kept_away_is_so_without_a_rule_of_its_own() {
    let mut fleet = fleet();
    let guard = ask_with("guard", &[], affinity(true, Topology::Zone, true));
    fleet.bind(guard.id(), &guard, &node_id("a1"));
    for index in 0..6 {
        let node = go(&mut fleet, &format!("w{index}"), WEB, PlacementRules::default()).unwrap();
        assert!(node.as_str().starts_with('b'), "{node}");
    }
    // Others are not concerned, and nobody is once the guard is gone.
    go(&mut fleet, "db", &[("app", "db")], PlacementRules::default()).unwrap();
    fleet.unbind(guard.id());
    let node = go(&mut fleet, "w9", WEB, PlacementRules::default()).unwrap();
    assert!(node.as_str().starts_with('a'), "{node}");
}

#[test]
fn a_zone_that_changes_its_name_takes_its_instances_along() {
    let mut fleet = fleet();
    let guard = ask_with("guard", &[], affinity(true, Topology::Zone, true));
    fleet.bind(guard.id(), &guard, &node_id("a1"));
    for (name, zone) in [("a1", "b"), ("b1", "a"), ("b2", "a")] {
        let mut view = node(name, 8, 8192);
        view.zone = zone.into();
        fleet.upsert_node(view);
    }
    // The guard's zone is b now, alone.
    let fitting = fleet.fitting(&ask_with("w", WEB, PlacementRules::default()));
    assert_eq!(fitting, ["a2", "b1", "b2"].map(node_id));
}

#[test]
fn required_affinity_follows_its_peers_and_the_first_of_a_group_may_go_anywhere() {
    let mut fleet = fleet();
    let lonely = go(&mut fleet, "i", &[], affinity(false, Topology::Node, true)).unwrap_err();
    assert_eq!(lonely.of(Rule::Affinity), 4);
    let first = go(&mut fleet, "w0", WEB, affinity(false, Topology::Node, true)).unwrap();
    for index in 1..4 {
        assert_eq!(
            go(&mut fleet, &format!("w{index}"), WEB, affinity(false, Topology::Node, true)),
            Ok(first.clone())
        );
    }
    assert_eq!(go(&mut fleet, "i", &[], affinity(false, Topology::Node, true)), Ok(first));
}

#[test]
fn a_rule_may_name_one_instance() {
    let mut fleet = fleet();
    let db = ask_with("db", &[], PlacementRules::default());
    fleet.bind(db.id(), &db, &node_id("b2"));
    let peers = Peers { labels: Selector::default(), instance_name: "db".into() };
    let rule = AffinityRule { anti: false, peers, topology: Topology::Node, required: true };
    let rules = PlacementRules { affinity: vec![rule], ..PlacementRules::default() };
    assert_eq!(go(&mut fleet, "i", &[], rules), Ok(node_id("b2")));
}

#[test]
fn peers_of_another_project_do_not_count() {
    let mut fleet = fleet();
    let mut record = crate::world::instance("w", 1, 64);
    record.project = "other".into();
    record.metadata = std::sync::Arc::new(hv_types::Metadata {
        labels: crate::world::labels(WEB),
        ..hv_types::Metadata::default()
    });
    let foreign = hv_scheduler::Ask::of(&record);
    fleet.bind(foreign.id(), &foreign, &node_id("a1"));
    let wanted = ask_with("i", WEB, affinity(true, Topology::Region, true));
    assert_eq!(fleet.fitting(&wanted).len(), 4);
}

#[test]
fn required_spread_keeps_places_within_the_skew() {
    let mut fleet = fleet();
    let mut zones = [0u32; 2];
    for index in 0..20 {
        let node = go(&mut fleet, &format!("w{index}"), WEB, spread(Topology::Zone, 1, true)).unwrap();
        zones[usize::from(node.as_str().starts_with('b'))] += 1;
        assert!(zones[0].abs_diff(zones[1]) <= 1, "{zones:?}");
    }
    // A zone that cannot be had at all does not hold the other back.
    for name in ["a1", "a2"] {
        fleet.set_live(&node_id(name), false);
    }
    for index in 20..23 {
        assert!(go(&mut fleet, &format!("w{index}"), WEB, spread(Topology::Zone, 1, true)).is_ok());
    }
}

#[test]
fn preferences_give_way_when_they_cannot_be_met() {
    let mut fleet = fleet();
    let mut nodes: Vec<_> = (0..4)
        .map(|i| go(&mut fleet, &format!("w{i}"), WEB, affinity(true, Topology::Node, false)).unwrap())
        .collect();
    nodes.sort();
    nodes.dedup();
    assert_eq!(nodes.len(), 4);
    assert!(go(&mut fleet, "w4", WEB, affinity(true, Topology::Node, false)).is_ok());
}

#[test]
fn queries_that_were_pushed_out_are_counted_afresh() {
    let mut fleet = fleet();
    let rule = |index: usize| {
        let peers = Peers { labels: Selector::default(), instance_name: format!("p{index}") };
        let rule = AffinityRule { anti: false, peers, topology: Topology::Node, required: true };
        PlacementRules { affinity: vec![rule], ..PlacementRules::default() }
    };
    for round in 0..2 {
        for index in 0..400 {
            let found = fleet.fitting(&ask_with("i", &[], rule(index))).len();
            assert_eq!(found, usize::from(round == 1));
            let placed = fleet.place(&ask_with("i", &[], rule(index)), Strategy::Spread, &mut rng());
            assert_eq!(placed.is_ok(), round == 1, "round {round}, query {index}");
        }
        for index in 0..400 {
            let peer = ask_with(&format!("p{index}"), &[], PlacementRules::default());
            let peer = peer.with_resources(hv_types::Resources::default());
            fleet.bind(peer.id(), &peer, &node_id(["a1", "a2", "b1", "b2"][index % 4]));
        }
    }
}
