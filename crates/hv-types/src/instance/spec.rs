//! What an instance is made of, as a user writes it.

use serde::{Deserialize, Serialize};

use super::{Environment, InstanceType};
use crate::device::{Amounts, DeviceNeeds};
use crate::id::InstanceId;
use crate::resources::{MIB, Resources};
use crate::validate::{self, Invalid};

/// Most cores that one instance may ask for.
pub const MAX_CPU_CORES: u32 = 4096;
/// Least memory that an instance may ask for, in bytes.
pub const MIN_MEMORY_BYTES: u64 = 4 * MIB;
/// Most memory that an instance may ask for, in bytes: 64 TiB.
pub const MAX_MEMORY_BYTES: u64 = 64 << 40;
/// Most disks of one instance.
pub const MAX_DISKS: usize = 32;
/// Largest disk, in bytes: 1 PiB.
pub const MAX_DISK_BYTES: u64 = 1 << 50;
/// Most words of a command, and most arguments.
pub const MAX_ARGS: usize = 1024;
/// Longest kernel command line, in bytes: what x86 Linux takes.
pub const MAX_KERNEL_ARGS_BYTES: usize = 2047;
/// Longest cloud-init document, in bytes.
pub const MAX_USER_DATA_BYTES: usize = 256 << 10;
/// Most bytes of all command words, arguments and environment together.
pub const MAX_PROCESS_BYTES: usize = 256 << 10;

/// What an instance is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// The image it starts from; may be empty if a kernel is given.
    pub image: String,
    /// Processor cores.
    pub cpu_cores: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Disks beside the image's own.
    pub disks: Vec<DiskSpec>,
    /// How it is connected; `None` is a network of the driver's choice.
    pub network: Option<NetworkSpec>,
    /// Kernel file in the node's image directory, for a direct boot.
    pub kernel: String,
    /// Initial ram disk in the node's image directory.
    pub initrd: String,
    /// Kernel command line, added to the image's own.
    pub kernel_args: String,
    /// What a container runs instead of its image's entry point.
    pub command: Vec<String>,
    /// Arguments to it.
    pub args: Vec<String>,
    /// Environment variables.
    pub env: Environment,
    /// Volumes to mount.
    pub volume_mounts: Vec<VolumeMount>,
    /// Bounds beyond cores and memory.
    pub limits: Option<ResourceLimits>,
    /// cloud-init user data for a virtual machine; may be empty.
    pub user_data: String,
    /// How a virtual machine boots; `None` is the driver's choice.
    #[serde(default)]
    pub firmware: Option<Firmware>,
    /// Whether a virtual machine has a trusted platform module.
    #[serde(default)]
    pub tpm: bool,
    /// Whether a container's root cannot be written.
    #[serde(default)]
    pub read_only_root: bool,
    /// Whom a container runs as: `uid` or `uid:gid`; empty: the image's user.
    #[serde(default)]
    pub user: String,
    /// Where a container's process begins; empty: the image's.
    #[serde(default)]
    pub working_dir: String,
    /// How a container is known to be well.
    #[serde(default)]
    pub health_check: Option<HealthCheck>,
    /// The image that it is started from to be repaired, its own disks behind it; empty: it is not in rescue.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub rescue: String,
    /// What it is made from instead of its image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone_of: Option<Box<CloneOrigin>>,
    /// What of its node it has for itself.
    #[serde(default)]
    pub devices: DeviceNeeds,
}

/// The snapshot of another instance that one is made from; it lies on the node of that one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CloneOrigin {
    /// Whose snapshot it is.
    pub instance: InstanceId,
    /// The snapshot's name.
    pub snapshot: String,
}

/// How a virtual machine boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Firmware {
    /// A PC BIOS.
    Bios,
    /// UEFI, with variables of its own.
    Uefi,
}

impl Firmware {
    /// As the API spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bios => "bios",
            Self::Uefi => "uefi",
        }
    }
}

impl std::str::FromStr for Firmware {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "bios" => Ok(Self::Bios),
            "uefi" => Ok(Self::Uefi),
            _ => Err(Invalid::new("spec.firmware", text, "must be `bios` or `uefi`")),
        }
    }
}

/// A command that tells whether a container is well: exit code 0 says so.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HealthCheck {
    /// Program and arguments.
    pub command: Vec<String>,
    /// From one end to the next begin, in seconds.
    pub interval_seconds: u32,
    /// How long it may take, in seconds.
    pub timeout_seconds: u32,
    /// So many failures in a row end the container with a failure.
    pub retries: u32,
    /// Failures in the first seconds do not count.
    pub start_seconds: u32,
}

impl HealthCheck {
    /// Where nothing is said.
    pub const INTERVAL_SECONDS: u32 = 30;
    /// Where nothing is said.
    pub const TIMEOUT_SECONDS: u32 = 5;
    /// Where nothing is said.
    pub const RETRIES: u32 = 3;
    /// The longest of each time, in seconds: a day.
    pub const MAX_SECONDS: u32 = 86_400;
    /// Most words of its command.
    pub const MAX_WORDS: usize = 64;

