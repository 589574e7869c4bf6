//! The devices of a microVM, each driven by a bare-metal guest of its own.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use hv_driver::Driver as _;
use hv_driver::StopMode;
use hv_driver::conformance::{STOP_TIMEOUT, cleaned};
use hv_types::{DiskSpec, ResourceLimits};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};

use crate::subject::{FirecrackerSubject, PATIENCE, read_until, real, skip};

const MIB: u64 = 1 << 20;

/// With a guest that drives a device.
async fn with(guest: &str) -> Option<FirecrackerSubject> {
    Some(real().await?.with_guest(guest))
}

fn disk(name: &str, size_bytes: u64) -> DiskSpec {
    DiskSpec { name: name.to_owned(), size_bytes, ..DiskSpec::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_is_read_written_and_counted() {
    let Some(mut subject) = with("blk").await else { return };
    subject.spec.disks = vec![disk("data", 4 * MIB)];
    let (driver, config) = (subject.firecracker(), subject.config("blk"));
    driver.create(&config).await.unwrap();
    let file = subject.root(&config.id).join("disk0.raw");
    let mut content = vec![0; 4 << 20];
    content[..20].copy_from_slice(b"hello from the host\0");
    fs::write(&file, &content).unwrap();
    driver.start(&config.id).await.unwrap();
    let mut console = driver.console(&config.id).await.unwrap();
    let printed = read_until(&mut console, "write status=0").await;
    for expected in ["sectors=8192", "read status=0", "first=hello from the host"] {
        assert!(printed.contains(expected), "{printed}");
    }
    let stats = driver.stats(&config.id).await.unwrap();
    assert_eq!((stats.disk_read_bytes, stats.disk_write_bytes), (512, 512), "{stats:?}");
    assert_eq!(driver.stats(&config.id).await.unwrap().disk_read_bytes, 512, "counted twice");
    drop(driver);
    let driver = subject.firecracker();
    assert_eq!(driver.stats(&config.id).await.unwrap().disk_read_bytes, 512, "forgotten by a new agent");
    driver.stop(&config.id, StopMode::Graceful(STOP_TIMEOUT)).await.unwrap();
    assert!(fs::read(&file).unwrap()[512..].starts_with(b"written by the guest"));
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_is_no_faster_than_its_limit() {
    let Some(mut subject) = with("blk").await else { return };
    subject.spec.disks = vec![disk("data", 4 * MIB)];
    subject.spec.kernel_args = "bulk".to_owned();
    let mut took = Vec::new();
    for io_read_bps in [0, 1 << 20] {
        subject.spec.limits = Some(ResourceLimits { io_read_bps, ..ResourceLimits::default() });
        let (driver, config) = subject.running("limited").await;
        let mut console = driver.console(&config.id).await.unwrap();
        read_until(&mut console, "write status=0").await;
        let begun = Instant::now();
        read_until(&mut console, "bulk read").await;
        took.push(begun.elapsed());
        cleaned(&subject, &driver, &config).await;
    }
    // 3 MiB at 1 MiB each second, of which the first is there at once.
    assert!(took[1] > Duration::from_millis(1500) && took[1] > took[0], "{took:?}");
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

/// A bridge that goes with the test.
struct Bridge(String);

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.0]).output();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_card_is_reached_over_the_bridge_and_counted() {
    let Some(mut subject) = with("net").await else { return };
    let has_tools = ["ip", "ping"].iter().all(|tool| Command::new(tool).arg("-V").output().is_ok());
    if !rustix::process::geteuid().is_root() || !has_tools {
        return skip(
            "hv-driver-firecracker::net",
            "a bridge takes root, ip and ping; apt-get install iproute2 iputils-ping",
        );
    }
    let pid = std::process::id();
    let bridge = Bridge(format!("hvbr{pid}"));
    run("ip", &["link", "add", &bridge.0, "type", "bridge"]);
    let net = format!("10.{}.{}", 64 + pid / 250 % 60, pid % 250);
    run("ip", &["addr", "add", &format!("{net}.1/24"), "dev", &bridge.0]);
    run("ip", &["link", "set", &bridge.0, "up"]);
    subject.options.bridge = Some(bridge.0.clone());
    subject.spec.network = Some(hv_types::NetworkSpec::default());
    let (driver, config) = subject.running("net").await;
    let mut console = driver.console(&config.id).await.unwrap();
    let printed = read_until(&mut console, "mac=0668").await;
    assert!(!printed.contains("no card"));
    let pinged = tokio::task::spawn_blocking(move || {
        run("ping", &["-c", "3", "-i", "0.2", "-w", "30", "-I", &format!("{net}.1"), &format!("{net}.2")])
    });
    let pinged = pinged.await.unwrap();
    assert!(pinged.contains(" 0% packet loss"), "{pinged}");
    let stats = driver.stats(&config.id).await.unwrap();
    assert!(stats.network_rx_bytes >= 3 * 98 && stats.network_tx_bytes >= 3 * 98, "{stats:?}");
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_reads_its_user_data_with_a_token() {
    let Some(mut subject) = with("mmds").await else { return };
    if !rustix::process::geteuid().is_root() {
        return skip("hv-driver-firecracker::mmds", "a tap interface takes root");
    }
    subject.spec.user_data = "#cloud-config\nhostname: \"ü\"\n".to_owned();
    let (driver, config) = subject.running("mmds").await;
    let mut console = driver.console(&config.id).await.unwrap();
    let printed = read_until(&mut console, "\nread").await;
    assert!(printed.contains(&format!("user-data={}", subject.spec.user_data)), "{printed}");
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_is_reached_over_its_vsock() {
    let Some(subject) = with("vsock").await else { return };
    let (driver, config) = subject.running("vsock").await;
    let mut console = driver.console(&config.id).await.unwrap();
    read_until(&mut console, "cid=3").await;
    let link = tempfile::tempdir().unwrap();
    let path = link.path().join("s");
    std::os::unix::fs::symlink(driver.vsock_path(&config.id).unwrap(), &path).unwrap();
    let work = async {
        let mut stream = BufReader::new(tokio::net::UnixStream::connect(path).await.unwrap());
        stream.write_all(b"CONNECT 52\n").await.unwrap();
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        assert!(line.starts_with("OK "), "{line:?}");
        for text in ["one", "and another"] {
            stream.write_all(text.as_bytes()).await.unwrap();
            let mut back = vec![0; text.len()];
            stream.read_exact(&mut back).await.unwrap();
            assert_eq!(back, text.as_bytes());
        }
    };
    tokio::time::timeout(PATIENCE, work).await.unwrap();
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_balloon_takes_memory_gives_it_back_and_tells() {
    let Some(subject) = with("balloon").await else { return };
    let (driver, config) = subject.running("balloon").await;
    let mut console = driver.console(&config.id).await.unwrap();
    read_until(&mut console, "balloon\r\n").await;
    driver.set_balloon(&config.id, 2 << 20).await.unwrap();
    read_until(&mut console, "pages=512").await;
    driver.set_balloon(&config.id, 0).await.unwrap();
    read_until(&mut console, "pages=0").await;
    let begun = Instant::now();
    // The guest tells of 4 MiB of caches, at the next of its turns.
    while driver.stats(&config.id).await.unwrap().memory_cache_bytes != 4 * MIB {
        assert!(begun.elapsed() < PATIENCE, "the guest's figures never came");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_devices_are_is_on_the_command_line() {
    let Some(mut subject) = real().await else { return };
    subject.spec.disks = vec![disk("data", MIB)];
    let (driver, config) = subject.running("line").await;
    let mut console = driver.console(&config.id).await.unwrap();
    crate::subject::type_line(&console, "!line\nthat is all\n").await;
    let printed = read_until(&mut console, "that is all").await;
    // Disk, balloon, vsock, entropy.
    assert!(printed.matches("virtio_mmio.device=4K@0x").count() >= 4, "{printed}");
    cleaned(&subject, &driver, &config).await;
}
