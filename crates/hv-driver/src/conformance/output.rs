//! Claims about consoles, logs, counters and reads in general.

use bytes::Bytes;
use futures::StreamExt as _;

use super::{Subject, cleaned, config, read_all, read_until, started};
use crate::{DriverError, Input, LogRequest, StopMode};

async fn type_line(console: &crate::Console, line: &str) {
    console.input.send(Input::Data(Bytes::copy_from_slice(line.as_bytes()))).await.expect("input");
}

/// The guest's first words come, and what is typed comes back.
pub async fn the_console_greets_and_echoes(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let mut console = driver.console(&config.id).await.expect("console");
    read_until(&mut console.output, subject.greeting(), 1).await;
    type_line(&console, "one two\n").await;
    read_until(&mut console.output, "one two", 1).await;
    cleaned(subject, &*driver, &config).await;
}

/// Several may be attached at once.
pub async fn two_consoles_see_the_same(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let mut one = driver.console(&config.id).await.expect("console");
    let mut other = driver.console(&config.id).await.expect("second console");
    read_until(&mut one.output, subject.greeting(), 1).await;
    read_until(&mut other.output, subject.greeting(), 1).await;
    type_line(&one, "from one\n").await;
    read_until(&mut other.output, "from one", 1).await;
    read_until(&mut one.output, "from one", 1).await;
    type_line(&other, "from other\n").await;
    read_until(&mut one.output, "from other", 1).await;
    cleaned(subject, &*driver, &config).await;
}

/// What was printed before is shown once, and nothing is missing between it and what comes.
pub async fn a_late_console_sees_the_history(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let mut first = driver.console(&config.id).await.expect("console");
    read_until(&mut first.output, subject.greeting(), 1).await;
    type_line(&first, "earlier\n").await;
    read_until(&mut first.output, "earlier", 1).await;
    let mut late = driver.console(&config.id).await.expect("late console");
    type_line(&first, "later\n").await;
    let printed = read_until(&mut late.output, "later", 1).await;
    assert_eq!(printed.matches(subject.greeting()).count(), 1, "{printed:?}");
    assert_eq!(printed.matches("earlier").count(), 1, "{printed:?}");
    cleaned(subject, &*driver, &config).await;
}

/// Its output ends, so that nobody waits for ever.
pub async fn a_console_ends_with_its_instance(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let console = driver.console(&config.id).await.expect("console");
    driver.stop(&config.id, StopMode::Force).await.expect("stop");
    read_all(console.output).await;
    cleaned(subject, &*driver, &config).await;
}

/// Coming and going of viewers is nothing to the guest.
pub async fn a_dropped_console_does_not_disturb(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    for _ in 0..8 {
        drop(driver.console(&config.id).await.expect("console"));
    }
    let mut console = driver.console(&config.id).await.expect("console");
    read_until(&mut console.output, subject.greeting(), 1).await;
    type_line(&console, "still there\n").await;
    read_until(&mut console.output, "still there", 1).await;
    cleaned(subject, &*driver, &config).await;
}

/// A new agent shows what was printed under the old one, and can type.
pub async fn the_history_outlives_the_driver(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let mut console = driver.console(&config.id).await.expect("console");
    read_until(&mut console.output, subject.greeting(), 1).await;
    drop((console, driver));
    let driver = subject.driver();
    driver.recover(&config.id, None).await.expect("recover");
    let mut console = driver.console(&config.id).await.expect("console");
    read_until(&mut console.output, subject.greeting(), 1).await;
    type_line(&console, "after all\n").await;
    read_until(&mut console.output, "after all", 1).await;
    cleaned(subject, &*driver, &config).await;
}

/// The last lines, or all of them, running or not.
pub async fn logs_are_read_by_lines_also_when_stopped(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let mut console = driver.console(&config.id).await.expect("console");
    read_until(&mut console.output, subject.greeting(), 1).await;
    type_line(&console, "first line\nsecond line\nthird line\n").await;
    read_until(&mut console.output, "third line\n", 1).await;
    for is_stopped in [false, true] {
        let all = read_all(driver.logs(&config.id, LogRequest::default()).await.expect("logs")).await;
        assert!(all.contains(subject.greeting()) && all.contains("second line"), "{is_stopped}: {all:?}");
        let request = LogRequest { tail_lines: Some(2), ..LogRequest::default() };
        let tail = read_all(driver.logs(&config.id, request).await.expect("logs")).await;
        let lines: Vec<_> = tail.lines().map(str::trim).collect();
        assert_eq!(lines, ["second line", "third line"], "{is_stopped}");
        driver.stop(&config.id, StopMode::Force).await.expect("stop");
    }
    cleaned(subject, &*driver, &config).await;
}

/// Following goes on with what comes, and ends.
pub async fn followed_logs_end_with_the_instance(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let console = driver.console(&config.id).await.expect("console");
    let request = LogRequest { follow: true, ..LogRequest::default() };
    let mut logs = driver.logs(&config.id, request).await.expect("logs");
    read_until(&mut logs, subject.greeting(), 1).await;
    type_line(&console, "followed\n").await;
    read_until(&mut logs, "followed", 1).await;
    driver.stop(&config.id, StopMode::Force).await.expect("stop");
    read_all(logs).await;
    let logs = driver.logs(&config.id, request).await.expect("logs of what does not run");
    assert!(read_all(logs).await.contains("followed"));
    cleaned(subject, &*driver, &config).await;
}

/// Counters grow while it runs, and it uses some memory.
pub async fn counters_never_fall(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let mut console = driver.console(&config.id).await.expect("console");
    let mut last = driver.stats(&config.id).await.expect("stats");
    read_until(&mut console.output, subject.greeting(), 1).await;
    for _ in 0..5 {
        let now = driver.stats(&config.id).await.expect("stats");
        assert!(
            now.cpu_time_ns >= last.cpu_time_ns && now.disk_read_bytes >= last.disk_read_bytes,
            "{last:?} {now:?}"
        );
        assert!(
            now.disk_write_bytes >= last.disk_write_bytes && now.network_rx_bytes >= last.network_rx_bytes
        );
        assert!(now.memory_used_bytes > 0);
        last = now;
    }
    cleaned(subject, &*driver, &config).await;
}

/// Reads during changes are answered, or refused because of the state; they never fail otherwise.
pub async fn reads_come_at_any_time(subject: &dyn Subject) {
    let (driver, config) = (subject.driver(), config(subject));
    let allowed = |error: DriverError| match error {
        DriverError::WrongState { .. } | DriverError::NotFound(_) => {}
        other => panic!("a read failed: {other}: {:?}", std::error::Error::source(&other)),
    };
    let changes = async {
        for _ in 0..3 {
            driver.create(&config).await.expect("create");
            driver.start(&config.id).await.expect("start");
            driver.pause(&config.id).await.expect("pause");
            driver.resume(&config.id).await.expect("resume");
            driver.stop(&config.id, StopMode::Force).await.expect("stop");
        }
        driver.delete(&config.id).await.expect("delete");
    };
    let reads = async {
        loop {
            driver.observe(&config.id).await.expect("observe");
            driver.list().await.expect("list");
            driver.images().await.expect("images");
            if let Err(error) = driver.console(&config.id).await {
                allowed(error);
            }
            match driver.logs(&config.id, LogRequest::default()).await {
                Err(error) => allowed(error),
                Ok(mut logs) => drop(logs.next().await),
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = changes => {}
        () = reads => {}
    }
    cleaned(subject, &*driver, &config).await;
}
