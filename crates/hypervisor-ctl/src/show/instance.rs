//! Instances as rows and as a page.

use std::collections::HashMap;
use std::time::SystemTime;

use hv_proto::v1::{self, InstanceState};

use super::{Page, pairs};
use crate::output::table::{Cell, Table, Tone};
use crate::output::text::{age, escape, labels, moment, short_id, short_ids, size};
use crate::output::{Output, OutputFormat};

/// Prints instances as rows.
#[derive(Debug)]
pub(crate) struct InstanceTable {
    table: Table,
    wide: bool,
    id_chars: usize,
}

impl InstanceTable {
    pub(crate) fn new(output: Output) -> Self {
        let wide = output.format == OutputFormat::Wide;
        let mut titles = vec!["ID", "NAME", "TYPE", "STATE", "NODE", "IP", "AGE"];
        if wide {
            titles.extend(["IMAGE", "CPUS", "MEMORY", "WANTED", "PROJECT", "LABELS", "REASON"]);
        }
        Self { table: Table::new(titles, output.colours), wide, id_chars: 0 }
    }

    /// For a watch: leaves room for the states that will come.
    pub(crate) fn for_watch(output: Output) -> Self {
        let mut watch = Self::new(output);
        watch.table.reserve(&[("NAME", 12), ("STATE", 8), ("NODE", 13), ("IP", 12)]);
        watch
    }

    /// The rows as lines.
    pub(crate) fn render(&mut self, instances: &[v1::Instance], now: SystemTime) -> String {
        self.id_chars = self.id_chars.max(short_ids(instances.iter().map(|instance| instance.id.as_str())));
        let rows: Vec<Vec<Cell>> = instances.iter().map(|instance| self.row(instance, now)).collect();
        self.table.render(&rows)
    }

    /// The row of an instance that is gone.
    pub(crate) fn gone(&mut self, instance: &v1::Instance, now: SystemTime) -> String {
        let mut row = self.row(instance, now);
        row[3] = Cell::toned("DELETED", Tone::Bad);
        self.table.render(&[row])
    }

    fn row(&self, instance: &v1::Instance, now: SystemTime) -> Vec<Cell> {
        let mut row: Vec<Cell> = vec![
            if self.wide { escape(&instance.id) } else { short_id(&instance.id, self.id_chars) }.into(),
            escape(&instance.name).into(),
            type_name(instance.r#type()).into(),
            Cell::toned(state_shown(instance), tone(instance.state())),
            if self.wide { escape(&instance.node_id) } else { short_id(&instance.node_id, self.id_chars) }
                .into(),
            escape(&instance.ip_address).into(),
            age(instance.created_at.as_ref(), now).into(),
        ];
        if self.wide {
            let spec = instance.spec.clone().unwrap_or_default();
            let image = if spec.image.is_empty() { &spec.kernel } else { &spec.image };
            row.extend([
                escape(image).into(),
                spec.cpu_cores.to_string().into(),
                size(spec.memory_bytes).into(),
                wanted_name(instance.wanted()).into(),
                escape(&instance.project).into(),
                labels(&instance.metadata.clone().unwrap_or_default().labels).into(),
                Cell::from(escape(&instance.state_reason)),
            ]);
        }
        row
    }
}

/// The state, with a word about what it runs from if that is not its own disk.
fn state_shown(instance: &v1::Instance) -> String {
    let rescue = instance.spec.as_ref().is_some_and(|spec| !spec.rescue.is_empty());
    let state = state_name(instance.state());
    if rescue { format!("{state} (rescue)") } else { state.to_owned() }
}

/// A state as people see it.
pub(crate) fn state_name(state: InstanceState) -> &'static str {
    state.as_str_name().trim_start_matches("INSTANCE_STATE_")
}

/// What is wanted, as people see it.
pub(crate) fn wanted_name(wanted: v1::InstanceWanted) -> &'static str {
    match wanted {
        v1::InstanceWanted::Unspecified => "",
        _ => wanted.as_str_name().trim_start_matches("INSTANCE_WANTED_"),
    }
}

