//! Where a machine's console is: Firecracker's standard output is the log, and its standard input what is typed.

use hv_machine::console::{ConsoleHub, Screen};
use hv_machine::log::Log;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::files::{InstanceDir, LOCK, STDERR};
use crate::keyboard;

/// Follows it until the machine has ended.
pub(crate) fn follow(
    dir: &InstanceDir,
    ended: watch::Receiver<bool>,
    cancelled: CancellationToken,
) -> ConsoleHub {
    let screen = Screen { log: Log::new(&dir.path), is_replaced: false, side_logs: vec![dir.file(STDERR)] };
    let lock = dir.file(LOCK);
    ConsoleHub::start(screen, |typed| keyboard::pass_on(lock, typed), ended, cancelled)
}
