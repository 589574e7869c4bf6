//! MicroVMs: each a Firecracker process, by default in a jail of its own.
//!
//! Where Firecracker cannot run the driver is there all the same: it says so, and refuses everything.

mod options;

#[cfg(target_os = "linux")]
mod api;
#[cfg(target_os = "linux")]
mod boot;
#[cfg(target_os = "linux")]
mod boot_args;
#[cfg(target_os = "linux")]
mod console;
#[cfg(target_os = "linux")]
mod create;
#[cfg(target_os = "linux")]
mod disks;
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
mod images;
#[cfg(target_os = "linux")]
mod jail;
#[cfg(target_os = "linux")]
mod keyboard;
#[cfg(target_os = "linux")]
mod layout;
#[cfg(target_os = "linux")]
mod machine;
#[cfg(target_os = "linux")]
mod metrics;
#[cfg(target_os = "linux")]
mod platform;
#[cfg(target_os = "linux")]
mod problem;
#[cfg(target_os = "linux")]
mod process;
#[cfg(target_os = "linux")]
mod rescue;
#[cfg(target_os = "linux")]
mod snapshot;
#[cfg(target_os = "linux")]
mod tap;

pub use driver::FirecrackerDriver;
pub use options::FirecrackerOptions;

/// The driver's name.
pub const NAME: &str = "firecracker";
