//! A real libvirtd in a mount namespace of its own, with all that it writes in a directory of ours.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal, kill_process};

/// How long a libvirtd may take until it answers.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a shared libvirtd may stand idle, in seconds, before it is stopped.
const IDLE_S: u32 = 5;
/// The directories of libvirt's that are private to each daemon, and what they are in ours.
const BOUND: [(&str, &str); 5] = [
    ("/etc/libvirt", "etc"),
    ("/var/lib/libvirt", "lib"),
    ("/run/libvirt", "run"),
    ("/var/cache/libvirt", "cache"),
    ("/var/log/libvirt", "log"),
];

/// A libvirtd. Dropping it leaves it running; its keeper stops it.
pub(crate) struct Libvirtd {
    pub(crate) dir: PathBuf,
    child: Option<Child>,
    /// Who uses it, where it is shared.
    users: Option<PathBuf>,
    /// Held as long as this process uses it.
    _use: Option<fs::File>,
}

impl Libvirtd {
    /// What a driver connects to.
    pub(crate) fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.socket().display())
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("run/libvirt-sock")
    }

    /// Writes its configuration, and starts it.
    pub(crate) fn start(dir: &Path) -> Self {
        let mut daemon = Self { dir: dir.to_owned(), child: None, users: None, _use: None };
        daemon.configure();
        daemon.spawn();
        daemon
    }

    /// One for all tests of a run, which ends when the last of them is over.
    pub(crate) fn shared(name: &str) -> Self {
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("libvirtd-{name}"));
        fs::create_dir_all(&dir).unwrap();
        let open = |name: &str| fs::File::create(dir.join(name)).unwrap();
        let (users, starting) = (open("users.lock"), open("starting.lock"));
        rustix::fs::flock(&users, FlockOperation::LockShared).unwrap();
        rustix::fs::flock(&starting, FlockOperation::LockExclusive).unwrap();
        let users_path = dir.join("users.lock");
        let mut daemon = Self { dir, child: None, users: Some(users_path), _use: Some(users) };
        if std::os::unix::net::UnixStream::connect(daemon.socket()).is_err() {
            daemon.configure();
            daemon.spawn();
        }
        daemon
    }

    fn configure(&self) {
        let dir = &self.dir;
        for (_, name) in BOUND {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        fs::create_dir_all(dir.join("etc/qemu")).unwrap();
        fs::create_dir_all(dir.join("lib/images")).unwrap();
        let qemu = "security_driver = \"none\"\nuser = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\n\
            remember_owner = 0\nnamespaces = []\nstdio_handler = \"file\"\nswtpm_user = \"root\"\n\
            swtpm_group = \"root\"\ncgroup_controllers = []\n";
        fs::write(dir.join("etc/qemu.conf"), qemu).unwrap();
        let uuid = hv_types::InstanceId::generate();
        let libvirtd = format!(
            "auth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\nhost_uuid = \"{uuid}\"\nmax_client_requests = 50\n"
        );
        fs::write(dir.join("etc/libvirtd.conf"), libvirtd).unwrap();
    }

    /// Starts it in its directory, which may have seen one before.
    pub(crate) fn spawn(&mut self) {
        let mut script = String::from("set -e; mount --make-rprivate /\n");
        for (there, here) in BOUND {
            script.push_str(&format!("mkdir -p {there}; mount --bind \"$1/{here}\" {there}\n"));
        }
        if let Some(users) = &self.users {
            // Whoever uses it holds a shared lock. When nobody does any more it ends, and nobody can come meanwhile.
            script.push_str(&format!(
                "(while sleep {IDLE_S}; do flock -n -x '{}' sh -c 'kill $0; while [ -e /proc/$0/exe ]; do sleep 0.05; done' $$ && exit; done) &\n",
                users.display()
            ));
        }
        script.push_str("exec libvirtd -f /etc/libvirt/libvirtd.conf -p /run/libvirt/libvirtd.pid\n");
        let log = fs::File::create(self.dir.join("libvirtd.err")).unwrap();
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script, "libvirtd"]).arg(&self.dir);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
        self.child = Some(command.spawn().unwrap());
        let begun = Instant::now();
        while std::os::unix::net::UnixStream::connect(self.socket()).is_err() {
            assert!(
                begun.elapsed() < START_TIMEOUT && self.is_alive(),
                "libvirtd does not come up: {}",
                fs::read_to_string(self.dir.join("libvirtd.err")).unwrap_or_default()
            );
            wait();
        }
    }

    /// One that somebody else keeps.
    pub(crate) fn of(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), child: None, users: None, _use: None }
    }

    fn is_alive(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().is_ok_and(|status| status.is_none()))
    }

    /// Kills it without a chance to say anything.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The processes whose command line has a text in it, and are QEMU or are about to become it.
pub(crate) fn processes_with(text: &str) -> Vec<i32> {
    let all =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let own = i32::try_from(std::process::id()).unwrap();
    all.filter(|pid| *pid != own)
        .filter(|pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains("qemu-system") && line.contains(text)
        })
        .collect()
}

pub(crate) fn kill_pid(pid: i32) {
    // It may have ended meanwhile.
    let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
}

/// A moment, in code that is not asynchronous.
#[expect(
    clippy::disallowed_methods,
    reason = "processes of others are looked at; there is nothing to wait on"
)]
pub(crate) fn wait() {
    std::thread::sleep(Duration::from_millis(20));
}
