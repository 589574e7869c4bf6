//! The driver on a real libvirtd.
#![cfg(all(target_os = "linux", feature = "libvirt"))]

mod conformance;
mod daemon;
mod real_libvirt;
mod subject;
