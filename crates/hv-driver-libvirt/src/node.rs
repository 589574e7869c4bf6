//! What this node's libvirtd and QEMU are and can do, found out once for each connection.

use std::path::{Path, PathBuf};

use hv_machine::kvm;

use crate::daemon::Daemon;
use crate::emulator;
use crate::options::{Accel, LibvirtOptions};
use crate::xml::Element;

/// A libvirtd that works.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) version: String,
    /// What domains name as their emulator.
    pub(crate) emulator: PathBuf,
    /// `kvm` or `qemu`.
    pub(crate) kind: &'static str,
    /// The user and the group that QEMU runs as.
    pub(crate) owner: (u32, u32),
    pub(crate) has_uefi: bool,
    pub(crate) has_tpm: bool,
    pub(crate) has_spice: bool,
    /// What an operator should know.
    pub(crate) message: String,
}

impl Node {
    /// Looks at it. The error is for an operator.
    pub(crate) async fn inspect(daemon: &Daemon, options: &LibvirtOptions, emulator: &Path) -> Result<Self, String> {
        let told = |problem: crate::problem::Problem| problem.to_string();
        let (_, version) = daemon.version().await.map_err(told)?;
        let capabilities = daemon.capabilities().await.map_err(told)?;
        let arch = std::env::consts::ARCH;
        let guest = capabilities.all("guest").find(|guest| {
            guest.at("arch").and_then(|found| found.attribute("name")) == Some(arch)
                && guest.text_at("os_type") == Some("hvm")
        });
        let qemu = guest.and_then(|guest| guest.text_at("arch/emulator")).ok_or_else(|| {
            format!("libvirtd knows no emulator for {arch}; apt-get install qemu-system-x86 libvirt-daemon-driver-qemu")
        })?;
        let qemu = Path::new(qemu);
        let (kind, mut message) = accelerator(options.accel, qemu).await?;
        emulator::install(emulator, qemu).map_err(told)?;
        let can = daemon.domain_capabilities(&emulator.display().to_string(), kind).await.map_err(|problem| {
            format!("libvirtd cannot use {}: {problem}", emulator.display())
        })?;
        let node = Self {
            version,
            emulator: emulator.to_owned(),
            kind,
            owner: owner(&capabilities).unwrap_or((0, 0)),
            has_uefi: lists(&can, "os", "firmware", "efi"),
            has_tpm: lists(&can, "devices/tpm", "backendModel", "emulator"),
            has_spice: lists(&can, "devices/graphics", "type", "spice"),
            message: String::new(),
        };
        for (is_there, what) in [(node.has_uefi, "UEFI (ovmf)"), (node.has_tpm, "TPM (swtpm)")] {
            if !is_there {
                message.push_str("; without ");
                message.push_str(what);
            }
        }
        Ok(Self { message, ..node })
    }
}

/// Whether an enumeration in the domain capabilities has a value.
fn lists(capabilities: &Element, at: &str, name: &str, value: &str) -> bool {
    let Some(part) = capabilities.at(at) else { return false };
    let mut named = part.all("enum").filter(|list| list.attribute("name") == Some(name));
    named.any(|list| list.all("value").any(|known| known.text == value))
}

/// The user and group of QEMU: `+UID:+GID` in the capabilities' label of discretionary access control.
fn owner(capabilities: &Element) -> Option<(u32, u32)> {
    let mut models = capabilities.at("host")?.all("secmodel");
    let dac = models.find(|model| model.text_at("model") == Some("dac"))?;
    let (user, group) = dac.text_at("baselabel")?.split_once(':')?;
    let number = |text: &str| text.trim_start_matches('+').parse().ok();
    Some((number(user)?, number(group)?))
}

async fn accelerator(wanted: Accel, qemu: &Path) -> Result<(&'static str, String), String> {
    let probed = match wanted {
        Accel::Tcg => return Ok(("qemu", "emulating, as configured".to_owned())),
        Accel::Auto | Accel::Kvm => kvm::probe(qemu).await,
    };
    match (wanted, probed) {
        (_, Ok(())) => Ok(("kvm", "KVM".to_owned())),
        (Accel::Kvm, Err(reason)) => {
            Err(format!("no usable KVM: {reason}; set drivers.libvirt.accel to auto to emulate"))
        }
        (Accel::Auto | Accel::Tcg, Err(reason)) => {
            tracing::warn!(%reason, "no usable KVM: guests are emulated and run slowly");
            Ok(("qemu", format!("no usable KVM: emulating; {reason}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read() {
        let document = "<capabilities><host><secmodel><model>none</model></secmodel><secmodel><model>dac</model>\
            <baselabel type='kvm'>+64055:+994</baselabel></secmodel></host></capabilities>";
        assert_eq!(owner(&Element::parse(document).unwrap()), Some((64055, 994)));
        let document = "<domainCapabilities><os><enum name='firmware'><value>bios</value><value>efi</value></enum></os>\
            <devices><tpm supported='no'/></devices></domainCapabilities>";
        let can = Element::parse(document).unwrap();
        assert!(lists(&can, "os", "firmware", "efi"));
        assert!(!lists(&can, "devices/tpm", "backendModel", "emulator"));
        assert!(!lists(&can, "devices/graphics", "type", "spice"));
    }
}
