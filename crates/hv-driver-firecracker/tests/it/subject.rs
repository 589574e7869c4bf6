//! A Firecracker driver in a private directory, over the real VMM or over its double, with a bare-metal guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use hv_driver::conformance::{Counter, Grows, Measured, Subject};
use hv_driver::{Console, Driver, ImageContent, Input, InstanceConfig, LocalImage};
use hv_driver_firecracker::{FirecrackerDriver, FirecrackerOptions};
use hv_types::{InstanceId, InstanceSpec, Metadata};
use rustix::process::{Pid, Signal, kill_process};

use crate::double;
use crate::guests::guest;

/// What the guest of the suite prints first.
pub(crate) const GREETING: &str = "microvm-guest: hello";
/// What the guest of the rescue image prints first.
pub(crate) const RESCUE_GREETING: &str = "microvm-saver: hello";
/// How long anything may take that a test waits for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// The version that the project's setup script installs.
const VERSION: &str = "1.12.1";
/// Each test process takes so many user ids, which also name its tap interfaces.
const UIDS_PER_PROCESS: u32 = 64;

pub(crate) struct FirecrackerSubject {
    _dir: tempfile::TempDir,
    pub(crate) options: FirecrackerOptions,
    pub(crate) spec: InstanceSpec,
    is_double: bool,
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

/// The VMM: `FIRECRACKER_BIN`, or where the setup script puts it.
fn binary() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(binary) = var("FIRECRACKER_BIN") {
        return Some(binary);
    }
    let cache = var("HYPERVISOR_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|dir| dir.join("hypervisor")))
        .or_else(|| var("HOME").map(|dir| dir.join(".cache/hypervisor")))?;
    Some(cache.join(format!("tools/firecracker-{VERSION}/firecracker"))).filter(|path| path.is_file())
}

/// What keeps the real VMM from running guests here.
fn missing() -> Option<&'static str> {
    if !cfg!(target_arch = "x86_64") {
        return Some("the bare-metal guests are for x86-64");
    }
    if binary().is_none() {
        return Some("firecracker is not installed; run hack/setup.sh tools");
    }
    if fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        return Some("/dev/kvm cannot be used");
    }
    None
}

/// On the real VMM, jailed where the tests run as root. The state directory is longer than a socket's address may be, and
/// full of characters that mean something to shells and JSON.
pub(crate) async fn real() -> Option<FirecrackerSubject> {
    if let Some(reason) = missing() {
        skip("hv-driver-firecracker on firecracker", reason);
        return None;
    }
    let odd = format!("a,b c \"d\" 'e' ü $(f) {}", "x".repeat(100));
    FirecrackerSubject::new(&odd, false, |options| options.binary = binary())
}

/// On the double.
pub(crate) async fn doubled() -> Option<FirecrackerSubject> {
    FirecrackerSubject::new("state", true, |options| {
        options.binary = Some(double::install(&options.image_dir));
        options.use_jailer = false;
        // It is opened and nothing else.
        options.kvm = PathBuf::from("/dev/null");
    })
}

