//! The agent dies at each step of an operation; the next one finishes what was asked, with one QEMU.

use std::process::{Command, Stdio};

use hv_driver::conformance::{Subject as _, cleaned};
use hv_driver::{Driver, Exit, InstanceConfig, Observed, StopMode};
use hv_driver_qemu::{Accel, QemuDriver, QemuOptions};

use crate::subject::{QemuSubject, setup};

/// Tells the test that it is the process that is to die, and what to work on.
const WORK: &str = "HV_DRIVER_QEMU_TEST_WORK";
/// As the crash points' own crate spells it.
const CRASH_AT: &str = "HYPERVISOR_CRASH_AT";

/// What was being done when the process died, and is to be reached.
#[derive(Clone, Copy, Debug)]
enum Goal {
    Running,
    Stopped,
    Deleted,
}

const POINTS: [(&str, Goal); 8] = [
    ("qemu.create.after_dir", Goal::Running),
    ("qemu.create.after_disk", Goal::Running),
    ("qemu.start.before_spawn", Goal::Running),
    ("qemu.start.after_spawn", Goal::Running),
    ("qemu.start.after_qmp", Goal::Running),
    ("qemu.stop.after_powerdown", Goal::Stopped),
    ("qemu.stop.after_kill", Goal::Stopped),
    ("qemu.delete.before_rmdir", Goal::Deleted),
];

/// Everything that can be done with an instance; dies on the way.
async fn work(options: QemuOptions, config: InstanceConfig) {
    let driver = QemuDriver::new(options);
    driver.create(&config).await.unwrap();
    if config.spec.is_in_rescue() {
        driver.update(&config).await.unwrap();
    }
    driver.start(&config.id).await.unwrap();
    driver.stop(&config.id, StopMode::Graceful(hv_driver::conformance::STOP_TIMEOUT)).await.unwrap();
    driver.start(&config.id).await.unwrap();
    driver.stop(&config.id, StopMode::Force).await.unwrap();
    driver.delete(&config.id).await.unwrap();
}

fn die_at(point: &str, subject: &QemuSubject, config: &InstanceConfig) {
    let options = &subject.options;
    let work =
        serde_json::json!({ "state": options.state_dir, "images": options.image_dir, "config": config });
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["crash::a_crash_at_any_step_is_survived_with_one_qemu", "--exact", "--nocapture"])
        .env(WORK, work.to_string())
        .env(CRASH_AT, point)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), None, "{point}: it did not die there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_step_is_survived_with_one_qemu() {
    if let Some(text) = std::env::var_os(WORK) {
        let asked: serde_json::Value = serde_json::from_str(text.to_str().unwrap()).unwrap();
        let path = |name: &str| serde_json::from_value(asked[name].clone()).unwrap();
        let options = QemuOptions {
            state_dir: path("state"),
            image_dir: path("images"),
            accel: Accel::Tcg,
            ..QemuOptions::default()
        };
        return work(options, serde_json::from_value(asked["config"].clone()).unwrap()).await;
    }
    for (point, goal) in POINTS {
        let Some(subject) = setup().await else { return };
        let config = subject.config("crash");
        die_at(point, &subject, &config);
        let driver = subject.qemu();
        assert_eq!(driver.list().await.unwrap(), std::slice::from_ref(&config.id), "{point}");
        let found = driver.recover(&config.id, None).await.unwrap();
        eprintln!("{point}: found {found:?}");
        match goal {
            Goal::Running => {
                driver.create(&config).await.unwrap();
                driver.start(&config.id).await.unwrap();
                assert!(matches!(driver.observe(&config.id).await.unwrap(), Observed::Running(_)), "{point}");
                assert_eq!(subject.copies(&config.id), 1, "{point}");
            }
            Goal::Stopped => {
                driver.stop(&config.id, StopMode::Force).await.unwrap();
                assert_eq!(
                    driver.observe(&config.id).await.unwrap(),
                    Observed::Stopped(Exit::Stopped),
                    "{point}"
                );
                assert_eq!(subject.copies(&config.id), 0, "{point}");
            }
            Goal::Deleted => {}
        }
        cleaned(&subject, &driver, &config).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_on_the_way_into_rescue_leaves_its_own_disks_as_they_were() {
    for point in ["qemu.start.before_spawn", "qemu.start.after_spawn", "qemu.start.after_qmp"] {
        let Some(subject) = setup().await else { return };
        let config = subject.config("rescued");
        let own = subject.instance_dir(&config.id).join("boot.qcow2");
        let driver = subject.qemu();
        driver.create(&config).await.unwrap();
        drop(driver);
        let before = std::fs::read(&own).unwrap();
        let mut rescued = config.clone();
        rescued.spec.rescue = "counter".to_owned();
        die_at(point, &subject, &rescued);
        let driver = subject.qemu();
        driver.recover(&config.id, None).await.unwrap();
        driver.start(&config.id).await.unwrap();
        assert_eq!(subject.copies(&config.id), 1, "{point}");
        assert!(subject.instance_dir(&config.id).join("rescue.qcow2").exists(), "{point}");
        driver.stop(&config.id, StopMode::Force).await.unwrap();
        assert!(std::fs::read(&own).unwrap() == before, "{point}: its own disk is another");
        driver.update(&config).await.unwrap();
        driver.start(&config.id).await.unwrap();
        assert!(!subject.instance_dir(&config.id).join("rescue.qcow2").exists(), "{point}");
        cleaned(&subject, &driver, &config).await;
    }
}
