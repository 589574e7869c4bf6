//! What only a real libvirtd can show: it dies and comes back, and guests do not notice.

use std::time::{Duration, Instant};

use futures::StreamExt as _;
use hv_driver::conformance::{PATIENCE, Subject as _, cleaned};
use hv_driver::fence::{self, Outcome, Zeal};
use hv_driver::{Driver, DriverError, Exit, FenceTarget, Input, InstanceConfig, Observed, StopMode};
use hv_driver_libvirt::{LibvirtDriver, LibvirtOptions};
use hv_types::DiskSpec;
use hv_types::instance::Firmware;

use crate::daemon::{Libvirtd, processes_with};
use crate::subject::{LibvirtSubject, can_run, setup, virsh};

/// How soon a libvirtd that died must be known to be dead.
const DETECTED_WITHIN: Duration = Duration::from_secs(2);
/// How often a condition is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// A libvirtd of a test's own, in a directory of its own.
struct OwnDaemon {
    _dir: tempfile::TempDir,
    daemon: Libvirtd,
}

impl Drop for OwnDaemon {
    fn drop(&mut self) {
        self.daemon.kill();
    }
}

/// A subject over a libvirtd that the test may kill.
fn own() -> Option<(LibvirtSubject, OwnDaemon)> {
    if !can_run() {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let daemon = Libvirtd::start(dir.path());
    let subject = LibvirtSubject::over(Libvirtd::of(dir.path()), "state");
    Some((subject, OwnDaemon { _dir: dir, daemon }))
}

async fn running(subject: &LibvirtSubject, driver: &LibvirtDriver) -> InstanceConfig {
    let config = subject.config("real");
    driver.create(&config).await.unwrap();
    driver.start(&config.id).await.unwrap();
    config
}

async fn until(what: &str, timeout: Duration, mut condition: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !condition().await {
        assert!(begun.elapsed() < timeout, "waited in vain until {what}");
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Types something until the guest says it back.
async fn echoes(driver: &LibvirtDriver, config: &InstanceConfig, line: &str) {
    let mut console = driver.console(&config.id).await.unwrap();
    let mut printed = String::new();
    until("the guest answers", PATIENCE, async || {
        console.input.send(Input::Data(format!("{line}\n").into())).await.unwrap();
        while let Ok(Some(piece)) =
            tokio::time::timeout(Duration::from_millis(200), console.output.next()).await
        {
            printed.push_str(&String::from_utf8_lossy(&piece.unwrap()));
        }
        printed.contains(line)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_libvirtd_that_is_killed_is_noticed_and_found_again_and_the_guest_goes_on() {
    let Some((subject, mut own)) = own() else { return };
    let driver = subject.libvirt();
    let config = running(&subject, &driver).await;
    let before = driver.observe(&config.id).await.unwrap();
    let fingerprint = driver.fingerprint().await;
    assert!(fingerprint.healthy, "{}", fingerprint.message);
    let mut turns = driver.health_turns();
    own.daemon.kill();
    let begun = Instant::now();
    tokio::time::timeout(PATIENCE, turns.next()).await.expect("its end is told").unwrap();
    let fingerprint = driver.fingerprint().await;
    assert!(!fingerprint.healthy);
    assert!(begun.elapsed() < DETECTED_WITHIN, "{:?}", begun.elapsed());
    assert!(fingerprint.message.contains("libvirt"), "{}", fingerprint.message);
    assert!(matches!(driver.observe(&config.id).await.unwrap(), Observed::Running(_)), "the lock tells");
    echoes(&driver, &config, "without libvirtd").await;
    own.daemon.spawn();
    tokio::time::timeout(PATIENCE, turns.next()).await.expect("its return is told").unwrap();
    until("libvirtd is found again", PATIENCE, async || driver.fingerprint().await.healthy).await;
    assert_eq!(driver.observe(&config.id).await.unwrap(), before);
    assert_eq!(subject.copies(&config.id), 1);
    echoes(&driver, &config, "with libvirtd").await;
    driver.stop(&config.id, StopMode::Force).await.unwrap();
    assert_eq!(driver.observe(&config.id).await.unwrap(), Observed::Stopped(Exit::Stopped));
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happened_while_libvirtd_was_away_is_told_when_it_is_back() {
    let Some((subject, mut own)) = own() else { return };
    let driver = subject.libvirt();
    let (dies, stays) = (running(&subject, &driver).await, running(&subject, &driver).await);
    let mut events = driver.events();
    own.daemon.kill();
    subject.kill(&dies.id).await;
    own.daemon.spawn();
    let event = tokio::time::timeout(PATIENCE, events.next()).await.expect("it is told").unwrap();
    assert_eq!(event.id, dies.id);
    let Observed::Stopped(exit) = driver.observe(&dies.id).await.unwrap() else { panic!("it runs") };
    assert!(matches!(exit, Exit::Failed(_) | Exit::Lost), "{exit:?}");
    assert!(matches!(driver.observe(&stays.id).await.unwrap(), Observed::Running(_)));
    driver.start(&dies.id).await.unwrap();
    assert_eq!(subject.copies(&dies.id), 1);
    driver.delete(&stays.id).await.unwrap();
    cleaned(&subject, &driver, &dies).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_is_stopped_and_fenced_while_libvirtd_is_dead() {
    let Some((subject, mut own)) = own() else { return };
    let driver = subject.libvirt();
    let (stopped, fenced) = (running(&subject, &driver).await, running(&subject, &driver).await);
    own.daemon.kill();
    driver.stop(&stopped.id, StopMode::Force).await.unwrap();
    assert_eq!(subject.copies(&stopped.id), 0);
    let target = driver.fence_target(&fenced.id).unwrap();
    until("it is fenced", PATIENCE, async || fence::kill(&target, Zeal::Instance) == Outcome::Gone).await;
    assert_eq!(subject.copies(&fenced.id), 0);
    own.daemon.spawn();
    until("libvirtd is found again", PATIENCE, async || driver.fingerprint().await.healthy).await;
    assert_eq!(driver.observe(&stopped.id).await.unwrap(), Observed::Stopped(Exit::Stopped));
    let observed = driver.observe(&fenced.id).await.unwrap();
    assert!(matches!(observed, Observed::Stopped(Exit::Failed(_) | Exit::Lost)), "{observed:?}");
    driver.delete(&stopped.id).await.unwrap();
    cleaned(&subject, &driver, &fenced).await;
}

/// A start that was already on its way to libvirtd comes to nothing after the fencer has said that nothing runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_libvirtd_is_told_to_start_after_a_fence_does_not_run() {
    let Some(subject) = setup().await else { return };
    let driver = subject.libvirt();
    let config = running(&subject, &driver).await;
    let target = driver.fence_target(&config.id).unwrap();
    until("it is fenced", PATIENCE, async || fence::kill(&target, Zeal::Instance) == Outcome::Gone).await;
    let name = format!("hv-{}", config.id);
    for _ in 0..2 {
        virsh(&subject.daemon.uri(), &["start", &name]);
        assert_eq!(subject.copies(&config.id), 0, "libvirtd could start it");
    }
    let FenceTarget::Permitted { permit, .. } = &target else { panic!("{target:?}") };
    assert!(!permit.exists());
    driver.start(&config.id).await.unwrap();
    // Nor does a second one come to run beside the first.
    virsh(&subject.daemon.uri(), &["start", &name]);
    assert_eq!(subject.copies(&config.id), 1);
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_of_users_are_text_for_libvirt() {
    let Some(subject) = setup().await else { return };
    let driver = subject.libvirt();
    let nasty =
        "</title></metadata><devices><disk type='block'><source dev='/dev/sda'/></disk></devices> & \" ' ]]>";
    let mut config = subject.config(nasty);
    config.metadata.labels.insert("a".to_owned(), nasty.to_owned());
    config.metadata.annotations.insert(nasty.to_owned(), "<x/>".to_owned());
    let disk = DiskSpec { name: "<d>&'\"".to_owned(), size_bytes: 1 << 20, ..DiskSpec::default() };
    config.spec.disks.push(disk);
    driver.create(&config).await.unwrap();
    driver.start(&config.id).await.unwrap();
    let name = format!("hv-{}", config.id);
    let document = virsh(&subject.daemon.uri(), &["dumpxml", &name]);
    let devices = document.split("<devices>").nth(1).unwrap();
    assert!(!devices.contains("<source dev=") && devices.matches("<disk ").count() == 3, "{document}");
    let title = virsh(&subject.daemon.uri(), &["desc", "--title", &name]);
    assert_eq!(title.trim(), nasty);
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uefi_and_a_tpm_are_there_or_refused_with_a_reason() {
    let Some(subject) = setup().await else { return };
    let driver = subject.libvirt();
    let mut config = subject.config("firmware");
    config.spec.firmware = Some(Firmware::Uefi);
    config.spec.tpm = true;
    config.spec.memory_bytes = 128 << 20;
    match driver.create(&config).await {
        Err(DriverError::InvalidConfig { reason, .. }) => {
            assert!(reason.contains("apt-get install"), "{reason}");
            crate::subject::skip("hv-driver-libvirt: UEFI and TPM", &reason);
            assert!(subject.leftovers().is_empty());
        }
        created => {
            created.unwrap();
            driver.start(&config.id).await.unwrap();
            let document = virsh(&subject.daemon.uri(), &["dumpxml", &format!("hv-{}", config.id)]);
            assert!(document.contains("OVMF") && document.contains("tpm-crb"), "{document}");
            assert!(subject.instance_dir(&config.id).join("nvram.fd").exists());
            driver.stop(&config.id, StopMode::Force).await.unwrap();
            driver.start(&config.id).await.unwrap();
            cleaned(&subject, &driver, &config).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_libvirtd_does_not_have_is_refused() {
    let Some(subject) = setup().await else { return };
    let driver = LibvirtDriver::new(LibvirtOptions {
        default_network: "no-such".to_owned(),
        ..subject.options.clone()
    });
    let error = driver.create(&subject.config("lonely")).await.unwrap_err();
    assert!(matches!(error, DriverError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("no-such"), "{error}");
    assert!(subject.leftovers().is_empty());
}

#[tokio::test]
async fn a_node_without_libvirtd_says_so_and_refuses_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let options = LibvirtOptions {
        uri: "qemu+unix:///system?socket=/nonexistent/socket".to_owned(),
        state_dir: dir.path().join("state"),
        image_dir: dir.path().join("images"),
        ..LibvirtOptions::default()
    };
    let fingerprint = LibvirtDriver::new(options).fingerprint().await;
    assert!(!fingerprint.healthy);
    assert!(fingerprint.message.contains("/nonexistent/socket"), "{}", fingerprint.message);
}

/// libvirtd dies at the source in the middle of a transfer: there is one machine afterwards, and it runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_whose_libvirtd_dies_keeps_one_machine() {
    let Some((subject, mut own)) = own() else { return };
    let (source, target) = (subject.libvirt(), LibvirtDriver::new(subject.second_options()));
    let config = running(&subject, &source).await;
    echoes(&source, &config, "before").await;
    let incoming = hv_driver::IncomingRequest {
        migration: "dies".to_owned(),
        storage: hv_driver::Storage::Copied,
        listen: std::net::Ipv4Addr::LOCALHOST.into(),
    };
    let answer = target.prepare_incoming(&config, &incoming).await.unwrap();
    let request = hv_driver::MigrateRequest {
        migration: "dies".to_owned(),
        storage: hv_driver::Storage::Copied,
        target: answer.target,
        downtime_limit: Duration::from_millis(300),
        bandwidth_limit: 1 << 20,
        auto_converge: false,
    };
    source.migrate(&config.id, &request).await.unwrap();
    until("the target's qemu is there", PATIENCE, async || {
        processes_with(&format!("guest=hv-{},", config.id)).len() == 2
    })
    .await;
    own.daemon.kill();
    own.daemon.spawn();
    until("it is over", PATIENCE, async || {
        let status = source.migration(&config.id).await;
        matches!(
            status,
            Ok(Some(hv_driver::MigrationStatus {
                phase: hv_driver::MigrationPhase::Failed { .. } | hv_driver::MigrationPhase::HandedOver,
                ..
            }))
        )
    })
    .await;
    if source.observe(&config.id).await.unwrap() == Observed::HandedOver {
        target.delete(&config.id).await.unwrap();
        source.abort_migration(&config.id).await.unwrap();
    } else {
        target.delete(&config.id).await.unwrap();
    }
    until("it runs here", PATIENCE, async || {
        matches!(source.observe(&config.id).await, Ok(Observed::Running(_)))
    })
    .await;
    assert_eq!(subject.copies(&config.id), 1);
    echoes(&source, &config, "after").await;
    cleaned(&subject, &source, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_domain_that_is_destroyed_by_somebody_else_has_failed() {
    let Some(subject) = setup().await else { return };
    let driver = subject.libvirt();
    let config = running(&subject, &driver).await;
    let mut events = driver.events();
    virsh(&subject.daemon.uri(), &["destroy", &format!("hv-{}", config.id)]);
    let event = tokio::time::timeout(PATIENCE, events.next()).await.expect("it is told").unwrap();
    assert_eq!(event.id, config.id);
    let observed = driver.observe(&config.id).await.unwrap();
    assert!(
        matches!(&observed, Observed::Stopped(Exit::Failed(why)) if why.contains("somebody")),
        "{observed:?}"
    );
    cleaned(&subject, &driver, &config).await;
}
