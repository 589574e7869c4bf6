//! Every method that the gRPC port serves, with who calls it and whether it changes something: one table.

/// What a method is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Users read.
    Read,
    /// Users change something.
    Change,
    /// Nodes tell of themselves and of their instances.
    Node,
    /// An operator's upkeep of the store; works also while the store is frozen.
    Upkeep,
}

/// By the path that a call has.
const METHODS: &[(&str, Kind)] = &[
    ("/hypervisor.v1.AssignmentService/ReportInstances", Kind::Node),
    ("/hypervisor.v1.AssignmentService/WatchAssignments", Kind::Node),
    ("/hypervisor.v1.ClusterService/ConfirmNodeDown", Kind::Change),
    ("/hypervisor.v1.ClusterService/CordonNode", Kind::Change),
    ("/hypervisor.v1.ClusterService/DeregisterNode", Kind::Change),
    ("/hypervisor.v1.ClusterService/DrainNode", Kind::Change),
    ("/hypervisor.v1.ClusterService/GetClusterInfo", Kind::Read),
    ("/hypervisor.v1.ClusterService/GetNode", Kind::Read),
    ("/hypervisor.v1.ClusterService/Heartbeat", Kind::Node),
    ("/hypervisor.v1.ClusterService/ListEvents", Kind::Read),
    ("/hypervisor.v1.ClusterService/ListNodes", Kind::Read),
    ("/hypervisor.v1.ClusterService/RegisterNode", Kind::Node),
    ("/hypervisor.v1.ClusterService/SetNodeFailover", Kind::Change),
    ("/hypervisor.v1.ClusterService/UncordonNode", Kind::Change),
    ("/hypervisor.v1.ClusterService/UpdateNode", Kind::Change),
    ("/hypervisor.v1.ClusterService/UpdateNodeStatus", Kind::Change),
    ("/hypervisor.v1.ClusterService/WatchEvents", Kind::Read),
    ("/hypervisor.v1.ClusterService/WatchNodes", Kind::Read),
    ("/hypervisor.v1.ComputeService/AttachConsole", Kind::Read),
    ("/hypervisor.v1.ComputeService/CloneInstance", Kind::Change),
    ("/hypervisor.v1.ComputeService/CollectImages", Kind::Change),
    ("/hypervisor.v1.ComputeService/Console", Kind::Change),
    ("/hypervisor.v1.ComputeService/CreateInstance", Kind::Change),
    ("/hypervisor.v1.ComputeService/CreateInstanceSnapshot", Kind::Change),
    ("/hypervisor.v1.ComputeService/CreateInstances", Kind::Change),
    ("/hypervisor.v1.ComputeService/DeleteImage", Kind::Change),
    ("/hypervisor.v1.ComputeService/DeleteInstance", Kind::Change),
    ("/hypervisor.v1.ComputeService/DeleteInstanceSnapshot", Kind::Change),
    ("/hypervisor.v1.ComputeService/Exec", Kind::Change),
    ("/hypervisor.v1.ComputeService/ExplainInstance", Kind::Read),
    ("/hypervisor.v1.ComputeService/GetImage", Kind::Read),
    ("/hypervisor.v1.ComputeService/GetInstance", Kind::Read),
    ("/hypervisor.v1.ComputeService/GetInstanceLogs", Kind::Read),
    ("/hypervisor.v1.ComputeService/GetInstanceStats", Kind::Read),
    ("/hypervisor.v1.ComputeService/ListImages", Kind::Read),
    ("/hypervisor.v1.ComputeService/ListInstanceSnapshots", Kind::Read),
    ("/hypervisor.v1.ComputeService/ListInstances", Kind::Read),
    ("/hypervisor.v1.ComputeService/MigrateInstance", Kind::Change),
    ("/hypervisor.v1.ComputeService/PauseInstance", Kind::Change),
    ("/hypervisor.v1.ComputeService/PreviewPlacement", Kind::Read),
    ("/hypervisor.v1.ComputeService/PullImage", Kind::Change),
    ("/hypervisor.v1.ComputeService/RestartInstance", Kind::Change),
    ("/hypervisor.v1.ComputeService/ResumeInstance", Kind::Change),
    ("/hypervisor.v1.ComputeService/RevertInstance", Kind::Change),
    ("/hypervisor.v1.ComputeService/StartInstance", Kind::Change),
    ("/hypervisor.v1.ComputeService/StopInstance", Kind::Change),
    ("/hypervisor.v1.ComputeService/UpdateInstance", Kind::Change),
    ("/hypervisor.v1.ComputeService/UpdateInstanceMetadata", Kind::Change),
    ("/hypervisor.v1.ComputeService/UploadImage", Kind::Change),
    ("/hypervisor.v1.ComputeService/WatchInstance", Kind::Read),
    ("/hypervisor.v1.ComputeService/WatchInstances", Kind::Read),
    ("/hypervisor.v1.OperationService/CancelOperation", Kind::Change),
    ("/hypervisor.v1.OperationService/GetOperation", Kind::Read),
    ("/hypervisor.v1.OperationService/ListOperations", Kind::Read),
    ("/hypervisor.v1.OperationService/WatchOperations", Kind::Read),
    ("/hypervisor.v1.StoreService/BackupStore", Kind::Upkeep),
    ("/hypervisor.v1.StoreService/CompactStore", Kind::Upkeep),
    ("/hypervisor.v1.StoreService/DumpStore", Kind::Upkeep),
    ("/hypervisor.v1.StoreService/FreezeStore", Kind::Upkeep),
    ("/hypervisor.v1.StoreService/GetStoreStatus", Kind::Upkeep),
    ("/hypervisor.v1.StoreService/RestoreStore", Kind::Upkeep),
];

/// What a path is; `None` where it is none of ours, as health and reflection.
pub(crate) fn kind(path: &str) -> Option<Kind> {
    METHODS.binary_search_by(|(known, _)| (*known).cmp(path)).ok().map(|index| METHODS[index].1)
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn the_table_has_each_method_of_the_server_once_and_no_other() {
        // Served by agents, not by this port.
        const ELSEWHERE: &str = "AgentService";
        let set = prost_types::FileDescriptorSet::decode(hv_proto::DESCRIPTORS).unwrap();
        let mut served: Vec<String> = Vec::new();
        for file in set.file {
            for service in file.service.iter().filter(|service| service.name() != ELSEWHERE) {
                let paths = service.method.iter();
                served.extend(paths.map(|m| format!("/{}.{}/{}", file.package(), service.name(), m.name())));
            }
        }
        served.sort();
        assert_eq!(METHODS.iter().map(|(path, _)| *path).collect::<Vec<_>>(), served);
    }

    #[test]
    fn foreign_paths_are_none_of_ours() {
        assert_eq!(kind("/grpc.health.v1.Health/Check"), None);
        assert_eq!(kind("/hypervisor.v1.ClusterService/Heartbeat"), Some(Kind::Node));
    }
}
