//! The store's backends against the conformance suite, and against crashes.

mod backup;
mod crash;
mod embedded;
mod etcd;
mod etcd_failures;
mod etcd_upkeep;
mod full_disk;
mod io_error;
mod pause;
mod workload;
