//! Claims about who has to give way.

use hv_scheduler::{Fleet, MAX_VICTIMS};
use proptest::prelude::*;

use crate::world::{instance_id, node, node_id, with_priority};

fn fleet(nodes: &[(&str, u32)], bound: &[(&str, u32, i32, &str)]) -> Fleet {
    let mut fleet = Fleet::new();
    for (name, cores) in nodes {
        fleet.upsert_node(node(name, *cores, 65536));
    }
    for (name, cores, priority, node) in bound {
        fleet.bind(&instance_id(name), &with_priority(name, *cores, 64, *priority), &node_id(node));
    }
    fleet
}

fn victims(fleet: &Fleet, cores: u32, priority: i32) -> Option<(String, Vec<String>)> {
    let preemption = fleet.preempt(&with_priority("new", cores, 64, priority))?;
    let victims = preemption.victims.iter().map(ToString::to_string).collect();
    Some((preemption.node.to_string(), victims))
}

#[test]
fn the_fewest_go_and_of_these_the_lowest() {
    let bound = [("a1", 4, 0, "a"), ("a2", 4, 0, "a"), ("b1", 8, 3, "b"), ("c1", 8, 2, "c")];
    let fleet = fleet(&[("a", 8), ("b", 8), ("c", 8)], &bound);
    assert_eq!(victims(&fleet, 8, 5), Some(("c".into(), vec!["c1".into()])));
    assert_eq!(victims(&fleet, 4, 5), Some(("a".into(), vec!["a2".into()])));
    // Only those on a are low enough; the youngest is named first.
    assert_eq!(victims(&fleet, 8, 2), Some(("a".into(), vec!["a2".into(), "a1".into()])));
}

#[test]
fn nobody_of_equal_or_higher_priority_goes() {
    let fleet = fleet(&[("a", 8)], &[("a1", 8, 5, "a")]);
    assert_eq!(victims(&fleet, 1, 5), None);
    assert_eq!(victims(&fleet, 1, 4), None);
    assert_eq!(victims(&fleet, 9, 6), None);
    assert_eq!(victims(&fleet, 1, 6), Some(("a".into(), vec!["a1".into()])));
}

#[test]
fn a_node_that_a_rule_rejects_is_not_emptied() {
    let mut fleet = fleet(&[("a", 8)], &[("a1", 8, 0, "a")]);
    let mut cordoned = node("a", 8, 65536);
    cordoned.open = false;
    fleet.upsert_node(cordoned);
    assert_eq!(victims(&fleet, 1, 5), None);
}

#[test]
fn too_much_promised_of_what_is_not_asked_for_costs_nobody() {
    let mut fleet = fleet(&[("a", 8)], &[("cores", 8, 0, "a")]);
    let disk = with_priority("disk", 0, 0, 0);
    let disk = disk.with_resources(hv_types::Resources { disk_bytes: 2 << 40, ..Default::default() });
    fleet.bind(disk.id(), &disk, &node_id("a"));
    assert_eq!(victims(&fleet, 4, 1), Some(("a".into(), vec!["cores".into()])));
}

#[test]
fn whoever_turns_out_not_to_be_needed_is_spared() {
    let mut fleet = Fleet::new();
    fleet.upsert_node(node("a", 40, 3900));
    for (name, cores, memory, priority) in [("x", 20, 900, 0), ("y", 18, 1000, 1), ("z", 2, 2000, 2)] {
        fleet.bind(&instance_id(name), &with_priority(name, cores, memory, priority), &node_id("a"));
    }
    // Alone, x and y give the cores but not the memory; with z, which gives the memory, the lower of them is enough.
    let preemption = fleet.preempt(&with_priority("new", 20, 2000, 5)).unwrap();
    assert_eq!(preemption.victims, ["x", "z"].map(instance_id));
}

#[test]
fn more_than_the_bound_never_go() {
    let names: Vec<_> = (0..64).map(|i| format!("i{i:02}")).collect();
    let bound: Vec<_> = names.iter().map(|name| (name.as_str(), 1, 0, "a")).collect();
    let fleet = fleet(&[("a", 64)], &bound);
    assert_eq!(victims(&fleet, MAX_VICTIMS as u32, 1).map(|(_, victims)| victims.len()), Some(MAX_VICTIMS));
    assert_eq!(victims(&fleet, MAX_VICTIMS as u32 + 1, 1), None);
}

proptest! {
    #[test]
    fn room_is_found_where_one_victim_is_enough(
        bound in prop::collection::vec((1u32..9, -3i32..4, 0usize..3), 1..20),
        cores in 1u32..9,
        priority in -2i32..5,
    ) {
        let nodes = ["a", "b", "c"];
        let mut fleet = fleet(&[], &[]);
        let mut used = [0u32; 3];
        for (index, (cores, priority, at)) in bound.iter().enumerate() {
            let name = format!("i{index}");
            fleet.bind(&instance_id(&name), &with_priority(&name, *cores, 1, *priority), &node_id(nodes[*at]));
            used[*at] += cores;
        }
        // Every node is exactly full.
        for (name, used) in nodes.iter().zip(used) {
            fleet.upsert_node(node(name, used, 65536));
        }
        let single = bound.iter().filter(|(has, of, _)| *has >= cores && *of < priority).map(|(_, of, _)| *of).min();
        let preemption = fleet.preempt(&with_priority("new", cores, 1, priority));
        if let Some(lowest) = single {
            let preemption = preemption.clone();
            prop_assert_eq!(preemption.map(|p| p.victims.len()), Some(1));
            let victim = fleet.preempt(&with_priority("new", cores, 1, priority)).map(|p| p.victims[0].to_string());
            let index = victim.and_then(|name| name[1..].parse::<usize>().ok()).unwrap_or(usize::MAX);
            prop_assert_eq!(bound[index].1, lowest);
        }
        let lower = |at: usize| bound.iter().filter(|(_, of, on)| *on == at && *of < priority).map(|(has, _, _)| *has).sum::<u32>();
        prop_assert_eq!(preemption.is_some(), (0..3).any(|at| lower(at) >= cores));
    }
}
