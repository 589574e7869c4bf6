//! Pauses between attempts: doubling, bounded, and never the same on two nodes.

use std::time::Duration;

/// Pauses from `base` to `max`.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    base: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    pub(crate) fn new(base: Duration, max: Duration) -> Self {
        Self { base, max, failures: 0 }
    }

    /// The pause after one more failure: between three quarters and five quarters of the doubled one before.
    pub(crate) fn pause(&mut self) -> Duration {
        self.failures = self.failures.saturating_add(1);
        self.nth(self.failures)
    }

    /// The pause after the n-th failure, counted from 1.
    pub(crate) fn nth(&self, failures: u32) -> Duration {
        const MOST_DOUBLINGS: u32 = 16;
        let factor = 1u32 << failures.saturating_sub(1).min(MOST_DOUBLINGS);
        let pause = self.base.saturating_mul(factor).min(self.max);
        pause.mul_f64(rand::random_range(0.75..1.25))
    }

    /// It worked.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_bound_and_differ() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(8));
        let pauses: Vec<_> = (0..100).map(|_| backoff.pause().as_secs_f64()).collect();
        for (pause, expected) in pauses.iter().zip([1.0, 2.0, 4.0, 8.0, 8.0]) {
            assert!((expected * 0.75..expected * 1.25).contains(pause), "{pause} for {expected}");
        }
        assert!(pauses.iter().all(|pause| *pause < 10.0));
        assert!(pauses[50..].windows(2).any(|pair| pair[0] != pair[1]));
        backoff.reset();
        assert!(backoff.pause().as_secs_f64() < 1.25);
    }
}
