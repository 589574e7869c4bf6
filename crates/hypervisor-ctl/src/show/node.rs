//! Nodes and images as rows and as a page.

use std::time::SystemTime;

use hv_proto::v1::{self, NodeStatus};

use super::instance::type_name;
use super::{Page, pairs, resources};
use crate::output::table::{Cell, Table, Tone};
use crate::output::text::{age, escape, labels, moment, short_id, short_ids, size};
use crate::output::{Output, OutputFormat};

/// Prints nodes as rows.
#[derive(Debug)]
pub(crate) struct NodeTable {
    table: Table,
    wide: bool,
    id_chars: usize,
}

impl NodeTable {
    pub(crate) fn new(output: Output) -> Self {
        let wide = output.format == OutputFormat::Wide;
        let mut titles =
            vec!["ID", "NAME", "STATUS", "CPUS", "MEMORY", "INSTANCES", "TYPES", "LAST SEEN", "AGE"];
        if wide {
            titles.extend(["ADDRESS", "ROLE", "REGION", "ZONE", "VERSION", "LABELS"]);
        }
        Self { table: Table::new(titles, output.colours), wide, id_chars: 0 }
    }

    /// For a watch: leaves room for the states that will come.
    pub(crate) fn for_watch(output: Output) -> Self {
        let mut watch = Self::new(output);
        watch.table.reserve(&[("STATUS", 11), ("MEMORY", 16)]);
        watch
    }

    /// The rows as lines.
    pub(crate) fn render(&mut self, nodes: &[v1::Node], now: SystemTime) -> String {
        self.id_chars = self.id_chars.max(short_ids(nodes.iter().map(|node| node.id.as_str())));
        let rows: Vec<Vec<Cell>> = nodes.iter().map(|node| self.row(node, now)).collect();
        self.table.render(&rows)
    }

    /// The row of a node that is gone.
    pub(crate) fn gone(&mut self, node: &v1::Node, now: SystemTime) -> String {
        let mut row = self.row(node, now);
        row[2] = Cell::toned("DELETED", Tone::Bad);
        self.table.render(&[row])
    }

    fn row(&self, node: &v1::Node, now: SystemTime) -> Vec<Cell> {
        let allocated = node.allocated.unwrap_or_default();
        let allocatable = node.allocatable.or(node.capacity).unwrap_or_default();
        let mut row: Vec<Cell> = vec![
            if self.wide { escape(&node.id) } else { short_id(&node.id, self.id_chars) }.into(),
            escape(&node.hostname).into(),
            Cell::toned(status_name(node.status()), tone(node.status())),
            format!("{}/{}", allocated.cpu_cores, allocatable.cpu_cores).into(),
            format!("{}/{}", size(allocated.memory_bytes), size(allocatable.memory_bytes)).into(),
            node.instance_count.to_string().into(),
            escape(&node.supported_instance_types.join(",")).into(),
            age(node.last_seen.as_ref(), now).into(),
            age(node.created_at.as_ref(), now).into(),
        ];
        if self.wide {
            row.extend([
                address(node).into(),
                role_name(node.role()).into(),
                escape(&node.region).into(),
                escape(&node.zone).into(),
                escape(&node.agent_version).into(),
                Cell::from(labels(&node.metadata.clone().unwrap_or_default().labels)),
            ]);
        }
        row
    }
}

/// A status as people see it.
pub(crate) fn status_name(status: NodeStatus) -> &'static str {
    status.as_str_name().trim_start_matches("NODE_STATUS_")
}

fn role_name(role: v1::NodeRole) -> &'static str {
    match role {
        v1::NodeRole::Unspecified => "",
        v1::NodeRole::Master => "master",
        v1::NodeRole::Worker => "worker",
    }
}

fn tone(status: NodeStatus) -> Tone {
    match status {
        NodeStatus::Ready => Tone::Good,
        NodeStatus::NotReady => Tone::Bad,
        NodeStatus::Maintenance | NodeStatus::Draining => Tone::Busy,
        NodeStatus::Unspecified => Tone::Plain,
    }
}

fn address(node: &v1::Node) -> String {
    let host = if node.ip.contains(':') { format!("[{}]", node.ip) } else { node.ip.clone() };
    escape(&format!("{host}:{}", node.port))
}

