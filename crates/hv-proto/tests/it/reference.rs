//! What clients of the reference services rely on: every service, method, message, field and enum value, with its
//! number and type, is there as it was, and what is new keeps away from it.

use std::collections::{BTreeMap, BTreeSet};

use hv_proto::{DESCRIPTORS, v1};
use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet};

/// Where the fields begin that the reference does not have, in messages that it does have.
const FIRST_NEW_NUMBER: i32 = 100;

const METHODS: &str = "\
ComputeService CreateInstance CreateInstanceRequest -> Instance
ComputeService DeleteInstance DeleteInstanceRequest -> Empty
ComputeService GetInstance GetInstanceRequest -> Instance
ComputeService ListInstances ListInstancesRequest -> ListInstancesResponse
ComputeService StartInstance StartInstanceRequest -> Instance
ComputeService StopInstance StopInstanceRequest -> Instance
ComputeService RestartInstance RestartInstanceRequest -> Instance
ComputeService GetInstanceStats GetInstanceStatsRequest -> InstanceStats
ComputeService WatchInstance WatchInstanceRequest -> stream InstanceEvent
ComputeService AttachConsole AttachConsoleRequest -> stream ConsoleData
ComputeService ListImages ListImagesRequest -> ListImagesResponse
ComputeService PullImage PullImageRequest -> stream PullImageProgress
AgentService CreateInstance AgentCreateInstanceRequest -> Instance
AgentService DeleteInstance AgentDeleteInstanceRequest -> Empty
AgentService StartInstance AgentInstanceRequest -> Instance
AgentService StopInstance AgentStopInstanceRequest -> Instance
AgentService RestartInstance AgentRestartInstanceRequest -> Instance
AgentService GetInstance AgentInstanceRequest -> Instance
AgentService ListInstances Empty -> AgentListInstancesResponse
AgentService GetInstanceStats AgentInstanceRequest -> InstanceStats
AgentService AttachConsole stream AgentConsoleInput -> stream AgentConsoleOutput
ClusterService RegisterNode RegisterNodeRequest -> RegisterNodeResponse
ClusterService DeregisterNode DeregisterNodeRequest -> Empty
ClusterService GetNode GetNodeRequest -> Node
ClusterService ListNodes ListNodesRequest -> ListNodesResponse
ClusterService UpdateNodeStatus UpdateNodeStatusRequest -> Node
ClusterService Heartbeat HeartbeatRequest -> HeartbeatResponse
ClusterService WatchNodes WatchNodesRequest -> stream NodeEvent
ClusterService GetClusterInfo Empty -> ClusterInfo
";

const ENUM_VALUES: &str = "\
NodeRole NODE_ROLE_UNSPECIFIED 0
NodeRole NODE_ROLE_MASTER 1
NodeRole NODE_ROLE_WORKER 2
NodeStatus NODE_STATUS_UNSPECIFIED 0
NodeStatus NODE_STATUS_READY 1
NodeStatus NODE_STATUS_NOT_READY 2
NodeStatus NODE_STATUS_MAINTENANCE 3
NodeStatus NODE_STATUS_DRAINING 4
InstanceType INSTANCE_TYPE_UNSPECIFIED 0
InstanceType INSTANCE_TYPE_VM 1
InstanceType INSTANCE_TYPE_CONTAINER 2
InstanceType INSTANCE_TYPE_MICROVM 3
InstanceState INSTANCE_STATE_UNSPECIFIED 0
InstanceState INSTANCE_STATE_PENDING 1
InstanceState INSTANCE_STATE_CREATING 2
InstanceState INSTANCE_STATE_RUNNING 3
InstanceState INSTANCE_STATE_STOPPED 4
InstanceState INSTANCE_STATE_FAILED 5
InstanceState INSTANCE_STATE_DELETING 6
EventType EVENT_TYPE_UNSPECIFIED 0
EventType EVENT_TYPE_ADDED 1
EventType EVENT_TYPE_MODIFIED 2
EventType EVENT_TYPE_DELETED 3
";

