//! What the fixed rules say of every group, remembered for each shape of ask.
//!
//! # Theory of operation
//! The shape of an ask is what the fixed rules look at: type, image, region, zone, selector, tolerations, and the node
//! asked for. Not the amounts: those are looked up in the lattices. What a rule said of a group holds for good, so an
//! entry is brought up to date by judging the groups that were born since; and as long as no class of node comes that was
//! not there before, that is none.
//!
//! # Invariants
//! - An entry that was resolved has a verdict on every group, equal to what [`Class::judge`] says of it now.
//! - There are at most [`MAX_SHAPES`] entries, and fewer if there are many groups; the one used the longest ago goes first.
//!
//! [`Class::judge`]: crate::groups::Class::judge

use std::collections::HashMap;
use std::sync::Arc;

use hv_types::InstanceType;
use hv_types::placement::PlacementRules;

use crate::ask::Ask;
use crate::groups::{Fixed, Groups};
use crate::hash::Keyed;

/// Most shapes that are remembered.
pub(crate) const MAX_SHAPES: usize = 512;
/// Most verdicts that are remembered, over all shapes; a shape is remembered in any case.
const MAX_VERDICTS: usize = 4 << 20;

/// The verdicts for one shape.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    hash: u64,
    instance_type: InstanceType,
    image: Arc<str>,
    rules: Arc<PlacementRules>,
    /// By group.
    pub(crate) fixed: Vec<Fixed>,
    /// The groups that no fixed rule rejects.
    pub(crate) open: Vec<u32>,
    /// By group: whether it is among the open ones.
    listed: Vec<bool>,
    /// How many births of groups it knows of.
    seen: u64,
    used: u64,
}

/// The shapes that were asked for lately.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shapes {
    entries: Vec<Entry>,
    by_hash: HashMap<u64, u32, Keyed>,
    clock: u64,
}

impl Shapes {
    /// The entry of the ask's shape, up to date.
    pub(crate) fn resolve(&mut self, ask: &Ask, groups: &Groups) -> &Entry {
        self.clock += 1;
        let known = self.by_hash.get(&ask.shape_hash()).map(|&at| at as usize);
        let at = match known {
            Some(at) if self.entries[at].is_of(ask) => at,
            // Another shape with the same hash: it gives way.
            Some(at) => {
                self.entries[at] = Entry::of(ask);
                at
            }
            None => self.add(ask, groups.slots.len()),
        };
        let entry = &mut self.entries[at];
        entry.used = self.clock;
        entry.catch_up(ask, groups);
        entry
    }

    /// How many shapes are remembered.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    fn add(&mut self, ask: &Ask, groups: usize) -> usize {
        let room = (MAX_VERDICTS / groups.max(1)).clamp(1, MAX_SHAPES);
        while self.entries.len() >= room {
            let oldest = (0..self.entries.len()).min_by_key(|&at| self.entries[at].used);
            let Some(oldest) = oldest else { break };
            let gone = self.entries.swap_remove(oldest);
            self.by_hash.remove(&gone.hash);
            if let Some(moved) = self.entries.get(oldest) {
                self.by_hash.insert(moved.hash, oldest as u32);
            }
        }
        self.entries.push(Entry::of(ask));
        let at = self.entries.len() - 1;
        self.by_hash.insert(ask.shape_hash(), at as u32);
        at
    }
}

impl Entry {
    fn of(ask: &Ask) -> Self {
        Self {
            hash: ask.shape_hash(),
            instance_type: ask.instance_type(),
            image: ask.image_name().clone(),
            rules: ask.placement().clone(),
            fixed: Vec::new(),
            open: Vec::new(),
            listed: Vec::new(),
            seen: 0,
            used: 0,
        }
    }

    fn is_of(&self, ask: &Ask) -> bool {
        let (ours, theirs) = (&self.rules, ask.placement());
        let same_rules = || {
            ours.region == theirs.region
                && ours.zone == theirs.zone
                && ours.preferred_node == theirs.preferred_node
                && ours.node_selector == theirs.node_selector
                && ours.tolerations == theirs.tolerations
        };
        self.instance_type == ask.instance_type()
            && *self.image == *ask.image()
            && (Arc::ptr_eq(ours, theirs) || same_rules())
    }

    fn catch_up(&mut self, ask: &Ask, groups: &Groups) {
        let (missed, now) = groups.births(self.seen);
        if now == self.seen {
            return;
        }
        self.seen = now;
        self.fixed.resize(groups.slots.len(), Fixed::default());
        self.listed.resize(groups.slots.len(), false);
        let mut closed = false;
        match missed {
            Some(born) => {
                for &group in born {
                    closed |= self.judge(ask, groups, group);
                }
            }
            None => {
                for group in 0..groups.slots.len() {
                    closed |= self.judge(ask, groups, group as u32);
                }
            }
        }
        if closed {
            let listed = &self.listed;
            self.open.retain(|group| listed[*group as usize]);
        }
    }

    /// Whether the group has to go from the list of the open ones.
    fn judge(&mut self, ask: &Ask, groups: &Groups, group: u32) -> bool {
        let at = group as usize;
        let fixed = groups.slots[at].class.judge(ask);
        self.fixed[at] = fixed;
        let listed = std::mem::replace(&mut self.listed[at], fixed.verdict.fits());
        if !listed && fixed.verdict.fits() {
            self.open.push(group);
        }
        listed && !fixed.verdict.fits()
    }
}
