//! What this node's QEMU is and can do, found out once for each binary.
//!
//! # Theory of operation
//! A device file proves nothing: under nested or emulated KVM it may be there and run a million instructions a second.
//! So a guest of 256 bytes is run, which switches to long mode and counts to ten million. Where KVM works that takes a
//! few milliseconds. The guest says `R` when it runs at all, so that a slow start of QEMU is not held against KVM.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};

use crate::argv::SANDBOX;
use crate::options::{Accel, QemuOptions};
use crate::problem::{Outcome, Problem};

/// How long QEMU may take to say its version.
const INSPECT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long QEMU may take to run its first instruction under KVM.
const PROBE_START_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the guest may take to count to ten million. Processors take 10 ms, emulated KVM 10 s.
const PROBE_COUNT_TIMEOUT: Duration = Duration::from_millis(500);
/// Where the emulator is found if not in `PATH`.
const ELSEWHERE: [&str; 2] = ["/usr/libexec/qemu-kvm", "/usr/bin/qemu-kvm"];

/// What runs the guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accelerator {
    Kvm,
    Tcg,
}

/// A QEMU that works.
#[derive(Clone, Debug)]
pub(crate) struct Platform {
    pub(crate) binary: PathBuf,
    modified: Option<SystemTime>,
    pub(crate) version: String,
    pub(crate) sandbox: bool,
    pub(crate) accelerator: Accelerator,
    /// What an operator should know.
    pub(crate) message: String,
}

impl Platform {
    /// Whether the binary is still the one that was looked at.
    pub(crate) fn is_current(&self) -> bool {
        modified(&self.binary) == self.modified && self.modified.is_some()
    }

    #[cfg(test)]
    pub(crate) fn for_tests(accelerator: Accelerator) -> Self {
        let binary = PathBuf::from("qemu");
        Self {
            binary,
            modified: None,
            version: String::new(),
            sandbox: true,
            accelerator,
            message: String::new(),
        }
    }

    /// Looks at this node's QEMU. The error is for an operator.
    pub(crate) async fn inspect(options: &QemuOptions) -> Result<Self, String> {
        let binary = match &options.qemu_binary {
            Some(path) => Some(path.clone()).filter(|path| path.is_file()),
            None => find(&format!("qemu-system-{}", std::env::consts::ARCH))
                .or_else(|| ELSEWHERE.iter().map(PathBuf::from).find(|path| path.is_file())),
        };
        let binary = binary.ok_or_else(|| match &options.qemu_binary {
            Some(path) => format!(
                "there is no {}; correct drivers.qemu.binary, or apt-get install qemu-system-x86",
                path.display()
            ),
            None => "qemu is not installed; apt-get install qemu-system-x86 qemu-utils".to_owned(),
        })?;
        let (version, sandbox) = match version(&binary, true).await {
            Ok(version) => (version, true),
            Err(_) => (version(&binary, false).await.map_err(|e| describe(&binary, &e))?, false),
        };
        let (accelerator, mut message) = accelerator(options.accel, &binary).await?;
        if !sandbox {
            message.push_str("; this qemu has no seccomp sandbox");
        }
        let modified = modified(&binary);
        Ok(Self { binary, modified, version, sandbox, accelerator, message })
    }
}

fn describe(binary: &Path, problem: &Problem) -> String {
    let cause = std::error::Error::source(problem).map(|cause| format!(": {cause}")).unwrap_or_default();
    format!(
        "{} does not work: {problem}{cause}; apt-get install --reinstall qemu-system-x86",
        binary.display()
    )
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|file| file.modified()).ok()
}

/// Where a program is in `PATH`.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.is_file())
}

async fn accelerator(wanted: Accel, binary: &Path) -> Result<(Accelerator, String), String> {
    let probed = match wanted {
        Accel::Tcg => return Ok((Accelerator::Tcg, "emulating, as configured".to_owned())),
        Accel::Auto | Accel::Kvm => probe_kvm(binary).await,
    };
    match (wanted, probed) {
        (_, Ok(())) => Ok((Accelerator::Kvm, "KVM".to_owned())),
        (Accel::Kvm, Err(reason)) => {
            Err(format!("no usable KVM: {reason}; set drivers.qemu.accel to auto to emulate"))
        }
        (Accel::Auto | Accel::Tcg, Err(reason)) => {
            tracing::warn!(%reason, "no usable KVM: guests are emulated and run slowly");
            Ok((Accelerator::Tcg, format!("no usable KVM: emulating; {reason}")))
        }
    }
}