/// A line that is indented goes on with the message above.
const MESSAGES: &str = "\
Resources: 1 cpu_cores: int32; 2 memory_bytes: int64; 3 disk_bytes: int64; 4 gpu_count: int32
NodeCondition: 1 type: string; 2 status: string; 3 reason: string; 4 message: string;
    5 last_transition_time: Timestamp
NetworkSpec: 1 network_id: string; 2 subnet_id: string; 3 security_groups: repeated string;
    4 assign_public_ip: bool
DiskSpec: 1 name: string; 2 size_bytes: int64; 3 type: string; 4 boot: bool
Metadata: 1 labels: map<string,string>; 2 annotations: map<string,string>
Instance: 1 id: string; 2 name: string; 3 type: InstanceType; 4 state: InstanceState;
    5 spec: InstanceSpec; 6 node_id: string; 7 ip_address: string; 8 metadata: Metadata;
    9 state_reason: string; 10 created_at: Timestamp; 11 started_at: Timestamp
InstanceSpec: 1 image: string; 2 cpu_cores: int32; 3 memory_bytes: int64; 4 disks: repeated DiskSpec;
    5 network: NetworkSpec; 6 kernel: string; 7 initrd: string; 8 kernel_args: string;
    10 command: repeated string; 11 args: repeated string; 12 env: map<string,string>;
    13 volume_mounts: repeated VolumeMount; 14 limits: ResourceLimits
ResourceLimits: 1 cpu_quota: int64; 2 cpu_period: int64; 3 memory_limit: int64; 4 memory_swap: int64;
    5 io_read_bps: int64; 6 io_write_bps: int64
VolumeMount: 1 name: string; 2 mount_path: string; 3 read_only: bool
InstanceStats: 1 instance_id: string; 2 cpu_usage_percent: double; 3 cpu_time_ns: int64;
    4 memory_used_bytes: int64; 5 memory_cache_bytes: int64; 6 disk_read_bytes: int64;
    7 disk_write_bytes: int64; 8 network_rx_bytes: int64; 9 network_tx_bytes: int64;
    10 collected_at: Timestamp
InstanceEvent: 1 type: EventType; 2 instance: Instance
CreateInstanceRequest: 1 name: string; 2 type: InstanceType; 3 spec: InstanceSpec; 4 metadata: Metadata;
    5 preferred_node_id: string; 6 region: string; 7 zone: string
DeleteInstanceRequest: 1 instance_id: string; 2 force: bool
GetInstanceRequest: 1 instance_id: string
ListInstancesRequest: 1 type: InstanceType; 2 state: InstanceState; 3 node_id: string;
    4 label_selector: map<string,string>; 10 page_size: int32; 11 page_token: string
ListInstancesResponse: 1 instances: repeated Instance; 2 next_page_token: string; 3 total_count: int32
StartInstanceRequest: 1 instance_id: string
StopInstanceRequest: 1 instance_id: string; 2 force: bool; 3 timeout_seconds: int32
RestartInstanceRequest: 1 instance_id: string; 2 force: bool
GetInstanceStatsRequest: 1 instance_id: string
WatchInstanceRequest: 1 instance_id: string
AttachConsoleRequest: 1 instance_id: string; 2 tty: bool; 3 width: int32; 4 height: int32
ConsoleData: 1 data: bytes
Image: 1 id: string; 2 name: string; 3 tags: repeated string; 4 size_bytes: int64; 5 type: InstanceType;
    6 created_at: Timestamp
ListImagesRequest: 1 type: InstanceType; 2 page_size: int32; 3 page_token: string
ListImagesResponse: 1 images: repeated Image; 2 next_page_token: string
PullImageRequest: 1 image_ref: string; 2 type: InstanceType
PullImageProgress: 1 status: string; 2 current: int64; 3 total: int64; 4 completed: bool; 5 error: string
AgentCreateInstanceRequest: 1 instance_id: string; 2 name: string; 3 type: InstanceType;
    4 spec: InstanceSpec; 5 labels: map<string,string>; 6 annotations: map<string,string>