/// Everything about one node.
pub(crate) fn describe(node: &v1::Node, output: Output, now: SystemTime) -> Page {
    let mut page = Page::default();
    let status = node.status();
    page.line(0, "Name", escape(&node.hostname));
    page.line(0, "Id", escape(&node.id));
    page.line(0, "Status", tone(status).paint(status_name(status), output.colours));
    page.line(0, "Address", address(node));
    page.some(0, "Role", role_name(node.role()));
    page.some(0, "Region", escape(&node.region));
    page.some(0, "Zone", escape(&node.zone));
    page.some(0, "Agent version", escape(&node.agent_version));
    page.line(0, "Registered", moment(node.created_at.as_ref()));
    let last_seen = match age(node.last_seen.as_ref(), now) {
        none if none.is_empty() => none,
        age => format!("{} ({age} ago)", moment(node.last_seen.as_ref())),
    };
    page.line(0, "Last seen", last_seen);
    describe_decisions(&mut page, node);
    page.heading(0, "Resources");
    page.line(1, "Capacity", resources(node.capacity.as_ref()));
    page.line(1, "Allocatable", resources(node.allocatable.as_ref()));
    if let Some(reserved) = node.reserved.as_ref().filter(|amount| **amount != v1::Resources::default()) {
        page.line(1, "Reserved", resources(Some(reserved)));
    }
    if let Some(more) = node.overcommit.as_ref().filter(|more| **more != NO_OVERCOMMIT) {
        let (cpu, memory, disk) = (more.cpu_percent, more.memory_percent, more.disk_percent);
        page.line(1, "Overcommit", format!("{cpu} % of cores, {memory} % of memory, {disk} % of disk"));
    }
    if node.schedulable != node.allocatable {
        page.line(1, "Schedulable", resources(node.schedulable.as_ref()));
    }
    page.line(1, "Allocated", resources(node.allocated.as_ref()));
    if let Some(usage) = &node.usage {
        let used =
            format!("{:.1} cores, {} memory", usage.cpu_usage_percent / 100.0, size(usage.memory_used_bytes));
        page.line(1, "In use", format!("{used}, {} disk", size(usage.disk_used_bytes)));
    }
    describe_devices(&mut page, node, output);
    pairs(&mut page, 0, "Labels", node.metadata.as_ref().map(|metadata| &metadata.labels));
    pairs(&mut page, 0, "Annotations", node.metadata.as_ref().map(|metadata| &metadata.annotations));
    describe_health(&mut page, node, output, now);
    page
}

/// As much as there is.
const NO_OVERCOMMIT: v1::Overcommit =
    v1::Overcommit { cpu_percent: 100, memory_percent: 100, disk_percent: 100 };

/// What it gives to one instance at a time, and what of that is promised.
fn describe_devices(page: &mut Page, node: &v1::Node, output: Output) {
    let Some(devices) = &node.devices else { return };
    page.heading(0, "Devices");
    for amount in &devices.amounts {
        let free = amount.total.saturating_sub(amount.allocated);
        page.line(1, &escape(&amount.kind), format!("{free} of {} free", amount.total));
    }
    if devices.pci.is_empty() {
        return;
    }
    let mut table =
        Table::new(vec!["ADDRESS", "KIND", "CLASS", "NUMA", "GROUP", "DRIVER", "USABLE"], output.colours);
    let number = |number: Option<u32>| number.map(|number| number.to_string()).unwrap_or_default();
    let row = |device: &v1::NodePciDevice| {
        let usable = if device.unusable.is_empty() {
            Cell::toned("yes", Tone::Good)
        } else {
            Cell::toned(escape(&format!("no: {}", device.unusable)), Tone::Bad)
        };
        vec![
            escape(&device.address).into(),
            escape(&device.model).into(),
            format!("{:06x}", device.class).into(),
            number(device.numa_node).into(),
            number(device.iommu_group).into(),
            escape(&device.driver).into(),
            usable,
        ]
    };
    page.block(1, &table.render(&devices.pci.iter().map(row).collect::<Vec<_>>()));
}

/// What the operator decided, and how a loss of the node would go.
fn describe_decisions(page: &mut Page, node: &v1::Node) {
    let taint = |taint: &v1::Taint| {
        let value = if taint.value.is_empty() { String::new() } else { format!("={}", taint.value) };
        let prefer = taint.effect() == v1::TaintEffect::PreferNoSchedule;
        escape(&format!("{}{value}{}", taint.key, if prefer { ":prefer" } else { "" }))
    };
    page.some(0, "Taints", node.taints.iter().map(taint).collect::<Vec<_>>().join(", "));
    if let Some(fencing) = &node.fencing {
        let armed = if fencing.armed { "armed" } else { "not armed" };
        let why = if fencing.message.is_empty() { String::new() } else { format!(": {}", fencing.message) };
        page.line(0, "Fencing", escape(&format!("{armed}{why}")));
    }
    if node.failover_held {
        page.line(0, "Failover", "held by an operator; `node release-failover` ends that");
    }
    if node.confirmed_down {
        page.line(0, "Confirmed down", "yes, by an operator");
    }
    page.some(0, "Lost since", moment(node.lost_since.as_ref()));
    page.some(0, "Drain operation", escape(&node.drain_operation_id));
}

