//! A domain as libvirt describes it, made from an instance (libvirt's `formatdomain`).

use std::path::Path;

use hv_types::instance::spec::Firmware;

use crate::emulator::{LOCK_VARIABLE, PERMIT_VARIABLE};
use crate::files::{
    CONSOLE, CONSOLE_SOCKET, InstanceDir, LOCK, NVRAM, PERMIT, SPICE_SOCKET, Stored, StoredDisk, VNC_SOCKET,
};
use crate::node::Node;
use crate::xml::Element;

/// Where our own notes in a domain are named.
const METADATA_NAMESPACE: &str = "urn:hypervisor:instance:1";
/// Where libvirt's elements for QEMU alone are named.
const QEMU_NAMESPACE: &str = "http://libvirt.org/schemas/domain/qemu/1.0";
/// PCI Express ports that stay free for what is plugged in while it runs.
const SPARE_PORTS: usize = 8;
/// Ports for what every machine has: boot disk, seed, network, SCSI and serial controllers, balloon, random numbers,
/// tablet.
const OWN_PORTS: usize = 8;
/// How many cores a machine can grow to while it runs, over what it has.
const CORES_HEADROOM: u32 = 4;
/// Most cores that QEMU's q35 takes without more ado.
pub(crate) const MAX_CORES: u32 = 255;
/// How often the guest's memory is asked for, in seconds.
const BALLOON_PERIOD_S: u32 = 5;
/// The longest title: libvirt takes any, people do not.
const MAX_TITLE_CHARS: usize = 200;

/// The whole description.
pub(crate) fn describe(stored: &Stored, dir: &InstanceDir, node: &Node) -> Element {
    let spec = &stored.config.spec;
    let bytes = |name: &str, value: u64| Element::new(name).with("unit", "b").text(value);
    let mut domain = Element::new("domain")
        .with("type", node.kind)
        .with("xmlns:qemu", QEMU_NAMESPACE)
        .child(Element::new("name").text(stored.domain().name))
        .child(Element::new("uuid").text(stored.uuid))
        .child(Element::new("title").text(title(&stored.config.name)))
        .child(metadata(stored))
        .child(bytes("memory", spec.memory_bytes))
        .child(bytes("currentMemory", spec.memory_bytes))
        .child(vcpus(spec.cpu_cores))
        .children(dedicated(stored))
        .child(os(stored, dir))
        .child(Element::new("features").child(Element::new("acpi")).child(Element::new("apic")))
        .child(Element::new("clock").with("offset", "utc"))
        .child(Element::new("on_poweroff").text("destroy"))
        .child(Element::new("on_reboot").text("restart"))
        .child(Element::new("on_crash").text("destroy"));
    if node.kind == "kvm" {
        domain = domain.child(Element::new("cpu").with("mode", "host-passthrough"));
    }
    let variable = |name: &str, value: &Path| {
        Element::new("qemu:env").with("name", name).with("value", value.display())
    };
    let variables = Element::new("qemu:commandline")
        .child(variable(LOCK_VARIABLE, &dir.file(LOCK)))
        .child(variable(PERMIT_VARIABLE, &dir.file(PERMIT)));
    domain.child(devices(stored, dir, node)).child(variables)
}

/// A name as one line.
fn title(name: &str) -> String {
    let line = name.chars().map(|c| if c.is_control() { ' ' } else { c });
    line.take(MAX_TITLE_CHARS).collect()
}

/// What is said of it elsewhere, for who looks with libvirt's own tools.
pub(crate) fn metadata(stored: &Stored) -> Element {
    let entries = |kind: &'static str, values: &std::collections::BTreeMap<String, String>| {
        let entry = |(key, value): (&String, &String)| {
            Element::new(kind).with("key", key).text(value)
        };
        values.iter().map(entry).collect::<Vec<_>>()
    };
    let metadata = &stored.config.metadata;
    let instance = Element::new("hv:instance")
        .with("xmlns:hv", METADATA_NAMESPACE)
        .with("id", &stored.config.id)
        .child(Element::new("hv:name").text(&stored.config.name))
        .children(entries("hv:label", &metadata.labels))
        .children(entries("hv:annotation", &metadata.annotations));
    Element::new("metadata").child(instance)
}

