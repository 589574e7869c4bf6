//! Claims about what of a log is kept, and which part of it is shown.

use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::{Subject, cleaned, read_all, read_until, report, started};
use crate::{Console, Input, LogRequest};

/// How long the suite waits between what is old and what is new.
const APART: Duration = Duration::from_millis(1100);
/// The length of the lines that fill a log.
const LINE: usize = 1024;

async fn type_line(console: &Console, line: &str) {
    console.input.send(Input::Data(Bytes::copy_from_slice(line.as_bytes()))).await.expect("input");
}

/// Never less than what was asked for; the whole log if the runtime keeps no times.
pub async fn nothing_printed_since_is_missing(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let mut console = driver.console(&config.id).await.expect("console");
    read_until(&mut console.output, subject.greeting(), 1).await;
    type_line(&console, "before\n").await;
    read_until(&mut console.output, "before", 1).await;
    tokio::time::sleep(APART).await;
    let since = SystemTime::now();
    type_line(&console, "after\n").await;
    read_until(&mut console.output, "after", 1).await;
    let request = LogRequest { since: Some(since), ..LogRequest::default() };
    let read = read_all(driver.logs(&config.id, request).await.expect("logs")).await;
    assert!(read.contains("after"), "{read:?}");
    let request = LogRequest { tail_lines: Some(1), ..request };
    let read = read_all(driver.logs(&config.id, request).await.expect("logs")).await;
    assert!(read.contains("after") && !read.contains("before"), "{read:?}");
    cleaned(subject, &*driver, &config).await;
}

/// A guest that prints without end does not fill the node; what it printed last is there.
pub async fn what_is_kept_has_a_bound(subject: &dyn Subject) {
    let Some(bound) = subject.log_bound() else {
        return report::skipped("its tests cannot print as much as is kept");
    };
    let (driver, config) = started(subject).await;
    let mut console = driver.console(&config.id).await.expect("console");
    read_until(&mut console.output, subject.greeting(), 1).await;
    let lines = usize::try_from(bound).expect("a bound") * 2 / LINE;
    for index in 0..lines {
        let line = format!("{index:0width$}\n", width = LINE - 1);
        type_line(&console, &line).await;
        // The guest is given time to echo: what is typed too fast may be lost.
        read_until(&mut console.output, &line[LINE - 9..LINE - 1], 1).await;
    }
    let kept = read_all(driver.logs(&config.id, LogRequest::default()).await.expect("logs")).await;
    assert!(kept.len() as u64 <= bound, "{} bytes are kept", kept.len());
    assert!(kept.trim_end().ends_with(&format!("{:08}", lines - 1)), "the last line is missing");
    cleaned(subject, &*driver, &config).await;
}
