//! Whole clusters for tests: the real programs as processes of their own, with real etcd and QEMU.
//!
//! [`Cluster`] starts `hypervisor-server` and `hypervisor-agent` on free ports in a private directory, restarts what is
//! killed on demand, and ends everything it started when it is dropped. Nothing but tests and benches uses it.

#[cfg(feature = "chaos")]
pub mod chaos;
mod cluster;
mod containerd;
mod disk;
mod etcd;
mod instances;
mod netns;
mod probe;
mod process;
mod programs;
#[cfg(feature = "simulation")]
pub mod simulation;
mod usage;

pub use cluster::{AgentOptions, Cluster, ClusterOptions, StoreKind};
pub use containerd::Containerd;
pub use disk::SmallDisk;
pub use etcd::Etcd;
pub use hv_store::conformance::skip;
pub use instances::{Ask, create_request, until_gone, until_settled};
pub use netns::{Cut, Host, Network};
pub use probe::{DEADLINE, qemu_processes, until};
pub use process::Process;
pub use programs::{Program, firecracker, image_dir};
pub use usage::{Usage, median, percentile};
