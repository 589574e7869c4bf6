//! The runtime specification of a container, from typed values.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use containerd_client::types::Mount as WireMount;
use hv_driver::{ExecRequest, InstanceConfig, TerminalSize};
use hv_types::InstanceSpec;
use hv_types::instance::ResourceLimits;
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    BoxBuilder, Capability as Cap, LinuxBuilder, LinuxCapabilities, LinuxCapabilitiesBuilder,
    LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType,
    LinuxResources, Mount, MountBuilder, PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process,
    ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};
use prost_types::Any;

use crate::cgroup::Cgroup;
use crate::files::{ETC, InstanceDir, Stored};
use crate::image::ImageProcess;
use crate::problem::{Outcome, Problem};
use crate::user::{self, User};
use crate::{ContainerdOptions, seccomp};

pub(crate) mod resources;

/// What containerd calls the document.
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// What containerd calls the process of a further command.
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// The version of the runtime specification that is written: what runc 1.0 and all later ones read.
const VERSION: &str = "1.0.2";
/// Where programs are looked for if the image does not say.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most files that a process may have open.
const MAX_FILES: u64 = 65_536;
/// The annotation that gives an instance pipes instead of a terminal when it is `false`; its input is empty then.
const TERMINAL: &str = "terminal";
/// Longest host name (hostname(7)).
const MAX_HOSTNAME: usize = 63;

/// What root may do in a container that asked to be root: manage its own files and users, and listen.
const OF_ROOT: [Cap; 8] = [
    Cap::Chown,
    Cap::DacOverride,
    Cap::Fowner,
    Cap::Fsetid,
    Cap::Kill,
    Cap::NetBindService,
    Cap::Setgid,
    Cap::Setuid,
];
/// What tells of the machine or changes it.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Whether an instance has a terminal; it has unless it asks for pipes.
pub(crate) fn has_terminal(config: &InstanceConfig) -> bool {
    config.metadata.annotations.get(TERMINAL).is_none_or(|value| value != "false")
}

/// Everything that a specification is made from.
pub(crate) struct Parts<'a> {
    pub(crate) stored: &'a Stored,
    pub(crate) dir: &'a InstanceDir,
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) options: &'a ContainerdOptions,
    /// The mounts of the root file system.
    pub(crate) root: &'a [WireMount],
}

