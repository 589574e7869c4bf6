//! What is counted, and which things are chosen.

use super::*;

const GPU: Model = Model { vendor: 0x10de, device: 0x2204 };

fn device(address: &str, node: u32) -> PciDevice {
    PciDevice {
        address: address.into(),
        model: GPU,
        class: 0x03_0000,
        numa_node: Some(node),
        iommu_group: Some(node),
        driver: String::new(),
        is_virtual: false,
        companions: Vec::new(),
        unusable: String::new(),
    }
}

fn inventory() -> DeviceInventory {
    let pages = |numa_node, total| HugePages { size_bytes: 2 << 20, numa_node, total };
    let with_sound = PciDevice { companions: vec!["0000:65:00.1".into()], ..device("0000:65:00.0", 1) };
    let broken = PciDevice { unusable: "no IOMMU".into(), ..device("0000:66:00.0", 1) };
    DeviceInventory {
        cpus: (0..8).map(|id| Cpu { id, numa_node: id / 4 }).collect(),
        huge_pages: vec![pages(0, 64), pages(1, 128)],
        pci: vec![broken, with_sound, device("0000:17:00.0", 0)],
    }
}

fn needs(cpus: bool, pages: bool, gpus: u32) -> DeviceNeeds {
    let pci = (gpus > 0).then_some((GPU, gpus)).into_iter().collect();
    DeviceNeeds { dedicated_cpus: cpus, huge_page_bytes: if pages { 2 << 20 } else { 0 }, pci }
}

fn choose(held: &[DeviceGrant], needs: &DeviceNeeds, cores: u32, mib: u64) -> Result<DeviceGrant, String> {
    DeviceGrant::choose(&inventory(), held, needs, &needs.amounts(cores, mib << 20))
}

#[test]
fn all_of_a_grant_is_on_one_numa_node_where_that_can_be() {
    let grant = choose(&[], &needs(true, true, 1), 4, 256).unwrap();
    assert_eq!((grant.numa_node, grant.cpus, grant.huge_pages), (Some(1), vec![4, 5, 6, 7], 128));
    // What belongs to the card goes along.
    assert_eq!(grant.pci, ["0000:65:00.0", "0000:65:00.1"]);
    let grant = choose(&[], &needs(true, false, 2), 6, 256).unwrap();
    assert_eq!((grant.numa_node, grant.cpus.len(), grant.pci.len()), (None, 6, 3));
}

#[test]
fn nothing_is_given_twice() {
    let mut held: Vec<DeviceGrant> = Vec::new();
    for _ in 0..2 {
        let grant = choose(&held, &needs(true, true, 1), 4, 64).unwrap();
        for before in &held {
            assert!(grant.cpus.iter().all(|cpu| !before.cpus.contains(cpu)));
            assert!(grant.pci.iter().all(|one| !before.pci.contains(one)));
        }
        held.push(grant);
    }
    let why = choose(&held, &needs(false, false, 1), 1, 64).unwrap_err();
    assert_eq!(why, "it needs 1 PCI device 10de:2204, and 0 are free");
    assert!(choose(&held, &needs(true, false, 0), 1, 64).is_err());
    held.remove(0);
    assert!(choose(&held, &needs(true, true, 1), 4, 64).is_ok());
}

#[test]
fn where_the_counts_have_room_a_choice_is_found() {
    let has = inventory().amounts();
    assert_eq!(has.of(Kind::Pci(GPU)), 2);
    let mut held = Vec::new();
    let mut used = Amounts::default();
    for round in 0_u32..40 {
        let needs = needs(round % 2 == 0, round % 3 == 0, u32::from(round % 5 == 0));
        let need = needs.amounts(1 + round % 3, u64::from(round % 4 + 1) << 24);
        let fits = has.has_room(&used, &need);
        let chosen = DeviceGrant::choose(&inventory(), &held, &needs, &need);
        assert_eq!(chosen.is_ok(), fits, "{round}: {chosen:?}");
        if let Ok(grant) = chosen {
            held.push(grant);
            used.add(&need);
        }
    }
    assert!(!held.is_empty());
}

#[test]
fn amounts_that_were_added_can_be_taken() {
    let (mut sum, some) = (Amounts::default(), needs(true, true, 1).amounts(2, 4 << 20));
    sum.add(&some);
    sum.add(&some);
    assert_eq!(sum.of(Kind::HugePages(2 << 20)), 4);
    sum.take(&some);
    sum.take(&some);
    assert!(sum.is_empty());
}

#[test]
fn models_addresses_and_sizes_are_checked() {
    for bad in ["", "10de", "10de:*", "10de:220", "+0de:2204", "10de:2204:1"] {
        assert!(bad.parse::<Model>().is_err(), "{bad}");
    }
    assert_eq!("10DE:2204".parse::<Model>().unwrap(), GPU);
    for bad in
        ["", "65:00.0", "0000:65:00.8", "0000:65:00,0", "0000.65.00:0", "../../../etc", "0000:65:00.0,x=1"]
    {
        assert!(pci_address("a", bad).is_err(), "{bad}");
    }
    assert!(pci_address("a", "0000:65:00.0").is_ok());
    let pages = needs(false, true, 0);
    assert!(pages.validate(InstanceType::Vm, 4 << 20).is_ok());
    assert!(pages.validate(InstanceType::Vm, 5 << 20).is_err());
    assert!(pages.validate(InstanceType::Container, 4 << 20).is_err());
    assert!(needs(false, false, 33).validate(InstanceType::Vm, 4 << 20).is_err());
}
