//! Containers and the end of those who watch them.

use std::fs;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use hv_driver::conformance::{Subject as _, cleaned};
use hv_driver::fence::{self, Outcome, Zeal};
use hv_driver::{Driver, DriverError, Exit, LogRequest, Observed, StopMode};

use crate::claims::{PATIENCE, command, exit, log_of, run};
use crate::subject::setup;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_do_not_notice_the_end_of_containerd() {
    let Some(mut subject) = setup().await else { return };
    let driver = subject.containerd();
    // More than a pipe holds, so that one which waited for a reader would stand still.
    let counts = "i=0; while true; do i=$((i+1)); echo $i ................................................; \
                  [ $((i % 500)) = 0 ] && sleep 0.1; done";
    let configs: Vec<_> = (0..5).map(|_| subject.script(counts)).collect();
    for config in &configs {
        run(&driver, config).await;
    }
    let pids: Vec<_> = configs.iter().map(|config| subject.first_pids(&config.id)).collect();
    let mut events = driver.events();
    // The driver knows that it was there.
    assert!(driver.fingerprint().await.healthy);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let begun = Instant::now();
    subject.daemon.kill();
    let told = tokio::time::timeout(PATIENCE, events.next()).await.expect("its end is told").unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2), "noticed after {:?}", begun.elapsed());
    assert!(told.what.contains("containerd does not answer"), "{}", told.what);
    assert!(!driver.fingerprint().await.healthy);
    for (config, pids) in configs.iter().zip(&pids) {
        assert!(matches!(driver.observe(&config.id).await.unwrap(), Observed::Running(_)));
        driver.stats(&config.id).await.expect("stats go on");
        assert_eq!(&subject.first_pids(&config.id), pids);
        let before =
            log_of(&driver, &config.id, LogRequest { tail_lines: Some(1), ..LogRequest::default() }).await;
        let begun = Instant::now();
        while log_of(&driver, &config.id, LogRequest { tail_lines: Some(1), ..LogRequest::default() }).await
            == before
        {
            assert!(begun.elapsed() < PATIENCE, "it prints no more");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let refused = driver.create(&subject.config("late")).await.expect_err("created without containerd");
    assert!(matches!(refused, DriverError::Unavailable { .. }), "{refused:?}");
    // One ends meanwhile; how is known when containerd is back. A new agent finds the others.
    fs::write(format!("/proc/{}/oom_score_adj", pids[0][0]), "0").unwrap();
    let target = driver.fence_target(&configs[0].id).unwrap();
    assert_eq!(fence::kill(&target, Zeal::Instance), Outcome::Gone);
    drop((events, driver));
    let driver = subject.containerd();
    for config in &configs[1..] {
        assert!(matches!(driver.recover(&config.id, None).await.unwrap(), Observed::Running(_)));
    }
    let mut events = driver.events();
    // It has looked for it in vain.
    assert!(!driver.fingerprint().await.healthy);
    tokio::time::sleep(Duration::from_millis(500)).await;
    subject.daemon.run();
    let begun = Instant::now();
    while !driver.fingerprint().await.healthy {
        assert!(begun.elapsed() < Duration::from_secs(2), "its return was not noticed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::timeout(PATIENCE, events.next()).await.expect("its return is told").unwrap();
    let ended = exit(&driver, &configs[0].id).await;
    assert!(
        matches!(&ended, Exit::Failed(reason) if reason.contains("signal 9")) || ended == Exit::Lost,
        "{ended:?}"
    );
    for (config, pids) in configs.iter().zip(&pids).skip(1) {
        assert_eq!(&subject.first_pids(&config.id), pids, "it was disturbed");
        assert_eq!(command(&driver, &config.id, "echo here").await, ("here\n".to_owned(), 0));
        driver.stop(&config.id, StopMode::Force).await.unwrap();
    }
    for config in &configs {
        driver.delete(&config.id).await.unwrap();
    }
    assert_eq!(subject.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn a_lost_shim_is_a_lost_container_and_it_starts_again() {
    let Some(subject) = setup().await else { return };
    let (driver, config) = (subject.containerd(), subject.config("shim"));
    run(&driver, &config).await;
    let shim = subject
        .daemon
        .helpers()
        .into_iter()
        .find(|(_, command)| command.contains("containerd-shim") && command.contains(config.id.as_str()));
    let (pid, _) = shim.expect("a shim");
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    let ended = exit(&driver, &config.id).await;
    assert!(matches!(ended, Exit::Lost | Exit::Failed(_)), "{ended:?}");
    driver.start(&config.id).await.expect("start again");
    assert_eq!(subject.copies(&config.id), 1);
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn a_start_that_was_cut_short_is_done_again() {
    let Some(subject) = setup().await else { return };
    let config = subject.config("cut");
    let driver = subject.containerd();
    driver.create(&config).await.unwrap();
    // Given up at whatever point it is then.
    for wait_ms in [1, 20, 60, 120, 200, 300] {
        let driver = subject.containerd();
        let _ = tokio::time::timeout(Duration::from_millis(wait_ms), driver.start(&config.id)).await;
        drop(driver);
        let driver = subject.containerd();
        driver.recover(&config.id, None).await.expect("recover");
        driver.start(&config.id).await.expect("start");
        assert_eq!(subject.copies(&config.id), 1, "after {wait_ms} ms");
        driver.stop(&config.id, StopMode::Force).await.expect("stop");
    }
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn helpers_end_with_their_container() {
    let Some(subject) = setup().await else { return };
    let (driver, config) = (subject.containerd(), subject.config("helpers"));
    run(&driver, &config).await;
    assert!(!subject.daemon.helpers().is_empty());
    cleaned(&subject, &driver, &config).await;
    let begun = Instant::now();
    while !subject.daemon.helpers().is_empty() {
        assert!(begun.elapsed() < PATIENCE, "{:?}", subject.daemon.helpers());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
