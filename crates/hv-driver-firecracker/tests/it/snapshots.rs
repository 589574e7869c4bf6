//! Snapshots on the real VMM: complete and differences, return, clones, and what a crash leaves.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use hv_driver::conformance::{Subject as _, cleaned};
use hv_driver::{Driver as _, DriverError, Exit, Observed, StopMode};
use hv_types::DiskSpec;

use crate::subject::{FirecrackerSubject, GREETING, count, read_until, real};
use crate::traps::{ask, snapshot};

fn meta(subject: &FirecrackerSubject, id: &hv_types::InstanceId, name: &str) -> serde_json::Value {
    let path = subject.instance_dir(id).join("snapshots").join(name).join("meta.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_snapshot_brings_back_its_own_moment() {
    let Some(subject) = real().await else { return };
    let (driver, config) = subject.running("moments").await;
    let id = &config.id;
    let mut counts = Vec::new();
    for name in ["one", "two", "three"] {
        counts.push(count(&driver, id).await);
        let info = driver.snapshot(id, &snapshot(name, true)).await.unwrap();
        assert!(info.memory && info.size_bytes > 0, "{info:?}");
        assert_eq!(driver.snapshot(id, &snapshot(name, true)).await.unwrap(), info, "taken twice");
    }
    let kinds = ["one", "two", "three"].map(|name| meta(&subject, id, name)["is_diff"] == true);
    assert_eq!(kinds, [false, true, true], "only the first has all memory");
    let names: Vec<_> = driver.snapshots(id).await.unwrap().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["one", "two", "three"]);
    counts.push(count(&driver, id).await);
    for (at, name) in [(0, "one"), (2, "three"), (1, "two")] {
        driver.revert(id, name).await.unwrap();
        assert_eq!(subject.copies(id), 1);
        // The first look after the return: later than when it was taken, and not as late as it had been.
        driver.pause(id).await.unwrap();
        driver.resume(id).await.unwrap();
        let now = count(&driver, id).await;
        assert!(now > counts[at], "{name}: {now} of {counts:?}");
        // What was printed until then is printed no more: the guest is where it was.
        let (_, state) = ask(&subject, id, "GET /", "");
        assert!(state.contains("Running"), "{state}");
    }
    // A difference to the snapshot that was returned to is complete again.
    driver.snapshot(id, &snapshot("four", true)).await.unwrap();
    assert_eq!(meta(&subject, id, "four")["is_diff"], true);
    driver.delete_snapshot(id, "four").await.unwrap();
    driver.delete_snapshot(id, "four").await.unwrap();
    driver.snapshot(id, &snapshot("five", true)).await.unwrap();
    assert_eq!(meta(&subject, id, "five")["is_diff"], false, "its base is gone");
    driver.revert(id, "five").await.unwrap();
    assert!(count(&driver, id).await > 0);
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn time_goes_back_to_where_a_paused_machine_stood() {
    let Some(subject) = real().await else { return };
    let (driver, config) = subject.running("stands").await;
    let id = &config.id;
    let before = count(&driver, id).await;
    driver.pause(id).await.unwrap();
    driver.snapshot(id, &snapshot("still", true)).await.unwrap();
    assert!(matches!(driver.observe(id).await.unwrap(), Observed::Paused(_)));
    driver.resume(id).await.unwrap();
    let mut later = count(&driver, id).await;
    // Far enough that a return cannot be mistaken.
    while later < before + 200_000 {
        later = count(&driver, id).await;
    }
    driver.revert(id, "still").await.unwrap();
    assert!(matches!(driver.observe(id).await.unwrap(), Observed::Paused(_)), "it did not stand still then");
    driver.resume(id).await.unwrap();
    let back = count(&driver, id).await;
    assert!(back > before && back < later, "{before} {back} {later}");
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_without_memory_brings_back_the_disks() {
    let Some(mut subject) = real().await else { return };
    subject.spec.disks =
        vec![DiskSpec { name: "data".to_owned(), size_bytes: 2 << 20, ..DiskSpec::default() }];
    let (driver, config) = (subject.firecracker(), subject.config("disks"));
    let id = &config.id;
    driver.create(&config).await.unwrap();
    let disk = subject.root(id).join("disk0.raw");
    let fill = |byte: u8| fs::write(&disk, vec![byte; 2 << 20]).unwrap();
    fill(1);
    // Of what stands there is no memory to keep.
    let info = driver.snapshot(id, &snapshot("one", true)).await.unwrap();
    assert!(!info.memory);
    fill(2);
    driver.start(id).await.unwrap();
    let info = driver.snapshot(id, &snapshot("two", false)).await.unwrap();
    assert!(!info.memory && matches!(driver.observe(id).await.unwrap(), Observed::Running(_)));
    driver.revert(id, "one").await.unwrap();
    assert_eq!(driver.observe(id).await.unwrap(), Observed::Stopped(Exit::Stopped));
    assert!(fs::read(&disk).unwrap().iter().all(|byte| *byte == 1));
    driver.revert(id, "two").await.unwrap();
    assert!(fs::read(&disk).unwrap().iter().all(|byte| *byte == 2));
    driver.start(id).await.unwrap();
    let mut console = driver.console(id).await.unwrap();
    read_until(&mut console, GREETING).await;
    assert!(matches!(driver.revert(id, "three").await, Err(DriverError::WrongState { .. })));
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_is_started_from_one_snapshot() {
    let Some(mut subject) = real().await else { return };
    subject.spec.disks =
        vec![DiskSpec { name: "data".to_owned(), size_bytes: 1 << 20, ..DiskSpec::default() }];
    if rustix::process::geteuid().is_root() {
        subject.spec.user_data = "who=source".to_owned();
    }
    let (driver, source) = subject.running("source").await;
    let before = count(&driver, &source.id).await;
    driver.snapshot(&source.id, &snapshot("golden", true)).await.unwrap();
    let mut fleet = Vec::new();
    for number in 0..3 {
        let mut config = subject.config(&format!("clone-{number}"));
        if !config.spec.user_data.is_empty() {
            config.spec.user_data = format!("who=clone-{number}");
        }
        let begun = std::time::Instant::now();
        driver.clone_snapshot(&source.id, "golden", &config).await.unwrap();
        driver.clone_snapshot(&source.id, "golden", &config).await.unwrap();
        assert_eq!(driver.observe(&config.id).await.unwrap(), Observed::Stopped(Exit::NeverStarted));
        driver.start(&config.id).await.unwrap();
        eprintln!("clone {number} runs after {:?}", begun.elapsed());
        fleet.push(config);
    }
    let memory = |id| fs::metadata(subject.root(id).join("load.memory")).unwrap().ino();
    for (number, config) in fleet.iter().enumerate() {
        assert_eq!(subject.copies(&config.id), 1);
        assert!(count(&driver, &config.id).await > before, "it did not go on from the snapshot");
        assert_eq!(memory(&config.id), memory(&fleet[0].id), "memory was copied");
        assert!(driver.vsock_path(&config.id).unwrap().exists(), "no vsock of its own");
        if !config.spec.user_data.is_empty() {
            let (status, told) = ask(&subject, &config.id, "GET /mmds", "");
            assert!(status == 200 && told.contains(&format!("who=clone-{number}")), "{told}");
            assert!(told.contains(config.id.as_str()) && !told.contains(source.id.as_str()), "{told}");
            let (_, of_source) = ask(&subject, &source.id, "GET /mmds", "");
            let mac = |told: &str| {
                let told: serde_json::Value = serde_json::from_str(told).unwrap();
                told["latest"]["meta-data"]["mac"].as_str().unwrap().to_owned()
            };
            assert_ne!(mac(&told), mac(&of_source));
        }
    }
    // The source and its snapshot go; the fleet stays, and each boots by itself when it is started again.
    driver.delete(&source.id).await.unwrap();
    let [first, rest @ ..] = &fleet[..] else { unreachable!("there are three") };
    assert!(count(&driver, &first.id).await > before);
    driver.stop(&first.id, StopMode::Force).await.unwrap();
    driver.start(&first.id).await.unwrap();
    let mut console = driver.console(&first.id).await.unwrap();
    read_until(&mut console, GREETING).await;
    for config in rest {
        driver.delete(&config.id).await.unwrap();
    }
    cleaned(&subject, &driver, first).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_that_does_not_fit_is_refused_and_leaves_nothing() {
    let Some(subject) = real().await else { return };
    let (driver, source) = subject.running("source").await;
    driver.snapshot(&source.id, &snapshot("golden", true)).await.unwrap();
    let mut configs: Vec<_> = (0..2).map(|_| subject.config("other")).collect();
    configs[0].spec.memory_bytes *= 2;
    configs[1].spec.disks.push(DiskSpec { name: "x".to_owned(), size_bytes: 512, ..DiskSpec::default() });
    for config in &configs {
        let error = driver.clone_snapshot(&source.id, "golden", config).await.unwrap_err();
        assert!(matches!(error, DriverError::InvalidConfig { .. }), "{error}");
    }
    let error = driver.clone_snapshot(&source.id, "none", &configs[0]).await.unwrap_err();
    assert!(matches!(error, DriverError::WrongState { .. }), "{error}");
    assert_eq!(driver.list().await.unwrap(), std::slice::from_ref(&source.id));
    cleaned(&subject, &driver, &source).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_crash_leaves_of_a_snapshot_is_never_listed_and_goes() {
    let Some(subject) = real().await else { return };
    let (driver, config) = subject.running("crash").await;
    let id = &config.id;
    driver.snapshot(id, &snapshot("whole", true)).await.unwrap();
    let run: serde_json::Value =
        serde_json::from_slice(&fs::read(subject.instance_dir(id).join("run.json")).unwrap()).unwrap();
    drop(driver);
    // The agent died while the machine stood still for it, with half of a snapshot written.
    let (status, fault) = ask(&subject, id, "PATCH /vm", r#"{"state":"Paused"}"#);
    assert_eq!(status, 204, "{fault}");
    let held = serde_json::json!({ "run": run["number"] });
    fs::write(subject.instance_dir(id).join("held.json"), held.to_string()).unwrap();
    let snapshots = subject.instance_dir(id).join("snapshots");
    for name in [".half.partial", ".gone.deleting", "nothing-in-it"] {
        fs::create_dir_all(snapshots.join(name)).unwrap();
    }
    fs::write(snapshots.join(".half.partial/meta.json"), "{").unwrap();
    fs::write(subject.root(id).join("taken.memory"), "half").unwrap();

    let driver = subject.firecracker();
    assert!(matches!(driver.recover(id, None).await.unwrap(), Observed::Running(_)), "it does not go on");
    let names: Vec<_> = driver.snapshots(id).await.unwrap().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["whole"]);
    assert!(!snapshots.join(".half.partial").exists() && !subject.root(id).join("taken.memory").exists());
    driver.snapshot(id, &snapshot("half", true)).await.unwrap();
    driver.revert(id, "half").await.unwrap();
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_return_that_was_cut_short_is_finished_by_the_next_start() {
    let Some(subject) = real().await else { return };
    let (driver, config) = subject.running("cut").await;
    let id = &config.id;
    driver.pause(id).await.unwrap();
    driver.snapshot(id, &snapshot("moment", true)).await.unwrap();
    driver.stop(id, StopMode::Force).await.unwrap();
    drop(driver);
    // As far as a crash in the middle comes.
    let note = r#"{"name":"moment","was_paused":true}"#;
    fs::write(subject.instance_dir(id).join("restore.json"), note).unwrap();
    let driver = subject.firecracker();
    assert_eq!(driver.recover(id, None).await.unwrap(), Observed::Stopped(Exit::Stopped));
    driver.start(id).await.unwrap();
    assert!(matches!(driver.observe(id).await.unwrap(), Observed::Paused(_)));
    driver.stop(id, StopMode::Force).await.unwrap();
    driver.start(id).await.unwrap();
    assert!(matches!(driver.observe(id).await.unwrap(), Observed::Running(_)), "it was restored twice");
    assert_eq!(subject.copies(id), 1);
    cleaned(&subject, &driver, &config).await;
}
