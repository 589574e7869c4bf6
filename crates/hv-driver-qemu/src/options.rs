//! The driver's configuration.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The driver's configuration; in an agent's configuration file the section of its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QemuOptions {
    /// Where each instance has a directory of its own, named after its id. Made when needed.
    pub state_dir: PathBuf,
    /// Where the images are: `NAME.qcow2`, `NAME.raw`, `NAME.img`, or `NAME/` with `kernel`, `initrd`, `cmdline` and
    /// `disk.qcow2`.
    pub image_dir: PathBuf,
    /// The emulator; `None` looks for it in `PATH`.
    pub qemu_binary: Option<PathBuf>,
    /// The disk tool; `None` looks for it in `PATH`.
    pub qemu_img: Option<PathBuf>,
    /// How guests are accelerated.
    pub accel: Accel,
    /// The machine type, with options as QEMU's `-machine` takes them.
    pub machine: String,
}

impl Default for QemuOptions {
    fn default() -> Self {
        Self {
            state_dir: PathBuf::new(),
            image_dir: PathBuf::new(),
            qemu_binary: None,
            qemu_img: None,
            accel: Accel::Auto,
            machine: "q35".to_owned(),
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
