//! What is asked holds against the contract.

use serde_json::{Value, json};

use super::types::{
    Action, Actions, Balloon, BalloonTarget, BootSource, Drive, DriveLimit, MachineConfig, MemoryBackend,
    Metrics, MmdsConfig, NetworkInterface, RateLimiter, SnapshotCreate, SnapshotLoad, SnapshotType, Vm,
    VmState, Vsock,
};

const CONTRACT: &str = include_str!("contract.txt");

fn required(method: &str, path: &str) -> Vec<String> {
    let words = |line: &str| line.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let line = CONTRACT.lines().filter(|line| !line.starts_with('#')).map(words);
    let found = line.into_iter().find(|line| line[0] == method && line[1] == path);
    found.unwrap_or_else(|| panic!("{method} {path} is not in the contract")).split_off(2)
}

fn json<T: serde::Serialize>(value: T) -> Value {
    serde_json::to_value(value).unwrap()
}

#[test]
fn every_body_has_what_the_contract_requires() {
    let rate_limiter = RateLimiter::bytes_per_second(1);
    let drive = Drive {
        drive_id: "a".into(),
        is_root_device: true,
        is_read_only: false,
        path_on_host: "a".into(),
        cache_type: "Writeback",
        rate_limiter: Some(rate_limiter),
    };
    let load = SnapshotLoad {
        snapshot_path: "s",
        mem_backend: MemoryBackend { backend_type: "File", backend_path: "m" },
        enable_diff_snapshots: true,
        resume_vm: false,
        network_overrides: Vec::new(),
    };
    let create = SnapshotCreate {
        snapshot_type: SnapshotType::Diff,
        snapshot_path: "s".into(),
        mem_file_path: "m".into(),
    };
    let interface = NetworkInterface {
        iface_id: "eth0",
        host_dev_name: "tap".into(),
        guest_mac: "06:00:00:00:00:01".into(),
    };
    let cases = [
        ("PUT", "/actions", json(Actions { action_type: Action::SendCtrlAltDel })),
        (
            "PUT",
            "/balloon",
            json(Balloon { amount_mib: 0, deflate_on_oom: true, stats_polling_interval_s: 1 }),
        ),
        ("PATCH", "/balloon", json(BalloonTarget { amount_mib: 1 })),
        (
            "PUT",
            "/boot-source",
            json(BootSource { kernel_image_path: "kernel", boot_args: String::new(), initrd_path: None }),
        ),
        ("PUT", "/drives/{id}", json(drive)),
        ("PATCH", "/drives/{id}", json(DriveLimit { drive_id: "a".into(), rate_limiter })),
        ("PUT", "/entropy", json!({})),
        (
            "PUT",
            "/machine-config",
            json(MachineConfig { vcpu_count: 1, mem_size_mib: 1, track_dirty_pages: true }),
        ),
        ("PUT", "/metrics", json(Metrics { metrics_path: "m" })),
        ("PUT", "/mmds", json!({})),
        ("PUT", "/mmds/config", json(MmdsConfig { version: "V2", network_interfaces: ["eth0"] })),
        ("PUT", "/network-interfaces/{id}", json(interface)),
        ("PUT", "/snapshot/create", json(create)),
        ("PUT", "/snapshot/load", json(load)),
        ("PATCH", "/vm", json(Vm { state: VmState::Paused })),
        ("PUT", "/vsock", json(Vsock { guest_cid: 3, uds_path: "v" })),
    ];
    for (method, path, body) in &cases {
        for field in required(method, path) {
            assert!(!body[&field].is_null(), "{method} {path} lacks {field}: {body}");
        }
    }
    let asked = CONTRACT.lines().filter(|line| line.starts_with("PUT") || line.starts_with("PATCH")).count();
    assert_eq!(asked, cases.len(), "a request of the contract is not covered here");
}
