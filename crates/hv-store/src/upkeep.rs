//! What keeps a store from growing: compaction as time passes, and defragmentation where it gives much room back.
//!
//! # Theory of operation
//! One program of a cluster runs [`run`], the leader. Every [`Upkeep::every`] it notes the store's revision and compacts
//! to the one it noted [`Upkeep::keep_for`] ago, so that readers of old revisions and watches that resume have that long.
//! A new leader has noted nothing yet: it compacts for the first time after [`Upkeep::keep_for`].
//!
//! After that it looks at the room that is free inside the members' files. Where that is much, they are defragmented one
//! after the other. An embedded store is not, as nobody is answered meanwhile and its free pages are used again; only
//! where it has refused writes for lack of room.
//!
//! A store that refuses writes is compacted to what was noted last, without waiting, and defragmented if that frees
//! anything worth while.
//!
//! # Failure and recovery
//! Whatever fails is logged and tried again at the next turn. Nothing is remembered across restarts.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::{Result, Revision, SharedStore, StoreStatus};

/// A defragmentation that helped little is not repeated sooner.
const DEFRAGMENT_PAUSE: Duration = Duration::from_secs(600);
/// The same where the store refuses writes.
const PRESSED_PAUSE: Duration = Duration::from_secs(30);
/// How many revisions are noted at most; older ones go first.
const MAX_NOTED: usize = 4096;

/// What is kept, and when room is given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upkeep {
    /// How long superseded values can be read.
    pub keep_for: Duration,
    /// How often the store is looked at. Together with `keep_for` it says how exact that is.
    pub every: Duration,
    /// Members are defragmented where more than this share of their file is free, in percent,
    pub free_percent: u64,
    /// and more than this, in bytes.
    pub free_bytes: u64,
}

impl Default for Upkeep {
    fn default() -> Self {
        Self {
            keep_for: Duration::from_secs(600),
            every: Duration::from_secs(60),
            free_percent: 50,
            free_bytes: 64 << 20,
        }
    }
}

/// Which revision was the store's at which time.
#[derive(Debug, Default)]
pub struct Noted {
    /// In the order of time.
    at: VecDeque<(Instant, Revision)>,
    compacted: Revision,
}

impl Noted {
    /// The store was at `revision`.
    pub fn note(&mut self, now: Instant, revision: Revision) {
        if self.at.len() == MAX_NOTED {
            self.at.pop_front();
        }
        self.at.push_back((now, revision));
    }

    /// The revision to compact to: the newest that was noted at least `keep_for` ago. `None` where there is none, or
    /// none after the last one that this returned.
    pub fn compact_to(&mut self, now: Instant, keep_for: Duration) -> Option<Revision> {
        let mut due = None;
        while let Some((_, revision)) = self.at.front().filter(|(at, _)| *at + keep_for <= now) {
            due = Some(*revision);
            self.at.pop_front();
        }
        let due = due.filter(|revision| *revision > self.compacted)?;
        self.compacted = due;
        Some(due)
    }
}

impl Upkeep {
    /// Whether defragmenting is worth that members answer nobody meanwhile.
    #[must_use]
    pub fn should_defragment(&self, status: &StoreStatus) -> bool {
        let free_bytes = status.size_bytes.saturating_sub(status.used_bytes);
        let free_percent = free_bytes * 100 / status.size_bytes.max(1);
        if status.is_full {
            // A store that is full of what is in use gains nothing.
            return free_percent >= 10;
        }
        status.backend != "embedded" && free_percent > self.free_percent && free_bytes > self.free_bytes
    }
}

/// Looks after `store` until `stop` ends.
pub async fn run(store: SharedStore, upkeep: Upkeep, stop: impl Future<Output = ()>) {
    let looking_after = async {
        let mut noted = Noted::default();
        let mut defragmented = None;
        let mut next = Instant::now();
        loop {
            if let Err(error) = turn(&store, &upkeep, &mut noted, &mut defragmented).await {
                tracing::warn!(%error, "the upkeep of the store failed; it is tried again");
            }
            next = (next + upkeep.every).max(Instant::now());
            sleep_until(next).await;
        }
    };
    tokio::select! {
        () = looking_after => {}
        () = stop => {}
    }
}

async fn turn(
    store: &SharedStore,
    upkeep: &Upkeep,
    noted: &mut Noted,
    defragmented: &mut Option<Instant>,
) -> Result<()> {
    let revision = store.revision().await?;
    noted.note(Instant::now(), revision);
    let status = store.status().await?;
    let keep_for = if status.is_full { Duration::ZERO } else { upkeep.keep_for };
    if let Some(to) = noted.compact_to(Instant::now(), keep_for) {
        store.compact(to).await?;
        tracing::debug!(%to, "compacted the store");
    }
    if !upkeep.should_defragment(&status) {
        return Ok(());
    }
    let pause = if status.is_full { PRESSED_PAUSE } else { DEFRAGMENT_PAUSE };
    if defragmented.is_some_and(|last| last.elapsed() < pause) {
        return Ok(());
    }
    *defragmented = Some(Instant::now());
    store.defragment(&|step| tracing::info!(done = step.done, total = step.total, "{}", step.message)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: Duration = Duration::from_secs(600);
    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn what_is_younger_than_asked_is_never_compacted() {
        let (mut noted, start) = (Noted::default(), Instant::now());
        for minute in 0..30 {
            let now = start + MINUTE * minute;
            noted.note(now, Revision(u64::from(minute) * 100 + 1));
            let expected = (minute >= 10).then(|| Revision(u64::from(minute - 10) * 100 + 1));
            assert_eq!(noted.compact_to(now, KEEP), expected, "minute {minute}");
        }
    }

    #[test]
    fn a_store_that_stands_still_is_not_compacted_again() {
        let (mut noted, start) = (Noted::default(), Instant::now());
        noted.note(start, Revision(5));
        noted.note(start + MINUTE, Revision(5));
        assert_eq!(noted.compact_to(start + KEEP, KEEP), Some(Revision(5)));
        assert_eq!(noted.compact_to(start + KEEP + MINUTE, KEEP), None);
    }

    #[test]
    fn after_a_long_pause_the_newest_that_is_due_counts() {
        let (mut noted, start) = (Noted::default(), Instant::now());
        noted.note(start, Revision(5));
        noted.note(start + MINUTE, Revision(9));
        assert_eq!(noted.compact_to(start + KEEP * 3, KEEP), Some(Revision(9)));
    }

    #[test]
    fn defragmenting_needs_much_room_to_gain() {
        let mib = |size: u64, used: u64, backend: &'static str, is_full: bool| StoreStatus {
            backend,
            revision: Revision(1),
            oldest: None,
            size_bytes: size << 20,
            used_bytes: used << 20,
            quota_bytes: None,
            is_full,
            members: Vec::new(),
            warnings: Vec::new(),
        };
        let cases = [
            (mib(200, 50, "etcd", false), true, "150 MiB of 200"),
            (mib(200, 110, "etcd", false), false, "less than half"),
            (mib(100, 40, "etcd", false), false, "less than 64 MiB"),
            (mib(0, 0, "etcd", false), false, "an empty one"),
            (mib(4000, 50, "embedded", false), false, "embedded, and not full"),
            (mib(4000, 50, "embedded", true), true, "embedded and full"),
            (mib(2000, 1700, "etcd", true), true, "full, and 15 % is free"),
            (mib(2000, 1900, "etcd", true), false, "full of what is in use"),
        ];
        for (status, expected, what) in cases {
            assert_eq!(Upkeep::default().should_defragment(&status), expected, "{what}");
        }
    }
}
