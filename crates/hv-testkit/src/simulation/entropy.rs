//! Randomness and wall clock of a simulated process: `getrandom` and `clock_gettime` as the C library has them, answered
//! from the seed and the simulated clock on threads that simulate, and by the kernel on all others.
//!
//! # Theory of operation
//! Hash maps, ids of version 4 and 7, jitter and `SystemTime::now` all end in these two functions. The executable's own
//! definition comes before that of the C library, also for those who look it up at run time.
#![allow(unsafe_code, reason = "defining a function of the C library is unsafe; nothing else here is")]

use std::cell::Cell;

use tokio::time::Instant;

/// 2026-01-01, in nanoseconds since 1970: when every history begins.
const BEGIN_NS: i128 = 1_767_225_600_000_000_000;

/// The wall clock of the process that runs now.
#[derive(Clone, Copy)]
pub(crate) struct Wall {
    /// The process's own clock when it was started.
    pub(crate) start: Instant,
    /// What its wall clock showed then, in nanoseconds since the history began.
    pub(crate) at_start_ns: i128,
}

thread_local! {
    static STATE: Cell<Option<u64>> = const { Cell::new(None) };
    static WALL: Cell<Option<Wall>> = const { Cell::new(None) };
}

/// From now on this thread's randomness comes from the seed and its clocks stand still but for [`set_wall`].
pub(crate) fn begin(seed: u64) {
    STATE.set(Some(seed));
    WALL.set(None);
}

/// Which process's wall clock is asked now.
pub(crate) fn set_wall(wall: Option<Wall>) {
    WALL.set(wall);
}

/// The next number of this thread (splitmix64); `None` on a thread that does not simulate.
fn draw() -> Option<u64> {
    let state = STATE.get()?.wrapping_add(0x9e37_79b9_7f4a_7c15);
    STATE.set(Some(state));
    let mut z = state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    Some(z ^ (z >> 31))
}

/// As getrandom(2).
///
/// # Safety
/// `buffer` has room for `length` bytes.
#[unsafe(no_mangle)]
#[allow(unreachable_pub, reason = "the linker reaches it")]
pub unsafe extern "C" fn getrandom(buffer: *mut libc::c_void, length: usize, flags: libc::c_uint) -> isize {
    if STATE.get().is_none() {
        // SAFETY: the caller's promise is the kernel's condition.
        let written = unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) };
        return written as isize;
    }
    if length > 0 {
        // SAFETY: the caller promises that there is room for so many bytes.
        let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
        for chunk in bytes.chunks_mut(8) {
            let drawn = draw().unwrap_or_default().to_le_bytes();
            chunk.copy_from_slice(&drawn[..chunk.len()]);
        }
    }
    length as isize
}

/// As clock_gettime(2).
///
/// # Safety
/// `time` can be written.
#[unsafe(no_mangle)]
#[allow(unreachable_pub, reason = "the linker reaches it")]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    let simulates = STATE.get().is_some();
    let is_ours = clock == libc::CLOCK_REALTIME || clock == libc::CLOCK_MONOTONIC;
    if !simulates || !is_ours {
        // SAFETY: the caller's promise is the kernel's condition.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) } as libc::c_int;
    }
    let mut now_ns = BEGIN_NS;
    // The monotonic clock stands still: tokio's paused one does not ask it, and nothing else may depend on it.
    if clock == libc::CLOCK_REALTIME
        && let Some(wall) = WALL.get()
        && tokio::runtime::Handle::try_current().is_ok()
    {
        now_ns += wall.at_start_ns + wall.start.elapsed().as_nanos() as i128;
    }
    // SAFETY: the caller promises that it can be written.
    unsafe {
        (*time).tv_sec = (now_ns / 1_000_000_000) as libc::time_t;
        (*time).tv_nsec = (now_ns % 1_000_000_000) as libc::c_long;
    }
    0
}
