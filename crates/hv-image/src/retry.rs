//! How often and when a source that fails is asked again.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// Failures in a row, without a byte between them, after which a source is given up.
pub(crate) const MAX_FAILURES: u32 = 5;
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// Counts failures.
#[derive(Default)]
pub(crate) struct Retry {
    failures: u32,
}

impl Retry {
    /// Something arrived.
    pub(crate) fn progressed(&mut self) {
        self.failures = 0;
    }

    /// Waits before the next attempt: twice as long each time, and by chance up to half of it less, so that
    /// many nodes do not come back at once.
    /// `false`: there is none.
    pub(crate) async fn failed(&mut self, cancel: &CancellationToken) -> bool {
        self.failures += 1;
        if self.failures >= MAX_FAILURES {
            return false;
        }
        let wait = FIRST_WAIT.saturating_mul(1 << self.failures).min(LONGEST_WAIT);
        let wait = wait.mul_f64(rand::random_range(0.5..1.0));
        tokio::select! {
            () = tokio::time::sleep(wait) => true,
            () = cancel.cancelled() => false,
        }
    }
}
