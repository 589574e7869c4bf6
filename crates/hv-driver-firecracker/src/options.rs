//! The driver's configuration.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The driver's configuration; in an agent's configuration file the section of its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FirecrackerOptions {
    /// Where each instance has a directory of its own, named after its id. Made when needed.
    pub state_dir: PathBuf,
    /// Where the images are: `NAME.elf` (a kernel, booted without a disk), `NAME.ext4`, `NAME.raw`, `NAME.img` (a root
    /// drive for the default kernel), or `NAME/` with `kernel`, `initrd`, `cmdline` and `disk.raw`.
    pub image_dir: PathBuf,
    /// The VMM; `None` looks for `firecracker` in `PATH`.
    pub binary: Option<PathBuf>,
    /// What jails it; `None` looks for `jailer` beside the VMM, then in `PATH`.
    pub jailer: Option<PathBuf>,
    /// Whether each VMM is jailed: own user, root directory, cgroup. Needs root; without it nothing is jailed.
    pub use_jailer: bool,
    /// The kernel for images that have none.
    pub default_kernel: Option<PathBuf>,
    /// The root drive of instances that name a kernel and no image; `None`: they have none.
    pub default_root_drive: Option<PathBuf>,
    /// The first user and group id of jailed instances; each has its own of the [`FirecrackerOptions::UIDS`] from there.
    pub uid_base: u32,
    /// The network namespace that every VMM joins, as `/run/netns/NAME`; `None`: the agent's.
    pub netns: Option<PathBuf>,
    /// The bridge that instances with a network are connected to; `None`: such instances are refused.
    pub bridge: Option<String>,
    /// The device that runs guests.
    pub kvm: PathBuf,
    /// Whether memory that changes is tracked, so that each snapshot after the first holds a guest still for a moment only.
    pub diff_snapshots: bool,
}

impl FirecrackerOptions {
    /// How many user ids there are for instances.
    pub const UIDS: u32 = 65_536;
}

impl Default for FirecrackerOptions {
    fn default() -> Self {
        Self {
            state_dir: PathBuf::new(),
            image_dir: PathBuf::new(),
            binary: None,
            jailer: None,
            use_jailer: true,
            default_kernel: None,
            default_root_drive: None,
            uid_base: 200_000,
            netns: None,
            bridge: None,
            kvm: PathBuf::from("/dev/kvm"),
            diff_snapshots: true,
        }
    }
}
