//! A container's first process, named by a pidfd so that a pid that is used again means nothing.

use std::os::fd::OwnedFd;

use hv_machine::notify::awaitable;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;

use crate::cgroup::Cgroup;
use crate::problem::{Outcome, Problem};

/// A process, alive or a moment ago.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    fd: AsyncFd<OwnedFd>,
}

impl Process {
    /// The process of this pid, if it is in the group.
    pub(crate) fn open_in(pid: i32, cgroup: &Cgroup) -> Outcome<Option<Self>> {
        let Some(raw) = Pid::from_raw(pid) else { return Ok(None) };
        let fd = match pidfd_open(raw, PidfdFlags::empty()) {
            Ok(fd) => awaitable(fd).map_err(Problem::Process)?,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(Problem::Process(e.into())),
        };
        // Looked at now that the descriptor can mean no other process.
        Ok(cgroup.holds(pid).then_some(Self { pid, fd }))
    }

    pub(crate) fn signal(&self, signal: Signal) -> Outcome<()> {
        match pidfd_send_signal(self.fd.get_ref(), signal) {
            Err(e) if e != rustix::io::Errno::SRCH => Err(Problem::Process(e.into())),
            _ => Ok(()),
        }
    }

    /// Waits for its end: a pidfd becomes readable then (pidfd_open(2)).
    pub(crate) async fn ended(&self) {
        let _ = self.fd.readable().await;
    }
}