impl Parts<'_> {
    /// The document, as containerd takes it.
    pub(crate) fn document(&self) -> Outcome<Any> {
        let spec = self.spec()?;
        let value = serde_json::to_vec(&spec).map_err(|e| Problem::Spec(e.to_string()))?;
        Ok(Any { type_url: SPEC_TYPE.to_owned(), value })
    }

    fn spec(&self) -> Outcome<Spec> {
        let config = &self.stored.config;
        let wanted = &config.spec;
        let user = user::of(&wanted.user, &self.stored.image.user, self.root)?;
        let mut mounts = system_mounts().map_err(|e| Problem::Spec(e.to_string()))?;
        mounts.extend(self.etc_mounts().map_err(|e| Problem::Spec(e.to_string()))?);
        for volume in volumes(wanted, self.options.volumes_dir.as_deref())? {
            mounts.push(volume.mount().map_err(|e| Problem::Spec(e.to_string()))?);
        }
        let resources = resources::of(wanted, resources::Disk::of(self.root))?;
        let process = process(config, &self.stored.image, user)?;
        let build = || {
            let linux = LinuxBuilder::default()
                .namespaces(namespaces()?)
                .cgroups_path(PathBuf::from(&self.cgroup.path))
                .resources(with_devices(resources)?)
                .masked_paths(MASKED.map(str::to_owned).to_vec())
                .readonly_paths(READ_ONLY.map(str::to_owned).to_vec())
                // Every port is the container's own: it need not be root to listen below 1024.
                .sysctl(HashMap::from([("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())]))
                .seccomp(seccomp::filter()?)
                .build()?;
            let root = RootBuilder::default().path("rootfs").readonly(wanted.read_only_root).build()?;
            SpecBuilder::default()
                .version(VERSION)
                .hostname(hostname(&config.name))
                .root(root)
                .process(process)
                .mounts(mounts)
                .linux(linux)
                .build()
        };
        build().map_err(|e: OciSpecError| Problem::Spec(e.to_string()))
    }

    /// Host name, hosts and resolver; the files are the instance's.
    fn etc_mounts(&self) -> Result<Vec<Mount>, OciSpecError> {
        let options = ["rbind", "ro", "nosuid", "nodev", "noexec"];
        let mount = |name: &str| {
            let (to, from) = (format!("/etc/{name}"), self.dir.file(ETC).join(name));
            mount_of(&to, "bind", &from.display().to_string(), &options)
        };
        ["hostname", "hosts", "resolv.conf"].into_iter().map(mount).collect()
    }
}

/// Letters, digits and `-`, as a host name takes them (RFC 1123).
pub(crate) fn hostname(name: &str) -> String {
    let mut host: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .take(MAX_HOSTNAME)
        .collect();
    host = host.trim_matches('-').to_owned();
    if host.is_empty() { "container".to_owned() } else { host }
}

fn process(config: &InstanceConfig, image: &ImageProcess, user: User) -> Outcome<Process> {
    let spec = &config.spec;
    let (program, arguments) = match (spec.command.is_empty(), spec.args.is_empty()) {
        (true, true) => (&image.entrypoint, &image.command),
        (true, false) => (&image.entrypoint, &spec.args),
        (false, _) => (&spec.command, &spec.args),
    };
    let args: Vec<String> = program.iter().chain(arguments).cloned().collect();
    if args.is_empty() {
        return Err(Problem::Invalid("its image names no program to run; give it a command".to_owned()));
    }
    let cwd = [&spec.working_dir, &image.working_dir].into_iter().find(|dir| !dir.is_empty());
    let cwd = cwd.map_or("/", String::as_str);
    let env = environment(config, image);
    build_process(args, env, cwd, user, has_terminal(config)).map_err(|e| Problem::Spec(e.to_string()))
}

/// Later ones of a name win: a path, the image's, the specification's.
fn environment(config: &InstanceConfig, image: &ImageProcess) -> Vec<String> {
    let mut env = vec![PATH.to_owned(), format!("HOSTNAME={}", hostname(&config.name))];
    if has_terminal(config) {
        env.push("TERM=xterm".to_owned());
    }
    let own = config.spec.env.iter().map(|(name, value)| format!("{name}={value}"));
    for entry in image.env.iter().cloned().chain(own) {
        let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
        env.retain(|known| name(known) != name(&entry));
        env.push(entry);
    }
    env
}

/// The process of a further command in a container, with the rights of the container's own.
pub(crate) fn further_process(stored: &Stored, root: &[WireMount], request: &ExecRequest) -> Outcome<Any> {
    let has_terminal = request.tty.is_some();
    let (spec, image) = (&stored.config.spec, &stored.image);
    let user = user::of(&spec.user, &image.user, root)?;
    let mut env = environment(&stored.config, image);
    env.extend(has_terminal.then(|| "TERM=xterm".to_owned()));
    env.extend(request.env.iter().map(|(name, value)| format!("{name}={value}")));
    let cwd = [&spec.working_dir, &image.working_dir].into_iter().find(|dir| !dir.is_empty());
    let build = || {
        let args = request.command.clone();
        let mut process = build_process(args, env, cwd.map_or("/", String::as_str), user, has_terminal)?;
        if let Some(TerminalSize { width, height }) = request.tty {
            let size = BoxBuilder::default().width(u64::from(width)).height(u64::from(height)).build()?;
            process.set_console_size(Some(size));
        }
        Ok(process)
    };
    let process = build().map_err(|e: OciSpecError| Problem::Spec(e.to_string()))?;
    let value = serde_json::to_vec(&process).map_err(|e| Problem::Spec(e.to_string()))?;
    Ok(Any { type_url: PROCESS_TYPE.to_owned(), value })
}

fn build_process(
    args: Vec<String>,
    env: Vec<String>,
    cwd: &str,
    user: User,
    has_terminal: bool,
) -> Result<Process, OciSpecError> {
    ProcessBuilder::default()
        .terminal(has_terminal)
        .user(UserBuilder::default().uid(user.uid).gid(user.gid).build()?)
        .args(args)
        .env(env)
        .cwd(cwd)
        .capabilities(capabilities(user)?)
        .rlimits(limits()?)
        .no_new_privileges(true)
        .build()
}

fn capabilities(user: User) -> Result<LinuxCapabilities, OciSpecError> {
    let all: std::collections::HashSet<Cap> = if user.uid == 0 { OF_ROOT.into() } else { [].into() };
    LinuxCapabilitiesBuilder::default()
        .bounding(all.clone())
        .effective(all.clone())
        .permitted(all)
        .inheritable([])
        .ambient([])
        .build()
}

fn limits() -> Result<Vec<PosixRlimit>, OciSpecError> {
    // Not everywhere may root raise what it was given itself.
    let allowed = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(MAX_FILES);
    let limit = |kind, value: u64| PosixRlimitBuilder::default().typ(kind).soft(value).hard(value).build();
    Ok(vec![
        limit(PosixRlimitType::RlimitNofile, MAX_FILES.min(allowed))?,
        limit(PosixRlimitType::RlimitCore, 0)?,
    ])
}

fn namespaces() -> Result<Vec<LinuxNamespace>, OciSpecError> {
    use LinuxNamespaceType as T;
    let mut kinds = vec![T::Pid, T::Network, T::Ipc, T::Uts, T::Mount];
    if crate::cgroup::is_unified() {
        kinds.push(T::Cgroup);
    }
    kinds.into_iter().map(|kind| LinuxNamespaceBuilder::default().typ(kind).build()).collect()
}

/// The runtime's own devices (null, zero, random, tty) are added by it; all others are refused.
fn with_devices(mut resources: LinuxResources) -> Result<LinuxResources, OciSpecError> {
    let rule = |allow: bool, access: &str| -> Result<LinuxDeviceCgroup, OciSpecError> {
        LinuxDeviceCgroupBuilder::default().allow(allow).access(access).build()
    };
    resources.set_devices(Some(vec![rule(false, "rwm")?]));
    Ok(resources)
}

fn mount_of(to: &str, kind: &str, from: &str, options: &[&str]) -> Result<Mount, OciSpecError> {
    let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
    MountBuilder::default().destination(to).typ(kind).source(from).options(options).build()
}

fn system_mounts() -> Result<Vec<Mount>, OciSpecError> {
    let quiet = ["nosuid", "noexec", "nodev"];
    Ok(vec![
        mount_of("/proc", "proc", "proc", &quiet)?,
        mount_of("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount_of(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
        )?,
        mount_of("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"])?,
        mount_of("/dev/mqueue", "mqueue", "mqueue", &quiet)?,
        mount_of("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"])?,
        mount_of("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"])?,
    ])
}

