//! QEMU's command line, built from typed values.
//!
//! # Invariants
//! Nothing that a user chose can become an option: disks are given as JSON, a comma in a `key=value` list is doubled
//! (the rule of QEMU's option parser), and the rest are whole arguments of their own.

use std::ffi::OsString;

use hv_driver::InstanceConfig;
use serde_json::{Value, json};

use crate::files::{
    AGENT_SOCKET, CONSOLE, CONSOLE_SOCKET, EVENTS, EVENTS_SOCKET, MONITOR_SOCKET, PID, Stored, StoredDisk,
    UEFI_VARIABLES, VNC_SOCKET,
};
use crate::platform::{Accelerator, Platform};
use crate::rescue::RESCUE_DISK;

/// Disks sit in slots of their own from this one, eight to a slot, so that their names in the guest never change.
const FIRST_DISK_SLOT: usize = 8;
/// The rescue disk sits before all others: the guest finds it first.
const RESCUE_SLOT: usize = 7;
/// Where a machine has root ports they sit in slots from this one, eight to a slot.
const FIRST_PORT_SLOT: usize = 0x10;
/// Where the seed sits then: behind all others, so that it never takes a disk's name.
const SEED_SLOT: usize = 0x1d;
/// Free root ports with which a machine starts: so many disks can be added while it runs.
const SPARE_PORTS: usize = 4;
/// A machine can grow to so many times its cores and memory while it runs.
const ROOM: u64 = 2;
/// Most cores of a machine with room.
const MAX_CORES: u64 = 255;
/// Above it a machine has no room for memory: guests' physical addresses end somewhere.
const MAX_ROOM_KIB: u64 = 256 << 20;
/// How many pieces of memory can be added while it runs.
const MEMORY_SLOTS: u32 = 8;
/// The functions of a PCI slot.
const FUNCTIONS: usize = 8;

/// Where the first guest of a user-mode network is: the address that QEMU's DHCP server hands out first.
pub(crate) const GUEST_ADDRESS: [u8; 4] = [10, 0, 2, 15];

/// Most threads that clear huge pages before a guest begins.
const MAX_PREALLOC_THREADS: u32 = 16;
/// What the sandbox denies.
pub(crate) const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// How a machine comes to life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Launch {
    /// It runs at once.
    Run,
    /// It stands still until it is told to go on.
    Still,
    /// It waits for what another node hands over, then stands still.
    Incoming,
}

/// Whether disks can come and go while a machine of this type runs.
pub(crate) fn has_ports(machine: &str) -> bool {
    machine.contains("q35")
}