fn describe_health(page: &mut Page, node: &v1::Node, output: Output, now: SystemTime) {
    if !node.drivers.is_empty() {
        let mut table =
            Table::new(vec!["NAME", "TYPE", "HEALTHY", "VERSION", "CAPABILITIES", "MESSAGE"], output.colours);
        let row = |driver: &v1::DriverInfo| {
            let (word, tone) = if driver.healthy { ("yes", Tone::Good) } else { ("no", Tone::Bad) };
            vec![
                escape(&driver.name).into(),
                type_name(driver.r#type()).into(),
                Cell::toned(word, tone),
                escape(&driver.version).into(),
                escape(&driver.capabilities.join(",")).into(),
                escape(&driver.message).into(),
            ]
        };
        page.heading(0, "Drivers");
        page.block(1, &table.render(&node.drivers.iter().map(row).collect::<Vec<_>>()));
    }
    if !node.conditions.is_empty() {
        let mut table = Table::new(vec!["CONDITION", "STATUS", "SINCE", "REASON", "MESSAGE"], output.colours);
        let row = |condition: &v1::NodeCondition| {
            vec![
                escape(&condition.r#type).into(),
                escape(&condition.status).into(),
                age(condition.last_transition_time.as_ref(), now).into(),
                escape(&condition.reason).into(),
                Cell::from(escape(&condition.message)),
            ]
        };
        page.heading(0, "Conditions");
        page.block(1, &table.render(&node.conditions.iter().map(row).collect::<Vec<_>>()));
    }
    if !node.images.is_empty() {
        page.heading(0, "Images");
        page.block(1, &image_table(&node.images, output, now));
    }
}

/// What is known of an image.
pub(crate) fn image_page(image: &v1::Image, now: SystemTime) -> Page {
    let or_none = |text: &str| if text.is_empty() { "-".to_owned() } else { escape(text) };
    let mut page = Page::default();
    page.line(0, "Name", escape(&image.name));
    page.line(0, "Type", type_name(image.r#type()));
    page.line(0, "Form", or_none(&image.form));
    page.line(0, "Architecture", or_none(&image.architecture));
    page.line(0, "Size", size(image.size_bytes));
    page.line(0, "Digest", or_none(&image.digest));
    page.line(0, "Source", or_none(&image.source));
    page.line(0, "Age", age(image.created_at.as_ref(), now));
    page.line(0, "Instances", image.instances.to_string());
    page.line(0, "Nodes", or_none(&image.node_ids.join(", ")));
    page
}

/// Images that were removed, as rows.
pub(crate) fn collected_table(images: &[v1::CollectedImage], output: Output) -> String {
    let row = |image: &v1::CollectedImage| -> Vec<Cell> {
        vec![escape(&image.node_id).into(), escape(&image.name).into(), size(image.size_bytes).into()]
    };
    Table::new(vec!["NODE", "NAME", "SIZE"], output.colours)
        .render(&images.iter().map(row).collect::<Vec<_>>())
}

/// Images as rows.
pub(crate) fn image_table(images: &[v1::Image], output: Output, now: SystemTime) -> String {
    let wide = output.format == OutputFormat::Wide;
    let mut titles = vec!["NAME", "TYPE", "ARCH", "SIZE", "NODES", "AGE"];
    if wide {
        titles.extend(["FORM", "SOURCE", "DIGEST", "ON", "TAGS"]);
    }
    let or_none = |text: &str| Cell::from(if text.is_empty() { "-".to_owned() } else { escape(text) });
    let row = |image: &v1::Image| {
        let mut row: Vec<Cell> = vec![
            escape(&image.name).into(),
            type_name(image.r#type()).into(),
            or_none(&image.architecture),
            size(image.size_bytes).into(),
            image.node_ids.len().to_string().into(),
            age(image.created_at.as_ref(), now).into(),
        ];
        if wide {
            row.extend([&image.form, &image.source, &image.digest].map(|text| or_none(text)));
            row.push(or_none(&image.node_ids.join(",")));
            row.push(or_none(&image.tags.join(",")));
        }
        row
    };
    Table::new(titles, output.colours).render(&images.iter().map(row).collect::<Vec<_>>())
}