AgentDeleteInstanceRequest: 1 instance_id: string; 2 force: bool
AgentInstanceRequest: 1 instance_id: string
AgentStopInstanceRequest: 1 instance_id: string; 2 force: bool; 3 timeout_seconds: int32
AgentRestartInstanceRequest: 1 instance_id: string; 2 force: bool
AgentListInstancesResponse: 1 instances: repeated Instance
AgentConsoleInput: 1 data: bytes (oneof input); 2 resize: AgentConsoleResize (oneof input)
AgentConsoleResize: 1 width: int32; 2 height: int32
AgentConsoleOutput: 1 data: bytes
Node: 1 id: string; 2 hostname: string; 3 ip: string; 4 port: int32; 5 role: NodeRole;
    6 status: NodeStatus; 7 region: string; 8 zone: string; 9 capacity: Resources;
    10 allocatable: Resources; 11 allocated: Resources; 12 conditions: repeated NodeCondition;
    13 metadata: Metadata; 14 supported_instance_types: repeated string; 15 created_at: Timestamp;
    16 last_seen: Timestamp
NodeEvent: 1 type: EventType; 2 node: Node
RegisterNodeRequest: 1 hostname: string; 2 ip: string; 3 port: int32; 4 role: NodeRole; 5 region: string;
    6 zone: string; 7 capacity: Resources; 8 metadata: Metadata;
    9 supported_instance_types: repeated string
RegisterNodeResponse: 1 node_id: string; 2 heartbeat_interval_seconds: int64; 3 lease_ttl_seconds: int64
DeregisterNodeRequest: 1 node_id: string
GetNodeRequest: 1 node_id: string
ListNodesRequest: 1 role: NodeRole; 2 status: NodeStatus; 3 region: string; 4 zone: string;
    5 label_selector: map<string,string>; 10 page_size: int32; 11 page_token: string
ListNodesResponse: 1 nodes: repeated Node; 2 next_page_token: string; 3 total_count: int32
UpdateNodeStatusRequest: 1 node_id: string; 2 status: NodeStatus; 3 conditions: repeated NodeCondition;
    4 allocated: Resources
HeartbeatRequest: 1 node_id: string; 2 status: NodeStatus; 3 conditions: repeated NodeCondition;
    4 allocated: Resources
HeartbeatResponse: 1 accepted: bool; 2 next_heartbeat_seconds: int64; 3 commands: repeated NodeCommand
NodeCommand: 1 id: string; 2 type: string; 3 parameters: map<string,string>
WatchNodesRequest: 1 role: NodeRole; 2 region: string; 3 zone: string
ClusterInfo: 1 cluster_id: string; 2 cluster_name: string; 3 version: string; 4 total_nodes: int32;
    5 ready_nodes: int32; 6 total_capacity: Resources; 7 total_allocated: Resources
";

fn files() -> Vec<FileDescriptorProto> {
    let set = FileDescriptorSet::decode(DESCRIPTORS).unwrap();
    set.file.into_iter().filter(|file| file.package() == "hypervisor.v1").collect()
}

fn short(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

fn type_of(field: &FieldDescriptorProto, message: &DescriptorProto) -> String {
    let entry = message.nested_type.iter().find(|nested| nested.name() == short(field.type_name()));
    if let Some(entry) =
        entry.filter(|nested| nested.options.as_ref().is_some_and(|options| options.map_entry()))
    {
        return format!("map<{},{}>", type_of(&entry.field[0], entry), type_of(&entry.field[1], entry));
    }
    let name = match field.r#type() {
        Type::Message | Type::Enum => short(field.type_name()).to_owned(),
        scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_ascii_lowercase(),
    };
    if field.label() == Label::Repeated { format!("repeated {name}") } else { name }
}

/// `number name: type`, as the table has it.
fn fields(message: &DescriptorProto) -> BTreeSet<String> {
    let described = message.field.iter().map(|field| {
        let member = field.oneof_index.filter(|_| !field.proto3_optional());
        let oneof = member.map(|index| format!(" (oneof {})", message.oneof_decl[index as usize].name()));
        let kind = type_of(field, message);
        format!("{} {}: {kind}{}", field.number(), field.name(), oneof.unwrap_or_default())
    });
    described.collect()
}