    fn validate(&self) -> Result<(), Invalid> {
        let words = self.command.len();
        if words == 0 || words > Self::MAX_WORDS {
            let expected = format!("must have between 1 and {} words", Self::MAX_WORDS);
            return Err(Invalid::new("spec.health_check.command", words, expected));
        }
        if let Some(word) =
            self.command.iter().find(|word| word.contains('\0') || word.len() > MAX_PROCESS_BYTES)
        {
            return Err(Invalid::new(
                "spec.health_check.command",
                word,
                "must not contain NUL or be so long",
            ));
        }
        let times = [
            ("interval_seconds", self.interval_seconds),
            ("timeout_seconds", self.timeout_seconds),
            ("start_seconds", self.start_seconds),
            ("retries", self.retries),
        ];
        match times.into_iter().find(|(_, time)| *time > Self::MAX_SECONDS) {
            Some((field, value)) => Err(Invalid::new(
                format!("spec.health_check.{field}"),
                value,
                format!("must be at most {}", Self::MAX_SECONDS),
            )),
            None => Ok(()),
        }
    }
}

/// One more disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Its name, unique in the instance.
    pub name: String,
    /// Its size in bytes. For the boot disk 0 keeps the image's size.
    pub size_bytes: u64,
    /// `ssd`, `hdd` or `nvme`; empty for any.
    pub disk_type: String,
    /// Whether this sizes the disk that is made from the image.
    pub boot: bool,
}

/// How an instance is connected.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Which network; empty for the driver's own.
    pub network_id: String,
    /// Which subnet of it.
    pub subnet_id: String,
    /// Security groups.
    pub security_groups: Vec<String>,
    /// Whether it gets a public address.
    pub assign_public_ip: bool,
}

/// A volume in an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VolumeMount {
    /// Which volume.
    pub name: String,
    /// Where it is mounted.
    pub mount_path: String,
    /// Whether it can only be read.
    pub read_only: bool,
}

/// Bounds beyond cores and memory; 0 is no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ResourceLimits {
    /// Microseconds of processor time in each period.
    pub cpu_quota: i64,
    /// The period, in microseconds.
    pub cpu_period: i64,
    /// Memory, in bytes.
    pub memory_limit: i64,
    /// Memory and swap, in bytes.
    pub memory_swap: i64,
    /// Bytes read per second.
    pub io_read_bps: i64,
    /// Bytes written per second.
    pub io_write_bps: i64,
    /// Processes and threads.
    #[serde(default)]
    pub pids: i64,
}

impl InstanceSpec {
    /// The image that its node must have to make it; empty where it needs none.
    #[must_use]
    pub fn needed_image(&self) -> &str {
        if self.clone_of.is_some() { "" } else { &self.image }
    }

    /// Whether it is started from another image than its own, to be repaired.
    #[must_use]
    pub fn is_in_rescue(&self) -> bool {
        !self.rescue.is_empty()
    }

    /// What the scheduler counts. Disks count with the size asked for.
    #[must_use]
    pub fn resources(&self) -> Resources {
        Resources {
            cpu_cores: self.cpu_cores,
            memory_bytes: self.memory_bytes,
            disk_bytes: self.disks.iter().fold(0u64, |sum, disk| sum.saturating_add(disk.size_bytes)),
            gpu_count: 0,
        }
    }

    /// What of its node's devices is to be counted.
    #[must_use]
    pub fn device_amounts(&self) -> Amounts {
        self.devices.amounts(self.cpu_cores, self.memory_bytes)
    }