/// The arguments for an instance. QEMU is to run inside the instance's directory.
pub(crate) fn arguments(
    stored: &Stored,
    machine: &str,
    platform: &Platform,
    launch: Launch,
) -> Vec<OsString> {
    let config = &stored.config;
    let mut list = Arguments::default();
    list.pair("-name", format!("guest={},debug-threads=on", escape(&config.name)));
    if is_uuid(config.id.as_str()) {
        list.pair("-uuid", config.id.as_str());
    }
    list.flag("-nodefaults").flag("-no-user-config").pair("-display", "none");
    // Guests read an emulated HPET slowly and do not need it. Other machine types have none.
    let is_pc = machine.starts_with("q35") || machine.starts_with("pc");
    let mut kind = if is_pc { format!("{machine},hpet=off") } else { machine.to_owned() };
    if let Some(firmware) = &stored.uefi {
        kind.push_str(",pflash0=uefi-code,pflash1=uefi-variables");
        let flash = |name: &str, file: &std::path::Path, read_only: bool| {
            let file = json!({ "driver": "file", "filename": file });
            json!({ "driver": "raw", "node-name": name, "read-only": read_only, "file": file }).to_string()
        };
        list.pair("-blockdev", flash("uefi-code", firmware, true));
        list.pair("-blockdev", flash("uefi-variables", UEFI_VARIABLES.as_ref(), false));
    }
    let memory = memory_object(config);
    if memory.is_some() {
        kind.push_str(",memory-backend=memory0");
    }
    list.pair("-machine", kind);
    if let Some(memory) = memory {
        list.pair("-object", memory.to_string());
    }
    match launch {
        Launch::Run => &mut list,
        Launch::Still => list.flag("-S"),
        Launch::Incoming => list.flag("-S").pair("-incoming", "defer"),
    };
    match platform.accelerator {
        Accelerator::Kvm => list.pair("-accel", "kvm").pair("-cpu", "host"),
        Accelerator::Tcg => list.pair("-accel", "tcg,thread=multi").pair("-cpu", "max"),
    };
    let (cores, memory) = (config.spec.cpu_cores, config.spec.memory_bytes.div_ceil(1024));
    if has_ports(machine) {
        let most = (u64::from(cores) * ROOM).min(MAX_CORES).max(u64::from(cores));
        list.pair("-smp", format!("cpus={cores},maxcpus={most},sockets=1,cores={most},threads=1"));
    } else {
        list.pair("-smp", cores.to_string());
    }
    if has_ports(machine) && memory <= MAX_ROOM_KIB {
        let most = (memory * ROOM).next_multiple_of(1 << 20);
        list.pair("-m", format!("size={memory}k,slots={MEMORY_SLOTS},maxmem={most}k"));
    } else {
        list.pair("-m", format!("size={memory}k"));
    }
    if platform.sandbox {
        list.pair("-sandbox", SANDBOX);
    }
    list.pair("-pidfile", PID);
    list.pair("-chardev", format!("socket,id=monitor,path={MONITOR_SOCKET},server=on,wait=off"));
    list.pair("-mon", "chardev=monitor,mode=control");
    let log = format!("logfile={EVENTS},logappend=on");
    list.pair("-chardev", format!("socket,id=events,path={EVENTS_SOCKET},server=on,wait=off,{log}"));
    list.pair("-mon", "chardev=events,mode=control");
    let log = format!("logfile={CONSOLE},logappend=on");
    list.pair("-chardev", format!("socket,id=console,path={CONSOLE_SOCKET},server=on,wait=off,{log}"));
    list.pair("-serial", "chardev:console");
    list.pair("-vnc", format!("unix:{VNC_SOCKET}")).pair("-device", "VGA");
    boot(&mut list, stored);
    disks(&mut list, stored, has_ports(machine));
    list.pair("-netdev", "user,id=net0");
    list.pair(
        "-device",
        format!("virtio-net-pci,netdev=net0,mac={},romfile=", mac_address(config.id.as_str())),
    );
    list.pair("-device", "virtio-balloon-pci,id=balloon0").pair("-device", "virtio-rng-pci");
    list.pair("-device", "virtio-serial-pci");
    list.pair("-chardev", format!("socket,id=agent,path={AGENT_SOCKET},server=on,wait=off"));
    list.pair("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0");
    for (number, address) in config.devices.iter().flat_map(|grant| &grant.pci).enumerate() {
        list.pair(
            "-device",
            json!({ "driver": "vfio-pci", "id": format!("host{number}"), "host": address }).to_string(),
        );
    }
    list.0
}

/// Where the guest's memory comes from, if not from ordinary pages of any NUMA node. Huge pages are all taken at the
/// start: one that is missing later would kill the guest. Ordinary pages are nobody's own, so that another NUMA node is
/// better than none.
fn memory_object(config: &InstanceConfig) -> Option<Value> {
    let grant = config.devices.as_ref()?;
    let size = config.spec.memory_bytes.next_multiple_of(1024);
    let (mut object, policy) = if grant.huge_page_bytes == 0 {
        grant.numa_node?;
        (json!({ "qom-type": "memory-backend-ram", "id": "memory0", "size": size }), "preferred")
    } else {
        let (page, threads) = (grant.huge_page_bytes, config.spec.cpu_cores.clamp(1, MAX_PREALLOC_THREADS));
        let object = json!({ "qom-type": "memory-backend-memfd", "id": "memory0", "size": size, "hugetlb": true,
            "hugetlbsize": page, "prealloc": true, "prealloc-threads": threads });
        (object, "bind")
    };
    if let Some(node) = grant.numa_node {
        object["host-nodes"] = json!([node]);
        object["policy"] = policy.into();
    }
    Some(object)
}

