//! QEMU's command line, built from typed values.
//!
//! # Invariants
//! Nothing that a user chose can become an option: disks are given as JSON, a comma in a `key=value` list is doubled
//! (the rule of QEMU's option parser), and the rest are whole arguments of their own.

use std::ffi::OsString;

use serde_json::json;

use crate::files::{
    AGENT_SOCKET, CONSOLE, CONSOLE_SOCKET, EVENTS, EVENTS_SOCKET, MONITOR_SOCKET, PID, Stored, VNC_SOCKET,
};
use crate::platform::{Accelerator, Platform};

/// Disks sit in slots of their own from this one, eight to a slot, so that their names in the guest never change.
const FIRST_DISK_SLOT: usize = 8;
/// The functions of a PCI slot.
const FUNCTIONS: usize = 8;

/// Where the first guest of a user-mode network is: the address that QEMU's DHCP server hands out first.
pub(crate) const GUEST_ADDRESS: [u8; 4] = [10, 0, 2, 15];

/// What the sandbox denies.
pub(crate) const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// The arguments for an instance. QEMU is to run inside the instance's directory.
pub(crate) fn arguments(stored: &Stored, machine: &str, platform: &Platform) -> Vec<OsString> {
    let config = &stored.config;
    let mut list = Arguments::default();
    list.pair("-name", format!("guest={},debug-threads=on", escape(&config.name)));
    if is_uuid(config.id.as_str()) {
        list.pair("-uuid", config.id.as_str());
    }
    list.flag("-nodefaults").flag("-no-user-config").pair("-display", "none");
    // Guests read an emulated HPET slowly and do not need it. Other machine types have none.
    let is_pc = machine.starts_with("q35") || machine.starts_with("pc");
    list.pair("-machine", if is_pc { format!("{machine},hpet=off") } else { machine.to_owned() });
    match platform.accelerator {
        Accelerator::Kvm => list.pair("-accel", "kvm").pair("-cpu", "host"),
        Accelerator::Tcg => list.pair("-accel", "tcg,thread=multi").pair("-cpu", "max"),
    };
    list.pair("-smp", config.spec.cpu_cores.to_string());
    list.pair("-m", format!("size={}k", config.spec.memory_bytes.div_ceil(1024)));
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
    disks(&mut list, stored);
    list.pair("-netdev", "user,id=net0");
    list.pair(
        "-device",
        format!("virtio-net-pci,netdev=net0,mac={},romfile=", mac_address(config.id.as_str())),
    );
    list.pair("-device", "virtio-balloon-pci,id=balloon0").pair("-device", "virtio-rng-pci");
    list.pair("-device", "virtio-serial-pci");
    list.pair("-chardev", format!("socket,id=agent,path={AGENT_SOCKET},server=on,wait=off"));
    list.pair("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0");
    list.0
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

fn disks(list: &mut Arguments, stored: &Stored) {
    for (index, disk) in stored.disks.iter().enumerate() {
        let discard = if disk.read_only { "ignore" } else { "unmap" };
        let file = json!({ "driver": "file", "filename": disk.file, "discard": discard });
        let node = json!({
            "driver": disk.format.name(),
            "node-name": format!("disk{index}"),
            "read-only": disk.read_only,
            "discard": discard,
            "file": file,
        });
        list.pair("-blockdev", node.to_string());
        let (slot, function) = (FIRST_DISK_SLOT + index / FUNCTIONS, index % FUNCTIONS);
        let address = format!("bus=pcie.0,addr={slot:#x}.{function:#x},multifunction=on");
        let serial = escape(&disk.serial);
        let device =
            format!("virtio-blk-pci,id=virtio-disk{index},drive=disk{index},serial={serial},{address}");
        let is_boot_disk = index == 0 && stored.kernel.is_none();
        list.pair("-device", if is_boot_disk { format!("{device},bootindex=1") } else { device });
    }
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
