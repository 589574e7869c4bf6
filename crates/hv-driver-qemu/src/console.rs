//! Where a machine's console is: QEMU appends what the guest prints to the log, and takes what is typed from a socket.

use std::sync::Arc;

use hv_machine::console::{ConsoleHub, Screen, type_on_socket};
use hv_machine::log::Log;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::files::{CONSOLE_SOCKET, EVENTS, InstanceDir, STDERR};

/// Follows it until the machine has ended.
pub(crate) fn follow(
    dir: &Arc<InstanceDir>,
    ended: watch::Receiver<bool>,
    cancelled: CancellationToken,
) -> ConsoleHub {
    let screen = Screen {
        log: Log::new(&dir.path),
        is_replaced: false,
        side_logs: vec![dir.file(EVENTS), dir.file(STDERR)],
    };
    let dir = dir.clone();
    let keyboard = |typed| async move { type_on_socket(&dir.socket(CONSOLE_SOCKET), typed).await };
    ConsoleHub::start(screen, keyboard, ended, cancelled)
}
