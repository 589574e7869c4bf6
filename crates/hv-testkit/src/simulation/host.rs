//! One simulated process: a runtime of its own with a clock of its own. Dropping the runtime is `kill -9`.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hv_telemetry::crash::{self, Point};
use hypervisor_agent::fencing::clock::{Clock, Moment};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::entropy::{self, Wall};

thread_local! {
    /// The life of the process that runs now, for crash points.
    static RUNNING: RefCell<Option<Arc<Life>>> = const { RefCell::new(None) };
    /// Its clock, and what that showed of the machine's uptime when it began, in nanoseconds.
    static UPTIME: Cell<Option<(Instant, u64)>> = const { Cell::new(None) };
}

/// The clock of a machine's uptime: the same to all processes of a machine, as their clocks run at one rate.
pub(crate) struct MachineClock {
    /// How many parts of a million it shows.
    pub(crate) shown_ppm: u64,
}

impl Clock for MachineClock {
    fn now(&self) -> Moment {
        let (start, at_start_ns) = UPTIME.get().expect("asked by a process that runs");
        let uptime_ns = at_start_ns + start.elapsed().as_nanos() as u64;
        Moment(1 + (u128::from(uptime_ns) * u128::from(self.shown_ppm) / 1_000_000) as u64)
    }
}

/// Whether a process lives, and where it is to die.
#[derive(Default)]
pub(crate) struct Life {
    dead: AtomicBool,
    died: Notify,
    /// The crash point, and how often it is passed before it kills.
    doom: parking_lot::Mutex<Option<(Point, u32)>>,
}

/// What unwinds a task at a crash point.
struct Killed;

impl Life {
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    /// It dies now.
    pub(crate) fn end(&self) {
        self.dead.store(true, Ordering::Relaxed);
        self.died.notify_one();
    }

    /// It is not to die at a crash point any more.
    pub(crate) fn spare(&self) {
        *self.doom.lock() = None;
    }

    /// It dies when it reaches `point` for the `nth` time from now, counted from 0.
    pub(crate) fn doom(&self, point: Point, nth: u32) {
        *self.doom.lock() = Some((point, nth));
    }
}

fn reached(point: Point) {
    let life = RUNNING.with_borrow(Clone::clone);
    let Some(life) = life else { return };
    {
        let mut doom = life.doom.lock();
        match &mut *doom {
            Some((at, 0)) if *at == point => *doom = None,
            Some((at, left)) if *at == point => {
                *left -= 1;
                return;
            }
            _ => return,
        }
    }
    life.end();
    std::panic::resume_unwind(Box::new(Killed));
}

/// Makes crash points kill simulated processes on this thread.
pub(crate) fn watch_crash_points() {
    crash::watch(Some(reached));
}

/// A simulated process.
pub(crate) struct Host {
    runtime: Option<Runtime>,
    pub(crate) life: Arc<Life>,
    start: Instant,
    /// When it was started, by the world's clock.
    born: Duration,
    /// How fast its clock runs, in parts per million.
    rate_ppm: u64,
    wall: Wall,
}

impl Host {
    /// A process that begins at `born`, with a clock of the given rate and a wall clock that is off by `wall_offset`
    /// milliseconds.
    pub(crate) fn new(born: Duration, rate_ppm: u64, wall_offset_ms: i64) -> Self {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build();
        let runtime = runtime.expect("a runtime without threads can always be made");
        let start = runtime.block_on(async { Instant::now() });
        let at_start_ns = born.as_nanos() as i128 + i128::from(wall_offset_ms) * 1_000_000;
        let wall = Wall { start, at_start_ns };
        Self { runtime: Some(runtime), life: Arc::default(), start, born, rate_ppm, wall }
    }

    pub(crate) fn handle(&self) -> Handle {
        self.runtime.as_ref().expect("it lives").handle().clone()
    }

    /// Moves the wall clock by so many milliseconds.
    pub(crate) fn jump_wall(&mut self, by_ms: i64) {
        self.wall.at_start_ns += i128::from(by_ms) * 1_000_000;
    }

    /// Does something inside of the process, at once.
    pub(crate) fn enter<T>(&self, work: impl FnOnce() -> T) -> T {
        let _guard = self.runtime.as_ref().expect("it lives").enter();
        self.take_over();
        let done = work();
        Self::leave();
        done
    }

    fn take_over(&self) {
        entropy::set_wall(Some(self.wall));
        UPTIME.set(Some((self.start, (self.born.as_nanos() as u64 / 1_000_000) * self.rate_ppm)));
        RUNNING.set(Some(self.life.clone()));
    }

    fn leave() {
        RUNNING.set(None);
        UPTIME.set(None);
        entropy::set_wall(None);
    }

    fn local(&self, now: Duration) -> Instant {
        let age = (now - self.born).as_micros() as u64;
        self.start + Duration::from_micros(age * self.rate_ppm / 1_000_000)
    }

    /// It stood still until now: its clock jumps there.
    pub(crate) fn wake_at(&self, now: Duration) {
        let Some(runtime) = &self.runtime else { return };
        let to = self.local(now);
        self.take_over();
        runtime.block_on(async move { tokio::time::advance(to.duration_since(Instant::now())).await });
        Self::leave();
    }

    /// Runs it until the world's clock shows `now`. False: it died meanwhile.
    pub(crate) fn run_until(&mut self, now: Duration) -> bool {
        let Some(runtime) = &self.runtime else { return false };
        let until = self.local(now);
        self.take_over();
        let life = self.life.clone();
        runtime.block_on(async move {
            tokio::select! {
                biased;
                () = life.died.notified() => {}
                () = tokio::time::sleep_until(until) => {}
            }
        });
        Self::leave();
        !self.life.is_dead()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.life.dead.store(true, Ordering::Relaxed);
        entropy::set_wall(Some(self.wall));
        // Tasks are dropped where they stand; what their destructors do must not look like work.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        entropy::set_wall(None);
    }
}
