//! The containerd driver on a real containerd: the conformance suite, and what only containers can show.
#![cfg(target_os = "linux")]

mod claims;
mod conformance;
mod daemon;
mod image;
mod subject;
mod survival;
