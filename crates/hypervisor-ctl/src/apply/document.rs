//! A document: what a user writes about an instance, strictly read.
//!
//! Field names are those of the wire, in snake_case or lowerCamelCase, and some short forms (`cpus`, `memory`, `size`). What
//! the server alone sets is accepted and ignored, so that the output of `instance get -o yaml` can be applied.

use std::collections::BTreeMap;

use hv_config::ByteSize;
use hv_proto::v1;
use hv_types::validate::excerpt;
use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny};
use serde_saphyr::{Spanned, UserMessageFormatter};

use crate::error::CtlError;

/// What a document asks for.
#[derive(Debug, Clone)]
pub(crate) struct Desired {
    /// `file:line`, for messages.
    pub(crate) place: String,
    pub(crate) name: String,
    /// Empty: the default one.
    pub(crate) project: String,
    /// The fields of the specification that the document gives, by their name in JSON.
    pub(crate) given: Vec<&'static str>,
    /// The fields beside the specification that the document gives and that cannot change, by their name in JSON.
    pub(crate) given_rules: Vec<&'static str>,
    /// What is to be, if it is said.
    pub(crate) wanted: Option<Wanted>,
    /// Whole; absent: as it is.
    pub(crate) labels: Option<BTreeMap<String, String>>,
    /// Whole; absent: as it is.
    pub(crate) annotations: Option<BTreeMap<String, String>>,
    /// How it would be created.
    pub(crate) request: v1::CreateInstanceRequest,
}

/// What an instance is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Wanted {
    #[serde(alias = "INSTANCE_WANTED_RUNNING")]
    Running,
    #[serde(alias = "INSTANCE_WANTED_STOPPED")]
    Stopped,
    #[serde(alias = "INSTANCE_WANTED_PAUSED")]
    Paused,
}

impl Wanted {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Paused => "paused",
        }
    }
}

/// All documents of a text.
///
/// # Errors
/// The first mistake, as `file:line:column: what`.
pub(crate) fn parse(file: &str, text: &str) -> Result<Vec<Desired>, CtlError> {
    let options = serde_saphyr::options! { with_snippet: false };
    let documents: Vec<Spanned<Option<Document>>> =
        serde_saphyr::from_multiple_with_options(text, options)
            .map_err(|error| CtlError::Document(located(file, text, &error)))?;
    let present = documents.into_iter().filter_map(|document| {
        let line = document.referenced.line();
        document.value.map(|value| (line, value))
    });
    present.map(|(line, document)| document.desired(format!("{file}:{line}"))).collect()
}

/// Places the message as editors and compilers do, and repeats the line: it names the field.
fn located(file: &str, text: &str, error: &serde_saphyr::Error) -> String {
    let message = error.render_with_formatter(&UserMessageFormatter);
    let Some(location) = error.location() else { return format!("{file}: {}", worded(&message)) };
    let (line, column) = (location.line(), location.column());
    // The message carries the position too, in words.
    let message = message.replace(&format!(" at line {line}, column {column}"), "");
    let message = message.replace(&format!("line {line} column {column}: "), "");
    let found = usize::try_from(line).ok().and_then(|line| text.lines().nth(line.saturating_sub(1)));
    let found = found.map(|found| format!("; found {}", excerpt(found.trim()))).unwrap_or_default();
    format!("{file}:{line}:{column}: {}{found}", worded(message.trim()))
}

/// The parser's terms in words that users of YAML know.
fn worded(message: &str) -> &str {
    match message {
        "expected string scalar" => "expected a text",
        "expected mapping start" => "expected fields with values, as `kind: Instance`",
        "expected sequence start" => "expected a list",
        "invalid i32" | "invalid i64" => "expected a whole number",
        other => other,
    }
}