/// A type as people type it.
pub(crate) fn type_name(kind: v1::InstanceType) -> &'static str {
    match kind {
        v1::InstanceType::Unspecified => "",
        v1::InstanceType::Vm => "vm",
        v1::InstanceType::Container => "container",
        v1::InstanceType::Microvm => "microvm",
    }
}

fn tone(state: InstanceState) -> Tone {
    match state {
        InstanceState::Running => Tone::Good,
        InstanceState::Failed | InstanceState::Unknown => Tone::Bad,
        InstanceState::Pending
        | InstanceState::Creating
        | InstanceState::Starting
        | InstanceState::Stopping
        | InstanceState::Deleting => Tone::Busy,
        InstanceState::Stopped | InstanceState::Paused | InstanceState::Unspecified => Tone::Plain,
    }
}

/// Everything about one instance.
pub(crate) fn describe(instance: &v1::Instance, node_name: &str, output: Output) -> Page {
    let mut page = Page::default();
    let state = instance.state();
    page.line(0, "Name", escape(&instance.name));
    page.line(0, "Id", escape(&instance.id));
    page.line(0, "Type", type_name(instance.r#type()));
    page.some(0, "Project", escape(&instance.project));
    page.line(0, "State", tone(state).paint(state_name(state), output.colours));
    page.some(0, "Reason", escape(&instance.state_reason));
    if let Some(spec) = instance.spec.as_ref().filter(|spec| !spec.rescue.is_empty()) {
        page.line(0, "Rescue", format!("from {}, its own disks behind it", escape(&spec.rescue)));
    }
    page.some(0, "Wanted", wanted_name(instance.wanted()));
    let progress =
        if instance.observed_generation >= instance.generation { "settled" } else { "in progress" };
    page.line(
        0,
        "Generation",
        format!("{} ({progress}, node has finished {})", instance.generation, instance.observed_generation),
    );
    let node = match node_name {
        "" => escape(&instance.node_id),
        name if name == instance.node_id => escape(name),
        name => format!("{} ({})", escape(name), escape(&instance.node_id)),
    };
    page.line(0, "Node", node);
    page.line(0, "Epoch", format!("{} (how often it was bound to a node)", instance.epoch));
    page.line(0, "IP", escape(&instance.ip_address));
    page.some(0, "Recovery", escape(&instance.recovery_note));
    page.some(0, "At next start", escape(&instance.update_note));
    describe_policies(&mut page, instance);
    page.line(0, "Created", moment(instance.created_at.as_ref()));
    page.some(0, "Started", moment(instance.started_at.as_ref()));
    page.line(0, "Revision", instance.revision.to_string());
    describe_spec(&mut page, &instance.spec.clone().unwrap_or_default());
    let metadata = instance.metadata.as_ref();
    pairs(&mut page, 0, "Labels", metadata.map(|metadata| &metadata.labels));
    pairs(&mut page, 0, "Annotations", metadata.map(|metadata| &metadata.annotations));
    page
}

fn describe_policies(page: &mut Page, instance: &v1::Instance) {
    let restarts = match (instance.restart_policy(), instance.restart_count) {
        (v1::RestartPolicy::Unspecified | v1::RestartPolicy::Never, _) => "never".to_owned(),
        (policy, count) => {
            let name = if policy == v1::RestartPolicy::Always { "always" } else { "on-failure" };
            format!("{name} (restarted {count} times)")
        }
    };
    page.line(0, "Restart", restarts);
    let elsewhere = instance.failover_policy() == v1::FailoverPolicy::Restart;
    page.line(0, "Failover", if elsewhere { "restart" } else { "never" });
    page.some(0, "Set", escape(&instance.set));
    page.some(0, "Only node", escape(&instance.preferred_node_id));
    page.some(0, "Only region", escape(&instance.region));
    page.some(0, "Only zone", escape(&instance.zone));
    pairs(page, 0, "Only nodes with", Some(&instance.node_selector));
    if let Some(rules) = &instance.placement {
        page.heading(0, "Placement");
        let rules = serde_json::to_value(rules).unwrap_or_default();
        for (name, rule) in rules.as_object().into_iter().flatten() {
            page.line(1, name, escape(&rule.to_string()));
        }
    }
}

fn describe_spec(page: &mut Page, spec: &v1::InstanceSpec) {
    page.heading(0, "Spec");
    page.some(1, "Image", escape(&spec.image));
    if let Some(origin) = &spec.clone_of {
        let (snapshot, source) = (escape(&origin.snapshot), escape(&origin.instance_id));
        page.line(1, "Made from", format!("snapshot {snapshot} of instance {source}"));
    }
    page.line(1, "CPUs", spec.cpu_cores.to_string());
    page.line(1, "Memory", size(spec.memory_bytes));
    page.some(1, "Kernel", escape(&spec.kernel));
    page.some(1, "Initrd", escape(&spec.initrd));
    page.some(1, "Kernel arguments", escape(&spec.kernel_args));
    let words = |words: &[String]| words.iter().map(|word| escape(word)).collect::<Vec<_>>().join(" ");
    page.some(1, "Firmware", escape(&spec.firmware));
    page.some(1, "TPM", if spec.tpm { "yes" } else { "" });
    page.some(1, "Root", if spec.read_only_root { "read-only" } else { "" });
    page.some(1, "User", escape(&spec.user));
    page.some(1, "Working directory", escape(&spec.working_dir));
    page.some(1, "Command", words(&spec.command));
    page.some(1, "Arguments", words(&spec.args));
    if !spec.user_data.is_empty() {
        page.line(1, "User data", size(i64::try_from(spec.user_data.len()).unwrap_or(i64::MAX)));
    }
    if let Some(needs) = &spec.devices {
        let mut parts = Vec::new();
        parts.extend(needs.dedicated_cpus.then(|| "dedicated processors".to_owned()));
        if needs.huge_page_bytes > 0 {
            parts
                .push(format!("pages of {}", size(i64::try_from(needs.huge_page_bytes).unwrap_or(i64::MAX))));
        }
        parts.extend(needs.pci.iter().map(|need| format!("{} of {}", need.count, escape(&need.model))));
        page.some(1, "For itself", parts.join(", "));
    }
    if let Some(check) = &spec.health_check {
        page.some(1, "Health check", words(&check.command));
    }
    if !spec.disks.is_empty() {
        page.heading(1, "Disks");
    }
    for disk in &spec.disks {
        let boot = if disk.boot { ", boot" } else { "" };
        let kind = if disk.r#type.is_empty() { String::new() } else { format!(", {}", escape(&disk.r#type)) };
        let shown = if disk.size_bytes == 0 { "the image's size".to_owned() } else { size(disk.size_bytes) };
        page.line(2, &escape(&disk.name), format!("{shown}{kind}{boot}"));
    }
    if let Some(network) = &spec.network {
        page.some(1, "Network", escape(&network.network_id));
    }
    let names: HashMap<String, String> = spec.env.clone();
    pairs(page, 1, "Environment", Some(&names));
}

/// Use of resources as rows.
pub(crate) fn stats_table(output: Output) -> Table {
    let mut titles = vec!["NAME", "CPU", "MEMORY", "DISK READ", "DISK WRITTEN", "RECEIVED", "SENT"];
    if output.format == OutputFormat::Wide {
        titles.extend(["CPU TIME", "CACHE", "AT"]);
    }
    Table::new(titles, output.colours)
}

/// One reading as a row.
pub(crate) fn stats_row(output: Output, name: &str, stats: &v1::InstanceStats) -> Vec<Cell> {
    let mut row: Vec<Cell> = vec![
        escape(name).into(),
        format!("{:.1}%", stats.cpu_usage_percent).into(),
        size(stats.memory_used_bytes).into(),
        size(stats.disk_read_bytes).into(),
        size(stats.disk_write_bytes).into(),
        size(stats.network_rx_bytes).into(),
        size(stats.network_tx_bytes).into(),
    ];
    if output.format == OutputFormat::Wide {
        let seconds = stats.cpu_time_ns as f64 / 1e9;
        row.extend([
            format!("{seconds:.1}s").into(),
            size(stats.memory_cache_bytes).into(),
            moment(stats.collected_at.as_ref()).into(),
        ]);
    }
    row
}
