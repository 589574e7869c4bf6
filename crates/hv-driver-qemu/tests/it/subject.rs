//! A QEMU driver in a private directory, with a guest of one disk sector that needs no time to boot.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use hv_driver::conformance::Subject;
use hv_driver::{Driver, InstanceConfig};
use hv_driver_qemu::{Accel, QemuDriver, QemuOptions};
use hv_types::{InstanceId, InstanceSpec, Metadata};
use rustix::process::{Pid, Signal, kill_process};

/// A boot sector. It enables the power button (port 0x602 of q35's ACPI, bit 8), prints a greeting on the first serial
/// port, then echoes what comes in, looking at the line and at the power button (port 0x600) after each timer tick,
/// and powers off (port 0x604, `SLP_EN`) when the button is pressed. Assembled from:
///
/// ```text
/// xor ax,ax; mov ds,ax; mov ss,ax; mov sp,0x7c00; cld; sti
/// mov dx,0x3fa; mov al,1; out dx,al            ; the port's queue
/// mov dx,0x602; mov ax,0x100; out dx,ax        ; the power button
/// mov si,greeting
/// print: lodsb; test al,al; jz printed; call put; jmp print
/// printed: cmp byte [ends],0; jne off
/// wait: mov dx,0x3fd; in al,dx; test al,1; jz quiet; mov dx,0x3f8; in al,dx; call put; jmp wait
/// quiet: mov dx,0x600; in ax,dx; test ah,1; jnz off; hlt; jmp wait
/// off: mov dx,0x604; mov ax,0x2000; out dx,ax; hlt; jmp off
/// put: mov dx,0x3f8; out dx,al; ret
/// ends: db 0
/// greeting: db "sector-guest: hello",13,10,0
/// ```
const SECTOR_GUEST: &str = "31c08ed88ed0bc007cfcfbbafa03b001eeba0206b80001efbe597cac84c07405e83000ebf6803e587c00751dbafd03ec\
a8017409baf803ece81800ebefba0006edf6c4017503f4ebe3ba0406b80020eff4ebf6baf803eec300736563746f722d67756573743a2068656c6c\
6f0d0a00";
/// Where the guest looks whether it is to power off after its greeting.
const ENDS_AT: usize = 0x58;

pub(crate) struct QemuSubject {
    _dir: tempfile::TempDir,
    pub(crate) options: QemuOptions,
    pub(crate) spec: InstanceSpec,
    greeting: &'static str,
}

/// With a state directory that is longer than a socket's address may be, and full of characters that mean something to
/// QEMU, shells and JSON.
pub(crate) async fn setup() -> Option<QemuSubject> {
    let odd = format!("a,b=c \"d\" 'e' ü $(f) {}", "x".repeat(120));
    QemuSubject::new(&odd)
}

/// Says why a suite did not run, on standard error and in the file that collects it.
pub(crate) fn skip(suite: &str, reason: &str) {
    use std::io::Write as _;
    eprintln!("skipped {suite}: {reason}");
    if let Some(path) = std::env::var_os("HYPERVISOR_SKIP_LOG") {
        let mut log =
            fs::OpenOptions::new().create(true).append(true).open(path).expect("the skip log opens");
        writeln!(log, "{suite}: {reason}").expect("the skip log is written");
    }
}

/// Whether a program is installed.
fn has(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}

