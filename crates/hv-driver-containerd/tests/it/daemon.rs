//! A containerd of a test's own, in private directories.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long it may take until it answers; a busy machine takes its time.
const START_TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) struct Daemon {
    dir: PathBuf,
    pub(crate) address: PathBuf,
    child: Option<Child>,
}

impl Daemon {
    pub(crate) fn start(dir: &Path) -> Self {
        let mut daemon = Self { dir: dir.to_owned(), address: dir.join("c.sock"), child: None };
        let config = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/run\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.snapshotter.v1.aufs\", \
             \"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.devmapper\", \
             \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.internal.v1.tracing\"]\n\
             [grpc]\naddress = \"{0}/c.sock\"\n[ttrpc]\naddress = \"{0}/t.sock\"\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{0}/opt\"\n",
            dir.display()
        );
        fs::write(dir.join("config.toml"), config).unwrap();
        daemon.run();
        daemon
    }

    /// Runs it, and waits until it answers.
    pub(crate) fn run(&mut self) {
        let log = File::options().create(true).append(true).open(self.dir.join("containerd.log")).unwrap();
        let mut command = Command::new("containerd");
        command.arg("--config").arg(self.dir.join("config.toml"));
        command.stdin(Stdio::null()).stdout(Stdio::from(log.try_clone().unwrap())).stderr(Stdio::from(log));
        self.child = Some(command.spawn().expect("containerd starts"));
        let begun = Instant::now();
        while self.ctr(&["version"]).is_none() {
            let log = || fs::read_to_string(self.dir.join("containerd.log")).unwrap_or_default();
            assert!(begun.elapsed() < START_TIMEOUT, "containerd does not answer: {}", log());
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    /// Kills it as the kernel would.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// What its own command line tool says; `None` if it failed.
    pub(crate) fn ctr(&self, arguments: &[&str]) -> Option<String> {
        let output = Command::new("ctr")
            .args(["--timeout", "10s", "--namespace", "hypervisor", "--address"])
            .arg(&self.address)
            .args(arguments)
            .output()
            .expect("ctr runs");
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The processes that were started for it: shims and log keepers.
    pub(crate) fn helpers(&self) -> Vec<(i32, String)> {
        let own = self.dir.display().to_string();
        let all =
            fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let with_command = all.filter_map(|pid: i32| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            Some((pid, String::from_utf8_lossy(&command).replace('\0', " ")))
        });
        let is_one = |(_, command): &(i32, String)| {
            command.contains(&own)
                && (command.contains("containerd-shim") || command.contains("container-log"))
        };
        with_command.filter(is_one).collect()
    }
}

impl Drop for Daemon {
    /// A claim that failed leaves processes and mounts.
    fn drop(&mut self) {
        for (pid, _) in self.helpers() {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
        self.kill();
        let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
        let own = self.dir.display().to_string();
        for mount in
            mounts.lines().filter_map(|line| line.split(' ').nth(1)).filter(|path| path.starts_with(&own))
        {
            let _ = Command::new("umount").args(["-l", mount]).status();
        }
    }
}
