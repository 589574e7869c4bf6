//! A machine whose devices are files: what is read of it, and what becomes of devices that are handed over.

use std::os::unix::fs::symlink;
use std::sync::Arc;

use hv_types::DeviceNeeds;

use super::*;

/// A tree as the kernel shows one.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        tree.put("devices/system/cpu/online", "0-7\n");
        for (node, cpus, pages) in [(0, "0-3", 8), (1, "4-7", 16)] {
            let dir = format!("devices/system/node/node{node}");
            tree.put(&format!("{dir}/cpulist"), cpus);
            tree.put(&format!("{dir}/hugepages/hugepages-2048kB/nr_hugepages"), &format!("{pages}\n"));
            tree.put(&format!("{dir}/hugepages/hugepages-1048576kB/nr_hugepages"), "0\n");
        }
        tree.put("bus/pci/drivers_probe", "");
        for driver in ["nvidia", "snd_hda_intel", "vfio-pci"] {
            tree.put(&format!("bus/pci/drivers/{driver}/unbind"), "");
        }
        tree
    }

    fn root(&self) -> &Path {
        self.0.path()
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn device(&self, address: &str, model: &str, class: &str, group: Option<u32>, driver: &str) {
        let (vendor, device) = model.split_once(':').unwrap();
        let dir = format!("bus/pci/devices/{address}");
        for (name, text) in [("vendor", vendor), ("device", device), ("class", class)] {
            self.put(&format!("{dir}/{name}"), &format!("0x{text}\n"));
        }
        self.put(&format!("{dir}/numa_node"), "-1\n");
        self.put(&format!("{dir}/driver_override"), "(null)\n");
        let dir = self.root().join(dir);
        if let Some(group) = group {
            symlink(format!("../../../kernel/iommu_groups/{group}"), dir.join("iommu_group")).unwrap();
        }
        if !driver.is_empty() {
            symlink(format!("../../drivers/{driver}"), dir.join("driver")).unwrap();
        }
    }

    /// A card with its sound function, and one that shares its group with somebody else's device.
    fn with_cards() -> Self {
        let tree = Self::new();
        tree.device("0000:65:00.0", "10de:2204", "030000", Some(7), "nvidia");
        tree.device("0000:65:00.1", "10de:1aef", "040300", Some(7), "snd_hda_intel");
        tree.device("0000:64:00.0", "8086:2030", "060400", Some(7), "pcieport");
        tree.device("0000:17:00.0", "10de:2204", "030000", Some(9), "nvidia");
        tree.device("0000:18:00.0", "8086:1533", "020000", Some(9), "igb");
        tree.device("0000:19:00.0", "10de:2204", "030000", None, "");
        tree.put("bus/pci/devices/not-a-device/vendor", "0x10de\n");
        tree
    }

    fn devices(&self, settings: Settings) -> Devices {
        let settings = Settings { sysfs: self.root().to_owned(), ..settings };
        Devices::new(&settings, BTreeMap::new(), false).unwrap()
    }

    fn driver(&self, address: &str) -> Option<String> {
        sysfs::link(&self.root().join("bus/pci/devices").join(address).join("driver"))
    }

    /// What the kernel does when something is written; vfio-pci does not take the device that it `refuses`.
    fn kernel(&self, path: &Path, text: &str, refuses: &str) -> io::Result<()> {
        let devices = self.root().join("bus/pci/devices");
        let name = path.file_name().unwrap().to_str().unwrap();
        let is_free = |address: &str| {
            !std::fs::read_to_string(devices.join(address).join("driver_override"))
                .unwrap()
                .starts_with("vfio-pci")
        };
        match name {
            "driver_override" => std::fs::write(path, text),
            "unbind" => std::fs::remove_file(devices.join(text).join("driver")),
            "drivers_probe" if is_free(text) => {
                let driver = if text.ends_with(".1") { "snd_hda_intel" } else { "nvidia" };
                symlink(format!("../../drivers/{driver}"), devices.join(text).join("driver"))
            }
            "drivers_probe" if text == refuses => Ok(()),
            "drivers_probe" => symlink("../../drivers/vfio-pci", devices.join(text).join("driver")),
            _ => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }
}

fn settings(pci: &[&str], cpus: &str, huge_pages: bool) -> Settings {
    let pci = pci.iter().map(|text| (*text).to_owned()).collect();
    Settings { pci, dedicated_cpus: cpus.to_owned(), huge_pages, ..Settings::default() }
}

fn spec(cores: u32, needs: DeviceNeeds) -> InstanceSpec {
    InstanceSpec { cpu_cores: cores, memory_bytes: 8 << 20, devices: needs, ..InstanceSpec::default() }
}

#[test]
fn nothing_is_given_unless_the_operator_says_so() {
    let tree = Tree::with_cards();
    let devices = tree.devices(Settings::default());
    assert_eq!(devices.inventory(), DeviceInventory::default());
}

#[test]
fn processors_and_huge_pages_are_read_with_their_nodes() {
    let tree = Tree::new();
    let devices = tree.devices(settings(&[], "2-5,9", true));
    // Of what the operator names only what is online, and what this agent may run on.
    let found = devices.source.read(Some(&(0..5).collect()));
    let cpus: Vec<_> = found.cpus.iter().map(|cpu| (cpu.id, cpu.numa_node)).collect();
    assert_eq!(cpus, [(2, 0), (3, 0), (4, 1)]);
    let pages: Vec<_> = found.huge_pages.iter().map(|p| (p.size_bytes, p.numa_node, p.total)).collect();
    assert_eq!(pages, [(2 << 20, 0, 8), (2 << 20, 1, 16)]);
}

#[test]
fn a_device_is_usable_only_if_all_of_its_group_may_go_with_it() {
    let tree = Tree::with_cards();
    let found = tree.devices(settings(&["10de:*"], "", false)).inventory().pci;
    let told: Vec<_> = found.iter().map(|one| (one.address.as_str(), one.unusable.as_str())).collect();
    assert_eq!(told[0].0, "0000:17:00.0");
    assert!(told[0].1.contains("0000:18:00.0"), "{told:?}");
    assert!(told[1].1.contains("no IOMMU"), "{told:?}");
    assert_eq!(told[2], ("0000:65:00.0", ""));
    assert_eq!(told[3], ("0000:65:00.1", "goes along with 0000:65:00.0"));
    assert_eq!(found[2].companions, ["0000:65:00.1"]);
    assert_eq!((found[2].class >> 16, found[2].driver.as_str(), found[2].numa_node), (3, "nvidia", None));
    // Without its sound function the card cannot go, and a bridge never.
    let found = tree.devices(settings(&["10de:2204", "8086:2030"], "", false)).inventory().pci;
    assert!(found.iter().all(|one| !one.unusable.is_empty()), "{found:?}");
}

#[test]
fn a_device_whose_virtual_functions_are_on_is_not_given() {
    let tree = Tree::new();
    tree.device("0000:18:00.0", "8086:1572", "020000", Some(9), "i40e");
    tree.device("0000:18:02.0", "8086:154c", "020000", Some(10), "");
    tree.put("bus/pci/devices/0000:18:00.0/sriov_numvfs", "1\n");
    symlink("../0000:18:00.0", tree.root().join("bus/pci/devices/0000:18:02.0/physfn")).unwrap();
    let found = tree.devices(settings(&["8086:*"], "", false)).inventory().pci;
    assert!(found[0].unusable.contains("virtual functions"), "{found:?}");
    assert!(found[1].is_virtual && found[1].unusable.is_empty(), "{found:?}");
}

#[test]
fn settings_that_are_none_are_refused() {
    for pci in ["", "*", "10de", "10de:22", "65:00.0", "../0000:65:00.0"] {
        assert!(Devices::new(&settings(&[pci], "", false), BTreeMap::new(), false).is_err(), "{pci}");
    }
    for cpus in ["a", "3-1", "0-99999999", "-1"] {
        assert!(Devices::new(&settings(&[], cpus, false), BTreeMap::new(), false).is_err(), "{cpus}");
    }
}

#[test]
fn of_many_that_ask_at_once_one_gets_the_card() {
    let tree = Tree::with_cards();
    let devices = Arc::new(tree.devices(settings(&["10de:*"], "", false)));
    let needs = DeviceNeeds { pci: [("10de:2204".parse().unwrap(), 1)].into(), ..DeviceNeeds::default() };
    let ids: Vec<_> = (0..8).map(|n| format!("i{n}").parse::<InstanceId>().unwrap()).collect();
    let threads = ids.iter().cloned().map(|id| {
        let (devices, spec) = (Arc::clone(&devices), spec(1, needs.clone()));
        std::thread::spawn(move || devices.give(&id, &spec).map(|grant| (id, grant)))
    });
    let threads: Vec<_> = threads.collect();
    let given: Vec<_> = threads.into_iter().filter_map(|thread| thread.join().unwrap().ok()).collect();
    assert_eq!(given.len(), 1);
    let (id, grant) = &given[0];
    // Whoever has it gets it again, and what the journal says is held.
    assert_eq!(devices.give(id, &spec(1, needs.clone())).as_ref(), Ok(grant));
    let settings = Settings { sysfs: tree.root().to_owned(), ..settings(&["10de:*"], "", false) };
    let after_restart = Devices::new(&settings, given.iter().cloned().collect(), false).unwrap();
    let other: InstanceId = "other".parse().unwrap();
    assert!(after_restart.give(&other, &spec(1, needs.clone())).is_err());
    after_restart.release(id);
    assert!(after_restart.give(&other, &spec(1, needs.clone())).is_ok());
    let blind = Devices::new(&settings, BTreeMap::new(), true).unwrap();
    assert!(blind.give(&other, &spec(1, needs)).is_err());
}

#[test]
fn devices_go_to_vfio_and_back() {
    let tree = Tree::with_cards();
    let both = ["0000:65:00.0".to_owned(), "0000:65:00.1".to_owned()];
    let write = |path: &Path, text: &str| tree.kernel(path, text, "");
    for _ in 0..2 {
        vfio::bind(tree.root(), &both, &write).unwrap();
        assert!(both.iter().all(|one| tree.driver(one).as_deref() == Some("vfio-pci")));
    }
    for _ in 0..2 {
        vfio::restore(tree.root(), &both, &write).unwrap();
        assert_eq!(tree.driver(&both[0]).as_deref(), Some("nvidia"));
        assert_eq!(tree.driver(&both[1]).as_deref(), Some("snd_hda_intel"));
    }
}

#[test]
fn if_one_device_cannot_be_had_all_are_handed_back() {
    let tree = Tree::with_cards();
    let both = ["0000:65:00.0".to_owned(), "0000:65:00.1".to_owned()];
    let write = |path: &Path, text: &str| tree.kernel(path, text, &both[1]);
    let error = vfio::bind(tree.root(), &both, &write).unwrap_err();
    assert!(matches!(error, vfio::VfioError::NotTaken { .. }), "{error}");
    assert_eq!(tree.driver(&both[0]).as_deref(), Some("nvidia"));
    assert_eq!(tree.driver(&both[1]).as_deref(), Some("snd_hda_intel"));
}
