//! A libvirt driver in a private directory, with a guest of one disk sector that needs no time to boot.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use hv_driver::conformance::{Counter, Grows, Measured, Subject};
use hv_driver::{DiskFormat, Driver, ImageContent, InstanceConfig, LocalImage, Storage};
use hv_driver_libvirt::{Accel, LibvirtDriver, LibvirtOptions};
use hv_types::{InstanceId, InstanceSpec, Metadata};

use crate::daemon::{Libvirtd, kill_pid, processes_with};

/// A boot sector. It enables the power button (port 0x602 of q35's ACPI, bit 8), prints a greeting on the first serial
/// port, then echoes what comes in, looking at the line and at the power button (port 0x600) after each timer tick,
/// and powers off (port 0x604, `SLP_EN`) when the button is pressed. A `?` counts in memory, a `!` in the second sector
/// of the boot disk; both print the number. Assembled from:
///
/// ```text
/// xor ax,ax; mov ds,ax; mov es,ax; mov ss,ax; mov sp,0x7c00; cld; sti; mov [drive],dl
/// mov dx,0x3fa; mov al,1; out dx,al            ; the port's queue
/// mov dx,0x602; mov ax,0x100; out dx,ax        ; the power button
/// mov si,greeting; call print; cmp byte [ends],0; jne off
/// wait: mov dx,0x3fd; in al,dx; test al,1; jz quiet; mov dx,0x3f8; in al,dx
/// cmp al,'?'; je memory; cmp al,'!'; je disk; call put; jmp wait
/// quiet: mov dx,0x600; in ax,dx; test ah,1; jnz off; hlt; jmp wait
/// off: mov dx,0x604; mov ax,0x2000; out dx,ax; hlt; jmp off
/// memory: inc word [count]; mov si,ofmem; call print; mov ax,[count]; jmp tell
/// disk: mov ax,0x201; call io; inc word [0x7e00]; mov ax,0x301; call io; mov si,ofdisk; call print; mov ax,[0x7e00]
/// tell: xor cx,cx; mov bx,10
/// digit: xor dx,dx; div bx; push dx; inc cx; test ax,ax; jnz digit
/// say: pop ax; add al,'0'; call put; loop say; mov si,line; call print; jmp wait
/// io: mov bx,0x7e00; mov cx,2; mov dl,[drive]; mov dh,0; int 0x13; ret
/// print: lodsb; test al,al; jz done; call put; jmp print
/// put: mov dx,0x3f8; out dx,al
/// done: ret
/// ends: db 0    drive: db 0    count: dw 0
/// greeting: db "sector-guest: hello",13,10,0    ofmem: db "count=",0    ofdisk: db "disk=",0    line: db 13,10,0
/// ```
const SECTOR_GUEST: &str = "31c08ed88ec08ed0bc007cfcfb8816c07cbafa03b001eeba0206b80001efbec37ce88c00803ebf7c007525bafd03eca80174\
11baf803ec3c3f741f3c21742ae87800ebe7ba0006edf6c4017503f4ebdbba0406b80020eff4ebf6ff06c17cbed97ce84c00\
a1c17ceb19b80102e83200ff06007eb80103e82800bee07ce83100a1007e31c9bb0a0031d2f7f3524185c075f6580430e823\
00e2f8bee67ce81100eb8abb007eb902008a16c07cb600cd13c3ac84c07409e80200ebf6baf803eec300000000736563746f\
722d67756573743a2068656c6c6f0d0a00636f756e743d006469736b3d000d0a00";
/// Where the guest looks whether it is to power off after its greeting.
const ENDS_AT: usize = 0xbf;

pub(crate) struct LibvirtSubject {
    _dir: tempfile::TempDir,
    pub(crate) daemon: Libvirtd,
    /// The other node's libvirtd, if it was asked for.
    second: std::sync::Mutex<Option<Libvirtd>>,
    pub(crate) options: LibvirtOptions,
    pub(crate) spec: InstanceSpec,
    greeting: &'static str,
}

