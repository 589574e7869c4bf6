//! Keeps the log of one container; started by containerd's shim, never by hand.

use std::process::ExitCode;

fn main() -> ExitCode {
    hv_driver_containerd::keeper::run_if_asked().unwrap_or_else(|| {
        eprintln!("this program is started by containerd to keep a container's log");
        ExitCode::FAILURE
    })
}
