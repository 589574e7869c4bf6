//! What only QEMU can show, with the guest of one sector.

use std::fs;
use std::io::Write as _;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use hv_driver::conformance::{Subject as _, cleaned};
use hv_driver::{Display, Driver, DriverError, Exit, Observed, StopMode};
use hv_driver_qemu::{Accel, QemuDriver, QemuOptions};
use hv_types::{DiskSpec, NetworkSpec, VolumeMount};
use tokio::io::AsyncReadExt as _;

use crate::subject::{QemuSubject, setup};

const PATIENCE: Duration = Duration::from_secs(60);

async fn running(subject: &QemuSubject) -> (QemuDriver, hv_driver::InstanceConfig) {
    let (driver, config) = (subject.qemu(), subject.config("real"));
    driver.create(&config).await.unwrap();
    driver.start(&config.id).await.unwrap();
    (driver, config)
}

fn cause(error: &DriverError) -> String {
    std::error::Error::source(error).map(ToString::to_string).unwrap_or_default()
}

/// The virtual size in a qcow2 header.
fn virtual_size(path: &std::path::Path) -> u64 {
    let header = fs::read(path).unwrap();
    u64::from_be_bytes(header[24..32].try_into().unwrap())
}

#[tokio::test]
async fn the_screen_speaks_vnc_however_long_the_path_is() {
    for state_name in ["short".to_owned(), "long".repeat(60)] {
        let Some(subject) = QemuSubject::new(&state_name) else { return };
        let (driver, config) = running(&subject).await;
        let Display::Vnc(path) = driver.display(&config.id).await.unwrap();
        let mut screen = tokio::net::UnixStream::connect(&path).await.unwrap();
        let mut version = [0; 12];
        screen.read_exact(&mut version).await.unwrap();
        assert_eq!(&version, b"RFB 003.008\n");
        cleaned(&subject, &driver, &config).await;
    }
}

