//! The Firecracker driver: the conformance suite on the real VMM and on a double of its API, its traps, its devices and
//! its snapshots.

mod conformance;
mod devices;
mod double;
mod guests;
mod overhead;
mod snapshots;
mod subject;
mod traps;
