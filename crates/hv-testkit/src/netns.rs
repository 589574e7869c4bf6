//! Hosts as network namespaces: each joined by a veth pair to one bridge, each with an address of its own.
//!
//! # Theory of operation
//! The bridge lies in the namespace of the test, so that the test reaches every host. A link is cut by dropping packets
//! inside the host, one way or both: connections that are open stay open and go silent, as with a cable pulled. Every name
//! has the process id of the run in it; what a dead run left behind is swept by the next one, and nothing else is.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};

/// What every name begins with.
const PREFIX: &str = "hvt";
/// Hosts of one network; the bridge has an address of its own.
const MAX_HOSTS: u32 = 250;
/// Networks of one process.
static NETWORKS: AtomicU32 = AtomicU32::new(0);

/// What is cut of a host's link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// It hears nothing.
    In,
    /// It is not heard.
    Out,
    /// Both.
    Both,
}

/// A bridge with hosts. Goes when it is dropped, with its hosts.
#[derive(Debug)]
pub struct Network {
    /// `hvtPIDbN`; an interface's name has at most 15 bytes.
    bridge: String,
    /// The first three bytes of every address, as `10.64.3`.
    subnet: String,
    number: u32,
    hosts: AtomicU32,
}

/// One host of a network. Goes when it is dropped.
#[derive(Debug)]
pub struct Host {
    namespace: String,
    ip: String,
}

impl Network {
    /// A network without hosts. `None`, reported by [`crate::skip`] for `suite`, where namespaces or packet filters cannot be
    /// made here.
    ///
    /// # Errors
    /// They can be made, and yet it failed.
    pub fn create(suite: &str) -> Result<Option<Self>> {
        if let Err(error) = probe() {
            crate::skip(
                suite,
                &format!("no network namespaces here ({error:#}); run as root with iproute2 and iptables"),
            );
            return Ok(None);
        }
        sweep()?;
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        // Runs at the same time have different process ids, and so, with some luck, different networks.
        let subnet = format!("10.{}.{}", 64 + (pid / 61 + number) % 61, pid % 251);
        let network =
            Self { bridge: format!("{PREFIX}{pid}b{number}"), subnet, number, hosts: AtomicU32::new(0) };
        ip(&["link", "add", &network.bridge, "type", "bridge"])?;
        ip(&["addr", "add", &format!("{}.254/24", network.subnet), "dev", &network.bridge])?;
        ip(&["link", "set", &network.bridge, "up"])?;
        Ok(Some(network))
    }

    /// Adds a host.
    ///
    /// # Errors
    /// The system refuses.
    pub fn add_host(&self) -> Result<Host> {
        let index = self.hosts.fetch_add(1, Ordering::Relaxed);
        ensure!(index < MAX_HOSTS, "a network has at most {MAX_HOSTS} hosts");
        let pid = std::process::id();
        let namespace = format!("{PREFIX}-{pid}-{}-{index}", self.number);
        let outside = format!("{PREFIX}{pid}v{}", self.number * MAX_HOSTS + index);
        let host = Host { ip: format!("{}.{}", self.subnet, index + 1), namespace };
        ip(&["netns", "add", &host.namespace])?;
        ip(&["link", "add", &outside, "type", "veth", "peer", "name", "eth0", "netns", &host.namespace])?;
        ip(&["link", "set", &outside, "master", &self.bridge, "up"])?;
        ip(&["-n", &host.namespace, "addr", "add", &format!("{}/24", host.ip), "dev", "eth0"])?;
        for interface in ["lo", "eth0"] {
            ip(&["-n", &host.namespace, "link", "set", interface, "up"])?;
        }
        Ok(host)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The next run sweeps what cannot be removed now.
        let _ = ip(&["link", "del", &self.bridge]);
    }
}

impl Host {
    /// Its address.
    #[must_use]
    pub fn ip(&self) -> &str {
        &self.ip
    }

    /// A command that runs there; its process id is that of the program.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace]).arg(program);
        command
    }

    /// Cuts its link to everybody.
    ///
    /// # Errors
    /// The system refuses.
    pub fn cut(&self, cut: Cut) -> Result<()> {
        for chain in cut.chains() {
            self.filter(&[
                "-A",
                chain,
                "!",
                match *chain {
                    "INPUT" => "-i",
                    _ => "-o",
                },
                "lo",
                "-j",
                "DROP",
            ])?;
        }
        Ok(())
    }

    /// Cuts its link to one other host.
    ///
    /// # Errors
    /// The system refuses.
    pub fn cut_from(&self, peer: &str, cut: Cut) -> Result<()> {
        for chain in cut.chains() {
            self.filter(&[
                "-A",
                chain,
                match *chain {
                    "INPUT" => "-s",
                    _ => "-d",
                },
                peer,
                "-j",
                "DROP",
            ])?;
        }
        Ok(())
    }

    /// Mends everything that was cut.
    ///
    /// # Errors
    /// The system refuses.
    pub fn heal(&self) -> Result<()> {
        self.filter(&["-F"])
    }

    fn filter(&self, args: &[&str]) -> Result<()> {
        run(self.command(Path::new("iptables")).arg("-w").args(args))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The next run sweeps what cannot be removed now.
        let _ = ip(&["netns", "del", &self.namespace]);
    }
}

impl Cut {
    fn chains(self) -> &'static [&'static str] {
        match self {
            Self::In => &["INPUT"],
            Self::Out => &["OUTPUT"],
            Self::Both => &["INPUT", "OUTPUT"],
        }
    }
}

/// Tries everything that hosts need, with names of its own.
fn probe() -> Result<()> {
    let namespace = format!("{PREFIX}-{}-probe", std::process::id());
    ip(&["netns", "add", &namespace])?;
    let host = Host { namespace, ip: String::new() };
    host.filter(&["-A", "INPUT", "!", "-i", "lo", "-j", "DROP"])
}

/// Removes what runs that have died left behind: their namespaces with the processes in them, and their bridges.
fn sweep() -> Result<()> {
    for line in output(&["netns", "list"])?.lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        let owner = name.strip_prefix(&format!("{PREFIX}-")).and_then(|rest| rest.split('-').next());
        if owner.is_some_and(is_dead) {
            // Another run may sweep at the same time.
            for pid in output(&["netns", "pids", name]).unwrap_or_default().split_whitespace() {
                if let Some(pid) = pid.parse().ok().and_then(rustix::process::Pid::from_raw) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
            let _ = ip(&["netns", "del", name]);
        }
    }
    for line in output(&["-br", "link", "show", "type", "bridge"])?.lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('b').next());
        if owner.is_some_and(is_dead) {
            let _ = ip(&["link", "del", name]);
        }
    }
    Ok(())
}

/// Whether the text is a process id that nobody has.
fn is_dead(pid: &str) -> bool {
    pid.parse::<u32>().is_ok_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

fn ip(args: &[&str]) -> Result<()> {
    run(Command::new("ip").args(args))
}

fn output(args: &[&str]) -> Result<String> {
    let output = Command::new("ip").args(args).stdin(Stdio::null()).output().context("ip cannot be run")?;
    ensure!(
        output.status.success(),
        "ip {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn run(command: &mut Command) -> Result<()> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("{command:?} cannot be run"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