fn quiet(binary: &Path) -> Command {
    let mut command = Command::new(binary);
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

fn spawn(mut command: Command) -> Outcome<Child> {
    let remedy = "check that it is executable";
    command.spawn().map_err(|source| Problem::Spawn { tool: "qemu".to_owned(), remedy, source })
}

/// The version that QEMU's own greeting tells; fails if it does not start so.
async fn version(binary: &Path, sandbox: bool) -> Outcome<String> {
    let mut command = quiet(binary);
    command.args(["-machine", "none", "-qmp", "stdio"]);
    if sandbox {
        command.args(["-sandbox", SANDBOX]);
    }
    let mut child = spawn(command)?;
    let work = async {
        if let Some(mut stdin) = child.stdin.take() {
            // If it has ended already its status says so.
            let _ = stdin.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n").await;
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(INSPECT_TIMEOUT, work).await.map_err(|_| Problem::Timeout {
        what: "asking qemu for its version".to_owned(),
        timeout_ms: 20_000,
    })?;
    let output = output.map_err(Problem::Process)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Problem::Tool { tool: "qemu".to_owned(), status: output.status.to_string(), stderr });
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let greeting: serde_json::Value =
        text.lines().next().and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();
    let number = &greeting["QMP"]["version"]["qemu"];
    let part = |name: &str| number[name].as_u64().unwrap_or(0);
    Ok(format!("{}.{}.{}", part("major"), part("minor"), part("micro")))
}

/// The guest: 256 bytes at the end of the address space's first MiB and of its first 4 GiB, entered in real mode at
/// its last 16 bytes. Assembled from:
///
/// ```text
/// cli                          ; at f000:ff00
/// mov al,'R'; out 0xe9,al
/// xor ax,ax; mov ds,ax; mov ss,ax
/// mov dword [0x1000],0x2003    ; page tables: one page of 2 MiB, mapped to itself
/// mov dword [0x2000],0x3003
/// mov dword [0x3000],0x83
/// lgdt [cs:0xff88]
/// mov eax,0x20; mov cr4,eax    ; PAE
/// mov eax,0x1000; mov cr3,eax
/// mov ecx,0xc0000080; mov eax,0x100; xor edx,edx; wrmsr   ; EFER.LME
/// mov eax,0x80000001; mov cr0,eax                          ; paging, protection: long mode
/// jmp 8:0xfff61
/// mov al,'S'; out 0xe9,al      ; 64 bit from here
/// mov ecx,10000000
/// dec ecx; jnz $-2
/// mov al,'E'; out 0xe9,al
/// hlt; jmp $-1
/// ; the descriptor table, its address, and at the very end: jmp f000:ff00
/// ```
const PROBE_GUEST: &str = "fab052e6e931c08ed88ed066c70600100320000066c70600200330000066c7060030830000002e660f011688ff66b8\
200000000f22e066b8001000000f22d866b9800000c066b8000100006631d20f3066b8010000800f22c066ea61ff0f000800b053e6e9b980969800\
ffc975fcb045e6e9f4ebfd8d7400000000000000000000000000009a20000f0078ff0f00";

fn probe_firmware() -> Vec<u8> {
    const SIZE: usize = 64 << 10;
    let digit = |byte: u8| (byte as char).to_digit(16).unwrap_or(0) as u8;
    let code: Vec<u8> =
        PROBE_GUEST.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect();
    let mut firmware = vec![0; SIZE];
    firmware[SIZE - 256..][..code.len()].copy_from_slice(&code);
    firmware[SIZE - 16..][..5].copy_from_slice(&[0xea, 0x00, 0xff, 0x00, 0xf0]);
    firmware
}

/// Whether KVM runs guests at a processor's speed. The error says why not, and what to do.
async fn probe_kvm(binary: &Path) -> Result<(), String> {
    match fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(
                "there is no /dev/kvm; enable virtualisation in the firmware and load kvm_intel or kvm_amd"
                    .into(),
            );
        }
        Err(e) => {
            return Err(format!("/dev/kvm cannot be opened ({e}); add the agent's user to the group kvm"));
        }
    }
    let firmware = tempfile::NamedTempFile::new().map_err(|e| format!("the probe cannot be written: {e}"))?;
    fs::write(firmware.path(), probe_firmware()).map_err(|e| format!("the probe cannot be written: {e}"))?;
    run_probe(binary, "kvm", firmware.path(), PROBE_COUNT_TIMEOUT).await
}

async fn run_probe(
    binary: &Path,
    accel: &str,
    firmware: &Path,
    count_timeout: Duration,
) -> Result<(), String> {
    let mut command = quiet(binary);
    command
        .args(["-machine", "pc", "-accel", accel, "-m", "2M", "-debugcon", "stdio", "-bios"])
        .arg(firmware);
    let mut child = spawn(command).map_err(|e| e.to_string())?;
    let mut said = child.stdout.take().ok_or("the probe has no output")?;
    let first = tokio::time::timeout(PROBE_START_TIMEOUT, said.read_u8()).await;
    let verdict = match first {
        Ok(Ok(_)) => {
            let mut rest = [0; 2];
            match tokio::time::timeout(count_timeout, said.read_exact(&mut rest)).await {
                Ok(Ok(_)) if rest == *b"SE" => Ok(()),
                _ => Err("/dev/kvm is there, but does not run a guest at a processor's speed".to_owned()),
            }
        }
        Ok(Err(_)) => Err("qemu cannot create a virtual machine on /dev/kvm".to_owned()),
        Err(_) => Err("a guest on /dev/kvm does not run".to_owned()),
    };
    // It may have ended already.
    let _ = child.kill().await;
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_ends_with_its_entry() {
        let firmware = probe_firmware();
        assert_eq!(firmware.len(), 64 << 10);
        assert_eq!(firmware[0xff00..0xff05], [0xfa, 0xb0, b'R', 0xe6, 0xe9]);
        assert_eq!(firmware[0xfff0..0xfff5], [0xea, 0x00, 0xff, 0x00, 0xf0]);
    }

    #[tokio::test]
    async fn the_probe_counts_to_its_end_where_guests_run() {
        let Some(binary) = find("qemu-system-x86_64") else {
            return eprintln!("skipped: qemu is not installed");
        };
        let firmware = tempfile::NamedTempFile::new().unwrap();
        fs::write(firmware.path(), probe_firmware()).unwrap();
        // Emulated, and beside other tests.
        run_probe(&binary, "tcg", firmware.path(), Duration::from_secs(30)).await.unwrap();
    }
}
