//! Containers over containerd's API (1.6 to 2.x).
//!
//! # Theory of operation
//! An instance is a directory of the driver, a container record and a writable snapshot of containerd, all of its id,
//! and while it runs a task: a process in a control group of its own, with a network namespace that lives and dies
//! with it. What is printed goes to a [keeper](mod@keeper) process per container, so that neither the agent nor
//! containerd is needed for a container to go on. Whether it runs is asked of the kernel; how it ended, of containerd.
//!
//! Where containerd cannot run the driver is there all the same: it says so, and refuses everything.

pub mod keeper;
mod options;

#[cfg(target_os = "linux")]
mod cgroup;
#[cfg(target_os = "linux")]
mod client;
#[cfg(target_os = "linux")]
mod container;
#[cfg(target_os = "linux")]
mod daemon;
#[cfg(target_os = "linux")]
mod driver;
#[cfg(not(target_os = "linux"))]
#[path = "elsewhere.rs"]
mod driver;
#[cfg(target_os = "linux")]
mod exec;
#[cfg(target_os = "linux")]
mod files;
#[cfg(target_os = "linux")]
mod health;
#[cfg(target_os = "linux")]
mod image;
#[cfg(target_os = "linux")]
mod import;
#[cfg(target_os = "linux")]
mod network;
#[cfg(target_os = "linux")]
mod output;
#[cfg(target_os = "linux")]
mod problem;
#[cfg(target_os = "linux")]
mod process;
#[cfg(target_os = "linux")]
mod seccomp;
#[cfg(target_os = "linux")]
mod spec;
#[cfg(target_os = "linux")]
mod user;

pub use driver::ContainerdDriver;
pub use options::ContainerdOptions;

/// The driver's name.
pub const NAME: &str = "containerd";
