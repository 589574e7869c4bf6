//! The command line's entry point; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    hypervisor_ctl::main(std::env::args_os())
}
