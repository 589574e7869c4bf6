//! A containerd of a test's own, in private directories, and what an agent is told so that it runs containers on it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::probe::DEADLINE;
use crate::process::Process;

const CGROUPS: &str = "/sys/fs/cgroup";

/// It ends with its owner, and whatever it still runs with it.
pub struct Containerd {
    // First, so that it ends before its directory goes.
    process: Option<Process>,
    dir: TempDir,
}

impl Containerd {
    /// What keeps containers from running here, with the remedy; `None` if they can.
    #[must_use]
    pub fn missing() -> Option<&'static str> {
        let has = |program: &str| {
            Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
        };
        if !rustix::process::geteuid().is_root() {
            return Some("containers can be run by root only");
        }
        if !has("containerd") || !has("runc") {
            return Some("containerd is not installed; apt-get install containerd runc");
        }
        let has_groups =
            ["cgroup.controllers", "freezer"].iter().any(|name| Path::new(CGROUPS).join(name).exists());
        if !has_groups {
            return Some("there are no control groups; mount them on /sys/fs/cgroup");
        }
        None
    }

    /// Starts one, and waits until it answers.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn start() -> Result<Self> {
        // Short: the addresses of unix sockets are.
        let dir = tempfile::Builder::new().prefix("hvc").tempdir()?;
        let config = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/run\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.snapshotter.v1.aufs\", \
             \"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.devmapper\", \
             \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.internal.v1.tracing\"]\n\
             [grpc]\naddress = \"{0}/c.sock\"\n[ttrpc]\naddress = \"{0}/t.sock\"\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{0}/opt\"\n",
            dir.path().display()
        );
        fs::write(dir.path().join("config.toml"), config)?;
        let mut daemon = Self { process: None, dir };
        daemon.run().await?;
        Ok(daemon)
    }

    /// Starts it again after [`kill`](Self::kill), and waits until it answers.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn run(&mut self) -> Result<()> {
        let log = self.dir.path().join("containerd.log");
        let args = ["--config".into(), self.dir.path().join("config.toml").into()];
        let address = self.address();
        let process = self.process.insert(Process::spawn(None, Path::new("containerd"), &args, &[], &log)?);
        let begun = tokio::time::Instant::now();
        while tokio::net::UnixStream::connect(&address).await.is_err() {
            ensure!(process.ended()?.is_none(), "containerd ended: {}", process.log_tail());
            ensure!(begun.elapsed() < DEADLINE, "containerd does not answer: {}", process.log_tail());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Ends it as a power failure would; its containers run on.
    ///
    /// # Errors
    /// The system refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.process.as_mut().map_or(Ok(()), Process::kill)
    }

    /// Its socket.
    #[must_use]
    pub fn address(&self) -> PathBuf {
        self.dir.path().join("c.sock")
    }

    /// The bridge of its containers.
    #[must_use]
    pub fn bridge(&self) -> String {
        format!("hvt{}", std::process::id())
    }

    /// The network of its containers, with room for some hundred.
    #[must_use]
    pub fn subnet(&self) -> String {
        format!("{}/22", network(0))
    }

    /// The first address of the network's upper half.
    #[must_use]
    pub fn upper_half(&self) -> String {
        network(2)
    }

    fn cgroup(&self) -> String {
        format!("hv-test-{}", std::process::id())
    }

    /// What an agent is told so that its containers run there.
    #[must_use]
    pub fn env(&self) -> Vec<(&'static str, String)> {
        vec![
            ("HYPERVISOR_CONTAINERD_ADDRESS", self.address().display().to_string()),
            ("HYPERVISOR_CONTAINERD_CGROUP_PARENT", format!("/{}", self.cgroup())),
            ("HYPERVISOR_CONTAINERD_BRIDGE", self.bridge()),
            ("HYPERVISOR_CONTAINERD_SUBNET", self.subnet()),
            ("HYPERVISOR_CONTAINERD_MASQUERADE", "false".to_owned()),
        ]
    }

    /// The directories of its control groups, one in each hierarchy.
    fn cgroups(&self) -> Vec<PathBuf> {
        let hierarchies = fs::read_dir(CGROUPS).into_iter().flatten().flatten().map(|entry| entry.path());
        let all = hierarchies.chain([CGROUPS.into()]).map(|hierarchy: PathBuf| hierarchy.join(self.cgroup()));
        all.filter(|dir| dir.is_dir()).collect()
    }

    /// The processes in its containers, and the shims and keepers beside them.
    fn processes(&self) -> Vec<i32> {
        let own = self.dir.path().display().to_string();
        let groups =
            self.cgroups().into_iter().flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten());
        let listed = groups.filter_map(|group| fs::read_to_string(group.path().join("cgroup.procs")).ok());
        let mut found: Vec<i32> = listed
            .flat_map(|text| text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<_>>())
            .collect();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&command).contains(&own) {
                found.push(pid);
            }
        }
        found
    }
}

/// A network of this process: four times 256 addresses, of which this is one of the quarters.
fn network(quarter: u32) -> String {
    let pid = std::process::id();
    format!("10.{}.{}.0", 100 + (pid / 60) % 100, (pid % 60) * 4 + quarter)
}

impl Drop for Containerd {
    /// A test that failed leaves containers.
    fn drop(&mut self) {
        self.process = None;
        let begun = std::time::Instant::now();
        loop {
            let left = self.processes();
            if left.is_empty() || begun.elapsed() > DEADLINE {
                break;
            }
            for pid in left.into_iter().filter_map(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
        let own = self.dir.path().display().to_string();
        let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
        for mount in
            mounts.lines().filter_map(|line| line.split(' ').nth(1)).filter(|at| at.starts_with(&own))
        {
            let _ = Command::new("umount").args(["-l", mount]).output();
        }
        let _ = Command::new("ip").args(["link", "delete", &self.bridge()]).output();
        for dir in self.cgroups() {
            for inner in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(inner.path());
            }
            let _ = fs::remove_dir(&dir);
        }
    }
}
