//! The program that libvirtd starts guests with: it lets a QEMU run only under its instance's lock, and only if it may.
//!
//! # Background
//! libvirtd starts QEMU, so the agent cannot hand it a lock. But libvirtd starts whatever `<emulator>` names, and
//! passes on variables from the domain's description.
//!
//! # Theory of operation
//! `<emulator>` is a small script. It opens the instance's lock file as its standard input, locks it (flock(2)), then
//! looks whether the permit is there, and becomes QEMU. So
//! - whoever runs as the instance's QEMU holds the lock from before its first instruction to after its last one,
//! - no two run at once, whatever libvirtd or anybody believes,
//! - who removes the permit first and finds the lock free after that knows that nothing runs, nor will: a start that
//!   is under way in libvirtd, or in one that was stopped and goes on later, finds no permit. That is what
//!   [`FenceTarget::Permitted`](hv_driver::FenceTarget) does.
//!
//! Without the variables the script just becomes QEMU: libvirtd asks every emulator what it can do.
//!
//! # Caveats
//! Where libvirtd confines guests (AppArmor, SELinux) the policy must allow the script.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use crate::problem::{Outcome, Problem};

/// The variables of a domain that the script reads.
pub(crate) const LOCK_VARIABLE: &str = "HYPERVISOR_LOCK";
pub(crate) const PERMIT_VARIABLE: &str = "HYPERVISOR_PERMIT";
/// Where flock(1) is.
const FLOCK: [&str; 2] = ["/usr/bin/flock", "/bin/flock"];

fn script(qemu: &Path, flock: &str) -> String {
    // libvirtd looks anew at what an emulator can do when its file changes, so the script changes with QEMU.
    let stamp = fs::metadata(qemu).and_then(|file| file.modified()).ok();
    let stamp = stamp.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok()).unwrap_or_default();
    let qemu = qemu.display().to_string().replace('\'', "'\\''");
    format!(
        "#!/bin/sh\n\
         # Starts QEMU under the lock of its instance, and only if it may. For QEMU of {stamp}.\n\
         if [ -n \"${LOCK_VARIABLE}\" ]; then\n\
         \texec 0<>\"${LOCK_VARIABLE}\" || exit 1\n\
         \t{flock} -n -x 0 || {{ echo 'an earlier run of this instance is not over' >&2; exit 1; }}\n\
         \t[ -e \"${PERMIT_VARIABLE}\" ] || {{ echo 'this instance may not start: it was fenced or stopped' >&2; exit 1; }}\n\
         fi\n\
         exec '{qemu}' \"$@\"\n",
        stamp = stamp.as_secs(),
    )
}

/// Writes the script, unless it is there already.
pub(crate) fn install(path: &Path, qemu: &Path) -> Outcome<()> {
    let flock = FLOCK.iter().find(|path| Path::new(path).exists()).unwrap_or(&FLOCK[0]);
    let wanted = script(qemu, flock);
    if fs::read_to_string(path).is_ok_and(|there| there == wanted) {
        return Ok(());
    }
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(Problem::file("make", dir))?;
    }
    let dir = path.parent().unwrap_or(Path::new("/"));
    // Another name for each writer: several drivers may do this at once.
    let mut partial = tempfile::NamedTempFile::new_in(dir).map_err(Problem::file("write", dir))?;
    let mut write = || {
        partial.write_all(wanted.as_bytes())?;
        partial.as_file().set_permissions(fs::Permissions::from_mode(0o755))?;
        partial.as_file().sync_all()
    };
    write().map_err(Problem::file("write", path))?;
    // Closed before it has its name: what is open for writing cannot be run.
    partial.into_temp_path().persist(path).map_err(|e| Problem::file("rename", path)(e.error))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::process::{Command, Output};

    use super::*;

    /// Runs the script with something in QEMU's place that says what its standard input is.
    fn run(dir: &Path, permitted: bool) -> Output {
        let qemu = dir.join("it's qemu");
        fs::write(&qemu, "#!/bin/sh\nreadlink /proc/self/fd/0; echo \"$@\"\n").unwrap();
        fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).unwrap();
        let emulator = dir.join("emulator");
        install(&emulator, &qemu).unwrap();
        let permit = dir.join("permit");
        if permitted {
            fs::write(&permit, "").unwrap();
        }
        let mut command = Command::new(emulator);
        command.env(LOCK_VARIABLE, dir.join("lock")).env(PERMIT_VARIABLE, permit).args(["-a", "b c"]);
        loop {
            match command.output() {
                // Another test's child has just been forked, and still has the file open.
                Err(e) if e.kind() == std::io::ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
                other => return other.unwrap(),
            }
        }
    }

    #[test]
    fn qemu_runs_with_the_lock_as_its_standard_input() {
        let dir = tempfile::tempdir().unwrap();
        let output = run(dir.path(), true);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(said, format!("{}\n-a b c\n", dir.path().join("lock").display()));
    }

    #[test]
    fn without_a_permit_or_while_another_runs_it_does_not_become_qemu() {
        let dir = tempfile::tempdir().unwrap();
        let output = run(dir.path(), false);
        assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
        let lock = fs::File::create(dir.path().join("lock")).unwrap();
        rustix::fs::flock(lock.as_fd(), rustix::fs::FlockOperation::LockExclusive).unwrap();
        let output = run(dir.path(), true);
        assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    }
}