#[derive(Debug, Clone, Copy, Deserialize)]
enum Kind {
    Instance,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    kind: Option<Kind>,
    #[serde(default)]
    name: String,
    #[serde(default)]
    r#type: Option<Type>,
    #[serde(default)]
    project: String,
    #[serde(default)]
    wanted: Option<Wanted>,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    region: String,
    #[serde(default)]
    zone: String,
    #[serde(default, alias = "preferredNodeId")]
    preferred_node_id: String,
    #[serde(default, alias = "nodeSelector")]
    node_selector: BTreeMap<String, String>,
    #[serde(default, alias = "restartPolicy")]
    restart_policy: Option<Restart>,
    #[serde(default, alias = "failoverPolicy")]
    failover_policy: Option<Failover>,
    /// As the wire spells it.
    #[serde(default)]
    placement: Option<v1::PlacementRules>,
    // What only the server sets.
    #[serde(default, rename = "id", deserialize_with = "ignored")]
    _id: (),
    #[serde(default, rename = "state", deserialize_with = "ignored")]
    _state: (),
    #[serde(default, rename = "node_id", alias = "nodeId", deserialize_with = "ignored")]
    _node_id: (),
    #[serde(default, rename = "ip_address", alias = "ipAddress", deserialize_with = "ignored")]
    _ip_address: (),
    #[serde(default, rename = "state_reason", alias = "stateReason", deserialize_with = "ignored")]
    _state_reason: (),
    #[serde(default, rename = "created_at", alias = "createdAt", deserialize_with = "ignored")]
    _created_at: (),
    #[serde(default, rename = "started_at", alias = "startedAt", deserialize_with = "ignored")]
    _started_at: (),
    #[serde(default, rename = "revision", deserialize_with = "ignored")]
    _revision: (),
    #[serde(default, rename = "generation", deserialize_with = "ignored")]
    _generation: (),
    #[serde(
        default,
        rename = "observed_generation",
        alias = "observedGeneration",
        deserialize_with = "ignored"
    )]
    _observed_generation: (),
    #[serde(default, rename = "epoch", deserialize_with = "ignored")]
    _epoch: (),
    #[serde(default, rename = "restart_count", alias = "restartCount", deserialize_with = "ignored")]
    _restart_count: (),
    #[serde(default, rename = "recovery_note", alias = "recoveryNote", deserialize_with = "ignored")]
    _recovery_note: (),
    #[serde(default, rename = "set", deserialize_with = "ignored")]
    _set: (),
    #[serde(default, rename = "update_note", alias = "updateNote", deserialize_with = "ignored")]
    _update_note: (),
    #[serde(default, rename = "migration_target", alias = "migrationTarget", deserialize_with = "ignored")]
    _migration_target: (),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Restart {
    #[serde(alias = "RESTART_POLICY_NEVER")]
    Never,
    #[serde(alias = "RESTART_POLICY_ON_FAILURE")]
    OnFailure,
    #[serde(alias = "RESTART_POLICY_ALWAYS")]
    Always,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Failover {
    #[serde(alias = "FAILOVER_POLICY_NEVER")]
    Never,
    #[serde(alias = "FAILOVER_POLICY_RESTART")]
    Restart,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Type {
    #[serde(alias = "INSTANCE_TYPE_VM")]
    Vm,
    #[serde(alias = "INSTANCE_TYPE_CONTAINER")]
    Container,
    #[serde(alias = "INSTANCE_TYPE_MICROVM")]
    Microvm,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    image: Option<String>,
    #[serde(alias = "cpuCores", alias = "cpus")]
    cpu_cores: Option<i32>,
    #[serde(alias = "memoryBytes")]
    memory_bytes: Option<ByteSize>,
    #[serde(default, deserialize_with = "with_unit")]
    memory: Option<ByteSize>,
    disks: Option<Vec<Disk>>,
    network: Option<Network>,
    kernel: Option<String>,
    initrd: Option<String>,
    #[serde(alias = "kernelArgs")]
    kernel_args: Option<String>,
    command: Option<Vec<String>>,
    args: Option<Vec<String>>,
    env: Option<BTreeMap<String, String>>,
    #[serde(alias = "volumeMounts")]
    volume_mounts: Option<Vec<VolumeMount>>,
    limits: Option<Limits>,
    #[serde(alias = "userData")]
    user_data: Option<String>,
    firmware: Option<String>,
    tpm: Option<bool>,
    #[serde(alias = "readOnlyRoot")]
    read_only_root: Option<bool>,
    user: Option<String>,
    #[serde(alias = "workingDir")]
    working_dir: Option<String>,
    #[serde(alias = "healthCheck")]
    health_check: Option<v1::HealthCheck>,
    devices: Option<v1::DeviceNeeds>,
    /// Part of what is printed of an instance in rescue; it is set by a command of its own.
    #[serde(default, rename = "rescue", deserialize_with = "ignored")]
    _rescue: (),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Disk {
    name: String,
    #[serde(default, alias = "sizeBytes", alias = "size")]
    size_bytes: ByteSize,
    #[serde(default)]
    r#type: String,
    #[serde(default)]
    boot: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Network {
    #[serde(default, alias = "networkId")]
    network_id: String,
    #[serde(default, alias = "subnetId")]
    subnet_id: String,
    #[serde(default, alias = "securityGroups")]
    security_groups: Vec<String>,
    #[serde(default, alias = "assignPublicIp")]
    assign_public_ip: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct VolumeMount {
    name: String,
    #[serde(alias = "mountPath")]
    mount_path: String,
    #[serde(default, alias = "readOnly")]
    read_only: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Limits {
    #[serde(alias = "cpuQuota")]
    cpu_quota: i64,
    #[serde(alias = "cpuPeriod")]
    cpu_period: i64,
    #[serde(alias = "memoryLimit")]
    memory_limit: ByteSize,
    #[serde(alias = "memorySwap")]
    memory_swap: ByteSize,
    #[serde(alias = "ioReadBps")]
    io_read_bps: ByteSize,
    #[serde(alias = "ioWriteBps")]
    io_write_bps: ByteSize,
    #[serde(default)]
    pids: i64,
}

fn ignored<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    IgnoredAny::deserialize(deserializer).map(|_| ())
}

/// On the command line a bare number is MiB, in `memory_bytes` it is bytes: here nobody knows what it means.
fn with_unit<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ByteSize>, D::Error> {
    let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(de::Error::custom(format!(
            "memory: found {text}, expected a size with its unit, as {text}MiB or 1GiB"
        )));
    }
    text.parse().map(Some).map_err(|error| de::Error::custom(format!("memory: {error}")))
}

fn signed(size: ByteSize) -> i64 {
    i64::try_from(size.bytes()).unwrap_or(i64::MAX)
}

impl Document {
    fn desired(self, place: String) -> Result<Desired, CtlError> {
        let refuse = |problem: &str| CtlError::Document(format!("{place}: {problem}"));
        match self.kind {
            Some(Kind::Instance) => {}
            None => return Err(refuse("kind: is missing, add `kind: Instance`")),
        }
        if self.spec.memory.is_some() && self.spec.memory_bytes.is_some() {
            return Err(refuse("spec: memory and memory_bytes say the same, leave one of them out"));
        }
        let given = self.spec.given();
        let rules = [
            ("restartPolicy", self.restart_policy.is_some()),
            ("failoverPolicy", self.failover_policy.is_some()),
            ("placement", self.placement.is_some()),
            ("region", !self.region.is_empty()),
            ("zone", !self.zone.is_empty()),
            ("nodeSelector", !self.node_selector.is_empty()),
        ];
        let given_rules = rules.into_iter().filter_map(|(name, given)| given.then_some(name)).collect();
        let metadata = v1::Metadata {
            labels: self.metadata.labels.clone().unwrap_or_default().into_iter().collect(),
            annotations: self.metadata.annotations.clone().unwrap_or_default().into_iter().collect(),
        };
        let request = v1::CreateInstanceRequest {
            name: self.name.clone(),
            r#type: self.r#type.map_or(0, |kind| kind.wire() as i32),
            spec: Some(self.spec.wire()),
            metadata: Some(metadata),
            preferred_node_id: self.preferred_node_id,
            region: self.region,
            zone: self.zone,
            node_selector: self.node_selector.into_iter().collect(),
            project: self.project.clone(),
            restart_policy: self.restart_policy.map_or(0, |policy| policy.wire() as i32),
            failover_policy: self.failover_policy.map_or(0, |policy| policy.wire() as i32),
            placement: self.placement,
            ..Default::default()
        };
        Ok(Desired {
            place,
            name: self.name,
            project: self.project,
            given,
            given_rules,
            wanted: self.wanted,
            labels: self.metadata.labels,
            annotations: self.metadata.annotations,
            request,
        })
    }
}

impl Restart {
    fn wire(self) -> v1::RestartPolicy {
        match self {
            Self::Never => v1::RestartPolicy::Never,
            Self::OnFailure => v1::RestartPolicy::OnFailure,
            Self::Always => v1::RestartPolicy::Always,
        }
    }
}

impl Failover {
    fn wire(self) -> v1::FailoverPolicy {
        match self {
            Self::Never => v1::FailoverPolicy::Never,
            Self::Restart => v1::FailoverPolicy::Restart,
        }
    }
}

impl Type {
    fn wire(self) -> v1::InstanceType {
        match self {
            Self::Vm => v1::InstanceType::Vm,
            Self::Container => v1::InstanceType::Container,
            Self::Microvm => v1::InstanceType::Microvm,
        }
    }
}

impl Spec {
    fn given(&self) -> Vec<&'static str> {
        [
            ("image", self.image.is_some()),
            ("cpuCores", self.cpu_cores.is_some()),
            ("memoryBytes", self.memory_bytes.is_some() || self.memory.is_some()),
            ("disks", self.disks.is_some()),
            ("network", self.network.is_some()),
            ("kernel", self.kernel.is_some()),
            ("initrd", self.initrd.is_some()),
            ("kernelArgs", self.kernel_args.is_some()),
            ("command", self.command.is_some()),
            ("args", self.args.is_some()),
            ("env", self.env.is_some()),
            ("volumeMounts", self.volume_mounts.is_some()),
            ("limits", self.limits.is_some()),
            ("userData", self.user_data.is_some()),
            ("firmware", self.firmware.is_some()),
            ("tpm", self.tpm.is_some()),
            ("readOnlyRoot", self.read_only_root.is_some()),
            ("user", self.user.is_some()),
            ("workingDir", self.working_dir.is_some()),
            ("healthCheck", self.health_check.is_some()),
            ("devices", self.devices.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, given)| given.then_some(name))
        .collect()
    }

    fn wire(self) -> v1::InstanceSpec {
        v1::InstanceSpec {
            image: self.image.unwrap_or_default(),
            cpu_cores: self.cpu_cores.unwrap_or(1),
            memory_bytes: signed(self.memory.or(self.memory_bytes).unwrap_or(ByteSize::from_mib(512))),
            disks: self.disks.unwrap_or_default().into_iter().map(Disk::wire).collect(),
            network: self.network.map(Network::wire),
            kernel: self.kernel.unwrap_or_default(),
            initrd: self.initrd.unwrap_or_default(),
            kernel_args: self.kernel_args.unwrap_or_default(),
            command: self.command.unwrap_or_default(),
            args: self.args.unwrap_or_default(),
            env: self.env.unwrap_or_default().into_iter().collect(),
            volume_mounts: self
                .volume_mounts
                .unwrap_or_default()
                .into_iter()
                .map(VolumeMount::wire)
                .collect(),
            limits: self.limits.map(Limits::wire),
            user_data: self.user_data.unwrap_or_default(),
            firmware: self.firmware.unwrap_or_default(),
            tpm: self.tpm.unwrap_or_default(),
            read_only_root: self.read_only_root.unwrap_or_default(),
            user: self.user.unwrap_or_default(),
            working_dir: self.working_dir.unwrap_or_default(),
            health_check: self.health_check,
            // Only `instance clone` makes instances from snapshots.
            clone_of: None,
            rescue: String::new(),
            devices: self.devices,
        }
    }
}

impl Disk {
    fn wire(self) -> v1::DiskSpec {
        v1::DiskSpec {
            name: self.name,
            size_bytes: signed(self.size_bytes),
            r#type: self.r#type,
            boot: self.boot,
        }
    }
}

impl Network {
    fn wire(self) -> v1::NetworkSpec {
        v1::NetworkSpec {
            network_id: self.network_id,
            subnet_id: self.subnet_id,
            security_groups: self.security_groups,
            assign_public_ip: self.assign_public_ip,
        }
    }
}

impl VolumeMount {
    fn wire(self) -> v1::VolumeMount {
        v1::VolumeMount { name: self.name, mount_path: self.mount_path, read_only: self.read_only }
    }
}

impl Limits {
    fn wire(self) -> v1::ResourceLimits {
        v1::ResourceLimits {
            cpu_quota: self.cpu_quota,
            cpu_period: self.cpu_period,
            memory_limit: signed(self.memory_limit),
            memory_swap: signed(self.memory_swap),
            io_read_bps: signed(self.io_read_bps),
            io_write_bps: signed(self.io_write_bps),
            pids: self.pids,
        }
    }
}