/// How many cores it has at most.
pub(crate) fn max_cores(cores: u32) -> u32 {
    cores.saturating_mul(CORES_HEADROOM).clamp(cores, MAX_CORES.max(cores))
}

fn vcpus(cores: u32) -> Element {
    Element::new("vcpu").with("placement", "static").with("current", cores).text(max_cores(cores))
}

/// Which processors, which pages and which NUMA node are its own. Huge pages of a NUMA node come from there or not at
/// all; ordinary pages are nobody's own, so that another NUMA node is better than none.
fn dedicated(stored: &Stored) -> Vec<Element> {
    let Some(grant) = &stored.config.devices else { return Vec::new() };
    let mut elements = Vec::new();
    if grant.huge_page_bytes != 0 {
        let page = Element::new("page").with("size", grant.huge_page_bytes).with("unit", "b");
        elements.push(Element::new("memoryBacking").child(Element::new("hugepages").child(page)));
    }
    if !grant.cpus.is_empty() {
        let pin = |(core, cpu): (usize, &u32)| Element::new("vcpupin").with("vcpu", core).with("cpuset", cpu);
        elements.push(Element::new("cputune").children(grant.cpus.iter().enumerate().map(pin)));
    }
    if let Some(node) = grant.numa_node {
        let mode = if grant.huge_page_bytes == 0 { "preferred" } else { "strict" };
        let memory = Element::new("memory").with("mode", mode).with("nodeset", node);
        elements.push(Element::new("numatune").child(memory));
    }
    elements
}

/// A PCI device of the host, which vfio-pci has by then: `0000:65:00.0`.
fn host_device(address: &str) -> Element {
    let mut parts = address.split([':', '.']);
    let source = ["domain", "bus", "slot", "function"].into_iter().fold(Element::new("address"), |element, name| {
        element.with(name, format!("0x{}", parts.next().unwrap_or_default()))
    });
    Element::new("hostdev")
        .with("mode", "subsystem")
        .with("type", "pci")
        .with("managed", "no")
        .child(Element::new("source").child(source))
}

fn os(stored: &Stored, dir: &InstanceDir) -> Element {
    let mut os = Element::new("os");
    let kind = Element::new("type").with("arch", std::env::consts::ARCH).with("machine", "q35").text("hvm");
    let is_uefi = stored.config.spec.firmware == Some(Firmware::Uefi);
    if is_uefi {
        let feature = |name: &str| Element::new("feature").with("enabled", "no").with("name", name);
        let features = Element::new("firmware").child(feature("enrolled-keys")).child(feature("secure-boot"));
        os = os.with("firmware", "efi").child(kind).child(features);
        os = os.child(Element::new("nvram").text(dir.file(NVRAM).display()));
    } else {
        os = os.child(kind);
    }
    if let Some(kernel) = &stored.kernel {
        os = os.child(Element::new("kernel").text(kernel.display()));
        if let Some(initrd) = &stored.initrd {
            os = os.child(Element::new("initrd").text(initrd.display()));
        }
        if !stored.cmdline.is_empty() {
            os = os.child(Element::new("cmdline").text(&stored.cmdline));
        }
    }
    os.child(Element::new("boot").with("dev", "hd"))
}

