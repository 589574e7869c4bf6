//! Guests' processors on processors of the host that nobody else has.

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::machine::Machine;
use crate::problem::{Outcome, Problem};
use crate::qmp::Qmp;

/// How long QEMU may take to name the threads.
const QUERY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);
/// What fails, in errors.
const WHAT: &str = "query-cpus-fast";

impl Machine {
    /// Binds the thread of each of the guest's processors to the one that the node gave for it, if it gave some.
    pub(crate) async fn pin_processors(&self, qmp: &Qmp) -> Outcome<()> {
        let given = self.given_cpus();
        if given.is_empty() {
            return Ok(());
        }
        let answer = qmp.command(WHAT, None, QUERY_TIMEOUT).await?;
        for one in answer.as_array().into_iter().flatten() {
            let number = |name: &str| one[name].as_u64();
            let index = number("cpu-index").and_then(|index| usize::try_from(index).ok());
            let thread = number("thread-id").and_then(|thread| i32::try_from(thread).ok());
            let cpu = index.and_then(|index| given.get(index));
            let (Some(cpu), Some(thread)) = (cpu, thread.and_then(Pid::from_raw)) else {
                return Err(refused(format!("no processor of the host is known for {one}")));
            };
            let cpu = usize::try_from(*cpu).unwrap_or(usize::MAX);
            if cpu >= CpuSet::MAX_CPU {
                return Err(refused(format!("processor {cpu} is beyond what can be bound to")));
            }
            let mut set = CpuSet::new();
            set.set(cpu);
            sched_setaffinity(Some(thread), &set).map_err(|error| {
                refused(format!("a processor cannot be bound to processor {cpu} of the host: {error}"))
            })?;
        }
        Ok(())
    }
}

fn refused(reason: String) -> Problem {
    Problem::Refused { command: WHAT.to_owned(), reason }
}
