//! Changes of machines that run, and what machines are given, asked of QEMU itself.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use hv_driver::conformance::cleaned;
use hv_driver::{Driver, DriverError, Exit, Observed, StopMode, Updated};
use hv_types::{DiskSpec, Firmware, ResourceLimits};
use serde_json::{Value, json};

use crate::subject::{setup, skip};

/// Emulated firmware on a busy machine takes its time.
const PATIENCE: Duration = Duration::from_secs(90);

/// Asks QEMU on the monitor that the driver leaves free.
fn ask(dir: &Path, command: &str) -> Value {
    // The directory's descriptor stands for a path that is too long for a socket.
    let open = fs::File::open(dir).unwrap();
    let socket = format!("/proc/self/fd/{}/events.sock", open.as_raw_fd());
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut request = |name: &str| {
        writeln!(stream, "{}", json!({ "execute": name })).unwrap();
        loop {
            let answer: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
            if answer.get("return").is_some() || answer.get("error").is_some() {
                return answer["return"].clone();
            }
        }
    };
    request("qmp_capabilities");
    request(command)
}

fn disk(name: &str, size_bytes: u64, boot: bool) -> DiskSpec {
    DiskSpec { name: name.to_owned(), size_bytes, boot, ..DiskSpec::default() }
}

fn sizes(dir: &Path) -> Vec<u64> {
    let nodes = ask(dir, "query-named-block-nodes");
    let is_disk = |node: &&Value| {
        node["node-name"].as_str().is_some_and(|name| name.starts_with("disk")) && node["ro"] == false
    };
    let mut sizes: Vec<_> = nodes
        .as_array()
        .unwrap()
        .iter()
        .filter(is_disk)
        .map(|node| node["image"]["virtual-size"].as_u64().unwrap())
        .collect();
    sizes.sort_unstable();
    sizes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disks_grow_come_and_go_while_it_runs_and_while_it_does_not() {
    let Some(subject) = setup().await else { return };
    let (driver, mut config) = (subject.qemu(), subject.config("grows"));
    config.spec.disks = vec![disk("root", 8 << 20, true), disk("data", 8 << 20, false)];
    driver.create(&config).await.unwrap();
    driver.start(&config.id).await.unwrap();
    let dir = subject.instance_dir(&config.id);
    config.spec.disks[0].size_bytes = 16 << 20;
    config.spec.disks[1].size_bytes = 24 << 20;
    config.spec.disks.push(disk("more", 4 << 20, false));
    for _ in 0..2 {
        assert_eq!(driver.update(&config).await.unwrap(), Updated::Done);
        assert_eq!(sizes(&dir), [4 << 20, 16 << 20, 24 << 20]);
    }
    let mut smaller = config.clone();
    smaller.spec.disks[0].size_bytes = 8 << 20;
    assert!(matches!(driver.update(&smaller).await, Err(DriverError::InvalidConfig { .. })));
    driver.stop(&config.id, StopMode::Force).await.unwrap();
    config.spec.disks[0].size_bytes = 32 << 20;
    config.spec.disks.remove(1);
    config.name = "renamed".to_owned();
    assert_eq!(driver.update(&config).await.unwrap(), Updated::Done);
    driver.start(&config.id).await.unwrap();
    assert_eq!(sizes(&dir), [4 << 20, 32 << 20]);
    config.name = "renamed-again".to_owned();
    for _ in 0..2 {
        let waits = driver.update(&config).await.unwrap();
        assert!(matches!(&waits, Updated::AtNextStart(what) if what.contains("name")), "{waits:?}");
    }
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bounds_of_reads_and_writes_are_qemu_s() {
    let Some(subject) = setup().await else { return };
    let (driver, mut config) = (subject.qemu(), subject.config("bounded"));
    let limits =
        |read, write| ResourceLimits { io_read_bps: read, io_write_bps: write, ..Default::default() };
    config.spec.limits = Some(limits(1 << 20, 2 << 20));
    driver.create(&config).await.unwrap();
    driver.start(&config.id).await.unwrap();
    let dir = subject.instance_dir(&config.id);
    let bounds = || {
        let disks = ask(&dir, "query-block");
        let boot = disks.as_array().unwrap().iter().find(|disk| disk["inserted"]["node-name"] == "disk0");
        let inserted = boot.unwrap()["inserted"].clone();
        (inserted["bps_rd"].as_u64(), inserted["bps_wr"].as_u64())
    };
    assert_eq!(bounds(), (Some(1 << 20), Some(2 << 20)));
    for (read, write) in [(3 << 20, 0), (0, 0)] {
        config.spec.limits = Some(limits(read, write));
        assert_eq!(driver.update(&config).await.unwrap(), Updated::Done);
        assert_eq!(bounds(), (u64::try_from(read).ok(), u64::try_from(write).ok()));
    }
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uefi_is_booted_where_its_firmware_is_installed() {
    let Some(subject) = setup().await else { return };
    let (driver, mut config) = (subject.qemu(), subject.config("uefi"));
    config.spec.firmware = Some(Firmware::Uefi);
    match driver.create(&config).await {
        Err(DriverError::Unsupported { reason, .. }) => {
            assert!(reason.contains("apt-get install ovmf"), "{reason}");
            return skip("hv-driver-qemu::changes", "no UEFI firmware is installed; apt-get install ovmf");
        }
        created => drop(created.unwrap()),
    }
    driver.start(&config.id).await.unwrap();
    let mut console = driver.console(&config.id).await.unwrap();
    let begun = Instant::now();
    let mut printed = String::new();
    // Its boot manager looks for something to boot, and says so.
    while !printed.contains("BdsDxe") {
        let piece = tokio::time::timeout(PATIENCE, console.output.next()).await.unwrap().unwrap();
        printed.push_str(&String::from_utf8_lossy(&piece.unwrap()));
        assert!(begun.elapsed() < PATIENCE, "{printed}");
    }
    driver.stop(&config.id, StopMode::Force).await.unwrap();
    assert_eq!(driver.observe(&config.id).await.unwrap(), Observed::Stopped(Exit::Stopped));
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_rescue_its_own_disks_are_there_and_nothing_else_changes() {
    let Some(subject) = setup().await else { return };
    let mut config = subject.config("rescued");
    config.spec.disks.push(disk("data", 4 << 20, false));
    let dir = subject.instance_dir(&config.id);
    let driver = subject.qemu();
    driver.create(&config).await.unwrap();
    let mut rescued = config.clone();
    rescued.spec.rescue = "counter".to_owned();
    assert_eq!(driver.update(&rescued).await.unwrap(), Updated::Done);
    driver.start(&config.id).await.unwrap();
    // The rescue disk, its own boot disk, and the other one.
    assert_eq!(sizes(&dir).len(), 3);
    let mut more = rescued.clone();
    more.spec.cpu_cores += 1;
    let refused = driver.update(&more).await.unwrap_err();
    assert!(matches!(refused, DriverError::WrongState { .. }), "{refused}");
    // The image may go meanwhile, and a name is only a name.
    fs::remove_file(subject.options.image_dir.join("counter.raw")).unwrap();
    rescued.name = "renamed".to_owned();
    assert!(matches!(driver.update(&rescued).await.unwrap(), Updated::AtNextStart(_)));
    driver.stop(&config.id, StopMode::Force).await.unwrap();
    assert_eq!(driver.update(&config).await.unwrap(), Updated::Done);
    driver.start(&config.id).await.unwrap();
    assert_eq!(sizes(&dir).len(), 2);
    cleaned(&subject, &driver, &config).await;
}
