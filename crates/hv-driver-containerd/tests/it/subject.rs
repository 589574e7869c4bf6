//! A containerd driver in private directories, over a containerd of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use hv_driver::conformance::{Measured, Subject};
use hv_driver::{Driver, ImageContent, InstanceConfig, LocalImage};
use hv_driver_containerd::{ContainerdDriver, ContainerdOptions};
use hv_types::instance::VolumeMount;
use hv_types::{InstanceId, InstanceSpec, Metadata};
use rustix::process::{Pid, Signal, kill_process};

use crate::daemon::Daemon;
use crate::image::{self, GREETING, Made};

/// Each subject of a process has a number of its own.
static NUMBER: AtomicU32 = AtomicU32::new(0);
/// How long a killed process may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) struct ContainerdSubject {
    pub(crate) daemon: Daemon,
    pub(crate) options: ContainerdOptions,
    pub(crate) image: Made,
    // Removed last.
    pub(crate) dir: tempfile::TempDir,
}

/// Says why a suite did not run, on standard error and in the file that collects it.
fn skip(suite: &str, reason: &str) {
    use std::io::Write as _;
    eprintln!("skipped {suite}: {reason}");
    if let Some(path) = std::env::var_os("HYPERVISOR_SKIP_LOG") {
        let mut log =
            fs::OpenOptions::new().create(true).append(true).open(path).expect("the skip log opens");
        writeln!(log, "{suite}: {reason}").expect("the skip log is written");
    }
}

/// What is missing here, with the remedy.
fn missing() -> Option<&'static str> {
    let has = |program: &str| {
        Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
    };
    let checks = [
        (rustix::process::geteuid().is_root(), "containers can be run by root only"),
        (has("containerd") && has("runc"), "containerd is not installed; apt-get install containerd runc"),
        (image::has_busybox(), "busybox is not installed; apt-get install busybox-static"),
        (Path::new("/sys/fs/cgroup").exists(), "there are no control groups; mount them on /sys/fs/cgroup"),
    ];
    checks.into_iter().find_map(|(is_well, reason)| (!is_well).then_some(reason))
}

pub(crate) async fn setup() -> Option<ContainerdSubject> {
    if let Some(reason) = missing() {
        skip("hv-driver-containerd", reason);
        return None;
    }
    Some(ContainerdSubject::new())
}

impl ContainerdSubject {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("hvc").tempdir().unwrap();
        let image = image::layout(dir.path());
        let daemon = Daemon::start(dir.path());
        let tar = dir.path().join("images.tar");
        let tarred =
            Command::new("tar").arg("-C").arg(&image.layout).arg("-cf").arg(&tar).arg(".").status().unwrap();
        assert!(tarred.success());
        daemon
            .ctr(&["images", "import", "--all-platforms", &tar.display().to_string()])
            .expect("the images are imported");
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let options = ContainerdOptions {
            // Full of characters that mean something to addresses, shells and JSON.
            state_dir: dir.path().join("a,b=c \"d\" 'e' ü $(f) &g?h#i%20"),
            address: daemon.address.clone(),
            cgroup_parent: format!("/hv-test-{pid}-{number}"),
            bridge: format!("hvt{pid}-{number}"),
            subnet: format!("10.{}.{}.0/24", 100 + (pid / 250) % 100, (pid + number) % 250),
            masquerade: false,
            volumes_dir: Some(dir.path().join("volumes")),
            keeper: Some(env!("CARGO_BIN_EXE_hypervisor-container-log").into()),
            log_file_bytes: 256 << 10,
            ..ContainerdOptions::default()
        };
        Self { daemon, options, image, dir }
    }

    pub(crate) fn containerd(&self) -> ContainerdDriver {
        ContainerdDriver::new(self.options.clone())
    }

    pub(crate) fn config(&self, name: &str) -> InstanceConfig {
        InstanceConfig {
            id: InstanceId::generate(),
            name: name.to_owned(),
            spec: self.spec(),
            metadata: Metadata::default(),
            image: None,
            rescue_image: None,
            devices: None,
        }
    }

    /// An instance that runs a shell script, from the image as the node's store has it.
    pub(crate) fn script(&self, script: &str) -> InstanceConfig {
        let mut config = self.config("script");
        config.spec.command = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        config.image = Some(self.stored_image());
        config
    }

    pub(crate) fn stored_image(&self) -> LocalImage {
        let (layout, manifest) = (self.image.layout.clone(), self.image.manifest.clone());
        LocalImage { digest: manifest.clone(), content: ImageContent::Oci { layout, manifest } }
    }

    pub(crate) fn instance_dir(&self, id: &InstanceId) -> PathBuf {
        self.options.state_dir.join(id.as_str())
    }

    /// The directory of an instance's control group, of a version 1 hierarchy or of the only one.
    pub(crate) fn group(&self, controller: &str, id: &InstanceId) -> PathBuf {
        let root = Path::new("/sys/fs/cgroup");
        let root =
            if root.join("cgroup.controllers").exists() { root.to_owned() } else { root.join(controller) };
        root.join(self.options.cgroup_parent.trim_start_matches('/')).join(id.as_str())
    }

    pub(crate) fn pids(&self, id: &InstanceId) -> Vec<i32> {
        let listed = fs::read_to_string(self.group("freezer", id).join("cgroup.procs")).unwrap_or_default();
        listed.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// The first processes of the containers in its group: those whose parents are outside.
    pub(crate) fn first_pids(&self, id: &InstanceId) -> Vec<i32> {
        let all = self.pids(id);
        let parent = |pid: i32| -> Option<i32> {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            stat.rsplit(')').next()?.split_ascii_whitespace().nth(1)?.parse().ok()
        };
        let is_first = |pid: &i32| parent(*pid).is_some_and(|parent| !all.contains(&parent));
        all.iter().copied().filter(is_first).collect()
    }
}

