//! Where a machine's console is: QEMU or virtlogd appends what the guest prints to the log, and what is typed goes to a
//! socket.

use hv_machine::console::{ConsoleHub, Screen, type_on_socket};
use hv_machine::log::{LOG_OLD, Log};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::files::{CONSOLE_SOCKET, InstanceDir};

/// What the log had before it was last cut, by virtlogd or by us.
const OLDER: [&str; 2] = ["console.log.0", LOG_OLD];

/// The log of an instance.
pub(crate) fn log_of(dir: &InstanceDir) -> Log {
    Log::with_older(&dir.path, &OLDER)
}

/// Follows it until the machine has ended.
pub(crate) fn follow(
    dir: &InstanceDir,
    ended: watch::Receiver<bool>,
    cancelled: CancellationToken,
) -> ConsoleHub {
    // virtlogd puts another file in the log's place.
    let screen = Screen { log: log_of(dir), is_replaced: true, side_logs: Vec::new() };
    let socket = dir.file(CONSOLE_SOCKET);
    let keyboard = |typed| async move { type_on_socket(&socket, typed).await };
    ConsoleHub::start(screen, keyboard, ended, cancelled)
}