#[tokio::test]
async fn a_killed_child_has_failed_with_its_signal() {
    let Some(subject) = setup().await else { return };
    let (driver, config) = running(&subject).await;
    let mut events = driver.events();
    subject.kill(&config.id).await;
    let event = tokio::time::timeout(PATIENCE, events.next()).await.unwrap().unwrap();
    assert_eq!(event.id, config.id);
    let observed = driver.observe(&config.id).await.unwrap();
    assert!(
        matches!(&observed, Observed::Stopped(Exit::Failed(why)) if why.contains("signal: 9")),
        "{observed:?}"
    );
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn two_agents_on_one_state_directory_still_run_one_copy() {
    let Some(subject) = setup().await else { return };
    let (one, config) = running(&subject).await;
    let other = subject.qemu();
    other.start(&config.id).await.unwrap();
    assert_eq!(subject.copies(&config.id), 1);
    drop(one);
    cleaned(&subject, &other, &config).await;
}

#[tokio::test]
async fn a_start_that_was_given_up_half_way_is_taken_over() {
    let Some(subject) = setup().await else { return };
    let (driver, config) = (subject.qemu(), subject.config("abandoned"));
    driver.create(&config).await.unwrap();
    // Looks at QEMU beforehand, so that the time goes into the start.
    assert!(driver.fingerprint().await.healthy);
    for patience_ms in [5, 20, 40, 80] {
        let start = driver.start(&config.id);
        let _ = tokio::time::timeout(Duration::from_millis(patience_ms), start).await;
        driver.start(&config.id).await.unwrap();
        assert!(matches!(driver.observe(&config.id).await.unwrap(), Observed::Running(_)));
        assert_eq!(subject.copies(&config.id), 1, "{patience_ms} ms");
        driver.stop(&config.id, StopMode::Force).await.unwrap();
    }
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn a_deaf_guest_is_killed_after_the_timeout() {
    let Some(mut subject) = setup().await else { return };
    fs::write(subject.options.image_dir.join("deaf.raw"), vec![0; 1 << 20]).unwrap();
    subject.spec.image = "deaf".to_owned();
    let (driver, config) = running(&subject).await;
    let begun = Instant::now();
    driver.stop(&config.id, StopMode::Graceful(Duration::from_millis(500))).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(500));
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(driver.observe(&config.id).await.unwrap(), Observed::Stopped(Exit::Stopped));
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn a_deletion_that_was_cut_short_is_found_and_finished() {
    let Some(subject) = setup().await else { return };
    let (driver, config) = (subject.qemu(), subject.config("half-deleted"));
    driver.create(&config).await.unwrap();
    drop(driver);
    let trash = subject.options.state_dir.join(format!(".{}.deleting", config.id));
    fs::rename(subject.instance_dir(&config.id), &trash).unwrap();
    let driver = subject.qemu();
    assert_eq!(driver.list().await.unwrap(), std::slice::from_ref(&config.id));
    assert!(matches!(driver.start(&config.id).await, Err(DriverError::WrongState { .. })));
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn disks_are_made_as_asked_and_never_touch_the_image() {
    let Some(subject) = setup().await else { return };
    let image = subject.options.image_dir.join("sector.raw");
    let before = fs::read(&image).unwrap();
    let mut config = subject.config("disks");
    let disk = |name: String, size_bytes, boot| DiskSpec { name, size_bytes, boot, ..DiskSpec::default() };
    config.spec.disks = (0..12).map(|i| disk(format!("data-{i}"), (i + 1) << 20, false)).collect();
    config.spec.disks.push(disk("root".to_owned(), 64 << 20, true));
    let driver = subject.qemu();
    driver.create(&config).await.unwrap();
    let dir = subject.instance_dir(&config.id);
    assert_eq!(virtual_size(&dir.join("boot.qcow2")), 64 << 20);
    assert_eq!(virtual_size(&dir.join("disk11.qcow2")), 12 << 20);
    driver.start(&config.id).await.unwrap();
    let mut console = driver.console(&config.id).await.unwrap();
    let greeting = tokio::time::timeout(PATIENCE, console.output.next()).await.unwrap();
    assert!(greeting.is_some(), "the guest did not boot from its first disk");
    driver.stop(&config.id, StopMode::Force).await.unwrap();
    assert_eq!(fs::read(&image).unwrap(), before);
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn a_boot_disk_smaller_than_its_image_is_refused() {
    let Some(subject) = setup().await else { return };
    let mut config = subject.config("small");
    let disk = DiskSpec { name: "root".to_owned(), size_bytes: 4096, boot: true, ..DiskSpec::default() };
    config.spec.disks.push(disk);
    let error = subject.qemu().create(&config).await.unwrap_err();
    assert!(
        matches!(&error, DriverError::InvalidConfig { reason, .. } if reason.contains("at least")),
        "{error}"
    );
    assert!(subject.leftovers().is_empty());
}

#[tokio::test]
async fn what_a_virtual_machine_cannot_have_is_refused_not_ignored() {
    let Some(subject) = setup().await else { return };
    let driver = subject.qemu();
    let mut configs: Vec<_> = (0..5).map(|_| subject.config("odd")).collect();
    configs[0].spec.network = Some(NetworkSpec { network_id: "blue".to_owned(), ..NetworkSpec::default() });
    configs[1].spec.volume_mounts.push(VolumeMount::default());
    configs[2].spec.command.push("sh".to_owned());
    configs[3].spec.network = Some(NetworkSpec { assign_public_ip: true, ..NetworkSpec::default() });
    configs[4].spec.limits = Some(hv_types::ResourceLimits { cpu_quota: 1, ..Default::default() });
    for config in &configs {
        let error = driver.create(config).await.unwrap_err();
        assert!(matches!(error, DriverError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("spec."), "{error}");
    }
    assert!(subject.leftovers().is_empty());
}

#[tokio::test]
async fn a_qemu_that_dies_while_starting_says_why() {
    let Some(subject) = setup().await else { return };
    fs::write(subject.options.image_dir.join("no-kernel"), "not a kernel").unwrap();
    let mut config = subject.config("dies");
    config.spec.image = String::new();
    config.spec.kernel = "no-kernel".to_owned();
    let driver = subject.qemu();
    driver.create(&config).await.unwrap();
    let error = driver.start(&config.id).await.unwrap_err();
    assert!(error.retryable());
    assert!(cause(&error).contains("kernel"), "{error}: {}", cause(&error));
    assert!(matches!(driver.observe(&config.id).await.unwrap(), Observed::Stopped(Exit::Failed(_))));
    assert_eq!(subject.copies(&config.id), 0);
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn the_console_log_stays_within_its_bound() {
    let Some(subject) = setup().await else { return };
    let (driver, config) = running(&subject).await;
    let mut console = driver.console(&config.id).await.unwrap();
    let _ = console.output.next().await;
    let dir = subject.instance_dir(&config.id);
    // As a guest that prints a lot: QEMU appends to the file just so.
    let mut log = fs::OpenOptions::new().append(true).open(dir.join("console.log")).unwrap();
    for number in 0..60_000 {
        writeln!(log, "line {number:06} {}", "x".repeat(100)).unwrap();
    }
    let begun = Instant::now();
    while fs::metadata(dir.join("console.log")).unwrap().len() > 2 << 20 {
        assert!(begun.elapsed() < PATIENCE, "the log was not cut");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let logs = driver
        .logs(&config.id, hv_driver::LogRequest { tail_lines: Some(1), ..Default::default() })
        .await
        .unwrap();
    let last: Vec<_> = logs.collect().await;
    assert!(String::from_utf8_lossy(last[0].as_ref().unwrap()).starts_with("line 059999"));
    let mut late = driver.console(&config.id).await.unwrap();
    let history = late.output.next().await.unwrap().unwrap();
    assert!(history.len() <= 256 << 10, "{}", history.len());
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn a_node_without_qemu_says_so_and_refuses_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let options = QemuOptions {
        state_dir: dir.path().join("state"),
        image_dir: dir.path().join("images"),
        qemu_binary: Some("/nonexistent/qemu".into()),
        ..QemuOptions::default()
    };
    let fingerprint = QemuDriver::new(options).fingerprint().await;
    assert!(!fingerprint.healthy);
    assert!(fingerprint.message.contains("apt-get install qemu-system-x86"), "{}", fingerprint.message);
}

#[tokio::test]
async fn kvm_is_used_only_where_it_runs_guests() {
    let Some(subject) = setup().await else { return };
    let with = |accel| QemuDriver::new(QemuOptions { accel, ..subject.options.clone() });
    let (auto, kvm) = (with(Accel::Auto).fingerprint().await, with(Accel::Kvm).fingerprint().await);
    assert!(auto.healthy, "{}", auto.message);
    if kvm.healthy {
        assert_eq!(auto.message, "KVM");
    } else {
        assert!(auto.message.starts_with("no usable KVM: emulating; "), "{}", auto.message);
        assert!(kvm.message.starts_with("no usable KVM: "), "{}", kvm.message);
    }
}

/// The processors that the threads of the guest's processors may run on, by the names that QEMU gives them.
fn processors_of_guest(pid: i32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().map(|task| task.path());
    let guests =
        tasks.filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("CPU ")));
    let allowed = guests.filter_map(|task| {
        let status = fs::read_to_string(task.join("status")).ok()?;
        Some(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?.trim().to_owned())
    });
    let mut allowed: Vec<_> = allowed.collect();
    allowed.sort_unstable();
    allowed
}

#[tokio::test]
async fn each_processor_of_the_guest_is_bound_to_the_one_that_was_given_for_it() {
    let Some(subject) = setup().await else { return };
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
    let Ok(first) = allowed.split([',', '-']).next().unwrap().parse::<u32>() else { panic!("{allowed}") };
    let (driver, mut config) = (subject.qemu(), subject.config("pinned"));
    config.spec.cpu_cores = 1;
    config.devices = Some(hv_types::DeviceGrant { cpus: vec![first], ..Default::default() });
    driver.create(&config).await.unwrap();
    driver.start(&config.id).await.unwrap();
    assert_eq!(processors_of_guest(subject.pids(&config.id)[0]), [first.to_string()]);
    // After a stop and a start too; and a processor that is not there is no start.
    driver.stop(&config.id, StopMode::Force).await.unwrap();
    driver.start(&config.id).await.unwrap();
    assert_eq!(processors_of_guest(subject.pids(&config.id)[0]), [first.to_string()]);
    cleaned(&subject, &driver, &config).await;
    let mut config = subject.config("nowhere");
    config.devices = Some(hv_types::DeviceGrant { cpus: vec![1000], ..Default::default() });
    driver.create(&config).await.unwrap();
    let refused = driver.start(&config.id).await.unwrap_err();
    assert!(cause(&refused).contains("1000"), "{refused}: {}", cause(&refused));
    assert!(subject.pids(&config.id).is_empty());
    cleaned(&subject, &driver, &config).await;
}
