//! What the drivers of machines share, and none of them has to itself.
//!
//! A driver is a process model (a QEMU, a domain, a VMM, a container) over the same few things of a node: a directory for
//! each instance, a log that is followed while it is cut, a process that is named by the lock that it holds. Those are
//! here, so that what is put right is put right for all. What the drivers have only alike by outline stays with them.
//!
//! [`Absent`] is for every system; everything else is for those where machines run.

mod elsewhere;

#[cfg(target_os = "linux")]
pub mod console;
#[cfg(target_os = "linux")]
pub mod files;
#[cfg(target_os = "linux")]
mod found;
#[cfg(target_os = "linux")]
pub mod guest_agent;
#[cfg(target_os = "linux")]
mod heard;
#[cfg(target_os = "linux")]
pub mod image_dir;
#[cfg(target_os = "linux")]
pub mod images;
#[cfg(target_os = "linux")]
pub mod kvm;
#[cfg(target_os = "linux")]
pub mod log;
#[cfg(target_os = "linux")]
pub mod notify;
#[cfg(target_os = "linux")]
pub mod process;
#[cfg(target_os = "linux")]
pub mod seed;

pub use elsewhere::{Absence, Absent};
#[cfg(target_os = "linux")]
pub use found::{Found, check_version};
#[cfg(target_os = "linux")]
pub use heard::heard;
