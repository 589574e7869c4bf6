//! Time as deadlines count it: since the machine's boot, also while it is suspended, untouched by the wall clock.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A moment, in nanoseconds since the boot. Means the same to every process of one boot, and nothing beyond it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Moment(pub u64);

impl Moment {
    /// So much later.
    #[must_use]
    pub fn after(self, by: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// How long until then from `now`; nothing if it is past.
    #[must_use]
    pub fn since(self, now: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(now.0))
    }
}

/// Tells the time. Simulations put their own in the real one's place.
pub trait Clock: Send + Sync + 'static {
    /// Now. Never goes back.
    fn now(&self) -> Moment;
}

/// A clock that is shared.
pub type SharedClock = Arc<dyn Clock>;

/// The machine's clock: `CLOCK_BOOTTIME` where there is one (clock_gettime(2)).
#[derive(Clone, Copy, Debug, Default)]
pub struct BootClock;

impl Clock for BootClock {
    #[cfg(target_os = "linux")]
    fn now(&self) -> Moment {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
        Moment(seconds.saturating_mul(1_000_000_000) + u64::try_from(time.tv_nsec).unwrap_or_default())
    }

    /// Elsewhere nothing is fenced, and the time since this process began will do.
    #[cfg(not(target_os = "linux"))]
    fn now(&self) -> Moment {
        static BEGAN: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
        let began = BEGAN.get_or_init(std::time::Instant::now);
        Moment(1).after(began.elapsed())
    }
}

/// The clock of tokio's timers, which a test or a simulation may hold and wind: its beginning is the first reading.
#[derive(Clone, Copy, Debug)]
pub struct TokioClock(tokio::time::Instant);

impl TokioClock {
    /// A clock that begins now. Needs a runtime where time is paused.
    #[must_use]
    pub fn new() -> Self {
        Self(tokio::time::Instant::now())
    }
}

impl Default for TokioClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for TokioClock {
    fn now(&self) -> Moment {
        Moment(1).after(self.0.elapsed())
    }
}