impl Drop for ContainerdSubject {
    fn drop(&mut self) {
        let lock = self.dir.path().join("nobody");
        let groups = fs::read_dir(self.group("freezer", &InstanceId::generate()).parent().unwrap());
        for group in groups.into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
            let target = hv_driver::FenceTarget::Cgroup { path: group.path(), lock: lock.clone() };
            let _ = hv_driver::fence::kill(&target, hv_driver::fence::Zeal::Instance);
        }
        let _ = Command::new("ip").args(["link", "delete", &self.options.bridge]).output();
        let parent = self.options.cgroup_parent.trim_start_matches('/');
        let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        let hierarchies = hierarchies.map(|entry| entry.path()).chain(["/sys/fs/cgroup".into()]);
        for group in
            hierarchies.map(|hierarchy: PathBuf| hierarchy.join(parent)).filter(|group| group.exists())
        {
            for inner in fs::read_dir(&group).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(inner.path());
            }
            let _ = fs::remove_dir(&group);
        }
    }
}

fn files_below(dir: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        // The address plugin's own: not of any instance.
        let is_plugins = path.file_name().is_some_and(|name| name == "lock" || name == "last_reserved_ip.0");
        let is_addresses = path.components().any(|part| part.as_os_str() == ".addresses");
        if !(is_addresses && (is_plugins || path.is_dir())) {
            found.push(path.display().to_string());
        }
        if path.is_dir() {
            files_below(&path, found);
        }
    }
}

#[async_trait]
impl Subject for ContainerdSubject {
    fn driver(&self) -> Arc<dyn Driver> {
        Arc::new(self.containerd())
    }

    fn spec(&self) -> InstanceSpec {
        InstanceSpec {
            image: "guest".to_owned(),
            cpu_cores: 1,
            memory_bytes: 64 << 20,
            ..InstanceSpec::default()
        }
    }

    fn greeting(&self) -> &str {
        GREETING
    }

    fn make_short_lived(&self, config: &mut InstanceConfig) {
        config.spec.image = "quits".to_owned();
    }

    fn shell(&self) -> Option<InstanceSpec> {
        Some(self.spec())
    }

    fn local_image(&self) -> Option<LocalImage> {
        Some(self.stored_image())
    }

    fn volume(&self) -> Option<VolumeMount> {
        fs::create_dir_all(self.dir.path().join("volumes/data")).unwrap();
        Some(VolumeMount { name: "data".to_owned(), mount_path: "/data".to_owned(), read_only: false })
    }

    fn log_bound(&self) -> Option<u64> {
        Some(2 * self.options.log_file_bytes)
    }

    /// As the kernel has it.
    async fn measured(&self, id: &InstanceId) -> Option<Measured> {
        let number = |controller: &str, file: &str| -> Option<u64> {
            let text = fs::read_to_string(self.group(controller, id).join(file)).ok()?;
            text.split_ascii_whitespace().next()?.parse().ok()
        };
        let quota = number("cpu", "cpu.cfs_quota_us").or_else(|| number("", "cpu.max"));
        let memory = number("memory", "memory.limit_in_bytes").or_else(|| number("", "memory.max"));
        let cores = quota.and_then(|quota| u32::try_from(quota / 100_000).ok());
        Some(Measured { cpu_cores: cores, memory_bytes: memory, disks: None })
    }

    fn leave_half_created(&self, config: &InstanceConfig) {
        let dir = self.instance_dir(&config.id);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("config.json.partial"), "{").unwrap();
        self.daemon.ctr(&["snapshots", "prepare", config.id.as_str()]).expect("a snapshot is prepared");
    }

    async fn kill(&self, id: &InstanceId) {
        for pid in self.first_pids(id) {
            kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        }
        let begun = Instant::now();
        while !self.pids(id).is_empty() {
            assert!(begun.elapsed() < KILL_TIMEOUT, "it cannot be killed");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn copies(&self, id: &InstanceId) -> usize {
        self.first_pids(id).len()
    }

    fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        files_below(&self.options.state_dir, &mut found);
        let mut ask = |what: &str, arguments: &[&str], is_left: &dyn Fn(&str) -> bool| {
            let listed = self.daemon.ctr(arguments).unwrap_or_default();
            found.extend(listed.lines().filter(|line| is_left(line)).map(|line| format!("{what} {line}")));
        };
        ask("container", &["containers", "list", "--quiet"], &|_| true);
        ask("task", &["tasks", "list", "--quiet"], &|_| true);
        ask("snapshot", &["snapshots", "list"], &|line| line.contains("Active"));
        let parent = self.group("freezer", &InstanceId::generate()).parent().unwrap().to_owned();
        let groups =
            fs::read_dir(parent).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir());
        found.extend(groups.map(|group| format!("group {}", group.path().display())));
        found.sort();
        found
    }
}