/// A directory of the node in a container.
struct Volume {
    from: PathBuf,
    to: String,
    is_read_only: bool,
}

impl Volume {
    fn mount(&self) -> Result<Mount, OciSpecError> {
        let access = if self.is_read_only { "ro" } else { "rw" };
        mount_of(
            &self.to,
            "bind",
            &self.from.display().to_string(),
            &["rbind", "rprivate", "nosuid", "nodev", access],
        )
    }
}

/// The volumes that a specification names, checked: each is a directory right below the node's volumes.
fn volumes(spec: &InstanceSpec, dir: Option<&Path>) -> Outcome<Vec<Volume>> {
    let one = |mount: &hv_types::instance::VolumeMount| {
        let refused = |reason: &str| Problem::Invalid(format!("volume `{}` {reason}", mount.name));
        let dir = dir.ok_or_else(|| refused("is not here: this node has no volumes directory"))?;
        let mut parts = Path::new(&mount.name).components();
        let (Some(Component::Normal(name)), None) = (parts.next(), parts.next()) else {
            return Err(refused("has a name that is no single word"));
        };
        let to = Path::new(&mount.mount_path);
        let is_plain = to.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        let system = ["/proc", "/sys", "/dev"].iter().any(|own| to.starts_with(own));
        if !to.is_absolute() || !is_plain || to == Path::new("/") || system {
            return Err(refused(
                "must be mounted at an absolute path without `..`, and not over the system's",
            ));
        }
        let from = dir.join(name);
        let found = std::fs::symlink_metadata(&from).map_err(|_| refused("is not on this node"))?;
        if !found.is_dir() {
            return Err(refused("is not a directory"));
        }
        Ok(Volume { from, to: mount.mount_path.clone(), is_read_only: mount.read_only })
    };
    spec.volume_mounts.iter().map(one).collect()
}

/// The bounds that a user gave; none of them if there are none.
fn limits_of(spec: &InstanceSpec) -> ResourceLimits {
    spec.limits.unwrap_or_default()
}

#[cfg(test)]
mod tests;
