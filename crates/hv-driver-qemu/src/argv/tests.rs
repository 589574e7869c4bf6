//! Hostile values stay values.

use hv_driver::{DiskFormat, InstanceConfig};
use hv_types::{InstanceSpec, Metadata};

use super::*;
use crate::files::StoredDisk;

fn stored(id: &str, name: &str) -> Stored {
    let spec = InstanceSpec { cpu_cores: 2, memory_bytes: (64 << 20) + 1, ..InstanceSpec::default() };
    let config = InstanceConfig {
        id: id.parse().unwrap(),
        name: name.to_owned(),
        spec,
        metadata: Metadata::default(),
        image: None,
        rescue_image: None,
        devices: None,
    };
    let disk = StoredDisk {
        file: "boot.qcow2".into(),
        format: DiskFormat::Qcow2,
        serial: "a,b".into(),
        read_only: false,
        number: None,
        name: String::new(),
        size_bytes: 0,
    };
    let mut disks: Vec<_> =
        (0..8).map(|n| StoredDisk { file: format!("disk{n}.qcow2"), ..disk.clone() }).collect();
    disks.insert(0, disk);
    Stored {
        version: 1,
        config,
        kernel: None,
        initrd: None,
        cmdline: String::new(),
        disks,
        disk_dir: None,
        uefi: None,
        rescue: None,
    }
}

fn list(stored: &Stored, accelerator: Accelerator) -> Vec<String> {
    let platform = Platform::for_tests(accelerator);
    let list = arguments(stored, "q35", &platform, Launch::Run);
    list.into_iter().map(|argument| argument.into_string().unwrap()).collect()
}

fn after<'a>(list: &'a [String], option: &str) -> Vec<&'a str> {
    list.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].as_str()).collect()
}

#[test]
fn a_name_cannot_become_an_option() {
    let list = list(&stored("x", "a,process=evil \"b\" -S"), Accelerator::Tcg);
    assert_eq!(after(&list, "-name"), ["guest=a,,process=evil \"b\" -S,debug-threads=on"]);
    assert!(!list.contains(&"-S".to_owned()));
    assert!(after(&list, "-device").iter().any(|device| device.contains("serial=a,,b,")));
}

#[test]
fn the_kernel_command_line_is_one_argument() {
    let mut stored = stored("x", "n");
    stored.kernel = Some("/images/a,b/kernel".into());
    stored.cmdline = "a=\"b,c\" -display gtk".to_owned();
    let list = list(&stored, Accelerator::Tcg);
    assert_eq!(after(&list, "-append"), ["a=\"b,c\" -display gtk"]);
    assert_eq!(after(&list, "-kernel"), ["/images/a,b/kernel"]);
    assert!(!after(&list, "-device").iter().any(|device| device.contains("bootindex")));
}

#[test]
fn memory_is_never_less_than_asked_for() {
    assert_eq!(
        after(&list(&stored("x", "n"), Accelerator::Kvm), "-m"),
        ["size=65537k,slots=8,maxmem=1048576k"]
    );
}

#[test]
fn the_accelerator_decides_the_processor() {
    let kvm = list(&stored("x", "n"), Accelerator::Kvm);
    assert_eq!((after(&kvm, "-accel"), after(&kvm, "-cpu")), (vec!["kvm"], vec!["host"]));
    let tcg = list(&stored("x", "n"), Accelerator::Tcg);
    assert_eq!((after(&tcg, "-accel"), after(&tcg, "-cpu")), (vec!["tcg,thread=multi"], vec!["max"]));
}

#[test]
fn disks_have_addresses_of_their_own() {
    let list = list(&stored("x", "n"), Accelerator::Tcg);
    let devices = after(&list, "-device");
    let of_disks = devices.iter().filter(|device| device.starts_with("virtio-blk-pci"));
    let addresses: std::collections::BTreeSet<_> =
        of_disks.filter_map(|device| device.split(",bus=").nth(1)).collect();
    assert_eq!(addresses.len(), 9, "{addresses:?}");
    let ports = devices.iter().filter(|device| device.starts_with("pcie-root-port"));
    assert_eq!(ports.count(), 8 + SPARE_PORTS);
}

#[test]
fn only_a_uuid_becomes_the_machine_s_uuid() {
    let uuid = "0190a5a0-7b6e-7c1e-8f00-0123456789ab";
    assert_eq!(after(&list(&stored(uuid, "n"), Accelerator::Tcg), "-uuid"), [uuid]);
    for id in ["x", "0190a5a0-7b6e-7c1e-8f00-0123456789ag", "0190a5a07b6e-7c1e-8f00-0123-456789ab"] {
        assert!(after(&list(&stored(id, "n"), Accelerator::Tcg), "-uuid").is_empty(), "{id}");
    }
}

#[test]
fn a_mac_address_is_local_unicast_and_belongs_to_the_id() {
    let one = mac_address("one");
    assert_eq!(one, mac_address("one"));
    assert_ne!(one, mac_address("two"));
    assert!(one.starts_with("02:") && one.len() == 17, "{one}");
}

#[test]
fn the_rescue_disk_comes_first_and_its_own_disks_keep_their_places() {
    let mut stored = stored("i-1", "a");
    let own = list(&stored, Accelerator::Tcg);
    let rescue =
        r#"{"kernel":null,"initrd":null,"cmdline":"","disk":{"path":"/r","format":"raw","size_bytes":512}}"#;
    stored.rescue = Some(serde_json::from_str(rescue).unwrap());
    let rescued = list(&crate::rescue::as_started(&stored), Accelerator::Tcg);
    let disks = |list: &[String]| -> Vec<String> {
        list.iter().filter(|word| word.starts_with("virtio-blk-pci")).cloned().collect()
    };
    let (own, rescued) = (disks(&own), disks(&rescued));
    assert_eq!(rescued.len(), own.len() + 1);
    assert!(rescued[0].contains("addr=0x7.0") && rescued[0].ends_with("bootindex=1"), "{}", rescued[0]);
    assert_eq!(rescued[1], own[0].trim_end_matches(",bootindex=1"));
    assert_eq!(rescued[2..], own[1..]);
}

#[test]
fn what_the_node_gave_is_attached_and_nothing_else_changes() {
    let mut stored = stored("x", "n");
    stored.config.spec.memory_bytes = 64 << 20;
    let without = list(&stored, Accelerator::Tcg);
    assert!(after(&without, "-object").is_empty());
    stored.config.devices = Some(hv_types::DeviceGrant {
        cpus: vec![2, 3],
        huge_page_bytes: 2 << 20,
        numa_node: Some(1),
        huge_pages: 32,
        pci: vec!["0000:65:00.0".into()],
    });
    let with = list(&stored, Accelerator::Tcg);
    let memory: Value = serde_json::from_str(after(&with, "-object")[0]).unwrap();
    assert_eq!((&memory["hugetlbsize"], &memory["host-nodes"]), (&json!(2 << 20), &json!([1])));
    assert!(after(&with, "-machine")[0].ends_with(",memory-backend=memory0"));
    let device = after(&with, "-device").into_iter().find(|one| one.contains("vfio-pci")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(device).unwrap()["host"], "0000:65:00.0");
    assert_eq!(with.len(), without.len() + 4);
}
