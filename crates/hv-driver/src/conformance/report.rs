//! What came of each claim, for the table of drivers and capabilities.
//!
//! With `HYPERVISOR_CONFORMANCE_LOG` set to a file each claim appends one line of JSON to it: which suite, row and
//! claim, and whether it works, was refused (with the driver's reason), was skipped (with what is missing), or failed.

use std::cell::RefCell;
use std::io::Write as _;

use serde::Serialize;

use super::Subject;

/// Names the file.
const LOG_VARIABLE: &str = "HYPERVISOR_CONFORMANCE_LOG";
/// Names the file that collects why tests were skipped.
const SKIP_VARIABLE: &str = "HYPERVISOR_SKIP_LOG";

tokio::task_local! {
    static OUTCOME: RefCell<Outcome>;
}

/// What came of a claim.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "outcome", content = "reason", rename_all = "snake_case")]
enum Outcome {
    Works,
    Refused(String),
    Skipped(String),
    Failed,
}

/// A claim of a driver's suite.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Report {
    /// The crate whose tests make it.
    pub suite: &'static str,
    /// The row of the table.
    pub row: &'static str,
    /// Its name.
    pub claim: &'static str,
}

#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    report: Report,
    against: &'a str,
    #[serde(flatten)]
    outcome: Outcome,
}

impl Report {
    /// Follows a claim to its end, and writes down what came of it, also if it panics.
    pub async fn of(self, subject: &dyn Subject, claim: impl Future<Output = ()>) {
        let against = subject.is_in_table().then(|| subject.against());
        let mut pending = Pending { report: self, against, outcome: Outcome::Failed, is_told: false };
        let work = async {
            claim.await;
            OUTCOME.with(|outcome| outcome.borrow().clone())
        };
        pending.outcome = OUTCOME.scope(RefCell::new(Outcome::Works), work).await;
    }

    /// The runtime is not there.
    pub fn not_here(self) {
        let outcome = Outcome::Skipped("its runtime is not on this machine".to_owned());
        drop(Pending { report: self, against: Some(""), outcome, is_told: true });
    }
}

/// Written down when it goes out of scope.
struct Pending<'a> {
    report: Report,
    against: Option<&'a str>,
    outcome: Outcome,
    /// Whether the skip log has it already.
    is_told: bool,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if let (Outcome::Skipped(reason), false) = (&self.outcome, self.is_told) {
            append(SKIP_VARIABLE, format!("{}: {reason}\n", self.report.suite).into_bytes());
        }
        let Some(against) = self.against else { return };
        let line = Line { report: self.report, against, outcome: self.outcome.clone() };
        if let Ok(mut line) = serde_json::to_vec(&line) {
            line.push(b'\n');
            append(LOG_VARIABLE, line);
        }
    }
}

/// Appends to the file that a variable names, in one write: tests of other processes append too.
fn append(variable: &str, line: Vec<u8>) {
    let Some(path) = std::env::var_os(variable) else { return };
    let file = std::fs::File::options().create(true).append(true).open(&path);
    if let Err(e) = file.and_then(|mut file| file.write_all(&line)) {
        eprintln!("{}: {e}", path.display());
    }
}

fn set(outcome: Outcome) {
    // A claim that is called by itself has nobody to tell.
    let _ = OUTCOME.try_with(|current| *current.borrow_mut() = outcome);
}

/// The driver refused it, as it may.
pub fn refused(reason: &str) {
    set(Outcome::Refused(reason.to_owned()));
}

/// The subject cannot show it.
pub fn skipped(reason: &str) {
    set(Outcome::Skipped(reason.to_owned()));
}