impl FirecrackerSubject {
    fn new(state_name: &str, is_double: bool, adjust: impl FnOnce(&mut FirecrackerOptions)) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let image_dir = dir.path().join("images, \"all\"");
        fs::create_dir(&image_dir).unwrap();
        let console = match guest("console") {
            Ok(path) => path,
            Err(reason) => {
                skip("hv-driver-firecracker", &reason);
                return None;
            }
        };
        fs::copy(console, image_dir.join("console.elf")).unwrap();
        let uid_base = 300_000 + (std::process::id() % 1_000_000) * UIDS_PER_PROCESS;
        let mut options = FirecrackerOptions {
            state_dir: dir.path().join(state_name),
            image_dir,
            uid_base,
            ..FirecrackerOptions::default()
        };
        adjust(&mut options);
        let spec = InstanceSpec {
            image: "console".to_owned(),
            cpu_cores: 1,
            memory_bytes: 16 << 20,
            ..InstanceSpec::default()
        };
        Some(Self { _dir: dir, options, spec, is_double })
    }

    /// Offers a guest beside the suite's.
    pub(crate) fn with_guest(mut self, name: &str) -> Self {
        let built = guest(name).expect("gcc built the first guest");
        fs::copy(built, self.options.image_dir.join(format!("{name}.elf"))).unwrap();
        self.spec.image = name.to_owned();
        self
    }

    pub(crate) fn firecracker(&self) -> FirecrackerDriver {
        FirecrackerDriver::new(self.options.clone())
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

    /// A guest that counts, as the suite asks it.
    fn counter_of(&self, spec: InstanceSpec, grows: Grows) -> Counter {
        Counter { spec, ask: "!count\n".to_owned(), answer: "count=".to_owned(), grows }
    }

    /// A new instance that runs.
    pub(crate) async fn running(&self, name: &str) -> (FirecrackerDriver, InstanceConfig) {
        let (driver, config) = (self.firecracker(), self.config(name));
        driver.create(&config).await.unwrap();
        driver.start(&config.id).await.unwrap();
        (driver, config)
    }

    pub(crate) fn instance_dir(&self, id: &InstanceId) -> PathBuf {
        self.options.state_dir.join(id.as_str())
    }

    /// The tap interfaces of this process's instances.
    fn taps(&self) -> Vec<String> {
        let own = self.options.uid_base..self.options.uid_base + UIDS_PER_PROCESS;
        let names = fs::read_dir("/sys/class/net").unwrap();
        let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let uid_of = |name: &str| name.strip_prefix("hvfc")?.parse::<u32>().ok();
        names.filter(|name| uid_of(name).is_some_and(|uid| own.contains(&uid))).collect()
    }

    /// The VMM's root directory.
    pub(crate) fn root(&self, id: &InstanceId) -> PathBuf {
        let jail = fs::read_dir(self.instance_dir(id).join("jail")).unwrap().next().unwrap().unwrap();
        jail.path().join(id.as_str()).join("root")
    }

    /// The processes that have an instance's lock as their standard input.
    pub(crate) fn pids(&self, id: &InstanceId) -> Vec<i32> {
        let own = self.instance_dir(id);
        processes_of(&self.options.state_dir)
            .into_iter()
            .filter(|(_, lock)| lock.starts_with(&own))
            .map(|(pid, _)| pid)
            .collect()
    }
}

