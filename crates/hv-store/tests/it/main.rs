//! The store's backends against the conformance suite, and against crashes.

mod crash;
mod embedded;
mod etcd;
mod etcd_failures;
mod full_disk;
mod io_error;
mod workload;
