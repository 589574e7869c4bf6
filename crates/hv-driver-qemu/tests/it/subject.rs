//! A QEMU driver in a private directory, with a guest of one disk sector that needs no time to boot.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use hv_driver::conformance::{Counter, Grows, Subject};
use hv_driver::{DiskFormat, Driver, ImageContent, InstanceConfig, LocalImage, Storage};
use hv_driver_qemu::{Accel, QemuDriver, QemuOptions};
use hv_types::{InstanceId, InstanceSpec, Metadata};
use rustix::process::{Pid, Signal, kill_process};

/// A boot sector. It enables the power button (port 0x602 of q35's ACPI, bit 8), prints a greeting on the first serial
/// port, then echoes what comes in, looking at the line and at the power button (port 0x600) after each timer tick,
/// and powers off (port 0x604, `SLP_EN`) when the button is pressed. It lets go of every device that it is asked for. Assembled from:
///
/// ```text
/// xor ax,ax; mov ds,ax; mov ss,ax; mov sp,0x7c00; cld; sti
/// mov dx,0x3fa; mov al,1; out dx,al            ; the port's queue
/// mov dx,0x602; mov ax,0x100; out dx,ax        ; the power button
/// mov si,greeting
/// print: lodsb; test al,al; jz printed; call put; jmp print
/// printed: cmp byte [ends],0; jne off
/// wait: mov dx,0x3fd; in al,dx; test al,1; jz quiet; mov dx,0x3f8; in al,dx; call put; jmp wait
/// quiet: mov dx,0x600; in ax,dx; test ah,1; jnz off
/// xor ecx,ecx                                  ; let devices go: select a bus (ACPI hot plug of q35), ask, eject
/// next: mov dx,0xcd0; mov eax,ecx; out dx,eax; mov dx,0xcc4; in eax,dx; test eax,eax; jz kept
/// mov dx,0xcc8; out dx,eax
/// kept: inc cx; cmp cx,64; jb next; hlt; jmp wait
/// off: mov dx,0x604; mov ax,0x2000; out dx,ax; hlt; jmp off
/// put: mov dx,0x3f8; out dx,al; ret
/// ends: db 0
/// greeting: db "sector-guest: hello",13,10,0
/// ```
const SECTOR_GUEST: &str = "31c08ed88ed0bc007cfcfbbafa03b001eeba0206b80001efbe797cac84c07405e85000ebf6803e787c00753dba\
fd03eca8017409baf803ece83800ebefba0006edf6c40175236631c9bad00c6689c866efbac40c66ed6685c07405bac80c66ef4183f94072e3f4eb\
c3ba0406b80020eff4ebf6baf803eec300736563746f722d67756573743a2068656c6c6f0d0a00";
/// Where the guest looks whether it is to power off after its greeting.
const ENDS_AT: usize = 0x78;

/// Another one, which never rests: it writes to each page of 2 MiB and counts its rounds. It prints the count when `?` is
/// typed, and echoes what else is. Assembled from what the first one has, and:
///
/// ```text
/// cli; lgdt [gdtr]; mov eax,cr0; or al,1; mov cr0,eax; mov bx,8; mov es,bx   ; a flat segment
/// and al,0xfe; mov cr0,eax; sti
/// round: mov eax,[count]; inc eax; mov [count],eax; mov edi,0x400000
/// page: mov es:[edi],eax; add edi,0x1000; cmp edi,0x600000; jb page
/// (serial port: none: quiet) cmp al,'?'; je answer; call put; jmp round
/// answer: mov si,is; call print; mov eax,[count]; xor cx,cx; mov ebx,10
/// digit: xor edx,edx; div ebx; push dx; inc cx; test eax,eax; jnz digit
/// say: pop ax; add al,'0'; call put; loop say; mov al,13; call put; mov al,10; call put; jmp round
/// quiet: mov dx,0x600; in ax,dx; test ah,1; jz round; (off)
/// is: db "n=",0
/// greeting: db "counter-guest: hello",13,10,0
/// ```
const COUNTER_GUEST: &str = "31c08ed88ed0bc007cfcfbbafa03b001eeba0206b80001effa660f0116e07c0f20c00c010f22c0bb08008ec324\
fe0f22c0fbbee97ce8870066a1cc7c664066a3cc7c66bf0000400026676689076681c7001000006681ff0000600072ebbafd03eca8017440baf803\
ec3c3f7405e84800ebc6bee67ce8470066a1cc7c31c966bb0a0000006631d266f7f352416685c075f3580430e82100e2f8b00de81a00b00ae81500\
eb93ba0006edf6c401748aba0406b80020eff4ebf652baf803ee5ac3ac84c07405e8f1ffebf6c36690000000000000000000000000ffff00000092\
cf000f00d07c00006e3d00636f756e7465722d67756573743a2068656c6c6f0d0a00";

/// With a second node, whose state is another, and a directory for disks that both see.
struct Second {
    state_dir: PathBuf,
    disk_dir: PathBuf,
}

