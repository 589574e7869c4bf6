//! A hasher for the fleet's own tables: fast for the short names and numbers that they are looked up by.
//!
//! Multiply and fold, as in many hash tables: not for secrets. Tables whose keys users choose are keyed by chance, once for
//! the process. Tables that are walked over are not, so that a history that is repeated repeats its results.

use std::hash::{BuildHasher, BuildHasherDefault, Hasher, RandomState};
use std::sync::LazyLock;

/// The fractional part of the golden ratio: odd, and without a pattern.
const MULTIPLIER: u64 = 0x9E37_79B9_7F4A_7C15;

/// The key of this process.
static KEY: LazyLock<[u64; 2]> = LazyLock::new(|| {
    let random = RandomState::new();
    [random.hash_one(1), random.hash_one(2) | 1]
});

/// The state of a hash.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fold {
    state: u64,
    multiplier: u64,
}

impl Default for Fold {
    fn default() -> Self {
        Self { state: 0, multiplier: MULTIPLIER }
    }
}

impl Fold {
    fn mix(&mut self, word: u64) {
        let product = u128::from(self.state ^ word) * u128::from(self.multiplier);
        self.state = (product as u64) ^ ((product >> 64) as u64).wrapping_add(MULTIPLIER);
    }
}

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        let mut last = *self;
        last.mix(MULTIPLIER);
        last.state
    }

    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|word| self.mix(u64::from_le_bytes(*word)));
        if !rest.is_empty() {
            let mut word = [0; 8];
            word[..rest.len()].copy_from_slice(rest);
            self.mix(u64::from_le_bytes(word));
        }
        self.mix(bytes.len() as u64);
    }

    fn write_u8(&mut self, number: u8) {
        self.mix(u64::from(number));
    }

    fn write_u32(&mut self, number: u32) {
        self.mix(u64::from(number));
    }

    fn write_u64(&mut self, number: u64) {
        self.mix(number);
    }

    fn write_usize(&mut self, number: usize) {
        self.mix(number as u64);
    }
}

/// Hashes with the key of this process.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Keyed;

impl BuildHasher for Keyed {
    type Hasher = Fold;

    fn build_hasher(&self) -> Fold {
        let [state, multiplier] = *KEY;
        Fold { state, multiplier }
    }
}

/// Hashes always alike.
pub(crate) type Fixed = BuildHasherDefault<Fold>;
