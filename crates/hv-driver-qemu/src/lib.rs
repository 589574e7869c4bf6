//! QEMU virtual machines over QMP, without libvirt.
//!
//! Where QEMU cannot run the driver is there all the same: it says so, and refuses everything.

mod options;

#[cfg(target_os = "linux")]
mod agent;
#[cfg(target_os = "linux")]
mod argv;
#[cfg(target_os = "linux")]
mod console;
#[cfg(target_os = "linux")]
mod create;
#[cfg(target_os = "linux")]
mod driver;
#[cfg(not(target_os = "linux"))]
#[path = "elsewhere.rs"]
mod driver;
#[cfg(target_os = "linux")]
mod exit;
#[cfg(target_os = "linux")]
mod files;
#[cfg(target_os = "linux")]
mod jobs;
#[cfg(target_os = "linux")]
mod limits;
#[cfg(target_os = "linux")]
mod live;
#[cfg(target_os = "linux")]
mod machine;
#[cfg(target_os = "linux")]
mod migration;
#[cfg(target_os = "linux")]
mod pin;
#[cfg(target_os = "linux")]
mod platform;
#[cfg(target_os = "linux")]
mod problem;
#[cfg(target_os = "linux")]
mod process;
#[cfg(target_os = "linux")]
mod qmp;
#[cfg(target_os = "linux")]
mod rescue;
#[cfg(target_os = "linux")]
mod snapshots;
#[cfg(target_os = "linux")]
mod update;

pub use driver::QemuDriver;
pub use options::{Accel, QemuOptions};

/// The driver's name.
pub const NAME: &str = "qemu";
