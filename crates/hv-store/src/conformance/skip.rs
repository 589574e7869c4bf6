//! Suites that cannot run here say so where the closing lines of a test run find it.

use std::fs::OpenOptions;
use std::io::Write;

/// Names the file that gathers what was skipped, one line each.
const LOG_VARIABLE: &str = "HYPERVISOR_SKIP_LOG";

/// Reports that `suite` did not run, and why: on standard error, and in the file that `HYPERVISOR_SKIP_LOG` names.
///
/// # Panics
/// If that file cannot be written: a skipped suite must not pass silently.
pub fn skip(suite: &str, reason: &str) {
    eprintln!("skipped: {suite}: {reason}");
    let Some(path) = std::env::var_os(LOG_VARIABLE) else { return };
    let mut log = OpenOptions::new().create(true).append(true).open(path).expect("the skip log opens");
    log.write_all(format!("{suite}: {reason}\n").as_bytes()).expect("the skip log is written");
}
