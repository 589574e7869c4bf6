//! The driver's configuration.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The driver's configuration; in an agent's configuration file the section of its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LibvirtOptions {
    /// Which libvirtd: `qemu:///system`, or with a socket of its own `qemu+unix:///system?socket=/path`.
    pub uri: String,
    /// Where each instance has a directory of its own, named after its id. Made when needed. At most 60 bytes long,
    /// because sockets lie in it.
    pub state_dir: PathBuf,
    /// Where the images are: `NAME.qcow2`, `NAME.raw`, `NAME.img`, or `NAME/` with `kernel`, `initrd`, `cmdline` and
    /// `disk.qcow2`.
    pub image_dir: PathBuf,
    /// The libvirt network of instances that name none; `user` is user-mode networking, which needs none.
    pub default_network: String,
    /// The directory pool in which disks are made; empty: in the instance's own directory.
    pub default_storage_pool: String,
    /// How guests are accelerated.
    pub accel: Accel,
    /// The program that libvirtd starts guests with, written by the driver; `None` is `.emulator` in the state directory.
    pub emulator: Option<PathBuf>,
}

impl Default for LibvirtOptions {
    fn default() -> Self {
        Self {
            uri: "qemu:///system".to_owned(),
            state_dir: PathBuf::new(),
            image_dir: PathBuf::new(),
            default_network: "user".to_owned(),
            default_storage_pool: String::new(),
            accel: Accel::Auto,
            emulator: None,
        }
    }
}

/// How guests are accelerated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// KVM if it really runs guests, else emulation.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Emulation.
    Tcg,
}