pub(crate) struct QemuSubject {
    second: Option<Second>,
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

/// Two nodes that share a directory for disks.
pub(crate) async fn two_nodes() -> Option<QemuSubject> {
    let mut subject = setup().await?;
    let dir = subject._dir.path();
    let second = Second { state_dir: dir.join("second"), disk_dir: dir.join("disks, \"shared\"") };
    subject.second = Some(second);
    Some(subject)
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
        fs::write(image_dir.join("sector.raw"), sector(SECTOR_GUEST, false)).unwrap();
        fs::write(image_dir.join("quits.raw"), sector(SECTOR_GUEST, true)).unwrap();
        fs::write(image_dir.join("counter.raw"), sector(COUNTER_GUEST, false)).unwrap();
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
            // As much as it takes to double it while it runs.
            memory_bytes: 128 << 20,
            ..InstanceSpec::default()
        };
        Some(Self { second: None, _dir: dir, options, spec, greeting: "sector-guest: hello" })
    }

    pub(crate) fn qemu(&self) -> QemuDriver {
        let driver = QemuDriver::new(self.options.clone());
        match &self.second {
            Some(second) => driver.with_disk_dir(&second.disk_dir),
            None => driver,
        }
    }

    /// The driver of the second node.
    pub(crate) fn other_qemu(&self) -> QemuDriver {
        let second = self.second.as_ref().expect("two nodes");
        let options = QemuOptions { state_dir: second.state_dir.clone(), ..self.options.clone() };
        QemuDriver::new(options).with_disk_dir(&second.disk_dir)
    }

    /// Kills what runs for an instance on one node, behind the driver's back.
    pub(crate) async fn kill_at(&self, second: bool, id: &InstanceId) {
        let dir = self.state_dirs()[usize::from(second)].join(id.as_str());
        for (pid, _) in processes_in(&dir) {
            kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        }
        let begun = Instant::now();
        while !processes_in(&dir).is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(10), "it cannot be killed");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn state_dirs(&self) -> Vec<PathBuf> {
        let second = self.second.as_ref().map(|second| second.state_dir.clone());
        std::iter::once(self.options.state_dir.clone()).chain(second).collect()
    }

    /// The processes of all instances, on both nodes.
    fn processes(&self) -> Vec<(i32, PathBuf)> {
        self.state_dirs().iter().flat_map(|dir| processes_in(dir)).collect()
    }

    pub(crate) fn config(&self, name: &str) -> InstanceConfig {
        let (id, spec, metadata) = (InstanceId::generate(), self.spec.clone(), Metadata::default());
        InstanceConfig {
            id,
            name: name.to_owned(),
            spec,
            metadata,
            image: None,
            rescue_image: None,
            devices: None,
        }
    }

    pub(crate) fn instance_dir(&self, id: &InstanceId) -> PathBuf {
        self.options.state_dir.join(id.as_str())
    }

    /// The QEMU processes that run for an instance.
    pub(crate) fn pids(&self, id: &InstanceId) -> Vec<i32> {
        let own: Vec<_> = self.state_dirs().iter().map(|dir| dir.join(id.as_str())).collect();
        let is_own = |cwd: &Path| own.iter().any(|own| cwd.starts_with(own));
        self.processes().into_iter().filter(|(_, cwd)| is_own(cwd)).map(|(p, _)| p).collect()
    }
}

impl Drop for QemuSubject {
    /// A claim that failed leaves processes.
    fn drop(&mut self) {
        for (pid, _) in self.processes() {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }
}

fn sector(guest: &str, ends: bool) -> Vec<u8> {
    let digit = |byte: u8| (byte as char).to_digit(16).unwrap() as u8;
    let mut disk: Vec<u8> =
        guest.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect();
    if ends {
        disk[ENDS_AT] = 1;
    }
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

    fn second_driver(&self) -> Option<Arc<dyn Driver>> {
        self.second.as_ref().map(|_| Arc::new(self.other_qemu()) as Arc<dyn Driver>)
    }

    fn storage(&self) -> Vec<Storage> {
        vec![Storage::Copied, Storage::Shared]
    }

    fn counter(&self) -> Option<Counter> {
        let spec = InstanceSpec { image: "counter".to_owned(), ..self.spec.clone() };
        Some(Counter { spec, ask: "?".to_owned(), answer: "n=".to_owned(), grows: Grows::ByItself })
    }

    fn rescue_image(&self) -> Option<(String, String)> {
        Some(("counter".to_owned(), "counter-guest: hello".to_owned()))
    }

    fn local_image(&self) -> Option<LocalImage> {
        let content =
            ImageContent::Disk { path: self.options.image_dir.join("sector.raw"), format: DiskFormat::Raw };
        Some(LocalImage { digest: format!("sha256:{}", "0".repeat(64)), content })
    }

    async fn leave_half_snapshot(&self, id: &InstanceId, name: &str) -> bool {
        let Some(second) = &self.second else { return false };
        let disk = second.disk_dir.join(id.as_str()).join("boot.qcow2");
        let made =
            Command::new("qemu-img").args(["snapshot", "-c", &format!("hv.{name}")]).arg(disk).status();
        made.unwrap().success()
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
        let disks = self.second.as_ref().map(|second| second.disk_dir.clone());
        for dir in self.state_dirs().into_iter().chain(disks) {
            files_below(&dir, &mut found);
        }
        found.extend(self.processes().into_iter().map(|(pid, _)| format!("process {pid}")));
        found.sort();
        found
    }
}