fn devices(stored: &Stored, dir: &InstanceDir, node: &Node) -> Element {
    let controller = |kind: &str, model: &str| {
        Element::new("controller").with("type", kind).with("model", model)
    };
    let disks = stored.disks.iter().map(disk);
    let given = stored.config.devices.as_ref().map_or(&[][..], |grant| &grant.pci);
    let ports = OWN_PORTS + SPARE_PORTS + given.len();
    let virtio = |name: &str| Element::new(name).with("model", "virtio");
    let random = Element::new("backend").with("model", "random").text("/dev/urandom");
    let balloon = virtio("memballoon").child(Element::new("stats").with("period", BALLOON_PERIOD_S));
    let mut devices = Element::new("devices")
        .child(Element::new("emulator").text(node.emulator.display()))
        .children(disks)
        .child(controller("usb", "none"))
        .child(controller("scsi", "virtio-scsi"))
        .child(controller("pci", "pcie-root"))
        .children((0..ports).map(|_| controller("pci", "pcie-root-port")))
        .child(interface(stored))
        .child(serial(dir))
        .child(agent_channel())
        .child(Element::new("input").with("type", "tablet").with("bus", "virtio"))
        .child(vnc(dir))
        .child(Element::new("video").child(Element::new("model").with("type", "vga")))
        .child(balloon)
        .child(virtio("rng").child(random))
        .child(Element::new("panic").with("model", "isa"))
        .children(given.iter().map(|address| host_device(address)));
    if node.has_spice {
        let socket = dir.file(SPICE_SOCKET);
        let listen = Element::new("listen").with("type", "socket").with("socket", socket.display());
        devices = devices.child(Element::new("graphics").with("type", "spice").child(listen));
    }
    if stored.config.spec.tpm {
        let backend = Element::new("backend").with("type", "emulator").with("version", "2.0");
        devices = devices.child(Element::new("tpm").with("model", "tpm-crb").child(backend));
    }
    devices
}

/// A disk. What it is laid over is told too, so that nobody has to believe its header.
pub(crate) fn disk(disk: &StoredDisk) -> Element {
    let source = |path: &Path| Element::new("source").with("file", path.display());
    let driver = Element::new("driver").with("name", "qemu").with("type", disk.format.name());
    let driver = if disk.read_only { driver } else { driver.with("discard", "unmap") };
    let end = Element::new("backingStore");
    let below = match &disk.base {
        None => end,
        Some((path, format)) => Element::new("backingStore")
            .with("type", "file")
            .child(Element::new("format").with("type", format.name()))
            .child(source(path))
            .child(end),
    };
    let mut element = Element::new("disk")
        .with("type", "file")
        .with("device", "disk")
        .child(driver)
        .child(source(&disk.path))
        .child(below)
        .child(Element::new("target").with("dev", &disk.target).with("bus", disk.bus()))
        .children((!disk.serial.is_empty()).then(|| Element::new("serial").text(&disk.serial)));
    if disk.read_only {
        element = element.child(Element::new("readonly"));
    }
    element
}

fn interface(stored: &Stored) -> Element {
    let (kind, source) = match &stored.network {
        Some(network) => ("network", Some(Element::new("source").with("network", network))),
        None => ("user", None),
    };
    Element::new("interface")
        .with("type", kind)
        .child(Element::new("mac").with("address", &stored.mac))
        .children(source)
        .child(Element::new("model").with("type", "virtio"))
        // Firmware on the card would look for a boot server first.
        .child(Element::new("rom").with("enabled", "no"))
}

fn serial(dir: &InstanceDir) -> Element {
    let socket = dir.file(CONSOLE_SOCKET);
    Element::new("serial")
        .with("type", "unix")
        .child(Element::new("source").with("mode", "bind").with("path", socket.display()))
        .child(Element::new("log").with("file", dir.file(CONSOLE).display()).with("append", "on"))
        .child(Element::new("target").with("type", "isa-serial").with("port", 0))
}

/// The channel of the guest's agent. libvirt makes its socket and talks on it.
fn agent_channel() -> Element {
    let target = Element::new("target").with("type", "virtio").with("name", "org.qemu.guest_agent.0");
    Element::new("channel").with("type", "unix").child(Element::new("source").with("mode", "bind")).child(target)
}

fn vnc(dir: &InstanceDir) -> Element {
    let socket = dir.file(VNC_SOCKET);
    let listen = Element::new("listen").with("type", "socket").with("socket", socket.display());
    Element::new("graphics").with("type", "vnc").child(listen)
}

#[cfg(test)]
mod tests;