    /// Checks what a user wrote.
    ///
    /// # Errors
    /// Names the field that is refused.
    pub fn validate(&self, instance_type: InstanceType) -> Result<(), Invalid> {
        if self.cpu_cores == 0 || self.cpu_cores > MAX_CPU_CORES {
            let expected = format!("must be between 1 and {MAX_CPU_CORES}");
            return Err(Invalid::new("spec.cpu_cores", self.cpu_cores, expected));
        }
        if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&self.memory_bytes) {
            let expected =
                format!("must be between {MIN_MEMORY_BYTES} (4 MiB) and {MAX_MEMORY_BYTES} (64 TiB)");
            return Err(Invalid::new("spec.memory_bytes", self.memory_bytes, expected));
        }
        self.validate_boot(instance_type)?;
        self.validate_process()?;
        self.validate_disks()?;
        validate::text("spec.user_data", &self.user_data, MAX_USER_DATA_BYTES)?;
        self.validate_kind(instance_type)?;
        self.devices.validate(instance_type, self.memory_bytes)?;
        if self.volume_mounts.len() > MAX_DISKS {
            let expected = format!("must have at most {MAX_DISKS} entries");
            return Err(Invalid::new("spec.volume_mounts", self.volume_mounts.len(), expected));
        }
        Ok(())
    }

    fn validate_boot(&self, instance_type: InstanceType) -> Result<(), Invalid> {
        if !self.image.is_empty() {
            validate::printable("spec.image", &self.image, 512)?;
        }
        for (field, value) in [("spec.kernel", &self.kernel), ("spec.initrd", &self.initrd)] {
            if !value.is_empty() {
                validate::file_name(field, value)?;
            }
        }
        let kernel_args = &self.kernel_args;
        validate::text("spec.kernel_args", kernel_args, MAX_KERNEL_ARGS_BYTES)?;
        if kernel_args.contains('\n') {
            return Err(Invalid::new("spec.kernel_args", kernel_args, "must be one line"));
        }
        if self.is_in_rescue() {
            validate::printable("spec.rescue", &self.rescue, 512)?;
            if instance_type == InstanceType::Container {
                let expected = "is not for containers: stop it, and run another container from a rescue image with the \
                                same volumes, or use `hypervisor-ctl instance exec`";
                return Err(Invalid::new("spec.rescue", &self.rescue, expected));
            }
        }
        let bootable =
            !self.image.is_empty() || (!self.kernel.is_empty() && instance_type != InstanceType::Container);
        if !bootable {
            return Err(Invalid::new(
                "spec.image",
                "",
                "must name an image; see `hypervisor-ctl image list`",
            ));
        }
        Ok(())
    }

    fn validate_process(&self) -> Result<(), Invalid> {
        let count = self.command.len() + self.args.len() + self.env.len();
        if count > MAX_ARGS {
            let expected =
                format!("and spec.args and spec.env must together have at most {MAX_ARGS} entries");
            return Err(Invalid::new("spec.command", count, expected));
        }
        let words = self.command.iter().chain(&self.args).chain(self.env.keys()).chain(self.env.values());
        let mut bytes = 0;
        for word in words {
            bytes += word.len();
            if word.contains('\0') {
                return Err(Invalid::new("spec.command", word, "must not contain NUL"));
            }
        }
        if bytes > MAX_PROCESS_BYTES {
            let expected =
                format!("and spec.args and spec.env must together have at most {MAX_PROCESS_BYTES} bytes");
            return Err(Invalid::new("spec.command", bytes, expected));
        }
        if let Some(name) = self.env.keys().find(|name| name.is_empty() || name.contains('=')) {
            return Err(Invalid::new("spec.env", name, "names must not be empty or contain `=`"));
        }
        Ok(())
    }

    /// What only one kind of instance has is refused elsewhere, so that nobody relies on it in vain.
    fn validate_kind(&self, instance_type: InstanceType) -> Result<(), Invalid> {
        let of_containers = [
            ("spec.read_only_root", self.read_only_root),
            ("spec.user", !self.user.is_empty()),
            ("spec.working_dir", !self.working_dir.is_empty()),
            ("spec.health_check", self.health_check.is_some()),
        ];
        let of_machines = [("spec.firmware", self.firmware.is_some()), ("spec.tpm", self.tpm)];
        let refused: &[(&str, bool)] = match instance_type {
            InstanceType::Vm => &of_containers,
            InstanceType::Container => &of_machines,
            InstanceType::Microvm => &[of_containers[0], of_containers[3], of_machines[0], of_machines[1]],
        };
        if let Some((field, _)) = refused.iter().find(|(_, is_set)| *is_set) {
            return Err(Invalid::new(*field, instance_type, "is not for an instance of this type"));
        }
        let is_id = |id: &str| id.parse::<u32>().is_ok();
        let (uid, gid) = self.user.split_once(':').unwrap_or((&self.user, "0"));
        let is_user = self.user.is_empty() || (is_id(uid) && is_id(gid));
        if !is_user {
            return Err(Invalid::new("spec.user", &self.user, "must be `uid` or `uid:gid` in numbers"));
        }
        validate::text("spec.working_dir", &self.working_dir, 4096)?;
        if !self.working_dir.is_empty() && !self.working_dir.starts_with('/') {
            return Err(Invalid::new("spec.working_dir", &self.working_dir, "must begin with `/`"));
        }
        self.health_check.as_ref().map_or(Ok(()), HealthCheck::validate)
    }

    fn validate_disks(&self) -> Result<(), Invalid> {
        if self.disks.len() > MAX_DISKS {
            return Err(Invalid::new(
                "spec.disks",
                self.disks.len(),
                format!("must have at most {MAX_DISKS} entries"),
            ));
        }
        let mut names = std::collections::BTreeSet::new();
        for (index, disk) in self.disks.iter().enumerate() {
            let field = |name: &str| format!("spec.disks[{index}].{name}");
            validate::name(&field("name"), &disk.name)?;
            if !names.insert(&disk.name) {
                return Err(Invalid::new(field("name"), &disk.name, "must be unique in the instance"));
            }
            if disk.size_bytes > MAX_DISK_BYTES || (disk.size_bytes == 0 && !disk.boot) {
                let expected = format!("must be between 1 and {MAX_DISK_BYTES} (1 PiB)");
                return Err(Invalid::new(field("size_bytes"), disk.size_bytes, expected));
            }
        }
        if self.disks.iter().filter(|disk| disk.boot).count() > 1 {
            return Err(Invalid::new("spec.disks", self.disks.len(), "must have at most one boot disk"));
        }
        Ok(())
    }
}
