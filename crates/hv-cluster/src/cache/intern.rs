//! Shares equal parts of records: a fleet has few shapes, and each is kept once.
//!
//! # Invariants
//! The interner keeps nothing alive. It has at most [`CAPACITY`] entries; beyond that, new values are kept unshared.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Arc, Weak};

/// Most values that are offered for sharing.
const CAPACITY: usize = 65_536;
/// Fewest entries at which it is worth looking for dead ones.
const LEAST_SWEPT: usize = 1024;

/// Values by their content.
pub(super) struct Interner<T> {
    known: HashMap<u64, Weak<T>>,
    hasher: RandomState,
    /// How many entries there may be before the dead ones are looked for.
    sweep_at: usize,
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self { known: HashMap::new(), hasher: RandomState::new(), sweep_at: LEAST_SWEPT }
    }
}

impl<T: Eq + Hash> Interner<T> {
    /// The value that is shared by all who have an equal one.
    pub(super) fn share(&mut self, value: Arc<T>) -> Arc<T> {
        let hash = self.hasher.hash_one(&*value);
        if let Some(known) = self.known.get(&hash).and_then(Weak::upgrade) {
            // Unequal values of one hash are rare enough to be left unshared.
            return if *known == *value { known } else { value };
        }
        if self.known.len() >= self.sweep_at {
            self.sweep();
        }
        if self.known.len() < CAPACITY {
            self.known.insert(hash, Arc::downgrade(&value));
        }
        value
    }

    /// Forgets what nobody has any more, and, where that is not enough, what only one has.
    fn sweep(&mut self) {
        self.known.retain(|_, value| value.strong_count() > 0);
        if self.known.len() >= CAPACITY / 2 {
            self.known.retain(|_, value| value.strong_count() > 1);
        }
        self.sweep_at = (self.known.len() * 2).clamp(LEAST_SWEPT, CAPACITY);
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.known.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_one_and_dead_ones_are_forgotten() {
        let mut interner = Interner::default();
        let first = interner.share(Arc::new("a".to_owned()));
        let second = interner.share(Arc::new("a".to_owned()));
        assert!(Arc::ptr_eq(&first, &second));
        for n in 0..100_000 {
            interner.share(Arc::new(n.to_string()));
        }
        assert!(interner.len() <= LEAST_SWEPT, "{} dead entries are kept", interner.len());
        assert!(Arc::ptr_eq(&first, &interner.share(Arc::new("a".to_owned()))));
    }

    #[test]
    fn values_that_nobody_shares_do_not_push_out_those_that_are_shared() {
        let mut interner = Interner::default();
        let (shared, also) = (interner.share(Arc::new(usize::MAX)), interner.share(Arc::new(usize::MAX)));
        let unique: Vec<_> = (0..200_000).map(|n| interner.share(Arc::new(n))).collect();
        assert!(interner.len() <= CAPACITY);
        assert!(Arc::ptr_eq(&shared, &interner.share(Arc::new(usize::MAX))));
        drop((unique, also));
    }
}
