//! System calls that a container has no business with, as a filter (seccomp(2)).
//!
//! They change the machine rather than the container (time, modules, swap), make namespaces and mounts, reach into
//! other processes' kernel state, or belong to parts of the kernel where most of its holes have been.

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompBuilder,
    LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};

/// What a refused call returns: `EPERM`.
const NOT_PERMITTED: u32 = 1;
/// What makes the C library fall back to `clone`, whose flags a filter can see: `ENOSYS`.
const NOT_THERE: u32 = 38;
/// Flags of `clone` that make namespaces: user, PID, network, mount, IPC, UTS, cgroup (clone(2)).
const NAMESPACES: [u64; 7] =
    [0x1000_0000, 0x2000_0000, 0x4000_0000, 0x0002_0000, 0x0800_0000, 0x0400_0000, 0x0200_0000];

const REFUSED: &[&str] = &[
    "_sysctl",
    "acct",
    "add_key",
    "adjtimex",
    "bpf",
    "clock_adjtime",
    "clock_adjtime64",
    "clock_settime",
    "clock_settime64",
    "create_module",
    "delete_module",
    "fanotify_init",
    "finit_module",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "get_kernel_syms",
    "get_mempolicy",
    "init_module",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "ioperm",
    "iopl",
    "kcmp",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "lookup_dcookie",
    "mbind",
    "migrate_pages",
    "mount",
    "mount_setattr",
    "move_mount",
    "move_pages",
    "nfsservctl",
    "open_by_handle_at",
    "open_tree",
    "perf_event_open",
    "pivot_root",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "query_module",
    "quotactl",
    "quotactl_fd",
    "reboot",
    "request_key",
    "set_mempolicy",
    "setns",
    "settimeofday",
    "stime",
    "swapoff",
    "swapon",
    "syslog",
    "sysfs",
    "umount",
    "umount2",
    "unshare",
    "uselib",
    "userfaultfd",
    "ustat",
    "vhangup",
    "vm86",
    "vm86old",
];

/// The filter.
pub(crate) fn filter() -> Result<LinuxSeccomp, OciSpecError> {
    let names = REFUSED.iter().map(|name| (*name).to_owned()).collect();
    let mut calls =
        vec![refused(names, NOT_PERMITTED, None)?, refused(vec!["clone3".to_owned()], NOT_THERE, None)?];
    for flag in NAMESPACES {
        let is_set = LinuxSeccompArgBuilder::default()
            .index(0usize)
            .value(flag)
            .value_two(flag)
            .op(LinuxSeccompOperator::ScmpCmpMaskedEq)
            .build()?;
        calls.push(refused(vec!["clone".to_owned()], NOT_PERMITTED, Some(is_set))?);
    }
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActAllow)
        .architectures(architectures())
        .syscalls(calls)
        .build()
}

fn refused(
    names: Vec<String>,
    errno: u32,
    argument: Option<LinuxSeccompArg>,
) -> Result<LinuxSyscall, OciSpecError> {
    let call =
        LinuxSyscallBuilder::default().names(names).action(LinuxSeccompAction::ScmpActErrno).errno_ret(errno);
    match argument {
        Some(argument) => call.args(vec![argument]).build(),
        None => call.build(),
    }
}

/// This machine's, with all in which it runs programs: each has other numbers for the same calls.
fn architectures() -> Vec<Arch> {
    match std::env::consts::ARCH {
        "aarch64" => vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm],
        _ => vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32],
    }
}
