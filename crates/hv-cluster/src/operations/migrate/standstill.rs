//! Whether anything of an instance that moves is still sent. A link that is cut says nothing for a quarter of an hour, while a
//! guest whose disks are being copied may wait for each of its writes.

use std::time::Duration;

use hv_proto::v1::MigrationPhase;
use tokio::time::Instant;

/// How long nothing may be sent before a move is given up.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// What was last sent, and when.
#[derive(Debug, Default)]
pub(super) struct Standstill(Option<(MigrationPhase, u64, Instant)>);

impl Standstill {
    /// So many bytes are sent in this phase. Says why the move is hopeless, if so.
    pub(super) fn look(&mut self, phase: MigrationPhase, done: u64, now: Instant) -> Option<String> {
        match self.0 {
            Some((known, sent, since)) if (known, sent) == (phase, done) => {
                let is_over = now.saturating_duration_since(since) > PATIENCE;
                is_over.then(|| {
                    format!(
                        "nothing was sent for {} s; is the link between the two nodes broken?",
                        PATIENCE.as_secs()
                    )
                })
            }
            _ => {
                self.0 = Some((phase, done, now));
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_that_stands_still_is_hopeless_and_a_slow_one_is_not() {
        let (mut standstill, begin) = (Standstill::default(), Instant::now());
        let mut look = |phase, done, seconds| {
            standstill.look(phase, done, begin + Duration::from_secs(seconds)).is_some()
        };
        assert!(!look(MigrationPhase::Disks, 0, 0));
        assert!(!look(MigrationPhase::Disks, 1, 30));
        assert!(!look(MigrationPhase::Disks, 1, 60));
        // As many bytes of something else are something else.
        assert!(!look(MigrationPhase::Memory, 1, 61));
        assert!(!look(MigrationPhase::Memory, 1, 91));
        assert!(look(MigrationPhase::Memory, 1, 92));
    }
}
