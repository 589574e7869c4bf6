//! Things that only one instance can have: counted by node and kind, free again when the instance is gone.

use std::sync::Arc;

use hv_scheduler::{Ask, Fleet, NodeView, Rule, Strategy};
use hv_types::device::{Amounts, Kind, Model};
use hv_types::{DeviceNeeds, InstanceSpec};

use crate::world::{ask, instance, instance_id, node, node_id, rng};

const GPU: Model = Model { vendor: 0x10de, device: 0x2204 };

fn with(name: &str, gpus: u64, cpus: u64, pages: u64) -> NodeView {
    let counts = [(Kind::Pci(GPU), gpus), (Kind::Cpu, cpus), (Kind::HugePages(2 << 20), pages)];
    let devices = Amounts(counts.into_iter().filter(|(_, count)| *count > 0).collect());
    NodeView { devices, ..node(name, 64, 1 << 20) }
}

fn needs(name: &str, gpus: u32, dedicated_cpus: bool, pages: bool) -> Ask {
    let mut record = instance(name, 4, 64);
    let pci = (gpus > 0).then_some((GPU, gpus)).into_iter().collect();
    let devices = DeviceNeeds { dedicated_cpus, huge_page_bytes: if pages { 2 << 20 } else { 0 }, pci };
    record.spec = Arc::new(InstanceSpec { devices, ..InstanceSpec::clone(&record.spec) });
    Ask::of(&record)
}

fn place(fleet: &mut Fleet, ask: &Ask) -> Option<String> {
    let placed = fleet.place(ask, Strategy::Spread, &mut rng()).ok()?;
    fleet.bind_at(ask.id(), ask, placed.index);
    Some(placed.node.to_string())
}

#[test]
fn who_asks_for_a_device_goes_where_it_is_free_and_others_go_anywhere() {
    let mut fleet = Fleet::new();
    for n in 0..50 {
        fleet.upsert_node(with(&format!("n{n}"), 0, 0, 0));
    }
    fleet.upsert_node(with("gpu", 2, 0, 0));
    assert_eq!(place(&mut fleet, &needs("a", 1, false, false)).as_deref(), Some("gpu"));
    assert_eq!(place(&mut fleet, &needs("b", 1, false, false)).as_deref(), Some("gpu"));
    let third = needs("c", 1, false, false);
    let rejections = fleet.place(&third, Strategy::Spread, &mut rng()).unwrap_err();
    assert_eq!(rejections.of(Rule::Devices), 51);
    let summary = rejections.summary(&third);
    assert!(summary.contains("51 without 1 PCI device 10de:2204 to give"), "{summary}");
    let explained = fleet.explain(&third, Strategy::Spread);
    assert!(explained.summary().contains("10de:2204"), "{}", explained.summary());
    assert!(fleet.preempt(&third).is_none());
    assert!(place(&mut fleet, &ask("plain", 4, 64)).is_some());
    fleet.unbind(&instance_id("a"));
    assert_eq!(place(&mut fleet, &third).as_deref(), Some("gpu"));
}

#[test]
fn processors_and_huge_pages_are_counted_too() {
    let mut fleet = Fleet::new();
    fleet.upsert_node(with("n", 0, 8, 32));
    assert!(place(&mut fleet, &needs("a", 0, true, true)).is_some());
    assert!(place(&mut fleet, &needs("b", 0, true, true)).is_none(), "32 pages are one instance's");
    assert!(place(&mut fleet, &needs("b", 0, true, false)).is_some());
    assert!(place(&mut fleet, &needs("c", 0, true, false)).is_none(), "8 processors are two instances'");
    assert!(place(&mut fleet, &needs("c", 0, false, false)).is_some());
}

#[test]
fn what_is_bound_counts_when_its_node_comes_later_or_comes_back() {
    let mut fleet = Fleet::new();
    fleet.bind(&instance_id("a"), &needs("a", 1, false, false), &node_id("n"));
    fleet.upsert_node(with("n", 1, 0, 0));
    assert!(place(&mut fleet, &needs("b", 1, false, false)).is_none());
    fleet.remove_node(&node_id("n"));
    fleet.upsert_node(with("n", 1, 0, 0));
    assert!(place(&mut fleet, &needs("b", 1, false, false)).is_none());
    // A node that lost the device gives none, and one that got another gives that.
    fleet.upsert_node(with("n", 0, 0, 0));
    assert!(place(&mut fleet, &needs("b", 1, false, false)).is_none());
    fleet.upsert_node(with("n", 2, 0, 0));
    assert!(place(&mut fleet, &needs("b", 1, false, false)).is_some());
}
