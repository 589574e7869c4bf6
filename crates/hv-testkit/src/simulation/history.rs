//! What happened: a hash of all of it, the last of it as text, and the first breach of an invariant.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

/// How many lines are kept.
const TAIL: usize = 120;

struct Inner {
    hash: u64,
    events: u64,
    now: Duration,
    tail: VecDeque<String>,
    violation: Option<Violation>,
    prints: bool,
}

/// A broken invariant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which: 1 to 7, as the design numbers them.
    pub invariant: u8,
    /// What was seen.
    pub what: String,
}

/// What happened in one run. Clones share it.
#[derive(Clone)]
pub(crate) struct History(Arc<Mutex<Inner>>);

impl History {
    pub(crate) fn new(prints: bool) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            hash: 0xcbf2_9ce4_8422_2325,
            events: 0,
            now: Duration::ZERO,
            tail: VecDeque::new(),
            violation: None,
            prints,
        })))
    }

    pub(crate) fn set_now(&self, now: Duration) {
        self.0.lock().now = now;
    }

    pub(crate) fn note(&self, what: fmt::Arguments<'_>) {
        let mut inner = self.0.lock();
        let line = format!("{:9.3} {what}", inner.now.as_secs_f64());
        for byte in line.bytes() {
            inner.hash = (inner.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        inner.events += 1;
        if inner.prints {
            println!("{line}");
        }
        if inner.tail.len() == TAIL {
            inner.tail.pop_front();
        }
        inner.tail.push_back(line);
    }

    pub(crate) fn violation(&self, invariant: u8, what: fmt::Arguments<'_>) {
        self.note(format_args!("INVARIANT {invariant} IS BROKEN: {what}"));
        let mut inner = self.0.lock();
        if inner.violation.is_none() {
            inner.violation = Some(Violation { invariant, what: what.to_string() });
        }
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.0.lock().violation.is_some()
    }

    pub(crate) fn end(&self) -> (u64, u64, Option<Violation>, Vec<String>) {
        let inner = self.0.lock();
        (inner.hash, inner.events, inner.violation.clone(), inner.tail.iter().cloned().collect())
    }
}