#[test]
fn every_method_is_there_with_its_messages() {
    let mut there = BTreeSet::new();
    for service in files().iter().flat_map(|file| &file.service) {
        for method in &service.method {
            let stream = |streams| if streams { "stream " } else { "" };
            there.insert(format!(
                "{} {} {}{} -> {}{}",
                service.name(),
                method.name(),
                stream(method.client_streaming()),
                short(method.input_type()),
                stream(method.server_streaming()),
                short(method.output_type())
            ));
        }
    }
    for line in METHODS.lines() {
        assert!(there.contains(line), "{line}");
    }
}

#[test]
fn every_enum_value_is_there_with_its_number_and_new_ones_have_numbers_of_their_own() {
    let files = files();
    let mut reference: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for line in ENUM_VALUES.lines() {
        let (name, value) = line.split_once(' ').unwrap();
        reference.entry(name).or_default().insert(value.to_owned());
    }
    for (name, values) in reference {
        let found = files.iter().flat_map(|file| &file.enum_type).find(|found| found.name() == name).unwrap();
        let there: BTreeSet<_> =
            found.value.iter().map(|value| format!("{} {}", value.name(), value.number())).collect();
        assert!(there.is_superset(&values), "{name}: {values:?} are not all in {there:?}");
        let most =
            values.iter().filter_map(|value| value.rsplit(' ').next()?.parse::<i32>().ok()).max().unwrap();
        for new in there.difference(&values) {
            let number: i32 = new.rsplit(' ').next().unwrap().parse().unwrap();
            assert!(number > most, "{name}: {new} takes a number that the reference may have");
        }
    }
}

#[test]
fn every_field_is_there_with_its_number_and_type_and_new_ones_begin_at_100() {
    let files = files();
    let messages: BTreeMap<_, _> =
        files.iter().flat_map(|file| &file.message_type).map(|message| (message.name(), message)).collect();
    for line in MESSAGES.replace("\n    ", " ").lines() {
        let (name, listed) = line.split_once(": ").unwrap();
        let expected: BTreeSet<_> = listed.split("; ").map(str::to_owned).collect();
        let there = fields(messages.get(name).unwrap_or_else(|| panic!("{name} is missing")));
        let missing: Vec<_> = expected.difference(&there).collect();
        assert!(missing.is_empty(), "{name}: {missing:?} are missing, there are {there:?}");
        for new in there.difference(&expected) {
            let number: i32 = new.split(' ').next().unwrap().parse().unwrap();
            assert!(number >= FIRST_NEW_NUMBER, "{name}: {new}");
        }
    }
}

#[test]
fn a_request_written_by_hand_is_read_and_the_answer_is_found_where_it_always_was() {
    // CreateInstanceRequest { 1: "web", 2: 1, 3: { 1: "tiny", 2: 2, 3: 67108864 }, 5: "n1" } as bytes.
    let spec = [&[0x0a, 4][..], b"tiny", &[0x10, 2, 0x18, 0x80, 0x80, 0x80, 0x20]].concat();
    let request =
        [&[0x0a, 3][..], b"web", &[0x10, 1, 0x1a, spec.len() as u8], &spec, &[0x2a, 2], b"n1"].concat();
    let read = v1::CreateInstanceRequest::decode(&request[..]).unwrap();
    let spec = read.spec.as_ref().unwrap();
    assert_eq!(
        (read.name.as_str(), read.r#type(), read.preferred_node_id.as_str()),
        ("web", v1::InstanceType::Vm, "n1")
    );
    assert_eq!((spec.image.as_str(), spec.cpu_cores, spec.memory_bytes), ("tiny", 2, 64 << 20));

    // Instance { 1: "i1", 4: 3, 6: "n1", 9: "why" }: a client that knows no more finds these and skips the rest.
    let answer = v1::Instance {
        id: "i1".into(),
        state: v1::InstanceState::Running.into(),
        node_id: "n1".into(),
        state_reason: "why".into(),
        revision: 7,
        ..v1::Instance::default()
    };
    let expected = [&[0x0a, 2][..], b"i1", &[0x20, 3, 0x32, 2], b"n1", &[0x4a, 3], b"why"].concat();
    let bytes = answer.encode_to_vec();
    assert_eq!(&bytes[..expected.len()], expected, "fields are written in the order of their numbers");
}