/// With a state directory full of characters that mean something to XML, QEMU and shells.
pub(crate) async fn setup() -> Option<LibvirtSubject> {
    LibvirtSubject::new("a,b=<c> \"d\" 'e' &ü;")
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
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Whether libvirtd can be run here; says so if not.
pub(crate) fn can_run() -> bool {
    for (program, package) in [
        ("libvirtd", "libvirt-daemon libvirt-daemon-driver-qemu"),
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("qemu-img", "qemu-utils"),
        ("unshare", "util-linux"),
    ] {
        if !has(program) {
            skip("hv-driver-libvirt", &format!("{program} is not installed; apt-get install {package}"));
            return false;
        }
    }
    if !rustix::process::geteuid().is_root() {
        skip("hv-driver-libvirt", "libvirtd is started by root only");
        return false;
    }
    true
}

impl LibvirtSubject {
    pub(crate) fn new(state_name: &str) -> Option<Self> {
        can_run().then(|| Self::over(Libvirtd::shared("first"), state_name))
    }

    /// Over a libvirtd of its own.
    pub(crate) fn over(daemon: Libvirtd, state_name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image_dir = dir.path().join("images, \"all\"");
        fs::create_dir(&image_dir).unwrap();
        fs::write(image_dir.join("sector.raw"), sector(false)).unwrap();
        fs::write(image_dir.join("quits.raw"), sector(true)).unwrap();
        // Whether KVM works is not what the suite is about; finding out takes half a second each time.
        let options = LibvirtOptions {
            state_dir: dir.path().join(state_name),
            image_dir,
            accel: Accel::Tcg,
            uri: daemon.uri(),
            // libvirtd looks at each emulator once.
            emulator: Some(daemon.dir.join("emulator")),
            ..LibvirtOptions::default()
        };
        let spec = InstanceSpec {
            image: "sector".to_owned(),
            cpu_cores: 1,
            memory_bytes: 32 << 20,
            ..InstanceSpec::default()
        };
        Self {
            _dir: dir,
            daemon,
            second: std::sync::Mutex::default(),
            options,
            spec,
            greeting: "sector-guest: hello",
        }
    }

    /// The configuration of another node, with a libvirtd and a state of its own.
    pub(crate) fn second_options(&self) -> LibvirtOptions {
        let mut second = self.second.lock().unwrap();
        let daemon = second.get_or_insert_with(|| Libvirtd::shared("second"));
        LibvirtOptions {
            uri: daemon.uri(),
            emulator: Some(daemon.dir.join("emulator")),
            state_dir: self._dir.path().join("2nd <node> & 'state'"),
            ..self.options.clone()
        }
    }

    pub(crate) fn libvirt(&self) -> LibvirtDriver {
        LibvirtDriver::new(self.options.clone())
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

    /// The QEMU processes that run for an instance, or are about to.
    pub(crate) fn pids(&self, id: &InstanceId) -> Vec<i32> {
        processes_with(&format!("guest=hv-{id},"))
    }

    fn all_pids(&self) -> Vec<i32> {
        let ids = fs::read_dir(&self.options.state_dir).into_iter().flatten();
        ids.flat_map(|entry| processes_with(&format!("guest=hv-{},", entry.unwrap().file_name().display())))
            .collect()
    }

    fn pool(&self) -> PathBuf {
        self._dir.path().join("pool-disks")
    }

    /// Makes disks in a storage pool that both libvirtds have.
    pub(crate) fn use_pool(&mut self) {
        fs::create_dir(self.pool()).unwrap();
        let name = format!("pool-{}", InstanceId::generate());
        let directory = self.pool().display().to_string();
        for uri in [self.daemon.uri(), self.second_options().uri] {
            virsh(&uri, &["pool-create-as", &name, "dir", "--target", &directory]);
        }
        self.options.default_storage_pool = name;
    }

    /// What the libvirtds would keep knowing.
    pub(crate) fn forget_pool(&self) {
        for uri in [self.daemon.uri(), self.second_options().uri] {
            virsh(&uri, &["pool-destroy", &self.options.default_storage_pool]);
        }
    }

    fn is_locked(&self, id: &InstanceId) -> bool {
        let Ok(lock) = fs::File::open(self.instance_dir(id).join("lock")) else { return false };
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockShared).is_err()
    }

    fn counting(&self, ask: &str, answer: &str) -> Counter {
        Counter {
            spec: self.spec.clone(),
            ask: ask.to_owned(),
            answer: answer.to_owned(),
            grows: Grows::WhenAsked,
        }
    }

    fn virsh(&self, arguments: &[&str]) -> String {
        virsh(&self.daemon.uri(), arguments)
    }

    /// The domains that libvirtd knows of this subject, on both nodes: address and name.
    fn domains(&self) -> Vec<(String, String)> {
        let marker = self._dir.path().display().to_string();
        let second = self.second.lock().unwrap().as_ref().map(Libvirtd::uri);
        let of = |uri: String| {
            let names = virsh(&uri, &["list", "--all", "--name"]);
            let ours =
                names.split_whitespace().filter(|name| virsh(&uri, &["dumpxml", name]).contains(&marker));
            ours.map(|name| (uri.clone(), name.to_owned())).collect::<Vec<_>>()
        };
        [Some(self.daemon.uri()), second].into_iter().flatten().flat_map(of).collect()
    }
}

/// Asks a libvirtd with libvirt's own tool.
pub(crate) fn virsh(uri: &str, arguments: &[&str]) -> String {
    let output = Command::new("virsh").args(["-q", "-c", uri]).args(arguments).output();
    String::from_utf8_lossy(&output.unwrap().stdout).into_owned()
}

impl Drop for LibvirtSubject {
    /// A claim that failed leaves processes and domains.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.all_pids().into_iter().for_each(kill_pid);
            for (uri, name) in self.domains() {
                virsh(&uri, &["destroy", &name]);
                virsh(&uri, &["undefine", "--nvram", "--snapshots-metadata", "--managed-save", &name]);
            }
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
impl Subject for LibvirtSubject {
    fn driver(&self) -> Arc<dyn Driver> {
        Arc::new(self.libvirt())
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
            kill_pid(pid);
        }
        let begun = Instant::now();
        while self.copies(id) > 0 {
            assert!(begun.elapsed() < Duration::from_secs(10), "it cannot be killed");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// A process that is just ending has no command line any more, and still has its lock.
    fn copies(&self, id: &InstanceId) -> usize {
        let pids = self.pids(id).len();
        if pids == 0 { usize::from(self.is_locked(id)) } else { pids }
    }

    fn storage(&self) -> Vec<Storage> {
        vec![if self.pool().exists() { Storage::Shared } else { Storage::Copied }]
    }

    fn second_driver(&self) -> Option<Arc<dyn Driver>> {
        Some(Arc::new(LibvirtDriver::new(self.second_options())))
    }

    fn counter(&self) -> Option<Counter> {
        Some(self.counting("?\n", "count="))
    }

    fn disk_counter(&self) -> Option<Counter> {
        Some(self.counting("!\n", "disk="))
    }

    /// The suite's guest again, made to say something else first.
    fn rescue_image(&self) -> Option<(String, String)> {
        let (from, to) = (&b"sector-guest"[..], b"rescue-guest");
        let mut disk = sector(false);
        let at = disk.windows(from.len()).position(|at| at == from).unwrap();
        disk[at..at + from.len()].copy_from_slice(to);
        fs::write(self.options.image_dir.join("rescue.raw"), disk).unwrap();
        Some(("rescue".to_owned(), "rescue-guest: hello".to_owned()))
    }

    fn local_image(&self) -> Option<LocalImage> {
        let path = self.options.image_dir.join("sector.raw");
        let content = ImageContent::Disk { path, format: DiskFormat::Raw };
        Some(LocalImage { digest: format!("sha256:{}", "5".repeat(64)), content })
    }

    async fn measured(&self, id: &InstanceId) -> Option<Measured> {
        let xml = self.virsh(&["dumpxml", &format!("hv-{id}")]);
        let cores = xml.split("current='").nth(1).or_else(|| xml.split("<vcpu placement='static'>").nth(1));
        let cores = cores?.split(['\'', '<']).next()?.parse().ok();
        let memory = xml.split("<memory unit='KiB'>").nth(1)?.split('<').next()?.parse::<u64>().ok();
        let sizes = |target: &str| {
            let info = self.virsh(&["domblkinfo", &format!("hv-{id}"), target]);
            info.lines().find_map(|line| line.strip_prefix("Capacity:")?.trim().parse::<u64>().ok())
        };
        let targets = xml.split("<target dev='").skip(1).filter_map(|rest| rest.split('\'').next());
        let mut disks: Vec<_> = targets.filter(|target| target.starts_with("sd")).filter_map(sizes).collect();
        disks.sort_unstable();
        Some(Measured { cpu_cores: cores, memory_bytes: memory.map(|kib| kib << 10), disks: Some(disks) })
    }

    fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        files_below(&self.options.state_dir, &mut found);
        files_below(&self.pool(), &mut found);
        files_below(&self._dir.path().join("2nd <node> & 'state'"), &mut found);
        found.extend(self.domains().into_iter().map(|(_, name)| format!("domain {name}")));
        found.sort();
        found
    }
}
