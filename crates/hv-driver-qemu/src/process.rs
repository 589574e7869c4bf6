//! The QEMU process, by the lock that it holds: see [`Process`].

use hv_machine::process::Process;

use crate::files::{InstanceDir, LOCK, PID};
use crate::problem::{Outcome, Problem};

/// The process that holds an instance's lock; `None` if the lock is free by now.
pub(crate) async fn find(dir: &InstanceDir) -> Outcome<Option<Process>> {
    let hint = || std::fs::read_to_string(dir.file(PID)).ok()?.trim().parse().ok();
    let is_free = || Ok(dir.try_lock(LOCK)?.is_some());
    Process::find(&dir.file(LOCK), hint, is_free, || Problem::Unfindable(dir.file(LOCK))).await
}