impl Drop for FirecrackerSubject {
    /// A claim that failed leaves processes.
    fn drop(&mut self) {
        for (pid, _) in processes_of(&self.options.state_dir) {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
        for tap in self.taps() {
            let _ = std::process::Command::new("ip").args(["link", "delete", &tap]).output();
        }
    }
}

/// Processes whose standard input is a file in a directory or below, with that file. What has ended and was not waited
/// for has none.
fn processes_of(dir: &Path) -> Vec<(i32, PathBuf)> {
    let all =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let with_lock = all.filter_map(|pid: i32| Some((pid, fs::read_link(format!("/proc/{pid}/fd/0")).ok()?)));
    with_lock.filter(|(_, lock)| lock.starts_with(dir)).collect()
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

/// Reads a console until a text was printed, and returns all that was printed.
pub(crate) async fn read_until(console: &mut Console, text: &str) -> String {
    let mut printed = Vec::new();
    let work = async {
        while !String::from_utf8_lossy(&printed).contains(text) {
            let piece = console.output.next().await;
            let piece = piece
                .unwrap_or_else(|| panic!("ended before {text:?}: {}", String::from_utf8_lossy(&printed)));
            printed.extend_from_slice(&piece.unwrap());
        }
    };
    let outcome = tokio::time::timeout(PATIENCE, work).await;
    let printed = String::from_utf8_lossy(&printed).into_owned();
    assert!(outcome.is_ok(), "waited in vain for {text:?}: {printed}");
    printed
}

pub(crate) async fn type_line(console: &Console, line: &str) {
    console.input.send(Input::Data(Bytes::copy_from_slice(line.as_bytes()))).await.unwrap();
}

/// How far the suite's guest has counted.
pub(crate) async fn count(driver: &FirecrackerDriver, id: &InstanceId) -> u64 {
    static ASKED: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let mut console = driver.console(id).await.unwrap();
    // The mark tells this answer from those in the history.
    let number = ASKED.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let mark = format!("mark-{number}-{}.", std::process::id());
    type_line(&console, &format!("{mark}\n!count\n")).await;
    let mut printed = read_until(&mut console, &mark).await;
    while !printed
        .rsplit(&mark)
        .next()
        .is_some_and(|rest| rest.split_once("count=").is_some_and(|(_, n)| n.contains('\n')))
    {
        let piece = tokio::time::timeout(PATIENCE, console.output.next()).await.unwrap().unwrap().unwrap();
        printed.push_str(&String::from_utf8_lossy(&piece));
    }
    let rest = printed.rsplit(&mark).next().unwrap();
    rest.split_once("count=").unwrap().1.lines().next().unwrap().trim().parse().unwrap()
}

#[async_trait]
impl Subject for FirecrackerSubject {
    fn driver(&self) -> Arc<dyn Driver> {
        Arc::new(self.firecracker())
    }

    fn spec(&self) -> InstanceSpec {
        self.spec.clone()
    }

    fn greeting(&self) -> &str {
        GREETING
    }

    fn make_short_lived(&self, config: &mut InstanceConfig) {
        config.spec.kernel_args = "quit".to_owned();
    }

    fn leave_half_created(&self, config: &InstanceConfig) {
        let dir = self.instance_dir(&config.id);
        let root = dir.join("jail/firecracker").join(config.id.as_str()).join("root");
        fs::create_dir_all(&root).unwrap();
        fs::write(root.join("kernel"), "a part").unwrap();
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
            processes_of(&self.options.state_dir).into_iter().map(|(pid, _)| format!("process {pid}")),
        );
        found.extend(self.taps());
        found.sort();
        found
    }

    fn counter(&self) -> Option<Counter> {
        Some(self.counter_of(self.spec(), Grows::ByItself))
    }

    /// A directory of the image store, with a guest and its disk.
    fn disk_counter(&self) -> Option<Counter> {
        if self.is_double {
            return None;
        }
        let dir = self.options.image_dir.join("keeper");
        fs::create_dir_all(&dir).unwrap();
        fs::copy(guest("keeper").expect("gcc built the first guest"), dir.join("kernel")).unwrap();
        fs::write(dir.join("disk.raw"), [0; 4096]).unwrap();
        let spec = InstanceSpec { image: "keeper".to_owned(), ..self.spec() };
        Some(self.counter_of(spec, Grows::WhenAsked))
    }

    /// The suite's guest again, made to say something else first.
    fn rescue_image(&self) -> Option<(String, String)> {
        let dir = self.options.image_dir.join("rescuer");
        fs::create_dir_all(&dir).unwrap();
        let own = fs::read(self.options.image_dir.join("console.elf")).unwrap();
        let from = GREETING.as_bytes();
        let mut other = own.clone();
        match own.windows(from.len()).position(|at| at == from) {
            Some(at) => other[at..at + from.len()].copy_from_slice(RESCUE_GREETING.as_bytes()),
            // The double looks for it.
            None => other.extend_from_slice(RESCUE_GREETING.as_bytes()),
        }
        fs::write(dir.join("kernel"), other).unwrap();
        fs::write(dir.join("disk.raw"), [0; 4096]).unwrap();
        Some(("rescuer".to_owned(), RESCUE_GREETING.to_owned()))
    }

    fn local_image(&self) -> Option<LocalImage> {
        let path = self.options.image_dir.join("console.elf");
        let digest = format!("sha256:{}", "0".repeat(64));
        Some(LocalImage { digest, content: ImageContent::Kernel { path } })
    }

    fn kernel(&self) -> Option<InstanceSpec> {
        Some(InstanceSpec { image: String::new(), kernel: "console.elf".to_owned(), ..self.spec() })
    }

    async fn measured(&self, id: &InstanceId) -> Option<Measured> {
        if self.is_double {
            return None;
        }
        let (_, text) = crate::traps::ask(self, id, "GET /vm/config", "");
        let told: serde_json::Value = serde_json::from_str(&text).unwrap();
        let machine = &told["machine-config"];
        let drives =
            told["drives"].as_array().unwrap().iter().filter(|drive| drive["is_root_device"] != true);
        let size = |drive: &serde_json::Value| {
            fs::metadata(self.root(id).join(drive["path_on_host"].as_str().unwrap())).unwrap().len()
        };
        let mut disks: Vec<u64> = drives.map(size).collect();
        disks.sort_unstable();
        Some(Measured {
            cpu_cores: machine["vcpu_count"].as_u64().and_then(|cores| cores.try_into().ok()),
            memory_bytes: machine["mem_size_mib"].as_u64().map(|mib| mib << 20),
            disks: Some(disks),
        })
    }

    async fn leave_half_snapshot(&self, id: &InstanceId, name: &str) -> bool {
        let dir = self.instance_dir(id).join("snapshots").join(format!(".{name}.partial"));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("memory"), "a part").unwrap();
        fs::write(self.root(id).join("taken.state"), "a part").unwrap();
        true
    }

    fn against(&self) -> &str {
        if self.is_double { "double" } else { "" }
    }
}
