//! Names and values of users are text in a domain's description, whatever they contain.

use hv_driver::{DiskFormat, InstanceConfig};
use hv_types::{InstanceSpec, Metadata};

use super::*;

pub(super) fn node() -> Node {
    Node {
        version: String::new(),
        emulator: "/x/emulator".into(),
        kind: "qemu",
        owner: (0, 0),
        has_uefi: true,
        has_tpm: true,
        has_spice: true,
        message: String::new(),
    }
}

fn stored(name: &str) -> Stored {
    let spec = InstanceSpec { cpu_cores: 2, memory_bytes: 64 << 20, ..InstanceSpec::default() };
    let id = "one".parse().unwrap();
    let config =
        InstanceConfig { id, name: name.to_owned(), spec, metadata: Metadata::default(), image: None, rescue_image: None, devices: None };
    Stored {
        version: Stored::VERSION,
        config,
        uuid: uuid::Uuid::from_u128(1),
        mac: "52:54:00:00:00:01".to_owned(),
        network: None,
        kernel: None,
        initrd: None,
        cmdline: String::new(),
        disks: Vec::new(),
        disk_dir: None,
        rescue: None,
    }
}

#[test]
fn nothing_that_a_user_writes_becomes_markup() {
    let nasty = "</title><devices><disk type='block'/>]]><!-- & \" ' \u{0} \u{7}";
    let mut machine = stored(nasty);
    machine.config.metadata.labels.insert(nasty.to_owned(), nasty.to_owned());
    machine.kernel = Some(format!("/images/{nasty}").into());
    machine.cmdline = nasty.to_owned();
    machine.config.spec.firmware = Some(Firmware::Uefi);
    machine.disks.push(StoredDisk {
        name: nasty.to_owned(),
        path: format!("/{nasty}").into(),
        format: DiskFormat::Qcow2,
        base: Some((format!("/base{nasty}").into(), DiskFormat::Raw)),
        serial: nasty.to_owned(),
        read_only: false,
        target: "vda".to_owned(),
        size_bytes: 0,
    });
    let dir = InstanceDir::at(format!("/state/{nasty}"));
    let document = describe(&machine, &dir, &node()).to_xml();
    let read = Element::parse(&document).unwrap();
    assert_eq!(read.all("devices").count(), 1);
    assert_eq!(read.at("devices").unwrap().all("disk").count(), 1);
    let carried: String = nasty.chars().filter(|c| !c.is_control()).collect();
    let disk = read.at("devices/disk").unwrap();
    assert_eq!(disk.attribute("type"), Some("file"));
    assert_eq!(disk.at("source").unwrap().attribute("file"), Some(format!("/{carried}").as_str()));
    assert_eq!(read.at("os/cmdline").unwrap().text, carried);
    let label = read.at("metadata/hv:instance/hv:label").unwrap();
    assert_eq!((label.attribute("key"), label.text.as_str()), (Some(carried.as_str()), carried.as_str()));
    assert!(read.text_at("title").unwrap().starts_with("</title>"));
}

#[test]
fn a_machine_has_room_to_grow_and_ports_to_plug_into() {
    assert_eq!((max_cores(1), max_cores(100), max_cores(300)), (4, 255, 300));
    let domain = describe(&stored("x"), &InstanceDir::at("/s/one"), &node());
    let devices = domain.at("devices").unwrap();
    let ports = devices.all("controller").filter(|c| c.attribute("model") == Some("pcie-root-port"));
    assert_eq!(ports.count(), OWN_PORTS + SPARE_PORTS);
    assert_eq!(domain.at("vcpu").unwrap().attribute("current"), Some("2"));
}

#[test]
fn what_the_node_gave_is_attached_and_nothing_else_changes() {
    let (mut machine, dir) = (stored("x"), InstanceDir::at("/s/one"));
    let without = describe(&machine, &dir, &node());
    assert!(["cputune", "memoryBacking", "numatune"].iter().all(|name| without.at(name).is_none()));
    assert!(without.at("devices/hostdev").is_none());
    machine.config.devices = Some(hv_types::DeviceGrant {
        cpus: vec![2, 5],
        huge_page_bytes: 2 << 20,
        numa_node: Some(1),
        huge_pages: 32,
        pci: vec!["0000:65:00.0".into(), "0000:65:00.1".into()],
    });
    let with = describe(&machine, &dir, &node());
    let pins: Vec<_> = with.at("cputune").unwrap().all("vcpupin").collect();
    assert_eq!(pins.len(), 2);
    assert_eq!((pins[1].attribute("vcpu"), pins[1].attribute("cpuset")), (Some("1"), Some("5")));
    assert_eq!(with.at("memoryBacking/hugepages/page").unwrap().attribute("size"), Some("2097152"));
    let memory = with.at("numatune/memory").unwrap();
    assert_eq!((memory.attribute("mode"), memory.attribute("nodeset")), (Some("strict"), Some("1")));
    let devices = with.at("devices").unwrap();
    let sound = devices.all("hostdev").nth(1).unwrap().at("source/address").unwrap();
    let address = ["domain", "bus", "slot", "function"].map(|name| sound.attribute(name).unwrap());
    assert_eq!(address, ["0x0000", "0x65", "0x00", "0x1"]);
    let ports = |domain: &Element| domain.at("devices").unwrap().all("controller").count();
    assert_eq!(ports(&with), ports(&without) + 2, "each device has a port of its own");
}