fn boot(list: &mut Arguments, stored: &Stored) {
    if let Some(kernel) = &stored.kernel {
        list.pair("-kernel", kernel);
        if !stored.cmdline.is_empty() {
            list.pair("-append", &stored.cmdline);
        }
    }
    if let Some(initrd) = &stored.initrd {
        list.pair("-initrd", initrd);
    }
}

fn disks(list: &mut Arguments, stored: &Stored, has_ports: bool) {
    if has_ports {
        let removable = stored.disks.iter().filter(|disk| !disk.is_fixed()).count();
        for port in 0..removable + SPARE_PORTS {
            let (slot, function) = (FIRST_PORT_SLOT + port / FUNCTIONS, port % FUNCTIONS);
            let address = format!("bus=pcie.0,addr={slot:#x}.{function:#x},multifunction=on");
            list.pair("-device", format!("pcie-root-port,id=port{port},chassis={},{address}", port + 1));
        }
    }
    let mut ports = 0..;
    for (index, (number, disk)) in stored.numbered().enumerate() {
        list.pair("-blockdev", disk_node(stored, number, disk).to_string());
        let address = if disk.file == RESCUE_DISK {
            slot_address(RESCUE_SLOT, 0)
        } else if !has_ports {
            slot_address(FIRST_DISK_SLOT + number / FUNCTIONS, number % FUNCTIONS)
        } else if disk.is_fixed() {
            slot_address(if disk.read_only { SEED_SLOT } else { FIRST_DISK_SLOT }, 0)
        } else {
            format!("bus=port{}", ports.next().unwrap_or_default())
        };
        let serial = escape(&disk.serial);
        let device =
            format!("virtio-blk-pci,id=virtio-disk{number},drive=disk{number},serial={serial},{address}");
        let is_boot_disk = index == 0 && stored.kernel.is_none();
        list.pair("-device", if is_boot_disk { format!("{device},bootindex=1") } else { device });
    }
}

fn slot_address(slot: usize, function: usize) -> String {
    format!("bus=pcie.0,addr={slot:#x}.{function:#x},multifunction=on")
}

/// A disk as `-blockdev` and `blockdev-add` take it. Formats are given, never looked for in the file.
pub(crate) fn disk_node(stored: &Stored, number: usize, disk: &StoredDisk) -> Value {
    let discard = if disk.read_only { "ignore" } else { "unmap" };
    let file = json!({ "driver": "file", "filename": stored.disk_path(disk), "discard": discard });
    json!({
        "driver": disk.format.name(),
        "node-name": format!("disk{number}"),
        "read-only": disk.read_only,
        "discard": discard,
        "file": file,
    })
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.into());
        self
    }

    fn pair(&mut self, name: &str, value: impl Into<OsString>) -> &mut Self {
        self.0.push(name.into());
        self.0.push(value.into());
        self
    }
}

fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

fn is_uuid(id: &str) -> bool {
    let lengths: Vec<_> = id.split('-').map(str::len).collect();
    lengths == [8, 4, 4, 4, 12] && id.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit())
}

/// A locally administered unicast address (IEEE 802, second-lowest bit of the first octet) with 40 bits of the id's
/// FNV-1a hash: the same for the same instance, on whatever node.
fn mac_address(id: &str) -> String {
    let hash = id.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let [a, b, c, d, e, ..] = hash.to_be_bytes();
    format!("02:{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}")
}

#[cfg(test)]
mod tests;
