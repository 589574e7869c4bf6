//! Whether KVM really runs guests on this node.
//!
//! # Theory of operation
//! A device file proves nothing: under nested or emulated KVM it may be there and run a million instructions a second.
//! So a guest of 256 bytes is run, which switches to long mode and counts to ten million. Where KVM works that takes a
//! few milliseconds. The guest says `R` when it runs at all, so that a slow start of QEMU is not held against KVM.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

/// How long QEMU may take to run its first instruction under KVM.
const PROBE_START_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the guest may take to count to ten million. Processors take 10 ms, emulated KVM 10 s.
const PROBE_COUNT_TIMEOUT: Duration = Duration::from_millis(500);

fn quiet(binary: &Path) -> Command {
    let mut command = Command::new(binary);
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    command
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

/// Whether guests can be run on this device (`/dev/kvm`). The error says why not, and what to do.
///
/// # Errors
/// If it is not there, or not ours to open.
pub fn check(device: &Path) -> Result<(), String> {
    match fs::OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(format!(
            "there is no {}; enable virtualisation in the firmware and load kvm_intel or kvm_amd",
            device.display()
        )),
        Err(e) => Err(format!(
            "{} cannot be opened ({e}); run the agent as root, or add its user to the group kvm",
            device.display()
        )),
    }
}

/// Whether KVM runs guests of this QEMU at a processor's speed. The error says why not, and what to do.
///
/// # Errors
/// As of [`check`], and if a guest does not run, or runs too slowly.
pub async fn probe(binary: &Path) -> Result<(), String> {
    check(Path::new("/dev/kvm"))?;
    let firmware = tempfile::NamedTempFile::new().map_err(|e| format!("the probe cannot be written: {e}"))?;
    fs::write(firmware.path(), probe_firmware()).map_err(|e| format!("the probe cannot be written: {e}"))?;
    run_probe(binary, "kvm", firmware.path(), PROBE_COUNT_TIMEOUT).await
}

async fn run_probe(binary: &Path, accel: &str, firmware: &Path, within: Duration) -> Result<(), String> {
    let mut command = quiet(binary);
    command
        .args(["-machine", "pc", "-accel", accel, "-m", "2M", "-debugcon", "stdio", "-bios"])
        .arg(firmware);
    let mut child = command.spawn().map_err(|e| format!("{} could not be run ({e})", binary.display()))?;
    let mut said = child.stdout.take().ok_or("the probe has no output")?;
    let first = tokio::time::timeout(PROBE_START_TIMEOUT, said.read_u8()).await;
    let verdict = match first {
        Ok(Ok(_)) => {
            let mut rest = [0; 2];
            match tokio::time::timeout(within, said.read_exact(&mut rest)).await {
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
        let binary = Path::new("/usr/bin/qemu-system-x86_64");
        if !binary.exists() {
            return eprintln!("skipped: qemu is not installed");
        }
        let firmware = tempfile::NamedTempFile::new().unwrap();
        fs::write(firmware.path(), probe_firmware()).unwrap();
        // Emulated, and beside other tests.
        run_probe(binary, "tcg", firmware.path(), Duration::from_secs(30)).await.unwrap();
    }
}
