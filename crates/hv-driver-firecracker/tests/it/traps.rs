//! The traps of Firecracker, each with a test that walks into it, on the real VMM.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use hv_driver::conformance::{Subject as _, cleaned};
use hv_driver::{Driver as _, DriverError, Exit, Observed, SnapshotRequest, StopMode, Updated};
use hv_types::{DiskSpec, ResourceLimits};

use crate::subject::{FirecrackerSubject, GREETING, count, read_until, real, type_line};

/// Asks a VMM without the driver: the status and the body.
pub(crate) fn ask(
    subject: &FirecrackerSubject,
    id: &hv_types::InstanceId,
    request: &str,
    body: &str,
) -> (u16, String) {
    // A short path: a socket's address has 107 bytes.
    let link = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(subject.root(id), link.path().join("r")).unwrap();
    let mut stream = UnixStream::connect(link.path().join("r/api.sock")).unwrap();
    let text = format!(
        "{request} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(text.as_bytes()).unwrap();
    let (mut answer, mut piece) = (Vec::new(), [0; 4096]);
    // All of it comes at once; the connection stays open.
    while !answer.windows(4).any(|window| window == b"\r\n\r\n") {
        let length = stream.read(&mut piece).unwrap();
        assert!(length > 0, "the VMM hung up");
        answer.extend_from_slice(&piece[..length]);
    }
    let answer = String::from_utf8(answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
}

pub(crate) fn snapshot(name: &str, memory: bool) -> SnapshotRequest {
    SnapshotRequest { name: name.to_owned(), memory }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vmm_is_jailed_and_holds_its_lock_to_its_end() {
    let Some(subject) = real().await else { return };
    if !rustix::process::geteuid().is_root() {
        return crate::subject::skip("hv-driver-firecracker::jail", "a jail takes root");
    }
    let (driver, config) = subject.running("jailed").await;
    let [pid] = subject.pids(&config.id)[..] else { panic!("not one VMM") };
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let uid = subject.options.uid_base.to_string();
    for field in ["Uid:", "Gid:"] {
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        assert_eq!(line.split_ascii_whitespace().nth(1), Some(uid.as_str()), "{line}");
    }
    assert_eq!(fs::read_link(format!("/proc/{pid}/root")).unwrap().as_os_str(), "/");
    let inside: Vec<_> = fs::read_dir(format!("/proc/{pid}/root"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(inside.contains(&"kernel".to_owned()) && !inside.contains(&"etc".to_owned()), "{inside:?}");
    assert_ne!(
        fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap(),
        fs::read_link("/proc/self/ns/mnt").unwrap(),
        "it has our mounts"
    );
    // In a PID namespace of its own SIGTERM would do nothing, and its exit code would be somebody else's.
    assert_eq!(
        fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap(),
        fs::read_link("/proc/self/ns/pid").unwrap()
    );
    let target = driver.fence_target(&config.id).unwrap();
    drop(driver);
    assert_eq!(hv_driver::fence::may_run(&target), Some(true), "the lock did not survive the jailer");
    subject.kill(&config.id).await;
    // The kernel lets go of a lock a moment after the process is gone.
    let begun = std::time::Instant::now();
    while hv_driver::fence::may_run(&target) != Some(false) {
        assert!(begun.elapsed() < crate::subject::PATIENCE, "the lock outlived the VMM");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    cleaned(&subject, &subject.firecracker(), &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_runs_without_a_jail_where_that_is_configured() {
    let Some(mut subject) = real().await else { return };
    subject.options.use_jailer = false;
    let (driver, config) = subject.running("free").await;
    assert!(driver.fingerprint().await.message.contains("not jailed"));
    let mut console = driver.console(&config.id).await.unwrap();
    read_until(&mut console, GREETING).await;
    driver.snapshot(&config.id, &snapshot("one", true)).await.unwrap();
    driver.revert(&config.id, "one").await.unwrap();
    assert!(count(&driver, &config.id).await > 0);
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_socket_that_does_not_accept_yet_is_tried_again() {
    let Some(subject) = real().await else { return };
    let (driver, config) = subject.running("young").await;
    for _ in 0..10 {
        driver.stop(&config.id, StopMode::Force).await.unwrap();
        driver.start(&config.id).await.unwrap();
    }
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_resets_the_processor_has_finished() {
    let Some(subject) = real().await else { return };
    let (driver, config) = subject.running("ends").await;
    let mut console = driver.console(&config.id).await.unwrap();
    read_until(&mut console, GREETING).await;
    type_line(&console, "!quit\n").await;
    let begun = std::time::Instant::now();
    while driver.observe(&config.id).await.unwrap() != Observed::Stopped(Exit::Finished) {
        assert!(begun.elapsed() < crate::subject::PATIENCE);
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deaf_guest_is_killed_after_the_timeout() {
    let Some(mut subject) = real().await else { return };
    subject.spec.kernel_args = "deaf".to_owned();
    let (driver, config) = subject.running("deaf").await;
    let begun = std::time::Instant::now();
    driver.stop(&config.id, StopMode::Graceful(std::time::Duration::from_millis(500))).await.unwrap();
    assert!(begun.elapsed().as_millis() >= 500 && begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
    assert_eq!(driver.observe(&config.id).await.unwrap(), Observed::Stopped(Exit::Stopped));
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_api_refuses_after_the_start_waits_for_the_next() {
    let Some(subject) = real().await else { return };
    let (driver, mut config) = subject.running("changes").await;
    let (status, fault) =
        ask(&subject, &config.id, "PUT /machine-config", r#"{"vcpu_count":2,"mem_size_mib":32}"#);
    assert_eq!(status, 400, "{fault}");
    config.spec.memory_bytes = 32 << 20;
    let Updated::AtNextStart(why) = driver.update(&config).await.unwrap() else { panic!("done at once") };
    assert!(why.contains("starts"), "{why}");
    driver.stop(&config.id, StopMode::Force).await.unwrap();
    driver.start(&config.id).await.unwrap();
    let (_, machine) = ask(&subject, &config.id, "GET /machine-config", "");
    assert!(machine.contains("\"mem_size_mib\":32"), "{machine}");
    // It never asks for a CPU template, which most processors refuse.
    assert!(!machine.contains("\"cpu_template\":\"T"), "{machine}");
    // What can be told to a machine that runs is told at once.
    config.name = "renamed".to_owned();
    config.spec.limits = Some(ResourceLimits { io_read_bps: 1 << 20, ..ResourceLimits::default() });
    assert_eq!(driver.update(&config).await.unwrap(), Updated::Done);
    config.spec.disks.push(DiskSpec { name: "more".to_owned(), size_bytes: 1 << 20, ..DiskSpec::default() });
    assert!(matches!(driver.update(&config).await.unwrap(), Updated::AtNextStart(_)));
    driver.stop(&config.id, StopMode::Force).await.unwrap();
    driver.start(&config.id).await.unwrap();
    assert_eq!(fs::metadata(subject.root(&config.id).join("disk0.raw")).unwrap().len(), 1 << 20);
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_machine_is_held_for_its_snapshot_and_goes_on() {
    let Some(subject) = real().await else { return };
    let (driver, config) = subject.running("held").await;
    let body = r#"{"snapshot_path":"s","mem_file_path":"m"}"#;
    let (status, fault) = ask(&subject, &config.id, "PUT /snapshot/create", body);
    assert_eq!(status, 400, "{fault}");
    driver.snapshot(&config.id, &snapshot("one", true)).await.unwrap();
    assert!(matches!(driver.observe(&config.id).await.unwrap(), Observed::Running(_)));
    let before = count(&driver, &config.id).await;
    assert!(count(&driver, &config.id).await > before);
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_that_fails_ends_the_vmm_and_not_the_instance() {
    let Some(subject) = real().await else { return };
    let (driver, config) = subject.running("spoiled").await;
    driver.snapshot(&config.id, &snapshot("good", true)).await.unwrap();
    // What a VMM that was killed leaves: its vsock's socket, in whose place no other can be made.
    driver.revert(&config.id, "good").await.unwrap();
    assert!(subject.root(&config.id).join("vsock.sock").exists());
    driver.revert(&config.id, "good").await.unwrap();
    let state = subject.instance_dir(&config.id).join("snapshots/good/state");
    let whole = fs::read(&state).unwrap();
    fs::remove_file(&state).unwrap();
    fs::write(&state, &whole[..whole.len() / 2]).unwrap();
    let error = driver.revert(&config.id, "good").await.unwrap_err();
    let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    assert!(error.retryable() && cause.contains("/snapshot/load"), "{error}: {cause}");
    assert_eq!(subject.copies(&config.id), 0);
    assert!(matches!(driver.observe(&config.id).await.unwrap(), Observed::Stopped(Exit::Failed(_))));
    driver.start(&config.id).await.unwrap();
    let mut console = driver.console(&config.id).await.unwrap();
    read_until(&mut console, GREETING).await;
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_jailers_cgroup_has_the_limits_and_goes_with_the_instance() {
    let Some(subject) = real().await else { return };
    let has_cgroups =
        fs::metadata("/sys/fs/cgroup/cpu").is_ok() && fs::metadata("/sys/fs/cgroup/memory").is_ok();
    let is_unified = fs::metadata("/sys/fs/cgroup/cgroup.controllers").is_ok();
    if !rustix::process::geteuid().is_root() || !(has_cgroups || is_unified) {
        return crate::subject::skip("hv-driver-firecracker::cgroups", "there are no cgroups to put it in");
    }
    let (driver, mut config) = (subject.firecracker(), subject.config("bound"));
    let memory_limit = 256 << 20;
    config.spec.limits =
        Some(ResourceLimits { cpu_quota: 50_000, memory_limit, ..ResourceLimits::default() });
    driver.create(&config).await.unwrap();
    driver.start(&config.id).await.unwrap();
    let [pid] = subject.pids(&config.id)[..] else { panic!("not one VMM") };
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let own = format!("/hypervisor-microvm/{0}/{0}", config.id);
    assert!(cgroups.lines().any(|line| line.ends_with(&own)), "{cgroups}");
    let file = match is_unified {
        true => format!("/sys/fs/cgroup{own}/memory.max"),
        false => format!("/sys/fs/cgroup/memory{own}/memory.limit_in_bytes"),
    };
    assert_eq!(fs::read_to_string(file).unwrap().trim(), memory_limit.to_string());
    cleaned(&subject, &driver, &config).await;
    let top = if is_unified { "/sys/fs/cgroup" } else { "/sys/fs/cgroup/cpu" };
    assert!(fs::metadata(format!("{top}/hypervisor-microvm/{}", config.id)).is_err(), "the cgroup stays");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vmm_joins_the_network_namespace_it_is_given() {
    let Some(mut subject) = real().await else { return };
    let name = format!("hvfc-{}", std::process::id());
    let ip = |arguments: &[&str]| {
        std::process::Command::new("ip").args(arguments).status().is_ok_and(|s| s.success())
    };
    if !rustix::process::geteuid().is_root() || !ip(&["netns", "add", &name]) {
        return crate::subject::skip("hv-driver-firecracker::netns", "network namespaces cannot be made");
    }
    let path = std::path::PathBuf::from(format!("/run/netns/{name}"));
    subject.options.netns = Some(path.clone());
    // Its tap is made there too.
    subject.spec.user_data = "in a namespace".to_owned();
    let (driver, config) = subject.running("netns").await;
    let [pid] = subject.pids(&config.id)[..] else { panic!("not one VMM") };
    let inode = |path: &std::path::Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    assert_eq!(inode(std::path::Path::new(&format!("/proc/{pid}/ns/net"))), inode(&path));
    cleaned(&subject, &driver, &config).await;
    assert!(ip(&["netns", "delete", &name]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vmm_in_foreign_hands_leads_nobody_out_of_its_root() {
    let Some(mut subject) = real().await else { return };
    subject.spec.disks =
        vec![DiskSpec { name: "data".to_owned(), size_bytes: 1 << 20, ..DiskSpec::default() }];
    let (driver, config) = subject.running("hostile").await;
    let id = &config.id;
    driver.snapshot(id, &snapshot("good", true)).await.unwrap();
    let outside = subject.options.image_dir.join("precious");
    fs::write(&outside, "untouched").unwrap();
    let root = subject.root(id);
    let lead_out = |name: &str| {
        let _ = fs::remove_file(root.join(name));
        std::os::unix::fs::symlink(&outside, root.join(name)).unwrap();
    };
    for name in ["metrics.json", "firecracker.log", "disk0.raw", "disk0.raw.partial", "load.memory", "kernel"]
    {
        lead_out(name);
    }
    let error = driver.stats(id).await.unwrap_err();
    assert!(matches!(error, DriverError::Failed { .. }), "{error}");
    driver.snapshot(id, &snapshot("bad", false)).await.unwrap_err();
    driver.revert(id, "good").await.unwrap();
    assert!(count(&driver, id).await > 0);
    assert_eq!(driver.snapshots(id).await.unwrap().len(), 1);
    cleaned(&subject, &driver, &config).await;
    assert_eq!(fs::read_to_string(&outside).unwrap(), "untouched");
    if rustix::process::geteuid().is_root() {
        assert_eq!(std::os::unix::fs::MetadataExt::uid(&fs::metadata(&outside).unwrap()), 0, "given away");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_was_given_up_half_way_is_taken_over() {
    let Some(subject) = real().await else { return };
    let (driver, config) = (subject.firecracker(), subject.config("abandoned"));
    driver.create(&config).await.unwrap();
    // Looks at the VMM beforehand, so that the time goes into the start.
    assert!(driver.fingerprint().await.healthy);
    for patience_ms in [1, 3, 6, 10, 15, 20, 30] {
        let start = driver.start(&config.id);
        let _ = tokio::time::timeout(std::time::Duration::from_millis(patience_ms), start).await;
        let another = subject.firecracker();
        another.recover(&config.id, None).await.unwrap();
        another.start(&config.id).await.unwrap();
        assert!(matches!(another.observe(&config.id).await.unwrap(), Observed::Running(_)));
        assert_eq!(subject.copies(&config.id), 1, "{patience_ms} ms");
        another.stop(&config.id, StopMode::Force).await.unwrap();
        // A driver of which nothing is asked meanwhile notices too.
        let begun = std::time::Instant::now();
        while !matches!(driver.observe(&config.id).await.unwrap(), Observed::Stopped(_)) {
            assert!(begun.elapsed() < crate::subject::PATIENCE);
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn a_node_without_firecracker_says_so_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let options = hv_driver_firecracker::FirecrackerOptions {
        state_dir: dir.path().join("state"),
        image_dir: dir.path().join("images"),
        binary: Some("/nonexistent/firecracker".into()),
        ..Default::default()
    };
    let fingerprint = hv_driver_firecracker::FirecrackerDriver::new(options.clone()).fingerprint().await;
    assert!(
        !fingerprint.healthy && fingerprint.message.contains("drivers.firecracker.binary"),
        "{}",
        fingerprint.message
    );
    let options = hv_driver_firecracker::FirecrackerOptions {
        binary: Some("/bin/true".into()),
        kvm: dir.path().join("no-kvm"),
        ..options
    };
    let fingerprint = hv_driver_firecracker::FirecrackerDriver::new(options).fingerprint().await;
    assert!(!fingerprint.healthy && fingerprint.message.contains("kvm_intel"), "{}", fingerprint.message);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_microvm_cannot_have_is_refused_not_ignored() {
    let Some(subject) = crate::subject::doubled().await else { return };
    let driver = subject.firecracker();
    let mut configs: Vec<_> = (0..5).map(|_| subject.config("odd")).collect();
    configs[0].spec.network = Some(hv_types::NetworkSpec::default());
    configs[1].spec.volume_mounts.push(hv_types::VolumeMount::default());
    configs[2].spec.limits = Some(ResourceLimits { pids: 1, ..ResourceLimits::default() });
    configs[3].spec.limits = Some(ResourceLimits { cpu_quota: 1, ..ResourceLimits::default() });
    configs[4].spec.user = "1".to_owned();
    for config in &configs {
        let error = driver.create(config).await.unwrap_err();
        assert!(matches!(error, DriverError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("spec."), "{error}");
    }
    let mut invalid: Vec<_> = (0..3).map(|_| subject.config("wrong")).collect();
    invalid[0].spec.cpu_cores = 33;
    invalid[1].spec.command.push("sh".to_owned());
    invalid[2].spec.kernel = "no-such-kernel".to_owned();
    for config in &invalid {
        let error = driver.create(config).await.unwrap_err();
        assert!(matches!(error, DriverError::InvalidConfig { .. }), "{error}");
    }
    assert!(subject.leftovers().is_empty());
}