impl QemuSubject {
    pub(crate) fn new(state_name: &str) -> Option<Self> {
        if !has("qemu-system-x86_64") || !has("qemu-img") {
            skip("hv-driver-qemu", "qemu is not installed; apt-get install qemu-system-x86 qemu-utils");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let image_dir = dir.path().join("images, \"all\"");
        fs::create_dir(&image_dir).unwrap();
        fs::write(image_dir.join("sector.raw"), sector(false)).unwrap();
        fs::write(image_dir.join("quits.raw"), sector(true)).unwrap();
        // Whether KVM works is not what the suite is about; finding out takes half a second each time.
        let options = QemuOptions {
            state_dir: dir.path().join(state_name),
            image_dir,
            accel: Accel::Tcg,
            ..QemuOptions::default()
        };
        let spec = InstanceSpec {
            image: "sector".to_owned(),
            cpu_cores: 1,
            memory_bytes: 32 << 20,
            ..InstanceSpec::default()
        };
        Some(Self { _dir: dir, options, spec, greeting: "sector-guest: hello" })
    }

    pub(crate) fn qemu(&self) -> QemuDriver {
        QemuDriver::new(self.options.clone())
    }

    pub(crate) fn config(&self, name: &str) -> InstanceConfig {
        let (id, spec, metadata) = (InstanceId::generate(), self.spec.clone(), Metadata::default());
        InstanceConfig { id, name: name.to_owned(), spec, metadata, image: None }
    }

    pub(crate) fn instance_dir(&self, id: &InstanceId) -> PathBuf {
        self.options.state_dir.join(id.as_str())
    }

    /// The QEMU processes that run for an instance.
    pub(crate) fn pids(&self, id: &InstanceId) -> Vec<i32> {
        let own = self.instance_dir(id);
        processes_in(&self.options.state_dir)
            .into_iter()
            .filter(|(_, cwd)| cwd.starts_with(&own))
            .map(|(p, _)| p)
            .collect()
    }
}

impl Drop for QemuSubject {
    /// A claim that failed leaves processes.
    fn drop(&mut self) {
        for (pid, _) in processes_in(&self.options.state_dir) {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }
}

fn sector(ends: bool) -> Vec<u8> {
    let digit = |byte: u8| (byte as char).to_digit(16).unwrap() as u8;
    let mut disk: Vec<u8> =
        SECTOR_GUEST.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect();
    disk[ENDS_AT] = u8::from(ends);
    disk.resize(510, 0);
    disk.extend([0x55, 0xaa]);
    // The firmware takes nothing smaller than a cylinder of 16 heads and 63 sectors for a disk.
    disk.resize(1 << 20, 0);
    disk
}

/// Processes that work in a directory or below, with where exactly. What has ended and was not waited for does not.
fn processes_in(dir: &Path) -> Vec<(i32, PathBuf)> {
    let all =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let with_cwd = all.filter_map(|pid: i32| Some((pid, fs::read_link(format!("/proc/{pid}/cwd")).ok()?)));
    with_cwd.filter(|(_, cwd)| cwd.starts_with(dir)).collect()
}

fn files_below(dir: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        found.push(path.display().to_string());
        if path.is_dir() {
            files_below(&path, found);
        }
    }
}

#[async_trait]
impl Subject for QemuSubject {
    fn driver(&self) -> Arc<dyn Driver> {
        Arc::new(self.qemu())
    }

    fn spec(&self) -> InstanceSpec {
        self.spec.clone()
    }

    fn greeting(&self) -> &str {
        self.greeting
    }

    fn make_short_lived(&self, config: &mut InstanceConfig) {
        config.spec.image = "quits".to_owned();
    }

    fn leave_half_created(&self, config: &InstanceConfig) {
        let dir = self.instance_dir(&config.id);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("boot.qcow2"), "a part").unwrap();
        fs::write(dir.join("config.json.partial"), "{").unwrap();
    }

    async fn kill(&self, id: &InstanceId) {
        for pid in self.pids(id) {
            kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        }
        let begun = Instant::now();
        while !self.pids(id).is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(10), "it cannot be killed");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn copies(&self, id: &InstanceId) -> usize {
        self.pids(id).len()
    }

    fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        files_below(&self.options.state_dir, &mut found);
        found.extend(
            processes_in(&self.options.state_dir).into_iter().map(|(pid, _)| format!("process {pid}")),
        );
        found.sort();
        found
    }
}
